//! Filling in the background.

use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{Around, BytesSource, Error, Order, Retry};

use crate::support::proc::wait_until;
use crate::support::{page, require};
use crate::{Watched, byte, in_steps, step};

fn lazy(source: &Watched, pages: usize) -> LazyMemory {
    let memory = LazyMemory::builder(source.clone()).len(pages * page()).around(Around::Page);
    memory.threads(2).build().unwrap()
}

fn assert_content(memory: &LazyMemory) {
    for (number, page) in memory.chunks(page()).enumerate() {
        assert!(page.iter().all(|here| *here == byte(number)), "page {number}");
    }
}

#[test]
fn all_is_filled_in_order_and_nothing_twice() {
    require!();
    let (source, pages) = (Watched::new(), 10 * step() + 3);
    let memory = lazy(&source, pages);
    assert_eq!(memory[5 * page()], byte(5));
    let background = memory.background(Order::Ascending).unwrap();
    let progress = background.wait();
    assert_eq!((progress.done, progress.total), ((pages * page()) as u64, (pages * page()) as u64));
    let statistics = memory.statistics();
    assert_eq!((statistics.absent_pages, statistics.faults()), (0, 1));
    let reads = source.reads();
    assert_eq!(reads[0], 5..6);
    assert!(reads[1..].is_sorted_by_key(|read| read.start), "{reads:?}");
    assert!(reads.iter().all(|read| read.len() <= step()), "{reads:?}");
    assert_eq!(reads.iter().map(ExactSizeIterator::len).sum::<usize>(), pages);
    assert_content(&memory);
    assert_eq!(memory.statistics().faults(), 1);
}

#[test]
fn ranges_are_filled_in_their_order_and_nothing_else() {
    require!();
    let (source, page) = (Watched::new(), page());
    let memory = lazy(&source, 100);
    let ranges = vec![
        90 * page..91 * page,
        50 * page + 7..52 * page + 1,
        10 * page..10 * page,
        3 * page + 1..3 * page + 2,
        99 * page + 5..usize::MAX,
        200 * page..300 * page,
    ];
    let background = memory.background(Order::Ranges(ranges)).unwrap();
    assert_eq!(background.wait().done, 6 * page as u64);
    assert_eq!(source.reads(), in_steps([90..91, 50..53, 3..4, 99..100]));
    assert_eq!(memory.statistics().present_pages, 6);
}

#[test]
fn nothing_is_begun_while_a_fault_is_being_answered() {
    require!();
    let (source, pages) = (Watched::new(), 20 * step());
    let memory = lazy(&source, pages);
    let last = pages - 1;
    source.set(|state| state.tickets = Some(0));
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory[last * page()]);
        source.wait_until(|state| state.waiting == 1);
        let background = memory.background(Order::Ascending).unwrap();
        // It looks again and again meanwhile.
        thread::park_timeout(Duration::from_millis(20));
        assert_eq!((background.progress().done, source.reads().len()), (0, 1));
        // The step that it is at lets the fault through, if the other way round.
        source.set(|state| state.tickets = Some(1));
        assert_eq!(reader.join().unwrap(), byte(last));
        source.wait_until(|state| state.waiting == 1);
        assert_eq!(source.reads().last(), Some(&(0..step())));
        source.set(|state| state.tickets = None);
        assert_eq!(background.wait().done, (pages * page()) as u64);
    });
    assert_content(&memory);
}

#[test]
fn a_fault_does_not_wait_for_the_background() {
    require!();
    let (source, pages) = (Watched::new(), 4 * step());
    let memory = lazy(&source, pages);
    source.set(|state| state.tickets = Some(0));
    let background = memory.background(Order::Ascending).unwrap();
    source.wait_until(|state| state.waiting == 1);
    let last = pages - 1;
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory[last * page()]);
        source.wait_until(|state| state.waiting == 2);
        assert_eq!(source.reads(), [0..step(), last..last + 1]);
        source.set(|state| state.tickets = None);
        assert_eq!(reader.join().unwrap(), byte(last));
    });
    background.wait();
    assert_content(&memory);
}

#[test]
fn it_pauses_goes_on_and_ends_when_it_is_told() {
    require!();
    let (source, pages) = (Watched::new(), 500 * step());
    let memory = lazy(&source, pages);
    source.set(|state| state.tickets = Some(1));
    let background = memory.background(Order::Ascending).unwrap();
    source.wait_until(|state| state.waiting == 1 && state.reads.len() == 2);
    background.pause();
    source.set(|state| state.tickets = None);
    wait_until(|| background.progress().done == 2 * (step() * page()) as u64);
    thread::park_timeout(Duration::from_millis(10));
    assert_eq!(source.reads().len(), 2, "{background:?}");
    source.set(|state| state.tickets = Some(1));
    background.resume();
    source.wait_until(|state| state.waiting == 1 && state.reads.len() == 4);
    assert!(!background.is_finished());
    thread::scope(|scope| {
        let dropping = scope.spawn(|| drop(background));
        while !dropping.is_finished() {
            source.set(|state| state.tickets = Some(1));
            thread::yield_now();
        }
    });
    source.set(|state| state.tickets = None);
    let reads = source.reads().len();
    assert!(reads < 500, "{reads} reads");
    thread::park_timeout(Duration::from_millis(5));
    assert_eq!(source.reads().len(), reads);
    assert_content(&memory);
}

