//! Where content is written back to.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::{PageData, PageSource, invalid};

/// A source that content can be written back to: what [`PagedMemory`](crate::PagedMemory) is made of.
///
/// A read that begins after a write has returned must deliver what was written. [`FileStore`](super::FileStore) is a file,
/// [`FnStore`] a pair of closures.
///
/// # What a store must not do
///
/// What a [source](PageSource#what-a-source-must-not-do) must not do. A write is called by the thread that flushes, and by
/// a thread that writes pages back when memory is short. Threads that wait for room wait for the latter, so a write must not
/// touch memory that shares the [budget](crate::pager::Budget), nor take a lock that a faulting thread may hold. A fault
/// doesn't wait for ever: a store that does nothing for a second is reported, and the budget exceeded.
pub trait PageStore: PageSource {
    /// Writes `bytes` from byte `offset` of the store on. Both are whole pages of the memory, except that the bytes end
    /// with the store.
    ///
    /// # Errors
    ///
    /// After an error, or a panic, nothing is known of these bytes of the store: the pages stay dirty, and are written
    /// again.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// After an error nothing is known of anything that was written since the last success.
    fn sync(&self) -> io::Result<()>;
}

impl<S: PageStore + ?Sized> PageStore for Arc<S> {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }
}

/// What [`FnStore::on_sync`] was given.
type OnSync = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// A store of closures: one that reads, of the shape of [`PageSource::read`], and one that writes, of the shape of
/// [`PageStore::write`].
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use userfaultfd::pager::{FnStore, PageData, PageSource, PageStore};
///
/// let bytes = Arc::new(Mutex::new(vec![7; 10_000]));
/// let (from, to) = (Arc::clone(&bytes), Arc::clone(&bytes));
/// let read = move |offset: u64, page: &mut [u8]| {
///     let bytes = from.lock().unwrap();
///     let rest = &bytes[offset as usize..];
///     let len = rest.len().min(page.len());
///     page[..len].copy_from_slice(&rest[..len]);
///     Ok(PageData::Data)
/// };
/// let write = move |offset: u64, page: &[u8]| {
///     to.lock().unwrap()[offset as usize..][..page.len()].copy_from_slice(page);
///     Ok(())
/// };
/// let store = FnStore::new(10_000, read, write);
/// store.write(4096, &[8; 4096])?;
/// store.sync()?;
/// assert_eq!(store.len(), Some(10_000));
/// assert_eq!(bytes.lock().unwrap()[4095..4097], [7, 8]);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct FnStore<R, W> {
    len: u64,
    read: R,
    write: W,
    sync: Option<OnSync>,
}

impl<R, W> FnStore<R, W>
where
    R: Fn(u64, &mut [u8]) -> io::Result<PageData> + Send + Sync,
    W: Fn(u64, &[u8]) -> io::Result<()> + Send + Sync,
{
    /// Returns a store of `len` bytes. What is written counts as durable at once, unless [`on_sync`](Self::on_sync) is
    /// called.
    pub fn new(len: u64, read: R, write: W) -> Self {
        Self { len, read, write, sync: None }
    }

    /// Sets the function that makes durable what was written.
    #[must_use]
    pub fn on_sync(mut self, sync: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        self.sync = Some(Box::new(sync));
        self
    }
}

impl<R, W> PageSource for FnStore<R, W>
where
    R: Fn(u64, &mut [u8]) -> io::Result<PageData> + Send + Sync,
    W: Send + Sync,
{
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        (self.read)(offset, page)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }
}

impl<R, W> PageStore for FnStore<R, W>
where
    R: Fn(u64, &mut [u8]) -> io::Result<PageData> + Send + Sync,
    W: Fn(u64, &[u8]) -> io::Result<()> + Send + Sync,
{
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        within(self.len, offset, bytes)?;
        (self.write)(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync.as_ref().map_or(Ok(()), |sync| sync())
    }
}

/// Refuses to write beyond a store's end.
pub(super) fn within(len: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
    match offset.checked_add(bytes.len() as u64) {
        Some(end) if end <= len => Ok(()),
        _ => Err(invalid(format!("{} bytes at byte {offset} of a store of {len} bytes", bytes.len()))),
    }
}

impl<R, W> fmt::Debug for FnStore<R, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FnStore({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn store_of_closures_writes_within_its_length_and_syncs() {
        crate::support::require!();
        let (written, synced) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (writes, syncs) = (Arc::clone(&written), Arc::clone(&synced));
        let read = |offset: u64, page: &mut [u8]| {
            page.fill(offset as u8);
            Ok(PageData::Data)
        };
        let write = move |_: u64, bytes: &[u8]| {
            writes.fetch_add(bytes.len(), Ordering::Relaxed);
            Ok(())
        };
        let store =
            FnStore::new(100, read, write).on_sync(move || match syncs.fetch_add(1, Ordering::Relaxed) {
                0 => Ok(()),
                _ => Err(io::ErrorKind::TimedOut.into()),
            });
        let store: Arc<dyn PageStore> = Arc::new(store);
        let mut page = [0; 4];
        assert_eq!(store.read(9, &mut page).unwrap(), PageData::Data);
        assert_eq!((page, store.len(), store.zeros(100)), ([9; 4], Some(100), u64::MAX));
        store.write(90, &[1; 10]).unwrap();
        for (offset, len) in [(91, 10), (100, 1), (u64::MAX, 1)] {
            let refused = store.write(offset, &vec![0; len]).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{refused}");
        }
        assert_eq!(written.load(Ordering::Relaxed), 10);
        store.sync().unwrap();
        assert_eq!(store.sync().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
