//! The state of each page of a region: one byte, in a mapping that takes memory only where a page was accessed.

#![expect(unsafe_code, reason = "atomic bytes in a mapping")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use self::room::cells;
pub(crate) use self::room::{Room, map};
use crate::sync::atomic::{AtomicU8, AtomicUsize};

/// The content is in place.
const PRESENT: u8 = 1 << 0;
/// An access raises SIGBUS.
const POISONED: u8 = 1 << 1;
/// The page was removed: zeros belong there, whatever the source has.
const REMOVED: u8 = 1 << 2;
/// One thread, the claimant, is about to put content there. No other thread may.
const LOADING: u8 = 1 << 3;
/// Another fault came meanwhile: the claimant wakes once more when it settles the state.
const JOINED: u8 = 1 << 4;
/// First bit of the counter of tries: how often the kernel reported the page as present, and a fault came all the same.
const TRIES_SHIFT: u32 = 5;

/// Faults on a page that counts as present, before it counts as removed where nothing else can tell: as many are mostly
/// those of threads that have been woken.
const MAX_DOUBTS: u8 = 2;

/// The largest count of tries that fits.
pub(crate) const MAX_TRIES: u8 = u8::MAX >> TRIES_SHIFT;

/// The state in which a fault finds its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The page was missing, and the caller must load it: with zeros if `removed`.
    Acquired { removed: bool, tries: u8 },
    /// Another thread loads the page, and will wake this fault, too.
    Joined,
    /// Present, as far as the pager knows.
    Present,
    /// Poisoned, as far as the pager knows.
    Poisoned,
}

/// What a fault finds a page to be that was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PresentClaim {
    /// There, and the caller's.
    Acquired,
    /// Another thread has it, and knows now that there is one more to wake.
    Joined,
    /// Not there any more.
    Gone,
}

/// How a load ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// The content is in place.
    Present,
    /// The same, where removed pages are loaded again: if the page was removed since it was loaded before, that may come to
    /// pass only now.
    Reloaded,
    /// The page is poisoned.
    Poisoned,
    /// The page is missing again, and any thread may load it.
    Released,
    /// The same, and the kernel reports the page as present.
    Contested,
    /// It was there, and has left memory: missing from now on.
    Left,
}

/// A state without the thread that is loading the page: one that was loaded once more is doubted.
fn settled(state: u8) -> u8 {
    let is_doubted = state & PRESENT != 0 && (state & LOADING != 0 || state >> TRIES_SHIFT > 0);
    let doubt = if is_doubted { 1 << TRIES_SHIFT } else { 0 };
    state & (PRESENT | POISONED | REMOVED) | doubt
}

/// The states of the pages of a region.
pub(crate) struct Pages {
    /// The regions of a forked child share one mapping.
    states: Arc<Room>,
    first: usize,
    count: usize,
    present: AtomicUsize,
    poisoned: AtomicUsize,
}

/// Loading pages that the debug text of a region lists.
const LISTED_PAGES: usize = 16;

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Loading<'a>(&'a Pages);

        impl fmt::Debug for Loading<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Relaxed: it shows a moment, and no other data is read because of it.
                let is_loading = |cell: &AtomicU8| cell.load(Ordering::Relaxed) & LOADING != 0;
                let loading = self.0.cells().iter().enumerate().filter(|(_, cell)| is_loading(cell));
                f.debug_list().entries(loading.map(|(page, _)| page).take(LISTED_PAGES)).finish()
            }
        }

        let (present, poisoned) = self.present_and_poisoned();
        f.debug_struct("Pages")
            .field("count", &self.count)
            .field("present", &present)
            .field("poisoned", &poisoned)
            .field("loading", &Loading(self))
            .finish_non_exhaustive()
    }
}

impl Pages {
    /// States of `count` missing pages.
    pub(crate) fn new(count: usize) -> io::Result<Self> {
        let states = Arc::new(map(count)?);
        Ok(Self { states, first: 0, count, present: AtomicUsize::new(0), poisoned: AtomicUsize::new(0) })
    }

    /// Marks all pages as present, for memory that was served before. No other thread may use these states yet.
    pub(crate) fn all_present(&self) {
        self.cells().iter().for_each(|cell| cell.store(PRESENT, Ordering::Relaxed));
        self.present.store(self.count, Ordering::Relaxed);
    }

