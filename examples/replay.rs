//! A program that starts twice: what it needed the first time is there the second time before it is touched.
//!
//! ```sh
//! cargo run --release --example replay
//! ```
//!
//! Any kernel; no rights from Linux 5.11 on.

use std::process::ExitCode;
use std::time::Instant;
use std::{env, fs, process};

use userfaultfd::pager::{FaultAround, PageData, PageSource, WorkingSet};
use userfaultfd::{LazyMemory, page_size};
use userfaultfd_examples::Result;

/// Pages of memory, and how many of them the program needs.
const PAGES: usize = 20_000;
const NEEDED: usize = PAGES / 10;

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let path = env::temp_dir().join(format!("working-set-{}", process::id()));

        // The first start. Each page is brought by a fault.
        let memory = memory()?;
        let recorder = memory.record()?;
        let start = Instant::now();
        let first = work(&memory)?;
        println!("first start:  {} faults in {:.1?}", memory.statistics().faults(), start.elapsed());
        recorder.finish().save(&path)?;
        println!("working set:  {NEEDED} pages in {} bytes", fs::metadata(&path)?.len());
        drop(memory);

        // The second. The set is filled in the background; faults would come first.
        let set = WorkingSet::load(&path)?;
        fs::remove_file(&path)?;
        let memory = self::memory()?;
        let start = Instant::now();
        let mut replay = memory.replay(&set)?;
        replay.wait();
        println!("replayed:     in {:.1?}", start.elapsed());
        let start = Instant::now();
        let second = work(&memory)?;
        println!("second start: {} faults in {:.1?}", memory.statistics().faults(), start.elapsed());
        println!("{}", replay.report());
        if first == second { Ok(()) } else { Err("the second start found something else".into()) }
    })
}

/// Memory whose pages know their number.
fn memory() -> Result<LazyMemory> {
    Ok(LazyMemory::builder(numbers()).len(PAGES * page_size()).fault_around(FaultAround::Page).build()?)
}

fn numbers() -> impl PageSource {
    |offset: u64, buffer: &mut [u8]| {
        for (at, word) in buffer.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(offset + 8 * at as u64).to_ne_bytes());
        }
        Ok(PageData::Data)
    }
}

/// What the program does: it adds up numbers that it finds here and there.
fn work(memory: &[u8]) -> Result<u64> {
    let needed = (0..NEEDED).map(|number| number * 7919 % PAGES * page_size());
    needed.map(|at| Ok(u64::from_ne_bytes(memory[at + 8..at + 16].try_into()?))).sum()
}
