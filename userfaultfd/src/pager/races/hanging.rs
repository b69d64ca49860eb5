//! A worker has taken on several things, and the source of the first hangs: the other worker does the rest.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::harness::{Reader, Seen, Stop, start as start_thread, tell_signals};
use crate::pager::{Delivery, FaultAround, PageData, PageSource, Pager, Region, RetryPolicy, SourceBytes};
use crate::support::gate::Gate;
use crate::support::memory::{Kind, Memory};
use crate::support::proc::{self, wait_for_pending, wait_until, wait_until_in};
use crate::support::{child, page, require, test_name, uffd};
use crate::sync_point::Point;
use crate::{FeatureFlags, Uffd};

/// The page whose source hangs. The content of all others is in memory, so that no worker counts as slow.
const HANGS: usize = 0;

/// Pages at which the workers are stopped.
const STOPS: [usize; 2] = [4, 5];

struct Hanging(Gate, Vec<u8>);

impl PageSource for Hanging {
    fn read(&self, _: u64, bytes: &mut [u8]) -> std::io::Result<PageData> {
        self.0.pass();
        bytes.fill(7);
        Ok(PageData::Data)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        (offset != (HANGS * page()) as u64).then(|| SourceBytes::from(&self.1[..len]))
    }
}

/// A pager with two workers, both of which are stopped with a page of the first memory, which must be the last that goes.
struct Scene {
    gate: Gate,
    pager: Pager,
    uffds: Vec<Uffd>,
    stops: [Stop; 2],
    readers: Vec<Reader>,
    memories: Vec<Memory>,
}

impl Scene {
    fn new(memories: usize) -> Self {
        let pager = Pager::builder().threads(2).max_threads(2).delivery(Delivery::Sleep).build().unwrap();
        let (gate, mut uffds) = (Gate::default(), Vec::new());
        let memories: Vec<_> = (0..memories).map(|_| Memory::new(Kind::Anonymous, 6)).collect();
        for memory in &memories {
            let (uffd, source) = (uffd(FeatureFlags::empty()), Hanging(gate.clone(), vec![7; page()]));
            uffds.push(uffd.try_clone().unwrap());
            let region = Region::new(memory.start().expose_provenance(), memory.len(), source);
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            unsafe { pager.add_own(uffd, [region.fault_around(FaultAround::Page)]) }.unwrap();
        }
        let mut readers = Vec::new();
        let stops = STOPS.map(|number| {
            let start = memories[0].at(number).addr();
            let stop = Stop::at(Point::BeforeFill, start..start + page());
            readers.push(Reader::of(start));
            stop.reached();
            stop
        });
        Self { gate, pager, uffds, stops, readers, memories }
    }

    /// A thread faults, and no worker reads that.
    fn fault(&self, memory: usize, number: usize, pending: usize) -> Reader {
        let reader = Reader::of(self.memories[memory].at(number).addr());
        wait_for_pending(&self.uffds[memory], pending);
        reader
    }

    /// The first worker takes all on, and hangs. The other one does the rest.
    fn go(self, hanging: &Reader, rest: &[Reader]) {
        self.stops[0].go();
        self.gate.wait_for_arrival();
        self.stops[1].go();
        assert!(rest.iter().chain(&self.readers).all(|reader| reader.wait() == Seen::Byte(7)));
        assert!(!hanging.has_seen());
        self.gate.open();
        assert_eq!(hanging.wait(), Seen::Byte(7));
        // Counted a moment after the reader goes on. Each was read and filled once.
        let faults = (rest.len() + self.readers.len() + 1) as u64;
        wait_until(|| self.pager.statistics().fills == faults);
        assert_eq!(self.pager.statistics().faults(), faults);
    }
}

#[test]
fn faults_are_resolved_beside_one_whose_source_hangs() {
    require!();
    child::run_well(test_name!(), || {
        let scene = Scene::new(1);
        let hanging = scene.fault(0, HANGS, 1);
        let rest = [scene.fault(0, 1, 2), scene.fault(0, 2, 3), scene.fault(0, 3, 4)];
        scene.go(&hanging, &rest);
    });
}

#[test]
fn descriptors_are_read_beside_one_whose_source_hangs() {
    require!();
    child::run_well(test_name!(), || {
        let scene = Scene::new(4);
        let hanging = scene.fault(1, HANGS, 1);
        let rest = [scene.fault(2, 1, 1), scene.fault(3, 1, 1)];
        scene.go(&hanging, &rest);
    });
}

