//! userfaultfd(2) and /dev/userfaultfd: how a descriptor comes into being.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use userfaultfd::{Errno, Error, OpenRefusal, OpenWith, Uffd, UffdBuilder};

use crate::support::handler::{Fault, kernel_write, zero};
use crate::support::memory::Memory;
use crate::support::mounts::{self, Device};
use crate::support::{self, child, foreign, has, proc, raw, require, test_name};

/// The ways that are open to this process.
fn ways(test: &str) -> Vec<OpenWith> {
    let mut ways = vec![OpenWith::Auto, OpenWith::Syscall];
    ways.extend(device(test).map(|_| OpenWith::Device));
    ways
}

/// The device, where this process may open it.
fn device(test: &str) -> Option<File> {
    let device = File::open("/dev/userfaultfd").ok();
    has(test, "/dev/userfaultfd", device.is_some()).then_some(device?)
}

#[test]
fn every_way_makes_a_userfaultfd() {
    require!();
    for way in ways(test_name!()) {
        let memory = Memory::anonymous(1);
        let uffd = UffdBuilder::new().open_with(way).create().unwrap();
        assert!(proc::is_userfaultfd(uffd.as_raw_fd()), "{way:?}");
        uffd.register(memory.start(), memory.len()).unwrap();
    }
}

#[test]
fn device_that_is_open_makes_userfaultfds() {
    require!();
    let Some(device) = device(test_name!()) else { return };
    for _ in 0..2 {
        let memory = Memory::anonymous(1);
        let uffd = UffdBuilder::new().from_device(&device).unwrap();
        uffd.register(memory.start(), memory.len()).unwrap();
    }
}

#[test]
fn descriptor_has_requested_flags() {
    require!();
    let device = device(test_name!());
    for (close_on_exec, non_blocking) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut builder = UffdBuilder::new();
        builder.close_on_exec(close_on_exec).non_blocking(non_blocking);
        let mut made: Vec<Uffd> =
            ways(test_name!()).into_iter().map(|way| builder.open_with(way).create().unwrap()).collect();
        made.extend(device.as_ref().map(|device| builder.from_device(device).unwrap()));
        for uffd in made {
            assert_eq!(raw::flags(&uffd), (close_on_exec, non_blocking));
        }
    }
}

#[test]
fn for_user_mode_only_kernel_s_own_faults_are_refused() {
    require!();
    if !has(test_name!(), "UFFD_USER_MODE_ONLY", raw::knows_user_mode_only()) {
        return;
    }
    for way in ways(test_name!()) {
        // It is the default.
        for builder in [&mut UffdBuilder::new(), UffdBuilder::new().user_mode_only(true)] {
            let memory = Memory::anonymous(1);
            let uffd = builder.open_with(way).non_blocking(true).create().unwrap();
            uffd.register(memory.start(), memory.len()).unwrap();
            assert_eq!(kernel_write(&memory, 0, 1), Err(Errno::EFAULT));
            assert!(uffd.read_event().unwrap().is_none());
        }
    }
}

#[test]
fn kernel_faults_are_delivered_without_user_mode_only() {
    require!(root);
    if !has(test_name!(), "CAP_SYS_PTRACE", support::may_watch_forks()) {
        return;
    }
    for way in ways(test_name!()) {
        let memory = Memory::anonymous(1);
        let uffd = UffdBuilder::new().open_with(way).user_mode_only(false).create().unwrap();
        uffd.register(memory.start(), memory.len()).unwrap();
        std::thread::scope(|scope| {
            let written = scope.spawn(|| kernel_write(&memory, 0, 1));
            assert_eq!(Fault::next(&uffd).addr, memory.start().addr());
            zero(&uffd, &memory, 0, 1);
            assert_eq!(written.join().unwrap(), Ok(()));
        });
        assert_eq!(memory.read(0), 1);
    }
}

