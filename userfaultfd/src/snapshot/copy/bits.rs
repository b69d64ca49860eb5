//! A bit a page.

use std::ops::Range;

#[derive(Clone, Debug, Default)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    pub(crate) fn new(len: usize, value: bool) -> Self {
        let mut bits = Self { words: vec![0; len.div_ceil(64)], len };
        if value {
            bits.set(0..len, true);
        }
        bits
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn get(&self, at: usize) -> bool {
        self.words[at / 64] >> (at % 64) & 1 == 1
    }

    pub(crate) fn set(&mut self, range: Range<usize>, value: bool) {
        let mut at = range.start;
        while at < range.end {
            let (word, bit) = (at / 64, at % 64);
            let here = (64 - bit).min(range.end - at);
            let mask = (!0 >> (64 - here)) << bit;
            if value {
                self.words[word] |= mask;
            } else {
                self.words[word] &= !mask;
            }
            at += here;
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The first that is set, from `from` on.
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        self.find(from..self.len, |word| word)
    }

    /// The first in a range that is set in what `of` makes of the words.
    fn find(&self, range: Range<usize>, of: impl Fn(u64) -> u64) -> Option<usize> {
        let mut word = range.start / 64;
        let mut bits = of(*self.words.get(word)?) & (!0 << (range.start % 64));
        while bits == 0 && word * 64 < range.end {
            word += 1;
            bits = of(*self.words.get(word)?);
        }
        Some(word * 64 + bits.trailing_zeros() as usize).filter(|found| *found < range.end)
    }

    /// The next run of set bits from `from` on, of at most `limit`.
    pub(crate) fn next_run(&self, from: usize, limit: usize) -> Option<Range<usize>> {
        let start = self.next(from)?;
        let last = self.len.min(start.saturating_add(limit));
        Some(start..self.find(start..last, |word| !word).unwrap_or(last))
    }

    /// Whether all in a range are set.
    pub(crate) fn all(&self, range: Range<usize>) -> bool {
        self.find(range, |word| !word).is_none()
    }

    /// Sets what is set in all of the others.
    pub(crate) fn join_common(&mut self, one: &Bits, other: &Bits) {
        let common = one.words.iter().zip(&other.words).map(|(one, other)| one & other);
        self.words.iter_mut().zip(common).for_each(|(word, common)| *word |= common);
    }

    /// Sets what is set in the other.
    pub(crate) fn join(&mut self, other: &Bits) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_across_words() {
        crate::support::require!();
        let mut bits = Bits::new(200, false);
        assert_eq!((bits.count(), bits.next(0), bits.next_run(7, 9)), (0, None, None));
        bits.set(60..130, true);
        bits.set(199..200, true);
        assert_eq!(bits.count(), 71);
        assert!(!bits.get(59) && bits.get(60) && bits.get(129) && !bits.get(130));
        assert_eq!(bits.next_run(0, 1000), Some(60..130));
        assert_eq!(bits.next_run(64, 10), Some(64..74));
        assert_eq!(bits.next_run(130, 10), Some(199..200));
        assert_eq!(bits.next(200), None);
        assert!(bits.all(60..130) && bits.all(64..128) && !bits.all(59..130) && !bits.all(60..131));
        bits.set(61..128, false);
        assert_eq!(bits.next_run(61, 1000), Some(128..130));
        let mut all = Bits::new(129, true);
        assert_eq!((all.count(), all.next_run(0, 1000)), (129, Some(0..129)));
        all.set(0..129, false);
        all.join(&bits);
        assert_eq!(all.next_run(0, 10), Some(60..61));
        let (mut common, mut other) = (Bits::new(200, false), Bits::new(200, false));
        other.set(129..200, true);
        common.join_common(&bits, &other);
        assert_eq!((common.count(), common.next(0), common.next(130)), (2, Some(129), Some(199)));
    }
}
