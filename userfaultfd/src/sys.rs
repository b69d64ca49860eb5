//! Every system call of the crate, and the only place that makes one.
//!
//! The functions are as thin as they can be: a number, a structure, an [`Errno`]. What the answers mean is
//! decided by the callers. The `unsafe` ones change what memory holds without the compiler knowing; the
//! others only change how faults on it are handled.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, unused_imports, reason = "each feature uses a part")
)]
#![expect(unsafe_code, reason = "system calls")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

pub(crate) use userfaultfd_sys::*;

pub(crate) use self::file::*;
pub(crate) use self::memory::*;
pub(crate) use self::signal::*;
pub(crate) use self::thread::*;
pub(crate) use self::uffd::*;
pub(crate) use self::wait::*;
use crate::Errno;

mod file;
mod memory;
#[cfg(any(
    feature = "handoff",
    all(target_arch = "x86_64", any(feature = "tracking", feature = "snapshot"))
))]
pub(crate) mod process;
#[cfg(all(target_arch = "x86_64", any(feature = "tracking", feature = "snapshot")))]
pub(crate) mod ptrace;
mod signal;
#[cfg(feature = "handoff")]
pub(crate) mod socket;
mod thread;
mod uffd;
mod wait;

/// Turns the C convention (-1 and `errno`) into a result.
#[inline]
fn check(returned: libc::c_int) -> Result<libc::c_int, Errno> {
    if returned == -1 { Err(Errno::last()) } else { Ok(returned) }
}

/// Takes ownership of a descriptor number that the kernel has just handed to this process.
///
/// # Safety
///
/// The caller must make sure that `fd` is open and that nothing else owns it.
#[inline]
pub(crate) unsafe fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller's promise is that of from_raw_fd.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Bytes that nobody can guess: getrandom(2).
pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N], Errno> {
    let mut bytes = [0; N];
    // SAFETY: the kernel writes at most `N` bytes to the array, borrowed for the call.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Up to 256 bytes come at once.
    if usize::try_from(got) == Ok(N) { Ok(bytes) } else { Err(Errno::last()) }
}
