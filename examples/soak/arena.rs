//! Memory that a pager fills, and what each of its pages must hold.
//!
//! The state of a page says what belongs there, and of which generation it is. A thread that changes a page locks its state,
//! and counts the generation up. A thread that reads takes no lock: it looks at the state before and after. If that is the
//! same, the page holds exactly what the state says; if not, each word is one that was right at some time between.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::{ptr, thread};

use memmap2::{MmapOptions, MmapRaw};
use userfaultfd::FeatureFlags;

use crate::board::{Act, Board, Slot};
use crate::bus::Access;
use crate::content::{Content, WORD};
use crate::link::{Memory, Piece, Spec};
use crate::random::Random;

/// A thread changes the page.
const LOCKED: u32 = 1 << 0;
/// Nobody may touch it meanwhile.
const HIDDEN: u32 = 1 << 1;
/// In which window it is.
const WINDOW: u32 = 1 << 2;
const KIND: u32 = 3 << 3;
const SOURCE: u32 = 0 << 3;
const ZERO: u32 = 1 << 3;
const WRITTEN: u32 = 2 << 3;
/// What the source has, or zero: that depends on whether it was filled before it was removed.
const EITHER: u32 = 3 << 3;
/// How often it was changed, as far as there is room for that.
const CHANGE: u32 = 1 << 5;
const CHANGES: u32 = 0x3ff << 5;
/// How often it was written.
const GENERATION: u32 = 15;

/// Generations between two looks that are looked through at most.
const MOST: u32 = 64;

/// How often a lock is tried.
const TRIES: usize = 200;

/// What a state says.
pub(crate) fn describe(state: u32) -> String {
    let kind =
        ["from the source", "zero", "written", "from the source or zero"][(state & KIND) as usize >> 3];
    let locked = if state & LOCKED != 0 { ", being changed" } else { "" };
    format!("{kind}, generation {}, window {}{locked}", state >> GENERATION, (state & WINDOW) >> 2)
}

/// The state after one more change.
fn next(state: u32, kind: u32) -> u32 {
    state & !(CHANGES | KIND | LOCKED | HIDDEN) | (state + CHANGE) & CHANGES | kind
}

/// How a page is read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum How<'a> {
    /// Words of it.
    Words(usize),
    Whole,
    /// By a system call, which writes it to a file.
    Kernel(&'a File),
}

#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) index: usize,
    pub(crate) spec: Spec,
    pub(crate) features: FeatureFlags,
    content: Content,
    /// The two places where a page can be.
    windows: [usize; 2],
    /// Of the forks of shared memory, too.
    states: MmapRaw,
    /// Whether a move has left something behind in the other window, for each page.
    left: Vec<AtomicBool>,
    file: Option<File>,
    /// Whether any missing page may be poisoned.
    pub(crate) may_be_poisoned: AtomicBool,
    /// Whether a pager serves it.
    pub(crate) is_served: AtomicBool,
    /// Another thread has mapped something in a hole.
    is_lost: AtomicBool,
}

/// Maps memory, at an address if that isn't 0.
pub(crate) fn map(
    address: usize,
    len: usize,
    protection: i32,
    flags: i32,
    file: Option<(&File, usize)>,
) -> io::Result<usize> {
    let at = ptr::without_provenance_mut(address);
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    // SAFETY: without an address the kernel chooses one that is free; with one it is that of an arena's window, which
    // nothing but its atomics refers to.
    let start = unsafe { libc::mmap(at, len, protection, flags, fd, offset as libc::off_t) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start.expose_provenance()) }
}

// What libc hasn't for Android: numbers of uapi/linux/mman.h, which are the same everywhere but on Alpha.
pub(crate) const FIXED_NOREPLACE: i32 = 0x10_0000;
pub(crate) const MAYMOVE: i32 = 1;
pub(crate) const FIXED: i32 = 2;
pub(crate) const DONTUNMAP: i32 = 4;

