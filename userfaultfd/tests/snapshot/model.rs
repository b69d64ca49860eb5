//! Random programs that write, drop, move, map, fork and collapse while snapshots are taken, against a plain model of
//! what memory held when each began.
//!
//! A page belongs to one thread, whose operations on it follow each other. Each notes when it began and ended, and what
//! the page holds afterwards. A snapshot holds what the page held after the last operation that had ended when it began,
//! or after one that was going on then.
//!
//! `USERFAULTFD_MODEL_SECONDS` says how long it takes (and `USERFAULTFD_TEST_SECONDS` more than that), and
//! `USERFAULTFD_MODEL_SEED` where the random numbers begin.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::snapshot::{Content, Geometry, Options, Removal, Sink};
use userfaultfd::{FeatureFlags, MoveMode, RegisterMode};

use crate::image::{Stop, addresses};
use crate::support::memory::{Kind, Memory};
use crate::support::{child, features, page, require, show, test_name, uffd};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const THREADS: usize = 3;
const MADV_COLLAPSE: libc::c_int = 25;
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }
}

/// What an operation does to what snapshots hold of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It holds this afterwards.
    Holds(u64),
    /// The same, and no event tells of it: what isn't saved yet is gone.
    Silent(u64),
    /// It isn't there any more.
    Gone,
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    began: u64,
    ended: u64,
    effect: Effect,
    name: &'static str,
}

type Log = BTreeMap<usize, Vec<Operation>>;

/// Where a log has the moves of pages. Memory may have to be unregistered while a snapshot begins, if it can't be
/// protected since the layout changes all the time; what moves then is gone.
const MOVES: usize = 1 << 30;

/// After such a pause memory may have been unregistered while it began: nothing told of changes in that moment.
const UNFOLLOWED: Duration = Duration::from_millis(150);

/// What a snapshot holds: the first word of each page, `None` where it is gone.
type Held = BTreeMap<usize, Option<u64>>;

struct Taken {
    began: (u64, u64),
    ended: u64,
    held: Held,
}

/// Takes all, slowly now and then, or fails half-way.
struct Collect {
    held: Arc<Mutex<Held>>,
    page: usize,
    random: Random,
    fails: bool,
}

