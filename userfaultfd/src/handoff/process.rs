//! [`Process`]: the process at the other end of a socket.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::{io, process};

use serde::{Deserialize, Serialize};

use crate::pager::on_end;
use crate::sys;
use crate::sys::socket;

/// The process at the other end of a socket when it connected, its user and its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Credentials {
    /// The process id, or `None` if the process has none in this process's namespace.
    pub pid: Option<u32>,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Credentials {
    /// Those of a peer that can't be asked.
    pub(super) const UNKNOWN: Self = Self { pid: None, uid: u32::MAX, gid: u32::MAX };

    /// Reads `SO_PEERCRED`.
    pub(super) fn of_peer(socket: &UnixStream) -> io::Result<Self> {
        let libc::ucred { pid, uid, gid } = socket::peer_credentials(socket.as_fd())?;
        Ok(Self { pid: u32::try_from(pid).ok().filter(|pid| *pid != 0), uid, gid })
    }
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid} (user {})", self.uid),
            None => write!(f, "a process of another namespace (user {})", self.uid),
        }
    }
}

/// A process that hands memory over.
#[derive(Debug)]
#[non_exhaustive]
pub struct Process {
    /// Its id, user and group when it connected.
    pub credentials: Credentials,
    /// A pidfd of it, or `None` where the kernel gives none (Linux before 5.3; a process that has ended, before 6.16).
    pub pidfd: Option<OwnedFd>,
}

impl Process {
    /// Returns the process at the other end of a socket, by `SO_PEERCRED` and `SO_PEERPIDFD`.
    ///
    /// Before Linux 6.5 the pidfd is opened by the process id: if the process ends at that moment, and another one gets its
    /// id, that one is meant. The connection is looked at once more afterwards, so that this takes a socket that yet
    /// another process has open.
    ///
    /// # Errors
    ///
    /// `ENOTCONN`, `EOPNOTSUPP`: the socket isn't connected.
    pub fn of_peer(socket: &UnixStream) -> io::Result<Self> {
        let credentials = Credentials::of_peer(socket)?;
        let pidfd = socket::peer_pidfd(socket.as_fd()).ok().or_else(|| {
            let opened = sys::process::open_pidfd(i32::try_from(credentials.pid?).ok()?).ok()?;
            (!socket::is_hung_up(socket.as_fd())).then_some(opened)
        });
        Ok(Self { credentials, pidfd })
    }

    /// Returns whether the process has ended, or `None` without a pidfd.
    #[must_use]
    pub fn has_ended(&self) -> Option<bool> {
        self.pidfd.as_ref().map(|pidfd| sys::is_readable(pidfd.as_fd()))
    }

    /// Returns whether it is this process.
    #[must_use]
    pub fn is_this(&self) -> bool {
        self.credentials.pid == Some(process::id())
    }

    /// The pidfd by which the process may be killed: never this process's.
    pub(super) fn victim(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd).filter(|pidfd| !self.is_this() && !on_end::is_own(*pidfd))
    }
}
