//! Trackers of the pages that a program writes ([`DirtyTracker`]) or accesses ([`AccessTracker`]).
//!
//! A tracker reports the pages of its ranges that were written, or accessed, since they were last reset. Incremental
//! backups, migration of virtual machines, garbage collectors and checkpoints need the first; tiering of memory, and
//! estimates of how much memory a program needs, the second.
//!
//! | | reports | since Linux | an access costs |
//! | --- | --- | --- | --- |
//! | [`DirtyTracker`], [`Mode::Async`] | pages written | 6.7 | a short page fault |
//! | [`DirtyTracker`], [`Mode::Sync`] | pages written | 5.7 private anonymous, 5.19 shared and hugetlb memory | a wake-up of the tracker's thread and back |
//! | [`AccessTracker`], either mode | pages read or written | 7.3 | the same |
//!
//! The cost is that of the first access to a page after a reset; further accesses cost nothing.
//!
//! # What counts as written
//!
//! A page counts as written when the program, or a system call on its behalf, writes to it through **the mapping that is
//! tracked**. Writes through another mapping of the same file or by write(2), and writes to
//! [pinned memory](#pinned-memory), aren't seen.
//!
//! The unit is the page of the memory: the base page, or the huge page on hugetlb memory. The kernel splits transparent
//! huge pages when they are written, so they are reported by the base page.
//!
//! Both modes report the same:
//!
//! | | |
//! | --- | --- |
//! | a page that was never accessed | counts as written when it is written |
//! | a page that is only read | doesn't count as written |
//! | `MADV_DONTNEED`, `MADV_FREE` on private anonymous memory | dropped pages count as written: their content is gone. Exception, in `Async` mode: pages of a large hole that were written and dropped since the last look; they are zero as before |
//! | the same on other memory, `MADV_REMOVE`, holes punched into a file | isn't seen; the next write is |
//! | munmap(2) | those pages are no longer reported |
//! | another mapping in the same place | [`Error::NotTracked`](crate::Error::NotTracked), also when another tracker or snapshot of this process has registered it, whose pages are left alone |
//! | mremap(2) to elsewhere | as munmap(2); track the new place |
//! | fork(2) | the parent goes on as before; the child isn't tracked; from Linux 5.19 to 6.3 it hangs if it writes to protected [hugetlb memory](crate::Uffd::write_protect) |
//! | mprotect(2), also to `PROT_NONE` | isn't seen; pages stay tracked |
//! | mlock(2), `MADV_POPULATE_WRITE` of pages that can be written | is a write in `Async` mode: the kernel makes them writable ahead. In `Sync` mode the pages are written likewise, or the call fails: see [`Options::user_mode_only`] |
//! | swapping, compaction, page migration | isn't seen |
//!
//! A write during a [`take`](DirtyTracker::take) is reported by this call or by the next one, never by neither. In
//! `Sync` mode both may report it.
//!
//! # Memory with missing pages
//!
//! A range can be registered with only one userfaultfd. Track a [`LazyMemory`](crate::LazyMemory) by
//! [`LazyMemory::tracker`](crate::LazyMemory::tracker), and memory that a handler of yours fills by
//! [`Options::read_elsewhere`].
//!
//! # Pinned memory
//!
//! The kernel and devices write to pinned pages without the page table, so protection doesn't stop them, and neither a
//! tracker nor a [`Series`](crate::snapshot::Series) sees these writes. Pinned are
//!
//! - buffers registered with io_uring (`IORING_REGISTER_BUFFERS`), while they are registered;
//! - the target of a read with `O_DIRECT`, from its submission to its completion: data that arrives after the page was
//!   reset isn't seen;
//! - memory registered for RDMA, or mapped for a device by VFIO: all memory of a virtual machine with a passed-through
//!   device;
//! - pages that a driver holds by `pin_user_pages`, such as those of packet sockets and of graphics user pointers.
//!
//! A system call with an ordinary buffer, such as read(2), writes through the page table and is seen.
//! [`DirtyTracker::set_always_dirty`] makes pinned ranges count as written at every look;
//! [`Series::set_always_dirty`](crate::snapshot::Series::set_always_dirty) saves them in every snapshot.
//!
//! # Going back
//!
//! [`DirtyTracker::reset`] copies an image back over what was written. For memory that a program makes for this,
//! such as a sandbox's, `Pristine` does the same, and is safe.
//!
//! # What is safe, and why
//!
//! All of it is safe but [`reset`](DirtyTracker::reset), which writes memory. Protection decides when a thread waits, never what it reads. Where the kernel can't protect empty
//! pages (private anonymous memory before Linux 6.4), the tracker maps the kernel's page of zeros there, which is what
//! such pages hold already. It never does so where another handler fills missing pages, or where memory was mapped anew.
//! Otherwise a tracker reads and writes no memory of the program.
//!
//! Dropping a tracker lifts its protection, unregisters its ranges, and wakes their waiters. Where another handler fills
//! missing pages of the same memory ([`Options::read_elsewhere`]), ranges stay registered, since unregistered memory
//! shows zeros where pages are missing.
//!
//! A tracker works in the process that made it. In a forked child its methods fail with
//! [`Error::OtherProcess`](crate::Error::OtherProcess), and dropping it leaves the parent's tracker alone.
//!
//! # Sync mode: what to keep away from it
//!
//! A thread of the tracker lifts protection. It uses its stack and a little memory on the heap: track neither, or the
//! thread waits for itself. [`Options::user_mode_only`] says how system calls behave that write to tracked memory.

