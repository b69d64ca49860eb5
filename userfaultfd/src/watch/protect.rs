//! Protecting tracked memory, lifting the protection, and the treatment of holes and empty pages.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::thread;

use super::ranges;
use super::words::{CHUNK_PAGES, Words, is_content, runs};
use super::{Protection, Watch, pointer, retry};
use crate::pagemap::{Categories, Region, Scan};
use crate::{Errno, Error, FaultKind, ReadWrite, RegisterMode, Result, Uffd, ZeropageMode, page_size};

/// Blocks of the smallest hole that is left unprotected. Protection takes a page table for each block, and 80 ns for
/// each page.
const HOLE_BLOCKS: usize = 16;

impl Watch {
    /// Protects a whole registered range.
    pub(crate) fn arm(&self, range: &Range<usize>) -> Result<()> {
        self.arm_through(&self.uffd, range)
    }

    /// The same, through another descriptor of the same process: to protect and to fill, the kernel accepts any descriptor
    /// of the process.
    pub(crate) fn arm_through(&self, uffd: &Uffd, range: &Range<usize>) -> Result<()> {
        if self.leaves_holes {
            return self.arm_around_holes(range);
        }
        self.protect_through(uffd, range)?;
        if !self.fills_empty() {
            return Ok(());
        }
        let mut words = Words::default();
        for mapping in self.process.mappings(range)?.iter().filter(|mapping| mapping.anonymous) {
            let Range { start, end } = mapping.range;
            for start in (start..end).step_by(CHUNK_PAGES * page_size()) {
                let chunk = start..end.min(start.saturating_add(CHUNK_PAGES * page_size()));
                words.read(&self.pagemap, &chunk)?;
                let empty = runs(&chunk, page_size(), |index| words.get(index).is_empty());
                self.protect_empty_through(uffd, &chunk, &empty)?;
            }
        }
        Ok(())
    }

    /// Protects present pages and small holes.
    fn arm_around_holes(&self, range: &Range<usize>) -> Result<()> {
        let (holes, mut protected) = (self.holes(range)?, range.start);
        for hole in &holes {
            if protected < hole.start {
                self.protect(&(protected..hole.start))?;
            }
            protected = hole.end;
        }
        self.set_armed(&holes, false);
        if protected < range.end { self.protect(&(protected..range.end)) } else { Ok(()) }
    }

    /// The large holes of private anonymous memory, in whole blocks.
    fn holes(&self, range: &Range<usize>) -> Result<Vec<Range<usize>>> {
        let mut holes = Vec::new();
        let mut note = |hole: Range<usize>| {
            let (start, end) = (hole.start.next_multiple_of(block()), hole.end / block() * block());
            if start < end && end - start >= HOLE_BLOCKS * block() {
                holes.push(start..end);
            }
        };
        if range.len() < HOLE_BLOCKS * block() {
            return Ok(holes);
        }
        let there = Categories::PRESENT | Categories::SWAPPED;
        let mut regions = vec![Region::default(); 512];
        for mapping in self.process.mappings(range)?.iter().filter(|mapping| mapping.anonymous) {
            let mut end = mapping.range.start;
            let mut scan = Scan::new(mapping.range.clone());
            scan.any_of(there).report(there);
            while let Some(regions) = scan.next_regions(&self.pagemap, &mut regions)? {
                for region in regions.iter().map(Region::range) {
                    note(end..region.start);
                    end = region.end;
                }
            }
            note(end..mapping.range.end);
        }
        Ok(holes)
    }

