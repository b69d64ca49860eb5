//! Recording the pages that fault, in order.

use std::fmt;
use std::sync::Arc;

use super::working_set::WorkingSet;
use crate::pager::memory::fault_log::Mode;
use crate::pager::memory::served::ServedRegion;
use crate::pager::{Error, Pager, RegionId, Result};

/// A running record of the order in which the pages of a region are first accessed. Dropping it ends the record.
///
/// It records faults. A present page doesn't fault, so begin before the memory is used. Meanwhile each fault fills its
/// page alone, whatever the region's [`FaultAround`](crate::pager::FaultAround), so that the set has exactly the accessed
/// pages: a recorded run is slower. Recording takes no lock and allocates nothing.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{PageData, WorkingSet};
///
/// let source = |_: u64, page: &mut [u8]| {
///     page.fill(7);
///     Ok(PageData::Data)
/// };
/// let page = userfaultfd::page_size();
/// let memory = LazyMemory::new(1000 * page, source)?;
/// let recorder = memory.record()?;
/// let sum: u64 = [500, 501, 3, 502].iter().map(|number| u64::from(memory[number * page])).sum();
/// let set = recorder.finish();
/// assert_eq!(sum, 28);
/// assert!(set.pages().eq([500, 501, 3, 502]));
///
/// let path = std::env::temp_dir().join(format!("working-set-{}", std::process::id()));
/// set.save(&path)?;
///
/// // At the next start:
/// let set = WorkingSet::load(&path)?;
/// let memory = LazyMemory::new(1000 * page, source)?;
/// let mut replay = memory.replay(&set)?;
/// replay.wait();
/// assert_eq!(memory.statistics().present_pages, 4);
/// assert_eq!(memory[3 * page], 7); // is there
/// println!("{}", replay.report());
/// # std::fs::remove_file(path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping it ends the record"]
pub struct WorkingSetRecorder {
    region: Arc<ServedRegion>,
}

impl WorkingSetRecorder {
    /// Begins to record.
    pub(crate) fn start(region: Arc<ServedRegion>) -> Result<Self> {
        if !region.log()?.start(Mode::Exact) {
            return Err(Error::AlreadyRecorded);
        }
        Ok(Self { region })
    }

    /// Takes over a record that began with the first fault.
    #[cfg(feature = "handoff")]
    pub(crate) fn started(region: Arc<ServedRegion>) -> Self {
        Self { region }
    }

    /// Ends the record, and returns the pages that were accessed.
    #[must_use]
    pub fn finish(self) -> WorkingSet {
        let count = self.region.pages.count();
        let pages = self.region.noted();
        WorkingSet::new(self.region.page_size(), count, &pages)
    }
}

impl Drop for WorkingSetRecorder {
    fn drop(&mut self) {
        self.region.stop_noting();
    }
}

impl fmt::Debug for WorkingSetRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkingSetRecorder").field("region", &self.region).finish_non_exhaustive()
    }
}

impl Pager {
    /// Starts to record which pages of a region are accessed, in order: see [`WorkingSetRecorder`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served.
    /// - [`AlreadyRecorded`](Error::AlreadyRecorded): the region is being recorded already, or a working set is being
    ///   replayed.
    /// - [`System`](Error::System): failed to map memory.
    pub fn record(&self, region: RegionId) -> Result<WorkingSetRecorder> {
        WorkingSetRecorder::start(Arc::clone(self.target(region)?.region()))
    }
}
