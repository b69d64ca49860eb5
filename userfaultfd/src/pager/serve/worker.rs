//! The workers: threads that read faults and resolve them.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::backlog::{Backlog, EVENTS_PER_WAIT};
use super::delivery::{Delivery, WaitPolicy};
use super::descriptor_cache::DescriptorCache;
use super::event_reader::{EventReader, Read};
use super::poll::Token;
use super::shared::Shared;
use crate::error::errno_of;
use crate::lock_order::{LockGuard, lock};
use crate::pager::fill::filler::PageFiller;
use crate::pager::fill::retry::{self, Deferred, History, Put};
use crate::pager::fill::work::{Fault, Outcome, RetryAfter, Work, page_of};
use crate::pager::memory::descriptor::{Descriptor, wake};
use crate::pager::thread::has_heap;
use crate::pager::trace::event;
use crate::pager::{DescriptorId, Problem, RegionId};
use crate::source::call::message;
use crate::{Errno, Error, Result, sys};

/// Events read by one system call: more threads rarely wait at once.
const EVENTS_PER_READ: usize = 64;

/// Batches of one descriptor that are resolved before other descriptors get their turn.
const MAX_BATCHES_PER_DESCRIPTOR: usize = 64;

/// While spinning, reads of the last descriptor between two polls of all descriptors.
const POLLS_PER_EPOLL_CHECK: u32 = 8;

/// The delay before a failed read of a descriptor is retried.
const REREAD_DELAY: Duration = Duration::from_millis(100);

/// Faults that an added worker resolves before it may end.
const TRIAL_FAULTS: u32 = 8;

/// The time without work after which an added worker ends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    /// The number of its shards and counters.
    thread: usize,
    /// The place in which it notes what it is doing.
    place: usize,
    is_added: bool,
    filler: PageFiller,
    reader: EventReader,
    /// Faults that were read and aren't resolved yet. All but the first are in the backlog.
    faults: VecDeque<Fault>,
    /// Whether the backlog may have work that waits for a change of the layout.
    has_changing: bool,
    /// Changes that were read since such work last succeeded.
    misses: u32,
    /// Descriptors that this worker has used.
    known: DescriptorCache,
    /// The descriptor whose faults are being resolved, in case that panics.
    current: Option<Token>,
    waiting: WaitPolicy,
}

impl Worker {
    /// Makes a worker of the start.
    pub(crate) fn new(shared: Arc<Shared>, thread: usize, delivery: Delivery) -> Result<Self> {
        Self::with(shared, PageFiller::new(thread), (thread, false), delivery)
    }

    /// Makes a worker that is added later.
    pub(crate) fn added(
        shared: Arc<Shared>,
        filler: PageFiller,
        place: usize,
        delivery: Delivery,
    ) -> Result<Self> {
        Self::with(shared, filler, (place, true), delivery)
    }

    fn with(
        shared: Arc<Shared>,
        mut filler: PageFiller,
        (place, is_added): (usize, bool),
        delivery: Delivery,
    ) -> Result<Self> {
        // Other workers should get work, too.
        let batch = (2 * EVENTS_PER_READ / (shared.fill.threads.workers + 1)).max(4);
        filler.begin_to_serve(place);
        filler.prepare().map_err(|error| errno_of(&error))?;
        let thread = filler.thread;
        if !lock(shared.backlog(place)).prepare(batch, retry::QUEUE_ROOM) {
            return Err(Errno::ENOMEM.into());
        }
        let mut faults = VecDeque::new();
        faults.try_reserve_exact(2 * batch).map_err(|_| Errno::ENOMEM)?;
        Ok(Self {
            filler,
            reader: EventReader::try_new(batch).ok_or(Errno::ENOMEM)?,
            faults,
            has_changing: false,
            misses: 0,
            known: DescriptorCache::try_new().ok_or(Errno::ENOMEM)?,
            current: None,
            waiting: WaitPolicy::new(delivery),
            shared,
            thread,
            place,
            is_added,
        })
    }

