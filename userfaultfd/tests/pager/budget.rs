//! Memory with a limit: what leaves comes back, whatever other threads read and write.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::pager::{Budget, Error, FaultAround, FillOrder, PageData, Pager, Problem, RetryPolicy};
use userfaultfd::{FeatureFlags, LazyBuilder, LazyMemory};

use crate::scene;
use crate::support::random::Random;
use crate::support::{child, maps, page, proc, require, test_name};

/// A byte of the source.
fn byte(at: u64) -> u8 {
    (at / 4096 * 31 + at % 251) as u8
}

fn content(offset: u64, bytes: &mut [u8]) -> io::Result<PageData> {
    for (at, to) in bytes.iter_mut().enumerate() {
        *to = byte(offset + at as u64);
    }
    Ok(PageData::Data)
}

fn builder(pages: usize, budget: &Budget) -> LazyBuilder {
    LazyMemory::builder(content).len(pages * page()).budget(budget)
}

#[test]
fn memory_larger_than_its_budget_stays_within_it() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (pages, most) = (4096, 256);
    let budget = Budget::new(most * page());
    let memory = builder(pages, &budget).build().unwrap();
    let (start, done) = (memory.as_ptr().addr(), AtomicBool::new(false));
    let largest = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut largest = 0;
            while !done.load(Ordering::Relaxed) {
                largest = largest.max(budget.resident());
                let mapped = maps::sum_of(start..start + pages * page(), "Rss");
                assert!(mapped <= (most + 64) * page(), "{mapped} bytes are mapped");
            }
            largest
        });
        for _ in 0..2 {
            assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    // What is reserved by a thread that gives it back at once, and waits, counts for a moment.
    assert!(largest <= (most + 64) * page(), "{largest} bytes were resident");
    let statistics = budget.statistics();
    assert!(statistics.evictions >= 2 * (pages - most) as u64 - 64, "{statistics:?}");
    assert_eq!((statistics.spilled, statistics.unwritten), (0, 0), "nothing was written");
    assert!(statistics.refaults > 0, "{statistics:?}");
    drop(memory);
    assert_eq!(budget.resident(), 0);
}

#[test]
fn pages_that_were_written_come_back_from_the_spill_file() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let pages = 2048;
    let budget = Budget::new(64 * page());
    let mut memory = builder(pages, &budget).build().unwrap();
    for round in 1..=2_u8 {
        for at in (0..pages).filter(|at| at % 3 != 0) {
            memory[at * page() + 7] = at as u8 ^ round;
        }
        for at in (0..pages).rev() {
            let (start, found) = (at * page(), &memory[at * page()..][..16]);
            let expected = |offset: usize| match offset {
                7 if at % 3 != 0 => at as u8 ^ round,
                _ => byte((start + offset) as u64),
            };
            assert!(found.iter().enumerate().all(|(offset, byte)| *byte == expected(offset)), "page {at}");
        }
    }
    let statistics = budget.statistics();
    assert!(statistics.spilled >= 2 * (pages as u64 * 2 / 3 - 64), "{statistics:?}");
}

#[test]
fn page_in_use_outlasts_a_scan() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let pages = 4096;
    let budget = Budget::new(256 * page());
    let reads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&reads);
    let source = move |offset: u64, bytes: &mut [u8]| {
        counted.fetch_add(usize::from(offset == 0), Ordering::Relaxed);
        content(offset, bytes)
    };
    let memory = LazyMemory::builder(source)
        .len(pages * page())
        .fault_around(FaultAround::Page)
        .budget(&budget)
        .build()
        .unwrap();
    for at in 0..pages {
        // One page is in use all the time, beside a scan.
        assert_eq!((memory[0], memory[at * page()]), (byte(0), byte((at * page()) as u64)));
    }
    let statistics = budget.statistics();
    // Where it is dropped once all the same, since room was needed at once, it is known to be in use from then on.
    assert!(statistics.second_chances + statistics.refaults > 0, "{statistics:?}");
    assert!(reads.load(Ordering::Relaxed) <= 4, "the page in use was read {reads:?} times");
}

