//! What a snapshot holds while the program goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::mpsc;
use std::thread;

use userfaultfd::snapshot::{Options, Snapshot};
use userfaultfd::{FeatureFlags, Reason, RegisterMode};

use crate::image::{Image, Stop, addresses, content, number, wait_until_in_fault};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{child, features, page, proc, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// Memory of every kind that can be protected.
fn each(test: &str, pages: usize) -> impl Iterator<Item = Memory> {
    memory::each(test, RegisterMode::WRITE_PROTECT, pages).inspect(|memory| println!("{memory:?}"))
}

#[test]
fn snapshot_holds_memory_of_its_beginning() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 9) {
        let before = number(&memory, 1);
        let image = Image::closed();
        let snapshot = Snapshot::begin(addresses(&memory), image.clone()).unwrap();
        image.wait_for_piece();
        thread::scope(|scope| {
            let memory = &memory;
            for first in 0..3 {
                scope.spawn(move || (first..9).step_by(3).for_each(|page| memory.write(page, 99)));
            }
            image.open();
        });
        let progress = snapshot.wait().unwrap().progress;
        assert_eq!(image.content(&memory), before);
        assert_eq!(content(&memory), [99; 9]);
        assert_eq!((progress.total, progress.saved), (memory.len() as u64, memory.len() as u64));
        assert_eq!(progress.gone, 0);
        assert!(!progress.pause.is_zero());
        let geometry = image.with(|delivered| delivered.geometry.clone().unwrap());
        assert!(!geometry.incremental);
        assert_eq!(geometry.regions.len(), 1);
        assert_eq!(geometry.regions[0].page, memory.page() as u64);
        assert_eq!(geometry.regions[0].addresses.start, memory.start().addr() as u64);
        // Nobody handles faults any more, and another may.
        (0..9).for_each(|page| memory.write(page, 98));
        drop(Snapshot::begin(addresses(&memory), Image::new()).unwrap());
    }
}

#[test]
fn untouched_memory_is_zero() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 4) {
        memory.write(2, 7);
        let image = Image::closed();
        let snapshot = Snapshot::begin(addresses(&memory), image.clone()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| (0..4).for_each(|page| memory.write(page, 99)));
            image.open();
        });
        snapshot.wait().unwrap();
        assert_eq!(image.content(&memory), [0, 0, 7, 0], "{memory:?}");
    }
}

/// The walk stands still, with all its buffers full, and a write to the last page goes on.
#[test]
fn pages_about_to_be_written_come_first() {
    require!(WRITE_PROTECT);
    let pages = 16 * (256 << 10) / page();
    let memory = Memory::anonymous(pages);
    let before = number(&memory, 1);
    let image = Image::closed();
    let snapshot = Options::new().range(addresses(&memory)).buffer(0).begin(image.clone()).unwrap();
    image.wait_for_piece();
    memory.write(pages - 1, 99);
    memory.write(pages - 2, 99);
    assert_eq!(snapshot.progress().on_write, 2 * page() as u64);
    assert!(!snapshot.is_finished());
    image.open();
    let progress = snapshot.wait().unwrap().progress;
    assert_eq!(image.content(&memory), before);
    assert_eq!(progress.on_write, 2 * page() as u64);
    let order = image.with(|delivered| delivered.order.clone());
    let place = |page: usize| order.iter().position(|first| *first == page as u64).unwrap();
    assert!(place(pages - 1) < place(pages - 2));
    assert!(place(pages - 2) <= 4, "{order:?}");
}

/// With a sink that takes nothing, as many writes go on as there are buffers; the next one waits.
#[test]
fn writers_wait_for_a_sink_that_is_behind() {
    require!(WRITE_PROTECT);
    let pages = 16 * (256 << 10) / page();
    let memory = Memory::anonymous(pages);
    let before = number(&memory, 1);
    let image = Image::closed();
    let snapshot = Options::new().range(addresses(&memory)).buffer(0).begin(image.clone()).unwrap();
    image.wait_for_piece();
    (0..4).for_each(|page| memory.write(pages - 1 - page, 99));
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let memory = &memory;
        let writer = scope.spawn(move || {
            tell.send(proc::thread_id()).unwrap();
            memory.write(pages - 9, 99);
        });
        wait_until_in_fault(told.recv().unwrap());
        assert!(!writer.is_finished());
        assert_eq!(snapshot.progress().on_write, 4 * page() as u64);
        // Reading is free.
        assert_eq!(memory.read(pages - 9), before[pages - 9]);
        image.open();
        writer.join().unwrap();
    });
    let progress = snapshot.wait().unwrap().progress;
    assert_eq!(image.content(&memory), before);
    assert!(progress.on_write <= 5 * page() as u64);
}

/// A cut in time: what was written after another write is in the snapshot only if that one is. Few pages are protected at
/// the moment itself, many are ahead of it, while they are written.
#[test]
fn snapshot_holds_no_write_without_earlier_ones() {
    require!(WRITE_PROTECT);
    for pages in [8, 600] {
        let each = memory::each_of(test_name!(), &Kind::SMALL, RegisterMode::WRITE_PROTECT, pages);
        for memory in each {
            let all = 0..pages;
            all.clone().for_each(|page| set(&memory, page, 0));
            let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
            // Each snapshot of a series holds what was written since the one before.
            let mut series = Options::new().range(addresses(&memory)).series().unwrap();
            let mut restored = vec![0; pages];
            thread::scope(|scope| {
                let _stop = Stop(&stop);
                scope.spawn(|| {
                    for round in 1.. {
                        all.clone().for_each(|page| set(&memory, page, round));
                        rounds.store(round, Ordering::SeqCst);
                        if stop.load(Ordering::SeqCst) {
                            break;
                        }
                    }
                });
                for _ in 0..15 {
                    let least = rounds.load(Ordering::SeqCst);
                    let image = Image::new();
                    series.begin(image.clone()).unwrap().wait().unwrap();
                    put(&image, &memory, &mut restored);
                    let (first, last) = (restored[0], restored[pages - 1]);
                    assert!(restored.is_sorted_by(|a, b| a >= b) && first <= last + 1, "{restored:?}");
                    assert!(last >= least, "{restored:?} {least}");
                }
            });
            let image = Image::new();
            series.begin(image.clone()).unwrap().wait().unwrap();
            put(&image, &memory, &mut restored);
            assert!(all.zip(&restored).all(|(page, held)| get(&memory, page) == *held));
        }
    }
}