    /// Serves until the pager stops. A panic ends the present work, not the thread.
    pub(crate) fn run(mut self) {
        if !self.is_added {
            self.shared.started.arrive();
        } else if !has_heap() {
            // The source may allocate, and must be read by threads that can.
            return self.shared.end_worker(self.place, self.thread);
        }
        while let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| self.serve())) {
            let message = message(&*panic).to_owned();
            self.shared.fill.report(Problem::Panicked { message });
            self.start_anew();
        }
        if self.is_added {
            self.shared.end_worker(self.place, self.thread);
        }
    }

    fn set_at_work(&self, at_work: bool) {
        self.shared.fill.activities.set_at_work(self.place, at_work);
    }

    fn backlog(&self) -> LockGuard<'_, Backlog> {
        lock(self.shared.backlog(self.place))
    }

    /// Recovers after a panic: claimed pages are released, and their waiters are woken, to fault again. A thread that is
    /// woken in vain faults again, too.
    fn start_anew(&mut self) {
        self.set_at_work(false);
        self.take_back();
        if let Some(descriptor) = self.current.take().and_then(|token| self.find(token)) {
            let serving = descriptor.lock_shard(self.thread);
            for serving in serving.iter() {
                let faults = self.faults.iter().map(|fault| page_of(fault.address));
                let segments = serving.layout.everything().map(|segment| segment.start..segment.end);
                faults.chain(segments).for_each(|range| wake(&serving.uffd, range));
            }
        }
        self.faults.clear();
        self.has_changing = true;
        self.defer_changing();
        // This worker may have consumed the signal of a due entry.
        self.shared.retries.look();
        // Descriptors that epoll has reported once to this worker, and that it hasn't read, must be reported again.
        for descriptor in self.shared.table.all() {
            if let Some(serving) = &*descriptor.lock_shard(self.thread) {
                self.shared.poll.rearm(&descriptor, serving.uffd.as_fd());
            }
        }
    }

    /// Takes back the faults of the backlog; its events are forgotten.
    fn take_back(&mut self) {
        while let Some(fault) = { self.backlog().next_fault() } {
            self.faults.push_back(fault);
        }
        while self.backlog().next_event().is_some() {}
    }

    fn serve(&mut self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS_PER_WAIT];
        // The descriptor of the last fault first: the next fault may be near.
        let mut last = None;
        let mut waits = 0;
        while !self.shared.is_stopping() {
            // Items that a worker takes before it waits for a source would wait with it.
            let room = if self.filler.is_slow() { 1 } else { events.len() };
            let ready = self.wait(&mut events[..room], last.take());
            waits += 1;
            let is_needed =
                || self.filler.is_slow() || self.shared.fill.activities.all_others_are_reading(self.place);
            if self.is_added && (ready == 0 || waits > TRIAL_FAULTS && !is_needed()) {
                // It was woken for work that is still there.
                return self.pass_on(&events[..ready]);
            }
            self.set_at_work(true);
            self.shared.fill.counters(self.thread).wakeups.add(1);
            let mut taken = events[..ready].iter().filter_map(|event| {
                let blocking = event.events & libc::EPOLLERR as u32 != 0;
                Token::of_event(event).map(|token| (token, blocking))
            });
            let mut next = taken.next();
            if ready > 1 {
                self.backlog().put_events(taken);
            }
            while let Some((token, blocking)) = next {
                if token == Token::RETRY {
                    self.resume();
                } else if let Some(descriptor) = self.find(token) {
                    self.current = Some(token);
                    self.answer(&descriptor, blocking);
                    self.current = None;
                    last = Some(token);
                }
                next = if ready > 1 { self.backlog().next_event() } else { None };
            }
            self.set_at_work(false);
        }
    }

    /// Leaves events to other workers.
    fn pass_on(&mut self, events: &[libc::epoll_event]) {
        for event in events {
            match Token::of_event(event) {
                Some(Token::RETRY) => self.shared.retries.look(),
                Some(token) => {
                    let Some(descriptor) = self.find(token) else { continue };
                    if let Some(serving) = &*descriptor.lock_shard(self.thread) {
                        self.shared.poll.rearm(&descriptor, serving.uffd.as_fd());
                    }
                }
                None => {}
            }
        }
    }

    /// Waits until a descriptor is readable. Spins on the `last` one before it sleeps, and resolves the faults that it finds
    /// there.
    fn wait(&mut self, events: &mut [libc::epoll_event], last: Option<Token>) -> usize {
        let wait = |shared: &Shared, events: &mut _, timeout| match shared.poll.wait(events, timeout) {
            Ok(ready) => ready,
            Err(errno) => unreachable!("waiting for faults: {errno}"),
        };
        while let Some(token) = last {
            let Some(descriptor) = self.find(token) else { break };
            let (mut waiting, mut looks, mut ready) = (self.waiting, 0, 0);
            self.current = Some(token);
            let shared = Arc::clone(&self.shared);
            let found = waiting.spin(
                &shared.spinner,
                || shared.is_stopping(),
                || {
                    looks += 1;
                    if looks % POLLS_PER_EPOLL_CHECK == 0 {
                        ready = wait(&self.shared, events, 0);
                    }
                    ready > 0 || {
                        let answered = self.answer(&descriptor, false);
                        self.set_at_work(false);
                        answered
                    }
                },
            );
            self.current = None;
            self.waiting = waiting;
            if ready > 0 {
                return ready;
            }
            if !found || self.shared.is_stopping() {
                break;
            }
        }
        let timeout = if self.is_added { IDLE_TIMEOUT.as_millis() as libc::c_int } else { -1 };
        wait(&self.shared, events, timeout)
    }

    /// The descriptor of an event of epoll, if it is still served.
    fn find(&mut self, token: Token) -> Option<Arc<Descriptor>> {
        self.known.find(&self.shared.table, token)
    }

    /// Reads a descriptor's events and resolves the faults among them, until there are none or other descriptors have waited
    /// long enough. Returns whether there were any.
    fn answer(&mut self, descriptor: &Arc<Descriptor>, blocking: bool) -> bool {
        let any = self.answer_batches(descriptor, blocking);
        self.defer_changing();
        any
    }

    fn answer_batches(&mut self, descriptor: &Arc<Descriptor>, mut blocking: bool) -> bool {
        let mut gave_way = false;
        for round in 0..MAX_BATCHES_PER_DESCRIPTOR {
            let how = (self.thread, self.filler.is_slow(), blocking);
            let read = self.reader.read(&self.shared, descriptor, how, &mut self.faults);
            blocking = false;
            if std::mem::take(&mut gave_way) {
                self.waiting.gave_way(self.faults.front());
            } else if round > 0 && matches!(read, Ok(Read::Nothing)) && self.waiting.gives_way() {
                gave_way = true;
                self.set_at_work(false);
                thread::yield_now();
                continue;
            }
            self.answer_all(descriptor);
            if matches!(read, Ok(Read::Changes)) {
                let mut backlog = self.backlog();
                self.shared.retries.take_changing(descriptor, &mut backlog.changing);
                let has_changing = !backlog.changing.is_empty();
                drop(backlog);
                self.has_changing |= has_changing;
            }
            if self.has_changing && !matches!(read, Ok(Read::Faults)) {
                self.try_changing(descriptor, matches!(read, Ok(Read::Changes)));
            }
            match read {
                Ok(Read::Nothing) => return round > 0,
                Ok(_) if self.shared.is_stopping() => return true,
                Ok(_) => {}
                Err(error) => {
                    self.unreadable(descriptor, error);
                    return round > 0;
                }
            }
        }
        if let Some(serving) = &*descriptor.lock_shard(self.thread) {
            self.shared.poll.rearm(descriptor, serving.uffd.as_fd());
        }
        true
    }

    fn answer_all(&mut self, descriptor: &Arc<Descriptor>) {
        if !self.faults.is_empty() {
            self.set_at_work(true);
        }
        let several = self.faults.len() > 1;
        if several {
            // Not `self.backlog()`, which would borrow all of this.
            let mut backlog = lock(self.shared.backlog(self.place));
            backlog.put_faults(Token::of(descriptor), self.faults.drain(1..));
        }
        while let Some(fault) = self.faults.front().copied() {
            let done = self.filler.resume(&self.shared.fill, descriptor, Work::Fault(fault));
            if let Some(deferred) = self.settle(descriptor, done, None) {
                self.keep_or_defer(deferred);
            }
            self.faults.pop_front();
            self.waiting.answered(&fault, &self.shared.bindings, self.place);
            if several {
                let next = self.backlog().next_fault();
                self.faults.extend(next);
            }
        }
    }

    /// Retries work that waits for a change of the layout, for [`RETRY_AFTER_CHANGE`](retry::RETRY_AFTER_CHANGE).
    fn try_changing(&mut self, descriptor: &Arc<Descriptor>, is_after_change: bool) {
        self.set_at_work(true);
        let (start, mut is_through) = (Instant::now(), false);
        while let Some(Deferred { work, history, .. }) = self.next_changing() {
            self.shared.fill.counters(self.thread).retries.add(1);
            let done = self.filler.resume(&self.shared.fill, descriptor, work);
            match self.settle(descriptor, done, Some(history)) {
                Some(deferred) => self.keep_or_defer(deferred),
                None => is_through = true,
            }
            if start.elapsed() >= retry::RETRY_AFTER_CHANGE {
                break;
            }
            std::hint::spin_loop();
        }
        if is_through {
            self.misses = 0;
        } else if is_after_change {
            self.misses += 1;
        }
        if self.misses >= retry::MISSES_BEFORE_MOVE {
            self.misses = 0;
            sys::leave_cpu();
        }
    }

    /// Keeps work that waits for a change of the layout, until the descriptor's events are read.
    fn keep_or_defer(&mut self, deferred: Deferred) {
        if deferred.waits_for_change() {
            let mut backlog = self.backlog();
            if backlog.changing.len() < backlog.changing.capacity() {
                backlog.changing.push(deferred);
                drop(backlog);
                self.has_changing = true;
                return;
            }
        }
        self.defer(deferred);
    }

    fn next_changing(&mut self) -> Option<Deferred> {
        if !self.has_changing {
            return None;
        }
        let next = self.backlog().next_changing();
        self.has_changing = next.is_some();
        next
    }

    fn defer_changing(&mut self) {
        while let Some(deferred) = self.next_changing() {
            self.defer(deferred);
        }
    }

    /// Handles a failed read: the descriptor is no longer served, unless the failure can pass.
    fn unreadable(&mut self, descriptor: &Arc<Descriptor>, error: Error) {
        let errno = error.errno();
        let id = DescriptorId(descriptor.id);
        if !descriptor.read_failed.swap(true, Ordering::Relaxed) {
            self.shared.fill.report(Problem::Read { descriptor: id, error });
        }
        if matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) {
            self.defer(Deferred::new(descriptor, Work::Read, RetryAfter::Delay(REREAD_DELAY), None));
        } else if let Some(serving) = self.shared.remove(descriptor) {
            // Closing it would show zeros where pages are missing.
            std::mem::forget(Arc::clone(&serving.uffd));
            self.shared.leave(descriptor, serving);
        }
    }

    /// Retries the deferred work that is due, each piece once.
    fn resume(&mut self) {
        let now = Instant::now();
        while let Some(Deferred { descriptor, work, history, .. }) = self.shared.retries.next_due(now) {
            self.shared.fill.counters(self.thread).retries.add(1);
            self.current = Some(Token::of(&descriptor));
            if matches!(work, Work::Read) {
                self.answer(&descriptor, false);
            } else {
                let done = self.filler.resume(&self.shared.fill, &descriptor, work);
                if let Some(deferred) = self.settle(&descriptor, done, Some(history)) {
                    self.defer(deferred);
                }
            }
            self.current = None;
        }
    }

    /// Settles a piece of work, or returns the part that must be deferred.
    fn settle(
        &mut self,
        descriptor: &Arc<Descriptor>,
        done: Outcome,
        history: Option<History>,
    ) -> Option<Deferred> {
        let (work, wait) = match done {
            Outcome::Settled => return None,
            Outcome::TargetGone => {
                self.shared.retire(descriptor);
                return None;
            }
            Outcome::Deferred(work, wait) => (work, wait),
        };
        let mut deferred = Deferred::new(descriptor, work, wait, history);
        if let Some(errno) = deferred.report() {
            self.tell_stuck(descriptor, &deferred.work, errno);
        }
        if let Work::Load(run, _) | Work::Install(run, _) = &deferred.work {
            if deferred.is_stuck() && run.region.is_ending() {
                // The thread that ends it must not wait for this.
                run.mark_stuck();
            }
        }
        Some(deferred)
    }

    fn tell_stuck(&self, descriptor: &Descriptor, work: &Work, errno: Errno) {
        let serving = descriptor.lock_shard(self.thread);
        let Some(serving) = &*serving else { return };
        let (region, addresses) = match work {
            Work::Load(run, _) | Work::Install(run, _) => (run.region.id, run.addresses()),
            Work::Fault(fault) => match serving.layout.find(fault.address) {
                Some(segment) => (segment.region.id, page_of(fault.address)),
                None => return,
            },
            Work::Stray { .. } | Work::Answered { .. } | Work::Read => return,
        };
        let (region, address) = (RegionId(region), addresses.start);
        self.shared.fill.report(Problem::Stuck { region, address, errno });
        // Perhaps the memory is gone without an event, as that of a truncated file. The waiting thread finds out.
        wake(&serving.uffd, addresses);
    }

    fn defer(&mut self, deferred: Deferred) {
        let Deferred { work, .. } = &deferred;
        event!(
            DEBUG,
            "put off",
            work = tracing::field::debug(work),
            delay = tracing::field::debug(deferred.delay())
        );
        let joined = matches!(work, Work::Fault(fault) | Work::Stray { fault, .. } if !fault.joined);
        match self.shared.retries.put(deferred) {
            Put::Entered => {}
            Put::Merged => self.shared.fill.counters(self.thread).duplicates.add(joined.into()),
            Put::NoRoom(Deferred { descriptor, work, .. }) => {
                // The thread faults again at once. Don't retry at full speed.
                thread::sleep(retry::NO_MEMORY_DELAY);
                if let (Work::Read, Some(serving)) = (&work, &*descriptor.lock_shard(self.thread)) {
                    self.shared.poll.rearm(&descriptor, serving.uffd.as_fd());
                }
                self.filler.give_up(&descriptor, work);
            }
        }
    }
}