pub(crate) const RESERVED: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Arena {
    pub(crate) fn new(index: usize, spec: Spec, features: FeatureFlags) -> io::Result<Self> {
        let len = spec.pages * spec.page_size;
        let file = match spec.memory {
            Memory::Anonymous => None,
            Memory::Huge | Memory::HugeMinor | Memory::HugePrivate => {
                Some(userfaultfd_examples::memfd_with(libc::MFD_HUGETLB, len)?)
            }
            _ => Some(userfaultfd_examples::memfd(len)?),
        };
        let states = match spec.memory.is_shared() {
            true => MmapOptions::new().map_raw(&userfaultfd_examples::memfd(spec.pages * WORD)?)?,
            false => MmapOptions::new().len(spec.pages * WORD).map_anon()?.into(),
        };
        // One window is enough for what isn't moved.
        let windows = if spec.memory.is_huge() {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let start = map(0, len, libc::PROT_NONE, flags, file.as_ref().map(|file| (file, 0)))?;
            [start, start]
        } else {
            let start = map(0, 2 * len, libc::PROT_NONE, RESERVED, None)?;
            [start, start + len]
        };
        let arena = Self {
            index,
            spec,
            features,
            content: Content {
                key: spec.key,
                page: spec.page_size / WORD,
                words: spec.words,
                has_bad: spec.has_bad,
            },
            windows,
            states,
            left: (0..spec.pages).map(|_| AtomicBool::new(false)).collect(),
            file,
            may_be_poisoned: AtomicBool::new(false),
            is_served: AtomicBool::new(true),
            is_lost: AtomicBool::new(false),
        };
        arena.map_pages(windows[0], 0..spec.pages)?;
        Ok(arena)
    }

    /// Maps fresh memory in a window.
    fn map_pages(&self, window: usize, pages: Range<usize>) -> io::Result<()> {
        let bytes = pages.start * self.spec.page_size;
        let sharing = if self.spec.memory.is_shared() { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let anonymous = if self.file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        let file = self.file.as_ref().map(|file| (file, bytes));
        let (len, flags) = (pages.len() * self.spec.page_size, libc::MAP_FIXED | sharing | anonymous);
        map(window + bytes, len, libc::PROT_READ | libc::PROT_WRITE, flags, file).map(drop)
    }

    pub(crate) fn file(&self) -> io::Result<Option<File>> {
        self.file.as_ref().filter(|_| self.spec.memory.is_minor()).map(File::try_clone).transpose()
    }

    fn states(&self) -> &[AtomicU32] {
        // SAFETY: the mapping has this length, and aligned as pages are. Its atomics are good whatever they hold, and nothing
        // else leads to it as long as `self` is there.
        unsafe { std::slice::from_raw_parts(self.states.as_ptr().cast(), self.spec.pages) }
    }

    fn address(&self, page: usize, state: u32) -> usize {
        self.windows[usize::from(state & WINDOW != 0)] + page * self.spec.page_size
    }

    /// Whether an address is that of a page, in either window.
    pub(crate) fn has(&self, page: usize, address: usize) -> bool {
        let bytes = page * self.spec.page_size;
        self.windows
            .iter()
            .any(|window| (window + bytes..window + bytes + self.spec.page_size).contains(&address))
    }

    fn told(&self, event: FeatureFlags) -> bool {
        self.features.contains(event)
    }

    fn words(&self, address: usize) -> &[AtomicU32] {
        let start = ptr::with_exposed_provenance(address);
        // SAFETY: a page of this arena is mapped there, and aligned. Whatever it holds is good for atomics; nothing but
        // such atomics and the kernel touches it.
        unsafe { std::slice::from_raw_parts(start, self.content.page) }
    }

    /// Reads a page, and checks what it holds. Whether it could be read.
    pub(crate) fn read(
        &self,
        slot: &Slot,
        random: &mut Random,
        page: usize,
        how: How<'_>,
    ) -> Result<bool, String> {
        let cell = &self.states()[page];
        slot.at(page);
        let before = cell.load(Ordering::SeqCst);
        if before & HIDDEN != 0 {
            return Ok(false);
        }
        let address = self.address(page, before);
        slot.touches(address, before);
        let access = self.access(page, before, false);
        let mut check = Check::new(self, page, before, address);
        match how {
            How::Kernel(file) => {
                let mut copy = vec![[0; WORD]; self.content.page];
                // SAFETY: the kernel reads a page of this arena, or says that it can't.
                let written = unsafe {
                    libc::pwrite(
                        file.as_raw_fd(),
                        ptr::with_exposed_provenance(address),
                        self.spec.page_size,
                        0,
                    )
                };
                if written != self.spec.page_size as isize {
                    // Poisoned, or not a fault that may be told.
                    return self.read(slot, random, page, How::Words(4));
                }
                std::os::unix::fs::FileExt::read_exact_at(file, copy.as_flattened_mut(), 0)
                    .map_err(|error| format!("reading a copy: {error}"))?;
                for (word, bytes) in copy.into_iter().enumerate() {
                    check.word(word, u32::from_ne_bytes(bytes));
                }
            }
            How::Whole => {
                for (word, cell) in self.words(address).iter().enumerate() {
                    check.word(word, access.during(|| cell.load(Ordering::Relaxed)));
                }
            }
            How::Words(count) => {
                for _ in 0..count {
                    let word = random.below(self.content.page);
                    let cell = &self.words(address)[word];
                    check.word(word, access.during(|| cell.load(Ordering::Relaxed)));
                }
            }
        }
        fence(Ordering::Acquire);
        let after = cell.load(Ordering::SeqCst);
        self.count_hits(slot, &access)?;
        check.end(after, access.hits.get() > 0).map(|()| true)
    }

    fn access(&self, page: usize, state: u32, locked: bool) -> Access<'_> {
        let (state, hits, wrong) = (state.into(), 0.into(), false.into());
        Access { arena: self, page, state, locked, hits, wrong }
    }

    fn count_hits(&self, slot: &Slot, access: &Access<'_>) -> Result<(), String> {
        if access.hits.get() > 0 {
            slot.count(Act::Poisoned);
        }
        if access.wrong.get() {
            let state = describe(access.state.get());
            return Err(format!("page {} is poisoned, and must not be: it is {state}", access.page));
        }
        Ok(())
    }

    /// A page is poisoned: takes that away, and notes that it is zero now. Runs in a signal handler.
    pub(crate) fn poisoned(&self, access: &Access<'_>, address: usize) {
        let cell = &self.states()[access.page];
        let state = cell.load(Ordering::SeqCst);
        let start = address - (address - self.windows[0]) % self.spec.page_size;
        if !access.locked {
            if state & LOCKED != 0 {
                // SAFETY: touches no memory.
                unsafe { libc::sched_yield() };
                return;
            }
            if state != access.state.replace(state) {
                return;
            }
            if self.address(access.page, state) != start && !self.spec.memory.is_shared() {
                // What a move has left behind.
                access.hits.set(access.hits.get() + 1);
                self.forget(start);
                return;
            }
            if cell.compare_exchange(state, state | LOCKED, Ordering::SeqCst, Ordering::Relaxed).is_err() {
                return;
            }
        }
        // Of shared memory a removal takes the page away, and leaves the poison.
        let may_be_bad = self.spec.memory.is_shared() || matches!(state & KIND, SOURCE | EITHER);
        let is_bad = self.content.is_bad(access.page) && may_be_bad;
        if !is_bad && !self.may_be_poisoned.load(Ordering::SeqCst) {
            access.wrong.set(true);
        }
        access.hits.set(access.hits.get() + 1);
        self.forget(start);
        if !access.locked {
            // Of shared memory only the mapping goes, and what is missing counts as removed.
            let kind = match state & KIND {
                WRITTEN if self.spec.memory.is_shared() => WRITTEN,
                SOURCE | EITHER if self.spec.memory.is_shared() => EITHER,
                _ => ZERO,
            };
            cell.store(next(state, kind), Ordering::SeqCst);
        }
    }

    /// Takes the page at an address away.
    fn forget(&self, address: usize) {
        let start = ptr::with_exposed_provenance_mut(address);
        // SAFETY: a page of this arena, to which only atomics refer.
        unsafe { libc::madvise(start, self.spec.page_size, libc::MADV_DONTNEED) };
    }

    /// Whether a thread changes a page.
    pub(crate) fn is_locked(&self, page: usize) -> bool {
        self.states()[page].load(Ordering::SeqCst) & LOCKED != 0
    }

    fn lock(&self, page: usize) -> Option<u32> {
        let cell = &self.states()[page];
        for _ in 0..TRIES {
            let state = cell.load(Ordering::SeqCst);
            let free = state & LOCKED == 0;
            if free
                && cell.compare_exchange(state, state | LOCKED, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            {
                fence(Ordering::Release);
                return Some(state);
            }
            thread::yield_now();
        }
        None
    }

    /// Locks pages in the same window, as many as can be had.
    fn lock_range(&self, pages: Range<usize>) -> Range<usize> {
        let mut end = pages.start;
        let mut window = None;
        while end < pages.end {
            let Some(state) = self.lock(end) else { break };
            if *window.get_or_insert(state & WINDOW) != state & WINDOW {
                self.unlock(end..end + 1, |state| state);
                break;
            }
            end += 1;
        }
        pages.start..end
    }

    fn unlock(&self, pages: Range<usize>, change: impl Fn(u32) -> u32) {
        for cell in &self.states()[pages] {
            let state = cell.load(Ordering::SeqCst) & !(LOCKED | HIDDEN);
            cell.store(change(state), Ordering::SeqCst);
        }
    }

    /// Hides pages that are locked. Whether nobody touches them any more.
    fn hide(&self, board: &Board, pages: &Range<usize>) -> bool {
        for cell in &self.states()[pages.clone()] {
            cell.fetch_or(HIDDEN, Ordering::SeqCst);
        }
        (0..TRIES).any(|_| {
            thread::yield_now();
            !board.slots().iter().any(|slot| slot.is_at(self.index, pages))
        })
    }

    /// Writes a page. Whether it could be locked.
    pub(crate) fn write(&self, slot: &Slot, random: &mut Random, page: usize) -> Result<bool, String> {
        let Some(state) = self.lock(page) else { return Ok(false) };
        let looks = if random.one_in(2) { 4 } else { 0 };
        self.write_locked(slot, random, (page, state), looks, 0..0)?;
        Ok(true)
    }

    /// Looks at some words of a page that is locked, and writes it. The words of a range may be zero before.
    fn write_locked(
        &self,
        slot: &Slot,
        random: &mut Random,
        (page, state): (usize, u32),
        looks: usize,
        cut: Range<usize>,
    ) -> Result<(), String> {
        let address = self.address(page, state);
        slot.touches(address, state);
        let access = self.access(page, state, true);
        let words = self.words(address);
        let mut check = Check::new(self, page, state, address);
        for _ in 0..looks {
            let word = random.below(words.len());
            let value = access.during(|| words[word].load(Ordering::Relaxed));
            if value != 0 || !cut.contains(&word) {
                check.word(word, value);
            }
        }
        check.end(state, access.hits.get() > 0)?;
        let written = next(state, WRITTEN).wrapping_add(1 << GENERATION);
        for (word, cell) in words.iter().enumerate() {
            let value = self.content.written(page, word, written >> GENERATION);
            access.during(|| cell.store(value, Ordering::Relaxed));
        }
        self.states()[page].store(written, Ordering::SeqCst);
        self.count_hits(slot, &access)
    }

    /// Removes pages, and perhaps parts of huge ones beside them. Returns whether the kernel does that.
    pub(crate) fn remove(
        &self,
        slot: &Slot,
        random: &mut Random,
        pages: Range<usize>,
        hole: bool,
    ) -> Result<bool, String> {
        let pages = self.lock_range(pages);
        if pages.is_empty() {
            return Ok(false);
        }
        let (shared, told) = (self.spec.memory.is_shared(), self.told(FeatureFlags::EVENT_REMOVE));
        let hole = hole && shared;
        let start = self.address(pages.start, self.states()[pages.start].load(Ordering::SeqCst));
        slot.touches(start, self.states()[pages.start].load(Ordering::Relaxed));
        let advice = if hole { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        let bytes = self.removed(random, pages.len() * self.spec.page_size, hole);
        let at = ptr::with_exposed_provenance_mut(start + bytes.start);
        // SAFETY: pages of this arena, to which only atomics refer.
        if unsafe { libc::madvise(at, bytes.len(), advice) } == -1 {
            let error = io::Error::last_os_error();
            self.unlock(pages, |state| state);
            // Hugetlb memory before Linux 5.18.
            return if self.spec.memory.is_huge() { Ok(false) } else { Err(format!("madvise: {error}")) };
        }
        let mut whole = pages.clone();
        if self.spec.memory.is_huge() {
            // The kernel removes those that are in the range as a whole. A hole in a file is zeros in others.
            let (size, first) = (self.spec.page_size, pages.start);
            whole = first + bytes.start.div_ceil(size)..first + bytes.end / size;
            whole.end = whole.end.max(whole.start);
            for page in (first..whole.start).chain(whole.end..pages.end) {
                let here = (page - first) * size..(page - first + 1) * size;
                let cut = bytes.start.max(here.start)..bytes.end.min(here.end);
                let cut = if hole { cut.start - here.start..cut.end - here.start } else { 0..0 };
                let state = self.states()[page].load(Ordering::SeqCst) & !LOCKED;
                let cut = cut.start / WORD..cut.end / WORD;
                self.write_locked(slot, random, (page, state), 16, cut)?;
            }
        }
        self.unlock(whole, |state| {
            let kind = match (state & KIND, shared && !hole) {
                (SOURCE, false) if told => ZERO,
                (EITHER, false) if told => ZERO,
                (SOURCE | EITHER, false) => EITHER,
                (_, false) => ZERO,
                // The mapping goes, and the page stays. What is missing counts as removed, if that is told; what was
                // poisoned is zero.
                (SOURCE, true) if told || self.may_be_poisoned.load(Ordering::SeqCst) => EITHER,
                (kind, true) => kind,
            };
            next(state, kind)
        });
        Ok(true)
    }

    /// The bytes to remove of some pages. Of huge ones the kernel takes ranges that begin or end inside a page; of
    /// others it rounds the end.
    fn removed(&self, random: &mut Random, len: usize, hole: bool) -> Range<usize> {
        let base = userfaultfd::page_size();
        if random.one_in(2) {
            return 0..len;
        }
        if !self.spec.memory.is_huge() {
            return 0..len - random.below(base);
        }
        let pages = self.spec.page_size / base;
        let start = if hole { random.below(pages) } else { 0 };
        let end = len / base - random.below(pages);
        start * base..end.max(start + 1) * base
    }

    /// Moves pages to the other window. Whether the kernel did.
    pub(crate) fn relocate(
        &self,
        slot: &Slot,
        board: &Board,
        pages: Range<usize>,
        leave: bool,
    ) -> Result<bool, String> {
        let pages = self.lock_range(pages);
        if pages.is_empty() {
            return Ok(false);
        }
        if self.is_lost.load(Ordering::Relaxed) || !leave && !self.hide(board, &pages) {
            self.unlock(pages, |state| state);
            return Ok(false);
        }
        let state = self.states()[pages.start].load(Ordering::SeqCst);
        let (from, to) = (self.address(pages.start, state), self.address(pages.start, state ^ WINDOW));
        slot.touches(from, state);
        let len = pages.len() * self.spec.page_size;
        let flags = MAYMOVE | FIXED | if leave { DONTUNMAP } else { 0 };
        // SAFETY: both are in windows of this arena, to which only atomics refer.
        if unsafe { libc::syscall(libc::SYS_mremap, from, len, len, flags, to) } == -1 {
            let error = io::Error::last_os_error();
            // What was there may have gone already.
            if map(to, len, libc::PROT_NONE, RESERVED | FIXED_NOREPLACE, None).is_ok() {
                pages.clone().for_each(|page| self.left[page].store(false, Ordering::Relaxed));
            }
            self.unlock(pages, |state| state);
            // Several mappings at once, and kinds of memory that can't be moved so.
            return match error.raw_os_error() {
                Some(libc::EFAULT | libc::EINVAL) => Ok(false),
                _ => Err(format!("mremap: {error}")),
            };
        }
        if !leave && map(from, len, libc::PROT_NONE, RESERVED | FIXED_NOREPLACE, None).is_err() {
            self.is_lost.store(true, Ordering::Relaxed);
        }
        pages.clone().for_each(|page| self.left[page].store(leave, Ordering::Relaxed));
        self.unlock(pages, |state| next(state, state & KIND) ^ WINDOW);
        Ok(true)
    }

    /// Maps pages anew, and has the new memory served. Whether it could be done.
    pub(crate) fn replace(
        &self,
        slot: &Slot,
        board: &Board,
        pages: Range<usize>,
        serve: impl FnOnce(Piece) -> io::Result<()>,
    ) -> Result<bool, String> {
        let pages = self.lock_range(pages);
        let shown = || pages.clone().any(|page| self.left[page].load(Ordering::Relaxed));
        // What is left behind of shared memory shows the same file.
        let is_shown = self.spec.memory.is_shared() && shown();
        if pages.is_empty() || is_shown || !self.hide(board, &pages) {
            self.unlock(pages, |state| state);
            return Ok(false);
        }
        let state = self.states()[pages.start].load(Ordering::SeqCst);
        let window = self.windows[usize::from(state & WINDOW != 0)];
        let (start, len) = (self.address(pages.start, state), pages.len() * self.spec.page_size);
        slot.touches(start, state);
        self.put_anew(window, start, len, &pages).map_err(|error| format!("mapping anew: {error}"))?;
        let piece = Piece { address: start, first: pages.start, pages: pages.len(), is_left_behind: false };
        serve(piece).map_err(|error| format!("serving a new region: {error}"))?;
        self.unlock(pages, |state| next(state, SOURCE));
        Ok(true)
    }

    fn put_anew(&self, window: usize, start: usize, len: usize, pages: &Range<usize>) -> io::Result<()> {
        // Once this is told, nothing is filled there any more, so that the hole in the file stays.
        map(start, len, libc::PROT_NONE, RESERVED | libc::MAP_FIXED, None)?;
        if let Some(file) = self.file.as_ref().filter(|_| self.spec.memory.is_shared()) {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let offset = (pages.start * self.spec.page_size) as libc::off_t;
            // SAFETY: touches no memory that is mapped.
            if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len as libc::off_t) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        self.map_pages(window, pages.clone())
    }

    /// Whether shared pages are in both windows. Another pager would take them for pages of two regions.
    pub(crate) fn shows_twice(&self) -> bool {
        self.spec.memory.is_shared() && self.left.iter().any(|left| left.load(Ordering::Relaxed))
    }

    /// What lies where.
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let states = || self.states().iter().map(|cell| cell.load(Ordering::SeqCst)).enumerate();
        for window in [0, WINDOW] {
            for (page, state) in states() {
                let is_left_behind = state & WINDOW != window;
                if is_left_behind && !self.left[page].load(Ordering::Relaxed) {
                    continue;
                }
                let address = self.address(page, window);
                match pieces.last_mut() {
                    Some(last)
                        if last.address + last.pages * self.spec.page_size == address
                            && last.first + last.pages == page
                            && last.is_left_behind == is_left_behind =>
                    {
                        last.pages += 1;
                    }
                    _ => pieces.push(Piece { address, first: page, pages: 1, is_left_behind }),
                }
            }
        }
        pieces
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.is_lost.load(Ordering::Relaxed) {
            return;
        }
        let windows = if self.windows[0] == self.windows[1] { 1 } else { 2 };
        let (at, len) =
            (ptr::with_exposed_provenance_mut(self.windows[0]), self.spec.pages * self.spec.page_size);
        // SAFETY: the windows, which nobody refers to any more.
        let unmapped = unsafe { libc::munmap(at, windows * len) };
        assert_eq!(unmapped, 0, "munmap: {}", io::Error::last_os_error());
    }
}

/// Words that were read from a page, and whether they can be right.
struct Check<'a> {
    arena: &'a Arena,
    page: usize,
    before: u32,
    address: usize,
    /// The first word that isn't what the state says, and what was read.
    strange: Option<(usize, u32)>,
    /// Likewise, for a page that is zero.
    not_zero: Option<(usize, u32)>,
    /// All that was read.
    words: Vec<(usize, u32)>,
}

