//! Pages on their way to a store, at each point of it: written, pushed out, pinned, flushed once more, and their memory
//! ended meanwhile; with a store that takes them, fails or panics.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use super::evict::{Cell, Way, accesses, is_resident, once, ways};
use crate::pager::{Budget, FaultAround, FnStore, PageData, RetryPolicy, WriteBack};
use crate::support::proc::{self, wait_until};
use crate::support::{page, require, test_name};
use crate::sync_point::Departure;
use crate::{FeatureFlags, PagedMemory};

const PAGES: usize = 64;
/// The least that there can be.
const BUDGET: usize = 16;

/// The page that a test is about.
const PAGE: usize = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mood {
    #[default]
    Good,
    Fails,
    Panics,
}

const MOODS: [Mood; 3] = [Mood::Good, Mood::Fails, Mood::Panics];

/// A store in memory, of which each page has its number in each byte.
#[derive(Clone, Debug)]
struct Shelf {
    bytes: Arc<Mutex<Vec<u8>>>,
    mood: Arc<Mutex<Mood>>,
}

impl Shelf {
    fn new() -> Self {
        let bytes = (0..PAGES * page()).map(|at| (at / page()) as u8).collect();
        Self { bytes: Arc::new(Mutex::new(bytes)), mood: Arc::default() }
    }

    /// What it has of a page, where tests write.
    fn byte(&self, number: usize) -> u8 {
        self.bytes.lock().unwrap()[number * page() + 9]
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn memory(&self, way: Way, budget: &Budget, write_back: WriteBack) -> PagedMemory {
        let (from, to, mood) = (Arc::clone(&self.bytes), Arc::clone(&self.bytes), Arc::clone(&self.mood));
        let read = move |offset: u64, bytes: &mut [u8]| {
            bytes.copy_from_slice(&from.lock().unwrap()[offset as usize..][..bytes.len()]);
            Ok(PageData::Data)
        };
        let write = move |offset: u64, bytes: &[u8]| {
            let mood = *mood.lock().unwrap();
            match mood {
                Mood::Good => {}
                Mood::Fails => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                Mood::Panics => panic!("a store that panics"),
            }
            to.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        let builder = PagedMemory::builder(FnStore::new((PAGES * page()) as u64, read, write));
        let builder = if way == Way::Copied { builder.copied_out() } else { builder };
        builder
            .budget(budget)
            .write_back(write_back)
            .fault_around(FaultAround::Page)
            .threads(2)
            .retry(RetryPolicy { attempts: 1, delay: std::time::Duration::ZERO })
            .on_problem(|_| {})
            .build()
            .unwrap()
    }
}

fn cell_of(memory: &PagedMemory, number: usize) -> Cell {
    Cell::at(memory.as_raw_slice(), number)
}

/// Reads enough other pages for one that was read before to leave.
fn read_others(raw: usize) {
    let memory =
        std::ptr::slice_from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(raw), PAGES * page());
    for number in (8..PAGES).chain(8..PAGES) {
        assert_eq!(Cell::at(memory, number).read(), number as u8);
    }
}

const POINTS: [Departure; 3] = [Departure::BeforeClean, Departure::BeforeStore, Departure::AfterStore];

/// Memory of which a page was written, with its store and budget, and the page.
fn written(way: Way, write_back: WriteBack) -> (Shelf, Budget, PagedMemory, Cell) {
    let (shelf, budget) = (Shelf::new(), Budget::new(BUDGET * page()));
    let memory = shelf.memory(way, &budget, write_back);
    let cell = cell_of(&memory, PAGE);
    cell.write(0x83);
    (shelf, budget, memory, cell)
}

#[test]
fn write_during_a_flush_is_in_memory_and_in_the_next_flush() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        for write_back in [WriteBack::Any, WriteBack::OnFlush] {
            for point in POINTS {
                for mood in MOODS {
                    let context = format!("{way:?} {write_back:?} {point:?} {mood:?}");
                    let (shelf, _budget, memory, cell) = written(way, write_back);
                    shelf.set(mood);
                    let (armed, happened) = once(point, cell, move || {
                        accesses(cell, |cell| {
                            cell.write(0x99);
                            0
                        })
                    });
                    let flushed = memory.flush();
                    assert_eq!(flushed.is_ok(), mood == Mood::Good, "{context}");
                    happened.recv().unwrap().join().unwrap();
                    drop(armed);
                    assert_eq!(cell.read(), 0x99, "{context}");
                    if mood == Mood::Good {
                        let flushed = shelf.byte(PAGE);
                        // What was copied before the write is what the first flush writes.
                        let expected: &[u8] = if point == Departure::BeforeClean { &[0x99] } else { &[0x83] };
                        assert!(expected.contains(&flushed), "{context}: {flushed:#x}");
                    }
                    shelf.set(Mood::Good);
                    memory.flush().unwrap();
                    assert_eq!((shelf.byte(PAGE), cell.read()), (0x99, 0x99), "{context}");
                    assert_eq!(memory.statistics().dirty, 0, "{context}");
                }
            }
        }
    }
}

