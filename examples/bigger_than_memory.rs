//! A file larger than memory, as one slice of bytes that never takes more than a limit; and whether it is what the file
//! holds.
//!
//! ```sh
//! cargo run --release --example bigger_than_memory -- [--limit 256M] [--all] FILE
//! ```
//!
//! Touches a thousand pages in random order, all of them with `--all`. Linux 5.7; no rights from Linux 5.11 on.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

use userfaultfd::pager::{Budget, FileSource};
use userfaultfd::{LazyMemory, page_size};
use userfaultfd_examples::{Result, limit_flag_and_file, progress_bar};

const USAGE: &str = "usage: bigger_than_memory [--limit 256M] [--all] FILE";

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let (limit, all, path) = limit_flag_and_file(256 << 20, "--all").ok_or(USAGE)?;
        touch(&path, limit, all)
    })
}

fn touch(path: &Path, limit: usize, all: bool) -> Result<()> {
    let budget = Budget::new(limit);
    let source = FileSource::open(path)?;
    let memory =
        LazyMemory::builder(source).budget(&budget).on_problem(|problem| eprintln!("{problem}")).build()?;
    let pages = memory.len().div_ceil(page_size());
    let touched = if all { pages } else { pages.min(1000) };
    println!("{} bytes of memory, of which {limit} may be resident", memory.len());

    let bar = progress_bar("in random order", touched * page_size());
    let (mut sum, mut most) = (0, 0);
    for page in random_order(pages).take(touched) {
        let start = page * page_size();
        let bytes = &memory[start..memory.len().min(start + page_size())];
        sum += sum_of(page, bytes);
        if !all {
            let mut expected = vec![0; bytes.len()];
            File::open(path)?.read_exact_at(&mut expected, start as u64)?;
            if bytes != expected {
                return Err(format!("page {page} isn't what the file holds").into());
            }
        }
        most = most.max(budget.resident());
        bar.inc(page_size() as u64);
    }
    drop(bar);
    if all && sum != sum_of_file(path)? {
        return Err("the sum of all pages isn't that of the file".into());
    }
    let statistics = budget.statistics();
    println!("pages: {touched}, as read(2) has them");
    println!("resident: {most} bytes at most");
    println!("evicted: {}", statistics.evictions);
    println!("second chances: {}", statistics.second_chances);
    println!("waited for room: {} times, {:?} in all", statistics.waits, statistics.waited);
    if most > limit {
        return Err("more was resident than the limit".into());
    }
    Ok(())
}

/// Each page once, in an order that looks random: the numbers below a power of two are gone through by a generator that
/// has each once, and those that are no pages are left out.
fn random_order(pages: usize) -> impl Iterator<Item = usize> {
    let end = pages.next_power_of_two();
    let mut next = 12_345 % end;
    let all = std::iter::repeat_with(move || {
        next = (next.wrapping_mul(2_891_336_453) + 1_013_904_223) % end;
        next
    });
    all.take(end).filter(move |page| *page < pages)
}

/// Depends on every byte and on where the page is.
fn sum_of(page: usize, bytes: &[u8]) -> u128 {
    let hash =
        bytes.iter().fold(page as u64, |hash, byte| hash.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte));
    u128::from(hash)
}

/// The sum of the pages of a file, as read(2) has them.
fn sum_of_file(path: &Path) -> Result<u128> {
    let (mut file, mut sum, mut bytes) = (File::open(path)?, 0, vec![0; page_size()]);
    for page in 0.. {
        let mut len = 0;
        while len < bytes.len() {
            match file.read(&mut bytes[len..])? {
                0 => break,
                read => len += read,
            }
        }
        if len == 0 {
            break;
        }
        sum += sum_of(page, &bytes[..len]);
    }
    Ok(sum)
}
