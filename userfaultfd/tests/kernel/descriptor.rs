//! Descriptors given away, duplicated, passed on, inherited and adopted.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use userfaultfd::{Event, EventBuffer, Uffd, UffdBuilder};

use crate::support::handler::{Fault, fill};
use crate::support::memory::Memory;
use crate::support::raw;
use crate::support::{child, has, page, proc, require, test_name};

/// A blocking userfaultfd, and missing memory that is registered with it.
fn watched(pages: usize) -> (Uffd, Memory) {
    let memory = Memory::anonymous(pages);
    let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
    uffd.register(memory.start(), memory.len()).unwrap();
    (uffd, memory)
}

/// Runs into a fault on a page that is missing, and resolves it.
fn serve(uffd: &Uffd, memory: &Memory, page: usize) {
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory.read(page));
        assert_eq!(Fault::next(uffd).addr, memory.at(page).addr());
        fill(uffd, memory, page, 7);
        assert_eq!(reader.join().unwrap(), 7);
    });
}

/// Resolves one fault of whatever process it is, with a page full of sevens.
fn serve_elsewhere(uffd: &Uffd) {
    let fault = Fault::next(uffd);
    let content = vec![7u8; page()];
    let dst = std::ptr::without_provenance_mut(fault.addr);
    // SAFETY: the content lives on, and the destination is in memory of a process that waits for it.
    let copied = unsafe { uffd.copy(content.as_ptr().cast(), dst, page(), true) };
    assert_eq!(copied.unwrap(), page());
}

#[test]
fn into_raw_fd_leaves_the_descriptor_open() {
    require!();
    let (uffd, memory) = watched(2);
    serve(&uffd, &memory, 0);
    let raw = uffd.into_raw_fd();
    assert!(proc::is_userfaultfd(raw));
    // SAFETY: into_raw_fd gave it away.
    serve(&unsafe { Uffd::from_raw_fd(raw) }, &memory, 1);
}

#[test]
fn descriptor_survives_any_conversion() {
    require!();
    let (uffd, memory) = watched(3);
    serve(&uffd, &memory, 0);
    let owned = OwnedFd::from(uffd);
    let uffd = Uffd::from(owned);
    serve(&uffd, &memory, 1);
    assert_eq!(uffd.as_fd().as_raw_fd(), uffd.as_raw_fd());
    // SAFETY: into_raw_fd gave it away.
    let owned = unsafe { OwnedFd::from_raw_fd(uffd.into_raw_fd()) };
    serve(&Uffd::from(owned), &memory, 2);
}

#[test]
fn dropping_closes() {
    require!();
    child::run_well(test_name!(), || {
        let before = proc::open_descriptors();
        let (uffd, _memory) = watched(1);
        let clone = uffd.try_clone().unwrap();
        let adopted = Uffd::from(OwnedFd::from(uffd));
        assert_eq!(proc::open_descriptors(), before + 2);
        drop((clone, adopted));
        assert_eq!(proc::open_descriptors(), before);
    });
}

#[test]
fn clone_is_the_same_userfaultfd() {
    require!();
    let memory = Memory::anonymous(2);
    let uffd = UffdBuilder::new().create().unwrap();
    uffd.register(memory.start(), memory.len()).unwrap();
    let clone = uffd.try_clone().unwrap();
    assert_eq!((raw::flags(&uffd), raw::flags(&clone)), ((false, false), (true, false)));
    serve(&clone, &memory, 0);
    // It keeps the ranges registered.
    drop(uffd);
    serve(&clone, &memory, 1);
}

#[test]
fn another_process_serves_what_it_is_passed() {
    require!();
    child::run_well(test_name!(), || {
        let (here, there) = UnixStream::pair().unwrap();
        // It is there before the memory, so the address means nothing in it.
        let handler = child::fork(|| serve_elsewhere(&Uffd::from(child::receive_fd(&there))));
        let (uffd, memory) = watched(1);
        child::send_fd(&here, uffd.as_fd());
        drop(uffd);
        assert_eq!(memory.read(0), 7);
        handler.succeed();
    });
}

#[test]
fn descriptor_is_fetched_from_another_process() {
    require!(root);
    child::run_well(test_name!(), || {
        let (mut reader, mut writer) = raw::pipe();
        let child = child::fork(|| {
            let (uffd, memory) = watched(1);
            writer.write_all(&uffd.as_raw_fd().to_ne_bytes()).unwrap();
            assert_eq!(memory.read(0), 7);
        });
        let mut number = [0; 4];
        reader.read_exact(&mut number).unwrap();
        let process = child.pidfd();
        let number = i32::from_ne_bytes(number);
        // SAFETY: touches no memory.
        let fetched = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
        if !has(test_name!(), "pidfd_getfd", fetched >= 0) {
            return;
        }
        serve_elsewhere(&Uffd::from(raw::own(fetched as i32)));
        child.succeed();
    });
}

#[test]
fn inherited_descriptor_is_still_for_parent_s_memory() {
    require!();
    child::run_well(test_name!(), || {
        let (uffd, memory) = watched(1);
        let handler = child::fork(|| {
            serve_elsewhere(&uffd);
            // What lies there in the child is another page, and isn't registered.
            assert_eq!(memory.read(0), 0);
        });
        assert_eq!(memory.read(0), 7);
        handler.succeed();
    });
}

#[test]
fn exec_closes_close_on_exec_descriptor() {
    require!();
    child::run_well(test_name!(), || {
        if let Some(stage) = child::stage() {
            let (number, open) = stage.split_once(' ').unwrap();
            assert_eq!(proc::is_userfaultfd(number.parse().unwrap()), open == "open");
            return;
        }
        let keep = UffdBuilder::new().create().unwrap();
        let close = UffdBuilder::new().close_on_exec(true).create().unwrap();
        let clone = keep.try_clone().unwrap();
        for (uffd, then) in [(&keep, "open"), (&close, "closed"), (&clone, "closed")] {
            let stage = format!("{} {then}", uffd.as_raw_fd());
            child::fork(|| child::execute(test_name!(), &stage)).succeed();
        }
    });
}

#[test]
fn threads_share_a_descriptor() {
    require!();
    fn shared_and_sent<T: Send + Sync>() {}
    shared_and_sent::<Uffd>();
    shared_and_sent::<Event>();
    shared_and_sent::<EventBuffer>();
    shared_and_sent::<UffdBuilder>();

    const HANDLERS: usize = 4;
    let (uffd, memory) = watched(8 * HANDLERS);
    thread::scope(|scope| {
        for _ in 0..HANDLERS {
            // Each message goes to one of them.
            scope.spawn(|| (0..memory.pages() / HANDLERS).for_each(|_| serve_elsewhere(&uffd)));
        }
        let readers: Vec<_> = (0..memory.pages())
            .map(|page| {
                let memory = &memory;
                scope.spawn(move || memory.read(page))
            })
            .collect();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), 7);
        }
    });
    assert_eq!(proc::fdinfo(&uffd).total, 0);
}
