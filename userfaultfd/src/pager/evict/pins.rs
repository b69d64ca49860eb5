//! Pages that mustn't leave memory, since the program has pinned them.
//!
//! A pinned page may be given to system calls and devices, which write to it without a fault from then on. So a page that
//! was pinned at any time while it was copied for its store counts as dirty still when the store has it.

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
    /// How often some were pinned.
    made: u64,
}

impl Pins {
    pub(super) fn new() -> Self {
        Self { all: mapped_vec::none(), pages: 0, made: 0 }
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
        self.made += 1;
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
}

/// Which of some neighbouring pages are pinned, or were since this was made.
pub(super) struct Pinning {
    first: usize,
    pages: [bool; WRITE_PAGES],
    made: u64,
}

impl Pinning {
    /// Looks at no more than [`WRITE_PAGES`] pages.
    pub(super) fn of(residence: &Residence, pages: &Range<usize>) -> Self {
        let mut pinning = Self { first: pages.start, pages: [false; WRITE_PAGES], made: 0 };
        let frames = residence.pool().lock();
        if let Some(member) = residence.member() {
            pinning.made = frames.pins.made;
            pages.clone().for_each(|page| pinning.pages[page - pages.start] = frames.pins.has(member, page));
        }
        pinning
    }

    /// Looks once more. Pins that were made meanwhile may have ended: all pages count as pinned then.
    pub(super) fn update(&mut self, residence: &Residence) {
        let frames = residence.pool().lock();
        if residence.member().is_some() && frames.pins.made != self.made {
            self.pages.fill(true);
        }
    }

    pub(super) fn has(&self, page: usize) -> bool {
        self.pages[page - self.first]
    }
}
