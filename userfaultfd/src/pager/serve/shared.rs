//! What the threads of a pager share. Faults meet at none of its locks.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::fs::File;
use std::iter;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use super::backlog::{Backlog, Item};
use super::beside::{Anywhere, Bound};
use crate::mapped_vec::MappedVec;
use crate::owner::{InheritedFd, InheritedFds, Owner, abandon};
use crate::pager::activity::{Activity, Doing, Reads};
use crate::pager::fill::filler::PageFiller;
use crate::pager::fill::retry::{self, Deferred, Put, RetryQueue};
use crate::pager::fill::work::{RetryAfter, Work};
use crate::pager::memory::address_map::{AddressMap, SEGMENT_ROOM, Segments};
use crate::pager::memory::descriptor::{Attachment, Descriptor, LOOK, OUTSIDE, Origin, lock};
use crate::pager::memory::page_state::Room;
use crate::pager::memory::served::ServedRegion;
use crate::pager::prefetch::read_ahead::Ahead;
use crate::pager::reports::Reports;
use crate::pager::stats::Counters;
use crate::pager::{Error, Problem, Result, RetryPolicy, Statistics};
use crate::{Errno, Uffd, mapped_vec, sys};

/// What the threads that serve faults have others do. They don't do it themselves: it takes locks that who waits for a
/// page may hold, the allocator's or those of the program's callback.
#[derive(Debug)]
pub(crate) enum Note {
    /// For the thread that reports.
    Problem(Problem),
    /// For the control thread.
    Fork(Fork),
    /// Something isn't served any more: likewise.
    Ended,
}

/// A process forked, and this is its child's.
#[derive(Debug)]
pub(crate) struct Fork {
    pub(crate) parent: u64,
    pub(crate) uffd: Uffd,
    pub(crate) copy: std::io::Result<Inherited>,
}

/// What a fork's child has of its parent.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// As it was when the process forked, which is the child's.
    pub(crate) layout: AddressMap,
    /// The states of its segments' pages then, one after the other; nothing of those that are shared.
    pub(crate) states: Room,
}

/// Notes for the control thread that it hasn't taken yet. Adding one takes nothing of the allocator's: see `mapped_vec`.
#[derive(Debug)]
struct Notes {
    forks: MappedVec<Fork>,
    /// Room for what a change takes out of a layout.
    gone: Segments,
    ended: bool,
    /// Whether one was taken, and its child isn't served yet.
    adopting: bool,
    stopped: bool,
}

const READ_AHEAD_QUEUE_LEN: usize = 1024;
const FORK_ROOM: usize = 16;

/// The descriptors that are served, by slot.
///
/// Threads that serve faults find descriptors here and close them, while a thread that forks may hold the allocator's
/// locks until its event is read. So nothing is allocated or freed while this is locked, and who closes a descriptor
/// leaves it in its slot: it is taken out by others, once nobody else has it.
#[derive(Debug, Default)]
struct Table {
    slots: Vec<Option<Arc<Descriptor>>>,
    /// How many were ever added.
    count: u64,
    served: usize,
}

/// What an event of the poll is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u64);

impl Token {
    const STOP: Self = Self(u64::MAX);
    /// Something that was put off is due.
    pub(crate) const RETRY: Self = Self(u64::MAX - 1);

    /// The slot in the table, and the number of who is meant there: the slot may be another's since.
    pub(crate) fn of(descriptor: &Descriptor) -> Self {
        Self(u64::from(descriptor.slot) << 32 | descriptor.id & u64::from(u32::MAX))
    }

    pub(crate) fn slot(self) -> usize {
        (self.0 >> 32) as usize
    }

    pub(crate) fn means(self, descriptor: &Descriptor) -> bool {
        self == Self::of(descriptor)
    }
}

/// All regions that were added and not freed yet, so that none ends with a thread that serves faults: to free its source
/// is the program's code. And what is left to be known of those that were.
#[derive(Debug, Default)]
struct Regions {
    all: Vec<Arc<ServedRegion>>,
    present: usize,
    missing: usize,
}

impl Regions {
    /// The pages of a region that are there, and those that are missing.
    fn figures(region: &ServedRegion) -> (usize, usize) {
        let (present, poisoned) = region.pages.present_and_poisoned();
        (present, region.pages.count() - present - poisoned)
    }
}

impl Notes {
    /// Whether a process has forked whose child isn't served yet.
    fn has_forks(&self) -> bool {
        self.adopting || !self.forks.is_empty()
    }
}

/// Whether a background gives way to faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    No,
    /// All that goes on for faults are reads of the sources of other regions. They take CPU, unless they hang.
    Elsewhere(Reads),
    Yes,
}

