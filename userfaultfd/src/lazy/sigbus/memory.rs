//! Memory whose faults the faulting thread resolves itself.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use super::shard::{SHARDS, shard_number};
use super::visitors::Visitors;
use crate::pager::memory::descriptor::addr_to_ptr;
use crate::pager::memory::page_state::{Claim, Settlement};
use crate::pager::memory::served::ServedRegion;
use crate::pager::memory::unfillable::Unfillable;
use crate::pager::stats::{self, Counters};
use crate::pager::{Error, MissingRange, PageData, Progress, Region, RegionId, Result, Statistics};
use crate::sync_point::{Point, reach};
use crate::sys::{self, Pause};
use crate::{CopyMode, Errno, Uffd, ZeropageMode};

/// Bytes filled between two reports of progress, where no thread waits for a particular page.
const BULK_BYTES: usize = 1 << 20;

/// Faults in a row that may find nothing to do before the access counts as hopeless: races end far below that.
const MAX_FUTILE_RETRIES: u32 = 1 << 16;

/// Tries of a fill for which the kernel returns `EAGAIN`, before the access itself is repeated.
const MAX_FILL_TRIES: u32 = 64;

/// Faults of which one is timed: reading the clock takes a hundredth of the time of a fault.
const FAULTS_PER_TIMING: u32 = 8;

/// Polls of a page that another thread fills, before this thread fills it itself: a few microseconds.
const JOIN_POLLS: u32 = 200;

/// Counters of the threads that use a memory, chosen by shard, so that threads rarely share a cache line.
const USER_COUNTERS: usize = 8;

/// What the handler needs to fill a page of one memory.
pub(crate) struct Lazy {
    uffd: Uffd,
    served: Arc<ServedRegion>,
    start: usize,
    end: usize,
    /// [`Counters`] for each shard. An unused shard takes no memory.
    counters: MmapRaw,
    /// Whether a thread is writing the counters of a shard.
    counting: [AtomicBool; SHARDS],
    /// A page of zeros, where zero pages can't be mapped.
    zeros: Option<MmapMut>,
    /// Number of faults in a row that found nothing to do.
    futile: AtomicU32,
    /// Filled as a whole, or gone.
    closed: AtomicBool,
    /// Gone: no thread enters any more.
    gone: AtomicBool,
    places: [Place; USER_COUNTERS],
}

#[derive(Default)]
#[repr(align(128))] // no line of the cache, nor the one that is fetched with it, is another place's
struct Place {
    /// Threads that are using the memory.
    users: Visitors,
    /// Faults so far: chooses those that are timed.
    faults: AtomicU32,
    /// Faults that are being resolved.
    running: AtomicU32,
}

/// A fault that is being resolved, until this is dropped.
pub(super) struct Running<'a>(&'a AtomicU32);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<'a> User<'a> {
    /// Counts a fault that this thread resolves.
    pub(super) fn begin_fault(&self) -> Running<'a> {
        let running = &self.lazy.places[self.place].running;
        running.fetch_add(1, Ordering::Relaxed);
        Running(running)
    }
}

/// A memory that a thread has entered: it stays until this is dropped.
pub(super) struct User<'a> {
    lazy: &'a Lazy,
    place: usize,
}

impl Deref for User<'_> {
    type Target = Lazy;

    fn deref(&self) -> &Lazy {
        self.lazy
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.lazy.places[self.place].users.leave();
    }
}

/// What one fault or fill did, added to the counters at its end.
#[derive(Default)]
struct Tally {
    faults: u64,
    duplicates: u64,
    fills: u64,
    zero_fills: u64,
    bytes: u64,
    prefetched: u64,
    retries: u64,
    source_errors: u64,
    poisoned: u64,
    since: Option<Instant>,
}

/// What becomes of a page that its source doesn't deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// An access raises SIGBUS from now on.
    Poisoned,
    /// It stays missing.
    Missing,
}

impl Lazy {
    /// Registers a region of this process's memory, and reads the pages that have one of `borders` inside.
    pub(super) fn new(uffd: Uffd, mut region: Region, borders: &[u64]) -> Result<Self> {
        region.ask_source()?;
        region.check()?;
        let Range { start, end } = region.range();
        let offered = uffd.register(addr_to_ptr(start), end - start);
        let offered = offered.map_err(|error| Error::Register { address: start, error })?;
        region.check_ioctls(offered)?;
        let served = Arc::new(region.serve(0, offered)?);
        let mapping = |len| MmapOptions::new().len(len).no_reserve_swap().map_anon();
        let counters = MmapRaw::from(mapping(SHARDS * size_of::<Counters>())?);
        let zeros = if served.zeropage { None } else { Some(mapping(served.page_size())?) };
        let lazy = Self {
            uffd,
            served,
            start,
            end,
            counters,
            counting: [const { AtomicBool::new(false) }; SHARDS],
            zeros,
            futile: AtomicU32::new(0),
            closed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            places: Default::default(),
        };
        lazy.prepare(borders)?;
        Ok(lazy)
    }

