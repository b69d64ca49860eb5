//! Histograms of durations.

use std::fmt;
use std::time::{Duration, Instant};

use super::count::{COUNTED, Count};

/// Buckets between a power of two and the next: a bound is at most an eighth above the durations it stands for.
const BUCKETS_PER_DOUBLING: u64 = 8;

/// Buckets for all 64 bits of nanoseconds: one each for 0 to 7, then [`BUCKETS_PER_DOUBLING`] for each power of two.
const BUCKETS: usize = bucket_of(u64::MAX) + 1;

const fn bucket_of(nanos: u64) -> usize {
    let shift = (nanos | BUCKETS_PER_DOUBLING).ilog2() - BUCKETS_PER_DOUBLING.ilog2();
    (shift as u64 * BUCKETS_PER_DOUBLING + (nanos >> shift)) as usize
}

/// The longest duration of a bucket, in nanoseconds.
const fn upper_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * BUCKETS_PER_DOUBLING {
        return bucket;
    }
    let (shift, first) =
        (bucket / BUCKETS_PER_DOUBLING - 1, bucket % BUCKETS_PER_DOUBLING + BUCKETS_PER_DOUBLING);
    (first << shift) + ((1 << shift) - 1)
}

fn sum(counts: &[u64]) -> u64 {
    counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
}

fn nanos_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A histogram of durations. It is plain data: it can be cloned, compared, and merged with another one.
///
/// The width of a bucket is an eighth of its lower bound, or a nanosecond. So [quantiles](Self::quantile) are upper
/// bounds, at most an eighth too long; the mean and the maximum are exact. Durations beyond 584 years count as 584 years.
///
/// ```
/// use std::time::Duration;
/// use userfaultfd::pager::Histogram;
///
/// let mut histogram = Histogram::default();
/// for micros in 1..=100 {
///     histogram.record(Duration::from_micros(micros));
/// }
/// assert_eq!(histogram.count(), 100);
/// assert_eq!(histogram.mean(), Some(Duration::from_nanos(50_500)));
/// assert_eq!(histogram.max(), Some(Duration::from_micros(100)));
/// let median = histogram.quantile(0.5).unwrap();
/// assert!(median >= Duration::from_micros(50) && median < Duration::from_nanos(56_250));
/// println!("{histogram}");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    total: u64,
    max: u64,
}

impl Histogram {
    /// Counts a duration.
    pub fn record(&mut self, duration: Duration) {
        let nanos = nanos_of(duration);
        let count = &mut self.buckets[bucket_of(nanos)];
        *count = count.saturating_add(1);
        self.total = self.total.saturating_add(nanos);
        self.max = self.max.max(nanos);
    }

    /// Adds the counts of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *count = count.saturating_add(*more);
        }
        self.total = self.total.saturating_add(other.total);
        self.max = self.max.max(other.max);
    }

    /// Returns the number of counted durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        sum(&self.buckets)
    }

    /// Returns a duration that the fraction `part` (0.5: the median) of all durations doesn't exceed: an upper bound, at most
    /// an eighth too long. `part` is clamped to 0 to 1. `None` if nothing was counted.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let count = self.count();
        // 0.55 is a little more than 55 hundredths: a product this near to a whole number counts as that number.
        let exact = part * count as f64;
        let whole = exact.round();
        let near = (exact - whole).abs() <= 2.0 * f64::EPSILON * whole;
        let rank = (if near { whole } else { exact.ceil() } as u64).clamp(1, count.max(1));
        let mut seen = 0_u64;
        let bucket = self.buckets.iter().position(|&here| {
            seen = here.saturating_add(seen);
            seen >= rank
        })?;
        Some(self.bound(bucket))
    }

    /// Returns the longest duration, or `None` if nothing was counted.
    #[must_use]
    pub fn max(&self) -> Option<Duration> {
        (self.count() != 0).then_some(Duration::from_nanos(self.max))
    }

    /// Returns the mean, or `None` if nothing was counted.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.total.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// Returns the sum of all durations.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.total)
    }

    /// Returns an iterator over the buckets that aren't empty, shortest first: the longest duration that the bucket takes,
    /// and the number of durations in it.
    pub fn iter(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let filled = self.buckets.iter().enumerate().filter(|&(_, &count)| count != 0);
        filled.map(|(bucket, &count)| (Duration::from_nanos(upper_bound(bucket)), count))
    }

    /// The bounds of the durations in a bucket.
    fn bound(&self, bucket: usize) -> Duration {
        Duration::from_nanos(upper_bound(bucket).min(self.max))
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], total: 0, max: 0 }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Prints one line: number, mean, quantiles, maximum. With `{:#}` also a bar for each power of two in between.
impl fmt::Display for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(mean), Some(max)) = (self.mean(), self.max()) else { return f.write_str("none") };
        write!(f, "{} in {:.1?}: mean {mean:.1?}", self.count(), self.total())?;
        for (name, part) in [("half", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("99.9 %", 0.999)] {
            if let Some(bound) = self.quantile(part) {
                write!(f, ", {name} ≤ {bound:.1?}")?;
            }
        }
        write!(f, ", max {max:.1?}")?;
        if f.alternate() {
            self.write_bars(f)?;
        }
        Ok(())
    }
}

