//! The threads that read faults and answer them.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::changes::{self, Change};
use super::delivery::{Delivery, Waiting};
use super::descriptor::{Descriptor, Serving, wake};
use super::fault::{Fault, page_of};
use super::fill::{Done, Filler, Wait, Work};
use super::load::message;
use super::shared::{Note, Shared, Token};
use super::stats;
use super::trace::event;
use super::{DescriptorId, Problem, RegionId};
use crate::{Errno, Error, Event, EventBuffer, FaultKind, Result};

/// So many events are read with one system call.
const BATCH: usize = 64;

/// So many batches of a descriptor's are answered before others get their turn.
const ROUNDS: usize = 64;

/// So often it is looked at one descriptor before it is looked at all, while spinning.
const OTHERS: u32 = 8;

/// So many descriptors a thread knows at a time.
const KNOWN: usize = 64;

/// So many pieces of work are put off by a thread. Beyond that a thread that waits is waked, and faults again.
const PARKED: usize = 256;

/// After so many tries it is told.
pub(super) const STUCK: u32 = 24;

/// So often it is looked whether what was put off is due, or to end.
const LOOK: Duration = Duration::from_millis(100);

/// What was put off.
#[derive(Debug)]
struct Parked {
    due: Instant,
    tries: u32,
    descriptor: Arc<Descriptor>,
    work: Work,
}

