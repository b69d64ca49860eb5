//! The kernel's interface without this crate: to see what the kernel itself says, and to prepare descriptors
//! that the crate hasn't touched.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use userfaultfd::{Errno, FeatureFlags, IoctlFlags};
use userfaultfd_sys as sys;

/// Turns the C convention into a result.
pub(crate) fn check(returned: impl Into<i64>) -> Result<i64, Errno> {
    let returned = returned.into();
    if returned == -1 { Err(Errno::last()) } else { Ok(returned) }
}

/// A descriptor that a system call returned.
pub(crate) fn own(fd: libc::c_int) -> OwnedFd {
    check(fd).unwrap();
    // SAFETY: a new descriptor of this process, owned by nothing else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// pipe2(2): the reading and the writing end, closed on exec.
pub(crate) fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors to the array.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }).unwrap();
    (own(ends[0]).into(), own(ends[1]).into())
}

/// userfaultfd(2).
pub(crate) fn userfaultfd(flags: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory of the caller.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: a new descriptor of this process, owned by nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// A descriptor for faults from user mode that hasn't shaken hands, closed on exec.
pub(crate) fn unshaken(flags: libc::c_int) -> OwnedFd {
    let flags = flags | libc::O_CLOEXEC;
    // Before Linux 5.11 there is no restriction to user mode.
    userfaultfd(flags | sys::UFFD_USER_MODE_ONLY as libc::c_int).or_else(|_| userfaultfd(flags)).unwrap()
}

/// Whether the kernel can restrict a descriptor to faults from user mode.
pub(crate) fn knows_user_mode_only() -> bool {
    userfaultfd(sys::UFFD_USER_MODE_ONLY as libc::c_int).is_ok()
}

/// The handshake: what the kernel offers.
pub(crate) fn api(fd: impl AsFd, features: FeatureFlags) -> Result<(FeatureFlags, IoctlFlags), Errno> {
    let mut arg = sys::uffdio_api { api: sys::UFFD_API, features: features.bits(), ioctls: 0 };
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads and writes the structure, which is borrowed for the call.
    check(unsafe { libc::ioctl(fd, sys::UFFDIO_API as libc::Ioctl, &raw mut arg) })?;
    Ok((FeatureFlags::from_bits_retain(arg.features), IoctlFlags::from_bits_retain(arg.ioctls)))
}

/// Waits for a message of a non-blocking userfaultfd, which must be of a fault, and reads it: its flags and address.
pub(crate) fn fault(fd: impl AsFd) -> (u64, u64) {
    wait_for_event(&fd);
    let mut message = std::mem::MaybeUninit::<sys::uffd_msg>::zeroed();
    let len = size_of::<sys::uffd_msg>();
    // SAFETY: the kernel writes at most as many bytes as the message has.
    let read = check(unsafe { libc::read(fd.as_fd().as_raw_fd(), message.as_mut_ptr().cast(), len) } as i64);
    assert_eq!(read, Ok(len as i64));
    // SAFETY: every byte is written, and every value of it is one of these numbers.
    let message = unsafe { message.assume_init() };
    assert_eq!(message.event, sys::UFFD_EVENT_PAGEFAULT);
    // SAFETY: the message of a fault has this part.
    let fault = unsafe { message.arg.pagefault };
    (fault.flags, fault.address)
}

/// Whether a descriptor is closed on exec, and whether it is non-blocking.
pub(crate) fn flags(fd: impl AsFd) -> (bool, bool) {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: touches no memory.
    let of_descriptor = check(unsafe { libc::fcntl(fd, libc::F_GETFD) }).unwrap();
    // SAFETY: touches no memory.
    let of_file = check(unsafe { libc::fcntl(fd, libc::F_GETFL) }).unwrap();
    (of_descriptor & i64::from(libc::FD_CLOEXEC) != 0, of_file & i64::from(libc::O_NONBLOCK) != 0)
}

/// What poll(2) says of a descriptor at once, of `POLLIN` and the conditions that it always tells.
pub(crate) fn poll(fd: impl AsFd) -> libc::c_short {
    poll_for(fd, 0)
}

/// Waits until poll(2) says that a descriptor can be read. For non-blocking userfaultfds.
pub(crate) fn wait_for_event(fd: impl AsFd) {
    assert_eq!(poll_for(fd, -1), libc::POLLIN);
}

fn poll_for(fd: impl AsFd, milliseconds: libc::c_int) -> libc::c_short {
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the structure is borrowed for the call.
    check(unsafe { libc::poll(&raw mut poll, 1, milliseconds) }).unwrap();
    poll.revents
}
