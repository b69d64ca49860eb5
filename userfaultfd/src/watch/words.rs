//! The state of each page according to the page table: words of /proc/PID/pagemap, read a chunk at a time.

use std::ops::Range;

use crate::pagemap::{Categories, Pagemap};
use crate::{Result, page_size};

/// Base pages whose words are read at a time: 32 KiB of words.
pub(crate) const CHUNK_PAGES: usize = 4096;

/// A word of `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    /// Also set on markers of missing pages. Linux 5.13.
    const PROTECTED: u64 = 1 << 57;

    pub(crate) fn is_protected(self) -> bool {
        self.0 & Self::PROTECTED != 0
    }

    /// The page is empty but for a marker of something else than protection, or was swapped out unprotected.
    pub(crate) fn is_marker(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED | Self::PROTECTED) == Self::SWAPPED
    }

    /// The page is empty, without a marker.
    pub(crate) fn is_empty(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED | Self::PROTECTED) == 0
    }
}

/// The words of some pages.
#[derive(Debug, Default)]
pub(crate) struct Words(Vec<u8>);

impl Words {
    /// Reads the words of all base pages in a range.
    pub(crate) fn read(&mut self, pagemap: &Pagemap, range: &Range<usize>) -> Result<()> {
        self.0.resize(range.len() / page_size() * 8, 0);
        pagemap.read_words(range.start, &mut self.0)
    }

    pub(crate) fn get(&self, index: usize) -> Word {
        let bytes = self.0[8 * index..].first_chunk().expect("a word for each page");
        Word(u64::from_ne_bytes(*bytes))
    }
}

/// Whether a page that isn't protected was written: a page that was only read is the kernel's page of zeros.
pub(crate) fn is_content(page: Categories) -> bool {
    page.intersects(Categories::PRESENT | Categories::SWAPPED) && !page.contains(Categories::PFNZERO)
}

/// The runs of pages in `range` that `pick` picks by their index.
pub(crate) fn runs(range: &Range<usize>, page: usize, pick: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, start) in range.clone().step_by(page).enumerate() {
        if pick(index) {
            match runs.last_mut() {
                Some(last) if last.end == start => last.end += page,
                _ => runs.push(start..start + page),
            }
        }
    }
    runs
}
