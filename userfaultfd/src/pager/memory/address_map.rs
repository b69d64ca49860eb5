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

    /// The part with some of its pages.
    pub(crate) fn of_pages(&self, pages: &Range<usize>) -> Self {
        let Range { start, end } = self.addresses_of(pages);
        Self { start, end, region: Arc::clone(&self.region), first: pages.start }
    }

    /// The pages that lie in a range as a whole.
    pub(crate) fn pages_within(&self, range: &Range<usize>) -> Range<usize> {
        let shift = self.region.page_shift;
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        let first = (start.saturating_sub(self.start)).div_ceil(1 << shift);
        let behind = end.saturating_sub(self.start) >> shift;
        self.first + first..self.first + behind.max(first)
    }

    /// Whether it is a hole that the region's mapping has grown by.
    pub(crate) fn is_growth(&self) -> bool {
        self.first >= self.region.pages.count()
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
    /// Segments that have left by an event that isn't read yet: another segment was moved to their place. See
    /// [`shift`](Self::shift).
    displaced: Segments,
    /// The parts that are being moved.
    moving: Segments,
}

/// What an event that ends a place belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// A segment in whose place another one is by now.
    Displaced,
    /// A hole below a segment.
    Below,
    /// What is there.
    Top,
}

impl Default for AddressMap {
    fn default() -> Self {
        Self {
            segments: mapped_vec::none(),
            holes: mapped_vec::none(),
            displaced: mapped_vec::none(),
            moving: mapped_vec::none(),
        }
    }
}

impl AddressMap {
    /// An empty map with room for a number of segments, and for changes. `None` where there is no memory.
    pub(crate) fn try_with_room(segments: usize) -> Option<Self> {
        Some(Self {
            segments: mapped_vec::try_with_room(segments + SEGMENT_ROOM)?,
            holes: mapped_vec::try_with_room(SEGMENT_ROOM)?,
            displaced: mapped_vec::try_with_room(SEGMENT_ROOM)?,
            moving: mapped_vec::try_with_room(SEGMENT_ROOM)?,
        })
    }

    /// Makes room for more segments. Returns whether there is memory for that.
    pub(crate) fn try_reserve(&mut self, segments: usize) -> bool {
        self.segments.try_reserve(segments).is_ok()
    }

