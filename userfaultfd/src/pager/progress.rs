//! The progress of a fill of many pages, and the pages that it couldn't fill.

use std::ops::Range;

use super::RegionId;

/// The progress of a fill of many pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes that were missing when the fill began.
    pub total: u64,
}

/// A run of pages that couldn't be filled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failed {
    /// The region.
    pub region: RegionId,
    /// Their range in bytes, counted from the start of the region.
    pub range: Range<usize>,
}

impl Failed {
    /// Runs of pages, ordered by address, in bytes; adjacent ones are merged.
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
