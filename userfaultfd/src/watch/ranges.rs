//! The tracked ranges, ordered by address.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::lock_order::{self, LockGuard, RankedMutex, rank};
use crate::sync::AtomicU64;
use crate::{Error, Result};

/// A tracked range with pages of one size.
#[derive(Clone, Debug)]
pub(crate) struct Tracked {
    pub(crate) range: Range<usize>,
    /// Size of a page in bytes: of a huge page on hugetlb memory.
    pub(crate) page: usize,
    /// The pages that faults have reported, where the page table doesn't say.
    pub(crate) noted: Option<Arc<DirtyBits>>,
    /// Counts as written, whatever the kernel reports.
    pub(crate) always: bool,
    /// Empty pages are protected, too. Where they aren't, a present page that isn't protected was written.
    pub(crate) armed: bool,
    /// It was unmapped, and what was mapped there since is another watch's.
    pub(crate) lost: bool,
}

/// One bit for each page: whether it was written.
#[derive(Debug)]
pub(crate) struct DirtyBits {
    lock: RankedMutex<(), { rank::BITS }>,
    start: usize,
    page: usize,
    words: Box<[AtomicU64]>,
}

impl DirtyBits {
    pub(crate) fn new(range: &Range<usize>, page: usize) -> Self {
        let words = (range.len() / page).div_ceil(64);
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { lock: RankedMutex::default(), start: range.start, page, words }
    }

    /// A thread that changes a bit and the protection of its page holds this lock for both: if a reset came between the
    /// bit and the lifted protection, the write would be lost.
    pub(crate) fn lock(&self) -> LockGuard<'_, ()> {
        lock_order::lock(&self.lock)
    }

    fn place(&self, address: usize) -> (&AtomicU64, u64) {
        let index = (address - self.start) / self.page;
        (&self.words[index / 64], 1 << (index % 64))
    }

    pub(crate) fn set(&self, address: usize) {
        let (word, bit) = self.place(address);
        word.fetch_or(bit, Ordering::SeqCst);
    }

    pub(crate) fn get(&self, address: usize) -> bool {
        let (word, bit) = self.place(address);
        word.load(Ordering::SeqCst) & bit != 0
    }

    pub(crate) fn unset(&self, address: usize) {
        let (word, bit) = self.place(address);
        word.fetch_and(!bit, Ordering::SeqCst);
    }
}

/// Whether two ranges overlap.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Whether `range` overlaps one of `all`.
pub(crate) fn overlaps(all: &[Tracked], range: &Range<usize>) -> bool {
    !range.is_empty() && all.iter().any(|tracked| overlap(&tracked.range, range))
}

/// `all` and `more`, ordered.
pub(crate) fn with(all: &[Tracked], more: Vec<Tracked>) -> Vec<Tracked> {
    let mut joined = [all, &more].concat();
    joined.sort_by_key(|tracked| tracked.range.start);
    joined
}

/// `all` without the parts in `range`.
pub(crate) fn without(all: &[Tracked], range: &Range<usize>) -> Vec<Tracked> {
    let mut left = Vec::with_capacity(all.len() + 1);
    for tracked in all {
        let Range { start, end } = tracked.range.clone();
        let before = start..end.min(range.start);
        let behind = start.max(range.end)..end;
        let parts = if overlap(&tracked.range, range) { [before, behind] } else { [start..end, end..end] };
        left.extend(
            parts
                .into_iter()
                .filter(|part| !part.is_empty())
                .map(|range| Tracked { range, ..tracked.clone() }),
        );
    }
    left
}

/// `all`, cut at the ends of `range`, with the parts in it changed by `change`.
pub(crate) fn changed(all: &[Tracked], range: &Range<usize>, change: impl Fn(&mut Tracked)) -> Vec<Tracked> {
    let mut inside = within(all, range);
    inside.iter_mut().for_each(change);
    with(&without(all, range), inside)
}

/// `all`, with the pages of which a part lies in `range` marked as lost.
pub(crate) fn lose(all: &[Tracked], range: &Range<usize>) -> Vec<Tracked> {
    let (mut left, mut lost) = (all.to_vec(), within(all, range));
    for tracked in &mut lost {
        left = without(&left, &tracked.range);
        tracked.lost = true;
    }
    with(&left, lost)
}