#[test]
fn page_is_not_dropped_before_its_store_has_it() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        for write_back in [WriteBack::Any, WriteBack::OnFlush] {
            for point in [Departure::BeforeStore, Departure::AfterStore] {
                for mood in MOODS {
                    let context = format!("{way:?} {write_back:?} {point:?} {mood:?}");
                    let (shelf, _budget, memory, cell) = written(way, write_back);
                    shelf.set(mood);
                    let raw = memory.as_raw_slice().cast::<u8>().expose_provenance();
                    let (armed, happened) = once(point, cell, move || {
                        // Others need its room, and another thread its content.
                        read_others(raw);
                        accesses(cell, Cell::read)
                    });
                    let flushed = memory.flush();
                    assert_eq!(flushed.is_ok(), mood == Mood::Good, "{context}");
                    assert_eq!(happened.recv().unwrap().join().unwrap(), 0x83, "{context}");
                    drop(armed);
                    read_others(raw);
                    assert_eq!(cell.read(), 0x83, "{context}");
                    shelf.set(Mood::Good);
                    memory.close().unwrap();
                    assert_eq!(shelf.byte(PAGE), 0x83, "{context}");
                }
            }
        }
    }
}

#[test]
fn page_that_is_pinned_while_it_is_written_stays() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        for point in POINTS {
            let (shelf, _budget, memory, cell) = written(way, WriteBack::Any);
            let memory = Arc::new(memory);
            let raw = memory.as_raw_slice().cast::<u8>().expose_provenance();
            let pinning = Arc::clone(&memory);
            let (_armed, happened) = once(point, cell, move || {
                let (thread_id, pinning) = (Arc::new(AtomicU32::new(0)), Arc::clone(&pinning));
                let told = Arc::clone(&thread_id);
                let pins = thread::spawn(move || {
                    told.store(proc::thread_id() as u32, Ordering::SeqCst);
                    let pinned = pinning.pin(PAGE * page()..(PAGE + 1) * page()).unwrap();
                    read_others(raw);
                    assert_eq!((pinned[9], is_resident(cell)), (0x83, true));
                });
                wait_until(|| thread_id.load(Ordering::SeqCst) != 0);
                if point == Departure::BeforeClean {
                    // The page is claimed here: the pin waits until it is known whether the page stays.
                    proc::wait_until_in(thread_id.load(Ordering::SeqCst) as libc::pid_t, libc::SYS_nanosleep);
                } else {
                    wait_until(|| pins.is_finished());
                }
                pins
            });
            memory.flush().unwrap();
            happened.recv().unwrap().join().unwrap();
            assert_eq!(shelf.byte(PAGE), 0x83, "{way:?} {point:?}");
            // A device may have written to it while it was pinned, if that was before it was protected.
            let dirty = if point == Departure::BeforeClean { page() } else { 0 };
            assert_eq!(memory.statistics().dirty, dirty, "{way:?} {point:?}");
        }
    }
}

