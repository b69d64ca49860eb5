//! A thread of the pager panics, as if by a mistake in it: its faults are answered all the same, and it goes on.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use super::harness::{Flavour, PAGE, PAGES, Source, Stop, content, races, read};
use crate::FeatureFlags;
use crate::pager::fill::buffers::put_aside;
use crate::pager::{PageData, Pager, Problem};
use crate::support::memory::Memory;
use crate::support::proc::{sleeps_in_fault, thread_id, wait_until, wait_until_in};
use crate::support::{child, require, test_name, uffd};
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

/// A thread of the pager panics, or a source, while the content of a page is put aside: its fill is refused until a removal is
/// read. The content is given back, and its bytes are no longer counted.
#[test]
fn content_put_aside_is_given_back_after_a_panic() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        const BAD: usize = 4;
        const REMOVED: usize = 5;
        for source_panics in [false, true] {
            let memory = Arc::new(Memory::anonymous(PAGES));
            let problems = Arc::new(Mutex::new(Vec::new()));
            let told = Arc::clone(&problems);
            let tell = move |problem: &Problem| told.lock().unwrap().push(problem.to_string());
            let pager = Pager::builder().threads(1).max_threads(1).on_problem(tell).build().unwrap();
            let (once, size) = (AtomicBool::new(source_panics), memory.page());
            let source = move |offset: u64, bytes: &mut [u8]| {
                let page = offset as usize / size;
                if page == BAD && once.swap(false, Ordering::SeqCst) {
                    assert!(put_aside() >= size, "content is put aside");
                    panic!("as the test wants it");
                }
                bytes.fill(page as u8 + 1);
                Ok(PageData::Data)
            };
            let region = Flavour::Anonymous.region(&memory, source);
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            unsafe { pager.add_own(uffd(FeatureFlags::EVENT_REMOVE), [region]) }.unwrap();
            let (others, of_action) = (Arc::new(Mutex::new(Vec::new())), Arc::clone(&memory));
            let (acting, fills) = (Arc::clone(&others), Mutex::new(0));
            let place = memory.at(PAGE).addr();
            let armed = at(Point::BeforeFill, place..place + 1, move |_| {
                let mut fills = fills.lock().unwrap_or_else(PoisonError::into_inner);
                *fills += 1;
                if *fills == 1 {
                    // Nobody reads that it is removed before the fill is refused.
                    let act = |act: fn(&Memory)| {
                        let (tell, told) = mpsc::channel();
                        let memory = Arc::clone(&of_action);
                        let handle = thread::spawn(move || {
                            tell.send(thread_id()).unwrap();
                            act(&memory);
                        });
                        acting.lock().unwrap().push(handle);
                        told.recv().unwrap()
                    };
                    let remover = act(|memory| memory.advise(REMOVED, 1, libc::MADV_DONTNEED).unwrap());
                    wait_until_in(remover, libc::SYS_madvise);
                    if source_panics {
                        let reader = act(|memory| assert_eq!(memory.read(BAD), BAD as u8 + 1));
                        wait_until(|| sleeps_in_fault(reader));
                    }
                } else if *fills == 2 && !source_panics {
                    assert!(put_aside() >= size, "content is put aside");
                    panic!("a mistake");
                }
            });
            assert_eq!(read(memory.at(PAGE).addr()), content(PAGE));
            others.lock().unwrap().drain(..).for_each(|other| other.join().unwrap());
            if !source_panics {
                wait_until(|| !problems.lock().unwrap().is_empty());
                assert_eq!(*problems.lock().unwrap(), ["a thread of the pager panicked: a mistake"]);
            }
            drop(armed);
            (0..REMOVED)
                .for_each(|page| assert_eq!(read(memory.at(page).addr()), content(page), "page {page}"));
            assert_eq!(put_aside(), 0);
            pager.finish(|_| {}).unwrap();
        }
    });
}
