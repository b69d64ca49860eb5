//! The parts of this library that hold memory of this process, so that an error can name them.
//!
//! The kernel reports that another userfaultfd has registered a range, but not whose. So each part of this library that
//! registers memory of this process makes an entry here. The entries serve texts of errors alone: one that can't be made
//! or read at once is left out.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

use crate::lock_order::{RankedMutex, lock, rank, try_lock};
use crate::owner::{Owner, PerProcess};
use crate::sync::AtomicU64;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// The part of this library that has registered a range of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Holder {
    /// A [`LazyMemory`](crate::LazyMemory) that isn't filled yet.
    LazyMemory,
    /// A [`Pager`](crate::pager::Pager).
    Pager,
    /// A [`DirtyTracker`](crate::DirtyTracker).
    DirtyTracker,
    /// An [`AccessTracker`](crate::AccessTracker).
    AccessTracker,
    /// A [`Snapshot`](crate::Snapshot) that is being taken, or a [`Series`](crate::snapshot::Series).
    Snapshot,
}

impl fmt::Display for Holder {
    /// The holder's name, and what would work.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LazyMemory => "a LazyMemory: use its tracker(), snapshot() or series(), or fill() it first",
            Self::Pager => "a Pager: finish or remove the region first",
            Self::DirtyTracker => "a DirtyTracker: untrack the range, or drop the tracker first",
            Self::AccessTracker => "an AccessTracker: untrack the range, or drop the tracker first",
            Self::Snapshot => "a snapshot: wait for it, or drop the Series first",
        })
    }
}

#[derive(Debug)]
struct Entry {
    id: u64,
    holder: Holder,
    range: Range<usize>,
}

/// The entries in the order in which they were made. A forked child drops its parent's.
static ENTRIES: PerProcess<RankedMutex<Vec<Entry>, { rank::HOLDERS }>> = PerProcess::new();

/// Tries to lock the entries: without a wait, since the holder of the lock may itself wait for a fault.
const MAX_READ_TRIES: usize = 10_000;

/// Changes the entries, unless they stay locked.
fn change(mut change: impl FnMut(&mut Vec<Entry>)) {
    let Ok(all) = ENTRIES.get() else { return };
    for _ in 0..MAX_READ_TRIES {
        if let Some(mut entries) = try_lock(all) {
            return change(&mut entries);
        }
        std::thread::yield_now();
    }
}

/// The ranges of one holder. They are forgotten when this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    id: u64,
    owner: Owner,
    holder: Holder,
}

impl Held {
    /// An entry without ranges.
    pub(crate) fn new(owner: Owner, holder: Holder) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), owner, holder }
    }

    /// Replaces the ranges that it holds.
    pub(crate) fn set(&self, ranges: impl IntoIterator<Item = Range<usize>>) {
        let Self { id, holder, .. } = *self;
        let mut new: Vec<Entry> = ranges.into_iter().map(|range| Entry { id, holder, range }).collect();
        change(|entries| {
            entries.retain(|entry| entry.id != id);
            entries.append(&mut new);
        });
    }

    /// Whether another holder has a part of a range. Waits until it can be told.
    pub(crate) fn is_shared(&self, range: &Range<usize>) -> bool {
        let Some(all) = ENTRIES.made() else { return false };
        let entries = lock(all);
        let overlaps = |entry: &Entry| entry.range.start < range.end && range.start < entry.range.end;
        entries.iter().any(|entry| entry.id != self.id && overlaps(entry))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.owner.is_current() {
            change(|entries| entries.retain(|entry| entry.id != self.id));
        }
    }
}

/// The holder of a part of a range, the latest if there are several. `None` if it isn't known. Allocates nothing.
pub(crate) fn of(range: &Range<usize>) -> Option<Holder> {
    let entries = try_lock(ENTRIES.made()?)?;
    let overlaps = |entry: &&Entry| entry.range.start < range.end && range.start < entry.range.end;
    entries.iter().rev().find(overlaps).map(|entry| entry.holder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::require;

    #[test]
    fn latest_holder_is_named_until_it_ends() {
        require!();
        let owner = Owner::current().unwrap();
        // No memory is there.
        let (first, second) = (Held::new(owner, Holder::LazyMemory), Held::new(owner, Holder::Snapshot));
        first.set([100..200, 300..400]);
        assert_eq!(
            (of(&(150..160)), of(&(199..300)), of(&(200..300))),
            (Some(Holder::LazyMemory), Some(Holder::LazyMemory), None)
        );
        second.set(Some(150..160));
        assert_eq!((of(&(0..500)), of(&(160..170))), (Some(Holder::Snapshot), Some(Holder::LazyMemory)));
        first.set(Some(300..310));
        assert_eq!((of(&(160..170)), of(&(305..306))), (None, Some(Holder::LazyMemory)));
        drop(second);
        drop(first);
        assert_eq!(of(&(0..500)), None);
    }
}
