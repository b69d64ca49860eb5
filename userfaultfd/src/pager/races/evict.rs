//! Pages on their way out, at each point of it: read, written, pinned, and their memory ended meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};

use super::harness::start;
use crate::pager::{Budget, FaultAround, PageData};
use crate::support::proc::{self, wait_until};
use crate::support::{page, require, test_name};
use crate::sync_point::tests::at;
use crate::sync_point::{Departure, Point};
use crate::{FeatureFlags, LazyBuilder, LazyMemory};

const PAGES: usize = 64;
/// The least that there can be.
const BUDGET: usize = 16;

/// How pages leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Moved,
    Copied,
}

const WAYS: [Way; 2] = [Way::Moved, Way::Copied];

/// The ways that this kernel has.
pub(super) fn ways(test: &str) -> impl Iterator<Item = Way> {
    let moves = crate::support::has_features(test, FeatureFlags::MOVE);
    WAYS.into_iter().filter(move |way| moves || *way == Way::Copied)
}

/// Memory of which each page has its number in each byte.
fn memory(way: Way, budget: &Budget) -> LazyMemory {
    let source = |offset: u64, bytes: &mut [u8]| {
        for (at, bytes) in bytes.chunks_mut(page()).enumerate() {
            bytes.fill((offset as usize / page() + at) as u8);
        }
        Ok(PageData::Data)
    };
    let builder = LazyMemory::builder(source)
        .len(PAGES * page())
        .fault_around(FaultAround::Page)
        .threads(2)
        .budget(budget);
    let builder = if way == Way::Copied { LazyBuilder::copied_out(builder) } else { builder };
    builder.build().unwrap()
}

/// What a test does to a page of memory: by raw pointers, as other threads do it at the same time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell(usize);

impl Cell {
    fn of(memory: &LazyMemory, page_number: usize) -> Self {
        Self::at(memory.as_raw_slice(), page_number)
    }

    pub(super) fn at(memory: *mut [u8], page_number: usize) -> Self {
        Self(memory.cast::<u8>().expose_provenance() + page_number * page() + 9)
    }

    fn atomic(self) -> &'static std::sync::atomic::AtomicU8 {
        #[expect(unsafe_code, reason = "a byte that several threads access")]
        // SAFETY: a byte of the test's memory, which outlives all that looks at it; nothing but atomics does so.
        unsafe {
            &*std::ptr::with_exposed_provenance(self.0)
        }
    }

    pub(super) fn read(self) -> u8 {
        self.atomic().load(Ordering::Relaxed)
    }

    /// The byte behind it.
    pub(super) fn next(self) -> Self {
        Self(self.0 + 1)
    }

    pub(super) fn write(self, byte: u8) {
        self.atomic().store(byte, Ordering::Relaxed);
    }
}

/// Makes page 3 resident by a read, or by a write. Returns a byte of it, and what that is.
fn resident_page(memory: &LazyMemory, is_written: bool) -> (Cell, u8) {
    let cell = Cell::of(memory, 3);
    if is_written {
        cell.write(0x83);
        return (cell, 0x83);
    }
    assert_eq!(cell.read(), 3);
    (cell, 3)
}

pub(super) fn is_resident(cell: Cell) -> bool {
    crate::sys::is_resident(std::ptr::with_exposed_provenance_mut(cell.0 - cell.0 % page()))
}

/// Does something once when a page is at a point, and returns what came of it.
pub(super) fn once<T: Send + 'static>(
    point: Departure,
    cell: Cell,
    act: impl Fn() -> T + Send + Sync + 'static,
) -> (impl Sized, mpsc::Receiver<T>) {
    let (sender, receiver) = mpsc::channel();
    let (sender, is_done) = (Mutex::new(sender), AtomicBool::new(false));
    let start = cell.0 - cell.0 % page();
    let armed = at(Point::Evict(point), start..start + page(), move |_| {
        if !is_done.swap(true, Ordering::SeqCst) {
            let _nobody_listens = sender.lock().unwrap().send(act());
        }
    });
    (armed, receiver)
}

/// Touches pages from one on until something has happened.
fn push_out<T>(memory: &LazyMemory, from: usize, happened: &mpsc::Receiver<T>) -> T {
    for turn in 0.. {
        if let Ok(outcome) = happened.try_recv() {
            return outcome;
        }
        let number = from + turn % (PAGES - from);
        assert_eq!(Cell::of(memory, number).read(), number as u8);
    }
    unreachable!("it goes on")
}

/// Reads enough other pages for a page that was read before to leave.
fn read_others(memory: &LazyMemory) {
    for number in (8..PAGES).chain(8..PAGES) {
        assert_eq!(Cell::of(memory, number).read(), number as u8);
    }
}

/// A thread that accesses a page, and is in the fault of it by now, or through.
pub(super) fn accesses(cell: Cell, access: impl FnOnce(Cell) -> u8 + Send + 'static) -> JoinHandle<u8> {
    let thread = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&thread);
    let access = thread::spawn(move || {
        told.store(proc::thread_id() as u32, Ordering::SeqCst);
        access(cell)
    });
    let in_fault = || {
        let thread = thread.load(Ordering::SeqCst) as libc::pid_t;
        thread != 0 && proc::sleeps_in_fault(thread)
    };
    wait_until(|| access.is_finished() || in_fault());
    access
}

