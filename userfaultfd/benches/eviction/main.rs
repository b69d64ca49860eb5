//! Which page should leave: policies by their miss ratios on traces, beside LRU and the optimum.
//!
//! `cargo bench -p userfaultfd --bench eviction [-- --quick] [-- --trace NAME | --memory]`. Traces are the same on every
//! run, so that figures don't depend on the machine. The tables are printed, and written to `target/eviction/eviction.md`,
//! with a picture for each size of memory beside it. Afterwards, or with `--memory` alone, real memory is measured: some
//! minutes, and 1 GiB of disk.
//!
//! Policies appear twice: told of every access, as `RWP` tells it since Linux 7.3, and with a **staging area**, where a
//! victim rests before it leaves, and where alone accesses are noticed. What is accessed there is an interruption of some
//! microseconds, and no miss; the last table says how often.

mod candidates;
mod memory;
mod picture;
#[path = "../../src/pager/evict/policy.rs"]
#[expect(dead_code, reason = "no trace resizes memory")]
mod policy;
#[expect(dead_code, reason = "others need the rest")]
#[path = "../random/mod.rs"]
mod random;
mod replay;
mod traces;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, thread};

use userfaultfd::PendingFile;

use crate::candidates::{Clock, Fifo, Lru, Sieve};
use crate::policy::S3Fifo;
use crate::replay::{Outcome, optimal, with_accesses, with_staging};
use crate::traces::Trace;

/// Pages of all data: 256 MiB of 4 KiB.
const PAGES: usize = 1 << 16;

/// Memory as a share of the data: one page of this number.
const SHARES: [usize; 2] = [4, 10];

type Replay = fn(&Trace, usize, usize) -> Outcome;

/// The columns.
const COLUMNS: [(&str, Replay); 12] = [
    ("OPT", optimal),
    ("LRU", with_accesses::<Lru>),
    ("FIFO", with_accesses::<Fifo>),
    ("CLOCK", with_accesses::<Clock>),
    ("SIEVE", with_accesses::<Sieve>),
    ("S3-FIFO", with_accesses::<S3Fifo>),
    ("FIFO, 1/4 staged", |trace, pages, frames| with_staging::<Fifo>(trace, pages, frames, 4)),
    ("SIEVE, 1/8 staged", |trace, pages, frames| with_staging::<Sieve>(trace, pages, frames, 8)),
    ("SIEVE, 1/4 staged", |trace, pages, frames| with_staging::<Sieve>(trace, pages, frames, 4)),
    ("S3-FIFO, 1/8 staged", |trace, pages, frames| with_staging::<S3Fifo>(trace, pages, frames, 8)),
    ("S3-FIFO, 1/4 staged", |trace, pages, frames| with_staging::<S3Fifo>(trace, pages, frames, 4)),
    ("FIFO, 1/8 staged", |trace, pages, frames| with_staging::<Fifo>(trace, pages, frames, 8)),
];

const USAGE: &str = "usage: eviction [--quick] [--trace NAME | --memory]";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, Default)]
struct Options {
    quick: bool,
    trace: Option<String>,
    memory: bool,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        // What `cargo test` runs is told nothing, and measures nothing.
        let mut options = Self { quick: true, ..Self::default() };
        let mut is_quick = false;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--quick" => is_quick = true,
                // As `cargo bench` runs it.
                "--bench" => options.quick = false,
                "--memory" => options.memory = true,
                "--trace" => options.trace = Some(args.next().ok_or(USAGE)?),
                _ => return Err(USAGE.to_owned()),
            }
        }
        options.quick |= is_quick;
        Ok(options)
    }
}

fn run() -> Result<(), String> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    if let [first, contender @ ..] = args.as_slice() {
        if first == "--contender" {
            return memory::run_contender(contender);
        }
    }
    let options = Options::parse(args.into_iter())?;
    let mut text = String::new();
    if !options.memory {
        candidates::check();
        text += &replay_traces(&options)?;
        save("eviction.md", &text)?;
    }
    if options.trace.is_none() {
        let scale = if options.quick { &memory::Scale::QUICK } else { &memory::Scale::WHOLE };
        let section = memory::section(&folder(), scale, aligned)?;
        print!("{section}");
        save(if options.memory { "memory.md" } else { "eviction.md" }, &(text + &section))?;
    }
    eprintln!("report in {}", folder().display());
    Ok(())
}

