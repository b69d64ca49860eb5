//! What the threads of a pager share. Faults meet at none of its locks.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, TryLockError};

use memmap2::MmapRaw;

use super::ahead::Ahead;
use super::apart;
use super::descriptor::{Descriptor, Serving, lock};
use super::fill::Filler;
use super::layout::{Layout, ROOM, Segments};
use super::region::Served;
use super::retry::RetryQueue;
use super::stats::Counters;
use super::{Error, Problem, Result, Retry, Statistics};
use crate::owner::{InheritedFd, Owner, abandon};
use crate::{Uffd, sys};

/// What the thread in the background is told by those that serve faults. They don't do it themselves: it takes locks
/// that who waits for a page may hold, the allocator's or those of the program's callback.
#[derive(Debug)]
pub(crate) enum Note {
    Problem(Problem),
    Fork(Fork),
    /// Something [has gone](Shared::take_gone).
    Gone,
}

/// A process forked, and this is its child's.
#[derive(Debug)]
pub(crate) struct Fork {
    pub(crate) parent: u64,
    pub(crate) uffd: Uffd,
    /// As it was when the process forked, which is the child's.
    pub(crate) layout: Layout,
    /// The states of its segments' pages then, one after the other; nothing of those that are shared.
    pub(crate) states: std::io::Result<MmapRaw>,
}

/// Notes that aren't taken yet. Adding one takes nothing of the allocator's: see `apart`. Problems that there is no room
/// for are lost; for forks, and for what has gone, room is made.
#[derive(Debug)]
struct Notes {
    problems: VecDeque<Problem>,
    forks: apart::Vec<Fork>,
    /// What was served, and is to be freed once nobody has it.
    gone: Segments,
    /// Whether one was taken, and its child isn't served yet.
    adopting: bool,
    stopped: bool,
}

const PROBLEMS: usize = 1024;
const AHEAD: usize = 1024;
const FORKS: usize = 16;

/// Shards of a descriptor that callers and threads in the background share: see [`Shared::lease`]. A shard is locked
/// while the kernel fills, never while a source is read. Each more makes each change of a layout dearer.
pub(super) const OUTSIDE: usize = 5;

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

#[repr(align(128))] // no line of the cache, nor the one that is fetched with it, is another thread's
struct AtWork(AtomicBool);

