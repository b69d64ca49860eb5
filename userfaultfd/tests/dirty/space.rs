//! Memory to be tracked: the kinds of the other tests, and those that only trackers take.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::AsFd;

use userfaultfd::dirty::{Mode, Options, Ranges};
use userfaultfd::{DirtyTracker, FeatureFlags, RegisterMode};

use crate::support::mapping::{self, Mapping};
use crate::support::memory::{self, Memory};
use crate::support::{features, has, has_features, maps, page, uffd};

/// What a space is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Small pages, or those of hugetlb memory.
    Of(memory::Kind),
    /// Private anonymous memory in transparent huge pages, told by the small page.
    Transparent,
    /// A private mapping of a file on a file system.
    PrivateFile,
    /// A shared mapping of one.
    File,
}

impl Kind {
    /// Whether it can be tracked in this mode here. If not, says so.
    pub(crate) fn tracked(self, test: &str, mode: Mode) -> bool {
        let kind = match self {
            Kind::Of(kind) => kind,
            Kind::Transparent => memory::Kind::Anonymous,
            Kind::PrivateFile | Kind::File if mode == Mode::Sync => return false,
            Kind::PrivateFile | Kind::File => memory::Kind::Memfd,
        };
        let mut needs = kind.needs(RegisterMode::WRITE_PROTECT).unwrap();
        if mode == Mode::Async {
            needs |= FeatureFlags::WP_ASYNC;
        }
        has_features(&format!("{test} ({self:?}, {mode})"), needs)
    }

    /// Whether what is dropped is told, since nothing of it is kept.
    pub(crate) fn tells_drops(self) -> bool {
        matches!(self, Kind::Of(memory::Kind::Anonymous) | Kind::Transparent)
    }
}

/// Some pages of a kind. The first byte of each is its content.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) kind: Kind,
    start: *mut u8,
    pub(crate) page: usize,
    pub(crate) pages: usize,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Memory(Memory),
    Mapping { _mapping: Mapping },
}

// SAFETY: a mapping belongs to the process; access to it is by raw pointers, whose users see to order.
unsafe impl Send for Space {}

// SAFETY: as for Send.
unsafe impl Sync for Space {}

impl Space {
    /// Maps a number of pages. `None`, visibly, where there is no such memory.
    pub(crate) fn new(test: &str, kind: Kind, pages: usize) -> Option<Self> {
        match kind {
            Kind::Of(kind) => Memory::try_new(test, kind, pages).map(Self::from),
            Kind::Transparent => Self::transparent(test, pages),
            Kind::PrivateFile => {
                let file = mapping::regular_file(test, pages)?;
                Some(Self::mapped(kind, Mapping::private(pages, file.as_fd()).unwrap(), pages))
            }
            Kind::File => {
                let file = mapping::regular_file(test, pages)?;
                Some(Self::mapped(kind, Mapping::shared(pages, file.as_fd()).unwrap(), pages))
            }
        }
    }

    fn mapped(kind: Kind, mapping: Mapping, pages: usize) -> Self {
        let start = mapping.start.cast();
        Self { kind, start, page: page(), pages, held: Held::Mapping { _mapping: mapping } }
    }

    /// Pages at the end of one transparent huge page and at the beginning of the next.
    fn transparent(test: &str, pages: usize) -> Option<Self> {
        let size = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").ok();
        let size: Option<usize> = size.and_then(|size| size.trim().parse().ok());
        if !has(test, "transparent huge pages", size.is_some()) {
            return None;
        }
        let size = size.unwrap();
        assert!(pages * page() < 2 * size);
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let mapping = Mapping::new(3 * size / page(), rights, libc::MAP_PRIVATE, None).unwrap();
        let aligned = mapping.start.map_addr(|address| address.next_multiple_of(size));
        // SAFETY: the range lies inside the mapping, whose content nobody borrows.
        unsafe { libc::madvise(aligned, 2 * size, libc::MADV_HUGEPAGE) };
        let start = aligned.wrapping_byte_add(size - pages / 2 * page());
        for at in [aligned, aligned.wrapping_byte_add(size)] {
            // SAFETY: inside the mapping, which is accessed by raw pointers alone.
            unsafe { at.cast::<u8>().write_volatile(1) };
        }
        let huge = is_transparent(aligned.addr()) && is_transparent(aligned.addr() + size);
        let mut space = Self::mapped(Kind::Transparent, mapping, pages);
        space.start = start.cast();
        has(test, "transparent huge pages", huge).then_some(space)
    }

    /// The mapping and the file behind it, of the kinds of the other tests.
    pub(crate) fn memory(&self) -> &Memory {
        match &self.held {
            Held::Memory(memory) => memory,
            Held::Mapping { .. } => panic!("{:?} is no such memory", self.kind),
        }
    }

