//! Pages that mustn't leave memory, since the program has pinned them.
//!
//! A page that the program has pinned may be given to system calls and devices, which write to it without a fault from then
//! on. So a page that was pinned so at any time while it was copied for its store counts as dirty still when the store has
//! it. What the library pins while it copies from memory is given to nobody.

use std::ops::Range;
use std::time::Duration;

use super::residence::Residence;
use super::store::WRITE_PAGES;
use crate::mapped_vec::{self, MappedVec};

/// How long a part of a larger range waits until others like it are pinned no more. It is longer only where a source waits
/// for memory of the budget that it fills.
pub(super) const SHORT_PIN_PATIENCE: Duration = Duration::from_secs(3);

/// For how long pages are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PinTerm {
    /// As long as the program wants.
    Program,
    /// As long as one part of a range is filled and copied.
    Part,
}

#[derive(Debug)]
struct Pin {
    member: u32,
    pages: Range<usize>,
    term: PinTerm,
}

/// All pins of a budget.
#[derive(Debug)]
pub(super) struct Pins {
    all: MappedVec<Pin>,
    /// Pages that are pinned, those that are so twice counted twice.
    pages: usize,
}

impl Pins {
    pub(super) fn new() -> Self {
        Self { all: mapped_vec::none(), pages: 0 }
    }

    pub(super) fn page_count(&self) -> usize {
        self.pages
    }

    /// Pins pages, unless more would be pinned than `limit`.
    pub(super) fn pin(&mut self, limit: usize, member: u32, pages: Range<usize>, term: PinTerm) -> bool {
        let pinned = self.pages + pages.len();
        if pinned > limit || !mapped_vec::try_reserve(&mut self.all) {
            return false;
        }
        self.pages = pinned;
        self.all.push(Pin { member, pages, term });
        true
    }

    /// Ends a pin. Returns whether it was there.
    pub(super) fn unpin(&mut self, member: u32, pages: &Range<usize>, term: PinTerm) -> bool {
        let is_it = |pin: &Pin| (pin.member, &pin.pages, pin.term) == (member, pages, term);
        let at = self.all.iter().position(is_it);
        if let Some(at) = at {
            self.all.swap_remove(at);
            self.pages -= pages.len();
        }
        at.is_some()
    }

    /// Ends those of a member.
    pub(super) fn leave(&mut self, member: u32) {
        self.all.retain(|pin| pin.member != member);
        self.pages = self.all.iter().map(|pin| pin.pages.len()).sum();
    }

    /// Whether any ends soon.
    pub(super) fn has_parts(&self) -> bool {
        self.all.iter().any(|pin| pin.term == PinTerm::Part)
    }

    pub(super) fn has(&self, member: u32, page: usize) -> bool {
        self.all.iter().any(|pin| pin.member == member && pin.pages.contains(&page))
    }

    /// The pages of a member that the program has pinned.
    fn of_program(&self, member: u32) -> impl Iterator<Item = &Range<usize>> {
        let is_one = move |pin: &&Pin| (pin.member, pin.term) == (member, PinTerm::Program);
        self.all.iter().filter(is_one).map(|pin| &pin.pages)
    }
}

/// Which of some neighbouring pages the program has pinned, or had since this was made.
pub(super) struct Pinning {
    first: usize,
    pages: [bool; WRITE_PAGES],
}

impl Pinning {
    /// Looks at no more than [`WRITE_PAGES`] pages, which are about to be copied.
    pub(super) fn begin(residence: &Residence, pages: &Range<usize>) -> Self {
        let mut pinning = Self { first: pages.start, pages: [false; WRITE_PAGES] };
        let mut frames = residence.pool().lock();
        let Some(member) = residence.member() else { return pinning };
        for pinned in frames.pins.of_program(member) {
            let (start, end) = (pinned.start.max(pages.start), pinned.end.min(pages.end));
            (start..end).for_each(|page| pinning.pages[page - pages.start] = true);
        }
        frames.begin_copy(member, pages.clone());
        pinning
    }

    /// Looks once more, after they were copied. A pin that was made meanwhile may have ended: then all count as pinned.
    pub(super) fn end(&mut self, residence: &Residence) {
        let mut frames = residence.pool().lock();
        if residence.member().is_some_and(|member| frames.end_copy(member)) {
            self.pages.fill(true);
        }
    }

    pub(super) fn has(&self, page: usize) -> bool {
        self.pages[page - self.first]
    }
}
