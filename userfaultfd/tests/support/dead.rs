//! Userfaultfds that have outlived their process.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use userfaultfd::{FeatureFlags, Uffd};

use super::child;
use super::memory::Memory;

/// A userfaultfd of a process that is gone, where `memory` was registered with it. For tests that run alone
/// ([`child::run`]).
pub(crate) fn uffd(memory: &Memory) -> Uffd {
    let (here, there) = UnixStream::pair().unwrap();
    let forked = child::fork(|| {
        let uffd = super::uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        child::send_fd(&there, uffd.as_fd());
    });
    forked.succeed();
    Uffd::from(child::receive_fd(&here))
}
