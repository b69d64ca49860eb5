//! The map from addresses to regions.

use std::ops::Range;
use std::sync::Arc;

use super::served::ServedRegion;
use crate::mapped_vec;
use crate::mapped_vec::MappedVec;
use crate::pager::{MissingRange, RegionId};

/// A part of a region at its present address. mremap(2) and munmap(2) cut regions into several.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) region: Arc<ServedRegion>,
    /// The page of the region that is at `start`.
    pub(crate) first: usize,
}

impl Segment {
    /// The page of the region at an address of the segment.
    pub(crate) fn page_at(&self, address: usize) -> usize {
        self.first + ((address - self.start) >> self.region.page_shift)
    }

    /// The address of a page of the region, if it is in this segment.
    pub(crate) fn address_of(&self, page: usize) -> Option<usize> {
        let address =
            page.checked_sub(self.first).map(|pages| self.start + (pages << self.region.page_shift))?;
        (address < self.end).then_some(address)
    }

    /// The pages of the region in this segment.
    pub(crate) fn pages(&self) -> Range<usize> {
        self.first..self.first + ((self.end - self.start) >> self.region.page_shift)
    }

    /// The addresses of those of some pages that are in this segment.
    pub(crate) fn addresses_of(&self, pages: &Range<usize>) -> Range<usize> {
        let within = self.pages();
        let (start, end) = (pages.start.max(within.start), pages.end.min(within.end));
        let address = |page: usize| self.start + ((page - self.first) << self.region.page_shift);
        if start < end { address(start)..address(end) } else { 0..0 }
    }

    /// The pages that lie in a range as a whole.
    pub(crate) fn pages_within(&self, range: &Range<usize>) -> Range<usize> {
        let shift = self.region.page_shift;
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        let first = (start.saturating_sub(self.start)).div_ceil(1 << shift);
        let behind = end.saturating_sub(self.start) >> shift;
        self.first + first..self.first + behind.max(first)
    }

    /// Both halves. `None` for a single page.
    pub(crate) fn halves(&self) -> Option<[Self; 2]> {
        let middle = self.start + ((self.pages().len() / 2) << self.region.page_shift);
        let (below, above) = (self.part(&(self.start..middle))?, self.part(&(middle..self.end))?);
        Some([below, above])
    }

    /// The part in a range, which may lie anywhere. Its bounds are aligned to pages, as the kernel's are.
    fn part(&self, range: &Range<usize>) -> Option<Self> {
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        (start < end).then(|| Self {
            start,
            end,
            region: Arc::clone(&self.region),
            first: self.page_at(start),
        })
    }
}

/// Segments that are cut and moved with all shards locked: see `mapped_vec`.
pub(crate) type Segments = MappedVec<Segment>;

/// Further segments that there is room for from the start. Room that is mapped while the pager handles an unmapping could
/// come to lie in the unmapped place, where the program is about to map something else.
pub(crate) const SEGMENT_ROOM: usize = 128;

/// The segments of an address space, ordered by address.
#[derive(Debug)]
pub(crate) struct AddressMap {
    segments: Segments,
    /// The places from which mremap(2) has moved private segments away. Zeros belong there, so they need no states of
    /// pages.
    holes: Segments,
    /// The parts that are being moved.
    moving: Segments,
}

impl Default for AddressMap {
    fn default() -> Self {
        Self { segments: mapped_vec::none(), holes: mapped_vec::none(), moving: mapped_vec::none() }
    }
}

impl AddressMap {
    /// An empty map with room for a number of segments, and for changes. `None` where there is no memory.
    pub(crate) fn try_with_room(segments: usize) -> Option<Self> {
        Some(Self {
            segments: mapped_vec::try_with_room(segments + SEGMENT_ROOM)?,
            holes: mapped_vec::try_with_room(SEGMENT_ROOM)?,
            moving: mapped_vec::try_with_room(SEGMENT_ROOM)?,
        })
    }

    /// Makes room for more segments. Returns whether there is memory for that.
    pub(crate) fn try_reserve(&mut self, segments: usize) -> bool {
        self.segments.try_reserve(segments).is_ok()
    }

