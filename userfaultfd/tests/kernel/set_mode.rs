//! UFFDIO_SET_MODE, of Linux 7.3.

use userfaultfd::{Error, FaultKind, FeatureFlags, IoctlFlags, RegisterMode};

use crate::support::fault::{self, Fault};
use crate::support::memory;
use crate::support::{features, handler, require, test_name, uffd};

const NONE: FeatureFlags = FeatureFlags::empty();
const RWP: FeatureFlags = FeatureFlags::RWP;
const RWP_ASYNC: FeatureFlags = FeatureFlags::RWP_ASYNC;

#[test]
fn protection_becomes_asynchronous_and_back() {
    require!(RWP | RWP_ASYNC);
    for memory in memory::each(test_name!(), RegisterMode::READ_WRITE_PROTECT, 1) {
        let uffd = uffd(RWP);
        memory.write(0, 1);
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, RegisterMode::READ_WRITE_PROTECT).unwrap();
        for _ in 0..2 {
            uffd.set_async(RWP_ASYNC, NONE).unwrap();
            uffd.read_write_protect(start, len).unwrap();
            assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 1, "{memory:?}");
            uffd.set_async(NONE, RWP_ASYNC).unwrap();
            uffd.read_write_protect(start, len).unwrap();
            fault::during(
                &uffd,
                &memory,
                || memory.read(0),
                |faults| {
                    let expected = Fault::read(FaultKind::ReadWriteProtected, &memory, 0);
                    assert_eq!(faults.next(), expected, "{memory:?}");
                    uffd.remove_read_write_protection(start, len, true).unwrap();
                },
            );
        }
    }
}

#[test]
fn switch_to_async_wakes_every_waiter() {
    require!(RWP | RWP_ASYNC);
    let modes = RegisterMode::MISSING | RegisterMode::READ_WRITE_PROTECT;
    for memory in memory::each(test_name!(), modes, 2) {
        let uffd = uffd(RWP);
        memory.write(0, 1);
        uffd.register_with_mode(memory.start(), memory.len(), modes).unwrap();
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        let memory = &memory;
        let read = |page| move || memory.read(page);
        let bytes = fault::during_all(&uffd, memory, [read(0), read(1)], |faults| {
            let mut kinds = [faults.next().kind, faults.next().kind];
            kinds.sort_by_key(|kind| *kind == FaultKind::Missing);
            assert_eq!(kinds, [FaultKind::ReadWriteProtected, FaultKind::Missing], "{memory:?}");
            uffd.set_async(RWP_ASYNC, NONE).unwrap();
            // The one goes on, the other comes back.
            assert_eq!(faults.next(), Fault::read(FaultKind::Missing, memory, 1));
            handler::fill(&uffd, memory, 1, 5);
        });
        assert_eq!(bytes, [1, 5], "{memory:?}");
    }
}

#[test]
fn set_mode_accepts_no_change() {
    require!(RWP);
    uffd(RWP).set_async(NONE, NONE).unwrap();
    uffd(NONE).set_async(NONE, NONE).unwrap();
}

#[test]
fn only_what_is_known_and_negotiated_is_switched() {
    require!(RWP | RWP_ASYNC);
    let uffd = uffd(RWP);
    let invalid = [
        (RWP_ASYNC, RWP_ASYNC),
        (FeatureFlags::WP_ASYNC, NONE),
        (NONE, FeatureFlags::WP_ASYNC),
        (RWP, NONE),
        (FeatureFlags::from_bits_retain(1 << 40), NONE),
    ];
    for (enable, disable) in invalid {
        let refused = uffd.set_async(enable, disable);
        assert!(matches!(refused, Err(Error::NotSwitchable(_))), "{enable} {disable} {refused:?}");
    }
    let without = self::uffd(NONE);
    let refused = without.set_async(RWP_ASYNC, NONE);
    assert!(matches!(refused, Err(Error::FeatureNeeds { needs: RWP, .. })), "{refused:?}");
    without.set_async(NONE, RWP_ASYNC).unwrap();
}

#[test]
fn kernel_without_rwp_differs_from_invalid_mode() {
    require!();
    if features().contains(RWP) {
        return;
    }
    match uffd(NONE).set_async(RWP_ASYNC, NONE) {
        Err(Error::UnsupportedIoctls(ioctls)) => assert!(!ioctls.contains(IoctlFlags::SET_MODE)),
        other => panic!("{other:?}"),
    }
}
