//! Protecting tracked memory, lifting that, and what holes and empty pages need.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::thread;

use super::ranges;
use super::words::{CHUNK_PAGES, Words, is_content, runs};
use super::{Protection, Watch, pointer, retry};
use crate::pagemap::{Categories, Region, Scan};
use crate::{Errno, Error, FaultKind, ReadWrite, RegisterMode, Result, Uffd, ZeropageMode, page_size};

/// How many blocks a hole has at least that is left unprotected. Protecting them takes a page table each, and 80 ns a page.
const HOLE_BLOCKS: usize = 16;

impl Watch {
    /// Protects all of a registered range.
    pub(crate) fn arm(&self, range: &Range<usize>) -> Result<()> {
        self.arm_through(&self.uffd, range)
    }

    /// The same, through another descriptor of the same process: the kernel doesn't ask which one has registered memory
    /// that is protected or filled.
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

    /// Protects what is there, and small holes.
    fn arm_around_holes(&self, range: &Range<usize>) -> Result<()> {
        let (mut all, mut protected) = (self.ranges().to_vec(), range.start);
        for hole in self.holes(range)? {
            if protected < hole.start {
                self.protect(&(protected..hole.start))?;
            }
            protected = hole.end;
            all = ranges::changed(&all, &hole, |tracked| tracked.armed = false);
        }
        self.set_ranges(all);
        if protected < range.end { self.protect(&(protected..range.end)) } else { Ok(()) }
    }

    /// Large holes of private anonymous memory, whole blocks.
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

    /// Protects the blocks of a hole in which these pages are, and adds to `found` what is written there, which is
    /// reset in the same step. Returns the end of the last block.
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
        let all = armed.iter().fold(self.ranges().to_vec(), |all, range| {
            ranges::changed(&all, range, |tracked| tracked.armed = true)
        });
        self.set_ranges(all);
        Ok(armed.last().map_or(hole.start, |last| last.end))
    }

    /// Whether empty pages of private anonymous memory are filled, to be protected. Never where another handler fills
    /// them.
    pub(crate) fn fills_empty(&self) -> bool {
        !self.protects_empty
            && self.protection == Protection::Write
            && !self.also.contains(RegisterMode::MISSING)
    }

    /// Fills the `empty` pages of a protected part of a mapping, and protects them.
    ///
    /// That `part` was protected shows that what lies there is registered for it; that it can be registered again
    /// shows that it is registered with this descriptor. So pages of what was mapped there meanwhile aren't filled.
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

    /// Makes pages of private anonymous memory that are empty such that can be protected: the zero page is mapped.
    pub(crate) fn fill(&self, range: &Range<usize>) -> Result<()> {
        self.fill_through(&self.uffd, range)
    }

    #[expect(unsafe_code, reason = "filling is")]
    fn fill_through(&self, uffd: &Uffd, range: &Range<usize>) -> Result<()> {
        let Range { mut start, end } = *range;
        while start < end {
            // SAFETY: what is empty in private anonymous memory holds zeros already; other pages aren't touched.
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

    /// Protects a range, as far as it is registered.
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

    /// Applies an operation to a range: at once, or, where the kernel wants one mapping at a time (up to a kernel
    /// between 6.1 and 6.12), has a hole or something unregistered in between, to each mapping.
    fn each(&self, range: &Range<usize>, operation: impl Fn(*mut c_void, usize) -> Result<()>) -> Result<()> {
        let apply = |range: &Range<usize>| retry(self.tries, || operation(pointer(range.start), range.len()));
        let mut result = apply(range);
        // Mappings may change between being looked up and the operation.
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

    /// Resolves a fault: its page is noted, and free to be accessed. What isn't this watch's is woken.
    pub(crate) fn resolve(&self, kind: FaultKind, rw: ReadWrite, address: *mut c_void) -> Result<()> {
        let ranges = self.ranges();
        let tracked = ranges::at(&ranges, address.addr());
        let page = tracked.map_or(page_size(), |tracked| tracked.page);
        let start = address.addr() / page * page;
        let notes = tracked.and_then(|tracked| tracked.noted.as_ref());
        let _lock = notes.map(|notes| {
            let lock = notes.lock();
            notes.set(start);
            lock
        });
        self.faults[usize::from(rw == ReadWrite::Write)].fetch_add(1, Ordering::Relaxed);
        let resolved = match kind {
            // Registered to be noted, where nobody else fills.
            FaultKind::Missing if notes.is_some() => self.fill(&(start..start + page_size())),
            FaultKind::Missing => Ok(()),
            _ => self.lift_one(pointer(start), page),
        };
        match resolved {
            // Unmapped or unregistered meanwhile, or the layout is changing: if the access still waits, it faults
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

/// Bytes that a page table is for, on most machines.
fn block() -> usize {
    512 * page_size()
}
