//! [`Orphan`]: the memory of a process, after it was found that no pager will serve it.

use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};

use super::{MemoryRegion, Process, region};
use crate::pager::OnEnd;
use crate::pager::on_end::KILL_PATIENCE;
use crate::{Errno, Uffd, sys};

/// The userfaultfd of a process whose memory isn't served by any pager. It is closed once the process has ended. If that isn't
/// known when this is dropped, it stays open as long as this process lives, so that threads wait instead of reading zeros.
#[derive(Debug)]
pub(super) struct Orphan {
    userfaultfd: Option<OwnedFd>,
    pidfd: Option<OwnedFd>,
    is_killed: bool,
}

impl Orphan {
    /// Ends a process as was chosen, and doesn't wait for its end. `None`: nothing must be kept of it.
    pub(super) fn end(
        on_end: OnEnd,
        userfaultfd: Uffd,
        regions: &[MemoryRegion],
        process: Process,
    ) -> Option<Self> {
        // A peer that this process may not signal waits for its memory.
        let is_killed =
            on_end == OnEnd::Kill && process.victim().is_some_and(|pidfd| sys::kill(pidfd).is_ok());
        let is_over = on_end == OnEnd::Poison
            && region::check(regions).is_ok()
            && regions.iter().all(|region| poison(&userfaultfd, region));
        let userfaultfd = Some(OwnedFd::from(userfaultfd));
        (!is_over).then_some(Self { userfaultfd, pidfd: process.pidfd, is_killed })
    }

    /// A descriptor that can be read when the process has ended. `None`: that can't be known.
    pub(super) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Waits for the end of the process if it was killed, for [`KILL_PATIENCE`] at most.
    pub(super) fn wait(self) {
        if let Some(pidfd) = self.pidfd.as_ref().filter(|_| self.is_killed) {
            // It is looked at once more when this is dropped.
            let _ended = sys::wait_readable([pidfd.as_fd()], KILL_PATIENCE.as_millis() as libc::c_int);
        }
    }

    /// Closes the numbers in a fork's child.
    pub(super) fn abandon(mut self) {
        self.userfaultfd = None;
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        let has_ended = self.pidfd().is_some_and(sys::is_readable);
        if let Some(userfaultfd) = self.userfaultfd.take().filter(|_| !has_ended) {
            let _kept = userfaultfd.into_raw_fd();
        }
    }
}

/// Poisons a region as a whole. Returns whether all of it is poisoned, or present.
#[expect(unsafe_code, reason = "poisoning memory that a monitor handed over")]
fn poison(userfaultfd: &Uffd, region: &MemoryRegion) -> bool {
    let mut pages = (0..region.len / region.page_size).map(|page| region.address + page * region.page_size);
    pages.all(|address| {
        let start = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the memory belongs to another process, which handed it over to be served or poisoned.
        let poisoned = unsafe { userfaultfd.poison(start, region.page_size, true) };
        poisoned.map_or_else(|error| error.errno() == Some(Errno::EEXIST), |bytes| bytes == region.page_size)
    })
}
