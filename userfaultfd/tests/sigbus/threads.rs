//! Many threads, many memories.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::support::{page, require};
use super::{builder, byte, lazy, next};

const THREADS: usize = 16;

#[test]
fn threads_fill_each_page_once() {
    require!();
    let page = page();
    for block in [1, 16] {
        let pages = 1024;
        let memory = builder(pages).block(block * page).build().unwrap();
        let barrier = Barrier::new(THREADS);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (memory, barrier) = (&memory, &barrier);
                scope.spawn(move || {
                    // Half of them all go the same way, and meet on every page.
                    let mut state = thread as u64 / 2 * 2 * (thread as u64 % 2);
                    barrier.wait();
                    for step in 0..2 * pages {
                        let number = if thread % 2 == 0 { step % pages } else { next(&mut state) % pages };
                        let at = number * page + step % page;
                        assert_eq!(memory[at], byte(at), "{at:#x}");
                    }
                });
            }
        });
        let statistics = memory.statistics();
        assert_eq!((statistics.fills, statistics.present_pages), (pages as u64, pages as u64));
        assert_eq!(statistics.zero_fills, 0, "what is there isn't taken for removed");
        let filling = statistics.missing_faults - statistics.duplicates;
        assert!(filling <= pages as u64, "{filling} faults that filled");
        let (timed, faults) = (statistics.fault_latency.count(), statistics.missing_faults);
        assert!(timed > 0 && timed >= faults / 8 && timed <= faults, "{timed} of {faults} were timed");
    }
}

#[test]
fn writes_of_many_threads_stay() {
    require!();
    let page = page();
    let mut memory = builder(2000).block(8 * page).build().unwrap();
    thread::scope(|scope| {
        // Neighbouring pages are different threads'.
        let mut of_threads: Vec<Vec<&mut [u8]>> = (0..THREADS).map(|_| Vec::new()).collect();
        for (number, chunk) in memory.chunks_mut(page).enumerate() {
            of_threads[number % THREADS].push(chunk);
        }
        for chunks in of_threads {
            scope.spawn(move || {
                for chunk in chunks {
                    chunk[7] = 0;
                }
            });
        }
    });
    for (at, here) in memory.iter().enumerate() {
        assert_eq!(*here, if at % page == 7 { 0 } else { byte(at) }, "{at:#x}");
    }
}

#[test]
fn memories_come_and_go_beside_faults() {
    require!();
    let page = page();
    let (running, rounds) = (AtomicBool::new(true), AtomicUsize::new(0));
    thread::scope(|scope| {
        for thread in 0..4 {
            let (running, rounds) = (&running, &rounds);
            scope.spawn(move || {
                let mut state = thread;
                while running.load(Ordering::Relaxed) {
                    let memory = lazy(16);
                    for _ in 0..16 {
                        let at = next(&mut state) % memory.len();
                        assert_eq!(memory[at], byte(at));
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let stay: Vec<_> = (0..100).map(|_| lazy(4)).collect();
        let mut state = 99;
        while rounds.load(Ordering::Relaxed) < 100 {
            let mut passing: Vec<_> = (0..20).map(|number| lazy(number + 1)).collect();
            while !passing.is_empty() {
                let memory = passing.swap_remove(next(&mut state) % passing.len());
                let at = next(&mut state) % memory.len();
                assert_eq!(memory[at], byte(at));
            }
        }
        running.store(false, Ordering::Relaxed);
        for memory in &stay {
            assert_eq!((memory[0], memory[3 * page]), (byte(0), byte(3 * page)));
        }
    });
}

#[test]
fn fill_continues_beside_faults() {
    require!();
    let page = page();
    let pages = 2048;
    let memory = builder(pages).block(4 * page).build().unwrap();
    thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                let mut state = thread;
                for _ in 0..pages {
                    let at = next(&mut state) % memory.len();
                    assert_eq!(memory[at], byte(at));
                }
            });
        }
        memory.fill(|_| {}).unwrap();
    });
    let statistics = memory.statistics();
    assert_eq!((statistics.fills, statistics.missing_pages), (pages as u64, 0));
}
