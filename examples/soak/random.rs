//! Numbers that are random to the pager, and the same for the same seed.

/// The splitmix64 generator.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Another sequence for each list of numbers.
    pub(crate) fn new(seed: &[u64]) -> Self {
        Self(seed.iter().fold(0, |state, number| mix(state ^ mix(*number))))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(crate) fn one_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }
}

/// A number in which every bit depends on each bit of another.
pub(crate) fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
