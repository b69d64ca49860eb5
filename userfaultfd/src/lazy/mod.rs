//! [`LazyMemory`]: memory of this process that fills itself.

mod builder;
mod paged;
#[cfg(feature = "tracking")]
mod pristine;
pub(crate) mod sigbus;

pub use self::builder::LazyBuilder;
pub use self::paged::{CloseError, PagedBuilder, PagedMemory, PagedStatistics};
#[cfg(feature = "tracking")]
pub use self::pristine::{Pristine, PristineBuilder, ResetMethod, ResetReport};
pub use self::sigbus::builder::SigbusBuilder;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

#[cfg(feature = "tracking")]
use crate::dirty::{self, DirtyTracker};
use crate::error::Whole;
use crate::lease::Lease;
use crate::own_mapping::OwnMapping;
use crate::pager::evict::pins::PinTerm;
use crate::pager::memory::served;
use crate::pager::{
    self, BackgroundFill, DescriptorId, Error, FillOrder, MissingRange, PageSource, Pager, Progress,
    RegionId, SignalSafe, Statistics, Target, WorkingSet, WorkingSetRecorder, WorkingSetReplay,
};
#[cfg(feature = "snapshot")]
use crate::snapshot::{self, Series, Sink, Snapshot};

/// Memory of this process whose pages are read from a source on first access.
///
/// It dereferences to `[u8]`. The first access to a page reads that page from the source; a page that was never
/// accessed takes no memory, so the source may be larger than the machine's memory. Writes stay in memory: the source
/// isn't changed.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::FileSource;
///
/// let memory = LazyMemory::builder(FileSource::open("Cargo.toml")?).build()?;
/// println!("{} bytes, the last is {:?}", memory.len(), memory.last());
/// println!("{}", memory.statistics());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # When the source fails
///
/// The pager retries the read according to [`retry`](LazyBuilder::retry), then poisons the page: **an access to it
/// raises SIGBUS**, as for a mapped file whose disk fails. Linux before 6.6 has no poison: there the thread waits until
/// the source delivers. [`on_problem`](LazyBuilder::on_problem) is called in both cases.
///
/// [`try_populate`](Self::try_populate), [`read_at`](Self::read_at) and [`write_at`](Self::write_at) return an error
/// instead.
///
/// # System calls
///
/// Where the process may handle faults from kernel mode (see "Rights" in the [crate docs](crate#rights)), the memory
/// can be passed to system calls like any other. Elsewhere a system call that meets a missing page fails with `EFAULT`:
/// [`populate`](Self::populate) the range first. [`handles_kernel_faults`](Self::handles_kernel_faults) returns which of
/// the two applies.
///
/// A KVM guest accesses its memory in kernel mode, too. Without the right, `KVM_RUN` fails with `EFAULT`, or ends with
/// `KVM_EXIT_INTERNAL_ERROR` (an `InternalError` in VM monitors), when the guest meets a missing page. Build the memory
/// with [`handle_kernel_faults(true)`](LazyBuilder::handle_kernel_faults): it fails early and names the missing right.
///
/// # MADV_DONTNEED
///
/// After `madvise(MADV_DONTNEED)` the range reads as zeros, as on anonymous memory: the
/// source isn't read again. To have pages read again, drop the memory and build it anew.
///
/// # Locked memory
///
/// In a process that locks what it maps (`mlockall(MCL_FUTURE)`) the memory stays lazy: the kernel locks each page once
/// it is present. The whole length counts towards the limit of locked memory from the start.
///
/// # Forks
///
/// A forked child doesn't have the memory (`MADV_DONTFORK`): dereferencing it there panics, its methods fail with
/// [`OtherProcess`](pager::Error::OtherProcess), and an access through a reference from before the fork raises SIGSEGV,
/// instead of reading zeros. Dropping it there closes the child's copies of its descriptors, and nothing else.
///
/// # Locks
///
/// An access may wait for the source, whatever locks the accessing thread holds: see [`PageSource`].
pub struct LazyMemory {
    served: ServedBy,
    memory: OwnMapping,
    /// The states of its pages.
    region: Arc<served::ServedRegion>,
    len: usize,
    handles_kernel_faults: bool,
}

