//! What threads have done to pages, and whether a snapshot fits it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use userfaultfd::snapshot::Removal;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Write,
    Drop,
    /// No event tells of it.
    Silent,
    Unmap,
}

/// What was done to a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) began: u64,
    pub(super) ended: u64,
    pub(super) act: Act,
    /// What the page holds afterwards. `None`: it isn't there any more.
    pub(super) holds: Option<u64>,
}

/// Pages were moved, or weren't there any more.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) began: u64,
    pub(super) ended: u64,
    pub(super) pages: Range<usize>,
}

/// Whether something happened while something else did.
fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.1 && one.1 > other.0
}

impl Operation {
    fn overlaps(&self, time: (u64, u64)) -> bool {
        overlap((self.began, self.ended), time)
    }
}

/// What a snapshot holds: the first word of each page, `None` where it is gone.
pub(super) type Held = BTreeMap<usize, Option<u64>>;

#[derive(Debug)]
pub(super) struct Taken {
    /// Before and after it began.
    pub(super) began: (u64, u64),
    pub(super) ended: u64,
    /// When the one before had ended, well or not.
    pub(super) previous: u64,
    /// It is of a series, which follows pages that have moved before it began.
    pub(super) follows: bool,
    pub(super) held: Held,
    /// Pages that came with an earlier member of the series.
    pub(super) earlier: BTreeSet<usize>,
}

/// What all workers have done.
#[derive(Default)]
pub(super) struct Log {
    pub(super) pages: BTreeMap<usize, Vec<Operation>>,
    pub(super) changes: Vec<Change>,
}

impl Log {
    /// When a page held what a snapshot has of it: between two times, as far as that can be told.
    fn when(&self, taken: &Taken, removal: Removal, page: usize) -> Result<Option<(u64, u64)>, String> {
        let operations = &self.pages[&page][..];
        let Taken { began: (before, after), ended, ref held, .. } = *taken;
        let during: Vec<_> =
            operations.iter().filter(|operation| operation.overlaps((before, ended))).collect();
        // A snapshot that isn't of a series is of addresses, whatever lies there when it begins.
        let other = |change: &Change| !taken.follows && change.began < after && change.pages.contains(&page);
        if self.changes.iter().any(other) {
            return Ok(None);
        }
        let Some(word) = held[&page] else {
            let fine = during.iter().any(|operation| match operation.act {
                Act::Write => false,
                Act::Silent | Act::Unmap => true,
                // By a call that was under way while it began, or while the layout changed.
                Act::Drop => {
                    operation.overlaps((before, after))
                        || self.changes.iter().any(|change| operation.overlaps((change.began, change.ended)))
                }
            });
            let unmapped = |operation: &Operation| operation.act == Act::Unmap && operation.began < ended;
            let fine = fine || operations.iter().any(unmapped);
            return if fine { Ok(None) } else { Err(self.tell(taken, page)) };
        };
        if word == 0 && removal == Removal::Zero && during.iter().any(|operation| operation.act == Act::Drop)
        {
            return Ok(None);
        }
        let spans = operations.iter().enumerate().filter(|(_, operation)| operation.holds == Some(word));
        let spans = spans.map(|(index, operation)| {
            (operation.began, operations.get(index + 1).map_or(u64::MAX, |next| next.ended))
        });
        let spans: Vec<_> = spans.filter(|(start, end)| *start < after && *end > before).collect();
        let start = spans.iter().map(|(start, _)| *start).min();
        let end = spans.iter().map(|(_, end)| *end).max();
        start.zip(end).map(Some).ok_or_else(|| self.tell(taken, page))
    }

    fn tell(&self, taken: &Taken, page: usize) -> String {
        let Taken { began: (before, after), ended, previous, held, earlier, .. } = taken;
        let near = |operation: &&Operation| operation.ended + 400 > *before && operation.began < ended + 100;
        let near: Vec<_> = self.pages[&page].iter().filter(near).collect();
        let changes = |change: &&Change| change.ended + 400 > *before && change.began < *ended;
        let changes: Vec<_> = self.changes.iter().filter(changes).collect();
        let held = held[&page];
        let came = if earlier.contains(&page) { "from an earlier one" } else { "delivered with it" };
        format!(
            "page {page} has {held:?}, {came}, in the snapshot of {before}..{after}, at work until {ended}, after one until \
             {previous}: {near:?}, the layout changed {changes:?}"
        )
    }

    /// Whether there is a moment at which all was as a snapshot has it.
    pub(super) fn check(&self, taken: &Taken, removal: Removal) -> Result<(), String> {
        let (mut latest, mut earliest) = ((taken.began.0, None), (taken.began.1, None));
        for page in taken.held.keys() {
            let Some((start, end)) = self.when(taken, removal, *page)? else { continue };
            if start > latest.0 {
                latest = (start, Some(page));
            }
            if end < earliest.0 {
                earliest = (end, Some(page));
            }
        }
        if latest.0 < earliest.0 {
            return Ok(());
        }
        let tell = |page: Option<&usize>| page.map(|page| self.tell(taken, *page));
        Err(format!("no moment: {latest:?} {:?}; {earliest:?} {:?}", tell(latest.1), tell(earliest.1)))
    }
}
