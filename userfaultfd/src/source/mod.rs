//! Where the content of pages comes from.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(feature = "pager")]
pub(crate) mod call;
mod concat;
mod file;
mod mapped;
mod memory;

pub use concat::ConcatSource;
pub use file::FileSource;
pub use mapped::MappedFileSource;
pub use memory::{BytesSource, ZeroSource};

/// How a source answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageData {
    /// The bytes are in the buffer, all of them.
    Data,
    /// All of it is zero. The buffer is as it was; nothing of it is looked at.
    Zero,
}

/// Where the content of memory comes from: what belongs at which offset.
///
/// It is read by the pager's threads, several at once, each page once unless a read fails. A read may take as long
/// as it needs: faults on other pages go on meanwhile, with
/// [more threads](crate::pager::PagerBuilder::max_threads) if need be.
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
/// Where the memory belongs to the process that the pager runs in, a thread that waits for a page may hold any lock
/// of that program: `println!("{}", memory[0])` holds the standard output's. A source that takes the same lock waits
/// for ever. Nor may it touch the memory that it fills. Where the descriptor tells of forks, a thread that forks holds
/// the allocator's locks until the pager has read of it: then a source must not allocate.
pub trait PageSource: Send + Sync {
    /// Fills `page`, a whole number of the region's pages, with what belongs at byte `offset` of the source.
    ///
    /// What lies beyond the end of the source is zero. The buffer holds old bytes, so a source that answers
    /// [`PageData::Data`] writes all of it; what is beyond [`len`](Self::len) is zeroed afterwards in any case.
    ///
    /// # Errors
    ///
    /// Any error means that nothing of `page` is used. The pager tries again as it is configured to, a page at
    /// a time, and in the end makes the page one that can't be read; it never shows zeros instead. A panic counts as
    /// an error.
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData>;

    /// The length of the source, in bytes. `None` if it has no end: a closure, zeros.
    ///
    /// A region that reaches beyond the last page of it is refused.
    fn len(&self) -> Option<u64> {
        None
    }

    /// Whether the source has a length, and it is 0.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// How many bytes from `offset` on are known to be zero, so that they need not be read: the pager fills such
    /// pages with zeros, many in one call. `u64::MAX`: all that follows.
    ///
    /// 0 says nothing about the bytes. That is the answer of a source that doesn't know better, except beyond its
    /// end.
    fn zeros(&self, offset: u64) -> u64 {
        if self.len().is_some_and(|len| offset >= len) { u64::MAX } else { 0 }
    }

    /// The bytes themselves, if they are in memory: the page is copied from there, without [`read`](Self::read) and
    /// a buffer in between. `None` where they aren't, or not all `len` of them.
    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        let _ = (offset, len);
        None
    }
}

/// Bytes of a source that are in memory already. Only the kernel reads them.
#[derive(Clone, Copy, Debug)]
pub struct SourceBytes<'a> {
    start: NonNull<u8>,
    len: usize,
    source: PhantomData<&'a [u8]>,
}

impl SourceBytes<'_> {
    /// The first address. The bytes may change at any time, so only the kernel is to read them.
    #[must_use]
    pub fn as_ptr(&self) -> *const c_void {
        self.start.as_ptr().cast_const().cast()
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
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

impl<S: PageSource + ?Sized> PageSource for Arc<S> {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        (**self).read(offset, page)
    }

    fn len(&self) -> Option<u64> {
        (**self).len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        (**self).zeros(offset)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        (**self).bytes(offset, len)
    }
}

/// An error about what a source should be made of.
fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
