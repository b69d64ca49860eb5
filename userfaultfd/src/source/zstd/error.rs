//! Why a compressed file is refused.

use std::io::{self, ErrorKind};

/// Why a [`SeekableZstd`](super::SeekableZstd) can't be opened or read: what the [`io::Error`] holds
/// ([`io::Error::get_ref`]).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ZstdError {
    /// The file doesn't end with a seek table: it isn't compressed by zstd, or as one frame, as `zstd` does it.
    #[error("the file has no seek table at its end, so that it isn't a zstd seekable file")]
    NotSeekable,

    /// The seek table has bits that its format reserves for later.
    #[error("the seek table is of a kind that isn't known here (descriptor {0:#04x})")]
    UnknownTable(u8),

    /// The seek table contradicts itself or the file.
    #[error("the seek table is damaged: {0}")]
    DamagedTable(&'static str),

    /// A frame is longer than the reader's [limit](super::SeekableZstdBuilder::max_frame_size).
    #[error("frame {frame} has {len} bytes, and {limit} are allowed")]
    LongFrame {
        /// The number of the frame.
        frame: usize,
        /// Its length, decompressed or compressed, in bytes.
        len: u64,
        /// The limit, in bytes.
        limit: u64,
    },

    /// A frame can't be decompressed.
    #[error("frame {frame} can't be decompressed: {reason}")]
    DamagedFrame {
        /// The number of the frame.
        frame: usize,
        /// What is wrong.
        reason: String,
    },

    /// A frame isn't what its checksum in the seek table says.
    #[error("frame {frame} doesn't match its checksum")]
    WrongChecksum {
        /// The number of the frame.
        frame: usize,
    },
}

impl From<ZstdError> for io::Error {
    fn from(error: ZstdError) -> Self {
        Self::new(ErrorKind::InvalidData, error)
    }
}
