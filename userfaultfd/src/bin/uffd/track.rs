//! `uffd track`: what a process writes, live.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use userfaultfd::dirty::Options as TrackerOptions;
use userfaultfd::{CreateInRefusal, DirtyTracker, Errno, Error, FeatureFlags, Pid, UffdBuilder};

use crate::exit::{Count, Failure, say};
use crate::serve;

/// Report what a process writes, live
///
/// Prints a line for each interval: how many bytes of memory were written, in whole pages. The process goes on meanwhile; its first
/// write to a page in an interval costs a short page fault. At the start ptrace(2) stops it for less than a millisecond. This program
/// ends with the process, and on SIGINT and SIGTERM.
///
/// Memory that the process maps is tracked from the next interval on. Children that it forks aren't, nor is a program that it
/// executes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The id of the process
    #[arg(value_name = "PID")]
    pid: NonZeroU64,

    /// Seconds between two lines
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,

    /// End after this number of lines
    #[arg(long, value_name = "NUMBER")]
    count: Option<NonZeroU64>,

    /// Print each range of pages that was written, with what is mapped there
    #[arg(long)]
    ranges: bool,

    /// Print a line of JSON for each interval
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let good =
        seconds.filter(|seconds| (Duration::from_millis(1)..=Duration::from_secs(86400)).contains(seconds));
    good.ok_or_else(|| "it isn't a number of seconds between 0.001 and 86400".to_owned())
}

/// A range that was written.
#[derive(Debug, Serialize)]
struct Written {
    start: usize,
    end: usize,
    /// What is mapped there: a path, or a name such as `[heap]`.
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
}

/// What an interval had.
#[derive(Debug, Serialize)]
struct Line {
    /// Since the start.
    seconds: f64,
    /// In whole pages.
    bytes: usize,
    ranges: usize,
    /// With `--ranges`.
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<Vec<Written>>,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let pid =
        i32::try_from(options.pid.get()).map_err(|_| Failure::Arguments("no process has such a number"))?;
    let process = Pid::from_raw(pid);
    let (mut signals, _) = serve::signals()?;
    let mut tracked = Tracked::new(process)?;
    tracked.follow();
    say!("tracking {}", tracked.summary());
    let begin = Instant::now();
    let mut due = begin;
    let mut lines = 0;
    loop {
        due += options.interval;
        if wait(&mut signals, due) {
            return Ok(());
        }
        let Some(ranges) = tracked.take()? else {
            say!("process {pid} has ended");
            return Ok(());
        };
        let names = options.ranges.then(|| tracked.mappings());
        let line = Line {
            seconds: begin.elapsed().as_secs_f64(),
            bytes: ranges.iter().map(Range::len).sum(),
            ranges: ranges.len(),
            written: names.map(|names| named(&ranges, &names)),
        };
        print(&line, options.json).map_err(Failure::Output)?;
        lines += 1;
        if options.count.is_some_and(|count| lines >= count.get()) {
            return Ok(());
        }
        tracked.follow();
    }
}

/// Waits until a moment. Returns whether a signal came that ends this program.
fn wait(signals: &mut UnixStream, until: Instant) -> bool {
    loop {
        // Once at least, however late it is.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        if signals.set_read_timeout(Some(left)).is_err() {
            return true;
        }
        match signals.read(&mut [0]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if until <= Instant::now() {
                    return false;
                }
            }
            _ => return true,
        }
    }
}

fn print(line: &Line, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, line)?;
        writeln!(out)?;
    } else {
        let (ranges, kib) = (Count(line.ranges, "range"), line.bytes as f64 / 1024.0);
        writeln!(out, "{:>9.3} s {kib:>12.1} KiB in {ranges}", line.seconds)?;
        for Written { start, end, name } in line.written.iter().flatten() {
            writeln!(
                out,
                "    {start:#014x}..{end:#014x} {:>10.1} KiB  {name}",
                (end - start) as f64 / 1024.0
            )?;
        }
    }
    out.flush()
}

/// A mapping that can be written.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    range: Range<usize>,
    name: String,
}

/// The mappings of a line of `/proc/PID/maps` that can be written.
fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (addresses, rights) = (words.next()?, words.next()?);
    let name = words.nth(3).unwrap_or_default().trim().to_owned();
    let (start, end) = addresses.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let range = number(start)?..number(end)?;
    rights.contains('w').then_some(Mapping { range, name })
}

