//! The error type of snapshots.

use std::io;

use crate::error::Whole;

/// The error of a snapshot. After any error protection is lifted, and all writers go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the kernel failed: the memory can't be protected, or no descriptor could be created.
    #[error(transparent)]
    Kernel(#[from] crate::Error),

    /// The sink failed.
    #[error("the sink of the snapshot failed: {}", Whole(.0))]
    Sink(io::Error),

    /// The sink panicked.
    #[error("the sink of the snapshot panicked")]
    SinkPanicked,

    /// The snapshot was [aborted](super::Snapshot::abort), or its memory was given up.
    #[error("the snapshot was aborted")]
    Aborted,

    /// Another snapshot of this series is still running.
    #[error("a snapshot of the same memory is still at work")]
    Running,

    /// Missing pages of a [`LazyMemory`](crate::LazyMemory) couldn't be filled.
    #[cfg(feature = "pager")]
    #[error("missing pages can't be filled before the snapshot: {0}")]
    Fill(crate::pager::Error),

    /// Failed to create a thread, or what it needs.
    #[error("a thread for the snapshot can't be started: {0}")]
    Thread(io::Error),
}

/// The result of taking a snapshot.
pub type Result<T, E = Error> = std::result::Result<T, E>;
