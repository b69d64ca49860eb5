//! What eviction costs by itself, in this process.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions, UncheckedAdvice};
use userfaultfd::pager::{Budget, BytesSource, Delivery, FaultAround, FileStore};
use userfaultfd::{LazyBuilder, LazyMemory, PagedMemory, page_size};

use crate::random::Random;

/// Bytes of a call of write(2).
const WRITE_BYTES: usize = 1 << 20;

/// An access that takes longer has met a fault.
const LEAST_FAULT: Duration = Duration::from_nanos(1500);

fn timed(run: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

/// All of a file as memory, resident.
fn resident(file: &Path, bytes: usize) -> io::Result<PagedMemory> {
    let budget = Budget::new(bytes + bytes / 4);
    let memory = PagedMemory::builder(FileStore::open(file)?).read_around().budget(&budget).build();
    let memory = memory.map_err(io::Error::other)?;
    (0..bytes).step_by(page_size()).for_each(|at| _ = black_box(memory[at]));
    Ok(memory)
}

trait ReadAround {
    /// In long reads: how the content comes isn't what is measured.
    fn read_around(self) -> Self;
}

impl ReadAround for userfaultfd::PagedBuilder {
    fn read_around(self) -> Self {
        self.fault_around(FaultAround::Adaptive { most: WRITE_BYTES })
    }
}

/// Seconds to evict clean pages, and to give as much anonymous memory back.
pub(crate) fn clean(file: &Path, bytes: usize) -> io::Result<[f64; 2]> {
    let memory = resident(file, bytes)?;
    let ours = timed(|| memory.evict(0..bytes).map_err(io::Error::other))?;
    let map = MmapOptions::new().len(bytes).populate().map_anon()?;
    // SAFETY: nothing has a reference to its bytes.
    let theirs = timed(|| unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) })?;
    Ok([ours, theirs])
}

/// Seconds to evict pages that were written, and to write the same bytes.
pub(crate) fn dirty(file: &Path, bytes: usize) -> io::Result<[f64; 2]> {
    let mut memory = resident(file, bytes)?;
    (0..bytes).step_by(page_size()).for_each(|at| memory[at] ^= 1);
    let ours = timed(|| memory.evict(0..bytes).map_err(io::Error::other))?;
    drop(memory);
    let mut map = MmapMut::map_anon(bytes)?;
    (0..bytes).step_by(page_size()).for_each(|at| map[at] ^= 1);
    let file = File::options().write(true).open(file)?;
    let write = |at| file.write_all_at(&map[at..bytes.min(at + WRITE_BYTES)], at as u64);
    let theirs = timed(|| (0..bytes).step_by(WRITE_BYTES).try_for_each(write))?;
    Ok([ours, theirs])
}

fn lazy(bytes: usize, budget: Option<&Budget>) -> io::Result<LazyMemory> {
    let memory = LazyMemory::builder(BytesSource::new(vec![7; bytes])).fault_around(FaultAround::Page);
    // Always the same, so that it isn't the delivery that differs.
    let memory = memory.delivery(Delivery::Sleep);
    let memory = budget.into_iter().fold(memory, LazyBuilder::budget);
    memory.build().map_err(io::Error::other)
}

/// Seconds for a fault with a budget that has room for all, and without one.
pub(crate) fn budget_set(bytes: usize) -> io::Result<[f64; 2]> {
    let budget = Budget::new(2 * bytes);
    let pages = Random::new(1).shuffled(bytes / page_size());
    let fault_all = |memory: &LazyMemory| {
        let start = Instant::now();
        pages.iter().for_each(|page| _ = black_box(memory[page * page_size()]));
        start.elapsed().as_secs_f64() / pages.len() as f64
    };
    Ok([fault_all(&lazy(bytes, Some(&budget))?), fault_all(&lazy(bytes, None)?)])
}

/// Seconds for an access to a page that rests in the staging area, and for a fault that reads a source in memory: medians.
pub(crate) fn second_chance(bytes: usize) -> io::Result<[f64; 2]> {
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().ok_or_else(|| io::Error::other("no page was in the staging area"))
    };
    let access = |memory: &LazyMemory, page: usize| {
        let start = Instant::now();
        black_box(memory[page * page_size()]);
        start.elapsed()
    };
    let (pages, budget) = (bytes / page_size(), Budget::new(bytes));
    let (memory, plain) = (lazy(bytes, Some(&budget))?, lazy(bytes, None)?);
    let mut random = Random::new(1);
    let faults = random.shuffled(pages).into_iter().map(|page| access(&plain, page).as_secs_f64()).collect();
    random.shuffled(pages).into_iter().for_each(|page| _ = access(&memory, page));
    let before = budget.statistics();
    let mut chances = Vec::new();
    for page in (0..8).flat_map(|_| random.shuffled(pages)) {
        let (refaults, chance) = (budget.statistics().refaults, budget.statistics().second_chances);
        let time = access(&memory, page);
        let now = budget.statistics();
        if now.refaults == refaults && now.second_chances > chance && time > LEAST_FAULT {
            chances.push(time.as_secs_f64());
        }
    }
    if budget.statistics().second_chances == before.second_chances {
        return Err(io::Error::other("nothing rested in the staging area"));
    }
    Ok([median(chances)?, median(faults)?])
}