    /// Marks some of them as missing, with zeros as content if `removed`.
    pub(crate) fn set_missing(&self, pages: Range<usize>, removed: bool) {
        for cell in &self.cells()[pages] {
            let before = cell.swap(if removed { REMOVED } else { 0 }, Ordering::Relaxed);
            self.count_change(before, 0);
        }
    }

    /// The states that [`copy_to`](Self::copy_to) wrote to a mapping from `first` on.
    pub(crate) fn of_copy(states: Arc<Room>, first: usize, count: usize) -> Self {
        let (present, poisoned) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let pages = Self { states, first, count, present, poisoned };
        for cell in pages.cells() {
            let state = cell.load(Ordering::Relaxed);
            pages.count_change(0, state);
        }
        pages
    }

    /// The states that lie in a mapping from `first` on, where a process may have left them at any moment. What it was loading
    /// is missing, or present if it was present before.
    pub(crate) fn taken_over(states: Arc<Room>, first: usize, count: usize) -> Self {
        for cell in cells(&states, first, count) {
            let state = cell.load(Ordering::Acquire);
            let settled = settled(state);
            // Writing zeros would take memory.
            if settled != state {
                cell.store(settled, Ordering::Relaxed);
            }
        }
        Self::of_copy(states, first, count)
    }

    /// Copies the states of a range of pages to a mapping from `first` on. Loading pages are missing in the copy, and those
    /// that are loaded once more are doubted.
    pub(crate) fn copy_to(&self, range: Range<usize>, copy: &Room, first: usize) {
        let to = cells(copy, first, range.len());
        for (to, from) in to.iter().zip(&self.cells()[range]) {
            let state = settled(from.load(Ordering::Acquire));
            // Writing zeros would take memory.
            if state != 0 {
                to.store(state, Ordering::Relaxed);
            }
        }
    }

    fn cells(&self) -> &[AtomicU8] {
        cells(&self.states, self.first, self.count)
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The numbers of present and of poisoned pages. Their sum doesn't exceed the number of pages.
    pub(crate) fn present_and_poisoned(&self) -> (usize, usize) {
        // Another thread may count a removal before the first one has counted the fill.
        let number = |count: &AtomicUsize| (count.load(Ordering::Relaxed) as isize).max(0) as usize;
        let present = number(&self.present).min(self.count);
        (present, number(&self.poisoned).min(self.count - present))
    }

    /// Claims the page of a fault.
    pub(crate) fn claim(&self, page: usize) -> Claim {
        let cell = &self.cells()[page];
        let mut state = cell.load(Ordering::Acquire);
        loop {
            let (next, claim) = if state & LOADING != 0 {
                (state | JOINED, Claim::Joined)
            } else if state & PRESENT != 0 {
                return Claim::Present;
            } else if state & POISONED != 0 {
                return Claim::Poisoned;
            } else {
                let claim = Claim::Acquired { removed: state & REMOVED != 0, tries: state >> TRIES_SHIFT };
                (state | LOADING, claim)
            };
            match cell.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return claim,
                Err(now) => state = now,
            }
        }
    }

    /// Claims the pages around a claimed one that are plainly missing, with content of the same kind, and within a range.
    /// Returns all of them.
    pub(crate) fn claim_around(&self, page: usize, within: Range<usize>, removed: bool) -> Range<usize> {
        let (mut start, mut end) = (page, page + 1);
        while start > within.start && self.try_claim_untouched(start - 1, removed) {
            start -= 1;
        }
        while end < within.end && self.try_claim_untouched(end, removed) {
            end += 1;
        }
        start..end
    }

