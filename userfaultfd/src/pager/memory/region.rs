//! [`Region`]: memory and the source of its content, as a program passes it to a pager.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use super::fault_around::{FaultAround, Streams};
use super::fault_log::Mode;
use super::page_cache::Cache;
use super::page_state::{Pages, Room};
use super::served::{Moved, ServedRegion};
use super::shared_image::SharedImage;
use crate::pager::evict::residence::Residence;
use crate::pager::stats::Tally;
use crate::pager::{Budget, Error, MissingRange, PageSource, Result};
use crate::source::call::catch_panic;
use crate::{FeatureFlags, IoctlFlags, RegisterMode, Support};

/// What a page shows after it was removed: see [`Region::on_removal`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnRemoval {
    /// Zeros, as without a pager: for a VM's balloon, and programs that give memory back.
    #[default]
    Zero,
    /// What the source has: for caches that drop pages themselves.
    Reload,
}

/// A range of memory that a pager fills from a source.
///
/// Page `i` of the range gets the source's content from byte [`offset`](Self::offset) + `i` × page size on.
///
/// ```
/// use userfaultfd::pager::{PageData, Region};
///
/// let source = |offset: u64, page: &mut [u8]| {
///     page.fill((offset >> 20) as u8);
///     Ok(PageData::Data)
/// };
/// let region = Region::new(0x7f00_0000_0000, 1 << 30, source).offset(1 << 40).block(64 << 10);
/// println!("{region:?}");
/// ```
#[must_use = "a region is served once it is added to a pager"]
pub struct Region {
    start: usize,
    len: usize,
    source: Arc<dyn PageSource>,
    /// Set by [`ask_source`](Self::ask_source).
    source_len: Option<u64>,
    is_async: bool,
    offset: u64,
    page_size: usize,
    around: FaultAround,
    write_protected: bool,
    minor: Option<(File, u64)>,
    image: Option<Arc<SharedImage>>,
    shared: bool,
    on_removal: OnRemoval,
    missing: Option<Vec<MissingRange>>,
    /// The budget, and where the spill file is made.
    limit: Option<Budget>,
    spill: Option<PathBuf>,
    /// Where its pages are, if a budget limits how many are in memory.
    pub(super) residence: Option<Arc<Residence>>,
    /// Counters of its own.
    tally: Option<Arc<Tally>>,
    /// Whether its faults are noted from the first on, and how.
    noting: Option<Mode>,
    /// Whether the memory's owner registers it.
    registered: bool,
    /// Where the states of its pages lie, if not in memory of the pager's own, and the first of them.
    states: Option<(Arc<Room>, usize)>,
}

impl Region {
    /// The source of the content.
    pub(crate) fn source(&self) -> Arc<dyn PageSource> {
        Arc::clone(&self.source)
    }

    /// Returns a region of `len` bytes of memory from address `start` on, in the address space of the descriptor with
    /// which it is added. Both must be multiples of the page size.
    ///
    /// The memory must be mapped: private anonymous memory, memfd, tmpfs, shared anonymous, or hugetlb memory. The
    /// pager registers it for missing faults, whether it is registered already or not.
    ///
    /// In a private mapping of a memfd a thread sees the file's pages, and faults where the file has none. Pages that the
    /// pager fills without a fault ([`fault_around`](Self::fault_around), background fills,
    /// [`finish`](crate::pager::Pager::finish)) get the source's content, which hides the file's. Before Linux 5.14 dropping
    /// a pager does the same to memory of another process.
    ///
    /// Pages that must come from the source must not be present yet. **Locked memory is present**: mlock(2) fills a range
    /// with zeros, and so do mlockall(2) with `MCL_FUTURE` and `MAP_POPULATE` for each new mapping. To avoid that, map the
    /// memory with `PROT_NONE`, unlock it, and then make it accessible; `mlock2` with `MLOCK_ONFAULT` locks it once it is
    /// registered. [`LazyMemory`](crate::LazyMemory) does all that.
    ///
    /// Where mremap(2) makes the mapping longer, the new part reads as zeros, as it would without a pager. No event reports
    /// the growth; the pager notices that the mapping goes on behind the region. The same holds for memory that the
    /// program itself registers with the same descriptor behind a served region, if the kernel merges both mappings: until
    /// that memory is added, its faults are resolved with zeros, and after the first of them it can't be added any more
    /// ([`Overlap`](crate::pager::Error::Overlap)). So leave registering to
    /// [`Pager::add_region`](crate::pager::Pager::add_region), or register the memory before you add the region in front of
    /// it: then its faults wait until it is added.
    pub fn new(start: usize, len: usize, source: impl PageSource + 'static) -> Self {
        Self {
            start,
            len,
            source: Arc::new(source),
            source_len: None,
            is_async: false,
            offset: 0,
            page_size: crate::page_size(),
            around: FaultAround::default(),
            write_protected: false,
            minor: None,
            image: None,
            shared: false,
            on_removal: OnRemoval::default(),
            missing: None,
            limit: None,
            spill: None,
            residence: None,
            tally: None,
            noting: None,
            registered: false,
            states: None,
        }
    }

