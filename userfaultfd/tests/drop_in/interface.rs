//! Every item of 0.9's interface, with the type that it had. A change of one doesn't build.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::c_void;
use std::fmt::{Debug, Display};
use std::hash::Hash;
use std::io;
use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, BitXor, Not, Sub};
use std::os::unix::io::{AsFd, AsRawFd, FromRawFd, IntoRawFd};

use nix::errno::Errno;
use nix::unistd::Pid;
use userfaultfd::{
    Error, Event, EventBuffer, FaultKind, FeatureFlags, IoctlFlags, ReadWrite, RegisterMode, Result, Uffd,
    UffdBuilder,
};

#[test]
fn functions_have_their_types() {
    let _: fn() -> UffdBuilder = UffdBuilder::new;
    let _: for<'a> fn(&'a mut UffdBuilder, bool) -> &'a mut UffdBuilder = UffdBuilder::close_on_exec;
    let _: for<'a> fn(&'a mut UffdBuilder, bool) -> &'a mut UffdBuilder = UffdBuilder::non_blocking;
    let _: for<'a> fn(&'a mut UffdBuilder, bool) -> &'a mut UffdBuilder = UffdBuilder::user_mode_only;
    let _: for<'a> fn(&'a mut UffdBuilder, FeatureFlags) -> &'a mut UffdBuilder =
        UffdBuilder::require_features;
    let _: for<'a> fn(&'a mut UffdBuilder, IoctlFlags) -> &'a mut UffdBuilder = UffdBuilder::require_ioctls;
    let _: fn(&UffdBuilder) -> Result<Uffd> = UffdBuilder::create;

    let _: fn(&Uffd, *mut c_void, usize) -> Result<IoctlFlags> = Uffd::register;
    let _: fn(&Uffd, *mut c_void, usize, RegisterMode) -> Result<IoctlFlags> = Uffd::register_with_mode;
    let _: fn(&Uffd, *mut c_void, usize) -> Result<()> = Uffd::unregister;
    let _: fn(&Uffd, *mut c_void, usize) -> Result<()> = Uffd::wake;
    let _: unsafe fn(&Uffd, *const c_void, *mut c_void, usize, bool) -> Result<usize> = Uffd::copy;
    let _: unsafe fn(&Uffd, *mut c_void, usize, bool) -> Result<usize> = Uffd::zeropage;
    let _: fn(&Uffd, *mut c_void, usize) -> Result<()> = Uffd::write_protect;
    let _: fn(&Uffd, *mut c_void, usize, bool) -> Result<()> = Uffd::remove_write_protection;
    let _: fn(&Uffd, *mut c_void, usize, bool) -> Result<u64> = Uffd::r#continue;
    let _: fn(&Uffd) -> Result<Option<Event>> = Uffd::read_event;
    let _: fn(usize) -> EventBuffer = EventBuffer::new;

    // The error of `Result` is this crate's, and the other parameter comes first.
    let _: fn(Result<u8>) -> std::result::Result<u8, userfaultfd::Error> = |result| result;
    // libc's `c_void` and the standard library's are one.
    let _: fn(&Uffd, *mut libc::c_void, usize) -> Result<()> = Uffd::wake;
}

/// What `read_events` returns borrows the buffer and not the userfaultfd, which is gone here when the events are used.
fn events_of(uffd: Uffd, buffer: &mut EventBuffer) -> impl Iterator<Item = Result<Event>> + '_ {
    uffd.read_events(buffer).unwrap()
}

#[test]
fn events_outlive_the_userfaultfd() {
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create().unwrap();
    let mut buffer = EventBuffer::new(4);
    assert!(events_of(uffd, &mut buffer).next().is_none());
}

fn is_a_handle<T: Debug + Send + Sync + AsFd + AsRawFd + FromRawFd + IntoRawFd + 'static>() {}
fn is_an_error<T: std::error::Error + Display + Send + Sync + From<Errno> + 'static>() {}
fn is_a_value<T: Copy + Clone + Debug + PartialEq>() {}
fn is_a_set<T>()
where
    T: Copy + Clone + Debug + Eq + Hash + Ord + PartialEq + PartialOrd + Send + Sync + 'static,
    T: BitOr<Output = T> + BitAnd<Output = T> + BitXor<Output = T> + Sub<Output = T> + Not<Output = T>,
    T: BitOrAssign + BitAndAssign + Extend<T> + FromIterator<T>,
{
}

