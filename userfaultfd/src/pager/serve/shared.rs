//! What the threads of a pager share, and what takes several parts of it. Faults meet at none of its locks.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::iter;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Instant;

use super::backlog::Backlog;
use super::binding::Bindings;
use super::delivery::Spinner;
use super::mailbox::{Mailbox, Note, Stopped};
use super::poll::Poll;
use super::regions::Regions;
use crate::lock_order::{RankedMutex, lock, rank, try_lock};
use crate::owner::{InheritedFd, InheritedFds, Owner, abandon};
use crate::pager::activity::{Busy, ThreadCounts};
use crate::pager::bell::Bell;
use crate::pager::evict::context::EvictContext;
use crate::pager::fill::context::FillContext;
use crate::pager::fill::filler::PageFiller;
use crate::pager::fill::in_flight::InFlight;
use crate::pager::fill::lease::{FillerPool, Lease};
use crate::pager::fill::retry::RetryQueue;
use crate::pager::memory::descriptor::{Attachment, Descriptor, LOOK_SHARD, OUTSIDE_SHARDS, Origin};
use crate::pager::memory::served::ServedRegion;
use crate::pager::memory::table::Table;
use crate::pager::thread::StartBarrier;
use crate::pager::{DescriptorId, Error, Problem, Result, RetryPolicy, Statistics};
use crate::proc_maps;

pub(crate) struct Shared {
    pub(crate) owner: Owner,
    /// The numbers of what is served, for a fork's child.
    inherited: Arc<InheritedFds>,
    pub(crate) fill: FillContext,
    /// For what isn't done by the threads of the pager.
    fillers: FillerPool,
    /// What workers have put off.
    pub(crate) retries: Arc<RetryQueue>,
    /// What workers have taken on and not begun, by their places.
    backlogs: Box<[RankedMutex<Backlog, { rank::LAYOUT }>]>,
    pub(super) bindings: Bindings,
    pub(super) spinner: Spinner,
    pub(crate) started: StartBarrier,
    pub(super) poll: Poll,
    pub(crate) table: Arc<Table>,
    pub(crate) regions: Regions,
    pub(crate) mailbox: Mailbox,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The events, the faults and the deferred work of each worker that has any, by its place.
        let backlogs = self.backlogs.iter().enumerate();
        let backlogs = backlogs.map(|(place, backlog)| (place, try_lock(backlog).map(|held| held.counts())));
        let backlogs: Vec<_> = backlogs.filter(|(_, counts)| *counts != Some([0; 3])).collect();
        f.debug_struct("Shared")
            .field("threads", &self.fill.threads)
            .field("retry", &self.fill.retry)
            .field("descriptors", &self.table.all())
            .field("activities", &self.fill.activities)
            .field("in_flight", &self.fill.in_flight)
            .field("deferred", &self.retries)
            .field("backlogs", &backlogs)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new(threads: ThreadCounts, retry: RetryPolicy) -> Result<Self> {
        let (owner, bell, retries) =
            (Owner::current()?, Arc::new(Bell::new()?), Arc::new(RetryQueue::new()?));
        let in_flight = InFlight::new(owner, Arc::clone(&retries))?;
        let backlogs = iter::repeat_with(|| RankedMutex::new(Backlog::new())).take(threads.places());
        Ok(Self {
            owner,
            inherited: Arc::default(),
            fill: FillContext::new(threads, retry, Arc::clone(&bell), in_flight),
            fillers: FillerPool::new(),
            poll: Poll::new(retries.timer())?,
            retries,
            backlogs: backlogs.collect(),
            bindings: Bindings::new(threads.places(), Arc::clone(&bell)),
            spinner: Spinner::default(),
            started: StartBarrier::default(),
            table: Arc::new(Table::new(owner)),
            regions: Regions::default(),
            mailbox: Mailbox::new(bell)?,
        })
    }

    /// Returns an error in any process but the one that made the pager.
    pub(crate) fn check_owner(&self) -> Result<()> {
        if self.owner.is_current() { Ok(()) } else { Err(Error::OtherProcess) }
    }

