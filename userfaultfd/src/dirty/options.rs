//! Options of a tracker: its mode, its descriptor, whose memory it tracks.

use std::ops::Range;
use std::sync::Arc;

use super::serve::FaultThread;
use crate::holder::Holder;
use crate::lease::Lease;
use crate::proc_maps::Process;
use crate::watch::{Protection, Watch, can_scan, tells_protection};
use crate::{Error, FeatureFlags, Pid, RegisterMode, Result, Support, Uffd, UffdBuilder};

/// The way in which a tracker detects an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// The kernel itself lifts the protection of a page when it is accessed. One scan finds these pages and protects them
    /// again. The access costs a short page fault; no thread is woken.
    ///
    /// Linux 6.7 for writes, 7.3 for any access.
    Async,
    /// The kernel suspends the accessing thread and reports the fault to a thread of the tracker, which lifts the
    /// protection: for older kernels. An access costs many times as much.
    ///
    /// Linux 5.7 for writes to private anonymous memory, 5.19 to shared and hugetlb memory; 7.3 for any access.
    Sync,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Async => "async",
            Mode::Sync => "sync",
        })
    }
}

/// Options of a [`DirtyTracker`](crate::DirtyTracker) or an [`AccessTracker`](crate::AccessTracker), for
/// [`with`](crate::DirtyTracker::with).
///
/// ```
/// use userfaultfd::dirty::{Mode, Options};
/// use userfaultfd::{DirtyTracker, FeatureFlags, Support};
///
/// if Support::probe()?.features().contains(FeatureFlags::PAGEFAULT_FLAG_WP) {
///     let tracker = DirtyTracker::with(Options::new().mode(Mode::Sync))?;
///     assert_eq!(tracker.mode(), Mode::Sync);
/// }
/// # Ok::<(), userfaultfd::Error>(())
/// ```
#[derive(Debug)]
#[must_use]
pub struct Options {
    mode: Option<Mode>,
    user_mode_only: bool,
    descriptor: Option<Uffd>,
    process: Process,
    /// Further modes for which ranges are registered, where another handler reads the descriptor.
    elsewhere: Option<RegisterMode>,
    /// For memory that a pager fills: the lease of its region, and its range.
    lease: Option<(Arc<Lease>, Vec<Range<usize>>)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: None,
            user_mode_only: true,
            descriptor: None,
            process: Process::Own,
            elsewhere: None,
            lease: None,
        }
    }
}

impl Options {
    /// Returns the defaults: memory of this process, the best mode that the kernel has, a descriptor of the tracker's own.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires a mode. The default is `Async` where the kernel has it, and `Sync` elsewhere.
    ///
    /// A [descriptor](Self::descriptor) that is passed in has a mode already; then this option is ignored.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Sets whether only accesses from user mode are resolved, as
    /// [`UffdBuilder::user_mode_only`](crate::UffdBuilder::user_mode_only) does. The default is `true`, which needs no
    /// right.
    ///
    /// It matters in `Sync` mode alone: **there a system call that writes to tracked memory, such as read(2), fails with
    /// `EFAULT` if this is `true`.** With `false`, which needs a [right](crate#rights), it waits like any write.
    pub fn user_mode_only(mut self, user_mode_only: bool) -> Self {
        self.user_mode_only = user_mode_only;
        self
    }

    /// Uses a descriptor instead of opening one. It is `Async` if it was made with
    /// [`WP_ASYNC`](FeatureFlags::WP_ASYNC) ([`RWP_ASYNC`](FeatureFlags::RWP_ASYNC) for an
    /// [`AccessTracker`](crate::AccessTracker)), and `Sync` otherwise. `WP_UNPOPULATED` helps there.
    ///
    /// In `Sync` mode the tracker reads from it, and makes it non-blocking, also for those it is shared with. It drops
    /// events other than faults. See [`read_elsewhere`](Self::read_elsewhere).
    pub fn descriptor(mut self, uffd: Uffd) -> Self {
        self.descriptor = Some(uffd);
        self
    }

    /// Tracks memory of another process, in which the [descriptor](Self::descriptor) was made: that process sent it, or
    /// [`UffdBuilder::create_in`](crate::UffdBuilder::create_in) made it. Without a descriptor
    /// [`with`](crate::DirtyTracker::with) fails. Needs the right to read that process's memory by ptrace(2).
    ///
    /// ```no_run
    /// use userfaultfd::dirty::Options;
    /// use userfaultfd::{DirtyTracker, FeatureFlags, Pid, UffdBuilder};
    ///
    /// # let range = 0..4096;
    /// let pid = Pid::from_raw(4711);
    /// let uffd = UffdBuilder::new().require_features(FeatureFlags::WP_ASYNC).create_in(pid)?;
    /// let mut tracker = DirtyTracker::with(Options::new().process(pid).descriptor(uffd))?;
    /// tracker.track(range)?; // addresses in the other process
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    pub fn process(mut self, pid: Pid) -> Self {
        self.process = Process::Other(pid);
        self
    }

