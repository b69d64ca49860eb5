//! The loan of memory that a pager fills to a tracker: what both know of each other.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking")),
    allow(dead_code, reason = "without a pager nothing is lent, without a tracker nobody asks")
)]

use std::sync::atomic::{AtomicBool, Ordering};

/// The use of memory that a pager fills, by one tracker at a time. The pager fills pages protected while it is taken.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    taken: AtomicBool,
    ended: AtomicBool,
}

impl Lease {
    /// Whether it was free.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::SeqCst)
    }

    pub(crate) fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Relaxed)
    }

    pub(crate) fn give_back(&self) {
        self.taken.store(false, Ordering::SeqCst);
    }

    /// The memory is about to be unmapped: what is mapped there later isn't the tracker's.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}