    /// In a fork's child, which hasn't got the threads: closes the number of a descriptor that was served, or of all
    /// and of the pager's own. It takes no lock, since another thread may have held that when the process forked.
    #[expect(unsafe_code, reason = "closes what the threads have a share of")]
    pub(crate) fn abandon(self: &Arc<Self>, descriptor: Option<u64>) {
        abandon(self);
        // SAFETY: this is a child, without the threads, and every method of the pager is an error in it. The pager owned
        // the descriptors when the process forked, or else their numbers were forgotten; nothing that owns them is
        // dropped any more.
        unsafe { self.inherited.close(descriptor) };
        if descriptor.is_some() {
            return;
        }
        for fd in self.poll.fds().into_iter().chain(self.mailbox.fds()).chain([self.retries.timer()]) {
            // SAFETY: as above; they are asked for once, when the pager is dropped.
            unsafe { InheritedFd::new(fd).close() };
        }
    }

    /// The number by which threads that aren't the pager's look at layouts. They count nothing.
    pub(crate) fn outside_id(&self) -> usize {
        LOOK_SHARD
    }

    /// What a budget may know of this pager.
    pub(crate) fn evict_context(&self) -> EvictContext {
        EvictContext {
            retry: self.fill.retry,
            reports: Arc::clone(&self.fill.reports),
            table: Arc::clone(&self.table),
        }
    }

