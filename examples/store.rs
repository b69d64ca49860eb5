//! An index of the crate `fst`, which works on `&[u8]`, over a file ten times larger than what may be resident of it: most
//! lookups are of a few keys, beside a scan of all; with a plot of resident memory and misses over time.
//!
//! ```sh
//! cargo run --release --example store -- [--limit 1M] [--keep] FILE
//! ```
//!
//! Makes the index in FILE, unless `--keep` says that it is there. Checks every answer. Linux 5.7; no rights from Linux
//! 5.11 on.

use std::io::{BufWriter, IntoInnerError};
use std::path::Path;
use std::process::ExitCode;

use fst::{Map, MapBuilder, Streamer};
use userfaultfd::pager::{Budget, FileSource};
use userfaultfd::{LazyMemory, PendingFile, page_size};
use userfaultfd_examples::{Result, limit_flag_and_file, progress_bar};

const USAGE: &str = "usage: store [--limit 1M] [--keep] FILE";

/// The index is this many times larger than what may be resident.
const TIMES: usize = 10;
/// Bytes that an index of such keys has for each at least.
const BYTES_A_KEY: usize = 22;
/// Columns of the plot.
const COLUMNS: usize = 60;
/// Lookups in a column.
const LOOKUPS: u64 = 600;

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let (limit, keep, path) = limit_flag_and_file(1 << 20, "--keep").ok_or(USAGE)?;
        let keys = (TIMES * limit / BYTES_A_KEY) as u64;
        if !keep {
            build(&path, keys)?;
        }
        look_up(&path, keys, limit)
    })
}

/// The key of a number: they are in order, and have little in common.
fn key(number: u64, keys: u64) -> String {
    let step = u64::MAX / keys;
    format!("{:016x}", number * step + mix(number) % step)
}

/// A number in which every bit depends on each bit of another.
fn mix(number: u64) -> u64 {
    let number =
        (number.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) ^ number >> 31
}

fn build(path: &Path, keys: u64) -> Result<()> {
    let bar = progress_bar("building the index", keys as usize);
    // An index that is there stays until this one is complete.
    let mut index = MapBuilder::new(BufWriter::new(PendingFile::create(path)?))?;
    for number in 0..keys {
        index.insert(key(number, keys), mix(number))?;
        bar.inc(1);
    }
    let file = index.into_inner()?.into_inner().map_err(IntoInnerError::into_error)?;
    Ok(file.commit()?)
}

/// What was so at the end of a column.
struct Column {
    resident: usize,
    misses: u64,
}

fn look_up(path: &Path, keys: u64, limit: usize) -> Result<()> {
    let budget = Budget::new(limit);
    let builder = LazyMemory::builder(FileSource::open(path)?).budget(&budget);
    let memory = builder.on_problem(|problem| eprintln!("{problem}")).build()?;
    let bytes = memory.len();
    println!("index: {bytes} bytes, of which {limit} may be resident");
    if bytes < TIMES * limit {
        return Err(format!("the index is less than {TIMES} times larger than the limit").into());
    }

    let index = Map::new(memory)?;
    // A part of the keys that fits into a quarter of the limit is wanted most.
    let hot = keys / (4 * TIMES) as u64;
    let bar = progress_bar("looking up", COLUMNS * LOOKUPS as usize);
    let (mut columns, mut most, mut missing) = (Vec::with_capacity(COLUMNS), 0, 0_u64);
    // Beside it all keys are gone through, so that each is looked at.
    let (mut scan, mut scanned) = (index.stream(), 0_u64);
    for column in 0..COLUMNS as u64 {
        let before = budget.statistics().bytes_read;
        for lookup in 0..LOOKUPS {
            let random = mix(column * LOOKUPS + lookup);
            // One of ten is of any key, and one of a hundred of a key that isn't there.
            let number = if random % 10 == 0 { mix(random) % keys } else { mix(random) % hot };
            let wanted = key(number, keys);
            let is_there = random % 100 != 1;
            let found = if is_there { index.get(&wanted) } else { index.get(format!("{wanted}0")) };
            if found != is_there.then(|| mix(number)) {
                return Err(format!("the value of {wanted} is {found:?}").into());
            }
            missing += u64::from(!is_there);
            most = most.max(budget.resident());
        }
        // The scan is at rest in the first and last third.
        let end = keys * (column + 1).saturating_sub(COLUMNS as u64 / 3) / (COLUMNS as u64 / 3);
        while scanned < end.min(keys) {
            match scan.next() {
                Some((found, value)) if found == key(scanned, keys).as_bytes() && value == mix(scanned) => {}
                found => return Err(format!("the scan finds {found:?} as number {scanned}").into()),
            }
            scanned += 1;
            most = most.max(budget.resident());
        }
        let misses = (budget.statistics().bytes_read - before) / page_size() as u64;
        columns.push(Column { resident: budget.resident(), misses });
        bar.inc(LOOKUPS);
    }
    drop(bar);
    if scan.next().is_some() || scanned != keys {
        return Err(format!("the scan ended at {scanned} of {keys} keys").into());
    }

    let lookups = COLUMNS as u64 * LOOKUPS;
    println!(
        "keys: {lookups} looked up, of which {missing} aren't there, and {keys} gone through: as they were put in"
    );
    let statistics = budget.statistics();
    println!(
        "pages: {} read, {} of them again, {} evicted",
        statistics.bytes_read / page_size() as u64,
        statistics.refaults,
        statistics.evictions
    );
    plot("resident", columns.iter().map(|column| column.resident as u64), limit as u64);
    let highest = columns.iter().map(|column| column.misses).max().unwrap_or(0);
    plot("misses", columns.iter().map(|column| column.misses), highest);
    println!("resident: {most} bytes at most");
    if most > limit {
        return Err("more was resident than the limit".into());
    }
    if statistics.evictions < (bytes - limit) as u64 / page_size() as u64 {
        return Err("less was evicted than doesn't fit".into());
    }
    Ok(())
}

/// A bar for each value, in eighths of the highest.
fn plot(what: &str, values: impl Iterator<Item = u64>, highest: u64) {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let bar = |value: u64| BARS[(8 * value).div_ceil(highest.max(1)).min(8) as usize];
    println!("{what:<9}│{}│ of {highest}", values.map(bar).collect::<String>());
}
