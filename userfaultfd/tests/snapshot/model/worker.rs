//! The memory, and the threads that change it.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

use userfaultfd::{FeatureFlags, MoveMode};

use super::clock::{Clock, dawdle};
use super::log::{Act, Change, Operation};
use super::tally::Tally;
use crate::support::memory::{Kind, Memory};
use crate::support::random::Random;
use crate::support::{features, page, uffd};

const MADV_COLLAPSE: libc::c_int = 25;
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

/// Bytes of a transparent huge page.
pub(super) const HUGE: usize = 2 << 20;

/// The memory, and where pages may be moved to.
pub(super) struct World {
    pub(super) memory: Memory,
    away: Memory,
    /// The first page of the memory that is used, and how many.
    first: usize,
    pub(super) pages: usize,
    /// In transparent huge pages.
    transparent: bool,
    /// Pages may move and go: not where another snapshot registers all anew.
    moves: bool,
    pub(super) clock: Arc<Clock>,
    /// What a thread does at most between two snapshots.
    pub(super) pace: usize,
    /// Pages that were unmapped.
    gone: AtomicUsize,
}

impl World {
    pub(super) fn new(
        test: &'static str,
        kind: Kind,
        transparent: bool,
        pages: usize,
        moves: bool,
    ) -> Option<Self> {
        let spare = if transparent { HUGE / page() } else { 0 };
        let memory = Memory::try_new(test, kind, pages + spare)?;
        let first = if transparent { memory.start().align_offset(HUGE) / page() } else { 0 };
        let away = Memory::anonymous(if kind.is_hugetlb() { 1 } else { pages });
        let (clock, gone) = (Arc::default(), AtomicUsize::new(0));
        let world = Self { memory, away, first, pages, transparent, moves, clock, pace: 60, gone };
        if transparent {
            world.memory.advise(first, pages, libc::MADV_HUGEPAGE).ok()?;
        }
        Some(world)
    }

    pub(super) fn now(&self) -> u64 {
        self.clock.now()
    }

    fn at(&self, page: usize) -> *mut c_void {
        self.memory.at(self.first + page)
    }

    /// Whether so little is left that nothing more is learned from it.
    pub(super) fn is_over(&self) -> bool {
        4 * self.gone.load(Ordering::Relaxed) > 3 * self.pages
    }

    pub(super) fn addresses(&self) -> Range<usize> {
        self.memory.range(self.first, self.pages)
    }

    fn is_small(&self) -> bool {
        !self.memory.kind().is_hugetlb()
    }
}

/// The pages of a thread, and what it has done to them.
pub(super) struct Worker<'a> {
    world: &'a World,
    pub(super) pages: Range<usize>,
    random: Random,
    /// Where its pages are, unless they are gone.
    places: Vec<Option<usize>>,
    /// Where UFFDIO_MOVE puts pages. It is mapped from the beginning, so that it doesn't lie where the memory has a hole: a
    /// snapshot couldn't begin while it is registered there.
    target: Memory,
    pub(super) log: BTreeMap<usize, Vec<Operation>>,
    /// When the layout changed: moves, and what was unmapped or mapped anew.
    pub(super) changes: Vec<Change>,
    pub(super) tally: Tally,
    /// What it panicked with. It does nothing since.
    pub(super) panicked: Option<Box<dyn Any + Send>>,
}

impl<'a> Worker<'a> {
    /// Begins with content everywhere.
    pub(super) fn new(world: &'a World, pages: Range<usize>, random: Random) -> Self {
        let places = (0..pages.end).map(|page| Some(world.at(page).expose_provenance())).collect();
        let mut worker = Self {
            world,
            pages,
            random,
            places,
            target: Memory::anonymous(1),
            log: BTreeMap::new(),
            changes: Vec::new(),
            tally: Tally::default(),
            panicked: None,
        };
        worker.pages.clone().for_each(|page| worker.write(page));
        worker
    }

