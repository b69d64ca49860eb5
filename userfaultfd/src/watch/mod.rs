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
//! - Which thread resolves a write doesn't matter. With `WP_ASYNC`, which the descriptor of a `LazyMemory` has from its handshake, it
//!   is the kernel; without, a worker of the pager lifts the protection of the page. In both cases a page is written that
//!   isn't protected.
//!
//! A snapshot needs each write to wait until the page is saved, so it has a descriptor of its own, and the pager fills
//! everything before.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

mod protect;
pub(crate) mod ranges;
mod words;

pub(crate) use self::words::{CHUNK_PAGES, Words, runs};

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use self::ranges::{DirtyBits, Tracked};
use crate::error::errno_of;
use crate::holder::{Held, Holder};
use crate::lease::Lease;
use crate::owner::Owner;
use crate::pagemap::{Pagemap, Region, Scan};
use crate::proc_maps::{Mapping, Process};
use crate::sync::AtomicU64;
use crate::{Errno, Error, IoctlFlags, RegisterMode, Result, Uffd, UffdBuilder, page_size};

/// How often an operation is tried again while the memory layout changes. It is over when the changing thread has
/// run; some kernels have a bug that says so for ever.
const MAX_LAYOUT_TRIES: usize = 100_000;

/// Against what memory is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Write,
    ReadWrite,
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
            tries: MAX_LAYOUT_TRIES,
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
            let noted = self.notes.then(|| Arc::new(DirtyBits::new(&range, page)));
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
