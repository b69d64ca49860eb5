//! All regions that were added and not freed yet, so that none ends with a thread that serves faults: to free its source
//! is the program's code. And what is left to be known of those that were.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::lock_order::{RankedMutex, lock, rank};
use crate::pager::memory::served::ServedRegion;

#[derive(Debug, Default)]
pub(crate) struct Regions {
    kept: RankedMutex<Kept, { rank::STORE }>,
    /// How many were ever numbered.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Kept {
    all: Vec<Arc<ServedRegion>>,
    /// Pages of those that were freed.
    freed: PageCounts,
}

/// Pages that are there, and pages that are missing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageCounts {
    pub(crate) present: usize,
    pub(crate) missing: usize,
}

impl PageCounts {
    fn of(region: &ServedRegion) -> Self {
        let (present, poisoned) = region.pages.present_and_poisoned();
        Self { present, missing: region.pages.count() - present - poisoned }
    }

    fn plus(self, other: Self) -> Self {
        Self { present: self.present + other.present, missing: self.missing + other.missing }
    }
}

impl Regions {
    pub(crate) fn new_id(&self) -> u64 {
        // Relaxed: a number that no other region has is all that is asked for.
        self.count.fetch_add(1, Ordering::Relaxed) as u64
    }

    /// Keeps a region until nothing else refers to it.
    pub(crate) fn keep(&self, region: &Arc<ServedRegion>) {
        lock(&self.kept).all.push(Arc::clone(region));
    }

    /// The regions of shared memory whose pages a budget counts.
    pub(crate) fn limited(&self) -> Vec<Arc<ServedRegion>> {
        let is_limited = |region: &&Arc<ServedRegion>| {
            region.residence.as_ref().is_some_and(|residence| residence.is_limiting())
        };
        lock(&self.kept).all.iter().filter(is_limited).cloned().collect()
    }

    /// Keeps a region no longer, which was never served.
    pub(crate) fn keep_not(&self, region: &Arc<ServedRegion>) {
        lock(&self.kept).all.retain(|kept| !Arc::ptr_eq(kept, region));
    }

    /// Takes the regions that nothing else refers to any more. Returns them, and whether there are others that aren't among
    /// those that are served.
    pub(crate) fn take_unused(&self, served: &HashSet<u64>) -> (Vec<Arc<ServedRegion>>, bool) {
        let mut unused = Vec::new();
        let mut kept = lock(&self.kept);
        let Kept { all, freed } = &mut *kept;
        all.retain(|region| {
            // Nothing makes another reference but by one that there is.
            let is_last = Arc::strong_count(region) == 1;
            if is_last {
                if !region.is_childs {
                    *freed = freed.plus(PageCounts::of(region));
                }
                unused.push(Arc::clone(region));
            }
            !is_last
        });
        let left = all.iter().any(|region| !served.contains(&region.id));
        (unused, left)
    }

    /// The pages of all regions, with those that were freed.
    pub(crate) fn page_counts(&self) -> PageCounts {
        let kept = lock(&self.kept);
        kept.all.iter().map(|region| PageCounts::of(region)).fold(kept.freed, PageCounts::plus)
    }
}