    /// Returns a region of `len` bytes of memory from address `start` on that is a private mapping of an
    /// [image's file](SharedImage::file). The mapping begins at the file offset that [`offset`](Self::offset) sets, by
    /// default 0. All three are multiples of the page size.
    ///
    /// Pages that any region of the image has loaded are mapped without a read; others are loaded into the image first. A
    /// fault maps the pages around it as [`fault_around`](Self::fault_around) says. Writes are to copies that belong to the
    /// mapping alone. After `MADV_DONTNEED` a page shows the image again, whatever
    /// [`on_removal`](Self::on_removal) says.
    ///
    /// The range is registered for [`RegisterMode::MINOR`], too: the descriptor needs
    /// [`FeatureFlags::MINOR_SHMEM`] (Linux 5.14). [`minor`](Self::minor) is for memory that changes its file.
    ///
    /// Adding it fails with [`Register`](Error::Register) where the mapping is shared, which the kernel refuses for a sealed file, or isn't of
    /// a memfd, or where the descriptor or the kernel has no such faults.
    pub fn image(start: usize, len: usize, image: &Arc<SharedImage>) -> Self {
        let region = Self::new(start, len, Arc::clone(image));
        Self { image: Some(Arc::clone(image)), ..region }
    }

    /// Sets the offset in the source of the first page's content, in bytes. The default is 0.
    pub fn offset(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// Sets the page size of the memory, in bytes: the huge page size of hugetlb memory. The default is the
    /// [page size of the system](crate::page_size()).
    pub fn page_size(mut self, bytes: usize) -> Self {
        self.page_size = bytes;
        self
    }

    /// Sets how much is filled for one fault. The default is [`FaultAround::Adaptive`] with at most 2 MiB.
    pub fn fault_around(mut self, around: FaultAround) -> Self {
        self.around = around;
        self
    }

    /// Fills, for one fault, the block of `bytes` bytes that has the page: short for [`FaultAround::Block`].
    pub fn block(self, bytes: usize) -> Self {
        self.fault_around(FaultAround::Block(bytes))
    }

    /// Fills pages write-protected, so that the first write to each page faults, too; the pager counts the fault and lifts
    /// the protection. The range is registered for [`RegisterMode::WRITE_PROTECT`], too.
    ///
    /// Use it for a tracker of written pages that reads `/proc/PID/pagemap` and must not see the pager's own writes. Since
    /// Linux 5.7; for shared and hugetlb memory 5.19; for [`minor`](Self::minor) regions 6.4.
    pub fn write_protected(mut self) -> Self {
        self.write_protected = true;
        self
    }

    /// Fills pages by writing them to the file of which the memory is a shared mapping, and mapping them from the page
    /// cache. `file` is the memfd, or the file of hugetlbfs or tmpfs; `offset` is the file offset of the range's start, in
    /// bytes, a multiple of the page size.
    ///
    /// The range is registered for [`RegisterMode::MINOR`], too. Existing content of the file is ignored: the pager loads
    /// each page from the source before it is first mapped. Since Linux 5.14; for hugetlb memory 5.13.
    ///
    /// After a hole is punched, a page shows what the file holds: zeros (or see [`on_removal`](Self::on_removal)), unless
    /// another mapping or write(2) writes it. That
    /// includes pages that were never loaded, where the descriptor reports the removal. The kernel removes only huge pages
    /// that lie in the range as a whole. (On memfd and tmpfs that needs commit 73f37dbcfe17 of Linux 5.19, which 5.18.13 and
    /// 5.15.56 have, too: without it such an access waits until the page is written.)
    ///
    /// A write(2) to the file whose source is missing in memory of this pager may wait for ever: the kernel keeps the file
    /// locked until the page is there, and the pager writes pages to the file. Access such a source first.
    ///
    /// The file should not shrink while it is served: pages behind its end are poisoned. Huge pages, and files opened for
    /// appending, are written by process_vm_writev(2) of this process to itself. Such memory is always [shared](Self::shared).
    ///
    /// The method is safe, because a shared mapping changes whenever any process writes to the file: the code that made a
    /// reference into such a mapping has vouched for that, and the pager is one more writer. It writes each missing page
    /// once, from this process, whatever process the memory belongs to; other mappings of the file see it, also in this
    /// process. Hold no reference into such a mapping except to data that may change: atomics, cells.
    pub fn minor(mut self, file: File, offset: u64) -> Self {
        self.minor = Some((file, offset));
        self.shared = true;
        self
    }

    /// Declares that the memory is a shared mapping (memfd, tmpfs, shared anonymous), so that after a fork parent and child
    /// fill the same pages. By default each fills its own.
    pub fn shared(mut self) -> Self {
        self.shared = true;
        self
    }

    /// Sets what a page shows after it was removed: by madvise(2), or by a hole that was punched into its file. The default is
    /// [`OnRemoval::Zero`].
    ///
    /// With [`OnRemoval::Reload`] the memory is a cache whose owner drops pages: what is dropped is read from the source again
    /// when it is accessed next, and by all that fills missing pages. What was written to it is lost.
    ///
    /// ```
    /// use userfaultfd::pager::{FileSource, OnRemoval, Pager, Region};
    /// use userfaultfd::{FeatureFlags, UffdBuilder};
    ///
    /// let page = userfaultfd::page_size();
    /// let path = std::env::current_exe()?;
    /// let mut memory = memmap2::MmapMut::map_anon(4 * page)?;
    /// let uffd = UffdBuilder::new().require_features(FeatureFlags::EVENT_REMOVE).create()?;
    /// let region = Region::new(memory.as_ptr().addr(), memory.len(), FileSource::open(&path)?);
    /// let pager = Pager::new()?;
    /// // SAFETY: bytes are good whatever they are, and no reference into the memory lives on while it is dropped.
    /// unsafe { pager.add_own(uffd, [region.on_removal(OnRemoval::Reload)]) }?;
    ///
    /// assert_eq!(memory[1..4], *b"ELF");
    /// memory[1..4].fill(b'.');
    /// // SAFETY: nothing is borrowed from the memory.
    /// unsafe { memory.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) }?;
    /// assert_eq!(memory[1..4], *b"ELF");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// **On shared memory** a page that the file has stays what it is: `MADV_DONTNEED` takes the mapping away, and another
    /// mapping or write(2) may fill a hole before the pager does. `MADV_REMOVE` and holes remove the page itself.
    ///
    /// **Events.** Make the descriptor with [`EVENT_REMOVE`](crate::FeatureFlags::EVENT_REMOVE). Without it, and for holes
    /// that fallocate(2) punches, which no event reports, a removed page counts as present until it is accessed: then it is
    /// loaded all the same, on private memory after a few faults that are woken in vain. But nothing that fills missing pages
    /// finds it: background fills, [`finish`](crate::pager::Pager::finish), the list of missing ranges.
    ///
    /// A removed page is listed as missing with its offset when the memory is handed over, so the next pager must have
    /// `Reload`, too. In a list that is passed to [`missing`](Self::missing), pages without an offset count as removed:
    /// with `Reload` they show what the source has at their place.
    pub fn on_removal(mut self, on_removal: OnRemoval) -> Self {
        self.on_removal = on_removal;
        self
    }

    /// Declares that the memory was served before, with the list of its missing ranges: the one that another pager
    /// [returns](crate::pager::Detached::missing) when it hands the memory over.
    ///
    /// All other pages count as present, and are never read from the source. The content of a missing range is at the
    /// range's own offset in the source; without an offset it is zeros. Parts outside of this region are ignored, so one
    /// list serves several regions. The list can come from another process: see [`MissingRange::new`].
    ///
    /// By default all pages count as missing. A present page then keeps its content until it is removed, unless the region
    /// is [minor](Self::minor).
    ///
    /// ```no_run
    /// use userfaultfd::pager::{Detached, FileSource, Pager, Region};
    ///
    /// fn hand_over(detached: Detached, to: &Pager, start: usize, len: usize) -> Result<(), Box<dyn std::error::Error>> {
    ///     let region = Region::new(start, len, FileSource::open("snapshot")?).missing(detached.missing());
    ///     to.add(detached.uffd, [region])?;
    ///     Ok(())
    /// }
    /// ```
    pub fn missing(mut self, missing: impl IntoIterator<Item = MissingRange>) -> Self {
        self.missing = Some(missing.into_iter().collect());
        self
    }

    /// Limits how much of the memory is resident, together with all else that shares the budget: see [`Budget`]. It must be
    /// [minor](Self::minor), so a shared mapping of a file that this process has open, of any process.
    ///
    /// Pages leave from outside: the pager protects a page, copies it from the file, and punches a hole there; the page
    /// comes back when a thread touches it. What was written since it was loaded goes to a [spill file](Self::spill), any
    /// other page is read again from the source, which must have the same content then. With a list of
    /// [missing](Self::missing) pages all others count from the start, as written ones.
    ///
    /// ```no_run
    /// use std::fs::File;
    /// use userfaultfd::Uffd;
    /// use userfaultfd::pager::{Budget, FileSource, Pager, Region};
    ///
    /// fn limit(pager: &Pager, uffd: Uffd, start: usize, len: usize, memfd: File) -> Result<Budget, Box<dyn std::error::Error>> {
    ///     let budget = Budget::new(512 << 20);
    ///     let region = Region::new(start, len, FileSource::open("image")?).minor(memfd, 0).budget(&budget);
    ///     pager.add(uffd, [region])?;
    ///     Ok(budget)
    /// }
    /// ```
    ///
    /// **All writes must be seen.** A write between the copy and the hole would be lost, so the memory must be written
    /// through the registered mapping alone. Other mappings of the file, write(2) to it, devices and io_uring with pinned
    /// pages don't go with a budget. Make the descriptor with
    /// [`EVENT_FORK`](crate::FeatureFlags::EVENT_FORK) if the process forks and the child writes, with
    /// [`EVENT_REMAP`](crate::FeatureFlags::EVENT_REMAP) and [`EVENT_UNMAP`](crate::FeatureFlags::EVENT_UNMAP) if it
    /// changes its mappings. What is in memory when it is unmapped stays in the file; what has left by then is gone.
    ///
    /// **Removal.** A page that the process removes by `MADV_REMOVE` reads as zeros, if the descriptor has
    /// [`EVENT_REMOVE`](crate::FeatureFlags::EVENT_REMOVE). The kernel reports `MADV_DONTNEED` alike: there a page that has
    /// left is zero, too, though its file would have it still, and `MADV_FREE`, which it then refuses. A hole that is punched without an event removes a page that
    /// is in memory, not one that has left.
    ///
    /// **Ends.** [`finish`](crate::pager::Pager::finish) is refused. When the memory is handed over
    /// ([`remove`](crate::pager::Pager::remove), [`detach`](crate::pager::Pager::detach)), what has left comes back first,
    /// whatever the budget: the next pager has no spill file. Its region must be [write-protected](Self::write_protected),
    /// as this one is. Dropping the pager poisons what has left. When the process
    /// ends, or the region is removed, the budget counts it no longer.
    ///
    /// Linux 6.4: earlier kernels can't map a page of a file protected. There are no such budgets of huge pages, nor with
    /// [`OnRemoval::Reload`].
    pub fn budget(mut self, budget: &Budget) -> Self {
        self.limit = Some(budget.clone());
        self.write_protected()
    }

    /// Sets the directory of the spill file of memory with a [budget](Self::budget). The file has no name there, and takes as
    /// much disk as was written of the memory. The default is the [temporary directory](std::env::temp_dir): where that is a
    /// tmpfs, what is spilled stays in memory.
    pub fn spill(mut self, dir: impl Into<PathBuf>) -> Self {
        self.spill = Some(dir.into());
        self
    }

    /// Makes the places of its pages, if a budget limits how many are in memory.
    pub(crate) fn limit(&mut self) -> Result<()> {
        let Some(budget) = self.limit.take() else { return Ok(()) };
        let dir = self.spill.take().unwrap_or_else(std::env::temp_dir);
        self.residence = Some(Arc::new(Residence::of_file(&budget, self.len / self.page_size, &dir)?));
        Ok(())
    }

    /// Checks that it goes with the budget, if it has one.
    fn check_budget(&self) -> Result<()> {
        let Some(budget) = &self.limit else { return Ok(()) };
        let refused = match (&self.minor, self.on_removal) {
            (None, _) => Some(("memory without a file", "pages leave by its file: see Region::minor")),
            _ if self.page_size != crate::page_size() => {
                Some(("memory of huge pages", "they are copied page by page"))
            }
            (_, OnRemoval::Reload) => Some(("Reload", "a page that has left isn't removed")),
            (Some(_), OnRemoval::Zero) => None,
        };
        match refused {
            Some((option, reason)) => Err(Error::NotWithBudget { option, reason }),
            None => budget.check(),
        }
    }

    /// Limits how many of its pages are in memory. They are filled protected.
    pub(crate) fn residence(mut self, residence: Arc<Residence>) -> Self {
        self.residence = Some(residence);
        self.write_protected()
    }

    /// Declares that the memory's owner registers it, perhaps later: the pager doesn't, and fills nothing there until it is touched.
    #[cfg(feature = "handoff")]
    pub(crate) fn registered_by_owner(mut self) -> Self {
        self.registered = true;
        self
    }

    /// The operations of memory that its owner registers: private anonymous memory. `None`: it must be registered here.
    pub(crate) fn ioctls_by_owner(&self) -> Option<IoctlFlags> {
        let supported = Support::probe().map(|support| support.features());
        let mut ioctls = IoctlFlags::COPY | IoctlFlags::ZEROPAGE | IoctlFlags::WAKE;
        ioctls.set(
            IoctlFlags::POISON,
            supported.is_ok_and(|supported| supported.contains(FeatureFlags::POISON)),
        );
        self.registered.then_some(ioctls)
    }

    /// Gives it counters of its own.
    #[cfg(feature = "handoff")]
    pub(crate) fn tally(mut self, tally: Arc<Tally>) -> Self {
        self.tally = Some(tally);
        self
    }

    /// Has the states of its pages lie in a mapping from `first` on. They may be there already.
    #[cfg(feature = "handoff")]
    pub(crate) fn states(mut self, states: Arc<Room>, first: usize) -> Self {
        self.states = Some((states, first));
        self
    }

    /// Notes its faults from the first on.
    #[cfg(feature = "handoff")]
    pub(crate) fn noting(mut self, mode: Option<Mode>) -> Self {
        self.noting = mode;
        self
    }

    /// The addresses of the region.
    pub(crate) fn range(&self) -> Range<usize> {
        self.start..self.start.saturating_add(self.len)
    }

    /// Whether its content is put into a file, and mapped from there.
    fn has_cache(&self) -> bool {
        self.minor.is_some() || self.image.is_some()
    }

    /// The modes for which the region must be registered.
    pub(crate) fn modes(&self) -> RegisterMode {
        let mut modes = RegisterMode::MISSING;
        modes.set(RegisterMode::WRITE_PROTECT, self.write_protected);
        modes.set(RegisterMode::MINOR, self.has_cache());
        modes
    }

    /// Asks the source for its length and its kind: once, and while nothing is locked. Turns its panic into an error.
    pub(crate) fn ask_source(&mut self) -> Result<()> {
        let asked = catch_panic(|| Ok((self.source.len(), self.source.as_async().is_some())));
        (self.source_len, self.is_async) =
            asked.map_err(|error| Error::Source { offset: self.offset, error })?;
        Ok(())
    }

    /// The missing parts of the region that were declared, with the pages of each.
    fn missing_parts(&self) -> impl Iterator<Item = (&MissingRange, Range<usize>)> {
        let (range, page) = (self.range(), self.page_size);
        self.missing.iter().flatten().filter_map(move |part| {
            let start = part.address.max(range.start);
            let end = part.address.saturating_add(part.len).min(range.end);
            let page_at = |address: usize| (address - range.start) / page;
            (start < end).then(|| (part, page_at(start)..page_at(end)))
        })
    }

    /// Checks the declared missing parts.
    fn check_missing(&self) -> Result<()> {
        let page = self.page_size;
        for (part, _) in self.missing_parts() {
            let MissingRange { address, len, offset, .. } = *part;
            if address % page != 0 || len % page != 0 {
                return Err(Error::Unaligned { address, len, page_size: page });
            }
            let Some(offset) = offset else { continue };
            let source_len = self.source_len.unwrap_or(u64::MAX);
            let available = source_len.checked_next_multiple_of(page as u64).unwrap_or(u64::MAX);
            if offset.checked_add(len as u64).is_none_or(|end| end > available) {
                return Err(Error::BeyondSource { address, len, offset, source_len });
            }
        }
        Ok(())
    }

    /// Checks the arguments, without the kernel. The source was asked for its length.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { start, len, page_size: page, .. } = *self;
        if !page.is_power_of_two() || page < crate::page_size() {
            return Err(Error::PageSize { address: start, page_size: page });
        }
        if len == 0 {
            return Err(Error::EmptyRegion { address: start });
        }
        if start % page != 0 || len % page != 0 || start.checked_add(len).is_none() {
            return Err(Error::Unaligned { address: start, len, page_size: page });
        }
        match self.around {
            FaultAround::Block(block) if block == 0 || block % page != 0 => {
                return Err(Error::Block { block, page_size: page });
            }
            _ => {}
        }
        if self.image.is_some() {
            let offset = self.offset;
            if self.minor.is_some() || page != crate::page_size() || offset % page as u64 != 0 {
                return Err(Error::FileRange { address: start, len, offset });
            }
        }
        if let Some((_, offset)) = self.minor {
            let end = offset.checked_add(len as u64).and_then(|end| i64::try_from(end).ok());
            if end.is_none() || offset % page as u64 != 0 {
                return Err(Error::FileRange { address: start, len, offset });
            }
        }
        if self.offset.checked_add(len as u64).is_none() {
            let (address, offset) = (start, self.offset);
            return Err(Error::BeyondSource { address, len, offset, source_len: u64::MAX });
        }
        if let Some(source) = self.source_len {
            let rest = source.saturating_sub(self.offset);
            let available = rest.checked_next_multiple_of(page as u64).unwrap_or(u64::MAX);
            if len as u64 > available {
                return Err(Error::BeyondSource {
                    address: start,
                    len,
                    offset: self.offset,
                    source_len: source,
                });
            }
        }
        self.check_budget()?;
        self.check_missing()
    }

