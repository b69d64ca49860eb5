//! The plan of a background fill: its pages, in order.

use std::ops::Range;

use super::working_set::{PageCover, WorkingSet};

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

/// Bytes of a working set that are sorted by address: a part of its order. Short enough that what is needed soon is there
/// soon, and long enough that pages near each other meet.
const CHUNK_BYTES: usize = 4 << 20;

/// The longest gap between pages of a working set that is read with them: less than what another request takes, on any
/// source that is worth a working set.
const GAP_BYTES: usize = 32 << 10;

/// The longest read of a replay, from a slow source: a fault on one of its pages waits for all of it.
const READ_BYTES: usize = 1 << 20;

/// The pages of a plan, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(super) ranges: Vec<Range<usize>>,
    /// The length of a read that is always allowed where the source is slow.
    pub(super) read_bytes: usize,
}

impl Plan {
    pub(super) fn new(order: FillOrder, count: usize, shift: u32) -> Self {
        Self { ranges: pages_of(order, count, shift), read_bytes: 0 }
    }

    /// The pages of a working set, in few reads: in chunks of its order, within each by address, with the small gaps between
    /// them. Each page once. Pages of the set that `leave_out` names are not among them.
    pub(super) fn of_set(set: &WorkingSet, cover: &PageCover, leave_out: fn(usize) -> bool) -> Self {
        let pages = |bytes: usize| bytes / set.page_size();
        let (chunk_pages, gap_pages) = (pages(CHUNK_BYTES).max(1), pages(GAP_BYTES));
        let is_left_out = |page: &usize| leave_out(*page) && cover.has(*page);
        let (mut ranges, mut planned) = (Vec::new(), PageCover::default());
        let mut end_chunk = |chunk: &mut Vec<Range<usize>>| {
            chunk.sort_unstable_by_key(|run| run.start);
            let near = chunk.chunk_by(|run, next| next.start - run.end <= gap_pages);
            for near in near {
                let whole = near[0].start..near[near.len() - 1].end;
                planned.add(&whole, |new| {
                    let mut rest = new.clone();
                    for page in new.filter(is_left_out) {
                        push(&mut ranges, rest.start..page);
                        rest.start = page + 1;
                    }
                    push(&mut ranges, rest);
                });
            }
            chunk.clear();
        };
        let (mut chunk, mut room) = (Vec::new(), chunk_pages);
        for run in set.runs() {
            let mut run = run.clone();
            while !run.is_empty() {
                let end = run.end.min(run.start.saturating_add(room));
                chunk.push(run.start..end);
                room -= end - run.start;
                run.start = end;
                if room == 0 {
                    end_chunk(&mut chunk);
                    room = chunk_pages;
                }
            }
        }
        end_chunk(&mut chunk);
        Self { ranges, read_bytes: READ_BYTES }
    }

    /// The number of pages.
    pub(super) fn pages(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Takes pages of one range, from a place on, up to a multiple of `step` from the start of the region.
    pub(super) fn next(&self, place: &mut Place, step: usize) -> Option<Range<usize>> {
        loop {
            let range = self.ranges.get(place.range)?;
            let start = place.page.max(range.start);
            if start >= range.end {
                *place = Place { range: place.range + 1, page: 0 };
                continue;
            }
            place.page = (start - start % step).saturating_add(step).min(range.end);
            return Some(start..place.page);
        }
    }
}

/// Appends pages, if there are any. Where they follow the last ones, as in a run that is longer than a chunk, one read may have
/// both.
fn push(ranges: &mut Vec<Range<usize>>, pages: Range<usize>) {
    match ranges.last_mut().filter(|last| last.end == pages.start) {
        Some(last) => last.end = pages.end,
        None if pages.is_empty() => {}
        None => ranges.push(pages),
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

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;
    const GAP: usize = GAP_BYTES / PAGE;
    const CHUNK: usize = CHUNK_BYTES / PAGE;

    /// Where each range of the plan begins and ends.
    fn plan(pages: impl IntoIterator<Item = usize>, leave_out: fn(usize) -> bool) -> Vec<(usize, usize)> {
        let set = WorkingSet::from_pages(PAGE, 1 << 20, pages).unwrap();
        let ranges = Plan::of_set(&set, &set.cover(), leave_out).ranges;
        ranges.into_iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn pages_of_a_set_are_sorted_and_small_gaps_are_read() {
        crate::support::require!();
        let far = 100 + 2 + GAP + 1;
        assert_eq!(plan([far, 7, 101, 100, 8 + GAP], |_| false), [(7, 9 + GAP), (100, 102), (far, far + 1)]);
        // A run that follows the one before it in memory, but not in the set.
        assert_eq!(plan([50, 49], |_| false), [(49, 51)]);
        assert_eq!(plan([], |_| false), []);
    }

    #[test]
    fn order_of_a_set_is_kept_between_its_chunks() {
        crate::support::require!();
        // Two chunks of pages that lie apart, the second one in front of the first.
        let apart = |first: usize| (0..CHUNK).map(move |number| first + (CHUNK - 1 - number) * (GAP + 2));
        let ranges = plan(apart(500_000).chain(apart(3)), |_| false);
        assert_eq!(ranges.len(), 2 * CHUNK);
        let (one, other) = ranges.split_at(CHUNK);
        assert!(one.is_sorted() && other.is_sorted());
        assert_eq!((one[0].0, other[0].0), (500_000, 3));

        // One run that is longer than a chunk.
        assert_eq!(plan(9..2 * CHUNK + 14, |_| false), [(9, 2 * CHUNK + 14)]);
    }

    #[test]
    fn no_page_is_planned_twice_or_left_out_without_need() {
        crate::support::require!();
        // The gap of the first chunk has a page of the second, which isn't read once more.
        let first = (0..CHUNK).map(|number| number * 2);
        let ranges = plan(first.chain([5, 900_000, 1]), |_| false);
        assert_eq!(ranges, [(0, 2 * CHUNK - 1), (900_000, 900_001)]);
        // Pages of the set alone are left out.
        assert_eq!(plan([10, 12, 14], |page| page == 11 || page == 12), [(10, 12), (13, 15)]);
        assert_eq!(plan([10, 11, 12], |page| page != 11), [(11, 12)]);

        // Random sets, against plain lists.
        let mut random = crate::support::random::Random::new(7);
        for _ in 0..200 {
            let mut next = |below: usize| (random.next() % below as u64) as usize;
            let pages: Vec<_> = (0..next(60)).map(|_| next(700)).collect();
            let planned: Vec<_> = plan(pages.iter().copied(), |page| page % 5 == 0)
                .into_iter()
                .flat_map(|(start, end)| {
                    assert!(start < end);
                    start..end
                })
                .collect();
            let mut once = planned.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), planned.len());
            for page in 0..700 {
                let is_set = pages.contains(&page);
                let is_planned = once.binary_search(&page).is_ok();
                assert!(!is_set || is_planned == (page % 5 != 0), "{page}");
                let within =
                    |pages: Range<usize>| pages.clone().any(|page| once.binary_search(&page).is_ok());
                assert!(is_set || !is_planned || within(page.saturating_sub(GAP)..page + GAP + 1), "{page}");
            }
        }
    }
}
