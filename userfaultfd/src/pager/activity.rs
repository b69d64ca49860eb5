//! What each thread that resolves faults, or reads ahead for them, is doing: a word that the other threads look at.
//!
//! Workers and read-ahead threads write their words. The control thread looks whether sources keep all workers waiting;
//! background threads look whether a fault is being resolved.

use std::fmt;
use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use super::bell::Bell;
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
struct Activity {
    doing: AtomicU64,
    /// When the last read of a source began, in nanoseconds from [`Activities::base`].
    since: AtomicU64,
}

impl Activity {
    const fn of(doing: u64) -> Self {
        Self { doing: AtomicU64::new(doing), since: AtomicU64::new(0) }
    }

    /// The place of a thread that there is.
    const fn idle() -> Self {
        Self::of(IDLE)
    }

    /// A place for a worker that may be added.
    const fn missing() -> Self {
        Self::of(VACANT)
    }

    // Relaxed: no other memory is read because of what is seen here.
    fn set(&self, bits: u64) {
        let reads = self.doing.load(Ordering::Relaxed) & READS;
        self.doing.store(reads | bits, Ordering::Relaxed);
    }

    fn set_missing(&self) {
        self.set(VACANT);
    }

    fn set_at_work(&self, at_work: bool) {
        self.set(if at_work { AT_WORK } else { IDLE });
    }

    /// The thread begins to read the source of a region. Ends with [`set_at_work`](Self::set_at_work).
    fn set_reading(&self, region: u64, is_slow: bool) {
        let before = self.doing.load(Ordering::Relaxed);
        let reads = before.wrapping_add(READ) & READS;
        let slow = if is_slow { SLOW } else { 0 };
        self.doing.store(region << REGION | reads | slow | READING, Ordering::Relaxed);
    }

    fn look(&self) -> Doing {
        Doing(self.doing.load(Ordering::Relaxed))
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

/// The number of threads of each kind. Their places come in this order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadCounts {
    /// Workers that serve from the start.
    pub(crate) workers: usize,
    /// Threads that read ahead.
    pub(crate) read_ahead: usize,
    /// Workers that may be added.
    pub(crate) added: usize,
}

impl ThreadCounts {
    /// Threads that there are from the start.
    pub(crate) fn initial(self) -> usize {
        self.workers + self.read_ahead
    }

    /// All places.
    pub(crate) fn places(self) -> usize {
        self.initial() + self.added
    }
}

/// Whether a background gives way to faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    No,
    /// All that goes on for faults are reads of the sources of other regions. They take CPU, unless they hang.
    Elsewhere(Reads),
    Yes,
}

/// What all threads are doing, by their places.
pub(crate) struct Activities {
    threads: ThreadCounts,
    all: Box<[Activity]>,
    /// Whether the control thread looks after the workers: whether sources keep them waiting.
    watched: AtomicBool,
    bell: Arc<Bell>,
    /// From when on the beginnings of reads are counted.
    base: Instant,
}

impl fmt::Debug for Activities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doing = self.all.iter().map(Activity::look).enumerate();
        f.debug_map().entries(doing.filter(|(_, doing)| !doing.is_missing())).finish()
    }
}

impl Activities {
    pub(crate) fn new(threads: ThreadCounts, bell: Arc<Bell>) -> Self {
        let initial = iter::repeat_with(Activity::idle).take(threads.initial());
        let added = iter::repeat_with(Activity::missing).take(threads.added);
        let all = initial.chain(added).collect();
        Self { threads, all, watched: AtomicBool::new(false), bell, base: Instant::now() }
    }

    /// A thread begins to answer faults, or to read ahead for them; or it has ended.
    pub(crate) fn set_at_work(&self, place: usize, at_work: bool) {
        self.all[place].set_at_work(at_work);
    }