    /// Checks for operations that the kernel lacks though it registers the memory for them.
    pub(crate) fn check_kernel(&self) -> Result<()> {
        if !(self.write_protected && self.has_cache()) {
            return Ok(());
        }
        // CONTINUE maps protected pages since Linux 6.4, like this feature; it has none of its own. Where the process may
        // not probe, the first fault shows it.
        let Ok(supported) = Support::probe().map(|support| support.features()) else { return Ok(()) };
        let missing = FeatureFlags::WP_UNPOPULATED.difference(supported);
        if missing.is_empty() {
            return Ok(());
        }
        let error = crate::Error::UnsupportedFeatures { missing, supported };
        Err(Error::Register { address: self.start, error })
    }

    /// Checks the operations that the kernel offers for the registered memory.
    pub(crate) fn check_ioctls(&self, offered: IoctlFlags) -> Result<()> {
        // Hugetlb memory is where zero pages can't be mapped.
        if offered.contains(IoctlFlags::ZEROPAGE) != (self.page_size == crate::page_size()) {
            return Err(Error::PageSize { address: self.start, page_size: self.page_size });
        }
        let mut needed = IoctlFlags::COPY | IoctlFlags::WAKE;
        needed.set(IoctlFlags::WRITE_PROTECT, self.write_protected);
        needed.set(IoctlFlags::CONTINUE, self.has_cache());
        let missing = needed.difference(offered);
        if missing.is_empty() { Ok(()) } else { Err(Error::MissingIoctls { address: self.start, missing }) }
    }