    /// A copy for a fork's child, with room for changes. `None` where there is no memory.
    ///
    /// What its parent's events are still to tell no event of the child will: what is displaced isn't copied.
    pub(crate) fn try_clone(&self) -> Option<Self> {
        Some(Self {
            segments: mapped_vec::try_copy(&self.segments, SEGMENT_ROOM)?,
            holes: mapped_vec::try_copy(&self.holes, SEGMENT_ROOM)?,
            displaced: mapped_vec::try_with_room(SEGMENT_ROOM)?,
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

    /// The parts of holes in a range.
    pub(crate) fn parts_of_holes(&self, range: Range<usize>) -> impl Iterator<Item = Segment> {
        parts(&self.holes, range)
    }

    /// The segments that overlap a range.
    pub(crate) fn overlapping(&self, range: &Range<usize>) -> impl Iterator<Item = &Segment> {
        let from = self.segments.partition_point(|segment| segment.end <= range.start);
        let end = range.end;
        self.segments[from..].iter().take_while(move |segment| segment.start < end)
    }

    /// Notes that the pages in a range were removed. The kernel removes only huge pages that lie in the range as a whole.
    pub(crate) fn remove_pages(&self, range: &Range<usize>) {
        for segment in self.overlapping(range) {
            segment.region.remove(segment.pages_within(range));
        }
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

    /// Takes out what an event reports as unmapped: in each place the oldest that lies there. See [`shift`](Self::shift).
    pub(crate) fn unmap(&mut self, range: Range<usize>, gone: &mut Segments) {
        let mut next = range.start;
        while next < range.end {
            let (leaving, until) = self.leaving(next..range.end);
            match leaving {
                Leaving::Displaced => cut(&mut self.displaced, &(next..until), gone),
                Leaving::Below => cut(&mut self.holes, &(next..until), gone),
                Leaving::Top => self.cut(next..until, gone),
            }
            next = until;
        }
    }

    /// Moves the parts in a range to another address, as mremap(2) does. They leave empty memory behind, until an unmapping
    /// is reported: with MREMAP_DONTUNMAP none is.
    ///
    /// The kernel queues an event after the change, so the changes of two threads may be read in another order. Where
    /// unmappings are reported (`tells_unmaps`), the order in each place is known all the same: before memory is moved to
    /// a place, the memory there must have left, by a move or an unmapping; what the move itself replaces is reported
    /// before the move. So
    ///
    /// - a segment in the target has left, and the event that says so isn't read yet. It is put aside as displaced. The
    ///   next event that ends this place belongs to it.
    /// - a hole in the target still has to be unmapped. It stays below the segment. The next unmapping belongs to it.
    ///
    /// Until that event is read the kernel refuses all fills, so that nothing is filled in the wrong place meanwhile.
    pub(crate) fn shift(&mut self, from: Range<usize>, to: usize, tells_unmaps: bool, gone: &mut Segments) {
        let target = to..to + from.len();
        if tells_unmaps {
            cut(&mut self.displaced, &target, gone);
            cut(&mut self.segments, &target, &mut self.moving);
            self.moving.drain(..).for_each(|segment| insert(&mut self.displaced, segment));
        } else {
            self.cut(target, gone);
        }
        let moved = |segment: &Segment| {
            let start = to + (segment.start - from.start);
            Segment { start, end: start + (segment.end - segment.start), ..segment.clone() }
        };
        let mut next = from.start;
        while next < from.end {
            let (leaving, until) = self.leaving(next..from.end);
            let place = next..until;
            if leaving == Leaving::Displaced {
                cut(&mut self.displaced, &place, &mut self.moving);
            } else if find(&self.segments, next).is_some() {
                cut(&mut self.segments, &place, &mut self.moving);
            } else if let Some(hole) = { parts(&self.holes, place).next() } {
                self.insert_hole(moved(&hole), gone);
            }
            next = until;
        }
        let mut moving = std::mem::replace(&mut self.moving, mapped_vec::none());
        for segment in moving.drain(..) {
            insert(&mut self.segments, moved(&segment));
            let place = segment.start..segment.end;
            if !segment.region.shared {
                self.insert_hole(segment, gone);
            } else if parts(&self.segments, place).next().is_some() {
                insert(&mut self.displaced, segment);
            } else {
                // The file shows the same in both places.
                insert(&mut self.segments, segment);
            }
        }
        self.moving = moving;
    }

    /// What leaves at the start of a range, which isn't empty, and up to where the same does.
    fn leaving(&self, range: Range<usize>) -> (Leaving, usize) {
        let look = |all: &Segments| {
            let next = all.get(all.partition_point(|part| part.end <= range.start));
            let is_there = next.is_some_and(|part| part.start <= range.start);
            (is_there, next.map_or(usize::MAX, |part| if is_there { part.end } else { part.start }))
        };
        let (displaced, hole, segment) = (look(&self.displaced), look(&self.holes), look(&self.segments));
        let leaving = match (displaced.0, hole.0 && segment.0) {
            (true, _) => Leaving::Displaced,
            (false, true) => Leaving::Below,
            (false, false) => Leaving::Top,
        };
        (leaving, range.end.min(displaced.1).min(hole.1).min(segment.1))
    }

    /// Whether events that say where segments have gone aren't read yet.
    pub(crate) fn is_unsettled(&self) -> bool {
        !self.displaced.is_empty()
    }

    /// Forgets the parts that events were expected to end: there are none.
    pub(crate) fn settle(&mut self, gone: &mut Segments) {
        mapped_vec::reserve(gone, self.displaced.len());
        gone.extend(self.displaced.drain(..));
        for segment in &self.segments {
            cut(&mut self.holes, &(segment.start..segment.end), gone);
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

    /// Takes out the holes in a range.
    pub(crate) fn cut_holes(&mut self, range: &Range<usize>, gone: &mut Segments) {
        cut(&mut self.holes, range, gone);
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
            let has_content = region.reloads || !region.pages.is_removed(page);
            let offset = has_content.then(|| region.offset_of(page));
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

    /// The places of what is there and what is below, by their regions.
    fn places(layout: &AddressMap) -> [Vec<(usize, usize, u64)>; 3] {
        [&layout.segments, &layout.holes, &layout.displaced]
            .map(|all| all.iter().map(|part| (part.start / PAGE, part.end / PAGE, part.region.id)).collect())
    }

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
    fn cut_returns_the_inside_and_leaves_the_rest() {
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
        layout.shift(12 * PAGE..14 * PAGE, 31 * PAGE, false, &mut gone);
        assert_eq!(shape(&layout), [(10, 12, 0), (14, 18, 4), (30, 31, 0), (31, 33, 2), (33, 34, 3)]);
        assert!(gone.len() == 1 && gone[0].region.id == b.id && gone[0].pages() == (1..3));
        let holes = |layout: &AddressMap| {
            layout.holes().iter().map(|hole| (hole.start / PAGE, hole.end / PAGE)).collect::<Vec<_>>()
        };
        assert_eq!(holes(&layout), [(12, 14)]);
        assert!(layout.find(13 * PAGE).is_none() && layout.find_hole(13 * PAGE).is_some());
        // Its hole moves along, and is left as well.
        layout.shift(11 * PAGE..15 * PAGE, 50 * PAGE, false, &mut gone);
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
        layout.shift(10 * PAGE..14 * PAGE, 30 * PAGE, false, &mut gone);
        // Something new in the middle of the hole, which is moved away in turn.
        layout.insert(segment(11, 2, &b, 0));
        layout.shift(11 * PAGE..13 * PAGE, 50 * PAGE, false, &mut gone);
        let holes: Vec<_> =
            layout.holes().iter().map(|s| (s.start / PAGE, s.end / PAGE, s.region.id, s.first)).collect();
        assert_eq!(&holes[..3], [(10, 11, 1, 0), (11, 13, 2, 0), (13, 14, 1, 3)]);
        assert!(gone.iter().any(|part| part.region.id == 1 && part.pages() == (1..3)));
        assert_eq!(layout.find_hole(12 * PAGE).map(|hole| hole.region.id), Some(2));
    }

    /// One thread moves A from X to Y, another one B from Z to X. The kernel queues the two events of a move one after the
    /// other, and those of two threads in any order.
    #[test]
    fn moves_of_two_threads_lead_to_the_same_in_any_order() {
        crate::support::require!();
        const X: usize = 10;
        const Y: usize = 30;
        const Z: usize = 50;
        let of = |from: usize, to: usize| [(true, from, to), (false, from, from)];
        let orders = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]];
        for is_shared in [false, true] {
            for order in orders {
                let [a, b] = [1, 2].map(|id| {
                    let mut region = ServedRegion::for_tests(id, PAGE, 4);
                    region.shared = is_shared;
                    Arc::new(region)
                });
                let mut layout = AddressMap::default();
                layout.insert(segment(X, 4, &a, 0));
                layout.insert(segment(Z, 4, &b, 0));
                let mut events = [of(X, Y).into_iter(), of(Z, X).into_iter()];
                let mut gone = mapped_vec::none();
                for thread in order {
                    let (is_move, from, to) = events[thread].next().unwrap();
                    let from = from * PAGE..(from + 4) * PAGE;
                    if is_move {
                        layout.shift(from, to * PAGE, true, &mut gone);
                    } else {
                        layout.unmap(from, &mut gone);
                    }
                }
                assert!(!layout.is_unsettled());
                let expected = [vec![(X, X + 4, 2), (Y, Y + 4, 1)], vec![], vec![]];
                assert_eq!(places(&layout), expected, "{order:?} {is_shared}");
                assert!(layout.segments().iter().all(|segment| segment.first == 0));
            }
        }
    }

    /// A thread unmaps a part of what lay where another one moves something to, and moves another part.
    #[test]
    fn parts_that_left_before_an_arrival_leave_when_told() {
        crate::support::require!();
        let (a, b) = (region(1, 8), region(2, 8));
        let mut layout = AddressMap::default();
        layout.insert(segment(10, 8, &a, 0));
        layout.insert(segment(50, 8, &b, 0));
        let mut gone = mapped_vec::none();
        layout.shift(50 * PAGE..56 * PAGE, 12 * PAGE, true, &mut gone);
        assert_eq!(
            places(&layout),
            [vec![(10, 12, 1), (12, 18, 2), (56, 58, 2)], vec![(50, 56, 2)], vec![(12, 18, 1)]]
        );
        layout.unmap(10 * PAGE..14 * PAGE, &mut gone);
        assert!(layout.is_unsettled());
        layout.shift(14 * PAGE..18 * PAGE, 30 * PAGE, true, &mut gone);
        layout.unmap(14 * PAGE..18 * PAGE, &mut gone);
        layout.unmap(50 * PAGE..56 * PAGE, &mut gone);
        assert_eq!(places(&layout), [vec![(12, 18, 2), (30, 34, 1), (56, 58, 2)], vec![], vec![]]);
        assert_eq!(layout.find(30 * PAGE).map(|segment| segment.first), Some(4));
        // From now on the end of this place is the end of what is there.
        layout.unmap(16 * PAGE..17 * PAGE, &mut gone);
        assert_eq!(places(&layout)[0], [(12, 16, 2), (17, 18, 2), (30, 34, 1), (56, 58, 2)]);
        // What no event has told when there are none any more none will.
        layout.shift(30 * PAGE..34 * PAGE, 12 * PAGE, true, &mut gone);
        layout.shift(56 * PAGE..57 * PAGE, 30 * PAGE, true, &mut gone);
        assert!(layout.is_unsettled());
        layout.settle(&mut gone);
        assert_eq!(places(&layout)[1..], [vec![(31, 34, 1), (56, 57, 2)], vec![]]);
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
        layout.shift(10 * PAGE..14 * PAGE, 20 * PAGE, false, &mut mapped_vec::none());
        assert_eq!(shape(&layout), [(10, 14, 0), (20, 24, 0)]);
        assert!(layout.holes().is_empty());
    }
}
