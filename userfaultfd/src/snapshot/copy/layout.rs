//! Where the pages of a snapshot lie in memory now: mappings may move or go while it is taken.

use std::ops::Range;

use crate::page_size;

/// A part of the memory whose pages lie side by side in it and in the snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) address: usize,
    /// Where it lies in the snapshot, in bytes.
    pub(crate) offset: usize,
    pub(crate) len: usize,
    /// Bytes of a page.
    pub(crate) page: usize,
}

impl Part {
    pub(super) fn addresses(&self) -> Range<usize> {
        self.address..self.address + self.len
    }

    /// Its bits: one for each page of the base size.
    pub(super) fn bits(&self) -> Range<usize> {
        self.offset / page_size()..(self.offset + self.len) / page_size()
    }

    /// Its pages, one by one.
    pub(super) fn pages(&self) -> impl Iterator<Item = Part> + use<> {
        let Part { address, offset, len, page } = *self;
        (0..len).step_by(page).map(move |at| Part {
            address: address + at,
            offset: offset + at,
            len: page,
            page,
        })
    }

    /// What lies at these addresses.
    fn cut(&self, range: &Range<usize>) -> Option<Part> {
        let own = self.addresses();
        let (start, end) = (own.start.max(range.start), own.end.min(range.end));
        (start < end).then(|| Part {
            address: start,
            offset: self.offset + (start - own.start),
            len: end - start,
            page: self.page,
        })
    }
}

/// The mappings in which the parts of a layout lie, cut where those end, in the order of their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mapped(Vec<Range<usize>>);

impl Mapped {
    /// What of some parts lies in mappings. Both are in order.
    pub(super) fn of(parts: &[Range<usize>], mappings: impl IntoIterator<Item = Range<usize>>) -> Self {
        let (mut mapped, mut rest) = (Vec::new(), parts);
        for mapping in mappings {
            while let Some((part, behind)) = rest.split_first() {
                let common = part.start.max(mapping.start)..part.end.min(mapping.end);
                if !common.is_empty() {
                    mapped.push(common);
                }
                if part.end > mapping.end {
                    break;
                }
                rest = behind;
            }
        }
        Self(mapped)
    }

    pub(super) fn ranges(&self) -> &[Range<usize>] {
        &self.0
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }

    /// As [`Layout::remove`].
    pub(super) fn remove(&mut self, range: &Range<usize>) {
        let rests = [0..range.start, range.end..usize::MAX];
        let cut = |one: &Range<usize>| {
            let rests = rests.clone().map(|rest| one.start.max(rest.start)..one.end.min(rest.end));
            rests.into_iter().filter(|rest| !rest.is_empty())
        };
        self.0 = self.0.iter().flat_map(cut).collect();
    }

