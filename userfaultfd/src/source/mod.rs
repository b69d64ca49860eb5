//! Sources: where the content of pages comes from, and stores, to which it is written back.
//!
//! A [`PageSource`] returns the bytes at an offset. [`LazyMemory`](crate::LazyMemory), the regions of a
//! [`Pager`](crate::pager::Pager), and what copies images take one; an `Arc` of a source is a source, too, so that several
//! memories can share it. A `PageStore` can also be written, for [`PagedMemory`](crate::PagedMemory).
//!
//! | content | source | cargo feature |
//! | --- | --- | --- |
//! | computed, or read by code of yours | any closure `Fn(u64, &mut [u8]) -> io::Result<PageData>`, or a type that implements [`PageSource`] | |
//! | bytes in memory; zeros | [`BytesSource`]; [`ZeroSource`] | |
//! | a file or block device | [`FileSource`]; [`MappedFileSource`], for [`LazyMemory::sigbus`](crate::LazyMemory::sigbus), too | |
//! | a snapshot that this crate has saved | [`SnapshotReader`](crate::snapshot::SnapshotReader), [`Chain`](crate::snapshot::Chain) | `snapshot` |
//! | an image of Firecracker, Cloud Hypervisor or QEMU | [`MemoryImage`](crate::snapshot::MemoryImage); [`MappedRamSource`] | `snapshot`; none |
//! | several sources in a row | [`ConcatSource`] | |
//! | a base with diffs on top; a few bytes replaced | [`LayeredSource`]; [`OverlaySource`] | |
//! | an HTTP server | `HttpSource` | `http` |
//! | S3 and other object stores | `ObjectSource` | `object-store` |
//! | a file in zstd's seekable format | `SeekableZstd` | `zstd` |
//! | any slow source, kept on the local disk for all processes of the host | [`ChunkCache`] | |
//! | futures | `TokioSource` | `tokio` |
//! | completed later by any thread; a fixed number of threads that read | [`AsyncPageSource`] with [`AsyncSource`]; [`ThreadedSource`] | |
//! | a file that is written back; closures that read and write | `FileStore`; `FnStore` | `pager` |
//!
//! All of them are in the module [`pager`](crate::pager), too: `pager::FileSource` is `source::FileSource`.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

mod async_load;
pub(crate) mod call;
mod chunk_cache;
mod concat;
mod data_ranges;
mod file;
#[cfg(feature = "pager")]
mod file_store;
#[cfg(any(feature = "zstd", feature = "snapshot"))]
pub(crate) mod frames;
mod layered;
mod mapped;
mod mapped_ram;
mod memory;
#[cfg(test)]
mod model;
mod overlay;
mod pieces;
#[cfg(any(feature = "http", feature = "object-store"))]
mod remote;
#[cfg(feature = "pager")]
mod store;
mod threaded;
#[cfg(all(feature = "pager", feature = "tokio"))]
mod tokio;
#[cfg(feature = "zstd")]
mod zstd;

pub use async_load::{AsyncPageSource, AsyncSource, Completion, Loaded, PageBuffer};
#[cfg(feature = "pager")]
pub(crate) use async_load::{LoadId, Receiver};
pub use chunk_cache::{CacheError, CacheStatistics, CachedImage, CachedImageBuilder, ChunkCache};
pub use concat::ConcatSource;
#[cfg(feature = "snapshot")]
pub(crate) use file::is_zero;
pub use file::{FileAdvice, FileSource};
#[cfg(feature = "pager")]
pub use file_store::FileStore;
pub use layered::LayeredSource;
pub use mapped::MappedFileSource;
pub use mapped_ram::{MappedRamSource, RamBlock};
pub use memory::{BytesSource, ZeroSource};
pub use overlay::OverlaySource;
#[cfg(feature = "http")]
pub use remote::{HttpSource, HttpSourceBuilder};
#[cfg(feature = "object-store")]
pub use remote::{ObjectSource, ObjectSourceBuilder, ObjectWriter};
#[cfg(any(feature = "http", feature = "object-store"))]
pub use remote::{RemoteError, RemoteOptions, RemoteStatistics};
#[cfg(feature = "pager")]
pub use store::{FnStore, PageStore};
#[cfg(all(feature = "pager", feature = "tokio"))]
pub use tokio::TokioSource;

pub use threaded::ThreadedSource;
#[cfg(feature = "zstd")]
pub use zstd::{SeekableZstd, SeekableZstdBuilder, SeekableZstdWriter, ZstdError};

/// What a source has put into the buffer of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageData {
    /// The whole buffer holds content.
    Data,
    /// The content is zeros. The buffer is ignored.
    Zero,
}

