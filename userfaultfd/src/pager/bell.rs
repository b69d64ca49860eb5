//! What wakes the control thread, and the thread that waits for ends of processes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::{Errno, sys};

/// An eventfd among what a thread waits for.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> Result<Self, Errno> {
        sys::eventfd(false).map(Self)
    }

    /// Has the thread look at what there is. Neither waits nor allocates.
    pub(crate) fn ring(&self) {
        sys::ring(self.0.as_fd());
    }

    /// Forgets that it rang, which is all that matters: not how often.
    pub(crate) fn hush(&self) {
        let _count = sys::read(self.0.as_fd(), &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
