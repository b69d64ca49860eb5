//! What was handed over, served by a pager.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{
    Connection, Dialect, Handoff, MemoryRegion, Parts, PeerError, Process, Received, region, succession,
};
use crate::pager::bell::Bell;
use crate::pager::memory::fault_log::Mode;
use crate::pager::on_end::Guest;
use crate::pager::stats::Tally;
use crate::pager::{
    self, Added, BackgroundFill, DescriptorId, FillOrder, MissingRange, OnEnd, PageSource, Pager, Progress,
    Refused, Region, RegionId, ReplayReport, Statistics, WorkingSet, WorkingSetRecorder, WorkingSetReplay,
};
use crate::{FeatureFlags, RegisterMode};

/// Why a pager doesn't serve what was handed over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The regions can't be: [`NoRegions`](PeerError::NoRegions), [`Region`](PeerError::Region).
    #[error(transparent)]
    Regions(PeerError),

    /// The memory isn't registered for missing faults, but to be tracked.
    #[error("the memory was handed over for {mode}, not for missing faults")]
    Mode {
        /// The modes for which it is registered.
        mode: RegisterMode,
    },

    /// The pager refused it: [`BeyondSource`](pager::Error::BeyondSource) if the source is shorter.
    #[error(transparent)]
    Pager(pager::Error),

    /// The states of its pages can't be kept in the pager's [directory](pager::PagerBuilder::state).
    #[error("the states of its pages can't be kept: {0}")]
    State(std::io::Error),

    /// The monitor doesn't take the confirmation.
    #[error("the monitor doesn't take the confirmation: {0}")]
    Confirm(std::io::Error),
}

/// What was handed over, with the reason why it isn't served.
///
/// Dropping it ends the process as [`Handoff::on_end`] says.
#[derive(Debug, thiserror::Error)]
#[error("{} isn't served: {error}", .handoff.process.credentials)]
pub struct Unserved {
    /// What was handed over.
    pub handoff: Box<Handoff>,
    /// Why it isn't served.
    pub error: ServeError,
}

/// A process whose memory a pager serves: the handle to it.
///
/// Dropping the handle changes nothing: the pager goes on until the process has ended, or the pager is dropped, which
/// ends the process as [`OnEnd`] says. The pager notices the end by the connection and the pidfd.
#[derive(Debug)]
pub struct ServedProcess {
    pager: Pager,
    descriptor: DescriptorId,
    memory: Vec<Memory>,
    guest: Arc<Guest>,
    dialect: Dialect,
    mode: RegisterMode,
    memfds: Vec<OwnedFd>,
    process: Process,
    pid: Option<u32>,
    stream: Option<Connection>,
}

/// A region that is served.
#[derive(Clone, Debug)]
struct Memory {
    region: MemoryRegion,
    id: RegionId,
    tally: Arc<Tally>,
}

impl Pager {
    /// Serves memory that a monitor has handed over: see [`ServedProcess`].
    ///
    /// `source` returns the source of a region: the memory file as a whole, since
    /// [`offset`](MemoryRegion::offset) counts through all regions. Everything is checked against it before the first
    /// page is filled. Then the monitor gets its confirmation, if the dialect has one.
    ///
    /// Where the memory is a file, pages are put into the file if the userfaultfd reports minor faults, and are copied
    /// otherwise.
    ///
    /// # Errors
    ///
    /// [`Unserved`], with what was handed over. Dropping that ends the process, by default with SIGKILL.
    pub fn serve<S: PageSource + 'static>(
        &self,
        handoff: Handoff,
        source: impl FnMut(&MemoryRegion) -> S,
    ) -> Result<ServedProcess, Unserved> {
        serve(self, handoff, source, None)
    }

    /// Serves memory like [`serve`](Self::serve), and records which pages are accessed, from the first fault on.
    ///
    /// # Errors
    ///
    /// Those of [`serve`](Self::serve).
    pub fn serve_recorded<S: PageSource + 'static>(
        &self,
        handoff: Handoff,
        source: impl FnMut(&MemoryRegion) -> S,
    ) -> Result<(ServedProcess, ProcessRecorder), Unserved> {
        let served = serve(self, handoff, source, Some(Mode::Exact))?;
        // A process that has ended by now has an empty record.
        let target = |memory: &Memory| self.target(memory.id).ok();
        let recorder = |memory| Some(WorkingSetRecorder::started(Arc::clone(target(memory)?.region())));
        let recorders = served.memory.iter().map(recorder).collect();
        let recorder = ProcessRecorder { recorders, places: served.places() };
        Ok((served, recorder))
    }
}