#[test]
fn a_limit_holds_and_can_be_lifted() {
    require!();
    let (source, pages) = (Watched::new(), 64 * step());
    let memory = lazy(&source, pages);
    let background =
        memory.background(Order::Ranges(std::iter::once(0..8 * step() * page()).collect())).unwrap();
    background.pause();
    let before = background.progress().done;
    // A step each 10 ms.
    background.limit(Some((step() * page()) as u64 * 100));
    let start = Instant::now();
    let done = background.wait().done - before;
    let steps = (done / (step() * page()) as u64) as u32;
    // The one that it was at, and the first, may go at once.
    assert!(start.elapsed() >= Duration::from_millis(10) * steps.saturating_sub(2), "{steps} steps");

    let slow = memory.background(Order::Ascending).unwrap();
    slow.limit(Some(1)); // for years
    wait_until(|| slow.progress().done > 0);
    slow.limit(None);
    assert_eq!(slow.wait().done, (pages * page()) as u64);
    assert_content(&memory);
}

#[test]
fn zeros_are_filled_without_being_read_in_few_calls() {
    require!();
    let (source, pages) = (Watched::new(), 100 * step());
    source.set(|state| state.zeros = step()..99 * step());
    let memory = lazy(&source, pages);
    memory.background(Order::Ascending).unwrap().wait();
    assert_eq!(source.reads(), [0..step(), 99 * step()..pages]);
    let statistics = memory.statistics();
    assert_eq!(statistics.zero_fills, 98 * step() as u64);
    assert_eq!((memory[2 * step() * page()], memory[99 * step() * page()]), (0, byte(99 * step())));
}

#[test]
fn filling_all_reads_no_zeros_either() {
    require!();
    let (source, pages) = (Watched::new(), 100 * step());
    source.set(|state| state.zeros = step()..100 * step());
    let memory = lazy(&source, pages);
    memory.fill(|_| {}).unwrap();
    let read: usize = source.reads().iter().map(ExactSizeIterator::len).sum();
    assert!(read <= (1 << 20) / page(), "{read} pages read");
    let statistics = memory.statistics();
    assert!(statistics.zero_fills > 80 * step() as u64, "{statistics}");
    for (number, here) in memory.chunks(page()).enumerate() {
        assert_eq!(here[0], if number < step() { byte(number) } else { 0 });
    }
}

#[test]
fn what_the_source_does_not_deliver_is_left_to_who_needs_it() {
    require!();
    for attempts in [1, 8] {
        let (source, pages) = (Watched::new(), 4 * step());
        let bad = step() + step() / 2;
        source.set(|state| state.bad = bad..bad + 1);
        let retry = Retry { attempts, delay: Duration::ZERO };
        let memory = LazyMemory::builder(source.clone()).len(pages * page()).around(Around::Page);
        let memory = memory.retry(retry).build().unwrap();
        let progress = memory.background(Order::Ascending).unwrap().wait();
        assert_eq!(progress.done, progress.total);
        let statistics = memory.statistics();
        assert_eq!((statistics.absent_pages, statistics.poisoned), (1, 0));
        source.set(|state| state.bad = 0..0);
        assert_content(&memory);
        assert_eq!(memory.statistics().faults(), 1);
    }
}

#[test]
fn it_ends_with_the_memory() {
    require!();
    let source = Watched::new();
    let memory = lazy(&source, 100 * step());
    source.set(|state| state.tickets = Some(1));
    let background = memory.background(Order::Ascending).unwrap();
    source.wait_until(|state| state.waiting == 1);
    source.set(|state| state.tickets = Some(1));
    drop(memory);
    source.set(|state| state.tickets = None);
    wait_until(|| background.is_finished());
    assert!(source.reads().len() < 100);
}

#[test]
fn memory_that_is_filled_has_nothing_to_fill() {
    require!();
    for memory in [
        LazyMemory::builder(BytesSource::new([1; 100_000])).build().unwrap(),
        LazyMemory::sigbus(BytesSource::new([1; 100_000])).build().unwrap(),
    ] {
        memory.fill(|_| {}).unwrap();
        assert!(matches!(memory.background(Order::Ascending), Err(Error::NotServed)));
    }
}

#[test]
fn memory_without_a_pager_is_filled_in_the_background_too() {
    require!();
    let len = 100 * step() * page();
    let content: Vec<u8> = (0..len).map(|at| byte(at / page())).collect();
    let memory = LazyMemory::sigbus(BytesSource::new(content)).around(Around::Page).build().unwrap();
    let background = memory.background(Order::Ascending).unwrap();
    thread::scope(|scope| {
        for first in 0..3 {
            let memory = &memory;
            scope.spawn(move || {
                for number in (first..len / page()).rev().step_by(7) {
                    assert_eq!(memory[number * page()], byte(number));
                }
            });
        }
    });
    assert_eq!(background.wait().done, len as u64);
    let statistics = memory.statistics();
    assert_eq!((statistics.absent_pages, statistics.fills), (0, (len / page()) as u64));
    assert_content(&memory);
}
