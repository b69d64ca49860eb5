//! How far a fill of many pages is, and what it couldn't fill.

use std::ops::Range;

use super::RegionId;

/// How far a fill of everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes that were missing when it began.
    pub total: u64,
}

/// Pages that couldn't be filled, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failed {
    /// The region.
    pub region: RegionId,
    /// Bytes, counted from the start of the region.
    pub range: Range<usize>,
}

impl Failed {
    /// Runs of pages, by address, in bytes. Those that follow each other are one.
    pub(crate) fn in_bytes(
        region: RegionId,
        page_shift: u32,
        pages: impl IntoIterator<Item = Range<usize>>,
    ) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for pages in pages {
            let range = pages.start << page_shift..pages.end << page_shift;
            match all.last_mut().filter(|last| range.start <= last.range.end) {
                Some(last) => last.range.end = last.range.end.max(range.end),
                None => all.push(Self { region, range }),
            }
        }
        all
    }
}
