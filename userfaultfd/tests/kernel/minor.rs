//! UFFDIO_CONTINUE, which resolves minor faults. What it has in common with other fills is tested in `fill`.

use userfaultfd::{ContinueMode, Errno, FaultKind, FeatureFlags, RegisterMode};

use crate::support::fault::{self, Fault};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{errno, handler, page, require, test_name, uffd};

#[test]
fn page_in_cache_is_minor_fault_and_continue_maps_it() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MINOR, 2) {
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::MINOR).unwrap();
        alias.write(0, 1);
        alias.write(1, 1);
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Minor, &memory, 0), "{memory:?}");
                // What is written up to the call is what the waiter sees.
                alias.write(0, 2);
                let mapped = uffd.r#continue(memory.at(0), memory.page(), true).unwrap();
                assert_eq!(mapped, memory.page() as u64);
            },
        );
        assert_eq!(byte, 2, "{memory:?}");
        assert!(!memory.state(1).present, "{memory:?}");
        fault::during(
            &uffd,
            &memory,
            || memory.write(1, 3),
            |faults| {
                assert_eq!(faults.next(), Fault::write(FaultKind::Minor, &memory, 1), "{memory:?}");
                uffd.r#continue(memory.at(1), memory.page(), true).unwrap();
            },
        );
        // A private mapping has a copy of its own from the first write on.
        let in_file = if memory.kind().is_shared() { 3 } else { 1 };
        assert_eq!((memory.read(1), alias.read(1)), (3, in_file), "{memory:?}");
        fault::assert_silent(&uffd);
    }
}

#[test]
fn page_is_minor_in_the_cache_and_missing_elsewhere() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING | RegisterMode::MINOR, 2) {
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        let modes = RegisterMode::MISSING | RegisterMode::MINOR;
        uffd.register_with_mode(memory.start(), memory.len(), modes).unwrap();
        alias.write(0, 1);
        for (number, kind) in [(0, FaultKind::Minor), (1, FaultKind::Missing)] {
            fault::during(
                &uffd,
                &memory,
                || memory.read(number),
                |faults| {
                    assert_eq!(faults.next(), Fault::read(kind, &memory, number), "{memory:?}");
                    match kind {
                        FaultKind::Minor => {
                            uffd.r#continue(memory.at(number), memory.page(), true).unwrap();
                        }
                        _ => handler::fill(&uffd, &memory, number, 4),
                    }
                },
            );
        }
        assert_eq!([0, 1].map(|number| memory.read(number)), [1, 4], "{memory:?}");
    }
}

#[test]
fn continue_without_cached_page_fails() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MINOR, 3) {
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, RegisterMode::MINOR).unwrap();
        assert_eq!(errno(uffd.r#continue(start, len, true)), Errno::EFAULT, "{memory:?}");
        // What is there is mapped, and the result tells how much that was.
        alias.write(0, 1);
        assert_eq!(uffd.r#continue(start, len, true).unwrap(), memory.page() as u64, "{memory:?}");
        assert_eq!(errno(uffd.r#continue(start, len, true)), Errno::EEXIST, "{memory:?}");
        let rest = uffd.r#continue(memory.at(1), 2 * memory.page(), true);
        assert_eq!(errno(rest), Errno::EFAULT, "{memory:?}");
        assert_eq!([0, 1, 2].map(|number| memory.state(number).present), [true, false, false]);
    }
}

#[test]
fn pages_are_write_protected_as_they_appear() {
    // No feature tells of that mode, but this one came with it.
    require!(FeatureFlags::WP_UNPOPULATED);
    for memory in memory::each(test_name!(), RegisterMode::MINOR | RegisterMode::WRITE_PROTECT, 1) {
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, RegisterMode::MINOR | RegisterMode::WRITE_PROTECT).unwrap();
        alias.write(0, 1);
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, 2),
            |faults| {
                assert_eq!(faults.next(), Fault::write(FaultKind::Minor, &memory, 0), "{memory:?}");
                uffd.continue_with(start, len, ContinueMode::WRITE_PROTECT).unwrap();
                assert_eq!(faults.next(), Fault::write(FaultKind::WriteProtected, &memory, 0), "{memory:?}");
                assert_eq!(memory.read(0), 1);
                uffd.remove_write_protection(start, len, true).unwrap();
            },
        );
        assert_eq!(memory.read(0), 2, "{memory:?}");
    }
}

#[test]
fn protecting_takes_that_registration() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MINOR, 1) {
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::MINOR).unwrap();
        alias.write(0, 1);
        for mode in [ContinueMode::WRITE_PROTECT, ContinueMode::from_bits_retain(1 << 20)] {
            let result = uffd.continue_with(memory.start(), memory.len(), mode);
            assert_eq!(errno(result), Errno::EINVAL, "{memory:?} {mode:?}");
        }
        assert!(!memory.state(0).present, "{memory:?}");
    }
}

#[test]
fn pages_dropped_from_a_mapping_are_minor_again() {
    require!(FeatureFlags::MINOR_SHMEM);
    for kind in [Kind::SharedAnonymous, Kind::Memfd] {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::new(kind, 1));
        memory.write(0, 6);
        uffd.register_with_mode(memory.start(), page(), RegisterMode::MINOR).unwrap();
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Minor, &memory, 0));
                uffd.r#continue(memory.start(), page(), true).unwrap();
            },
        );
        assert_eq!(byte, 6);
    }
}
