//! How many pages are resident, which threads may add to them, and which wait.
//!
//! Room is reserved before content is loaded, so that what is in flight counts.

use std::sync::Condvar;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::cgroup::{Cgroup, LOOK_INTERVAL};
use super::frames::{Frames, Need};
use super::residence::Residence;
use crate::lock_order::{LockGuard, RankedMutex, lock, rank};
use crate::owner::Owner;
use crate::sync::AtomicU64;

/// Pages of the least budget: fewer leave no room for what is in flight.
pub(super) const MIN_PAGES: usize = 16;

/// Pages of the largest budget: half of what a [`Place`](super::residence::Place) can count.
const MAX_PAGES: usize = 1 << 26;

/// Pages that one fault fills at most, of a budget without an end: 2 MiB of 4 KiB.
const MAX_RUN_PAGES: usize = 512;

/// Pages of a budget for each that one fault may fill.
pub(super) const RUN_SHARE: usize = 8;

/// Pages of a budget for each that may be filled ahead of one fault: they must fit into the policy's small queue, from where
/// they would leave before they are accessed.
const AHEAD_SHARE: usize = 16;

/// The delay until the evicting thread looks again whether what couldn't leave can: while threads wait for that, and later.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);
pub(super) const STUCK_INTERVAL: Duration = Duration::from_millis(100);

/// What the evicting thread and all others share.
pub(super) struct Pool {
    owner: Option<Owner>,
    /// In pages.
    limit: AtomicUsize,
    /// Pages that are in frames, or in flight to one.
    resident: AtomicUsize,
    /// The number of resident pages at which the evicting thread has to be woken.
    wake_at: AtomicUsize,
    frames: RankedMutex<Frames, { rank::QUEUE }>,
    /// The evicting thread waits for something to do.
    pub(super) work: Condvar,
    /// Others wait for room, or until the evicting thread has nothing in hand.
    pub(super) room: Condvar,
    pub(super) counters: Counters,
    /// The limit that it follows. The evicting thread locks it, alone.
    cgroup: Option<RankedMutex<Cgroup, { rank::QUEUE }>>,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) faults: AtomicU64,
    pub(crate) evictions: AtomicU64,
    pub(crate) refaults: AtomicU64,
    pub(crate) second_chances: AtomicU64,
    pub(crate) spilled: AtomicU64,
    pub(crate) unwritten: AtomicU64,
    pub(crate) write_backs: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) waited_ns: AtomicU64,
}

/// Pages of a budget of some bytes.
pub(super) fn pages_of(bytes: usize) -> usize {
    (bytes / crate::page_size()).min(MAX_PAGES)
}

/// The same, but no fewer than those of the least budget.
pub(super) fn pages_within(bytes: usize) -> usize {
    pages_of(bytes).max(MIN_PAGES)
}

pub(super) fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

impl Pool {
    /// A pool for some pages, or for what a cgroup leaves.
    pub(super) fn new(pages: usize, cgroup: Option<Cgroup>) -> Self {
        Self {
            owner: Owner::current().ok(),
            limit: AtomicUsize::new(pages),
            resident: AtomicUsize::new(0),
            wake_at: AtomicUsize::new(0),
            frames: RankedMutex::new(Frames::new(pages)),
            work: Condvar::new(),
            room: Condvar::new(),
            counters: Counters::default(),
            cgroup: cgroup.map(RankedMutex::new),
        }
    }

    /// Whether its limit is that of a cgroup.
    pub(super) fn follows_limit(&self) -> bool {
        self.cgroup.is_some()
    }

    /// Looks at that limit.
    pub(super) fn follow_limit(&self) {
        let Some(cgroup) = &self.cgroup else { return };
        let bytes = lock(cgroup).look();
        if let Some(bytes) = bytes {
            self.resize(pages_within(bytes));
        }
    }

    /// Changes how many pages it is for.
    pub(super) fn resize(&self, pages: usize) {
        let mut frames = self.lock();
        self.limit.store(pages, Ordering::SeqCst);
        frames.resize(pages);
        frames.set_stuck(false);
        self.work.notify_one();
        self.room.notify_all();
    }

