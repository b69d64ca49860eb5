//! `--metrics`: the numbers of the handler as Prometheus reads them, over HTTP.
//!
//! One address, one path, one connection at a time: a few lines of our own are less than what a web server and an exporter bring,
//! and the series of a machine end with it, which exporters don't know.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use userfaultfd::handoff::ProcessStatistics;
use userfaultfd::pager::{Histogram, Metric, Pager, Statistics};

use super::answer::answer;
use crate::exit::{Failure, say};

/// How long a client may take to ask, and to take the answer.
const CLIENT_TIME: Duration = Duration::from_secs(2);

/// How often it is looked whether there are descriptors again, or the thread has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The bounds of latencies are these powers of two, in nanoseconds: 1 µs to 69 s. The library's buckets end there, too.
const BOUNDS: std::ops::RangeInclusive<u32> = 10..=36;

/// What isn't counted for a machine alone.
const OF_PAGER_ALONE: [&str; 5] = [
    "userfaultfd_events_total",
    "userfaultfd_faults_without_fill_total",
    "userfaultfd_problems_lost_total",
    "userfaultfd_retries_total",
    "userfaultfd_wakeups_total",
];

/// How a machine or a connection ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    /// Its process ended.
    Ended,
    /// Its memory is complete.
    Complete,
    /// It couldn't be served, from the start.
    Unserved,
    /// Its content couldn't be had, and its process was killed.
    Killed,
    /// Its memory wasn't complete when this program ended.
    Incomplete,
    /// A peer sent something else.
    Refused,
}

const ENDINGS: [(Ending, &str); 6] = [
    (Ending::Ended, "ended"),
    (Ending::Complete, "complete"),
    (Ending::Unserved, "unserved"),
    (Ending::Killed, "killed"),
    (Ending::Incomplete, "incomplete"),
    (Ending::Refused, "refused"),
];

/// What there is to tell, kept up to date by the handler's loop.
#[derive(Debug, Default)]
pub(super) struct Board {
    machines: Mutex<BTreeMap<usize, (ProcessStatistics, String)>>,
    ends: [AtomicU64; ENDINGS.len()],
}

impl Board {
    fn machines(&self) -> MutexGuard<'_, BTreeMap<usize, (ProcessStatistics, String)>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A machine is served, or has more memory.
    pub(super) fn put(&self, number: usize, statistics: ProcessStatistics, process: String) {
        self.machines().insert(number, (statistics, process));
    }

    /// A machine isn't served any more.
    pub(super) fn remove(&self, number: usize) {
        self.machines().remove(&number);
    }

    pub(super) fn count(&self, ending: Ending, more: usize) {
        self.ends[ending as usize].fetch_add(more as u64, Ordering::Relaxed);
    }

    /// All of it, as text.
    fn render(&self, pager: &Pager) -> String {
        let mut text = String::new();
        let statistics = pager.statistics();
        write_metrics(&mut text, "userfaultfd_", &[(String::new(), statistics.metrics().collect())]);
        for ((name, help), histogram) in [
            (Statistics::FAULT_LATENCY, &statistics.fault_latency),
            (Statistics::SOURCE_LATENCY, &statistics.source_latency),
        ] {
            write_histogram(&mut text, name, help, histogram);
        }
        let oldest = pager.oldest_fault().unwrap_or_default().as_secs_f64();
        head(
            &mut text,
            "userfaultfd_oldest_fault_seconds",
            "How long the fault has waited that has waited longest.",
            false,
        );
        line(&mut text, "userfaultfd_oldest_fault_seconds", &[], oldest);
        head(
            &mut text,
            "userfaultfd_ends_total",
            "Machines and connections that have ended, by reason.",
            true,
        );
        for (ending, reason) in ENDINGS {
            let count = self.ends[ending as usize].load(Ordering::Relaxed);
            line(&mut text, "userfaultfd_ends_total", &[format!("reason=\"{reason}\"")], count as f64);
        }
        self.render_machines(&mut text);
        text
    }

    fn render_machines(&self, text: &mut String) {
        let machines = self.machines();
        let count = machines.len() as f64;
        head(text, "userfaultfd_vms", "Virtual machines that are served.", false);
        line(text, "userfaultfd_vms", &[], count);
        let counted = |statistics: &Statistics| -> Vec<Metric> {
            statistics.metrics().filter(|metric| !OF_PAGER_ALONE.contains(&metric.name)).collect()
        };
        let (mut of_vms, mut of_regions, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (process, pid)) in &*machines {
            let vm = format!("vm=\"{number}\"");
            let mut bytes = 0;
            for (at, (region, statistics)) in process.regions().enumerate() {
                bytes += statistics.missing_pages * region.page_size as u64;
                let labels = format!("{vm},region=\"{at}\",start=\"{:#x}\"", region.address);
                of_regions.push((labels, counted(&statistics)));
            }
            of_vms.push((format!("{vm},process=\"{pid}\""), counted(&process.total())));
            missing.push((vm, bytes));
        }
        write_metrics(text, "userfaultfd_vm_", &of_vms);
        if !missing.is_empty() {
            head(
                text,
                "userfaultfd_vm_missing_bytes",
                "Bytes of a machine's memory that are missing.",
                false,
            );
        }
        for (vm, bytes) in missing {
            line(text, "userfaultfd_vm_missing_bytes", &[vm], bytes as f64);
        }
        write_metrics(text, "userfaultfd_region_", &of_regions);
    }
}