pub(crate) struct Shared {
    pub(crate) owner: Owner,
    pub(crate) retry: Retry,
    /// How many threads serve faults.
    pub(crate) threads: usize,
    /// How many threads read ahead.
    pub(crate) readers: usize,
    ahead: Mutex<VecDeque<Ahead>>,
    asked: Condvar,
    /// Whether a thread spins, waiting for the next fault. The others sleep.
    spinning: AtomicBool,
    counters: Box<[Counters]>,
    /// What the threads that serve faults have put off.
    pub(crate) retries: RetryQueue,
    /// Which threads answer faults at the moment, or read ahead for them.
    at_work: Box<[AtWork]>,
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
    regions: AtomicUsize,
    notes: Mutex<Notes>,
    noted: Condvar,
    problems_lost: AtomicUsize,
    epoll: OwnedFd,
    /// Readable at any time, and looked at once the pager is to stop.
    bell: OwnedFd,
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
    pub(crate) fn new(threads: usize, readers: usize, retry: Retry) -> Result<Self> {
        let (epoll, bell) = (sys::epoll()?, sys::eventfd(true)?);
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, bell.as_fd(), 0, Token::STOP.0)?;
        let retries = RetryQueue::new()?;
        let events = libc::EPOLLIN | libc::EPOLLET;
        let timer = retries.timer();
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, timer, events, Token::RETRY.0)?;
        let notes = Notes {
            problems: VecDeque::with_capacity(PROBLEMS),
            forks: apart::with_room(FORKS),
            gone: apart::with_room(ROOM),
            adopting: false,
            stopped: false,
        };
        Ok(Self {
            owner: Owner::current()?,
            retry,
            threads,
            readers,
            ahead: Mutex::new(VecDeque::with_capacity(AHEAD)),
            asked: Condvar::new(),
            spinning: AtomicBool::new(false),
            counters: (0..threads + readers).map(|_| Counters::new()).collect(),
            retries,
            at_work: (0..threads + readers).map(|_| AtWork(AtomicBool::new(false))).collect(),
            leases: Leases::new(),
            table: Mutex::default(),
            adding: Mutex::default(),
            started: Mutex::default(),
            thread_has_started: Condvar::new(),
            table_changed: Condvar::new(),
            version: AtomicU32::new(0),
            regions: AtomicUsize::new(0),
            notes: Mutex::new(notes),
            noted: Condvar::new(),
            problems_lost: AtomicUsize::new(0),
            epoll,
            bell,
            stopping: AtomicBool::new(false),
        })
    }

    /// Returns an error in any process but the one that made the pager.
    pub(crate) fn check_owner(&self) -> Result<()> {
        if self.owner.is_current() { Ok(()) } else { Err(Error::NotServed) }
    }

    /// In a fork's child, which hasn't got the threads: closes the number of a descriptor that was served, or of all
    /// and of the pager's own. What a thread was about to change when the process forked isn't found.
    #[expect(unsafe_code, reason = "closes what the threads have a share of")]
    pub(crate) fn abandon(self: &Arc<Self>, descriptor: Option<u64>) {
        abandon(self);
        let table = match self.table.try_lock() {
            Ok(table) => Some(table),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let slots = table.iter().flat_map(|table| table.slots.iter().flatten());
        let of_descriptors = slots.filter(|served| descriptor.is_none_or(|id| id == served.id));
        let own = [self.epoll.as_fd(), self.bell.as_fd(), self.retries.timer()].map(InheritedFd::new);
        let own = own.iter().filter(|_| descriptor.is_none());
        for fd in of_descriptors.map(|served| &served.inherited).chain(own) {
            // SAFETY: this is a child, without the threads, and every method of the pager is an error in it. The table
            // owned the descriptor when the process forked, or else its number was forgotten; nothing of the table, nor
            // of this, is dropped any more. The pager's own three are asked for once, when it is dropped.
            unsafe { fd.close() };
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
    pub(super) fn counters(&self, thread: usize) -> &Counters {
        match self.counters.get(thread) {
            Some(counters) => counters,
            None => self.leases.counters(thread - self.counters.len()),
        }
    }

    /// The number by which threads that aren't the pager's look at layouts. They count nothing.
    pub(crate) fn outside_id(&self) -> usize {
        self.threads + self.readers
    }

    /// A filler for a caller, or for a thread in the background, which has it alone: neither waits for the source or the
    /// callback of another.
    pub(crate) fn lease(&self) -> Lease<'_> {
        let idle = lock(&self.leases.idle).pop();
        let filler = idle.unwrap_or_else(|| {
            let number = self.leases.made.fetch_add(1, Ordering::Relaxed);
            self.leases.make_counters(number);
            Filler::new(self.counters.len() + number)
        });
        Lease { leases: &self.leases, filler: Some(filler) }
    }

    pub(crate) fn new_region_id(&self) -> u64 {
        self.regions.fetch_add(1, Ordering::Relaxed) as u64
    }

    /// Begins to serve a descriptor.
    pub(crate) fn add(
        &self,
        serving: Serving,
        is_child: bool,
        was_blocking: bool,
    ) -> Result<Arc<Descriptor>> {
        let _adding = lock(&self.adding);
        self.reap();
        let uffd = Arc::clone(&serving.uffd);
        let (id, slot, len) = {
            let table = lock(&self.table);
            let len = table.slots.len();
            (table.count, table.slots.iter().position(Option::is_none).unwrap_or(len), len)
        };
        let shards = self.counters.len() + OUTSIDE;
        let descriptor = Descriptor::new((id, slot as u32), serving, shards, is_child, was_blocking);
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
            Ok(()) => Ok(descriptor),
            Err(errno) => {
                drop(self.remove(&descriptor));
                Err(errno.into())
            }
        }
    }

    /// Ends serving a descriptor, and gives back what was served. `None` if somebody did so before.
    pub(crate) fn remove(&self, descriptor: &Arc<Descriptor>) -> Option<Serving> {
        let serving = descriptor.close()?;
        // Others may hold the same description open. It isn't there if adding it has failed.
        let _deleted =
            sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_DEL, serving.uffd.as_fd(), 0, 0);
        lock(&self.table).served -= 1;
        self.version.fetch_add(1, Ordering::Release);
        self.table_changed.notify_all();
        Some(serving)
    }

    /// Frees what was served by descriptors that are closed, and takes those out that nobody else has any more. Not for
    /// threads that serve faults.
    pub(crate) fn reap(&self) {
        let next = || {
            let mut table = lock(&self.table);
            table.slots.iter_mut().find_map(|slot| {
                let closed = slot.as_ref().filter(|descriptor| descriptor.is_closed())?;
                let (left, unused) = (closed.take_left(), Arc::strong_count(closed) == 1);
                let descriptor = if unused { slot.take() } else { None };
                (left.is_some() || unused).then_some((left, descriptor))
            })
        };
        while let Some(freed) = next() {
            drop(freed);
        }
    }

    /// Has a thread that waits look at a descriptor, if something is there to read.
    pub(crate) fn hand_on(&self, descriptor: &Descriptor, uffd: BorrowedFd<'_>) {
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
        let table = lock(&self.table);
        drop(self.table_changed.wait_while(table, |table| table.served > 0));
    }

    /// Ends serving a descriptor whose process has gone.
    pub(crate) fn gone(&self, descriptor: &Arc<Descriptor>) {
        if let Some(serving) = self.remove(descriptor) {
            // Freed by who takes the descriptor out.
            descriptor.leave(serving);
            let descriptor = super::DescriptorId(descriptor.id);
            self.note(Note::Problem(Problem::TargetGone { descriptor }));
        }
    }

    /// Tells the thread in the background.
    pub(crate) fn note(&self, note: Note) {
        let mut notes = lock(&self.notes);
        match note {
            Note::Problem(_) if notes.problems.len() == PROBLEMS => {
                self.problems_lost.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Note::Problem(problem) => notes.problems.push_back(problem),
            Note::Fork(fork) => {
                apart::reserve(&mut notes.forks, 1);
                notes.forks.push(fork);
            }
            // It is there by now.
            Note::Gone => {}
        }
        drop(notes);
        self.noted.notify_all();
    }

    /// Leaves it to the thread in the background to free what a change takes out of a layout.
    pub(crate) fn free(&self, change: impl FnOnce(&mut Segments)) {
        let mut notes = lock(&self.notes);
        change(&mut notes.gone);
        let some = !notes.gone.is_empty();
        drop(notes);
        if some {
            self.noted.notify_all();
        }
    }

    /// Whether any part of a region is served.
    pub(crate) fn serves(&self, region: &Arc<Served>) -> bool {
        self.descriptors().iter().any(|descriptor| {
            let serving = descriptor.enter(self.outside_id());
            let mut parts = serving.iter().flat_map(|serving| serving.layout.everything());
            parts.any(|part| Arc::ptr_eq(&part.region, region))
        })
    }

    /// Takes what was left so. There is room for more at any time.
    pub(crate) fn take_gone(&self, gone: &mut Segments) {
        gone.extend(lock(&self.notes).gone.drain(..));
    }

    /// Waits for a note, at most so long. Forks come first. `Err` once the pager has stopped and nothing is left.
    pub(crate) fn next_note(&self, most: Option<std::time::Duration>) -> Result<Option<Note>, Stopped> {
        let nothing = |notes: &mut Notes| {
            notes.forks.is_empty() && notes.gone.is_empty() && notes.problems.is_empty() && !notes.stopped
        };
        let mut notes = lock(&self.notes);
        if std::mem::take(&mut notes.adopting) {
            self.noted.notify_all();
        }
        notes = match most {
            None => self.noted.wait_while(notes, nothing).unwrap_or_else(PoisonError::into_inner),
            Some(most) => {
                let waited = self.noted.wait_timeout_while(notes, most, nothing);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        let fork = (!notes.forks.is_empty()).then(|| Note::Fork(notes.forks.remove(0)));
        notes.adopting = fork.is_some();
        let note = fork.or_else(|| (!notes.gone.is_empty()).then_some(Note::Gone));
        let note = note.or_else(|| notes.problems.pop_front().map(Note::Problem));
        if note.is_none() && notes.stopped {
            return Err(Stopped);
        }
        drop(notes);
        self.noted.notify_all();
        Ok(note)
    }

    /// Waits until the children of all forks that were read are served.
    pub(crate) fn wait_for_forks(&self) {
        let some = |notes: &mut Notes| notes.adopting || !notes.forks.is_empty();
        drop(self.noted.wait_while(lock(&self.notes), some));
    }

    /// Has the thread in the background end when nothing is left.
    pub(crate) fn stop_notes(&self) {
        lock(&self.notes).stopped = true;
        self.noted.notify_all();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// A thread begins to answer faults, or to read ahead for them; or it has ended.
    pub(crate) fn set_at_work(&self, thread: usize, at_work: bool) {
        self.at_work[thread].0.store(at_work, Ordering::Relaxed);
    }

    /// Whether a fault waits or is being answered.
    pub(crate) fn is_busy(&self) -> bool {
        self.at_work.iter().any(|thread| thread.0.load(Ordering::Relaxed))
            || sys::is_readable(self.epoll.as_fd())
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
    pub(crate) fn ask(&self, ahead: Ahead) {
        let mut asked = lock(&self.ahead);
        if asked.len() < AHEAD {
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
        let (epoll, bell) = (self.epoll.as_fd(), self.bell.as_fd());
        sys::epoll_control(epoll, libc::EPOLL_CTL_MOD, bell, libc::EPOLLIN, Token::STOP.0)
            .unwrap_or_else(|errno| unreachable!("descriptor {} is polled: {errno}", bell.as_raw_fd()));
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let all = self.counters.iter().chain(self.leases.all_counters());
        let mut sum: Statistics = all.map(Counters::snapshot).sum();
        sum.problems_lost += self.problems_lost.load(Ordering::Relaxed) as u64;
        let mut seen = Vec::new();
        for descriptor in self.descriptors() {
            for segment in descriptor.segments(self.outside_id(), None) {
                let region = segment.region;
                if seen.contains(&region.id) {
                    continue;
                }
                seen.push(region.id);
                let (present, poisoned) = region.pages.present_and_poisoned();
                sum.present_pages += present as u64;
                sum.absent_pages += (region.pages.count() - present - poisoned) as u64;
            }
        }
        sum
    }
}

/// Fillers for threads that aren't the pager's: as many as are in use at the same time. Those that nobody uses keep their
/// numbers, and their counters.
struct Leases {
    idle: Mutex<Vec<Filler>>,
    /// How many there are.
    made: AtomicUsize,
    /// Blocks of counters, each twice as long as the one before. None moves once it is there.
    counters: [OnceLock<Box<[Counters]>>; usize::BITS as usize],
}

/// How many counters the first block has.
const FIRST: usize = 4;

impl Leases {
    fn new() -> Self {
        let counters = [const { OnceLock::new() }; usize::BITS as usize];
        Self { idle: Mutex::default(), made: AtomicUsize::new(0), counters }
    }

    /// The block of a number, and the place in it.
    fn place(number: usize) -> (usize, usize) {
        let block = (number / FIRST + 1).ilog2() as usize;
        (block, number - FIRST * ((1 << block) - 1))
    }

    fn make_counters(&self, number: usize) {
        let (block, _) = Self::place(number);
        self.counters[block].get_or_init(|| (0..FIRST << block).map(|_| Counters::new()).collect());
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
    filler: Option<Filler>,
}

impl Deref for Lease<'_> {
    type Target = Filler;

    fn deref(&self) -> &Filler {
        self.filler.as_ref().expect("it is there until this is dropped")
    }
}

impl DerefMut for Lease<'_> {
    fn deref_mut(&mut self) -> &mut Filler {
        self.filler.as_mut().expect("it is there until this is dropped")
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(filler) = self.filler.take() {
            // Without its buffers.
            let filler = Filler::new(filler.thread);
            lock(&self.leases.idle).push(filler);
        }
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
        let leases = Leases::new();
        for number in 0..100 {
            leases.make_counters(number);
            leases.counters(number).fills.add(number as u64 + 1);
        }
        let all: Vec<_> = leases.all_counters().map(|counters| counters.fills.get()).collect();
        assert!(all[..100].iter().enumerate().all(|(at, fills)| *fills == at as u64 + 1), "{all:?}");
    }
}
