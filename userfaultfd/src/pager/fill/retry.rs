//! Deferred work and its retries: the one policy for all work that must wait, in the workers' queue or in a caller's
//! thread.
//!
//! The workers share one queue. A worker that reads a source for long holds up no other work: a timer among the
//! descriptors that all workers poll wakes any free worker.
//!
//! A fill that the kernel refuses with `EAGAIN` must wait until a change of the layout was read and the thread that made
//! it has run on. Where a process makes one change after the other, a fill succeeds only for some microseconds after
//! each read. So the worker that reads a change takes such work out of the queue and retries it for
//! [`RETRY_AFTER_CHANGE`], before it reads on; the timer is for changes that no other change follows.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::work::{RetryAfter, Work, page_of};
use crate::lock_order::{RankedMutex, lock, rank, try_lock};
use crate::mapped_vec::MappedVec;
use crate::pager::RetryPolicy;
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::Descriptor;
use crate::{Errno, mapped_vec, sys};

/// Entries that the queue has room for from the start: 256 deferred fills are rare. It grows in a mapping of its own.
pub(crate) const QUEUE_ROOM: usize = 256;

/// Duration for which work is retried after a change was read: longer delays the reading of the next change.
///
/// Measured on two CPUs, as the time of 2,048 faults beside a thread that gives memory back without a pause, medians of
/// twelve runs: 80 ms for 5 µs, 85 for 10, 104 for 20, and of eight runs 119 for 30 and 137 for 40. Where a wake takes
/// longer, 5 µs can be too short for the changing thread to run on.
pub(crate) const RETRY_AFTER_CHANGE: Duration = Duration::from_micros(10);

/// Changes in a row after which no retry succeeded, before the worker that reads them moves to another CPU: the changing
/// thread then seems to share its CPU, and so never runs while the worker retries. On two CPUs nearly each change lets a
/// fill through.
pub(crate) const MISSES_BEFORE_MOVE: u32 = 8;

/// Duration for which the kernel may refuse a fill before that is reported.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// The longest delay of a fill that waits for a change of the layout.
const CHANGE_DELAY: Duration = Duration::from_millis(1);

/// The longest delay of work that waits for memory or for another thread.
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// The first of a series of doubling delays.
const FIRST_DELAY: Duration = Duration::from_millis(1);

/// The longest delays of work for which the kernel reports a present page again and again, and of a fault without a
/// region.
const CONTESTED_DELAY: Duration = Duration::from_millis(64);
const STRAY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between reads of a failing source.
const SOURCE_DELAY: Duration = Duration::from_secs(60);

/// The delay where there is no memory to defer work.
pub(crate) const NO_MEMORY_DELAY: Duration = Duration::from_millis(1);

/// The interval between looks whether all changes of the layout are read.
pub(crate) const CHANGE_INTERVAL: Duration = Duration::from_micros(50);

/// Duration for which a call waits without progress while the kernel lacks memory or is busy, or no thread reads events any
/// more.
pub(crate) const SHORT_PATIENCE: Duration = Duration::from_secs(3);

/// The interval between looks whether other threads have settled their work.
pub(crate) const BUSY_INTERVAL: Duration = Duration::from_millis(1);

/// The delay before work is retried for which the kernel has reported a present page `times` times.
pub(crate) fn contested(times: u8) -> RetryAfter {
    RetryAfter::Delay(doubled(FIRST_DELAY, times.into(), CONTESTED_DELAY))
}

/// The delay before a fault is retried that has found no region `times` times.
pub(crate) fn stray(times: u32) -> RetryAfter {
    RetryAfter::Delay(doubled(FIRST_DELAY, times, STRAY_DELAY))
}

fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX)).min(longest)
}

impl RetryPolicy {
    /// The delay before a source is retried that has failed `attempts` times. `None`: no retry.
    pub(crate) fn delay_after(self, attempts: u32) -> Option<Duration> {
        let again = attempts < self.attempts.max(1);
        again.then(|| doubled(self.delay, attempts.saturating_sub(1), SOURCE_DELAY))
    }
}

/// The longest interval between searches of the queue for work of ending regions and closed descriptors.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A piece of deferred work.
pub(crate) struct Deferred {
    pub(crate) descriptor: Arc<Descriptor>,
    pub(crate) work: Work,
    pub(crate) history: History,
    wait: RetryAfter,
    /// When it was last deferred, and until when.
    at: Instant,
    due: Instant,
}

/// The history of a piece of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    /// When it was first deferred.
    since: Instant,
    /// Whether it was reported that it waits.
    reported: bool,
}

