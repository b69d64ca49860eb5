//! The pager itself: adding memory, looking at it, and its ends.

use std::ops::Range;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::evict::residence::Content;
use super::fill::growth;
use super::fill::retry::Deferred;
use super::memory::address_map::{self, AddressMap, Segment};
use super::memory::descriptor::{Attachment, Descriptor, Origin, addr_to_ptr, unwrap_last_arc, wake};
use super::memory::page_state::Pages;
use super::memory::served::ServedRegion;
use super::memory::unfillable::Unfillable;
use super::on_end::Guest;
use super::serve::control;
use super::serve::mailbox::Note;
use super::serve::shared::Shared;
use super::serve::shutdown::{self, Drain, Patience};
use super::serve::thread::Thread;
use super::serve::vma_events;
use super::serve::worker_pool;
use super::{
    DescriptorId, Detached, Error, MissingRange, OnEnd, PagerBuilder, Progress, Refused, Region, RegionId,
    Result, Statistics, Target, target,
};
#[cfg(feature = "tracking")]
use crate::RegisterMode;
use crate::holder::{Held, Holder};
#[cfg(feature = "tracking")]
use crate::lease::Lease;
use crate::lock_order::{RankedMutex, lock, rank};
use crate::owner::Owner;
use crate::proc_maps::Process;
#[cfg(feature = "tracking")]
use crate::sync_point::{Point, reach};
use crate::{Errno, FeatureFlags, Uffd, mapped_vec};

/// The caller that adds a descriptor, and so what memory it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Adder {
    /// A program, for memory of another process.
    Foreign,
    /// A program, for memory of this process.
    Own,
    /// A [`LazyMemory`](crate::LazyMemory).
    Lazy,
}

/// What was added to a pager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// The descriptor.
    pub descriptor: DescriptorId,
    /// Its regions, in the order in which they were given.
    pub regions: Vec<RegionId>,
}

/// A set of threads that resolve faults: see the [module](super).
///
/// Dropping a pager poisons all missing pages that it serves and closes the descriptors: from then on an access to a page
/// that was never filled raises SIGBUS. A page that another mapping or write(2) has written to the memory's file isn't
/// missing (but see [`Region::minor`]). Linux before 6.6 has no poison: there dropping fills missing pages. A descriptor
/// whose pages can't be filled either stays open while this process lives, so that an access waits.
/// [`finish`](Self::finish) and [`detach`](Self::detach) are the other ends, and [`OnEnd`] what dropping does instead.
#[derive(Debug)]
pub struct Pager {
    pub(super) shared: Arc<Shared>,
    /// Held while regions are added, so that two that overlap can't both be accepted.
    pub(super) adding: Arc<RankedMutex<(), { rank::REGION }>>,
    /// The control thread, the reports thread, then the workers.
    pub(super) threads: Vec<Thread>,
    /// Workers that were added later.
    pub(super) added: Arc<worker_pool::Added>,
    /// The longest time that a call waits for the kernel without progress.
    pub(super) patience: Duration,
}