#[derive(Debug)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    thread: usize,
    filler: Filler,
    many: EventBuffer,
    one: EventBuffer,
    /// Read, and not answered yet.
    faults: VecDeque<Fault>,
    parked: Vec<Parked>,
    /// Descriptors that this thread has met, by slot: the table that all share is locked to find one. As many as there
    /// is room for from the start.
    known: Box<[Option<Arc<Descriptor>>; KNOWN]>,
    version: u32,
    /// Whose faults are being answered, for when that panics.
    current: Option<Token>,
    waiting: Waiting,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, thread: usize, delivery: Delivery) -> Self {
        // Others are to have something to do as well.
        let batch = (2 * BATCH / (shared.threads + 1)).max(4);
        Self {
            filler: Filler::new(thread),
            many: EventBuffer::new(batch),
            one: EventBuffer::new(1),
            faults: VecDeque::with_capacity(2 * batch),
            parked: Vec::with_capacity(PARKED),
            known: Box::new([const { None }; KNOWN]),
            version: 0,
            current: None,
            waiting: Waiting::new(delivery),
            shared,
            thread,
        }
    }

    /// Serves until the pager stops. A panic ends what is being done, not the thread.
    pub(crate) fn run(mut self) {
        self.shared.thread_started();
        while let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| self.serve())) {
            let message = message(&*panic).to_owned();
            self.shared.note(Note::Problem(Problem::Panicked { message }));
            self.start_anew();
        }
        self.give_up();
    }

    /// After a panic: what was claimed is free again, and who waits for it comes back. Who is waked for nothing does
    /// so, too.
    fn start_anew(&mut self) {
        self.shared.set_at_work(self.thread, false);
        if let Some(descriptor) = self.current.take().and_then(|token| self.find(token)) {
            let serving = descriptor.enter(self.thread);
            for serving in serving.iter() {
                let faults = self.faults.iter().map(|fault| page_of(fault.address));
                let segments = serving.layout.everything().map(|segment| segment.start..segment.end);
                faults.chain(segments).for_each(|range| wake(&serving.uffd, range));
            }
        }
        self.faults.clear();
        // What the thread was told of once, and hasn't read, it or another is told of again.
        for descriptor in self.shared.descriptors() {
            if let Some(serving) = &*descriptor.enter(self.thread) {
                self.shared.hand_on(&descriptor, serving.uffd.as_fd());
            }
        }
    }

    /// Leaves nothing behind that nobody would come back to.
    fn give_up(mut self) {
        for Parked { descriptor, work, .. } in std::mem::take(&mut self.parked) {
            self.filler.give_up(&descriptor, work);
        }
    }

    fn serve(&mut self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // Whose faults were answered last: the next may be near.
        let mut last = None;
        while !self.shared.is_stopping() {
            let ready = self.wait(&mut events, last.take());
            self.shared.set_at_work(self.thread, true);
            self.shared.counters(self.thread).wakeups.add(1);
            for event in &events[..ready] {
                let Some(token) = Shared::token(event) else { continue };
                let Some(descriptor) = self.find(token) else { continue };
                let blocking = event.events & libc::EPOLLERR as u32 != 0;
                self.current = Some(token);
                self.answer(&descriptor, blocking);
                self.current = None;
                last = Some(token);
            }
            self.resume();
            self.shared.set_at_work(self.thread, false);
        }
    }

    /// Waits for something to read, on any descriptor. Looks at the `last` one for a moment before it sleeps, and answers
    /// what it finds there.
    fn wait(&mut self, events: &mut [libc::epoll_event], last: Option<Token>) -> usize {
        let wait = |shared: &Shared, events: &mut _, timeout| match shared.wait(events, timeout) {
            Ok(ready) => ready,
            Err(errno) => unreachable!("waiting for faults: {errno}"),
        };
        while self.timeout() != 0 {
            let Some(token) = last else { break };
            let Some(descriptor) = self.find(token) else { break };
            let (mut waiting, mut looks, mut ready) = (self.waiting, 0, 0);
            self.current = Some(token);
            let found = waiting.spin(&Arc::clone(&self.shared), || {
                looks += 1;
                if looks % OTHERS == 0 {
                    ready = wait(&self.shared, events, 0);
                }
                ready > 0 || {
                    let answered = self.answer(&descriptor, false);
                    self.shared.set_at_work(self.thread, false);
                    answered
                }
            });
            self.current = None;
            self.waiting = waiting;
            if ready > 0 {
                return ready;
            }
            if !found || self.shared.is_stopping() {
                break;
            }
        }
        wait(&self.shared, events, self.timeout())
    }

    /// How long to sleep at most, in milliseconds.
    fn timeout(&self) -> libc::c_int {
        let Some(due) = self.parked.iter().map(|parked| parked.due).min() else { return -1 };
        // Something may end sooner: see `Served::is_ending`.
        let rest = due.saturating_duration_since(Instant::now()).min(LOOK);
        // Rounded up: too early is once more for nothing.
        rest.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX)
    }

    /// The descriptor that an event is about, if it is still served.
    fn find(&mut self, token: Token) -> Option<Arc<Descriptor>> {
        let version = self.shared.version();
        if version != self.version {
            // Not to keep what is served no more.
            self.known.fill(None);
            self.version = version;
        }
        let slot = token.slot();
        let known = &mut self.known[slot % KNOWN];
        if !known.as_ref().is_some_and(|descriptor| token.means(descriptor)) {
            *known = self.shared.in_slot(slot);
        }
        known.clone().filter(|descriptor| token.means(descriptor))
    }

    /// Reads a descriptor's events and answers the faults among them, until there are none, or others have waited long
    /// enough. Whether there were any.
    fn answer(&mut self, descriptor: &Arc<Descriptor>, mut blocking: bool) -> bool {
        let mut gave_way = false;
        for round in 0..ROUNDS {
            let read = self.read(descriptor, blocking);
            blocking = false;
            if std::mem::take(&mut gave_way) {
                self.waiting.gave_way(self.faults.front());
            } else if round > 0 && matches!(read, Ok(ControlFlow::Break(()))) && self.waiting.gives_way() {
                gave_way = true;
                self.shared.set_at_work(self.thread, false);
                thread::yield_now();
                continue;
            }
            self.answer_all(descriptor);
            match read {
                Ok(ControlFlow::Continue(())) if self.shared.is_stopping() => return true,
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return round > 0,
                Err(error) => {
                    self.unreadable(descriptor, error);
                    return round > 0;
                }
            }
        }
        if let Some(serving) = &*descriptor.enter(self.thread) {
            self.shared.hand_on(descriptor, serving.uffd.as_fd());
        }
        true
    }

    fn answer_all(&mut self, descriptor: &Arc<Descriptor>) {
        if !self.faults.is_empty() {
            self.shared.set_at_work(self.thread, true);
        }
        while let Some(fault) = self.faults.front().copied() {
            let done = self.filler.fault(&self.shared, descriptor, fault);
            self.settle(descriptor, done, 0);
            self.faults.pop_front();
            self.waiting.answered(&fault);
        }
    }

    /// Reads events with one system call. Breaks if there were no more.
    fn read(&mut self, descriptor: &Arc<Descriptor>, blocking: bool) -> Result<ControlFlow<()>> {
        // A thread that waits for a source leaves faults to the others.
        let alone = self.shared.threads == 1;
        let buffer = if !alone && self.filler.is_slow() { &mut self.one } else { &mut self.many };
        let (shared, thread, faults) = (&*self.shared, self.thread, &mut self.faults);
        let mut result = Ok(ControlFlow::Break(()));
        let mut read = |serving: &mut Serving| -> Result<ControlFlow<()>> {
            if blocking {
                // Somebody who shares the description has made it so.
                serving.uffd.set_nonblocking(true)?;
            }
            let count = serving.uffd.read_batch(buffer)?;
            let full = count == buffer.capacity();
            if full && !alone {
                shared.hand_on(descriptor, serving.uffd.as_fd());
            }
            let since = stats::now();
            // Changes are applied at once, and faults are answered after all of them.
            for event in buffer.drain() {
                take(shared, thread, descriptor, serving, event, faults, since);
            }
            // Who was waked by a fill may have run at once, and faulted again: often the next is there by now, and
            // needs no poll.
            Ok(if count > 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        };
        if descriptor.tells_changes {
            descriptor.exclusively(&mut |serving| {
                if let Some(serving) = serving {
                    result = read(serving);
                }
            });
        } else if let Some(serving) = &mut *descriptor.enter(thread) {
            result = read(serving);
        }
        result
    }

    /// A descriptor that can't be read is served no more, unless what it lacks can come.
    fn unreadable(&mut self, descriptor: &Arc<Descriptor>, error: Error) {
        let errno = error.errno();
        let id = DescriptorId(descriptor.id);
        self.shared.note(Note::Problem(Problem::Read { descriptor: id, error }));
        if matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) {
            self.park(descriptor, Work::Read, Duration::from_millis(100), 0);
        } else if let Some(serving) = self.shared.remove(descriptor) {
            // Closing it would show zeros where pages are missing.
            std::mem::forget(Arc::clone(&serving.uffd));
            descriptor.leave(serving);
        }
    }

    /// Goes on with what was put off and is due.
    fn resume(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let now = Instant::now();
        // Each once: what is put off again may wait for events, which somebody has to read in between.
        let (mut at, mut end) = (0, self.parked.len());
        while at < end {
            if self.parked[at].due > now && !self.parked[at].work.is_ending() {
                at += 1;
                continue;
            }
            end -= 1;
            self.parked.swap(at, end);
            let Parked { tries, descriptor, work, .. } = self.parked.swap_remove(end);
            self.shared.counters(self.thread).retries.add(1);
            self.current = Some(Token::of(&descriptor));
            if matches!(work, Work::Read) {
                self.answer(&descriptor, false);
            } else {
                let done = self.filler.resume(&self.shared, &descriptor, work);
                self.settle(&descriptor, done, tries + 1);
            }
            self.current = None;
        }
    }

    /// What follows from how far a piece of work got.
    fn settle(&mut self, descriptor: &Arc<Descriptor>, done: Done, tries: u32) {
        let backoff = |tries: u32, most: u32| Duration::from_millis(1 << tries.min(most));
        match done {
            Done::Yes => {}
            Done::Gone => self.shared.gone(descriptor),
            Done::Later(work, Wait::For(delay)) => self.park(descriptor, work, delay, 0),
            Done::Later(work, Wait::Rarely) => self.park(descriptor, work, Duration::from_secs(1), tries),
            Done::Later(work, wait) => {
                if let (Wait::Kernel(errno), STUCK) = (wait, tries) {
                    self.tell_stuck(descriptor, &work, errno);
                }
                if let (Work::Load(run, _) | Work::Install(run, _), STUCK..) = (&work, tries) {
                    if run.region.is_ending() {
                        // Whoever ends it isn't to wait for this.
                        run.mark_stuck();
                    }
                }
                // The first tries come as soon as other events were looked at.
                let delay = match (wait, tries) {
                    (Wait::Kernel(Errno::EAGAIN), 0..4) => Duration::ZERO,
                    (_, 0..STUCK) => backoff(tries.saturating_sub(3), 6),
                    _ => backoff(tries - STUCK, 10),
                };
                self.park(descriptor, work, delay, tries);
            }
        }
    }

    fn tell_stuck(&self, descriptor: &Descriptor, work: &Work, errno: Errno) {
        let serving = descriptor.enter(self.thread);
        let Some(serving) = &*serving else { return };
        let (region, addresses) = match work {
            Work::Load(run, _) | Work::Install(run, _) => (run.region.id, run.addresses()),
            Work::Fault(fault) => match serving.layout.find(fault.address) {
                Some(segment) => (segment.region.id, page_of(fault.address)),
                None => return,
            },
            Work::Stray(_) | Work::Read => return,
        };
        let (region, address) = (RegionId(region), addresses.start);
        self.shared.note(Note::Problem(Problem::Stuck { region, address, errno }));
        // Perhaps the memory has gone without a word, as that of a file that is cut off. Who waits finds out.
        wake(&serving.uffd, addresses);
    }

    fn park(&mut self, descriptor: &Arc<Descriptor>, work: Work, delay: Duration, tries: u32) {
        // A descriptor is read later in any case: nobody would tell of what is unread.
        if self.parked.len() >= PARKED && !matches!(work, Work::Read) {
            return self.filler.give_up(descriptor, work);
        }
        if delay.is_zero() {
            std::thread::yield_now();
        }
        event!(DEBUG, "put off", work = tracing::field::debug(&work), delay = tracing::field::debug(delay));
        let due = Instant::now() + delay;
        self.parked.push(Parked { due, tries, descriptor: Arc::clone(descriptor), work });
    }
}

