//! Filling what was needed the last time, before it is needed.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use super::background::{BackgroundFill, FillReport};
use super::fill_target::Target;
use super::plan::Plan;
use super::working_set::{ReplayedRuns, WorkingSet};
use crate::pager::memory::fault_log::Mode;
use crate::pager::memory::served::ServedRegion;
use crate::pager::{Error, Pager, RegionId, Result};

/// One page of so many is left out, to see whether it is needed.
const SAMPLE: usize = 64;

/// A [`WorkingSet`] that is being filled in about its order, in the [background](BackgroundFill): faults come first.
///
/// Where the source is slow, several threads do that, as for any [`BackgroundFill`].
///
/// One page of 64 is left out, so that it can be seen whether somebody touches it: of a page that is there already
/// nothing tells that. [`report`](Self::report) says from that how much of the set was filled for nothing.
///
/// Dropping it ends it.
pub struct WorkingSetReplay {
    background: BackgroundFill,
    region: Arc<ServedRegion>,
    set: WorkingSet,
    cover: ReplayedRuns,
}

/// How well a working set fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayReport {
    /// Pages of the set.
    pub set_pages: usize,
    /// Pages of the set for which a fault came: before it was their turn, or since they were left out.
    pub faults_in_set: usize,
    /// Other pages for which a fault came: the set lacks them.
    pub faults_outside: usize,
    /// Pages of the set that were left out, and not filled together with a neighbour either.
    pub sampled: usize,
    /// Pages of these for which a fault came.
    pub sampled_touched: usize,
}

impl WorkingSetReplay {
    /// Begins.
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
        match BackgroundFill::start_plan(target, Plan::without(set.runs().to_vec(), is_sampled)) {
            Ok(background) => Ok(Self { background, region, set: set.clone(), cover: set.cover() }),
            Err(error) => {
                region.stop_noting();
                Err(error)
            }
        }
    }

    /// The thread that fills: to pause it, to limit it, to see how far it is.
    #[must_use]
    pub fn background(&self) -> &BackgroundFill {
        &self.background
    }

    /// Waits until all of the set is there that isn't left out.
    pub fn wait(&mut self) -> FillReport {
        self.background.finish()
    }

    /// How well the set fits, so far. Faults are counted as long as the replay isn't dropped.
    #[must_use]
    pub fn report(&self) -> ReplayReport {
        let faults: HashSet<usize> = self.region.noted().into_iter().collect();
        let in_set = faults.iter().filter(|page| self.cover.has(**page));
        // What was filled together with another page tells nothing.
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
    (page as u32).wrapping_mul(0x9e37_79b1) >> 16 & (SAMPLE as u32 - 1) == 0
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
    /// Which part of the set nobody has needed so far, from 0 to 1: an estimate, from the pages that were left out. Of a
    /// hundred of them it is right to a tenth. `None` if there are none.
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
    /// Fills a working set that was recorded before: see [`WorkingSetReplay`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served any more.
    /// - [`OtherWorkingSet`](Error::OtherWorkingSet): the set is of a region of another size, or of other pages.
    /// - [`AlreadyRecorded`](Error::AlreadyRecorded): the region is being recorded, or another set replayed.
    /// - [`System`](Error::System): memory or a thread couldn't be had.
    pub fn replay(&self, region: RegionId, set: &WorkingSet) -> Result<WorkingSetReplay> {
        WorkingSetReplay::start(self.target(region)?, set)
    }
}