    fn note(&mut self, pages: Range<usize>, began: u64, act: Act, holds: Option<u64>) {
        let ended = self.world.now();
        for page in pages {
            self.log.entry(page).or_default().push(Operation { began, ended, act, holds });
        }
    }

    fn at(&self, page: usize) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.places[page].expect("it isn't gone"))
    }

    /// Reads a page, which holds what this thread has made of it: otherwise memory itself is wrong, not a snapshot.
    fn read(&self, page: usize) {
        // SAFETY: aligned, inside the mapping, which this thread alone accesses.
        let word = unsafe { self.at(page).cast::<u64>().read_volatile() };
        let last = self.log[&page].last().expect("it was written at first");
        assert_eq!(Some(word), last.holds, "page {page} holds something else than after {last:?}");
    }

    fn lose(&mut self, pages: Range<usize>) {
        self.world.gone.fetch_add(pages.len(), Ordering::Relaxed);
        self.places[pages].fill(None);
    }

    fn has_moved(&self, page: usize) -> bool {
        self.places[page] != Some(self.world.at(page).addr())
    }

    /// Moves pages to another place. Returns whether that can be done: not if they are of more than one mapping.
    fn move_to(&mut self, pages: Range<usize>, to: *mut c_void) -> bool {
        let Self { world: World { memory, first, .. }, .. } = *self;
        let moved = memory.try_move(first + pages.start, pages.len(), to, 0).is_ok();
        if moved {
            for (index, page) in pages.enumerate() {
                self.places[page] = Some(to.expose_provenance() + index * memory.page());
            }
        }
        moved
    }

    fn write(&mut self, page: usize) {
        let (began, word) = (self.world.now(), self.world.now());
        // SAFETY: aligned, inside the mapping, which this thread alone accesses.
        unsafe { self.at(page).cast::<u64>().write_volatile(word) };
        self.note(page..page + 1, began, Act::Write, Some(word));
    }

    /// Does some random things in each round.
    pub(super) fn work(mut self, round: &Barrier, stop: &AtomicBool) -> Self {
        loop {
            round.wait();
            if stop.load(Ordering::SeqCst) {
                return self;
            }
            // The others wait for it at the barrier, also after a panic.
            if self.panicked.is_none() {
                self.panicked = panic::catch_unwind(AssertUnwindSafe(|| self.round())).err();
            }
            round.wait();
        }
    }

    fn round(&mut self) {
        for _ in 0..self.random.below(self.world.pace) {
            self.operate();
            dawdle(&mut self.random, 2);
        }
    }

    fn operate(&mut self) {
        let (world, random) = (self.world, &mut self.random);
        // Some pages more often than others.
        let among = if random.one_in(2) { self.pages.len().min(4) } else { self.pages.len() };
        let first = self.pages.start + random.below(among);
        let Some(place) = self.places[first] else { return };
        let (small, kind) = (world.is_small(), world.memory.kind());
        let most = if random.one_in(16) { self.pages.len() } else { 9 };
        let many = first + 1 + random.below(most);
        let many = (first..self.pages.end.min(many))
            .take_while(|page| self.places[*page] == Some(place + (page - first) * world.memory.page()))
            .count();
        let what = random.below(1000);
        let (at, all, began) = (self.at(first), first..first + many, world.now());
        let bytes = many * world.memory.page();
        match what {
            0..630 => {
                self.write(first);
                self.tally.add("done: a page written", 1);
            }
            630..730 => {
                // What is dropped of shared memory is there again.
                let advice = if kind.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                // SAFETY: the pages are this thread's, and nobody borrows them.
                // Hugetlb memory can't be dropped before Linux 5.18.
                if unsafe { libc::madvise(at, bytes, advice) } == 0 {
                    self.note(all, began, Act::Drop, Some(0));
                    self.tally.add(if many > 1 { "done: pages dropped" } else { "done: a page dropped" }, 1);
                }
            }
            730..750 if kind == Kind::Anonymous => {
                // SAFETY: as above.
                if unsafe { libc::madvise(at, bytes, MADV_GUARD_INSTALL) } == 0 {
                    self.world.clock.wait(&mut self.random, 20);
                    // SAFETY: as above.
                    assert_eq!(unsafe { libc::madvise(at, bytes, MADV_GUARD_REMOVE) }, 0);
                    self.note(all, began, Act::Silent, Some(0));
                    self.tally.add("done: guard pages installed", 1);
                }
            }
            750..780 if kind == Kind::Anonymous && features().contains(FeatureFlags::MOVE) => {
                let (target, uffd) = (&self.target, uffd(FeatureFlags::MOVE));
                uffd.register(target.start(), page()).unwrap();
                // SAFETY: nobody borrows the page. It fails where a fork shares it, or it isn't there.
                let moved = unsafe { uffd.move_pages(at, target.start(), page(), MoveMode::empty()) };
                // Linux 6.18 answers EEXIST now and then after it has moved a page out of a huge one.
                let has_left = moved.is_ok() || target.state(0).present;
                // A child may keep the descriptor open for a while.
                uffd.unregister(target.start(), page()).unwrap();
                target.advise(0, 1, libc::MADV_DONTNEED).unwrap();
                if has_left {
                    self.note(first..first + 1, began, Act::Silent, Some(0));
                    self.tally.add("done: a page moved away by UFFDIO_MOVE", 1);
                }
            }
            780..790 if world.moves && small && !self.has_moved(first) => {
                // They hold what they held.
                if self.move_to(all.clone(), world.away.at(first)) {
                    self.changes.push(Change { began, ended: world.now(), pages: all });
                    self.tally.add("done: pages moved by mremap", 1);
                }
            }
            // Over another page, which is gone then.
            790..820 if world.moves && small && !self.has_moved(first) => {
                let other = self.pages.start + self.random.below(self.pages.len());
                if other != first
                    && self.places[other].is_some()
                    && self.move_to(first..first + 1, self.at(other))
                {
                    self.lose(other..other + 1);
                    self.note(other..other + 1, began, Act::Unmap, None);
                    self.tally.add("done: a page moved over another", 1);
                    for page in [first, other] {
                        self.changes.push(Change { began, ended: world.now(), pages: page..page + 1 });
                    }
                }
            }
            820..825 if world.moves && small && !self.has_moved(first) => {
                self.lose(all.clone());
                if self.random.one_in(2) {
                    world.memory.unmap(world.first + first, many);
                    self.tally.add("done: pages unmapped", 1);
                } else {
                    self.tally.add("done: pages mapped anew", 1);
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                    let protection = libc::PROT_READ | libc::PROT_WRITE;
                    // SAFETY: the pages are this thread's, and nobody borrows them.
                    unsafe { libc::mmap(at, bytes, protection, flags, -1, 0) };
                    // SAFETY: it was just mapped.
                    unsafe { at.cast::<u64>().write_volatile(u64::MAX) };
                }
                self.note(all.clone(), began, Act::Unmap, None);
                self.changes.push(Change { began, ended: world.now(), pages: all });
            }
            825..830 => {
                // SAFETY: the child writes to its copy of the page, and exits.
                match unsafe { libc::fork() } {
                    0 => {
                        if !kind.is_shared() && small {
                            // SAFETY: as above.
                            unsafe { at.cast::<u64>().write_volatile(u64::MAX - 1) };
                        }
                        // SAFETY: ends the child.
                        unsafe { libc::_exit(0) };
                    }
                    child => {
                        // SAFETY: the status isn't asked for.
                        let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                        self.tally.add("done: a fork", usize::from(child > 0 && waited == child));
                    }
                }
            }
            830..850 if world.transparent => {
                let huge = first * page() / HUGE * HUGE / page();
                // SAFETY: content stays as it is.
                let collapsed = unsafe { libc::madvise(world.at(huge), HUGE, MADV_COLLAPSE) };
                self.tally.add("done: a huge page collapsed", usize::from(collapsed == 0));
            }
            _ => {
                self.read(first);
                self.tally.add("done: a page read", 1);
            }
        }
    }
}
