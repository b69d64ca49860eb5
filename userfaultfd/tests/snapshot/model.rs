//! Random programs that write, drop, move, map, fork and collapse while snapshots are taken, against a plain model of
//! what memory held when each began.
//!
//! A page belongs to one thread, whose operations on it follow each other. Each notes when it began and ended, and what
//! the page holds afterwards. A snapshot is right if there is one moment while it began at which every page held what the
//! snapshot has of it. What may be missing of it, or be zero instead, is what the docs of the module say, and no more.
//!
//! `USERFAULTFD_MODEL_SECONDS` says how long it takes (and `USERFAULTFD_TEST_SECONDS` must be more than that), and
//! `USERFAULTFD_MODEL_SEED` where the random numbers begin.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::snapshot::{Content, Error, Geometry, Options, Progress, Removal, Sink, Snapshot};
use userfaultfd::{FeatureFlags, MoveMode, RegisterMode};

use crate::support::memory::{self, Kind, Memory};
use crate::support::random::Random;
use crate::support::{child, features, maps, page, require, show, test_name, uffd};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const THREADS: usize = 3;
const MADV_COLLAPSE: libc::c_int = 25;
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

/// Bytes of a transparent huge page.
const HUGE: usize = 2 << 20;

/// Lets a little time pass; now and then others run.
fn dawdle(random: &mut Random, limit: usize) {
    (0..random.below(limit * 200)).for_each(|_| std::hint::spin_loop());
    if random.one_in(12) {
        thread::yield_now();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Write,
    Drop,
    /// No event tells of it.
    Silent,
    Unmap,
}

/// What was done to a page.
#[derive(Clone, Copy, Debug)]
struct Operation {
    began: u64,
    ended: u64,
    act: Act,
    /// What the page holds afterwards. `None`: it isn't there any more.
    holds: Option<u64>,
}

/// Pages were moved, or weren't there any more.
#[derive(Clone, Debug)]
struct Change {
    began: u64,
    ended: u64,
    pages: Range<usize>,
}

/// Whether something happened while something else did.
fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.1 && one.1 > other.0
}

impl Operation {
    fn overlaps(&self, time: (u64, u64)) -> bool {
        overlap((self.began, self.ended), time)
    }
}

/// What a snapshot holds: the first word of each page, `None` where it is gone.
type Held = BTreeMap<usize, Option<u64>>;

#[derive(Debug)]
struct Taken {
    /// Before and after it began.
    began: (u64, u64),
    ended: u64,
    /// When the one before had ended, well or not.
    previous: u64,
    /// It is of a series, which follows pages that have moved before it began.
    follows: bool,
    held: Held,
    /// Pages that came with an earlier member of the series.
    earlier: BTreeSet<usize>,
}

/// Takes all, slowly now and then, or fails half-way.
struct Collect {
    held: Arc<Mutex<Held>>,
    page: usize,
    random: Random,
    slow: usize,
    fails: bool,
}