    /// Claims a page that no fault asked for, if it is plainly missing, with content of the given kind.
    pub(crate) fn try_claim_untouched(&self, page: usize, removed: bool) -> bool {
        let (missing, cell) = (if removed { REMOVED } else { 0 }, &self.cells()[page]);
        cell.compare_exchange(missing, missing | LOADING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Claims a page that no fault asked for, whatever its count of tries. Returns whether its content is zeros, or `None`
    /// if it isn't missing, or another thread has claimed it.
    pub(crate) fn claim_missing(&self, page: usize) -> Option<bool> {
        let state = self.cells()[page].load(Ordering::Acquire);
        if state & (LOADING | PRESENT | POISONED) != 0 {
            return None;
        }
        match self.claim(page) {
            Claim::Acquired { removed, .. } => Some(removed),
            Claim::Joined | Claim::Present | Claim::Poisoned => None,
        }
    }

    /// Claims a page that is there, to take it away or to note a write to it. Not where another thread has it.
    pub(crate) fn try_claim_present(&self, page: usize) -> bool {
        let claimed = |state: u8| (state & (PRESENT | LOADING) == PRESENT).then_some(state | LOADING);
        self.cells()[page].fetch_update(Ordering::AcqRel, Ordering::Acquire, claimed).is_ok()
    }

    /// The same for a fault: if another thread has the page, that thread wakes those that wait for it.
    pub(crate) fn claim_present(&self, page: usize) -> PresentClaim {
        let cell = &self.cells()[page];
        let mut state = cell.load(Ordering::Acquire);
        loop {
            let (next, claim) = match state {
                _ if state & (PRESENT | LOADING) == PRESENT => (state | LOADING, PresentClaim::Acquired),
                _ if state & LOADING != 0 => (state | JOINED, PresentClaim::Joined),
                _ => return PresentClaim::Gone,
            };
            match cell.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return claim,
                Err(now) => state = now,
            }
        }
    }

    /// Notes a fault on a page that counts as present. Returns whether enough have come that it may have been removed.
    pub(crate) fn doubt(&self, page: usize) -> bool {
        let cell = &self.cells()[page];
        let more = |state: u8| {
            let is_new = state & (PRESENT | LOADING) == PRESENT && state >> TRIES_SHIFT < MAX_DOUBTS;
            is_new.then(|| state + (1 << TRIES_SHIFT))
        };
        match cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) {
            Ok(_) => false,
            Err(state) => state & (PRESENT | LOADING) == PRESENT,
        }
    }

    /// Claims a page that counts as present, whatever is doubted of it, to load it again. Not where another thread has it.
    pub(crate) fn claim_again(&self, page: usize) -> bool {
        let claimed = |state: u8| (state & (PRESENT | LOADING) == PRESENT).then_some(PRESENT | LOADING);
        self.cells()[page].fetch_update(Ordering::AcqRel, Ordering::Acquire, claimed).is_ok()
    }

    /// Whether a thread is about to fill a page, with a prospect of success.
    pub(crate) fn is_in_work(&self, page: usize) -> bool {
        let state = self.cells()[page].load(Ordering::Acquire);
        state & LOADING != 0 && state >> TRIES_SHIFT != MAX_TRIES
    }

    /// Notes that a claimed page has no such prospect.
    pub(crate) fn mark_stuck(&self, page: usize) {
        self.cells()[page].fetch_or(MAX_TRIES << TRIES_SHIFT, Ordering::AcqRel);
    }

    /// Whether a page was removed, perhaps since it was claimed.
    pub(crate) fn is_removed(&self, page: usize) -> bool {
        self.cells()[page].load(Ordering::Acquire) & REMOVED != 0
    }

    /// Whether a thread is about to put content there.
    pub(crate) fn is_loading(&self, page: usize) -> bool {
        self.cells()[page].load(Ordering::Acquire) & LOADING != 0
    }

    /// Whether a page is poisoned.
    pub(crate) fn is_poisoned(&self, page: usize) -> bool {
        self.cells()[page].load(Ordering::Acquire) & POISONED != 0
    }

    /// Whether a page is neither present nor poisoned.
    pub(crate) fn is_missing(&self, page: usize) -> bool {
        self.cells()[page].load(Ordering::Acquire) & (PRESENT | POISONED) == 0
    }

    /// Whether a fill of a page has failed: the page isn't present, no thread is about to fill it, and it wasn't removed.
    pub(crate) fn is_failed(&self, page: usize) -> bool {
        self.cells()[page].load(Ordering::Acquire) & (PRESENT | LOADING | REMOVED) == 0
    }

    /// Ends the load of a claimed page. Returns whether another fault joined, so that its thread must be woken.
    #[must_use]
    pub(crate) fn end(&self, page: usize, end: Settlement) -> bool {
        let cell = &self.cells()[page];
        let mut state = cell.load(Ordering::Acquire);
        loop {
            let missing = state & !(LOADING | JOINED);
            let next = match end {
                Settlement::Present => PRESENT,
                Settlement::Reloaded if missing & REMOVED != 0 || missing >> TRIES_SHIFT != 0 => {
                    PRESENT | 1 << TRIES_SHIFT
                }
                Settlement::Reloaded => PRESENT,
                Settlement::Poisoned => POISONED,
                Settlement::Released => missing,
                Settlement::Left => state & REMOVED,
                Settlement::Contested if state >> TRIES_SHIFT == MAX_TRIES => missing,
                Settlement::Contested => missing + (1 << TRIES_SHIFT),
            };
            // Counted first, so that a page whose state is visible is counted.
            self.count_change(state, next);
            match cell.compare_exchange(state, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return state & JOINED != 0,
                Err(now) => {
                    self.count_change(next, state);
                    state = now;
                }
            }
        }
    }

