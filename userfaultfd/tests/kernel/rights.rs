//! What a process may do that isn't the superuser's, and what it is told otherwise.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use userfaultfd::pagemap::Pagemap;
use userfaultfd::{
    Errno, Error, FeatureFlags, OpenFailure, OpenRefusal, OpenWith, Pid, Support, UffdBuilder,
};

use crate::support::handler::{Fault, kernel_write, zero};
use crate::support::memory::Memory;
use crate::support::sysctl::{self, Sysctl};
use crate::support::{self, child, has, is_root, proc, raw, require, seccomp, test_name};

/// Becomes nobody, unless this process isn't the superuser's anyway.
fn drop_rights() {
    if is_root() {
        child::drop_rights();
    }
}

/// The setting that admits everybody to faults from kernel mode, as a test wants it.
fn sysctl(test: &str, value: &str) -> Option<Sysctl> {
    let sysctl = sysctl::lock(sysctl::UNPRIVILEGED);
    let met = sysctl.as_ref().is_some_and(|sysctl| sysctl.set(value));
    has(test, &format!("vm.unprivileged_userfaultfd={value}"), met).then_some(sysctl?)
}

fn open_failure(error: Error) -> OpenFailure {
    let Error::OpenFailed(failure) = error else { panic!("{error:?}") };
    failure
}

#[test]
fn faults_from_user_mode_take_no_rights() {
    require!();
    let offered = support::features();
    child::run_well(test_name!(), || {
        // Before Linux 5.11 the system call asks for rights where the setting says so.
        let _sysctl = sysctl::lock(sysctl::UNPRIVILEGED);
        drop_rights();
        for way in [OpenWith::Auto, OpenWith::Syscall] {
            let memory = Memory::anonymous(1);
            let uffd = UffdBuilder::new().user_mode_only(true).open_with(way).create().unwrap();
            uffd.register(memory.start(), memory.len()).unwrap();
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| memory.read(0));
                assert_eq!(Fault::next(&uffd).addr, memory.start().addr());
                zero(&uffd, &memory, 0, 1);
                assert_eq!(reader.join().unwrap(), 0);
            });
        }
        assert_eq!(Support::probe().unwrap().features(), offered);
    });
}

#[test]
fn kernel_faults_are_refused_with_remedy() {
    require!();
    child::run_well(test_name!(), || {
        let Some(_sysctl) = sysctl(test_name!(), "0") else { return };
        let refused = |way| UffdBuilder::new().user_mode_only(false).open_with(way).create().unwrap_err();
        child::fork(|| {
            drop_rights();
            let device = File::open("/dev/userfaultfd").err();
            if !has(test_name!(), "/dev/userfaultfd for root alone", device.is_some()) {
                return;
            }
            let device = device.unwrap();

            // Not a lesser descriptor, as the system call would give one.
            let failure = open_failure(refused(OpenWith::Auto));
            assert_eq!(failure.device().map(|errno| errno as i32), device.raw_os_error());
            assert_eq!(failure.syscall(), Some(Errno::EPERM));
            assert_eq!(failure.reason(), OpenRefusal::NotPermitted);
            let text = failure.to_string();
            let device_errno = format!("/dev/userfaultfd: open: {:?}", failure.device().unwrap());
            for part in
                [&device_errno, "EPERM", "vm.unprivileged_userfaultfd", "user_mode_only", "CAP_SYS_PTRACE"]
            {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
            assert_eq!(io::Error::from(refused(OpenWith::Auto)).kind(), io::ErrorKind::PermissionDenied);

            let failure = open_failure(refused(OpenWith::Syscall));
            assert_eq!((failure.device(), failure.syscall()), (None, Some(Errno::EPERM)));

            let error = refused(OpenWith::Device);
            assert!(error.to_string().contains("/dev/userfaultfd"), "{error}");
            let Error::OpenDevUserfaultfd(cause) = error else { panic!("{error:?}") };
            assert_eq!(cause.raw_os_error(), device.raw_os_error());
        })
        .succeed();
    });
}

#[test]
fn sysctl_admits_everybody_to_faults_from_kernel_mode() {
    require!(root);
    child::run_well(test_name!(), || {
        let Some(_sysctl) = sysctl(test_name!(), "1") else { return };
        child::fork(|| {
            child::drop_rights();
            let memory = Memory::anonymous(1);
            let uffd = UffdBuilder::new().user_mode_only(false).create().unwrap();
            uffd.register(memory.start(), memory.len()).unwrap();
            serve_the_kernel(&uffd, &memory);
        })
        .succeed();
    });
}

/// Has the kernel run into a missing page, and fills it.
fn serve_the_kernel(uffd: &userfaultfd::Uffd, memory: &Memory) {
    std::thread::scope(|scope| {
        let written = scope.spawn(|| kernel_write(memory, 0, 1));
        assert_eq!(Fault::next(uffd).addr, memory.start().addr());
        zero(uffd, memory, 0, 1);
        assert_eq!(written.join().unwrap(), Ok(()));
    });
    assert_eq!(memory.read(0), 1);
}

#[test]
fn device_that_is_handed_over_works_without_rights() {
    require!(root);
    child::run_well(test_name!(), || {
        let device = File::open("/dev/userfaultfd").ok();
        if !has(test_name!(), "/dev/userfaultfd", device.is_some()) {
            return;
        }
        let (here, there) = UnixStream::pair().unwrap();
        let unprivileged = child::fork(|| {
            child::drop_rights();
            let memory = Memory::anonymous(1);
            let device = child::receive_fd(&there);
            let uffd = UffdBuilder::new().user_mode_only(false).from_device(device).unwrap();
            uffd.register(memory.start(), memory.len()).unwrap();
            serve_the_kernel(&uffd, &memory);
        });
        child::send_fd(&here, device.unwrap().as_fd());
        unprivileged.succeed();
    });
}

/// What the kernel offers is asked with a descriptor that takes no rights, whatever the other one takes.
#[test]
fn features_are_probed_without_rights() {
    require!(root);
    child::run_well(test_name!(), || {
        let (device, sysctl) = (File::open("/dev/userfaultfd").ok(), sysctl(test_name!(), "0"));
        if !has(test_name!(), "/dev/userfaultfd", device.is_some()) || sysctl.is_none() {
            return;
        }
        child::fork(|| {
            child::drop_rights();
            let mut builder = UffdBuilder::new();
            builder.user_mode_only(false).request_features(FeatureFlags::THREAD_ID);
            let uffd = builder.from_device(device.as_ref().unwrap()).unwrap();
            assert_eq!(uffd.features(), FeatureFlags::THREAD_ID);
            // Nor does a refusal need more to be told apart.
            let missing = FeatureFlags::from_bits_retain(1 << 40);
            let error = builder.require_features(missing).from_device(device.unwrap()).unwrap_err();
            assert!(
                matches!(error, Error::UnsupportedFeatures { missing: named, .. } if named == missing),
                "{error:?}"
            );
        })
        .succeed();
    });
}

#[test]
fn fork_events_take_a_capability() {
    require!();
    let others = support::features().difference(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        // Before Linux 5.11 the system call asks for rights where the setting says so.
        let _sysctl = sysctl::lock(sysctl::UNPRIVILEGED);
        drop_rights();
        let refused = [
            UffdBuilder::new().require_features(FeatureFlags::EVENT_FORK).create(),
            UffdBuilder::new().require_features(FeatureFlags::EVENT_FORK).handshake(raw::unshaken(0)),
            // The required one is named, whatever else is wished for.
            UffdBuilder::new()
                .require_features(FeatureFlags::EVENT_FORK)
                .request_features(FeatureFlags::all())
                .create(),
        ];
        for result in refused {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::FeatureNotPermitted(FeatureFlags::EVENT_FORK)), "{error:?}");
            assert_eq!(error.errno(), Some(Errno::EPERM));
            assert!(error.to_string().contains("CAP_SYS_PTRACE"), "{error}");
        }
        let uffd = UffdBuilder::new().request_features(FeatureFlags::all()).create().unwrap();
        assert_eq!(uffd.features(), others);
    });
}

