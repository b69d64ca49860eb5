//! Loads that are started and answered later, by any thread: as many can be under way as the source takes, without a
//! thread for each.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions};

use super::{PageData, PageSource, SourceBytes};

/// The content of memory, by offset, from a source whose loads are started and completed later, by any thread.
///
/// The pager's threads call [`start`](Self::start), which must return at once. The thread that has the content then calls
/// [`Completion::complete`], from any thread, or from within `start`. Up to 4096 loads of a pager are in flight at the same
/// time; what is beyond that waits. A source that limits its requests should let those of `start` go before those of
/// [`start_early`](Self::start_early).
///
/// An [`AsyncSource`] makes a [`PageSource`] of it, which regions and builders take:
///
/// ```
/// use std::sync::mpsc;
/// use std::thread;
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{AsyncPageSource, AsyncSource, Completion, Loaded, PageBuffer};
///
/// /// Hands all loads to one thread, which answers many of them at once.
/// struct Batched(mpsc::Sender<(u64, PageBuffer, Completion)>);
///
/// impl AsyncPageSource for Batched {
///     fn start(&self, offset: u64, buffer: PageBuffer, done: Completion) {
///         // If the thread is gone, both are dropped: that is an error, too.
///         let _sent = self.0.send((offset, buffer, done));
///     }
/// }
///
/// let (sender, loads) = mpsc::channel::<(u64, PageBuffer, Completion)>();
/// thread::spawn(move || {
///     for (offset, mut buffer, done) in loads {
///         buffer.fill((offset >> 20) as u8);
///         done.complete(Ok(Loaded::Data(buffer)));
///     }
/// });
/// let memory = LazyMemory::builder(AsyncSource::new(Batched(sender))).len(8 << 20).build()?;
/// assert_eq!(memory[5 << 20], 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What becomes of a load
///
/// - Its content is put in place when it arrives, for faults before what was read ahead.
/// - An error is retried as one of [`PageSource::read`], and so is a completion that is dropped without an answer, and a
///   panic in `start`.
/// - If its memory is unmapped, moved, removed or handed over meanwhile, its content is dropped, and the threads that
///   waited fault again.
/// - Filling all ([`finish`](crate::pager::Pager::finish)) waits for loads in flight. Dropping or detaching a pager,
///   and removing a region, don't: they poison or hand over what is still missing, and late answers change nothing.
/// - Fills without a fault, but for read-ahead ([`read_ahead_threads`](crate::pager::PagerBuilder::read_ahead_threads), of
///   which one is enough), start a load and wait for it, each in a thread of its own.
///
/// # What a source must not do
///
/// That of [`PageSource`]: the thread that completes a load must not need the memory that waits for it, nor a lock that a
/// faulting thread may hold. `start` must not block: as long as it does, a thread of the pager resolves no other fault.
pub trait AsyncPageSource: Send + Sync {
    /// Starts to load what belongs at byte `offset` of the source, as many bytes as `buffer` has, a whole number of pages.
    ///
    /// The buffer holds old bytes, so all of it must be written before it is handed back as [`Loaded::Data`].
    fn start(&self, offset: u64, buffer: PageBuffer, done: Completion);

    /// Starts to load like [`start`](Self::start), where no thread waits for the bytes yet. The provided method calls
    /// `start`.
    fn start_early(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        self.start(offset, buffer, done);
    }

    /// Returns the length of the source in bytes, or `None` if it has no end: see [`PageSource::len`].
    fn len(&self) -> Option<u64> {
        None
    }

    /// Returns whether the source has a length of 0.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Returns the number of bytes from `offset` on that are known to be zero: see [`PageSource::zeros`].
    fn zeros(&self, offset: u64) -> u64 {
        if self.len().is_some_and(|len| offset >= len) { u64::MAX } else { 0 }
    }

    /// Checks that the calling thread may wait for a load. A blocking [`read`](PageSource::read) calls it before it waits.
    ///
    /// # Errors
    ///
    /// Any error ends the read: for a thread that runs the loads itself, and so would wait for itself.
    fn check_wait(&self) -> io::Result<()> {
        Ok(())
    }
}

impl<S: AsyncPageSource + ?Sized> AsyncPageSource for Arc<S> {
    fn start(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        (**self).start(offset, buffer, done);
    }

    fn start_early(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        (**self).start_early(offset, buffer, done);
    }

    fn len(&self) -> Option<u64> {
        (**self).len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        (**self).zeros(offset)
    }

    fn check_wait(&self) -> io::Result<()> {
        (**self).check_wait()
    }
}

/// The content of a load.
#[derive(Debug)]
pub enum Loaded {
    /// The buffer of the load, all of which was written.
    Data(PageBuffer),
    /// Zeros. The buffer can be dropped.
    Zero,
}

/// The number by which a receiver knows a load.
pub(crate) type LoadId = u64;

/// Where the answer to a load goes.
pub(crate) trait Receiver: Send + Sync {
    /// Takes an answer. Called once for each load.
    fn receive(&self, load: LoadId, answer: io::Result<Loaded>);

