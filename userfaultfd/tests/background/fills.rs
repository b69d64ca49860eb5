//! Filling in the background.

use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{
    BackgroundFill, BytesSource, Error, FaultAround, FillOrder, PageData, Pager, RetryPolicy, Statistics,
};

use crate::support::proc::wait_until;
use crate::support::{page, require};
use crate::{Watched, byte, in_steps, step};

fn lazy(source: &Watched, pages: usize) -> LazyMemory {
    let memory = LazyMemory::builder(source.clone()).len(pages * page()).fault_around(FaultAround::Page);
    memory.threads(2).build().unwrap()
}

fn assert_content(memory: &LazyMemory) {
    for (number, page) in memory.chunks(page()).enumerate() {
        assert!(page.iter().all(|here| *here == byte(number)), "page {number}");
    }
}

#[test]
fn background_fills_all_in_order_once() {
    require!();
    let (source, pages) = (Watched::new(), 10 * step() + 3);
    let memory = lazy(&source, pages);
    assert_eq!(memory[5 * page()], byte(5));
    let background = memory.background(FillOrder::Ascending).unwrap();
    let progress = background.wait();
    assert_eq!((progress.done, progress.total), ((pages * page()) as u64, (pages * page()) as u64));
    let statistics = memory.statistics();
    assert_eq!((statistics.missing_pages, statistics.faults()), (0, 1));
    // The page that was there cuts the step that it lies in.
    let steps = in_steps(std::iter::once(0..pages)).into_iter().flat_map(|step| {
        let parts = if step.contains(&5) { [step.start..5, 6..step.end] } else { [step, 0..0] };
        parts.into_iter().filter(|part| !part.is_empty())
    });
    source.assert_reads(&std::iter::once(5..6).chain(steps).collect::<Vec<_>>());
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
    let background = memory.background(FillOrder::Ranges(ranges)).unwrap();
    assert_eq!(background.wait().done, 6 * page as u64);
    source.assert_reads(&in_steps([90..91, 50..53, 3..4, 99..100]));
    assert_eq!(memory.statistics().present_pages, 6);
}

