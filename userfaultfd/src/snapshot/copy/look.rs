//! Looking for pages that aren't protected.

use std::ops::Range;

use super::layout::Part;
use crate::pagemap::{Categories, Pagemap, Region, Scan};
use crate::watch::{CHUNK_PAGES, Words, can_scan, runs, tells_protection};
use crate::{Result, page_size};

/// Ranges that a scan reports at a time.
const RANGES_PER_SCAN: usize = 256;

/// How the kernel reports what is protected.
#[derive(Debug)]
pub(crate) enum ChunkView {
    /// By a scan (Linux 6.7), which takes some nanoseconds a page.
    Scan(Box<[Region]>),
    /// By the words of the page map (Linux 5.13): some hundred nanoseconds a page.
    Words(Words),
    /// Not at all.
    Never,
}

impl ChunkView {
    pub(crate) fn new() -> Result<Self> {
        Ok(match tells_protection()? {
            false => ChunkView::Never,
            true if can_scan()? => ChunkView::Scan(vec![Region::default(); RANGES_PER_SCAN].into()),
            true => ChunkView::Words(Words::default()),
        })
    }

    pub(crate) fn can_tell(&self) -> bool {
        !matches!(self, ChunkView::Never)
    }

    /// Finds the runs of pages in a part that aren't protected, as addresses.
    pub(crate) fn unprotected(
        &mut self,
        pagemap: &Pagemap,
        part: &Part,
        mut found: impl FnMut(Range<usize>),
    ) -> Result<()> {
        let all = part.address..part.address + part.len;
        match self {
            ChunkView::Scan(regions) => {
                let mut scan = Scan::new(all);
                // Nothing but this category, picked and reported: the kernel has a fast path for that. A page that
                // isn't protected is a written one.
                scan.all_of(Categories::WRITTEN);
                while let Some(regions) = scan.next_regions(pagemap, regions)? {
                    regions.iter().for_each(|region| found(region.range()));
                }
            }
            ChunkView::Words(words) => {
                let bytes = (CHUNK_PAGES * page_size()).max(part.page);
                for start in all.clone().step_by(bytes) {
                    let chunk = start..all.end.min(start.saturating_add(bytes));
                    words.read(pagemap, &chunk)?;
                    let unprotected = |index: usize| {
                        let word = words.get(index * (part.page / page_size()));
                        // Of hugetlb memory holes aren't reported by a scan, either.
                        !word.is_protected() && (part.page == page_size() || !word.is_empty())
                    };
                    runs(&chunk, part.page, unprotected).into_iter().for_each(&mut found);
                }
            }
            ChunkView::Never => {}
        }
        Ok(())
    }
}