#[test]
fn pages_of_another_user_are_hidden() {
    require!(root);
    child::run_well(test_name!(), || {
        let here = Pid::from_raw(std::process::id() as i32);
        if !has(test_name!(), "CONFIG_PROC_PAGE_MONITOR", Pagemap::of(here).is_ok()) {
            return;
        }
        child::fork(|| {
            child::drop_rights();
            let error = Pagemap::of(here).unwrap_err();
            assert!(matches!(error, Error::NoAccess { errno: Errno::EACCES, .. }), "{error:?}");
            assert!(error.to_string().contains("ptrace"), "{error}");
        })
        .succeed();
    });
}

#[test]
fn denying_filter_differs_from_hiding_one() {
    require!();
    child::run_well(test_name!(), || {
        for (errno, reason) in
            [(Errno::EPERM, OpenRefusal::NotPermitted), (Errno::ENOSYS, OpenRefusal::NotBuiltIn)]
        {
            child::fork(|| {
                drop_rights();
                let no_device = File::open("/dev/userfaultfd").is_err();
                if !has(test_name!(), "/dev/userfaultfd for root alone", no_device)
                    || !has(test_name!(), "seccomp", seccomp::refuse_userfaultfd(errno))
                {
                    return;
                }
                let failure = open_failure(UffdBuilder::new().create().unwrap_err());
                assert_eq!((failure.syscall(), failure.reason()), (Some(errno), reason));
                assert!(failure.to_string().contains("seccomp"), "{failure}");
                let failure = open_failure(Support::probe().unwrap_err());
                assert_eq!(failure.reason(), reason);
            })
            .succeed();
        }
    });
}

#[test]
fn device_works_where_filter_refuses_system_call() {
    require!(root);
    child::run_well(test_name!(), || {
        if !has(test_name!(), "/dev/userfaultfd", File::open("/dev/userfaultfd").is_ok())
            || !has(test_name!(), "seccomp", seccomp::refuse_userfaultfd(Errno::EPERM))
        {
            return;
        }
        let failure = open_failure(UffdBuilder::new().open_with(OpenWith::Syscall).create().unwrap_err());
        assert_eq!(failure.syscall(), Some(Errno::EPERM));
        let uffd = UffdBuilder::new().user_mode_only(false).create().unwrap();
        assert!(proc::is_userfaultfd(uffd.as_raw_fd()));
    });
}
