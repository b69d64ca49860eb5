//! Memory whose faults are answered in the thread that makes them.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::fmt;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use super::handler;
use super::table::{self, Hold, SLOTS};
use crate::owner::{InheritedFd, Owner, abandon};
use crate::pager::descriptor::at;
use crate::pager::pages::{Claim, End};
use crate::pager::region::Served;
use crate::pager::stats::{self, Counters};
use crate::pager::{Absent, Error, Fill, Progress, Region, RegionId, Result, Statistics};
use crate::{CopyMode, Errno, Uffd};

/// So many bytes are filled at once, where nobody waits for a particular page.
const BULK: usize = 1 << 20;

/// So often in a row a fault may find that nothing was to be done: beyond that it isn't by chance.
const FUTILE: u32 = 1 << 16;

/// So often a fill is tried that the kernel says to try again.
const TRIES: u32 = 64;

/// Of so many faults that a handler answers one is timed: looking at the clock is a hundredth of what a fault takes.
const TIMED: u64 = 8;

/// So often it is looked whether another thread has filled the page.
const LOOKS: u32 = 200;

/// What a handler needs.
pub(crate) struct Lazy {
    uffd: Uffd,
    served: Arc<Served>,
    start: usize,
    end: usize,
    /// For each slot the [`Counters`] of the handlers that have it. What isn't used takes no memory.
    counters: MmapRaw,
    /// A page of zeros, where zero pages can't be mapped.
    zeros: Option<MmapMut>,
    /// How many faults in a row found nothing to do.
    futile: AtomicU32,
    /// Filled as a whole, or gone.
    closed: AtomicBool,
}

/// The memory's owner: handlers find it until this is dropped.
#[derive(Debug)]
pub(crate) struct Owned(Arc<Lazy>, Owner);

impl Owned {
    /// Registers a region of this process's memory, reads the pages that have one of `borders` inside, and has
    /// handlers find it.
    ///
    /// # Safety
    ///
    /// As [`Pager::add_own`](crate::pager::Pager::add_own). The source must be [`SignalSafe`](super::SignalSafe), with
    /// these borders.
    pub(crate) unsafe fn new(uffd: Uffd, mut region: Region, borders: &[u64]) -> Result<Self> {
        region.ask_source();
        region.check()?;
        let Range { start, end } = region.range();
        let offered = uffd.register(at(start), end - start);
        let offered = offered.map_err(|error| Error::Register { address: start, error })?;
        region.check_ioctls(offered)?;
        let served = Arc::new(region.serve(0, offered)?);
        let mapping = |len| MmapOptions::new().len(len).no_reserve_swap().map_anon();
        let counters = MmapRaw::from(mapping(SLOTS * size_of::<Counters>())?);
        let zeros = if served.zeropage { None } else { Some(mapping(served.page_size())?) };
        let (futile, closed) = (AtomicU32::new(0), AtomicBool::new(false));
        let owner = Owner::current()?;
        let lazy = Arc::new(Lazy { uffd, served, start, end, counters, zeros, futile, closed });
        lazy.prepare(borders)?;
        handler::install()?;
        // SAFETY: the `Arc` keeps it where it is, and is given up by `drop` only after it was removed.
        unsafe { table::add(Arc::as_ptr(&lazy), start, end) }?;
        Ok(Self(lazy, owner))
    }

    pub(crate) fn lazy(&self) -> &Arc<Lazy> {
        &self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.1.is_current() {
            abandon(&self.0);
            // SAFETY: this is a fork's child, and the parent's memory is dropped no more in it. This has kept the
            // descriptor open.
            return unsafe { InheritedFd::new(self.0.uffd.as_fd()).close() };
        }
        self.0.closed.store(true, Ordering::SeqCst);
        if table::remove(Arc::as_ptr(&self.0)).is_err() {
            // Handlers may find it for ever.
            std::mem::forget(Arc::clone(&self.0));
        }
    }
}