/// Writes the first word of a page, after all that was written before. Not as an atomic: a sanitizer has locks of its own
/// while it writes one, and this may wait.
fn set(memory: &Memory, page: usize, word: u64) {
    // SAFETY: aligned, inside the mapping, which one thread at a time accesses.
    unsafe { memory.at(page).cast::<u64>().write_volatile(word) };
    fence(Ordering::SeqCst);
}

fn get(memory: &Memory, page: usize) -> u64 {
    // SAFETY: as above.
    unsafe { memory.at(page).cast::<u64>().read_volatile() }
}

/// Puts what an image of memory in small pages holds over the first words of all.
fn put(image: &Image, memory: &Memory, words: &mut [u64]) {
    let held = image.pages();
    image.with(|delivered| {
        for page in held {
            words[page] = u64::from_ne_bytes(*delivered.bytes[page * memory.page()..].first_chunk().unwrap());
        }
    });
}

#[test]
fn several_ranges_lie_one_behind_the_other() {
    require!(WRITE_PROTECT);
    // One test has huge pages at a time, and one memory of it.
    let kinds = [&Kind::SMALL[..], &[Kind::Hugetlb]].concat();
    let memories = memory::each_of(test_name!(), &kinds, RegisterMode::WRITE_PROTECT, 3);
    let memories: Vec<Memory> = memories.collect();
    let mut options = Options::new();
    let mut before = Vec::new();
    for (index, memory) in memories.iter().enumerate() {
        let numbers = number(memory, 10 * index);
        before.extend((1..3).map(|page| (memory.page(), numbers[page])));
        options = options.range(memory.range(1, 2));
    }
    let image = Image::new();
    let progress = options.begin(image.clone()).unwrap().wait().unwrap().progress;
    let mut at = 0;
    image.with(|delivered| {
        for (page, byte) in before {
            assert_eq!(delivered.bytes[at], byte);
            at += page;
        }
        assert_eq!(delivered.bytes.len(), at);
        let regions = &delivered.geometry.as_ref().unwrap().regions;
        let starts: Vec<u64> = regions.iter().map(|region| region.addresses.start).collect();
        assert_eq!(starts, memories.iter().map(|memory| memory.at(1).addr() as u64).collect::<Vec<_>>());
        assert!(regions.iter().zip(&memories).all(|(region, memory)| region.page == memory.page() as u64));
    });
    assert_eq!(progress.total, at as u64);
}

#[test]
fn forked_child_writes_freely_outside_snapshot() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        for memory in each(test_name!(), 4) {
            if memory.kind().is_shared() {
                continue; // the child's writes are in the same pages, through another mapping
            }
            if memory.kind().is_hugetlb() && !features().contains(FeatureFlags::WP_UNPOPULATED) {
                continue; // before Linux 6.4 the child would fault for ever
            }
            let before = number(&memory, 1);
            let image = Image::closed();
            let snapshot = Snapshot::begin(addresses(&memory), image.clone()).unwrap();
            let status = child::fork(|| (0..4).for_each(|page| memory.write(page, 77))).wait();
            thread::scope(|scope| {
                scope.spawn(|| memory.write(3, 99));
                image.open();
            });
            // Not before: what fails while the sink waits would hang in the drop of the snapshot.
            assert_eq!(status, 0, "{memory:?}: wait status of the child");
            snapshot.wait().unwrap();
            assert_eq!(image.content(&memory), before);
        }
    });
}

#[test]
fn unprotectable_memory_is_refused() {
    require!(WRITE_PROTECT);
    let memory = Memory::new(Kind::Anonymous, 2);
    memory.write(0, 1);
    let all = addresses(&memory);
    let begin = |range| Snapshot::begin(range, Image::new()).map(drop).unwrap_err();
    for range in [all.start + 1..all.end, all.start..all.start, all.end..all.start] {
        let error = begin(range.clone());
        let userfaultfd::snapshot::Error::Kernel(userfaultfd::Error::Refused { refusal, .. }) = error else {
            panic!("{range:x?} {error:?}")
        };
        let reason = refusal.reason();
        let is_told = matches!(reason, Reason::Unaligned { .. } | Reason::Empty | Reason::BeyondAddressSpace);
        assert!(is_told, "{range:x?} {reason:?}");
    }
    let twice = Options::new().range(all.clone()).range(all.clone()).begin(Image::new()).map(drop);
    let Err(userfaultfd::snapshot::Error::Kernel(userfaultfd::Error::AlreadyTracked { start, end })) = twice
    else {
        panic!("{twice:?}")
    };
    assert_eq!(start..end, all);
    // Nothing is left of what failed.
    let progress = Snapshot::begin(all, Image::new()).unwrap().wait().unwrap().progress;
    assert_eq!(progress.total, memory.len() as u64);
}