fn serve<S: PageSource + 'static>(
    pager: &Pager,
    handoff: Handoff,
    mut source: impl FnMut(&MemoryRegion) -> S,
    noting: Option<Mode>,
) -> Result<ServedProcess, Unserved> {
    let unserved = |handoff, error| Unserved { handoff: Box::new(handoff), error };
    if !handoff.mode.contains(RegisterMode::MISSING) {
        let mode = handoff.mode;
        return Err(unserved(handoff, ServeError::Mode { mode }));
    }
    if let Err(error) = region::check(&handoff.regions) {
        return Err(unserved(handoff, ServeError::Regions(error)));
    }
    let state = match (&handoff.state, pager.state_dir()) {
        (Some(adopted), _) => match adopted.check(&handoff.regions) {
            Ok(state) => Some(state),
            Err(error) => return Err(unserved(handoff, ServeError::State(error))),
        },
        (None, Some(dir)) => match succession::keep(dir, &handoff) {
            Ok(state) => Some(Arc::new(state)),
            Err(error) => return Err(unserved(handoff, ServeError::State(error))),
        },
        (None, None) => None,
    };
    let mut first = state.as_ref().map_or(0, |state| state.first());
    let tallies: Vec<Arc<Tally>> = handoff.regions.iter().map(|_| Arc::default()).collect();
    let regions = (0..handoff.regions.len()).map(|number| {
        let memory = &handoff.regions[number];
        let mut region = of_memory(&handoff, number, source(memory))?;
        if let Some(state) = &state {
            region = region.states(state.room(), first);
            first += memory.len / memory.page_size;
        }
        Ok(region.tally(Arc::clone(&tallies[number])).noting(noting))
    });
    let (regions, pidfd) = match regions.collect::<std::io::Result<Vec<_>>>().and_then(|regions| {
        let pidfd = handoff.process.victim().map(|pidfd| pidfd.try_clone_to_owned()).transpose()?;
        Ok((regions, pidfd))
    }) {
        Ok(made) => made,
        Err(error) => return Err(unserved(handoff, ServeError::Pager(error.into()))),
    };
    let (on_end, owner) = (handoff.on_end(), handoff.owner());
    let guest = Arc::new(Guest::new(on_end, pidfd).with_state(state));
    let mut parts = handoff.into_parts();
    let Added { descriptor, regions: ids } =
        match pager.add_guest(parts.userfaultfd, regions, Arc::clone(&guest)) {
            Ok(added) => added,
            Err(Refused { uffd, error }) => {
                parts.userfaultfd = uffd;
                return Err(unserved(Handoff::of(owner, parts, on_end), ServeError::Pager(error)));
            }
        };
    let Parts { dialect, regions, mode, memfds, process, pid, stream, .. } = parts;
    let memory = regions.into_iter().zip(ids).zip(tallies);
    let memory = memory.map(|((region, id), tally)| Memory { region, id, tally }).collect();
    let pager = pager.handle();
    let served =
        ServedProcess { pager, descriptor, memory, guest, dialect, mode, memfds, process, pid, stream };
    match served
        .watch()
        .map_err(ServeError::Pager)
        .and_then(|()| served.confirm().map_err(ServeError::Confirm))
    {
        Ok(()) => Ok(served),
        // The pager may have noticed the end of the process meanwhile; then there is nothing to hand back.
        Err(error) => match served.take_back() {
            Ok(handoff) => Err(unserved(handoff, error)),
            Err(served) => Ok(*served),
        },
    }
}

/// The region of a pager for a region of a hand-over.
fn of_memory<S: PageSource + 'static>(handoff: &Parts, number: usize, source: S) -> std::io::Result<Region> {
    let memory = &handoff.regions[number];
    let MemoryRegion { address, len, offset, page_size, file_offset, .. } = *memory;
    let mut region = Region::new(address, len, source).offset(offset).page_size(page_size);
    if let Some(missing) = &handoff.missing {
        region = region.missing(missing.iter().cloned());
    }
    // One file for all, by the offset that counts through, or one for each region.
    let file = match &handoff.memfds[..] {
        [] => return Ok(region),
        [file] => (file, file_offset.unwrap_or(offset)),
        files => match files.get(number) {
            Some(file) => (file, file_offset.unwrap_or(0)),
            None => return Ok(region),
        },
    };
    let minor = FeatureFlags::MINOR_SHMEM | FeatureFlags::MINOR_HUGETLBFS;
    if handoff.userfaultfd.features().intersects(minor) {
        Ok(region.minor(File::from(file.0.try_clone()?), file.1))
    } else {
        Ok(region.shared())
    }
}