impl<'a> Check<'a> {
    fn new(arena: &'a Arena, page: usize, before: u32, address: usize) -> Self {
        Self { arena, page, before, address, strange: None, not_zero: None, words: Vec::new() }
    }

    fn word(&mut self, word: usize, value: u32) {
        let (content, page) = (&self.arena.content, self.page);
        let right = match self.before & KIND {
            ZERO => 0,
            WRITTEN => content.written(page, word, self.before >> GENERATION),
            _ => content.loaded(page, word),
        };
        if value != right {
            self.strange.get_or_insert((word, value));
            self.words.push((word, value));
        }
        if value != 0 {
            self.not_zero.get_or_insert((word, value));
        }
    }

    /// What follows from the state afterwards.
    fn end(self, after: u32, was_poisoned: bool) -> Result<(), String> {
        let Some(strange) = self.strange else { return Ok(()) };
        let (before, either) = (self.before, self.before & KIND == EITHER);
        if before == after && before & LOCKED == 0 && !was_poisoned {
            return match self.not_zero {
                None if either => Ok(()),
                // Some of the words are the source's, some not: neither page.
                Some(word) if either => Err(self.wrong(if strange.1 == 0 { word } else { strange }, after)),
                _ => Err(self.wrong(strange, after)),
            };
        }
        let (content, page) = (&self.arena.content, self.page);
        let (first, last) = (before >> GENERATION, (after >> GENERATION) + 1);
        if last < first || last - first > MOST {
            return Ok(());
        }
        let was_right = |(word, value): (usize, u32)| {
            value == 0
                || value == content.loaded(page, word)
                || (first..=last).any(|generation| value == content.written(page, word, generation))
        };
        match self.words.iter().find(|word| !was_right(**word)) {
            None => Ok(()),
            Some(word) => Err(self.wrong(*word, after)),
        }
    }

    fn wrong(&self, (word, value): (usize, u32), after: u32) -> String {
        let (content, page, address) = (&self.arena.content, self.page, self.address + word * WORD);
        let pages = 0..self.arena.spec.pages;
        let author = if value == 0 {
            "zero".to_owned()
        } else if value == content.loaded(page, word) {
            "what the source has".to_owned()
        } else if let Some(generation) = (0..1 << 12).find(|g| value == content.written(page, word, *g)) {
            format!("written in generation {generation}")
        } else if let Some(page) = pages.clone().find(|page| value == content.loaded(*page, word)) {
            format!("what the source has for page {page}")
        } else {
            "nobody's".to_owned()
        };
        format!(
            "{value:#x} in word {word} of page {page}, at {address:#x}: that is {author}. The page was {}, then {}",
            describe(self.before),
            describe(after)
        )
    }
}
