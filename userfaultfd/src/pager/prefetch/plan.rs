//! The plan of a background fill: its pages, in order.

use std::ops::Range;

/// The pages that a background fill fills, and their order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FillOrder {
    /// The whole region, from the first page on.
    Ascending,
    /// These ranges alone, one after the other, in bytes from the start of the region. They are extended to whole pages
    /// and cut to the region.
    Ranges(Vec<Range<usize>>),
}

/// A page of a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) range: usize,
    pub(super) page: usize,
}

/// The pages of a plan, in order.
pub(crate) struct Plan {
    pub(super) ranges: Vec<Range<usize>>,
    /// Pages of them to leave out.
    pub(super) leave_out: Option<fn(usize) -> bool>,
}

impl Plan {
    pub(super) fn new(order: FillOrder, count: usize, shift: u32) -> Self {
        Self { ranges: pages_of(order, count, shift), leave_out: None }
    }

    /// Runs of pages, without some.
    pub(crate) fn without(ranges: Vec<Range<usize>>, leave_out: fn(usize) -> bool) -> Self {
        Self { ranges, leave_out: Some(leave_out) }
    }

    fn is_left_out(&self, page: usize) -> bool {
        self.leave_out.is_some_and(|leave_out| leave_out(page))
    }

    /// The number of pages.
    pub(super) fn pages(&self) -> usize {
        let ranges = self.ranges.iter();
        match self.leave_out {
            None => ranges.map(Range::len).sum(),
            Some(leave_out) => ranges.flat_map(Range::clone).filter(|page| !leave_out(*page)).count(),
        }
    }

    /// Takes pages of one range, from a place on, up to a multiple of `step` from the start of the region.
    pub(super) fn next(&self, place: &mut Place, step: usize) -> Option<Range<usize>> {
        loop {
            let range = self.ranges.get(place.range)?;
            let start = place.page.max(range.start);
            let Some(start) = (start..range.end).find(|page| !self.is_left_out(*page)) else {
                *place = Place { range: place.range + 1, page: 0 };
                continue;
            };
            let border = (start - start % step).saturating_add(step).min(range.end);
            let end = (start..border).find(|page| self.is_left_out(*page)).unwrap_or(border);
            place.page = end;
            return Some(start..end);
        }
    }
}

/// The ranges of pages of an order, in a region of `pages` pages.
fn pages_of(order: FillOrder, count: usize, shift: u32) -> Vec<Range<usize>> {
    match order {
        FillOrder::Ascending => std::iter::once(0..count).collect(),
        FillOrder::Ranges(ranges) => {
            let pages = |range: Range<usize>| {
                let end = (range.end >> shift) + usize::from(range.end & ((1 << shift) - 1) != 0);
                range.start >> shift..end.min(count)
            };
            let ranges = ranges.into_iter().filter(|range| !range.is_empty()).map(pages);
            ranges.filter(|pages| !pages.is_empty()).collect()
        }
    }
}
