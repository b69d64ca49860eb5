//! Numbers that look random: the generator of the tests, and what benchmarks ask of it.

use std::hash::{BuildHasher, Hasher, RandomState};

#[path = "../../tests/support/random.rs"]
#[allow(dead_code, reason = "each benchmark uses a part")]
mod generator;

pub(crate) use self::generator::Random;

impl Random {
    /// With a seed that differs from run to run.
    pub(crate) fn of_this_run() -> Self {
        Self::new(RandomState::new().build_hasher().finish())
    }

    /// At least 0 and less than 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The numbers below `count`, each order being as likely.
    pub(crate) fn shuffled(&mut self, count: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..count).collect();
        for end in (1..count).rev() {
            all.swap(end, self.below(end + 1));
        }
        all
    }
}