    /// A thread begins to read the source of a region, at a moment.
    pub(crate) fn set_reading(&self, place: usize, region: u64, is_slow: bool, at: Instant) {
        let since = at.saturating_duration_since(self.base).as_nanos();
        self.all[place].since.store(since as u64, Ordering::Relaxed);
        self.all[place].set_reading(region, is_slow);
        let ThreadCounts { workers, added, .. } = self.threads;
        let is_worker = !(workers..self.threads.initial()).contains(&place);
        if is_worker && (workers > 1 || added > 0) {
            // Pairs with the fence of `end_watching`: either it is seen here that nothing is watched, or there that
            // this thread reads.
            fence(Ordering::SeqCst);
            if !self.watched.load(Ordering::Relaxed) && !self.watched.swap(true, Ordering::Relaxed) {
                self.bell.ring();
            }
        }
    }

    /// What the workers are doing, each with its place, and the places for more.
    pub(crate) fn workers(&self) -> impl Iterator<Item = (usize, Doing)> {
        let places = (0..self.threads.workers).chain(self.threads.initial()..self.all.len());
        places.map(|place| (place, self.all[place].look()))
    }

    /// When the read began that a worker has been in for longest, for figures: a read that has begun at this moment may be
    /// taken for the one before it.
    pub(crate) fn oldest_read(&self) -> Option<Instant> {
        let reading = self.workers().filter(|(_, doing)| doing.is_reading());
        let since = reading.map(|(place, _)| self.all[place].since.load(Ordering::Relaxed)).min()?;
        Some(self.base + Duration::from_nanos(since))
    }

    /// Whether the control thread looks after the workers.
    pub(crate) fn is_watched(&self) -> bool {
        // Relaxed: the control thread asks, which alone ends it. That it begins comes with the bell.
        self.watched.load(Ordering::Relaxed)
    }

    /// The control thread looks after the workers no more, unless one reads a source: the next one that does rings.
    /// Returns whether it is so.
    pub(crate) fn end_watching(&self) -> bool {
        self.watched.store(false, Ordering::Relaxed);
        // Pairs with the fence of `set_reading`.
        fence(Ordering::SeqCst);
        let none = !self.workers().any(|(_, doing)| doing.is_reading());
        self.watched.fetch_or(!none, Ordering::Relaxed);
        none
    }

    /// Whether all workers but one are in a source.
    pub(crate) fn all_others_are_reading(&self, place: usize) -> bool {
        self.workers().all(|(other, doing)| other == place || doing.is_missing() || doing.is_reading())
    }

    /// Takes a place for a worker to be added, if there is one.
    pub(crate) fn take_place(&self) -> Option<usize> {
        let first = self.threads.initial();
        let place = first + self.all[first..].iter().position(|place| place.look().is_missing())?;
        self.set_at_work(place, false);
        Some(place)
    }

    /// Gives up a place for a worker to be added.
    pub(crate) fn free_place(&self, place: usize) {
        self.all[place].set_missing();
    }

    /// Whether no worker has a place, or one that is about to end.
    pub(crate) fn is_free(&self, place: usize) -> bool {
        self.all[place].look().is_missing()
    }

    /// Whether a worker resolves faults.
    pub(crate) fn is_at_work(&self, place: usize) -> bool {
        let doing = self.all[place].look();
        doing.is_at_work() || doing.is_reading()
    }

    /// Returns what faults keep the threads busy with, for a background of a region. `has_events` tells whether there is
    /// something to read that no thread has begun with.
    pub(crate) fn busy(&self, region: u64, has_events: impl FnOnce() -> bool) -> Busy {
        let mut reads = None;
        for doing in self.all.iter().map(Activity::look) {
            if doing.is_at_work() || doing.is_reading_of(region) {
                return Busy::Yes;
            }
            // What is known to be slow takes no CPU.
            if doing.is_reading() && !doing.is_reading_slowly() {
                reads.get_or_insert_with(Reads::default).add(doing);
            }
        }
        if has_events() {
            if !self.all_others_are_reading(usize::MAX) {
                return Busy::Yes;
            }
            // No thread is free for these faults, which wait for the reads.
            reads.get_or_insert_default();
        }
        reads.map_or(Busy::No, Busy::Elsewhere)
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
        let activity = Activity::of(READS | IDLE);
        activity.set_reading(3, false);
        assert_eq!(format!("{:?}", activity.look()), "in read 0 of region 3");
    }
}
