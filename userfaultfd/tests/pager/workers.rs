//! Workers that are added while the source keeps the others waiting.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use userfaultfd::pager::{FaultAround, PageData, Pager, Region};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::reader::{Reader, Seen, read, tell_signals};
use crate::scene::serve;
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{child, has_features, page, require, test_name, uffd};

/// The names of this process's threads.
fn names() -> impl Iterator<Item = String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
}

/// Threads of this process that resolve faults.
fn workers() -> usize {
    names().filter(|name| name.trim() == "uffd-pager").count()
}

/// Threads of this process that are any pager's.
fn threads() -> usize {
    names().filter(|name| name.starts_with("uffd-")).count()
}

/// A source each of whose reads waits until a number of them go on at the same time, once.
struct Together {
    wanted: usize,
    reading: Mutex<usize>,
    changed: Condvar,
    most: AtomicUsize,
    open: AtomicBool,
}

impl Together {
    const fn new(wanted: usize) -> Self {
        let (reading, most, open) = (Mutex::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        Self { wanted, reading, changed: Condvar::new(), most, open }
    }

    fn read(&self, bytes: &mut [u8]) -> std::io::Result<PageData> {
        let mut reading = self.reading.lock().unwrap();
        *reading += 1;
        self.most.fetch_max(*reading, Ordering::SeqCst);
        if *reading == self.wanted {
            self.open.store(true, Ordering::SeqCst);
            self.changed.notify_all();
        }
        let closed = |_: &mut usize| !self.open.load(Ordering::SeqCst);
        let mut reading = self.changed.wait_while(reading, closed).unwrap();
        *reading -= 1;
        bytes.fill(7);
        Ok(PageData::Data)
    }
}

#[test]
fn waiting_source_is_read_by_one_thread_a_fault() {
    require!();
    child::run_well(test_name!(), || {
        static SOURCE: Together = Together::new(6);
        let source = |_: u64, bytes: &mut [u8]| SOURCE.read(bytes);
        let memory =
            LazyMemory::builder(source).len(8 * page()).fault_around(FaultAround::Page).build().unwrap();
        assert_eq!(workers(), 1);
        let start = memory.as_ptr().addr();
        let readers: Vec<_> = (0..6).map(|number| Reader::of(start + number * page())).collect();
        // None of the reads ends before the last has begun.
        assert!(readers.iter().all(|reader| reader.wait() == Seen::Byte(7)));
        // They end again.
        wait_until(|| workers() == 1);
        assert_eq!(memory[6 * page()], 7);
    });
}

#[test]
fn suddenly_hanging_source_holds_up_no_other_memory() {
    require!();
    const PAGES: usize = 400;
    let (hangs, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let state = Arc::new((hangs, reads));
    let seen = Arc::clone(&state);
    let hanging = move |_: u64, bytes: &mut [u8]| {
        let (hangs, reads) = &*seen;
        reads.fetch_add(1, Ordering::SeqCst);
        wait_until(|| !hangs.load(Ordering::SeqCst));
        bytes.fill(1);
        Ok(PageData::Data)
    };
    let fast = |_: u64, bytes: &mut [u8]| {
        bytes.fill(2);
        Ok(PageData::Data)
    };
    let pager = Arc::new(Pager::new().unwrap());
    let one = LazyMemory::builder(hanging).len(PAGES * page()).fault_around(FaultAround::Page);
    let one = one.pager(&pager).build().unwrap();
    let other = LazyMemory::builder(fast).len(PAGES * page()).fault_around(FaultAround::Page);
    let other = other.pager(&pager).build().unwrap();
    let (hangs, reads) = &*state;
    assert!((0..100).all(|number| (one[number * page()], other[number * page()]) == (1, 2)));
    hangs.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let before = reads.load(Ordering::SeqCst);
        let reader = scope.spawn(|| one[200 * page()]);
        wait_until(|| reads.load(Ordering::SeqCst) > before);
        let others = scope.spawn(|| (100..PAGES).all(|number| other[number * page()] == 2));
        let start = Instant::now();
        while !others.is_finished() && start.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        let are_there = others.is_finished();
        hangs.store(false, Ordering::SeqCst);
        assert!(others.join().unwrap());
        assert_eq!(reader.join().unwrap(), 1);
        assert!(are_there, "they waited for the other source");
    });
}