/// The parts of ranges in each mapping, with its name.
fn named(ranges: &[Range<usize>], mappings: &[Mapping]) -> Vec<Written> {
    let mut written = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let here = mappings.iter().find(|mapping| mapping.range.contains(&at));
            let next = mappings.iter().map(|mapping| mapping.range.start).find(|start| *start > at);
            let end = here.map_or(next.unwrap_or(range.end), |mapping| mapping.range.end).min(range.end);
            let name = here.map_or(String::new(), |mapping| mapping.name.clone());
            written.push(Written { start: at, end, name });
            at = end;
        }
    }
    written
}

/// The parts of a range that lie in none of others, which are ordered.
fn outside(range: &Range<usize>, others: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut at, mut parts) = (range.start, Vec::new());
    for other in others.iter().filter(|other| other.start < range.end && range.start < other.end) {
        if at < other.start {
            parts.push(at..other.start);
        }
        at = at.max(other.end);
    }
    if at < range.end {
        parts.push(at..range.end);
    }
    parts
}

/// A process whose memory is tracked.
struct Tracked {
    process: Pid,
    tracker: DirtyTracker,
    /// The ranges that can't be tracked, which aren't tried again.
    refused: BTreeSet<(usize, usize)>,
    reason: Option<Error>,
}

impl Tracked {
    fn new(process: Pid) -> Result<Self, Failure> {
        let builder = || {
            let mut builder = UffdBuilder::new();
            builder.close_on_exec(true).require_features(FeatureFlags::WP_ASYNC);
            builder
        };
        let uffd = builder().create_in(process).map_err(|error| refused(process, &error))?;
        let tracker = DirtyTracker::with(TrackerOptions::new().descriptor(uffd).process(process));
        let tracker = tracker.map_err(|error| refused(process, &error))?;
        Ok(Self { process, tracker, refused: BTreeSet::new(), reason: None })
    }

    /// What it has mapped, and may write. Nothing once it has ended.
    fn mappings(&self) -> Vec<Mapping> {
        let maps = fs::read(format!("/proc/{}/maps", self.process)).unwrap_or_default();
        String::from_utf8_lossy(&maps).lines().filter_map(mapping).collect()
    }

    /// Tracks what was mapped since.
    fn follow(&mut self) {
        for Mapping { range, .. } in self.mappings() {
            for part in outside(&range, &self.tracker.tracked()) {
                if self.refused.contains(&(part.start, part.end)) {
                    continue;
                }
                if let Err(error) = self.tracker.track(part.clone()) {
                    self.refused.insert((part.start, part.end));
                    self.reason.get_or_insert(error);
                }
            }
        }
    }

    /// What was written since, or `None` once the process has ended.
    fn take(&mut self) -> Result<Option<Vec<Range<usize>>>, Failure> {
        let mut written = Vec::new();
        loop {
            if self.mappings().is_empty() {
                return Ok(None);
            }
            let mut replaced = None;
            for range in self.tracker.take() {
                match range {
                    Ok(range) => written.push(range),
                    // Something else was mapped there.
                    Err(Error::NotTracked { start, end }) => replaced = Some(start..end),
                    Err(error) if matches!(error.errno(), Some(Errno::ESRCH)) => return Ok(None),
                    Err(error) => return Err(Failure::of(format!("process {}", self.process))(error)),
                }
            }
            match replaced {
                None => return Ok(Some(written)),
                // It is tracked anew with what is mapped there now. What was written to it until then isn't known.
                Some(range) => drop(self.tracker.untrack(range)),
            }
        }
    }

    fn summary(&self) -> String {
        let mib = self.tracker.statistics().tracked as f64 / f64::from(1 << 20);
        let refused = match (&self.reason, self.refused.len()) {
            (Some(reason), count) => format!("; {} can't be tracked: {reason}", Count(count, "range")),
            (None, _) => String::new(),
        };
        format!("{mib:.1} MiB of process {}{refused}", self.process)
    }
}

/// Why a process can't be tracked. The error says what helps.
fn refused(process: Pid, error: &Error) -> Failure {
    let what = format!("process {process} can't be tracked: {error}");
    match error {
        Error::NotCreatedIn { refusal, .. } => match refusal {
            CreateInRefusal::ThisProcess => Failure::Arguments("this is the process that would track"),
            CreateInRefusal::Ended => {
                Failure::Failed(format!("there is no process {process}, or it has ended"))
            }
            CreateInRefusal::NotStopped => Failure::Failed(what),
            _ => Failure::Unmet(format!("{what}; `uffd doctor` says more")),
        },
        Error::UnsupportedFeatures { .. } => Failure::Unmet(format!("{what}; it takes Linux 6.7")),
        _ => Failure::Unmet(format!("{what}; `uffd doctor` says more")),
    }
}