    /// The address of a page.
    pub(crate) fn at(&self, page: usize) -> *mut c_void {
        assert!(page <= self.pages);
        self.start.wrapping_add(page * self.page).cast()
    }

    pub(crate) fn addresses(&self, pages: Range<usize>) -> Range<usize> {
        self.at(pages.start).addr()..self.at(pages.end).addr()
    }

    pub(crate) fn all(&self) -> Range<usize> {
        self.addresses(0..self.pages)
    }

    /// Numbers of pages from addresses.
    pub(crate) fn pages_of(&self, range: &Range<usize>) -> Range<usize> {
        let number = |address: usize| {
            let offset = address.checked_sub(self.start.addr()).expect("an address in the space");
            assert_eq!(offset % self.page, 0, "{range:x?}");
            offset / self.page
        };
        number(range.start)..number(range.end)
    }

    pub(crate) fn read(&self, page: usize) -> u8 {
        // SAFETY: inside the mapping, which lives as long as self and is only accessed by raw pointers.
        unsafe { self.at(page).cast::<u8>().read_volatile() }
    }

    pub(crate) fn write(&self, page: usize, byte: u8) {
        // SAFETY: as for read.
        unsafe { self.at(page).cast::<u8>().write_volatile(byte) }
    }

    /// Writes to every page.
    pub(crate) fn populate(&self) {
        (0..self.pages).for_each(|page| self.write(page, 1));
    }

    /// Drops pages by `MADV_DONTNEED`. Tells whether the kernel can of this kind.
    pub(crate) fn drop_pages(&self, pages: Range<usize>) -> bool {
        // SAFETY: the range lies inside the mapping, whose content nobody borrows.
        let dropped =
            unsafe { libc::madvise(self.at(pages.start), pages.len() * self.page, libc::MADV_DONTNEED) };
        dropped == 0
    }

    /// What an iterator of a tracker finds, as ranges of pages.
    pub(crate) fn told(&self, ranges: Ranges<'_>) -> Vec<Range<usize>> {
        ranges.map(|range| self.pages_of(&range.unwrap())).collect()
    }
}

impl From<Memory> for Space {
    fn from(memory: Memory) -> Self {
        Self {
            kind: Kind::Of(memory.kind()),
            start: memory.start().cast(),
            page: memory.page(),
            pages: memory.pages(),
            held: Held::Memory(memory),
        }
    }
}

/// Whether a transparent huge page begins at an address.
fn is_transparent(address: usize) -> bool {
    maps::mapping_field(address, "AnonHugePages").is_some_and(|size| !size.starts_with("0 "))
}

/// Every kind, in an order that finds the simplest failure first.
pub(crate) const KINDS: [Kind; 9] = [
    Kind::Of(memory::Kind::Anonymous),
    Kind::Of(memory::Kind::SharedAnonymous),
    Kind::Of(memory::Kind::Memfd),
    Kind::Of(memory::Kind::PrivateMemfd),
    Kind::Transparent,
    Kind::PrivateFile,
    Kind::File,
    Kind::Of(memory::Kind::Hugetlb),
    Kind::Of(memory::Kind::PrivateHugetlb),
];

pub(crate) const MODES: [Mode; 2] = [Mode::Sync, Mode::Async];

/// A tracker in this mode.
pub(crate) fn tracker(mode: Mode) -> DirtyTracker {
    DirtyTracker::with(Options::new().mode(mode)).expect("the kernel has the mode")
}

/// A tracker that can't protect empty pages of private anonymous memory, as on old kernels. `None` where others can't,
/// either.
fn filling_tracker(mode: Mode) -> Option<DirtyTracker> {
    let others = mode == Mode::Async || !features().contains(FeatureFlags::WP_UNPOPULATED);
    let options = || Options::new().descriptor(uffd(FeatureFlags::PAGEFAULT_FLAG_WP));
    (!others).then(|| DirtyTracker::with(options()).expect("the kernel has the mode"))
}

/// Runs a test in both modes on every kind of memory of `pages` pages, which isn't tracked yet.
pub(crate) fn each(test: &str, pages: usize, body: impl Fn(&mut DirtyTracker, &Space)) {
    for mode in MODES {
        for kind in KINDS {
            if kind.tracked(test, mode) {
                if let Some(space) = Space::new(test, kind, pages) {
                    // What is seen of a failure is which case it was.
                    println!("{test}: {mode} {kind:?}");
                    body(&mut tracker(mode), &space);
                }
                if let Some(mut tracker) = Some(mode).filter(|_| kind.tells_drops()).and_then(filling_tracker)
                {
                    if let Some(space) = Space::new(test, kind, pages) {
                        println!("{test}: {mode} {kind:?}, where empty pages can't be protected");
                        body(&mut tracker, &space);
                    }
                }
            }
        }
    }
}
