//! Calls that act on a range: copy and wake.

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::time::Duration;

use memmap2::{MmapMut, UncheckedAdvice};
use userfaultfd::{Errno, Error, Uffd};

use super::{Pair, Way, bare, timed, uffd};

/// How many pages a round is about.
const PAGES: usize = 256;

/// Memory that is registered for missing faults, and what it is filled with.
struct Filled {
    uffd: Uffd,
    memory: MmapMut,
    content: Vec<u8>,
}

impl Filled {
    /// Filled by blocks of this number of pages.
    fn new(pages: usize) -> Self {
        let (uffd, page) = (uffd(true), userfaultfd::page_size());
        let mut memory = MmapMut::map_anon(PAGES * page).expect("memory");
        uffd.register(memory.as_mut_ptr().cast(), memory.len()).expect("a registered range");
        Self { uffd, memory, content: vec![42; pages * page] }
    }

    /// How many blocks there are.
    fn count(&self) -> u32 {
        (self.memory.len() / self.content.len()) as u32
    }

    /// The addresses of its blocks.
    fn blocks(&mut self) -> impl Iterator<Item = *mut u8> + use<> {
        let (start, block) = (self.memory.as_mut_ptr(), self.content.len());
        (0..self.count()).map(move |index| start.wrapping_add(index as usize * block))
    }

    /// Makes every page missing again.
    fn empty(&mut self) {
        // SAFETY: nothing refers to the content, and any other is as good.
        unsafe { self.memory.unchecked_advise(UncheckedAdvice::DontNeed) }.expect("dropped pages");
    }

    /// Copies into one block with the library.
    fn copy(&self, block: *mut u8) -> userfaultfd::Result<usize> {
        let content = black_box(&self.content);
        // SAFETY: the content lives on, and any bytes are good for the memory.
        unsafe { self.uffd.copy(content.as_ptr().cast(), block.cast(), content.len(), true) }
    }

    /// Copies into one block by hand.
    fn copy_by_hand(&self, block: *mut u8) -> Result<usize, i32> {
        let content = black_box(&self.content);
        // SAFETY: the content lives on, and any bytes are good for the memory.
        unsafe { bare::copy(self.uffd.as_raw_fd(), content.as_ptr(), block, content.len()) }
    }
}

/// Fills missing blocks, one call for each.
pub(super) struct Copy(Filled);

impl Copy {
    pub(super) fn new(pages: usize) -> Self {
        Self(Filled::new(pages))
    }
}

impl Pair for Copy {
    fn count(&self) -> u32 {
        self.0.count()
    }

    fn round(&mut self, way: Way) -> Duration {
        let (blocks, filled) = (self.0.blocks(), &self.0);
        let len = filled.content.len();
        let time = match way {
            Way::Library => timed(|| {
                blocks.for_each(|block| assert_eq!(filled.copy(block).expect("a copy"), len));
            }),
            Way::ByHand => timed(|| {
                blocks.for_each(|block| assert_eq!(filled.copy_by_hand(block).expect("a copy"), len));
            }),
        };
        self.0.empty();
        time
    }
}

/// Copies to where a page is already.
pub(super) struct CopyAgain(Filled);

impl CopyAgain {
    pub(super) fn new() -> Self {
        let mut filled = Filled::new(1);
        filled.blocks().for_each(|block| assert!(filled.copy(block).is_ok()));
        Self(filled)
    }
}

impl Pair for CopyAgain {
    fn count(&self) -> u32 {
        self.0.count()
    }

    fn round(&mut self, way: Way) -> Duration {
        let (blocks, filled) = (self.0.blocks(), &self.0);
        match way {
            Way::Library => timed(|| {
                for block in blocks {
                    assert!(matches!(filled.copy(block), Err(Error::CopyFailed(Errno::EEXIST))));
                }
            }),
            Way::ByHand => timed(|| {
                blocks.for_each(|block| assert_eq!(filled.copy_by_hand(block), Err(libc::EEXIST)));
            }),
        }
    }
}

/// Wakes a page that nobody waits for.
pub(super) struct Wake(Filled);

impl Wake {
    pub(super) fn new() -> Self {
        Self(Filled::new(1))
    }
}

impl Pair for Wake {
    fn count(&self) -> u32 {
        self.0.count()
    }

    fn round(&mut self, way: Way) -> Duration {
        let (blocks, uffd, page) = (self.0.blocks(), &self.0.uffd, self.0.content.len());
        match way {
            Way::Library => timed(|| {
                blocks.for_each(|block| uffd.wake(black_box(block).cast(), page).expect("a wake"));
            }),
            Way::ByHand => timed(|| {
                let fd = uffd.as_raw_fd();
                blocks.for_each(|block| bare::wake(fd, black_box(block), page).expect("a wake"));
            }),
        }
    }
}