impl Sink for Collect {
    fn begin(&mut self, _: &Geometry) -> io::Result<()> {
        dawdle(&mut self.random, 3);
        Ok(())
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        dawdle(&mut self.random, self.slow);
        if self.fails && self.random.one_in(3) {
            return Err(io::Error::other("as it is told to"));
        }
        let len = content.len() as usize;
        for at in (0..len).step_by(self.page) {
            let word = match content {
                Content::Data(bytes) => Some(u64::from_ne_bytes(*bytes[at..].first_chunk().unwrap())),
                Content::Zero(_) => Some(0),
                Content::Gone(_) => None,
                other => panic!("{other:?}"),
            };
            let page = (offset as usize + at) / self.page;
            assert_eq!(self.held.lock().unwrap().insert(page, word), None, "page {page} came twice");
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.fails { Err(io::Error::other("as it is told to")) } else { Ok(()) }
    }
}

/// The memory, and where pages may be moved to.
struct World {
    memory: Memory,
    away: Memory,
    /// The first page of the memory that is used, and how many.
    first: usize,
    pages: usize,
    /// In transparent huge pages.
    transparent: bool,
    /// Pages may move and go: not where another snapshot registers all anew.
    moves: bool,
    clock: AtomicU64,
    collapsed: AtomicUsize,
}

impl World {
    fn new(test: &'static str, kind: Kind, transparent: bool, pages: usize, moves: bool) -> Option<Self> {
        let spare = if transparent { HUGE / page() } else { 0 };
        let memory = Memory::try_new(test, kind, pages + spare)?;
        let first = if transparent { memory.start().align_offset(HUGE) / page() } else { 0 };
        let away = Memory::anonymous(if kind.is_hugetlb() { 1 } else { pages });
        let (clock, collapsed) = (AtomicU64::new(1), AtomicUsize::new(0));
        let world = Self { memory, away, first, pages, transparent, moves, clock, collapsed };
        if transparent {
            world.memory.advise(first, pages, libc::MADV_HUGEPAGE).ok()?;
        }
        Some(world)
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn at(&self, page: usize) -> *mut c_void {
        self.memory.at(self.first + page)
    }

    fn addresses(&self) -> Range<usize> {
        self.memory.range(self.first, self.pages)
    }

    fn is_small(&self) -> bool {
        !self.memory.kind().is_hugetlb()
    }
}

/// The pages of a thread, and what it has done to them.
struct Worker<'a> {
    world: &'a World,
    pages: Range<usize>,
    random: Random,
    /// Where its pages are, unless they are gone.
    places: Vec<Option<usize>>,
    /// Where UFFDIO_MOVE puts pages. It is mapped from the beginning, so that it doesn't lie where the memory has a hole: a
    /// snapshot couldn't begin while it is registered there.
    target: Memory,
    log: BTreeMap<usize, Vec<Operation>>,
    /// When the layout changed: moves, and what was unmapped or mapped anew.
    changes: Vec<Change>,
    /// What it panicked with. It does nothing since.
    panicked: Option<Box<dyn Any + Send>>,
}

impl<'a> Worker<'a> {
    /// Begins with content everywhere.
    fn new(world: &'a World, pages: Range<usize>, random: Random) -> Self {
        let places = (0..pages.end).map(|page| Some(world.at(page).expose_provenance())).collect();
        let mut worker = Self {
            world,
            pages,
            random,
            places,
            target: Memory::anonymous(1),
            log: BTreeMap::new(),
            changes: Vec::new(),
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
    fn work(mut self, round: &Barrier, stop: &AtomicBool) -> Self {
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
        for _ in 0..self.random.below(60) {
            self.operate();
            dawdle(&mut self.random, 3);
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
            0..630 => self.write(first),
            630..730 => {
                // What is dropped of shared memory is there again.
                let advice = if kind.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                // SAFETY: the pages are this thread's, and nobody borrows them.
                // Hugetlb memory can't be dropped before Linux 5.18.
                if unsafe { libc::madvise(at, bytes, advice) } == 0 {
                    self.note(all, began, Act::Drop, Some(0));
                }
            }
            730..750 if kind == Kind::Anonymous => {
                // SAFETY: as above.
                if unsafe { libc::madvise(at, bytes, MADV_GUARD_INSTALL) } == 0 {
                    dawdle(&mut self.random, 200);
                    // SAFETY: as above.
                    assert_eq!(unsafe { libc::madvise(at, bytes, MADV_GUARD_REMOVE) }, 0);
                    self.note(all, began, Act::Silent, Some(0));
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
                }
            }
            780..790 if world.moves && small && !self.has_moved(first) => {
                // They hold what they held.
                if self.move_to(all.clone(), world.away.at(first)) {
                    self.changes.push(Change { began, ended: world.now(), pages: all });
                }
            }
            // Over another page, which is gone then.
            790..820 if world.moves && small && !self.has_moved(first) => {
                let other = self.pages.start + self.random.below(self.pages.len());
                if other != first
                    && self.places[other].is_some()
                    && self.move_to(first..first + 1, self.at(other))
                {
                    self.places[other] = None;
                    self.note(other..other + 1, began, Act::Unmap, None);
                    for page in [first, other] {
                        self.changes.push(Change { began, ended: world.now(), pages: page..page + 1 });
                    }
                }
            }
            820..825 if world.moves && small && !self.has_moved(first) => {
                self.places[all.clone()].fill(None);
                if self.random.one_in(2) {
                    world.memory.unmap(world.first + first, many);
                } else {
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
                        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                    }
                }
            }
            830..850 if world.transparent => {
                let huge = first * page() / HUGE * HUGE / page();
                // SAFETY: content stays as it is.
                let collapsed = unsafe { libc::madvise(world.at(huge), HUGE, MADV_COLLAPSE) };
                world.collapsed.fetch_add(usize::from(collapsed == 0), Ordering::Relaxed);
            }
            _ => self.read(first),
        }
    }
}

/// What all workers have done.
#[derive(Default)]
struct Log {
    pages: BTreeMap<usize, Vec<Operation>>,
    changes: Vec<Change>,
}

impl Log {
    /// When a page held what a snapshot has of it: between two times, as far as that can be told.
    fn when(&self, taken: &Taken, removal: Removal, page: usize) -> Result<Option<(u64, u64)>, String> {
        let operations = &self.pages[&page][..];
        let Taken { began: (before, after), ended, ref held, .. } = *taken;
        let during: Vec<_> =
            operations.iter().filter(|operation| operation.overlaps((before, ended))).collect();
        // A snapshot that isn't of a series is of addresses, whatever lies there when it begins.
        let other = |change: &Change| !taken.follows && change.began < after && change.pages.contains(&page);
        if self.changes.iter().any(other) {
            return Ok(None);
        }
        let Some(word) = held[&page] else {
            let fine = during.iter().any(|operation| match operation.act {
                Act::Write => false,
                Act::Silent | Act::Unmap => true,
                // By a call that was under way while it began, or while the layout changed.
                Act::Drop => {
                    operation.overlaps((before, after))
                        || self.changes.iter().any(|change| operation.overlaps((change.began, change.ended)))
                }
            });
            let unmapped = |operation: &Operation| operation.act == Act::Unmap && operation.began < ended;
            let fine = fine || operations.iter().any(unmapped);
            return if fine { Ok(None) } else { Err(self.tell(taken, page)) };
        };
        if word == 0 && removal == Removal::Zero && during.iter().any(|operation| operation.act == Act::Drop)
        {
            return Ok(None);
        }
        let spans = operations.iter().enumerate().filter(|(_, operation)| operation.holds == Some(word));
        let spans = spans.map(|(index, operation)| {
            (operation.began, operations.get(index + 1).map_or(u64::MAX, |next| next.ended))
        });
        let spans: Vec<_> = spans.filter(|(start, end)| *start < after && *end > before).collect();
        let start = spans.iter().map(|(start, _)| *start).min();
        let end = spans.iter().map(|(_, end)| *end).max();
        start.zip(end).map(Some).ok_or_else(|| self.tell(taken, page))
    }

