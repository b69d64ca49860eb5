//! Workers that are bound to a CPU, that of the thread that faults, and where they may run otherwise.
//!
//! All that is exchanged here is the numbers themselves: nothing else is read because of them, so that their orderings are
//! relaxed. The control thread, which looks at them every few milliseconds, may find them a moment late.

use std::iter;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::pager::bell::Bell;
use crate::sys::{self, CpuSet};

/// A worker that isn't bound.
pub(super) const FREE: i32 = 0;

/// One that was, and didn't get on there.
pub(super) const STARVED: i32 = -1;

/// Whether a worker is bound to a CPU.
#[derive(Debug)]
#[repr(align(128))] // no line of the cache, nor the one that is fetched with it, is another thread's
struct Bound {
    /// The thread, or one of the above.
    thread: AtomicI32,
    /// How often it has begun to answer faults.
    turns: AtomicU32,
}

/// Which workers are bound, by their places.
#[derive(Debug)]
pub(crate) struct Bindings {
    workers: Box<[Bound]>,
    /// Where workers run that aren't bound: asked before the first is, since none of them knows more then.
    anywhere: OnceLock<Option<CpuSet>>,
    bell: Arc<Bell>,
}

impl Bindings {
    pub(crate) fn new(places: usize, bell: Arc<Bell>) -> Self {
        let bound = || Bound { thread: AtomicI32::new(FREE), turns: AtomicU32::new(0) };
        let workers = iter::repeat_with(bound).take(places).collect();
        Self { workers, anywhere: OnceLock::new(), bell }
    }

    /// How many places there are.
    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }

    /// The calling worker gets on.
    pub(super) fn take_turn(&self, place: usize) {
        // A load and a store: no other thread changes it.
        let turns = &self.workers[place].turns;
        turns.store(turns.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// How often a worker has begun to answer faults.
    pub(super) fn turns(&self, place: usize) -> u32 {
        self.workers[place].turns.load(Ordering::Relaxed)
    }

    /// The thread of a bound worker, or [`FREE`] or [`STARVED`].
    pub(super) fn thread(&self, place: usize) -> i32 {
        self.workers[place].thread.load(Ordering::Relaxed)
    }

    /// Whether the worker was idle, and so may be bound at once by the next fault.
    pub(super) fn is_free(&self, place: usize) -> bool {
        self.thread(place) == FREE
    }

    /// The calling worker can't be bound, until it has answered more faults.
    pub(super) fn give_up(&self, place: usize) {
        self.workers[place].thread.store(STARVED, Ordering::Relaxed);
    }

    /// The worker of a place ends.
    pub(super) fn end(&self, place: usize) {
        self.workers[place].thread.store(FREE, Ordering::Relaxed);
    }

    /// Binds the calling worker to a CPU.
    pub(super) fn bind(&self, place: usize, cpu: usize) {
        if self.anywhere.get_or_init(|| sys::affinity().ok()).is_none() || sys::run_on(cpu).is_err() {
            // Without the permission it stays where it is.
            return self.give_up(place);
        }
        if self.workers[place].thread.swap(sys::own_thread(), Ordering::Relaxed) <= FREE {
            // The control thread must begin to look after it.
            self.bell.ring();
        }
    }

    /// Where workers run that aren't bound. `None` while none was bound, or where that can't be told.
    pub(super) fn anywhere(&self) -> Option<CpuSet> {
        *self.anywhere.get()?
    }

    /// Frees a worker that is bound still, and lets it run anywhere. `state` is [`FREE`] or [`STARVED`].
    pub(super) fn free(&self, place: usize, thread: i32, state: i32, anywhere: &CpuSet) {
        let bound = &self.workers[place].thread;
        if bound.compare_exchange(thread, state, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            // It may have ended.
            let _moved = sys::set_affinity(thread, anywhere);
        }
    }
}