    /// Marks pages as removed: from now on zeros belong there. With `keep_present`, present pages stay as they are.
    pub(crate) fn remove(&self, pages: Range<usize>, keep_present: bool) {
        self.change_all(pages, |state| {
            let stays = keep_present && state & PRESENT != 0;
            if stays { state } else { state & (LOADING | JOINED) | REMOVED }
        });
    }

    /// The same for memory with a file, which may have the page still, where removed pages are loaded again. One that was
    /// never loaded stays plainly missing. One that is being loaded for the first time may be removed after that.
    pub(crate) fn remove_from_file(&self, pages: Range<usize>) {
        self.change_all(pages, |state| {
            let more = match state {
                _ if state & (PRESENT | REMOVED) != 0 => REMOVED,
                _ if state & LOADING != 0 => 1 << TRIES_SHIFT,
                _ => 0,
            };
            state & (LOADING | JOINED) | more
        });
    }

    /// The same where pages leave memory: a present page is doubted, as it is removed only after this. One that a thread has
    /// in hand may be on its way out: the claim ends as it would.
    pub(crate) fn remove_limited(&self, pages: Range<usize>) {
        self.change_all(pages, |state| match state & (PRESENT | LOADING) {
            PRESENT => PRESENT | 1 << TRIES_SHIFT,
            _ => state & (LOADING | JOINED) | REMOVED,
        });
    }

    /// Whether a page counts as present and is doubted.
    pub(crate) fn is_doubted(&self, page: usize) -> bool {
        let state = self.cells()[page].load(Ordering::Acquire);
        state & PRESENT != 0 && state >> TRIES_SHIFT > 0
    }

    /// Marks pages as removed that count as present and are doubted: the next fault or fill finds out.
    pub(crate) fn remove_doubted(&self, pages: Range<usize>) {
        let is_doubted = |state: u8| state & (PRESENT | LOADING) == PRESENT && state >> TRIES_SHIFT > 0;
        self.change_all(pages, |state| if is_doubted(state) { REMOVED } else { state });
    }

    fn change_all(&self, pages: Range<usize>, change: impl Fn(u8) -> u8) {
        for cell in &self.cells()[pages] {
            let mut state = cell.load(Ordering::Acquire);
            loop {
                let next = change(state);
                if next == state {
                    break;
                }
                match cell.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break self.count_change(state, next),
                    Err(now) => state = now,
                }
            }
        }
    }

    fn count_change(&self, from: u8, to: u8) {
        for (flag, count) in [(PRESENT, &self.present), (POISONED, &self.poisoned)] {
            match (from & flag != 0, to & flag != 0) {
                (false, true) => drop(count.fetch_add(1, Ordering::Relaxed)),
                (true, false) => drop(count.fetch_sub(1, Ordering::Relaxed)),
                _ => {}
            }
        }
    }
}

/// The states in a mapping.
#[cfg(not(all(test, userfaultfd_loom)))]
mod room {
    use std::sync::atomic::AtomicU8;
    use std::{io, slice};

    use memmap2::{MmapOptions, MmapRaw};

    use crate::sys;

    pub(crate) type Room = MmapRaw;

    /// Maps room for the states of `count` pages, all missing, without the allocator.
    pub(crate) fn map(count: usize) -> io::Result<Room> {
        let states: MmapRaw = MmapOptions::new().len(count).no_reserve_swap().map_anon()?.into();
        // Memory is taken for accessed pages, not for 2 MiB around them. A kernel without huge pages refuses this.
        let _refused = sys::no_huge_pages(&states);
        Ok(states)
    }

    /// A part of the states in a mapping.
    pub(super) fn cells(states: &Room, first: usize, count: usize) -> &[AtomicU8] {
        assert!(first.checked_add(count).is_some_and(|end| end <= states.len()), "states that are mapped");
        // SAFETY: `first` is within the mapping, as has been asserted.
        let start = unsafe { states.as_ptr().add(first) };
        // SAFETY: `count` bytes from there on are mapped, readable and writable as long as `states` is borrowed. Nothing
        // but these atomics leads to them, and any byte is good for an atomic one.
        unsafe { slice::from_raw_parts(start.cast::<AtomicU8>(), count) }
    }
}

