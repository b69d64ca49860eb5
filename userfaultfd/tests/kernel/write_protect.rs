//! UFFDIO_WRITEPROTECT.

use userfaultfd::{Errno, Error, FaultKind, FeatureFlags, RegisterMode, Uffd};

use crate::support::fault::{self, Fault};
use crate::support::handler::{self, Change};
use crate::support::memory::{self, Kind, Memory, State};
use crate::support::{bad_ranges, child, errno, nowhere, page, raw, require, test_name, uffd};

const WRITE_PROTECT: RegisterMode = RegisterMode::WRITE_PROTECT;

/// Memory of every kind that is registered for write protection, and its userfaultfd.
fn each(test: &str, features: FeatureFlags, pages: usize) -> impl Iterator<Item = (Memory, Uffd)> {
    memory::each(test, WRITE_PROTECT, pages).map(move |memory| {
        let uffd = uffd(features);
        uffd.register_with_mode(memory.start(), memory.len(), WRITE_PROTECT).unwrap();
        (memory, uffd)
    })
}

/// Writes to a page, whose protection is lifted when the write is delivered.
fn write_through_protection(uffd: &Uffd, memory: &Memory, number: usize, byte: u8) {
    fault::during(
        uffd,
        memory,
        || memory.write(number, byte),
        |faults| {
            assert_eq!(faults.next(), Fault::write(FaultKind::WriteProtected, memory, number), "{memory:?}");
            uffd.remove_write_protection(memory.at(number), memory.page(), true).unwrap();
        },
    );
    assert_eq!(memory.read(number), byte, "{memory:?}");
}

#[test]
fn write_is_delivered_and_a_read_is_not() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 2) {
        (0..2).for_each(|page| memory.write(page, 1));
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        let bytes = fault::silently(&uffd, &memory, || [0, 1].map(|page| memory.read(page)));
        assert_eq!(bytes, [1, 1], "{memory:?}");
        for page in 0..2 {
            write_through_protection(&uffd, &memory, page, 2);
            fault::silently(&uffd, &memory, || memory.write(page, 3));
        }
    }
}

#[test]
fn lifting_without_a_wake_leaves_that_to_wake() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        memory.write(0, 1);
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, 2),
            |faults| {
                faults.next();
                faults.wait_for_sleepers(1);
                uffd.remove_write_protection(memory.start(), memory.len(), false).unwrap();
                assert_eq!((fault::waiters(&uffd), memory.read(0)), (1, 1), "{memory:?}");
                uffd.wake(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(memory.read(0), 2, "{memory:?}");
    }
}

#[test]
fn protecting_wakes_no_thread() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        memory.write(0, 1);
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, 2),
            |faults| {
                faults.next();
                uffd.write_protect(memory.start(), memory.len()).unwrap();
                assert_eq!(fault::waiters(&uffd), 1, "{memory:?}");
                uffd.remove_write_protection(memory.start(), memory.len(), true).unwrap();
            },
        );
    }
}

#[test]
fn empty_pages_are_protected_except_anonymous() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        if memory.kind() == Kind::Anonymous {
            fault::silently(&uffd, &memory, || memory.write(0, 1));
        } else {
            write_through_protection(&uffd, &memory, 0, 1);
        }
    }
}

#[test]
fn empty_anonymous_pages_are_protected_on_request() {
    require!(FeatureFlags::WP_UNPOPULATED);
    for (memory, uffd) in each(test_name!(), FeatureFlags::WP_UNPOPULATED, 2) {
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        // A read doesn't end it.
        assert_eq!(memory.read(1), 0);
        (0..2).for_each(|page| write_through_protection(&uffd, &memory, page, 1));
    }
}

#[test]
fn dropped_anonymous_pages_lose_protection() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 2) {
        memory.write(0, 1);
        uffd.write_protect(memory.start(), memory.page()).unwrap();
        if memory.advise(0, 1, libc::MADV_DONTNEED).is_err() {
            // Huge pages before Linux 5.18.
            assert!(memory.kind().is_hugetlb(), "{memory:?}");
            continue;
        }
        if memory.kind() == Kind::Anonymous {
            fault::silently(&uffd, &memory, || memory.write(0, 2));
        } else {
            write_through_protection(&uffd, &memory, 0, 2);
        }
    }
}

#[test]
fn hole_in_the_file_keeps_it() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        if !matches!(memory.kind(), Kind::Memfd | Kind::Hugetlb) {
            continue;
        }
        memory.write(0, 1);
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        memory.punch(0, 1);
        assert_eq!(memory.state(0), State { present: false, protected: true }, "{memory:?}");
        write_through_protection(&uffd, &memory, 0, 2);
    }
}

#[test]
fn writes_through_another_mapping_are_not_delivered() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        if !matches!(memory.kind(), Kind::Memfd | Kind::Hugetlb) {
            continue;
        }
        let alias = memory.alias();
        memory.write(0, 1);
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        fault::silently(&uffd, &memory, || alias.write(0, 2));
        assert_eq!(memory.read(0), 2);
        write_through_protection(&uffd, &memory, 0, 3);
    }
}