const POINTS: [Departure; 4] =
    [Departure::BeforeLeave, Departure::BeforeCopyOut, Departure::BeforeWriteBack, Departure::AfterLeave];

/// Each point that a page passes which leaves this way, written or not.
fn each_point(test: impl Fn(Way, Departure, bool)) {
    for way in ways("each_point") {
        for point in POINTS {
            for is_written in [false, true] {
                let passes = match point {
                    Departure::BeforeCopyOut => way == Way::Copied,
                    Departure::BeforeWriteBack => is_written,
                    _ => true,
                };
                if passes {
                    test(way, point, is_written);
                }
            }
        }
    }
}

#[test]
fn page_that_is_accessed_while_it_leaves_has_its_content() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    each_point(|way, point, is_written| {
        for writes in [false, true] {
            let budget = Budget::new(BUDGET * page());
            let memory = memory(way, &budget);
            let (cell, before) = resident_page(&memory, is_written);
            let (_armed, happened) = once(point, cell, move || {
                accesses(cell, move |cell| {
                    let found = cell.read();
                    if writes {
                        cell.write(0x99);
                    }
                    found
                })
            });
            let access = push_out(&memory, 8, &happened);
            let context = format!("{way:?} {point:?}, written before: {is_written}, written: {writes}");
            assert_eq!(access.join().unwrap(), before, "{context}");
            let after = if writes { 0x99 } else { before };
            assert_eq!(cell.read(), after, "{context}");
            // It leaves once more, and comes back.
            read_others(&memory);
            assert_eq!(cell.read(), after, "{context}");
            assert!((4..PAGES).all(|number| Cell::of(&memory, number).read() == number as u8), "{context}");
        }
    });
}

#[test]
fn write_alone_while_a_page_leaves_isnt_lost() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    each_point(|way, point, is_written| {
        let budget = Budget::new(BUDGET * page());
        let memory = memory(way, &budget);
        let (cell, _) = resident_page(&memory, is_written);
        let (_armed, happened) = once(point, cell, move || {
            accesses(cell, |cell| {
                cell.write(0x99);
                0
            })
        });
        push_out(&memory, 8, &happened).join().unwrap();
        let context = format!("{way:?} {point:?}, written before: {is_written}");
        assert_eq!(cell.read(), 0x99, "{context}");
        read_others(&memory);
        assert_eq!((cell.read(), Cell(cell.0 + 1).read()), (0x99, 3), "{context}");
    });
}

#[test]
fn page_that_is_pinned_while_it_leaves_is_there() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    each_point(|way, point, is_written| {
        let budget = Budget::new(BUDGET * page());
        let memory = memory(way, &budget);
        let (cell, before) = resident_page(&memory, is_written);
        let pinning_thread = Arc::new(AtomicU32::new(0));
        let (tell, told) = mpsc::channel();
        let seen = Arc::clone(&pinning_thread);
        let (_armed, happened) = once(point, cell, move || {
            tell.send(()).unwrap();
            wait_until(|| seen.load(Ordering::SeqCst) != 0);
            // It waits for the thread that has the page in hand.
            proc::wait_until_in(seen.load(Ordering::SeqCst) as libc::pid_t, libc::SYS_futex);
        });
        let (memory, budget) = (&memory, &budget);
        thread::scope(|scope| {
            let pinning = scope.spawn(move || {
                told.recv().unwrap();
                pinning_thread.store(proc::thread_id() as u32, Ordering::SeqCst);
                let pinned = memory.pin(3 * page()..4 * page()).unwrap();
                let leaves = budget.statistics().evictions;
                while budget.statistics().evictions < leaves + 2 * BUDGET as u64 {
                    thread::yield_now();
                }
                (pinned[9], is_resident(cell))
            });
            push_out(memory, 8, &happened);
            for number in (8..PAGES).cycle() {
                assert_eq!(Cell::of(memory, number).read(), number as u8);
                if pinning.is_finished() {
                    break;
                }
            }
            assert_eq!(pinning.join().unwrap(), (before, true), "{way:?} {point:?} {is_written}");
        });
    });
}

