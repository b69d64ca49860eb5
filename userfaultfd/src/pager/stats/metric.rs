//! The names by which monitoring systems know the numbers of [`Statistics`].

use super::Statistics;

/// A number of [`Statistics`], as a monitoring system has it: see [`Statistics::metrics`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// The name, in the style of Prometheus.
    pub name: &'static str,
    /// The name and value of the label that tells it from others of the same name.
    pub label: Option<(&'static str, &'static str)>,
    /// A sentence on all metrics of the name.
    pub help: &'static str,
    /// Whether it only grows. Otherwise it is a present number.
    pub is_counter: bool,
    /// The number.
    pub value: u64,
}

/// A name, its label, and its sentence.
type Description = (&'static str, Option<(&'static str, &'static str)>, &'static str);

const FAULTS: (&str, &str) = ("userfaultfd_faults_total", "Faults that were read, by kind.");
const PAGES: (&str, &str) = ("userfaultfd_pages_total", "Pages that got in or changed, by outcome.");
const UNFILLED: (&str, &str) = (
    "userfaultfd_faults_without_fill_total",
    "Faults and fills that put no page in place: joined a fill, found the page there, or their memory was gone.",
);
const EVENTS: (&str, &str) =
    ("userfaultfd_events_total", "Changes of memory that the kernel reported, by kind.");
const PRESENT: (&str, &str) = ("userfaultfd_pages", "Pages of served memory, by state.");

/// How a field of [`Statistics`] is described.
fn describe(field: &str) -> Option<Description> {
    let of =
        |(name, help): (&'static str, &'static str), label, value| Some((name, Some((label, value)), help));
    let plain = |name, help| Some((name, None, help));
    match field {
        "missing_faults" => of(FAULTS, "kind", "missing"),
        "minor_faults" => of(FAULTS, "kind", "minor"),
        "write_protect_faults" => of(FAULTS, "kind", "write_protect"),
        "read_write_protect_faults" => of(FAULTS, "kind", "read_write_protect"),
        "unknown_faults" => of(FAULTS, "kind", "unknown"),
        "fills" => of(PAGES, "outcome", "data"),
        "zero_fills" => of(PAGES, "outcome", "zero"),
        "continues" => of(PAGES, "outcome", "mapped"),
        "poisoned" => of(PAGES, "outcome", "poisoned"),
        "unprotected" => of(PAGES, "outcome", "unprotected"),
        "duplicates" => of(UNFILLED, "reason", "joined"),
        "woken" => of(UNFILLED, "reason", "present"),
        "dropped" => of(UNFILLED, "reason", "gone"),
        "forks" => of(EVENTS, "kind", "fork"),
        "removes" => of(EVENTS, "kind", "remove"),
        "unmaps" => of(EVENTS, "kind", "unmap"),
        "remaps" => of(EVENTS, "kind", "remap"),
        "missing_pages" => of(PRESENT, "state", "missing"),
        "present_pages" => of(PRESENT, "state", "present"),
        "bytes" => plain("userfaultfd_filled_bytes_total", "Bytes of all pages filled or mapped."),
        "retries" => plain("userfaultfd_retries_total", "Retries of fills that were deferred."),
        "source_reads" => plain("userfaultfd_source_reads_total", "Reads of sources."),
        "source_errors" => plain("userfaultfd_source_errors_total", "Reads of sources that failed."),
        "prefetched" => plain("userfaultfd_prefetched_pages_total", "Pages filled without a fault on them."),
        "wakeups" => plain(
            "userfaultfd_wakeups_total",
            "Times that a worker woke up, or found a fault before it slept.",
        ),
        "problems_lost" => plain(
            "userfaultfd_problems_lost_total",
            "Problems that weren't reported, since they came too fast.",
        ),
        _ => None,
    }
}

impl Statistics {
    /// The name and help text of the histogram [`fault_latency`](Self::fault_latency), which is in seconds.
    pub const FAULT_LATENCY: (&'static str, &'static str) =
        ("userfaultfd_fault_seconds", "Time from the read of a fault until its thread was woken.");

    /// The name and help text of the histogram [`source_latency`](Self::source_latency), which is in seconds.
    pub const SOURCE_LATENCY: (&'static str, &'static str) =
        ("userfaultfd_source_seconds", "Time of reads of sources, failed ones included.");

    /// Returns an iterator over all numbers, named for a monitoring system; those of one name follow each other.
    ///
    /// The time to put pages in place, without that of sources, is about the difference of the sums of
    /// [`fault_latency`](Self::fault_latency) and [`source_latency`](Self::source_latency).
    pub fn metrics(&self) -> impl Iterator<Item = Metric> + use<> {
        let metric = |(field, value): (&'static str, u64)| {
            let (name, label, help) = describe(field)?;
            Some(Metric { name, label, help, is_counter: name.ends_with("_total"), value })
        };
        let mut metrics: Vec<Metric> = self.numbers().filter_map(metric).collect();
        // By the first of each name.
        let order: Vec<&str> = metrics.iter().map(|metric| metric.name).collect();
        metrics.sort_by_key(|metric| order.iter().position(|name| *name == metric.name));
        metrics.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_number_has_a_metric_of_its_own() {
        crate::support::require!();
        let statistics = Statistics { fills: 3, missing_pages: 7, ..Statistics::default() };
        let metrics: Vec<_> = statistics.metrics().collect();
        for (field, _) in statistics.numbers() {
            assert!(describe(field).is_some(), "{field}");
        }
        let names: HashSet<_> = metrics.iter().map(|metric| (metric.name, metric.label)).collect();
        assert_eq!((metrics.len(), names.len()), (statistics.numbers().count(), metrics.len()));
        let groups = metrics.chunk_by(|one, next| one.name == next.name).count();
        let names: HashSet<_> = metrics.iter().map(|metric| metric.name).collect();
        assert_eq!(groups, names.len(), "those of one name follow each other");
        let value = |name, label| metrics.iter().find(|one| (one.name, one.label) == (name, label)).unwrap();
        assert_eq!(value("userfaultfd_pages_total", Some(("outcome", "data"))).value, 3);
        let missing = value("userfaultfd_pages", Some(("state", "missing")));
        assert!(missing.value == 7 && !missing.is_counter);
    }
}