/// The parts of `all` that lie in `range`, in whole pages.
pub(crate) fn within(all: &[Tracked], range: &Range<usize>) -> Vec<Tracked> {
    let cut = |tracked: &Tracked| {
        let up = |address: usize| address.checked_next_multiple_of(tracked.page).unwrap_or(usize::MAX);
        let start = tracked.range.start.max(range.start / tracked.page * tracked.page);
        let end = tracked.range.end.min(up(range.end));
        (start < end && overlap(&tracked.range, range))
            .then(|| Tracked { range: start..end, ..tracked.clone() })
    };
    all.iter().filter_map(cut).collect()
}

/// The first part of `range` that isn't in any of some parts, which are ordered by their addresses.
pub(crate) fn first_gap(parts: &[Tracked], range: &Range<usize>) -> Option<Range<usize>> {
    let mut from = range.start;
    for Tracked { range: part, .. } in parts {
        if part.start > from {
            return Some(from..part.start.min(range.end));
        }
        from = from.max(part.end);
    }
    (from < range.end).then_some(from..range.end)
}

/// Fails if a bound of `range` lies inside a page.
pub(crate) fn check_bounds(all: &[Tracked], range: &Range<usize>) -> Result<()> {
    for address in [range.start, range.end] {
        let inside = |tracked: &&Tracked| tracked.range.contains(&address) && address % tracked.page != 0;
        if let Some(Tracked { page, .. }) = all.iter().find(inside) {
            return Err(Error::InsidePage { address, page_size: *page });
        }
    }
    Ok(())
}

/// The range that has an address.
pub(crate) fn at(all: &[Tracked], address: usize) -> Option<&Tracked> {
    let next = all.partition_point(|tracked| tracked.range.start <= address);
    all[..next].last().filter(|tracked| tracked.range.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ranges: &[Range<usize>]) -> Vec<Tracked> {
        ranges
            .iter()
            .map(|range| Tracked {
                range: range.clone(),
                page: 4,
                noted: None,
                always: false,
                armed: true,
                lost: false,
            })
            .collect()
    }

    fn ranges(all: &[Tracked]) -> Vec<Range<usize>> {
        all.iter().map(|tracked| tracked.range.clone()).collect()
    }

    #[test]
    fn ranges_stay_in_order_and_are_cut() {
        crate::support::require!();
        let all = with(&of(&[16..20, 32..64]), vec![of(&[8..16, 64..72]).remove(0)]);
        assert_eq!(ranges(&all), [8..16, 16..20, 32..64]);
        for (range, expected) in
            [(0..8, false), (20..32, false), (0..9, true), (60..99, true), (24..24, false), (40..40, false)]
        {
            assert_eq!(overlaps(&all, &range), expected, "{range:?}");
        }
        assert_eq!(ranges(&without(&all, &(12..40))), [8..12, 40..64]);
        assert_eq!(ranges(&without(&all, &(40..44))), [8..16, 16..20, 32..40, 44..64]);
        assert_eq!(ranges(&without(&all, &(20..32))), ranges(&all));
        assert!(without(&all, &(0..64)).is_empty());
        assert_eq!(ranges(&within(&all, &(13..34))), [12..16, 16..20, 32..36]);
        assert!(within(&all, &(20..32)).is_empty());
        assert_eq!(ranges(&within(&all, &(0..usize::MAX))), ranges(&all));
        for (address, start) in
            [(7, None), (8, Some(8)), (15, Some(8)), (16, Some(16)), (20, None), (64, None)]
        {
            assert_eq!(at(&all, address).map(|tracked| tracked.range.start), start, "{address}");
        }
    }

    #[test]
    fn whole_pages_are_lost() {
        crate::support::require!();
        let mut all = of(&[8..16, 32..64]);
        all[1].page = 16;
        let lost = lose(&all, &(12..33));
        assert_eq!(ranges(&lost), [8..12, 12..16, 32..48, 48..64]);
        assert_eq!(lost.iter().map(|tracked| tracked.lost).collect::<Vec<_>>(), [false, true, true, false]);
        assert_eq!(ranges(&lose(&all, &(16..32))), [8..16, 32..64]);
        assert!(lose(&all, &(0..99)).iter().all(|tracked| tracked.lost));
    }

    #[test]
    fn notes_are_of_a_page() {
        crate::support::require!();
        let notes = DirtyBits::new(&(4096..4096 + 4 * 130), 4);
        for address in [4096, 4096 + 4 * 64, 4096 + 4 * 129] {
            assert!(!notes.get(address));
            notes.set(address);
            assert!(notes.get(address) && notes.get(address + 3));
            assert!(!notes.get(address ^ 4));
            notes.unset(address);
            assert!(!notes.get(address));
        }
    }
}
