//! Which pages a program writes: a large buffer changes in one way after the other, and after each the tracker tells
//! where. A table, and a heat map as a picture.
//!
//! ```sh
//! cargo run --release --example dirty_tracking -- [PICTURE.svg [MIB]]
//! ```
//!
//! The picture goes to `target/dirty_tracking.svg` unless another path is given. Linux 6.7 for the fast mode, 5.7 for
//! the other one, on architectures with write protection: x86-64, arm64, some riscv64. No rights from Linux 5.11 on.

use std::env;
use std::fmt::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use userfaultfd::{DirtyTracker, PendingFile, page_size};
use userfaultfd_examples::{Result, progress_bar};

/// Columns of the heat map.
const COLUMNS: usize = 128;

/// What happens in an interval: its name, and whether it writes to page number `page` of `pages`.
type Pattern = (&'static str, fn(page: usize, pages: usize) -> bool);

const PATTERNS: [Pattern; 9] = [
    ("all of it", |_, _| true),
    ("nothing", |_, _| false),
    ("the first quarter", |page, pages| page < pages / 4),
    ("every eighth page", |page, _| page % 8 == 0),
    ("a hot spot", |page, pages| (pages / 2..pages / 2 + pages / 16).contains(&page)),
    ("a moving window", |page, pages| window(page, pages) == 0),
    ("a moving window", |page, pages| window(page, pages) == 1),
    ("a moving window", |page, pages| window(page, pages) == 2),
    ("a moving window", |page, pages| window(page, pages) == 3),
];

fn window(page: usize, pages: usize) -> usize {
    page * 4 / pages
}

/// What was told of an interval.
struct Interval {
    name: &'static str,
    written: Vec<Range<usize>>,
    took: Duration,
}

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let picture = arguments.next().map_or_else(|| PathBuf::from("target/dirty_tracking.svg"), PathBuf::from);
    let mib = arguments.next().map_or(Some(256), |mib| mib.to_str()?.parse::<usize>().ok());
    let Some(bytes) = mib.filter(|mib| *mib > 0).and_then(|mib| mib.checked_mul(1 << 20)) else {
        eprintln!("usage: cargo run --example dirty_tracking -- [PICTURE.svg [MIB]]");
        return ExitCode::FAILURE;
    };
    userfaultfd_examples::run(|| {
        let intervals = track(bytes)?;
        PendingFile::replace(&picture, heat_map(&intervals, bytes)?.as_bytes())?;
        println!("heat map: {}", picture.display());
        Ok(())
    })
}

fn track(bytes: usize) -> Result<Vec<Interval>> {
    let mut buffer = MmapMut::map_anon(bytes)?;
    let start = buffer.as_ptr().addr();
    let mut tracker = DirtyTracker::new()?;
    tracker.track(start..start + bytes)?;
    println!("{} pages of {} bytes, tracked in {} mode", bytes / page_size(), page_size(), tracker.mode());
    println!("{:<20}{:>10}{:>10}{:>12}", "interval", "pages", "ranges", "take");

    let bar = progress_bar("writing", PATTERNS.len() * bytes);
    let mut intervals = Vec::new();
    for (name, writes) in PATTERNS {
        let pages = bytes / page_size();
        for (number, page) in buffer.chunks_mut(page_size()).enumerate() {
            if writes(number, pages) {
                page[0] = page[0].wrapping_add(1);
            }
        }
        bar.inc(bytes as u64);

        let begin = Instant::now();
        // Tells the pages written since the last time, and begins anew, in one step.
        let written = tracker.take().collect::<userfaultfd::Result<Vec<_>>>()?;
        let took = begin.elapsed();
        let written: Vec<_> =
            written.into_iter().map(|range| range.start - start..range.end - start).collect();
        intervals.push(Interval { name, written, took });
    }
    bar.finish_and_clear();
    for Interval { name, written, took } in &intervals {
        let pages: usize = written.iter().map(|range| range.len() / page_size()).sum();
        println!("{name:<20}{pages:>10}{:>10}{:>9} µs", written.len(), took.as_micros());
    }
    Ok(intervals)
}

/// A row for each interval; the darker a field, the more of its pages were written.
fn heat_map(intervals: &[Interval], bytes: usize) -> Result<String> {
    const FIELD: usize = 8;
    let (width, height) = (COLUMNS * FIELD + 160, intervals.len() * 2 * FIELD + 40);
    let mut svg = String::new();
    writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"150\" y=\"16\">pages written in each interval, by their place in {} MiB</text>",
        bytes >> 20
    )?;
    for (row, interval) in intervals.iter().enumerate() {
        let y = 28 + row * 2 * FIELD;
        writeln!(svg, "<text x=\"4\" y=\"{}\">{}</text>", y + 12, interval.name)?;
        for column in 0..COLUMNS {
            let field = column * bytes / COLUMNS..(column + 1) * bytes / COLUMNS;
            let part = share(&interval.written, &field);
            // From white over orange to dark red.
            let (green, blue) = (255.0 - 235.0 * part, 255.0 * (1.0 - part).powi(3));
            let red = 255.0 - 90.0 * part * part;
            let (x, wide, high) = (150 + column * FIELD, FIELD - 1, 2 * FIELD - 2);
            writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{wide}\" height=\"{high}\" stroke=\"#ddd\" stroke-width=\"0.5\" \
                 fill=\"rgb({red:.0},{green:.0},{blue:.0})\"/>"
            )?;
        }
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// How much of a field was written: from 0 to 1.
fn share(written: &[Range<usize>], field: &Range<usize>) -> f64 {
    let inside = |range: &Range<usize>| range.end.min(field.end).saturating_sub(range.start.max(field.start));
    written.iter().map(inside).sum::<usize>() as f64 / field.len() as f64
}
