//! Forks.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{PageData, PageSource, SignalSafe};

use super::support::proc::wait_until;
use super::support::{child, page, require, test_name};
use super::{byte, lazy};

#[test]
fn forked_child_makes_memory_of_its_own() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        assert_eq!(memory[0], byte(0));
        let child = child::fork(|| {
            let own: Vec<_> = (0..10).map(|_| lazy(4)).collect();
            for memory in &own {
                assert_eq!(memory[3 * page()], byte(3 * page()));
            }
            drop(own);
            let last = lazy(2);
            assert_eq!(last[page()], byte(page()));
        });
        child.succeed();
        assert_eq!(memory.statistics().missing_faults, 1, "the child's are the child's");
        assert_eq!(memory[5 * page()], byte(5 * page()));
    });
}

#[test]
fn forked_child_lacks_memory_of_parent() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        let start = memory.as_ptr();
        let child = child::fork(|| {
            // SAFETY: that it can't be read is what is tested.
            std::hint::black_box(unsafe { start.read_volatile() });
        });
        assert_eq!(ExitStatus::from_raw(child.wait()).signal(), Some(libc::SIGSEGV));
        assert_eq!(memory[0], byte(0));
    });
}

#[test]
fn child_memory_at_parents_address_is_its_own() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        let start: *mut libc::c_void = memory.as_ptr().cast_mut().cast();
        let (page, file) = (page(), super::support::mapping::memfd(0, 0));
        let child = child::fork(|| {
            // A file without a byte: an access is SIGBUS.
            use std::os::fd::AsRawFd;
            let (access, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
            // SAFETY: nothing is mapped there in the child.
            let here = unsafe { libc::mmap(start, page, access, flags, file.as_raw_fd(), 0) };
            assert_eq!(here, start);
            // SAFETY: mapped above; an access is SIGBUS, as is tested.
            std::hint::black_box(unsafe { start.cast::<u8>().read_volatile() });
        });
        assert_eq!(ExitStatus::from_raw(child.wait()).signal(), Some(libc::SIGBUS));
        assert_eq!(memory.statistics().fills, 0);
        assert_eq!(memory[0], byte(0));
    });
}

static WAITING: AtomicUsize = AtomicUsize::new(0);
static GO_ON: AtomicBool = AtomicBool::new(false);

/// A source that keeps its callers waiting.
struct Slow;

impl PageSource for Slow {
    fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<PageData> {
        unreachable!("it has no borders")
    }

    fn zeros(&self, _: u64) -> u64 {
        WAITING.fetch_add(1, Ordering::SeqCst);
        while !GO_ON.load(Ordering::SeqCst) {
            std::hint::spin_loop();
            // SAFETY: touches no memory.
            unsafe { libc::sched_yield() };
        }
        u64::MAX
    }
}

// SAFETY: it computes and waits.
unsafe impl SignalSafe for Slow {}

#[test]
fn faults_of_parents_threads_are_not_running_in_fork() {
    require!();
    child::run_well(test_name!(), || {
        const THREADS: usize = 70;
        let memory = LazyMemory::sigbus(Slow).len(THREADS * page()).block(1).build().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let memory = &memory;
                scope.spawn(move || assert_eq!(memory[thread * page()], 0));
            }
            wait_until(|| WAITING.load(Ordering::SeqCst) == THREADS);
            let child = child::fork(|| {
                // SAFETY: touches no memory.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) };
                for _ in 0..3 {
                    let own = lazy(4);
                    assert_eq!(own[3 * page()], byte(3 * page()));
                }
            });
            let status = child.wait();
            GO_ON.store(true, Ordering::SeqCst);
            assert_eq!(status, 0);
        });
    });
}