impl Histogram {
    fn write_bars(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WIDTH: u64 = 40;
        let powers: Vec<(usize, u64)> =
            self.buckets.chunks(BUCKETS_PER_DOUBLING as usize).map(sum).enumerate().collect();
        let Some(first) = powers.iter().position(|&(_, count)| count != 0) else { return Ok(()) };
        let last = powers.iter().rposition(|&(_, count)| count != 0).unwrap_or(first);
        let most = powers.iter().map(|&(_, count)| count).max().unwrap_or(1);
        for &(power, count) in &powers[first..=last] {
            let bound = Duration::from_nanos(upper_bound((power + 1) * BUCKETS_PER_DOUBLING as usize - 1));
            // Rounded up, so that a single duration has a bar, too. The product may not fit into u64.
            let bar = (u128::from(count) * u128::from(WIDTH)).div_ceil(u128::from(most)) as usize;
            write!(f, "\n  ≤ {:>8} {count:>10}", format!("{bound:.1?}"))?;
            if bar != 0 {
                write!(f, " {:#<bar$}", "")?;
            }
        }
        Ok(())
    }
}

/// A histogram that one thread writes and any thread reads.
#[derive(Debug)]
pub(crate) struct HistogramCells {
    buckets: [Count; BUCKETS],
    total: Count,
    max: Count,
}

impl HistogramCells {
    pub(crate) const fn new() -> Self {
        Self { buckets: [const { Count::new() }; BUCKETS], total: Count::new(), max: Count::new() }
    }

    /// Counts a duration. For the writing thread only.
    #[inline]
    pub(crate) fn record(&self, duration: Duration) {
        let nanos = nanos_of(duration);
        // Before the bucket: a reader that sees the duration counted mostly sees it in these, too.
        self.total.add(nanos);
        if nanos > self.max.get() {
            self.max.set(nanos);
        }
        self.buckets[bucket_of(nanos)].add(1);
    }

    /// Counts the duration since a moment that [`now`](super::now) has returned.
    #[inline]
    pub(crate) fn record_since(&self, since: Instant) {
        if COUNTED {
            self.record(since.elapsed());
        }
    }

