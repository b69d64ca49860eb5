//! A mapping that grows, shrinks and moves while it is served and read, as what realloc(3) makes its memory of.
//!
//! One thread changes it. Others read it: as Rust does, which the changes wait for, and by system calls, which they don't:
//! those find the page, or nothing there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock};
use std::{ptr, thread};

use userfaultfd::pager::{Pager, Region};
use userfaultfd::{FeatureFlags, UffdBuilder, page_size};
use userfaultfd_examples::memfd;

use crate::arena::{DONTUNMAP, FIXED, FIXED_NOREPLACE, MAYMOVE, RESERVED, map};
use crate::content::{Content, WORD};
use crate::random::Random;

/// Pages of the mapping at first, and at most.
const FIRST: usize = 48;
const MOST: usize = 160;

/// Changes of one storm.
const CHANGES: usize = 60;

/// Readers of each kind.
const READERS: usize = 2;

/// What a page holds: what the source has, zeros, or what was written last.
const SOURCE: u32 = 0;
const ZERO: u32 = 1;
const WRITTEN: u32 = 2;

struct Mapping {
    content: Content,
    /// The two places where it can be.
    windows: [usize; 2],
    /// Held by a reader, and exclusively while the mapping is changed.
    place: RwLock<Place>,
    /// Likewise, for readers that don't wait: odd during a change, and higher after it.
    version: AtomicU64,
    window: AtomicU64,
    pages: AtomicU64,
    states: Vec<AtomicU32>,
}

#[derive(Clone, Copy)]
struct Place {
    window: usize,
    pages: usize,
}

/// What a change came to.
enum Changed {
    Yes,
    /// The kernel refuses it.
    No,
    /// Another thread has mapped something in a hole that the change made.
    Lost,
}

