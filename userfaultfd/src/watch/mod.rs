//! Memory under the protection of a userfaultfd: the common ground of both trackers and the snapshot.
//!
//! # Memory that a pager fills
//!
//! A mapping can be registered with one userfaultfd only, so memory with missing pages is tracked through the descriptor
//! of the pager that fills it. Three rules make that work:
//!
//! - The pager [lends](crate::pager::Pager::lend) a region to one tracker at a time: a [`Lease`]. From then on the region
//!   is registered for `MISSING` and `WRITE_PROTECT`, also when it is filled.
//! - While the lease is taken, every fill protects its pages in the same call (`UFFDIO_COPY_MODE_WP`), so that a filled
//!   page doesn't count as written. The lease is taken while no fill runs, and before the tracker protects, so no page
//!   falls between.
//! - A write is resolved by the kernel with `WP_ASYNC`, which the descriptor of a `LazyMemory` has from its handshake;
//!   without, a worker of the pager lifts the protection. In both cases a page that isn't protected was written.
//!
//! A snapshot needs each write to wait until the page is saved, so it has a descriptor of its own, and the pager fills
//! all missing pages first.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

mod claims;
mod protect;
pub(crate) mod ranges;
mod words;

pub(crate) use self::words::{CHUNK_PAGES, Words, runs};

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use self::claims::Claims;
use self::ranges::{DirtyBits, Tracked};
use crate::error::errno_of;
use crate::holder::{Held, Holder};
use crate::lease::Lease;
use crate::lock_order::LockGuard;
use crate::owner::Owner;
use crate::pagemap::{Pagemap, Region, Scan};
use crate::proc_maps::{Mapping, Process};
use crate::sync::AtomicU64;
use crate::{Errno, Error, IoctlFlags, RegisterMode, Result, Uffd, UffdBuilder, page_size};

/// Retries of an operation while the layout of memory changes. The change ends when the changing thread has run; some
/// kernels have a fault and report it for ever.
const MAX_LAYOUT_TRIES: usize = 100_000;

/// The accesses against which memory is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Write,
    ReadWrite,
}

/// An address as a pointer, for the kernel's operations.
pub(crate) fn pointer(address: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(address)
}

/// Calls `operation` up to `tries` times while the layout changes.
fn retry<T>(tries: usize, mut operation: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..tries {
        match operation() {
            Err(error) if error.is_retryable() => thread::yield_now(),
            result => return result,
        }
    }
    operation()
}

