//! Whether memory is what it seems: all where the layout says, and protected.

use std::ops::Range;

use super::copier::Copier;
use super::layout::{Mapped, Part};
use crate::sync_point::{Moment, Point, reach};
use crate::watch::pointer;
use crate::{Errno, Error, RegisterMode, Result, page_size};

/// What a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    /// Pages that aren't protected, though they should be.
    pub(super) pages: usize,
    /// Those of them that can't be protected: guard pages, poisoned pages.
    pub(super) markers: usize,
    /// Pages that weren't known to be unprotected, with those that may go at any time.
    pub(super) found: usize,
}

impl Copier {
    /// Whether the kernel knows of a change of the layout that isn't read yet, or whose thread hasn't run since.
    pub(super) fn is_changing(&self) -> bool {
        self.watch.uffd.is_layout_changing()
    }

    /// Whether no change has been made that isn't read. One that moves pages leaves a hole, or with `MREMAP_DONTUNMAP`
    /// unprotected pages, and other mappings than before. One that unmaps pages leaves a hole, or memory that isn't
    /// registered with this descriptor.
    pub(super) fn is_still_ours(&mut self) -> Result<bool> {
        reach(Point::Watch(Moment::Trust), self.first_address());
        let mapped = self.mappings()?;
        if mapped.bytes() != self.layout.bytes() {
            return Ok(false);
        }
        // What has lost its protection where nothing was mapped anew was moved away without an event. Where the page table
        // doesn't tell what is protected, it may have.
        // Likewise of hugetlb memory in which there may be holes.
        let may_have_holes = |part: &Part| {
            part.page > page_size()
                && self.unprotected.next(part.bits().start).is_some_and(|bit| bit < part.bits().end)
        };
        let may_have_holes = self.layout.parts().iter().any(may_have_holes);
        let is_as_known = mapped == self.mapped;
        if may_have_holes || !self.look.can_tell() {
            return Ok(is_as_known && self.strays(&mapped)?.is_empty());
        }
        // The page that isn't protected may be of memory that was mapped where another one has left. From now on it is known,
        // and so found by no look.
        self.suspects |= self.look_at_all()?.found > 0;
        self.suspects &= !is_as_known;
        if self.suspects {
            return Ok(false);
        }
        // The place that a page has left may have been mapped anew.
        if !self.strays(&mapped)?.is_empty() {
            return Ok(false);
        }
        self.mapped = mapped;
        Ok(true)
    }

    pub(super) fn first_address(&self) -> usize {
        self.layout.parts().first().map_or(0, |part| part.address)
    }

    /// The mappings in which all lies. Looked up once for all parts, which may be many.
    pub(super) fn mappings(&self) -> Result<Mapped> {
        let mut parts: Vec<_> = self.layout.parts().iter().map(Part::addresses).collect();
        parts.sort_unstable_by_key(|part| part.start);
        let Some((first, last)) = parts.first().zip(parts.last()) else { return Ok(Mapped::default()) };
        let mappings = self.watch.process.mappings(&(first.start..last.end))?;
        Ok(Mapped::of(&parts, mappings.into_iter().map(|mapping| mapping.range)))
    }

    /// Looks at all pages. Those that aren't protected, though they should be, have changed.
    pub(super) fn look_at_all(&mut self) -> Result<Lost> {
        let mut lost = Lost::default();
        for part in self.layout.parts().to_vec() {
            let Lost { pages, markers, found } = self.look_at(&part)?;
            lost.pages += pages;
            lost.markers += markers;
            lost.found += found;
        }
        Ok(lost)
    }

    /// The same with a part.
    pub(super) fn look_at(&mut self, part: &Part) -> Result<Lost> {
        let mut found = Vec::new();
        let bit_of = |address: usize| (part.offset + (address - part.address)) / page_size();
        self.look.unprotected(&self.watch.pagemap, part, |range| {
            // The others are known, and may be most of all.
            if !self.unprotected.all(bit_of(range.start)..bit_of(range.end)) {
                found.push(range);
            }
        })?;
        let mut lost = Lost::default();
        for range in found {
            let first = bit_of(range.start);
            self.words.read(&self.watch.pagemap, &range)?;
            // What was removed about when the snapshot began may go at any time.
            let expected = |bit| self.active.as_ref().is_some_and(|active| active.removed.get(bit));
            for index in (0..range.len() / page_size()).filter(|index| !self.unprotected.get(first + index)) {
                lost.found += 1;
                if !expected(first + index) {
                    lost.pages += 1;
                    lost.markers += usize::from(self.words.get(index).is_marker());
                }
            }
            self.changed(first..first + range.len() / page_size());
        }
        Ok(lost)
    }

    /// What of the layout isn't mapped, or isn't registered with this descriptor.
    pub(super) fn strays(&self, mapped: &Mapped) -> Result<Vec<Range<usize>>> {
        let mut strays = Vec::new();
        if mapped.bytes() != self.layout.bytes() {
            let mut holes = self.layout.clone();
            mapped.ranges().iter().for_each(|range| drop(holes.remove(range)));
            strays.extend(holes.parts().iter().map(Part::addresses));
        }
        for range in mapped.ranges() {
            // Where nothing is protected, no page can be taken for another one. And memory that the program has mapped
            // there since must not be registered by this question.
            let protected = |part: &Part| !self.unprotected.all(part.bits());
            if self.layout.at(range).iter().any(protected) && !self.is_registered_here(range)? {
                strays.push(range.clone());
            }
        }
        Ok(strays)
    }

    /// Whether memory can be registered with this descriptor, as what is registered with it already.
    fn is_registered_here(&self, range: &Range<usize>) -> Result<bool> {
        let mode = RegisterMode::WRITE_PROTECT;
        match self.watch.uffd.register_unexplained(pointer(range.start), range.len(), mode) {
            Err(Error::SystemError(Errno::EBUSY | Errno::EINVAL)) => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// Whether a part of a range is registered with another descriptor. What isn't registered is, with this one: another
    /// holder may say that it has it still, as a `LazyMemory` does that was filled, which no safe code unmaps.
    pub(super) fn is_of_another(&self, range: &Range<usize>) -> bool {
        let mode = RegisterMode::WRITE_PROTECT;
        let registered = self.watch.uffd.register_unexplained(pointer(range.start), range.len(), mode);
        matches!(registered, Err(Error::SystemError(Errno::EBUSY)))
    }
}
