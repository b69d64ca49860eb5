//! Files that are in memory and nowhere else.

use std::fs::File;
use std::os::fd::FromRawFd;

/// memfd_create(2), of length 0.
pub(crate) fn memfd() -> File {
    // SAFETY: the name ends with a zero byte.
    let fd = unsafe { libc::memfd_create(c"benchmark".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a memfd: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nothing else owns it.
    unsafe { File::from_raw_fd(fd) }
}
