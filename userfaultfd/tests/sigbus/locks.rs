//! Faults where locks are held, or where a signal has interrupted something.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, Write};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicUsize, Ordering};

use userfaultfd::LazyMemory;

use super::support::{child, page, proc, require, signal, test_name};
use super::{byte, lazy};

/// The system's allocator behind a lock of the kind that isn't taken twice, which touches memory when it is told.
struct Locking;

static LOCKED: AtomicBool = AtomicBool::new(false);
/// What the next allocation touches. Only for tests that run alone.
static TOUCH: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
static TOUCHED: AtomicU8 = AtomicU8::new(0);

fn locked<T>(call: impl FnOnce() -> T) -> T {
    while LOCKED.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        std::thread::yield_now();
    }
    let touch = TOUCH.swap(ptr::null_mut(), Ordering::Relaxed);
    if !touch.is_null() {
        // SAFETY: the test that set it has the memory there.
        TOUCHED.store(unsafe { touch.read_volatile() }, Ordering::Relaxed);
    }
    let result = call();
    LOCKED.store(false, Ordering::Release);
    result
}

// SAFETY: passes everything on.
unsafe impl GlobalAlloc for Locking {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the same.
        locked(|| unsafe { System.alloc(layout) })
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same.
        locked(|| unsafe { System.dealloc(pointer, layout) });
    }
}

#[global_allocator]
static ALLOCATOR: Locking = Locking;

fn at(memory: &LazyMemory, offset: usize) -> *mut u8 {
    memory[offset..].as_ptr().cast_mut()
}

#[test]
fn fault_inside_the_allocator() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        for number in 0..8 {
            TOUCHED.store(0, Ordering::Relaxed);
            TOUCH.store(at(&memory, number * page()), Ordering::Relaxed);
            drop(std::hint::black_box(Box::new(5)));
            assert_eq!(TOUCHED.load(Ordering::Relaxed), byte(number * page()));
        }
        assert_eq!(memory.statistics().missing_faults, 8);
    });
}

#[test]
fn fault_while_standard_output_is_locked() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(1);
        let mut output = io::stdout().lock();
        writeln!(output, "{}", memory[5]).unwrap();
        assert_eq!(memory.statistics().missing_faults, 1);
    });
}

static HANDLED: AtomicUsize = AtomicUsize::new(0);

/// Touches the page that [`TOUCH`] tells.
extern "C" fn touch(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let page = TOUCH.swap(ptr::null_mut(), Ordering::SeqCst);
    if !page.is_null() {
        // SAFETY: the test that set it has the memory there.
        TOUCHED.store(unsafe { page.read_volatile() }, Ordering::SeqCst);
    }
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn fault_inside_the_handler_of_another_signal() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        signal::handle(libc::SIGUSR1, touch);
        for number in 0..8 {
            LOCKED.store(true, Ordering::SeqCst); // nobody allocates meanwhile
            TOUCH.store(at(&memory, number * page()), Ordering::SeqCst);
            signal::send(proc::thread_id(), libc::SIGUSR1);
            LOCKED.store(false, Ordering::SeqCst);
            assert_eq!(TOUCHED.load(Ordering::SeqCst), byte(number * page()));
        }
        assert_eq!((memory.statistics().missing_faults, HANDLED.load(Ordering::SeqCst)), (8, 8));
    });
}

#[test]
fn signals_that_come_all_the_time_disturb_no_fault() {
    require!();
    child::run_well(test_name!(), || {
        signal::handle(libc::SIGUSR1, touch);
        let memory = lazy(4096);
        let (me, done) = (proc::thread_id(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 1;
                while !done.load(Ordering::SeqCst) {
                    let before = HANDLED.load(Ordering::SeqCst);
                    signal::send(me, libc::SIGUSR1);
                    while HANDLED.load(Ordering::SeqCst) == before && !done.load(Ordering::SeqCst) {
                        std::hint::spin_loop();
                    }
                    number += 1;
                }
                assert!(number > 10, "{number} signals");
            });
            let mut at = 0;
            while HANDLED.load(Ordering::SeqCst) < 20 || at < memory.len() {
                assert_eq!(memory[at % memory.len()], byte(at % memory.len()));
                at += page();
            }
            done.store(true, Ordering::SeqCst);
        });
        assert_eq!(memory.statistics().fills, 4096);
    });
}