mod access;
mod changes;
pub(crate) mod options;
mod reset;
mod serve;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use self::access::AccessTracker;
use self::changes::Detector;
pub use self::changes::Ranges;
pub use self::options::{Mode, Options};
use self::serve::FaultThread;
use crate::pagemap::Categories;
use crate::watch::{Protection, Watch, ranges};
use crate::{Event, FaultKind, Result};

/// Statistics of a tracker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Bytes that are tracked.
    pub tracked: usize,
    /// Number of read faults that the tracker's thread has resolved: those of an [`AccessTracker`] in `Sync` mode, and on
    /// old kernels those of dropped pages.
    pub reads: u64,
    /// Number of write faults that the tracker's thread has resolved, in `Sync` mode.
    pub writes: u64,
}

/// What both trackers have in common.
#[derive(Debug)]
struct Tracker {
    watch: Arc<Watch>,
    mode: Mode,
    /// Ends before the ranges are unregistered: see `drop`.
    server: Option<FaultThread>,
}

impl Tracker {
    fn open(options: Options, protection: Protection) -> Result<Self> {
        let (watch, mode, server) = options.open(protection)?;
        Ok(Self { watch, mode, server })
    }

    fn tracked(&self) -> Vec<Range<usize>> {
        let mut merged: Vec<Range<usize>> = Vec::new();
        for tracked in self.watch.ranges().iter() {
            match merged.last_mut() {
                Some(last) if last.end == tracked.range.start => last.end = tracked.range.end,
                _ => merged.push(tracked.range.clone()),
            }
        }
        merged
    }

    /// Looks at what of `range` is tracked.
    fn look(&self, range: &Range<usize>, eye: Detector, reset: bool) -> Ranges<'_> {
        Ranges::new(&self.watch, ranges::within(&self.watch.ranges(), range), eye, reset)
    }

    fn resolve(&self, event: &Event) -> Result<bool> {
        self.watch.check_owner()?;
        let Event::Pagefault { kind, rw, addr, .. } = event else { return Ok(false) };
        let protected = match self.watch.protection {
            Protection::Write => FaultKind::WriteProtected,
            Protection::ReadWrite => FaultKind::ReadWriteProtected,
        };
        let ours = *kind == protected && ranges::at(&self.watch.ranges(), addr.addr()).is_some();
        if ours {
            self.watch.resolve(*kind, *rw, *addr)?;
        }
        Ok(ours)
    }

    fn statistics(&self) -> Statistics {
        let [reads, writes] = self.watch.faults.each_ref().map(|count| count.load(Ordering::Relaxed));
        let tracked = self.watch.ranges().iter().map(|tracked| tracked.range.len()).sum();
        Statistics { tracked, reads, writes }
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if !self.watch.owner.is_current() {
            if let Some(server) = self.server.take() {
                server.abandon(&self.watch);
            }
            return;
        }
        // Unregistering wakes all waiters, so no thread needs this one afterwards; but a page may be protected until
        // then. A forked child may keep the descriptor open, so closing it isn't enough.
        for range in self.tracked() {
            // A range that can't be unregistered is gone: the process has ended, or the descriptor is no userfaultfd.
            drop(self.watch.untrack(&range));
        }
        drop(self.server.take());
        if let Some(lease) = &self.watch.lease {
            lease.give_back();
        }
    }
}