/// What fills the memory.
#[derive(Debug)]
enum ServedBy {
    Pager(Arc<Pager>, DescriptorId, RegionId, Arc<Lease>),
    /// A handler of SIGBUS, in each faulting thread.
    Sigbus(sigbus::Owned),
}

/// A region that its pager doesn't serve any more has been filled: nothing else ends the service of such memory.
fn ended<T>(result: pager::Result<T>) -> pager::Result<T> {
    result.map_err(|error| match error {
        Error::NotServed => Error::Filled,
        error => error,
    })
}

impl LazyMemory {
    /// Maps `len` bytes of memory with the content of a source.
    ///
    /// # Errors
    ///
    /// As [`LazyBuilder::build`].
    pub fn new(len: usize, source: impl PageSource + 'static) -> pager::Result<Self> {
        Self::builder(source).len(len).build()
    }

    /// Returns a builder. By default the memory is as long as the source, has pages of the system's size, and has a
    /// pager of its own.
    pub fn builder(source: impl PageSource + 'static) -> LazyBuilder {
        LazyBuilder::new(source)
    }

    /// Returns a builder for memory that the faulting thread itself fills, in a handler of SIGBUS.
    ///
    /// No other thread has to be woken for a fault, which is most of a fault's latency otherwise, and no pager is needed.
    ///
    /// ```
    /// use userfaultfd::LazyMemory;
    /// use userfaultfd::pager::MappedFileSource;
    ///
    /// let memory = LazyMemory::sigbus(MappedFileSource::open(std::env::current_exe()?)?).build()?;
    /// assert_eq!(memory[1..4], *b"ELF");
    /// assert_eq!(memory.statistics().missing_faults, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # What is different
    ///
    /// - System calls that meet a missing page always fail with `EFAULT`: [`populate`](Self::populate) the range first.
    ///   [`handles_kernel_faults`](Self::handles_kernel_faults) returns `false`.
    /// - A thread that has SIGBUS blocked must not touch a missing page: the kernel ends the process.
    /// - When the source fails (a file that has become shorter), the handler poisons the page without a retry. Before
    ///   Linux 6.6, which has no poison, each access to the page raises SIGBUS all the same.
    ///
    /// # The handler
    ///
    /// The first such memory installs the handler, which stays for the life of the process. It runs with all signals
    /// blocked, on the stack of the faulting thread, not on an alternate stack: the one of Rust's threads is too small for
    /// CPUs with large registers (AMX). So a thread with a small stack, such as a coroutine's, must keep free what the
    /// kernel pushes (`AT_MINSIGSTKSZ` of getauxval(3): 1 to 12 KiB) and 4 KiB more.
    ///
    /// The handler passes every other SIGBUS (a truncated mapped file, an unaligned access, a poisoned page, kill(2)) on to
    /// the action that was installed before: a handler is called with the arguments and the blocked signals it would have
    /// got; the default action ends the process. If that handler installs the default action, as the one of Rust's
    /// runtime does, or itself, this handler is installed again when it returns; until then a fault of another thread on
    /// a missing page ends the process.
    ///
    /// A handler that the program installs **later** replaces this one. It must call the action that sigaction(2) returned
    /// to it for each SIGBUS that it doesn't know; otherwise an access to a missing page is a crash.
    pub fn sigbus(source: impl SignalSafe + 'static) -> SigbusBuilder {
        SigbusBuilder::new(source)
    }

    /// Returns whether system calls can be passed missing pages of the memory.
    #[must_use]
    pub fn handles_kernel_faults(&self) -> bool {
        self.handles_kernel_faults
    }

