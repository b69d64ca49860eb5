//! Memory that is tracked and saved while a pager fills it.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use userfaultfd::dirty::Ranges;
use userfaultfd::pager::{BytesSource, FaultAround, PageData};
use userfaultfd::snapshot::{self, Content};
use userfaultfd::{DirtyTracker, Errno, Error, FeatureFlags, LazyMemory, pager};

use crate::reader::{Seen, read, tell_signals};
use crate::scene::{Pages, Problems, byte, can_poison};
use crate::support::memory::Memory;
use crate::support::{child, features, has, hugetlb, page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const NONE: [usize; 0] = [];

/// The pages that are told.
fn told(memory: &LazyMemory, ranges: Ranges<'_>) -> Vec<usize> {
    pages_of(memory.as_ptr().addr(), page(), ranges)
}

fn pages_of(start: usize, page: usize, ranges: Ranges<'_>) -> Vec<usize> {
    let pages = |range: Range<usize>| (range.start - start) / page..(range.end - start) / page;
    ranges.flat_map(|range| pages(range.unwrap())).collect()
}

/// A tracker. `None`, visibly, on kernels that don't report protection.
fn tracker(test: &str, memory: &LazyMemory) -> Option<DirtyTracker> {
    if !has(test, "protection in pagemap", features().contains(FeatureFlags::WP_HUGETLBFS_SHMEM)) {
        return None;
    }
    Some(memory.tracker().unwrap())
}

fn memory(pages: usize, around: FaultAround) -> (LazyMemory, Pages) {
    let source = Pages::new(page());
    let memory =
        LazyMemory::builder(source.clone()).len(pages * page()).fault_around(around).build().unwrap();
    (memory, source)
}

#[test]
fn pages_that_are_filled_are_not_written() {
    require!(WRITE_PROTECT);
    for around in [FaultAround::Page, FaultAround::Block(4 * page())] {
        let (mut memory, source) = memory(32, around);
        // There before it is tracked: one that is read, one that is written.
        assert_eq!(memory[0], byte(0));
        memory[4 * page()] = 99;
        let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
        assert_eq!(told(&memory, tracker.take()), NONE);
        assert_eq!(memory[8 * page()], byte(8));
        assert_eq!(told(&memory, tracker.take()), NONE, "filled");
        memory[0] = 90;
        memory[8 * page()] = 91;
        memory[16 * page() + 5] = 92; // missing
        assert_eq!(told(&memory, tracker.dirty()), [0, 8, 16]);
        assert_eq!(told(&memory, tracker.take()), [0, 8, 16]);
        assert_eq!(told(&memory, tracker.take()), NONE);
        assert_eq!((memory[16 * page()], memory[16 * page() + 5]), (byte(16), 92));
        memory[16 * page()] = 93;
        assert_eq!(told(&memory, tracker.take()), [16]);

        // It stays tracked when all is there.
        memory.fill(|_| {}).unwrap();
        assert_eq!(memory.missing().unwrap_or_default(), []);
        assert_eq!(told(&memory, tracker.take()), NONE);
        memory[24 * page()] = 94;
        memory[0] = 95;
        assert_eq!(told(&memory, tracker.take()), [0, 24]);
        source.were_read_once(32);

        // And can be tracked anew.
        drop(tracker);
        memory[1] = 96;
        let mut tracker = memory.tracker().unwrap();
        memory[2 * page()] = 97;
        assert_eq!(told(&memory, tracker.take()), [2]);
        drop(tracker);
        memory.fill(|_| {}).unwrap();
        assert!(matches!(memory.missing(), Err(pager::Error::Filled)));
        let mut tracker = memory.tracker().unwrap();
        memory[3 * page()] = 98;
        assert_eq!(told(&memory, tracker.take()), [3]);
        let first: Vec<u8> = memory[..5 * page()].iter().step_by(page()).copied().collect();
        assert_eq!(first, [95, byte(1), 97, 98, 99]);
    }
}

#[test]
fn pages_that_source_knows_to_be_zero_are_not_written() {
    require!(WRITE_PROTECT);
    let zeros = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
    let mut memory =
        LazyMemory::builder(zeros).len(16 * page()).fault_around(FaultAround::Page).build().unwrap();
    assert_eq!(memory[page()], 0);
    let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
    assert_eq!((memory[page()], memory[2 * page()]), (0, 0));
    memory[3 * page()] = 1;
    assert_eq!(told(&memory, tracker.take()), [3]);
    memory.fill(|_| {}).unwrap();
    assert_eq!(told(&memory, tracker.take()), NONE);
    memory[2 * page()] = 1;
    assert_eq!(told(&memory, tracker.take()), [2]);
}

#[test]
fn huge_pages_are_tracked_while_they_are_filled() {
    require!(FeatureFlags::WP_HUGETLBFS_SHMEM);
    let Some(_pages) = hugetlb::reserve(test_name!(), 4) else { return };
    let huge = hugetlb::page();
    let source = Pages::new(huge);
    let mut memory = LazyMemory::builder(source).len(4 * huge).huge_pages(huge).build().unwrap();
    assert_eq!(memory[0], byte(0));
    let mut tracker = memory.tracker().unwrap();
    assert_eq!(memory[huge], byte(1));
    memory[2 * huge + 1] = 7;
    let start = memory.as_ptr().addr();
    assert_eq!(pages_of(start, huge, tracker.take()), [2]);
    memory[huge] = 8;
    assert_eq!(pages_of(start, huge, tracker.take()), [1]);
    assert_eq!((memory[2 * huge], memory[2 * huge + 1], memory[3 * huge]), (byte(2), 7, byte(3)));
    assert_eq!(pages_of(start, huge, tracker.take()), NONE);
}

/// Poison is no content: it is there all the same where a page is marked as protected.
#[test]
fn source_that_fails_poisons_tracked_memory() {
    require!(WRITE_PROTECT);
    if !can_poison() {
        return;
    }
    child::run_well(test_name!(), || {
        tell_signals();
        let fails = |offset: u64, bytes: &mut [u8]| {
            if offset == 3 * page() as u64 {
                return Err(io::Error::other("no"));
            }
            bytes.fill(7);
            Ok(PageData::Data)
        };
        let problems = Problems::default();
        let memory = LazyMemory::builder(fails).len(8 * page()).fault_around(FaultAround::Page);
        let memory = memory.retry(pager::RetryPolicy { attempts: 1, ..Default::default() });
        let memory = memory.on_problem(problems.callback()).build().unwrap();
        let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
        let at = |number: usize| memory.as_ptr().expose_provenance() + number * page();
        assert_eq!(read(at(3)), Seen::POISON);
        assert_eq!(read(at(4)), Seen::Byte(7));
        assert_eq!((problems.count("Poisoned"), problems.count("Stuck")), (1, 0), "{:?}", problems.all());
        assert_eq!(told(&memory, tracker.take()), [3]);
    });
}

/// All takes together cover every write, and tell nothing that was only filled.
#[test]
fn no_write_is_lost_while_pages_are_filled() {
    require!(WRITE_PROTECT);
    const PAGES: usize = 600;
    let (memory, source) = memory(PAGES, FaultAround::Block(8 * page()));
    let start = memory.as_ptr().expose_provenance();
    let counter = |number: usize| {
        let at = std::ptr::with_exposed_provenance_mut::<u64>(start + number * page() + 8);
        // SAFETY: aligned, inside the memory, which outlives the threads that use it, by atomics alone.
        unsafe { AtomicU64::from_ptr(at) }
    };
    // Pages of even number are written, the others read, before it is tracked and meanwhile.
    let access = |number: usize, value: u64| match number % 2 {
        0 => counter(number).store(value, Ordering::SeqCst),
        _ => {
            counter(number).load(Ordering::SeqCst);
        }
    };
    (0..PAGES).step_by(5).for_each(|number| access(number, 1));
    let next = AtomicUsize::new(0);
    let mut seen = vec![0; PAGES];
    thread::scope(|scope| {
        let worker = || loop {
            let step = next.fetch_add(1, Ordering::SeqCst);
            if step >= 4 * PAGES {
                break;
            }
            access(step * 7 % PAGES, step as u64 + 2);
        };
        let first = scope.spawn(worker);
        let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
        // What was written before it was tracked is known.
        let content = |number: usize| counter(number).load(Ordering::SeqCst);
        (0..PAGES).step_by(2).for_each(|number| seen[number] = content(number));
        let second = scope.spawn(worker);
        let mut done = false;
        while !done {
            done = first.is_finished() && second.is_finished();
            for number in told(&memory, tracker.take()) {
                assert_eq!(number % 2, 0, "page {number} was never written");
                seen[number] = content(number);
            }
        }
        for number in (0..PAGES).step_by(2) {
            assert_eq!(seen[number], content(number), "page {number}");
        }
        source.were_read_once(PAGES);
    });
}

#[test]
fn second_tracker_or_snapshot_is_refused() {
    require!(WRITE_PROTECT);
    let (memory, _) = memory(4, FaultAround::Page);
    let Some(tracker) = tracker(test_name!(), &memory) else { return };
    let all = memory.as_ptr().addr()..memory.as_ptr().addr() + memory.len();
    let is_ours = |error: &userfaultfd::Error| matches!(error, userfaultfd::Error::AlreadyTracked { start, end } if (*start..*end) == all);
    let second = memory.tracker();
    assert!(matches!(&second, Err(pager::Error::Uffd(error)) if is_ours(error)), "{second:?}");
    let saved = memory.snapshot(|_, _: Content<'_>| Ok(()));
    assert!(matches!(&saved, Err(snapshot::Error::Kernel(error)) if is_ours(error)), "{saved:?}");
    assert_eq!(memory.missing().unwrap().len(), 1, "nothing was filled for that");
    drop(tracker);
    memory.tracker().unwrap();
    let progress = memory.snapshot(|_, _: Content<'_>| Ok(())).unwrap().wait().unwrap().progress;
    assert_eq!(progress.saved, 4 * page() as u64);
}

/// Its addresses may be another mapping's by then.
#[test]
fn outliving_tracker_leaves_addresses_alone() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let (memory, _) = memory(4, FaultAround::Page);
        let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
        let start = memory.as_ptr().addr();
        drop(memory);
        let (at, flags) = (std::ptr::without_provenance_mut(start), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces nothing.
        let mapped = unsafe { libc::mmap(at, 4 * page(), rights, flags | libc::MAP_FIXED_NOREPLACE, -1, 0) };
        assert_eq!(mapped, at);
        let mut other = DirtyTracker::new().unwrap();
        other.track(start..start + 4 * page()).unwrap();
        let result: Vec<_> = tracker.take().collect();
        assert!(matches!(result[..], [Err(userfaultfd::Error::MemoryDropped)]), "{result:?}");
        drop(tracker);
        assert_eq!(pages_of(start, page(), other.take()), NONE, "protection was lifted");
        // SAFETY: the page was just mapped, and nothing borrows it.
        unsafe { mapped.cast::<u8>().write_volatile(1) };
        assert_eq!(pages_of(start, page(), other.take()), [0]);
    });
}

/// The content of a snapshot.
fn saved(
    memory: &LazyMemory,
    begin: impl FnOnce(Copy) -> snapshot::Result<userfaultfd::Snapshot<Copy>>,
) -> Vec<u8> {
    let bytes = Arc::new(Mutex::new(vec![0xee; memory.len()]));
    let copy = Copy(Arc::clone(&bytes));
    begin(copy).unwrap().wait().unwrap();
    let bytes = bytes.lock().unwrap();
    bytes.clone()
}

struct Copy(Arc<Mutex<Vec<u8>>>);

impl snapshot::Sink for Copy {
    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let target = &mut bytes[offset as usize..][..content.len() as usize];
        match content {
            Content::Data(data) => target.copy_from_slice(data),
            Content::Zero(_) => target.fill(0),
            _ => target.fill(0xdd),
        }
        Ok(())
    }
}

