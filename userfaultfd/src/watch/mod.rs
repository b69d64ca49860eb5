//! Memory under the protection of a userfaultfd: what both trackers and the snapshot stand on.
//!
//! # Memory that a pager fills
//!
//! A mapping is registered with one userfaultfd, so memory with missing pages is tracked through the descriptor of the pager
//! that fills it. Three ideas make that work:
//!
//! - The pager [lends](crate::pager::Pager::lend) a region to one tracker at a time: a [`Lease`]. The region is registered
//!   for `MISSING` and `WRITE_PROTECT` from then on, also when it is filled.
//! - While the lease is taken every fill is protected in the same call (`UFFDIO_COPY_MODE_WP`), so that what is filled isn't
//!   written. It is taken while no fill is at work, and before the tracker protects: there is no page in between.
//! - Who resolves a write doesn't matter. With `WP_ASYNC`, which the descriptor of a `LazyMemory` has from its handshake, it
//!   is the kernel; without, a worker of the pager lifts the protection of the page. In both cases a page is written that
//!   isn't protected.
//!
//! A snapshot needs each write to wait until the page is saved, so it has a descriptor of its own, and the pager fills
//! everything before.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

pub(crate) mod ranges;

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use self::ranges::{Notes, Tracked};
use crate::error::errno_of;
use crate::holder::{Held, Holder};
use crate::lease::Lease;
use crate::owner::Owner;
use crate::pagemap::{Categories, Pagemap, Region, Scan};
use crate::proc_maps::{Mapping, Process};
use crate::sync::AtomicU64;
use crate::{
    Errno, Error, FaultKind, IoctlFlags, ReadWrite, RegisterMode, Result, Uffd, UffdBuilder, ZeropageMode,
    page_size,
};

/// How often an operation is tried again while the memory layout changes. It is over when the changing thread has
/// run; some kernels have a bug that says so for ever.
const TRIES: usize = 100_000;

/// Pages whose words are read at a time, if they are of the base size.
pub(crate) const CHUNK: usize = 4096;

/// How many blocks a hole has at least that is left unprotected. Protecting them takes a page table each, and 80 ns a page.
const HOLE_BLOCKS: usize = 16;

/// Against what memory is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Write,
    ReadWrite,
}

/// A word of `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    /// Also on markers of pages that aren't there. Linux 5.13.
    const PROTECTED: u64 = 1 << 57;

    pub(crate) fn is_protected(self) -> bool {
        self.0 & Self::PROTECTED != 0
    }

    /// Nothing is there but a marker of something else than protection, or a page that was swapped out unprotected.
    pub(crate) fn is_marker(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED | Self::PROTECTED) == Self::SWAPPED
    }

    /// Nothing is there, not even a marker.
    pub(crate) fn is_empty(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED | Self::PROTECTED) == 0
    }
}

/// The words of some pages.
#[derive(Debug, Default)]
pub(crate) struct Words(Vec<u8>);

impl Words {
    /// Of all pages of the base size in a range.
    pub(crate) fn read(&mut self, pagemap: &Pagemap, range: &Range<usize>) -> Result<()> {
        self.0.resize(range.len() / page_size() * 8, 0);
        pagemap.read_words(range.start, &mut self.0)
    }

    pub(crate) fn get(&self, index: usize) -> Word {
        let bytes = self.0[8 * index..].first_chunk().expect("a word for each page");
        Word(u64::from_ne_bytes(*bytes))
    }
}

/// An address as the kernel's operations take it.
pub(crate) fn pointer(address: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(address)
}

/// Tries up to `tries` times while the layout changes.
fn retry<T>(tries: usize, mut operation: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..tries {
        match operation() {
            Err(error) if error.is_retryable() => thread::yield_now(),
            result => return result,
        }
    }
    operation()
}

