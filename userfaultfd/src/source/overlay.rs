//! Some bytes patched over another source.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Bound;

use super::{PageData, PageSource, SourceBytes, invalid};

/// Any source with some bytes replaced, without a copy of it: the generation id of a VM, its entropy, a mailbox with
/// its network address, a configuration.
///
/// ```
/// use userfaultfd::pager::{BytesSource, OverlaySource, PageSource};
///
/// let image = BytesSource::new(vec![b'.'; 100]);
/// let mut clone = OverlaySource::new(image);
/// clone.patch(10, b"clone number 7")?;
/// clone.patch(23, b"8")?;
///
/// let mut page = [0; 30];
/// clone.read(0, &mut page)?;
/// assert_eq!(&page, b"..........clone number 8......");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// The source below is read in the same whole pages as without patches, or not at all where patches replace all that
/// is read. A read takes one search, allocates nothing, and takes no lock.
#[derive(Clone)]
pub struct OverlaySource<S> {
    base: S,
    /// By their offsets. None is empty, or touches another.
    patches: BTreeMap<u64, Vec<u8>>,
}

impl<S: PageSource> OverlaySource<S> {
    /// Returns a source without patches.
    #[must_use]
    pub fn new(base: S) -> Self {
        Self { base, patches: BTreeMap::new() }
    }

    /// Replaces the bytes from `offset` on, also those of earlier patches.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the source ends before the patch does.
    pub fn patch(&mut self, offset: u64, bytes: impl AsRef<[u8]>) -> io::Result<&mut Self> {
        let bytes = bytes.as_ref();
        let end = offset.checked_add(bytes.len() as u64);
        let len = self.base.len().unwrap_or(u64::MAX);
        let Some(end) = end.filter(|end| *end <= len) else {
            return Err(invalid(format!("{} bytes to patch at offset {offset} of {len} bytes", bytes.len())));
        };
        if bytes.is_empty() {
            return Ok(self);
        }
        let (mut start, mut patch) = (offset, bytes.to_vec());
        // One with those that it touches.
        while let Some((at, touched)) =
            self.last_until(end).filter(|(at, touched)| *at + touched.len() as u64 >= start)
        {
            let touched_end = at + touched.len() as u64;
            if touched_end > start + patch.len() as u64 {
                patch.extend_from_slice(&touched[(start + patch.len() as u64 - at) as usize..]);
            }
            if at < start {
                let before = &touched[..(start - at) as usize];
                patch.splice(0..0, before.iter().copied());
                start = at;
            }
            self.patches.remove(&at);
        }
        self.patches.insert(start, patch);
        Ok(self)
    }

    /// Returns the source below.
    #[must_use]
    pub fn base(&self) -> &S {
        &self.base
    }

    /// The last patch that begins at `offset` or before.
    fn last_until(&self, offset: u64) -> Option<(u64, &Vec<u8>)> {
        self.patches.range(..=offset).next_back().map(|(at, patch)| (*at, patch))
    }

    /// The patch that has a byte, and where in it.
    fn patch_at(&self, offset: u64) -> Option<(&[u8], usize)> {
        let (at, patch) = self.last_until(offset)?;
        let into = usize::try_from(offset - at).ok().filter(|into| *into < patch.len())?;
        Some((patch, into))
    }

    /// Where the first patch behind `offset` begins.
    fn next_patch(&self, offset: u64) -> Option<(u64, &Vec<u8>)> {
        let mut behind = self.patches.range((Bound::Excluded(offset), Bound::Unbounded));
        behind.next().map(|(at, patch)| (*at, patch))
    }

    fn read_by(
        &self,
        offset: u64,
        page: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> io::Result<PageData>,
    ) -> io::Result<PageData> {
        let first = self.patch_at(offset).map(|(patch, into)| &patch[into..]);
        if let Some(patch) = first.filter(|patch| patch.len() >= page.len()) {
            page.copy_from_slice(&patch[..page.len()]);
            return Ok(PageData::Data);
        }
        let end = offset.saturating_add(page.len() as u64);
        let mut next = self.next_patch(offset).filter(|(at, _)| *at < end);
        let data = read(page)?;
        if first.is_none() && next.is_none() {
            return Ok(data);
        }
        if data == PageData::Zero {
            page.fill(0);
        }
        if let Some(patch) = first {
            page[..patch.len()].copy_from_slice(patch);
        }
        while let Some((at, patch)) = next {
            let into = (at - offset) as usize;
            let len = patch.len().min(page.len() - into);
            page[into..into + len].copy_from_slice(&patch[..len]);
            next = self.next_patch(at).filter(|(at, _)| *at < end);
        }
        Ok(PageData::Data)
    }
}

impl<S: PageSource> PageSource for OverlaySource<S> {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_by(offset, page, |page| self.base.read(offset, page))
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_by(offset, page, |page| self.base.read_early(offset, page))
    }

    fn len(&self) -> Option<u64> {
        self.base.len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        if self.patch_at(offset).is_some() {
            return 0;
        }
        let zeros = self.base.zeros(offset);
        self.next_patch(offset).map_or(zeros, |(at, _)| zeros.min(at - offset))
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        if let Some((patch, into)) = self.patch_at(offset) {
            return patch[into..].get(..len).map(SourceBytes::from);
        }
        let end = offset.checked_add(len as u64)?;
        if self.next_patch(offset).is_some_and(|(at, _)| at < end) {
            return None;
        }
        self.base.bytes(offset, len)
    }
}

