//! Fillers for threads that aren't the pager's: as many as are in use at the same time. Those that nobody uses keep their
//! numbers, and their counters.

use std::ops::{Deref, DerefMut};
use std::thread;

use super::filler::PageFiller;
use super::retry;
use crate::lock_order::{RankedMutex, lock, rank};
use crate::mapped_vec::{self, MappedVec};
use crate::pager::stats::ThreadCounters;

/// The fillers of a pager for callers, background threads, and workers that are added.
#[derive(Debug)]
pub(crate) struct FillerPool(RankedMutex<Pool, { rank::STORE }>);

#[derive(Debug)]
struct Pool {
    /// With room for all that were made: a worker that ends allocates nothing.
    idle: MappedVec<PageFiller>,
    /// How many there are.
    made: usize,
}

impl FillerPool {
    pub(crate) fn new() -> Self {
        Self(RankedMutex::new(Pool { idle: mapped_vec::none(), made: 0 }))
    }

    /// A filler for a caller, or for a thread in the background, which has it alone: neither waits for the source or the
    /// callback of another.
    pub(crate) fn lease(&self, counters: &ThreadCounters) -> Lease<'_> {
        let filler = loop {
            if let Some(filler) = self.take(counters) {
                break filler;
            }
            // There is no memory for its counters. Callers wait for that, as faults do.
            thread::sleep(retry::NO_MEMORY_DELAY);
        };
        Lease { pool: self, filler }
    }

    /// The same, for a worker. `None`: there is no memory for one more.
    pub(crate) fn take(&self, counters: &ThreadCounters) -> Option<PageFiller> {
        let mut pool = lock(&self.0);
        if let Some(filler) = pool.idle.pop() {
            return Some(filler);
        }
        let made = pool.made + 1;
        pool.idle.try_reserve(made).ok()?;
        let thread = counters.initial() + pool.made;
        if !counters.ensure(thread) {
            return None;
        }
        pool.made = made;
        Some(PageFiller::new(thread))
    }

    /// Takes back the number of a filler, whose buffers are gone.
    pub(crate) fn put(&self, thread: usize) {
        lock(&self.0).idle.push(PageFiller::new(thread));
    }
}

/// A filler, until it is dropped.
pub(crate) struct Lease<'a> {
    pool: &'a FillerPool,
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
        self.pool.put(self.filler.thread);
    }
}