impl Lazy {
    /// Fills the pages for which a handler couldn't get the content.
    fn prepare(&self, borders: &[u64]) -> Result<()> {
        let page = self.served.page_size() as u64;
        let mut buffer = Vec::new();
        for border in borders {
            let inside = border.checked_sub(self.served.offset).filter(|inside| inside % page != 0);
            let number = inside.and_then(|inside| usize::try_from(inside / page).ok());
            let Some(number) = number.filter(|number| *number < self.served.pages.count()) else { continue };
            if self.served.pages.claim_absent(number).is_none() {
                continue; // it has two of them
            }
            let offset = self.served.offset_of(number);
            buffer.resize(page as usize, 0);
            let read = self.served.source.read(offset, &mut buffer);
            match read.map_err(|error| Error::Source { offset, error })? {
                Fill::Data => buffer[self.served.within_source(offset, page as usize)..].fill(0),
                Fill::Zero => buffer.fill(0),
            }
            let (to, from) = (at(self.address(number)), buffer.as_ptr().cast());
            // SAFETY: nobody has seen the page, and whoever handed the region over vouches for what it comes to hold.
            unsafe { self.uffd.copy_with(from, to, page as usize, CopyMode::empty()) }?;
            let _nobody_joined = self.served.pages.end(number, End::Present);
        }
        Ok(())
    }

    /// Answers a fault. Whether the access is to be tried again; if not, it is an access that can't be.
    /// Async-signal-safe.
    pub(super) fn fault(&self, address: usize, slot: usize) -> bool {
        let counters = self.counters(slot);
        let since = (counters.missing_faults.get() % TIMED == 0).then(stats::now);
        counters.missing_faults.add(1);
        let page = (address - self.start) >> self.served.page_shift;
        let answered = match self.served.pages.claim(page) {
            Claim::Mine { removed, .. } => self.load(page, removed, counters),
            Claim::Joined => {
                counters.duplicates.add(1);
                self.join(page, counters)
            }
            Claim::Present => {
                counters.duplicates.add(1);
                self.again(page, counters)
            }
            Claim::Poisoned => false,
        };
        if let Some(since) = since {
            counters.fault_latency.record_since(since);
        }
        answered
    }

    /// Fills a page that was claimed, and what is absent around it.
    fn load(&self, page: usize, removed: bool, counters: &Counters) -> bool {
        let states = &self.served.pages;
        let (around, window) = self.served.around(page);
        let mut pages = page..page + 1;
        while pages.start > around.start && states.claim_quietly(pages.start - 1, removed) {
            pages.start -= 1;
        }
        while pages.end < around.end && states.claim_quietly(pages.end, removed) {
            pages.end += 1;
        }
        if let Some(window) = window {
            self.served.goes_on(window, &pages);
        }
        let filled = self.put_all(pages.clone(), removed, Some(page), counters);
        if filled == pages.end {
            return true;
        }
        for other in (filled..pages.end).filter(|other| *other != page) {
            let _joined = states.end(other, End::Released);
        }
        // What can't be filled may be another page.
        filled > page || self.one(page, removed, true, counters)
    }