    /// Protects the blocks of a hole that have these pages, and adds the written ones to `found`, which are reset in the
    /// same step. Returns the end of the last block.
    pub(crate) fn arm_blocks(
        &self,
        hole: &Range<usize>,
        pages: &[Region],
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize> {
        let (mut regions, mut armed) = ([Region::default(); 64], Vec::<Range<usize>>::new());
        for page in pages.iter().map(Region::range) {
            let start = (page.start / block() * block()).max(hole.start);
            let start = start.max(armed.last().map_or(start, |last| last.end));
            let end = page.end.next_multiple_of(block()).min(hole.end);
            if start >= end {
                continue;
            }
            let mut scan = Scan::new(start..end);
            scan.all_of(Categories::WRITTEN)
                .report(Categories::PRESENT | Categories::SWAPPED | Categories::PFNZERO)
                .write_protect(true)
                .require_async(true);
            loop {
                match scan.next_regions(&self.pagemap, &mut regions) {
                    Ok(Some(regions)) => {
                        let written = regions.iter().filter(|region| is_content(region.categories()));
                        found.extend(written.map(Region::range));
                    }
                    Ok(None) => break,
                    Err(error) => {
                        self.give_back(&(start..end));
                        return Err(error);
                    }
                }
            }
            match armed.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => armed.push(start..end),
            }
        }
        self.set_armed(&armed, true);
        Ok(armed.last().map_or(hole.start, |last| last.end))
    }

    fn set_armed(&self, parts: &[Range<usize>], armed: bool) {
        self.claims.update(|all| {
            parts
                .iter()
                .fold(all.to_vec(), |all, part| ranges::changed(&all, part, |tracked| tracked.armed = armed))
        });
    }

    /// Whether empty pages of private anonymous memory must be filled to be protected. Never where another handler fills
    /// them.
    pub(crate) fn fills_empty(&self) -> bool {
        !self.protects_empty
            && self.protection == Protection::Write
            && !self.also.contains(RegisterMode::MISSING)
    }

    /// Fills the `empty` pages of a protected part of a mapping, and protects them.
    ///
    /// A successful protection of `part` shows that it is registered for protection; a successful second registration
    /// shows that it is registered with this descriptor. So pages of memory that was mapped there meanwhile aren't filled.
    pub(crate) fn protect_empty(&self, part: &Range<usize>, empty: &[Range<usize>]) -> Result<()> {
        self.protect_empty_through(&self.uffd, part, empty)
    }

    fn protect_empty_through(&self, uffd: &Uffd, part: &Range<usize>, empty: &[Range<usize>]) -> Result<()> {
        if empty.is_empty() {
            return Ok(());
        }
        match self.uffd.register_unexplained(pointer(part.start), part.len(), self.modes()) {
            Ok(_) => {}
            Err(Error::SystemError(Errno::EBUSY | Errno::EINVAL)) => {
                return Err(Error::NotTracked { start: part.start, end: part.end });
            }
            Err(error) => return Err(error),
        }
        for run in empty {
            match self.fill_through(uffd, run) {
                // Mapped anew meanwhile.
                Err(error) if error.errno() == Some(Errno::ENOENT) => {
                    return Err(Error::NotTracked { start: run.start, end: run.end });
                }
                result => result?,
            }
        }
        self.protect_through(uffd, part)
    }

    /// Maps the zero page into empty pages of private anonymous memory, so that they can be protected.
    pub(crate) fn fill(&self, range: &Range<usize>) -> Result<()> {
        self.fill_through(&self.uffd, range)
    }

