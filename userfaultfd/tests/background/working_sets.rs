//! What was needed the last time is there before it is needed.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::{io, thread};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{
    BytesSource, Error, FaultAround, FillOrder, MappedFileSource, PageData, PageSource, WorkingSet,
};

use crate::support::gate::Gate;
use crate::support::mapping;
use crate::support::proc::wait_until;
use crate::support::random::Random;
use crate::support::{page, require};
use crate::{Watched, byte, in_steps, step};

fn lazy(source: &Watched, pages: usize) -> LazyMemory {
    LazyMemory::builder(source.clone()).len(pages * page()).threads(2).build().unwrap()
}

/// Both kinds of memory, with the same content.
fn both(pages: usize) -> [LazyMemory; 2] {
    let content: Vec<u8> = (0..pages * page()).map(|at| byte(at / page())).collect();
    [lazy(&Watched::new(), pages), LazyMemory::sigbus(BytesSource::new(content)).build().unwrap()]
}

/// Touches pages, one after the other.
fn touch(memory: &LazyMemory, pages: impl IntoIterator<Item = usize>) {
    for number in pages {
        assert_eq!(memory[number * page()], byte(number));
    }
}

/// A working set of pages.
fn recorded(pages: usize, touched: impl IntoIterator<Item = usize>) -> WorkingSet {
    let memory = lazy(&Watched::new(), pages);
    let recorder = memory.record().unwrap();
    touch(&memory, touched);
    recorder.finish()
}

#[test]
fn record_has_each_accessed_page_once_in_order() {
    require!();
    for memory in both(1000) {
        touch(&memory, [77]);
        let recorder = memory.record().unwrap();
        touch(&memory, [500, 3, 4, 5, 6, 500, 77, 999, 0]);
        let set = recorder.finish();
        assert!(set.pages().eq([500, 3, 4, 5, 6, 999, 0]), "{set:?}");
        assert_eq!((set.page_size(), set.region_pages()), (page(), 1000));
        // A page is counted after the thread that waited for it was woken. Nothing was filled around them.
        wait_until(|| memory.statistics().present_pages >= 8);
        assert_eq!(memory.statistics().present_pages, 8);
        // From now on nothing is noted, and more is filled for a fault where access is sequential.
        touch(&memory, 100..200);
        assert!(memory.statistics().faults() < 60);
        let second = memory.record().unwrap();
        touch(&memory, [300]);
        assert!(second.finish().pages().eq([300]));
    }
}

#[test]
fn touches_of_many_threads_are_recorded() {
    require!();
    for memory in both(4000) {
        let recorder = memory.record().unwrap();
        thread::scope(|scope| {
            for first in 0..8 {
                let memory = &memory;
                scope.spawn(move || touch(memory, (first / 2..4000).step_by(8)));
            }
        });
        let set = recorder.finish();
        let pages: BTreeSet<_> = set.pages().collect();
        let expected: BTreeSet<_> = (0..4000).filter(|page| page % 8 < 4).collect();
        assert_eq!(pages.len(), set.pages().count(), "each once");
        assert_eq!(pages, expected);
    }
}

#[test]
fn pages_accessed_during_background_read_are_recorded() {
    require!();
    let (source, pages) = (Watched::new(), 4 * step());
    let memory = lazy(&source, pages);
    let recorder = memory.record().unwrap();
    source.set(|state| state.tickets = Some(0));
    let background = memory.background(FillOrder::Ascending).unwrap();
    source.wait_until(|state| state.waiting == 1);
    thread::scope(|scope| {
        scope.spawn(|| touch(&memory, [3]));
        wait_until(|| memory.statistics().duplicates == 1);
        source.set(|state| state.tickets = None);
    });
    background.wait();
    assert!(recorder.finish().pages().eq([3]));
}

#[test]
fn set_of_another_region_fits_once_it_is_adapted() {
    require!();
    let set = recorded(1000, [7, 900, 8, 9, 30]);
    let source = Watched::new();
    let memory = lazy(&source, 800);
    assert!(matches!(memory.replay(&set), Err(Error::OtherWorkingSet { .. })));
    let set = set.with_page_size(2 * page()).unwrap().with_page_size(page()).unwrap().with_region_pages(800);
    let outcome = memory.replay(&set).unwrap().wait();
    assert_eq!((outcome.done, outcome.failed.len()), (outcome.total, 0));
    assert!(set.pages().eq([6, 7, 8, 9, 30, 31]), "{set:?}");
    let missing = memory.statistics().missing_pages;
    assert!((794..=796).contains(&missing), "{missing}: one or two may be left out");
}

#[test]
fn set_is_filled_with_neighbours_in_one_read() {
    require!();
    // Few enough that none of these is left out.
    let touched = [900, 10, 11, 12, 13, 500, 499];
    let set = recorded(1000, touched);
    let source = Watched::new();
    let memory = lazy(&source, 1000);
    let mut replay = memory.replay(&set).unwrap();
    let progress = replay.wait();
    assert_eq!(progress.done, progress.total);
    // By several threads: each takes the next, and they may overtake each other.
    let mut reads = source.reads();
    reads.sort_by_key(|read| read.start);
    assert_eq!(reads, in_steps([10..14, 499..501, 900..901]));
    touch(&memory, touched);
    let report = replay.report();
    assert_eq!((report.set_pages, report.faults_in_set, report.faults_outside), (7, 0, 0));
    assert_eq!((report.sampled, report.waste()), (0, None));
    touch(&memory, [10, 0, 300]);
    assert_eq!(replay.report().faults_outside, 2);
}

