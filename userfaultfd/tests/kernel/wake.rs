//! UFFDIO_WAKE.

use std::ptr;

use userfaultfd::{Errno, FaultKind, FeatureFlags};

use crate::support::fault::{self, Fault};
use crate::support::memory::Memory;
use crate::support::{bad_ranges, errno, nowhere, page, require, test_name, uffd};

/// Fills a missing page with zeros, and wakes nobody.
fn fill(uffd: &userfaultfd::Uffd, memory: &Memory, page: usize) {
    // SAFETY: the memory is only accessed by raw pointers.
    unsafe { uffd.zeropage(memory.at(page), memory.page(), false) }.unwrap();
}

#[test]
fn wake_without_a_resolution_brings_the_fault_back() {
    require!();
    for (mode, memory, uffd) in fault::each_mode(test_name!(), 1) {
        let kind = fault::provoke(&uffd, &memory, mode);
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, 9),
            |faults| {
                for _ in 0..3 {
                    assert_eq!(faults.next(), Fault::write(kind, &memory, 0), "{memory:?}");
                    uffd.wake(memory.start(), memory.len()).unwrap();
                }
                faults.next();
                uffd.unregister(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(memory.read(0), 9, "{memory:?}");
    }
}

#[test]
fn only_waiters_of_the_range_are_woken() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
    uffd.register(memory.start(), memory.len()).unwrap();
    let memory = &memory;
    let read = |page| move || memory.read(page);
    fault::during_all(&uffd, memory, [0, 1, 2].map(read), |faults| {
        (0..3).for_each(|_| assert_eq!(faults.next().kind, FaultKind::Missing));
        for round in 0..3 {
            uffd.wake(memory.at(1), page()).unwrap();
            assert_eq!(faults.next(), Fault::read(FaultKind::Missing, memory, 1), "{round}");
        }
        assert_eq!(fault::waiters(&uffd), 3);
        (0..3).for_each(|page| fill(&uffd, memory, page));
        uffd.wake(memory.start(), memory.len()).unwrap();
    });
}

#[test]
fn wake_reaches_all_waiters_of_page() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    let bytes = fault::during_all(&uffd, &memory, [(); 5].map(|()| || memory.read(0)), |faults| {
        (0..5).for_each(|_| assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 0)));
        faults.wait_for_sleepers(5);
        fill(&uffd, &memory, 0);
        assert_eq!(fault::waiters(&uffd), 5);
        uffd.wake(memory.start(), memory.len()).unwrap();
    });
    assert_eq!(bytes, [0; 5]);
}

#[test]
fn exact_address_waiters_are_woken_by_page() {
    require!(FeatureFlags::EXACT_ADDRESS);
    let (uffd, memory) = (uffd(FeatureFlags::EXACT_ADDRESS), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    let inside = memory.at(0).wrapping_byte_add(page() - 3);
    let address = inside.addr();
    let read = || {
        // SAFETY: inside the mapping, which is only accessed by raw pointers.
        unsafe { ptr::with_exposed_provenance::<u8>(address).read_volatile() }
    };
    fault::during(&uffd, &memory, read, |faults| {
        // The processor of s390x doesn't tell more than the page.
        let told = if cfg!(target_arch = "s390x") { memory.at(0).addr() } else { address };
        assert_eq!(faults.next().addr, told);
        fill(&uffd, &memory, 0);
        uffd.wake(memory.start(), memory.len()).unwrap();
    });
}

#[test]
fn range_need_not_be_registered_nor_mapped() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.wake(memory.start(), memory.len()).unwrap();
    uffd.wake(nowhere(), page()).unwrap();
}

#[test]
fn malformed_ranges_are_invalid() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(2));
    for (why, start, len) in bad_ranges(&memory) {
        assert_eq!(errno(uffd.wake(start, len)), Errno::EINVAL, "{why}");
    }
}
