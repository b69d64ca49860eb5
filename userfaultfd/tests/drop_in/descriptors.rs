//! Descriptors as numbers: given away, taken over, watched.

use std::collections::HashMap;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::unix::io::{AsFd, AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::thread;

use userfaultfd as uffd;
use userfaultfd::{FeatureFlags, IoctlFlags, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::require;

/// A descriptor in a wrapper, as event loops want it.
struct Source(Arc<Uffd>);

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: touches no memory.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// A process may open a file meanwhile, so that a number is in use again.
fn is_userfaultfd(fd: RawFd) -> bool {
    let name = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    name.is_ok_and(|name| name.to_string_lossy().contains("userfaultfd"))
}

#[test]
fn number_given_away_stays_open_and_is_taken_over() {
    require!();
    let memory = Mapping::anonymous(2);
    let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
    uffd.register(memory.ptr, memory.len).unwrap();

    // As a monitor does that receives a file over a socket.
    let fd: RawFd = uffd.into_raw_fd();
    assert!(is_open(fd) && is_userfaultfd(fd));
    // SAFETY: nothing else owns the number.
    let file = unsafe { File::from_raw_fd(fd) };
    // SAFETY: nothing else owns the number.
    let uffd = unsafe { Uffd::from_raw_fd(file.into_raw_fd()) };
    assert_eq!(uffd.as_raw_fd(), fd);
    // SAFETY: nothing has read the memory.
    assert_eq!(unsafe { uffd.zeropage(memory.ptr, memory.len, true) }.unwrap(), memory.len);
    assert_eq!(memory.get(1), 0);

    // As one does that is only lent the number.
    // SAFETY: the owner closes it, since this one is never dropped.
    let lent = ManuallyDrop::new(unsafe { Uffd::from_raw_fd(fd) });
    lent.wake(memory.ptr, memory.len).unwrap();
    assert!(is_userfaultfd(uffd.as_fd().as_raw_fd()));
}

#[test]
fn userfaultfd_is_shared_by_threads_and_statics() {
    require!();
    static GLOBAL: OnceLock<Uffd> = OnceLock::new();
    let make = || UffdBuilder::new().close_on_exec(true).non_blocking(true).create().unwrap();
    let global = GLOBAL.get_or_init(make);
    assert!(global.read_event().unwrap().is_none());

    let shared = Arc::new(make());
    let source = Source(Arc::clone(&shared));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let uffd = shared.clone();
            thread::spawn(move || uffd.read_event().unwrap().is_none())
        })
        .collect();
    assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    assert_eq!(source.as_raw_fd(), shared.as_raw_fd());

    let table: HashMap<RawFd, Uffd> = (0..3).map(|_| make()).map(|uffd| (uffd.as_raw_fd(), uffd)).collect();
    for (fd, uffd) in &table {
        assert!(format!("{uffd:?}").contains(&fd.to_string()));
    }
}

#[test]
fn builder_is_a_chain_or_a_variable() {
    require!();
    let chained = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(true)
        .require_features(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP)
        .require_ioctls(IoctlFlags::API | IoctlFlags::REGISTER | IoctlFlags::UNREGISTER)
        .create()
        .expect("a userfaultfd");
    assert!(chained.read_event().unwrap().is_none());

    let mut builder = UffdBuilder::new();
    builder.require_features(FeatureFlags::EVENT_REMOVE);
    builder.close_on_exec(true);
    if page_size() != 0 {
        builder.non_blocking(true);
    }
    let (first, second) = (builder.create().unwrap(), builder.create().unwrap());
    assert_ne!(first.as_raw_fd(), second.as_raw_fd());
}

/// What a program adds to the type.
trait ZeroPage {
    unsafe fn zero_page(&self, page: *mut libc::c_void) -> userfaultfd::Result<usize>;
}

impl ZeroPage for Uffd {
    unsafe fn zero_page(&self, page: *mut libc::c_void) -> userfaultfd::Result<usize> {
        // SAFETY: the caller's promises are the same.
        unsafe { self.zeropage(page, page_size(), true) }
    }
}

#[test]
fn operations_of_a_range_are_required_of_a_builder() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let memory = Mapping::anonymous(1);
    let uffd = uffd::UffdBuilder::new()
        .close_on_exec(true)
        .require_ioctls(uffd::IoctlFlags::ZEROPAGE | uffd::IoctlFlags::WRITE_PROTECT)
        .require_features(uffd::FeatureFlags::PAGEFAULT_FLAG_WP)
        .create()
        .unwrap();
    let modes = uffd::RegisterMode::MISSING | uffd::RegisterMode::WRITE_PROTECT;
    uffd.register_with_mode(memory.ptr, memory.len, modes).unwrap();
    // SAFETY: nothing has read the memory.
    assert_eq!(unsafe { uffd.zero_page(memory.ptr) }.unwrap(), page_size());
}

#[test]
fn kernel_faults_are_optional() {
    require!();
    let mut privileged = UffdBuilder::new();
    privileged
        .close_on_exec(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::empty())
        .require_ioctls(IoctlFlags::empty());
    let uffd = match privileged.create() {
        Ok(uffd) => uffd,
        Err(_) => privileged.user_mode_only(true).create().expect("a userfaultfd"),
    };
    let memory = Mapping::anonymous(1);
    uffd.register(memory.ptr, memory.len).unwrap();
    uffd.unregister(memory.ptr, memory.len).unwrap();
}

#[test]
fn userfaultfd_is_probed_by_creation() {
    require!();
    let available = match UffdBuilder::new().close_on_exec(true).non_blocking(false).create() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("no userfaultfd: {error}, {error:?}");
            false
        }
    };
    assert!(available);
}
