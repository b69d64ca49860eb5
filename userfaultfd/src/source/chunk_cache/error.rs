//! Why a cache can't be used.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

/// Why a [`ChunkCache`](super::ChunkCache) or an image in it can't be used: what the [`io::Error`] of an operation holds
/// ([`io::Error::get_ref`]).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A call on the directory or on a file in it failed: it isn't there, may not be written, is read-only, or the disk is
    /// full.
    #[error("{what} {path}: {error}", path = path.display())]
    Io {
        /// What was tried: `can't open`, `can't create`, …
        what: &'static str,
        /// The directory or the file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        error: io::Error,
    },

    /// Every user of the machine may write to the directory, and so decide what the content of memory is.
    #[error("every user may write to the directory {path}, and so change what memory holds", path = path.display())]
    WritableByAll {
        /// The directory.
        path: PathBuf,
    },

    /// The file system can't make holes in files, by which chunks are given back.
    #[error("the file system of {path} can't punch holes into files", path = path.display())]
    NoHoles {
        /// The directory.
        path: PathBuf,
    },

    /// A file has the name of one of the cache's, and isn't one.
    #[error("{path} isn't a file of a chunk cache", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },

    /// A file of the cache is of another version of the format.
    #[error("{path} is of version {found} of the format, and {known} is known", path = path.display())]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that this library writes.
        known: u32,
    },

    /// A file of the cache contradicts itself. [`ChunkCache::remove`](super::ChunkCache::remove) removes the image.
    #[error("{path} is damaged: {what}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },

    /// The image in the cache has another length than the source.
    #[error("the image {name} has {cached} bytes in the cache, and {found} in its source")]
    OtherLength {
        /// The image.
        name: String,
        /// Its length in the cache.
        cached: u64,
        /// The length of the source.
        found: u64,
    },

    /// The image in the cache has another [identity](super::CachedImageBuilder::identity).
    #[error("the image {name} is {cached:?} in the cache, and {found:?} was asked for")]
    OtherIdentity {
        /// The image.
        name: String,
        /// Its identity in the cache.
        cached: String,
        /// The identity that was asked for.
        found: String,
    },

    /// The image is open, in this process or another one.
    #[error("the image {name} is in use")]
    InUse {
        /// The image.
        name: String,
    },

    /// Another process has locked the directory for longer than the [wait limit](super::CachedImageBuilder::wait_limit).
    #[error("another process has locked the cache {path} for too long", path = path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
}

impl CacheError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { error, .. } => error.kind(),
            Self::WritableByAll { .. } => ErrorKind::PermissionDenied,
            Self::NoHoles { .. } => ErrorKind::Unsupported,
            Self::Foreign { .. } | Self::OtherVersion { .. } | Self::Damaged { .. } => ErrorKind::InvalidData,
            Self::OtherLength { .. } | Self::OtherIdentity { .. } => ErrorKind::InvalidInput,
            Self::InUse { .. } => ErrorKind::ResourceBusy,
            Self::Locked { .. } => ErrorKind::TimedOut,
        }
    }
}

impl From<CacheError> for io::Error {
    fn from(error: CacheError) -> Self {
        Self::new(error.kind(), error)
    }
}
