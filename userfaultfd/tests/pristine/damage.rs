//! What code with a raw pointer may do to the mapping: a reset repairs it, or says where it can't.

use std::ops::Range;

use userfaultfd::{Errno, Error, Pristine, ResetMethod};

use crate::support::mapping::Mapping;
use crate::support::{child, has, page, require, test_name};
use crate::{image, methods, pristine};

fn at(memory: &Pristine, at: usize) -> *mut libc::c_void {
    memory.as_raw_slice().cast::<u8>().wrapping_add(at * page()).cast()
}

fn addresses(memory: &Pristine, pages: Range<usize>) -> Range<usize> {
    at(memory, pages.start).addr()..at(memory, pages.end).addr()
}

/// Checks that a reset and a release say which range they can't bring back.
#[track_caller]
fn is_not_restored(memory: &mut Pristine, pages: Range<usize>) {
    let expected = addresses(memory, pages);
    for result in [memory.reset(), memory.release()] {
        match result {
            Err(Error::NotRestored { start, end, errno: Errno::ENOMEM | Errno::ENOENT }) => {
                assert_eq!(start..end, expected);
            }
            result => panic!("{result:?}"),
        }
    }
}

#[test]
fn access_comes_back() {
    require!();
    for method in methods(test_name!()) {
        let image = image(40);
        let mut memory = pristine(&image, method);
        for protection in [libc::PROT_NONE, libc::PROT_READ] {
            memory[3 * page()..30 * page()].fill(1);
            for pages in [2..5, 10..11, 29..35] {
                // SAFETY: nothing accesses the pages before the reset.
                let set =
                    unsafe { libc::mprotect(at(&memory, pages.start), pages.len() * page(), protection) };
                assert_eq!(set, 0);
            }
            memory.reset().unwrap();
            assert!(memory[..] == image, "{method:?}");
            memory.fill(2);
            memory.reset().unwrap();
            assert!(memory[..] == image, "{method:?}");
        }
    }
}

#[test]
fn unmapped_pages_are_named() {
    require!();
    // Alone: no other thread may map something in the hole.
    child::run_well(test_name!(), || {
        for method in methods(test_name!()) {
            for hole in [0..2, 3..5, 7..8] {
                let mut memory = pristine(&image(8), method);
                memory.fill(1);
                // SAFETY: nothing accesses these pages any more.
                assert_eq!(unsafe { libc::munmap(at(&memory, hole.start), hole.len() * page()) }, 0);
                is_not_restored(&mut memory, hole);
            }
        }
    });
}

#[test]
fn other_mapping_is_named_and_left_alone() {
    require!();
    child::run_well(test_name!(), || {
        for method in methods(test_name!()) {
            let mut memory = pristine(&image(8), method);
            memory.fill(1);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: nothing accesses what was there any more.
            let other = unsafe { libc::mmap(at(&memory, 4), 2 * page(), protection, flags, -1, 0) };
            // SAFETY: mapped above.
            unsafe { other.cast::<u8>().write_volatile(9) };
            is_not_restored(&mut memory, 4..6);
            // SAFETY: as above.
            assert_eq!(unsafe { other.cast::<u8>().read_volatile() }, 9, "{method:?}");
            drop(memory);
            // SAFETY: as above; the memory leaves what isn't its own.
            assert_eq!(unsafe { other.cast::<u8>().read_volatile() }, 9, "{method:?}");
            // SAFETY: mapped above.
            assert_eq!(unsafe { libc::munmap(other, 2 * page()) }, 0);
        }
    });
}

/// No look at the pages tells of it: all of them count as written.
#[test]
fn other_mapping_in_an_always_dirty_range_is_left_alone() {
    require!();
    child::run_well(test_name!(), || {
        for method in methods(test_name!()) {
            let mut memory = pristine(&image(8), method);
            memory.set_always_dirty(3 * page()..7 * page(), true).unwrap();
            memory.fill(1);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            // SAFETY: nothing accesses what was there any more.
            let other = unsafe { libc::mmap(at(&memory, 4), 2 * page(), libc::PROT_READ, flags, -1, 0) };
            is_not_restored(&mut memory, 4..6);
            // SAFETY: mapped above.
            assert_eq!(unsafe { other.cast::<u8>().read_volatile() }, 0, "{method:?}");
            drop(memory);
            // SAFETY: mapped above.
            assert_eq!(unsafe { libc::munmap(other, 2 * page()) }, 0);
        }
    });
}

#[test]
fn guard_pages_go_by_release() {
    require!();
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    // With a tracker the call doesn't end: see the docs.
    for method in methods(test_name!()).into_iter().filter(|method| *method == ResetMethod::Drop) {
        let image = image(8);
        let mut memory = pristine(&image, method);
        // SAFETY: nothing accesses the page before the release.
        let guarded = unsafe { libc::madvise(at(&memory, 2), page(), MADV_GUARD_INSTALL) } == 0;
        if !has(test_name!(), "guard pages", guarded) {
            return;
        }
        memory.release().unwrap();
        assert!(memory[..] == image, "{method:?}");
    }
}

#[test]
fn moved_pages_are_named() {
    require!();
    child::run_well(test_name!(), || {
        for method in methods(test_name!()) {
            let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // To elsewhere, so that there is a hole.
            let mut memory = pristine(&image(8), method);
            let elsewhere = Mapping::new(1, libc::PROT_NONE, libc::MAP_PRIVATE, None).unwrap();
            // SAFETY: nothing accesses what is at both places.
            let moved = unsafe { libc::mremap(at(&memory, 2), page(), page(), fixed, elsewhere.start) };
            assert_eq!(moved, elsewhere.start);
            is_not_restored(&mut memory, 2..3);

            // One page over another one, and a hole where it was.
            let mut memory = pristine(&image(8), method);
            // SAFETY: as above.
            let moved = unsafe { libc::mremap(at(&memory, 6), page(), page(), fixed, at(&memory, 2)) };
            assert_eq!(moved, at(&memory, 2));
            is_not_restored(&mut memory, 2..3);
        }
    });
}

#[test]
fn page_moved_away_and_back_is_restored_or_named() {
    require!();
    child::run_well(test_name!(), || {
        for method in methods(test_name!()) {
            let image = image(8);
            let mut memory = pristine(&image, method);
            memory.fill(1);
            let elsewhere = Mapping::new(1, libc::PROT_NONE, libc::MAP_PRIVATE, None).unwrap();
            let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: nothing accesses what is at both places.
            let away = unsafe { libc::mremap(at(&memory, 2), page(), page(), fixed, elsewhere.start) };
            // SAFETY: as above.
            let back = unsafe { libc::mremap(away, page(), page(), fixed, at(&memory, 2)) };
            assert_eq!(back, at(&memory, 2));
            std::mem::forget(elsewhere); // nothing is there any more
            match (method, memory.reset()) {
                (ResetMethod::Drop, Ok(_)) => assert!(memory[..] == image),
                // The kernel has ended its registration.
                (ResetMethod::CopyBack, Err(Error::NotRestored { start, end, .. })) => {
                    assert_eq!(start..end, addresses(&memory, 0..8));
                }
                (_, result) => panic!("{method:?}: {result:?}"),
            }
        }
    });
}