    /// Fills the pages whose content the handler can't get.
    fn prepare(&self, borders: &[u64]) -> Result<()> {
        let page = self.served.page_size();
        // The buffer must be aligned to a page: the file may be open with O_DIRECT.
        let mut buffer: Option<MmapMut> = None;
        for border in borders {
            let inside = border.checked_sub(self.served.offset).filter(|inside| inside % page as u64 != 0);
            let number = inside.and_then(|inside| usize::try_from(inside / page as u64).ok());
            let Some(number) = number.filter(|number| *number < self.served.pages.count()) else { continue };
            if self.served.pages.claim_missing(number).is_none() {
                continue; // it has two of them
            }
            let offset = self.served.offset_of(number);
            let buffer = match &mut buffer {
                Some(buffer) => buffer,
                none => none.insert(MmapOptions::new().len(page).map_anon()?),
            };
            let read = self.served.source.read(offset, buffer);
            match read.map_err(|error| Error::Source { offset, error })? {
                PageData::Data => buffer[self.served.within_source(offset, page)..].fill(0),
                PageData::Zero => buffer.fill(0),
            }
            let (to, from) = (addr_to_ptr(self.address(number)), buffer.as_ptr().cast());
            // SAFETY: no thread has seen the page, and the caller of `new` vouches for what it comes to hold.
            unsafe { self.uffd.copy_with(from, to, page, CopyMode::empty()) }?;
            let _nobody_joined = self.served.pages.end(number, Settlement::Present);
        }
        Ok(())
    }

