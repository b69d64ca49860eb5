//! Locks that know their place in the order in which a thread takes them.
//!
//! `pager/CONCURRENCY.md` has the order, with a rank for each lock of a pager, a tracker and a snapshot. A build with debug assertions checks it: a
//! thread that takes a lock below one that it holds panics, also where no other thread is there to deadlock with. In a
//! release build the rank is a parameter of the type, and nothing else is left of it.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// The ranks, in the order in which locks are taken.
pub(crate) mod rank {
    /// That regions of a pager are added one after the other.
    pub(crate) const REGION: u8 = 1;
    /// That one thread at a time chooses a slot, a thread or a step.
    pub(crate) const TURN: u8 = 2;
    /// The table of descriptors.
    pub(crate) const TABLE: u8 = 3;
    /// The address map of a descriptor. A thread takes several of this rank by their addresses, which are those of one slice.
    pub(crate) const LAYOUT: u8 = 4;
    /// Queues: nothing else is locked while one is.
    pub(crate) const QUEUE: u8 = 5;
    /// What may be held by a thread that waits for the allocator.
    pub(crate) const STORE: u8 = 6;
    /// Who holds which memory, for texts of errors.
    pub(crate) const HOLDERS: u8 = 7;

    // Those of trackers, of which no thread of a pager takes any.

    /// All trackers and snapshots of the process.
    pub(crate) const WATCHES: u8 = 1;
    /// That a tracker changes protection.
    pub(crate) const WORK: u8 = 2;
    /// That a tracker resolves a fault.
    pub(crate) const RESOLVING: u8 = 3;
    /// The bits of a tracked range and the protection of its pages.
    pub(crate) const BITS: u8 = 4;
    /// Which ranges a tracker has.
    pub(crate) const RANGES: u8 = 5;
}

/// A lock of a rank. Taken by [`lock`].
#[derive(Debug, Default)]
pub(crate) struct RankedMutex<T, const RANK: u8>(Mutex<T>);

impl<T, const RANK: u8> RankedMutex<T, RANK> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// The value, of which this is the only borrow.
    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a lock, also one that a thread held which panicked: what these locks guard is whole between any two statements.
#[inline]
pub(crate) fn lock<T, const RANK: u8>(mutex: &RankedMutex<T, RANK>) -> LockGuard<'_, T> {
    // Before it waits: a deadlock shows nothing.
    let held = order::enter(RANK, std::ptr::from_ref(mutex).addr());
    LockGuard { guard: mutex.0.lock().unwrap_or_else(PoisonError::into_inner), _held: held }
}

/// Takes a lock unless another thread has it.
pub(crate) fn try_lock<T, const RANK: u8>(mutex: &RankedMutex<T, RANK>) -> Option<LockGuard<'_, T>> {
    let held = order::enter(RANK, std::ptr::from_ref(mutex).addr());
    match mutex.0.try_lock() {
        Ok(guard) => Some(LockGuard { guard, _held: held }),
        Err(TryLockError::Poisoned(poisoned)) => {
            Some(LockGuard { guard: poisoned.into_inner(), _held: held })
        }
        Err(TryLockError::WouldBlock) => None,
    }
}

/// A lock that is held until this is dropped.
#[derive(Debug)]
pub(crate) struct LockGuard<'a, T> {
    guard: MutexGuard<'a, T>,
    _held: order::Held,
}

impl<T> LockGuard<'_, T> {
    /// Waits for a condition variable while something is so. The lock counts as held meanwhile: the thread takes no other.
    pub(crate) fn wait_while(self, changed: &Condvar, condition: impl FnMut(&mut T) -> bool) -> Self {
        let Self { guard, _held } = self;
        let guard = changed.wait_while(guard, condition).unwrap_or_else(PoisonError::into_inner);
        Self { guard, _held }
    }

    /// The same, for a time at most.
    pub(crate) fn wait_timeout_while(
        self,
        changed: &Condvar,
        timeout: Duration,
        condition: impl FnMut(&mut T) -> bool,
    ) -> Self {
        let Self { guard, _held } = self;
        let waited = changed.wait_timeout_while(guard, timeout, condition);
        Self { guard: waited.unwrap_or_else(PoisonError::into_inner).0, _held }
    }

    /// Waits for one notice. It may return without.
    pub(crate) fn wait(self, changed: &Condvar) -> Self {
        let Self { guard, _held } = self;
        Self { guard: changed.wait(guard).unwrap_or_else(PoisonError::into_inner), _held }
    }

    /// Waits for one notice, or a time. It may return without either.
    pub(crate) fn wait_timeout(self, changed: &Condvar, timeout: Duration) -> Self {
        let Self { guard, _held } = self;
        let waited = changed.wait_timeout(guard, timeout);
        Self { guard: waited.unwrap_or_else(PoisonError::into_inner).0, _held }
    }
}

