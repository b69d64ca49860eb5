//! Ways to have a 4 KiB fault answered: the pager's, and what a program writes without it, on libc and
//! `userfaultfd-sys` alone. All fault on the same pages in the same order, and find the same content there.

#[path = "../pairs/bare.rs"]
#[expect(dead_code, reason = "the loops wake by copying")]
pub(crate) mod bare;
pub(crate) mod cpus;
pub(crate) mod handler;
pub(crate) mod kernel;
pub(crate) mod order;
pub(crate) mod pager;
pub(crate) mod raw;
pub(crate) mod sigbus;

use std::hint::black_box;
use std::ops::Range;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions};
use userfaultfd::pager::Delivery;

use self::cpus::Place;
pub(crate) use self::order::{FAULTS, PAGES, ROUNDS, first_byte, shuffled};

/// One of those that are compared.
pub(crate) trait Contender {
    /// Has [`FAULTS`] faults answered and tells how long that took.
    fn round(&mut self) -> Duration;
}

/// What makes a contender, or tells why it can't be.
pub(crate) type Make = fn() -> Result<Box<dyn Contender>, String>;

/// All contenders of the latency ladder, by name.
pub(crate) const CONTENDERS: &[(&str, Make)] = &[
    ("pager, default", || pager::make(Place::Anywhere, Delivery::default())),
    ("pager, default, same CPU", || pager::make(Place::Same, Delivery::default())),
    ("pager, default, other CPU", || pager::make(Place::Other, Delivery::default())),
    ("bare poll and read", || handler::make(Place::Anywhere, handler::Loop::Poll)),
    ("pager, Threads, other CPU", || pager::make(Place::Other, Delivery::Sleep)),
    ("bare blocking read, other CPU", || handler::make(Place::Other, handler::Loop::Blocking)),
    ("pager, Spin, other CPU", || pager::make(Place::Other, Delivery::Spin(SPIN))),
    ("bare spinning read, other CPU", || handler::make(Place::Other, handler::Loop::Spinning)),
    ("pager, Threads, same CPU", || pager::make(Place::Same, Delivery::Sleep)),
    ("bare blocking read, same CPU", || handler::make(Place::Same, handler::Loop::Blocking)),
    ("pager, Beside", || pager::make(Place::Beside, Delivery::SameCpu)),
    ("pager, Sigbus", pager::sigbus),
    ("bare SIGBUS handler", sigbus::make),
    ("kernel, anonymous page", kernel::make),
];

/// How long the pager that spins looks for the next fault. They come sooner.
const SPIN: Duration = Duration::from_micros(200);

/// Pages of content.
pub(crate) fn content(pages: usize) -> Vec<u8> {
    let page = userfaultfd::page_size();
    let mut content = vec![0; pages * page];
    for (index, bytes) in content.chunks_exact_mut(page).enumerate() {
        bytes.fill(first_byte(index));
    }
    content
}

/// What the contenders of the ladder find.
pub(crate) static CONTENT: LazyLock<Arc<[u8]>> = LazyLock::new(|| content(PAGES).into());

/// Memory that nobody has touched, without huge pages.
pub(crate) fn memory(len: usize) -> MmapMut {
    let memory = MmapOptions::new().len(len).no_reserve_swap().map_anon().expect("memory");
    memory.advise(memmap2::Advice::NoHugePage).expect("memory without huge pages");
    memory
}

/// Takes so much memory and gives it back, so that the kernel has it at hand. What a virtual machine hasn't used for a
/// while its host has to find first, which takes longer than all that is measured.
///
/// On each of the first CPUs: since Linux 6.7 what is given back stays with the CPU that did so, up to a part of all
/// memory, and the thread that answers may run on another one.
pub(crate) fn warm(len: usize) {
    let touch = || {
        let mut memory = memory(len);
        memory.iter_mut().step_by(userfaultfd::page_size()).for_each(|byte| *byte = 1);
        black_box(&memory);
    };
    for cpu in cpus::ALLOWED.iter().take(4) {
        let touch_there = || {
            cpus::stay_on(&[*cpu]);
            touch();
        };
        thread::scope(|scope| scope.spawn(touch_there).join()).expect("a thread that only touches memory");
    }
}

/// Touches pages in the order of the ladder.
pub(crate) struct Walk {
    order: Arc<[u32]>,
    next: usize,
}

impl Walk {
    /// A walk over the pages of the ladder.
    pub(crate) fn new() -> Self {
        static ORDER: LazyLock<Arc<[u32]>> = LazyLock::new(|| shuffled(PAGES).into());
        Self { order: Arc::clone(&ORDER), next: 0 }
    }

    /// A walk over a number of pages.
    pub(crate) fn over(order: &Arc<[u32]>) -> Self {
        Self { order: Arc::clone(order), next: 0 }
    }

    /// A walk over a part of the same pages.
    pub(crate) fn part(&self, part: Range<usize>) -> Self {
        Self { order: self.order[part].into(), next: 0 }
    }

    /// Reads a byte of each of the next pages of a memory.
    pub(crate) fn read(&mut self, start: *const u8, faults: usize) -> Duration {
        let page = userfaultfd::page_size();
        let pages = &self.order[self.next..self.next + faults];
        self.next += faults;
        timed(|| {
            for index in pages {
                let index = *index as usize;
                // SAFETY: the caller's memory has a page for each number of the order.
                let byte = unsafe { start.wrapping_add(index * page).read_volatile() };
                assert_eq!(byte, first_byte(index), "page {index}");
            }
        })
    }

    /// Writes a byte to each of the next pages.
    pub(crate) fn write(&mut self, start: *mut u8, faults: usize) -> Duration {
        let page = userfaultfd::page_size();
        let pages = &self.order[self.next..self.next + faults];
        self.next += faults;
        timed(|| {
            for index in pages {
                let index = *index as usize;
                // SAFETY: as above; nobody refers to the memory.
                unsafe { start.wrapping_add(index * page).write_volatile(first_byte(index)) };
            }
        })
    }
}

/// How long something takes.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    black_box(work());
    start.elapsed()
}
