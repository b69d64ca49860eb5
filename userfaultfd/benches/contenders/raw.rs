//! A userfaultfd without the library.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use memmap2::MmapMut;
use userfaultfd_sys::*;

/// Opens a userfaultfd with these flags, beside those that every opponent has, and asks for features.
pub(crate) fn open(flags: i32, features: u64) -> OwnedFd {
    let flags = libc::O_CLOEXEC | flags | UFFD_USER_MODE_ONLY as i32;
    // SAFETY: touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = uffdio_api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the structure is the one of this number.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as libc::Ioctl, &mut api) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    fd
}

/// Registers memory for missing faults.
pub(crate) fn register(fd: &OwnedFd, memory: &mut MmapMut) {
    let range = uffdio_range { start: memory.as_mut_ptr() as u64, len: memory.len() as u64 };
    let mut arg = uffdio_register { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
    // SAFETY: the structure is the one of this number.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER as libc::Ioctl, &mut arg) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