impl Pager {
    /// Starts a pager with the default options: one worker at first, more as sources keep it waiting.
    ///
    /// # Errors
    ///
    /// [`System`](Error::System): failed to create a thread or a descriptor.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Another handle to the same pager. Dropping it does nothing; once the pager is dropped, it serves nothing.
    #[cfg(feature = "handoff")]
    pub(crate) fn handle(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            adding: Arc::clone(&self.adding),
            threads: Vec::new(),
            added: Arc::clone(&self.added),
            patience: self.patience,
        }
    }

    /// Whether a descriptor is served.
    #[cfg(feature = "handoff")]
    pub(crate) fn serves(&self, descriptor: DescriptorId) -> bool {
        self.shared.table.find(descriptor.0).is_some()
    }

    /// Waits until a descriptor isn't served any more.
    #[cfg(feature = "handoff")]
    pub(crate) fn wait_for(&self, descriptor: DescriptorId) {
        self.shared.table.wait_until_closed(descriptor.0);
    }

    /// Returns a builder with the default options.
    pub fn builder() -> PagerBuilder {
        PagerBuilder::default()
    }

    /// Serves memory of another process.
    ///
    /// The descriptor was made in that process, and came over a Unix socket, by fork(2) or with pidfd_getfd(2). Its
    /// handshake must be done. While it is served, it is non-blocking. Another owner of its description that changes that
    /// costs time, and before Linux 6.10 may keep the pager waiting.
    ///
    /// The pager registers each region for missing faults and the region's other modes, so the memory need not be
    /// registered before; if it is, then for the same modes. Faults that wait already are resolved. Don't register memory
    /// with a served descriptor yourself; use [`add_region`](Self::add_region): see [`Region::new`].
    ///
    /// # Errors
    ///
    /// [`Refused`], with the descriptor. Nothing of it is served then, though regions may be registered.
    ///
    /// - [`Overlap`](Error::Overlap), [`EmptyRegion`](Error::EmptyRegion), [`Unaligned`](Error::Unaligned),
    ///   [`PageSize`](Error::PageSize), [`Block`](Error::Block), [`BeyondSource`](Error::BeyondSource): the arguments of a
    ///   region are invalid.
    /// - [`Register`](Error::Register), [`MissingIoctls`](Error::MissingIoctls): the kernel refused the region. The error
    ///   has the reason if the process is known: see [`Uffd::set_process`].
    /// - [`TargetGone`](Error::TargetGone): the process has ended.
    /// - [`OwnMemory`](Error::OwnMemory): the descriptor and so the memory belong to this process; see
    ///   [`add_own`](Self::add_own).
    /// - [`System`](Error::System): failed to map memory for the states of pages.
    pub fn add(&self, uffd: Uffd, regions: impl IntoIterator<Item = Region>) -> Result<Added, Refused> {
        self.add_checked(uffd, regions.into_iter().collect(), Adder::Foreign, None)
    }

    /// Serves memory of this process, or of any.
    ///
    /// The first access to a page finds the source's content. A thread that waits for a page may hold any lock of the
    /// program: see [`PageSource`](super::PageSource).
    ///
    /// The pager's threads map memory at times, as any thread does. So map new memory over a region (`MAP_FIXED`) instead
    /// of unmapping it first: another mapping may come to lie in an unmapped place.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add), but for [`OwnMemory`](Error::OwnMemory).
    ///
    /// # Safety
    ///
    /// The caller must make sure that
    ///
    /// - the source's content is valid for the type of every reference into a page that is missing now, and no missing page
    ///   was seen with other content.
    /// - the same holds for zeros in pages that are removed later, as by `MADV_DONTNEED`, and for memory that is mapped in
    ///   the place of the regions before they are removed from the pager.
    /// - the program can bear SIGBUS on an access to a poisoned page.
    /// - the same holds for what the pager does later: it fills pages around a fault, and all of a region in the background
    ///   and at its [end](Self::finish); pages that mremap(2) moves take their content along and leave zeros; a mapping
    ///   that grows gets zeros.
    /// - for a [`minor`](Region::minor) region, the same holds for every other mapping of its file in this process: the
    ///   pager overwrites pages that count as missing in the file.
    /// - the list of [`missing`](Region::missing) pages, if there is one, is true of this memory.
    ///
    /// The kernel makes sure that no present page is filled, except pages of a file.
    #[expect(unsafe_code, reason = "the contract is the caller's")]
    pub unsafe fn add_own(
        &self,
        uffd: Uffd,
        regions: impl IntoIterator<Item = Region>,
    ) -> Result<Added, Refused> {
        self.add_checked(uffd, regions.into_iter().collect(), Adder::Own, None)
    }

    /// As [`add_own`](Self::add_own), for a [`LazyMemory`](crate::LazyMemory), which alone may end the service.
    ///
    /// # Safety
    ///
    /// As `add_own`.
    #[expect(unsafe_code, reason = "the contract is the caller's")]
    pub(crate) unsafe fn add_lazy(&self, uffd: Uffd, region: Region) -> Result<Added, Refused> {
        self.add_checked(uffd, vec![region], Adder::Lazy, None)
    }

    /// As [`add`](Self::add), for a process whose end is chosen before its first fault is read.
    #[cfg(feature = "handoff")]
    pub(crate) fn add_guest(
        &self,
        uffd: Uffd,
        regions: Vec<Region>,
        guest: Arc<Guest>,
    ) -> Result<Added, Refused> {
        self.add_checked(uffd, regions, Adder::Foreign, Some(guest))
    }

    fn add_checked(
        &self,
        uffd: Uffd,
        mut regions: Vec<Region>,
        adder: Adder,
        guest: Option<Arc<Guest>>,
    ) -> Result<Added, Refused> {
        if let Err(error) = self.shared.check_owner() {
            return Err(Refused { uffd, error });
        }
        if let Err(error) = regions.iter_mut().try_for_each(Region::ask_source) {
            return Err(Refused { uffd, error });
        }
        // Refused regions aren't dropped while this is locked: a source may own memory of this pager.
        let _sources: Vec<_> = regions.iter().map(Region::source).collect();
        let _adding = lock(&self.adding);
        let was_blocking = match uffd.is_nonblocking() {
            Ok(is_nonblocking) => !is_nonblocking,
            Err(error) => return Err(Refused { uffd, error: error.into() }),
        };
        self.add_all(uffd, regions, was_blocking, adder, guest).map_err(|Refused { uffd, error }| {
            let switched = if was_blocking { uffd.set_nonblocking(false) } else { Ok(()) };
            Refused { error: switched.err().map_or(error, Error::from), uffd }
        })
    }

    fn add_all(
        &self,
        uffd: Uffd,
        regions: Vec<Region>,
        was_blocking: bool,
        adder: Adder,
        guest: Option<Arc<Guest>>,
    ) -> Result<Added, Refused> {
        let prepared = AddressMap::try_with_room(regions.len()).ok_or_else(|| Errno::ENOMEM.into());
        let prepared = prepared.and_then(|mut layout| {
            for region in regions {
                check_overlap(&layout, &region.range())?;
                layout.insert(self.register(&uffd, None, region)?);
            }
            uffd.set_nonblocking(true)?;
            Ok(layout)
        });
        let layout = match prepared {
            Ok(layout) => layout,
            Err(error) => return Err(Refused { uffd, error }),
        };
        let is_own = target::is_own(&uffd);
        match (&is_own, layout.segments().first()) {
            (Ok(true), Some(first)) if adder == Adder::Foreign => {
                return Err(Refused { error: Error::OwnMemory { address: first.start }, uffd });
            }
            (Err(_), _) if adder == Adder::Foreign => {
                let error = if target::target_is_gone(&uffd, None) {
                    Error::TargetGone
                } else {
                    Error::from(is_own.unwrap_err())
                };
                return Err(Refused { uffd, error });
            }
            _ => {}
        }
        let is_lazy = adder == Adder::Lazy;
        let is_own = is_own.unwrap_or(false);
        let origin = Origin { guest, is_child: false, is_own, is_lazy, was_blocking };
        if origin.is_own {
            layout.segments().iter().for_each(hold);
        }
        let regions: Vec<_> = layout.segments().iter().map(|segment| Arc::clone(&segment.region)).collect();
        regions.iter().for_each(|region| self.shared.regions.keep(region));
        let uffd = Arc::new(uffd);
        if let Err(error) = layout.segments().iter().try_for_each(|segment| self.begin_limit(segment, &uffd))
        {
            regions.iter().for_each(|region| self.keep_not(region));
            return Err(Refused { uffd: unwrap_last_arc(uffd), error });
        }
        let serving = Attachment { uffd: Arc::clone(&uffd), layout: Arc::new(layout) };
        match self.shared.add(serving, origin) {
            Ok(descriptor) => {
                regions.iter().for_each(|region| serve_at(region, &descriptor));
                // Faults that another reader has read and not resolved are reported again.
                for segment in descriptor.segments(self.shared.outside_id(), None) {
                    wake(&uffd, segment.start..segment.end);
                }
                let mut regions: Vec<_> = regions.iter().map(|region| RegionId(region.id)).collect();
                regions.sort_unstable(); // numbered in the order in which they were given
                Ok(Added { descriptor: DescriptorId(descriptor.id), regions })
            }
            Err(error) => {
                regions.iter().for_each(|region| self.keep_not(region));
                // A worker may own it for a moment.
                Err(Refused { uffd: unwrap_last_arc(uffd), error })
            }
        }
    }

    /// Serves one more region of a descriptor.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add), and [`NotServed`](Error::NotServed) if the descriptor isn't served any more.
    pub fn add_region(&self, descriptor: DescriptorId, region: Region) -> Result<RegionId> {
        self.add_region_checked(descriptor, region, true)
    }

    /// Serves one more region of a descriptor that may belong to this process.
    ///
    /// # Errors
    ///
    /// As [`add_region`](Self::add_region), but for [`OwnMemory`](Error::OwnMemory).
    ///
    /// # Safety
    ///
    /// As [`add_own`](Self::add_own).
    #[expect(unsafe_code, reason = "the contract is the caller's")]
    pub unsafe fn add_own_region(&self, descriptor: DescriptorId, region: Region) -> Result<RegionId> {
        self.add_region_checked(descriptor, region, false)
    }

    fn add_region_checked(
        &self,
        descriptor: DescriptorId,
        mut region: Region,
        foreign: bool,
    ) -> Result<RegionId> {
        self.shared.check_owner()?;
        region.ask_source()?;
        // Dropped without a lock, as in `add`.
        let _source = region.source();
        let _adding = lock(&self.adding);
        self.add_one(descriptor, region, foreign)
    }

    fn add_one(&self, descriptor: DescriptorId, region: Region, foreign: bool) -> Result<RegionId> {
        let descriptor = self.shared.table.find(descriptor.0).ok_or(Error::NotServed)?;
        // What is read from now on is no older than the memory.
        let settled = vma_events::settle(&self.shared, &descriptor);
        let uffd = {
            let serving = descriptor.lock_shard(self.shared.outside_id());
            let serving = serving.as_ref().ok_or(Error::NotServed)?;
            check_overlap(&serving.layout, &region.range())?;
            if foreign && descriptor.is_own {
                return Err(Error::OwnMemory { address: region.range().start });
            }
            Arc::clone(&serving.uffd)
        };
        let _registering = descriptor.begin_registering(self.shared.outside_id());
        let segment = self.register(&uffd, descriptor.process.get().copied(), region)?;
        if descriptor.is_own {
            hold(&segment);
        }
        self.begin_limit(&segment, &uffd)?;
        drop(uffd);
        let (region, range) = (Arc::clone(&segment.region), segment.start..segment.end);
        self.shared.regions.keep(&region);
        let (mut refused, mut replaced) = (Ok(()), mapped_vec::none());
        let served = descriptor.change_layout(|layout| {
            // A move may have brought another mapping there meanwhile.
            refused = check_overlap(layout, &range);
            if refused.is_ok() && !layout.try_reserve(1) {
                refused = Err(Errno::ENOMEM.into());
            }
            if refused.is_ok() {
                if settled {
                    // A hole that is there isn't still to be unmapped: it is this memory.
                    layout.cut_holes(&range, &mut replaced);
                }
                layout.insert(segment);
            }
        });
        drop(replaced);
        let added = refused.and(if served { Ok(()) } else { Err(Error::NotServed) });
        added.inspect_err(|_| self.keep_not(&region))?;
        serve_at(&region, &descriptor);
        if let Some(serving) = &*descriptor.lock_shard(self.shared.outside_id()) {
            wake(&serving.uffd, range);
        }
        Ok(RegionId(region.id))
    }

    /// Has a budget count the pages of a segment that is about to be served.
    fn begin_limit(&self, segment: &Segment, uffd: &Arc<Uffd>) -> Result<()> {
        match segment.region.residence.as_ref().filter(|residence| residence.places().is_some()) {
            Some(residence) => residence.attach(&segment.region, segment.start, uffd, &self.shared),
            None => Ok(()),
        }
    }

    /// Keeps a region no longer, which was never served.
    fn keep_not(&self, region: &Arc<ServedRegion>) {
        if let Some(residence) = region.residence.as_ref().filter(|residence| residence.places().is_some()) {
            residence.detach();
        }
        self.shared.regions.keep_not(region);
    }

    /// Has budgets count no pages any more of the shared memory of a descriptor, or of one of its regions.
    fn end_limits(&self, descriptor: &Descriptor, region: Option<RegionId>) {
        let segments = descriptor.segments(self.shared.outside_id(), region.map(|region| region.0));
        self.shared.leave_budgets(|region| segments.iter().any(|segment| segment.region.id == region.id));
    }

    /// Brings back what has left of the shared memory of a descriptor, which is about to be handed over. Returns the parts
    /// that can't be read back.
    fn bring_back(&self, descriptor: &Arc<Descriptor>) -> Vec<(Segment, Range<usize>)> {
        self.end_limits(descriptor, None);
        let mut lost = Vec::new();
        for segment in descriptor.segments(self.shared.outside_id(), None) {
            let region = &segment.region;
            let Some(residence) = region.residence.as_ref().filter(|residence| residence.places().is_some())
            else {
                continue;
            };
            let has_left = |page: &usize| {
                let is_missing = region.pages.is_missing(*page) && !region.pages.is_removed(*page);
                is_missing && residence.content(*page) != Content::Source
            };
            let target = Target::Pager {
                shared: Arc::clone(&self.shared),
                descriptor: Arc::clone(descriptor),
                region: Arc::clone(region),
            };
            let mut next = segment.pages().start;
            while let Some(first) = (next..segment.pages().end).find(&has_left) {
                next =
                    (first..segment.pages().end).find(|page| !has_left(page)).unwrap_or(segment.pages().end);
                // It may not be served any more, since its process has ended.
                let _filled = target.fill_now(first..next);
                lost.extend((first..next).filter(&has_left).map(|page| (segment.clone(), page..page + 1)));
            }
        }
        lost
    }

    /// Checks a region, and registers it.
    fn register(&self, uffd: &Uffd, process: Option<Process>, mut region: Region) -> Result<Segment> {
        region.check()?;
        let Range { start, end } = region.range();
        if uffd.features().contains(FeatureFlags::SIGBUS) {
            return Err(Error::NoMessages);
        }
        region.check_kernel()?;
        if let Some(offered) = region.ioctls_by_owner() {
            let region = region.serve(self.shared.regions.new_id(), offered)?;
            return Ok(Segment { start, end, region: Arc::new(region), first: 0 });
        }
        let offered = uffd.register_in(process, addr_to_ptr(start), end - start, region.modes());
        let offered = offered.map_err(|error| match error.errno() {
            Some(Errno::ENOMEM | Errno::ESRCH) if target::target_is_gone(uffd, None) => Error::TargetGone,
            _ => Error::Register { address: start, error },
        })?;
        region.check_ioctls(offered)?;
        region.limit()?;
        let mut region = region.serve(self.shared.regions.new_id(), offered)?;
        let page = region.page_size();
        // Where the kernel doesn't say, it may be so.
        let followed = end.checked_add(page).and_then(|to| growth::is_one_mapping(uffd, end - page..to));
        region.followed = (followed != Some(false)).then_some(end);
        Ok(Segment { start, end, region: Arc::new(region), first: 0 })
    }

    /// Fills the missing pages of a region, and unregisters it.
    ///
    /// `progress` is called repeatedly, first with nothing done and last with all done.
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served.
    /// - [`Poisoned`](Error::Poisoned): its source failed, so that some pages are poisoned. All others are filled, and the
    ///   region is unregistered.
    /// - [`Unfilled`](Error::Unfilled): its source fails, before Linux 6.6. The pager goes on serving the region.
    pub fn finish_region(&self, region: RegionId, progress: impl FnMut(Progress)) -> Result<()> {
        let descriptor = self.of_region(region)?;
        check_budget(&self.shared, &descriptor, Some(region))?;
        let (mut poisoned, mut patience) = (Unfillable::default(), Patience::new(self.patience));
        let region_alone = [(Arc::clone(&descriptor), Some(region.0))];
        shutdown::fill(&self.shared, &region_alone, &mut patience, progress)?;
        let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
        // A missing page where nothing is mapped is no failure.
        poisoned.add(&segments, Pages::is_poisoned);
        // While a tracker is active, the region stays registered, and the pager resolves its protection faults.
        self.drop_region(&descriptor, region, |region| !region.lease.is_taken())?;
        poisoned.poisoned()
    }

    /// Lends a region to a tracker: fills protect their pages from now on, until the lease is given back. The whole region
    /// is registered for protection, too. Returns the descriptor for the protection, and the region's ranges.
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served any more.
    /// - [`Uffd`](Error::Uffd): [`AlreadyTracked`](crate::Error::AlreadyTracked).
    /// - [`Register`](Error::Register): the kernel can't protect such memory.
    #[cfg(feature = "tracking")]
    pub(crate) fn lend(&self, region: RegionId) -> Result<(Uffd, Arc<Lease>, Vec<Range<usize>>)> {
        let descriptor = self.of_region(region)?;
        let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
        let uffd = {
            let serving = descriptor.lock_shard(self.shared.outside_id());
            Arc::clone(&serving.as_ref().ok_or(Error::NotServed)?.uffd)
        };
        let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
        for Segment { start, end, .. } in &segments {
            let registered = uffd.register_with_mode(addr_to_ptr(*start), end - start, modes);
            registered.map_err(|error| Error::Register { address: *start, error })?;
        }
        let lease =
            segments.first().map(|segment| Arc::clone(&segment.region.lease)).ok_or(Error::NotServed)?;
        // While no fill runs, and once all is registered: the kernel refuses a protecting fill of other memory.
        let ends = segments
            .iter()
            .fold((usize::MAX, 0), |(start, end), segment| (start.min(segment.start), end.max(segment.end)));
        let mut refused = crate::Error::AlreadyTracked { start: ends.0, end: ends.1 }.into();
        let mut taken = false;
        reach(Point::BeforeLend, ends.0);
        // Not for a region that was given back meanwhile: `drop_region` looks at the lease.
        descriptor.with_all_shards(&mut |serving| {
            let is_served = serving.as_ref().is_some_and(|serving| {
                serving.layout.segments().iter().any(|segment| segment.region.id == region.0)
            });
            if !is_served {
                refused = Error::NotServed;
            } else if lease.take() {
                taken = true;
            }
        });
        if !taken {
            return Err(refused);
        }
        let ranges = segments.iter().map(|segment| segment.start..segment.end).collect();
        match uffd.try_clone() {
            Ok(uffd) => Ok((uffd, lease, ranges)),
            Err(error) => {
                lease.give_back();
                Err(error.into())
            }
        }
    }

    /// Poisons the missing pages of a region, and unregisters it.
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served, or belongs to a [`LazyMemory`](crate::LazyMemory).
    /// - [`Unfilled`](Error::Unfilled): pages are missing, before Linux 6.6. The pager goes on serving the region.
    pub fn remove_region(&self, region: RegionId) -> Result<()> {
        let descriptor = self.of_region(region)?;
        if descriptor.is_lazy {
            return Err(Error::NotServed);
        }
        self.end_limits(&descriptor, Some(region));
        let mut patience = Patience::new(self.patience);
        let left = shutdown::drain(
            &self.shared,
            &descriptor,
            Some(region.0),
            Drain::Poison,
            &mut patience,
            &mut |_| {},
        )?;
        if left > 0 {
            let mut failed = Unfillable::default();
            let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
            failed.add(&segments, Pages::is_failed);
            return Err(failed.unfilled(left));
        }
        self.drop_region(&descriptor, region, |_| true)
    }

    pub(super) fn of_region(&self, region: RegionId) -> Result<Arc<Descriptor>> {
        let has = |descriptor: &Arc<Descriptor>| {
            !descriptor.segments(self.shared.outside_id(), Some(region.0)).is_empty()
        };
        self.shared.table.all().into_iter().find(has).ok_or(Error::NotServed)
    }

    /// Unregisters a region, if `may_go` agrees while no fill runs.
    fn drop_region(
        &self,
        descriptor: &Descriptor,
        region: RegionId,
        may_go: impl Fn(&ServedRegion) -> bool,
    ) -> Result<()> {
        vma_events::settle_moves(&self.shared, descriptor);
        // Freed when the shards are unlocked again.
        let (mut gone, mut served) = (mapped_vec::none(), false);
        descriptor.with_all_shards(&mut |serving| {
            let Some(serving) = serving else { return };
            let mut of_it = serving.layout.segments().iter().filter(|segment| segment.region.id == region.0);
            if of_it.any(|segment| !may_go(&segment.region)) {
                served = true;
                return;
            }
            growth::adopt_all(descriptor, serving, region.0);
            let uffd = Arc::clone(&serving.uffd);
            let layout = serving.layout_mut();
            served = layout.take(region.0, &mut gone);
            let mut replaced = mapped_vec::none();
            // What stays registered is served on, as the kernel itself would.
            shutdown::unregister(&uffd, &gone, |part| layout.insert_hole(part, &mut replaced));
            mapped_vec::reserve(&mut gone, replaced.len());
            gone.extend(replaced);
        });
        drop(gone);
        self.shared.fill.in_flight.cancel(|_, run| run.region.id == region.0);
        self.shared.mailbox.post(Note::Ended);
        if served { Ok(()) } else { Err(Error::NotServed) }
    }

    /// Stops serving a descriptor, and returns it with the list of its missing pages. Waiting threads are woken, so that
    /// they fault again and the new owner reads their faults.
    ///
    /// The pager goes on serving children of its forks. If they share [`minor`](Region::minor) memory with it, hand them
    /// over, too, and to the same owner, as [`detach`](Self::detach) does: two pagers don't know which pages the other has
    /// loaded, and one would load pages again that were written since.
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the descriptor isn't served, or belongs to a [`LazyMemory`](crate::LazyMemory).
    /// - [`Unfilled`](Error::Unfilled): what has left memory with a [budget](Region::budget) can't be read back. The pager
    ///   goes on serving the descriptor, without the limit.
    pub fn remove(&self, descriptor: DescriptorId) -> Result<Detached> {
        self.remove_of(descriptor, false)
    }

    /// As [`remove`](Self::remove), called by the [`LazyMemory`](crate::LazyMemory) that owns the descriptor.
    pub(crate) fn remove_lazy(&self, descriptor: DescriptorId) -> Result<Detached> {
        self.remove_of(descriptor, true)
    }

    fn remove_of(&self, descriptor: DescriptorId, is_lazy: bool) -> Result<Detached> {
        self.shared.check_owner()?;
        // A thread that adds a region uses the descriptor meanwhile.
        let _adding = lock(&self.adding);
        let descriptor = self.shared.table.find(descriptor.0).filter(|found| found.is_lazy == is_lazy);
        let descriptor = descriptor.ok_or(Error::NotServed)?;
        let lost = self.bring_back(&descriptor);
        if !lost.is_empty() && !descriptor.is_closed() {
            let mut failed = Unfillable::default();
            let segments: Vec<_> = lost.iter().map(|(segment, pages)| segment.of_pages(pages)).collect();
            failed.add(&segments, Pages::is_failed);
            return Err(failed.unfilled(lost.len()));
        }
        let serving = self.shared.remove(&descriptor).ok_or(Error::NotServed)?;
        Ok(shutdown::detached(&descriptor, serving))
    }

    /// Waits for the fills of a region that the kernel has made: each is made and noted under one shard.
    pub(crate) fn wait_for_fills(&self, region: RegionId) {
        if let Ok(descriptor) = self.of_region(region) {
            descriptor.with_all_shards(&mut |_| {});
        }
    }

    /// Has a problem reported.
    pub(crate) fn report(&self, problem: super::Problem) {
        self.shared.fill.report(problem);
    }

    /// Has a budget count the pages of a lazy memory's region, which nobody has touched yet.
    pub(crate) fn attach_budget(&self, region: RegionId) -> Result<()> {
        let descriptor = self.of_region(region)?;
        let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
        let segment = segments.first().ok_or(Error::NotServed)?;
        let uffd = {
            let serving = descriptor.lock_shard(self.shared.outside_id());
            Arc::clone(&serving.as_ref().ok_or(Error::NotServed)?.uffd)
        };
        match &segment.region.residence {
            Some(residence) => residence.attach(&segment.region, segment.start, &uffd, &self.shared),
            None => Ok(()),
        }
    }

    /// Returns the missing ranges of a region, ordered by address.
    ///
    /// # Errors
    ///
    /// [`NotServed`](Error::NotServed): the region isn't served.
    pub fn missing(&self, region: RegionId) -> Result<Vec<MissingRange>> {
        let descriptor = self.of_region(region)?;
        let (thread, region) = (self.shared.outside_id(), Some(region.0));
        Ok(address_map::missing(&descriptor.segments(thread, region), &descriptor.holes(thread, region)))
    }

    /// Returns the descriptors that are served, with those of forked children, but without those of
    /// [`LazyMemory`](crate::LazyMemory), which the memory itself removes.
    #[must_use]
    pub fn descriptors(&self) -> Vec<DescriptorId> {
        let all = self.shared.table.all();
        all.iter().filter(|one| !one.is_lazy).map(|one| DescriptorId(one.id)).collect()
    }

    /// Returns counters, histograms of latencies, and the numbers of present and missing pages.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.shared.statistics()
    }

    /// Returns how long the fault has waited that has waited longest, or `None` if no fault waits. What waits in the kernel
    /// counts from when a worker reads it, and what is loaded from a source or deferred from when that began.
    ///
    /// It is looked up when it is asked for: nothing is counted for it while faults are resolved.
    #[must_use]
    pub fn oldest_fault(&self) -> Option<Duration> {
        self.shared.oldest_fault().map(|since| since.elapsed())
    }

    /// Watches `end`, so that the pager notices the end of a descriptor's process at once instead of within a second.
    ///
    /// `end` is a pidfd, or a socket or pipe whose other end that process alone has open. When it becomes readable or its
    /// other end is closed, the pager checks whether the process is gone, and goes on serving it if it isn't. By a pidfd it
    /// also learns which process that is, for the reasons of later refusals: see [`Uffd::set_process`].
    ///
    /// ```no_run
    /// use std::os::fd::OwnedFd;
    /// use userfaultfd::Uffd;
    /// use userfaultfd::pager::{FileSource, Pager, Region};
    ///
    /// # fn receive() -> (OwnedFd, OwnedFd, usize, usize) { unimplemented!() }
    /// let (uffd, socket, start, len) = receive();
    /// let pager = Pager::new()?;
    /// let region = Region::new(start, len, FileSource::open("snapshot")?);
    /// let added = pager.add(Uffd::from(uffd), [region])?;
    /// pager.watch(added.descriptor, socket)?;
    /// pager.join(); // returns as soon as the process has ended
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the descriptor isn't served.
    /// - [`System`](Error::System): `end` can't be polled.
    pub fn watch(&self, descriptor: DescriptorId, end: impl Into<OwnedFd>) -> Result<()> {
        let descriptor = self.shared.table.find(descriptor.0).ok_or(Error::NotServed)?;
        self.shared.watch(&descriptor, end.into())
    }

    /// Sets what becomes of a descriptor's process when its content can't be had: its source is given up, or the pager is
    /// dropped. The default is [`OnEnd::Poison`]. Children of its forks have the default again.
    ///
    /// `process` is a pidfd, for [`OnEnd::Kill`]. Workers use it as long as the descriptor is served.
    ///
    /// # Errors
    ///
    /// [`NotServed`](Error::NotServed): the descriptor isn't served.
    pub fn on_end(&self, descriptor: DescriptorId, on_end: OnEnd, process: Option<OwnedFd>) -> Result<()> {
        let descriptor = self.shared.table.find(descriptor.0).ok_or(Error::NotServed)?;
        descriptor.set_guest(Arc::new(Guest::new(on_end, process)));
        Ok(())
    }

    /// Waits until no descriptor is left: all processes have ended, or all descriptors were removed, and no child of a fork
    /// is about to be served.
    ///
    /// The pager notices the end of a process within a second, or at once: see [`watch`](Self::watch).
    pub fn join(&self) {
        self.shared.wait_until_empty();
    }

    /// Fills all missing pages, unregisters all memory and closes the descriptors. Afterwards the memory is complete and
    /// needs no pager.
    ///
    /// All filled pages become resident. `progress` is called repeatedly, first with nothing done and last with all done.
    /// The pager goes on resolving faults meanwhile. A page that its source doesn't deliver is poisoned, and the error
    /// names it. A removed page isn't filled: it reads as zeros with a pager and without. Memory that is added meanwhile
    /// is finished, too. A [`LazyMemory`](crate::LazyMemory) with a tracker at work is filled, and stays served as long as it
    /// lives.
    ///
    /// # Errors
    ///
    /// - [`Poisoned`](Error::Poisoned): a source failed, so that some pages are poisoned. All others are filled, all memory
    ///   is unregistered, and the descriptors are closed.
    /// - [`Unfilled`](Error::Unfilled): a source fails, before Linux 6.6. The pager goes on serving all memory.
    /// - [`NotWithBudget`](Error::NotWithBudget): there is lazy memory that mustn't all be resident. The pager goes on serving
    ///   all memory.
    /// - [`NotServed`](Error::NotServed): another process made the pager.
    pub fn finish(&self, mut progress: impl FnMut(Progress)) -> Result<()> {
        self.shared.check_owner()?;
        let (mut poisoned, mut patience) = (Unfillable::default(), Patience::new(self.patience));
        let mut lent = Vec::new();
        loop {
            self.shared.mailbox.wait_for_forks();
            let mut descriptors = self.shared.table.all();
            descriptors.retain(|descriptor| !lent.contains(&descriptor.id));
            if descriptors.is_empty() {
                return poisoned.poisoned();
            }
            descriptors.iter().try_for_each(|descriptor| check_budget(&self.shared, descriptor, None))?;
            let all: Vec<_> = descriptors.iter().map(|descriptor| (Arc::clone(descriptor), None)).collect();
            let filled = shutdown::fill(&self.shared, &all, &mut patience, &mut progress)?;
            // Memory that was added meanwhile isn't filled yet.
            let _adding = lock(&self.adding);
            for descriptor in &descriptors {
                if shutdown::give_back(&self.shared, descriptor, &filled, &mut poisoned) {
                    lent.push(descriptor.id);
                }
            }
            // Forks, and threads that add memory, have brought descriptors meanwhile.
        }
    }

    /// Stops the pager, and returns all descriptors with the lists of their missing pages. Waiting threads are woken, so
    /// that they fault again and the new owner reads their faults.
    ///
    /// What has left memory with a [budget](Region::budget) and can't be read back is poisoned.
    #[must_use = "closing the descriptors shows zeros where pages are missing"]
    pub fn detach(mut self) -> Vec<Detached> {
        if self.shared.owner.is_current() {
            for descriptor in self.shared.table.all() {
                for (segment, pages) in self.bring_back(&descriptor) {
                    shutdown::poison_pages(&self.shared, &descriptor, &segment, pages);
                }
            }
            self.stop_threads();
        }
        let descriptors = self.shared.table.all().into_iter();
        let detach = |descriptor: Arc<Descriptor>| {
            self.shared.remove(&descriptor).map(|serving| shutdown::detached(&descriptor, serving))
        };
        descriptors.filter_map(detach).collect()
    }

    /// Closes, in a forked child, its copy of a descriptor that the parent serves.
    pub(crate) fn abandon(&self, descriptor: DescriptorId) {
        self.shared.abandon(Some(descriptor.0));
    }

    /// Stops the threads, the workers first.
    fn stop_threads(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        self.shared.stop();
        let workers = self.threads.split_off(self.threads.len().min(2));
        let mut others = self.threads.drain(..);
        workers.into_iter().for_each(Thread::join);
        self.added.join();
        // No worker is left for what sources still answer, nor for the work that they have deferred.
        self.shared.fill.in_flight.cancel(|_, _| true);
        while let Some(Deferred { descriptor, work, .. }) = self.shared.retries.take_any() {
            self.shared.lease().give_up(&descriptor, work);
        }
        self.shared.mailbox.stop();
        others.next().into_iter().for_each(Thread::join);
        // The control thread does so while it runs.
        self.shared.leave_budgets(|_| true);
        self.shared.fill.reports.stop();
        others.for_each(Thread::join);
    }

    /// Ends a descriptor's process as was chosen. By default poisons the missing pages, or fills them where the kernel can't
    /// poison. Returns whether none is left, or no process that could see one.
    fn drain(&self, descriptor: &Arc<Descriptor>, patience: &mut Patience) -> bool {
        self.end_limits(descriptor, None);
        let is_covered = |drain| {
            matches!(shutdown::drain(&self.shared, descriptor, None, drain, patience, &mut |_| {}), Ok(0))
        };
        let is_covered = match descriptor.on_end() {
            // It was killed before, together with all others.
            OnEnd::Kill => descriptor.wait_for_end(),
            OnEnd::Poison => [Drain::Poison, Drain::FillOnce].into_iter().any(is_covered),
            OnEnd::Finish => [Drain::Fill, Drain::Poison].into_iter().any(is_covered),
            OnEnd::Leave => false,
        };
        is_covered || control::is_gone(descriptor, &self.shared)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        // A handle, or what is left of a pager that was detached.
        if self.threads.is_empty() {
            return;
        }
        if !self.shared.owner.is_current() {
            self.threads.drain(..).for_each(std::mem::forget);
            return self.shared.abandon(None);
        }
        // While the workers run, which read the events that fills wait for.
        let (mut uncovered, mut patience) = (Vec::new(), Patience::new(self.patience));
        loop {
            self.shared.mailbox.wait_for_forks();
            let mut descriptors = self.shared.table.all();
            descriptors.retain(|descriptor| !uncovered.contains(&descriptor.id));
            if descriptors.is_empty() {
                break;
            }
            for descriptor in descriptors.iter().filter(|descriptor| descriptor.on_end() == OnEnd::Kill) {
                descriptor.kill();
            }
            for descriptor in descriptors {
                if self.drain(&descriptor, &mut patience) {
                    drop(self.shared.remove(&descriptor));
                } else {
                    uncovered.push(descriptor.id);
                }
            }
            // Forks have brought descriptors meanwhile.
        }
        self.stop_threads();
        for descriptor in self.shared.table.all() {
            if let Some(serving) = self.shared.remove(&descriptor) {
                // Waiting threads go on waiting, instead of reading zeros.
                let _kept = unwrap_last_arc(serving.uffd).into_raw_fd();
            }
        }
    }
}