/// One storm. Whether all that was read was right.
pub(crate) fn storm(pager: &Arc<Pager>, random: &mut Random, kernel: bool) -> Result<(), String> {
    let page = page_size() / WORD;
    let content = Content { key: random.next(), page, words: FIRST * page, has_bad: false };
    let mapping = Mapping::new(content).map_err(|error| format!("mapping: {error}"))?;
    let changes = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
    let uffd =
        UffdBuilder::new().close_on_exec(true).user_mode_only(!kernel).require_features(changes).create();
    let uffd = uffd.map_err(|error| format!("a userfaultfd: {error}"))?;
    let source = content.source(1 + random.below(3), FIRST).map_err(|error| format!("a source: {error}"))?;
    let region = Region::new(mapping.windows[0], FIRST * page_size(), source);
    let region = region.block([1, 4, 16][random.below(3)] * page_size());
    // SAFETY: only atomics refer to the memory, whatever it holds.
    let added = unsafe { pager.add_own(uffd, [region]) }.map_err(|refused| format!("adding: {refused:?}"))?;
    let (done, seed) = (AtomicBool::new(false), random.next());
    let changed = thread::scope(|scope| {
        let (mapping, done) = (&mapping, &done);
        let readers: Vec<_> = (0..2 * READERS)
            .map(|reader| {
                scope.spawn(move || {
                    let mut random = Random::new(&[seed, reader as u64]);
                    let scratch = memfd(page_size()).map_err(|error| error.to_string())?;
                    while !done.load(Ordering::SeqCst) {
                        match reader < READERS || !kernel {
                            true => mapping.read(&mut random)?,
                            false => mapping.read_by_the_kernel(&mut random, &scratch)?,
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let changed = (0..CHANGES).try_fold(false, |lost, _| match lost {
            true => Ok(true),
            false => mapping.change(random),
        });
        done.store(true, Ordering::SeqCst);
        let read = readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err("a reader panicked".to_owned())));
        read.and(changed)
    });
    // With the memory still there, or without.
    let is_lost = matches!(changed, Ok(true) | Err(_));
    let checked = changed.and_then(|_| (0..MOST).try_for_each(|page| mapping.check(page)));
    let unmapped = !is_lost && random.one_in(2);
    if unmapped {
        mapping.unmap();
    }
    let removed = pager.remove(added.descriptor).map(drop).map_err(|error| format!("removing: {error}"));
    if !is_lost && !unmapped {
        mapping.unmap();
    }
    checked.and(removed)
}

impl Mapping {
    fn new(content: Content) -> io::Result<Self> {
        let len = MOST * page_size();
        let start = map(0, 2 * len, libc::PROT_NONE, RESERVED, None)?;
        let flags = RESERVED | libc::MAP_FIXED;
        map(start, FIRST * page_size(), libc::PROT_READ | libc::PROT_WRITE, flags, None)?;
        let state = |page| AtomicU32::new(if page < FIRST { SOURCE } else { ZERO });
        Ok(Self {
            content,
            windows: [start, start + len],
            place: RwLock::new(Place { window: 0, pages: FIRST }),
            version: AtomicU64::new(0),
            window: AtomicU64::new(0),
            pages: AtomicU64::new(FIRST as u64),
            states: (0..MOST).map(state).collect(),
        })
    }

    fn unmap(&self) {
        // SAFETY: the windows, to which nothing leads any more.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.windows[0]), 2 * MOST * page_size()) };
    }

    fn words(&self, window: usize, page: usize) -> &[AtomicU32] {
        let start = ptr::with_exposed_provenance(self.windows[window] + page * page_size());
        // SAFETY: the caller holds the place, so that the page is mapped. Only atomics refer to it.
        unsafe { std::slice::from_raw_parts(start, self.content.page) }
    }

    /// What a word must be.
    fn right(&self, page: usize, word: usize) -> u32 {
        match self.states[page].load(Ordering::Relaxed) {
            SOURCE => self.content.loaded(page, word),
            ZERO => 0,
            written => self.content.written(page, word, written - WRITTEN),
        }
    }

    fn is_right(&self, page: usize, word: usize, value: u32, place: Place) -> Result<(), String> {
        let right = self.right(page, word);
        if value == right {
            return Ok(());
        }
        let (state, Place { window, pages }) = (self.states[page].load(Ordering::Relaxed), place);
        Err(format!(
            "{value:#x} instead of {right:#x} in word {word} of page {page} of {pages}, state {state}, window {window}"
        ))
    }

    fn read(&self, random: &mut Random) -> Result<(), String> {
        let place = self.place.read().unwrap_or_else(PoisonError::into_inner);
        let page = random.below(place.pages);
        let words = self.words(place.window, page);
        (0..4).try_for_each(|_| {
            let word = random.below(words.len());
            self.is_right(page, word, words[word].load(Ordering::Relaxed), *place)
        })
    }

    fn read_by_the_kernel(&self, random: &mut Random, scratch: &File) -> Result<(), String> {
        let before = self.version.load(Ordering::SeqCst);
        let place = Place {
            window: self.window.load(Ordering::SeqCst) as usize,
            pages: self.pages.load(Ordering::SeqCst) as usize,
        };
        let page = random.below(place.pages);
        let at = ptr::with_exposed_provenance(self.windows[place.window] + page * page_size());
        // SAFETY: the kernel reads what is mapped there, or says that it can't.
        let written = unsafe { libc::pwrite(scratch.as_raw_fd(), at, page_size(), 0) };
        let error = io::Error::last_os_error();
        let mut copy = vec![[0; WORD]; self.content.page];
        if written == page_size() as isize {
            let read = scratch.read_exact_at(copy.as_flattened_mut(), 0);
            read.map_err(|error| format!("reading a copy: {error}"))?;
        }
        let right: Vec<_> = (0..self.content.page).map(|word| self.right(page, word)).collect();
        fence(Ordering::SeqCst);
        if before % 2 == 1 || self.version.load(Ordering::SeqCst) != before {
            return Ok(());
        }
        if written != page_size() as isize {
            return Err(format!("the kernel read {written} bytes of page {page}: {error}"));
        }
        match copy.iter().zip(&right).position(|(copy, right)| u32::from_ne_bytes(*copy) != *right) {
            None => Ok(()),
            Some(word) => self.is_right(page, word, u32::from_ne_bytes(copy[word]), place),
        }
    }

    /// Checks a page whole, if it is there.
    fn check(&self, page: usize) -> Result<(), String> {
        let place = self.place.read().unwrap_or_else(PoisonError::into_inner);
        if page >= place.pages {
            return Ok(());
        }
        let words = self.words(place.window, page).iter().enumerate();
        words
            .into_iter()
            .try_for_each(|(word, value)| self.is_right(page, word, value.load(Ordering::Relaxed), *place))
    }

    /// One change. Whether the mapping can't be gone on with, since another thread has a part of a window.
    fn change(&self, random: &mut Random) -> Result<bool, String> {
        let mut place = self.place.write().unwrap_or_else(PoisonError::into_inner);
        self.version.fetch_add(1, Ordering::SeqCst);
        let changed = match random.below(8) {
            0 => self.write(*place, random),
            1 | 2 => self.remove(*place, random),
            3 | 4 => self.grow_in_place(&mut place, random),
            5 => self.shrink(&mut place, random),
            _ => self.move_on(&mut place, random),
        };
        self.window.store(place.window as u64, Ordering::SeqCst);
        self.pages.store(place.pages as u64, Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
        Ok(matches!(changed.map_err(|error| format!("changing the mapping: {error}"))?, Changed::Lost))
    }

    fn write(&self, place: Place, random: &mut Random) -> io::Result<Changed> {
        let page = random.below(place.pages);
        let generation = random.below(1 << 16) as u32;
        for (word, cell) in self.words(place.window, page).iter().enumerate() {
            cell.store(self.content.written(page, word, generation), Ordering::Relaxed);
        }
        self.states[page].store(WRITTEN + generation, Ordering::Relaxed);
        Ok(Changed::Yes)
    }

    fn remove(&self, place: Place, random: &mut Random) -> io::Result<Changed> {
        let first = random.below(place.pages);
        let end = (first + 1 + random.below(12)).min(place.pages);
        let start = ptr::with_exposed_provenance_mut(self.windows[place.window] + first * page_size());
        // The kernel rounds the end.
        let len = (end - first) * page_size() - random.below(page_size());
        // SAFETY: pages to which only atomics refer.
        if unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) } == -1 {
            return Err(io::Error::last_os_error());
        }
        self.become_zero(first..end);
        Ok(Changed::Yes)
    }

    fn become_zero(&self, pages: std::ops::Range<usize>) {
        self.states[pages].iter().for_each(|state| state.store(ZERO, Ordering::Relaxed));
    }

    /// Reserves a part of a window that a change has left without a mapping.
    fn reserve(&self, window: usize, pages: std::ops::Range<usize>) -> Changed {
        let (start, len) = (self.windows[window] + pages.start * page_size(), pages.len() * page_size());
        if pages.is_empty() || map(start, len, libc::PROT_NONE, RESERVED | FIXED_NOREPLACE, None).is_ok() {
            Changed::Yes
        } else {
            Changed::Lost
        }
    }

    fn grow_in_place(&self, place: &mut Place, random: &mut Random) -> io::Result<Changed> {
        let Some(pages) = grown(place.pages, random) else { return Ok(Changed::No) };
        let (start, old) = (self.windows[place.window], place.pages);
        let (from, len) = (start + old * page_size(), (pages - old) * page_size());
        // SAFETY: a reserved part of the window, which nothing refers to.
        if unsafe { libc::munmap(ptr::with_exposed_provenance_mut(from), len) } == -1 {
            return Err(io::Error::last_os_error());
        }
        match remap(start, old, pages, 0, 0) {
            Ok(()) => {
                place.pages = pages;
                self.become_zero(old..pages);
                Ok(Changed::Yes)
            }
            // Another thread was faster.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                Ok(self.reserve(place.window, old..pages))
            }
            Err(error) => Err(error),
        }
    }

    fn shrink(&self, place: &mut Place, random: &mut Random) -> io::Result<Changed> {
        let (start, old) = (self.windows[place.window], place.pages);
        let pages = (old - random.below(old.min(24))).max(1);
        if pages == old {
            return Ok(Changed::No);
        }
        remap(start, old, pages, 0, 0)?;
        place.pages = pages;
        self.become_zero(pages..old);
        Ok(self.reserve(place.window, pages..old))
    }

    /// Moves the mapping to the other window. It may grow or shrink meanwhile, and empty memory may stay behind.
    fn move_on(&self, place: &mut Place, random: &mut Random) -> io::Result<Changed> {
        let (from, to, old) = (self.windows[place.window], self.windows[1 - place.window], place.pages);
        let leave = random.one_in(3);
        let pages = match random.below(3) {
            _ if leave => old,
            0 => grown(old, random).unwrap_or(old),
            1 => (old - random.below(old.min(24))).max(1),
            _ => old,
        };
        let flags = MAYMOVE | FIXED | if leave { DONTUNMAP } else { 0 };
        remap(from, old, pages, flags, to)?;
        let kept = old.min(pages);
        self.become_zero(kept..old.max(pages));
        *place = Place { window: 1 - place.window, pages };
        if leave {
            // What stays behind is empty memory, until it is needed.
            let len = old * page_size();
            return map(from, len, libc::PROT_NONE, RESERVED | libc::MAP_FIXED, None).map(|_| Changed::Yes);
        }
        Ok(self.reserve(1 - place.window, 0..old))
    }
}

/// How many pages it grows to, if there is room.
fn grown(pages: usize, random: &mut Random) -> Option<usize> {
    (pages < MOST).then(|| (pages + 1 + random.below(40)).min(MOST))
}

fn remap(from: usize, old: usize, new: usize, flags: i32, to: usize) -> io::Result<()> {
    let (old, new) = (old * page_size(), new * page_size());
    // SAFETY: both places are in the windows of a mapping to which only atomics refer, and which no reader touches now.
    match unsafe { libc::syscall(libc::SYS_mremap, from, old, new, flags, to) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
