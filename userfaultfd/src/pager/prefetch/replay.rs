//! Filling the pages that an earlier run needed, before they are needed.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use super::background::{BackgroundFill, FillReport};
use super::fill_target::Target;
use super::plan::Plan;
use super::working_set::{PageCover, WorkingSet};
use crate::pager::memory::fault_log::Mode;
use crate::pager::memory::served::ServedRegion;
use crate::pager::{Error, Pager, RegionId, Result};

/// Pages of which one is left out, to see whether it is needed: the sample costs a 64th of the faults.
const PAGES_PER_SAMPLE: usize = 64;

/// A running fill of a [`WorkingSet`], in about its order, in the [background](BackgroundFill): faults come first.
///
/// The set is read in few, long reads: in chunks of 4 MiB of its order, within a chunk by address. A gap of up to 32 KiB between two
/// pages of a chunk is read and filled with them, so that more pages may be filled than the set has. Where the source is slow, a read
/// is as long as 1 MiB, whatever the region's [`FaultAround`](crate::pager::FaultAround), and as many go on at the same time as for
/// any [`BackgroundFill`].
///
/// One page of 64 is left out as a sample: a fault on it shows that the page is needed, which a present page can't show.
/// From that [`report`](Self::report) estimates how much of the set was filled in vain.
///
/// Dropping it stops the fill.
#[must_use = "dropping it stops the fill"]
pub struct WorkingSetReplay {
    background: BackgroundFill,
    region: Arc<ServedRegion>,
    set: WorkingSet,
    cover: PageCover,
}

/// How well a working set matches the accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayReport {
    /// Number of pages of the set.
    pub set_pages: usize,
    /// Number of pages of the set that faulted: before their turn, or since they were left out.
    pub faults_in_set: usize,
    /// Number of other pages that faulted: the set lacks them.
    pub faults_outside: usize,
    /// Number of pages of the set that were left out as a sample, and not filled with a neighbour either.
    pub sampled: usize,
    /// Number of these pages that faulted.
    pub sampled_touched: usize,
}

impl WorkingSetReplay {
    /// Begins the replay.
    pub(crate) fn start(target: Target, set: &WorkingSet) -> Result<Self> {
        let region = Arc::clone(target.region());
        let (page_size, pages) = (region.page_size(), region.pages.count());
        if (set.page_size(), set.region_pages()) != (page_size, pages) {
            return Err(Error::OtherWorkingSet {
                set: (set.region_pages(), set.page_size()),
                region: (pages, page_size),
            });
        }
        if !region.log()?.start(Mode::On) {
            return Err(Error::AlreadyRecorded);
        }
        let cover = set.cover();
        match BackgroundFill::start_plan(target, Plan::of_set(set, &cover, is_sampled)) {
            Ok(background) => Ok(Self { background, region, set: set.clone(), cover }),
            Err(error) => {
                region.stop_noting();
                Err(error)
            }
        }
    }

    /// Returns the background fill, to pause it, to limit it, or to see its progress.
    pub fn background(&self) -> &BackgroundFill {
        &self.background
    }

    /// Waits until the whole set is filled, but for the pages that are left out.
    pub fn wait(&mut self) -> FillReport {
        self.background.finish()
    }

    /// Returns how well the set matches so far. Faults are counted until the replay is dropped.
    #[must_use]
    pub fn report(&self) -> ReplayReport {
        let faults: HashSet<usize> = self.region.noted().into_iter().collect();
        let in_set = faults.iter().filter(|page| self.cover.has(**page));
        // A page that was filled together with another one shows nothing.
        let touched = in_set.clone().filter(|page| is_sampled(**page)).count();
        let untouched =
            self.set.pages().filter(|page| is_sampled(*page) && self.region.pages.is_missing(*page));
        let untouched = untouched.filter(|page| !faults.contains(page)).count();
        let faults_in_set = in_set.count();
        ReplayReport {
            set_pages: self.set.len(),
            faults_in_set,
            faults_outside: faults.len() - faults_in_set,
            sampled: touched + untouched,
            sampled_touched: touched,
        }
    }
}

/// Whether a page is left out.
fn is_sampled(page: usize) -> bool {
    (page as u32).wrapping_mul(0x9e37_79b1) >> 16 & (PAGES_PER_SAMPLE as u32 - 1) == 0
}

impl Drop for WorkingSetReplay {
    fn drop(&mut self) {
        self.region.stop_noting();
    }
}

impl fmt::Debug for WorkingSetReplay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkingSetReplay")
            .field("background", &self.background)
            .field("coverage", &self.report())
            .finish_non_exhaustive()
    }
}

impl ReplayReport {
    /// Returns the estimated share of the set that wasn't needed so far, from 0 to 1, or `None` without sampled pages. With
    /// a hundred sampled pages it is right to a tenth.
    #[must_use]
    pub fn waste(&self) -> Option<f64> {
        let untouched = self.sampled - self.sampled_touched;
        (self.sampled > 0).then(|| untouched as f64 / self.sampled as f64)
    }
}

impl fmt::Display for ReplayReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { set_pages, faults_in_set, faults_outside, sampled, .. } = self;
        write!(
            f,
            "{set_pages} pages in the set, faults for {faults_in_set} of them and {faults_outside} others"
        )?;
        match self.waste() {
            Some(waste) => write!(f, "; about {:.0} % for nothing, as {sampled} tell", 100.0 * waste),
            None => Ok(()),
        }
    }
}

impl Pager {
    /// Starts to fill a recorded working set: see [`WorkingSetReplay`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served.
    /// - [`OtherWorkingSet`](Error::OtherWorkingSet): the set's region has another number of pages, or another page size.
    /// - [`AlreadyRecorded`](Error::AlreadyRecorded): the region is being recorded, or another set replayed.
    /// - [`System`](Error::System): failed to map memory or to create a thread.
    pub fn replay(&self, region: RegionId, set: &WorkingSet) -> Result<WorkingSetReplay> {
        WorkingSetReplay::start(self.target(region)?, set)
    }
}