impl ServedProcess {
    /// Has the pager notice the end of the process.
    fn watch(&self) -> pager::Result<()> {
        if let Some(stream) = &self.stream {
            self.pager.watch(self.descriptor, stream.as_fd().try_clone_to_owned()?)?;
        }
        if let Some(pidfd) = &self.process.pidfd {
            self.pager.watch(self.descriptor, pidfd.try_clone()?)?;
        }
        Ok(())
    }

    fn confirm(&self) -> std::io::Result<()> {
        self.stream.as_ref().map_or(Ok(()), |stream| stream.confirm(self.dialect))
    }

    /// Returns the process that handed the memory over.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Returns the dialect of the hand-over.
    #[must_use]
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Returns the id of the userfaultfd in the pager.
    #[must_use]
    pub fn descriptor(&self) -> DescriptorId {
        self.descriptor
    }

    /// Returns the regions, with their ids in the pager.
    pub fn regions(&self) -> impl Iterator<Item = (&MemoryRegion, RegionId)> {
        self.memory.iter().map(|memory| (&memory.region, memory.id))
    }

    /// Returns whether the pager still serves the process.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.pager.serves(self.descriptor)
    }

    /// Returns whether the pager has killed the process, since its content couldn't be had.
    #[must_use]
    pub fn was_killed(&self) -> bool {
        self.guest.was_killed()
    }

    /// Waits until the pager doesn't serve the process any more: it has ended, or was handed over, or the pager is dropped.
    pub fn wait(&self) {
        self.pager.wait_for(self.descriptor);
    }

    /// Has a bell ring when the pager doesn't serve the process any more, from now on.
    pub(super) fn ring_at_end(&self, bell: &Arc<Bell>) {
        self.guest.ring_at_end(Arc::clone(bell));
    }

    /// The connection, if there is one.
    pub(super) fn stream(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// Sets how the process ends when its memory can't be served any more.
    pub fn set_on_end(&self, on_end: OnEnd) {
        self.guest.set_on_end(on_end);
    }

    /// Returns how the process ends when its memory can't be served any more.
    #[must_use]
    pub fn on_end(&self) -> OnEnd {
        self.guest.on_end()
    }

    /// Returns counters of this process alone, and the numbers of its present and missing pages, which are 0 once it isn't
    /// served any more.
    ///
    /// Counted are faults, fills, bytes, reads and errors of the source, prefetched and poisoned pages. The other
    /// fields are 0.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.memory.iter().map(|memory| memory.statistics(&self.pager)).sum()
    }

    /// Returns a view of the statistics of the process and of the regions that it has now, for another thread: one that exports
    /// them, for example.
    #[must_use]
    pub fn process_statistics(&self) -> ProcessStatistics {
        ProcessStatistics { pager: self.pager.handle(), memory: self.memory.clone() }
    }

    /// Returns the missing ranges of all regions, ordered by region.
    ///
    /// # Errors
    ///
    /// [`NotServed`](pager::Error::NotServed): the process isn't served any more.
    pub fn missing(&self) -> pager::Result<Vec<MissingRange>> {
        let missing = self.memory.iter().map(|memory| self.pager.missing(memory.id));
        Ok(missing.collect::<pager::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Starts to fill the missing pages in the background: a [`BackgroundFill`] for each region.
    ///
    /// # Errors
    ///
    /// Those of [`Pager::background`].
    pub fn background(&self, order: FillOrder) -> pager::Result<Vec<BackgroundFill>> {
        self.memory.iter().map(|memory| self.pager.background(memory.id, order.clone())).collect()
    }

    /// Starts to record which pages are accessed. [`Pager::serve_recorded`] does so from the first fault on.
    ///
    /// # Errors
    ///
    /// Those of [`Pager::record`].
    pub fn record(&self) -> pager::Result<ProcessRecorder> {
        let recorders = self.memory.iter().map(|memory| self.pager.record(memory.id).map(Some));
        Ok(ProcessRecorder { recorders: recorders.collect::<pager::Result<_>>()?, places: self.places() })
    }

    /// Starts to fill a working set of all regions, which a [`ProcessRecorder`] has made.
    ///
    /// # Errors
    ///
    /// Those of [`Pager::replay`]. [`OtherWorkingSet`](pager::Error::OtherWorkingSet): the set has another number of pages
    /// than all regions together.
    pub fn replay(&self, set: &WorkingSet) -> pager::Result<ProcessReplay> {
        let places = self.places();
        let (page_size, pages) = (places.page_size(), places.pages());
        if (set.page_size(), set.region_pages()) != (page_size, pages) {
            let region = (pages, page_size);
            return Err(pager::Error::OtherWorkingSet { set: (set.region_pages(), set.page_size()), region });
        }
        let replay =
            |(memory, set): (&Memory, pager::Result<WorkingSet>)| self.pager.replay(memory.id, &set?);
        let replays = self.memory.iter().zip(places.split(set)).map(replay);
        Ok(ProcessReplay { replays: replays.collect::<pager::Result<_>>()? })
    }

    fn places(&self) -> Places {
        Places(
            self.memory
                .iter()
                .map(|Memory { region, .. }| (region.len / region.page_size, region.page_size))
                .collect(),
        )
    }

    /// Fills all missing pages, unregisters the memory and closes the userfaultfd. Afterwards the process needs no pager.
    ///
    /// # Errors
    ///
    /// Those of [`Pager::finish_region`]: regions before the one that failed are finished, and the pager serves the others.
    pub fn finish(&self, mut progress: impl FnMut(Progress)) -> pager::Result<()> {
        self.memory.iter().try_for_each(|memory| self.pager.finish_region(memory.id, &mut progress))?;
        // Nothing is registered any more.
        self.pager.remove(self.descriptor).map(drop)
    }

    /// Ends serving, and returns what was handed over with the list of missing pages, for another pager, perhaps in another
    /// process. Waiting threads are woken, so that their faults are read by the next owner.
    ///
    /// # Errors
    ///
    /// The handle: the process isn't served any more.
    pub fn detach(self) -> Result<Handoff, Box<Self>> {
        self.take_back()
    }

    fn take_back(self) -> Result<Handoff, Box<Self>> {
        let Ok(detached) = self.pager.remove(self.descriptor) else { return Err(Box::new(self)) };
        let missing = Some(detached.missing());
        let Self { memory, guest, dialect, mode, memfds, process, pid, stream, .. } = self;
        let regions = memory.into_iter().map(|memory| memory.region).collect();
        let userfaultfd = detached.uffd;
        let state = None;
        let parts =
            Parts { dialect, userfaultfd, regions, mode, memfds, process, pid, stream, missing, state };
        Ok(Handoff::new(parts, guest.on_end()))
    }

    /// Waits for a further message of the monitor, `timeout` at most: `None` if it has closed the connection, or
    /// there is none.
    ///
    /// After [`AddRegions`](super::Message::AddRegions) call [`add_region`](Self::add_region) for each region.
    ///
    /// # Errors
    ///
    /// Those of [`Connection::receive`].
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<Received>, PeerError> {
        match &mut self.stream {
            Some(stream) => stream.receive(timeout),
            None => Ok(None),
        }
    }

    /// Serves one more region, and confirms it if the dialect has a confirmation.
    ///
    /// # Errors
    ///
    /// [`Regions`](ServeError::Regions): it can't be, or overlaps another one. Those of [`Pager::add_region`].
    /// [`Confirm`](ServeError::Confirm): it is served, and the monitor doesn't know it.
    pub fn add_region<S: PageSource + 'static>(
        &mut self,
        region: MemoryRegion,
        source: S,
    ) -> Result<RegionId, ServeError> {
        let regions = self.memory.iter().map(|memory| memory.region.clone()).chain([region.clone()]);
        region::check(&regions.collect::<Vec<_>>()).map_err(ServeError::Regions)?;
        let tally = Arc::<Tally>::default();
        let served = Region::new(region.address, region.len, source).offset(region.offset);
        let served = served.page_size(region.page_size).tally(Arc::clone(&tally));
        let id = self.pager.add_region(self.descriptor, served).map_err(ServeError::Pager)?;
        self.memory.push(Memory { region, id, tally });
        self.confirm().map_err(ServeError::Confirm)?;
        Ok(id)
    }
}