#[test]
fn added_threads_stay_within_max_threads() {
    require!();
    child::run_well(test_name!(), || {
        static SOURCE: Together = Together::new(2);
        let memory = Memory::anonymous(64);
        let source = |_: u64, bytes: &mut [u8]| {
            // Slow after that, too.
            SOURCE.read(bytes)?;
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(200) {
                std::thread::yield_now();
            }
            Ok(PageData::Data)
        };
        let pager = Pager::builder().max_threads(2).build().unwrap();
        let region = Region::new(memory.start().expose_provenance(), memory.len(), source)
            .fault_around(FaultAround::Page);
        serve(&pager, uffd(FeatureFlags::empty()), region);
        std::thread::scope(|scope| {
            for first in 0..4 {
                let memory = &memory;
                scope.spawn(move || (first..64).step_by(4).for_each(|page| assert_eq!(memory.read(page), 7)));
            }
        });
        assert_eq!(SOURCE.most.load(Ordering::SeqCst), 2);
        drop(pager);
        // A thread that was joined is in /proc for a moment longer.
        wait_until(|| workers() == 0);
    });
}

#[test]
fn threads_come_and_go_while_the_process_forks() {
    require!();
    child::run_well(test_name!(), || {
        if !has_features(test_name!(), FeatureFlags::EVENT_FORK) {
            return;
        }
        const ROUNDS: usize = 20;
        let memory = Memory::anonymous(ROUNDS * 4);
        // The forking thread holds the allocator's locks until a worker reads its event.
        let source = |_: u64, bytes: &mut [u8]| {
            std::thread::park_timeout(Duration::from_millis(1));
            bytes.fill(7);
            Ok(PageData::Data)
        };
        let pager = Pager::new().unwrap();
        let region = Region::new(memory.start().expose_provenance(), memory.len(), source)
            .fault_around(FaultAround::Page);
        serve(&pager, uffd(FeatureFlags::EVENT_FORK), region);
        for round in 0..ROUNDS {
            let readers: Vec<_> =
                (0..4).map(|number| Reader::of(memory.at(4 * round + number).addr())).collect();
            child::fork(|| assert_eq!(memory.read(4 * round), 7)).succeed();
            assert!(readers.iter().all(|reader| reader.wait() == Seen::Byte(7)));
        }
    });
}

/// How many reads have begun, and the pager that the last of them drops.
static READS: AtomicUsize = AtomicUsize::new(0);
static DROPPED: Mutex<Option<Pager>> = Mutex::new(None);

/// A pager's source drops it in one of `reads` reads at the same time: on the worker that there is, or on one that was
/// added.
fn drop_in_read(reads: usize) {
    tell_signals();
    let memory = Memory::anonymous(4);
    let source = move |_: u64, bytes: &mut [u8]| {
        if READS.fetch_add(1, Ordering::SeqCst) + 1 < reads {
            wait_until(|| READS.load(Ordering::SeqCst) == reads);
        } else {
            let pager = DROPPED.lock().unwrap().take();
            assert!(pager.is_some());
            drop(pager);
        }
        bytes.fill(7);
        Ok(PageData::Data)
    };
    let pager = Pager::new().unwrap();
    let region =
        Region::new(memory.start().expose_provenance(), memory.len(), source).fault_around(FaultAround::Page);
    serve(&pager, uffd(FeatureFlags::empty()), region);
    *DROPPED.lock().unwrap() = Some(pager);
    let readers: Vec<_> = (0..reads)
        .map(|number| {
            let reader = Reader::of(memory.at(number).addr());
            wait_until(|| READS.load(Ordering::SeqCst) > number);
            reader
        })
        .collect();
    // What another thread reads is filled; what waits for the drop itself can't be.
    let (last, others) = readers.split_last().unwrap();
    assert!(others.iter().all(|reader| reader.wait() == Seen::Byte(7)));
    assert_eq!(last.wait(), Seen::POISON);
    assert_eq!(read(memory.at(3).addr()), Seen::POISON);
    wait_until(|| threads() == 0);
}

#[test]
fn source_may_drop_its_pager() {
    require!(FeatureFlags::POISON);
    child::run_well(test_name!(), || drop_in_read(1));
}

#[test]
fn source_may_drop_its_pager_on_worker_that_was_added() {
    require!(FeatureFlags::POISON);
    child::run_well(test_name!(), || drop_in_read(2));
}
