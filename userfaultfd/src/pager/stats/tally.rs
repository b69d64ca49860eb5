//! What is counted for one process that was handed over, by all threads of the pager.

use std::sync::atomic::{AtomicUsize, Ordering};

macro_rules! tally {
    ($($name:ident),*) => {
        /// Counters that any thread adds to. Pages, not bytes, so that a word has room for them on 32-bit machines, too.
        #[derive(Debug, Default)]
        pub(crate) struct Tally {
            $(pub(crate) $name: Tallied,)*
        }

        #[cfg(feature = "handoff")]
        impl Tally {
            /// Adds them to statistics, in pages of a size.
            pub(crate) fn add_to(&self, sum: &mut super::Statistics, page_size: usize) {
                $(sum.$name += self.$name.get() as u64;)*
                let pages = [&self.fills, &self.zero_fills, &self.continues].map(Tallied::get);
                sum.bytes += pages.iter().sum::<usize>() as u64 * page_size as u64;
            }
        }
    };
}

tally!(
    missing_faults,
    minor_faults,
    fills,
    zero_fills,
    continues,
    prefetched,
    source_reads,
    source_errors,
    poisoned
);

/// A counter of one region. Nothing else is read because of it.
#[derive(Debug, Default)]
pub(crate) struct Tallied(AtomicUsize);

impl Tallied {
    pub(crate) fn add(&self, more: usize) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    #[cfg(feature = "handoff")]
    fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}