    fn tell(&self, taken: &Taken, page: usize) -> String {
        let Taken { began: (before, after), ended, previous, held, earlier, .. } = taken;
        let near = |operation: &&Operation| operation.ended + 400 > *before && operation.began < ended + 100;
        let near: Vec<_> = self.pages[&page].iter().filter(near).collect();
        let changes = |change: &&Change| change.ended + 400 > *before && change.began < *ended;
        let changes: Vec<_> = self.changes.iter().filter(changes).collect();
        let held = held[&page];
        let came = if earlier.contains(&page) { "from an earlier one" } else { "delivered with it" };
        format!(
            "page {page} has {held:?}, {came}, in the snapshot of {before}..{after}, at work until {ended}, after one until \
             {previous}: {near:?}, the layout changed {changes:?}"
        )
    }

    /// Whether there is a moment at which all was as a snapshot has it.
    fn check(&self, taken: &Taken, removal: Removal) -> Result<(), String> {
        let (mut latest, mut earliest) = ((taken.began.0, None), (taken.began.1, None));
        for page in taken.held.keys() {
            let Some((start, end)) = self.when(taken, removal, *page)? else { continue };
            if start > latest.0 {
                latest = (start, Some(page));
            }
            if end < earliest.0 {
                earliest = (end, Some(page));
            }
        }
        if latest.0 < earliest.0 {
            return Ok(());
        }
        let tell = |page: Option<&usize>| page.map(|page| self.tell(taken, *page));
        Err(format!("no moment: {latest:?} {:?}; {earliest:?} {:?}", tell(latest.1), tell(earliest.1)))
    }
}

/// Snapshots one after the other.
struct Takes {
    random: Random,
    removal: Removal,
    series: Option<userfaultfd::snapshot::Series>,
    chain: Held,
    previous: u64,
    taken: Vec<Taken>,
}

impl Takes {
    fn options(world: &World, removal: Removal, buffer: usize) -> Options {
        Options::new().range(world.addresses()).buffer(buffer).removal(removal)
    }

