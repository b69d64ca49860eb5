//! [`PagedMemory`]: a store as memory.

mod builder;

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub use self::builder::PagedBuilder;
use super::{LazyMemory, Pinned};
use crate::pager::evict::clean;
use crate::pager::evict::residence::Residence;
use crate::pager::evict::writer::Writer;
use crate::pager::{self, BackgroundFill, FillOrder, FlushError, PageStore, Problem, Statistics, WriteBack};
use crate::sync::AtomicU64;

/// A store as memory: read on first access, written back, and never more of it resident than a
/// [budget](PagedBuilder::budget) has.
///
/// It dereferences to `[u8]`, as [`LazyMemory`] does, of which it is made: what is said there of failing sources, system
/// calls, locks and forks holds here, too.
///
/// ```
/// use userfaultfd::PagedMemory;
/// use userfaultfd::pager::{Budget, FileStore};
///
/// let path = std::env::temp_dir().join(format!("paged-{}", std::process::id()));
/// std::fs::write(&path, vec![1; 1 << 20])?;
/// let budget = Budget::new(128 << 10);
/// let mut memory = match PagedMemory::builder(FileStore::open(&path)?).budget(&budget).build() {
///     Ok(memory) => memory,
///     Err(error) => return Ok(println!("{error}")), // no write protection here
/// };
/// memory[7] = 2;
/// memory.flush()?;
/// assert_eq!(std::fs::read(&path)?[6..8], [1, 2]);
/// assert!(memory[8..].iter().all(|byte| *byte == 1));
/// println!("{:?}", memory.statistics());
/// memory.close()?;
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What reaches the store, and when
///
/// [`flush`](Self::flush) and [`flush_range`](Self::flush_range) write the pages that were written, sorted and merged, and
/// sync the store. When they return without an error, all that was written to the memory before they were called is
/// durable. Other writes go on meanwhile: a page that is written during a flush is written by it as it was at some moment
/// since its beginning, and whole.
///
/// With [`WriteBack::Any`] a thread of the memory also writes pages that are about to leave it. With
/// [`WriteBack::OnFlush`] nothing reaches the store but by a flush, [`close`](Self::close) included.
///
/// Nothing keeps a crash from leaving some pages of a flush written and others not. [`before_write`](PagedBuilder::before_write)
/// is the place for a log.
///
/// # Errors of the store
///
/// A write that fails is retried as [`retry`](PagedBuilder::retry) says, then reported: by the [`FlushError`] of a flush,
/// which names the ranges that are dirty still, or as [`Problem::WriteBack`]. The pages stay in memory. A read that fails is
/// SIGBUS, as for [`LazyMemory`].
///
/// # End
///
/// [`close`](Self::close) flushes, and gives the memory back with the error if that fails. **Dropping** it flushes, too, and
/// reports what fails as [`Problem::WriteBack`]; but with [`WriteBack::OnFlush`] it writes nothing, and reports what is lost
/// as [`Problem::Discarded`].
///
/// # Other users of the store
///
/// The memory shows what another user of the store writes when it next reads the page, and overwrites it with the whole
/// page if that was written here. So of two processes that write the same page of one file one loses its write, as with
/// write(2); each page is one's or the other's, whole.
pub struct PagedMemory {
    /// First, so that the thread has ended when the memory ends.
    writer: Writer,
    memory: LazyMemory,
    is_closed: bool,
}

/// What a [`PagedMemory`] has done, and what it has now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PagedStatistics {
    /// Faults on pages that weren't in memory.
    pub faults: u64,
    /// Pages that were filled again after they had left.
    pub refaults: u64,
    /// Pages that have left memory.
    pub evictions: u64,
    /// Pages that were taken back on their way out.
    pub second_chances: u64,
    /// Pages that were written to the store.
    pub write_backs: u64,
    /// Times that a page couldn't be written.
    pub unwritten: u64,
    /// Bytes that were read from the store.
    pub bytes_read: u64,
    /// Bytes that were written to the store.
    pub bytes_written: u64,
    /// Bytes of pages that were written and aren't in the store yet: now.
    pub dirty: usize,
    /// Bytes that are in memory now.
    pub resident: usize,
    /// Times that a thread waited for room.
    pub waits: u64,
    /// How long threads waited, altogether.
    pub waited: Duration,
}

