//! What is the whole machine's is one test's at a time, in this process or another.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::raw::check;

/// A file that is locked.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Waits until no other process or test holds it.
    pub(crate) fn wait(file: File) -> Self {
        let _pause = super::pause_watchdog();
        // SAFETY: touches no memory.
        check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }).unwrap();
        Self(file)
    }
}

impl Drop for Lock {
    /// Closing the file isn't enough: a process that another test has forked meanwhile has it open, too, and may be
    /// waiting for this very lock.
    fn drop(&mut self) {
        // SAFETY: touches no memory.
        check(unsafe { libc::flock(self.0.as_raw_fd(), libc::LOCK_UN) }).unwrap();
    }
}