/// The ranges, and what protects them.
#[derive(Debug)]
pub(crate) struct Watch {
    /// In another process nothing is known of any range, and nothing done.
    pub(crate) owner: Owner,
    pub(crate) uffd: Uffd,
    pub(crate) pagemap: Pagemap,
    pub(crate) process: Process,
    pub(crate) protection: Protection,
    /// What the ranges are registered for beside protection.
    pub(crate) also: RegisterMode,
    /// Empty pages of private anonymous memory can be protected, as all others can.
    pub(crate) protects_empty: bool,
    /// The page table doesn't tell what is protected, so faults are noted, those of empty pages, too.
    pub(crate) notes: bool,
    /// How often an operation is tried while the layout changes.
    pub(crate) tries: usize,
    /// Of memory that a pager of this process fills: an empty page is one that is missing.
    pub(crate) lease: Option<Arc<Lease>>,
    /// That memory. The descriptor is the pager's, which knows nothing of other ranges: their faults would have no end.
    pub(crate) lent: Option<Vec<Range<usize>>>,
    /// Large holes of private anonymous memory aren't protected before something is there: that takes page tables. Where
    /// a scan tells what is written, and empty pages belong to nobody else.
    pub(crate) leaves_holes: bool,
    /// Replaced as a whole, so that the lock is never held for long, nor while memory is allocated: the thread that
    /// handles faults takes it.
    ranges: Mutex<Arc<[Tracked]>>,
    /// For errors that others get.
    held: Held,
    failure: AtomicI32,
    pub(crate) faults: [AtomicU64; 2],
}

impl Watch {
    pub(crate) fn new(uffd: Uffd, process: Process, protection: Protection, holder: Holder) -> Result<Self> {
        let owner = Owner::current()?;
        Ok(Self {
            owner,
            uffd,
            pagemap: process.pagemap()?,
            process,
            protection,
            also: RegisterMode::empty(),
            protects_empty: true,
            notes: false,
            tries: TRIES,
            lease: None,
            lent: None,
            leaves_holes: false,
            ranges: Mutex::new(Arc::new([])),
            held: Held::new(owner, holder),
            failure: AtomicI32::new(0),
            faults: [const { AtomicU64::new(0) }; 2],
        })
    }

    pub(crate) fn ranges(&self) -> Arc<[Tracked]> {
        if !self.owner.is_current() {
            return Arc::new([]);
        }
        Arc::clone(&self.ranges.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_ranges(&self, ranges: Vec<Tracked>) {
        if self.process == Process::Own {
            self.held.set(ranges.iter().map(|tracked| tracked.range.clone()));
        }
        let mut ranges: Arc<[Tracked]> = ranges.into();
        std::mem::swap(&mut *self.ranges.lock().unwrap_or_else(PoisonError::into_inner), &mut ranges);
    }

    /// Whether another tracker, snapshot or pager of this process says that it has a part of a range.
    pub(crate) fn is_held_by_another(&self, range: &Range<usize>) -> bool {
        self.held.is_shared(range)
    }

    /// From now on nothing is known any more.
    pub(crate) fn fail(&self, error: &Error) {
        let errno = error.errno().unwrap_or(Errno::EIO);
        self.failure.store(errno as i32, Ordering::SeqCst);
    }

    /// Returns an error in any process but the owner's.
    pub(crate) fn check_owner(&self) -> Result<()> {
        if self.owner.is_current() { Ok(()) } else { Err(Error::OtherProcess) }
    }

    /// The error, after [`fail`](Self::fail), or of another process.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_owner()?;
        if self.has_ended() {
            let ranges = self.ranges();
            let ends = ranges.first().zip(ranges.last());
            let (start, end) = ends.map_or((0, 0), |(first, last)| (first.range.start, last.range.end));
            return Err(Error::NotTracked { start, end });
        }
        match self.failure.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => {
                Err(Error::TrackingFailed(crate::error::errno_of(&std::io::Error::from_raw_os_error(errno))))
            }
        }
    }

