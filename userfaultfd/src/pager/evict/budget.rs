//! A limit for resident memory that memories share.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::cgroup::Cgroup;
use super::frames::Member;
use super::pool::{MIN_PAGES, Pool, pages_of, pages_within};
use super::residence::Residence;
use super::take;
use crate::Errno;
use crate::error::errno_of;
use crate::lock_order::{RankedMutex, lock, rank};
use crate::pager::thread::Thread;
use crate::pager::{Error, Result};
use crate::sync::AtomicU64;

/// A limit for the resident memory of any number of [`LazyMemory`](crate::LazyMemory)s,
/// [`PagedMemory`](crate::PagedMemory)s, and [regions](crate::pager::Region::budget) of shared memory, of other processes, too.
///
/// Clones are the same budget. When the memories that share it get close to the limit, a thread of the budget takes pages
/// away from them, those first that don't seem to be needed (S3-FIFO). A page that was written since it was filled goes
/// to an unlinked file of its memory, any other is dropped; both come back when they are touched. A fault that finds no
/// room waits until there is some.
///
/// A page on its way out rests in a staging area, which counts as resident, for an eighth of the budget. A fault takes it
/// back from there without reading anything; so the budget learns which pages are in use.
///
/// What is resident exceeds the limit by no more than what is in flight at the moment, but where pages can't leave: those
/// that are [pinned](crate::LazyMemory::pin), and written ones while the file or store can't be written, which is a
/// [`Problem::WriteBack`](crate::pager::Problem::WriteBack), or mustn't ([`Problem::BudgetFull`](crate::pager::Problem)). A
/// fault doesn't wait for such pages.
///
/// The page cache of a source that reads a file counts for a container, but not for the budget.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{Budget, FileSource};
///
/// let budget = Budget::new(1 << 20);
/// let path = std::env::current_exe()?;
/// let memory = match LazyMemory::builder(FileSource::open(&path)?).budget(&budget).build() {
///     Ok(memory) => memory,
///     Err(error) => return Ok(println!("{error}")), // no write protection here
/// };
/// assert!(memory.iter().copied().eq(std::fs::read(&path)?));
/// assert!(budget.resident() <= 1 << 20);
/// println!("{budget}: {:?}", budget.statistics());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Budget(Arc<Handle>);

/// What a [`Budget`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BudgetStatistics {
    /// Pages that have left memory.
    pub evictions: u64,
    /// Pages that were filled again after they had left.
    pub refaults: u64,
    /// Pages that were taken back from the staging area.
    pub second_chances: u64,
    /// Pages that were written to a spill file before they left.
    pub spilled: u64,
    /// Pages that were written to the store of a [`PagedMemory`](crate::PagedMemory).
    pub write_backs: u64,
    /// Times that a page couldn't be written to its spill file or store, and stayed in memory.
    pub unwritten: u64,
    /// Bytes that were read from sources.
    pub bytes_read: u64,
    /// Bytes that were written to stores.
    pub bytes_written: u64,
    /// Faults that waited for room.
    pub waits: u64,
    /// How long they waited, altogether.
    pub waited: Duration,
    /// Pages of the staging area now.
    pub staged: usize,
}

/// The thread ends with the last one.
pub(super) struct Handle {
    pub(super) pool: Arc<Pool>,
    thread: RankedMutex<Option<Thread>, { rank::TURN }>,
}

