//! What was written, and what is in use: [`DirtyTracker`] and [`AccessTracker`].
//!
//! Both are told ranges of memory, and tell which pages of them a program has written, or accessed at all, since it
//! was last asked. Incremental backups, migration of virtual machines, garbage collectors and checkpoints want the
//! first; tiering of memory, and estimates of how much a program needs, the second.
//!
//! | | tells | since Linux | an access costs |
//! | --- | --- | --- | --- |
//! | [`DirtyTracker`], [`Mode::Async`] | pages written | 6.7 | a short page fault |
//! | [`DirtyTracker`], [`Mode::Sync`] | pages written | 5.7 private anonymous, 5.19 shared and hugetlb memory | a wake-up of the tracker's thread and back |
//! | [`AccessTracker`], either mode | pages read or written | 7.3 | the same |
//!
//! That is the first access to a page after it was reset; all others cost nothing.
//!
//! # What counts as written
//!
//! A page that a store of the program has changed, or a system call on its behalf, through **the mapping that is
//! tracked**. What comes through another mapping of the same file, or by write(2) to it, is not seen; nor is what is
//! written to [pinned memory](#pinned-memory).
//! The page is a page of the memory: of the base size, of a huge page on hugetlb memory. Transparent huge pages are
//! split when they are written, and told by the base page.
//!
//! The answer is the same in both modes:
//!
//! | | |
//! | --- | --- |
//! | a page nobody has touched | isn't written, and is when it is |
//! | a page that is read only | isn't written |
//! | `MADV_DONTNEED`, `MADV_FREE` on private anonymous memory | dropped pages are written: what they held is gone. Of a large hole, in `Async` mode, what was written and dropped since the last look is zero as before, and isn't |
//! | the same on other memory, `MADV_REMOVE`, holes punched into a file | isn't seen; the next write is |
//! | munmap(2) | those pages are told no more |
//! | another mapping in the same place | [`Error::NotTracked`](crate::Error::NotTracked) |
//! | mremap(2) to elsewhere | as munmap(2); track the new place |
//! | fork(2) | the parent goes on as before; the child isn't tracked; from Linux 5.19 to 6.3 it hangs if it writes to protected [hugetlb memory](crate::Uffd::write_protect) |
//! | mprotect(2), also to `PROT_NONE` | isn't seen; pages stay tracked |
//! | mlock(2), `MADV_POPULATE_WRITE` of pages that can be written | is a write in `Async` mode: the kernel makes them writable ahead. In `Sync` mode the pages are written likewise, or the call fails: see [`Options::user_mode_only`] |
//! | swapping, compaction, page migration | isn't seen |
//!
//! A write that is made while [`take`](DirtyTracker::take) is at work is told by it or by the next one, never by none.
//! In `Sync` mode it may be told by both.
//!
//! # Memory with missing pages
//!
//! A range can be registered with one userfaultfd. Memory that a [`LazyMemory`](crate::LazyMemory) fills is tracked by
//! [`LazyMemory::tracker`](crate::LazyMemory::tracker); what a handler of one's own fills, by
//! [`Options::read_elsewhere`].
//!
//! # Pinned memory
//!
//! The kernel and devices write to pages that are pinned through no page table, so that no protection is in their way,
//! and nothing reports those writes: neither a tracker in any mode, nor a [`Series`](crate::snapshot::Series). Pinned are
//!
//! - buffers that are registered with io_uring (`IORING_REGISTER_BUFFERS`), as long as they are;
//! - the target of a read with `O_DIRECT`, from when it is submitted until it is complete: of one that was in flight when
//!   its page was reset, the data that arrives afterwards isn't seen;
//! - memory that is registered for RDMA, or mapped for a device by VFIO: all the memory of a virtual machine that a
//!   device is passed to;
//! - pages that a driver holds by `pin_user_pages`, such as those of packet sockets and graphics memory of user pointers.
//!
//! A system call that is told an ordinary buffer, such as read(2), writes through the page table and is seen.
//! [`DirtyTracker::set_always_dirty`] has pinned ranges count as written in every look;
//! [`Series::set_always_dirty`](crate::snapshot::Series::set_always_dirty) saves them in every snapshot.
//!
//! # What is safe, and why
//!
//! All of it. Protection decides when a thread waits and never what it reads, as in the rest of this crate. Where a
//! kernel can't protect pages that are empty (private anonymous memory before Linux 6.4) the kernel's page of zeros
//! is put there, which is what they hold already: never where another handler fills missing pages, nor where memory was
//! mapped anew since. No memory of the program is read or written.
//!
//! A tracker that is dropped lifts its protection, unregisters its ranges, and wakes their waiters. Where another handler
//! fills missing pages of the same memory ([`Options::read_elsewhere`]), ranges stay registered: memory that isn't shows
//! zeros where pages are missing.
//!
//! A tracker works in the process that made it. In the child of a fork its methods fail with
//! [`Error::OtherProcess`](crate::Error::OtherProcess), and dropping it leaves the parent's alone.
//!
//! # Sync mode: what to keep away from it
//!
//! A thread of the tracker lifts protection. It allocates nothing and takes no lock for long, but it has a stack and
//! a little memory on the heap: track neither, or it waits for itself. [`Options::user_mode_only`] says what becomes
//! of system calls that write to tracked memory.

