//! [`AccessTracker`]: which pages are in use.

use std::fmt;
use std::ops::Range;

use super::changes::{Detector, Ranges};
use super::options::{Mode, Options};
use super::{Stats, Tracker};
use crate::pagemap::Categories;
use crate::watch::Protection;
use crate::{Event, Result};

/// Which pages were read or written since they were last reset: the working set.
///
/// Takes Linux 7.3; making one fails with the reason on an older kernel.
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
/// # Hot is told, cold isn't
///
/// There is no method for pages that weren't accessed, and what [`hot`](Self::hot) leaves out isn't that: only pages
/// that are there are protected, so a page that was dropped, reclaimed or never touched is left out as well, and so
/// is what another mapping or another process accesses. In shared memory a page that the kernel reclaimed from this
/// mapping loses its protection and may be told though nobody accessed it, once it is there again. Accesses to
/// [pinned memory](crate::dirty#pinned-memory) by the kernel and devices aren't seen.
///
/// Each look at the set is a sample: an access between [`hot`](Self::hot) and [`reset`](Self::reset) isn't told.
/// A transparent huge page is in use as a whole: `MADV_NOHUGEPAGE` has it told by the page.
///
/// Private anonymous, shared (memfd, tmpfs) and hugetlb memory can be tracked, none that has no access rights. What
/// is tracked here can't be tracked by a [`DirtyTracker`](crate::DirtyTracker) at the same time.
pub struct AccessTracker(Tracker);

impl AccessTracker {
    /// Tracks memory of this process, in `Async` mode.
    ///
    /// # Errors
    ///
    /// As [`with`](Self::with).
    pub fn new() -> Result<Self> {
        Self::with(Options::new())
    }

    /// Tracks as the options say.
    ///
    /// # Errors
    ///
    /// [`UnsupportedFeatures`](crate::Error::UnsupportedFeatures), naming `RWP`, before Linux 7.3. Otherwise as
    /// [`DirtyTracker::with`](crate::DirtyTracker::with).
    pub fn with(options: Options) -> Result<Self> {
        Tracker::open(options, Protection::ReadWrite).map(Self)
    }

    /// The mode that it works in. What it tells is the same; in `Sync` mode [`stats`](Self::stats) counts reads and
    /// writes, too, at many times the cost of an access.
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

    /// Tracks what of a range is tracked no longer.
    ///
    /// # Errors
    ///
    /// As [`DirtyTracker::untrack`](crate::DirtyTracker::untrack).
    pub fn untrack(&mut self, range: Range<usize>) -> Result<()> {
        self.0.watch.untrack(&range)
    }

    /// What is tracked: ranges in order, merged.
    #[must_use]
    pub fn tracked(&self) -> Vec<Range<usize>> {
        self.0.tracked()
    }

    /// The pages that were accessed since they were tracked or reset.
    ///
    /// The iterator's errors are [`TrackingFailed`](crate::Error::TrackingFailed), and
    /// [`SystemError`](crate::Error::SystemError) with `ENOMEM` or `ESRCH`.
    pub fn hot(&self) -> Ranges<'_> {
        self.hot_in(0..usize::MAX)
    }

    /// [`hot`](Self::hot) pages in a range.
    pub fn hot_in(&self, range: Range<usize>) -> Ranges<'_> {
        self.0.look(&range, Detector::scan(Categories::ACCESSED), false)
    }

    /// How many bytes are hot, by whole pages.
    ///
    /// # Errors
    ///
    /// As [`hot`](Self::hot).
    pub fn count(&self) -> Result<usize> {
        self.hot().try_fold(0, |count, range| Ok(count + range?.len()))
    }

    /// Begins anew: no page is hot until it is accessed again.
    ///
    /// # Errors
    ///
    /// [`NotTracked`](crate::Error::NotTracked): something else was mapped in a tracked range.
    /// [`TrackingFailed`](crate::Error::TrackingFailed); [`SystemError`](crate::Error::SystemError) with `ESRCH`.
    pub fn reset(&mut self) -> Result<()> {
        self.0.watch.check()?;
        self.0.watch.ranges().iter().try_for_each(|tracked| self.0.watch.protect(&tracked.range))
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// Handles a fault that was read elsewhere, if it is an access to a tracked page; tells whether it was. See
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
        f.debug_struct("AccessTracker").field("mode", &self.mode()).field("stats", &self.stats()).finish()
    }
}