impl Budget {
    /// Returns a budget of `bytes` bytes. Memory needs one of 16 pages at least.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self::with(pages_of(bytes), None)
    }

    /// Returns a budget of a fraction of the memory that the container may have, 0 < `fraction` ≤ 1.
    ///
    /// The limit is the least of `memory.max` and `memory.high` of the process's memory cgroup and all above it (version 2),
    /// or of `memory.limit_in_bytes` (version 1); without any, the machine's memory. The rest of the container's memory is for
    /// everything that isn't in the budget: heap, stacks, page cache.
    ///
    /// While memory shares the budget, its thread looks every half second whether the limit has changed. It also looks at the
    /// time for which threads waited for memory (pressure stall information, Linux 4.20, of the cgroup where it has it, else of
    /// the machine). If that is more than a tenth of the interval, the budget shrinks by an eighth, at most to a quarter
    /// of the fraction; without pressure it grows back by a thirty-second each time. It never gets smaller than the least
    /// budget. [`resize`](Self::resize) holds until the next change.
    ///
    /// # Errors
    ///
    /// [`Fraction`](Error::Fraction): not in 0 < `fraction` ≤ 1. [`System`](Error::System): `/proc` can't be read.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::pager::Budget;
    ///
    /// let budget = Budget::of_cgroup(0.5)?;
    /// println!("{budget}");
    /// # Ok::<(), userfaultfd::pager::Error>(())
    /// ```
    pub fn of_cgroup(fraction: f64) -> Result<Self> {
        if !(fraction > 0.0 && fraction <= 1.0) {
            return Err(Error::Fraction { fraction });
        }
        Ok(Self::with_cgroup(Cgroup::find(fraction).map_err(|error| errno_of(&error))?))
    }

    pub(super) fn with_cgroup(cgroup: Cgroup) -> Self {
        Self::with(pages_within(cgroup.bytes()), Some(cgroup))
    }

    fn with(pages: usize, cgroup: Option<Cgroup>) -> Self {
        Self(Arc::new(Handle { pool: Arc::new(Pool::new(pages, cgroup)), thread: RankedMutex::default() }))
    }

    /// Changes the budget to `bytes` bytes. If more is resident, the thread of the budget evicts what exceeds it.
    ///
    /// # Errors
    ///
    /// [`BudgetTooSmall`](Error::BudgetTooSmall): fewer than 16 pages.
    pub fn resize(&self, bytes: usize) -> Result<()> {
        let pages = check(pages_of(bytes))?;
        let pool = &self.0.pool;
        if !pool.is_here() {
            return Err(Error::OtherProcess);
        }
        pool.resize(pages);
        Ok(())
    }

    /// Returns the limit, in bytes: whole pages.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.pool.limit() * crate::page_size()
    }

    /// Returns the bytes that are resident now, with those that are in flight.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.0.pool.resident() * crate::page_size()
    }

    /// Returns what the budget has done so far.
    #[must_use]
    pub fn statistics(&self) -> BudgetStatistics {
        let (pool, get) = (&self.0.pool, |counter: &AtomicU64| counter.load(Ordering::Relaxed));
        let counters = &pool.counters;
        BudgetStatistics {
            evictions: get(&counters.evictions),
            refaults: get(&counters.refaults),
            second_chances: get(&counters.second_chances),
            spilled: get(&counters.spilled),
            write_backs: get(&counters.write_backs),
            unwritten: get(&counters.unwritten),
            bytes_read: get(&counters.bytes_read),
            bytes_written: get(&counters.bytes_written),
            waits: get(&counters.waits),
            waited: Duration::from_nanos(get(&counters.waited_ns)),
            staged: if pool.is_here() { pool.lock().staged_len() } else { 0 },
        }
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.0.pool
    }

    /// Checks that memory can be had under it.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.0.pool.is_here() {
            return Err(Error::OtherProcess);
        }
        check(self.0.pool.limit()).map(drop)
    }

    /// Counts the pages of a region from now on. Its residence was made for this budget.
    pub(super) fn attach(&self, member: Member) -> Result<()> {
        let pool = &self.0.pool;
        let mut thread = lock(&self.0.thread);
        if thread.is_none() {
            let pool = Arc::clone(pool);
            *thread = Some(Thread::spawn(c"uffd-evict", move || take::run(&pool))?);
        }
        if pool.lock().join(Arc::new(member), pool.limit()) { Ok(()) } else { Err(Errno::ENOMEM.into()) }
    }

    /// Counts a region no longer, and lets go of its pages, which stay as they are. The evicting thread has none of them in
    /// hand when this returns.
    pub(super) fn detach(&self, residence: &Residence) {
        self.0.pool.part_with(residence);
    }
}

fn check(pages: usize) -> Result<usize> {
    let page = crate::page_size();
    match pages {
        MIN_PAGES.. => Ok(pages),
        _ => Err(Error::BudgetTooSmall { bytes: pages * page, least: MIN_PAGES * page }),
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let thread = self.thread.get_mut().take();
        if !self.pool.is_here() {
            // A fork's child hasn't got the thread.
            thread.into_iter().for_each(std::mem::forget);
        } else if let Some(thread) = thread {
            self.pool.stop();
            thread.join();
        }
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget")
            .field("bytes", &self.bytes())
            .field("resident", &self.resident())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes resident", self.resident(), self.bytes())
    }
}
