//! Which pages a program uses: it works on a part of its memory, then on another one, and the tracker tells how large
//! its working set is each time.
//!
//! Linux 7.3; says so on older kernels. No rights.

use std::process::ExitCode;

use memmap2::MmapMut;
use userfaultfd::{AccessTracker, page_size};
use userfaultfd_examples::Result;

const PAGES: usize = 1024;

/// What the program does in a phase: its name, and which page it touches in a step.
type Phase = (&'static str, fn(step: usize) -> usize);

const PHASES: [Phase; 4] = [
    ("a scan of everything", |step| step % PAGES),
    ("a small loop", |step| 100 + step % 32),
    ("two tables", |step| [200, 800][step % 2] + step / 2 % 64),
    ("one page", |_| 7),
];

fn main() -> ExitCode {
    userfaultfd_examples::run(working_set)
}

fn working_set() -> Result<()> {
    let mut tracker = AccessTracker::new()?;
    let mut memory = MmapMut::map_anon(PAGES * page_size())?;
    // A transparent huge page is in use as a whole. A kernel without them doesn't know the advice.
    #[cfg(not(target_os = "android"))] // memmap2 doesn't give it there
    let _small = memory.advise(memmap2::Advice::NoHugePage);
    // Pages that are there: only those are told when they are used again.
    memory.chunks_mut(page_size()).for_each(|page| page[0] = 1);
    let start = memory.as_ptr().addr();
    tracker.track(start..start + memory.len())?;

    println!("{PAGES} pages, tracked in {} mode", tracker.mode());
    let mut sum = 0u64;
    for (name, page) in PHASES {
        tracker.reset()?;
        for step in 0..10_000 {
            sum += u64::from(memory[page(step) * page_size()]);
        }
        let hot = tracker.hot().collect::<userfaultfd::Result<Vec<_>>>()?;
        let pages: usize = hot.iter().map(|range| range.len() / page_size()).sum();
        println!("{name:<22}{pages:>6} pages hot, in {} ranges", hot.len());
    }
    assert_eq!(sum, 10_000 * PHASES.len() as u64);
    Ok(())
}