    /// Fills a range, in bytes, and returns when it is filled. The part beyond the end of the memory is ignored. Of a range
    /// larger than the [budget](LazyBuilder::budget) each page is read from the source once, and some have left again.
    ///
    /// ```
    /// use std::io::Write;
    /// use userfaultfd::LazyMemory;
    /// use userfaultfd::pager::PageData;
    ///
    /// let memory = LazyMemory::new(1 << 20, |_: u64, page: &mut [u8]| {
    ///     page.fill(b'.');
    ///     Ok(PageData::Data)
    /// })?;
    /// memory.populate(0..5000);
    /// std::io::sink().write_all(&memory[..5000])?; // a file would do, too
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn populate(&self, range: Range<usize>) {
        let page = crate::page_size();
        let end = range.end.min(self.len);
        let mut at = range.start - range.start % page;
        while at < end {
            std::hint::black_box(self[at]);
            at += page;
        }
    }

    /// Fills a range as [`populate`](Self::populate) does, and returns an error where that raises SIGBUS: when the source
    /// doesn't deliver a page, or a page is poisoned already.
    ///
    /// The source is retried according to [`retry`](LazyBuilder::retry). Pages that it doesn't deliver stay missing, so
    /// that a later call can fill them.
    ///
    /// # Errors
    ///
    /// The error names the first page of the range that isn't present, by its offsets in the memory and in the source. It has
    /// the kind and the text of the source's error.
    pub fn try_populate(&self, range: Range<usize>) -> io::Result<()> {
        self.check_owner().map_err(io::Error::other)?;
        // Under a budget part by part, each of which stays until it was looked at.
        self.parts(self.within(range.start, range.len()))
            .try_for_each(|part| self.pin_for(&part, PinTerm::Part).map(drop))
    }

    /// The pages that some bytes are in.
    fn pages_of(&self, range: &Range<usize>) -> Range<usize> {
        let shift = self.region.page_shift;
        if range.is_empty() { 0..0 } else { range.start >> shift..((range.end - 1) >> shift) + 1 }
    }

