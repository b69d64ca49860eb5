//! What workers wait with: the descriptors, the timer of what was put off, and the end.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::pager::memory::descriptor::Descriptor;
use crate::{Errno, sys};

/// What an event of a poll is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u64);

impl Token {
    /// The end, or the bell of the control thread.
    pub(super) const STOP: Self = Self(u64::MAX);
    /// Something that was put off is due.
    pub(crate) const RETRY: Self = Self(u64::MAX - 1);

    /// The slot in the table, and the number of the descriptor that is meant: the slot may be another's since.
    pub(crate) fn of(descriptor: &Descriptor) -> Self {
        Self(u64::from(descriptor.slot) << 32 | descriptor.id & u64::from(u32::MAX))
    }

    /// What an event is about. `None`: the end, or the bell.
    pub(crate) fn of_event(event: &libc::epoll_event) -> Option<Self> {
        Some(Self(event.u64)).filter(|token| *token != Self::STOP)
    }

    pub(crate) fn slot(self) -> usize {
        (self.0 >> 32) as usize
    }

    pub(crate) fn means(self, descriptor: &Descriptor) -> bool {
        self == Self::of(descriptor)
    }

    pub(super) fn number(self) -> u64 {
        self.0
    }
}

/// Edge-triggered, so that a fault wakes one worker: it reads all there is.
const EVENTS: libc::c_int = libc::EPOLLIN | libc::EPOLLET;

#[derive(Debug)]
pub(crate) struct Poll {
    epoll: OwnedFd,
    /// Readable at any time, and looked at once the pager stops.
    shutdown_eventfd: OwnedFd,
}

impl Poll {
    /// With the timer of what was put off.
    pub(crate) fn new(timer: BorrowedFd<'_>) -> Result<Self, Errno> {
        let (epoll, shutdown_eventfd) = (sys::epoll()?, sys::eventfd(true)?);
        let stop = Token::STOP.number();
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, shutdown_eventfd.as_fd(), 0, stop)?;
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, timer, EVENTS, Token::RETRY.number())?;
        Ok(Self { epoll, shutdown_eventfd })
    }

    /// Its own descriptors, for a fork's child.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.epoll.as_fd(), self.shutdown_eventfd.as_fd()]
    }

    pub(crate) fn add(&self, descriptor: &Descriptor, uffd: BorrowedFd<'_>) -> Result<(), Errno> {
        let token = Token::of(descriptor).number();
        sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_ADD, uffd, EVENTS, token)
    }

    pub(crate) fn remove(&self, uffd: BorrowedFd<'_>) {
        // Others may hold the same description open. It isn't there if adding it has failed.
        let _deleted = sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_DEL, uffd, 0, 0);
    }

    /// Has a worker that waits look at a descriptor, if something is there to read.
    pub(crate) fn rearm(&self, descriptor: &Descriptor, uffd: BorrowedFd<'_>) {
        let token = Token::of(descriptor).number();
        let handed = sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_MOD, uffd, EVENTS, token);
        // Removed meanwhile, or else it is there.
        debug_assert!(matches!(handed, Ok(()) | Err(Errno::ENOENT)), "{handed:?}");
    }

    /// Waits for something to read. Returns how many tokens there are.
    pub(crate) fn wait(
        &self,
        events: &mut [libc::epoll_event],
        timeout: libc::c_int,
    ) -> Result<usize, Errno> {
        sys::epoll_wait(self.epoll.as_fd(), events, timeout)
    }

    /// Whether there is something to read, on any descriptor.
    pub(crate) fn has_events(&self) -> bool {
        sys::is_readable(self.epoll.as_fd())
    }

    /// Wakes all workers, now and from now on.
    pub(crate) fn stop(&self) {
        let (epoll, eventfd) = (self.epoll.as_fd(), self.shutdown_eventfd.as_fd());
        let stop = Token::STOP.number();
        sys::epoll_control(epoll, libc::EPOLL_CTL_MOD, eventfd, libc::EPOLLIN, stop)
            .unwrap_or_else(|errno| unreachable!("descriptor {} is polled: {errno}", eventfd.as_raw_fd()));
    }
}
