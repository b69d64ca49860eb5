//! Random programs that write, drop, move, map, fork and collapse while snapshots are taken, against a plain model of
//! what memory held when each began.
//!
//! A page belongs to one thread, whose operations on it follow each other. Each notes when it began and ended, and what
//! the page holds afterwards. A snapshot is right if there is one moment while it began at which every page held what the
//! snapshot has of it. What may be missing of it, or be zero instead, is what the docs of the module say, and no more.
//!
//! `USERFAULTFD_MODEL_SECONDS` says how long it takes (and `USERFAULTFD_TEST_SECONDS` must be more than that), and
//! `USERFAULTFD_MODEL_SEED` where the random numbers begin.

mod log;
mod takes;
mod worker;

use std::panic;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::snapshot::Removal;
use userfaultfd::{FeatureFlags, RegisterMode};

use self::log::{Held, Log};
use self::takes::Takes;
use self::worker::{HUGE, Worker, World};
use crate::support::memory::Kind;
use crate::support::random::Random;
use crate::support::{child, features, maps, page, require, show, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const THREADS: usize = 3;

/// Lets a little time pass; now and then others run.
fn dawdle(random: &mut Random, limit: usize) {
    (0..random.below(limit * 200)).for_each(|_| std::hint::spin_loop());
    if random.one_in(12) {
        thread::yield_now();
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