pub(crate) struct Shared {
    pub(crate) owner: Owner,
    /// The numbers of what is served, for a fork's child.
    inherited: Arc<InheritedFds>,
    pub(crate) retry: RetryPolicy,
    /// How many threads serve faults.
    pub(crate) threads: usize,
    /// How many threads read ahead.
    pub(crate) read_ahead_threads: usize,
    ahead: Mutex<VecDeque<Ahead>>,
    asked: Condvar,
    /// Whether a thread spins, waiting for the next fault. The others sleep.
    spinning: AtomicBool,
    counters: Box<[Counters]>,
    /// What the threads that serve faults have put off.
    pub(crate) retries: RetryQueue,
    /// What the threads that serve faults are doing, then those that read ahead, then workers that were added.
    activities: Box<[Activity]>,
    /// What the workers have taken on and not begun, by their places.
    backlogs: Box<[Mutex<Backlog>]>,
    /// Whether the control thread looks after the workers: whether sources keep them waiting.
    watched: AtomicBool,
    /// Where workers run that aren't bound to a CPU.
    pub(super) anywhere: Anywhere,
    /// Whether they are, by place.
    bound: Box<[Bound]>,
    /// For what isn't done by the threads of the pager.
    leases: Leases,
    table: Mutex<Table>,
    /// Held while one is added.
    adding: Mutex<()>,
    /// How many threads serve faults by now.
    started: Mutex<usize>,
    thread_has_started: Condvar,
    /// A descriptor was added or removed.
    table_changed: Condvar,
    /// Grows with each change of the table.
    version: AtomicU32,
    region_count: AtomicUsize,
    regions: Mutex<Regions>,
    notes: Mutex<Notes>,
    /// The control thread has taken a note.
    note_taken: Condvar,
    /// What the control thread waits for: its bell, and what tells of the ends of processes.
    control_epoll: OwnedFd,
    control_eventfd: OwnedFd,
    pub(crate) reports: Reports,
    problems_lost: AtomicUsize,
    epoll: OwnedFd,
    /// Readable at any time, and looked at once the pager is to stop.
    shutdown_eventfd: OwnedFd,
    stopping: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("threads", &self.threads)
            .field("retry", &self.retry)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new(
        threads: usize,
        read_ahead_threads: usize,
        added: usize,
        retry: RetryPolicy,
    ) -> Result<Self> {
        let (epoll, shutdown_eventfd) = (sys::epoll()?, sys::eventfd(true)?);
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, shutdown_eventfd.as_fd(), 0, Token::STOP.0)?;
        let retries = RetryQueue::new()?;
        let events = libc::EPOLLIN | libc::EPOLLET;
        let timer = retries.timer();
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, timer, events, Token::RETRY.0)?;
        let (control_epoll, control_eventfd) = (sys::epoll()?, sys::eventfd(false)?);
        let (control, token) = (control_eventfd.as_fd(), Token::STOP.0);
        sys::epoll_control(control_epoll.as_fd(), libc::EPOLL_CTL_ADD, control, libc::EPOLLIN, token)?;
        let notes = Notes {
            forks: mapped_vec::try_with_room(FORK_ROOM).ok_or(Errno::ENOMEM)?,
            gone: mapped_vec::try_with_room(SEGMENT_ROOM).ok_or(Errno::ENOMEM)?,
            ended: false,
            adopting: false,
            stopped: false,
        };
        Ok(Self {
            owner: Owner::current()?,
            inherited: Arc::default(),
            retry,
            threads,
            read_ahead_threads,
            ahead: Mutex::new(VecDeque::with_capacity(READ_AHEAD_QUEUE_LEN)),
            asked: Condvar::new(),
            spinning: AtomicBool::new(false),
            counters: (0..threads + read_ahead_threads).map(|_| Counters::new()).collect(),
            retries,
            activities: iter::repeat_with(Activity::idle)
                .take(threads + read_ahead_threads)
                .chain(iter::repeat_with(Activity::missing).take(added))
                .collect(),
            backlogs: iter::repeat_with(|| Mutex::new(Backlog::new()))
                .take(threads + read_ahead_threads + added)
                .collect(),
            watched: AtomicBool::new(false),
            anywhere: Anywhere::default(),
            bound: iter::repeat_with(Bound::new).take(threads + read_ahead_threads + added).collect(),
            leases: Leases::new(),
            table: Mutex::default(),
            adding: Mutex::default(),
            started: Mutex::default(),
            thread_has_started: Condvar::new(),
            table_changed: Condvar::new(),
            version: AtomicU32::new(0),
            region_count: AtomicUsize::new(0),
            regions: Mutex::default(),
            notes: Mutex::new(notes),
            note_taken: Condvar::new(),
            control_epoll,
            control_eventfd,
            reports: Reports::new(),
            problems_lost: AtomicUsize::new(0),
            epoll,
            shutdown_eventfd,
            stopping: AtomicBool::new(false),
        })
    }

    /// Returns an error in any process but the one that made the pager.
    pub(crate) fn check_owner(&self) -> Result<()> {
        if self.owner.is_current() { Ok(()) } else { Err(Error::NotServed) }
    }

    /// In a fork's child, which hasn't got the threads: closes the number of a descriptor that was served, or of all
    /// and of the pager's own. It takes no lock, since another thread may have held that when the process forked.
    #[expect(unsafe_code, reason = "closes what the threads have a share of")]
    pub(crate) fn abandon(self: &Arc<Self>, descriptor: Option<u64>) {
        abandon(self);
        // SAFETY: this is a child, without the threads, and every method of the pager is an error in it. The pager owned
        // the descriptors when the process forked, or else their numbers were forgotten; nothing that owns them is
        // dropped any more.
        unsafe { self.inherited.close(descriptor) };
        if descriptor.is_some() {
            return;
        }
        let own = [&self.epoll, &self.shutdown_eventfd, &self.control_epoll, &self.control_eventfd];
        for fd in own.map(AsFd::as_fd).into_iter().chain([self.retries.timer()]) {
            // SAFETY: as above; they are asked for once, when the pager is dropped.
            unsafe { InheritedFd::new(fd).close() };
        }
    }

    /// A thread that serves faults is on its way to read: it allocates nothing from here on.
    pub(crate) fn thread_started(&self) {
        *lock(&self.started) += 1;
        self.thread_has_started.notify_all();
    }

    /// Waits until all are. One that starts takes locks of the allocator's, which a fork holds until its event is read.
    pub(crate) fn wait_until_started(&self) {
        let waiting = |started: &mut usize| *started < self.threads;
        drop(self.thread_has_started.wait_while(lock(&self.started), waiting));
    }

    /// The counters of a thread, for that thread.
    pub(crate) fn counters(&self, thread: usize) -> &Counters {
        match self.counters.get(thread) {
            Some(counters) => counters,
            None => self.leases.counters(thread - self.counters.len()),
        }
    }

    /// The number by which threads that aren't the pager's look at layouts. They count nothing.
    pub(crate) fn outside_id(&self) -> usize {
        LOOK
    }

    /// A filler for a caller, or for a thread in the background, which has it alone: neither waits for the source or the
    /// callback of another.
    pub(crate) fn lease(&self) -> Lease<'_> {
        let filler = loop {
            if let Some(filler) = self.take_filler() {
                break filler;
            }
            // There is no memory for its counters. Callers wait for that, as faults do.
            thread::sleep(retry::NO_MEMORY);
        };
        Lease { leases: &self.leases, filler }
    }

    /// The same, for a worker. `None`: there is no memory for one more.
    pub(crate) fn take_filler(&self) -> Option<PageFiller> {
        let idle = lock(&self.leases.idle).pop();
        idle.or_else(|| self.leases.make().map(|number| PageFiller::new(self.counters.len() + number)))
    }

    pub(crate) fn new_region_id(&self) -> u64 {
        self.region_count.fetch_add(1, Ordering::Relaxed) as u64
    }

    /// Runs something while no other thread can look at the table.
    #[cfg(test)]
    pub(crate) fn with_table_locked<T>(&self, run: impl FnOnce() -> T) -> T {
        let _table = lock(&self.table);
        run()
    }

    /// Keeps a region until nothing else refers to it.
    pub(crate) fn keep(&self, region: &Arc<ServedRegion>) {
        lock(&self.regions).all.push(Arc::clone(region));
    }

    /// Keeps a region no longer, which was never served.
    pub(crate) fn keep_not(&self, region: &Arc<ServedRegion>) {
        lock(&self.regions).all.retain(|kept| !Arc::ptr_eq(kept, region));
    }

    /// Has the regions freed that nothing refers to any more. Returns whether there are others that aren't served.
    pub(crate) fn sweep(&self) -> bool {
        let (mut freed, served) = (Vec::new(), self.served_regions());
        let mut regions = lock(&self.regions);
        let Regions { all, present, missing } = &mut *regions;
        all.retain(|region| {
            // Nobody makes another reference but by one that there is.
            let is_last = Arc::strong_count(region) == 1;
            if is_last {
                let figures = Regions::figures(region);
                if !region.is_childs {
                    (*present, *missing) = (*present + figures.0, *missing + figures.1);
                }
                freed.push(Arc::clone(region));
            }
            !is_last
        });
        let left = all.iter().any(|region| !served.contains(&region.id));
        drop(regions);
        if !freed.is_empty() {
            self.reports.free(freed);
        }
        left
    }

    /// Begins to serve a descriptor.
    pub(crate) fn add(&self, serving: Attachment, origin: Origin) -> Result<Arc<Descriptor>> {
        let _adding = lock(&self.adding);
        self.reap();
        let uffd = Arc::clone(&serving.uffd);
        let (id, slot, len) = {
            let table = lock(&self.table);
            let len = table.slots.len();
            (table.count, table.slots.iter().position(Option::is_none).unwrap_or(len), len)
        };
        let shards = self.counters.len() + OUTSIDE + 1;
        let inherited = self.inherited.note(uffd.as_fd(), id);
        let descriptor = Descriptor::new((id, slot as u32), serving, (shards, inherited), origin);
        let descriptor = Arc::new(descriptor);
        let more = if slot == len { Vec::with_capacity(2 * len + 8) } else { Vec::new() };
        let before = {
            let mut table = lock(&self.table);
            let before = if slot == len && len == table.slots.capacity() {
                let before = std::mem::replace(&mut table.slots, more);
                table.slots.extend(before.iter().cloned());
                before
            } else {
                more
            };
            if slot == len {
                table.slots.push(None);
            }
            table.slots[slot] = Some(Arc::clone(&descriptor));
            table.count += 1;
            table.served += 1;
            before
        };
        drop(before);
        self.version.fetch_add(1, Ordering::Release);
        self.table_changed.notify_all();
        // An edge for each fault: a thread that was told reads all there is.
        let events = libc::EPOLLIN | libc::EPOLLET;
        let token = Token::of(&descriptor).0;
        match sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_ADD, uffd.as_fd(), events, token) {
            Ok(()) => {
                // To look after its process from now on.
                sys::ring(self.control_eventfd.as_fd());
                Ok(descriptor)
            }
            Err(errno) => {
                drop(self.remove(&descriptor));
                Err(errno.into())
            }
        }
    }

    /// Ends serving a descriptor, and gives back what was served. `None` if somebody did so before.
    pub(crate) fn remove(&self, descriptor: &Arc<Descriptor>) -> Option<Attachment> {
        let serving = descriptor.close()?;
        // Others may hold the same description open. It isn't there if adding it has failed.
        let _deleted =
            sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_DEL, serving.uffd.as_fd(), 0, 0);
        lock(&self.table).served -= 1;
        self.version.fetch_add(1, Ordering::Release);
        self.table_changed.notify_all();
        self.post(Note::Ended);
        Some(serving)
    }

    /// Frees what was served by descriptors that are closed, and takes those out that nobody else has any more. Not for
    /// threads that serve faults.
    pub(crate) fn reap(&self) {
        let next = || {
            let mut table = lock(&self.table);
            table.slots.iter_mut().find_map(|slot| {
                let closed = slot.as_ref().filter(|descriptor| descriptor.is_closed())?;
                let (left, unused) = (closed.take_deferred_drop(), Arc::strong_count(closed) == 1);
                let descriptor = if unused { slot.take() } else { None };
                (left.is_some() || unused).then_some((left, descriptor))
            })
        };
        while let Some(freed) = next() {
            drop(freed);
        }
    }

    /// Has a thread that waits look at a descriptor, if something is there to read.
    pub(crate) fn rearm_epoll(&self, descriptor: &Descriptor, uffd: BorrowedFd<'_>) {
        let events = libc::EPOLLIN | libc::EPOLLET;
        let token = Token::of(descriptor).0;
        let handed = sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_MOD, uffd, events, token);
        // Removed meanwhile, or else it is there.
        debug_assert!(matches!(handed, Ok(()) | Err(crate::Errno::ENOENT)), "{handed:?}");
    }

    /// Waits for something to read. Returns how many tokens there are.
    pub(crate) fn wait(
        &self,
        events: &mut [libc::epoll_event],
        timeout: libc::c_int,
    ) -> Result<usize, crate::Errno> {
        sys::epoll_wait(self.epoll.as_fd(), events, timeout)
    }

    /// What an event is about. `None`: the pager is to stop.
    pub(crate) fn token(event: &libc::epoll_event) -> Option<Token> {
        Some(Token(event.u64)).filter(|token| *token != Token::STOP)
    }

    /// The descriptor in a slot.
    pub(crate) fn in_slot(&self, slot: usize) -> Option<Arc<Descriptor>> {
        lock(&self.table).slots.get(slot)?.clone()
    }

    pub(crate) fn descriptor(&self, id: u64) -> Option<Arc<Descriptor>> {
        self.descriptors().into_iter().find(|descriptor| descriptor.id == id)
    }

    /// The descriptors that are served: none in another process, where the table may be locked for ever.
    pub(crate) fn descriptors(&self) -> Vec<Arc<Descriptor>> {
        let mut descriptors = Vec::new();
        if !self.owner.is_current() {
            return descriptors;
        }
        loop {
            let len = lock(&self.table).slots.len();
            descriptors.reserve(len);
            let table = lock(&self.table);
            if table.slots.len() <= descriptors.capacity() {
                let served = table.slots.iter().flatten().filter(|descriptor| !descriptor.is_closed());
                descriptors.extend(served.cloned());
                return descriptors;
            }
        }
    }

    pub(crate) fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Waits until nothing is served any more.
    pub(crate) fn wait_until_empty(&self) {
        if !self.owner.is_current() {
            return;
        }
        // A fork whose child isn't served yet was noted before its parent could end.
        let some = |table: &mut Table| table.served > 0 || lock(&self.notes).has_forks();
        drop(self.table_changed.wait_while(lock(&self.table), some));
    }

    /// Leaves what was served by a descriptor to the control thread, to free it.
    pub(crate) fn leave(&self, descriptor: &Descriptor, serving: Attachment) {
        descriptor.defer_drop(serving);
        self.post(Note::Ended);
    }

    /// Ends serving a descriptor whose process has gone.
    pub(crate) fn retire(&self, descriptor: &Arc<Descriptor>) {
        if let Some(serving) = self.remove(descriptor) {
            self.leave(descriptor, serving);
            let descriptor = crate::pager::DescriptorId(descriptor.id);
            self.post(Note::Problem(Problem::TargetGone { descriptor }));
        }
    }

    /// Has another thread do something.
    pub(crate) fn post(&self, note: Note) {
        match note {
            Note::Problem(problem) => {
                if !self.reports.post(problem) {
                    self.problems_lost.fetch_add(1, Ordering::Relaxed);
                }
                return;
            }
            Note::Fork(fork) => {
                let mut notes = lock(&self.notes);
                mapped_vec::reserve(&mut notes.forks, 1);
                notes.forks.push(fork);
            }
            Note::Ended => lock(&self.notes).ended = true,
        }
        sys::ring(self.control_eventfd.as_fd());
    }

    /// Drops what a change takes out of a layout. That frees nothing: see [`Regions`].
    pub(crate) fn defer_free(&self, change: impl FnOnce(&mut Segments)) {
        let mut notes = lock(&self.notes);
        change(&mut notes.gone);
        let some = !notes.gone.is_empty();
        notes.gone.clear();
        drop(notes);
        if some {
            self.post(Note::Ended);
        }
    }

    /// The regions of which any part is served.
    fn served_regions(&self) -> HashSet<u64> {
        let mut served = HashSet::new();
        for descriptor in self.descriptors() {
            let (segments, holes) =
                (descriptor.segments(self.outside_id(), None), descriptor.holes(self.outside_id(), None));
            served.extend(segments.iter().chain(&holes).map(|part| part.region.id));
        }
        served
    }

    /// The next note for the control thread, which has done what the one before asked for. `Err` once the pager has
    /// stopped and nothing is left.
    pub(crate) fn next_note(&self) -> Result<Option<Note>, Stopped> {
        let mut notes = lock(&self.notes);
        let adopted = std::mem::take(&mut notes.adopting);
        let fork = (!notes.forks.is_empty()).then(|| Note::Fork(notes.forks.remove(0)));
        notes.adopting = fork.is_some();
        let note = fork.or_else(|| std::mem::take(&mut notes.ended).then_some(Note::Ended));
        let stopped = notes.stopped;
        drop(notes);
        self.note_taken.notify_all();
        if adopted {
            // Who waits for the last descriptor looks at this, too.
            drop(lock(&self.table));
            self.table_changed.notify_all();
        }
        if note.is_none() && stopped { Err(Stopped) } else { Ok(note) }
    }

    /// Waits until there are notes, or something tells of the end of a process. Returns how many tokens there are.
    pub(crate) fn wait_for_notes(
        &self,
        events: &mut [libc::epoll_event],
        timeout: Option<Duration>,
    ) -> usize {
        // Rounded up: too early is once more for nothing.
        let millis = |time: Duration| time.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX);
        let timeout = timeout.map_or(-1, millis);
        let ready = sys::epoll_wait(self.control_epoll.as_fd(), events, timeout)
            .unwrap_or_else(|errno| unreachable!("waiting for notes: {errno}"));
        if events[..ready].iter().any(|event| Self::token(event).is_none()) {
            // Whether it rang is all that matters.
            let _count = sys::read(self.control_eventfd.as_fd(), &mut [0; 8]);
        }
        ready
    }

    /// Has the control thread look after a process as soon as something can be read from `end`, or it is closed.
    pub(crate) fn watch(&self, descriptor: &Descriptor, end: OwnedFd) -> Result<()> {
        let end = File::from(end);
        let kind = end.metadata()?.file_type();
        // What is sent over a socket or a pipe tells nothing.
        let events = match () {
            () if kind.is_socket() => libc::EPOLLRDHUP,
            () if kind.is_fifo() => 0,
            () => libc::EPOLLIN,
        };
        let (epoll, token) = (self.control_epoll.as_fd(), Token::of(descriptor).0);
        sys::epoll_control(epoll, libc::EPOLL_CTL_ADD, end.as_fd(), events | libc::EPOLLONESHOT, token)?;
        let noted = self.inherited.note(end.as_fd(), descriptor.id);
        lock(&descriptor.ends).push((noted, end.into()));
        Ok(())
    }

    /// Waits until the children of all forks that were read are served.
    pub(crate) fn wait_for_forks(&self) {
        drop(self.note_taken.wait_while(lock(&self.notes), |notes| notes.has_forks()));
    }

    /// Has the control thread end when nothing is left.
    pub(crate) fn stop_notes(&self) {
        lock(&self.notes).stopped = true;
        sys::ring(self.control_eventfd.as_fd());
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// A thread begins to answer faults, or to read ahead for them; or it has ended.
    pub(crate) fn set_at_work(&self, place: usize, at_work: bool) {
        self.activities[place].set_at_work(at_work);
    }

    /// A thread begins to read the source of a region.
    pub(crate) fn set_reading(&self, place: usize, region: u64, is_slow: bool) {
        self.activities[place].set_reading(region, is_slow);
        let is_worker = !(self.threads..self.threads + self.read_ahead_threads).contains(&place);
        if is_worker && (self.threads > 1 || self.can_add_workers()) {
            // Pairs with the fence of `end_watching`: either it is seen here that nothing is watched, or there that
            // this thread reads.
            fence(Ordering::SeqCst);
            if !self.watched.load(Ordering::Relaxed) && !self.watched.swap(true, Ordering::Relaxed) {
                sys::ring(self.control_eventfd.as_fd());
            }
        }
    }

    /// Whether there is room for more workers than there are from the start.
    pub(crate) fn can_add_workers(&self) -> bool {
        self.activities.len() > self.threads + self.read_ahead_threads
    }

    fn places(&self) -> &[Activity] {
        &self.activities[self.threads + self.read_ahead_threads..]
    }

    /// What the workers are doing, each with its place, and the places for more.
    pub(crate) fn workers(&self) -> impl Iterator<Item = (usize, Doing)> {
        let places = (0..self.threads).chain(self.threads + self.read_ahead_threads..self.activities.len());
        places.map(|place| (place, self.activities[place].look()))
    }

    /// Whether the control thread looks after the workers.
    pub(crate) fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// The control thread looks after the workers no more, unless one reads a source: the next one that does rings.
    /// Returns whether it is so.
    pub(crate) fn end_watching(&self) -> bool {
        self.watched.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let none = !self.workers().any(|(_, doing)| doing.is_reading());
        self.watched.fetch_or(!none, Ordering::Relaxed);
        none
    }

    /// Whether all workers but one are in a source.
    pub(crate) fn all_others_are_reading(&self, place: usize) -> bool {
        self.workers().all(|(other, doing)| other == place || doing.is_missing() || doing.is_reading())
    }

    /// What the worker at a place has taken on and not begun.
    pub(crate) fn backlog(&self, place: usize) -> &Mutex<Backlog> {
        &self.backlogs[place]
    }

    /// Has others do what the worker at a place has taken on and not begun. Returns whether there was something.
    pub(crate) fn empty_backlog(&self, place: usize) -> bool {
        let mut any = false;
        while let Some(item) = { lock(&self.backlogs[place]).take_any() } {
            any = true;
            let find = |token: Token| self.in_slot(token.slot()).filter(|descriptor| token.means(descriptor));
            match item {
                Item::Event(Token::RETRY) => self.retries.look(),
                Item::Event(token) => {
                    let Some(descriptor) = find(token) else { continue };
                    if let Some(serving) = &*descriptor.lock_shard(self.outside_id()) {
                        self.rearm_epoll(&descriptor, serving.uffd.as_fd());
                    }
                }
                Item::Fault(token, fault) => {
                    // Who waits for one that is closed has been woken.
                    let Some(descriptor) = find(token) else { continue };
                    self.put_off(Deferred::new(
                        &descriptor,
                        Work::Fault(fault),
                        RetryAfter::Delay(Duration::ZERO),
                        None,
                    ));
                }
                Item::Deferred(deferred) => self.put_off(deferred),
            }
        }
        any
    }

    /// Puts work off that isn't the calling thread's. Where there is no room it is given up, so that it comes back.
    fn put_off(&self, deferred: Deferred) {
        let joined = matches!(&deferred.work, Work::Fault(fault) if !fault.joined);
        match self.retries.put(deferred) {
            Put::Entered => {}
            Put::Merged => self.counters(self.lease().thread).duplicates.add(joined.into()),
            Put::NoRoom(Deferred { descriptor, work, .. }) => self.lease().give_up(&descriptor, work),
        }
    }

    /// Whether there is something to read, on any descriptor.
    pub(crate) fn has_events(&self) -> bool {
        sys::is_readable(self.epoll.as_fd())
    }

    /// Takes a place for a worker to be added, if there is one.
    pub(crate) fn take_place(&self) -> Option<usize> {
        let place = self.places().iter().position(|place| place.look().is_missing())?;
        let place = self.threads + self.read_ahead_threads + place;
        self.set_at_work(place, false);
        Some(place)
    }

    /// Ends a worker that was added, with its place and the number of its filler.
    pub(crate) fn end_worker(&self, place: usize, number: usize) {
        lock(&self.leases.idle).push(PageFiller::new(number));
        self.bound(place).end();
        self.free_place(place);
    }

    /// Gives up a place for a worker to be added.
    pub(crate) fn free_place(&self, place: usize) {
        self.activities[place].set_missing();
    }

    /// Whether no worker has a place, or one that is about to end.
    pub(crate) fn is_free(&self, place: usize) -> bool {
        self.activities[place].look().is_missing()
    }

    /// Whether a worker resolves faults.
    pub(super) fn is_at_work(&self, place: usize) -> bool {
        let doing = self.activities[place].look();
        doing.is_at_work() || doing.is_reading()
    }

    /// Whether a worker is bound to a CPU.
    pub(super) fn bound(&self, place: usize) -> &Bound {
        &self.bound[place]
    }

    /// How many places for workers there are, with those of threads that read ahead.
    pub(super) fn place_count(&self) -> usize {
        self.activities.len()
    }

    /// Binds the calling worker to a CPU.
    pub(super) fn bind(&self, place: usize, cpu: usize) {
        if self.anywhere.bind(self.bound(place), cpu) {
            sys::ring(self.control_eventfd.as_fd());
        }
    }

    /// Returns what faults keep the threads busy with, for a background of a region.
    pub(crate) fn busy(&self, region: u64) -> Busy {
        let mut reads = None;
        for doing in self.activities.iter().map(Activity::look) {
            if doing.is_at_work() || doing.is_reading_of(region) {
                return Busy::Yes;
            }
            // What is known to be slow takes no CPU.
            if doing.is_reading() && !doing.is_reading_slowly() {
                reads.get_or_insert_with(Reads::default).add(doing);
            }
        }
        if self.has_events() {
            if !self.all_others_are_reading(usize::MAX) {
                return Busy::Yes;
            }
            // No thread is free for these faults, which wait for the reads.
            reads.get_or_insert_default();
        }
        reads.map_or(Busy::No, Busy::Elsewhere)
    }

    /// Begins to spin, if no other thread does.
    pub(crate) fn start_spinning(&self) -> Result<(), AlreadySpinning> {
        let started = self.spinning.compare_exchange(false, true, Ordering::Relaxed, Ordering::Relaxed);
        started.map(drop).map_err(|_| AlreadySpinning)
    }

    pub(crate) fn end_spinning(&self) {
        self.spinning.store(false, Ordering::Relaxed);
    }

    /// Asks the threads that read ahead for something. When they are asked for too much, the newest is left out.
    pub(crate) fn enqueue_read_ahead(&self, ahead: Ahead) {
        let mut asked = lock(&self.ahead);
        if asked.len() < READ_AHEAD_QUEUE_LEN {
            asked.push_back(ahead);
            drop(asked);
            self.asked.notify_one();
        }
    }

    /// Waits for something to read ahead. `None`: the pager is to stop.
    pub(crate) fn next_ahead(&self) -> Option<Ahead> {
        let nothing = |asked: &mut VecDeque<Ahead>| asked.is_empty() && !self.is_stopping();
        let asked = self.asked.wait_while(lock(&self.ahead), nothing);
        let mut asked = asked.unwrap_or_else(PoisonError::into_inner);
        if self.is_stopping() { None } else { asked.pop_front() }
    }

    /// Has the threads that serve faults and read ahead end.
    pub(crate) fn stop(&self) {
        {
            let mut asked = lock(&self.ahead);
            self.stopping.store(true, Ordering::Release);
            asked.clear();
        }
        self.asked.notify_all();
        let (epoll, shutdown_eventfd) = (self.epoll.as_fd(), self.shutdown_eventfd.as_fd());
        sys::epoll_control(epoll, libc::EPOLL_CTL_MOD, shutdown_eventfd, libc::EPOLLIN, Token::STOP.0)
            .unwrap_or_else(|errno| {
                unreachable!("descriptor {} is polled: {errno}", shutdown_eventfd.as_raw_fd())
            });
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let all = self.counters.iter().chain(self.leases.all_counters());
        let mut sum: Statistics = all.map(Counters::snapshot).sum();
        sum.problems_lost += self.problems_lost.load(Ordering::Relaxed) as u64;
        if self.owner.is_current() {
            let regions = lock(&self.regions);
            let figures = regions.all.iter().map(|region| Regions::figures(region));
            let ended = (regions.present, regions.missing);
            let (present, missing) = figures.fold(ended, |sum, one| (sum.0 + one.0, sum.1 + one.1));
            (sum.present_pages, sum.missing_pages) = (present as u64, missing as u64);
        }
        sum
    }
}