impl Sink for Collect {
    fn begin(&mut self, _: &Geometry) -> io::Result<()> {
        Ok(())
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        for _ in 0..self.random.below(20) {
            thread::yield_now();
        }
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
    /// Pages may move and go: not where each snapshot registers all anew.
    series: bool,
    clock: AtomicU64,
}

impl World {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Does random things to the pages of a thread until it is told to stop.
    fn work(&self, pages: std::ops::Range<usize>, mut random: Random, stop: &AtomicBool, log: &mut Log) {
        let small = !self.memory.kind().is_hugetlb();
        let mut moved = vec![false; pages.end];
        let mut gone = vec![false; pages.end];
        while !stop.load(Ordering::SeqCst) {
            let first = pages.start + random.below(pages.len());
            if gone[first] {
                continue;
            }
            let at = if moved[first] { self.away.at(first) } else { self.memory.at(first) };
            let many = (first..pages.end.min(first + 1 + random.below(9)))
                .take_while(|page| !gone[*page] && moved[*page] == moved[first])
                .count();
            let began = self.now();
            let (touched, effect, name) = match random.below(100) {
                0..70 => {
                    let word = self.now();
                    // SAFETY: aligned, inside the mapping, which this thread alone accesses.
                    unsafe { at.cast::<u64>().write_volatile(word) };
                    (1, Effect::Holds(word), "write")
                }
                70..80 => {
                    // What is dropped of shared memory is there again.
                    let shared = self.memory.kind().is_shared();
                    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                    // SAFETY: the pages are this thread's, and nobody borrows them.
                    match unsafe { libc::madvise(at, many * self.memory.page(), advice) } {
                        0 => (many, Effect::Holds(0), "drop"),
                        _ => continue, // hugetlb memory before Linux 5.18
                    }
                }
                80..82 if small && self.memory.kind() == Kind::Anonymous => {
                    // SAFETY: as above.
                    match unsafe { libc::madvise(at, many * page(), MADV_GUARD_INSTALL) } {
                        0 => {}
                        _ => continue,
                    }
                    // SAFETY: as above.
                    assert_eq!(unsafe { libc::madvise(at, many * page(), MADV_GUARD_REMOVE) }, 0);
                    (many, Effect::Silent(0), "guard")
                }
                82..84
                    if self.memory.kind() == Kind::Anonymous && features().contains(FeatureFlags::MOVE) =>
                {
                    let (target, uffd) = (Memory::anonymous(1), uffd(FeatureFlags::MOVE));
                    uffd.register(target.start(), page()).unwrap();
                    // SAFETY: nobody borrows the page.
                    match unsafe { uffd.move_pages(at, target.start(), page(), MoveMode::empty()) } {
                        Ok(_) => (1, Effect::Silent(0), "take"),
                        Err(_) => continue, // a fork shares it, or it isn't there
                    }
                }
                84..86 if self.series && small && !moved[first] => {
                    if self.memory.try_move(first, many, self.away.at(first), 0).is_err() {
                        continue; // more than one mapping
                    }
                    moved[first..first + many].fill(true);
                    // They hold what they held.
                    let moves = Operation { began, ended: self.now(), effect: Effect::Gone, name: "move" };
                    (first..first + many).for_each(|page| log.entry(page + MOVES).or_default().push(moves));
                    continue;
                }
                86 if self.series && small && random.one_in(4) && !moved[first] => {
                    gone[first..first + many].fill(true);
                    if random.one_in(2) {
                        self.memory.unmap(first, many);
                    } else {
                        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                        let protection = libc::PROT_READ | libc::PROT_WRITE;
                        // SAFETY: the pages are this thread's, and nobody borrows them.
                        unsafe { libc::mmap(at, many * page(), protection, flags, -1, 0) };
                        // SAFETY: it was just mapped.
                        unsafe { at.cast::<u64>().write_volatile(u64::MAX) };
                    }
                    (many, Effect::Gone, "unmap")
                }
                87..90 => {
                    // SAFETY: the child writes to its copy of the page, and exits.
                    match unsafe { libc::fork() } {
                        0 => {
                            if !self.memory.kind().is_shared() && small {
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
                    continue;
                }
                90..94 if small => {
                    // SAFETY: content stays as it is.
                    unsafe { libc::madvise(self.memory.start(), self.memory.len(), MADV_COLLAPSE) };
                    continue;
                }
                _ => {
                    // SAFETY: as above.
                    unsafe { at.cast::<u64>().read_volatile() };
                    continue;
                }
            };
            let ended = self.now();
            for page in first..first + touched {
                log.entry(page).or_default().push(Operation { began, ended, effect, name });
            }
        }
    }
}

/// Compares a snapshot with what may be in it.
fn check(log: &Log, taken: &Taken, page: usize, held: Option<u64>) -> Result<(), String> {
    let operations = log.get(&page).map_or(&[][..], Vec::as_slice);
    let Taken { began: (before, after), ended, .. } = *taken;
    let done = operations.iter().rposition(|operation| operation.ended < before);
    let last = done.map_or(Effect::Holds(0), |done| operations[done].effect);
    let going_on = operations
        .iter()
        .skip(done.map_or(0, |done| done + 1))
        .take_while(|operation| operation.began < after);
    // What was mapped anew while memory was unregistered is registered with the rest.
    if held == Some(u64::MAX) && operations.iter().any(|op| op.effect == Effect::Gone && op.began < after) {
        return Ok(());
    }
    let mut may = [last].into_iter().chain(going_on.map(|operation| operation.effect));
    let fine = match held {
        Some(word) => may.any(|effect| effect == Effect::Holds(word) || effect == Effect::Silent(word)),
        None => {
            let moving = log.keys().any(|page| *page >= MOVES)
                || log.values().flatten().any(|op| op.effect == Effect::Gone);
            let moves = log.get(&(page + MOVES)).map_or(&[][..], Vec::as_slice);
            may.any(|effect| effect == Effect::Gone)
                || operations.iter().chain(moves).any(|operation| {
                    operation.began < ended
                        && match operation.effect {
                            // A removal may be read before a page is saved, since a move hides it. One that began before may
                            // have been read by the snapshot before.
                            Effect::Holds(_) => {
                                operation.name == "drop"
                                    && operation.ended > before
                                    && (moving || operation.began < after)
                            }
                            Effect::Silent(_) => operation.ended > before,
                            Effect::Gone => true,
                        }
                })
        }
    };
    if fine {
        return Ok(());
    }
    let near: Vec<_> =
        operations.iter().filter(|operation| operation.ended + 400 > before).take(12).collect();
    Err(format!(
        "page {page} has {held:?} in the snapshot of {before}..{after}, at work until {ended}: {near:?}"
    ))
}

/// One memory with some snapshots of it. Returns how many.
fn life(test: &'static str, mut random: Random) -> Result<usize, String> {
    let kind = match random.below(12) {
        0..5 => Kind::Anonymous,
        5..7 => Kind::Memfd,
        7..9 => Kind::PrivateMemfd,
        9..11 => Kind::SharedAnonymous,
        _ if random.one_in(2) => Kind::Hugetlb,
        _ => Kind::PrivateHugetlb,
    };
    if kind.needs(RegisterMode::WRITE_PROTECT).is_none_or(|needs| !features().contains(needs)) {
        return Ok(0);
    }
    // A huge page of a child that was forked isn't in the pool for this.
    let pages = if kind.is_hugetlb() { 6 } else { [30, 300, 1000][random.below(3)] };
    let Some(memory) = Memory::try_new(test, kind, pages) else { return Ok(0) };
    let away = Memory::anonymous(if kind.is_hugetlb() { 1 } else { pages });
    let world = World { memory, away, series: random.one_in(2), clock: AtomicU64::new(1) };
    let removal = if random.one_in(3) { Removal::Zero } else { Removal::Save };
    let options = || {
        Options::new()
            .range(addresses(&world.memory))
            .buffer([0, 1 << 20, 16 << 20][pages % 3])
            .removal(removal)
    };
    let what = format!("{kind:?} of {pages} pages, {removal:?}, a series: {}", world.series);
    let mut series = world.series.then(|| options().series().unwrap());
    let stop = AtomicBool::new(false);
    let (mut log, mut taken, mut chain) = (Log::new(), Vec::new(), Held::new());
    thread::scope(|scope| {
        let ends = Stop(&stop);
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let pages = pages * thread / THREADS..pages * (thread + 1) / THREADS;
                let (world, stop, random) = (&world, &stop, Random(random.below(1 << 30) as u64));
                scope.spawn(move || {
                    let mut log = Log::new();
                    world.work(pages, random, stop, &mut log);
                    log
                })
            })
            .collect();
        for _ in 0..8 {
            let held = Arc::new(Mutex::new(Held::new()));
            let sink = Collect {
                held: Arc::clone(&held),
                page: world.memory.page(),
                random: Random(random.below(1 << 30) as u64),
                fails: random.one_in(6),
            };
            let fails = sink.fails;
            for _ in 0..random.below(200) {
                thread::yield_now();
            }
            let before = world.now();
            let snapshot = match &mut series {
                Some(series) => series.begin(sink),
                None => options().begin(sink),
            };
            let snapshot = snapshot.map_err(|error| format!("{what}: {error}"))?;
            let after = world.now();
            if snapshot.progress().pause > UNFOLLOWED {
                break;
            }
            let result = snapshot.wait();
            let ended = world.now();
            match result {
                Ok(_) => {}
                Err(_) if fails => continue,
                Err(error) => return Err(format!("{what}: {error}")),
            }
            let held = std::mem::take(&mut *held.lock().unwrap());
            let held = if world.series {
                chain.extend(held);
                chain.clone()
            } else {
                held
            };
            taken.push(Taken { began: (before, after), ended, held });
        }
        drop(ends);
        workers.into_iter().for_each(|worker| log.extend(worker.join().unwrap()));
        Ok(())
    })?;
    // For zeros of the balloon's kind a drop that goes on while the snapshot is at work may be in it.
    for (number, taken) in taken.iter().enumerate() {
        if taken.held.len() != pages {
            return Err(format!("{what}: snapshot {number} holds {} pages", taken.held.len()));
        }
        for (page, held) in &taken.held {
            let mut result = check(&log, taken, *page, *held);
            if removal == Removal::Zero && *held == Some(0) {
                let dropped =
                    |operation: &Operation| operation.name == "drop" && operation.began < taken.ended;
                if log.get(page).is_some_and(|log| log.iter().any(dropped)) {
                    result = Ok(());
                }
            }
            result.map_err(|error| format!("{what}: snapshot {number}: {error}"))?;
        }
    }
    Ok(taken.len())
}

fn number_from(variable: &str, or: u64) -> u64 {
    std::env::var(variable).map_or(or, |text| text.parse().expect("a number"))
}

#[test]
fn snapshots_are_what_the_model_says() {
    require!(WRITE_PROTECT);
    let limit = Duration::from_secs(number_from("USERFAULTFD_MODEL_SECONDS", 4));
    let seed = number_from("USERFAULTFD_MODEL_SEED", 1);
    let output = child::run(test_name!(), || {
        let (start, mut lives, mut members) = (Instant::now(), 0, 0);
        while start.elapsed() < limit {
            let seed = seed.wrapping_add(lives).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            match life(test_name!(), Random(seed)) {
                Ok(more) => members += more,
                Err(error) => panic!("life {lives}: {error}"),
            }
            lives += 1;
        }
        println!("{members} snapshots of {lives} memories are as they were");
    });
    if let Some(output) = output {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
        out.lines().filter(|line| line.contains("as they were")).for_each(show);
    }
}