    /// Whether the memory was unmapped by its owner.
    fn has_ended(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.has_ended())
    }

    fn modes(&self) -> RegisterMode {
        let protection = match self.protection {
            Protection::Write => RegisterMode::WRITE_PROTECT,
            Protection::ReadWrite => RegisterMode::READ_WRITE_PROTECT,
        };
        let noted = if self.notes { RegisterMode::MISSING } else { RegisterMode::empty() };
        protection | noted | self.also
    }

    /// Registers a range, and protects it. If that fails, nothing of it is tracked.
    pub(crate) fn track(&self, range: &Range<usize>) -> Result<()> {
        self.register(range)?;
        self.arm(range).inspect_err(|_| {
            // The first failure is the one to report.
            drop(self.untrack(range));
        })
    }

    /// Registers a range.
    pub(crate) fn register(&self, range: &Range<usize>) -> Result<()> {
        self.check_owner()?;
        let all = self.ranges();
        if ranges::overlaps(&all, range) {
            return Err(Error::AlreadyTracked { start: range.start, end: range.end });
        }
        self.check_lent(range)?;
        self.check_missing(range)?;
        self.check()?;
        let ioctls = self
            .uffd
            .register_in(self.process, pointer(range.start), range.len(), self.modes())
            .inspect_err(|error| {
                // The kernel checks the whole range first. `ENOMEM` is the one failure after that: mappings before the
                // one that couldn't be split are registered then.
                if error.errno() == Some(Errno::ENOMEM) {
                    drop(self.release(range));
                }
            })?;
        match self.layout(ioctls, range) {
            Ok(more) => {
                self.set_ranges(ranges::with(&all, more));
                Ok(())
            }
            Err(error) => {
                drop(self.release(range));
                Err(error)
            }
        }
    }

    /// Refuses memory that isn't lent.
    fn check_lent(&self, range: &Range<usize>) -> Result<()> {
        let holds = |lent: &Range<usize>| lent.start <= range.start && range.end <= lent.end;
        match &self.lent {
            Some(lent) if !lent.iter().any(holds) => {
                Err(Error::OtherMemory { start: range.start, end: range.end })
            }
            _ => Ok(()),
        }
    }

    /// Refuses memory that can't be protected since its missing pages are filled by another handler.
    fn check_missing(&self, range: &Range<usize>) -> Result<()> {
        if !self.also.contains(RegisterMode::MISSING) || self.protects_empty || self.lease.is_some() {
            return Ok(());
        }
        let mappings = self.process.mappings(range)?;
        match mappings.into_iter().find(|mapping| mapping.anonymous) {
            Some(Mapping { range: Range { start, end }, .. }) => Err(Error::MissingServed { start, end }),
            None => Ok(()),
        }
    }

    /// The range by the size of its pages.
    fn layout(&self, ioctls: IoctlFlags, range: &Range<usize>) -> Result<Vec<Tracked>> {
        let tracked = |range: Range<usize>, page| {
            let noted = self.notes.then(|| Arc::new(Notes::new(&range, page)));
            Tracked { range, page, noted, always: false, armed: true }
        };
        // Hugetlb memory anywhere in the range takes this operation away from the answer.
        if ioctls.contains(IoctlFlags::ZEROPAGE) {
            return Ok(vec![tracked(range.clone(), page_size())]);
        }
        let mappings = self.process.mappings_with_pages(range)?;
        Ok(mappings
            .into_iter()
            .map(|mapping| tracked(mapping.range, mapping.page.max(page_size())))
            .collect())
    }

    /// Unregisters what of the range is tracked. What was unmapped meanwhile is forgotten.
    pub(crate) fn untrack(&self, range: &Range<usize>) -> Result<()> {
        self.check_owner()?;
        let all = self.ranges();
        if ranges::cuts_a_page(&all, range) {
            return Err(Error::SystemError(Errno::EINVAL));
        }
        let mut result = Ok(());
        for Tracked { range, .. } in ranges::within(&all, range) {
            result = result.and(self.release(&range));
        }
        self.set_ranges(ranges::without(&all, range));
        result
    }

    /// Has a range count as written in every look, or no longer: what is known of it by then is that it was written.
    pub(crate) fn set_always(&self, range: &Range<usize>, always: bool) -> Result<()> {
        let all = self.ranges();
        if ranges::cuts_a_page(&all, range) {
            return Err(Error::SystemError(Errno::EINVAL));
        }
        let tracked = ranges::within(&all, range);
        if tracked.iter().map(|tracked| tracked.range.len()).sum::<usize>() != range.len() {
            return Err(Error::NotTracked { start: range.start, end: range.end });
        }
        self.set_ranges(ranges::changed(&all, range, |tracked| {
            (tracked.always, tracked.armed) = (always, true)
        }));
        tracked.iter().filter(|tracked| tracked.always && !always).for_each(|tracked| {
            self.give_back(&tracked.range);
        });
        self.check()
    }

    /// Ends the registration of a range and wakes its waiters. Where another handler fills missing pages, whose modes
    /// are registered beside, only the protection ends: unregistered memory would show zeros instead.
    fn release(&self, range: &Range<usize>) -> Result<()> {
        if self.has_ended() {
            return Ok(());
        }
        if !self.also.is_empty() {
            return self.for_each_mapping(range, |range| self.lift(range));
        }
        let unregister =
            |range: &Range<usize>| self.uffd.unregister_unexplained(pointer(range.start), range.len());
        // Before Linux 6.18 any userfaultfd of the process ends any registration, also that of what was mapped there
        // since and is served by another handler. Only its owner can register a mapping again.
        let register = |range: &Range<usize>| {
            self.uffd.register_unexplained(pointer(range.start), range.len(), self.modes())
        };
        let of_others = |error: &Error| matches!(error, Error::SystemError(Errno::EBUSY));
        let unregister_own = |range: &Range<usize>| match register(range) {
            Err(error) if of_others(&error) => Ok(()),
            _ => unregister(range),
        };
        match register(range) {
            Err(error) if of_others(&error) => self.for_each_mapping(range, unregister_own),
            _ => match unregister(range) {
                // Nothing is mapped there any more, or something that can't be registered.
                Err(Error::SystemError(Errno::EINVAL)) => self.for_each_mapping(range, unregister_own),
                result => result,
            },
        }
    }

    /// Applies an operation to each mapping in a range. Skips those that aren't this descriptor's.
    fn for_each_mapping(
        &self,
        range: &Range<usize>,
        operation: impl Fn(&Range<usize>) -> Result<()>,
    ) -> Result<()> {
        self.process.mappings(range)?.iter().try_for_each(|mapping| match operation(&mapping.range) {
            Err(Error::SystemError(Errno::EINVAL) | Error::NotTracked { .. }) => Ok(()),
            result => result,
        })
    }

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
            for start in (start..end).step_by(CHUNK * page_size()) {
                let chunk = start..end.min(start.saturating_add(CHUNK * page_size()));
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

    /// Lifts the protection of a range, and wakes who waits.
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

    /// Makes all of a range accessed, as far as it is registered, after something went wrong: nothing is lost so. If
    /// that fails, too, nothing is known any more.
    pub(crate) fn give_back(&self, range: &Range<usize>) {
        for Tracked { range, page, noted, .. } in ranges::within(&self.ranges(), range) {
            if let Some(notes) = noted {
                range.clone().step_by(page).for_each(|address| notes.set(address));
            }
            let lifted = match self.lift(&range) {
                // What isn't registered is told by every look at it.
                Err(Error::NotTracked { .. }) => self.for_each_mapping(&range, |range| self.lift(range)),
                result => result,
            };
            if let Err(error) = lifted {
                self.fail(&error);
            }
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

/// Whether a page that isn't protected has been written: zeros that were only read are the kernel's.
pub(crate) fn is_content(page: Categories) -> bool {
    page.intersects(Categories::PRESENT | Categories::SWAPPED) && !page.contains(Categories::PFNZERO)
}

/// Runs of pages in `range` that `pick` picks by their index.
pub(crate) fn runs(range: &Range<usize>, page: usize, pick: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, start) in range.clone().step_by(page).enumerate() {
        if pick(index) {
            match runs.last_mut() {
                Some(last) if last.end == start => last.end += page,
                _ => runs.push(start..start + page),
            }
        }
    }
    runs
}

/// Whether the kernel has `PAGEMAP_SCAN`.
pub(crate) fn can_scan() -> Result<bool> {
    match Scan::new(0..0).next_regions(&Pagemap::of_self()?, &mut [Region::default()]) {
        Ok(_) => Ok(true),
        Err(Error::SystemError(Errno::ENOTTY)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the kernel tells of protection in `/proc/PID/pagemap`, which it does since 5.13. Asks it once, with a page
/// that is mapped for that: any other may be registered already.
pub(crate) fn tells_protection() -> Result<bool> {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    if let Some(answer) = ANSWER.get() {
        return Ok(*answer);
    }
    let map = || -> std::io::Result<_> {
        let mut page = memmap2::MmapMut::map_anon(page_size())?;
        page[0] = 1; // it is there
        Ok(page)
    };
    let page = map().map_err(|error| Error::SystemError(errno_of(&error)))?;
    let start = page.as_ptr().addr();
    let uffd = UffdBuilder::new().close_on_exec(true).create()?;
    uffd.register_with_mode(pointer(start), page_size(), RegisterMode::WRITE_PROTECT)?;
    uffd.write_protect(pointer(start), page_size())?;
    let mut words = Words::default();
    words.read(&Pagemap::of_self()?, &(start..start + page_size()))?;
    Ok(*ANSWER.get_or_init(|| words.get(0).is_protected()))
}
