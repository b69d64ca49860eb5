//! UFFDIO_UNREGISTER.

use std::os::fd::AsFd;

use userfaultfd::{Errno, FaultKind, FeatureFlags, RegisterMode};

use crate::support::fault::{self, Fault};
use crate::support::fill::{Fill, Filler};
use crate::support::mapping::{self, Mapping};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{bad_ranges, errno, nowhere, page, require, test_name, uffd};

#[test]
fn waiters_of_every_kind_of_fault_go_on() {
    require!();
    for (mode, memory, uffd) in fault::each_mode(test_name!(), 1) {
        let kind = fault::provoke(&uffd, &memory, mode);
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, 9),
            |faults| {
                assert_eq!(faults.next(), Fault::write(kind, &memory, 0), "{memory:?}");
                uffd.unregister(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(memory.read(0), 9, "{memory:?}");
    }
}

#[test]
fn missing_pages_read_as_zeros_afterwards() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 1) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        uffd.unregister(memory.start(), memory.len()).unwrap();
        let content = fault::silently(&uffd, &memory, || memory.content(0));
        assert_eq!(content, vec![0; memory.page()], "{memory:?}");
    }
}

#[test]
fn protection_is_lifted_for_good() {
    require!();
    if !memory::tells_protection(test_name!()) {
        return;
    }
    for memory in memory::each(test_name!(), RegisterMode::WRITE_PROTECT, 1) {
        let uffd = uffd(FeatureFlags::empty());
        fault::provoke(&uffd, &memory, RegisterMode::WRITE_PROTECT);
        assert!(memory.state(0).protected, "{memory:?}");
        uffd.unregister(memory.start(), memory.len()).unwrap();
        assert!(!memory.state(0).protected, "{memory:?}");
        fault::silently(&uffd, &memory, || memory.write(0, 2));
        uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::WRITE_PROTECT).unwrap();
        fault::silently(&uffd, &memory, || memory.write(0, 3));
    }
}

#[test]
fn unregistering_twice_is_fine() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(2));
    uffd.register(memory.start(), page()).unwrap();
    for _ in 0..2 {
        uffd.unregister(memory.start(), memory.len()).unwrap();
        assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 0);
    }
}

#[test]
fn rest_stays_registered() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 3) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        uffd.unregister(memory.at(1), memory.page()).unwrap();
        assert_eq!(fault::silently(&uffd, &memory, || memory.read(1)), 0, "{memory:?}");
        for page in [0, 2] {
            let byte = fault::during(
                &uffd,
                &memory,
                || memory.read(page),
                |faults| {
                    assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, page));
                    uffd.unregister(memory.at(page), memory.page()).unwrap();
                },
            );
            assert_eq!(byte, 0);
        }
    }
}

#[test]
fn foreign_range_is_refused_or_unregistered() {
    require!();
    let (uffd, foreign) = (uffd(FeatureFlags::empty()), self::uffd(FeatureFlags::empty()));
    let memory = Memory::anonymous(1);
    uffd.register(memory.start(), memory.len()).unwrap();
    match foreign.unregister(memory.start(), memory.len()) {
        Ok(()) => {
            println!("{}: anybody may unregister", test_name!());
            assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 0);
        }
        Err(error) => {
            println!("{}: refused", test_name!());
            assert_eq!(error.errno(), Some(Errno::EINVAL));
            fault::during(
                &uffd,
                &memory,
                || memory.read(0),
                |faults| {
                    assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 0));
                    uffd.unregister(memory.start(), memory.len()).unwrap();
                },
            );
        }
    }
}

#[test]
fn poison_stays() {
    require!(FeatureFlags::POISON);
    for kind in Kind::ALL {
        let Some(filler) = Filler::try_new(test_name!(), Fill::Poison, kind, 1) else { continue };
        let memory = &filler.memory;
        filler.run(0, 1, true).unwrap();
        filler.uffd.unregister(memory.start(), memory.len()).unwrap();
        // A missing page would be zeros by now.
        assert_eq!(memory.read_by_kernel(0), Err(Errno::EFAULT), "{memory:?}");
        filler.uffd.register(memory.start(), memory.len()).unwrap();
        filler.assert_stopped(&filler.run(0, 1, true), 0, Errno::EEXIST);
    }
}

#[test]
fn malformed_or_unmapped_ranges_are_invalid() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 2) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        let unmapped = ("nothing mapped", nowhere(), page());
        for (why, start, len) in bad_ranges(&memory).into_iter().chain([unmapped]) {
            assert_eq!(errno(uffd.unregister(start, len)), Errno::EINVAL, "{why} {memory:?}");
        }
    }
}

#[test]
fn memory_that_can_never_be_registered_is_invalid() {
    require!();
    let uffd = uffd(FeatureFlags::empty());
    let Some(file) = mapping::regular_file(test_name!(), 1) else { return };
    let mapping = Mapping::shared(1, file.as_fd()).unwrap();
    assert_eq!(errno(uffd.unregister(mapping.start, mapping.len)), Errno::EINVAL);
}