/// Notes where a region is served, whose shared memory a budget limits.
fn serve_at(region: &ServedRegion, descriptor: &Descriptor) {
    if let Some(places) = region.residence.as_ref().and_then(|residence| residence.places()) {
        places.serve_at(descriptor.slot);
    }
}

/// Enters the pager as the holder of memory of this process.
fn hold(segment: &Segment) {
    let Ok(owner) = Owner::current() else { return };
    let held = segment.region.held.get_or_init(|| Held::new(owner, Holder::Pager));
    held.set(std::iter::once(segment.start..segment.end));
}

/// Refuses to fill all of what a budget limits.
fn check_budget(shared: &Shared, descriptor: &Descriptor, region: Option<RegionId>) -> Result<()> {
    let segments = descriptor.segments(shared.outside_id(), region.map(|region| region.0));
    if segments.iter().any(|segment| segment.region.residence.is_some()) {
        let reason = "it would take all of the memory to be resident";
        return Err(Error::NotWithBudget { option: "filling all that is missing", reason });
    }
    Ok(())
}

/// Whether a region would have its addresses for itself. What the mapping of another one has grown by was filled with zeros
/// by then, where there was a fault.
fn check_overlap(layout: &AddressMap, range: &Range<usize>) -> Result<()> {
    let grown = layout.parts_of_holes(range.clone()).find(Segment::is_growth);
    match layout.parts(range.clone()).next().or(grown) {
        Some(other) => Err(Error::Overlap { address: range.start, other: other.start }),
        None => Ok(()),
    }
}