    /// Makes the part of the region that the pager keeps.
    pub(crate) fn serve(self, id: u64, offered: IoctlFlags) -> io::Result<ServedRegion> {
        let page = self.page_size;
        let count = self.len / page;
        let pages = match &self.states {
            None => Pages::new(count)?,
            Some((states, first)) => Pages::taken_over(Arc::clone(states), *first, count),
        };
        let mut moved = Vec::new();
        if self.missing.is_some() {
            pages.all_present();
        }
        for (part, part_pages) in self.missing_parts() {
            pages.set_missing(part_pages.clone(), part.offset.is_none());
            let first = self.start + part_pages.start * page;
            let Some(offset) = part.offset.map(|offset| offset + (first - part.address) as u64) else {
                continue;
            };
            if offset != self.offset + (part_pages.start * page) as u64 {
                moved.push(Moved { pages: part_pages, offset });
            }
        }
        moved.sort_by_key(|part| part.pages.start);
        // Each page has one place; its first range counts.
        moved.dedup_by(|next, before| next.pages.start < before.pages.end);
        // An image has its content still.
        let reloads = self.on_removal == OnRemoval::Reload && self.image.is_none();
        let cache = match self.image {
            Some(image) => Some(Cache::Image { image, offset: self.offset }),
            None => self.minor.map(|(file, offset)| Cache::new(file, offset, self.len, page)).transpose()?,
        };
        let served = ServedRegion {
            id,
            source_len: self.source_len,
            is_async: self.is_async,
            source: self.source,
            offset: self.offset,
            moved: moved.into(),
            page_shift: page.trailing_zeros(),
            around: self.around,
            streams: Streams::new(),
            write_protected: self.write_protected,
            residence: self.residence,
            lease: Arc::default(),
            held: OnceLock::new(),
            cache,
            shared: self.shared,
            reloads,
            zeropage: page == crate::page_size() && !self.write_protected,
            poison: offered.contains(IoctlFlags::POISON),
            pages,
            followed: None,
            tally: self.tally,
            is_childs: false,
            ending: AtomicBool::new(false),
            log: OnceLock::new(),
        };
        if let Some(mode) = self.noting {
            served.log()?.start(mode);
        }
        Ok(served)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("range", &format_args!("{:#x}..{:#x}", self.range().start, self.range().end))
            .field("page_size", &self.page_size)
            .field("around", &self.around)
            .field("offset", &self.offset)
            .field("source_len", &self.source.len())
            .field("modes", &self.modes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
impl ServedRegion {
    pub(crate) fn for_tests(id: u64, page: usize, pages: usize) -> Self {
        let page_size = page.max(crate::page_size());
        let zeros = |_: u64, _: &mut [u8]| Ok(crate::pager::PageData::Zero);
        let mut region = Region::new(page_size, pages * page_size, zeros);
        region.ask_source().expect("it doesn't fail");
        let mut served = region.serve(id, IoctlFlags::empty()).expect("memory for states");
        served.page_shift = page.trailing_zeros();
        served
    }
}