impl Memory {
    fn statistics(&self, pager: &Pager) -> Statistics {
        let mut sum = Statistics::default();
        self.tally.add_to(&mut sum, self.region.page_size);
        if let Ok(target) = pager.target(self.id) {
            let pages = &target.region().pages;
            let present = pages.present_and_poisoned().0.min(pages.count());
            sum.present_pages = present as u64;
            sum.missing_pages = (pages.count() - present) as u64;
        }
        sum
    }
}

/// The statistics of a process that is served, and of its regions, as they are when they are asked for: see
/// [`ServedProcess::process_statistics`].
#[derive(Debug)]
pub struct ProcessStatistics {
    pager: Pager,
    memory: Vec<Memory>,
}

impl ProcessStatistics {
    /// Returns those of the process: see [`ServedProcess::statistics`].
    #[must_use]
    pub fn total(&self) -> Statistics {
        self.regions().map(|(_, statistics)| statistics).sum()
    }

    /// Returns those of each region.
    pub fn regions(&self) -> impl Iterator<Item = (&MemoryRegion, Statistics)> {
        self.memory.iter().map(|memory| (&memory.region, memory.statistics(&self.pager)))
    }
}

/// The regions of a process, one after the other, as one: for each its pages, and their size.
#[derive(Clone, Debug)]
struct Places(Vec<(usize, usize)>);