impl History {
    /// The history of work that is deferred for the first time.
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), reported: false }
    }

    /// The delay before the next retry.
    pub(crate) fn delay(&self, wait: RetryAfter, at: Instant) -> Duration {
        let waited = at.saturating_duration_since(self.since);
        match wait {
            RetryAfter::Delay(delay) => delay,
            RetryAfter::LongDelay => LONGEST_DELAY,
            RetryAfter::KernelBusy(Errno::EAGAIN) => (waited / 8).clamp(CHANGE_DELAY / 16, CHANGE_DELAY),
            RetryAfter::KernelBusy(_) | RetryAfter::OtherLoad => {
                (waited / 8).clamp(FIRST_DELAY, LONGEST_DELAY)
            }
        }
    }
}

/// What the debug text shows of a piece of deferred work: a copy, since the text is made without a lock.
#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "read by its debug text")]
struct Shown {
    descriptor: u64,
    work: &'static str,
    address: Option<usize>,
    wait: RetryAfter,
    deferred: Duration,
    due_in: Duration,
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown(Instant::now()).fmt(f)
    }
}

impl Deferred {
    fn shown(&self, now: Instant) -> Shown {
        let (work, address) = match &self.work {
            Work::Fault(fault) => ("fault", Some(fault.address)),
            Work::Stray { fault, .. } => ("fault without a region", Some(fault.address)),
            Work::Read => ("read", None),
            Work::Load(run, _) => ("load", Some(run.address())),
            Work::Answered { .. } => ("answered load", None),
            Work::Install(run, _) => ("install", Some(run.address())),
        };
        Shown {
            descriptor: self.descriptor.id,
            work,
            address,
            wait: self.wait,
            deferred: now.saturating_duration_since(self.history.since),
            due_in: self.due.saturating_duration_since(now),
        }
    }

    /// Defers work, once more if it has a history.
    pub(crate) fn new(
        descriptor: &Arc<Descriptor>,
        work: Work,
        wait: RetryAfter,
        history: Option<History>,
    ) -> Self {
        let (descriptor, at) = (Arc::clone(descriptor), Instant::now());
        let history = history.filter(|_| !matches!(wait, RetryAfter::Delay(_)));
        let history = history.unwrap_or_else(History::new);
        let mut new = Self { descriptor, work, history, wait, at, due: at };
        new.due += new.delay();
        new
    }

    pub(crate) fn delay(&self) -> Duration {
        self.history.delay(self.wait, self.at)
    }

    /// Since when a thread waits for it: when it was first deferred. `None`: none does, as far as is known.
    pub(crate) fn waited_for_since(&self) -> Option<Instant> {
        let is_waited_for = !self.work.is_early() && !matches!(self.work, Work::Read);
        is_waited_for.then_some(self.history.since)
    }

    /// Whether it has waited for so long that the end of its region no longer waits for it.
    pub(crate) fn is_stuck(&self) -> bool {
        let waited = self.at.saturating_duration_since(self.history.since);
        matches!(self.wait, RetryAfter::KernelBusy(_) | RetryAfter::OtherLoad) && waited >= STUCK_AFTER
    }

    /// The errno with which the kernel has long refused it, or `None`; returned once.
    pub(crate) fn report(&mut self) -> Option<Errno> {
        match self.wait {
            RetryAfter::KernelBusy(errno) if self.is_stuck() && !self.history.reported => {
                self.history.reported = true;
                Some(errno)
            }
            _ => None,
        }
    }

    /// Whether to retry it once a change of the layout was read. Not if its content must be loaded again.
    pub(crate) fn waits_for_change(&self) -> bool {
        self.wait == RetryAfter::KernelBusy(Errno::EAGAIN) && !matches!(self.work, Work::Load(..))
    }

    /// Whether it is due.
    fn is_due(&self, now: Instant) -> bool {
        // Work deferred anew after that moment waits: a change may have to be read in between.
        self.due <= now || self.at < now && (self.work.is_ending() || self.descriptor.is_closed())
    }

    /// Whether this also stands for other work, which wakes the same threads.
    fn includes(&self, other: &Self) -> bool {
        let page = |work: &Work| match work {
            Work::Fault(fault) | Work::Stray { fault, .. } => Some(page_of(fault.address).start),
            _ => None,
        };
        Arc::ptr_eq(&self.descriptor, &other.descriptor)
            && match (&self.work, &other.work) {
                (Work::Read, Work::Read) => true,
                (one, other) => page(one).is_some() && page(one) == page(other),
            }
    }
}

/// The work that workers have deferred.
pub(crate) struct RetryQueue {
    entries: RankedMutex<Entries, { rank::QUEUE }>,
    /// Number of entries, readable without the lock.
    count: AtomicUsize,
    timer: OwnedFd,
}

