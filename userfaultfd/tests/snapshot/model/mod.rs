//! Random programs that write, drop, move, map, fork and collapse while snapshots are taken, against a plain model of
//! what memory held when each began.
//!
//! A page belongs to one thread, whose operations on it follow each other. Each notes when it began and ended, and what
//! the page holds afterwards. A snapshot is right if there is one moment while it began at which every page held what the
//! snapshot has of it. What may be missing of it, or be zero instead, is what the docs of the module say, and no more.
//!
//! `USERFAULTFD_MODEL_SECONDS` says how long it takes (and `USERFAULTFD_TEST_SECONDS` must be more than that),
//! `USERFAULTFD_MODEL_SEED` where the random numbers begin, `USERFAULTFD_MODEL_PROCESSES` how many processes do it side by
//! side: snapshots wait for much of their time. What fails says the number of its life; `USERFAULTFD_MODEL_LIFE` has that
//! life again and again.

mod clock;
mod log;
mod takes;
mod tally;
mod worker;

use std::panic;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::snapshot::Removal;
use userfaultfd::{FeatureFlags, RegisterMode};

use self::log::Log;
use self::takes::{CHECKED, Takes};
use self::tally::Tally;
use self::worker::{HUGE, Worker, World};
use crate::support::memory::Kind;
use crate::support::random::Random;
use crate::support::{child, features, maps, page, require, show, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const THREADS: usize = 3;

/// Says which of some processes this is.
const PROCESS: &str = "USERFAULTFD_MODEL_PROCESS";

/// Names the one life that is repeated.
const LIFE: &str = "USERFAULTFD_MODEL_LIFE";

/// Time after which everything must have happened that a machine can't lack.
const LONG: Duration = Duration::from_secs(50);

/// What that is.
const ALWAYS: [&str; 10] = [
    CHECKED[0],
    CHECKED[1],
    "done: a fork",
    "done: a page dropped",
    "done: a page moved over another",
    "done: a page written",
    "done: pages dropped",
    "done: pages mapped anew",
    "done: pages moved by mremap",
    "done: pages unmapped",
];

const HUGE_PAGES: &str = "pages: huge ones that the kernel made";

/// One memory with some snapshots of it, the last of which begins before `end`.
fn life(test: &'static str, mut random: Random, tally: &mut Tally, end: Instant) -> Result<(), String> {
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
    let Some(mut world) = World::new(test, kind, transparent, pages, moves) else { return Ok(()) };
    world.pace = [10, 25, 60][random.below(3)];
    tally.add(
        match kind {
            Kind::Anonymous if transparent => "lives: of huge pages that the kernel makes",
            Kind::Anonymous => "lives: of private anonymous memory",
            Kind::SharedAnonymous => "lives: of shared anonymous memory",
            Kind::Memfd => "lives: of a memfd",
            Kind::PrivateMemfd => "lives: of a private mapping of a memfd",
            Kind::Hugetlb => "lives: of hugetlb memory",
            Kind::PrivateHugetlb => "lives: of private hugetlb memory",
        },
        1,
    );
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
    tally.add(HUGE_PAGES, huge);
    let series = series.then(|| Takes::options(world, removal, buffer).series().unwrap());
    let mut takes = Takes::new(random, removal, series);
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
            if result.is_err() || world.is_over() || Instant::now() > end {
                break;
            }
        }
        stop.store(true, Ordering::SeqCst);
        round.wait();
        let mut log = Log::default();
        for worker in workers {
            let Worker { log: pages, changes, panicked, tally: done, .. } = worker.join().unwrap();
            if let Some(payload) = panicked {
                panic::resume_unwind(payload);
            }
            log.pages.extend(pages);
            log.changes.extend(changes);
            tally.join(done);
        }
        log
    });
    tally.join(takes.tally);
    let all = takes.taken.iter().enumerate();
    let checked = all.map(|(number, taken)| {
        log.check(taken, removal).map_err(|error| format!("snapshot {number}: {error}"))
    });
    result.and_then(|()| checked.collect()).map_err(|error| format!("{what}: {error}"))
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// One life after the other, in one of some processes.
fn lives(test: &'static str, seed: u64, limit: Duration) {
    let (end, mut tally) = (Instant::now() + limit, Tally::default());
    let process = number_from(PROCESS).expect("the number of this process");
    let first = Random::new(seed.wrapping_add(process << 32)).next();
    let mut life = number_from(LIFE).unwrap_or(first);
    while Instant::now() < end {
        if let Err(error) = self::life(test, Random::new(life), &mut tally, end) {
            panic!("{LIFE}={life}: {error}\n{tally}");
        }
        life = number_from(LIFE).unwrap_or(life.wrapping_add(1));
    }
    print!("{}", tally.lines());
}

#[test]
fn snapshots_match_the_model() {
    require!(WRITE_PROTECT);
    let limit = Duration::from_secs(number_from("USERFAULTFD_MODEL_SECONDS").unwrap_or(1));
    let seed = number_from("USERFAULTFD_MODEL_SEED").unwrap_or(1);
    let processes = number_from("USERFAULTFD_MODEL_PROCESSES").unwrap_or(1);
    let start = Instant::now();
    let prepare = |process: usize, command: &mut Command| {
        command.env(PROCESS, process.to_string());
    };
    let ended = child::run_several(test_name!(), processes as usize, prepare, || {
        lives(test_name!(), seed, limit);
    });
    let Some(ended) = ended else { return };
    let mut tally = Tally::default();
    for (status, output) in &ended {
        assert!(status.success(), "seed {seed}, {status}\n{output}");
        tally.join_lines(output);
    }
    let checked = CHECKED.iter().map(|what| tally.of(what)).sum::<u64>();
    let rate = checked as f64 / start.elapsed().as_secs_f64();
    show(&format!("{tally}{checked:>12}  snapshots in all, {rate:.0} a second, seed {seed}"));
    // Asked for by MADV_HUGEPAGE, which "never" forbids.
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let may_be_huge = enabled.is_ok_and(|text| !text.contains("[never]"));
    let transparent = tally.of("lives: of huge pages that the kernel makes");
    assert!(tally.of(HUGE_PAGES) > 0 || transparent == 0 || !may_be_huge, "no huge pages");
    if limit >= LONG {
        let never: Vec<_> = ALWAYS.iter().filter(|what| tally.of(what) == 0).collect();
        assert!(never.is_empty(), "never happened: {never:?}");
    }
}