/// The states in a model, whose atomics aren't bytes.
#[cfg(all(test, userfaultfd_loom))]
mod room {
    use std::io;

    use crate::sync::atomic::AtomicU8;

    pub(crate) type Room = Vec<AtomicU8>;

    pub(crate) fn map(count: usize) -> io::Result<Room> {
        Ok((0..count).map(|_| AtomicU8::new(0)).collect())
    }

    pub(super) fn cells(states: &Room, first: usize, count: usize) -> &[AtomicU8] {
        &states[first..first + count]
    }
}

/// Every interleaving of two or three threads.
#[cfg(all(test, userfaultfd_loom))]
mod loom_models {
    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;

    fn explore(threads: impl Fn(&Arc<Pages>) + Send + Sync + 'static) {
        loom::model(move || threads(&Arc::new(Pages::new(1).unwrap())));
    }

    /// Content that the claimant alone writes, and that every thread may read once it finds the page present.
    #[test]
    fn page_is_loaded_by_one_and_seen_whole_by_others() {
        loom::model(|| {
            let pages = Arc::new((Pages::new(1).unwrap(), UnsafeCell::new(0)));
            let fault = |pages: &(Pages, UnsafeCell<u32>)| match pages.0.claim(0) {
                Claim::Acquired { .. } => {
                    // SAFETY: loom reports another access at the same time.
                    pages.1.with_mut(|content| unsafe { *content = 7 });
                    Some(pages.0.end(0, Settlement::Present))
                }
                Claim::Present => {
                    // SAFETY: as above.
                    assert_eq!(pages.1.with(|content| unsafe { *content }), 7);
                    None
                }
                Claim::Joined => None,
                Claim::Poisoned => unreachable!("nothing poisons it"),
            };
            let other = Arc::clone(&pages);
            let other = thread::spawn(move || fault(&other));
            let (here, there) = (fault(&pages), other.join().unwrap());
            assert!(here.is_some() != there.is_some(), "one load: {here:?}, {there:?}");
            assert_eq!(pages.0.present_and_poisoned(), (1, 0));
        });
    }

    /// A fault that joined is woken, whenever it came.
    #[test]
    fn fault_that_joined_is_woken_by_the_load() {
        explore(|pages| {
            assert!(matches!(pages.claim(0), Claim::Acquired { .. }));
            let other = Arc::clone(pages);
            let other = thread::spawn(move || other.claim(0));
            let wakes = pages.end(0, Settlement::Present);
            let claim = other.join().unwrap();
            assert_eq!(wakes, claim == Claim::Joined, "{claim:?}");
            assert!(matches!(claim, Claim::Joined | Claim::Present));
        });
    }

    /// A removal while a page is loaded isn't lost: either the load ends first, and the page goes, or it is known.
    #[test]
    fn removal_during_a_load_is_not_lost() {
        explore(|pages| {
            assert!(pages.try_claim_untouched(0, false));
            let other = Arc::clone(pages);
            let other = thread::spawn(move || other.remove(0..1, false));
            let _joined = pages.end(0, Settlement::Released);
            other.join().unwrap();
            assert_eq!(pages.claim(0), Claim::Acquired { removed: true, tries: 0 });
            assert_eq!(pages.present_and_poisoned(), (0, 0));
        });
    }

    /// A fault on a page that leaves either comes first, or is woken, or finds it missing.
    #[test]
    fn fault_on_a_page_that_leaves_is_woken_or_finds_it_missing() {
        explore(|pages| {
            assert!(pages.try_claim_untouched(0, false));
            assert!(!pages.end(0, Settlement::Present));
            let other = Arc::clone(pages);
            let other = thread::spawn(move || other.claim(0));
            assert!(pages.try_claim_present(0), "nothing else claims a page that is there");
            let wakes = pages.end(0, Settlement::Left);
            let claim = other.join().unwrap();
            assert_eq!(wakes, claim == Claim::Joined, "{claim:?}");
            assert_ne!(claim, Claim::Poisoned);
            assert_eq!(pages.present_and_poisoned(), (0, 0));
        });
    }