/// The only worker is stopped, so that a change isn't read, and the kernel refuses to poison for that long.
#[test]
fn region_ends_well_where_a_change_keeps_its_poison_away() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        const POISONED: usize = 1;
        tell_signals();
        let [memory, other] =
            [(Kind::SharedAnonymous, 3), (Kind::Anonymous, 1)].map(|(kind, pages)| Memory::new(kind, pages));
        let no_poisoned = |offset: u64, bytes: &mut [u8]| {
            if offset == (POISONED * page()) as u64 {
                return Err(std::io::Error::other("a source that fails"));
            }
            bytes.fill(7);
            Ok(PageData::Data)
        };
        let region = Region::new(memory.start().expose_provenance(), memory.len(), no_poisoned);
        let seven = |_: u64, bytes: &mut [u8]| {
            bytes.fill(7);
            Ok(PageData::Data)
        };
        let others = Region::new(other.start().expose_provenance(), other.len(), seven);
        let pager = Pager::builder()
            .threads(1)
            .max_threads(1)
            .retry(RetryPolicy { attempts: 1, delay: Duration::ZERO })
            .on_problem(|_| {})
            .build()
            .unwrap();
        let regions = [region.fault_around(FaultAround::Page).shared(), others];
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
        let added = unsafe { pager.add_own(uffd(FeatureFlags::EVENT_REMOVE), regions) }.unwrap();
        for (number, seen) in [(0, Seen::Byte(7)), (POISONED, Seen::POISON), (2, Seen::Byte(7))] {
            assert_eq!(Reader::of(memory.at(number).addr()).wait(), seen);
        }
        let start = other.start().addr();
        let stop = Stop::at(Point::BeforeFill, start..start + page());
        let reader = Reader::of(start);
        stop.reached();
        let (removed, pager) = (memory.at(2).addr(), Arc::new(pager));
        let (removing, id) = start_thread(move || {
            let page_2 = std::ptr::with_exposed_provenance_mut(removed);
            // SAFETY: the page is the test's.
            assert_eq!(unsafe { libc::madvise(page_2, page(), libc::MADV_DONTNEED) }, 0);
        });
        wait_until_in(id, libc::SYS_madvise);
        let ended = Arc::clone(&pager);
        let (ending, id) = start_thread(move || ended.remove_region(added.regions[0]));
        let before = proc::switches(id);
        wait_until(|| ending.is_finished() || proc::switches(id) > before + 32);
        assert!(!ending.is_finished(), "{:?}", ending.join());
        stop.go();
        assert!(ending.join().unwrap().is_ok());
        removing.join().unwrap();
        assert_eq!(reader.wait(), Seen::Byte(7));
    });
}

/// A page that is removed and read again and again, of which no event tells, and then read by two threads at once.
#[test]
fn page_that_was_often_empty_is_not_reported_as_stuck() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::new(Kind::Anonymous, 2);
        let at = |number: usize| memory.at(number).addr();
        let seven = |_: u64, bytes: &mut [u8]| {
            bytes.fill(7);
            Ok(PageData::Data)
        };
        let uffd = uffd(FeatureFlags::empty());
        let counted = uffd.try_clone().unwrap();
        let problems = Arc::new(AtomicUsize::new(0));
        let told = Arc::clone(&problems);
        let pager =
            Pager::builder().threads(1).max_threads(1).delivery(Delivery::Sleep).on_problem(move |_| {
                told.fetch_add(1, Ordering::SeqCst);
            });
        let pager = pager.build().unwrap();
        let region = Region::new(at(0), memory.len(), seven).fault_around(FaultAround::Page);
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
        unsafe { pager.add_own(uffd, [region]) }.unwrap();
        assert_eq!(Reader::of(at(0)).wait(), Seen::Byte(7));
        for _ in 0..300 {
            memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
            assert_eq!(Reader::of(at(0)).wait(), Seen::Byte(0));
        }
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        let stop = Stop::at(Point::BeforeFill, at(1)..at(1) + page());
        let other = Reader::of(at(1));
        stop.reached();
        let both = [1, 2].map(|pending| {
            let reader = Reader::of(at(0));
            wait_for_pending(&counted, pending);
            reader
        });
        stop.go();
        assert!(both.iter().all(|reader| reader.wait() == Seen::Byte(0)));
        assert_eq!(other.wait(), Seen::Byte(7));
        drop(pager);
        assert_eq!(problems.load(Ordering::SeqCst), 0);
    });
}