    /// As [`Layout::shift`].
    pub(super) fn shift(&mut self, from: &Range<usize>, to: usize) {
        let within = |one: &Range<usize>| one.start.max(from.start)..one.end.min(from.end);
        let moved: Vec<_> = self.0.iter().map(within).filter(|one| !one.is_empty()).collect();
        self.remove(from);
        self.remove(&(to..to + from.len()));
        self.0.extend(moved.into_iter().map(|one| one.start - from.start + to..one.end - from.start + to));
        self.0.sort_unstable_by_key(|one| one.start);
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Layout(Vec<Part>);

impl Layout {
    pub(crate) fn new(parts: Vec<Part>) -> Self {
        Self(parts)
    }

    pub(crate) fn parts(&self) -> &[Part] {
        &self.0
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(|part| part.len).sum()
    }

    /// What lies at these addresses.
    pub(crate) fn at(&self, range: &Range<usize>) -> Vec<Part> {
        self.0.iter().filter_map(|part| part.cut(range)).collect()
    }

    /// The page at an address.
    pub(crate) fn page_at(&self, address: usize) -> Option<Part> {
        let part = self.0.iter().find(|part| part.addresses().contains(&address))?;
        let start = address / part.page * part.page;
        part.cut(&(start..start + part.page))
    }

    /// Where the first bytes of a range of the snapshot lie, as many as lie side by side.
    pub(crate) fn locate(&self, range: &Range<usize>) -> Option<Part> {
        let part = self.0.iter().find(|part| (part.offset..part.offset + part.len).contains(&range.start))?;
        let into = range.start - part.offset;
        let len = range.len().min(part.len - into);
        Some(Part { address: part.address + into, offset: range.start, len, page: part.page })
    }

    /// How many bytes of a range of the snapshot, from its beginning on, lie nowhere.
    pub(crate) fn lost(&self, range: &Range<usize>) -> usize {
        let lies = |part: &Part| part.offset < range.end && part.offset + part.len > range.start;
        let next = self.0.iter().filter(|part| lies(part)).map(|part| part.offset).min();
        next.map_or(range.len(), |next| next.saturating_sub(range.start))
    }

    /// These addresses are gone. Returns what they were.
    pub(crate) fn remove(&mut self, range: &Range<usize>) -> Vec<Part> {
        let removed = self.at(range);
        let rests = [0..range.start, range.end..usize::MAX];
        self.0 = self.0.iter().flat_map(|part| rests.iter().filter_map(|rest| part.cut(rest))).collect();
        removed
    }

    /// What lay at `from` lies at `to` now, where something else may have lain. Returns what that was.
    pub(crate) fn shift(&mut self, from: &Range<usize>, to: usize) -> Vec<Part> {
        let moved = self.remove(from);
        let overwritten = self.remove(&(to..to + from.len()));
        self.0.extend(moved.into_iter().map(|part| Part { address: part.address - from.start + to, ..part }));
        overwritten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(address: usize, offset: usize, len: usize) -> Part {
        Part { address, offset, len, page: 4 }
    }

    #[test]
    fn parts_move_and_go() {
        crate::support::require!();
        let mut layout = Layout::new(vec![part(100, 0, 40), part(200, 40, 20)]);
        assert_eq!(layout.page_at(107), Some(part(104, 4, 4)));
        assert_eq!(layout.page_at(140), None);
        assert_eq!(layout.locate(&(32..60)), Some(part(132, 32, 8)));
        assert_eq!(layout.locate(&(44..48)), Some(part(204, 44, 4)));
        assert_eq!(layout.locate(&(60..64)), None);

        assert_eq!(layout.remove(&(108..112)), [part(108, 8, 4)]);
        assert_eq!(layout.parts(), [part(100, 0, 8), part(112, 12, 28), part(200, 40, 20)]);
        assert_eq!((layout.locate(&(8..12)), layout.page_at(108)), (None, None));
        assert_eq!([8..60, 8..10, 10..60, 60..64, 4..60].map(|range| layout.lost(&range)), [4, 2, 2, 4, 0]);

        // Over a part of the last one.
        assert_eq!(layout.shift(&(120..128), 208), [part(208, 48, 8)]);
        let now = [part(100, 0, 8), part(112, 12, 8), part(128, 28, 12), part(200, 40, 8), part(216, 56, 4)];
        assert_eq!(layout.parts(), [&now[..], &[part(208, 20, 8)]].concat());
        assert_eq!(layout.locate(&(20..60)), Some(part(208, 20, 8)));
        assert_eq!(layout.at(&(204..218)), [part(204, 44, 4), part(216, 56, 2), part(208, 20, 8)]);
        // Nothing of it.
        assert_eq!(layout.shift(&(300..400), 500), []);
    }

    #[test]
    fn mappings_follow_the_layout() {
        crate::support::require!();
        let mut layout = Layout::new(vec![part(100, 0, 40), part(200, 40, 20)]);
        let of = |layout: &Layout| {
            let mut parts: Vec<_> = layout.parts().iter().map(Part::addresses).collect();
            parts.sort_unstable_by_key(|part| part.start);
            Mapped::of(&parts, [0..150, 190..210, 210..300])
        };
        let mut mapped = of(&layout);
        assert_eq!((mapped.ranges(), mapped.bytes()), (&[100..140, 200..210, 210..220][..], 60));
        layout.remove(&(108..112));
        mapped.remove(&(108..112));
        assert_eq!(mapped, of(&layout));
        layout.shift(&(120..128), 205);
        mapped.shift(&(120..128), 205);
        assert_eq!(mapped.ranges(), [100..108, 112..120, 128..140, 200..205, 205..213, 213..220]);
        assert_eq!(mapped.bytes(), of(&layout).bytes());
        assert_eq!(
            Mapped::of(&[4..8, 8..12, 20..24], [0..5, 6..9, 10..30]).ranges(),
            [4..5, 6..8, 8..9, 10..12, 20..24]
        );
    }
}