    fn populate_pages(&self, pages: Range<usize>) -> io::Result<()> {
        let shift = self.region.page_shift;
        let states = &self.region.pages;
        // A page that another thread has claimed may be on its way out.
        let mut cause = None;
        if pages.clone().any(|page| states.is_missing(page) || states.is_loading(page)) {
            match self.target().and_then(|target| ended(target.fill_now(pages.clone()))) {
                Ok(error) => cause = error,
                Err(Error::Filled) => {}
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        match pages.into_iter().find(|page| states.is_missing(*page) || states.is_poisoned(*page)) {
            None => Ok(()),
            Some(page) => {
                let (at, offset) = (page << shift, self.region.offset_of(page));
                let place = format!("the page at byte {at:#x} of the memory, {offset:#x} of the source,");
                Err(match cause {
                    _ if states.is_poisoned(page) => io::Error::other(format!("{place} is poisoned")),
                    Some(error) => {
                        let text = format!("{place} can't be had from the source: {}", Whole(&error));
                        io::Error::new(error.kind(), text)
                    }
                    None => io::Error::other(format!("{place} can't be had from the source")),
                })
            }
        }
    }

    /// Copies bytes from `offset` of the memory into `buf`; a failing source is an error, not SIGBUS. Returns the number
    /// of bytes: less than `buf.len()` at the end of the memory, 0 beyond it.
    ///
    /// ```
    /// use userfaultfd::LazyMemory;
    /// use userfaultfd::pager::PageData;
    ///
    /// let mut memory = LazyMemory::new(1 << 20, |offset: u64, page: &mut [u8]| {
    ///     if offset >= 1 << 19 {
    ///         return Err(std::io::Error::other("the server is away"));
    ///     }
    ///     page.fill(7);
    ///     Ok(PageData::Data)
    /// })?;
    /// let mut bytes = [0; 10];
    /// assert_eq!((memory.read_at(5, &mut bytes)?, bytes), (10, [7; 10]));
    /// memory.write_at(5, b"written")?;
    /// let error = memory.read_at(1 << 19, &mut bytes).unwrap_err();
    /// assert!(error.to_string().contains("byte 0x80000 of the memory"), "{error}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`try_populate`](Self::try_populate); nothing was copied.
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> io::Result<usize> {
        self.check_owner().map_err(io::Error::other)?;
        let range = self.within(offset, buf.len());
        for part in self.parts(range.clone()) {
            let _pinned = self.pin_for(&part, PinTerm::Part)?;
            buf[part.start - range.start..part.end - range.start].copy_from_slice(&self[part]);
        }
        Ok(range.len())
    }

    /// Copies `buf` to `offset` of the memory; a failing source is an error, not SIGBUS. Returns the number of bytes: less
    /// than `buf.len()` at the end of the memory, 0 beyond it.
    ///
    /// # Errors
    ///
    /// As [`try_populate`](Self::try_populate), also for pages that would be overwritten whole; nothing was copied.
    pub fn write_at(&mut self, offset: usize, buf: &[u8]) -> io::Result<usize> {
        self.check_owner().map_err(io::Error::other)?;
        let range = self.within(offset, buf.len());
        for part in self.parts(range.clone()) {
            let pinned = self.pin_for(&part, PinTerm::Part)?.into_pages();
            let bytes = &buf[part.start - range.start..part.end - range.start];
            self[part].copy_from_slice(bytes);
            self.unpin(pinned, PinTerm::Part);
        }
        Ok(range.len())
    }

    /// Keeps a range resident as long as the guard lives, and fills what is missing of it. The range is in bytes, and cut
    /// to the memory. Memory without a [budget](LazyBuilder::budget) keeps all that it has, pinned or not.
    ///
    /// A pinned range can be given to system calls, and to io_uring for as long as it is pinned. A call that **writes** to
    /// it fails with `EFAULT` on memory that doesn't [handle kernel faults](Self::handles_kernel_faults), unless each page
    /// was written before, while it was pinned.
    ///
    /// ```
    /// use std::io::Write;
    /// use userfaultfd::LazyMemory;
    /// use userfaultfd::pager::{Budget, FileSource};
    ///
    /// let source = FileSource::open(std::env::current_exe()?)?;
    /// let memory = match LazyMemory::builder(source).budget(&Budget::new(1 << 20)).build() {
    ///     Ok(memory) => memory,
    ///     Err(error) => return Ok(println!("{error}")), // no write protection here
    /// };
    /// let pinned = memory.pin(0..100_000)?;
    /// std::io::sink().write_all(&pinned)?; // a file would do, too
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`try_populate`](Self::try_populate); `OutOfMemory`: more than half of the budget would be pinned.
    pub fn pin(&self, range: Range<usize>) -> io::Result<Pinned<'_>> {
        self.check_owner().map_err(io::Error::other)?;
        self.pin_for(&self.within(range.start, range.len()), PinTerm::Program)
    }