    /// Takes back the mapping of a buffer.
    fn put_back(&self, bytes: MmapMut);
}

/// The buffer of a load, which belongs to the load until it is handed back or dropped: no end of a region or a pager takes
/// it away. It is apart from the memory that is filled.
pub struct PageBuffer {
    bytes: Option<MmapMut>,
    len: usize,
    load: LoadId,
    to: Arc<dyn Receiver>,
}

impl PageBuffer {
    /// Makes the first `len` bytes of a mapping the buffer of a load.
    pub(crate) fn new(bytes: MmapMut, len: usize, load: LoadId, to: Arc<dyn Receiver>) -> Self {
        debug_assert!(len <= bytes.len());
        Self { bytes: Some(bytes), len, load, to }
    }

    /// Takes the mapping out.
    #[cfg(feature = "pager")]
    pub(crate) fn into_mapping(mut self) -> MmapMut {
        self.bytes.take().unwrap_or_else(|| unreachable!("it is there until the buffer is dropped"))
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_deref().map_or(&[], |bytes| &bytes[..self.len])
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.bytes.as_deref_mut().map_or(&mut [], |bytes| &mut bytes[..len])
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            self.to.put_back(bytes);
        }
    }
}

impl fmt::Debug for PageBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageBuffer").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Completes a load, with its content or an error. Dropping it uncompleted counts as a failed read.
#[must_use = "a load that is dropped has failed"]
pub struct Completion {
    load: LoadId,
    /// `None` once it is answered.
    to: Option<Arc<dyn Receiver>>,
}

impl Completion {
    pub(crate) fn new(load: LoadId, to: Arc<dyn Receiver>) -> Self {
        Self { load, to: Some(to) }
    }

    /// Completes the load. Any thread may call it; it doesn't wait for the content to be put in place.
    ///
    /// The buffer of another load counts as an error.
    pub fn complete(mut self, answer: io::Result<Loaded>) {
        let Some(to) = self.to.take() else { return };
        let answer = match answer {
            Ok(Loaded::Data(buffer)) if buffer.load != self.load || !Arc::ptr_eq(&buffer.to, &to) => {
                Err(io::Error::other("the source answered with the buffer of another load"))
            }
            answer => answer,
        };
        to.receive(self.load, answer);
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(to) = self.to.take() {
            to.receive(self.load, Err(io::Error::other("the source dropped the load without an answer")));
        }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion").field("load", &self.load).finish_non_exhaustive()
    }
}

/// Adapter that makes a [`PageSource`] of an [`AsyncPageSource`]. A pager starts its loads; where a thread needs the content itself
/// ([`read`](PageSource::read)), it waits for one.
#[derive(Clone, Debug)]
pub struct AsyncSource<S>(S);

impl<S: AsyncPageSource> AsyncSource<S> {
    /// Returns a source whose loads are those of `source`.
    pub fn new(source: S) -> Self {
        Self(source)
    }

    /// Returns the source.
    pub fn get_ref(&self) -> &S {
        &self.0
    }

    fn wait(&self, page: &mut [u8], start: impl FnOnce(&S, PageBuffer, Completion)) -> io::Result<PageData> {
        self.0.check_wait()?;
        let waiter = Arc::new(Waiter::default());
        let to = || Arc::clone(&waiter) as Arc<dyn Receiver>;
        let bytes = MmapOptions::new().len(page.len()).no_reserve_swap().map_anon()?;
        start(&self.0, PageBuffer::new(bytes, page.len(), 0, to()), Completion::new(0, to()));
        match waiter.wait()? {
            Loaded::Zero => Ok(PageData::Zero),
            Loaded::Data(buffer) => {
                page.copy_from_slice(&buffer);
                Ok(PageData::Data)
            }
        }
    }
}

impl<S: AsyncPageSource> PageSource for AsyncSource<S> {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.wait(page, |source, buffer, done| source.start(offset, buffer, done))
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.wait(page, |source, buffer, done| source.start_early(offset, buffer, done))
    }

    fn len(&self) -> Option<u64> {
        self.0.len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.0.zeros(offset)
    }

    fn bytes(&self, _: u64, _: usize) -> Option<SourceBytes<'_>> {
        None
    }

    fn as_async(&self) -> Option<&dyn AsyncPageSource> {
        Some(&self.0)
    }
}

/// A thread that waits for the answer to one load.
#[derive(Default)]
struct Waiter {
    answer: Mutex<Option<io::Result<Loaded>>>,
    changed: Condvar,
}

impl Waiter {
    fn wait(&self) -> io::Result<Loaded> {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = self.changed.wait_while(answer, |answer| answer.is_none());
        let answer = answer.unwrap_or_else(PoisonError::into_inner).take();
        answer.unwrap_or_else(|| unreachable!("the wait ends with an answer"))
    }
}

impl Receiver for Waiter {
    fn receive(&self, _: LoadId, answer: io::Result<Loaded>) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.changed.notify_all();
    }

    fn put_back(&self, bytes: MmapMut) {
        drop(bytes);
    }
}
