//! Other processes, by their pidfds.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::own;
use crate::Errno;

/// pidfd_open(2). Linux 5.3.
pub(crate) fn open_pidfd(process: libc::pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes two integers.
    match unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) } {
        -1 => Err(Errno::last()),
        // SAFETY: the kernel has opened it for this call, so nothing else owns it.
        fd => Ok(unsafe { own(fd as RawFd) }),
    }
}

/// pidfd_getfd(2): a duplicate of a descriptor of another process. Linux 5.6.
pub(crate) fn take_descriptor(pidfd: BorrowedFd<'_>, number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes three integers.
    match unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) } {
        -1 => Err(Errno::last()),
        // SAFETY: the kernel has opened it for this call, so nothing else owns it.
        fd => Ok(unsafe { own(fd as RawFd) }),
    }
}