/// A working set in an order that tells nothing, with gaps of a page where those are small enough to be read.
fn scattered(pages: usize) -> WorkingSet {
    let stride = if page() <= 32 << 10 { 2 } else { 1 };
    let mut set: Vec<_> = (0..pages).step_by(stride).collect();
    let mut random = Random::new(11);
    (1..set.len()).for_each(|at| set.swap(at, random.next() as usize % (at + 1)));
    WorkingSet::from_pages(page(), pages, set).unwrap()
}

#[test]
fn set_is_replayed_by_address_in_few_long_reads() {
    require!();
    let pages = (4 << 20) / page();
    let set = scattered(pages);
    let source = Watched::new();
    source.set(|state| state.slow = true);
    let memory = LazyMemory::builder(source.clone()).len(pages * page()).fault_around(FaultAround::Page);
    let memory = memory.build().unwrap();
    let mut replay = memory.replay(&set).unwrap();
    let outcome = replay.wait();
    assert_eq!((outcome.done, outcome.failed.len()), (outcome.total, 0));
    let (reads, left_out) = (source.reads(), replay.report().sampled);
    // Reads end at each MiB, and at what is left out. The first one of each thread, to which the source isn't slow yet, ends at
    // 64 KiB.
    assert!(left_out <= set.len() / 32, "{left_out} left out");
    assert!(reads.len() <= 4 + left_out + 4, "{} reads of {} pages: {reads:?}", reads.len(), set.len());
    let longest = reads.iter().map(ExactSizeIterator::len).max().unwrap();
    assert!(longest > step() && longest <= (1 << 20) / page(), "{longest} pages");
    // Each thread takes what is next: by address.
    let mut read: Vec<_> = reads.into_iter().flatten().collect();
    source.assert_sorted();
    read.sort_unstable();
    assert!(read.windows(2).all(|pages| pages[0] < pages[1]), "no page is read twice");
    touch(&memory, set.pages());
    assert_eq!(memory.statistics().faults(), left_out as u64);
}

#[test]
fn set_is_replayed_by_as_many_threads_as_the_pager_has() {
    require!();
    const THREADS: usize = 9;
    let pages = 16 * (1 << 20) / page();
    let set = WorkingSet::from_pages(page(), pages, 0..pages).unwrap();
    let source = Watched::new();
    source.set(|state| (state.slow, state.tickets) = (true, Some(0)));
    let memory = LazyMemory::builder(source.clone()).len(pages * page()).fault_around(FaultAround::Page);
    let memory = memory.threads(THREADS).build().unwrap();
    let mut replay = memory.replay(&set).unwrap();
    // Each that ends brings one more.
    for reads in 1..THREADS {
        source.wait_until(|state| state.waiting == reads && state.tickets == Some(0));
        source.set(|state| state.tickets = Some(1));
    }
    source.wait_until(|state| state.waiting == THREADS);
    source.set(|state| state.tickets = None);
    assert_eq!(replay.wait().failed, []);
    source.wait_until(|state| state.at_once == THREADS);
}

/// What a source is asked for, and whether by a fault.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Early,
    Fault,
    FaultAnswered,
}

