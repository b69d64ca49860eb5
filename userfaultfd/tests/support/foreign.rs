//! Descriptors that are no userfaultfds.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::mapping::memfd;
use super::raw::{own, pipe};

/// One of each kind, with its name.
pub(crate) fn descriptors() -> Vec<(&'static str, OwnedFd)> {
    let (reader, writer) = pipe();
    let mut descriptors: Vec<(_, OwnedFd)> = vec![
        ("the reading end of a pipe", reader.into()),
        ("the writing end of a pipe", writer.into()),
        ("a socket", UnixStream::pair().unwrap().0.into()),
        ("a file", File::open(std::env::current_exe().unwrap()).unwrap().into()),
        ("a directory", File::open("/proc").unwrap().into()),
        ("/dev/null", File::open("/dev/null").unwrap().into()),
        // SAFETY: touches no memory.
        ("an eventfd", own(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })),
        // SAFETY: touches no memory.
        ("an epoll descriptor", own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })),
        // SAFETY: touches no memory.
        ("a timer", own(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) })),
        ("a memfd", memfd(0, 0)),
    ];
    // Not every machine has a network.
    descriptors.extend(UdpSocket::bind("127.0.0.1:0").ok().map(|socket| ("a UDP socket", socket.into())));
    descriptors.extend(File::open("/dev/userfaultfd").ok().map(|device| ("the device", device.into())));
    descriptors
}