#[test]
fn background_yields_to_running_fault() {
    require!();
    let (source, pages) = (Watched::new(), 20 * step());
    let memory = lazy(&source, pages);
    let last = pages - 1;
    source.set(|state| state.tickets = Some(0));
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory[last * page()]);
        source.wait_until(|state| state.waiting == 1);
        let background = memory.background(FillOrder::Ascending).unwrap();
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
fn fault_does_not_wait_for_the_background() {
    require!();
    let (source, pages) = (Watched::new(), 4 * step());
    let memory = lazy(&source, pages);
    source.set(|state| state.tickets = Some(0));
    let background = memory.background(FillOrder::Ascending).unwrap();
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
fn background_pauses_resumes_and_stops() {
    require!();
    let (source, pages) = (Watched::new(), 500 * step());
    let memory = lazy(&source, pages);
    source.set(|state| state.tickets = Some(0));
    let background = memory.background(FillOrder::Ascending).unwrap();
    source.wait_until(|state| state.waiting == 1);
    background.pause();
    source.set(|state| state.tickets = None);
    wait_until(|| background.progress().done == (step() * page()) as u64);
    thread::park_timeout(Duration::from_millis(10));
    assert_eq!(source.reads().len(), 1, "{background:?}");
    source.set(|state| state.tickets = Some(0));
    background.resume();
    // If the machine is busy, the read counts as slow.
    source.wait_until(|state| state.waiting >= 1 && state.reads.len() >= 2);
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
fn background_rate_limit_holds_and_can_be_lifted() {
    require!();
    let (source, pages) = (Watched::new(), 64 * step());
    let memory = lazy(&source, pages);
    let background =
        memory.background(FillOrder::Ranges(std::iter::once(0..8 * step() * page()).collect())).unwrap();
    background.pause();
    let before = background.progress().done;
    // A step each 10 ms.
    background.limit(Some((step() * page()) as u64 * 100));
    let start = Instant::now();
    let done = background.wait().done - before;
    let steps = (done / (step() * page()) as u64) as u32;
    // The one that it was at, and the first, may go at once.
    assert!(start.elapsed() >= Duration::from_millis(10) * steps.saturating_sub(2), "{steps} steps");

    let slow = memory.background(FillOrder::Ascending).unwrap();
    slow.limit(Some(1)); // for years
    wait_until(|| slow.progress().done > 0);
    slow.limit(None);
    assert_eq!(slow.wait().done, (pages * page()) as u64);
    assert_content(&memory);
}

#[test]
fn waiting_background_accepts_higher_limit() {
    require!();
    for (bytes, raised) in [(4, Some(1 << 40)), (4, None), (1, Some(1 << 40))] {
        let (source, pages) = (Watched::new(), bytes * step());
        let memory = lazy(&source, pages);
        let background = memory.background(FillOrder::Ascending).unwrap();
        background.limit(Some(1)); // for hours
        wait_until(|| background.progress().done > 0);
        background.limit(Some(2));
        background.limit(raised);
        assert_eq!(background.wait().done, (pages * page()) as u64);
    }
}

#[test]
fn background_step_is_a_block() {
    require!();
    let (source, block, pages) = (Watched::new(), 3 * step() + 1, 14 * step());
    let memory = LazyMemory::builder(source.clone()).len(pages * page()).block(block * page());
    let memory = memory.build().unwrap();
    let ranges = vec![page()..(block + 2) * page(), 4 * block * page()..pages * page()];
    assert_eq!(memory.background(FillOrder::Ranges(ranges)).unwrap().wait().failed, []);
    source.assert_reads(&[1..block, block..block + 2, 4 * block..pages]);
}

#[test]
fn slow_source_is_read_concurrently_once_a_page() {
    require!();
    const MIB: usize = 1 << 20;
    // How many threads, how many readers, how much for a fault: the number of reads, and how much each.
    for (threads, readers, most, at_once, bytes) in
        [(1, 0, 2 * MIB, 4, 2 * MIB), (6, 0, MIB / 2, 6, MIB / 2), (1, 8, 16 * MIB, 9, MIB)]
    {
        let (source, pages) = (Watched::new(), (at_once + 4) * bytes / page());
        source.set(|state| (state.slow, state.tickets) = (true, Some(0)));
        let memory = LazyMemory::builder(source.clone()).len(pages * page());
        let memory = memory.read_ahead(readers, most).threads(threads).build().unwrap();
        let background = memory.background(FillOrder::Ascending).unwrap();
        // Each that ends brings one more thread.
        for reads in 1..at_once {
            source.wait_until(|state| state.waiting == reads && state.tickets == Some(0));
            source.set(|state| state.tickets = Some(1));
        }
        source.wait_until(|state| state.waiting == at_once);
        source.set(|state| state.tickets = None);
        assert_eq!(background.wait().done, (pages * page()) as u64);
        let reads = source.reads();
        assert!(reads.iter().any(|read| read.len() == bytes / page()), "{reads:?}");
        assert!(reads.iter().all(|read| read.len() <= bytes / page()), "{reads:?}");
        assert_eq!(reads.iter().map(ExactSizeIterator::len).sum::<usize>(), pages, "{reads:?}");
        source.wait_until(|state| state.at_once == at_once);
        assert_content(&memory);
    }
}

#[test]
fn source_that_hangs_keeps_no_other_region_waiting() {
    require!();
    let pager = Arc::new(Pager::builder().threads(2).build().unwrap());
    let memory = |source: &Watched| {
        let memory = LazyMemory::builder(source.clone()).len(8 * step() * page());
        memory.fault_around(FaultAround::Page).pager(&pager).build().unwrap()
    };
    let hanging = Watched::new();
    hanging.set(|state| state.tickets = Some(0));
    let hang: Vec<_> = (0..12).map(|_| memory(&hanging)).collect();
    let (filled, replayed) = hang.split_at(6);
    thread::scope(|scope| {
        let backgrounds: Vec<_> =
            replayed.iter().map(|memory| memory.background(FillOrder::Ascending).unwrap()).collect();
        for memory in filled {
            scope.spawn(|| memory.fill(|_| {}).unwrap());
        }
        hanging.wait_until(|state| state.waiting == hang.len());
        let source = Watched::new();
        let [one, other] = [memory(&source), memory(&source)];
        let outcome = one.background(FillOrder::Ascending).unwrap().wait();
        assert_eq!(outcome.done, outcome.total);
        other.fill(|_| {}).unwrap();
        assert_eq!(hanging.reads().len(), hang.len());
        hanging.set(|state| state.tickets = None);
        drop(backgrounds);
    });
}

#[test]
fn background_continues_while_other_source_hangs() {
    require!();
    let (hanging, source) = (Watched::new(), Watched::new());
    // The first reads count as slow, until one has shown otherwise: both kinds hang.
    for warm in [0, 100] {
        let pager = Arc::new(Pager::builder().threads(4).build().unwrap());
        let memory = |source: &Watched| {
            let memory = LazyMemory::builder(source.clone()).len(120 * step() * page());
            memory.fault_around(FaultAround::Page).pager(&pager).build().unwrap()
        };
        let [hangs, other] = [memory(&hanging), memory(&source)];
        assert!((0..warm).all(|number| hangs[number * page()] == byte(number)));
        hanging.set(|state| state.tickets = Some(0));
        thread::scope(|scope| {
            let reader = scope.spawn(|| hangs[110 * page()]);
            hanging.wait_until(|state| state.waiting == 1);
            let background = other.background(FillOrder::Ascending).unwrap();
            let (start, total) = (Instant::now(), background.progress().total);
            while !background.is_finished() && start.elapsed() < Duration::from_secs(20) {
                thread::yield_now();
            }
            let progress = background.progress();
            hanging.set(|state| state.tickets = None);
            assert_eq!(reader.join().unwrap(), byte(110));
            assert_eq!(progress.done, total, "after {warm} reads");
        });
    }
}

#[test]
fn source_may_drop_the_background_that_reads_it() {
    require!();
    // A slow source is read by several threads: one drops the fill while another one reads.
    for slow in [false, true] {
        let slot: Arc<Mutex<Option<BackgroundFill>>> = Arc::default();
        let dropping = Arc::clone(&slot);
        let reading = (Mutex::new(0), Condvar::new());
        let source = move |offset: u64, bytes: &mut [u8]| {
            let start = Instant::now();
            while slow && start.elapsed() < Duration::from_millis(1) {
                thread::yield_now();
            }
            if offset > 0 {
                let (count, changed) = &reading;
                let mut count = count.lock().unwrap();
                *count += 1;
                changed.notify_all();
                drop(changed.wait_while(count, |count| slow && *count < 2).unwrap());
                // Not with the lock, for which the other one may wait: a drop waits for its read.
                let dropped = dropping.lock().unwrap().take();
                drop(dropped);
            }
            bytes.fill(7);
            Ok(PageData::Data)
        };
        let len = 100 * step() * page();
        let memory = LazyMemory::builder(source).len(len).fault_around(FaultAround::Page).build().unwrap();
        {
            let mut slot = slot.lock().unwrap();
            *slot = Some(memory.background(FillOrder::Ascending).unwrap());
        }
        // The step that drops it is done to its end.
        let has_gone_on = |statistics: Statistics| {
            statistics.present_pages >= 2 * step() as u64 || statistics.source_errors > 0
        };
        wait_until(|| has_gone_on(memory.statistics()));
        wait_until(|| slot.lock().unwrap().is_none());
        assert_eq!(memory.statistics().source_errors, 0);
        assert_eq!(memory[len - 1], 7);
        assert!(memory.statistics().missing_pages > 0, "it has ended");
    }
}

#[test]
fn zeros_are_filled_without_being_read_in_few_calls() {
    require!();
    let (source, pages) = (Watched::new(), 100 * step());
    source.set(|state| state.zeros = step()..99 * step());
    let memory = lazy(&source, pages);
    memory.background(FillOrder::Ascending).unwrap().wait();
    source.assert_reads(&[0..step(), 99 * step()..pages]);
    let statistics = memory.statistics();
    assert_eq!(statistics.zero_fills, 98 * step() as u64);
    assert_eq!((memory[2 * step() * page()], memory[99 * step() * page()]), (0, byte(99 * step())));
}

#[test]
fn fill_reads_no_known_zeros() {
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
fn background_leaves_undelivered_pages_missing() {
    require!();
    for attempts in [1, 8] {
        let (source, pages) = (Watched::new(), 4 * step());
        let bad = step() + step() / 2;
        source.set(|state| state.bad = bad..bad + 1);
        let retry = RetryPolicy { attempts, delay: Duration::ZERO };
        let memory = LazyMemory::builder(source.clone()).len(pages * page()).fault_around(FaultAround::Page);
        let memory = memory.retry(retry).build().unwrap();
        let outcome = memory.background(FillOrder::Ascending).unwrap().wait();
        assert_eq!(outcome.done, outcome.total);
        let failed: Vec<_> =
            outcome.failed.iter().map(|failed| (failed.range.start, failed.range.len())).collect();
        assert_eq!(failed, [(bad * page(), page())]);
        assert!(outcome.error.is_some(), "{outcome:?}");
        let statistics = memory.statistics();
        assert_eq!((statistics.missing_pages, statistics.poisoned), (1, 0));
        source.set(|state| state.bad = 0..0);
        assert_content(&memory);
        assert_eq!(memory.statistics().faults(), 1);
    }
}

#[test]
fn background_ends_with_the_memory() {
    require!();
    let source = Watched::new();
    let memory = lazy(&source, 100 * step());
    source.set(|state| state.tickets = Some(0));
    let background = memory.background(FillOrder::Ascending).unwrap();
    source.wait_until(|state| state.waiting == 1);
    drop(memory);
    source.set(|state| state.tickets = None);
    wait_until(|| background.is_finished());
    assert!(source.reads().len() < 100);
}

/// Whether the thread of this name sleeps.
fn sleeps(name: &str) -> bool {
    std::fs::read_dir("/proc/self/task").unwrap().any(|task| {
        let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
        stat.is_ok_and(|stat| stat.contains(&format!("({name}) S ")))
    })
}

/// Drops both, in an order, in a thread of that name. The source goes on once that thread waits.
fn drop_beside_reads(
    source: &Watched,
    memory: LazyMemory,
    background: BackgroundFill,
    (memory_first, name): (bool, &str),
) {
    let end = move || {
        if memory_first {
            drop(memory);
            drop(background);
        } else {
            drop(background);
            drop(memory);
        }
    };
    let ending = thread::Builder::new().name(name.to_owned()).spawn(end).unwrap();
    wait_until(|| sleeps(name));
    source.set(|state| state.tickets = None);
    ending.join().unwrap();
}

#[test]
fn stop_waits_for_one_read_of_each_thread() {
    require!();
    for (memory_first, name) in [(false, "ends-background"), (true, "ends-memory")] {
        let source = Watched::new();
        source.set(|state| state.slow = true);
        let pages = 1000 * step();
        let memory = lazy(&source, pages);
        let background = memory.background(FillOrder::Ranges(vec![0..pages * page() / 2, 0..pages * page()]));
        let background = background.unwrap();
        source.wait_until(|state| state.at_once > 1);
        source.set(|state| state.tickets = Some(0));
        let before = source.reads().len();
        drop_beside_reads(&source, memory, background, (memory_first, name));
        // Those that went on are among them before, or were about to begin.
        let after = source.reads().len();
        let mut threads = 0;
        source.set(|state| threads = state.at_once);
        assert!(after - before <= threads, "{name}: {before} reads, then {after}, by {threads} threads");
    }
}

/// All threads that may read do so when it is stopped, and none begins another read.
#[test]
fn stop_begins_no_read_in_any_thread() {
    require!();
    for (read_ahead, at_once) in [(0, 4), (8, 9)] {
        for (memory_first, name) in [(false, "drop-background"), (true, "drop-memory")] {
            let source = Watched::new();
            source.set(|state| (state.slow, state.tickets) = (true, Some(0)));
            let memory = LazyMemory::builder(source.clone()).len(1000 * step() * page());
            let memory = memory.read_ahead(read_ahead, 1 << 20).threads(1).build().unwrap();
            let background = memory.background(FillOrder::Ascending).unwrap();
            // Each that ends brings one more thread.
            for reads in 1..at_once {
                source.wait_until(|state| state.waiting == reads && state.tickets == Some(0));
                source.set(|state| state.tickets = Some(1));
            }
            source.wait_until(|state| state.waiting == at_once);
            let before = source.reads().len();
            drop_beside_reads(&source, memory, background, (memory_first, name));
            assert_eq!(source.reads().len(), before, "{name}, {read_ahead} threads that read ahead");
        }
    }
}

#[test]
fn memory_that_is_filled_has_nothing_to_fill() {
    require!();
    for memory in [
        LazyMemory::builder(BytesSource::new([1; 100_000])).build().unwrap(),
        LazyMemory::sigbus(BytesSource::new([1; 100_000])).build().unwrap(),
    ] {
        memory.fill(|_| {}).unwrap();
        assert!(matches!(memory.background(FillOrder::Ascending), Err(Error::Filled)));
    }
}

#[test]
fn memory_without_pager_is_filled_in_background_too() {
    require!();
    let len = 100 * step() * page();
    let content: Vec<u8> = (0..len).map(|at| byte(at / page())).collect();
    let memory =
        LazyMemory::sigbus(BytesSource::new(content)).fault_around(FaultAround::Page).build().unwrap();
    let background = memory.background(FillOrder::Ascending).unwrap();
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
    assert_eq!((statistics.missing_pages, statistics.fills), (0, (len / page()) as u64));
    assert_content(&memory);
}
