//! A worker has taken on several things, and the source of the first hangs: the other worker does the rest.

#![expect(unsafe_code, reason = "the memory is the test's")]

use super::harness::{Reader, Seen, Stop};
use crate::pager::{Delivery, FaultAround, PageData, PageSource, Pager, Region, SourceBytes};
use crate::support::gate::Gate;
use crate::support::memory::{Kind, Memory};
use crate::support::proc::{wait_for_pending, wait_until};
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
fn faults_that_were_read_together_with_one_whose_source_hangs_are_resolved() {
    require!();
    child::run_well(test_name!(), || {
        let scene = Scene::new(1);
        let hanging = scene.fault(0, HANGS, 1);
        let rest = [scene.fault(0, 1, 2), scene.fault(0, 2, 3), scene.fault(0, 3, 4)];
        scene.go(&hanging, &rest);
    });
}

#[test]
fn descriptors_that_were_taken_together_with_one_whose_source_hangs_are_read() {
    require!();
    child::run_well(test_name!(), || {
        let scene = Scene::new(4);
        let hanging = scene.fault(1, HANGS, 1);
        let rest = [scene.fault(2, 1, 1), scene.fault(3, 1, 1)];
        scene.go(&hanging, &rest);
    });
}
