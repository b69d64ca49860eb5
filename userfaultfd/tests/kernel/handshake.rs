//! UFFDIO_API: what is asked for, what is got, and descriptors that can't be asked.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use userfaultfd::{Errno, Error, FeatureFlags, IoctlFlags, Uffd, UffdBuilder};

use crate::support::handler::{Fault, zero};
use crate::support::memory::Memory;
use crate::support::{self, child, foreign, has, mounts, proc, raw, require, test_name};

/// A feature that no kernel has.
const UNKNOWN: FeatureFlags = FeatureFlags::from_bits_retain(1 << 62);

#[test]
fn descriptor_made_elsewhere_shakes_hands() {
    require!(FeatureFlags::THREAD_ID);
    let memory = Memory::anonymous(1);
    let mut builder = UffdBuilder::new();
    let uffd = builder.require_features(FeatureFlags::THREAD_ID).handshake(raw::unshaken(0)).unwrap();
    assert_eq!(uffd.features(), FeatureFlags::THREAD_ID);
    uffd.register(memory.start(), memory.len()).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| (proc::thread_id(), memory.read(0)));
        let thread = Fault::next(&uffd).thread;
        zero(&uffd, &memory, 0, 1);
        assert_eq!(reader.join().unwrap(), (thread, 0));
    });
}

#[test]
fn second_handshake_is_refused() {
    require!();
    let uffd = UffdBuilder::new().create().unwrap();
    assert_eq!(raw::api(&uffd, FeatureFlags::empty()), Err(Errno::EINVAL));
    let error = UffdBuilder::new().handshake(uffd.into()).unwrap_err();
    assert!(matches!(error, Error::AlreadyHandshaken), "{error:?}");

    // A handshake that asked for nothing counts, too, and one that asks for a feature that isn't there is
    // told apart.
    let descriptor = raw::unshaken(0);
    raw::api(&descriptor, FeatureFlags::empty()).unwrap();
    let again = descriptor.try_clone().unwrap();
    let error = UffdBuilder::new().handshake(descriptor).unwrap_err();
    assert!(matches!(error, Error::AlreadyHandshaken), "{error:?}");
    let error = UffdBuilder::new().require_features(UNKNOWN).handshake(again).unwrap_err();
    assert!(matches!(error, Error::UnsupportedFeatures { missing: UNKNOWN, .. }), "{error:?}");
}

#[test]
fn refused_handshake_leaves_the_descriptor_as_it_was() {
    require!(FeatureFlags::THREAD_ID);
    let descriptor = raw::unshaken(0);
    assert_eq!(raw::api(&descriptor, UNKNOWN), Err(Errno::EINVAL));
    let again = descriptor.try_clone().unwrap();
    let error = UffdBuilder::new().require_features(UNKNOWN).handshake(again).unwrap_err();
    assert!(matches!(error, Error::UnsupportedFeatures { .. }), "{error:?}");
    let uffd = UffdBuilder::new().require_features(FeatureFlags::THREAD_ID).handshake(descriptor).unwrap();
    assert_eq!(uffd.features(), FeatureFlags::THREAD_ID);
}

#[test]
fn refused_handshake_closes_what_it_was_given() {
    require!();
    child::run_well(test_name!(), || {
        let before = proc::open_descriptors();
        for descriptor in [raw::unshaken(0), OwnedFd::from(UffdBuilder::new().create().unwrap())] {
            UffdBuilder::new().require_features(UNKNOWN).handshake(descriptor).unwrap_err();
        }
        for (_, descriptor) in foreign::descriptors() {
            UffdBuilder::new().handshake(descriptor).unwrap_err();
        }
        assert_eq!(proc::open_descriptors(), before);
    });
}

#[test]
fn other_descriptors_are_refused_as_userfaultfds() {
    require!();
    for (name, descriptor) in foreign::descriptors() {
        let error = UffdBuilder::new().handshake(descriptor).unwrap_err();
        assert!(matches!(error, Error::NotUserfaultfd), "{name}: {error:?}");
        assert_eq!(error.errno(), Some(Errno::ENOTTY));
    }
}

#[test]
fn required_features_that_are_missing_are_named() {
    require!(FeatureFlags::EVENT_REMAP);
    let mut builder = UffdBuilder::new();
    let error = builder.require_features(FeatureFlags::EVENT_REMAP | UNKNOWN).create().unwrap_err();
    assert!(error.to_string().contains("0x4000000000000000"), "{error}");
    assert_eq!(error.errno(), Some(Errno::EINVAL));
    let Error::UnsupportedFeatures { missing, supported } = error else { panic!("{error:?}") };
    assert_eq!((missing, supported), (UNKNOWN, support::features()));
}

#[test]
fn async_rwp_alone_is_refused() {
    require!();
    let error = UffdBuilder::new().require_features(FeatureFlags::RWP_ASYNC).create().unwrap_err();
    if support::features().contains(FeatureFlags::RWP_ASYNC) {
        let Error::FeatureNeeds { feature, needs } = error else { panic!("{error:?}") };
        assert_eq!((feature, needs), (FeatureFlags::RWP_ASYNC, FeatureFlags::RWP));
    } else {
        let Error::UnsupportedFeatures { missing, .. } = error else { panic!("{error:?}") };
        assert_eq!(missing, FeatureFlags::RWP_ASYNC);
    }
    let uffd = UffdBuilder::new().request_features(FeatureFlags::RWP_ASYNC).create().unwrap();
    assert_eq!(uffd.features(), FeatureFlags::empty());
}

