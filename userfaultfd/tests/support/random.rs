//! Numbers that look random.

use std::ops::Range;

/// A generator, which gives the same numbers for the same seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number: splitmix64.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Whether one of `limit` cases is so.
    pub(crate) fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }

    /// Damages bytes in one of many ways: parts that are other ones, lacking, moved, doubled, or taken from other bytes; numbers that
    /// are huge.
    pub(crate) fn damage(&mut self, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
        if bytes.is_empty() {
            return bytes.push(self.next() as u8);
        }
        let part = self.range(bytes.len());
        let to = self.below(bytes.len());
        match self.below(8) {
            0 => bytes[to] ^= 1 << self.below(8),
            1 => bytes[part].fill_with(|| self.next() as u8),
            2 => bytes.truncate(to),
            3 => drop(bytes.drain(part)),
            4 => {
                let part = bytes[part].to_vec();
                drop(bytes.splice(to..to, part));
            }
            5 => {
                // A length, or a number of something.
                let huge = u64::MAX >> self.below(64);
                let number = if self.one_in(2) { huge.to_le_bytes() } else { huge.to_be_bytes() };
                let len = [1, 2, 4, 8][self.below(4)].min(bytes.len() - to);
                bytes[to..to + len].copy_from_slice(&number[..len]);
            }
            6 => bytes[to] = b"[]{}\",:0-9\\ \xff"[self.below(13)],
            _ => {
                let Some(other) =
                    others.get(self.below(others.len().max(1))).filter(|other| !other.is_empty())
                else {
                    return;
                };
                drop(bytes.splice(part, other[self.range(other.len())].iter().copied()));
            }
        }
    }

    /// A range within `0..limit` that isn't empty.
    pub(crate) fn range(&mut self, limit: usize) -> Range<usize> {
        let (a, b) = (self.below(limit), self.below(limit));
        a.min(b)..a.max(b) + 1
    }
}

/// For how many seconds bytes are damaged, if that is more than one.
const DAMAGE_SECONDS: &str = "USERFAULTFD_TEST_DAMAGE_SECONDS";

/// Does something with generators of different seeds for a second, or for as long as `USERFAULTFD_TEST_DAMAGE_SECONDS` says. A panic
/// tells the seed.
pub(crate) fn for_a_while(mut round: impl FnMut(&mut Random)) {
    let seconds = std::env::var(DAMAGE_SECONDS).map_or(1, |text| text.parse().expect("a number of seconds"));
    let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    for seed in 0_u64.. {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| round(&mut Random::new(seed))));
        if let Err(panic) = result {
            eprintln!("with seed {seed}");
            std::panic::resume_unwind(panic);
        }
        if std::time::Instant::now() > until {
            break;
        }
    }
}