    /// A filler for a caller, or for a thread in the background.
    pub(crate) fn lease(&self) -> Lease<'_> {
        self.fillers.lease(&self.fill.counters)
    }

    /// The same, for a worker. `None`: there is no memory for one more.
    pub(crate) fn take_filler(&self) -> Option<PageFiller> {
        self.fillers.take(&self.fill.counters)
    }

    /// What the worker at a place has taken on and not begun.
    pub(crate) fn backlog(&self, place: usize) -> &RankedMutex<Backlog, { rank::LAYOUT }> {
        &self.backlogs[place]
    }

    /// Ends a worker that was added, with its place and the number of its filler.
    pub(crate) fn end_worker(&self, place: usize, number: usize) {
        self.fillers.put(number);
        self.bindings.end(place);
        self.fill.activities.free_place(place);
    }

    /// Begins to serve a descriptor.
    pub(crate) fn add(&self, serving: Attachment, origin: Origin) -> Result<Arc<Descriptor>> {
        let uffd = Arc::clone(&serving.uffd);
        let descriptor = self.table.add(|id, slot| {
            let shards = self.fill.threads.initial() + OUTSIDE_SHARDS + 1;
            let inherited = self.inherited.note(uffd.as_fd(), id);
            Descriptor::new((id, slot), serving, (shards, inherited), origin)
        });
        match self.poll.add(&descriptor, uffd.as_fd()) {
            Ok(()) => {
                // To look after its process from now on.
                self.mailbox.ring();
                Ok(descriptor)
            }
            Err(errno) => {
                drop(self.remove(&descriptor));
                Err(errno.into())
            }
        }
    }

    /// Ends serving a descriptor, and gives back what was served. `None` if another thread did so before.
    pub(crate) fn remove(&self, descriptor: &Arc<Descriptor>) -> Option<Attachment> {
        self.remove_if(descriptor, |_| true)
    }

    /// The same if it may be removed, which is asked while no fill is at work.
    pub(crate) fn remove_if(
        &self,
        descriptor: &Arc<Descriptor>,
        may: impl Fn(&Attachment) -> bool,
    ) -> Option<Attachment> {
        let serving = self.close_if(descriptor, may)?;
        self.note_closed(descriptor);
        Some(serving)
    }

    fn close_if(
        &self,
        descriptor: &Arc<Descriptor>,
        may: impl Fn(&Attachment) -> bool,
    ) -> Option<Attachment> {
        let serving = descriptor.close_if(may)?;
        self.fill.in_flight.cancel(|of, _| of.id == descriptor.id);
        self.poll.remove(serving.uffd.as_fd());
        // While their numbers are theirs: others may hold the same descriptions open, and watch them anew.
        lock(&descriptor.ends).iter().for_each(|(_, end)| self.mailbox.unwatch(end.as_fd()));
        Some(serving)
    }

    /// Lets all threads know that a descriptor is closed.
    fn note_closed(&self, descriptor: &Descriptor) {
        self.table.note_closed();
        descriptor.note_end();
        self.mailbox.post(Note::Ended);
    }

    /// Leaves what was served by a descriptor to the control thread, to free it.
    pub(crate) fn leave(&self, descriptor: &Descriptor, serving: Attachment) {
        descriptor.defer_drop(serving);
        self.mailbox.post(Note::Ended);
    }

    /// Ends serving a descriptor whose process has gone.
    pub(crate) fn retire(&self, descriptor: &Arc<Descriptor>) {
        if let Some(serving) = self.close_if(descriptor, |_| true) {
            // First, so that a thread that waits for the end finds it reported.
            self.fill.report(Problem::TargetGone { descriptor: DescriptorId(descriptor.id) });
            self.note_closed(descriptor);
            self.leave(descriptor, serving);
        }
    }

    /// Has the regions freed that nothing refers to any more. Returns whether there are others that aren't served.
    pub(crate) fn sweep(&self) -> bool {
        let served = self.served_regions();
        self.leave_budgets(|region| !served.contains(&region.id));
        let (unused, left) = self.regions.take_unused(&served);
        if !unused.is_empty() {
            self.fill.reports.free(unused);
        }
        left
    }

    /// Has budgets count no pages any more of the shared memory of regions. From then on nothing of them leaves.
    pub(crate) fn leave_budgets(&self, of: impl Fn(&ServedRegion) -> bool) {
        for region in self.regions.limited() {
            if let Some(residence) = region.residence.as_ref().filter(|_| of(&region)) {
                residence.detach();
            }
        }
    }

    /// The regions of which any part is served.
    fn served_regions(&self) -> HashSet<u64> {
        let mut served = HashSet::new();
        for descriptor in self.table.all() {
            let (segments, holes) =
                (descriptor.segments(LOOK_SHARD, None), descriptor.holes(LOOK_SHARD, None));
            served.extend(segments.iter().chain(&holes).map(|part| part.region.id));
        }
        served
    }

    /// The next note for the control thread, which has done what the one before asked for. `Err` once the pager has
    /// stopped and nothing is left.
    pub(crate) fn next_note(&self) -> Result<Option<Note>, Stopped> {
        let (note, adopted) = self.mailbox.next();
        if adopted {
            self.table.note_adopted();
        }
        note
    }

    /// Has the control thread look after a process as soon as something can be read from `end`, or it is closed.
    pub(crate) fn watch(&self, descriptor: &Descriptor, end: OwnedFd) -> Result<()> {
        let end = File::from(end);
        if let Some(process) = proc_maps::process_of_pidfd(end.as_raw_fd()) {
            // The first one counts: a descriptor's process stays the same.
            let _known = descriptor.process.set(process);
        }
        let kind = end.metadata()?.file_type();
        // What is sent over a socket or a pipe tells nothing.
        let events = match () {
            () if kind.is_socket() => libc::EPOLLRDHUP,
            () if kind.is_fifo() => 0,
            () => libc::EPOLLIN,
        };
        self.mailbox.watch(descriptor, end.as_fd(), events)?;
        let noted = self.inherited.note(end.as_fd(), descriptor.id);
        lock(&descriptor.ends).push((noted, end.into()));
        Ok(())
    }

    /// Waits until nothing is served any more.
    pub(crate) fn wait_until_empty(&self) {
        self.table.wait_until_empty(|| self.mailbox.has_forks());
    }

    /// Returns what faults keep the threads busy with, for a background of a region.
    pub(crate) fn busy(&self, region: u64) -> Busy {
        self.fill.activities.busy(region, || self.poll.has_events())
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.fill.is_stopping()
    }

    /// Has the threads that serve faults and read ahead end.
    pub(crate) fn stop(&self) {
        self.fill.stop();
        self.poll.stop();
    }

    /// Since when the fault waits that has waited longest, of those that were read. The locks are taken one after the other.
    pub(crate) fn oldest_fault(&self) -> Option<Instant> {
        if !self.owner.is_current() {
            return None;
        }
        let backlogs = self.backlogs.iter().filter_map(|backlog| lock(backlog).oldest());
        let others =
            [self.retries.oldest(), self.fill.in_flight.oldest(), self.fill.activities.oldest_read()];
        backlogs.chain(others.into_iter().flatten()).min()
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let mut sum = self.fill.counters.sum();
        sum.problems_lost += self.fill.reports.lost();
        // In a fork's child the lock may be taken for ever.
        if self.owner.is_current() {
            let counts = self.regions.page_counts();
            (sum.present_pages, sum.missing_pages) = (counts.present as u64, counts.missing as u64);
        }
        sum
    }
}