#[test]
fn requested_features_are_those_that_there_are() {
    require!();
    let mut expected = support::features();
    if !support::may_watch_forks() {
        expected.remove(FeatureFlags::EVENT_FORK);
    }
    let uffd = UffdBuilder::new().request_features(FeatureFlags::all() | UNKNOWN).create().unwrap();
    assert_eq!((uffd.features(), proc::fdinfo(&uffd).features), (expected, expected));
    // Also on a descriptor that was refused them once.
    let mut builder = UffdBuilder::new();
    let uffd = builder.request_features(FeatureFlags::all() | UNKNOWN).handshake(raw::unshaken(0)).unwrap();
    assert_eq!((uffd.features(), proc::fdinfo(&uffd).features), (expected, expected));
}

#[test]
fn unrequested_features_stay_disabled() {
    require!();
    let uffd = UffdBuilder::new().create().unwrap();
    assert_eq!((uffd.features(), proc::fdinfo(&uffd).features), Default::default());
}

#[test]
fn wp_async_adds_wp_unpopulated() {
    require!(FeatureFlags::WP_ASYNC);
    let both = FeatureFlags::WP_ASYNC | FeatureFlags::WP_UNPOPULATED;
    let uffd = UffdBuilder::new().require_features(FeatureFlags::WP_ASYNC).create().unwrap();
    assert_eq!((uffd.features(), proc::fdinfo(&uffd).features), (both, both));
}

#[test]
fn every_handle_returns_enabled_features() {
    require!(FeatureFlags::THREAD_ID | FeatureFlags::EVENT_REMAP);
    let features = FeatureFlags::THREAD_ID | FeatureFlags::EVENT_REMAP;
    let mut builder = UffdBuilder::new();
    let created = builder.require_features(features).create().unwrap();
    let cloned = created.try_clone().unwrap();
    let adopted = Uffd::from(OwnedFd::from(created.try_clone().unwrap()));
    let raw = created.try_clone().unwrap().into_raw_fd();
    // SAFETY: into_raw_fd gave it away.
    let from_raw = unsafe { Uffd::from_raw_fd(raw) };
    let handshaken = builder.handshake(raw::unshaken(0)).unwrap();

    let (_, ioctls) = raw::api(raw::unshaken(0), FeatureFlags::empty()).unwrap();
    for uffd in [created, cloned, adopted, from_raw, handshaken] {
        assert_eq!((uffd.features(), uffd.ioctls()), (features, ioctls), "{uffd:?}");
        assert_eq!(proc::fdinfo(&uffd).features, features);
    }
}

#[test]
fn adopted_descriptor_without_proc_has_no_features() {
    require!(FeatureFlags::THREAD_ID, root);
    child::run_well(test_name!(), || {
        if !has(test_name!(), "mount namespaces", mounts::own()) {
            return;
        }
        mounts::hide_proc();
        let features = FeatureFlags::THREAD_ID;
        let uffd = UffdBuilder::new().require_features(features).create().unwrap();
        assert_eq!(uffd.features(), features);
        let adopted = Uffd::from(OwnedFd::from(uffd));
        assert!(adopted.features().is_empty() && adopted.ioctls().is_empty());
        // What it is can still be told.
        let error = UffdBuilder::new().handshake(raw::pipe().0.into()).unwrap_err();
        assert!(matches!(error, Error::NotUserfaultfd), "{error:?}");
        UffdBuilder::new().handshake(raw::unshaken(0)).unwrap();
    });
}

#[test]
fn operations_of_the_descriptor_can_be_required() {
    require!();
    let basic = IoctlFlags::API | IoctlFlags::REGISTER | IoctlFlags::UNREGISTER;
    let uffd = UffdBuilder::new().require_ioctls(basic | IoctlFlags::COPY).create().unwrap();
    assert!(uffd.ioctls().contains(basic));
    let result = UffdBuilder::new().require_ioctls(IoctlFlags::SET_MODE).create();
    if support::features().contains(FeatureFlags::RWP) {
        assert!(result.unwrap().ioctls().contains(IoctlFlags::SET_MODE));
    } else {
        let Err(Error::UnsupportedIoctls(there)) = result else { panic!("{result:?}") };
        assert_eq!(there, basic);
    }
}

#[test]
fn operations_fail_before_handshake() {
    require!();
    let memory = Memory::anonymous(1);
    let (start, len) = (memory.start(), memory.len());
    let uffd = Uffd::from(raw::unshaken(libc::O_NONBLOCK));
    assert_eq!(uffd.features(), FeatureFlags::empty());
    assert_eq!(raw::poll(&uffd), libc::POLLERR);
    let content = vec![1u8; len];
    // SAFETY: the content lives on, and the memory is only accessed by raw pointers.
    let copied = unsafe { uffd.copy(content.as_ptr().cast(), start, len, true) };
    let errors = [
        uffd.register(start, len).map(drop),
        uffd.unregister(start, len),
        uffd.wake(start, len),
        uffd.write_protect(start, len),
        uffd.read_event().map(drop),
        copied.map(drop),
    ];
    for result in errors {
        assert_eq!(result.unwrap_err().errno(), Some(Errno::EINVAL));
    }
    // It can be made up for.
    let uffd = UffdBuilder::new().handshake(uffd.into()).unwrap();
    uffd.register(start, len).unwrap();
    assert_eq!(raw::poll(&uffd), 0);
}

#[test]
fn refusal_that_cannot_be_explained_keeps_its_errno() {
    require!();
    child::run_well(test_name!(), || {
        let descriptor = raw::unshaken(0);
        let full = child::use_up_descriptors();
        let error = UffdBuilder::new().require_features(UNKNOWN).handshake(descriptor).unwrap_err();
        drop(full);
        assert!(matches!(error, Error::SystemError(Errno::EINVAL)), "{error:?}");
    });
}