/// A plain array beside memory of ten times its budget.
fn model(seed: u64, steps: usize, prepare: impl FnOnce(LazyBuilder) -> LazyBuilder) {
    let (pages, most) = (600, 60);
    let budget = Budget::new(most * page());
    let mut memory = prepare(builder(pages, &budget)).build().unwrap();
    let mut expected: Vec<u8> = (0..pages * page()).map(|at| byte(at as u64)).collect();
    let mut random = Random::new(seed);
    for step in 0..steps {
        let (at, len) = scene::random_place(&mut random, expected.len());
        let what = random.below(100);
        match what {
            0..80 => scene::access(what, &mut memory, &mut expected, at..at + len, step),
            80..87 => {
                let mut bytes = vec![0; len];
                assert_eq!(memory.read_at(at, &mut bytes).unwrap(), len);
                assert!(bytes == expected[at..at + len], "step {step}");
            }
            87..93 => {
                let bytes = vec![step as u8 ^ 0x55; len];
                assert_eq!(memory.write_at(at, &bytes).unwrap(), len);
                expected[at..at + len].copy_from_slice(&bytes);
            }
            93..97 => {
                let pinned = memory.pin(at..at + len).unwrap();
                let other = random.below(expected.len());
                assert_eq!(memory[other], expected[other]);
                assert!(pinned[..] == expected[at..at + len], "step {step}");
            }
            97 => memory.try_populate(at..at + 8 * len).unwrap(),
            98 => budget.resize((20 + random.below(most)) * page()).unwrap(),
            _ => {
                let background =
                    memory.background(FillOrder::Ranges(std::iter::once(at..at + len).collect())).unwrap();
                assert_eq!(memory[at], expected[at], "step {step}");
                assert!(background.wait().failed.is_empty());
            }
        }
    }
    assert!(memory[..] == expected[..]);
    assert!(budget.statistics().evictions > 0);
}

#[test]
fn random_accesses_find_what_a_plain_array_has() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let steps = std::env::var("USERFAULTFD_MODEL_STEPS").ok().and_then(|steps| steps.parse().ok());
    let seed = Instant::now().elapsed().as_nanos() as u64 | u64::from(std::process::id()) << 20 | 1;
    println!("seed {seed}");
    model(seed, steps.unwrap_or(10_000), |builder| builder);
    model(seed ^ 0x9999, steps.unwrap_or(10_000), |builder| {
        builder.fault_around(FaultAround::Page).threads(2)
    });
}

/// Threads that each have some bytes of every page.
fn share_pages(prepare: impl FnOnce(LazyBuilder) -> LazyBuilder, steps: usize) {
    const THREADS: usize = 4;
    let (pages, stripe) = (400, page() / THREADS);
    let budget = Budget::new(40 * page());
    let memory = prepare(builder(pages, &budget)).build().unwrap();
    let raw = memory.as_raw_slice().cast::<AtomicU8>() as usize;
    let cell = |at: usize| {
        let cell = std::ptr::with_exposed_provenance::<AtomicU8>(raw + at);
        #[expect(unsafe_code, reason = "bytes that several threads write")]
        // SAFETY: a byte of the memory, which outlives the threads, and which nothing but atomics accesses here.
        unsafe {
            &*cell
        }
    };
    thread::scope(|scope| {
        for number in 0..THREADS {
            scope.spawn(move || {
                let mut random = Random::new(77 + number as u64);
                let mut expected = vec![None; pages];
                for step in 0..steps {
                    let at = if step % 3 == 0 { random.below(pages) } else { random.below(pages / 5) };
                    let place = at * page() + number * stripe + 1;
                    if random.below(3) == 0 {
                        cell(place).store(step as u8, Ordering::Relaxed);
                        expected[at] = Some(step as u8);
                    }
                    let found = cell(place).load(Ordering::Relaxed);
                    assert_eq!(found, expected[at].unwrap_or(byte(place as u64)), "page {at}, step {step}");
                }
                for (at, expected) in expected.iter().enumerate() {
                    let place = at * page() + number * stripe + 1;
                    assert_eq!(cell(place).load(Ordering::Relaxed), expected.unwrap_or(byte(place as u64)));
                }
            });
        }
    });
    assert!(budget.statistics().spilled > 0);
}

