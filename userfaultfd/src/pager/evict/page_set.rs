//! Pages, kept as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of pages.
#[derive(Debug, Default)]
pub(super) struct PageSet(BTreeMap<usize, usize>);

impl PageSet {
    /// Puts pages in.
    pub(super) fn insert(&mut self, pages: Range<usize>) {
        if pages.is_empty() {
            return;
        }
        let mut merged = pages;
        // Those that touch it: the last that begins before its end, again and again.
        while let Some((&start, &end)) = self.0.range(..=merged.end).next_back() {
            if end < merged.start {
                break;
            }
            merged = merged.start.min(start)..merged.end.max(end);
            self.0.remove(&start);
        }
        self.0.insert(merged.start, merged.end);
    }

    /// Takes pages out.
    pub(super) fn remove(&mut self, pages: &Range<usize>) {
        if pages.is_empty() {
            return;
        }
        while let Some((&start, &end)) = self.0.range(..pages.end).next_back() {
            if end <= pages.start {
                break;
            }
            self.0.remove(&start);
            if end > pages.end {
                self.0.insert(pages.end, end);
            }
            if start < pages.start {
                self.0.insert(start, pages.start);
                break;
            }
        }
    }

    pub(super) fn contains(&self, page: usize) -> bool {
        self.0.range(..=page).next_back().is_some_and(|(_, end)| page < *end)
    }

    /// The ranges, in order, each as long as can be.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<'_> {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    pub(super) fn range_count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Pages in order, as ranges.
pub(super) fn ranges_of(pages: &[usize]) -> impl Iterator<Item = Range<usize>> + use<'_> {
    let mut rest = pages;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let len = rest.iter().enumerate().take_while(|(at, page)| **page == first + at).count();
        rest = &rest[len..];
        Some(first..first + len)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_has_what_was_put_in_and_not_taken_out() {
        crate::support::require!();
        const PAGES: usize = 40;
        let (mut set, mut model, mut random) =
            (PageSet::default(), [false; PAGES], 88_172_645_463_325_252_u64);
        for step in 0..20_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let start = (random >> 20) as usize % PAGES;
            let end = start + (random >> 40) as usize % (PAGES - start).min(9);
            let inserts = random & 1 == 0;
            if inserts {
                set.insert(start..end);
            } else {
                set.remove(&(start..end));
            }
            model[start..end].fill(inserts);
            let expected: Vec<_> = (0..PAGES).filter(|page| model[*page]).collect();
            let ranges: Vec<_> = ranges_of(&expected).collect();
            assert!(set.ranges().eq(ranges.iter().cloned()), "step {step}: {set:?}");
            assert!((0..PAGES).all(|page| set.contains(page) == model[page]), "step {step}");
            assert_eq!((set.is_empty(), set.range_count()), (ranges.is_empty(), ranges.len()));
        }
    }
}