mod access;
mod changes;
pub(crate) mod options;
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

/// What a tracker has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes that are tracked.
    pub tracked: usize,
    /// Read faults handled: of an [`AccessTracker`] in `Sync` mode; on old kernels of dropped pages.
    pub reads: u64,
    /// Write faults handled, in `Sync` mode.
    pub writes: u64,
}

/// What both trackers are.
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

    fn stats(&self) -> Stats {
        let [reads, writes] = self.watch.faults.each_ref().map(|count| count.load(Ordering::Relaxed));
        let tracked = self.watch.ranges().iter().map(|tracked| tracked.range.len()).sum();
        Stats { tracked, reads, writes }
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
        // Unregistering wakes everybody, so nobody needs the thread after that; but a page may be protected until
        // then. A fork's child may keep the descriptor open, so closing it isn't enough.
        for range in self.tracked() {
            // What can't be unregistered is gone: the process has ended, or the descriptor is none.
            drop(self.watch.untrack(&range));
        }
        drop(self.server.take());
        if let Some(lease) = &self.watch.lease {
            lease.give_back();
        }
    }
}

/// Which pages were written since they were last taken.
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
/// assert_eq!(tracker.count()?, 3 * page);
///
/// let written = tracker.take().collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(written, [start + 3 * page..start + 5 * page, start + 9 * page..start + 10 * page]);
/// assert_eq!(tracker.count()?, 0); // until the next write
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// See the [module](crate::dirty) for what counts as written, and for what is dropped, moved, unmapped or forked.
///
/// # Nothing is lost
///
/// [`take`](Self::take) tells a page and resets it in one step: in `Async` mode the kernel does both at once, in `Sync`
/// mode what isn't protected is told and then protected. So a program that copies what each `take` tells, as it
/// tells it, has everything in the end, while other threads go on writing.
pub struct DirtyTracker(Tracker);

impl DirtyTracker {
    /// Tracks memory of this process, in the best mode that the kernel has.
    ///
    /// # Errors
    ///
    /// As [`with`](Self::with).
    pub fn new() -> Result<Self> {
        Self::with(Options::new())
    }

    /// Tracks as the options say.
    ///
    /// # Errors
    ///
    /// - [`UnsupportedFeatures`](crate::Error::UnsupportedFeatures): the kernel lacks the mode, or the architecture
    ///   any write protection.
    /// - [`OpenFailed`](crate::Error::OpenFailed): no descriptor, and why.
    /// - [`SystemError`](crate::Error::SystemError) with `ENOENT` where `/proc` isn't mounted; of another process,
    ///   if there is none, `EACCES` or `EPERM` if its memory may not be read, `EBADF` without its descriptor;
    ///   `EOPNOTSUPP` to read events elsewhere in `Sync` mode before Linux 5.13; those of starting a thread.
    pub fn with(options: Options) -> Result<Self> {
        Tracker::open(options, Protection::Write).map(Self)
    }

    /// The mode that it works in.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// Tracks a range of addresses from now on: a write from now on is told.
    ///
    /// It may span mappings and holes; what is mapped into a hole later isn't tracked. The bounds are multiples of
    /// the page size, of the huge page size on hugetlb memory. Takes time with the size of what is there, some
    /// milliseconds a GiB.
    ///
    /// Of an empty reservation that is so, too, where its pages are protected before they are there: 64 GiB take 0.6 s
    /// (Linux 6.18, x86-64, a virtual machine) and 128 MiB of page tables. In `Async` mode holes of 32 MiB and more in private
    /// anonymous memory (16 page tables) are left out until something is there, and cost nothing, unless the descriptor
    /// is [read elsewhere](Options::read_elsewhere).
    ///
    /// # Errors
    ///
    /// [`AlreadyTracked`](crate::Error::AlreadyTracked) if a part is.
    /// [`MissingServed`](crate::Error::MissingServed): a [descriptor](Options::descriptor) without `WP_UNPOPULATED`, and
    /// private anonymous memory whose missing pages another handler fills.
    /// [`OtherMemory`](crate::Error::OtherMemory): the tracker is that of a [`LazyMemory`](crate::LazyMemory). Those of
    /// [`register_with_mode`](crate::Uffd::register_with_mode): `EINVAL` for memory that can't be tracked in this
    /// mode (files, other than memfd and tmpfs, can in `Async` mode alone), for nothing mapped and for unaligned
    /// bounds; `EBUSY` if another userfaultfd has it, with the [holder](crate::Refusal::holder) if that is known. Nothing
    /// is tracked then.
    pub fn track(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.track(&range)
    }