impl<S: fmt::Debug> fmt::Debug for OverlaySource<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let patches = self.patches.iter().map(|(at, patch)| *at..*at + patch.len() as u64);
        let patches: Vec<_> = patches.collect();
        f.debug_struct("OverlaySource").field("base", &self.base).field("patches", &patches).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::source::model::{Random, byte, check, check_all, random_range};
    use crate::source::{BytesSource, ZeroSource};
    use crate::support::require;

    /// Patches anywhere, over each other, against an array that each was written to.
    #[test]
    fn random_patches_show_what_was_written_last() {
        require!();
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let len = 1 + random.below(3000);
            let mut expected: Vec<u8> = (0..len).map(|at| byte(0, at)).collect();
            let zeros = random_range(&mut random, len, 64);
            expected[zeros].fill(0);
            let mut source = OverlaySource::new(BytesSource::new(expected.clone()));
            for patch in 1..=random.below(30) {
                let range = random_range(&mut random, len, 64);
                let range = range.start..range.end.min(range.start + 200);
                let bytes: Vec<u8> = range.clone().map(|at| byte(patch, at)).collect();
                expected[range.clone()].copy_from_slice(&bytes);
                source.patch(range.start as u64, bytes).unwrap();
            }
            println!("seed {seed}: {source:?}");
            let ranges: Vec<_> =
                source.patches.iter().map(|(at, patch)| (*at, *at + patch.len() as u64)).collect();
            assert!(ranges.windows(2).all(|two| two[0].1 < two[1].0), "{ranges:?}");
            check_all(&source, &expected, &mut random, 64);
        }
    }

    #[test]
    fn source_below_is_read_in_whole_pages_or_not_at_all() {
        require!();
        let reads = AtomicUsize::new(0);
        let base = |offset: u64, page: &mut [u8]| {
            assert_eq!((offset % 100, page.len()), (0, 100));
            reads.fetch_add(1, Ordering::Relaxed);
            page.fill(7);
            Ok(PageData::Data)
        };
        let mut source = OverlaySource::new(base);
        source.patch(150, [1; 10]).unwrap().patch(199, [2; 102]).unwrap();
        let mut page = [0; 100];
        for (offset, expected, asked) in [
            (0, vec![(7, 100)], 1),
            (100, vec![(7, 50), (1, 10), (7, 39), (2, 1)], 2),
            (200, vec![(2, 100)], 2),
            (300, vec![(2, 1), (7, 99)], 3),
            (1_000_000_000_000, vec![(7, 100)], 4),
        ] {
            assert_eq!(source.read(offset, &mut page).unwrap(), PageData::Data);
            let expected: Vec<u8> =
                expected.into_iter().flat_map(|(byte, count)| vec![byte; count]).collect();
            assert_eq!((&page[..], reads.load(Ordering::Relaxed)), (&expected[..], asked), "{offset}");
        }
        assert_eq!((source.len(), source.zeros(0)), (None, 0));
    }

    #[test]
    fn zeros_end_where_a_patch_begins() {
        require!();
        let mut source = OverlaySource::new(ZeroSource);
        source.patch(100, "patch").unwrap();
        let zeros = [0, 99, 100, 104, 105].map(|offset| source.zeros(offset));
        assert_eq!(zeros, [100, 1, 0, 0, u64::MAX]);
        let mut page = [0xee; 16];
        assert_eq!(source.read(0, &mut page).unwrap(), PageData::Zero);
        assert_eq!(page, [0xee; 16]);
        assert_eq!(source.read(96, &mut page).unwrap(), PageData::Data);
        assert_eq!(&page, b"\0\0\0\0patch\0\0\0\0\0\0\0");
    }

    #[test]
    fn an_error_below_is_one_only_where_it_is_needed() {
        require!();
        let fails = |_: u64, _: &mut [u8]| -> io::Result<PageData> { Err(io::Error::other("lost")) };
        let mut source = OverlaySource::new(fails);
        source.patch(16, [3; 16]).unwrap();
        let mut page = [0; 16];
        source.read(16, &mut page).unwrap();
        assert_eq!(page, [3; 16]);
        assert_eq!(source.read(17, &mut page).unwrap_err().to_string(), "lost");
    }

    #[test]
    fn patches_beyond_the_end_are_refused() {
        require!();
        let mut source = OverlaySource::new(BytesSource::new([1; 100]));
        for (offset, len) in [(99, 2), (100, 1), (u64::MAX, 1), (0, 101)] {
            let error = source.patch(offset, vec![0; len]).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert_eq!(error.to_string(), format!("{len} bytes to patch at offset {offset} of 100 bytes"));
        }
        source.patch(100, []).unwrap().patch(99, [2]).unwrap();
        check(&source, &[[1; 99].as_slice(), &[2]].concat(), 0..100);
        assert_eq!(
            format!("{source:?}"),
            "OverlaySource { base: BytesSource(100 bytes), patches: [99..100] }"
        );
    }
}
