//! Pages that couldn't be filled, gathered for the error that names them.

use super::address_map::Segment;
use super::page_state::Pages;
use super::served::ServedRegion;
use crate::pager::{Error, Failed, RegionId, Result};

/// Pages that couldn't be filled.
#[derive(Debug, Default)]
pub(crate) struct Unfillable {
    pages: usize,
    failed: Vec<Failed>,
}

impl Unfillable {
    /// Adds the pages of some segments that a predicate selects.
    pub(crate) fn add(&mut self, segments: &[Segment], is_so: fn(&Pages, usize) -> bool) {
        for segment in segments {
            let region = &segment.region;
            self.add_pages(region, segment.pages().filter(|page| is_so(&region.pages, *page)));
        }
    }

    /// Adds pages of a region.
    pub(crate) fn add_pages(&mut self, region: &ServedRegion, pages: impl Iterator<Item = usize>) {
        let pages = pages.inspect(|_| self.pages += 1).map(|page| page..page + 1);
        self.failed.extend(Failed::in_bytes(RegionId(region.id), region.page_shift, pages));
    }

    /// The error for pages that stay missing: `pages` counts those of unknown place, too.
    pub(crate) fn unfilled(self, pages: usize) -> Error {
        Error::Unfilled { pages, failed: self.failed }
    }

    /// The error for pages that were poisoned.
    pub(crate) fn poisoned(self) -> Result<()> {
        let Self { pages, failed } = self;
        if pages == 0 { Ok(()) } else { Err(Error::Poisoned { pages, failed }) }
    }
}