    /// Takes one, unless it fails as it must.
    fn take(&mut self, world: &World, buffer: usize) -> Result<(), String> {
        let random = &mut self.random;
        let held = Arc::new(Mutex::new(Held::new()));
        let sink = Collect {
            held: Arc::clone(&held),
            page: world.memory.page(),
            random: Random::new(random.next()),
            slow: [1, 10, 400][random.below(3)],
            fails: random.one_in(10),
        };
        let (fails, aborts) = (sink.fails, random.one_in(20));
        dawdle(random, 20);
        let before = world.now();
        let begun = match &mut self.series {
            Some(series) => series.begin(sink),
            None => Self::options(world, self.removal, buffer).begin(sink),
        };
        let begun: Snapshot<_> = match begun {
            Ok(begun) => begun,
            // No second descriptor protects while the layout changes all the time.
            Err(Error::Kernel(error)) if error.is_retryable() && !memory::kernel_tells_protection() => {
                return Ok(());
            }
            Err(error) => return Err(format!("begin: {error:?}")),
        };
        let after = world.now();
        if aborts {
            begun.abort();
        }
        let result = begun.wait();
        let ended = world.now();
        let previous = std::mem::replace(&mut self.previous, ended);
        let Progress { total, saved, gone, .. } = match result {
            Ok(finished) => finished.progress,
            Err(Error::Sink(_)) if fails => return Ok(()),
            Err(Error::Aborted) if aborts => return Ok(()),
            Err(error) => return Err(format!("wait: {error:?}")),
        };
        let mut held = std::mem::take(&mut *held.lock().unwrap());
        let bytes = |pages: usize| (pages * world.memory.page()) as u64;
        let told = (bytes(held.len()), bytes(held.values().filter(|word| word.is_none()).count()));
        if (total, gone) != told || saved != total {
            return Err(format!("{saved} of {total}, of them {gone} gone, but delivered were {told:?}"));
        }
        let mut earlier = BTreeSet::new();
        if self.series.is_some() {
            earlier.extend(self.chain.keys().filter(|page| !held.contains_key(page)));
            self.chain.extend(held);
            held = self.chain.clone();
        }
        if held.len() != world.pages {
            return Err(format!("it holds {} pages of {}", held.len(), world.pages));
        }
        let follows = self.series.is_some();
        self.taken.push(Taken { began: (before, after), ended, previous, follows, held, earlier });
        Ok(())
    }
}

/// What all lives have been.
#[derive(Debug, Default)]
struct Totals {
    lives: u64,
    snapshots: usize,
    /// Lives in transparent huge pages, such pages that were seen, and collapses.
    transparent: usize,
    huge: usize,
    collapsed: usize,
}

/// One memory with some snapshots of it.
fn life(test: &'static str, mut random: Random, totals: &mut Totals) -> Result<(), String> {
    totals.lives += 1;
    let (kind, transparent) = match random.below(48) {
        0..20 => (Kind::Anonymous, false),
        20..24 => (Kind::Anonymous, true),
        24..32 => (Kind::Memfd, false),
        32..40 => (Kind::PrivateMemfd, false),
        40..47 => (Kind::SharedAnonymous, false),
        _ => ([Kind::SharedAnonymous, Kind::Hugetlb, Kind::PrivateHugetlb][random.below(3)], false),
    };
    if kind.needs(RegisterMode::WRITE_PROTECT).is_none_or(|needs| !features().contains(needs)) {
        return Ok(());
    }
    let pages = match () {
        // A huge page of a child that was forked isn't in the pool for this.
        () if kind.is_hugetlb() => 6,
        () if transparent => 2 * HUGE / page(),
        () => [6, 30, 100, 500][random.below(4)],
    };
    // Those of a series, several of one each, or a single one.
    let (series, members) =
        [(true, 24), (true, 24), (true, 24), (false, 12), (false, 12), (false, 1)][random.below(6)];
    let moves = series || members == 1;
    let Some(world) = World::new(test, kind, transparent, pages, moves) else { return Ok(()) };
    let world = &world;
    let removal = if random.one_in(3) { Removal::Zero } else { Removal::Save };
    let buffer = [0, 1 << 20, 16 << 20][random.below(3)];
    let what = format!(
        "{kind:?} of {pages} pages, huge pages: {transparent}, {removal:?}, a series: {series}, buffers: {buffer:#x}"
    );
    let of_thread = |thread: usize| pages * thread / THREADS..pages * (thread + 1) / THREADS;
    let workers: Vec<_> = (0..THREADS)
        .map(|thread| Worker::new(world, of_thread(thread), Random::new(random.next())))
        .collect();
    let huge = if transparent { maps::sum_of(world.addresses(), "AnonHugePages") / HUGE } else { 0 };
    let series = series.then(|| Takes::options(world, removal, buffer).series().unwrap());
    let mut takes = Takes { random, removal, series, chain: Held::new(), previous: 0, taken: Vec::new() };
    let (stop, round) = (AtomicBool::new(false), Barrier::new(THREADS + 1));
    let mut result = Ok(());
    let log = thread::scope(|scope| {
        let (stop, round) = (&stop, &round);
        let workers: Vec<_> =
            workers.into_iter().map(|worker| scope.spawn(move || worker.work(round, stop))).collect();
        for _ in 0..members {
            round.wait();
            // Now and then nothing happens but what they do, and now and then one follows the other at once.
            for _ in 0..if members == 1 { 1 } else { [0, 1, 1, 1, 3][takes.random.below(5)] } {
                if result.is_ok() {
                    result = takes.take(world, buffer);
                }
            }
            round.wait();
            if result.is_err() {
                break;
            }
        }
        stop.store(true, Ordering::SeqCst);
        round.wait();
        let mut log = Log::default();
        for worker in workers {
            let Worker { log: pages, changes, panicked, .. } = worker.join().unwrap();
            if let Some(payload) = panicked {
                panic::resume_unwind(payload);
            }
            log.pages.extend(pages);
            log.changes.extend(changes);
        }
        log
    });
    totals.snapshots += takes.taken.len();
    totals.transparent += usize::from(transparent);
    totals.huge += huge;
    totals.collapsed += world.collapsed.load(Ordering::Relaxed);
    let all = takes.taken.iter().enumerate();
    let checked = all.map(|(number, taken)| {
        log.check(taken, removal).map_err(|error| format!("snapshot {number}: {error}"))
    });
    result.and_then(|()| checked.collect()).map_err(|error| format!("{what}: {error}"))
}

fn number_from(variable: &str, or: u64) -> u64 {
    std::env::var(variable).map_or(or, |text| text.parse().expect("a number"))
}

#[test]
fn snapshots_match_the_model() {
    require!(WRITE_PROTECT);
    let limit = Duration::from_secs(number_from("USERFAULTFD_MODEL_SECONDS", 1));
    let seed = number_from("USERFAULTFD_MODEL_SEED", 1);
    let output = child::run(test_name!(), || {
        let (start, mut totals) = (Instant::now(), Totals::default());
        while start.elapsed() < limit {
            let seed = seed.wrapping_add(totals.lives).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if let Err(error) = life(test_name!(), Random::new(seed), &mut totals) {
                panic!("life {}: {error}", totals.lives);
            }
        }
        println!("as they were: {totals:?}");
        // Asked for by MADV_HUGEPAGE, which "never" forbids.
        let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        let may_be_huge = enabled.is_ok_and(|text| !text.contains("[never]"));
        assert!(totals.huge > 0 || totals.transparent == 0 || !may_be_huge, "no huge pages: {totals:?}");
    });
    if let Some(output) = output {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
        out.lines().filter(|line| line.contains("as they were")).for_each(show);
    }
}