/// Takes an event in: a change is applied, a fault is put to those that are to be answered.
fn take(
    shared: &Shared,
    thread: usize,
    descriptor: &Descriptor,
    serving: &mut Serving,
    event: Result<Event>,
    faults: &mut VecDeque<Fault>,
    since: Instant,
) {
    let counters = shared.counters(thread);
    let change = match event {
        Ok(Event::Pagefault { kind, addr, thread_id, .. }) => {
            let counter = match kind {
                FaultKind::Missing => &counters.missing_faults,
                FaultKind::Minor => &counters.minor_faults,
                FaultKind::WriteProtected => &counters.write_protect_faults,
                FaultKind::ReadWriteProtected => &counters.read_write_protect_faults,
                FaultKind::Unknown(_) => &counters.unknown_faults,
            };
            counter.add(1);
            return faults.push_back(Fault { address: addr.addr(), kind, thread: thread_id.as_raw(), since });
        }
        Ok(Event::Fork { uffd }) => Change::Fork { uffd },
        Ok(Event::Remap { from, to, len }) => {
            Change::Remap { from: from.addr()..from.addr() + len, to: to.addr() }
        }
        Ok(Event::Remove { start, end }) => Change::Remove(start.addr()..end.addr()),
        Ok(Event::Unmap { start, end }) => Change::Unmap(start.addr()..end.addr()),
        Err(error) => {
            let descriptor = DescriptorId(descriptor.id);
            return shared.note(Note::Problem(Problem::Read { descriptor, error }));
        }
    };
    changes::apply(shared, counters, descriptor, serving, change);
}
