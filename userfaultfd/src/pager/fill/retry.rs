//! Work that is put off, and when it is tried again: the one policy for everything that has to wait, in a worker's queue
//! or in a caller's thread.
//!
//! The threads that serve faults share a queue. A thread that reads a source for long keeps nobody's work: a timer among
//! the descriptors that all of them poll wakes any thread that is free.
//!
//! A fill that the kernel refuses with `EAGAIN` waits until a change of the layout has been read and the thread that made
//! it has run on. Where a process makes one change after the other, that moment is over some microseconds after each
//! read. So the thread that reads a change takes such work out of the queue and tries it at once, for
//! [`AFTER_CHANGE`], before it reads on; the timer is for changes that nothing follows.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::work::{RetryAfter, Work, page_of};
use crate::mapped_vec::MappedVec;
use crate::pager::RetryPolicy;
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Descriptor, lock};
use crate::{Errno, mapped_vec, sys};

/// Entries that the queue has room for from the start. It grows in a mapping of its own.
pub(crate) const QUEUE_ROOM: usize = 256;

/// How long work is tried again after a change was read. Longer keeps the next change from being read.
pub(crate) const AFTER_CHANGE: Duration = Duration::from_micros(20);

/// Changes in a row after each of which nothing got through, before the thread that reads them moves to another CPU. The
/// thread that makes them shares its CPU then, it seems, and so never runs while this one tries. On two CPUs nearly each
/// change lets a fill through.
pub(crate) const MISSES_BEFORE_MOVE: u32 = 8;

/// How long the kernel may refuse a fill before that is reported.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// The longest delay of a fill that waits for a change of the layout.
const CHANGE_DELAY: Duration = Duration::from_millis(1);

/// The longest delay of work that waits for memory, or for another thread.
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// The shortest delay of what is tried on with a delay that doubles.
const FIRST_DELAY: Duration = Duration::from_millis(1);

/// The longest delay of work that finds something in its way, again and again, and of a fault that finds no region.
const CONTESTED_DELAY: Duration = Duration::from_millis(64);
const STRAY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay of a source that fails.
const SOURCE_DELAY: Duration = Duration::from_secs(60);

/// The delay where there is no memory to put work off.
pub(crate) const NO_MEMORY: Duration = Duration::from_millis(1);

/// The delay until it is looked again whether what other threads are busy with is settled.
pub(crate) const BUSY: Duration = Duration::from_millis(1);

/// Delay before work is retried that has found something in its way `times` times.
pub(crate) fn contested(times: u8) -> RetryAfter {
    RetryAfter::Delay(doubled(FIRST_DELAY, times.into(), CONTESTED_DELAY))
}

/// Likewise, of a fault that has found no region `times` times.
pub(crate) fn stray(times: u32) -> RetryAfter {
    RetryAfter::Delay(doubled(FIRST_DELAY, times, STRAY_DELAY))
}

fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX)).min(longest)
}

impl RetryPolicy {
    /// Delay before a source is retried that has failed `attempts` times. `None`: it isn't.
    pub(crate) fn delay_after(self, attempts: u32) -> Option<Duration> {
        let again = attempts < self.attempts.max(1);
        again.then(|| doubled(self.delay, attempts.saturating_sub(1), SOURCE_DELAY))
    }
}

/// The longest time until the queue is searched for work of regions that end, and of descriptors that are closed.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A piece of work that is put off.
#[derive(Debug)]
pub(crate) struct Deferred {
    pub(crate) descriptor: Arc<Descriptor>,
    pub(crate) work: Work,
    pub(crate) history: History,
    wait: RetryAfter,
    /// When it was put off the last time, and until when.
    at: Instant,
    due: Instant,
}

/// What became of a piece of work so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    /// When it was put off for the first time.
    since: Instant,
    /// Whether it was reported that it waits.
    reported: bool,
}

impl History {
    /// Of what has to wait for the first time.
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), reported: false }
    }

    /// How long to wait at a moment before the next try.
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