/// The same of both kinds: what is missing comes from the source.
#[test]
fn snapshot_of_lazy_memory_fills_and_saves() {
    require!(WRITE_PROTECT);
    let content: Vec<u8> = (0..40 * page()).map(|at| (at / 7 % 251) as u8).collect();
    for sigbus in [false, true] {
        let source = BytesSource::new(content.clone());
        let build = || {
            if sigbus {
                LazyMemory::sigbus(source.clone()).build()
            } else {
                LazyMemory::builder(source.clone()).build()
            }
        };
        let mut memory = build().unwrap();
        if sigbus {
            let tracker = memory.tracker();
            let Err(pager::Error::Uffd(error)) = tracker else { panic!("{tracker:?}") };
            assert_eq!(error.errno(), Some(Errno::EBUSY), "{error}");
            assert!(error.to_string().contains("fill() it first"), "{error}");
        }
        memory[5] = 99;
        let mut expected = content.clone();
        expected[5] = 99;
        assert!(saved(&memory, |sink| memory.snapshot(sink)) == expected, "{sigbus}");
        // Once more, when all is there.
        memory[page()] = 98;
        expected[page()] = 98;
        assert!(saved(&memory, |sink| memory.snapshot(sink)) == expected, "{sigbus}");
        let mut tracker = memory.tracker().unwrap();
        memory[0] = 97;
        assert_eq!(told(&memory, tracker.take()), [0]);
        drop(tracker);

        let mut memory = build().unwrap();
        memory[6] = 99;
        let mut series = memory.series().unwrap();
        let mut image = saved(&memory, |sink| series.begin(sink));
        memory[7 * page()] = 96;
        let change = saved(&memory, |sink| series.begin(sink));
        assert!(change[..7 * page()].iter().chain(&change[8 * page()..]).all(|byte| *byte == 0xee));
        image[7 * page()..8 * page()].copy_from_slice(&change[7 * page()..8 * page()]);
        assert!(image == memory[..], "{sigbus}");
    }
}

