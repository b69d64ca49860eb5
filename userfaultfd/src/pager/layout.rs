//! Which region lies at which address.

use std::ops::Range;
use std::sync::Arc;

use super::region::Served;

/// A part of a region, where it is mapped now. mremap(2) and munmap(2) cut regions into several.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) region: Arc<Served>,
    /// Which page of the region is at `start`.
    pub(crate) first: usize,
}

impl Segment {
    /// The page of the region at an address of the segment.
    pub(crate) fn page_at(&self, address: usize) -> usize {
        self.first + ((address - self.start) >> self.region.page_shift)
    }

    /// Where a page of the region is, if it is in this segment.
    pub(crate) fn address_of(&self, page: usize) -> Option<usize> {
        let address =
            page.checked_sub(self.first).map(|pages| self.start + (pages << self.region.page_shift))?;
        (address < self.end).then_some(address)
    }

    /// The pages of the region in this segment.
    pub(crate) fn pages(&self) -> Range<usize> {
        self.first..self.first + ((self.end - self.start) >> self.region.page_shift)
    }

    /// Where those of some pages are that are in this segment.
    pub(crate) fn addresses_of(&self, pages: &Range<usize>) -> Range<usize> {
        let within = self.pages();
        let (start, end) = (pages.start.max(within.start), pages.end.min(within.end));
        let address = |page: usize| self.start + ((page - self.first) << self.region.page_shift);
        if start < end { address(start)..address(end) } else { 0..0 }
    }

    /// The part in a range, which may lie anywhere. Borders are those of pages, as the kernel's are.
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

/// The segments of an address space, by address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    segments: Vec<Segment>,
}

impl Layout {
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The segment at an address.
    pub(crate) fn find(&self, address: usize) -> Option<&Segment> {
        let at = self.segments.partition_point(|segment| segment.end <= address);
        self.segments.get(at).filter(|segment| segment.start <= address)
    }

    /// The parts of segments in a range.
    pub(crate) fn parts(&self, range: Range<usize>) -> impl Iterator<Item = Segment> {
        let from = self.segments.partition_point(|segment| segment.end <= range.start);
        self.segments[from..].iter().map_while(move |segment| segment.part(&range))
    }

    /// Adds a segment where there is none.
    pub(crate) fn insert(&mut self, segment: Segment) {
        let at = self.segments.partition_point(|other| other.end <= segment.start);
        debug_assert!(
            self.segments.get(at).is_none_or(|other| segment.end <= other.start),
            "segments overlap"
        );
        self.segments.insert(at, segment);
    }

    /// Takes out what lies in a range.
    pub(crate) fn cut(&mut self, range: Range<usize>) -> Vec<Segment> {
        let parts = self.parts(range.clone()).collect();
        let rest = |segment: &Segment| {
            let (below, above) = (segment.part(&(0..range.start)), segment.part(&(range.end..usize::MAX)));
            below.into_iter().chain(above)
        };
        self.segments = self.segments.iter().flat_map(rest).collect();
        parts
    }

    /// Takes out a whole region.
    pub(crate) fn take(&mut self, region: u64) -> Vec<Segment> {
        let (gone, stay) =
            std::mem::take(&mut self.segments).into_iter().partition(|segment| segment.region.id == region);
        self.segments = stay;
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn region(id: u64, pages: usize) -> Arc<Served> {
        Arc::new(Served::for_tests(id, PAGE, pages))
    }

    fn segment(start: usize, pages: usize, region: &Arc<Served>, first: usize) -> Segment {
        Segment { start: start * PAGE, end: (start + pages) * PAGE, region: Arc::clone(region), first }
    }

    fn shape(layout: &Layout) -> Vec<(usize, usize, usize)> {
        let shape = |s: &Segment| (s.start / PAGE, s.end / PAGE, s.first);
        layout.segments().iter().map(shape).collect()
    }

    #[test]
    fn an_address_finds_its_segment_and_page() {
        let (a, b) = (region(1, 4), region(2, 2));
        let mut layout = Layout::default();
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
        let (a, b) = (region(1, 4), region(2, 2));
        let mut layout = Layout::default();
        layout.insert(segment(10, 4, &a, 0));
        layout.insert(segment(14, 2, &b, 0));
        let parts = layout.cut(11 * PAGE..15 * PAGE);
        assert_eq!(shape(&layout), [(10, 11, 0), (15, 16, 1)]);
        let inside: Vec<_> = parts.iter().map(|s| (s.start / PAGE, s.end / PAGE, s.first)).collect();
        assert_eq!(inside, [(11, 14, 1), (14, 15, 0)]);
        assert_eq!(layout.cut(0..10 * PAGE).len(), 0);
        assert_eq!(layout.take(b.id).len(), 1);
        assert_eq!(shape(&layout), [(10, 11, 0)]);
    }

    #[test]
    fn a_hole_in_a_segment_makes_two() {
        let a = region(1, 8);
        let mut layout = Layout::default();
        layout.insert(segment(100, 8, &a, 0));
        layout.cut(103 * PAGE..105 * PAGE);
        assert_eq!(shape(&layout), [(100, 103, 0), (105, 108, 5)]);
        assert_eq!(layout.find(106 * PAGE).unwrap().page_at(106 * PAGE), 6);
        let first = layout.segments()[0].clone();
        assert_eq!(first.address_of(5), None, "it is in the other segment");
    }
}