#[derive(Debug)]
struct Entries {
    all: MappedVec<Deferred>,
    /// When the timer expires.
    armed: Option<Instant>,
}

/// The result of deferring an entry.
#[derive(Debug)]
pub(crate) enum Put {
    Entered,
    /// Another entry stands for the work.
    Merged,
    /// There is no memory for one more entry.
    NoRoom(Deferred),
}

impl fmt::Debug for RetryQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing is allocated while a worker may wait for the lock. What comes meanwhile isn't shown.
        let mut shown = Vec::with_capacity(self.count.load(Ordering::Relaxed));
        let now = Instant::now();
        let Some(entries) = try_lock(&self.entries) else { return f.write_str("locked") };
        shown.extend(entries.all.iter().take(shown.capacity()).map(|deferred| deferred.shown(now)));
        drop(entries);
        f.debug_list().entries(shown).finish()
    }
}

impl RetryQueue {
    pub(crate) fn new() -> Result<Self, Errno> {
        let all = mapped_vec::try_with_room(QUEUE_ROOM).ok_or(Errno::ENOMEM)?;
        let entries = RankedMutex::new(Entries { all, armed: None });
        Ok(Self { entries, count: AtomicUsize::new(0), timer: sys::timer()? })
    }

    /// Becomes readable when an entry is due.
    pub(crate) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    pub(crate) fn put(&self, new: Deferred) -> Put {
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.all.iter_mut().find(|entry| entry.includes(&new)) {
            if let Work::Stray { tries, again, .. } = &mut entry.work {
                *again = true;
                // The waiters that this worker woke may have faulted again meanwhile, and another worker may have read that.
                match new.work {
                    Work::Stray { tries: of_new, .. } if of_new > *tries => {
                        (*tries, entry.due) = (of_new, new.due);
                    }
                    _ => {}
                }
            }
            return Put::Merged;
        }
        if !mapped_vec::try_reserve(&mut entries.all) {
            return Put::NoRoom(new);
        }
        let due = new.due;
        entries.all.push(new);
        self.count.store(entries.all.len(), Ordering::Relaxed);
        if entries.armed.is_none_or(|armed| due < armed) {
            self.arm(&mut entries, Some(due));
        }
        Put::Entered
    }

