//! Named points in the life of a fault, at which a test can stop the pager and let the other side act.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature has points of its own")
)]

/// Where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// A fault was read, and its page claimed.
    AfterRead,
    /// An asynchronous source has started a load, which it may have answered, and which isn't marked as under way yet. Only
    /// in the life of faults on such memory.
    AfterStart,
    /// The content is there, and the kernel is about to be asked.
    BeforeFill,
    /// The content is in the page cache, and the kernel is about to be asked to map it.
    BeforeMap,
    /// The kernel has filled what it would, which isn't noted yet; the threads that it knew to wait are awake.
    AfterFill,
    /// Other threads are about to be woken, whose fault another fill has answered.
    BeforeWake,
    /// Events were read into a journal, and none of them is applied. The address is their number. Not in the life of a fault.
    AfterKept,
    /// They are applied, and about to be cleared in the journal. Likewise.
    BeforeClear,
    /// The child of a fork is about to be served. Not in the life of a fault.
    BeforeAdopt,
    /// A SIGBUS that isn't about a missing page is about to be passed on. Likewise.
    BeforeForeign,
    /// A region is registered for protection, and about to be lent to a tracker. Likewise.
    BeforeLend,
    /// A worker was added, or couldn't be: the address is 1 or 0. Not in the life of a fault.
    AfterAdd,
    /// Not in the life of a fault either.
    Watch(Moment),
    /// In the life of a page that a budget may evict.
    Evict(Departure),
}

/// Where a snapshot or a tracker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// A snapshot begins, and is about to look what has lost its protection.
    Look,
    /// Memory is about to be protected.
    Protect,
    /// All is about to be looked at, to see whether a change of the layout is unread. The address is the first one of the
    /// memory.
    Trust,
    /// Unread faults were counted, and something may be read. The address is the first one of the memory.
    Counted,
    /// Pages are about to be read.
    Read,
    /// Pages were read, and are kept.
    Kept,
    /// A tracker is about to look for accesses, perhaps to reset them.
    TrackerStep,
}

/// How far a page has got on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Departure {
    /// The fault of its first write was read, and the page is claimed.
    FirstWrite,
    /// It is claimed, and about to be brought to the staging area.
    BeforeLeave,
    /// It is protected, and about to be copied there, where it can't be moved.
    BeforeCopyOut,
    /// It rests there, is claimed again, and about to be written to the spill file.
    BeforeWriteBack,
    /// It is claimed, and about to be copied for its store.
    BeforeClean,
    /// It was copied, its claim has ended, and the store is about to be written.
    BeforeStore,
    /// The store was written, or has failed, which isn't noted yet.
    AfterStore,
    /// The store is about to be synced. The address is the first one of the memory.
    BeforeSync,
    /// It is in the staging area, or has been dropped from there, and its claim is about to end.
    AfterLeave,
    /// It was filled without being needed yet, and its claim has ended; that isn't counted yet.
    AfterPrefetch,
}

/// The pager is at a point, with the page at an address. Nothing outside of tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn reach(_point: Point, _address: usize) {}

#[cfg(test)]
pub(crate) use tests::reach;

#[cfg(test)]
pub(crate) mod tests {
    use std::ops::Range;
    use std::sync::atomic::Ordering;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::Point;
    use crate::sync::AtomicU64;

    /// What is done at a point.
    type Action = Arc<dyn Fn(usize) + Send + Sync>;

    /// A number, where, for which addresses, and what.
    type Entry = (u64, Point, Range<usize>, Action);

    /// The newest first: an older one may be about memory that has gone, and whose addresses are another test's.
    static ACTIONS: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

    static ARMED: AtomicU64 = AtomicU64::new(0);

    pub(crate) fn reach(point: Point, address: usize) {
        let actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
        let action = actions.iter().find(|(_, p, range, _)| *p == point && range.contains(&address));
        let action = action.map(|(.., action)| Arc::clone(action));
        drop(actions);
        if let Some(action) = action {
            action(address);
        }
    }

    /// Has something done whenever the pager is at a point with a page in a range, until the guard is dropped.
    pub(crate) fn at(
        point: Point,
        range: Range<usize>,
        action: impl Fn(usize) + Send + Sync + 'static,
    ) -> Armed {
        let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
        let number = ARMED.fetch_add(1, Ordering::Relaxed);
        actions.insert(0, (number, point, range, Arc::new(action)));
        Armed(number)
    }

    #[derive(Debug)]
    pub(crate) struct Armed(u64);

    impl Drop for Armed {
        fn drop(&mut self) {
            let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
            actions.retain(|(number, ..)| *number != self.0);
        }
    }
}
