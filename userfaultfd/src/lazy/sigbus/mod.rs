//! Faults that the faulting thread resolves itself, in a handler of SIGBUS: for
//! [`LazyMemory::sigbus`](crate::LazyMemory::sigbus).

pub(super) mod builder;
mod concat;
mod handler;
mod memory;
mod owned;
mod shard;
mod table;
mod visitors;

pub use concat::SignalSafeConcat;
pub(crate) use memory::{Lazy, Lost};
pub(crate) use owned::Owned;

use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

use crate::pager::{BytesSource, MappedFileSource, PageSource, ZeroSource};

/// A source that a signal handler may call, for [`LazyMemory::sigbus`](crate::LazyMemory::sigbus).
///
/// A signal may interrupt a thread while it allocates memory or holds any other lock. So the handler, and all that it
/// calls, must be async-signal-safe: see
/// [signal-safety(7)](https://man7.org/linux/man-pages/man7/signal-safety.7.html). The handler calls
/// [`bytes`](PageSource::bytes) and [`zeros`](PageSource::zeros); [`read`](PageSource::read) is called only while the
/// memory is built.
///
/// ```
/// use std::io;
/// use userfaultfd::pager::{PageData, PageSource, SignalSafe, SourceBytes};
///
/// /// The same page again and again.
/// struct Pattern(Vec<u8>);
///
/// impl PageSource for Pattern {
///     fn read(&self, _: u64, page: &mut [u8]) -> io::Result<PageData> {
///         page.chunks_mut(self.0.len()).for_each(|page| page.copy_from_slice(&self.0));
///         Ok(PageData::Data)
///     }
///
///     fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
///         let whole = offset % self.0.len() as u64 == 0;
///         self.0.get(..len).filter(|_| whole).map(SourceBytes::from)
///     }
/// }
///
/// // SAFETY: `bytes` only computes, and has every page; `zeros` is the provided one.
/// unsafe impl SignalSafe for Pattern {}
///
/// let pattern = Pattern(vec![7; userfaultfd::page_size()]);
/// let memory = userfaultfd::LazyMemory::sigbus(pattern).len(1 << 20).build()?;
/// assert_eq!(memory[123_456], 7);
/// # Ok::<(), userfaultfd::pager::Error>(())
/// ```
///
/// # Safety
///
/// The implementation must make sure that
///
/// - [`bytes`](PageSource::bytes), [`zeros`](PageSource::zeros) and [`len`](PageSource::len) are async-signal-safe:
///   they allocate and free nothing, take no lock, use no lazily initialised thread-local, don't panic, and touch no
///   memory that such a handler fills.
/// - for each page, while the source is whole, either `zeros` returns at least a page or `bytes` returns its content.
///   Pages with a [border](Self::borders) inside are excepted.
#[expect(unsafe_code, reason = "only its implementation can know")]
pub unsafe trait SignalSafe: PageSource {
    /// Returns the offsets, in bytes, at which content of different kinds meets. A page with such an offset inside is
    /// [read](PageSource::read) when the memory is built. The default is the end of a source that has one.
    fn borders(&self) -> Vec<u64> {
        self.len().into_iter().collect()
    }
}

/// Types whose bytes are reached without a call.
macro_rules! plain_bytes {
    ($([$($generics:tt)*] $bytes:ty,)*) => {$(
        // SAFETY: computes with the address and the length that the bytes have, and has each page that isn't cut by
        // the end.
        #[expect(unsafe_code, reason = "the contract is kept, as told")]
        unsafe impl<$($generics)*> SignalSafe for BytesSource<$bytes> {}
    )*};
}

plain_bytes! {
    [] Vec<u8>,
    [] Box<[u8]>,
    [] Arc<[u8]>,
    [] &'static [u8],
    [] &'static str,
    [] String,
    [const N: usize] [u8; N],
    [const N: usize] &'static [u8; N],
    [] Mmap,
    [] MmapMut,
}

// SAFETY: beside computing there are calls of fstat(2). It has each page that isn't cut by the end; if the file has
// become shorter, the source isn't whole.
#[expect(unsafe_code, reason = "the contract is kept, as told")]
unsafe impl SignalSafe for MappedFileSource {}

// SAFETY: all is zero.
#[expect(unsafe_code, reason = "the contract is kept, as told")]
unsafe impl SignalSafe for ZeroSource {}

// SAFETY: asks the source inside, without a lock.
#[expect(unsafe_code, reason = "the contract is kept, as told")]
unsafe impl<S: SignalSafe + ?Sized> SignalSafe for Arc<S> {
    fn borders(&self) -> Vec<u64> {
        (**self).borders()
    }
}