/// The error of [`PagedMemory::close`]: the memory, and why its flush failed. Dirty pages are still in the memory.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct CloseError {
    /// The memory.
    pub memory: PagedMemory,
    /// The reason.
    pub error: FlushError,
}

impl PagedMemory {
    /// Maps all of a store, without a limit.
    ///
    /// # Errors
    ///
    /// As [`PagedBuilder::build`].
    pub fn new(store: impl PageStore + 'static) -> pager::Result<Self> {
        Self::builder(store).build()
    }

    /// Returns a builder.
    pub fn builder(store: impl PageStore + 'static) -> PagedBuilder {
        PagedBuilder::new(store)
    }

    fn residence(&self) -> &Arc<Residence> {
        self.memory.region.residence.as_ref().expect("paged memory has a budget")
    }

    /// Writes all dirty pages to the store, and syncs it. [Pinned](Self::pin) pages that were written count as
    /// dirty still afterwards.
    ///
    /// # Errors
    ///
    /// The error names what is dirty still.
    pub fn flush(&self) -> Result<(), FlushError> {
        self.flush_range(0..self.memory.len)
    }

    /// Writes the pages of a range that were written to the store, and syncs the whole store. The range is in bytes, and
    /// cut to the memory.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    pub fn flush_range(&self, range: Range<usize>) -> Result<(), FlushError> {
        self.write(range, true)
    }

    /// Writes the pages of a range, and syncs the store if `syncs`.
    fn write(&self, range: Range<usize>, syncs: bool) -> Result<(), FlushError> {
        if self.memory.check_owner().is_err() {
            return Err(FlushError::in_child());
        }
        // A thread that was woken by a fill may have written the page, and be the one that flushes, before the fill has
        // noted that the page is there.
        self.memory.wait_for_fills();
        clean::flush(self.residence(), &self.pages_of(range), syncs)
    }

    fn pages_of(&self, range: Range<usize>) -> Range<usize> {
        self.memory.pages_of(&self.memory.within(range.start, range.len()))
    }

    /// Takes the pages of a range out of memory, in bytes, cut to the memory. With [`WriteBack::Any`] those that were
    /// written are written to the store before, and not synced; with [`WriteBack::OnFlush`] they stay. So do
    /// [pinned](Self::pin) ones, and those that are accessed meanwhile.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush). All others are out of memory all the same.
    pub fn evict(&self, range: Range<usize>) -> Result<(), FlushError> {
        if self.memory.check_owner().is_err() {
            return Err(FlushError::in_child());
        }
        self.memory.wait_for_fills();
        let pages = self.pages_of(range);
        match self.write_back() {
            WriteBack::OnFlush => {
                clean::evict(self.residence(), pages);
                Ok(())
            }
            WriteBack::Any => clean::write_and_evict(self.residence(), pages),
        }
    }

    /// Starts to fill the missing pages of a range in the background: in bytes, cut to the memory, and to half of the
    /// budget. Dropping the handle ends that.
    ///
    /// # Errors
    ///
    /// As [`LazyMemory::background`].
    pub fn prefetch(&self, range: Range<usize>) -> pager::Result<BackgroundFill> {
        let range = self.memory.within(range.start, range.len());
        let end = range.end.min(range.start.saturating_add(self.residence().budget_bytes() / 2));
        self.memory.background(FillOrder::Ranges(std::iter::once(range.start..end).collect()))
    }

    /// Returns how many bytes of a range are in memory, whole pages: the range is in bytes, and cut to the memory.
    #[must_use]
    pub fn resident(&self, range: Range<usize>) -> usize {
        let (residence, states) = (self.residence(), &self.memory.region.pages);
        let is_there = |page: &usize| !states.is_missing(*page) || residence.rests(*page);
        self.pages_of(range).filter(is_there).count() * crate::page_size()
    }

    /// Keeps a range resident as long as the guard lives: see [`LazyMemory::pin`].
    ///
    /// A device, or io_uring, may write to a pinned page at any time, which no fault tells. So a flush writes a pinned page that
    /// was written once, and leaves it writable and dirty: the next flush writes it again.
    ///
    /// # Errors
    ///
    /// As [`LazyMemory::pin`].
    pub fn pin(&self, range: Range<usize>) -> io::Result<Pinned<'_>> {
        self.memory.pin(range)
    }

    /// Copies bytes from `offset` of the memory into `buf`; a failing store is an error, not SIGBUS. See
    /// [`LazyMemory::read_at`].
    ///
    /// # Errors
    ///
    /// As [`LazyMemory::read_at`].
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> io::Result<usize> {
        self.memory.read_at(offset, buf)
    }

    /// Copies `buf` to `offset` of the memory; a store that can't be read is an error, not SIGBUS. See
    /// [`LazyMemory::write_at`].
    ///
    /// # Errors
    ///
    /// As [`LazyMemory::write_at`].
    pub fn write_at(&mut self, offset: usize, buf: &[u8]) -> io::Result<usize> {
        self.memory.write_at(offset, buf)
    }

    /// Returns a raw pointer to all bytes of the memory: see [`LazyMemory::as_raw_slice`].
    #[must_use]
    pub fn as_raw_slice(&self) -> *mut [u8] {
        self.memory.as_raw_slice()
    }

    /// Returns whether system calls can be passed missing pages of the memory.
    #[must_use]
    pub fn handles_kernel_faults(&self) -> bool {
        self.memory.handles_kernel_faults()
    }

    /// Returns when written pages may reach the store.
    #[must_use]
    pub fn write_back(&self) -> WriteBack {
        self.residence().store().map_or_else(WriteBack::default, |store| store.write_back)
    }

    /// Returns the statistics of this memory.
    #[must_use]
    pub fn statistics(&self) -> PagedStatistics {
        let (residence, page_size) = (self.residence(), crate::page_size());
        let counters = residence.counters();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PagedStatistics {
            faults: get(&counters.faults),
            refaults: get(&counters.refaults),
            evictions: get(&counters.evictions),
            second_chances: get(&counters.second_chances),
            write_backs: get(&counters.write_backs),
            unwritten: get(&counters.unwritten),
            bytes_read: get(&counters.bytes_read),
            bytes_written: get(&counters.bytes_written),
            dirty: residence.dirty_count() * page_size,
            resident: residence.resident_count() * page_size,
            waits: get(&counters.waits),
            waited: Duration::from_nanos(get(&counters.waited_ns)),
        }
    }

    /// Returns the statistics of the pager, for all memory that it serves.
    #[must_use]
    pub fn pager_statistics(&self) -> Statistics {
        self.memory.statistics()
    }

    /// Flushes, and unmaps the memory.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush), with the memory, which is as it was.
    #[expect(clippy::result_large_err, reason = "it is the memory, which the caller had before")]
    pub fn close(mut self) -> Result<(), CloseError> {
        match self.flush() {
            Ok(()) => {
                self.is_closed = true;
                Ok(())
            }
            Err(error) => Err(CloseError { memory: self, error }),
        }
    }
}