    /// A first write is noted under the claim, so that the thread that takes the page away afterwards knows of it; and no
    /// write is noted of a page that has left.
    #[test]
    fn first_write_is_known_to_who_takes_the_page_away() {
        loom::model(|| {
            let pages = Arc::new((Pages::new(1).unwrap(), UnsafeCell::new(false)));
            assert!(pages.0.try_claim_untouched(0, false));
            assert!(!pages.0.end(0, Settlement::Present));
            let other = Arc::clone(&pages);
            let writer = thread::spawn(move || {
                let claim = other.0.claim_present(0);
                if claim == PresentClaim::Acquired {
                    // SAFETY: loom reports another access at the same time.
                    other.1.with_mut(|written| unsafe { *written = true });
                    let _joined = other.0.end(0, Settlement::Present);
                }
                claim
            });
            let (mut known, mut wakes) = (None, false);
            if pages.0.try_claim_present(0) {
                // SAFETY: as above.
                known = Some(pages.1.with(|written| unsafe { *written }));
                wakes = pages.0.end(0, Settlement::Left);
            }
            let claim = writer.join().unwrap();
            match (claim, known) {
                // It was noted before, or had the claim, so that the page stayed.
                (PresentClaim::Acquired, known) => assert!(known.is_none_or(|known| known) && !wakes),
                (PresentClaim::Joined, known) => assert!(known == Some(false) && wakes),
                (PresentClaim::Gone, known) => assert!(known == Some(false) && !wakes),
            }
        });
    }

    /// A thread that sees a page present finds it counted, and what is removed is counted no more.
    #[test]
    fn counts_follow_the_states() {
        explore(|pages| {
            assert!(pages.try_claim_untouched(0, false));
            let other = Arc::clone(pages);
            let other = thread::spawn(move || {
                if other.claim(0) == Claim::Present {
                    assert_eq!(other.present_and_poisoned(), (1, 0));
                    other.remove(0..1, false);
                }
            });
            let _joined = pages.end(0, Settlement::Present);
            other.join().unwrap();
            let present = usize::from(!pages.is_missing(0));
            assert_eq!(pages.present_and_poisoned(), (present, 0));
        });
    }
}

