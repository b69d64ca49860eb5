//! The statistics of a pager.
//!
//! Each worker counts in [`Counters`] of its own, which no other thread writes. [`Statistics`] are their sum at a moment.

mod count;
mod histogram;
mod metric;
mod tally;
mod threads;

use std::fmt;
use std::iter::Sum;
use std::sync::OnceLock;
use std::time::Instant;

use count::{COUNTED, Count};
pub use histogram::Histogram;
pub(crate) use histogram::HistogramCells;
pub use metric::Metric;
pub(crate) use tally::{Tallied, Tally};
pub(crate) use threads::ThreadCounters;

/// The moment at which a duration begins that will be counted.
#[inline]
pub(crate) fn now() -> Instant {
    static ANY: OnceLock<Instant> = OnceLock::new();
    if COUNTED { Instant::now() } else { *ANY.get_or_init(Instant::now) }
}

/// Declares all counters, each with its documentation and its name.
macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident;)*) => {
        /// Statistics of a pager: counters that only grow, histograms of latencies, and the present numbers of pages.
        ///
        /// The counters are sums over all threads. Each is exact; a fault that is being resolved may be counted in one
        /// of them and not yet in another.
        ///
        /// `Display` prints a table; `{:#}` adds a chart of the latencies.
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
            /// The durations of faults, from the read of the fault until the waiting thread was woken. For memory
            /// [without a pager](crate::LazyMemory::sigbus) the first and then every eighth fault is timed.
            pub fault_latency: Histogram,
            /// The durations of reads of sources, failed ones included.
            pub source_latency: Histogram,
            /// Number of missing pages. Not a counter: it falls. A region that is no longer served counts with its last
            /// number, unless it belonged to a child of a fork.
            pub missing_pages: u64,
            /// Number of present pages, counted likewise. Not a counter: a removal lowers it.
            pub present_pages: u64,
        }

        /// The counters of one thread. Only that thread writes; any thread may read meanwhile.
        ///
        /// Aligned so that the counters of two threads share no cache line, nor its neighbour that is fetched with it.
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

            /// Returns the thread's statistics without the numbers of pages, which the caller adds.
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
            /// Adds the statistics of another pager or thread.
            pub fn merge(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
                self.fault_latency.merge(&other.fault_latency);
                self.source_latency.merge(&other.source_latency);
                self.missing_pages = self.missing_pages.saturating_add(other.missing_pages);
                self.present_pages = self.present_pages.saturating_add(other.present_pages);
            }

            /// Returns an iterator over the names and values of all fields that are numbers, for a table or a
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
    /// Number of faults on missing pages.
    missing_faults;
    /// Number of faults on pages that are in the page cache and not mapped here.
    minor_faults;
    /// Number of faults by writes to write-protected pages.
    write_protect_faults;
    /// Number of faults by accesses to pages that are protected against any access.
    read_write_protect_faults;
    /// Number of faults of a kind that this version of the crate doesn't know.
    unknown_faults;
    /// Number of pages filled with data.
    fills;
    /// Number of pages filled with zeros.
    zero_fills;
    /// Number of pages mapped from the page cache.
    continues;
    /// Number of bytes of all pages filled or mapped.
    bytes;
    /// Number of faults that joined a running fill, or found the page present.
    duplicates;
    /// Number of retries of fills that were deferred because the layout of memory was changing.
    retries;
    /// Number of fills that found the page filled by another thread, and woke its waiters.
    woken;
    /// Number of reads of sources.
    source_reads;
    /// Number of reads of sources that failed or panicked.
    source_errors;
    /// Number of pages that were poisoned, since their source didn't deliver them.
    poisoned;
    /// Number of faults that were dropped, since their memory was gone.
    dropped;
    /// Number of pages whose protection was lifted.
    unprotected;
    /// Number of pages filled without a fault on them. They are counted among the fills, too.
    prefetched;
    /// Number of fork events.
    forks;
    /// Number of removal events.
    removes;
    /// Number of unmapping events.
    unmaps;
    /// Number of remap events.
    remaps;
    /// Number of times that a worker woke up, or found a fault before it slept.
    wakeups;
    /// Number of problems that weren't reported, since they came faster than the callback returned.
    problems_lost;
}

impl Statistics {
    /// Returns the number of faults of all kinds.
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
                    // Each fault adds 4096 bytes in one step, so the sum is never torn.
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