    /// Pins and fills a range, which is within the memory.
    fn pin_for(&self, range: &Range<usize>, term: PinTerm) -> io::Result<Pinned<'_>> {
        let pages = self.pages_of(range);
        let mut pinned = Pinned { memory: self, range: range.clone(), pages: None, term };
        if let Some(residence) = &self.region.residence {
            if !residence.pin(&pages, term) {
                let text = "more than half of the budget would be pinned";
                return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
            }
            pinned.pages = Some(pages.clone());
        }
        self.populate_pages(pages)?;
        Ok(pinned)
    }

    fn unpin(&self, pages: Option<Range<usize>>, term: PinTerm) {
        if let (Some(residence), Some(pages)) = (&self.region.residence, pages) {
            residence.unpin(&pages, term);
        }
    }

    /// A range in parts that can be pinned at once: all of it where there is no budget.
    fn parts(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let most =
            self.region.residence.as_ref().map(|residence| residence.max_run() << self.region.page_shift);
        let Range { start: mut next, end } = range;
        std::iter::from_fn(move || {
            let part = next..most.map_or(end, |most| end.min((next / most + 1) * most));
            next = part.end;
            (!part.is_empty()).then_some(part)
        })
    }

    /// Cuts a range to the memory.
    fn within(&self, offset: usize, len: usize) -> Range<usize> {
        let start = offset.min(self.len);
        start..start + len.min(self.len - start)
    }

    /// Returns a raw pointer to all bytes of the memory, for threads that write to different parts of it and for foreign
    /// code. An access through it fills pages as any other does.
    ///
    /// Writing through it is sound while the memory lives and nothing borrows the bytes that are written. A forked child
    /// must not use it.
    ///
    /// ```
    /// use userfaultfd::LazyMemory;
    /// use userfaultfd::pager::BytesSource;
    ///
    /// let memory = LazyMemory::builder(BytesSource::new([7; 100])).build()?;
    /// let raw = memory.as_raw_slice().cast::<u8>();
    /// // SAFETY: within the memory, of which nothing is borrowed.
    /// unsafe { raw.add(99).write(8) };
    /// assert_eq!(memory[98..], [7, 8]);
    /// # Ok::<(), userfaultfd::pager::Error>(())
    /// ```
    #[must_use]
    pub fn as_raw_slice(&self) -> *mut [u8] {
        std::ptr::slice_from_raw_parts_mut(self.memory.as_ptr(), self.len)
    }

    /// Fills all missing pages and ends the service: from then on no access faults, and no pager is needed.
    ///
    /// Afterwards the whole length is resident. `progress` is called repeatedly, first with nothing done and last with all
    /// done. A page that the source doesn't deliver is poisoned, and the error names it. While a [tracker](Self::tracker)
    /// is active, the pager goes on resolving the faults of its protection.
    ///
    /// # Errors
    ///
    /// - [`Poisoned`](pager::Error::Poisoned): the source failed, now or for a fault before, so that some pages are
    ///   poisoned. All others are filled.
    /// - [`Unfilled`](pager::Error::Unfilled): the source fails, before Linux 6.6.
    /// - [`Filled`](pager::Error::Filled): the memory was filled before.
    /// - [`OtherProcess`](pager::Error::OtherProcess): in a fork's child.
    pub fn fill(&self, progress: impl FnMut(Progress)) -> pager::Result<()> {
        self.check_owner()?;
        match &self.served {
            ServedBy::Pager(pager, _, region, _) => ended(pager.finish_region(*region, progress)),
            ServedBy::Sigbus(owned) => owned.lazy().fill(progress),
        }
    }

    /// Starts to fill the missing pages in the background: see [`BackgroundFill`].
    ///
    /// # Errors
    ///
    /// - [`Filled`](pager::Error::Filled): the memory was [filled](Self::fill) before.
    /// - [`System`](pager::Error::System): the thread couldn't be created.
    pub fn background(&self, order: FillOrder) -> pager::Result<BackgroundFill> {
        BackgroundFill::start(self.target()?, order)
    }

    /// Starts to record which pages are accessed, in order: see [`WorkingSetRecorder`].
    ///
    /// # Errors
    ///
    /// As [`Pager::record`].
    pub fn record(&self) -> pager::Result<WorkingSetRecorder> {
        WorkingSetRecorder::start(Arc::clone(self.target()?.region()))
    }

    /// Starts to fill a recorded working set: see [`WorkingSetReplay`].
    ///
    /// # Errors
    ///
    /// As [`Pager::replay`].
    pub fn replay(&self, set: &WorkingSet) -> pager::Result<WorkingSetReplay> {
        WorkingSetReplay::start(self.target()?, set)
    }

    /// Waits until all fills are noted that have been made: a thread that was woken by one may be faster.
    fn wait_for_fills(&self) {
        if let ServedBy::Pager(pager, _, region, _) = &self.served {
            pager.wait_for_fills(*region);
        }
    }

    fn region_id(&self) -> Option<RegionId> {
        match &self.served {
            ServedBy::Pager(_, _, region, _) => Some(*region),
            ServedBy::Sigbus(_) => None,
        }
    }

    /// Has its pager report a problem.
    fn report(&self, problem: pager::Problem) {
        if let ServedBy::Pager(pager, ..) = &self.served {
            pager.report(problem);
        }
    }

    /// Where its pages are, under a budget.
    #[cfg(test)]
    pub(crate) fn residence(&self) -> &Arc<crate::pager::evict::residence::Residence> {
        self.region.residence.as_ref().expect("it has a budget")
    }

    fn check_owner(&self) -> pager::Result<()> {
        if self.memory.is_here() { Ok(()) } else { Err(Error::OtherProcess) }
    }

    fn target(&self) -> pager::Result<Target> {
        self.check_owner()?;
        match &self.served {
            ServedBy::Pager(pager, _, region, _) => ended(pager.target(*region)),
            ServedBy::Sigbus(owned) if owned.lazy().is_closed() => Err(Error::Filled),
            ServedBy::Sigbus(owned) => Ok(Target::Sigbus(Arc::clone(owned.lazy()))),
        }
    }

    /// Returns a tracker of the pages that the program writes from now on, while the pager goes on filling missing pages.
    ///
    /// A page counts as written when the program writes it, not when it is filled; a poisoned page counts as written. For
    /// memory that was [filled](Self::fill), the tracker has a descriptor of its own, as one by
    /// [`DirtyTracker::new`](DirtyTracker::new). The tracker may outlive the memory; then it returns
    /// [`NotTracked`](crate::Error::NotTracked). It tracks this memory alone: while the pager fills the memory, other
    /// ranges are [`OtherMemory`](crate::Error::OtherMemory).
    ///
    /// Since Linux 6.7 it works in [`Mode::Async`](crate::dirty::Mode::Async). From Linux 5.13 to 6.6 it works in
    /// [`Mode::Sync`](crate::dirty::Mode::Sync): the pager's threads resolve the first write to each page, and a system
    /// call that writes to a protected page fails with `EFAULT` unless
    /// [`handles_kernel_faults`](Self::handles_kernel_faults).
    ///
    /// ```
    /// use userfaultfd::{Error, LazyMemory, page_size};
    /// use userfaultfd::pager::BytesSource;
    ///
    /// let page = page_size();
    /// let mut memory = LazyMemory::builder(BytesSource::new(vec![1; 16 * page])).build()?;
    /// let mut tracker = match memory.tracker() {
    ///     Ok(tracker) => tracker,
    ///     Err(error) => return Ok(println!("{error}")), // no write protection here
    /// };
    /// let start = memory.as_ptr().addr();
    /// assert_eq!(memory[9 * page], 1); // filled, and not written
    /// memory[3 * page] = 2; // filled, and written
    /// let written = tracker.take().collect::<Result<Vec<_>, _>>()?;
    /// assert_eq!(written, [start + 3 * page..start + 4 * page]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Uffd`](pager::Error::Uffd): [`AlreadyTracked`](crate::Error::AlreadyTracked), by another tracker; the errors of
    ///   [`DirtyTracker::with`] and [`DirtyTracker::track`], [`NeedsProtectionInPagemap`](crate::Error::NeedsProtectionInPagemap)
    ///   from Linux 5.7 to 5.12; `EBUSY` if the memory was
    ///   built by [`sigbus`](Self::sigbus) and isn't [filled](Self::fill) yet.
    /// - [`Register`](pager::Error::Register): the kernel can't protect such memory: before Linux 5.7, hugetlb memory
    ///   before 5.19.
    #[cfg(feature = "tracking")]
    pub fn tracker(&self) -> pager::Result<DirtyTracker> {
        self.check_owner()?;
        if self.region.residence.is_some() {
            let reason = "the budget uses the protection of pages itself";
            return Err(Error::NotWithBudget { option: "a tracker", reason });
        }
        let (options, ranges) = match &self.served {
            ServedBy::Pager(pager, _, region, _) => match pager.lend(*region) {
                Ok((uffd, lease, ranges)) => {
                    (dirty::Options::new().lease(uffd, lease, ranges.clone()), ranges)
                }
                Err(Error::NotServed) => self.own_tracker(),
                Err(error) => return Err(error),
            },
            ServedBy::Sigbus(_) => self.own_tracker(),
        };
        let mut tracker = DirtyTracker::with(options)?;
        for range in ranges {
            tracker.track(range)?;
        }
        Ok(tracker)
    }

    #[cfg(feature = "tracking")]
    fn own_tracker(&self) -> (dirty::Options, Vec<Range<usize>>) {
        (dirty::Options::new().user_mode_only(!self.handles_kernel_faults), vec![self.range()])
    }

    /// Fills all missing pages, then begins a snapshot: see [`Snapshot::begin`]. Use it to save memory that was restored
    /// from a snapshot.
    ///
    /// The snapshot shows the moment after the fill. The memory needs no pager from then on. A page that the source
    /// doesn't deliver is poisoned, and [`Gone`](crate::snapshot::Content::Gone) in the snapshot.
    ///
    /// ```
    /// use userfaultfd::LazyMemory;
    /// use userfaultfd::snapshot::{Error, SnapshotReader, SnapshotWriter};
    /// # use userfaultfd::pager::BytesSource;
    ///
    /// # let dir = std::env::temp_dir();
    /// # let path = dir.join(format!("{}.lazy-snapshot", std::process::id()));
    /// let mut memory = LazyMemory::builder(BytesSource::new(vec![1; 1 << 20])).build()?;
    /// memory[0] = 2;
    /// let snapshot = match memory.snapshot(SnapshotWriter::create(&path)?) {
    ///     Ok(snapshot) => snapshot,
    ///     Err(Error::Kernel(error)) => return Ok(println!("{error}")), // no write protection here
    ///     Err(error) => return Err(error.into()),
    /// };
    /// memory[1] = 3; // goes on at once
    /// snapshot.wait()?;
    /// let restored = LazyMemory::new(memory.len(), SnapshotReader::open(&path)?)?;
    /// assert_eq!(restored[..3], [2, 1, 1]);
    /// # drop(restored);
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Snapshot::begin`], and [`Fill`](snapshot::Error::Fill): the fill failed. [`Kernel`](snapshot::Error::Kernel)
    /// with [`AlreadyTracked`](crate::Error::AlreadyTracked): a [tracker](Self::tracker) is active.
    #[cfg(feature = "snapshot")]
    pub fn snapshot<S: Sink + 'static>(&self, sink: S) -> snapshot::Result<Snapshot<S>> {
        self.filled()?.begin(sink)
    }

    /// Fills all missing pages, and returns a [series of snapshots](Series), each of which saves the changes since the
    /// one before.
    ///
    /// # Errors
    ///
    /// As [`snapshot`](Self::snapshot), without the errors of a sink.
    #[cfg(feature = "snapshot")]
    pub fn series(&self) -> snapshot::Result<Series> {
        self.filled()?.series()
    }

    /// Fills all missing pages, and returns the options of a snapshot of the whole memory.
    #[cfg(feature = "snapshot")]
    fn filled(&self) -> snapshot::Result<snapshot::Options> {
        self.check_owner().map_err(snapshot::Error::Fill)?;
        let range = self.range();
        if matches!(&self.served, ServedBy::Pager(.., lease) if lease.is_taken()) {
            return Err(crate::Error::AlreadyTracked { start: range.start, end: range.end }.into());
        }
        match self.fill(|_| {}) {
            Ok(()) | Err(Error::Filled) => {}
            Err(error) => return Err(snapshot::Error::Fill(error)),
        }
        Ok(snapshot::Options::new().range(range).user_mode_only(!self.handles_kernel_faults))
    }

    /// The addresses of the memory, rounded up to whole pages.
    #[cfg(any(feature = "tracking", feature = "snapshot"))]
    fn range(&self) -> Range<usize> {
        let start = self.memory.as_ptr().addr();
        start..start + self.memory.len()
    }

    /// Returns the ranges that are missing, ordered by address.
    ///
    /// # Errors
    ///
    /// [`Filled`](pager::Error::Filled): the memory was [filled](Self::fill) before, so that nothing is missing.
    pub fn missing(&self) -> pager::Result<Vec<MissingRange>> {
        self.check_owner()?;
        match &self.served {
            ServedBy::Pager(pager, _, region, _) => ended(pager.missing(*region)),
            ServedBy::Sigbus(owned) => owned.lazy().missing(),
        }
    }

    /// Returns the statistics of the pager, for all memory that it serves; for memory without a pager, those of this
    /// memory.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        match &self.served {
            ServedBy::Pager(pager, ..) => pager.statistics(),
            ServedBy::Sigbus(owned) => owned.lazy().statistics(),
        }
    }
}

impl Deref for LazyMemory {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl DerefMut for LazyMemory {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[..self.len]
    }
}

impl AsRef<[u8]> for LazyMemory {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for LazyMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        // No reference to the memory is left, so missing pages may stay missing. The mapping is dropped after this.
        if let ServedBy::Pager(pager, descriptor, _, lease) = &self.served {
            if self.memory.is_here() {
                lease.end();
                if let Some(residence) = &self.region.residence {
                    residence.detach();
                }
                drop(pager.remove_lazy(*descriptor));
            } else {
                pager.abandon(*descriptor);
            }
        }
        // Handlers let go of it when `served` is dropped, which is before `memory`.
    }
}

/// A range of a [`LazyMemory`] that stays resident: see [`LazyMemory::pin`].
#[derive(Debug)]
#[must_use = "the range is pinned as long as this lives"]
pub struct Pinned<'a> {
    memory: &'a LazyMemory,
    range: Range<usize>,
    /// Those that are pinned, under a budget.
    pages: Option<Range<usize>>,
    term: PinTerm,
}

impl Pinned<'_> {
    /// Its pages, which stay pinned.
    fn into_pages(mut self) -> Option<Range<usize>> {
        self.pages.take()
    }
}

impl Deref for Pinned<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}

impl AsRef<[u8]> for Pinned<'_> {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if self.memory.memory.is_here() {
            self.memory.unpin(self.pages.take(), self.term);
        }
    }
}

impl fmt::Debug for LazyMemory {
    /// Leaves the content out: reading it would fill it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyMemory")
            .field("start", &self.memory.as_ptr())
            .field("len", &self.len)
            .field("handles_kernel_faults", &self.handles_kernel_faults)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "tracking"))]
mod tests {
    use super::*;
    use crate::FeatureFlags;
    use crate::dirty::Mode;
    use crate::pager::FaultAround;
    use crate::support::{has_features, require, test_name};

    /// As on older kernels: without asynchronous protection, and without protection of missing pages.
    #[test]
    fn old_kernels_track_lazy_memory_by_its_pager() {
        require!(FeatureFlags::PAGEFAULT_FLAG_WP);
        let page = crate::page_size();
        for protection in [FeatureFlags::WP_UNPOPULATED, FeatureFlags::empty()] {
            if !has_features(test_name!(), protection | FeatureFlags::WP_HUGETLBFS_SHMEM) {
                continue;
            }
            let source = |_: u64, bytes: &mut [u8]| {
                bytes.fill(1);
                Ok(pager::PageData::Data)
            };
            let builder =
                LazyMemory::builder(source).len(16 * page).fault_around(FaultAround::Block(2 * page));
            let mut memory = builder.protection(protection).build().unwrap();
            let start = memory.as_ptr().addr();
            assert_eq!(memory[0], 1);
            memory[4 * page] = 2;
            let mut tracker = memory.tracker().unwrap();
            assert_eq!(tracker.mode(), Mode::Sync);
            let mut take = || -> Vec<usize> {
                let ranges = tracker.take().map(Result::unwrap);
                ranges.flat_map(|range| (range.start - start) / page..(range.end - start) / page).collect()
            };
            assert_eq!(take(), [0; 0]);
            assert_eq!((memory[7 * page], take()), (1, vec![]), "filled");
            memory[0] = 3;
            memory[4 * page] = 3;
            memory[9 * page + 1] = 3;
            assert_eq!((take(), take()), (vec![0, 4, 9], vec![]));
            memory[9 * page + 1] = 4;
            assert_eq!((memory[9 * page], memory[9 * page + 1], take()), (1, 4, vec![9]));
            memory.fill(|_| {}).unwrap();
            assert_eq!(take(), [0; 0]);
            memory[10 * page] = 5;
            assert_eq!(take(), [10]);
            drop(tracker);
            memory[10 * page] = 6;
            assert!(memory[11 * page..].iter().all(|byte| *byte == 1));
        }
    }
}