impl Drop for PagedMemory {
    fn drop(&mut self) {
        self.writer.stop();
        if self.is_closed || self.memory.check_owner().is_err() {
            return;
        }
        let Some(region) = self.memory.region_id() else { return };
        if self.write_back() == WriteBack::OnFlush {
            self.memory.wait_for_fills();
            let dirty = self.residence().dirty_count() * crate::page_size();
            if dirty > 0 {
                self.memory.report(Problem::Discarded { region, dirty });
            }
        } else if let Err(FlushError { error, dirty, lost, .. }) = self.flush() {
            let (kind, code) = (error.kind(), error.raw_os_error());
            let mut error = Some(error);
            for Range { start, end } in dirty.into_iter().chain(lost) {
                let again = || code.map_or_else(|| kind.into(), io::Error::from_raw_os_error);
                self.memory.report(Problem::WriteBack {
                    region,
                    address: self.memory.memory.as_ptr().addr() + start,
                    len: end - start,
                    error: error.take().unwrap_or_else(again),
                });
            }
        }
    }
}

impl Deref for PagedMemory {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for PagedMemory {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl AsRef<[u8]> for PagedMemory {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for PagedMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for PagedMemory {
    /// Leaves the content out: reading it would fill it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedMemory")
            .field("memory", &self.memory)
            .field("statistics", &self.statistics())
            .finish_non_exhaustive()
    }
}