    #[expect(unsafe_code, reason = "filling is")]
    fn fill_through(&self, uffd: &Uffd, range: &Range<usize>) -> Result<()> {
        let Range { mut start, end } = *range;
        while start < end {
            // SAFETY: an empty page of private anonymous memory holds zeros already; other pages aren't touched.
            let filled = retry(self.tries, || unsafe {
                uffd.zeropage_with(pointer(start), end - start, ZeropageMode::empty())
            });
            match filled {
                Ok(bytes) => start += bytes,
                Err(error) => match (error.progress(), error.errno()) {
                    (Some(bytes @ 1..), _) => start += bytes,
                    (_, Some(Errno::EEXIST)) => start += page_size(),
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Protects the registered parts of a range.
    pub(crate) fn protect(&self, range: &Range<usize>) -> Result<()> {
        self.protect_through(&self.uffd, range)
    }

    fn protect_through(&self, uffd: &Uffd, range: &Range<usize>) -> Result<()> {
        self.each(range, |start, len| match self.protection {
            Protection::Write => uffd.write_protect_unexplained(start, len),
            Protection::ReadWrite => uffd.read_write_protect_unexplained(start, len),
        })
    }

    /// Lifts the protection of a range, and wakes the threads that wait.
    pub(crate) fn lift(&self, range: &Range<usize>) -> Result<()> {
        self.each(range, |start, len| self.lift_one(start, len))
    }

    fn lift_one(&self, start: *mut c_void, len: usize) -> Result<()> {
        match self.protection {
            Protection::Write => self.uffd.remove_write_protection(start, len, true),
            Protection::ReadWrite => self.uffd.remove_read_write_protection(start, len, true),
        }
    }

    /// Applies an operation to a range: in one call, or to each mapping, where the kernel takes one mapping at a time (up
    /// to a kernel between 6.1 and 6.12) or the range has holes or unregistered parts.
    fn each(&self, range: &Range<usize>, operation: impl Fn(*mut c_void, usize) -> Result<()>) -> Result<()> {
        let apply = |range: &Range<usize>| retry(self.tries, || operation(pointer(range.start), range.len()));
        let mut result = apply(range);
        // Mappings may change between the look-up and the operation.
        for _ in 0..3 {
            if !matches!(result, Err(Error::SystemError(Errno::ENOENT))) {
                break;
            }
            result = self.process.mappings(range)?.iter().try_for_each(|mapping| apply(&mapping.range));
        }
        match result {
            Err(Error::SystemError(Errno::ENOENT)) => {
                Err(Error::NotTracked { start: range.start, end: range.end })
            }
            result => result,
        }
    }

    /// Protects all ranges anew.
    pub(crate) fn protect_all(&self) -> Result<()> {
        self.check()?;
        let _work = self.begin_work();
        self.ranges().iter().try_for_each(|tracked| {
            self.check_part(&tracked.range)?;
            self.protect(&tracked.range)
        })
    }

    /// Resolves a fault: notes its page and lifts the protection. Wakes the waiters of a page that isn't this watch's.
    pub(crate) fn resolve(&self, kind: FaultKind, rw: ReadWrite, address: *mut c_void) -> Result<()> {
        let _resolving = self.claims.begin_resolving();
        let ranges = self.ranges();
        let tracked = ranges::at(&ranges, address.addr());
        let page = tracked.map_or(page_size(), |tracked| tracked.page);
        let start = address.addr() / page * page;
        if tracked.is_some_and(|tracked| tracked.lost) {
            // Of a thread that waits since before that memory was unmapped. What lies there now is another watch's.
            return self.uffd.wake(pointer(start), page);
        }
        let notes = tracked.and_then(|tracked| tracked.noted.as_ref());
        let _lock = notes.map(|notes| {
            let lock = notes.lock();
            notes.set(start);
            lock
        });
        self.faults[usize::from(rw == ReadWrite::Write)].fetch_add(1, Ordering::Relaxed);
        let resolved = match kind {
            // Registered for missing pages only to note them: no other handler fills here.
            FaultKind::Missing if notes.is_some() => self.fill(&(start..start + page_size())),
            FaultKind::Missing => Ok(()),
            _ => self.lift_one(pointer(start), page),
        };
        match resolved {
            // Unmapped or unregistered meanwhile, or the layout is changing: if the thread still waits, it faults
            // again.
            Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EAGAIN)) => {
                thread::yield_now();
                self.uffd.wake(pointer(start), page)
            }
            // Another thread was faster.
            Ok(()) if kind == FaultKind::Missing => self.uffd.wake(pointer(start), page),
            result => result,
        }
    }
}

/// Bytes that one page table maps, on most machines.
fn block() -> usize {
    512 * page_size()
}