#[test]
fn asynchronous_protection_is_lifted_by_write_itself() {
    require!(FeatureFlags::WP_ASYNC);
    for (memory, uffd) in each(test_name!(), FeatureFlags::WP_ASYNC, 2) {
        memory.write(0, 1);
        let protected = || [0, 1].map(|page| memory.state(page).protected);
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        assert_eq!(protected(), [true; 2], "{memory:?}");
        fault::silently(&uffd, &memory, || memory.write(0, 2));
        assert_eq!(protected(), [false, true], "{memory:?}");
        fault::silently(&uffd, &memory, || memory.write(1, 2));
        assert_eq!(protected(), [false, false], "{memory:?}");
        uffd.write_protect(memory.start(), memory.len()).unwrap();
        uffd.remove_write_protection(memory.start(), memory.len(), true).unwrap();
        assert_eq!(protected(), [false, false], "{memory:?}");
    }
}

#[test]
fn protection_spans_mappings_up_to_unregistered_one() {
    require!();
    if !memory::tells_protection(test_name!()) {
        return;
    }
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 4) {
        (0..4).for_each(|page| memory.write(page, 1));
        // Registered, and another registered mapping, then two that aren't.
        memory.protect(0, 1, libc::PROT_READ);
        uffd.unregister(memory.at(2), 2 * memory.page()).unwrap();
        let protected = || [0, 1, 2, 3].map(|page| memory.state(page).protected);
        if let Err(error) = uffd.write_protect(memory.start(), 2 * memory.page()) {
            // Up to a kernel between 6.1 and 6.12.
            println!("{}: one mapping at a time", test_name!());
            assert_eq!(error.errno(), Some(Errno::ENOENT));
            assert_eq!(protected(), [false; 4], "{memory:?}");
            continue;
        }
        assert_eq!(protected(), [true, true, false, false], "{memory:?}");
        uffd.remove_write_protection(memory.start(), 2 * memory.page(), true).unwrap();
        assert_eq!(protected(), [false; 4], "{memory:?}");

        assert_eq!(errno(uffd.write_protect(memory.start(), memory.len())), Errno::ENOENT);
        assert_eq!(protected(), [true, true, false, false], "{memory:?}");
        // Nothing is done where the first mapping isn't registered.
        uffd.remove_write_protection(memory.start(), 2 * memory.page(), true).unwrap();
        uffd.unregister(memory.start(), memory.page()).unwrap();
        assert_eq!(errno(uffd.write_protect(memory.start(), 2 * memory.page())), Errno::ENOENT);
        assert_eq!(protected(), [false; 4], "{memory:?}");
    }
}

#[test]
fn missing_only_registration_is_enoent() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    assert_eq!(errno(uffd.write_protect(memory.start(), memory.len())), Errno::ENOENT);
    let result = uffd.remove_write_protection(memory.start(), memory.len(), true);
    assert_eq!(errno(result), Errno::ENOENT);
}

#[test]
fn holes_are_skipped() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
        [0, 2].into_iter().for_each(|page| memory.write(page, 1));
        memory.unmap(1, 1);
        uffd.register_with_mode(memory.start(), memory.len(), WRITE_PROTECT).unwrap();
        match uffd.write_protect(memory.start(), memory.len()) {
            Ok(()) => {
                [0, 2].into_iter().for_each(|page| write_through_protection(&uffd, &memory, page, 2));
            }
            // Up to a kernel between 6.1 and 6.12.
            Err(error) => assert_eq!(error.errno(), Some(Errno::ENOENT)),
        }
    });
}

#[test]
fn malformed_or_unmapped_ranges_are_refused() {
    require!();
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 2) {
        (0..2).for_each(|page| memory.write(page, 1));
        for (why, start, len) in bad_ranges(&memory) {
            assert_eq!(errno(uffd.write_protect(start, len)), Errno::EINVAL, "{why} {memory:?}");
            let lifted = uffd.remove_write_protection(start, len, true);
            assert_eq!(errno(lifted), Errno::EINVAL, "{why} {memory:?}");
        }
        assert!((0..2).all(|page| !memory.state(page).protected), "{memory:?}");
        assert_eq!(errno(uffd.write_protect(nowhere(), page())), Errno::ENOENT);
    }
}

#[test]
fn protection_is_retryable_while_layout_changes() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::EVENT_REMOVE);
    let (uffd, memory) = (uffd(FeatureFlags::EVENT_REMOVE), Memory::anonymous(2));
    memory.write(1, 1);
    uffd.register_with_mode(memory.start(), memory.len(), WRITE_PROTECT).unwrap();
    let remove = || memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
    handler::while_changing(&uffd, remove, |_| {
        raw::wait_for_event(&uffd);
        let protected = uffd.write_protect(memory.at(1), page());
        let lifted = uffd.remove_write_protection(memory.at(1), page(), true);
        // These work all the same.
        let others = [uffd.wake(memory.at(1), page()), uffd.unregister(memory.at(1), page())];
        let registered = uffd.register_with_mode(memory.at(1), page(), WRITE_PROTECT);
        assert_eq!(Change::next(&uffd), Change::Remove(memory.range(0, 1)));
        for result in [protected, lifted] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::SystemError(Errno::EAGAIN)), "{error:?}");
            assert!(error.is_retryable());
        }
        assert!(registered.is_ok() && others.iter().all(Result::is_ok), "{registered:?} {others:?}");
    });
    uffd.write_protect(memory.at(1), page()).unwrap();
}

#[test]
fn kernel_without_it_says_that_it_is_invalid() {
    require!();
    if crate::support::features().contains(FeatureFlags::PAGEFAULT_FLAG_WP) {
        return;
    }
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    let errno = errno(uffd.write_protect(memory.start(), memory.len()));
    println!("{}: {errno:?}", test_name!());
    assert!(matches!(errno, Errno::EINVAL | Errno::ENOENT), "{errno:?}");
}