    /// A copy, with room for changes. `None` where there is no memory.
    pub(crate) fn try_clone(&self) -> Option<Self> {
        Some(Self {
            segments: mapped_vec::try_copy(&self.segments, SEGMENT_ROOM)?,
            holes: mapped_vec::try_copy(&self.holes, SEGMENT_ROOM)?,
            moving: mapped_vec::try_copy(&self.moving, SEGMENT_ROOM)?,
        })
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(crate) fn holes(&self) -> &[Segment] {
        &self.holes
    }

    /// Segments, and holes.
    pub(crate) fn everything(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().chain(&self.holes)
    }

    /// The segment at an address.
    pub(crate) fn find(&self, address: usize) -> Option<&Segment> {
        find(&self.segments, address)
    }

    /// The hole at an address, if no segment is there.
    pub(crate) fn find_hole(&self, address: usize) -> Option<&Segment> {
        find(&self.holes, address)
    }

    /// The parts of segments in a range.
    pub(crate) fn parts(&self, range: Range<usize>) -> impl Iterator<Item = Segment> {
        parts(&self.segments, range)
    }

    /// The segments that overlap a range.
    pub(crate) fn overlapping(&self, range: &Range<usize>) -> impl Iterator<Item = &Segment> {
        let from = self.segments.partition_point(|segment| segment.end <= range.start);
        let end = range.end;
        self.segments[from..].iter().take_while(move |segment| segment.start < end)
    }

    /// Adds a segment where there is none.
    pub(crate) fn insert(&mut self, segment: Segment) {
        insert(&mut self.segments, segment);
    }

    /// Removes the parts in a range.
    pub(crate) fn cut(&mut self, range: Range<usize>, gone: &mut Segments) {
        cut(&mut self.segments, &range, gone);
        cut(&mut self.holes, &range, gone);
    }

    /// Moves the parts in a range to another address, where they replace others, as mremap(2) does. They leave empty
    /// memory behind, until an unmapping is reported: with MREMAP_DONTUNMAP none is.
    pub(crate) fn shift(&mut self, from: Range<usize>, to: usize, gone: &mut Segments) {
        self.cut(to..to + from.len(), gone);
        let moved = |segment: &Segment| {
            let start = to + (segment.start - from.start);
            Segment { start, end: start + (segment.end - segment.start), ..segment.clone() }
        };
        let mut next = from.start;
        while let Some(hole) = { parts(&self.holes, next..from.end).next() } {
            next = hole.end;
            insert(&mut self.holes, moved(&hole));
        }
        cut(&mut self.segments, &from, &mut self.moving);
        for segment in self.moving.drain(..) {
            insert(&mut self.segments, moved(&segment));
            if segment.region.shared {
                // The file shows the same in both places.
                insert(&mut self.segments, segment);
            } else {
                cut(&mut self.holes, &(segment.start..segment.end), gone);
                insert(&mut self.holes, segment);
            }
        }
    }

    /// Removes a whole region. Returns whether it was there.
    pub(crate) fn take(&mut self, region: u64, gone: &mut Segments) -> bool {
        let is_there = self.segments.iter().any(|segment| segment.region.id == region);
        for all in [&mut self.segments, &mut self.holes] {
            mapped_vec::reserve(gone, all.len());
            gone.extend(all.iter().filter(|part| part.region.id == region).cloned());
            all.retain(|part| part.region.id != region);
        }
        is_there
    }

    /// All segments and holes.
    pub(crate) fn into_parts(self) -> (Segments, Segments) {
        (self.segments, self.holes)
    }

    /// Adds a hole, which replaces others.
    pub(crate) fn insert_hole(&mut self, hole: Segment, gone: &mut Segments) {
        cut(&mut self.holes, &(hole.start..hole.end), gone);
        insert(&mut self.holes, hole);
    }

    /// The segment or hole that ends last before an address.
    pub(crate) fn before(&self, address: usize) -> Option<&Segment> {
        let last = |all: &Segments| all.partition_point(|part| part.end <= address).checked_sub(1);
        let segment = last(&self.segments).map(|at| &self.segments[at]);
        let hole = last(&self.holes).map(|at| &self.holes[at]);
        segment.into_iter().chain(hole).max_by_key(|part| part.end)
    }

    /// The start of the first segment or hole behind an address; `usize::MAX` if there is none.
    pub(crate) fn next_start(&self, address: usize) -> usize {
        let next = |all: &Segments| {
            all.get(all.partition_point(|part| part.start <= address)).map(|part| part.start)
        };
        next(&self.segments).into_iter().chain(next(&self.holes)).min().unwrap_or(usize::MAX)
    }

    /// Adds a hole in an empty place, and joins it to an adjacent hole before it. Returns whether there was room.
    pub(crate) fn grow(&mut self, hole: Segment) -> bool {
        let at = self.holes.partition_point(|other| other.end <= hole.start);
        let before = at.checked_sub(1).and_then(|at| self.holes.get_mut(at)).filter(|before| {
            before.end == hole.start
                && Arc::ptr_eq(&before.region, &hole.region)
                && before.pages().end == hole.first
        });
        if let Some(before) = before {
            before.end = hole.end;
            return true;
        }
        let room = mapped_vec::try_reserve(&mut self.holes);
        if room {
            self.holes.insert(at, hole);
        }
        room
    }
}

fn find(segments: &[Segment], address: usize) -> Option<&Segment> {
    let at = segments.partition_point(|segment| segment.end <= address);
    segments.get(at).filter(|segment| segment.start <= address)
}

fn parts(segments: &[Segment], range: Range<usize>) -> impl Iterator<Item = Segment> {
    let from = segments.partition_point(|segment| segment.end <= range.start);
    segments[from..].iter().map_while(move |segment| segment.part(&range))
}

fn insert(segments: &mut Segments, segment: Segment) {
    let at = segments.partition_point(|other| other.end <= segment.start);
    debug_assert!(segments.get(at).is_none_or(|other| segment.end <= other.start), "segments overlap");
    mapped_vec::reserve(segments, 1);
    segments.insert(at, segment);
}

/// Moves the parts in a range to `gone`.
fn cut(segments: &mut Segments, range: &Range<usize>, gone: &mut Segments) {
    let first = segments.partition_point(|segment| segment.end <= range.start);
    let count = segments[first..].partition_point(|segment| segment.start < range.end);
    let Some(last) = segments[first..first + count].last() else { return };
    let below = segments[first].part(&(0..range.start));
    let above = last.part(&(range.end..usize::MAX));
    mapped_vec::reserve(gone, count);
    gone.extend(parts(segments, range.clone()));
    segments.drain(first..first + count);
    mapped_vec::reserve(segments, 2);
    for rest in [above, below].into_iter().flatten() {
        segments.insert(first, rest);
    }
}

/// The missing ranges, ordered by address. Holes count as missing as a whole.
pub(crate) fn missing(segments: &[Segment], holes: &[Segment]) -> Vec<MissingRange> {
    let mut missing: Vec<MissingRange> = Vec::new();
    for segment in segments {
        let (region, shift) = (&segment.region, segment.region.page_shift);
        let (id, len) = (RegionId(region.id), 1 << shift);
        for page in segment.pages().filter(|page| region.pages.is_missing(*page)) {
            let offset = (!region.pages.is_removed(page)).then(|| region.offset_of(page));
            let address = segment.start + ((page - segment.first) << shift);
            match missing.last_mut() {
                Some(last) if last.is_followed_by(id, address, offset) => last.len += len,
                _ => missing.push(MissingRange { region: id, address, len, offset }),
            }
        }
    }
    missing.extend(holes.iter().map(|hole| MissingRange {
        region: RegionId(hole.region.id),
        address: hole.start,
        len: hole.end - hole.start,
        offset: None,
    }));
    missing.sort_by_key(|part| part.address);
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn region(id: u64, pages: usize) -> Arc<ServedRegion> {
        Arc::new(ServedRegion::for_tests(id, PAGE, pages))
    }

    fn segment(start: usize, pages: usize, region: &Arc<ServedRegion>, first: usize) -> Segment {
        Segment { start: start * PAGE, end: (start + pages) * PAGE, region: Arc::clone(region), first }
    }

    fn shape(layout: &AddressMap) -> Vec<(usize, usize, usize)> {
        let shape = |s: &Segment| (s.start / PAGE, s.end / PAGE, s.first);
        layout.segments().iter().map(shape).collect()
    }

    fn cut(layout: &mut AddressMap, range: std::ops::Range<usize>) -> Segments {
        let mut gone = mapped_vec::none();
        layout.cut(range, &mut gone);
        gone
    }

    #[test]
    fn an_address_finds_its_segment_and_page() {
        crate::support::require!();
        let (a, b) = (region(1, 4), region(2, 2));
        let mut layout = AddressMap::default();
        layout.insert(segment(20, 2, &b, 0));
        layout.insert(segment(10, 4, &a, 0));
        assert!(layout.find(10 * PAGE - 1).is_none());
        let found = layout.find(13 * PAGE + 5).unwrap();
        assert!(Arc::ptr_eq(&found.region, &a));
        assert_eq!(found.page_at(13 * PAGE + 5), 3);
        assert_eq!(found.address_of(3), Some(13 * PAGE));
        assert_eq!(found.address_of(4), None);
        assert!(layout.find(14 * PAGE).is_none());
        assert_eq!(layout.find(20 * PAGE).unwrap().pages(), 0..2);
        assert!(layout.find(22 * PAGE).is_none());
    }

    #[test]
    fn cutting_leaves_what_is_around_and_returns_what_was_inside() {
        crate::support::require!();
        let (a, b) = (region(1, 4), region(2, 2));
        let mut layout = AddressMap::default();
        layout.insert(segment(10, 4, &a, 0));
        layout.insert(segment(14, 2, &b, 0));
        let parts = cut(&mut layout, 11 * PAGE..15 * PAGE);
        assert_eq!(shape(&layout), [(10, 11, 0), (15, 16, 1)]);
        let inside: Vec<_> = parts.iter().map(|s| (s.start / PAGE, s.end / PAGE, s.first)).collect();
        assert_eq!(inside, [(11, 14, 1), (14, 15, 0)]);
        assert_eq!(cut(&mut layout, 0..10 * PAGE).len(), 0);
        let mut gone = mapped_vec::none();
        assert!(layout.take(b.id, &mut gone) && !layout.take(b.id, &mut gone));
        assert_eq!(gone.len(), 1);
        assert_eq!(shape(&layout), [(10, 11, 0)]);
    }

    #[test]
    fn a_hole_in_a_segment_makes_two() {
        crate::support::require!();
        let a = region(1, 8);
        let mut layout = AddressMap::default();
        layout.insert(segment(100, 8, &a, 0));
        cut(&mut layout, 103 * PAGE..105 * PAGE);
        assert_eq!(shape(&layout), [(100, 103, 0), (105, 108, 5)]);
        assert_eq!(layout.find(106 * PAGE).unwrap().page_at(106 * PAGE), 6);
        let first = layout.segments()[0].clone();
        assert_eq!(first.address_of(5), None, "it is in the other segment");
    }

    #[test]
    fn pages_are_within_a_range_that_has_all_of_them() {
        crate::support::require!();
        let segment = segment(100, 8, &region(1, 20), 5);
        let within = |start, end| segment.pages_within(&(start..end));
        assert_eq!(within(0, usize::MAX), 5..13);
        assert_eq!(within(101 * PAGE, 103 * PAGE), 6..8);
        assert_eq!(within(101 * PAGE - 1, 103 * PAGE - 1), 6..7);
        assert_eq!(within(101 * PAGE + 1, 103 * PAGE + 1), 7..8);
        assert!(within(101 * PAGE + 1, 102 * PAGE + 1).is_empty());
        assert!(within(108 * PAGE, 109 * PAGE).is_empty() && within(0, 100 * PAGE).is_empty());
    }

    #[test]
    fn what_is_moved_replaces_what_was_there_and_leaves_a_hole() {
        crate::support::require!();
        let (a, b) = (region(1, 8), region(2, 4));
        let mut layout = AddressMap::default();
        layout.insert(segment(10, 8, &a, 0));
        layout.insert(segment(30, 4, &b, 0));
        let mut gone = mapped_vec::none();
        layout.shift(12 * PAGE..14 * PAGE, 31 * PAGE, &mut gone);
        assert_eq!(shape(&layout), [(10, 12, 0), (14, 18, 4), (30, 31, 0), (31, 33, 2), (33, 34, 3)]);
        assert!(gone.len() == 1 && gone[0].region.id == b.id && gone[0].pages() == (1..3));
        let holes = |layout: &AddressMap| {
            layout.holes().iter().map(|hole| (hole.start / PAGE, hole.end / PAGE)).collect::<Vec<_>>()
        };
        assert_eq!(holes(&layout), [(12, 14)]);
        assert!(layout.find(13 * PAGE).is_none() && layout.find_hole(13 * PAGE).is_some());
        // Its hole moves along, and is left as well.
        layout.shift(11 * PAGE..15 * PAGE, 50 * PAGE, &mut gone);
        assert_eq!(
            shape(&layout),
            [(10, 11, 0), (15, 18, 5), (30, 31, 0), (31, 33, 2), (33, 34, 3), (50, 51, 1), (53, 54, 4)]
        );
        assert_eq!(holes(&layout), [(11, 12), (12, 14), (14, 15), (51, 53)]);
        layout.cut(0..usize::MAX, &mut gone);
        assert!(shape(&layout).is_empty() && holes(&layout).is_empty());
    }

    #[test]
    fn a_hole_takes_the_place_of_one_that_was_left_there_before() {
        crate::support::require!();
        let (a, b) = (region(1, 4), region(2, 2));
        let mut layout = AddressMap::default();
        layout.insert(segment(10, 4, &a, 0));
        let mut gone = mapped_vec::none();
        layout.shift(10 * PAGE..14 * PAGE, 30 * PAGE, &mut gone);
        // Something new in the middle of the hole, which is moved away in turn.
        layout.insert(segment(11, 2, &b, 0));
        layout.shift(11 * PAGE..13 * PAGE, 50 * PAGE, &mut gone);
        let holes: Vec<_> =
            layout.holes().iter().map(|s| (s.start / PAGE, s.end / PAGE, s.region.id, s.first)).collect();
        assert_eq!(&holes[..3], [(10, 11, 1, 0), (11, 13, 2, 0), (13, 14, 1, 3)]);
        assert!(gone.iter().any(|part| part.region.id == 1 && part.pages() == (1..3)));
        assert_eq!(layout.find_hole(12 * PAGE).map(|hole| hole.region.id), Some(2));
    }

    #[test]
    fn grown_part_of_a_mapping_extends_the_hole_before() {
        crate::support::require!();
        let a = region(1, 4);
        let mut layout = AddressMap::default();
        layout.insert(segment(10, 4, &a, 0));
        layout.insert(segment(30, 4, &a, 0));
        assert!(layout.before(10 * PAGE).is_none());
        for (start, first) in [(14, 4), (16, 6)] {
            assert_eq!(layout.before(start * PAGE).map(|part| part.end), Some(start * PAGE));
            assert_eq!(layout.next_start(start * PAGE), 30 * PAGE);
            assert!(layout.grow(segment(start, 2, &a, first)));
        }
        assert!(layout.grow(segment(34, 1, &a, 4)));
        let holes: Vec<_> = layout.holes().iter().map(|s| (s.start / PAGE, s.end / PAGE, s.first)).collect();
        assert_eq!(holes, [(14, 18, 4), (34, 35, 4)]);
        assert_eq!(layout.next_start(30 * PAGE), 34 * PAGE);
        assert_eq!(layout.next_start(34 * PAGE), usize::MAX);
    }

    #[test]
    fn what_is_shared_is_in_both_places_once_it_is_moved() {
        crate::support::require!();
        let mut a = ServedRegion::for_tests(1, PAGE, 4);
        a.shared = true;
        let a = Arc::new(a);
        let mut layout = AddressMap::default();
        layout.insert(segment(10, 4, &a, 0));
        layout.shift(10 * PAGE..14 * PAGE, 20 * PAGE, &mut mapped_vec::none());
        assert_eq!(shape(&layout), [(10, 14, 0), (20, 24, 0)]);
        assert!(layout.holes().is_empty());
    }
}
