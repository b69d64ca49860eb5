//! [`OnEnd`]: how a process ends when its content can't be had any more.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::pager::bell::Bell;
use crate::pager::memory::state_file::StateFile;
use crate::proc_maps::{self, Process};
use crate::{Pid, sys};

/// What becomes of a process when its memory can't be served any more.
///
/// | | a source is given up | the pager is dropped, by a panic too | refused, or dropped before it was served |
/// | --- | --- | --- | --- |
/// | `Kill` | the process is killed | the process is killed | the process is killed |
/// | `Poison` | the page is poisoned | missing pages are poisoned | all pages are poisoned |
/// | `Finish` | the page is poisoned | missing pages are filled; those without content are poisoned | as `Leave` |
/// | `Leave` | the page is retried, rarely | accesses wait | accesses wait |
///
/// Poison needs Linux 6.6: see [`Pager`](super::Pager). A program bears it as a SIGBUS. For a virtual machine poison isn't a
/// clean end: KVM may emulate the instruction that accesses a poisoned page, which makes the access one to a device, and
/// monitors answer that with zeros. Hence `Kill` is the default for what a monitor hands over (feature `handoff`), and
/// `Poison` for any other memory.
///
/// A killed process ends before its userfaultfd is closed, so that no thread of it sees zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum OnEnd {
    /// Kill the process, with SIGKILL by its pidfd. Without a pidfd, and for this process, it is as `Leave`.
    Kill,
    /// Poison pages, so that an access raises SIGBUS.
    Poison,
    /// Fill what is missing as long as there is a source.
    Finish,
    /// Leave the memory as it is. The userfaultfd stays open as long as this process lives, so that accesses wait.
    Leave,
}

/// How long a killed process may take until its userfaultfd is kept open instead of closed.
pub(crate) const KILL_PATIENCE: Duration = Duration::from_secs(3);

impl OnEnd {
    const ALL: [Self; 4] = [Self::Kill, Self::Poison, Self::Finish, Self::Leave];
}

/// Whether a pidfd is of this process, which doesn't kill itself.
pub(crate) fn is_own(pidfd: BorrowedFd<'_>) -> bool {
    let process = proc_maps::process_of_pidfd(pidfd.as_raw_fd());
    matches!(process, Some(Process::Other(pid)) if pid == Pid::this())
}

/// A process whose end was chosen.
#[derive(Debug)]
pub(crate) struct Guest {
    /// The number of an [`OnEnd`].
    on_end: AtomicU8,
    pidfd: Option<OwnedFd>,
    /// Whether it was killed.
    killed: AtomicBool,
    /// Rings when it isn't served any more.
    bell: OnceLock<Arc<Bell>>,
    /// The file in which the states of its pages lie.
    state: Option<Arc<StateFile>>,
}

impl Guest {
    pub(crate) fn new(on_end: OnEnd, pidfd: Option<OwnedFd>) -> Self {
        Self {
            on_end: AtomicU8::new(on_end as u8),
            pidfd: pidfd.filter(|pidfd| !is_own(pidfd.as_fd())),
            killed: AtomicBool::new(false),
            bell: OnceLock::new(),
            state: None,
        }
    }

    /// Gives it a file in which the states of its pages lie.
    #[cfg(feature = "handoff")]
    pub(crate) fn with_state(self, state: Option<Arc<StateFile>>) -> Self {
        Self { state, ..self }
    }

    /// The file in which the states of its pages lie.
    pub(crate) fn state(&self) -> Option<&Arc<StateFile>> {
        self.state.as_ref()
    }

    pub(crate) fn on_end(&self) -> OnEnd {
        // Nothing else is read because of it.
        OnEnd::ALL[usize::from(self.on_end.load(Ordering::Relaxed))]
    }

    #[cfg(feature = "handoff")]
    pub(crate) fn set_on_end(&self, on_end: OnEnd) {
        self.on_end.store(on_end as u8, Ordering::Relaxed);
    }

    /// Has a bell ring when the process isn't served any more: the first that is given.
    #[cfg(feature = "handoff")]
    pub(crate) fn ring_at_end(&self, bell: Arc<Bell>) {
        let _not_the_first = self.bell.set(bell);
    }

    /// The process isn't served any more. Neither waits nor allocates: workers call it.
    pub(crate) fn note_end(&self) {
        if let Some(bell) = self.bell.get() {
            bell.ring();
        }
    }

    /// Kills the process. Allocates nothing: workers call it. Returns whether this is the first time that it can be killed.
    pub(crate) fn kill(&self) -> bool {
        // It fails for a process that has ended, and for one that this process may not signal, which waits then.
        let is_killed = self.pidfd.as_ref().is_some_and(|pidfd| sys::kill(pidfd.as_fd()).is_ok());
        is_killed && !self.killed.swap(true, Ordering::Relaxed)
    }

    /// Whether it was killed.
    #[cfg(feature = "handoff")]
    pub(crate) fn was_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    /// Waits until the process has ended, which was killed. Returns whether it has.
    pub(crate) fn wait(&self) -> bool {
        let timeout = KILL_PATIENCE.as_millis() as libc::c_int;
        self.pidfd.as_ref().is_some_and(|pidfd| {
            sys::wait_readable([pidfd.as_fd()], timeout).is_ok_and(|[has_ended]| has_ended)
        })
    }
}
