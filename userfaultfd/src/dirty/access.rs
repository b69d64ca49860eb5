//! [`AccessTracker`]: which pages are in use.

use std::fmt;
use std::ops::Range;

use super::changes::{Detector, Ranges};
use super::options::{Mode, Options};
use super::{Statistics, Tracker};
use crate::pagemap::Categories;
use crate::watch::Protection;
use crate::{Event, Result};

/// Reports which pages were read or written since they were last reset: the working set.
///
/// Since Linux 7.3; on an older kernel [`new`](Self::new) fails and names the missing feature.
///
/// ```
/// use userfaultfd::{AccessTracker, Error, page_size};
///
/// let page = page_size();
/// let mut memory = memmap2::MmapMut::map_anon(16 * page)?;
/// memory.fill(1);
/// let start = memory.as_ptr().addr();
/// let mut tracker = match AccessTracker::new() {
///     Ok(tracker) => tracker,
///     Err(error @ Error::UnsupportedFeatures { .. }) => {
///         assert!(error.to_string().contains("RWP"));
///         return Ok(()); // before Linux 7.3
///     }
///     Err(error) => return Err(error.into()),
/// };
/// tracker.track(start..start + memory.len())?;
/// assert_eq!(memory[5 * page], 1);
/// let hot = tracker.hot().collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(hot, [start + 5 * page..start + 6 * page]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # It reports hot pages, not cold ones
///
/// A page that [`hot`](Self::hot) leaves out isn't necessarily cold. Only present pages are protected, so a page that
/// was dropped, reclaimed or never accessed is left out, too, and so are accesses of another mapping or another process.
/// In shared memory a page that the kernel reclaimed from this mapping loses its protection: once it is present again,
/// it may be reported without an access. Accesses to [pinned memory](crate::dirty#pinned-memory) by the kernel and by
/// devices aren't seen.
///
/// Each look is a sample: an access between [`hot`](Self::hot) and [`reset`](Self::reset) isn't reported. A transparent
/// huge page is reported as a whole; after `MADV_NOHUGEPAGE` memory is reported by the base page.
///
/// Private anonymous, shared (memfd, tmpfs) and hugetlb memory can be tracked, but not `PROT_NONE` memory. A
/// [`DirtyTracker`](crate::DirtyTracker) can't track the same range at the same time.
pub struct AccessTracker(Tracker);

impl AccessTracker {
    /// Returns a tracker for memory of this process, in `Async` mode.
    ///
    /// # Errors
    ///
    /// As [`with`](Self::with).
    pub fn new() -> Result<Self> {
        Self::with(Options::new())
    }

    /// Returns a tracker with the given options.
    ///
    /// # Errors
    ///
    /// [`UnsupportedFeatures`](crate::Error::UnsupportedFeatures), naming `RWP`, before Linux 7.3. Otherwise as
    /// [`DirtyTracker::with`](crate::DirtyTracker::with).
    pub fn with(options: Options) -> Result<Self> {
        Tracker::open(options, Protection::ReadWrite).map(Self)
    }

    /// Returns the mode in which the tracker works. Both modes report the same pages; in `Sync` mode
    /// [`statistics`](Self::statistics) also counts reads and writes, at many times the cost of an access.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// Tracks a range of addresses from now on. See [`DirtyTracker::track`](crate::DirtyTracker::track).
    ///
    /// # Errors
    ///
    /// As [`DirtyTracker::track`](crate::DirtyTracker::track).
    pub fn track(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.track(&range)
    }

    /// Stops tracking a range. Parts that aren't tracked are skipped.
    ///
    /// # Errors
    ///
    /// As [`DirtyTracker::untrack`](crate::DirtyTracker::untrack).
    pub fn untrack(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.untrack(&range)
    }

    /// Returns the tracked ranges, ordered by address and merged.
    #[must_use]
    pub fn tracked(&self) -> Vec<Range<usize>> {
        self.0.tracked()
    }

    /// Returns the ranges of pages that were accessed since they were tracked or reset.
    ///
    /// The iterator's errors are [`TrackingFailed`](crate::Error::TrackingFailed),
    /// [`NotTracked`](crate::Error::NotTracked) where another tracker or snapshot has what was mapped in a tracked range,
    /// and [`SystemError`](crate::Error::SystemError) with `ENOMEM` or `ESRCH`.
    pub fn hot(&self) -> Ranges<'_> {
        self.hot_in(0..usize::MAX)
    }

    /// Returns the [`hot`](Self::hot) pages of a range.
    pub fn hot_in(&self, range: Range<usize>) -> Ranges<'_> {
        self.0.look(&range, Detector::scan(Categories::ACCESSED), false)
    }

    /// Returns the number of hot bytes, in whole pages.
    ///
    /// # Errors
    ///
    /// As [`hot`](Self::hot).
    pub fn hot_len(&self) -> Result<usize> {
        self.hot().try_fold(0, |len, range| Ok(len + range?.len()))
    }

    /// Resets all pages: none is hot until its next access.
    ///
    /// # Errors
    ///
    /// [`NotTracked`](crate::Error::NotTracked): something else was mapped in a tracked range.
    /// [`TrackingFailed`](crate::Error::TrackingFailed); [`SystemError`](crate::Error::SystemError) with `ESRCH`.
    pub fn reset(&mut self) -> Result<()> {
        self.0.watch.protect_all()
    }

    /// Returns the statistics of the tracker.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.0.statistics()
    }

    /// Resolves a fault that another handler has read, if it is an access to a tracked page, and returns whether it was. See
    /// [`Options::read_elsewhere`].
    ///
    /// # Errors
    ///
    /// As [`DirtyTracker::resolve`](crate::DirtyTracker::resolve).
    pub fn resolve(&self, event: &Event) -> Result<bool> {
        self.0.resolve(event)
    }
}

impl fmt::Debug for AccessTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessTracker")
            .field("mode", &self.mode())
            .field("statistics", &self.statistics())
            .finish()
    }
}
