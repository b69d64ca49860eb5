//! Unix sockets that carry descriptors, and the processes at their other ends.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use super::{check, own};
use crate::Errno;

/// The most descriptors that the kernel sends with one message: SCM_MAX_FD.
const MAX_SENT: usize = 253;

/// Room for the control message of [`MAX_SENT`] descriptors, aligned as its header is.
#[repr(C, align(8))]
struct Control([u8; 1040]);

/// A message that is empty but for its parts.
fn message(data: &mut libc::iovec, control: *mut Control, len: usize) -> libc::msghdr {
    // SAFETY: all zeros is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = data;
    message.msg_iovlen = 1;
    message.msg_control = control.cast();
    message.msg_controllen = len as _;
    message
}

/// recvmsg(2), which doesn't wait: `EAGAIN` if nothing has come. Adds the descriptors that came, which programs that this
/// process executes don't get. Returns how many bytes came, and whether descriptors were lost for lack of numbers.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut impl Extend<OwnedFd>,
) -> Result<(usize, bool), Errno> {
    let mut data = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control([0; 1040]);
    let len = size_of::<Control>();
    let mut message = message(&mut data, &raw mut control, len);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    let received = loop {
        // SAFETY: the kernel writes to `bytes` and `control`, borrowed and alive for the call, no more than their lengths.
        match unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) } {
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(Errno::last()),
            received => break received as usize,
        }
    };
    // SAFETY: the kernel has filled in the message.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the header lies in `control`, as the kernel wrote it.
        let libc::cmsghdr { cmsg_len, cmsg_level, cmsg_type, .. } = unsafe { *header };
        if (cmsg_level, cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: computes an address inside `control`.
            #[expect(clippy::cast_ptr_alignment, reason = "numbers are read unaligned")]
            let first = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            // SAFETY: computes a length.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            // Of another width with musl.
            let whole: usize = cmsg_len as _;
            let count = whole.saturating_sub(empty) / size_of::<RawFd>();
            fds.extend((0..count).map(|number| {
                let place = first.wrapping_add(number);
                // SAFETY: the kernel has written `count` numbers there.
                let fd = unsafe { place.read_unaligned() };
                // SAFETY: the kernel has opened it for this call, so nothing else owns it.
                unsafe { own(fd) }
            }));
        }
        // SAFETY: the message and its headers are those that the kernel wrote.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((received, message.msg_flags & libc::MSG_CTRUNC != 0))
}

/// sendmsg(2), which doesn't wait and raises no signal: `EAGAIN` if there is no room. `fds` go with the first byte. Returns
/// how many bytes were sent. `EINVAL`: more descriptors than the kernel sends.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    if fds.len() > MAX_SENT {
        return Err(Errno::EINVAL);
    }
    let mut data = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([0; 1040]);
    let len = size_of_val(fds) as libc::c_uint;
    // SAFETY: computes a length.
    let space = unsafe { libc::CMSG_SPACE(len) } as usize;
    let mut message = message(&mut data, &raw mut control, space);
    if fds.is_empty() {
        message.msg_control = ptr::null_mut();
        message.msg_controllen = 0;
    } else {
        // SAFETY: the message was just set up.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: computes an address inside `control`.
        #[expect(clippy::cast_ptr_alignment, reason = "numbers are written unaligned")]
        let first = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
        // SAFETY: computes a length.
        let whole = unsafe { libc::CMSG_LEN(len) };
        // SAFETY: an empty header.
        let mut filled: libc::cmsghdr = unsafe { std::mem::zeroed() };
        filled.cmsg_level = libc::SOL_SOCKET;
        filled.cmsg_type = libc::SCM_RIGHTS;
        filled.cmsg_len = whole as _;
        // SAFETY: `control` has room for the header, and is aligned for it.
        unsafe { header.write(filled) };
        for (number, fd) in fds.iter().enumerate() {
            let place = first.wrapping_add(number);
            // SAFETY: `control` has room for MAX_SENT descriptors.
            unsafe { place.write_unaligned(fd.as_raw_fd()) };
        }
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    loop {
        // SAFETY: the kernel reads `bytes` and `control`, alive for the call, no more than their lengths.
        match unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) } {
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(Errno::last()),
            sent => return Ok(sent as usize),
        }
    }
}