#[test]
fn other_descriptors_are_refused_as_device() {
    require!();
    for (name, descriptor) in foreign::descriptors() {
        if name == "the device" {
            continue;
        }
        let error = UffdBuilder::new().from_device(descriptor).unwrap_err();
        assert!(error.to_string().contains("USERFAULTFD_IOC_NEW"), "{error}");
        let Error::OpenFailed(failure) = error else { panic!("{name}: {error:?}") };
        assert_eq!((failure.device(), failure.syscall()), (Some(Errno::ENOTTY), None), "{name}");
        assert_eq!(failure.reason(), OpenRefusal::Other);
    }
    // A userfaultfd isn't the device either.
    let error = UffdBuilder::new().from_device(UffdBuilder::new().create().unwrap()).unwrap_err();
    assert!(matches!(error, Error::OpenFailed(_)), "{error:?}");
    assert_eq!(error.errno(), Some(Errno::ENOTTY));
}

#[test]
fn system_call_is_used_without_device() {
    require!(root);
    child::run_well(test_name!(), || {
        if !has(test_name!(), "mount namespaces", mounts::own()) {
            return;
        }
        let user_mode_only = !support::may_watch_forks();
        for (device, errno) in [
            (Device::Missing, Errno::ENOENT),
            (Device::WithoutDriver, Errno::ENXIO),
            (Device::NotAllowed, Errno::EACCES),
            (Device::Foreign, Errno::ENOTTY),
            (Device::File, Errno::ENOTTY),
            (Device::Directory, Errno::ENOTTY),
        ] {
            mounts::replace(device);
            let before = proc::open_descriptors();
            let uffd = UffdBuilder::new().create().unwrap();
            assert!(proc::is_userfaultfd(uffd.as_raw_fd()), "{device:?}");
            UffdBuilder::new().user_mode_only(user_mode_only).create().unwrap();

            let error = UffdBuilder::new().open_with(OpenWith::Device).create().unwrap_err();
            assert_eq!(error.errno(), Some(errno), "{device:?}: {error:?}");
            match error {
                // It can be opened.
                Error::OpenFailed(failure) if errno == Errno::ENOTTY => {
                    assert_eq!((failure.device(), failure.syscall()), (Some(errno), None));
                }
                Error::OpenDevUserfaultfd(cause) => assert_eq!(cause.raw_os_error(), Some(errno as i32)),
                error => panic!("{device:?}: {error:?}"),
            }
            drop(uffd);
            assert_eq!(proc::open_descriptors(), before, "{device:?}");
        }
    });
}

#[test]
fn opening_leaves_one_descriptor_open() {
    require!();
    child::run_well(test_name!(), || {
        for way in ways(test_name!()) {
            let before = proc::open_descriptors();
            let uffd = UffdBuilder::new().open_with(way).create().unwrap();
            assert_eq!(proc::open_descriptors(), before + 1, "{way:?}");
            drop(uffd);
            assert_eq!(proc::open_descriptors(), before, "{way:?}");
        }
    });
}

#[test]
fn creation_without_free_descriptor_says_so() {
    require!();
    child::run_well(test_name!(), || {
        let device = device(test_name!());
        let full = child::use_up_descriptors();
        let mut errors = vec![
            UffdBuilder::new().create().unwrap_err(),
            UffdBuilder::new().open_with(OpenWith::Syscall).create().unwrap_err(),
        ];
        errors.extend(
            device.as_ref().map(|device| UffdBuilder::new().from_device(device.as_fd()).unwrap_err()),
        );
        drop(full);
        for error in errors {
            assert_eq!(error.errno(), Some(Errno::EMFILE), "{error:?}");
            assert!(error.to_string().contains("ulimit -n"), "{error}");
            let Error::OpenFailed(failure) = error else { panic!("{error:?}") };
            assert_eq!(failure.reason(), OpenRefusal::Other);
        }
    });
}

#[test]
fn clone_takes_a_free_descriptor() {
    require!();
    child::run_well(test_name!(), || {
        let uffd = UffdBuilder::new().create().unwrap();
        let full = child::use_up_descriptors();
        let error = uffd.try_clone().unwrap_err();
        drop(full);
        assert!(matches!(error, Error::SystemError(Errno::EMFILE)), "{error:?}");
    });
}
