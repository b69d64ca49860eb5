//! Pages that are swapped out: neither there nor missing.

use userfaultfd::pagemap::{Categories, Pagemap, Region, Scan};
use userfaultfd::{Errno, Error, FaultKind, FeatureFlags, MoveMode, RegisterMode, Uffd};

use crate::support::fault::{self, Fault};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{has, proc, require, test_name, uffd};

/// Memory of every kind that is swapped, with two pages of content, registered so, and its userfaultfd.
fn each(
    test: &str,
    modes: RegisterMode,
    features: FeatureFlags,
) -> impl Iterator<Item = (Memory, Uffd)> + use<> {
    let kinds: &[Kind] = if has(test, "swap", proc::has_swap()) { &Kind::SMALL } else { &[] };
    memory::each_of(test, kinds, modes, 2).collect::<Vec<_>>().into_iter().map(move |memory| {
        (0..2).for_each(|page| memory.write(page, page as u8 + 1));
        let uffd = uffd(features);
        uffd.register_with_mode(memory.start(), memory.len(), modes).unwrap();
        (memory, uffd)
    })
}

#[test]
fn page_that_is_swapped_out_is_not_missing() {
    require!();
    for (memory, uffd) in each(test_name!(), RegisterMode::MISSING, FeatureFlags::empty()) {
        memory.swap_out(0, 2);
        let source = vec![9u8; memory.page()];
        // SAFETY: the source lives on, and the memory is only accessed by raw pointers.
        let copied = unsafe { uffd.copy(source.as_ptr().cast(), memory.at(1), memory.page(), true) };
        assert!(matches!(copied, Err(Error::CopyFailed(Errno::EEXIST))), "{copied:?} {memory:?}");
        let bytes = fault::silently(&uffd, &memory, || [0, 1].map(|page| memory.read(page)));
        assert_eq!(bytes, [1, 2], "{memory:?}");
    }
}

#[test]
fn page_of_cache_that_is_swapped_out_is_minor_fault() {
    require!();
    for (memory, uffd) in each(test_name!(), RegisterMode::MINOR, FeatureFlags::empty()) {
        if !memory.kind().is_shared() {
            // What was written is a page of the mapping's own.
            continue;
        }
        memory.swap_out(0, 2);
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(1),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Minor, &memory, 1), "{memory:?}");
                uffd.r#continue(memory.at(1), memory.page(), true).unwrap();
            },
        );
        assert_eq!(byte, 2, "{memory:?}");
    }
}

#[test]
fn write_protection_outlives_it() {
    require!();
    for (memory, uffd) in each(test_name!(), RegisterMode::WRITE_PROTECT, FeatureFlags::empty()) {
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        memory.swap_out(0, 2);
        if memory::tells_protection(test_name!()) {
            assert!((0..2).all(|page| memory.state(page).protected), "{memory:?}");
        }
        assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 1, "{memory:?}");
        for page in 0..2 {
            fault::during(
                &uffd,
                &memory,
                || memory.write(page, 7),
                |faults| {
                    let expected = Fault::write(FaultKind::WriteProtected, &memory, page);
                    assert_eq!(faults.next(), expected, "{memory:?}");
                    uffd.remove_write_protection(memory.at(page), memory.page(), true).unwrap();
                },
            );
        }
    }
}

/// In either order: protected and swapped out, or swapped out and protected.
#[test]
fn scan_reports_swapped_pages_as_unwritten() {
    require!(FeatureFlags::WP_ASYNC);
    let pagemap = Pagemap::of_self().unwrap();
    let scan = |memory: &Memory, categories| {
        let mut regions = [Region::default(); 2];
        let mut scan = Scan::new(memory.range(0, 2));
        let found = scan.all_of(categories).next_regions(&pagemap, &mut regions).unwrap().unwrap();
        found.iter().map(Region::range).collect::<Vec<_>>()
    };
    for protect_first in [true, false] {
        for (memory, uffd) in each(test_name!(), RegisterMode::WRITE_PROTECT, FeatureFlags::WP_ASYNC) {
            let protect = || uffd.write_protect(memory.start(), memory.len()).unwrap();
            if protect_first {
                protect();
            }
            memory.swap_out(0, 2);
            if !protect_first {
                protect();
            }
            assert_eq!(scan(&memory, Categories::WRITTEN), [], "{memory:?}");
            assert_eq!(scan(&memory, Categories::PRESENT), [], "{memory:?}");
            if !memory.kind().is_shared() {
                // Of a shared page only a marker is left here.
                assert_eq!(scan(&memory, Categories::SWAPPED), [memory.range(0, 2)], "{memory:?}");
            }
            memory.write(1, 7);
            assert_eq!(scan(&memory, Categories::WRITTEN), [memory.range(1, 1)], "{memory:?}");
            assert_eq!([memory.read(0), memory.read(1)], [1, 7], "{memory:?}");
        }
    }
}

#[test]
fn pages_are_moved_as_they_are() {
    require!(FeatureFlags::MOVE);
    for (memory, uffd) in each(test_name!(), RegisterMode::MISSING, FeatureFlags::empty()) {
        if memory.kind() != Kind::Anonymous {
            continue;
        }
        let source = Memory::anonymous(2);
        (0..2).for_each(|page| source.write(page, page as u8 + 5));
        memory.advise(0, 2, libc::MADV_DONTNEED).unwrap();
        source.swap_out(0, 2);
        let mode = MoveMode::empty();
        // SAFETY: both are only accessed by raw pointers.
        let moved = unsafe { uffd.move_pages(source.start(), memory.start(), source.len(), mode) };
        assert_eq!(moved.unwrap(), source.len());
        assert_eq!(proc::swapped(source.range(0, 2)), 0);
        let bytes = fault::silently(&uffd, &memory, || [0, 1].map(|page| memory.read(page)));
        assert_eq!(bytes, [5, 6]);
        assert_eq!([source.read(0), source.read(1)], [0, 0]);
    }
}

#[test]
fn rwp_outlives_swap_on_private_memory_only() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), RegisterMode::READ_WRITE_PROTECT, FeatureFlags::RWP) {
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        memory.swap_out(0, 2);
        if memory.kind().is_shared() {
            assert_eq!(fault::silently(&uffd, &memory, || memory.read(1)), 2, "{memory:?}");
            continue;
        }
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(1),
            |faults| {
                let expected = Fault::read(FaultKind::ReadWriteProtected, &memory, 1);
                assert_eq!(faults.next(), expected, "{memory:?}");
                uffd.remove_read_write_protection(memory.start(), memory.len(), true).unwrap();
            },
        );
        assert_eq!(byte, 2, "{memory:?}");
    }
}