#[test]
fn threads_that_share_pages_lose_no_write() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    share_pages(|builder| builder, 6000);
    share_pages(|builder| builder.threads(3).fault_around(FaultAround::Page), 6000);
}

#[test]
fn memories_share_a_budget_and_leave_it_when_they_end() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let budget = Budget::new(128 * page());
    let pager = Arc::new(Pager::builder().threads(2).build().unwrap());
    let one = builder(512, &budget).pager(&pager).build().unwrap();
    thread::scope(|scope| {
        let budget = &budget;
        for number in 0..2 {
            let pager = &pager;
            scope.spawn(move || {
                for round in 0..10_u8 {
                    let mut other = builder(300, budget).pager(pager).build().unwrap();
                    other[page() * 7] = round ^ number;
                    let find = |(at, found): (usize, &u8)| at == page() * 7 || *found == byte(at as u64);
                    assert!(other.iter().enumerate().all(find));
                    assert_eq!(other[page() * 7], round ^ number);
                }
            });
        }
        for _ in 0..5 {
            assert!(one.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
        }
    });
    assert!(budget.resident() <= 128 * page());
    drop(one);
    assert_eq!(budget.resident(), 0);
}

#[test]
fn pinned_pages_stay_and_no_more_than_half_can_be() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let budget = Budget::new(100 * page());
    let memory = builder(1000, &budget).build().unwrap();
    let pinned = memory.pin(5..40 * page()).unwrap();
    let start = memory.as_ptr().addr();
    assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
    let is_resident = || {
        let mut resident = [0_u8; 40];
        #[expect(unsafe_code, reason = "asks the kernel")]
        // SAFETY: the kernel writes a byte for each page.
        let asked = unsafe {
            libc::mincore(std::ptr::with_exposed_provenance_mut(start), 40 * page(), resident.as_mut_ptr())
        };
        assert_eq!(asked, 0);
        resident.iter().all(|byte| byte & 1 == 1)
    };
    assert!(is_resident());
    let refused = memory.pin(500 * page()..511 * page()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
    assert!(pinned.iter().enumerate().all(|(at, found)| *found == byte(at as u64 + 5)));
    drop(pinned);
    drop(memory.pin(500 * page()..511 * page()).unwrap());
    budget.resize(20 * page()).unwrap();
    proc::wait_until(|| !is_resident());
    assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
    // Cut to the memory, as other ranges are.
    assert_eq!(memory.pin(999 * page() + 1..usize::MAX).unwrap().len(), page() - 1);
    assert!(memory.pin(5000 * page()..6000 * page()).unwrap().is_empty());
}

/// Populating more than the budget passes over all of it once, as a read of all of it does.
#[test]
fn populate_beyond_the_budget_reads_each_page_once() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (pages, most) = (512, 64);
    for around in
        [FaultAround::Page, FaultAround::Block(16 * page()), FaultAround::Adaptive { most: 1 << 20 }]
    {
        for tries in [false, true] {
            let reads: Arc<[AtomicUsize]> = (0..pages).map(|_| AtomicUsize::new(0)).collect();
            let counted = Arc::clone(&reads);
            let source = move |offset: u64, bytes: &mut [u8]| {
                for at in (0..bytes.len()).step_by(page()) {
                    counted[(offset as usize + at) / page()].fetch_add(1, Ordering::Relaxed);
                }
                content(offset, bytes)
            };
            let budget = Budget::new(most * page());
            let memory = LazyMemory::builder(source).len(pages * page()).fault_around(around).budget(&budget);
            let memory = memory.build().unwrap();
            let done = AtomicBool::new(false);
            let largest = thread::scope(|scope| {
                let watcher = scope.spawn(|| {
                    let mut largest = 0;
                    while !done.load(Ordering::Relaxed) {
                        largest = largest.max(budget.resident());
                    }
                    largest
                });
                if tries {
                    memory.try_populate(0..usize::MAX).unwrap();
                } else {
                    memory.populate(0..usize::MAX);
                }
                done.store(true, Ordering::Relaxed);
                watcher.join().unwrap()
            });
            let what = format!("{around:?}, tries: {tries}, {:?}", budget.statistics());
            let reads: Vec<_> = reads.iter().map(|reads| reads.load(Ordering::Relaxed)).collect();
            let other = reads.iter().position(|reads| *reads != 1);
            assert_eq!(other, None, "{:?}, {what}", other.map(|page| reads[page]));
            // What is reserved by a thread that gives it back at once, and waits, counts for a moment.
            assert!(largest <= (most + 64) * page(), "{largest} bytes were resident, {what}");
            assert!(budget.resident() <= most * page(), "{what}");
            assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)), "{what}");
        }
    }
}