/// Protected ranges, and the descriptor that protects them.
#[derive(Debug)]
pub(crate) struct Watch {
    /// In another process nothing is known of any range, and nothing done.
    pub(crate) owner: Owner,
    pub(crate) uffd: Uffd,
    pub(crate) pagemap: Pagemap,
    pub(crate) process: Process,
    pub(crate) protection: Protection,
    /// Further modes for which the ranges are registered.
    pub(crate) also: RegisterMode,
    /// Empty pages of private anonymous memory can be protected, as all others can.
    pub(crate) protects_empty: bool,
    /// The page table doesn't show protection, so faults are noted, those of empty pages, too.
    pub(crate) notes: bool,
    /// Tries of an operation while the layout changes.
    pub(crate) tries: usize,
    /// The lease of memory that a pager of this process fills: an empty page is missing.
    pub(crate) lease: Option<Arc<Lease>>,
    /// The range of that memory. The pager that reads the descriptor would never resolve faults in other ranges.
    pub(crate) lent: Option<Vec<Range<usize>>>,
    /// Large holes of private anonymous memory stay unprotected while they are empty, which saves page tables: where a scan
    /// finds what is written, and no other handler fills empty pages.
    pub(crate) leaves_holes: bool,
    claims: Arc<Claims>,
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
            claims: Arc::new(Claims::new(process, Held::new(owner, holder))),
            failure: AtomicI32::new(0),
            faults: [const { AtomicU64::new(0) }; 2],
        })
    }

    pub(crate) fn ranges(&self) -> Arc<[Tracked]> {
        if !self.owner.is_current() {
            return Arc::new([]);
        }
        self.claims.ranges()
    }

    /// Keeps other watches from taking ranges from this one while it protects or resets pages. The parts that they have taken
    /// are reported by [`check_part`](Self::check_part).
    pub(crate) fn begin_work(&self) -> LockGuard<'_, ()> {
        self.claims.begin_work()
    }

    /// Fails if a part of a range has become another watch's.
    pub(crate) fn check_part(&self, range: &Range<usize>) -> Result<()> {
        self.claims.check(range)
    }

    /// Whether another tracker, snapshot or pager of this process holds a part of a range.
    pub(crate) fn is_held_by_another(&self, range: &Range<usize>) -> bool {
        self.claims.is_held_by_another(range)
    }

    /// Marks the watch as failed: nothing is known from now on.
    pub(crate) fn fail(&self, error: &Error) {
        let errno = error.errno().unwrap_or(Errno::EIO);
        self.failure.store(errno as i32, Ordering::SeqCst);
    }

    /// Returns an error in every process but the owner's.
    pub(crate) fn check_owner(&self) -> Result<()> {
        if self.owner.is_current() { Ok(()) } else { Err(Error::OtherProcess) }
    }

    /// Returns an error after [`fail`](Self::fail), and in another process.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_owner()?;
        if self.has_ended() {
            return Err(Error::MemoryDropped);
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

    /// Registers a range and protects it. After an error nothing of it is tracked.
    pub(crate) fn track(&self, range: &Range<usize>) -> Result<()> {
        self.register(range)?;
        let work = self.begin_work();
        let armed = self.check_part(range).and_then(|()| self.arm(range));
        drop(work);
        armed.inspect_err(|_| {
            // The first failure is the one to report.
            drop(self.untrack(range));
        })
    }

    /// Registers a range.
    pub(crate) fn register(&self, range: &Range<usize>) -> Result<()> {
        self.check_owner()?;
        let all = self.ranges();
        if let Some(tracked) = ranges::within(&all, range).first() {
            return Err(Error::AlreadyTracked { start: tracked.range.start, end: tracked.range.end });
        }
        self.check_lent(range)?;
        self.check_missing(range)?;
        self.check()?;
        let register = || {
            let ioctls = self
                .uffd
                .register_in(Some(self.process), pointer(range.start), range.len(), self.modes())
                .inspect_err(|error| {
                    // The kernel checks the whole range first. `ENOMEM` is the one failure after that: mappings before
                    // the one that couldn't be split are registered then.
                    if error.errno() == Some(Errno::ENOMEM) {
                        drop(self.release(range));
                    }
                })?;
            let more = self.layout(ioctls, range).inspect_err(|_| drop(self.release(range)))?;
            self.claims.update(|all| ranges::with(all, more.clone()));
            Ok(())
        };
        self.claims.take_over(range, register)
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

    /// Splits the range by the size of its pages.
    fn layout(&self, ioctls: IoctlFlags, range: &Range<usize>) -> Result<Vec<Tracked>> {
        let tracked = |range: Range<usize>, page| {
            let noted = self.notes.then(|| Arc::new(DirtyBits::new(&range, page)));
            Tracked { range, page, noted, always: false, armed: true, lost: false }
        };
        // With hugetlb memory anywhere in the range the kernel leaves this operation out.
        if ioctls.contains(IoctlFlags::ZEROPAGE) {
            return Ok(vec![tracked(range.clone(), page_size())]);
        }
        let mappings = self.process.mappings_with_pages(range)?;
        Ok(mappings
            .into_iter()
            .map(|mapping| tracked(mapping.range, mapping.page.max(page_size())))
            .collect())
    }

    /// Unregisters the tracked parts of a range, and forgets what was unmapped meanwhile.
    pub(crate) fn untrack(&self, range: &Range<usize>) -> Result<()> {
        self.check_owner()?;
        let _work = self.begin_work();
        self.untrack_at_work(range)
    }

    /// The same, for the thread that handles faults, which must not wait for a thread that is at work; or under
    /// [`begin_work`](Self::begin_work).
    pub(crate) fn untrack_at_work(&self, range: &Range<usize>) -> Result<()> {
        let all = self.ranges();
        ranges::check_bounds(&all, range)?;
        let mut result = Ok(());
        for tracked in ranges::within(&all, range).iter().filter(|tracked| !tracked.lost) {
            result = result.and(self.release(&tracked.range));
        }
        self.claims.update(|all| ranges::without(all, range));
        result
    }

    /// Makes a range count as written at every look, or ends that: at the end, all of it counts as written once more.
    pub(crate) fn set_always(&self, range: &Range<usize>, always: bool) -> Result<()> {
        let _work = self.begin_work();
        let all = self.ranges();
        ranges::check_bounds(&all, range)?;
        self.check_part(range)?;
        let tracked = ranges::within(&all, range);
        if let Some(gap) = ranges::first_gap(&tracked, range) {
            return Err(Error::NeverTracked { start: gap.start, end: gap.end });
        }
        self.claims.update(|all| {
            ranges::changed(all, range, |tracked| (tracked.always, tracked.armed) = (always, true))
        });
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
                // The part isn't mapped any more, or is memory that can't be registered.
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

    /// Marks the registered parts of a range as accessed after an error, so that nothing is lost. If that fails, too, the
    /// watch has failed. Called under [`begin_work`](Self::begin_work).
    pub(crate) fn give_back(&self, range: &Range<usize>) {
        for Tracked { range, page, noted, lost, .. } in ranges::within(&self.ranges(), range) {
            if lost {
                continue;
            }
            if let Some(notes) = noted {
                range.clone().step_by(page).for_each(|address| notes.set(address));
            }
            let lifted = match self.lift(&range) {
                // Every look reports that a part isn't registered.
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

/// Whether the kernel shows protection in `/proc/PID/pagemap`, which it does since 5.13. Asks it once, with a page mapped
/// for that: any other may be registered already.
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
