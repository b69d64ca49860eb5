//! Forks.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use super::support::{child, page, require, test_name};
use super::{byte, lazy};

#[test]
fn a_fork_has_memory_of_its_own_and_leaves_that_of_its_parent_alone() {
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
fn a_fork_has_not_got_the_memory_of_its_parent() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        let child = child::fork(|| {
            std::hint::black_box(memory[0]);
        });
        assert_eq!(ExitStatus::from_raw(child.wait()).signal(), Some(libc::SIGSEGV));
        assert_eq!(memory[0], byte(0));
    });
}

#[test]
fn what_a_fork_puts_in_the_place_of_its_parents_memory_is_its_own() {
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
            std::hint::black_box(memory[0]);
        });
        assert_eq!(ExitStatus::from_raw(child.wait()).signal(), Some(libc::SIGBUS));
        assert_eq!(memory.statistics().fills, 0);
        assert_eq!(memory[0], byte(0));
    });
}