    /// Leaves reading from the [descriptor](Self::descriptor) to another handler, which resolves the other faults of the
    /// same memory. The tracker registers ranges for the modes `also`, too, and leaves them registered when it stops
    /// tracking them.
    ///
    /// In `Sync` mode that handler must pass events to [`resolve`](crate::DirtyTracker::resolve). In both modes it must
    /// fill pages unprotected, as fills do by default; a filled page counts as written.
    ///
    /// With [`MISSING`](RegisterMode::MISSING), private anonymous memory needs a descriptor in `Async` mode or with
    /// [`WP_UNPOPULATED`](FeatureFlags::WP_UNPOPULATED): Linux before 6.4 can't protect a missing page, and the tracker
    /// can't decide what it holds.
    pub fn read_elsewhere(mut self, also: RegisterMode) -> Self {
        self.elsewhere = Some(also);
        self
    }

    /// Tracks memory that a pager of this process fills through the descriptor.
    #[cfg(feature = "pager")]
    pub(crate) fn lease(self, uffd: Uffd, lease: Arc<Lease>, ranges: Vec<Range<usize>>) -> Self {
        Self { lease: Some((lease, ranges)), ..self.descriptor(uffd).read_elsewhere(RegisterMode::MISSING) }
    }

    /// Creates the watch. Returns it with its mode and the thread of `Sync` mode.
    pub(crate) fn open(self, protection: Protection) -> Result<(Arc<Watch>, Mode, Option<FaultThread>)> {
        let lease = self.lease.clone();
        self.open_leased(protection).inspect_err(|_| {
            if let Some((lease, _)) = lease {
                lease.give_back();
            }
        })
    }

    fn open_leased(self, protection: Protection) -> Result<(Arc<Watch>, Mode, Option<FaultThread>)> {
        let holder = match protection {
            Protection::Write => Holder::DirtyTracker,
            Protection::ReadWrite => Holder::AccessTracker,
        };
        let (asynchronous, synchronous) = match protection {
            Protection::Write => (FeatureFlags::WP_ASYNC, FeatureFlags::PAGEFAULT_FLAG_WP),
            Protection::ReadWrite => (FeatureFlags::RWP | FeatureFlags::RWP_ASYNC, FeatureFlags::RWP),
        };
        let adopted = self.descriptor.is_some();
        let uffd = match self.descriptor {
            Some(uffd) => uffd,
            None if self.process != Process::Own => return Err(Error::NoDescriptor),
            None => {
                let mode = match self.mode {
                    Some(mode) => mode,
                    None if Support::probe()?.features().contains(asynchronous) && can_scan()? => Mode::Async,
                    None => Mode::Sync,
                };
                let mut builder = UffdBuilder::new();
                builder.close_on_exec(true).non_blocking(true).user_mode_only(self.user_mode_only);
                match mode {
                    Mode::Async => builder.require_features(asynchronous),
                    Mode::Sync => builder.require_features(synchronous),
                };
                if mode == Mode::Sync && protection == Protection::Write {
                    builder.request_features(FeatureFlags::WP_UNPOPULATED);
                }
                builder.create()?
            }
        };
        let features = uffd.features();
        let mode = if features.contains(asynchronous) { Mode::Async } else { Mode::Sync };
        let mut watch = Watch::new(uffd, self.process, protection, holder)?;
        (watch.lease, watch.lent) = self.lease.unzip();
        watch.also = self.elsewhere.unwrap_or(RegisterMode::empty());
        watch.leaves_holes =
            protection == Protection::Write && mode == Mode::Async && self.elsewhere.is_none();
        if protection == Protection::Write && mode == Mode::Sync {
            watch.protects_empty = features.contains(FeatureFlags::WP_UNPOPULATED);
            watch.notes = !tells_protection()?;
            if watch.notes && adopted && self.elsewhere.is_some() {
                return Err(Error::NeedsProtectionInPagemap);
            }
        }
        let watch = Arc::new(watch);
        let serves = mode == Mode::Sync && self.elsewhere.is_none();
        let server = if serves { Some(FaultThread::start(&watch)?) } else { None };
        Ok((watch, mode, server))
    }
}