impl Deferred {
    /// Work that is put off, once more if it has a history.
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

    /// Whether it has waited for so long that nobody who ends its region waits for it.
    pub(crate) fn is_stuck(&self) -> bool {
        let waited = self.at.saturating_duration_since(self.history.since);
        matches!(self.wait, RetryAfter::KernelBusy(_) | RetryAfter::OtherLoad) && waited >= STUCK_AFTER
    }

    /// Why the kernel refuses it, once it has done so for long. The next time it is `None`.
    pub(crate) fn report(&mut self) -> Option<Errno> {
        match self.wait {
            RetryAfter::KernelBusy(errno) if self.is_stuck() && !self.history.reported => {
                self.history.reported = true;
                Some(errno)
            }
            _ => None,
        }
    }

    /// Whether it is worth trying once a change of the layout was read. Not if it has to be loaded again.
    pub(crate) fn waits_for_change(&self) -> bool {
        self.wait == RetryAfter::KernelBusy(Errno::EAGAIN) && !matches!(self.work, Work::Load(..))
    }

    /// Whether it need not wait any longer.
    fn is_due(&self, now: Instant) -> bool {
        // What is put off anew after that moment waits: a change may have to be read in between.
        self.due <= now || self.at < now && (self.work.is_ending() || self.descriptor.is_closed())
    }

    /// Whether this stands for other work as well, which wakes the same threads.
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

/// What the threads that serve faults have put off.
#[derive(Debug)]
pub(crate) struct RetryQueue {
    entries: Mutex<Entries>,
    /// How many there are, to be asked without the lock.
    count: AtomicUsize,
    timer: OwnedFd,
}

#[derive(Debug)]
struct Entries {
    all: MappedVec<Deferred>,
    /// When the timer expires.
    armed: Option<Instant>,
}

/// How an entry was put into the queue.
#[derive(Debug)]
pub(crate) enum Put {
    Entered,
    /// Another entry stands for it.
    Merged,
    /// There is no memory for one more.
    NoRoom(Deferred),
}

impl RetryQueue {
    pub(crate) fn new() -> Result<Self, Errno> {
        let all = mapped_vec::try_with_room(QUEUE_ROOM).ok_or(Errno::ENOMEM)?;
        let entries = Mutex::new(Entries { all, armed: None });
        Ok(Self { entries, count: AtomicUsize::new(0), timer: sys::timer()? })
    }

    /// Becomes readable when something is due.
    pub(crate) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    pub(crate) fn put(&self, new: Deferred) -> Put {
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.all.iter_mut().find(|entry| entry.includes(&new)) {
            if let Work::Stray { again, .. } = &mut entry.work {
                *again = true;
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

    /// Takes what was due at a moment, one at a time: others may take the next meanwhile.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Deferred> {
        let mut entries = lock(&self.entries);
        let at = entries.all.iter().position(|entry| entry.is_due(now));
        let due = at.map(|at| entries.all.remove(at));
        self.count.store(entries.all.len(), Ordering::Relaxed);
        let next = entries.all.iter().map(|entry| if entry.is_due(now) { now } else { entry.due }).min();
        self.arm(&mut entries, next);
        due
    }

    /// Moves what waits for a change of a descriptor's layout to a list, as far as that has room.
    pub(crate) fn take_changing(&self, descriptor: &Arc<Descriptor>, to: &mut MappedVec<Deferred>) {
        // One that is put in just now is tried by the thread that does that.
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

    /// How many pages of some segments wait for the kernel for so long that no end is in sight, and whether it lets them
    /// wait for changes alone, which are read.
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

    /// Takes any entry. For when nobody tries them any more.
    pub(crate) fn take_any(&self) -> Option<Deferred> {
        let mut entries = lock(&self.entries);
        let any = entries.all.pop();
        self.count.store(entries.all.len(), Ordering::Relaxed);
        any
    }

    /// Has the queue looked at by any thread.
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
}