    /// Returns the counts. A duration that is being counted may be included in part.
    pub(crate) fn snapshot(&self) -> Histogram {
        let mut histogram = Histogram::default();
        for (count, source) in histogram.buckets.iter_mut().zip(&self.buckets) {
            *count = source.get();
        }
        histogram.total = self.total.get();
        histogram.max = self.max.get();
        histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NANO: Duration = Duration::from_nanos(1);

    #[test]
    fn buckets_leave_no_gap_and_are_an_eighth_wide() {
        crate::support::require!();
        let mut lower = 0;
        for bucket in 0..BUCKETS {
            let upper = upper_bound(bucket);
            assert_eq!((bucket_of(lower), bucket_of(upper)), (bucket, bucket), "{lower}..={upper}");
            assert!(upper - lower <= lower / BUCKETS_PER_DOUBLING, "{lower}..={upper}");
            let Some(next) = upper.checked_add(1) else {
                assert_eq!(bucket, BUCKETS - 1);
                return;
            };
            lower = next;
        }
        panic!("the last bucket ends at {lower}");
    }

    #[test]
    fn nothing_counted_has_no_quantiles() {
        crate::support::require!();
        let histogram = Histogram::default();
        assert_eq!((histogram.count(), histogram.total()), (0, Duration::ZERO));
        assert_eq!((histogram.mean(), histogram.max(), histogram.quantile(0.5)), (None, None, None));
        assert_eq!(histogram.iter().count(), 0);
        assert_eq!((histogram.to_string(), format!("{histogram:?}")), ("none".to_owned(), "{}".to_owned()));
    }

    #[test]
    fn quantiles_count_from_the_shortest() {
        crate::support::require!();
        let mut histogram = Histogram::default();
        for nanos in [0, 1, 2, 3, 4, 5, 6, 7, 1000, 100_000] {
            histogram.record(nanos * NANO);
        }
        for (part, nanos) in [(f64::NAN, 0), (-1.0, 0), (0.0, 0), (0.1, 0), (0.11, 1), (0.5, 4), (0.8, 7)] {
            assert_eq!(histogram.quantile(part), Some(nanos * NANO), "{part}");
        }
        // 1000 lies between 960 and 1023; nothing is longer than the longest.
        assert_eq!(histogram.quantile(0.9), Some(1023 * NANO));
        for part in [0.91, 1.0, 2.0, f64::INFINITY] {
            assert_eq!(histogram.quantile(part), Some(100_000 * NANO), "{part}");
        }
        assert_eq!(histogram.mean(), Some(10_102 * NANO));
        assert_eq!(histogram.max(), Some(100_000 * NANO));
        assert_eq!(histogram.iter().last(), Some((106_495 * NANO, 1)));
    }

    #[test]
    fn a_quantile_at_a_gap_is_what_is_before_it() {
        crate::support::require!();
        for part in 1..100_u32 {
            let mut histogram = Histogram::default();
            for number in 0..100 {
                histogram.record(if number < part { NANO } else { 1_000_000 * NANO });
            }
            assert_eq!(histogram.quantile(f64::from(part) / 100.0), Some(NANO), "{part} %");
            assert_eq!(
                histogram.quantile(f64::from(part) / 100.0 + 0.001),
                Some(1_000_000 * NANO),
                "{part} %"
            );
        }
    }

    #[test]
    fn counts_stop_at_their_largest() {
        crate::support::require!();
        let mut histogram = Histogram { buckets: [u64::MAX; BUCKETS], total: u64::MAX, max: 1 };
        histogram.merge(&histogram.clone());
        histogram.record(NANO);
        assert_eq!(histogram.count(), u64::MAX);
        assert!(histogram.quantile(1.0).is_some() && format!("{histogram:#}").contains('#'));
    }

    #[test]
    fn the_longest_duration_is_counted() {
        crate::support::require!();
        let mut histogram = Histogram::default();
        histogram.record(Duration::MAX);
        histogram.record(Duration::MAX);
        assert_eq!(histogram.max(), Some(Duration::from_nanos(u64::MAX)));
        assert_eq!(histogram.total(), Duration::from_nanos(u64::MAX));
        assert_eq!(histogram.count(), 2);
        assert!(format!("{histogram:#}").contains(&"#".repeat(40)));
    }

    #[test]
    fn merged_is_as_if_counted_together() {
        crate::support::require!();
        let (mut one, mut other, mut both) =
            (Histogram::default(), Histogram::default(), Histogram::default());
        for nanos in (0..5000).step_by(7) {
            let part = if nanos % 2 == 0 { &mut one } else { &mut other };
            part.record(nanos * NANO);
            both.record(nanos * NANO);
        }
        assert_ne!(one, both);
        one.merge(&other);
        assert_eq!(one, both);
    }

    #[test]
    fn a_recorder_counts_as_a_histogram_does() {
        crate::support::require!();
        let recorder = HistogramCells::new();
        let mut histogram = Histogram::default();
        for nanos in (0..1_000_000).step_by(997) {
            recorder.record(nanos * NANO);
            histogram.record(nanos * NANO);
            assert_eq!(recorder.snapshot().max(), histogram.max());
        }
        assert_eq!(recorder.snapshot(), histogram);
    }

    #[test]
    fn bars_show_every_power_in_their_range() {
        crate::support::require!();
        let mut histogram = Histogram::default();
        for _ in 0..400 {
            histogram.record(1500 * NANO);
        }
        histogram.record(5000 * NANO);
        assert_eq!(
            format!("{histogram:#}"),
            format!(
                "401 in 605.0µs: mean 1.5µs, half ≤ 1.5µs, 90 % ≤ 1.5µs, 99 % ≤ 1.5µs, \
                 99.9 % ≤ 5.0µs, max 5.0µs\n  \
                 ≤    2.0µs        400 {}\n  \
                 ≤    4.1µs          0\n  \
                 ≤    8.2µs          1 #",
                "#".repeat(40)
            )
        );
        assert_eq!(histogram.to_string().lines().count(), 1);
    }
}
