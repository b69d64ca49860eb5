//! [`MetricsPublisher`]: statistics for the facade `metrics`.

use std::time::Duration;

use metrics::{Label, counter, gauge, histogram};

use super::{Histogram, Statistics};

/// Publishes [`Statistics`] by the facade [`metrics`](https://docs.rs/metrics), to the recorder that the program has installed.
///
/// Nothing is published while a fault is resolved. The program calls [`publish`](Self::publish) as often as its recorder is
/// read; it publishes what the pager's own counters have counted since. The names are those of
/// [`Statistics::metrics`]; latencies are histograms, in seconds.
///
/// ```
/// use userfaultfd::pager::{MetricsPublisher, Pager};
///
/// let pager = Pager::new()?;
/// let mut publisher = MetricsPublisher::new([("host", "a".to_owned())]);
/// publisher.publish(&pager.statistics()); // every few seconds
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Use one for each pager, process or region, with labels that tell them apart.
#[derive(Debug)]
pub struct MetricsPublisher {
    labels: Vec<Label>,
    /// What was published of the histograms, which a recorder gets by the sample.
    fault_latency: Histogram,
    source_latency: Histogram,
}

impl MetricsPublisher {
    /// Returns a publisher whose metrics all have some labels.
    #[must_use]
    pub fn new(labels: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let labels = labels.into_iter().map(|(name, value)| Label::new(name, value)).collect();
        Self { labels, fault_latency: Histogram::default(), source_latency: Histogram::default() }
    }

    /// Publishes what has changed. A duration is published as the longest of its bucket, at most an eighth too long.
    pub fn publish(&mut self, statistics: &Statistics) {
        for metric in statistics.metrics() {
            let mut labels = self.labels.clone();
            labels.extend(metric.label.map(|(name, value)| Label::from_static_parts(name, value)));
            if metric.is_counter {
                counter!(metric.name, labels).absolute(metric.value);
            } else {
                gauge!(metric.name, labels).set(metric.value as f64);
            }
        }
        for (name, now, before) in [
            (Statistics::FAULT_LATENCY.0, &statistics.fault_latency, &mut self.fault_latency),
            (Statistics::SOURCE_LATENCY.0, &statistics.source_latency, &mut self.source_latency),
        ] {
            let histogram = histogram!(name, self.labels.clone());
            for (duration, count) in new_since(now, before) {
                histogram.record_many(duration.as_secs_f64(), usize::try_from(count).unwrap_or(usize::MAX));
            }
            before.clone_from(now);
        }
    }
}

/// What was counted since.
fn new_since(now: &Histogram, before: &Histogram) -> impl Iterator<Item = (Duration, u64)> {
    let mut earlier = before.iter().peekable();
    now.iter().filter_map(move |(duration, count)| {
        while earlier.next_if(|(then, _)| *then < duration).is_some() {}
        let then = earlier.next_if(|(then, _)| *then == duration).map_or(0, |(_, count)| count);
        (count > then).then(|| (duration, count - then))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use metrics::{
        Counter, CounterFn, Gauge, GaugeFn, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    };

    use super::*;

    /// A recorder that keeps everything.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<BTreeMap<String, Vec<f64>>>>);

    struct Series(Kept, String);

    impl Series {
        fn new(kept: &Kept, key: &Key) -> Arc<Self> {
            let labels: Vec<_> =
                key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
            Arc::new(Self(kept.clone(), format!("{} {}", key.name(), labels.join(" ")).trim_end().to_owned()))
        }

        fn add(&self, value: f64) {
            self.0.0.lock().unwrap().entry(self.1.clone()).or_default().push(value);
        }
    }

    impl CounterFn for Series {
        fn increment(&self, _: u64) {
            panic!("counters are published whole")
        }
        fn absolute(&self, value: u64) {
            self.add(value as f64);
        }
    }

    impl GaugeFn for Series {
        fn increment(&self, _: f64) {}
        fn decrement(&self, _: f64) {}
        fn set(&self, value: f64) {
            self.add(value);
        }
    }

    impl HistogramFn for Series {
        fn record(&self, value: f64) {
            self.add(value);
        }
    }

    impl Recorder for Kept {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            Counter::from_arc(Series::new(self, key))
        }
        fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::from_arc(Series::new(self, key))
        }
        fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> metrics::Histogram {
            metrics::Histogram::from_arc(Series::new(self, key))
        }
    }

    #[test]
    fn recorder_gets_each_duration_once() {
        crate::support::require!();
        let (kept, mut statistics) = (Kept::default(), Statistics::default());
        let mut publisher = MetricsPublisher::new([("vm", "7".to_owned())]);
        let mut publish = |statistics: &Statistics| {
            metrics::with_local_recorder(&kept, || publisher.publish(statistics));
            std::mem::take(&mut *kept.0.lock().unwrap())
        };
        let micro = Duration::from_micros(1);
        statistics.missing_faults = 5;
        statistics.fault_latency.record(micro);
        statistics.fault_latency.record(micro);
        statistics.fault_latency.record(1000 * micro);
        let first = publish(&statistics);
        assert_eq!(first["userfaultfd_faults_total vm=7 kind=missing"], [5.0]);
        assert_eq!(first["userfaultfd_fault_seconds vm=7"].len(), 3);
        assert!(!first.contains_key("userfaultfd_source_seconds vm=7"));
        statistics.fault_latency.record(10 * micro);
        statistics.fault_latency.record(1000 * micro);
        let second = publish(&statistics);
        let seconds = &second["userfaultfd_fault_seconds vm=7"];
        assert!(seconds.len() == 2 && (1e-5..1.2e-5).contains(&seconds[0]), "{seconds:?}");
        assert!((1e-3..1.2e-3).contains(&seconds[1]), "{seconds:?}");
        assert!(!publish(&statistics).contains_key("userfaultfd_fault_seconds vm=7"));
    }
}
