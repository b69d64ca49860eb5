//! The store of a region whose written pages go back to where they came from.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use super::page_set::PageSet;
use crate::pager::fill::buffers::map_for_disk;
use crate::source::PageStore;
use crate::source::call::catch_panic;

/// When written pages may reach the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WriteBack {
    /// At any time, as with mmap(2): by a flush, and when they must leave memory.
    #[default]
    Any,
    /// By a flush alone, for write-ahead logging. Written pages don't leave memory before: when the
    /// [budget](crate::pager::Budget) is full of them, that is a
    /// [`Problem::BudgetFull`](crate::pager::Problem::BudgetFull), and faults exceed it.
    OnFlush,
}

/// Is called before each write, with the bytes of the store that will be written.
pub(crate) type BeforeWrite = Box<dyn Fn(Range<u64>) -> io::Result<()> + Send + Sync>;

/// Pages of one write at most: 1 MiB of 4 KiB.
pub(super) const WRITE_PAGES: usize = 256;

/// What the written pages of a region go to.
pub(crate) struct StoreBacking {
    pub(super) store: Arc<dyn PageStore>,
    /// The offset in the store of the region's first byte.
    offset: u64,
    /// The length of the memory, in bytes: the last page may be cut.
    len: usize,
    pub(crate) write_back: WriteBack,
    before_write: Option<BeforeWrite>,
    /// `/proc/self/mem`: read this way, the kernel doesn't wait for a page that is missing all the same.
    pub(super) memory: File,
    /// One thread at a time writes. Not a ranked lock: the program's store and hook are called while it is held, so it comes
    /// before all others.
    turn: Mutex<Turn>,
}

/// What the thread has that writes.
pub(super) struct Turn {
    pub(super) buffer: MmapMut,
    /// Pages that were written since the last sync that succeeded.
    pub(super) unsynced: PageSet,
    /// Pages that were written before a sync that failed, and have left memory.
    pub(super) lost: PageSet,
}

impl StoreBacking {
    pub(crate) fn new(
        store: Arc<dyn PageStore>,
        (offset, len): (u64, usize),
        write_back: WriteBack,
        before_write: Option<BeforeWrite>,
    ) -> io::Result<Self> {
        let memory = File::open("/proc/self/mem")?;
        let buffer = map_for_disk(WRITE_PAGES * crate::page_size())?;
        let turn = Mutex::new(Turn { buffer, unsynced: PageSet::default(), lost: PageSet::default() });
        Ok(Self { store, offset, len, write_back, before_write, memory, turn })
    }

    /// Takes the turn to write. Not with a lock held.
    pub(super) fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the hook for pages that will be written.
    pub(super) fn before_write(&self, pages: &Range<usize>) -> io::Result<()> {
        let Some(hook) = &self.before_write else { return Ok(()) };
        let (offset, len) = self.place_of(pages);
        catch_panic(|| hook(offset..offset + len as u64))
    }

    /// Writes pages, whose bytes are the first ones of a buffer.
    pub(super) fn write(&self, pages: &Range<usize>, bytes: &[u8]) -> io::Result<usize> {
        let (offset, len) = self.place_of(pages);
        catch_panic(|| self.store.write(offset, &bytes[..len])).map(|()| len)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        catch_panic(|| self.store.sync())
    }

    /// Where pages are in the store: the offset, and the length in bytes.
    fn place_of(&self, pages: &Range<usize>) -> (u64, usize) {
        let page_size = crate::page_size();
        let start = pages.start * page_size;
        (self.offset + start as u64, (pages.end * page_size).min(self.len) - start)
    }
}
