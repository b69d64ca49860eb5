//! UFFDIO_ZEROPAGE. What it has in common with other fills is tested in `fill`.

use userfaultfd::{
    CopyMode, Errno, Error, FaultKind, FeatureFlags, IoctlFlags, RegisterMode, Result, Uffd, ZeropageMode,
};

use crate::support::fault::{self, Fault};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{errno, page, require, test_name, uffd};

/// Fills some pages with zeros, and wakes the threads that wait for them.
fn zeropage(uffd: &Uffd, memory: &Memory, first: usize, pages: usize) -> Result<usize> {
    // SAFETY: the memory is only accessed by raw pointers.
    unsafe { uffd.zeropage(memory.at(first), pages * memory.page(), true) }
}

#[test]
fn zeros_are_there_and_a_later_write_is_not_delivered() {
    require!();
    for memory in memory::each_of(test_name!(), &Kind::SMALL, RegisterMode::MISSING, 1) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        let content = fault::during(
            &uffd,
            &memory,
            || memory.content(0),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 0));
                assert_eq!(zeropage(&uffd, &memory, 0, 1).unwrap(), page());
            },
        );
        assert_eq!(content, vec![0; page()], "{memory:?}");
        fault::silently(&uffd, &memory, || memory.write(0, 1));
        assert_eq!(memory.read(0), 1);
    }
}

/// As in 0.9 it doesn't tell how much it did, in the variant that programs look for; the other method does.
#[test]
fn zeropage_with_reports_partial_progress() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(6));
    uffd.register(memory.start(), memory.len()).unwrap();
    for present in [2, 5] {
        zeropage(&uffd, &memory, present, 1).unwrap();
    }
    let error = zeropage(&uffd, &memory, 0, 3).unwrap_err();
    assert!(matches!(error, Error::ZeropageFailed(Errno::EAGAIN)), "{error:?}");
    assert!(error.is_retryable() && error.progress().is_none(), "{error:?}");
    let error = zeropage(&uffd, &memory, 0, 3).unwrap_err();
    assert!(matches!(error, Error::ZeropageFailed(Errno::EEXIST)), "{error:?}");
    assert_eq!(error.progress(), Some(0));

    // SAFETY: the memory is only accessed by raw pointers.
    let error = unsafe { uffd.zeropage_with(memory.at(3), 3 * page(), ZeropageMode::empty()) }.unwrap_err();
    let stopped = matches!(error, Error::Stopped { ioctl: IoctlFlags::ZEROPAGE, errno: Errno::EAGAIN, .. });
    assert!(stopped, "{error:?}");
    assert_eq!(error.progress(), Some(2 * page()));
}

#[test]
fn zeros_cannot_be_had_where_a_page_of_the_file_is() {
    require!();
    for memory in memory::each_of(test_name!(), &Kind::SMALL, RegisterMode::MISSING, 1) {
        if memory.kind() == Kind::Anonymous {
            continue;
        }
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        uffd.register(memory.start(), memory.len()).unwrap();
        alias.write(0, 5);
        let result = zeropage(&uffd, &memory, 0, 1);
        if memory.kind().is_shared() {
            assert_eq!(errno(result), Errno::EEXIST, "{memory:?}");
            assert_eq!(memory.read(0), 5);
        } else {
            // Private memory doesn't look into the file.
            assert_eq!(result.unwrap(), page());
            assert_eq!((memory.read(0), alias.read(0)), (0, 5));
        }
    }
}

/// Zeros can't replace the marker of write protection on private memory, which a handler must not take for
/// "another thread was faster".
#[test]
fn protected_page_that_is_missing_takes_a_copy() {
    require!(FeatureFlags::WP_UNPOPULATED);
    let (uffd, memory) = (uffd(FeatureFlags::WP_UNPOPULATED), Memory::anonymous(1));
    let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
    uffd.register_with_mode(memory.start(), memory.len(), modes).unwrap();
    uffd.write_protect(memory.start(), memory.len()).unwrap();
    let missing = Fault::read(FaultKind::Missing, &memory, 0);
    let zeros = vec![0; page()];
    fault::during(
        &uffd,
        &memory,
        || memory.read(0),
        |faults| {
            for _ in 0..3 {
                assert_eq!(faults.next(), missing);
                assert_eq!(errno(zeropage(&uffd, &memory, 0, 1)), Errno::EEXIST);
                uffd.wake(memory.start(), memory.len()).unwrap();
            }
            assert_eq!(faults.next(), missing);
            let mode = CopyMode::WRITE_PROTECT;
            // SAFETY: the zeros live on, and the memory is only accessed by raw pointers.
            unsafe { uffd.copy_with(zeros.as_ptr().cast(), memory.start(), page(), mode) }.unwrap();
        },
    );
    fault::during(
        &uffd,
        &memory,
        || memory.write(0, 1),
        |faults| {
            assert_eq!(faults.next(), Fault::write(FaultKind::WriteProtected, &memory, 0));
            uffd.remove_write_protection(memory.start(), memory.len(), true).unwrap();
        },
    );
    assert_eq!(memory.read(0), 1);
}