/// Tells apart what is read for faults, and holds either up.
#[derive(Clone, Debug, Default)]
struct Priorities {
    early: Gate,
    fault: Gate,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl PageSource for Priorities {
    fn read(&self, _: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        self.asked.lock().unwrap().push(Asked::Fault);
        self.fault.pass();
        buffer.fill(2);
        self.asked.lock().unwrap().push(Asked::FaultAnswered);
        Ok(PageData::Data)
    }

    fn read_early(&self, _: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        self.asked.lock().unwrap().push(Asked::Early);
        self.early.pass();
        buffer.fill(1);
        Ok(PageData::Data)
    }
}

#[test]
fn fault_is_read_before_the_rest_of_the_set() {
    require!();
    let pages = 8 * (1 << 20) / page();
    let source = Priorities::default();
    let memory = LazyMemory::builder(source.clone()).len(pages * page()).fault_around(FaultAround::Page);
    let memory = memory.threads(2).build().unwrap();
    let set = WorkingSet::from_pages(page(), pages, 0..pages - 1).unwrap();
    thread::scope(|scope| {
        let mut replay = memory.replay(&set).unwrap();
        source.early.wait_for_arrival();
        let fault = scope.spawn(|| memory[(pages - 2) * page()]);
        source.fault.wait_for_arrival();
        // What had begun ends, and nothing else begins until the fault is resolved.
        let begun = source.asked.lock().unwrap().len() - 1;
        source.early.open();
        wait_until(|| replay.background().progress().done > 0);
        (0..1000).for_each(|_| thread::yield_now());
        assert_eq!(source.asked.lock().unwrap().len(), begun + 1);
        source.fault.open();
        assert_eq!(fault.join().unwrap(), 2);
        let outcome = replay.wait();
        assert_eq!((outcome.done, outcome.failed), (outcome.total, Vec::new()));
        let asked = source.asked.lock().unwrap();
        let fault = asked.iter().position(|asked| *asked == Asked::Fault).unwrap();
        assert_eq!(asked[fault + 1], Asked::FaultAnswered, "{asked:?}");
        assert!(asked.len() > fault + 2, "{asked:?}");
    });
}

#[test]
fn faults_come_before_the_set() {
    require!();
    let set = recorded(1000, 100..200);
    for memory in both(1000) {
        let mut replay = memory.replay(&set).unwrap();
        replay.background().pause();
        let before = replay.background().progress().done as usize / page();
        touch(&memory, [199, 900]);
        let report = replay.report();
        if before == 0 {
            // But for a step that may have been going on.
            assert!(report.faults_in_set <= 1 && report.faults_outside == 1, "{report:?}");
        }
        let progress = replay.wait();
        assert_eq!(progress.done, progress.total);
        touch(&memory, 100..200);
        let faults = memory.statistics().faults();
        assert!(faults <= 2 + replay.report().sampled_touched as u64, "{faults} faults");
    }
}

#[test]
fn tenth_of_memory_takes_twentieth_of_faults() {
    require!();
    let (pages, touched) = (5000, (0..500).map(|number| number * 7919 % 5000));
    let set = recorded(pages, touched.clone());
    for memory in both(pages) {
        memory.replay(&set).unwrap().wait();
        touch(&memory, touched.clone());
        let faults = memory.statistics().faults();
        assert!(faults <= 500 / 20, "{faults} faults instead of 500");
    }
}

#[test]
fn waste_is_estimated_from_what_was_left_out() {
    require!();
    let pages = 16_000;
    let all = (0..8000).map(|number| number * 7919 % pages);
    let set = recorded(pages, all.clone());
    let source = Watched::new();
    let memory =
        LazyMemory::builder(source).len(pages * page()).fault_around(FaultAround::Page).build().unwrap();
    let mut replay = memory.replay(&set).unwrap();
    replay.wait();
    let report = replay.report();
    assert!((80..200).contains(&report.sampled), "{report:?}");
    assert_eq!(report.waste(), Some(1.0));
    // Three quarters of what was needed is needed again.
    touch(&memory, all.clone().take(6000));
    let report = replay.report();
    let waste = report.waste().unwrap();
    assert!((0.15..0.35).contains(&waste), "{report}");
    assert_eq!(report.faults_in_set, report.sampled_touched);
    touch(&memory, all);
    assert_eq!(replay.report().waste(), Some(0.0));
    let text = replay.report().to_string();
    assert!(text.contains("8000 pages in the set") && text.contains("about 0 % for nothing"), "{text}");
}

/// What the source lacks stays missing, and is filled once it has it.
#[test]
fn sigbus_replay_leaves_undelivered_pages_missing() {
    require!();
    let pages = 64;
    let content: Vec<u8> = (0..pages * page()).map(|at| byte(at / page())).collect();
    let file = File::from(mapping::memfd(0, 0));
    file.write_all_at(&content, 0).unwrap();
    let source = MappedFileSource::new(file.try_clone().unwrap()).unwrap();
    let memory = LazyMemory::sigbus(source).fault_around(FaultAround::Page).build().unwrap();
    let set = WorkingSet::from_pages(page(), pages, 8..56).unwrap();
    file.set_len((32 * page()) as u64).unwrap();
    let mut replay = memory.replay(&set).unwrap();
    replay.wait();
    let report = replay.report();
    let statistics = memory.statistics();
    let read = statistics.present_pages as usize;
    // Some of the set are left out, by which its worth is estimated.
    assert!((1..=24).contains(&read) && 24 - read <= report.sampled, "{statistics}, {report}");
    assert_eq!((statistics.poisoned, statistics.missing_faults), (0, 0), "{statistics}");
    file.write_all_at(&content, 0).unwrap();
    assert!(memory[..] == content[..]);
}

#[test]
fn recording_is_refused_twice_and_for_other_regions() {
    require!();
    let set = recorded(100, [5]);
    for memory in both(100) {
        let recorder = memory.record().unwrap();
        assert!(matches!(memory.record(), Err(Error::AlreadyRecorded)));
        assert!(matches!(memory.replay(&set), Err(Error::AlreadyRecorded)));
        drop(recorder);
        let replay = memory.replay(&set).unwrap();
        assert!(matches!(memory.record(), Err(Error::AlreadyRecorded)));
        drop(replay);
        drop(memory.record().unwrap());
    }
    for memory in both(101) {
        match memory.replay(&set) {
            Err(Error::OtherWorkingSet { set, region }) => {
                assert_eq!((set, region), ((100, page()), (101, page())));
            }
            other => panic!("{other:?}"),
        }
        memory.fill(|_| {}).unwrap();
        assert!(matches!(memory.record(), Err(Error::Filled)));
    }
}
