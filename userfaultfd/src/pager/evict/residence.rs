//! Where the pages of a region with a budget are: in memory, in the staging area, in the spill file, or in the source.
//!
//! The claim of a page's state is what allows to change its place: a fault that loads it, a first write, the evicting
//! thread. A page counts as missing once it is in the staging area, and a fault on it finds its content there.
//!
//! **What was written** is known exactly. Pages are filled protected, and the fault of the first write sets
//! [`Place::is_written`] under the claim, before the protection is lifted. So the thread that has claimed a page that isn't
//! written knows that the source, or the spill file, has its content.
//!
//! Where written pages go to a store, a copy of a page may be on its way there while the page is in use
//! ([`clean`](super::clean)): it is dirty until that has ended, and can't be dropped.
//!
//! **The staging area** is a second range of addresses as long as the region: a page rests at its own offset there.

#![expect(unsafe_code, reason = "pages of memory that nobody else has while they rest")]

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::Instant;

use memmap2::{MmapOptions, MmapRaw};

use super::budget::Budget;
use super::context::EvictContext;
use super::frames::Member;
use super::pins::{PinTerm, SHORT_PIN_PATIENCE};
use super::policy::NONE;
use super::pool::{Counters, Pool, STUCK_INTERVAL, count};
use super::shared::Places;
use super::store::StoreBacking;
use super::write_back;
use crate::own_mapping::OwnMapping;
use crate::pager::memory::page_state::Pages;
use crate::pager::memory::served::ServedRegion;
use crate::pager::{Error, Result};
use crate::sync::AtomicU64;
use crate::{FeatureFlags, RegisterMode, Support, Uffd, sys};

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(u32);

/// In the staging area.
const STAGED: u32 = 1 << 31;
/// Written since it was filled: what the spill file and the source have of it is outdated.
const WRITTEN: u32 = 1 << 30;
/// The spill file has it.
const SPILLED: u32 = 1 << 29;
/// It has left memory before.
const LEFT: u32 = 1 << 28;
/// What it held is being written to the store, from a copy.
const WRITING: u32 = 1 << 27;
/// The number of its frame, while it has one.
const FRAME: u32 = WRITING - 1;

impl Place {
    pub(super) fn is_staged(self) -> bool {
        self.0 & STAGED != 0
    }

    pub(super) fn is_written(self) -> bool {
        self.0 & WRITTEN != 0
    }

    /// Whether memory alone has its content for certain.
    pub(super) fn is_dirty(self) -> bool {
        self.0 & (WRITTEN | WRITING) != 0
    }

    fn was_here(self) -> bool {
        self.0 & LEFT != 0
    }

    /// It was written.
    pub(super) fn written(self) -> Self {
        Self(self.0 | WRITTEN)
    }

    /// What it holds was copied, to be written to the store.
    pub(super) fn writing(self) -> Self {
        Self(self.0 & !WRITTEN | WRITING)
    }

    /// The same, of a page that may be written meanwhile without a fault.
    pub(super) fn writing_on(self) -> Self {
        Self(self.0 | WRITING)
    }

    /// The store has what was copied.
    pub(super) fn stored(self) -> Self {
        Self(self.0 & !WRITING)
    }

    pub(super) fn frame(self) -> u32 {
        self.0 & FRAME
    }

    /// It is moved to the staging area.
    pub(super) fn staged(self) -> Self {
        Self(self.0 | STAGED)
    }

    /// It is in memory, in a frame.
    pub(super) fn entered(self, frame: u32, is_written: bool) -> Self {
        let written = if is_written { WRITTEN } else { 0 };
        Self(self.0 & (WRITTEN | WRITING | SPILLED | LEFT) | written | frame & FRAME)
    }

    /// It has left memory. If it was written, the spill file has it now.
    pub(super) fn left(self) -> Self {
        debug_assert!(self.0 & WRITING == 0, "a page leaves while it is being written");
        let spilled = if self.is_written() { SPILLED } else { self.0 & SPILLED };
        Self(spilled | LEFT)
    }
}

/// Pages that are noted as present with the frames locked once, before their region is served.
const ENTER_PAGES: usize = 512;

/// Where the content of a page is that isn't in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Source,
    Spill,
    Staged,
}

/// The places of a region's pages, the staging area, and the spill file.
pub(crate) struct Residence {
    budget: Budget,
    /// Its number among those of the budget. Changed with the budget's frames locked.
    member: AtomicU32,
    /// A place and a stamp for each page, mapped where a page was touched.
    cells: MmapRaw,
    count: usize,
    staging: OwnMapping,
    pub(super) way: Way,
    pub(super) backing: Backing,
    pub(super) counters: Counters,
    /// Pages that memory alone has.
    dirty: AtomicUsize,
    /// Pages that are in frames.
    pub(super) resident: AtomicUsize,
}

