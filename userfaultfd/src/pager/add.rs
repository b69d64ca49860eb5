//! Memory that comes to a pager: descriptors, and regions of theirs.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::fill::growth;
use super::memory::address_map::{AddressMap, Segment};
use super::memory::descriptor::{Attachment, Descriptor, Origin, addr_to_ptr, unwrap_last_arc, wake};
use super::memory::served::ServedRegion;
use super::memory::state_file::{Mark, StateFile};
use super::on_end::Guest;
use super::serve::vma_events;
use super::{DescriptorId, Error, Pager, Refused, Region, RegionId, Result, target};
use crate::holder::{Held, Holder};
use crate::lock_order::lock;
use crate::owner::Owner;
use crate::proc_maps::Process;
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

impl Pager {
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
    /// - with [`OnRemoval::Reload`](crate::pager::OnRemoval::Reload) or a [budget](Region::budget), the source has the same
    ///   content whenever a page is read again; with a budget all writes are of the kind that is seen.
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
        let state = origin.guest.as_ref().and_then(|guest| guest.state().cloned());
        let is_new = match state.as_ref().map_or(Ok(false), |state| keep_states(state, &layout)) {
            Ok(is_new) => is_new,
            Err(error) => {
                regions.iter().for_each(|region| self.keep_not(region));
                return Err(Refused { uffd: unwrap_last_arc(uffd), error: error.into() });
            }
        };
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
                if let Some(state) = state.filter(|_| is_new) {
                    state.remove();
                }
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
        let descriptor = self.of_id(descriptor)?;
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
        descriptor.mark(Mark::Regions);
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
        let limited = segment.region.residence.as_ref().filter(|residence| residence.places().is_some());
        let Some(residence) = limited else { return Ok(()) };
        residence.attach(&segment.region, segment.start, uffd, self.shared.evict_context())?;
        residence.enter_present(&segment.region.pages);
        Ok(())
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
            Some(residence) => {
                residence.attach(&segment.region, segment.start, &uffd, self.shared.evict_context())
            }
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
}

/// Applies what another pager has read into a file of states and perhaps not applied; then gives a new file a name, before
/// the first page is filled. Returns whether it is new.
fn keep_states(state: &StateFile, layout: &AddressMap) -> io::Result<bool> {
    if layout.segments().iter().any(|segment| segment.region.has_moved()) {
        state.mark(Mark::Moved);
    }
    state.settle(layout);
    state.publish()
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

/// Whether a region would have its addresses for itself. What the mapping of another one has grown by was filled with zeros
/// by then, where there was a fault.
fn check_overlap(layout: &AddressMap, range: &Range<usize>) -> Result<()> {
    let grown = layout.parts_of_holes(range.clone()).find(Segment::is_growth);
    // The part that they share may begin behind the start of the other region.
    let whole = |part: Segment| layout.find(part.start).map_or(part.start, |whole| whole.start);
    match layout.parts(range.clone()).next().map(whole).or(grown.map(|grown| grown.start)) {
        Some(other) => Err(Error::Overlap { address: range.start, other }),
        None => Ok(()),
    }
}
