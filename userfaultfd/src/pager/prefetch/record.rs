//! Which pages faults came for, in which order.

use std::fmt;
use std::sync::Arc;

use super::working_set::WorkingSet;
use crate::pager::memory::fault_log::Mode;
use crate::pager::memory::served::ServedRegion;
use crate::pager::{Error, Pager, RegionId, Result};

/// Notes in which order the pages of a region are touched for the first time, until it is dropped.
///
/// It sees faults. What is there already makes none, so begin before the memory is used. Each fault fills its page
/// alone meanwhile, whatever [`FaultAround`](crate::pager::FaultAround) says, so that the set has what was touched and nothing else:
/// such a run is slower than others. Noting takes no lock and allocates nothing.
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
pub struct WorkingSetRecorder {
    region: Arc<ServedRegion>,
}

impl WorkingSetRecorder {
    /// Begins.
    pub(crate) fn start(region: Arc<ServedRegion>) -> Result<Self> {
        if !region.log()?.start(Mode::Exact) {
            return Err(Error::AlreadyRecorded);
        }
        Ok(Self { region })
    }

    /// Ends, and tells what was touched.
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
    /// Records which pages of a region are touched, in order: see [`WorkingSetRecorder`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](Error::NotServed): the region isn't served any more.
    /// - [`AlreadyRecorded`](Error::AlreadyRecorded): it is recorded already, or a working set is being replayed.
    /// - [`System`](Error::System): memory couldn't be had.
    pub fn record(&self, region: RegionId) -> Result<WorkingSetRecorder> {
        WorkingSetRecorder::start(Arc::clone(self.target(region)?.region()))
    }
}