/// How a page gets to the staging area.
pub(super) enum Way {
    /// It is moved: since Linux 6.8.
    Moved,
    /// It is copied from `/proc/self/mem`.
    Copied(File),
    /// It is copied from the memory's file, wherever that is mapped.
    FromFile(Places),
}

/// Where a page goes that was written.
pub(super) enum Backing {
    /// To a file of its own, when it leaves.
    Spill(File),
    /// To its source, before it leaves.
    Store(StoreBacking),
}

impl Way {
    fn of_private(moves: bool) -> Result<Self> {
        let can_move = moves && Support::probe()?.features().contains(FeatureFlags::MOVE);
        Ok(if can_move { Self::Moved } else { Self::Copied(File::open("/proc/self/mem")?) })
    }
}

impl Backing {
    /// A file for the pages of a budget.
    fn spill(budget: &Budget, dir: &Path) -> Result<Self> {
        budget.check()?;
        let spill = write_back::create(dir);
        spill.map(Self::Spill).map_err(|error| Error::Spill { dir: dir.to_owned(), error })
    }
}

impl Residence {
    /// For `count` pages of the base size, whose written ones go to a file. `moves`: whether pages are moved where the kernel
    /// can, since Linux 6.8.
    pub(crate) fn with_spill(budget: &Budget, count: usize, dir: &Path, moves: bool) -> Result<Self> {
        Self::new(budget, count, Backing::spill(budget, dir)?, Way::of_private(moves)?)
    }

    /// The same for shared memory, whose pages are copied from its file.
    pub(crate) fn of_file(budget: &Budget, count: usize, dir: &Path) -> Result<Self> {
        Self::new(budget, count, Backing::spill(budget, dir)?, Way::FromFile(Places::new()))
    }

    /// The same, whose written pages go to a store.
    pub(crate) fn with_store(
        budget: &Budget,
        count: usize,
        store: StoreBacking,
        moves: bool,
    ) -> Result<Self> {
        budget.check()?;
        Self::new(budget, count, Backing::Store(store), Way::of_private(moves)?)
    }

    fn new(budget: &Budget, count: usize, backing: Backing, way: Way) -> Result<Self> {
        let cells: MmapRaw =
            MmapOptions::new().len(count * size_of::<[AtomicU32; 2]>()).no_reserve_swap().map_anon()?.into();
        let staging = OwnMapping::new(count * crate::page_size(), None)?;
        Ok(Self {
            budget: budget.clone(),
            member: AtomicU32::new(NONE),
            cells,
            count,
            staging,
            way,
            backing,
            counters: Counters::default(),
            dirty: AtomicUsize::new(0),
            resident: AtomicUsize::new(0),
        })
    }

    /// Counts the pages of its region from now on, which is filled by a pager. Not one that was filled yet.
    pub(crate) fn attach(
        &self,
        region: &Arc<ServedRegion>,
        start: usize,
        uffd: &Arc<Uffd>,
        pager: EvictContext,
    ) -> Result<()> {
        if matches!(self.way, Way::Moved) {
            // Pages can be moved to what is registered alone. Nothing there is touched while it is missing.
            let (staging, len) = (self.staging.as_ptr(), self.count * crate::page_size());
            let registered = uffd.register_with_mode(staging.cast(), len, RegisterMode::MISSING);
            registered.map_err(|error| Error::Register { address: staging.addr(), error })?;
        }
        let (region, write_work) = (Arc::clone(region), Condvar::new());
        // The descriptor of shared memory is looked up: it may end before the budget.
        let uffd = self.places().is_none().then(|| Arc::clone(uffd));
        self.budget.attach(Member { region, start, uffd, pager, write_work })
    }

    /// Counts them no longer. No thread of the budget touches the region when this returns.
    pub(crate) fn detach(&self) {
        if self.budget.pool().is_here() {
            self.budget.detach(self);
        }
    }

    /// Where its pages are mapped, if they are shared memory's.
    pub(crate) fn places(&self) -> Option<&Places> {
        match &self.way {
            Way::FromFile(places) => Some(places),
            Way::Moved | Way::Copied(_) => None,
        }
    }

    /// Whether it is one of shared memory whose pages a budget counts.
    pub(crate) fn is_limiting(&self) -> bool {
        self.places().is_some_and(Places::is_served) && self.member().is_some()
    }

    /// Whether a page was written, for the thread that has claimed it.
    pub(super) fn is_written(&self, page: usize) -> bool {
        self.place(page).is_written()
    }