    /// A fault on a page that another thread fills. That may be off its CPU, or wait for a disk: this one doesn't
    /// depend on it.
    fn join(&self, page: usize, counters: &Counters) -> bool {
        let states = &self.served.pages;
        for look in 0..LOOKS {
            if !states.is_loading(page) {
                return true;
            }
            if look % 64 == 63 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        self.one(page, states.is_removed(page), false, counters)
    }

    /// A fault on a page that is there, as far as is known. Mostly it came just before. If the page was taken away,
    /// zero is what belongs there.
    fn again(&self, page: usize, counters: &Counters) -> bool {
        match self.put(page..page + 1, true, Some(page), counters) {
            Ok(_) => true,
            Err(Errno::EEXIST | Errno::EAGAIN | Errno::ENOMEM) => self.try_again(),
            Err(_) => self.is_closed(),
        }
    }

    /// Fills one page, which may be claimed or not.
    fn one(&self, page: usize, removed: bool, claimed: bool, counters: &Counters) -> bool {
        let settle = |end, answered| {
            if claimed {
                let _joined = self.served.pages.end(page, end);
            }
            answered
        };
        for _ in 0..TRIES {
            match self.put(page..page + 1, removed, Some(page), counters) {
                Ok(_) => return settle(End::Present, true),
                Err(Errno::EEXIST) => return settle(End::Present, self.try_again()),
                Err(Errno::EAGAIN) => {
                    counters.retries.add(1);
                    std::hint::spin_loop();
                }
                Err(Errno::ENOMEM) => break,
                // Who has claimed it sees to that.
                Err(Errno::EFAULT | Errno::ENODATA) if !claimed => break,
                Err(Errno::EFAULT | Errno::ENODATA) => {
                    counters.source_errors.add(1);
                    return if self.poison(page, counters) {
                        settle(End::Poisoned, true)
                    } else {
                        settle(End::Released, false)
                    };
                }
                Err(_) => return settle(End::Released, self.is_closed()),
            }
        }
        std::thread::yield_now();
        settle(End::Released, self.try_again())
    }

    /// Makes an access to a page raise SIGBUS. `false` before Linux 6.6.
    fn poison(&self, page: usize, counters: &Counters) -> bool {
        // SAFETY: whoever handed the region over accepts that pages whose content can't be had are SIGBUS.
        let poisoned = unsafe { self.uffd.poison(at(self.address(page)), self.served.page_size(), true) };
        if poisoned.is_ok() {
            counters.poisoned.add(1);
        }
        poisoned.is_ok()
    }

    /// Whether all is filled, and given back to the kernel perhaps after the fault.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// The access is to be tried again, unless that was for nothing all too often.
    fn try_again(&self) -> bool {
        self.futile.fetch_add(1, Ordering::Relaxed) < FUTILE
    }

    /// Fills pages that were claimed, from the first on, and settles them. Returns the first that couldn't be filled,
    /// or the end.
    fn put_all(
        &self,
        pages: Range<usize>,
        removed: bool,
        asked: Option<usize>,
        counters: &Counters,
    ) -> usize {
        let mut next = pages.start;
        while next < pages.end {
            let filled = match self.put(next..pages.end, removed, asked, counters) {
                Ok(filled) => filled,
                // Somebody has filled it who couldn't wait.
                Err(Errno::EEXIST) => 1,
                Err(_) => break,
            };
            for page in next..next + filled {
                let _joined = self.served.pages.end(page, End::Present);
            }
            next += filled;
        }
        next
    }

    /// One call of the kernel, which fills one page or more, from the first on. How many.
    fn put(
        &self,
        pages: Range<usize>,
        removed: bool,
        asked: Option<usize>,
        counters: &Counters,
    ) -> Result<usize, Errno> {
        let (served, page) = (&self.served, self.served.page_size());
        let (offset, len) = (served.offset_of(pages.start), pages.len() << served.page_shift);
        let to = at(self.address(pages.start));
        let zeros = if removed { u64::MAX } else { served.source.zeros(offset) };
        let known = usize::try_from(zeros).unwrap_or(usize::MAX).min(len) & !(page - 1);
        let (counter, result) = if known > 0 {
            let result = match &self.zeros {
                // SAFETY: whoever handed the region over vouches for what its pages come to hold; these aren't there
                // yet, as the kernel makes sure.
                None => unsafe { self.uffd.zeropage(to, known, true) },
                // SAFETY: as above; the source is a page of this memory's own.
                Some(zeros) => unsafe {
                    self.uffd.copy_with(zeros.as_ptr().cast(), to, page, CopyMode::empty())
                },
            };
            (&counters.zero_fills, result)
        } else {
            let whole = served.source.bytes(offset, len);
            let bytes = whole.or_else(|| served.source.bytes(offset, page)).ok_or(Errno::ENODATA)?;
            let len = bytes.len().min(len) & !(page - 1);
            // SAFETY: as above; the source has so many bytes there, which only the kernel reads.
            let result = unsafe { self.uffd.copy_with(bytes.as_ptr(), to, len, CopyMode::empty()) };
            (&counters.fills, result)
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
        counter.add(filled_pages as u64);
        counters.bytes.add(filled as u64);
        counters.prefetched.add((filled_pages - usize::from(asked)) as u64);
        Ok(filled_pages)
    }

    fn address(&self, page: usize) -> usize {
        self.start + (page << self.served.page_shift)
    }

    /// The counters of a slot, for who has it.
    fn counters(&self, slot: usize) -> &Counters {
        assert!(slot < SLOTS, "a slot");
        let counters = self.counters.as_ptr().cast::<Counters>().wrapping_add(slot);
        // SAFETY: the mapping has so many of them. Zeros are counters that have counted nothing, and all that is in
        // them are atomics.
        unsafe { &*counters }
    }

    /// Fills all that is absent.
    pub(crate) fn fill(&self, mut progress: impl FnMut(Progress)) -> Result<()> {
        if self.is_closed() {
            return Err(Error::NotServed);
        }
        let total = self.absent_pages();
        let bytes = |pages: usize| (pages as u64) << self.served.page_shift;
        let tell = |left| Progress { done: bytes(total.saturating_sub(left)), total: bytes(total) };
        progress(tell(total));
        let (mut next, end) = (0, self.served.pages.count());
        while next < end {
            next = self.fill_some(next..end, BULK);
            progress(tell(self.absent_pages()));
        }
        // What others are about to fill.
        while (0..end).any(|page| self.served.pages.is_loading(page)) {
            std::thread::yield_now();
        }
        let left = self.absent_pages();
        if left > 0 {
            return Err(Error::Unfilled { pages: left });
        }
        self.closed.store(true, Ordering::SeqCst);
        self.uffd.unregister_unexplained(at(self.start), self.end - self.start)?;
        progress(tell(0));
        Ok(())
    }

    /// Fills what is absent among the first pages of a range, at most so many bytes. Returns where to go on.
    pub(crate) fn fill_some(&self, pages: Range<usize>, most: usize) -> usize {
        let states = &self.served.pages;
        let hold = Hold::take();
        let counters = self.counters(hold.slot());
        let most = (most >> self.served.page_shift).max(1);
        for page in pages.clone() {
            let Some(removed) = states.claim_absent(page) else {
                if states.is_loading(page) {
                    self.join(page, counters);
                }
                continue;
            };
            let more = page + 1..pages.end.min(page.saturating_add(most));
            let end = page + 1 + more.take_while(|next| states.claim_quietly(*next, removed)).count();
            let filled = self.put_all(page..end, removed, None, counters);
            // One by one, so that what can't be filled is one page.
            for page in filled..end {
                let _filled = self.one(page, removed, true, counters);
            }
            return end;
        }
        pages.end
    }

    /// Whether any fault is being answered, of any memory.
    pub(crate) fn is_busy() -> bool {
        table::is_any_running()
    }

    pub(crate) fn region(&self) -> &Arc<Served> {
        &self.served
    }

    pub(crate) fn absent_pages(&self) -> usize {
        let (present, poisoned) = self.served.pages.present_and_poisoned();
        self.served.pages.count() - present - poisoned
    }

    /// What nobody has filled.
    pub(crate) fn absent(&self) -> Result<Vec<Absent>> {
        if self.is_closed() {
            return Err(Error::NotServed);
        }
        let mut absent: Vec<Absent> = Vec::new();
        let len = self.served.page_size();
        for page in (0..self.served.pages.count()).filter(|page| self.served.pages.is_absent(*page)) {
            let address = self.address(page);
            match absent.last_mut().filter(|last| last.address + last.len == address) {
                Some(last) => last.len += len,
                None => {
                    let offset = Some(self.served.offset_of(page));
                    absent.push(Absent { region: RegionId(self.served.id), address, len, offset });
                }
            }
        }
        Ok(absent)
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let mut sum: Statistics = (0..SLOTS).map(|slot| self.counters(slot).snapshot()).sum();
        sum.present_pages = self.served.pages.present_and_poisoned().0 as u64;
        sum.absent_pages = self.absent_pages() as u64;
        sum
    }
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
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::thread;

    use super::*;
    use crate::pager::BytesSource;
    use crate::{FeatureFlags, UffdBuilder, page_size};

    /// Memory of four pages, and where it is. One test at a time has any: dropping it waits for slots that are taken
    /// meanwhile, and these tests wait while they have some, as no handler does.
    fn owned() -> (MutexGuard<'static, ()>, Owned, MmapMut) {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = MmapOptions::new().len(4 * page_size()).map_anon().unwrap();
        let mut builder = UffdBuilder::new();
        let uffd = builder.close_on_exec(true).require_features(FeatureFlags::SIGBUS).create().unwrap();
        let start = memory.as_mut_ptr().expose_provenance();
        let region = Region::new(start, memory.len(), BytesSource::new(vec![7; memory.len()]));
        // SAFETY: bytes are good whatever they are, and the mapping stays longer than its owner.
        let owned = unsafe { Owned::new(uffd, region.block(2 * page_size()), &[]) };
        (alone, owned.unwrap(), memory)
    }

    #[test]
    fn a_fault_does_not_depend_on_the_thread_that_fills_its_page() {
        crate::support::require!();
        let (_alone, owned, memory) = owned();
        let states = &owned.lazy().served.pages;
        assert!(states.claim_quietly(1, false), "as if by a thread that gets no CPU");
        assert_eq!(memory[page_size()], 7);
        assert!(states.is_loading(1));
        assert_eq!(memory[0], 7);
        assert_eq!(owned.lazy().statistics().fills, 2);
        // The thread goes on, and finds that it is done.
        let hold = Hold::take();
        assert_eq!(owned.lazy().put_all(1..2, false, None, owned.lazy().counters(hold.slot())), 2);
        assert_eq!((states.claim(1), owned.lazy().statistics().fills), (Claim::Present, 2));
    }

    #[test]
    fn memory_stays_until_no_handler_has_it() {
        crate::support::require!();
        let (_alone, owned, memory) = owned();
        let lazy = Arc::downgrade(owned.lazy());
        let hold = Hold::take();
        let address = memory.as_ptr().addr();
        thread::scope(|scope| {
            let owner = scope.spawn(|| drop(owned));
            while Hold::take().find(address).is_some() {
                thread::yield_now();
            }
            for _ in 0..100 {
                thread::yield_now();
            }
            assert!(!owner.is_finished() && lazy.strong_count() == 1);
            assert_eq!(hold.find(address).unwrap().statistics().fills, 0);
            drop(hold);
            owner.join().unwrap();
        });
        assert_eq!(lazy.strong_count(), 0);
    }

    #[test]
    fn more_handlers_than_slots_wait_for_each_other() {
        crate::support::require!();
        let (_alone, owned, memory) = owned();
        let mut holds: Vec<_> = (0..SLOTS).map(|_| Hold::take()).collect();
        let mut slots: Vec<_> = holds.iter().map(Hold::slot).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), SLOTS, "each has its own");
        thread::scope(|scope| {
            let reader = scope.spawn(|| memory[3 * page_size()]);
            thread::yield_now();
            assert!(!reader.is_finished());
            holds.pop();
            assert_eq!(reader.join().unwrap(), 7);
        });
        drop(holds); // whoever is removed waits for them
        drop(owned);
    }
}