/// The tables of the traces. Saves a picture of each.
fn replay_traces(options: &Options) -> Result<String, String> {
    let (pages, len) = if options.quick { (PAGES >> 4, 400_000) } else { (PAGES, 8_000_000) };
    let mut text =
        format!("# Eviction\n\n{pages} pages of data, {len} accesses, of which a quarter warms up.\n");
    print!("{text}");
    for share in SHARES {
        let frames = pages / share;
        let mut traces = traces::all(pages, frames, len);
        if let Some(name) = &options.trace {
            traces.retain(|trace| trace.name == name);
        }
        if traces.is_empty() {
            return Err("no trace has such a name".to_owned());
        }
        let outcomes = thread::scope(|scope| {
            let replay =
                |trace| scope.spawn(move || COLUMNS.map(|(_, replay)| replay(trace, pages, frames)).to_vec());
            let threads: Vec<_> = traces.iter().map(replay).collect();
            threads.into_iter().map(|thread| thread.join().expect("a replay")).collect::<Vec<_>>()
        });
        let section = section(share, &traces, &outcomes);
        print!("{section}");
        text += &section;
        let groups = traces.iter().zip(&outcomes).map(|(trace, outcomes)| {
            (trace.name.to_owned(), outcomes.iter().map(Outcome::miss_ratio).collect())
        });
        let (names, groups) = (COLUMNS.map(|(name, ..)| name), groups.collect::<Vec<_>>());
        let subtitle = format!("memory for one page in {share}; {pages} pages, {len} accesses");
        save(
            &format!("misses-{share}.svg"),
            &picture::bars("Miss ratio by trace", &subtitle, &names, &groups),
        )?;
    }
    Ok(text)
}

fn section(share: usize, traces: &[Trace], outcomes: &[Vec<Outcome>]) -> String {
    let mut text = format!("\n## Memory for one page in {share}\n\nMiss ratios.\n\n");
    let header = |first: &str| {
        let names = COLUMNS.iter().map(|(name, ..)| (*name).to_owned());
        std::iter::once(first.to_owned()).chain(names).collect::<Vec<_>>()
    };
    let percent = |ratio: f64| format!("{:.2} %", 100.0 * ratio);
    let rows = |of: &dyn Fn(&Outcome) -> String| {
        let row = |(trace, outcomes): (&Trace, &Vec<Outcome>)| {
            std::iter::once(trace.name.to_owned()).chain(outcomes.iter().map(of)).collect()
        };
        traces.iter().zip(outcomes).map(row).collect::<Vec<Vec<_>>>()
    };
    let table = |first, rows: Vec<Vec<String>>| aligned(&[vec![header(first)], rows].concat());
    text += &table("trace", rows(&|outcome| percent(outcome.miss_ratio())));
    text += "\nMisses divided by those of the best but OPT, and the worst of each.\n\n";
    let worse = |(trace, outcomes): (&Trace, &Vec<Outcome>)| {
        let best = outcomes[1..].iter().map(Outcome::miss_ratio).fold(f64::INFINITY, f64::min);
        let cells = outcomes.iter().map(|outcome| format!("{:.3}", outcome.miss_ratio() / best));
        std::iter::once(trace.name.to_owned()).chain(cells).collect::<Vec<_>>()
    };
    let mut compared: Vec<Vec<String>> = traces.iter().zip(outcomes).map(worse).collect();
    let worst = (1..=COLUMNS.len()).map(|column| {
        compared
            .iter()
            .map(|row| row[column].as_str())
            .max_by(|a, b| number(a).total_cmp(&number(b)))
            .unwrap_or("")
            .to_owned()
    });
    compared.push(std::iter::once("worst".to_owned()).chain(worst).collect());
    text += &table("trace", compared);
    let hot: Vec<_> = traces.iter().zip(outcomes).filter(|(trace, _)| trace.hot > 0).collect();
    if !hot.is_empty() {
        text += "\nMiss ratios of the hot set alone.\n\n";
        let row = |(trace, outcomes): &(&Trace, &Vec<Outcome>)| {
            let cells = outcomes.iter().map(|outcome| percent(outcome.hot_miss_ratio()));
            std::iter::once(trace.name.to_owned()).chain(cells).collect()
        };
        text += &table("trace", hot.iter().map(row).collect());
    }
    text += "\nAccesses that found their page in the staging area.\n\n";
    text += &table("trace", rows(&|outcome| percent(outcome.staged_ratio())));
    text += "\n";
    for trace in traces {
        text += &format!("- {}: {}\n", trace.name, trace.what);
    }
    text
}

fn number(text: &str) -> f64 {
    text.parse().unwrap_or(f64::NAN)
}

fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            text += &format!("| {cell:width$} ");
        }
        text += "|\n";
        if index == 0 {
            widths.iter().for_each(|width| text += &format!("| {} ", "-".repeat(*width)));
            text += "|\n";
        }
    }
    text
}

fn folder() -> PathBuf {
    // Of the target directory, cargo tells the folder `tmp`.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    target.parent().unwrap_or(target).join("eviction")
}

fn save(name: &str, content: &str) -> Result<(), String> {
    let path = folder().join(name);
    fs::create_dir_all(folder()).map_err(|error| format!("{}: {error}", folder().display()))?;
    PendingFile::replace(&path, content.as_bytes()).map_err(|error| format!("{}: {error}", path.display()))
}