    pub(super) fn member(&self) -> Option<u32> {
        Some(self.member.load(Ordering::Relaxed)).filter(|member| *member != NONE)
    }

    pub(super) fn set_member(&self, member: Option<u32>) {
        self.member.store(member.unwrap_or(NONE), Ordering::Relaxed);
    }

    pub(super) fn as_member(&self) -> Option<Arc<Member>> {
        self.budget.pool().lock().member(self.member()?)
    }

    fn cell(&self, page: usize) -> &[AtomicU32; 2] {
        assert!(page < self.count, "page {page} of {}", self.count);
        // SAFETY: the mapping has as many cells as there are pages.
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins with a page")]
        let cell = unsafe { self.cells.as_mut_ptr().cast::<[AtomicU32; 2]>().add(page) };
        // SAFETY: it is mapped and aligned as long as this is borrowed; nothing but these atomics leads to it.
        unsafe { &*cell }
    }

    /// Relaxed, as below: only the thread that has claimed the page changes it, and claims are handed on by its state.
    pub(super) fn place(&self, page: usize) -> Place {
        Place(self.cell(page)[0].load(Ordering::Relaxed))
    }

    /// Changes a place, and returns what it was. In one step: a page that is claimed may be one of which a copy is being
    /// written, and the end of that changes the place, too, with the frames locked and without the claim.
    pub(super) fn change(&self, page: usize, change: impl Fn(Place) -> Place) -> Place {
        let cell = &self.cell(page)[0];
        let next = |place| Some(change(Place(place)).0);
        let before = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        let before = Place(before.unwrap_or_else(|place| place));
        match (before.is_dirty(), change(before).is_dirty()) {
            (false, true) => drop(self.dirty.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.dirty.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        before
    }

    /// Pages of the region.
    pub(super) fn page_count(&self) -> usize {
        self.count
    }

    /// Pages that memory alone has.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Pages that are in frames.
    pub(crate) fn resident_count(&self) -> usize {
        self.resident.load(Ordering::Relaxed)
    }

    pub(crate) fn budget_bytes(&self) -> usize {
        self.budget.bytes()
    }

    /// Whether a missing page is in the staging area: a guess, without its claim.
    pub(crate) fn rests(&self, page: usize) -> bool {
        self.place(page).is_staged()
    }

    /// What its pages are written to, if that is its source.
    pub(crate) fn store(&self) -> Option<&StoreBacking> {
        match &self.backing {
            Backing::Store(store) => Some(store),
            Backing::Spill(_) => None,
        }
    }

    /// Counts for this memory, and for all of the budget.
    pub(super) fn count(&self, of: impl Fn(&Counters) -> &AtomicU64, more: usize) {
        count(of(&self.counters), more);
        count(of(&self.budget.pool().counters), more);
    }

    pub(super) fn stamp(&self, page: usize) -> u32 {
        self.cell(page)[1].load(Ordering::Relaxed)
    }

    pub(super) fn set_stamp(&self, page: usize, stamp: u32) {
        self.cell(page)[1].store(stamp, Ordering::Relaxed);
    }

    /// Where the content of a missing page is, for the thread that has claimed it.
    pub(crate) fn content(&self, page: usize) -> Content {
        match self.place(page) {
            place if place.is_staged() => Content::Staged,
            place if place.0 & SPILLED != 0 => Content::Spill,
            _ => Content::Source,
        }
    }

    /// Notes that a page isn't what the source or the spill file has, for the thread that has claimed it.
    pub(crate) fn set_written(&self, page: usize) {
        self.change(page, Place::written);
    }

    /// Reads pages from the spill file.
    pub(crate) fn read_spilled(&self, page: usize, bytes: &mut [u8]) -> io::Result<()> {
        match &self.backing {
            Backing::Spill(spill) => spill.read_exact_at(bytes, page as u64 * crate::page_size() as u64),
            Backing::Store(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// A page in the staging area. It is there as long as its page is claimed.
    pub(crate) fn staged(&self, page: usize) -> *mut u8 {
        assert!(page < self.count, "page {page} of {}", self.count);
        self.staging.as_ptr().wrapping_add(page * crate::page_size())
    }

    /// Empties pages of the staging area that the caller has claimed.
    pub(super) fn empty(&self, pages: &Range<usize>) {
        let (start, len) = (self.staged(pages.start), pages.len() * crate::page_size());
        // SAFETY: the pages are this value's, and nobody else looks at them: the caller has their claims.
        let emptied = unsafe { sys::discard(start, len) };
        debug_assert!(emptied.is_ok(), "{emptied:?}");
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        self.budget.pool()
    }

    /// Counts what was read from the source.
    pub(crate) fn count_read(&self, bytes: usize) {
        self.count(|counters| &counters.bytes_read, bytes);
    }

    /// Pages of one load at most.
    pub(crate) fn max_run(&self) -> usize {
        self.budget.pool().max_run()
    }

    /// Pages of all loads at most that one fault has made ahead of need.
    pub(crate) fn max_ahead(&self) -> usize {
        self.budget.pool().max_ahead()
    }

    /// How many of some pages take room: those that aren't in the staging area. For the thread that has claimed them.
    fn uncounted(&self, pages: Range<usize>) -> usize {
        pages.filter(|page| !self.place(*page).is_staged()).count()
    }

    /// Reserves room for pages that the caller has claimed, and waits for it. Not with a lock held.
    pub(crate) fn reserve(&self, pages: Range<usize>, is_fault: bool) {
        self.count(|counters| &counters.faults, usize::from(is_fault));
        match self.uncounted(pages) {
            0 => {}
            pages => {
                if let Some(waited) = self.budget.pool().reserve(pages) {
                    self.count(|counters| &counters.waits, 1);
                    self.count(|counters| &counters.waited_ns, waited.as_nanos() as usize);
                }
            }
        }
    }

    /// Gives back what was reserved for pages that weren't filled, and are claimed still.
    pub(crate) fn give_back(&self, pages: Range<usize>) {
        self.budget.pool().give_back(self.uncounted(pages));
    }

    /// Notes that pages are in memory, before their claim ends. `was_reserved`: whether there is room for them.
    pub(crate) fn enter(&self, pages: Range<usize>, was_reserved: bool, is_written: impl Fn(usize) -> bool) {
        let (pool, new) = (self.budget.pool(), self.uncounted(pages.clone()));
        let (mut back, mut again) = (0, 0);
        for page in pages.clone() {
            let place = self.place(page);
            if place.is_staged() {
                self.empty(&(page..page + 1));
                back += 1;
            } else if place.was_here() {
                again += 1;
            }
        }
        if !was_reserved {
            pool.charge(new);
        }
        let mut frames = pool.lock();
        let mut has_left = false;
        for page in pages {
            has_left |= !frames.enter(self, page, is_written(page));
        }
        drop(frames);
        if has_left {
            // Its memory ends.
            pool.give_back(new);
        }
        self.count(|counters| &counters.second_chances, back);
        self.count(|counters| &counters.refaults, again);
    }

    /// Notes that pages are in memory that were there before the region was served, as it is about to be. They may have been
    /// written.
    pub(crate) fn enter_present(&self, states: &Pages) {
        if states.present_and_poisoned().0 == 0 {
            return;
        }
        let is_present = |page: &usize| !states.is_missing(*page);
        let mut next = 0;
        while let Some(first) = (next..self.count).find(is_present) {
            next = (first..self.count.min(first + ENTER_PAGES))
                .find(|page| !is_present(page))
                .unwrap_or(self.count.min(first + ENTER_PAGES));
            self.enter(first..next, false, |_| true);
        }
        let pool = self.budget.pool();
        let _frames = pool.lock();
        pool.work.notify_one();
    }

    /// Keeps pages from leaving that are there, and those that come. Waits for those that are about to leave. Returns
    /// whether that is possible.
    pub(crate) fn pin(&self, pages: &Range<usize>, term: PinTerm) -> bool {
        let pool = self.budget.pool();
        let (mut frames, since) = (pool.lock(), Instant::now());
        let is_pinned = loop {
            let Some(member) = self.member() else { break false };
            if frames.pin(pool.limit(), member, pages, term) {
                break true;
            }
            // A part is waited for by another part alone: its thread has no second one.
            let may_wait = term == PinTerm::Part && frames.pins.has_parts();
            if !may_wait || since.elapsed() > SHORT_PIN_PATIENCE {
                break false;
            }
            frames = frames.wait_timeout(&pool.room, STUCK_INTERVAL);
        };
        drop(pool.wait_for_pass(frames));
        is_pinned
    }

    /// Ends a pin.
    pub(crate) fn unpin(&self, pages: &Range<usize>, term: PinTerm) {
        let (Some(member), pool) = (self.member(), self.budget.pool()) else { return };
        let mut frames = pool.lock();
        if frames.pins.unpin(member, pages, term) {
            frames.set_stuck(false);
            if term == PinTerm::Part {
                pool.room.notify_all();
            }
        }
    }
}

impl fmt::Debug for Residence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Residence")
            .field("budget", &self.budget)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}
