//! What can go wrong between a monitor and its handler.

use std::io;
use std::time::Duration;

use super::{Credentials, Dialect, MemoryRegion, Message};

/// An error of the module [`handoff`](super).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The listening socket couldn't be made, or doesn't work any more. The text has the path of a socket that couldn't be
    /// made.
    #[error("listening failed: {0}")]
    Listen(io::Error),

    /// No socket was inherited that can be used.
    #[error("no socket is inherited: {reason}")]
    Inherited {
        /// Why not.
        reason: String,
    },

    /// A peer handed nothing over that can be served. All other peers are served on.
    #[error("{peer} hands nothing over: {error}")]
    Peer {
        /// The process at the other end.
        peer: Credentials,
        /// Why not.
        error: PeerError,
    },

    /// The dialect can't say what was to be sent, or hands over no userfaultfd.
    #[error("{dialect} has no message for {what}")]
    NoMessage {
        /// The dialect.
        dialect: Dialect,
        /// What was to be sent.
        what: &'static str,
    },

    /// The handler has closed the connection, or hasn't confirmed in time, that it serves the memory.
    #[error("the handler doesn't confirm that it serves the memory: {0}")]
    NotConfirmed(io::Error),

    /// Sending failed.
    #[error("sending failed: {0}")]
    Send(io::Error),
}

impl Error {
    /// Returns whether the listener works on: the error concerns one peer.
    #[must_use]
    pub fn is_of_peer(&self) -> bool {
        matches!(self, Self::Peer { .. })
    }
}

/// Why a peer is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The first bytes belong to no dialect that is allowed.
    #[error("its message is of no dialect that is allowed: {shown}")]
    Unrecognised {
        /// The first bytes, printable.
        shown: String,
    },

    /// The bytes are no message of the dialect.
    #[error("this is no message of {dialect}: {reason}: {shown}")]
    Message {
        /// The dialect.
        dialect: Dialect,
        /// Why not.
        reason: String,
        /// The first bytes, printable.
        shown: String,
    },

    /// The dialect has the message, but not at this place.
    #[error("it sends {message:?} before it hands memory over")]
    Unexpected {
        /// The message.
        message: Message,
    },

    /// The message exceeds the limit.
    #[error("its message is longer than {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },

    /// The message has no regions.
    #[error("its message has no regions")]
    NoRegions,

    /// A region can't be.
    #[error("the region of {:#x} bytes at {:#x} can't be: {reason}", .region.len, .region.address)]
    Region {
        /// The region.
        region: MemoryRegion,
        /// Why not.
        reason: &'static str,
    },

    /// No descriptor came with the message.
    #[error("no userfaultfd came with its message")]
    NoUserfaultfd,

    /// A descriptor came, and isn't a userfaultfd.
    #[error("the descriptor that came with its message is no userfaultfd")]
    NotUserfaultfd,

    /// A descriptor beside the userfaultfd isn't a file in memory.
    #[error("a descriptor beside the userfaultfd is no file in memory")]
    NotMemory,

    /// More descriptors came than the dialect has.
    #[error("{found} descriptors came with its message, and there are {most} at most")]
    TooManyDescriptors {
        /// The number of descriptors.
        found: usize,
        /// The number that the dialect has.
        most: usize,
    },

    /// Descriptors came and were lost: this process may open no more.
    #[error("descriptors were lost: this process may open no more (RLIMIT_NOFILE)")]
    DescriptorsLost,

    /// The peer closed the connection before its message was complete.
    #[error("it closed the connection after {received} bytes")]
    Closed {
        /// The number of bytes that came.
        received: usize,
    },

    /// The message wasn't complete in time.
    #[error("after {after:?} its message isn't complete: {received} bytes came")]
    Deadline {
        /// The deadline.
        after: Duration,
        /// The number of bytes that came.
        received: usize,
    },

    /// Too many peers have connected and sent nothing.
    #[error("it sent nothing while {connections} others waited")]
    Crowded {
        /// The number of connections.
        connections: usize,
    },

    /// The program's own check refused the peer.
    #[error("the check of its credentials refused it")]
    NotAdmitted,

    /// The socket failed.
    #[error("its socket failed: {0}")]
    Socket(io::Error),
}