#[test]
fn types_have_their_traits() {
    is_a_handle::<Uffd>();
    is_an_error::<Error>();
    is_a_value::<FaultKind>();
    is_a_value::<ReadWrite>();
    is_a_set::<FeatureFlags>();
    is_a_set::<IoctlFlags>();
    is_a_set::<RegisterMode>();
    let _: fn(&Event) -> &dyn Debug = |event| event;
    let _: fn(EventBuffer) -> Box<dyn Send> = |buffer| Box::new(buffer);
}

#[test]
fn flags_have_the_kernel_s_bits() {
    let features = [
        FeatureFlags::PAGEFAULT_FLAG_WP,
        FeatureFlags::EVENT_FORK,
        FeatureFlags::EVENT_REMAP,
        FeatureFlags::EVENT_REMOVE,
        FeatureFlags::MISSING_HUGETLBFS,
        FeatureFlags::MISSING_SHMEM,
        FeatureFlags::EVENT_UNMAP,
        FeatureFlags::SIGBUS,
        FeatureFlags::THREAD_ID,
        FeatureFlags::MINOR_HUGETLBFS,
        FeatureFlags::MINOR_SHMEM,
        FeatureFlags::EXACT_ADDRESS,
        FeatureFlags::WP_HUGETLBFS_SHMEM,
        FeatureFlags::WP_UNPOPULATED,
        FeatureFlags::POISON,
        FeatureFlags::WP_ASYNC,
    ];
    for (bit, feature) in features.into_iter().enumerate() {
        assert_eq!(feature.bits(), 1_u64 << bit, "{feature:?}");
    }
    let ioctls = [
        (IoctlFlags::REGISTER, 0x00),
        (IoctlFlags::UNREGISTER, 0x01),
        (IoctlFlags::WAKE, 0x02),
        (IoctlFlags::COPY, 0x03),
        (IoctlFlags::ZEROPAGE, 0x04),
        (IoctlFlags::WRITE_PROTECT, 0x06),
        (IoctlFlags::API, 0x3f),
    ];
    for (ioctl, bit) in ioctls {
        assert_eq!(ioctl.bits(), 1_u64 << bit, "{ioctl:?}");
    }
    assert_eq!(RegisterMode::MISSING.bits(), 1);
    assert_eq!(RegisterMode::WRITE_PROTECT.bits(), 2);
    assert_eq!(RegisterMode::MINOR.bits(), 4);
    // Ioctls of newer kernels come through.
    assert_eq!(IoctlFlags::from_bits(1 << 40).map(|flags| flags.bits()), Some(1 << 40));
    assert_eq!(IoctlFlags::from_bits_truncate(1 << 40).bits(), 1 << 40);
}

#[test]
fn flags_work_as_sets() {
    const BALLOON: FeatureFlags = FeatureFlags::EVENT_REMOVE.union(FeatureFlags::THREAD_ID);
    let mut features = FeatureFlags::empty();
    assert!(features.is_empty());
    features |= FeatureFlags::EVENT_REMOVE;
    features.insert(FeatureFlags::THREAD_ID);
    assert_eq!(features, BALLOON);
    assert!(FeatureFlags::all().contains(features) && features.intersects(FeatureFlags::THREAD_ID));
    features.set(FeatureFlags::EVENT_REMOVE, false);
    features.remove(FeatureFlags::THREAD_ID);
    features.toggle(FeatureFlags::SIGBUS);
    assert_eq!(features, FeatureFlags::from_bits_retain(0x80));
    assert_eq!(FeatureFlags::from_bits(0x80), Some(FeatureFlags::SIGBUS));
    assert_eq!(BALLOON - FeatureFlags::THREAD_ID, BALLOON & !FeatureFlags::THREAD_ID);
    assert_eq!(BALLOON.iter().collect::<FeatureFlags>(), BALLOON);
    assert_eq!(BALLOON.iter_names().map(|(name, _)| name).collect::<Vec<_>>(), ["EVENT_REMOVE", "THREAD_ID"]);

    let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT | RegisterMode::MINOR;
    assert_eq!(modes.bits(), 7);
    assert_eq!(format!("{modes:?}"), "RegisterMode(MISSING | WRITE_PROTECT | MINOR)");
    assert_eq!(HashSet::from([modes, modes]).len(), 1);
    assert_eq!(HashMap::from([(IoctlFlags::COPY, "copy")])[&IoctlFlags::COPY], "copy");
    assert!(BTreeSet::from([FeatureFlags::SIGBUS, BALLOON]).contains(&BALLOON));
    assert!(RegisterMode::MISSING < RegisterMode::MINOR);
}

