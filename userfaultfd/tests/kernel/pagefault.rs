//! What the message of a fault says: where, which thread, what access, and how often.

use userfaultfd::{FaultKind, FeatureFlags, ReadWrite, RegisterMode};

use crate::support::fault::{assert_silent, during, during_all, waiters};
use crate::support::handler::{Fault, fill, zero};
use crate::support::memory::{self, Memory};
use crate::support::proc::thread_id;
use crate::support::{self, require, test_name, uffd};

/// Accesses a byte of memory that is registered.
fn access(memory: &Memory, offset: usize, access: ReadWrite) {
    assert!(offset < memory.len());
    let byte = memory.start().wrapping_byte_add(offset).cast::<u8>();
    match access {
        // SAFETY: inside the mapping, which is only accessed by raw pointers.
        ReadWrite::Read => drop(unsafe { byte.read_volatile() }),
        // SAFETY: likewise.
        ReadWrite::Write => unsafe { byte.write_volatile(1) },
    }
}

/// The fault of an access to memory that is missing, which is filled then.
fn fault(features: FeatureFlags, memory: &Memory, offset: usize, rw: ReadWrite) -> Fault {
    let uffd = uffd(features);
    uffd.register(memory.start(), memory.len()).unwrap();
    let mut fault = None;
    during(
        &uffd,
        memory,
        || access(memory, offset, rw),
        |faults| {
            fault = Some(faults.next());
            fill(&uffd, memory, offset / memory.page(), 0);
        },
    );
    assert_silent(&uffd);
    fault.unwrap()
}

#[test]
fn fault_has_page_and_access() {
    require!();
    for rw in [ReadWrite::Read, ReadWrite::Write] {
        for memory in memory::each(test_name!(), RegisterMode::MISSING, 2) {
            let offset = memory.len() - 100;
            let told = fault(FeatureFlags::empty(), &memory, offset, rw);
            // Kernels before 5.18 told something inside the huge page.
            let old =
                memory.kind().is_hugetlb() && !support::features().contains(FeatureFlags::EXACT_ADDRESS);
            let addr = if old { told.addr / memory.page() * memory.page() } else { told.addr };
            let expected = Fault { kind: FaultKind::Missing, rw, addr: memory.at(1).addr(), thread: 0 };
            assert_eq!(Fault { addr, ..told }, expected, "{memory:?}");
        }
    }
}

#[test]
fn fault_has_exact_address_on_request() {
    require!(FeatureFlags::EXACT_ADDRESS);
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 2) {
        let offset = memory.len() - 100;
        let mut expected = memory.start().addr() + offset;
        if cfg!(target_arch = "s390x") {
            // The processor doesn't tell more than the page.
            expected &= !(support::page() - 1);
        }
        let told = fault(FeatureFlags::EXACT_ADDRESS, &memory, offset, ReadWrite::Read);
        assert_eq!(told.addr, expected, "{memory:?}");
    }
}

#[test]
fn fault_has_thread_on_request() {
    require!(FeatureFlags::THREAD_ID);
    let memory = Memory::anonymous(4);
    let uffd = uffd(FeatureFlags::THREAD_ID);
    uffd.register(memory.start(), memory.len()).unwrap();
    let mut told = [0; 4];
    let page_of = |addr: usize| (addr - memory.start().addr()) / memory.page();
    let memory = &memory;
    let accesses = (0..memory.pages()).map(|page| {
        move || {
            memory.read(page);
            thread_id()
        }
    });
    let threads = during_all(&uffd, memory, accesses, |faults| {
        for _ in 0..memory.pages() {
            let fault = faults.next();
            told[page_of(fault.addr)] = fault.thread;
        }
        zero(&uffd, memory, 0, memory.pages());
    });
    assert_eq!(told.to_vec(), threads);
}

#[test]
fn every_waiting_thread_has_a_message_of_its_own() {
    require!();
    let memory = Memory::anonymous(1);
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    let read = during_all(&uffd, &memory, [|| memory.read(0); 2], |faults| {
        assert_eq!([faults.next().addr, faults.next().addr], [memory.start().addr(); 2]);
        assert_eq!(waiters(&uffd), 2);
        // One answer wakes both.
        fill(&uffd, &memory, 0, 7);
    });
    assert_eq!(read, [7, 7]);
}

#[test]
fn fault_woken_but_not_resolved_comes_again() {
    require!();
    let memory = Memory::anonymous(1);
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    let read = during(
        &uffd,
        &memory,
        || memory.read(0),
        |faults| {
            let first = faults.next();
            for _ in 0..3 {
                // A message is delivered once for each wait.
                assert_silent(&uffd);
                uffd.wake(memory.start(), memory.len()).unwrap();
                assert_eq!(faults.next(), first);
            }
            fill(&uffd, &memory, 0, 7);
        },
    );
    assert_eq!(read, 7);
}
