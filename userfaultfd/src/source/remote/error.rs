//! Why bytes of an object can't be had.

use std::io::{self, ErrorKind};
use std::time::Duration;

/// Why a remote object can't be read: what the [`io::Error`] of a read holds ([`io::Error::get_ref`]).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The object isn't the one that was opened: its ETag, its date of modification or its length is another. Final.
    #[error("the object has changed since it was opened: {was} was {found}")]
    Changed {
        /// What it was, as the server said.
        was: String,
        /// What it is now.
        found: String,
    },

    /// The server answered with all of the object (200) where a range was asked for (206). Final.
    #[error("the server sends whole objects and no ranges")]
    NoRanges,

    /// The server answered with another range than was asked for. Final.
    #[error("bytes {asked} were asked for, and the server sent {found}")]
    WrongRange {
        /// The first and the last byte that were asked for.
        asked: String,
        /// What the server says that it sent.
        found: String,
    },

    /// The answer ended before all bytes of it were there. Retried.
    #[error("the answer of {expected} bytes ended after {found}")]
    ShortBody {
        /// Bytes that were asked for.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },

    /// The answer has more bytes than were asked for. Final.
    #[error("the answer has more than the {expected} bytes that were asked for")]
    LongBody {
        /// Bytes that were asked for.
        expected: u64,
    },

    /// The server refuses: credentials are missing, wrong or expired (401, 403). Final.
    #[error("the server refuses access with status {status}: credentials are missing, wrong or expired")]
    Forbidden {
        /// The status of HTTP.
        status: u16,
    },

    /// There is no such object (404, 410). Final.
    #[error("the server has no such object (status {status})")]
    NotFound {
        /// The status of HTTP.
        status: u16,
    },

    /// The server can't answer now (408, 429, 5xx). Retried, not before the server says.
    #[error("the server is busy or broken (status {status})")]
    Busy {
        /// The status of HTTP.
        status: u16,
        /// When to come again: `Retry-After`.
        retry_after: Option<Duration>,
    },

    /// The server answered something that can't be used. Final.
    #[error("the server's answer can't be used: {0}")]
    Unusable(String),

    /// No connection, or it broke. Retried.
    #[error("the connection failed: {0}")]
    Connection(String),

    /// A request took too long. Retried.
    #[error("the request took longer than {0:?}")]
    TimedOut(Duration),

    /// Nothing came until the [time to give up](super::RemoteOptions::give_up_after). The last error is told.
    #[error("given up after {after:?} and {attempts} attempts: {last}")]
    GaveUp {
        /// How long it was tried.
        after: Duration,
        /// How many requests were made.
        attempts: u32,
        /// What the last one ended with.
        last: Box<RemoteError>,
    },
}

impl RemoteError {
    /// Returns whether another attempt may succeed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::ShortBody { .. }
                | Self::Busy { .. }
                | Self::Connection(_)
                | Self::TimedOut(_)
                | Self::GaveUp { .. }
        )
    }

    /// When the server wants to be asked again.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::Changed { .. } | Self::WrongRange { .. } | Self::LongBody { .. } | Self::Unusable(_) => {
                ErrorKind::InvalidData
            }
            Self::NoRanges => ErrorKind::Unsupported,
            Self::ShortBody { .. } => ErrorKind::UnexpectedEof,
            Self::Forbidden { .. } => ErrorKind::PermissionDenied,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Busy { .. } => ErrorKind::ResourceBusy,
            Self::Connection(_) => ErrorKind::ConnectionAborted,
            Self::TimedOut(_) | Self::GaveUp { .. } => ErrorKind::TimedOut,
        }
    }
}

impl From<RemoteError> for io::Error {
    fn from(error: RemoteError) -> Self {
        Self::new(error.kind(), error)
    }
}
