//! The pager itself: its life, looking at it, and its ends.

#[cfg(feature = "tracking")]
use std::ops::Range;
use std::os::fd::{IntoRawFd, OwnedFd};
#[cfg(feature = "handoff")]
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::fill::retry::Deferred;
use super::memory::address_map;
#[cfg(feature = "tracking")]
use super::memory::address_map::Segment;
#[cfg(feature = "tracking")]
use super::memory::descriptor::addr_to_ptr;
use super::memory::descriptor::{Descriptor, unwrap_last_arc};
#[cfg(feature = "tracking")]
use super::memory::state_file::Mark;
use super::memory::unfillable::Unfillable;
use super::on_end::Guest;
use super::remove::check_budget;
use super::serve::control;
use super::serve::shared::Shared;
use super::serve::shutdown::{self, Drain, Patience};
use super::serve::worker_pool;
use super::thread::Thread;
use super::{
    DescriptorId, Detached, Error, MissingRange, OnEnd, PagerBuilder, Progress, RegionId, Result, Statistics,
};
#[cfg(feature = "tracking")]
use crate::lease::Lease;
use crate::lock_order::{RankedMutex, lock, rank};
#[cfg(feature = "tracking")]
use crate::sync_point::{Point, reach};
#[cfg(feature = "tracking")]
use crate::{RegisterMode, Uffd};

/// A set of threads that resolve faults: see the [module](super).
///
/// Dropping a pager poisons all missing pages that it serves and closes the descriptors: from then on an access to a page
/// that was never filled raises SIGBUS. A page that another mapping or write(2) has written to the memory's file isn't
/// missing (but see [`Region::minor`](super::Region::minor)). Linux before 6.6 has no poison: there dropping fills missing pages. A descriptor
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
    /// Where the states of pages are kept of processes that hand their memory over.
    #[cfg(feature = "handoff")]
    pub(super) state: Option<Arc<Path>>,
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
            state: self.state.clone(),
        }
    }

    /// Where the states of pages are kept of processes that hand their memory over.
    #[cfg(feature = "handoff")]
    pub(crate) fn state_dir(&self) -> Option<&Path> {
        self.state.as_deref()
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
        descriptor.mark(Mark::Tracked);
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

    pub(super) fn of_region(&self, region: RegionId) -> Result<Arc<Descriptor>> {
        let has = |descriptor: &Arc<Descriptor>| {
            !descriptor.segments(self.shared.outside_id(), Some(region.0)).is_empty()
        };
        self.shared.check_owner()?;
        self.shared.table.all().into_iter().find(has).ok_or(Error::NotServed)
    }

    pub(super) fn of_id(&self, descriptor: DescriptorId) -> Result<Arc<Descriptor>> {
        self.shared.check_owner()?;
        self.shared.table.find(descriptor.0).ok_or(Error::NotServed)
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

    /// Returns how long the oldest waiting fault has waited, or `None` if no fault waits. What waits in the kernel
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
    /// also learns which process that is, for the reasons of later refusals: see [`Uffd::set_process`](crate::Uffd::set_process).
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
        let descriptor = self.of_id(descriptor)?;
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
        let descriptor = self.of_id(descriptor)?;
        descriptor.set_guest(Arc::new(Guest::new(on_end, process)));
        Ok(())
    }

    /// Waits until no descriptor is left: all processes have ended, or all descriptors were removed, and no child of a fork
    /// is about to be served.
    ///
    /// The pager notices the end of a process within a second, or at once: see [`watch`](Self::watch). Problems are
    /// reported by then, unless [`on_problem`](PagerBuilder::on_problem) takes longer than 0.1 s.
    pub fn join(&self) {
        self.shared.wait_until_empty();
        if self.shared.check_owner().is_ok() {
            self.shared.fill.reports.wait();
        }
    }

    /// Fills all missing pages, unregisters all memory and closes the descriptors. Afterwards the memory is complete and
    /// needs no pager.
    ///
    /// All filled pages become resident. `progress` is called repeatedly, first with nothing done and last with all done.
    /// The pager goes on resolving faults meanwhile. A page that its source doesn't deliver is poisoned, and the error
    /// names it. A removed page isn't filled: it reads as zeros with a pager and without. Memory that is added meanwhile
    /// is finished, too. A [`LazyMemory`](crate::LazyMemory) with a tracker at work is filled, and stays served as long as it
    /// lives. Before Linux 7.2 it overwrites [guard pages](super#what-the-kernel-doesnt-report).
    ///
    /// # Errors
    ///
    /// - [`Poisoned`](Error::Poisoned): a source failed, so that some pages are poisoned. All others are filled, all memory
    ///   is unregistered, and the descriptors are closed.
    /// - [`Unfilled`](Error::Unfilled): a source fails, before Linux 6.6. The pager goes on serving all memory.
    /// - [`NotWithBudget`](Error::NotWithBudget): there is lazy memory that mustn't all be resident. The pager goes on serving
    ///   all memory.
    /// - [`OtherProcess`](Error::OtherProcess): another process made the pager.
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
    /// What has left memory with a [budget](super::Region::budget) and can't be read back is poisoned.
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
            let serving = self.shared.remove(&descriptor)?;
            descriptor.remove_state();
            Some(shutdown::detached(&descriptor, serving))
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