/// The lines on a name, before its series.
fn head(text: &mut String, name: &str, help: &str, is_counter: bool) {
    let kind = if is_counter { "counter" } else { "gauge" };
    let _never_fails = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

/// A series.
fn line(text: &mut String, name: &str, labels: &[String], value: f64) {
    let labels = labels.iter().filter(|label| !label.is_empty()).cloned().collect::<Vec<_>>().join(",");
    let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
    let _never_fails = writeln!(text, "{name}{labels} {value}");
}

/// The metrics of several series, each with its labels: all series of a name follow each other. All have the same metrics.
fn write_metrics(text: &mut String, prefix: &str, series: &[(String, Vec<Metric>)]) {
    let Some((_, first)) = series.first() else { return };
    let mut before = "";
    for (at, metric) in first.iter().enumerate() {
        if metric.name == before {
            continue;
        }
        before = metric.name;
        let name = metric.name.replacen("userfaultfd_", prefix, 1);
        head(text, &name, metric.help, metric.is_counter);
        for (labels, metrics) in series {
            for metric in metrics[at..].iter().take_while(|next| next.name == metric.name) {
                let own = metric.label.map_or(String::new(), |(name, value)| format!("{name}=\"{value}\""));
                line(text, &name, &[labels.clone(), own], metric.value as f64);
            }
        }
    }
}

fn write_histogram(text: &mut String, name: &str, help: &str, histogram: &Histogram) {
    let _never_fails = write!(text, "# HELP {name} {help}\n# TYPE {name} histogram\n");
    for shift in BOUNDS.step_by(2) {
        let bound = Duration::from_nanos(1 << shift);
        let below: u64 = histogram.iter().take_while(|(most, _)| *most < bound).map(|(_, count)| count).sum();
        line(text, &format!("{name}_bucket"), &[format!("le=\"{}\"", bound.as_secs_f64())], below as f64);
    }
    let count = histogram.count() as f64;
    line(text, &format!("{name}_bucket"), &["le=\"+Inf\"".to_owned()], count);
    line(text, &format!("{name}_sum"), &[], histogram.total().as_secs_f64());
    line(text, &format!("{name}_count"), &[], count);
}

/// The thread that tells.
#[derive(Debug)]
pub(super) struct Metrics {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Metrics {
    /// Listens on an address of this machine alone: what is told is nobody else's business, and there is no TLS here.
    pub(super) fn start(
        address: SocketAddr,
        pager: &Arc<Pager>,
        board: &Arc<Board>,
    ) -> Result<Self, Failure> {
        if !address.ip().is_loopback() {
            return Err(Failure::Arguments(
                "--metrics takes an address of this machine alone, such as 127.0.0.1:9090; let a proxy tell others",
            ));
        }
        let failure = || Failure::of(format!("--metrics {address}"));
        let listener = TcpListener::bind(address).map_err(failure())?;
        let address = listener.local_addr().map_err(failure())?;
        let stopping = Arc::new(AtomicBool::new(false));
        // The end of the pager is that of its machines: no client puts it off.
        let (flag, pager, board) = (Arc::clone(&stopping), Arc::downgrade(pager), Arc::clone(board));
        let serve = move || {
            while !flag.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let render = || pager.upgrade().map_or(String::new(), |pager| board.render(&pager));
                        // A client that goes away has lost interest, no more.
                        drop(answer(client, CLIENT_TIME, render));
                    }
                    // Such as for lack of descriptors: not at full speed.
                    Err(_) => thread::park_timeout(LOOK_INTERVAL),
                }
            }
        };
        let thread = thread::Builder::new().name("metrics".into()).spawn(serve);
        let thread = thread.map_err(Failure::of("the thread of --metrics"))?;
        say!("metrics on http://{address}/metrics");
        Ok(Self { address, stopping, thread })
    }

    /// Ends the thread. A client that it answers at the moment has its time.
    pub(super) fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        self.thread.thread().unpark();
        let until = Instant::now() + 3 * CLIENT_TIME;
        while !self.thread.is_finished() && Instant::now() < until {
            // Wakes it, if it waits for one to connect.
            drop(TcpStream::connect_timeout(&self.address, LOOK_INTERVAL));
            thread::park_timeout(LOOK_INTERVAL);
        }
    }
}