#[test]
fn flush_waits_for_another_that_has_its_page_in_hand() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        for point in POINTS {
            let (shelf, _budget, memory, cell) = written(way, WriteBack::Any);
            let memory = Arc::new(memory);
            let (flushing, its_shelf) = (Arc::clone(&memory), shelf.clone());
            let (_armed, happened) = once(point, cell, move || {
                let (thread_id, flushing, shelf) =
                    (Arc::new(AtomicU32::new(0)), Arc::clone(&flushing), its_shelf.clone());
                let told = Arc::clone(&thread_id);
                let flush = thread::spawn(move || {
                    told.store(proc::thread_id() as u32, Ordering::SeqCst);
                    flushing.flush().unwrap();
                    shelf.byte(PAGE)
                });
                wait_until(|| thread_id.load(Ordering::SeqCst) != 0);
                proc::wait_until_in(thread_id.load(Ordering::SeqCst) as libc::pid_t, libc::SYS_futex);
                assert!(!flush.is_finished());
                flush
            });
            memory.flush().unwrap();
            assert_eq!(happened.recv().unwrap().join().unwrap(), 0x83, "{way:?} {point:?}");
        }
    }
}

#[test]
fn memory_that_ends_waits_for_its_writers_page() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        for point in POINTS {
            for mood in MOODS {
                let (shelf, budget, memory, cell) = written(way, WriteBack::Any);
                shelf.set(mood);
                let (ending_thread, has_ended) =
                    (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
                let (ending, ended) = (Arc::clone(&ending_thread), Arc::clone(&has_ended));
                let (reached, is_reached) = mpsc::channel();
                let (reached, at_work) = (Mutex::new(reached), shelf.clone());
                let (_armed, _happened) = once(point, cell, move || {
                    reached.lock().unwrap().send(()).unwrap();
                    wait_until(|| ending.load(Ordering::SeqCst) != 0);
                    // The thread that ends it waits for this one.
                    proc::wait_until_in(ending.load(Ordering::SeqCst) as libc::pid_t, libc::SYS_futex);
                    assert!(!ended.load(Ordering::SeqCst));
                    // What the writer can't write, the end writes.
                    if point != Departure::BeforeClean {
                        at_work.set(Mood::Good);
                    }
                });
                let raw = memory.as_raw_slice().cast::<u8>().expose_provenance();
                while is_reached.try_recv().is_err() {
                    read_others(raw);
                }
                ending_thread.store(proc::thread_id() as u32, Ordering::SeqCst);
                if point == Departure::BeforeClean {
                    shelf.set(Mood::Good);
                }
                drop(memory);
                has_ended.store(true, Ordering::SeqCst);
                assert_eq!(shelf.byte(PAGE), 0x83, "{way:?} {point:?} {mood:?}");
                assert_eq!(budget.resident(), 0, "{way:?} {point:?} {mood:?}");
            }
        }
    }
}

#[test]
fn write_before_a_failed_sync_is_synced_by_the_next_flush() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        let (shelf, budget) = (Shelf::new(), Budget::new(BUDGET * page()));
        let memory = shelf.memory(way, &budget, WriteBack::Any);
        let cell = cell_of(&memory, 0);
        cell.write(0x83);
        // While the store is about to be synced, the page is written once more.
        let (armed, happened) = once(Departure::BeforeSync, cell, move || {
            accesses(cell, |cell| {
                cell.write(0x99);
                0
            })
        });
        memory.flush().unwrap();
        happened.recv().unwrap().join().unwrap();
        drop(armed);
        assert_eq!((shelf.byte(0), memory.statistics().dirty), (0x83, page()));
        memory.flush().unwrap();
        assert_eq!((shelf.byte(0), memory.statistics().dirty), (0x99, 0));
    }
}

#[test]
fn page_that_left_before_its_prefetch_counted_succeeded() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for way in ways(test_name!()) {
        let (shelf, budget) = (Shelf::new(), Budget::new(BUDGET * page()));
        let memory = Arc::new(shelf.memory(way, &budget, WriteBack::Any));
        let cell = cell_of(&memory, PAGE);
        let evicted = Arc::downgrade(&memory);
        let (_armed, has_left) = once(Departure::AfterPrefetch, cell, move || {
            let memory = evicted.upgrade().unwrap();
            memory.evict(PAGE * page()..(PAGE + 1) * page()).unwrap();
            memory.resident(PAGE * page()..(PAGE + 1) * page())
        });
        let report = memory.prefetch(PAGE * page()..(PAGE + 1) * page()).unwrap().wait();
        assert_eq!(has_left.recv().unwrap(), 0);
        assert!(report.failed.is_empty(), "{report:?}");
        assert_eq!(report.done, report.total, "{report:?}");
        assert_eq!(cell.read(), PAGE as u8);
    }
}