/// Reports which pages were written since they were last taken.
///
/// ```
/// use userfaultfd::{DirtyTracker, Error, page_size};
///
/// let page = page_size();
/// let mut memory = memmap2::MmapMut::map_anon(16 * page)?;
/// let start = memory.as_ptr().addr();
/// let mut tracker = match DirtyTracker::new() {
///     Ok(tracker) => tracker,
///     Err(Error::UnsupportedFeatures { .. }) => return Ok(()), // an architecture without write protection
///     Err(error) => return Err(error.into()),
/// };
/// tracker.track(start..start + memory.len())?;
///
/// memory[3 * page] = 1;
/// memory[4 * page] = 1;
/// memory[9 * page] = 1;
/// assert_eq!(tracker.dirty_len()?, 3 * page);
///
/// let written = tracker.take().collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(written, [start + 3 * page..start + 5 * page, start + 9 * page..start + 10 * page]);
/// assert_eq!(tracker.dirty_len()?, 0); // until the next write
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// See the [module](crate::dirty) for what counts as written, and for what is dropped, moved, unmapped or forked.
///
/// # Nothing is lost
///
/// [`take`](Self::take) reports a page and resets it in one step: in `Async` mode one operation of the kernel does both;
/// in `Sync` mode the tracker reports a page that isn't protected before it protects it. So a program that copies each
/// range when `take` returns it misses nothing in the end, while other threads go on writing.
pub struct DirtyTracker(Tracker);

impl DirtyTracker {
    /// Returns a tracker for memory of this process, in the best mode that the kernel has.
    ///
    /// # Errors
    ///
    /// As [`with`](Self::with).
    pub fn new() -> Result<Self> {
        Self::with(Options::new())
    }

    /// Returns a tracker with the given options.
    ///
    /// # Errors
    ///
    /// - [`UnsupportedFeatures`](crate::Error::UnsupportedFeatures): the kernel lacks the mode, or the architecture
    ///   has no write protection.
    /// - [`OpenFailed`](crate::Error::OpenFailed): no userfaultfd could be opened; the error has the reason.
    /// - [`NoDescriptor`](crate::Error::NoDescriptor): a process was given without its [descriptor](Options::descriptor).
    /// - [`NoAccess`](crate::Error::NoAccess) for another [process](Options::process): it doesn't exist (`ENOENT`), or the caller
    ///   may not read its memory (`EACCES`, `EPERM`).
    /// - [`NeedsProtectionInPagemap`](crate::Error::NeedsProtectionInPagemap): [`read_elsewhere`](Options::read_elsewhere) in
    ///   `Sync` mode before Linux 5.13.
    /// - [`SystemError`](crate::Error::SystemError) with `ENOENT`: `/proc` isn't mounted; or with the errors of starting a thread.
    pub fn with(options: Options) -> Result<Self> {
        Tracker::open(options, Protection::Write).map(Self)
    }

    /// Returns the mode in which the tracker works.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// Tracks a range of addresses: every write from now on is reported.
    ///
    /// The range may span mappings and holes; memory that is mapped into a hole later isn't tracked. The bounds must be
    /// multiples of the page size, of the huge page size on hugetlb memory. The call takes some milliseconds for each GiB of
    /// present pages.
    ///
    /// It takes time for empty pages, too, where they must be protected in advance: 64 GiB take 0.6 s (Linux 6.18, x86-64, a
    /// virtual machine) and 128 MiB of page tables. In `Async` mode, holes of 32 MiB and more (16 page tables) in private
    /// anonymous memory aren't protected and cost nothing, unless the descriptor is
    /// [read elsewhere](Options::read_elsewhere).
    ///
    /// # Errors
    ///
    /// After an error nothing of the range is newly tracked.
    ///
    /// - [`AlreadyTracked`](crate::Error::AlreadyTracked): a part is tracked already.
    /// - [`MissingServed`](crate::Error::MissingServed): another handler fills missing pages of this private anonymous
    ///   memory, and the [descriptor](Options::descriptor) has no `WP_UNPOPULATED`.
    /// - [`OtherMemory`](crate::Error::OtherMemory): the tracker belongs to a [`LazyMemory`](crate::LazyMemory), and the
    ///   range doesn't.
    /// - Those of [`register_with_mode`](crate::Uffd::register_with_mode): `EINVAL` for memory that can't be tracked in this
    ///   mode (files other than memfd and tmpfs can in `Async` mode alone), for nothing mapped and for unaligned bounds;
    ///   `EBUSY` if another userfaultfd has registered it, with the [holder](crate::Refusal::holder) if that is known.
    pub fn track(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.track(&range)
    }

    /// Stops tracking a range, and forgets what was written there. Parts that aren't tracked, or aren't mapped any more, are
    /// skipped.
    ///
    /// # Errors
    ///
    /// [`InsidePage`](crate::Error::InsidePage): a bound lies inside a page; nothing was changed.
    /// Otherwise those of [`unregister`](crate::Uffd::unregister); the range is no longer tracked all the same.
    pub fn untrack(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.untrack(&range)
    }