#[test]
fn events_have_their_fields() {
    // Without a last arm for all else: programs match all five.
    let describe = |event: &Event| match event {
        Event::Pagefault { kind: FaultKind::Missing, rw: ReadWrite::Write, addr, thread_id } => {
            let (addr, thread_id): (*mut c_void, Pid) = (*addr, *thread_id);
            format!("{addr:p} by {thread_id}")
        }
        Event::Pagefault { kind, rw, addr, .. } => format!("{kind:?} {rw:?} {:#x}", *addr as u64),
        Event::Fork { uffd } => format!("{}", uffd.as_raw_fd()),
        Event::Remap { from, to, len } => format!("{:?} {:?}", *from as usize..*from as usize + len, to),
        Event::Remove { start, end } | Event::Unmap { start, end } => {
            format!("{} bytes", *end as usize - *start as usize)
        }
    };
    let page = |number: usize| (number * 4096) as *mut c_void;
    let (kind, rw, addr, thread_id) = (FaultKind::Missing, ReadWrite::Write, page(1), Pid::from_raw(7));
    assert_eq!(describe(&Event::Pagefault { kind, rw, addr, thread_id }), "0x1000 by 7");
    let (kind, rw) = (FaultKind::WriteProtected, ReadWrite::Read);
    assert_eq!(describe(&Event::Pagefault { kind, rw, addr, thread_id }), "WriteProtected Read 0x1000");
    assert_ne!(kind, FaultKind::Minor);
    let (from, to, len): (*mut c_void, *mut c_void, usize) = (page(1), page(2), 4096);
    assert_eq!(describe(&Event::Remap { from, to, len }), "4096..8192 0x2000");
    assert_eq!(describe(&Event::Remove { start: page(1), end: page(3) }), "8192 bytes");
    assert_eq!(describe(&Event::Unmap { start: page(1), end: page(3) }), "8192 bytes");
}

#[test]
fn errors_have_their_fields() {
    let errors = [
        Error::CopyFailed(Errno::EEXIST),
        Error::PartiallyCopied(4096_usize),
        Error::IncompleteMsg { read: 8_usize, expected: 32_usize },
        Error::SystemError(Errno::EINVAL),
        Error::ReadEof,
        Error::UnrecognizedEvent(0x17_u8),
        Error::UnsupportedIoctls(IoctlFlags::API),
        Error::ZeropageFailed(Errno::ENOENT),
        Error::OpenDevUserfaultfd(io::Error::from(io::ErrorKind::PermissionDenied)),
    ];
    for error in errors {
        assert!(!error.to_string().is_empty());
        let number: Option<i32> = match error {
            Error::CopyFailed(errno) | Error::SystemError(errno) | Error::ZeropageFailed(errno) => {
                Some(errno as i32)
            }
            Error::OpenDevUserfaultfd(error) => error.raw_os_error(),
            Error::PartiallyCopied(done) => i32::try_from(done).ok(),
            Error::IncompleteMsg { read, expected } => i32::try_from(expected - read).ok(),
            Error::UnrecognizedEvent(event) => Some(event.into()),
            Error::UnsupportedIoctls(ioctls) => ioctls.contains(IoctlFlags::API).then_some(1),
            Error::ReadEof => None,
            other => panic!("{other}"),
        };
        assert_ne!(number, Some(0));
    }
}