    /// Counts a region no longer: see [`Budget::detach`](super::budget::Budget::detach).
    pub(super) fn part_with(&self, residence: &Residence) {
        let mut frames = self.lock();
        // From now on nothing of it becomes a victim, nor gets a frame.
        let Some(slot) = residence.member() else {
            // Another thread has begun this, and may still wait.
            return drop(self.wait_for_pass(frames));
        };
        residence.set_member(None);
        frames = self.wait_for_pass(frames);
        let (member, given_up) = frames.leave(slot);
        self.uncharge(given_up);
        frames.set_stuck(false);
        self.room.notify_all();
        drop(frames);
        drop(member);
    }

    /// Pages that are resident, with those in flight.
    pub(super) fn resident(&self) -> usize {
        self.resident.load(Ordering::SeqCst)
    }

    pub(super) fn lock(&self) -> LockGuard<'_, Frames> {
        lock(&self.frames)
    }

    /// Whether this is the process that made it: a fork's child may find it locked for ever.
    pub(super) fn is_here(&self) -> bool {
        self.owner.is_some_and(|owner| owner.is_current())
    }

    pub(super) fn limit(&self) -> usize {
        self.limit.load(Ordering::SeqCst)
    }

    /// Waits until the evicting thread has nothing in hand that it has chosen before.
    pub(super) fn wait_for_pass<'a>(&self, frames: LockGuard<'a, Frames>) -> LockGuard<'a, Frames> {
        let passes = frames.passes;
        let waits = |frames: &mut Frames| frames.is_busy && frames.passes == passes;
        frames.wait_while(&self.room, waits)
    }

    /// Waits until the evicting thread has nothing in hand, and keeps it from taking anything until [`resume`](Self::resume).
    /// Threads that wait for room wait for that, too: meanwhile nothing is allocated.
    pub(super) fn pause(&self) -> LockGuard<'_, Frames> {
        let mut frames = self.lock();
        frames.pauses += 1;
        frames.wait_while(&self.room, |frames| frames.is_busy)
    }

    pub(super) fn resume(&self, mut frames: LockGuard<'_, Frames>) {
        frames.pauses -= 1;
        self.work.notify_one();
    }

    /// Pages that one fault fills at most.
    pub(super) fn max_run(&self) -> usize {
        (self.limit() / RUN_SHARE).clamp(1, MAX_RUN_PAGES)
    }

    /// Pages that one fault has filled at most ahead of need, in several runs.
    pub(super) fn max_ahead(&self) -> usize {
        (self.limit() / AHEAD_SHARE).max(self.max_run())
    }

    /// Reserves room for some pages, and waits for it as long as others can leave. Not with a lock held. Returns how long it
    /// waited, if it did.
    pub(super) fn reserve(&self, pages: usize) -> Option<Duration> {
        let now = self.resident.fetch_add(pages, Ordering::SeqCst) + pages;
        if now >= self.wake_at.load(Ordering::SeqCst) {
            // Under the lock: it may be about to wait.
            let _frames = self.lock();
            self.work.notify_one();
        }
        (now > self.limit()).then(|| {
            self.uncharge(pages);
            self.wait_for_room(pages)
        })
    }

    #[cold]
    fn wait_for_room(&self, pages: usize) -> Duration {
        let since = Instant::now();
        let mut frames = self.lock();
        frames.waiting += 1;
        loop {
            let now = self.resident.fetch_add(pages, Ordering::SeqCst) + pages;
            // Nothing is waited for that can't leave: the thread that would let it may be this one, or wait for it.
            // Nor more than is ever made free: the budget has become smaller since the pages were claimed.
            if now <= self.limit() || pages > self.max_run() || !frames.may_shrink() {
                break;
            }
            self.uncharge(pages);
            // Also where another thread has taken the room that was made.
            if !frames.is_stuck() {
                self.work.notify_one();
            }
            frames = frames.wait(&self.room);
        }
        frames.waiting -= 1;
        since.elapsed()
    }

    /// Takes room without waiting for it.
    pub(super) fn charge(&self, pages: usize) {
        self.resident.fetch_add(pages, Ordering::SeqCst);
    }

    pub(super) fn uncharge(&self, pages: usize) {
        self.resident.fetch_sub(pages, Ordering::SeqCst);
    }

    /// Gives up room that was reserved and isn't needed, for which another thread may wait.
    pub(super) fn give_back(&self, pages: usize) {
        if pages > 0 {
            let frames = self.lock();
            self.uncharge(pages);
            if frames.waiting > 0 {
                self.room.notify_all();
            }
        }
    }

    /// Waits until there may be something to do for the evicting thread, or for no reason; with a timeout, while it is
    /// stuck, or what it needs is being written to a store, and where the limit must be looked at.
    pub(super) fn wait_for_work<'a>(
        &self,
        mut frames: LockGuard<'a, Frames>,
        waits_for_store: bool,
    ) -> LockGuard<'a, Frames> {
        if frames.is_stuck() || waits_for_store {
            let is_short = frames.is_stuck() && !frames.is_stuck_for_long();
            let interval = if is_short { RETRY_INTERVAL } else { STUCK_INTERVAL };
            return frames.wait_timeout(&self.work, interval);
        }
        self.wake_at.store(frames.wake_at(self), Ordering::SeqCst);
        // Either this sees what was reserved before, or the thread that reserves sees when to wake this.
        if frames.need(self) == Need::default() && !frames.has_requests() {
            frames = if self.follows_limit() {
                frames.wait_timeout(&self.work, LOOK_INTERVAL)
            } else {
                frames.wait(&self.work)
            };
        }
        self.wake_at.store(usize::MAX, Ordering::SeqCst);
        frames
    }

    /// Stops the evicting thread.
    pub(super) fn stop(&self) {
        self.lock().is_stopping = true;
        self.work.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::frames::{STUCK_PATIENCE, STUCK_TRIES};
    use super::*;
    use crate::pager::{Budget, ZeroSource};
    use crate::support::proc::wait_until;
    use crate::support::{page, require};
    use crate::{FeatureFlags, LazyMemory};

    /// Other threads have the pages that must leave, as they do for a moment: then threads that need room wait, and don't fill
    /// more than the limit. They do so if that lasts.
    #[test]
    fn thread_waits_for_room_until_nothing_has_left_for_long() {
        require!(FeatureFlags::PAGEFAULT_FLAG_WP);
        let budget = Budget::new(MIN_PAGES * page());
        let memory = LazyMemory::builder(ZeroSource).len(page()).budget(&budget).build().unwrap();
        assert_eq!(memory[9], 0);
        let pool = budget.pool();
        // The kernel wakes the reader before the page takes its frame.
        wait_until(|| pool.lock().may_shrink());
        // The evicting thread takes no page: what it has noted stays.
        drop(pool.pause());
        pool.charge(MIN_PAGES);
        thread::scope(|scope| {
            pool.lock().set_stuck_since(Instant::now() + Duration::from_secs(3600), STUCK_TRIES);
            let waiting = scope.spawn(|| pool.reserve(1));
            wait_until(|| waiting.is_finished() || pool.lock().waiting == 1);
            assert!(!waiting.is_finished());
            pool.lock().set_stuck_since(Instant::now().checked_sub(STUCK_PATIENCE).unwrap(), STUCK_TRIES);
            pool.room.notify_all();
            assert!(waiting.join().unwrap().is_some());
        });
        assert_eq!(pool.resident(), MIN_PAGES + 2);
        pool.give_back(MIN_PAGES + 1);
        pool.resume(pool.lock());
        assert_eq!(memory[9], 0);
    }

    /// On a busy machine it may not run for longer than others wait for it.
    #[test]
    fn evictor_is_stuck_for_long_after_some_tries() {
        require!();
        let mut frames = Frames::new(MIN_PAGES);
        let long_ago = Instant::now() - 2 * STUCK_PATIENCE;
        frames.set_stuck_since(long_ago, 0);
        (1..STUCK_TRIES).for_each(|_| frames.set_stuck(true));
        assert!(frames.is_stuck() && !frames.is_stuck_for_long());
        frames.set_stuck(true);
        assert!(frames.is_stuck_for_long());
        frames.set_stuck(false);
        assert!(!frames.is_stuck() && !frames.is_stuck_for_long());
    }
}