    /// Counts a thread that is about to find the memory in the table.
    pub(super) fn entered(&self, shard: usize) -> User<'_> {
        let place = shard % USER_COUNTERS;
        self.places[place].users.enter();
        User { lazy: self, place }
    }

    /// Whether a fault of this memory is being resolved.
    pub(crate) fn is_resolving(&self) -> bool {
        self.places.iter().any(|place| place.running.load(Ordering::Relaxed) > 0)
    }

    /// Counts the calling thread as a user, unless the memory is gone: then its addresses may belong to another mapping.
    fn enter(&self) -> Option<User<'_>> {
        let user = self.entered(shard_number());
        (!self.gone.load(Ordering::SeqCst)).then_some(user)
    }

    /// Has nothing filled from now on.
    pub(super) fn end(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.gone.store(true, Ordering::SeqCst);
    }

    pub(super) fn addresses(&self) -> Range<usize> {
        self.start..self.end
    }

    pub(super) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Waits until every thread that has entered the memory has left it.
    pub(super) fn wait_for_users(&self) {
        for place in &self.places {
            let mut pause = Pause::new();
            while place.users.are_inside() {
                pause.rest();
            }
        }
    }

    /// Resolves a fault. Returns whether the access must be repeated; `false` means that it can't succeed.
    /// Async-signal-safe.
    pub(super) fn fault(&self, address: usize, shard: usize) -> bool {
        let faults = self.places[shard % USER_COUNTERS].faults.fetch_add(1, Ordering::Relaxed);
        let since = (faults % FAULTS_PER_TIMING == 0).then(stats::now);
        let mut tally = Tally { faults: 1, since, ..Tally::default() };
        let page = (address - self.start) >> self.served.page_shift;
        let claim = self.served.pages.claim(page);
        if !matches!(claim, Claim::Acquired { .. }) {
            self.served.note(page);
        }
        let answered = match claim {
            Claim::Acquired { removed, .. } => self.load(page, removed, &mut tally),
            Claim::Joined => self.join(page, Some(page), &mut tally),
            Claim::Present => self.again(page, &mut tally),
            Claim::Poisoned => false,
        };
        // A fault that has filled its own page is no duplicate.
        let filled = tally.fills + tally.zero_fills > tally.prefetched;
        tally.duplicates = u64::from(answered && !filled && tally.poisoned == 0);
        self.count(&tally, shard);
        answered
    }

    /// Fills a page that was claimed, and what is missing around it.
    fn load(&self, page: usize, removed: bool, tally: &mut Tally) -> bool {
        let states = &self.served.pages;
        let (around, window) = self.served.fault_around(page);
        let pages = states.claim_around(page, around, removed);
        if let Some(window) = window {
            self.served.advance_stream(window, &pages);
        }
        reach(Point::AfterRead, self.address(page));
        let filled = self.put_all(pages.clone(), removed, Some(page), tally);
        if filled == pages.end {
            return true;
        }
        for other in (filled..pages.end).filter(|other| *other != page) {
            let _joined = states.end(other, Settlement::Released);
        }
        // What can't be filled may be another page.
        filled > page
            || self.one(page, Some(page), Work { removed, claimed: true, lost: Lost::Poisoned }, tally)
    }

    /// Resolves a fault on a page that another thread is filling. That thread may be off its CPU or wait for a disk, so
    /// this one waits only briefly and then fills the page itself.
    fn join(&self, page: usize, asked: Option<usize>, tally: &mut Tally) -> bool {
        let states = &self.served.pages;
        for look in 0..JOIN_POLLS {
            if !states.is_loading(page) {
                return true;
            }
            if look % 64 == 63 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        // The thread that has claimed the page deals with a source that doesn't deliver.
        let work = Work { removed: states.is_removed(page), claimed: false, lost: Lost::Missing };
        self.one(page, asked, work, tally)
    }

    /// Resolves a fault on a page whose state is present. Mostly another thread has just filled it. If the page was
    /// removed since, zeros belong there.
    fn again(&self, page: usize, tally: &mut Tally) -> bool {
        match self.put(page..page + 1, true, Some(page), tally) {
            Ok(_) => true,
            Err(Errno::EEXIST) if !self.is_there(page) => {
                Pause::long();
                self.try_again()
            }
            Err(Errno::EEXIST | Errno::EAGAIN | Errno::ENOMEM) => self.try_again(),
            Err(_) => self.is_closed(),
        }
    }

    /// Fills one page.
    fn one(&self, page: usize, asked: Option<usize>, work: Work, tally: &mut Tally) -> bool {
        let Work { removed, claimed, lost } = work;
        let settle = |end, answered| {
            // A present page is present for the thread that has claimed it, too.
            if claimed || end == Settlement::Present {
                let _joined = self.served.pages.end(page, end);
            }
            answered
        };
        for _ in 0..MAX_FILL_TRIES {
            match self.put(page..page + 1, removed, asked, tally) {
                Ok(_) => return settle(Settlement::Present, true),
                Err(Errno::EEXIST) if self.is_there(page) => {
                    return settle(Settlement::Present, self.try_again());
                }
                Err(Errno::EAGAIN) => {
                    tally.retries += 1;
                    std::hint::spin_loop();
                }
                Err(Errno::EEXIST | Errno::ENOMEM) => break,
                Err(Errno::EFAULT | Errno::ENODATA) if !claimed => break,
                Err(Errno::EFAULT | Errno::ENODATA) => {
                    tally.source_errors += 1;
                    return match lost {
                        Lost::Poisoned if self.poison(page, tally) => settle(Settlement::Poisoned, true),
                        _ => settle(Settlement::Released, false),
                    };
                }
                Err(_) => return settle(Settlement::Released, self.is_closed()),
            }
        }
        // Give the thread that frees memory, or that fills the page, time to run.
        Pause::long();
        settle(Settlement::Released, self.try_again())
    }

    /// Makes an access to a page raise SIGBUS. `false` before Linux 6.6.
    fn poison(&self, page: usize, tally: &mut Tally) -> bool {
        // SAFETY: the caller of `new` accepts that pages without content raise SIGBUS.
        let poisoned =
            unsafe { self.uffd.poison(addr_to_ptr(self.address(page)), self.served.page_size(), true) };
        tally.poisoned += u64::from(poisoned.is_ok());
        poisoned.is_ok()
    }

    /// Whether the memory was filled as a whole, perhaps after the fault.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Returns whether to repeat the access, which was in vain fewer than [`MAX_FUTILE_RETRIES`] times in a row.
    fn try_again(&self) -> bool {
        self.futile.fetch_add(1, Ordering::Relaxed) < MAX_FUTILE_RETRIES
    }

    /// Fills pages that were claimed, from the first on, and settles them. Returns the first that couldn't be filled,
    /// or the end.
    fn put_all(&self, pages: Range<usize>, removed: bool, asked: Option<usize>, tally: &mut Tally) -> usize {
        let mut next = pages.start;
        while next < pages.end {
            let filled = match self.put(next..pages.end, removed, asked, tally) {
                Ok(filled) => filled,
                // Another thread has filled it, since it gave up waiting.
                Err(Errno::EEXIST) if self.is_there(next) => 1,
                Err(_) => break,
            };
            reach(Point::AfterFill, self.address(next));
            for page in next..next + filled {
                let _joined = self.served.pages.end(page, Settlement::Present);
            }
            next += filled;
        }
        next
    }

    /// Returns whether a page for which the kernel returned `EEXIST` is present. For huge pages that errno also means that
    /// none can be allocated: the pool is empty, or the limit of a control group is met.
    fn is_there(&self, page: usize) -> bool {
        self.zeros.is_none() || sys::is_resident(addr_to_ptr(self.address(page)))
    }

    /// Makes one call to the kernel, which fills one page or more from the first on. Returns their number.
    fn put(
        &self,
        pages: Range<usize>,
        removed: bool,
        asked: Option<usize>,
        tally: &mut Tally,
    ) -> Result<usize, Errno> {
        let (served, page) = (&self.served, self.served.page_size());
        let (offset, len) = (served.offset_of(pages.start), pages.len() << served.page_shift);
        let to = addr_to_ptr(self.address(pages.start));
        let zeros = if removed { u64::MAX } else { served.source.zeros(offset) };
        let known = usize::try_from(zeros).unwrap_or(usize::MAX).min(len) & !(page - 1);
        let result = if known > 0 {
            match &self.zeros {
                // SAFETY: the caller of `new` vouches for what the pages come to hold; the kernel makes sure that
                // these are missing.
                None => unsafe { self.uffd.zeropage_with(to, known, ZeropageMode::empty()) },
                // SAFETY: as above; the source is a page of this memory's own.
                Some(zeros) => unsafe {
                    self.uffd.copy_with(zeros.as_ptr().cast(), to, page, CopyMode::empty())
                },
            }
        } else {
            let whole = served.source.bytes(offset, len);
            let bytes = whole.or_else(|| served.source.bytes(offset, page)).ok_or(Errno::ENODATA)?;
            let len = bytes.len().min(len) & !(page - 1);
            // SAFETY: as above; the source has `bytes.len()` bytes there, which only the kernel reads.
            unsafe { self.uffd.copy_with(bytes.as_ptr(), to, len, CopyMode::empty()) }
        };
        let filled = match result {
            Ok(filled) => filled,
            Err(error) => match error.progress() {
                Some(filled) if filled > 0 => filled,
                _ => return Err(error.errno().unwrap_or(Errno::EINVAL)),
            },
        };
        if self.futile.load(Ordering::Relaxed) != 0 {
            self.futile.store(0, Ordering::Relaxed);
        }
        let filled_pages = filled >> served.page_shift;
        let filled_range = pages.start..pages.start + filled_pages;
        let asked = asked.is_some_and(|page| filled_range.contains(&page));
        *(if known > 0 { &mut tally.zero_fills } else { &mut tally.fills }) += filled_pages as u64;
        tally.bytes += filled as u64;
        tally.prefetched += (filled_pages - usize::from(asked)) as u64;
        Ok(filled_pages)
    }

    fn address(&self, page: usize) -> usize {
        self.start + (page << self.served.page_shift)
    }

    /// The counters of a shard.
    fn counters(&self, shard: usize) -> &Counters {
        assert!(shard < SHARDS, "a shard");
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins with a page")]
        let counters = self.counters.as_ptr().cast::<Counters>().wrapping_add(shard);
        // SAFETY: the mapping has `SHARDS` of them. Zeroed counters are valid, and all their fields are atomics.
        unsafe { &*counters }
    }

    /// Adds a tally to the shard's counters or, while another thread or an interrupted one writes these, to the next
    /// ones.
    fn count(&self, tally: &Tally, shard: usize) {
        let mut pause = Pause::new();
        let shard = loop {
            let mut shards = (shard..shard + SHARDS).map(|shard| shard % SHARDS);
            // Acquire and release: a thread goes on counting where the one before it stopped.
            let free = shards.find(|shard| !self.counting[*shard].swap(true, Ordering::Acquire));
            match free {
                Some(shard) => break shard,
                None => pause.rest(),
            }
        };
        let counters = self.counters(shard);
        for (count, more) in [
            (&counters.missing_faults, tally.faults),
            (&counters.duplicates, tally.duplicates),
            (&counters.fills, tally.fills),
            (&counters.zero_fills, tally.zero_fills),
            (&counters.bytes, tally.bytes),
            (&counters.prefetched, tally.prefetched),
            (&counters.retries, tally.retries),
            (&counters.source_errors, tally.source_errors),
            (&counters.poisoned, tally.poisoned),
        ] {
            if more > 0 {
                count.add(more);
            }
        }
        if let Some(since) = tally.since {
            counters.fault_latency.record_since(since);
        }
        self.counting[shard].store(false, Ordering::Release);
    }

    /// Fills all missing pages.
    pub(crate) fn fill(&self, mut progress: impl FnMut(Progress)) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Filled);
        }
        let total = self.missing_pages();
        let bytes = |pages: usize| (pages as u64) << self.served.page_shift;
        let tell = |left| Progress { done: bytes(total.saturating_sub(left)), total: bytes(total) };
        progress(tell(total));
        let (mut next, end) = (0, self.served.pages.count());
        while next < end {
            let step = self.fill_some(next..end, BULK_BYTES, Lost::Poisoned).ok_or(Error::Filled)?;
            next = step.next;
            progress(tell(self.missing_pages()));
        }
        // Each page was filled or found present; its state lags while another thread fills it.
        let left = (0..end).filter(|page| self.served.pages.is_missing(*page)).count();
        let mut failed = Unfillable::default();
        failed.add_pages(&self.served, (0..end).filter(|page| self.served.pages.is_failed(*page)));
        if left > 0 {
            return Err(failed.unfilled(left));
        }
        self.closed.store(true, Ordering::SeqCst);
        self.uffd.unregister_unexplained(addr_to_ptr(self.start), self.end - self.start)?;
        progress(tell(0));
        failed.poisoned()
    }

    /// Fills the first missing pages of a range, up to `most` bytes. Returns `None` if the memory is gone.
    pub(crate) fn fill_some(&self, pages: Range<usize>, most: usize, lost: Lost) -> Option<Step> {
        let user = self.enter()?;
        let mut tally = Tally::default();
        let next = user.fill_first(pages, most, lost, &mut tally);
        user.count(&tally, shard_number());
        Some(Step { next, filled: (tally.fills + tally.zero_fills) as usize })
    }

    fn fill_first(&self, pages: Range<usize>, most: usize, lost: Lost, tally: &mut Tally) -> usize {
        let states = &self.served.pages;
        let most = (most >> self.served.page_shift).max(1);
        for page in pages.clone() {
            let Some(removed) = states.claim_missing(page) else {
                if states.is_loading(page) {
                    self.join(page, None, tally);
                }
                continue;
            };
            let onward = page..pages.end.min(page.saturating_add(most));
            let end = states.claim_around(page, onward, removed).end;
            reach(Point::BeforeFill, self.address(page));
            let filled = self.put_all(page..end, removed, None, tally);
            // One by one, so that a failure concerns one page.
            for page in filled..end {
                let _filled = self.one(page, None, Work { removed, claimed: true, lost }, tally);
            }
            return end;
        }
        pages.end
    }

    pub(crate) fn region(&self) -> &Arc<ServedRegion> {
        &self.served
    }

    fn missing_pages(&self) -> usize {
        let (present, poisoned) = self.served.pages.present_and_poisoned();
        self.served.pages.count().saturating_sub(present + poisoned)
    }

    /// The ranges that are missing, ordered by address.
    pub(crate) fn missing(&self) -> Result<Vec<MissingRange>> {
        if self.is_closed() {
            return Err(Error::Filled);
        }
        let mut missing: Vec<MissingRange> = Vec::new();
        let len = self.served.page_size();
        for page in (0..self.served.pages.count()).filter(|page| self.served.pages.is_missing(*page)) {
            let address = self.address(page);
            match missing.last_mut().filter(|last| last.address + last.len == address) {
                Some(last) => last.len += len,
                None => {
                    let offset = Some(self.served.offset_of(page));
                    missing.push(MissingRange {
                        region: RegionId::new(self.served.id),
                        address,
                        len,
                        offset,
                    });
                }
            }
        }
        Ok(missing)
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let mut sum: Statistics = (0..SHARDS).map(|shard| self.counters(shard).snapshot()).sum();
        sum.present_pages = self.served.pages.present_and_poisoned().0 as u64;
        sum.missing_pages = self.missing_pages() as u64;
        sum
    }
}

