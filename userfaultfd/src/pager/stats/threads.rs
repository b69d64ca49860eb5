//! The counters of each thread that counts.

use std::sync::OnceLock;

use super::{Counters, Statistics};

/// The counters of a pager's threads, by number, and of the callers and other threads that fill for it: those come and go, so
/// that theirs are made when they are needed.
pub(crate) struct ThreadCounters {
    initial: Box<[Counters]>,
    /// Blocks, each twice as long as the one before. None moves once it is there.
    more: [OnceLock<Box<[Counters]>>; usize::BITS as usize],
}

/// Counters of the first block. Four callers at once are many already, and a block is one allocation.
const FIRST_BLOCK_LEN: usize = 4;

impl ThreadCounters {
    pub(crate) fn new(threads: usize) -> Self {
        let initial = (0..threads).map(|_| Counters::new()).collect();
        Self { initial, more: [const { OnceLock::new() }; usize::BITS as usize] }
    }

    /// The number of threads that have counters from the start.
    pub(crate) fn initial(&self) -> usize {
        self.initial.len()
    }

    /// The counters of a thread, for that thread.
    pub(crate) fn of(&self, thread: usize) -> &Counters {
        match self.initial.get(thread) {
            Some(counters) => counters,
            None => {
                let (block, at) = place(thread - self.initial.len());
                &self.more[block].get().expect("a thread has its counters before its number")[at]
            }
        }
    }

    /// Makes counters for a thread, unless there are. Returns whether there are; `false`: there is no memory.
    pub(crate) fn ensure(&self, thread: usize) -> bool {
        let Some(number) = thread.checked_sub(self.initial.len()) else { return true };
        let (block, _) = place(number);
        if self.more[block].get().is_none() {
            let (mut counters, len) = (Vec::new(), FIRST_BLOCK_LEN << block);
            if counters.try_reserve_exact(len).is_err() {
                return false;
            }
            counters.extend((0..len).map(|_| Counters::new()));
            // Another thread may be faster.
            let _made = self.more[block].set(counters.into_boxed_slice());
        }
        true
    }

    /// The sum of all.
    pub(crate) fn sum(&self) -> Statistics {
        let more = self.more.iter().filter_map(OnceLock::get).flatten();
        self.initial.iter().chain(more).map(Counters::snapshot).sum()
    }
}

/// The block of a number, and the place in it.
fn place(number: usize) -> (usize, usize) {
    let block = (number / FIRST_BLOCK_LEN + 1).ilog2() as usize;
    (block, number - FIRST_BLOCK_LEN * ((1 << block) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_threads_are_each_their_own() {
        crate::support::require!();
        let counters = ThreadCounters::new(3);
        for thread in 0..100 {
            assert!(counters.ensure(thread));
            counters.of(thread).fills.add(thread as u64 + 1);
        }
        assert!((0..100).all(|thread| counters.of(thread).fills.get() == thread as u64 + 1));
        assert_eq!(counters.sum().fills, (1..=100).sum::<u64>());
    }
}