/// The pager knows nothing of other memory, and would leave its faults alone.
#[test]
fn tracker_of_lazy_memory_refuses_other_memory() {
    require!(WRITE_PROTECT);
    let (memory, _) = memory(8, FaultAround::Page);
    let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
    let other = Memory::anonymous(8);
    let (start, lazy) = (other.start().addr(), memory.as_ptr().addr());
    for range in [start..start + other.len(), lazy..lazy + 9 * page(), lazy - page()..lazy + page()] {
        tracker.untrack(lazy..lazy + memory.len()).unwrap();
        let refused = tracker.track(range.clone()).unwrap_err();
        assert!(
            matches!(refused, Error::OtherMemory { start, end } if (start, end) == (range.start, range.end)),
            "{refused}"
        );
    }
    assert_eq!(other.read(3), 0);
    // A part of its own memory is tracked again.
    tracker.track(lazy + 2 * page()..lazy + 4 * page()).unwrap();
    assert_eq!(memory[3 * page()], byte(3));
}

#[test]
fn finish_of_a_shared_pager_leaves_tracked_memory_tracked() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let pager = Arc::new(pager::Pager::new().unwrap());
        let build = || LazyMemory::builder(Pages::new(page())).len(8 * page()).pager(&pager).build().unwrap();
        let (mut memory, other) = (build(), build());
        let Some(mut tracker) = tracker(test_name!(), &memory) else { return };
        memory[0] = 90;
        pager.finish(|_| {}).unwrap();
        memory[page()] = 91;
        assert_eq!(told(&memory, tracker.take()), [0, 1]);
        memory[2 * page()] = 92;
        assert_eq!(told(&memory, tracker.take()), [2]);
        assert_eq!((memory[7 * page()], other[7 * page()]), (byte(7), byte(7)));
        drop(tracker);
        memory[3 * page()] = 93;
        pager.finish(|_| {}).unwrap();
        assert_eq!((memory[3 * page()], memory[4 * page()]), (93, byte(4)));
        assert_eq!(pager.statistics().missing_pages, 0);
    });
}