/// An option of a socket that is a plain structure of the kernel's.
///
/// # Safety
///
/// `T` must be the option's type, and be valid whatever bytes the kernel writes.
unsafe fn option<T>(socket: BorrowedFd<'_>, option: libc::c_int) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    let place = value.as_mut_ptr().cast();
    // SAFETY: the kernel writes `len` bytes at most to `value`, alive for the call.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, place, &raw mut len) })?;
    // SAFETY: zeros, or what the kernel wrote, which the caller vouches for.
    Ok(unsafe { value.assume_init() })
}

/// SO_PEERCRED: the process at the other end when it connected, and its user and group.
pub(crate) fn peer_credentials(socket: BorrowedFd<'_>) -> Result<libc::ucred, Errno> {
    // SAFETY: the option is a `ucred`, of integers.
    unsafe { option(socket, libc::SO_PEERCRED) }
}

/// The number of SO_PEERPIDFD, which differs on two architectures.
const SO_PEERPIDFD: libc::c_int =
    if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) { 0x0056 } else { 77 };

/// SO_PEERPIDFD: a pidfd of that process. Linux 6.5.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: the option is an integer.
    let fd: libc::c_int = unsafe { option(socket, SO_PEERPIDFD) }?;
    // SAFETY: the kernel has opened it for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// Whether a descriptor is a memfd, or another file that is in memory: it has seals.
pub(crate) fn is_memory_file(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: takes a number, and touches no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) }).is_ok()
}

/// poll(2) for what can be read, for `timeout` milliseconds at most, or for ever with -1. A signal may end it early.
/// Sets whether each can be read, or is closed at its other end.
pub(crate) fn poll_readable(fds: &mut [libc::pollfd], timeout: libc::c_int) -> Result<(), Errno> {
    fds.iter_mut().for_each(|fd| (fd.events, fd.revents) = (libc::POLLIN, 0));
    // SAFETY: the kernel writes to as many structures as are borrowed for the call.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) }) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Whether a descriptor of an inherited number is a Unix stream socket that listens, and a duplicate of it then.
pub(crate) fn inherited_listener(fd: RawFd) -> Result<Option<OwnedFd>, Errno> {
    // SAFETY: takes numbers; it fails if the number isn't open.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: it was just opened, and nothing else owns it.
    let copy = unsafe { own(copy) };
    let socket = std::os::fd::AsFd::as_fd(&copy);
    let is = |number, expected: libc::c_int| {
        // SAFETY: the option is an integer.
        let found = unsafe { option::<libc::c_int>(socket, number) };
        found.is_ok_and(|found| found == expected)
    };
    let is_listener = is(libc::SO_DOMAIN, libc::AF_UNIX)
        && is(libc::SO_TYPE, libc::SOCK_STREAM)
        && is(libc::SO_ACCEPTCONN, 1);
    Ok(is_listener.then_some(copy))
}

/// Whether the other end was closed, also where bytes of it are still to be read. Not, if it only sends no more.
pub(crate) fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: the kernel writes to the structure, which is borrowed for the call.
    let ready = unsafe { libc::poll(&raw mut polled, 1, 0) };
    ready == 1 && polled.revents & libc::POLLHUP != 0
}

/// Waits until there is room to send, for `timeout` milliseconds at most. A signal may end it early.
pub(crate) fn wait_writable(socket: BorrowedFd<'_>, timeout: libc::c_int) -> Result<(), Errno> {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: the kernel writes to the structure, which is borrowed for the call.
    match check(unsafe { libc::poll(&raw mut polled, 1, timeout) }) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::support::require;

    #[test]
    fn peer_that_is_gone_is_noticed_behind_unread_bytes() {
        require!();
        let (here, mut there) = UnixStream::pair().unwrap();
        assert!(!is_hung_up(here.as_fd()));
        there.write_all(b"unread").unwrap();
        there.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!is_hung_up(here.as_fd()), "it can still be read from");
        drop(there);
        assert!(is_hung_up(here.as_fd()));
    }
}