#[cfg(all(test, not(userfaultfd_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_claimed_by_one_and_joined_by_the_others() {
        crate::support::require!();
        let pages = Pages::new(3).unwrap();
        assert_eq!(pages.claim(1), Claim::Acquired { removed: false, tries: 0 });
        assert_eq!(pages.claim(1), Claim::Joined);
        assert!(!pages.try_claim_untouched(1, false));
        assert!(pages.end(1, Settlement::Present), "a fault joined");
        assert_eq!(pages.claim(1), Claim::Present);
        assert_eq!(pages.present_and_poisoned(), (1, 0));
        assert!(pages.try_claim_untouched(2, false));
        assert!(!pages.end(2, Settlement::Poisoned), "nobody joined");
        assert_eq!(pages.claim(2), Claim::Poisoned);
        assert_eq!(pages.present_and_poisoned(), (1, 1));
        assert!(pages.is_missing(0));
    }

    #[test]
    fn present_page_claimed_to_leave_is_joined_by_faults() {
        crate::support::require!();
        let pages = Pages::new(2).unwrap();
        assert!(!pages.try_claim_present(0));
        assert_eq!(pages.claim_present(0), PresentClaim::Gone);
        assert!(pages.try_claim_untouched(0, false));
        assert!(!pages.try_claim_present(0), "it is being loaded");
        assert_eq!(pages.claim_present(0), PresentClaim::Joined);
        assert!(pages.end(0, Settlement::Present));
        assert_eq!(pages.claim_present(0), PresentClaim::Acquired);
        assert!(!pages.try_claim_present(0) && !pages.is_missing(0));
        assert!(!pages.end(0, Settlement::Present));
        assert!(pages.try_claim_present(0));
        assert_eq!(pages.claim(0), Claim::Joined);
        assert!(pages.end(0, Settlement::Left));
        assert_eq!(pages.present_and_poisoned(), (0, 0));
        assert_eq!(pages.claim(0), Claim::Acquired { removed: false, tries: 0 });
        // What is removed while it leaves is zero.
        assert!(!pages.end(0, Settlement::Present));
        assert!(pages.try_claim_present(0));
        pages.remove(0..1, false);
        assert!(!pages.end(0, Settlement::Left));
        assert_eq!(pages.claim(0), Claim::Acquired { removed: true, tries: 0 });
    }

    #[test]
    fn claim_around_takes_missing_neighbours_within_the_range() {
        crate::support::require!();
        let pages = Pages::new(9).unwrap();
        pages.remove(7..9, false);
        assert!(pages.try_claim_untouched(1, false));
        let Claim::Acquired { removed, .. } = pages.claim(4) else { panic!("it is missing") };
        assert_eq!(pages.claim_around(4, 0..6, removed), 2..6, "1 is another's, 6 is outside");
        assert_eq!(pages.claim_around(6, 6..9, removed), 6..7, "the next is removed");
        assert_eq!(pages.claim_around(8, 0..9, true), 7..9, "the one before isn't");
    }

    #[test]
    fn page_removed_in_a_load_given_up_stays_removed() {
        crate::support::require!();
        let pages = Pages::new(1).unwrap();
        assert_eq!(pages.claim(0), Claim::Acquired { removed: false, tries: 0 });
        pages.remove(0..1, false);
        assert!(pages.is_removed(0));
        assert_eq!(pages.claim(0), Claim::Joined, "the load goes on");
        assert!(pages.end(0, Settlement::Released));
        assert_eq!(pages.claim(0), Claim::Acquired { removed: true, tries: 0 });
    }

    #[test]
    fn present_or_poisoned_page_is_zero_once_removed() {
        crate::support::require!();
        let pages = Pages::new(2).unwrap();
        for (page, end) in [(0, Settlement::Present), (1, Settlement::Poisoned)] {
            pages.claim(page);
            assert!(!pages.end(page, end));
        }
        pages.remove(0..2, false);
        assert_eq!(pages.present_and_poisoned(), (0, 0));
        assert_eq!(pages.claim_missing(0), Some(true));
        assert_eq!(pages.claim(1), Claim::Acquired { removed: true, tries: 0 });
    }

    #[test]
    fn removal_that_keeps_pages_keeps_present_ones_alone() {
        crate::support::require!();
        let pages = Pages::new(2).unwrap();
        pages.claim(0);
        assert!(!pages.end(0, Settlement::Present));
        pages.remove(0..2, true);
        assert_eq!(pages.claim(0), Claim::Present);
        assert_eq!(pages.claim(1), Claim::Acquired { removed: true, tries: 0 });
    }

    #[test]
    fn reloaded_page_that_a_file_may_have_is_doubted() {
        crate::support::require!();
        let pages = Pages::new(4).unwrap();
        for (page, end) in [(0, Settlement::Reloaded), (1, Settlement::Poisoned)] {
            pages.claim(page);
            assert!(!pages.end(page, end));
        }
        pages.remove_doubted(0..4);
        assert_eq!(pages.claim(0), Claim::Present, "it was never removed");
        pages.claim(2);
        pages.remove_from_file(0..4);
        assert_eq!(pages.present_and_poisoned(), (0, 0));
        let claim = |removed| Claim::Acquired { removed, tries: 0 };
        assert_eq!([0, 1, 3].map(|page| pages.claim(page)), [claim(true), claim(false), claim(false)]);
        (0..4).for_each(|page| assert!(!pages.end(page, Settlement::Reloaded)));
        pages.remove_doubted(0..4);
        let claims = [0, 1, 2, 3].map(|page| pages.claim(page));
        assert_eq!(claims, [claim(true), Claim::Present, claim(true), Claim::Present], "2 was being loaded");
    }

    #[test]
    fn present_page_is_claimed_again_after_some_doubts() {
        crate::support::require!();
        let pages = Pages::new(1).unwrap();
        assert!(!pages.doubt(0) && !pages.claim_again(0), "it is missing");
        pages.claim(0);
        assert!(!pages.doubt(0) && !pages.claim_again(0), "it is loaded");
        assert!(!pages.end(0, Settlement::Present));
        let doubts: Vec<_> = (0..4).map(|_| pages.doubt(0)).collect();
        assert_eq!(doubts, [false, false, true, true]);
        assert!(pages.claim_again(0) && !pages.claim_again(0));
        assert_eq!((pages.claim(0), pages.present_and_poisoned()), (Claim::Joined, (1, 0)));
        assert!(pages.end(0, Settlement::Released), "a fault joined");
        assert_eq!(pages.claim(0), Claim::Present);
        assert!(!pages.doubt(0), "nothing is doubted any more");
    }

    #[test]
    fn fault_joined_before_a_removal_is_woken() {
        crate::support::require!();
        let pages = Pages::new(1).unwrap();
        pages.claim(0);
        assert_eq!(pages.claim(0), Claim::Joined);
        pages.remove(0..1, false);
        assert!(pages.end(0, Settlement::Released), "a fault joined");
    }

    #[test]
    fn tries_are_counted_and_forgotten_with_success() {
        crate::support::require!();
        let pages = Pages::new(1).unwrap();
        for tries in (0..=MAX_TRIES).chain([MAX_TRIES]) {
            assert_eq!(pages.claim(0), Claim::Acquired { removed: false, tries });
            assert!(!pages.end(0, Settlement::Contested));
            assert!(!pages.try_claim_untouched(0, false), "no load for its own sake");
        }
        assert_eq!(pages.claim_missing(0), Some(false));
        assert!(!pages.end(0, Settlement::Present));
        pages.remove(0..1, false);
        assert_eq!(pages.claim(0), Claim::Acquired { removed: true, tries: 0 });
    }

    #[test]
    fn region_served_before_has_all_pages_but_the_missing() {
        crate::support::require!();
        let pages = Pages::new(4).unwrap();
        pages.all_present();
        pages.set_missing(1..2, false);
        pages.set_missing(2..3, true);
        assert_eq!(pages.present_and_poisoned(), (2, 0));
        let claims: Vec<_> = (0..4).map(|page| pages.claim(page)).collect();
        let missing = Claim::Acquired { removed: false, tries: 0 };
        let removed = Claim::Acquired { removed: true, tries: 0 };
        assert_eq!(claims, [Claim::Present, missing, removed, Claim::Present]);
    }

    #[test]
    fn page_counted_out_before_it_is_counted_in_is_none() {
        crate::support::require!();
        let pages = Pages::new(2).unwrap();
        pages.count_change(PRESENT, 0);
        pages.count_change(POISONED, 0);
        assert_eq!(pages.present_and_poisoned(), (0, 0));
        pages.count_change(0, PRESENT);
        pages.count_change(0, POISONED);
        assert_eq!(pages.present_and_poisoned(), (0, 0));
        // As many in as there are pages, and one that isn't counted out yet.
        (0..2).for_each(|_| pages.count_change(0, PRESENT));
        pages.count_change(0, POISONED);
        assert_eq!(pages.present_and_poisoned(), (2, 0));
    }

    #[test]
    fn a_copy_has_what_is_settled() {
        crate::support::require!();
        let pages = Pages::new(4).unwrap();
        for (page, end) in [(0, Settlement::Present), (1, Settlement::Poisoned)] {
            pages.claim(page);
            assert!(!pages.end(page, end));
        }
        pages.remove(2..3, false);
        pages.claim(3);
        let copy = map(6).unwrap();
        pages.copy_to(0..4, &copy, 2);
        let copy = Pages::of_copy(Arc::new(copy), 2, 4);
        assert_eq!(copy.present_and_poisoned(), (1, 1));
        let claims: Vec<_> = (0..4).map(|page| copy.claim(page)).collect();
        let missing = Claim::Acquired { removed: false, tries: 0 };
        let removed = Claim::Acquired { removed: true, tries: 0 };
        assert_eq!(claims, [Claim::Present, Claim::Poisoned, removed, missing]);
    }

    #[test]
    fn a_copy_doubts_what_may_be_removed_by_now() {
        crate::support::require!();
        let pages = Pages::new(3).unwrap();
        for page in 0..3 {
            pages.claim(page);
            assert!(!pages.end(page, Settlement::Present));
        }
        pages.remove(0..1, false);
        pages.claim(0);
        assert!(!pages.end(0, Settlement::Reloaded));
        // Its content isn't there, or another thread wouldn't load it.
        assert!(pages.claim_again(1));
        let room = map(3).unwrap();
        pages.copy_to(0..3, &room, 0);
        let copy = Pages::of_copy(Arc::new(room), 0, 3);
        assert_eq!(copy.present_and_poisoned(), (3, 0));
        copy.remove_doubted(0..3);
        assert_eq!([0, 1, 2].map(|page| copy.is_missing(page)), [true, true, false]);
    }

    #[test]
    fn states_take_memory_for_what_is_touched_alone() {
        crate::support::require!();
        let huge = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").is_dir();
        if !crate::support::has(crate::support::test_name!(), "transparent huge pages", huge) {
            return;
        }
        // So large that huge pages would fit in, wherever it lies.
        let pages = Pages::new(16 << 20).unwrap();
        let start = pages.states.as_ptr().addr();
        assert!(crate::support::maps::has_flag(start, "nh"), "no MADV_NOHUGEPAGE");
    }
}
