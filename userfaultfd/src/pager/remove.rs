//! Memory that leaves a pager: complete, poisoned, or with the list of its missing pages.

use std::ops::Range;
use std::sync::Arc;

use super::evict::residence::Content;
use super::fill::growth;
use super::memory::address_map::Segment;
use super::memory::descriptor::Descriptor;
use super::memory::page_state::Pages;
use super::memory::served::ServedRegion;
use super::memory::state_file::Mark;
use super::memory::unfillable::Unfillable;
use super::serve::mailbox::Note;
use super::serve::shared::Shared;
use super::serve::shutdown::{self, Drain, Patience};
use super::serve::vma_events;
use super::{DescriptorId, Detached, Error, Pager, Progress, RegionId, Result, Target};
use crate::lock_order::lock;
use crate::mapped_vec;

impl Pager {
    /// Fills the missing pages of a region, and unregisters it.
    ///
    /// `progress` is called repeatedly, first with nothing done and last with all done. Before Linux 7.2 it overwrites
    /// [guard pages](super#what-the-kernel-doesnt-report).
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served, or was removed meanwhile, which `progress` may do, too.
    ///   Pages that were filled before stay.
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

    /// Poisons the missing pages of a region, and unregisters it.
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served.
    /// - [`OfLazyMemory`](Error::OfLazyMemory): it belongs to a [`LazyMemory`](crate::LazyMemory).
    /// - [`Unfilled`](Error::Unfilled): pages are missing, before Linux 6.6. The pager goes on serving the region.
    pub fn remove_region(&self, region: RegionId) -> Result<()> {
        let descriptor = self.of_region(region)?;
        if descriptor.is_lazy {
            return Err(Error::OfLazyMemory);
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

    /// Unregisters a region, if `may_go` agrees while no fill runs.
    fn drop_region(
        &self,
        descriptor: &Descriptor,
        region: RegionId,
        may_go: impl Fn(&ServedRegion) -> bool,
    ) -> Result<()> {
        vma_events::settle_moves(&self.shared, descriptor);
        descriptor.mark(Mark::Regions);
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
    /// The pager goes on serving children of its forks. If they share [`minor`](super::Region::minor) memory with it, hand them
    /// over, too, and to the same owner, as [`detach`](Self::detach) does: two pagers don't know which pages the other has
    /// loaded, and one would load pages again that were written since.
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the descriptor isn't served.
    /// - [`OfLazyMemory`](Error::OfLazyMemory): it belongs to a [`LazyMemory`](crate::LazyMemory).
    /// - [`Unfilled`](Error::Unfilled): what has left memory with a [budget](super::Region::budget) can't be read back. The pager
    ///   goes on serving the descriptor, without the limit.
    pub fn remove(&self, descriptor: DescriptorId) -> Result<Detached> {
        self.remove_of(descriptor, false)
    }

    /// As [`remove`](Self::remove), called by the [`LazyMemory`](crate::LazyMemory) that owns the descriptor.
    pub(crate) fn remove_lazy(&self, descriptor: DescriptorId) -> Result<Detached> {
        self.remove_of(descriptor, true)
    }

    fn remove_of(&self, descriptor: DescriptorId, is_lazy: bool) -> Result<Detached> {
        // First: in a fork's child the lock may be held for ever.
        self.shared.check_owner()?;
        // A thread that adds a region uses the descriptor meanwhile.
        let _adding = lock(&self.adding);
        let descriptor = self.of_id(descriptor)?;
        if descriptor.is_lazy && !is_lazy {
            return Err(Error::OfLazyMemory);
        }
        let lost = self.bring_back(&descriptor);
        if !lost.is_empty() && !descriptor.is_closed() {
            let mut failed = Unfillable::default();
            let segments: Vec<_> = lost.iter().map(|(segment, pages)| segment.of_pages(pages)).collect();
            failed.add(&segments, Pages::is_failed);
            return Err(failed.unfilled(lost.len()));
        }
        let serving = self.shared.remove(&descriptor).ok_or(Error::NotServed)?;
        descriptor.remove_state();
        Ok(shutdown::detached(&descriptor, serving))
    }

    /// Has budgets count no pages any more of the shared memory of a descriptor, or of one of its regions.
    pub(super) fn end_limits(&self, descriptor: &Descriptor, region: Option<RegionId>) {
        let segments = descriptor.segments(self.shared.outside_id(), region.map(|region| region.0));
        self.shared.leave_budgets(|region| segments.iter().any(|segment| segment.region.id == region.id));
    }

    /// Brings back what has left of the shared memory of a descriptor, which is about to be handed over. Returns the parts
    /// that can't be read back.
    pub(super) fn bring_back(&self, descriptor: &Arc<Descriptor>) -> Vec<(Segment, Range<usize>)> {
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
}

/// Refuses to fill all of what a budget limits.
pub(super) fn check_budget(shared: &Shared, descriptor: &Descriptor, region: Option<RegionId>) -> Result<()> {
    let segments = descriptor.segments(shared.outside_id(), region.map(|region| region.0));
    if segments.iter().any(|segment| segment.region.residence.is_some()) {
        let reason = "it would take all of the memory to be resident";
        return Err(Error::NotWithBudget { option: "filling all that is missing", reason });
    }
    Ok(())
}