impl<T> Deref for LockGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for LockGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(not(debug_assertions))]
mod order {
    #[derive(Debug)]
    pub(super) struct Held;

    #[inline]
    pub(super) fn enter(_rank: u8, _address: usize) -> Held {
        Held
    }
}

/// What each thread holds. Neither allocates nor has a destructor: a worker may do neither.
#[cfg(debug_assertions)]
mod order {
    use std::cell::Cell;

    use super::rank;

    const RANKS: usize = rank::HOLDERS as usize + 1;

    #[derive(Clone, Copy)]
    struct Rank {
        held: usize,
        /// The address of the one that was taken last, as long as any is held.
        last: usize,
    }

    thread_local! {
        static HELD: Cell<[Rank; RANKS]> = const { Cell::new([Rank { held: 0, last: 0 }; RANKS]) };
    }

    #[derive(Debug)]
    pub(super) struct Held(u8);

    pub(super) fn enter(rank: u8, address: usize) -> Held {
        let mut all = HELD.get();
        let above = all[usize::from(rank) + 1..].iter().position(|rank| rank.held > 0);
        assert!(
            above.is_none(),
            "a lock of rank {rank} is taken while one of rank {} is held: see CONCURRENCY.md",
            usize::from(rank) + 1 + above.unwrap_or_default()
        );
        let own = &mut all[usize::from(rank)];
        assert!(
            own.held == 0 || rank == super::rank::LAYOUT && own.last < address,
            "two locks of rank {rank} are held, or layouts out of their order: see CONCURRENCY.md"
        );
        *own = Rank { held: own.held + 1, last: address };
        HELD.set(all);
        Held(rank)
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let mut all = HELD.get();
            all[usize::from(self.0)].held -= 1;
            HELD.set(all);
        }
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn panics(run: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(run)).is_err()
    }

    #[test]
    fn locks_are_taken_in_their_order_or_the_thread_panics() {
        crate::support::require!();
        let table = RankedMutex::<_, { rank::TABLE }>::new(1);
        let queue = RankedMutex::<_, { rank::QUEUE }>::new(2);
        let other = RankedMutex::<_, { rank::QUEUE }>::new(3);
        let held = lock(&table);
        assert_eq!(*held + *lock(&queue), 3);
        drop(held);
        let mut held = lock(&queue);
        *held += 1;
        assert!(panics(|| drop(lock(&table))), "upwards");
        assert!(panics(|| drop(lock(&other))), "two of one rank");
        drop(held);
        // As if nothing had been.
        assert_eq!(*lock(&table), 1);
        assert_eq!(*lock(&other), 3);
        assert_eq!(*lock(&queue), 3);
    }

    #[test]
    fn layouts_are_locked_by_index_and_no_other_rank_twice() {
        crate::support::require!();
        let shards = [const { RankedMutex::<_, { rank::LAYOUT }>::new(()) }; 3];
        let first = lock(&shards[0]);
        let last = lock(&shards[2]);
        assert!(panics(|| drop(lock(&shards[1]))), "backwards");
        drop((first, last));
        let _all: Vec<_> = shards.iter().map(lock).collect();
    }

    #[test]
    fn a_lock_counts_as_held_while_its_thread_waits() {
        crate::support::require!();
        let queue = RankedMutex::<_, { rank::QUEUE }>::new(0);
        let changed = Condvar::new();
        let held = lock(&queue).wait_timeout(&changed, Duration::from_micros(1));
        let held = held.wait_timeout_while(&changed, Duration::from_micros(1), |number| *number == 0);
        let held = held.wait_while(&changed, |number| *number != 0);
        assert!(panics(|| drop(lock(&queue))));
        drop(held);
        drop(lock(&queue));
    }
}
