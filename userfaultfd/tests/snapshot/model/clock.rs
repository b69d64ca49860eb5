//! The order of what happens, and threads that let others run.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::random::Random;

/// The longest time for which a thread waits for others. On a busy machine that is one turn of theirs.
const PATIENCE: Duration = Duration::from_micros(100);

/// Counts what happens.
#[derive(Debug, Default)]
pub(super) struct Clock(AtomicU64);

impl Clock {
    /// The next number, from 1 on.
    pub(super) fn now(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Lets up to `limit` things happen. Not for long: the threads that do them may wait for this one, or be done.
    pub(super) fn wait(&self, random: &mut Random, limit: usize) {
        let things = random.below(limit) as u64;
        let (start, until) = (Instant::now(), self.0.load(Ordering::SeqCst) + things);
        while self.0.load(Ordering::SeqCst) < until && start.elapsed() < PATIENCE {
            thread::yield_now();
        }
    }
}

/// Lets a little time pass; now and then others run.
pub(super) fn dawdle(random: &mut Random, limit: usize) {
    (0..random.below(limit * 200)).for_each(|_| std::hint::spin_loop());
    if random.one_in(12) {
        thread::yield_now();
    }
}