#[test]
fn memory_that_ends_while_its_page_leaves_is_waited_for() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    each_point(|way, point, is_written| {
        let budget = Budget::new(BUDGET * page());
        let (memory, other) = (memory(way, &budget), memory(way, &budget));
        let (cell, _) = resident_page(&memory, is_written);
        let (ending_thread, has_ended) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (ending, ended) = (Arc::clone(&ending_thread), Arc::clone(&has_ended));
        let (reached, is_reached) = mpsc::channel();
        let reached = Mutex::new(reached);
        let (_armed, _happened) = once(point, cell, move || {
            reached.lock().unwrap().send(()).unwrap();
            wait_until(|| ending.load(Ordering::SeqCst) != 0);
            // The thread that ends it waits for this one, which has the page in hand.
            proc::wait_until_in(ending.load(Ordering::SeqCst) as libc::pid_t, libc::SYS_futex);
            assert!(!ended.load(Ordering::SeqCst));
        });
        thread::scope(|scope| {
            let other = &other;
            let (_stop, stopped) = mpsc::channel::<()>();
            scope.spawn(move || {
                for number in (0..PAGES).cycle() {
                    assert_eq!(Cell::of(other, number).read(), number as u8);
                    if stopped.try_recv() == Err(mpsc::TryRecvError::Disconnected) {
                        break;
                    }
                }
            });
            is_reached.recv().unwrap();
            ending_thread.store(proc::thread_id() as u32, Ordering::SeqCst);
            drop(memory);
            has_ended.store(true, Ordering::SeqCst);
        });
        assert!((0..PAGES).all(|number| Cell::of(&other, number).read() == number as u8));
        drop(other);
        assert_eq!(budget.resident(), 0, "{way:?} {point:?} {is_written}");
    });
}

#[test]
fn second_thread_that_ends_a_limit_waits_too() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        let budget = Budget::new(BUDGET * page());
        let memory = memory(way, &budget);
        let (cell, before) = resident_page(&memory, false);
        let residence = Arc::clone(memory.residence());
        let (_armed, happened) = once(Departure::BeforeLeave, cell, move || {
            let let_go = |_| {
                let residence = Arc::clone(&residence);
                let (thread, id) = start(move || residence.detach());
                wait_until(|| thread.is_finished() || proc::is_in(id, libc::SYS_futex) == Some(true));
                thread
            };
            let threads = [0, 1].map(let_go);
            let any = threads.iter().any(JoinHandle::is_finished);
            (threads, any)
        });
        let (threads, any) = push_out(&memory, 8, &happened);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(!any, "{way:?}");
        assert_eq!(cell.read(), before, "{way:?}");
        // The kernel wakes a reader before its page is counted, which isn't any more.
        wait_until(|| budget.resident() == 0);
    }
}

#[test]
fn page_isnt_taken_while_its_first_write_is_resolved() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in WAYS {
        let budget = Budget::new(BUDGET * page());
        let memory = Arc::new(memory(way, &budget));
        let cell = Cell::of(&memory, 3);
        assert_eq!(cell.read(), 3);
        let reader = Arc::clone(&memory);
        let (_armed, happened) = once(Departure::FirstWrite, cell, move || {
            // By the other worker, while this one has the page claimed.
            (8..PAGES).for_each(|number| assert_eq!(Cell::of(&reader, number).read(), number as u8));
            let second = accesses(cell, |cell| {
                Cell(cell.0 + 1).write(0x77);
                0
            });
            (second, is_resident(cell))
        });
        cell.write(0x99);
        let (second, was_there) = happened.recv().unwrap();
        second.join().unwrap();
        assert!(was_there);
        read_others(&memory);
        assert_eq!((cell.read(), Cell(cell.0 + 1).read(), Cell(cell.0 + 2).read()), (0x99, 0x77, 3));
    }
}

#[test]
fn removed_pages_are_zeros_wherever_they_rest() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in WAYS {
        let budget = Budget::new(BUDGET * page());
        let memory = memory(way, &budget);
        let cell = Cell::of(&memory, 3);
        assert_eq!(cell.read(), 3);
        let start = (cell.0 - cell.0 % page()) as *mut u8;
        #[expect(unsafe_code, reason = "takes a page away")]
        // SAFETY: a page of the test's memory, which nothing borrows.
        let removed = unsafe { crate::sys::discard(start, page()) };
        removed.unwrap();
        assert_eq!(cell.read(), 0, "{way:?}");
        read_others(&memory);
        assert_eq!(cell.read(), 0, "{way:?}");
    }
}

/// Linux 6.18 may say of a page of a transparent huge page that it is in the way, after it has moved it.
#[test]
fn page_that_the_kernel_moves_and_denies_is_not_lost() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::MOVE);
    for is_written in [false, true] {
        let budget = Budget::new(BUDGET * page());
        let memory = memory(Way::Moved, &budget);
        let cell = Cell::of(&memory, 3);
        let before = if is_written { 0x83 } else { 3 };
        if is_written {
            cell.write(before);
        } else {
            assert_eq!(cell.read(), before);
        }
        let residence = Arc::clone(memory.residence());
        let (armed, happened) = once(Departure::BeforeLeave, cell, move || {
            crate::pager::evict::take::move_unasked(&residence, 3);
            assert!(!is_resident(cell));
        });
        push_out(&memory, 8, &happened);
        drop(armed);
        // It is back, and a write to it from now on is one that is noted.
        assert_eq!((cell.read(), Cell(cell.0 + 1).read()), (before, 3));
        cell.write(0x99);
        read_others(&memory);
        assert_eq!((cell.read(), Cell(cell.0 + 1).read()), (0x99, 3));
    }
}
