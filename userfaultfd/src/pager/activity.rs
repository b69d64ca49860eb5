//! What each thread that resolves faults, or reads ahead for them, is doing: a word that the other threads look at.

use std::fmt;
use std::sync::atomic::Ordering;

use crate::sync::AtomicU64;

const STATE: u64 = 0b11;
/// A place for a worker that may be added.
const VACANT: u64 = 0;
const IDLE: u64 = 1;
const AT_WORK: u64 = 2;
/// At work, and in a source.
const READING: u64 = 3;

/// With [`READING`]: the reads before took long.
const SLOW: u64 = 1 << 2;

/// These bits count the reads, so that two of them are told apart: one of them, and all.
const READ: u64 = 1 << 3;
const READS: u64 = (1 << REGION) - READ;

/// With [`READING`]: the lower half of the region's number, from this bit on.
const REGION: u32 = 32;

/// The word of one thread, which no other thread writes while there is that thread.
#[repr(align(128))] // no line of the cache, nor the one that is fetched with it, is another thread's
pub(crate) struct Activity(AtomicU64);

impl Activity {
    /// The place of a thread that there is.
    pub(crate) const fn idle() -> Self {
        Self(AtomicU64::new(IDLE))
    }

    /// A place for a worker that may be added.
    pub(crate) const fn missing() -> Self {
        Self(AtomicU64::new(VACANT))
    }

    // Relaxed: no other memory is read because of what is seen here.
    fn set(&self, bits: u64) {
        let reads = self.0.load(Ordering::Relaxed) & READS;
        self.0.store(reads | bits, Ordering::Relaxed);
    }

    pub(crate) fn set_missing(&self) {
        self.set(VACANT);
    }

    pub(crate) fn set_at_work(&self, at_work: bool) {
        self.set(if at_work { AT_WORK } else { IDLE });
    }

    /// The thread begins to read the source of a region. Ends with [`set_at_work`](Self::set_at_work).
    pub(crate) fn set_reading(&self, region: u64, is_slow: bool) {
        let before = self.0.load(Ordering::Relaxed);
        let reads = before.wrapping_add(READ) & READS;
        let slow = if is_slow { SLOW } else { 0 };
        self.0.store(region << REGION | reads | slow | READING, Ordering::Relaxed);
    }

    pub(crate) fn look(&self) -> Doing {
        Doing(self.0.load(Ordering::Relaxed))
    }
}

/// What a thread was doing at a moment. Equal for two moments at which it was in the same read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Doing(u64);

impl Doing {
    pub(crate) fn is_missing(self) -> bool {
        self.0 & STATE == VACANT
    }

    /// At work, and not in a source.
    pub(crate) fn is_at_work(self) -> bool {
        self.0 & STATE == AT_WORK
    }

    pub(crate) fn is_reading(self) -> bool {
        self.0 & STATE == READING
    }

    /// In a source, and the reads before took long.
    pub(crate) fn is_reading_slowly(self) -> bool {
        self.is_reading() && self.0 & SLOW != 0
    }

    /// In the source of a region.
    pub(crate) fn is_reading_of(self, region: u64) -> bool {
        self.is_reading() && self.0 >> REGION == region & u64::from(u32::MAX)
    }
}

impl fmt::Debug for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 & STATE {
            VACANT => f.write_str("missing"),
            IDLE => f.write_str("idle"),
            AT_WORK => f.write_str("at work"),
            _ => write!(f, "in read {} of region {}", self.0 as u32 / READ as u32, self.0 >> REGION),
        }
    }
}

/// Reads that were in progress at a moment, of sources that weren't slow before. Equal for two moments if none of them has
/// ended, and none begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reads(u64);

impl Reads {
    pub(crate) fn add(&mut self, doing: Doing) {
        self.0 = self.0.rotate_left(7) ^ doing.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_told_from_the_next_one() {
        crate::support::require!();
        let activity = Activity::idle();
        let reading = |region, is_slow| {
            activity.set_reading(region, is_slow);
            activity.look()
        };
        let first = reading(7, false);
        assert!(first.is_reading() && !first.is_reading_slowly() && !first.is_at_work());
        assert_eq!(first, activity.look());
        activity.set_at_work(true);
        assert!(activity.look().is_at_work() && !activity.look().is_reading());
        let second = reading(7, true);
        assert!(second.is_reading_slowly() && second.is_reading_of(7) && !second.is_reading_of(8));
        assert_ne!(first, second);
        assert!(reading(7 | 1 << 32, false).is_reading_of(7), "the lower half tells");
        activity.set_missing();
        assert!(activity.look().is_missing());
    }

    #[test]
    fn the_count_of_reads_spoils_nothing_when_it_is_full() {
        crate::support::require!();
        let activity = Activity(AtomicU64::new(READS | IDLE));
        activity.set_reading(3, false);
        assert_eq!(format!("{:?}", activity.look()), "in read 0 of region 3");
    }
}
