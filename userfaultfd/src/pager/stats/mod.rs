//! What a pager has done so far.
//!
//! Each thread that serves faults counts in [`Counters`] of its own, which nobody else writes. [`Statistics`] are
//! their sum at a moment.

mod count;
mod histogram;
mod threads;

use std::fmt;
use std::iter::Sum;
use std::sync::OnceLock;
use std::time::Instant;

use count::{COUNTED, Count};
pub use histogram::Histogram;
pub(crate) use histogram::HistogramCells;
pub(crate) use threads::ThreadCounters;

/// The moment that something begins whose duration is to be counted.
#[inline]
pub(crate) fn now() -> Instant {
    static ANY: OnceLock<Instant> = OnceLock::new();
    if COUNTED { Instant::now() } else { *ANY.get_or_init(Instant::now) }
}

/// One line per counter: its name, its documentation. A new one is one more line.
macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident;)*) => {
        /// What a pager has done so far: counters that only grow, and two that tell how things are.
        ///
        /// The counters are those of all threads together. Each is exact; between two of them there may be a fault
        /// that is being served, counted in one and not yet in the other.
        ///
        /// `Display` is a table, with `{:#}` one with a chart of the latencies.
        ///
        /// ```
        /// use userfaultfd::pager::Statistics;
        ///
        /// let statistics = Statistics::default();
        /// assert_eq!(statistics.faults(), 0);
        /// assert!(statistics.to_string().starts_with("missing_faults "));
        /// ```
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Statistics {
            $($(#[doc = $doc])* pub $name: u64,)*
            /// How long faults took, from when they were read until the thread that waits was woken. Of memory
            /// [without a pager](crate::LazyMemory::sigbus) one of eight is timed, the first among them.
            pub fault_latency: Histogram,
            /// How long the source took for a read, failed ones too.
            pub source_latency: Histogram,
            /// Pages that aren't there yet. Not a counter: it falls. A region that isn't served any more counts with what
            /// it had then, unless it was a fork's child's.
            pub missing_pages: u64,
            /// Pages that are there, likewise. Not a counter: removing lowers it.
            pub present_pages: u64,
        }

        /// The counters of one thread. Only that thread writes; any other may read meanwhile.
        ///
        /// Aligned so that two threads' counters share no cache line, nor the neighbour that is fetched with it.
        #[derive(Debug)]
        #[repr(align(128))]
        pub(crate) struct Counters {
            $(pub(crate) $name: Count,)*
            pub(crate) fault_latency: HistogramCells,
            pub(crate) source_latency: HistogramCells,
        }

        impl Counters {
            pub(crate) const fn new() -> Self {
                Self {
                    $($name: Count::new(),)*
                    fault_latency: HistogramCells::new(),
                    source_latency: HistogramCells::new(),
                }
            }

            /// What the thread has done so far. Numbers of pages are left to who knows the pages.
            pub(crate) fn snapshot(&self) -> Statistics {
                Statistics {
                    $($name: self.$name.get(),)*
                    fault_latency: self.fault_latency.snapshot(),
                    source_latency: self.source_latency.snapshot(),
                    missing_pages: 0,
                    present_pages: 0,
                }
            }
        }

        impl Statistics {
            /// Adds those of another pager, or thread.
            pub fn merge(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
                self.fault_latency.merge(&other.fault_latency);
                self.source_latency.merge(&other.source_latency);
                self.missing_pages = self.missing_pages.saturating_add(other.missing_pages);
                self.present_pages = self.present_pages.saturating_add(other.present_pages);
            }

            /// The names of the fields that are numbers, and the numbers: for a table of one's own, or for a
            /// monitoring system.
            pub fn numbers(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [
                    $((stringify!($name), self.$name),)*
                    ("missing_pages", self.missing_pages),
                    ("present_pages", self.present_pages),
                ]
                .into_iter()
            }
        }
    };
}

counters! {
    /// Faults on missing pages.
    missing_faults;
    /// Faults on pages that the page cache has and nobody has mapped here.
    minor_faults;
    /// Writes to pages that were protected against writes.
    write_protect_faults;
    /// Accesses to pages that were protected against any access.
    read_write_protect_faults;
    /// Faults of a kind that this version of the crate doesn't know.
    unknown_faults;
    /// Pages filled with data.
    fills;
    /// Pages filled with zeros.
    zero_fills;
    /// Pages mapped from the page cache.
    continues;
    /// Bytes of all pages filled or mapped.
    bytes;
    /// Faults that joined a fill that was going on, or found the page there.
    duplicates;
    /// Times that a fill was put off because the memory's layout was changing, and tried again.
    retries;
    /// Fills that found that the page had been filled by somebody else, and woke who waited.
    woken;
    /// Reads of the source.
    source_reads;
    /// Reads of the source that failed or panicked.
    source_errors;
    /// Pages made unreadable, since the source has no content for them.
    poisoned;
    /// Faults without an answer, since their memory is gone.
    dropped;
    /// Pages whose protection was lifted.
    unprotected;
    /// Pages filled before anybody asked for them. They are among the fills, too.
    prefetched;
    /// Forks that were told of.
    forks;
    /// Removals that were told of.
    removes;
    /// Unmappings that were told of.
    unmaps;
    /// Moves of memory that were told of.
    remaps;
    /// Times that a thread of the pager woke up, or found something before it slept.
    wakeups;
    /// Problems that weren't reported, since they came faster than the callback took them.
    problems_lost;
}

impl Statistics {
    /// Faults of all kinds together.
    #[must_use]
    pub fn faults(&self) -> u64 {
        let Self {
            missing_faults,
            minor_faults,
            write_protect_faults,
            read_write_protect_faults,
            unknown_faults,
            ..
        } = *self;
        let others = [minor_faults, write_protect_faults, read_write_protect_faults, unknown_faults];
        others.into_iter().fold(missing_faults, u64::saturating_add)
    }
}

impl Sum for Statistics {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        let mut sum = Self::default();
        parts.for_each(|part| sum.merge(&part));
        sum
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, number) in self.numbers() {
            writeln!(f, "{name:<25} {number:>16}")?;
        }
        for (name, histogram) in
            [("fault_latency", &self.fault_latency), ("source_latency", &self.source_latency)]
        {
            let end = if name == "source_latency" { "" } else { "\n" };
            if f.alternate() {
                write!(f, "{name:<25} {histogram:#}{end}")?;
            } else {
                write!(f, "{name:<25} {histogram}{end}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn threads_are_summed_up() {
        crate::support::require!();
        let threads = [Counters::new(), Counters::new()];
        threads[0].missing_faults.add(3);
        threads[1].missing_faults.add(4);
        threads[1].minor_faults.add(1);
        threads[0].fault_latency.record(Duration::from_nanos(5));
        threads[1].fault_latency.record(Duration::from_nanos(7));
        let sum: Statistics = threads.iter().map(Counters::snapshot).sum();
        assert_eq!((sum.missing_faults, sum.minor_faults, sum.faults()), (7, 1, 8));
        assert_eq!(sum.fault_latency.count(), 2);
        assert_eq!(sum.fault_latency.max(), Some(Duration::from_nanos(7)));
        assert_eq!(sum.source_latency.count(), 0);
    }

    #[test]
    fn faults_of_all_kinds_stop_at_the_largest_number() {
        crate::support::require!();
        let mut statistics =
            Statistics { missing_faults: u64::MAX, minor_faults: 1, ..Statistics::default() };
        assert_eq!(statistics.faults(), u64::MAX);
        statistics.merge(&statistics.clone());
        assert_eq!((statistics.faults(), statistics.minor_faults), (u64::MAX, 2));
    }

    #[test]
    fn threads_share_no_cache_line() {
        crate::support::require!();
        assert_eq!(size_of::<Counters>() % 128, 0);
        assert_eq!(align_of::<Counters>(), 128);
    }

    #[test]
    fn the_table_has_every_number_once() {
        crate::support::require!();
        let counters = Counters::new();
        counters.fills.add(1_234_567);
        counters.fault_latency.record(Duration::from_micros(20));
        let statistics = Statistics { missing_pages: 89, ..counters.snapshot() };
        let table = statistics.to_string();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), statistics.numbers().count() + 2, "{table}");
        for (name, number) in statistics.numbers() {
            let row = format!("{name:<25} {number:>16}");
            assert_eq!(lines.iter().filter(|line| **line == row).count(), 1, "{row}\n{table}");
        }
        assert!(table.contains("\nfault_latency             1 in 20.0µs: mean 20.0µs"), "{table}");
        assert!(table.ends_with("\nsource_latency            none"), "{table}");
        assert!(format!("{statistics:#}").contains("\n  ≤   32.8µs          1 ###"), "{statistics:#}");
    }

    #[test]
    fn a_reader_never_sees_less_than_before() {
        crate::support::require!();
        const FAULTS: u64 = 200_000;
        let threads = [Counters::new(), Counters::new()];
        let running = AtomicBool::new(true);
        let last = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut before = Statistics::default();
                while running.load(Ordering::Relaxed) {
                    let now: Statistics = threads.iter().map(Counters::snapshot).sum();
                    for ((name, before), (_, now)) in before.numbers().zip(now.numbers()) {
                        assert!(now >= before, "{name}: {now} after {before}");
                    }
                    let (then, latency) = (&before.fault_latency, &now.fault_latency);
                    assert!(latency.count() >= then.count());
                    assert!(latency.total() >= then.total());
                    assert!(latency.max() >= then.max());
                    // Whole: each fault adds 4096 bytes, in one step.
                    assert_eq!(now.bytes % 4096, 0);
                    before = now;
                }
                threads.iter().map(Counters::snapshot).sum::<Statistics>()
            });
            let writers = threads.each_ref().map(|counters| {
                scope.spawn(|| {
                    for fault in 0..FAULTS {
                        counters.missing_faults.add(1);
                        counters.bytes.add(4096);
                        counters.fault_latency.record(Duration::from_nanos(fault));
                    }
                })
            });
            for writer in writers {
                writer.join().unwrap();
            }
            running.store(false, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert_eq!((last.missing_faults, last.bytes), (2 * FAULTS, 2 * FAULTS * 4096));
        assert_eq!(last.fault_latency.count(), 2 * FAULTS);
        assert_eq!(last.fault_latency.total(), Duration::from_nanos(FAULTS * (FAULTS - 1)));
    }
}