    /// Takes an entry that was due at a moment: one at a time, so that other workers can take the next one.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Deferred> {
        let mut entries = lock(&self.entries);
        let due = |entry: &Deferred| entry.is_due(now);
        // What threads wait for comes first.
        let at = entries.all.iter().position(|entry| due(entry) && !entry.work.is_early());
        let at = at.or_else(|| entries.all.iter().position(due));
        let due = at.map(|at| entries.all.remove(at));
        self.count.store(entries.all.len(), Ordering::Relaxed);
        let next = entries.all.iter().map(|entry| if entry.is_due(now) { now } else { entry.due }).min();
        self.arm(&mut entries, next);
        due
    }

    /// Moves entries that wait for a change of a descriptor's layout to a list, while it has room.
    pub(crate) fn take_changing(&self, descriptor: &Arc<Descriptor>, to: &mut MappedVec<Deferred>) {
        // An entry that is deferred at this moment is retried by the thread that defers it.
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut entries = lock(&self.entries);
        let mut at = 0;
        while at < entries.all.len() && to.len() < to.capacity() {
            let entry = &entries.all[at];
            if Arc::ptr_eq(&entry.descriptor, descriptor) && entry.waits_for_change() {
                to.push(entries.all.remove(at));
            } else {
                at += 1;
            }
        }
        self.count.store(entries.all.len(), Ordering::Relaxed);
    }

    /// The number of pages of some segments that have long waited for the kernel, and whether all of them wait for changes
    /// alone, which are being read.
    pub(crate) fn stuck_pages(&self, segments: &[Segment]) -> (usize, bool) {
        let entries = lock(&self.entries);
        let (mut pages, mut for_changes) = (0, true);
        for entry in entries.all.iter().filter(|entry| entry.is_stuck()) {
            let (Work::Load(run, _) | Work::Install(run, _)) = &entry.work else { continue };
            let of_run = |segment: &&Segment| Arc::ptr_eq(&segment.region, &run.region);
            let inside = |segment: &Segment| {
                let (run, all) = (run.pages(), segment.pages());
                run.end.min(all.end).saturating_sub(run.start.max(all.start))
            };
            let inside: usize = segments.iter().filter(of_run).map(inside).sum();
            pages += inside;
            for_changes &= inside == 0 || entry.wait == RetryAfter::KernelBusy(Errno::EAGAIN);
        }
        (pages, for_changes)
    }

    /// Since when a thread waits for the entry that has waited longest.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        lock(&self.entries).all.iter().filter_map(Deferred::waited_for_since).min()
    }

    /// Takes any entry, once no worker retries them any more.
    pub(crate) fn take_any(&self) -> Option<Deferred> {
        let mut entries = lock(&self.entries);
        let any = entries.all.pop();
        self.count.store(entries.all.len(), Ordering::Relaxed);
        any
    }

    /// Makes any worker look at the queue.
    pub(crate) fn look(&self) {
        let now = Some(Instant::now());
        self.arm(&mut lock(&self.entries), now);
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.entries).all.len()
    }

    fn arm(&self, entries: &mut Entries, due: Option<Instant>) {
        let now = Instant::now();
        let due = due.map(|due| due.min(now + POLL_INTERVAL));
        if due != entries.armed || due.is_some_and(|due| due <= now) {
            entries.armed = due;
            sys::set_timer(self.timer.as_fd(), due.map(|due| due.saturating_duration_since(now)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::Fault;
    use super::*;

    #[test]
    fn a_source_is_asked_ever_more_rarely_and_as_often_as_told() {
        crate::support::require!();
        let retry = RetryPolicy { attempts: 40, delay: Duration::from_millis(10) };
        let delays: Vec<_> = (1..).map_while(|attempts| retry.delay_after(attempts)).collect();
        assert_eq!(delays.len(), 39);
        assert_eq!(delays[..3], [10, 20, 40].map(Duration::from_millis));
        assert!(delays.is_sorted() && delays[38] == SOURCE_DELAY, "{delays:?}");
        assert_eq!(RetryPolicy { attempts: 0, ..retry }.delay_after(1), None);
        let long = RetryPolicy { attempts: u32::MAX, delay: Duration::MAX };
        assert_eq!(long.delay_after(u32::MAX - 1), Some(SOURCE_DELAY));
    }

    #[test]
    fn work_waits_as_long_as_suits_what_it_waits_for() {
        crate::support::require!();
        let history = History::new();
        let after = |millis, wait| history.delay(wait, history.since + Duration::from_millis(millis));
        let (changes, memory) =
            (RetryAfter::KernelBusy(Errno::EAGAIN), RetryAfter::KernelBusy(Errno::ENOMEM));
        assert_eq!([0, 4, 60_000].map(|at| after(at, changes).as_micros()), [62, 500, 1000]);
        assert_eq!([0, 80, 60_000].map(|at| after(at, memory).as_millis()), [1, 10, 1000]);
        assert_eq!(after(60_000, RetryAfter::Delay(Duration::from_secs(7))), Duration::from_secs(7));
        assert_eq!(
            [0, 3, 200].map(contested),
            [1, 8, 64].map(|delay| RetryAfter::Delay(Duration::from_millis(delay)))
        );
        assert_eq!(
            [0, 3, 200].map(stray),
            [1, 8, 1000].map(|delay| RetryAfter::Delay(Duration::from_millis(delay)))
        );
    }

    #[test]
    fn returning_fault_without_a_region_keeps_its_count() {
        crate::support::require!();
        let memory = crate::support::memory::Memory::anonymous(1);
        let pager = crate::pager::Pager::new().unwrap();
        let region = crate::pager::Region::new(
            memory.start().expose_provenance(),
            memory.len(),
            |_: u64, _: &mut [u8]| Ok(crate::pager::PageData::Zero),
        );
        let uffd = crate::support::uffd(crate::FeatureFlags::empty());
        #[expect(unsafe_code, reason = "the memory is the test's")]
        // SAFETY: zeros are good bytes, and only raw pointers lead to them.
        let added = unsafe { pager.add_own(uffd, [region]) }.unwrap();
        let descriptor = pager.shared.table.find(added.descriptor.0).unwrap();
        let queue = RetryQueue::new().unwrap();
        let deferred = |tries| {
            let fault = Fault {
                address: memory.start().addr(),
                kind: crate::FaultKind::Missing,
                is_write: false,
                thread: 0,
                since: Instant::now(),
                joined: false,
            };
            let work = Work::Stray { fault, tries, again: tries == 0 };
            Deferred::new(&descriptor, work, stray(tries), None)
        };
        // A thread faults again while the worker that woke it hasn't put its work back: before and after that.
        for order in [[0, 9], [9, 0]] {
            assert!(matches!(queue.put(deferred(order[0])), Put::Entered));
            assert!(matches!(queue.put(deferred(order[1])), Put::Merged));
            assert!(queue.next_due(Instant::now() + Duration::from_millis(100)).is_none(), "it is the 9th");
            let taken = queue.next_due(Instant::now() + Duration::from_secs(10)).unwrap();
            assert!(matches!(taken.work, Work::Stray { tries: 9, again: true, .. }), "{taken:?}");
        }
    }
}