#[test]
fn many_threads_copy_under_a_small_budget() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let budget = Budget::new(24 * page());
    let memory = builder(500, &budget).build().unwrap();
    thread::scope(|scope| {
        let memory = &memory;
        for thread in 0..12 {
            scope.spawn(move || {
                let mut random = Random::new(thread);
                let mut bytes = vec![0; 6 * page()];
                for _ in 0..100 {
                    let at = random.below(494) * page();
                    assert_eq!(memory.read_at(at, &mut bytes).unwrap(), bytes.len());
                    assert!(bytes.iter().zip(at..).all(|(found, at)| *found == byte(at as u64)));
                    memory.try_populate(at..at + 3 * page()).unwrap();
                }
            });
        }
    });
    // A pin of the program isn't waited for.
    let _pinned = memory.pin(0..12 * page()).unwrap();
    let refused = memory.read_at(100 * page(), &mut [0; 10]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
}

#[test]
fn what_a_budget_excludes_is_refused_by_name() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let budget = Budget::new(64 * page());
    let refused = builder(64, &Budget::new(15 * page())).build().unwrap_err();
    assert!(matches!(refused, Error::BudgetTooSmall { .. }), "{refused}");
    assert!(matches!(budget.resize(15 * page()), Err(Error::BudgetTooSmall { .. })));
    assert_eq!(budget.bytes(), 64 * page());
    let missing = builder(64, &budget).spill("/no/such/folder").build().unwrap_err();
    assert!(missing.to_string().contains("/no/such/folder"), "{missing}");
    let Error::Spill { error, .. } = missing else { panic!("{missing}") };
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let huge = builder(64, &budget).huge_pages(1 << 21).build();
    assert!(matches!(
        huge,
        Err(Error::NotWithBudget { .. } | Error::NoHugePages { .. } | Error::PageSize { .. })
    ));
    let memory = builder(64, &budget).build().unwrap();
    let filled = memory.fill(|_| {}).unwrap_err();
    assert!(matches!(filled, Error::NotWithBudget { .. }), "{filled}");
    #[cfg(feature = "tracking")]
    assert!(matches!(memory.tracker(), Err(Error::NotWithBudget { .. })));
    #[cfg(feature = "snapshot")]
    assert!(matches!(memory.series(), Err(userfaultfd::snapshot::Error::Fill(Error::NotWithBudget { .. }))));
    let pager = Arc::new(Pager::new().unwrap());
    let shared = builder(64, &budget).pager(&pager).build().unwrap();
    assert!(matches!(pager.finish(|_| {}), Err(Error::NotWithBudget { .. })));
    assert_eq!((memory[5], shared[6]), (byte(5), byte(6)));
}

