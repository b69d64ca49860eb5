//! Why a snapshot wasn't taken.

use std::io;

use crate::error::Whole;

/// Why a snapshot wasn't taken. Memory is free and everybody goes on, whatever it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the kernel's failed: memory that can't be protected, no descriptor.
    #[error(transparent)]
    Kernel(#[from] crate::Error),

    /// The sink failed.
    #[error("the sink of the snapshot failed: {}", Whole(.0))]
    Sink(io::Error),

    /// The sink panicked.
    #[error("the sink of the snapshot panicked")]
    SinkPanicked,

    /// It was [aborted](super::Snapshot::abort), or its memory was given up.
    #[error("the snapshot was aborted")]
    Aborted,

    /// Another snapshot of this series is still at work.
    #[error("a snapshot of the same memory is still at work")]
    Running,

    /// What is missing of a [`LazyMemory`](crate::LazyMemory) can't be filled.
    #[cfg(feature = "pager")]
    #[error("missing pages can't be filled before the snapshot: {0}")]
    Fill(crate::pager::Error),

    /// A thread or what it needs can't be had.
    #[error("a thread for the snapshot can't be started: {0}")]
    Thread(io::Error),
}

/// The result of taking a snapshot.
pub type Result<T, E = Error> = std::result::Result<T, E>;