    /// Tracks what of a range is tracked no longer, and forgets what was written there. Parts that aren't tracked,
    /// or aren't mapped any more, are skipped.
    ///
    /// # Errors
    ///
    /// [`SystemError`](crate::Error::SystemError) with `EINVAL` if a bound lies inside a page: nothing is changed then.
    /// Otherwise those of [`unregister`](crate::Uffd::unregister), and it isn't tracked any longer all the same.
    pub fn untrack(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.untrack(&range)
    }

    /// What is tracked: ranges in order, merged.
    #[must_use]
    pub fn tracked(&self) -> Vec<Range<usize>> {
        self.0.tracked()
    }

    /// What was written since it was tracked or taken, without resetting it.
    ///
    /// The iterator's errors are [`NotTracked`](crate::Error::NotTracked),
    /// [`TrackingFailed`](crate::Error::TrackingFailed), and [`SystemError`](crate::Error::SystemError) with `ENOMEM`
    /// or `ESRCH`.
    pub fn dirty(&self) -> Ranges<'_> {
        self.dirty_in(0..usize::MAX)
    }

    /// [`dirty`](Self::dirty) of the pages in a range.
    pub fn dirty_in(&self, range: Range<usize>) -> Ranges<'_> {
        self.0.look(&range, self.eye(), false)
    }

    /// What was written since it was tracked or taken, and resets it, page by page in one atomic step.
    ///
    /// It is reset as the iterator goes on. What it didn't reach when it is dropped stays written; so does what it
    /// was about to tell. Errors are those of [`dirty`](Self::dirty), and leave everything written that was not told.
    pub fn take(&mut self) -> Ranges<'_> {
        self.take_in(0..usize::MAX)
    }

    /// [`take`](Self::take) of the pages in a range.
    pub fn take_in(&mut self, range: Range<usize>) -> Ranges<'_> {
        self.0.look(&range, self.eye(), true)
    }

    fn eye(&self) -> Detector {
        match self.0.mode {
            Mode::Async => Detector::scan(Categories::WRITTEN),
            Mode::Sync => Detector::words(),
        }
    }

    /// Has a tracked range count as written in every [`dirty`](Self::dirty) and [`take`](Self::take), whatever the
    /// kernel reports: for [pinned memory](crate::dirty#pinned-memory). With `false`, it counts as written once more, and
    /// then as any other memory does. Pages that are unmapped aren't told.
    ///
    /// The bounds are multiples of the page size, of the huge page size on hugetlb memory.
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
    /// [`NotTracked`](crate::Error::NotTracked) if a part isn't tracked.
    /// [`SystemError`](crate::Error::SystemError) with `EINVAL` if a bound lies inside a page. Nothing is changed then.
    /// [`TrackingFailed`](crate::Error::TrackingFailed).
    pub fn set_always_dirty(&mut self, range: Range<usize>, always: bool) -> Result<()> {
        self.0.watch.set_always(&range, always)
    }

    /// How many bytes were written, by whole pages, since they were tracked or taken.
    ///
    /// # Errors
    ///
    /// As [`dirty`](Self::dirty).
    pub fn count(&self) -> Result<usize> {
        self.dirty().try_fold(0, |count, range| Ok(count + range?.len()))
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// Handles a fault that was read elsewhere, if it is a write to a tracked page; tells whether it was. See
    /// [`Options::read_elsewhere`].
    ///
    /// # Errors
    ///
    /// Those of [`remove_write_protection`](crate::Uffd::remove_write_protection) but `EAGAIN` and `ENOENT`, where the
    /// writer is woken, to fault again if it must.
    pub fn resolve(&self, event: &Event) -> Result<bool> {
        self.0.resolve(event)
    }
}

impl fmt::Debug for DirtyTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyTracker").field("mode", &self.mode()).field("stats", &self.stats()).finish()
    }
}