#[test]
fn full_disk_is_reported_and_loses_nothing() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        let pages = 300;
        let budget = Budget::new(64 * page());
        let problems = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&problems);
        let on_problem = move |problem: &Problem| {
            if let Problem::WriteBack { error, .. } = problem {
                told.lock().unwrap().push(error.raw_os_error());
            }
        };
        let mut memory = builder(pages, &budget).on_problem(on_problem).build().unwrap();
        let limit = |bytes: libc::rlim_t| {
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
            #[expect(unsafe_code, reason = "a limit of this process")]
            // SAFETY: touches no memory but the structure.
            let set = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
            assert_eq!(set, 0);
        };
        // No file may be longer, as if the disk were full.
        limit(page() as libc::rlim_t);
        for at in 0..pages {
            memory[at * page()] = at as u8 ^ 0x3c;
        }
        proc::wait_until(|| !problems.lock().unwrap().is_empty());
        assert_eq!(problems.lock().unwrap()[0], Some(libc::EFBIG));
        assert!(budget.statistics().unwritten > 0);
        assert!((0..pages).all(|at| memory[at * page()] == at as u8 ^ 0x3c));
        // There is room again: what couldn't leave does.
        limit(libc::RLIM_INFINITY);
        proc::wait_until(|| budget.resident() <= 64 * page());
        assert!((0..pages).all(|at| memory[at * page()] == at as u8 ^ 0x3c));
    });
}

#[test]
fn page_that_cannot_be_reread_is_an_error_not_zeros() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::POISON);
    let budget = Budget::new(32 * page());
    let fails = Arc::new(AtomicBool::new(false));
    let failing = Arc::clone(&fails);
    let source = move |offset: u64, bytes: &mut [u8]| match failing.load(Ordering::Relaxed) {
        true => Err(io::Error::other("on purpose")),
        false => content(offset, bytes),
    };
    let retry = RetryPolicy { attempts: 2, delay: Duration::from_millis(1) };
    let memory = LazyMemory::builder(source).len(400 * page()).retry(retry).budget(&budget).build().unwrap();
    assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
    fails.store(true, Ordering::Relaxed);
    let mut bytes = [0; 10];
    let error = memory.read_at(3, &mut bytes).unwrap_err();
    assert!(error.to_string().contains("byte 0x0 of the memory"), "{error}");
    fails.store(false, Ordering::Relaxed);
    assert_eq!(memory.read_at(3, &mut bytes).unwrap(), 10);
    assert_eq!(bytes[0], byte(3));
}

#[test]
fn source_under_the_same_budget_doesnt_block_it() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let budget = Budget::new(24 * page());
    let base = Arc::new(builder(500, &budget).build().unwrap());
    let source = {
        let base = Arc::clone(&base);
        move |offset: u64, bytes: &mut [u8]| {
            let start = offset as usize;
            bytes.copy_from_slice(&base[start..start + bytes.len()]);
            Ok(PageData::Data)
        }
    };
    let above = LazyMemory::builder(source).len(500 * page()).threads(2).budget(&budget).build().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| assert!(base.iter().enumerate().all(|(at, found)| *found == byte(at as u64))));
        assert!(above.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
    });
    drop(above);
    assert!(budget.resident() <= 24 * page());
}

#[test]
fn childs_copy_of_limited_memory_ends_without_a_word() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let budget = Budget::new(32 * page());
    let memory = builder(300, &budget).build().unwrap();
    assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
    child::fork(|| {
        assert!(matches!(budget.resize(64 * page()), Err(Error::OtherProcess)));
        assert!(matches!(builder(10, &budget).build(), Err(Error::OtherProcess)));
        assert!(memory.pin(0..10).is_err());
        assert_eq!(budget.statistics().staged, 0);
    })
    .succeed();
    assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at as u64)));
}

#[test]
fn spill_file_has_no_name_and_goes_with_its_memory() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let dir: PathBuf =
        std::env::temp_dir().join(format!("{}-{}", test_name!().replace("::", "-"), std::process::id()));
    fs::create_dir(&dir).unwrap();
    let budget = Budget::new(32 * page());
    let mut memory = builder(300, &budget).spill(&dir).build().unwrap();
    (0..300).for_each(|at| memory[at * page()] = 9);
    assert!(budget.statistics().spilled > 0);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    let open = || {
        let fds = fs::read_dir("/proc/self/fd").unwrap();
        fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
            .filter(|path| path.starts_with(&dir))
            .count()
    };
    assert_eq!(open(), 1);
    drop(memory);
    proc::wait_until(|| open() == 0);
    fs::remove_dir(&dir).unwrap();
}