/// How one page is filled.
#[derive(Clone, Copy)]
struct Work {
    removed: bool,
    /// Whether the thread that fills it has claimed it.
    claimed: bool,
    lost: Lost,
}

/// What a step of a fill did.
pub(crate) struct Step {
    /// The first page that wasn't looked at.
    pub(crate) next: usize,
    /// Pages that were filled.
    pub(crate) filled: usize,
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy")
            .field("range", &format_args!("{:#x}..{:#x}", self.start, self.end))
            .field("served", &self.served)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};
    use std::thread;

    use super::super::owned::Owned;
    use super::super::table;
    use super::*;
    use crate::pager::BytesSource;
    use crate::pager::races::real_time;
    use crate::support::memory::Memory;
    use crate::support::proc::wait_until;
    use crate::support::{child, raw, require, test_name};
    use crate::sync_point::tests::{Armed, at as armed_at};
    use crate::{FeatureFlags, UffdBuilder, page_size};

    const PAGES: usize = 4;

    /// Memory of four pages of sevens, two of them a block, and where it is.
    fn owned() -> (Owned, MmapMut) {
        let mut memory = MmapOptions::new().len(PAGES * page_size()).map_anon().unwrap();
        let mut builder = UffdBuilder::new();
        let uffd = builder.close_on_exec(true).require_features(FeatureFlags::SIGBUS).create().unwrap();
        let start = memory.as_mut_ptr().expose_provenance();
        let region = Region::new(start, memory.len(), BytesSource::new(vec![7; memory.len()]));
        // SAFETY: bytes are good whatever they are, and the mapping stays longer than its owner.
        let owned = unsafe { Owned::new(uffd, region.block(2 * page_size()), &[]) };
        (owned.unwrap(), memory)
    }

    /// Threads that reach a point of a memory stop there until this is dropped.
    struct Stop {
        state: Arc<(Mutex<(usize, bool)>, Condvar)>,
        _armed: Armed,
    }

    impl Stop {
        fn at(point: Point, memory: &[u8]) -> Self {
            let state = Arc::new((Mutex::new((0, false)), Condvar::new()));
            let stopped = Arc::clone(&state);
            let start = memory.as_ptr().addr();
            let _armed = armed_at(point, start..start + memory.len(), move |_| {
                let (state, changed) = &*stopped;
                let mut state = state.lock().unwrap();
                state.0 += 1;
                changed.notify_all();
                drop(changed.wait_while(state, |(_, advance_stream)| !*advance_stream).unwrap());
            });
            Self { state, _armed }
        }

        /// Waits until this number of threads has stopped.
        fn reached_by(&self, threads: usize) {
            let (state, changed) = &*self.state;
            drop(changed.wait_while(state.lock().unwrap(), |(stopped, _)| *stopped < threads).unwrap());
        }
    }

    impl Drop for Stop {
        fn drop(&mut self) {
            self.state.0.lock().unwrap().1 = true;
            self.state.1.notify_all();
        }
    }

    fn is_found(memory: &MmapMut) -> bool {
        table::with_memory_at(memory.as_ptr().addr(), |_, _| ()).is_some()
    }

    #[test]
    fn fault_does_not_wait_for_the_thread_that_fills() {
        require!();
        let (owned, memory) = owned();
        let states = &owned.lazy().served.pages;
        assert!(states.try_claim_untouched(1, false), "as if by a thread that gets no CPU");
        assert_eq!(memory[page_size()], 7);
        assert_eq!(memory[0], 7);
        assert_eq!(owned.lazy().statistics().fills, 2);
        assert_eq!(owned.lazy().statistics().duplicates, 0, "each has filled its page");
        // The thread goes on, and finds that it is done.
        let mut tally = Tally::default();
        assert_eq!(owned.lazy().put_all(1..2, false, None, &mut tally), 2);
        assert_eq!((states.claim(1), tally.fills), (Claim::Present, 0));
        assert_eq!(states.present_and_poisoned(), (2, 0));
    }

    #[test]
    fn memory_stays_until_no_handler_uses_it() {
        require!();
        let (owned, memory) = owned();
        let lazy = Arc::downgrade(owned.lazy());
        let stop = Stop::at(Point::AfterRead, &memory);
        thread::scope(|scope| {
            let reader = scope.spawn(|| memory[0]);
            stop.reached_by(1);
            let owner = scope.spawn(|| drop(owned));
            wait_until(|| !is_found(&memory));
            for _ in 0..100 {
                thread::yield_now();
            }
            assert!(!owner.is_finished() && lazy.strong_count() == 1);
            drop(stop);
            owner.join().unwrap();
            // What is there by now, or zero.
            assert!([0, 7].contains(&reader.join().unwrap()));
        });
        assert_eq!(lazy.strong_count(), 0);
    }

    /// The thread that uses the memory still has that CPU alone.
    #[test]
    fn a_thread_under_fifo_that_drops_memory_does_not_spin() {
        require!(root);
        let Some([cpu, _]) = real_time::cpus(test_name!()) else { return };
        let (owned, memory) = owned();
        let stop = Stop::at(Point::AfterRead, &memory);
        thread::scope(|scope| {
            let memory = &memory;
            let reader = scope.spawn(move || {
                crate::sys::run_on(cpu).unwrap();
                memory[0]
            });
            stop.reached_by(1);
            let owner = scope.spawn(move || {
                crate::sys::run_on(cpu).unwrap();
                assert!(real_time::enter());
                let before = real_time::cpu_time();
                drop(owned);
                real_time::cpu_time().checked_sub(before).unwrap()
            });
            wait_until(|| !is_found(memory));
            drop(stop);
            let spent = owner.join().unwrap();
            assert!(spent < std::time::Duration::from_millis(200), "{spent:?}");
            assert!([0, 7].contains(&reader.join().unwrap()));
        });
    }

    #[test]
    fn removal_waits_for_no_fault_of_other_memory() {
        require!();
        let (slow, other) = (owned(), owned());
        let stop = Stop::at(Point::AfterRead, &slow.1);
        thread::scope(|scope| {
            let reader = scope.spawn(|| slow.1[0]);
            stop.reached_by(1);
            assert_eq!(other.1[0], 7);
            drop(other);
            let new = self::owned();
            assert_eq!(new.1[3 * page_size()], 7);
            drop(stop);
            assert_eq!(reader.join().unwrap(), 7);
        });
    }

    #[test]
    fn removal_waits_for_no_fill_of_other_memory() {
        require!();
        let (slow, other) = (owned(), owned());
        let stop = Stop::at(Point::BeforeFill, &slow.1);
        thread::scope(|scope| {
            let filler = scope.spawn(|| slow.0.lazy().fill(|_| {}));
            stop.reached_by(1);
            drop(other);
            drop(stop);
            filler.join().unwrap().unwrap();
        });
    }

    #[test]
    fn any_number_of_faults_is_answered_at_once() {
        require!();
        const MEMORIES: usize = 100;
        let slow: Vec<_> = (0..MEMORIES).map(|_| owned()).collect();
        let stops: Vec<_> = slow.iter().map(|(_, memory)| Stop::at(Point::AfterRead, memory)).collect();
        thread::scope(|scope| {
            let readers: Vec<_> = slow.iter().map(|(_, memory)| scope.spawn(|| memory[0])).collect();
            stops.iter().for_each(|stop| stop.reached_by(1));
            assert!(slow.iter().all(|(owned, _)| owned.lazy().is_resolving()));
            let (owned, memory) = owned();
            assert!(!owned.lazy().is_resolving(), "so that its background goes on");
            assert_eq!((memory[0], owned.lazy().statistics().fills), (7, 2));
            drop(stops);
            assert!(readers.into_iter().all(|reader| reader.join().unwrap() == 7));
        });
    }

    #[test]
    fn nothing_is_filled_once_the_memory_is_gone() {
        require!();
        let (owned, memory) = owned();
        let lazy = Arc::clone(owned.lazy());
        let stop = Stop::at(Point::BeforeFill, &memory);
        thread::scope(|scope| {
            let filler = scope.spawn(|| lazy.fill_some(0..PAGES, page_size(), Lost::Missing).is_some());
            stop.reached_by(1);
            let owner = scope.spawn(|| drop(owned));
            wait_until(|| !is_found(&memory));
            assert!(!owner.is_finished(), "a step that has begun is waited for");
            drop(stop);
            assert!(filler.join().unwrap());
            owner.join().unwrap();
        });
        let fills = lazy.statistics().fills;
        assert!(lazy.fill_some(0..PAGES, usize::MAX, Lost::Missing).is_none());
        assert_eq!(lazy.statistics().fills, fills);
        assert!(lazy.fill(|_| {}).is_err());
    }

    #[test]
    fn removal_takes_no_memory() {
        require!();
        child::run_well(test_name!(), || {
            let (one, other) = (owned(), owned());
            let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the structure is borrowed for the call.
            raw::check(unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut before) }).unwrap();
            let none = libc::rlimit { rlim_cur: 0, ..before };
            // SAFETY: as above.
            raw::check(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const none) }).unwrap();
            assert!(MmapOptions::new().len(page_size()).map_anon().is_err());
            drop(one.0);
            let is_found = [is_found(&one.1), is_found(&other.1)];
            // SAFETY: as above.
            raw::check(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const before) }).unwrap();
            assert_eq!(is_found, [false, true]);
            assert_eq!(other.1[0], 7);
        });
    }

    #[test]
    fn huge_pages_that_cannot_be_had_are_filled_once_they_can() {
        require!(FeatureFlags::MISSING_HUGETLBFS, root);
        child::run_well(test_name!(), || {
            let Some(memory) = Memory::unpromised_hugetlb(test_name!(), 3) else { return };
            let mut builder = UffdBuilder::new();
            let features = FeatureFlags::SIGBUS | FeatureFlags::MISSING_HUGETLBFS;
            let uffd = builder.close_on_exec(true).require_features(features).create().unwrap();
            let source = BytesSource::new(vec![7; memory.len()]);
            let region = Region::new(memory.start().expose_provenance(), memory.len(), source);
            // SAFETY: bytes are good whatever they are, and the mapping stays longer than its owner.
            let owned = unsafe { Owned::new(uffd, region.page_size(memory.page()), &[]) }.unwrap();
            assert_eq!(memory.read(0), 7);
            let pool = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
            let is_empty = memory.huge_pages().exhaust();
            if !crate::support::has(test_name!(), "a pool of huge pages that can be emptied", is_empty) {
                return;
            }
            let refused = owned.lazy().fill(|_| {}).unwrap_err();
            assert!(matches!(refused, Error::Unfilled { pages: 2, .. }), "{refused:?}");
            let step = owned.lazy().fill_some(0..3, usize::MAX, Lost::Poisoned).unwrap();
            assert_eq!(step.filled, 0);
            assert_eq!(owned.lazy().statistics().present_pages, 1);
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| memory.read(1));
                // The fault is tried again and again.
                let faults = owned.lazy().statistics().missing_faults;
                wait_until(|| owned.lazy().statistics().missing_faults > faults + 1);
                std::fs::write("/proc/sys/vm/nr_hugepages", pool.trim()).unwrap();
                assert_eq!(reader.join().unwrap(), 7);
            });
            owned.lazy().fill(|_| {}).unwrap();
            assert_eq!(memory.read(2), 7);
        });
    }

    #[test]
    fn a_page_that_is_being_filled_counts_before_it_is_seen() {
        require!();
        let (owned, memory) = owned();
        let stop = Stop::at(Point::AfterFill, &memory[..page_size()]);
        thread::scope(|scope| {
            let reader = scope.spawn(|| memory[0]);
            stop.reached_by(1);
            // The page is there, and nobody has said so yet.
            owned.lazy().fill(|_| {}).unwrap();
            assert_eq!(owned.lazy().statistics().missing_pages, 0);
            drop(stop);
            assert_eq!(reader.join().unwrap(), 7);
        });
        let statistics = owned.lazy().statistics();
        assert_eq!((statistics.present_pages, statistics.fills), (4, 4), "{statistics}");
        assert_eq!((statistics.missing_faults, statistics.prefetched), (1, 3), "{statistics}");
        assert_eq!(statistics.duplicates, 0, "{statistics}");
    }

    /// Signals by which C libraries cancel threads, and have all of them do something, are kept away from handlers.
    #[test]
    fn handler_is_not_cancelled() {
        require!();
        let (_owned, memory) = owned();
        let start = memory.as_ptr().addr();
        let blocked = Arc::new(Mutex::new(0_u64));
        let told = Arc::clone(&blocked);
        let _armed = armed_at(Point::AfterRead, start..start + memory.len(), move |_| {
            let mut set = 0_u64;
            let none = std::ptr::null::<u64>();
            // SAFETY: the kernel writes eight bytes, which are borrowed for the call.
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, none, &mut set, 8) };
            *told.lock().unwrap() = set;
        });
        assert_eq!(memory[0], 7);
        let deadly = [libc::SIGKILL, libc::SIGSTOP].iter().fold(0, |bits, signal| bits | 1 << (signal - 1));
        assert_eq!(*blocked.lock().unwrap(), !deadly);
    }
}