/// The content of memory, by offset.
///
/// The pager's threads call [`read`](Self::read), several at once, and once for each page unless a read fails. A read
/// may take any time: the pager goes on with faults on other pages, and starts
/// [more threads](crate::pager::PagerBuilder::max_threads) where reads hold up the ones it has.
///
/// Any closure of the shape of [`read`](Self::read) is a source:
///
/// ```
/// use userfaultfd::pager::{PageData, PageSource};
///
/// let counting = |offset: u64, page: &mut [u8]| {
///     for (at, word) in page.chunks_exact_mut(8).enumerate() {
///         word.copy_from_slice(&(offset + 8 * at as u64).to_ne_bytes());
///     }
///     Ok(PageData::Data)
/// };
/// let mut page = [0; 16];
/// assert_eq!(counting.read(4096, &mut page)?, PageData::Data);
/// assert_eq!(page[8..], 4104u64.to_ne_bytes());
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # What a source must not do
///
/// - Take a lock that a faulting thread may hold, if the memory belongs to the pager's own process:
///   `println!("{}", memory[0])` faults with the lock of the standard output held. A source that takes the same lock
///   waits for ever.
/// - Touch the memory that it fills.
/// - Deliver other bytes for an offset than it did before, where the memory has a
///   [budget](crate::LazyBuilder::budget): a page may be read again while the program has a reference to it.
/// - Allocate, if the descriptor reports forks: a forking thread holds the allocator's locks until the pager has read
///   the event. A panic allocates, too; so does a snapshot that is read from a chain of more files than are kept open.
pub trait PageSource: Send + Sync {
    /// Fills `page`, a whole number of the region's pages, with what belongs at byte `offset` of the source.
    ///
    /// The buffer holds old bytes, so a source that returns [`PageData::Data`] must write all of it; bytes beyond the end
    /// of the source are zero. The pager zeroes what is beyond [`len`](Self::len) in any case.
    ///
    /// # Errors
    ///
    /// After an error the pager uses nothing of `page`. It retries the read a page at a time, according to its
    /// [`RetryPolicy`](crate::pager::RetryPolicy), then ends the fault as the region says, by default with poison: an
    /// access to the page raises SIGBUS. Zeros are never substituted. A panic counts as an error.
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData>;

    /// Fills `page` as [`read`](Self::read) does, where no thread waits for it: ahead of a fault, or in the background. The
    /// pager calls this instead of `read` then, so that a source whose reads queue up can let those for faults go first.
    /// The provided method calls `read`.
    ///
    /// # Errors
    ///
    /// Those of [`read`](Self::read).
    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read(offset, page)
    }

    /// Returns the length of the source in bytes, or `None` if it has no end, as a closure or zeros.
    ///
    /// A region that reaches beyond the source's last page is refused.
    fn len(&self) -> Option<u64> {
        None
    }

    /// Returns whether the source has a length of 0.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Returns the number of bytes from `offset` on that are known to be zero; `u64::MAX` means all that follows.
    ///
    /// The pager doesn't read them, and fills many pages of zeros in one call. 0 says nothing about the bytes; the
    /// provided method returns it, except beyond the end of the source.
    fn zeros(&self, offset: u64) -> u64 {
        if self.len().is_some_and(|len| offset >= len) { u64::MAX } else { 0 }
    }

    /// Returns `len` bytes from `offset` on if all of them are in memory, else `None`. The kernel then copies the page
    /// from there, without [`read`](Self::read) and a buffer in between.
    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        let _ = (offset, len);
        None
    }

    /// Returns the source as one that answers later, if it is such: an [`AsyncSource`]. The pager then starts loads and goes
    /// on, instead of calling [`read`](Self::read).
    fn as_async(&self) -> Option<&dyn AsyncPageSource> {
        None
    }
}

/// Bytes of a source that are in memory. Only the kernel reads them.
#[derive(Clone, Copy, Debug)]
pub struct SourceBytes<'a> {
    start: NonNull<u8>,
    len: usize,
    source: PhantomData<&'a [u8]>,
}

impl SourceBytes<'_> {
    /// Returns the first address. The bytes may change at any time, so only the kernel may read them.
    #[must_use]
    pub fn as_ptr(&self) -> *const c_void {
        self.start.as_ptr().cast_const().cast()
    }

    /// Returns the number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<'a> From<&'a [u8]> for SourceBytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { start: NonNull::from(bytes).cast(), len: bytes.len(), source: PhantomData }
    }
}

impl<F> PageSource for F
where
    F: Fn(u64, &mut [u8]) -> io::Result<PageData> + Send + Sync,
{
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self(offset, page)
    }
}

/// Writes the methods of a [`PageSource`] that is another one.
macro_rules! read_through {
    ($self:ident => $source:expr) => {
        fn read(&$self, offset: u64, page: &mut [u8]) -> ::std::io::Result<$crate::source::PageData> {
            $source.read(offset, page)
        }

        fn read_early(&$self, offset: u64, page: &mut [u8]) -> ::std::io::Result<$crate::source::PageData> {
            $source.read_early(offset, page)
        }

        fn len(&$self) -> Option<u64> {
            $source.len()
        }

        fn zeros(&$self, offset: u64) -> u64 {
            $source.zeros(offset)
        }

        fn bytes(&$self, offset: u64, len: usize) -> Option<$crate::source::SourceBytes<'_>> {
            $source.bytes(offset, len)
        }

        fn as_async(&$self) -> Option<&dyn $crate::source::AsyncPageSource> {
            $source.as_async()
        }
    };
}
pub(crate) use read_through;

impl<S: PageSource + ?Sized> PageSource for Arc<S> {
    read_through!(self => (**self));
}

/// An error about the arguments of which a source should be made.
fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
