//! Bringing written pages back to what they held.

use std::ops::Range;

use super::{DirtyTracker, Mode};
use crate::proc_maps::Process;
use crate::watch::ranges;
use crate::{Error, Result, page_size};

/// Ranges that are copied back before they are protected again: as many as one scan reports.
const RANGES_PER_BATCH: usize = 512;

/// Pages that a scan walks in the time of one call that protects a range, roughly.
const SCANNED_PAGES_PER_CALL: usize = 128;

impl DirtyTracker {
    /// Copies an image back over the pages that were written since they were tracked or taken, and resets these pages.
    /// Returns the number of bytes that were copied, in whole pages.
    ///
    /// The image has the bytes of all [`tracked`](Self::tracked) ranges, one behind the other. For memory of its own a
    /// program has `Pristine`, which is safe.
    ///
    /// # Errors
    ///
    /// As [`reset_in`](Self::reset_in).
    ///
    /// # Safety
    ///
    /// As [`reset_in`](Self::reset_in), for all tracked memory.
    #[expect(unsafe_code, reason = "writes memory that is the caller's")]
    pub unsafe fn reset(&mut self, image: &[u8]) -> Result<usize> {
        let tracked = self.tracked();
        let len = tracked.iter().map(ExactSizeIterator::len).sum();
        self.check_image(image, len)?;
        let (mut rest, mut copied) = (image, 0);
        for range in tracked {
            let (image, next) = rest.split_at(range.len());
            // SAFETY: as the caller has made sure.
            copied += unsafe { self.reset_in(range, image) }?;
            rest = next;
        }
        Ok(copied)
    }

    /// Copies an image back over the written pages of a range, as [`reset`](Self::reset) does. The image has the bytes of the
    /// range. What isn't tracked there is left alone.
    ///
    /// ```
    /// use userfaultfd::{DirtyTracker, Error, page_size};
    ///
    /// let page = page_size();
    /// let mut memory = memmap2::MmapMut::map_anon(16 * page)?;
    /// memory.fill(1);
    /// let image = memory.to_vec();
    /// let mut tracker = match DirtyTracker::new() {
    ///     Ok(tracker) => tracker,
    ///     Err(Error::UnsupportedFeatures { .. }) => return Ok(()), // an architecture without write protection
    ///     Err(error) => return Err(error.into()),
    /// };
    /// let start = memory.as_ptr().addr();
    /// let all = start..start + memory.len();
    /// tracker.track(all.clone())?;
    /// memory[3 * page] = 2;
    /// // SAFETY: nothing borrows the memory, which can be written; any bytes are valid there.
    /// assert_eq!(unsafe { tracker.reset_in(all, &image) }?, page);
    /// assert!(memory[..] == image);
    /// assert_eq!(tracker.dirty_len()?, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// After an error every page that wasn't reset still counts as written.
    ///
    /// - [`ImageLength`](Error::ImageLength): the image has another length than the range.
    /// - [`InsidePage`](Error::InsidePage): a bound lies inside a page; nothing was changed.
    /// - [`NotOwnMemory`](Error::NotOwnMemory): the memory is another process's.
    /// - Those of [`dirty`](Self::dirty).
    ///
    /// # Safety
    ///
    /// The caller must make sure that, until the call returns,
    ///
    /// - the tracked pages of the range are mapped and can be written.
    /// - nothing borrows a byte of them, and no thread writes to them: such a write would be reset without being copied
    ///   back.
    /// - the image's bytes are valid for whatever is in the memory, and the image isn't in that memory.
    #[expect(unsafe_code, reason = "writes memory that is the caller's")]
    pub unsafe fn reset_in(&mut self, range: Range<usize>, image: &[u8]) -> Result<usize> {
        self.check_image(image, range.len())?;
        ranges::check_bounds(&self.0.watch.ranges(), &range)?;
        let mut copied = 0;
        self.restore(&range, |written, protect| {
            let part = &image[written.start - range.start..written.end - range.start];
            let to = std::ptr::with_exposed_provenance_mut::<u8>(written.start);
            // SAFETY: written pages lie in the range, whole, since its bounds lie in no page; the caller has made sure that
            // they can be written, and that nothing borrows them.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), to, part.len()) };
            copied += part.len();
            protect.push(written);
            Ok(())
        })?;
        Ok(copied)
    }

    fn check_image(&self, image: &[u8], memory: usize) -> Result<()> {
        self.0.watch.check()?;
        if self.0.watch.process != Process::Own {
            return Err(Error::NotOwnMemory);
        }
        if image.len() == memory { Ok(()) } else { Err(Error::ImageLength { image: image.len(), memory }) }
    }

    /// Passes the written ranges of `range` to `copy_back`, some hundred at a time, and then resets those that it has pushed.
    /// All others stay written, unless it is cheaper to reset them, too.
    pub(crate) fn restore(
        &mut self,
        range: &Range<usize>,
        mut copy_back: impl FnMut(Range<usize>, &mut Vec<Range<usize>>) -> Result<()>,
    ) -> Result<()> {
        let mut written = self.dirty_in(range.clone());
        let (mut protect, mut batch) = (Vec::new(), Vec::with_capacity(RANGES_PER_BATCH));
        loop {
            for range in written.by_ref().take(RANGES_PER_BATCH) {
                batch.push(range?);
            }
            let bytes: usize = batch.iter().map(ExactSizeIterator::len).sum();
            for range in batch.drain(..) {
                copy_back(range, &mut protect)?;
            }
            if bytes == 0 {
                return Ok(());
            }
            self.protect_again(&protect, bytes)?;
            protect.clear();
        }
    }

    /// Resets ranges, ordered by address, of a batch with `written` bytes: all of the batch by a scan, or each by a call.
    fn protect_again(&self, protect: &[Range<usize>], written: usize) -> Result<()> {
        let (Some(first), Some(last)) = (protect.first(), protect.last()) else { return Ok(()) };
        let span = first.start..last.end;
        let is_dense = span.len() / page_size() < SCANNED_PAGES_PER_CALL * protect.len();
        let is_most = protect.iter().map(ExactSizeIterator::len).sum::<usize>() >= written / 2;
        if is_most && is_dense {
            return self.0.look(&span, self.eye(), true).try_for_each(|reset| reset.map(drop));
        }
        let watch = &self.0.watch;
        for range in protect {
            match self.0.mode {
                Mode::Sync => self.0.look(range, self.eye(), true).try_for_each(|reset| reset.map(drop))?,
                Mode::Async => {
                    let _work = watch.begin_work();
                    watch.check_part(range)?;
                    watch.protect(range)?;
                }
            }
        }
        Ok(())
    }
}
