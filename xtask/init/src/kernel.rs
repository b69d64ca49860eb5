//! What the running kernel says of itself, asked without the library under test.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::{fs, io};

use userfaultfd_sys as sys;

use crate::Record;

/// Returns the kernel's release and the mask of its userfaultfd's features.
#[must_use]
pub fn ask() -> Record {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Record::Kernel {
        release: release.trim().to_owned(),
        features: handshake(0).map_err(|e| format!("userfaultfd: {e}")),
    }
}

/// Returns whether this process may be told of forks. The capability alone doesn't decide: it must be had in the initial
/// user namespace.
#[must_use]
pub fn may_watch_forks() -> bool {
    handshake(sys::UFFD_FEATURE_EVENT_FORK).is_ok()
}

/// Asks for features, and returns the mask of those that there are.
fn handshake(features: u64) -> io::Result<u64> {
    // Before Linux 5.11 there is no restriction to faults from user mode, which everybody may have.
    let user_mode_only = sys::UFFD_USER_MODE_ONLY as libc::c_int;
    let fd = open(user_mode_only).or_else(|_| open(0))?;
    let mut api = sys::uffdio_api { api: sys::UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one structure, which is borrowed for the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), sys::UFFDIO_API as _, &mut api) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(api.features)
}

fn open(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