    /// Returns the tracked ranges, ordered by address and merged.
    #[must_use]
    pub fn tracked(&self) -> Vec<Range<usize>> {
        self.0.tracked()
    }

    /// Returns the ranges that were written since they were tracked or taken, without resetting them.
    ///
    /// The iterator's errors are [`NotTracked`](crate::Error::NotTracked),
    /// [`TrackingFailed`](crate::Error::TrackingFailed), and [`SystemError`](crate::Error::SystemError) with `ENOMEM`
    /// or `ESRCH`.
    pub fn dirty(&self) -> Ranges<'_> {
        self.dirty_in(0..usize::MAX)
    }

    /// Returns the [`dirty`](Self::dirty) pages of a range.
    pub fn dirty_in(&self, range: Range<usize>) -> Ranges<'_> {
        self.0.look(&range, self.eye(), false)
    }

    /// Returns the ranges that were written since they were tracked or taken, and resets them: each page is reported and
    /// reset in one atomic step.
    ///
    /// Pages are reset as the iterator advances. Pages that it hasn't returned when it is dropped stay written. Errors are
    /// those of [`dirty`](Self::dirty); after one, every page that wasn't returned stays written.
    pub fn take(&mut self) -> Ranges<'_> {
        self.take_in(0..usize::MAX)
    }

    /// Returns and resets the written pages of a range, as [`take`](Self::take).
    pub fn take_in(&mut self, range: Range<usize>) -> Ranges<'_> {
        self.0.look(&range, self.eye(), true)
    }

    fn eye(&self) -> Detector {
        match self.0.mode {
            Mode::Async => Detector::scan(Categories::WRITTEN),
            Mode::Sync => Detector::words(),
        }
    }

    /// Makes a tracked range count as written in every [`dirty`](Self::dirty) and [`take`](Self::take), whatever the
    /// kernel reports: for [pinned memory](crate::dirty#pinned-memory). With `false` it counts as written once more, and
    /// then as any other memory does. Unmapped pages aren't reported.
    ///
    /// The bounds must be multiples of the page size, of the huge page size on hugetlb memory.
    ///
    /// ```
    /// use userfaultfd::{DirtyTracker, Error, page_size};
    ///
    /// let page = page_size();
    /// let memory = memmap2::MmapMut::map_anon(16 * page)?;
    /// let start = memory.as_ptr().addr();
    /// let mut tracker = match DirtyTracker::new() {
    ///     Ok(tracker) => tracker,
    ///     Err(Error::UnsupportedFeatures { .. }) => return Ok(()), // an architecture without write protection
    ///     Err(error) => return Err(error.into()),
    /// };
    /// tracker.track(start..start + memory.len())?;
    /// let buffers = start..start + 2 * page; // registered with io_uring
    /// tracker.set_always_dirty(buffers.clone(), true)?;
    /// for _ in 0..2 {
    ///     let written = tracker.take().collect::<Result<Vec<_>, _>>()?;
    ///     assert_eq!(written, [buffers.clone()]);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`NotTracked`](crate::Error::NotTracked): a part isn't tracked; nothing was changed.
    /// - [`InsidePage`](crate::Error::InsidePage): a bound lies inside a page; nothing was changed.
    /// - [`TrackingFailed`](crate::Error::TrackingFailed): the tracker has failed before.
    pub fn set_always_dirty(&mut self, range: Range<usize>, always: bool) -> Result<()> {
        self.0.watch.set_always(&range, always)
    }

    /// Returns the number of bytes, in whole pages, that were written since they were tracked or taken.
    ///
    /// # Errors
    ///
    /// As [`dirty`](Self::dirty).
    pub fn dirty_len(&self) -> Result<usize> {
        self.dirty().try_fold(0, |len, range| Ok(len + range?.len()))
    }

    /// Returns the statistics of the tracker.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.0.statistics()
    }

    /// Resolves a fault that another handler has read, if it is a write to a tracked page, and returns whether it was. See
    /// [`Options::read_elsewhere`].
    ///
    /// # Errors
    ///
    /// Those of [`remove_write_protection`](crate::Uffd::remove_write_protection), without `EAGAIN` and `ENOENT`: after
    /// these the writer is woken, and faults again if it must.
    pub fn resolve(&self, event: &Event) -> Result<bool> {
        self.0.resolve(event)
    }
}

impl fmt::Debug for DirtyTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyTracker")
            .field("mode", &self.mode())
            .field("statistics", &self.statistics())
            .finish()
    }
}
