//! A thread of the pager panics, as if by a mistake in it: its faults are answered all the same, and it goes on.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::harness::{Flavour, PAGE, PAGES, Source, Stop, content, races, read};
use crate::FeatureFlags;
use crate::pager::{Pager, Problem};
use crate::support::proc::wait_until;
use crate::support::{child, uffd};
use crate::sync_point::Point;
use crate::sync_point::tests::at;

static PANIC: Panic = Panic;

struct Panic;

impl Panic {
    fn race(&self, test: &'static str, flavour: Flavour, point: Point) {
        child::run_well(test, || {
            let Some(memory) = flavour.memory(test, PAGES) else { return };
            let source = Source::of(&memory);
            let problems = Arc::new(Mutex::new(Vec::new()));
            let told = Arc::clone(&problems);
            let tell = move |problem: &Problem| told.lock().unwrap().push(problem.to_string());
            // With one thread nobody else answers what it leaves.
            let threads = if point == Point::BeforeWake { 2 } else { 1 };
            let pager =
                Pager::builder().threads(threads).max_threads(threads).on_problem(tell).build().unwrap();
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            let added =
                unsafe { pager.add_own(uffd(FeatureFlags::empty()), [flavour.region(&memory, source)]) };
            added.unwrap();
            let load = (point == Point::BeforeWake).then(|| Stop::at(Point::BeforeFill, 0..usize::MAX));
            let once = AtomicBool::new(true);
            let _armed = at(point, 0..usize::MAX, move |_| {
                assert!(!once.swap(false, Ordering::SeqCst), "a mistake");
            });
            let first = super::harness::Reader::of(memory.at(PAGE).addr());
            if let Some(load) = load {
                load.reached();
                let second = super::harness::Reader::of(memory.at(PAGE).addr());
                wait_until(|| pager.statistics().duplicates > 0);
                load.go();
                assert_eq!(second.wait(), content(PAGE));
            }
            assert_eq!(first.wait(), content(PAGE));
            wait_until(|| !problems.lock().unwrap().is_empty());
            assert_eq!(*problems.lock().unwrap(), ["a thread of the pager panicked: a mistake"]);
            // It goes on, and nothing that was claimed is lost.
            (0..PAGES)
                .for_each(|page| assert_eq!(read(memory.at(page).addr()), content(page), "page {page}"));
            let total = PAGES * memory.page();
            pager
                .finish(|progress| assert!(progress.done <= progress.total && progress.total <= total as u64))
                .unwrap();
            assert_eq!(pager.descriptors(), []);
        });
    }
}

races! {
    worker: PANIC;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
