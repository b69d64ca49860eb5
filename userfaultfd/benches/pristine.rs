//! What it costs to bring memory back to its image, with the work that follows: a table of ratios.
//!
//! `cargo bench -p userfaultfd --bench pristine [-- MIB]`. A run writes a byte to each of some pages, in no order; the image
//! is brought back; and the next run begins. Ways are compared in one process and take turns, in an order that is drawn
//! by lot. Times are those of the CPU, of a run and its reset together, which all is done by one thread: the median of
//! the rounds, behind it the fastest round. The memory is 512 MiB unless told otherwise; it takes six times that.

#[path = "random/mod.rs"]
#[expect(dead_code, reason = "others need the rest")]
mod random;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::time::Duration;

use memmap2::{Advice, MmapMut, MmapOptions};
use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{DirtyTracker, Pristine, ResetMethod, page_size};

use crate::random::Random;

const PER_MILLE: [usize; 5] = [1, 10, 100, 500, 1000];

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    // Cargo says what it runs this for. A test only looks whether everything works.
    let measured = args.iter().any(|arg| arg == "--bench");
    let mib: usize = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(512);
    let (bytes, rounds) = if measured { (mib << 20, 11) } else { (8 << 20, 3) };
    let image: Vec<u8> = (0..bytes).map(|at| (at / page_size()) as u8 | 1).collect();
    let by_hand = match DirtyTracker::with(Options::new().mode(Mode::Async)) {
        Ok(tracker) => ByHand::new(&image, tracker),
        Err(error) => return println!("this machine can't track writes asynchronously: {error}"),
    };
    let pristine = Pristine::builder(&image).method(ResetMethod::CopyBack).build().expect("it tracks");
    let mut ways: [Box<dyn Way + '_>; 3] =
        [Box::new(pristine), Box::new(Private::new(&image)), Box::new(by_hand)];
    let mut random = Random::of_this_run();
    for (pattern, same) in [("the same pages", true), ("other pages", false)] {
        println!("\n{} MiB, each run writes {pattern}: a run and its reset", bytes >> 20);
        println!(
            "{:<8}{:>22}{:>22}{:>22}   Pristine is faster by",
            "touched", "Pristine", "MADV_DONTNEED", "by hand"
        );
        for share in PER_MILLE {
            row(&mut ways, &mut random, (bytes / page_size(), share, same), rounds);
        }
    }
    for way in &mut ways {
        assert!(way.bytes()[..] == image, "each way brings back the image");
    }
}

/// Measures one share of pages.
fn row(
    ways: &mut [Box<dyn Way + '_>; 3],
    random: &mut Random,
    (pages, share, same): (usize, usize, bool),
    rounds: usize,
) {
    let count = (pages * share / 1000).max(1);
    let mut touched = random.shuffled(pages);
    let mut times: [Vec<Duration>; 3] = [const { Vec::new() }; 3];
    // Rounds that aren't counted: each way may learn what is written, and has its pages.
    const UNCOUNTED: usize = 3;
    for round in 0..rounds + UNCOUNTED {
        if !same && round > 0 {
            touched = random.shuffled(pages);
        }
        for way in random.shuffled(3) {
            let (way, times) = (&mut ways[way], &mut times[way]);
            let begin = cpu_time();
            let bytes = way.bytes();
            touched[..count].iter().for_each(|page| bytes[page * page_size() + 8] = 0);
            way.reset();
            if round >= UNCOUNTED {
                times.push(cpu_time() - begin);
            }
        }
    }
    let times = times.map(|mut times| {
        times.sort_unstable();
        [times[times.len() / 2], times[0]].map(|time| time.as_secs_f64() * 1e3)
    });
    let cell = |[median, fastest]: [f64; 2]| format!("{median:>9.2} {fastest:>9.2} ms");
    let [own, dropped, by_hand] = times;
    println!(
        "{:<8}{}{}{}   {:.2} × DONTNEED, {:.2} × by hand",
        format!("{} %", share as f64 / 10.0),
        cell(own),
        cell(dropped),
        cell(by_hand),
        dropped[0] / own[0],
        by_hand[0] / own[0],
    );
}

/// A way to bring memory back.
trait Way {
    fn bytes(&mut self) -> &mut [u8];
    fn reset(&mut self);
}

impl Way for Pristine {
    fn bytes(&mut self) -> &mut [u8] {
        self
    }

    fn reset(&mut self) {
        self.reset().expect("nothing has happened to the mapping");
    }
}

/// A private mapping of a memfd, whose changed pages are dropped.
struct Private(MmapMut);

impl Private {
    fn new(image: &[u8]) -> Self {
        // SAFETY: the kernel copies the name, which ends with a NUL.
        let fd = unsafe { libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "memfd_create");
        // SAFETY: the kernel has made it above, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        std::io::Write::write_all(&mut &file, image).expect("memory");
        // SAFETY: nothing else writes to the file.
        let mapping = unsafe { MmapOptions::new().len(image.len()).map_copy(&file) };
        Self(mapping.expect("addresses"))
    }
}

impl Way for Private {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn reset(&mut self) {
        // SAFETY: nothing borrows the memory, and it holds the image afterwards.
        let dropped = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        dropped.expect("it isn't locked");
    }
}

/// Anonymous memory, of which a tracker finds what to copy back.
struct ByHand<'a> {
    memory: MmapMut,
    image: &'a [u8],
    tracker: DirtyTracker,
}

impl<'a> ByHand<'a> {
    fn new(image: &'a [u8], mut tracker: DirtyTracker) -> Self {
        let mut memory = MmapMut::map_anon(image.len()).expect("memory");
        // A kernel without huge pages has nothing to be told.
        let _advised = memory.advise(Advice::NoHugePage);
        memory.copy_from_slice(image);
        let start = memory.as_ptr().addr();
        tracker.track(start..start + memory.len()).expect("memory that can be tracked");
        Self { memory, image, tracker }
    }
}

impl Way for ByHand<'_> {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    fn reset(&mut self) {
        let start = self.memory.as_ptr().addr();
        for range in self.tracker.dirty() {
            let range = range.expect("nothing has happened to the mapping");
            let part = range.start - start..range.end - start;
            self.memory[part.clone()].copy_from_slice(&self.image[part]);
        }
        assert!(self.tracker.take().all(|range| range.is_ok()));
    }
}

/// The time of the CPU that this thread has had.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is borrowed for the call.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(read, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
