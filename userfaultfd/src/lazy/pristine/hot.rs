//! Which pages are written again and again.

use std::ops::Range;

/// Resets after which a page that is written again and again is protected once, to see whether it still is.
const RESETS_PER_CHECK: usize = 8;

/// Pages whose checks fall into the same reset.
const PAGES_PER_CHECK: usize = 64;

/// The pages that were written before the last reset, and before the one that runs.
#[derive(Debug)]
pub(super) struct HotPages {
    /// One bit for each page.
    last: Box<[u64]>,
    current: Box<[u64]>,
    resets: usize,
}

impl HotPages {
    pub(super) fn new(pages: usize) -> Self {
        let words = || vec![0; pages.div_ceil(64)].into();
        Self { last: words(), current: words(), resets: 0 }
    }

    /// Begins a reset.
    pub(super) fn begin(&mut self) {
        std::mem::swap(&mut self.last, &mut self.current);
        self.current.fill(0);
        self.resets = self.resets.wrapping_add(1);
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.last.fill(0);
        self.current.fill(0);
    }

    /// Notes that pages were written, and passes those on that must be protected: all but those that were written before
    /// the last reset, too, and aren't checked in this one.
    pub(super) fn note(&mut self, pages: Range<usize>, mut protect: impl FnMut(Range<usize>)) {
        let mut start = pages.start;
        for page in pages.clone() {
            let (word, bit) = (page / 64, 1_u64 << (page % 64));
            let is_checked = (page / PAGES_PER_CHECK + self.resets) % RESETS_PER_CHECK == 0;
            self.current[word] |= bit;
            if self.last[word] & bit != 0 && !is_checked {
                if start < page {
                    protect(start..page);
                }
                start = page + 1;
            }
        }
        if start < pages.end {
            protect(start..pages.end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reset(hot: &mut HotPages, pages: &[usize]) -> Vec<usize> {
        hot.begin();
        let mut protected = Vec::new();
        pages.iter().for_each(|page| hot.note(*page..page + 1, |pages| protected.extend(pages)));
        protected
    }

    #[test]
    fn page_written_twice_in_a_row_stays_unprotected_until_it_is_checked() {
        crate::support::require!();
        let mut hot = HotPages::new(200);
        assert_eq!(reset(&mut hot, &[3, 199]), [3, 199]);
        assert_eq!(reset(&mut hot, &[3, 4]), [4]);
        assert_eq!(reset(&mut hot, &[3, 199]), [199]);
        // Unprotected, it is reported each time, until its check.
        let checks: usize = (0..RESETS_PER_CHECK).map(|_| reset(&mut hot, &[3]).len()).sum();
        assert_eq!(checks, 1);
        assert!(reset(&mut hot, &[]).is_empty());
        assert_eq!(reset(&mut hot, &[3]), [3]);
        hot.clear();
        assert_eq!(reset(&mut hot, &[3]), [3]);
    }

    #[test]
    fn protected_pages_are_passed_on_as_ranges() {
        crate::support::require!();
        let mut hot = HotPages::new(64);
        reset(&mut hot, &[10, 11, 20]);
        hot.begin();
        let mut protected = Vec::new();
        hot.note(8..24, |pages| protected.push(pages));
        assert_eq!(protected, [8..10, 12..20, 21..24]);
    }
}