impl Places {
    /// The size of the pages in which a set counts: the smallest.
    fn page_size(&self) -> usize {
        self.0.iter().map(|(_, page_size)| *page_size).min().unwrap_or(crate::page_size())
    }

    fn pages(&self) -> usize {
        self.0.iter().map(|(pages, page_size)| pages * (page_size / self.page_size())).sum()
    }

    /// One set of those of all regions.
    fn join(&self, sets: &[Option<WorkingSet>]) -> pager::Result<WorkingSet> {
        let (mut pages, mut first) = (Vec::new(), 0);
        for ((count, page_size), set) in self.0.iter().zip(sets) {
            let each = page_size / self.page_size();
            let of_page = |page| (0..each).map(move |part| first + page * each + part);
            pages.extend(set.iter().flat_map(WorkingSet::pages).flat_map(of_page));
            first += count * each;
        }
        WorkingSet::from_pages(self.page_size(), self.pages(), pages)
    }

    /// The sets of all regions of one.
    fn split<'a>(&'a self, set: &'a WorkingSet) -> impl Iterator<Item = pager::Result<WorkingSet>> + 'a {
        let mut first = 0;
        self.0.iter().map(move |(count, page_size)| {
            let each = page_size / self.page_size();
            let range = first..first + count * each;
            first = range.end;
            let pages = set.pages().filter(|page| range.contains(page));
            WorkingSet::from_pages(*page_size, *count, pages.map(|page| (page - range.start) / each))
        })
    }
}

/// A running record of the pages that a process accesses, over all its regions.
#[derive(Debug)]
#[must_use = "dropping it ends the record"]
pub struct ProcessRecorder {
    recorders: Vec<Option<WorkingSetRecorder>>,
    places: Places,
}

impl ProcessRecorder {
    /// Ends the record, and returns the pages that were accessed: those of all regions, one region after the other, as one
    /// set. Within a region they are in the order of their first access.
    ///
    /// # Errors
    ///
    /// [`BeyondRegion`](pager::Error::BeyondRegion): the regions are longer than the address space.
    pub fn finish(self) -> pager::Result<WorkingSet> {
        let sets: Vec<_> =
            self.recorders.into_iter().map(|recorder| recorder.map(WorkingSetRecorder::finish)).collect();
        self.places.join(&sets)
    }
}

/// A running fill of a working set of all regions of a process.
#[derive(Debug)]
#[must_use = "dropping it stops the fill"]
pub struct ProcessReplay {
    replays: Vec<WorkingSetReplay>,
}

impl ProcessReplay {
    /// Returns the fills of the regions, in their order.
    pub fn replays(&self) -> &[WorkingSetReplay] {
        &self.replays
    }

    /// Waits until the set is filled, but for the pages that are left out.
    pub fn wait(&mut self) {
        self.replays.iter_mut().for_each(|replay| drop(replay.wait()));
    }

    /// Returns how well the set matches so far, for all regions together.
    #[must_use]
    pub fn report(&self) -> ReplayReport {
        self.replays.iter().map(WorkingSetReplay::report).fold(ReplayReport::default(), |sum, report| {
            let plus = |field: fn(&ReplayReport) -> usize| field(&sum) + field(&report);
            ReplayReport {
                set_pages: plus(|report| report.set_pages),
                faults_in_set: plus(|report| report.faults_in_set),
                faults_outside: plus(|report| report.faults_outside),
                sampled: plus(|report| report.sampled),
                sampled_touched: plus(|report| report.sampled_touched),
            }
        })
    }
}