/// Fillers for threads that aren't the pager's: as many as are in use at the same time. Those that nobody uses keep their
/// numbers, and their counters.
struct Leases {
    /// With room for all that were made: a worker that ends allocates nothing.
    idle: Mutex<MappedVec<PageFiller>>,
    /// How many there are.
    made: AtomicUsize,
    /// Blocks of counters, each twice as long as the one before. None moves once it is there.
    counters: [OnceLock<Box<[Counters]>>; usize::BITS as usize],
}

/// How many counters the first block has.
const FIRST_BLOCK_LEN: usize = 4;

impl Leases {
    fn new() -> Self {
        let counters = [const { OnceLock::new() }; usize::BITS as usize];
        Self { idle: Mutex::new(mapped_vec::none()), made: AtomicUsize::new(0), counters }
    }

    /// The block of a number, and the place in it.
    fn place(number: usize) -> (usize, usize) {
        let block = (number / FIRST_BLOCK_LEN + 1).ilog2() as usize;
        (block, number - FIRST_BLOCK_LEN * ((1 << block) - 1))
    }

    /// One more number, with its counters and room for its filler. `None`: there is no memory.
    fn make(&self) -> Option<usize> {
        loop {
            let number = self.made.load(Ordering::Relaxed);
            let (block, _) = Self::place(number);
            if self.counters[block].get().is_none() {
                let mut counters = Vec::new();
                counters.try_reserve_exact(FIRST_BLOCK_LEN << block).ok()?;
                counters.extend((0..FIRST_BLOCK_LEN << block).map(|_| Counters::new()));
                // Another thread may be faster.
                let _made = self.counters[block].set(counters.into_boxed_slice());
            }
            let mut idle = lock(&self.idle);
            let room = (number + 1).saturating_sub(idle.len());
            idle.try_reserve(room).ok()?;
            drop(idle);
            let next = number + 1;
            if self.made.compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Some(number);
            }
        }
    }

    fn counters(&self, number: usize) -> &Counters {
        let (block, at) = Self::place(number);
        &self.counters[block].get().expect("made together with the filler")[at]
    }

    fn all_counters(&self) -> impl Iterator<Item = &Counters> {
        self.counters.iter().filter_map(OnceLock::get).flatten()
    }
}

/// A filler, until it is dropped.
pub(crate) struct Lease<'a> {
    leases: &'a Leases,
    filler: PageFiller,
}

impl Deref for Lease<'_> {
    type Target = PageFiller;

    fn deref(&self) -> &PageFiller {
        &self.filler
    }
}

impl DerefMut for Lease<'_> {
    fn deref_mut(&mut self) -> &mut PageFiller {
        &mut self.filler
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // Without its buffers.
        let filler = PageFiller::new(self.filler.thread);
        lock(&self.leases.idle).push(filler);
    }
}

/// Another thread spins.
#[derive(Debug)]
pub(crate) struct AlreadySpinning;

/// There won't be any more notes.
#[derive(Debug)]
pub(crate) struct Stopped;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_fillers_are_each_their_own() {
        crate::support::require!();
        let leases = Leases::new();
        for number in 0..100 {
            assert_eq!(leases.make(), Some(number));
            leases.counters(number).fills.add(number as u64 + 1);
        }
        let all: Vec<_> = leases.all_counters().map(|counters| counters.fills.get()).collect();
        assert!(all[..100].iter().enumerate().all(|(at, fills)| *fills == at as u64 + 1), "{all:?}");
    }
}
