//! UFFDIO_MOVE. What it has in common with other fills is tested in `fill`.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use userfaultfd::{Errno, Error, FaultKind, FeatureFlags, MoveMode, RegisterMode, Result, Uffd};

use crate::support::fault::{self, Fault};
use crate::support::memory::{Kind, Memory};
use crate::support::raw::check;
use crate::support::{child, errno, has, nowhere, page, require, test_name, uffd};

/// Moves the first `pages` pages of a source to the beginning of a destination.
fn move_pages(
    uffd: &Uffd,
    source: &Memory,
    destination: &Memory,
    pages: usize,
    mode: MoveMode,
) -> Result<usize> {
    // SAFETY: both are only accessed by raw pointers.
    unsafe { uffd.move_pages(source.start(), destination.start(), pages * source.page(), mode) }
}

const PLAIN: MoveMode = MoveMode::empty();

/// A destination of `pages` pages that is registered, and its userfaultfd.
fn destination(pages: usize) -> (Uffd, Memory) {
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(pages));
    uffd.register(memory.start(), memory.len()).unwrap();
    (uffd, memory)
}

/// Pages with their number, from 1 on, in their first byte.
fn numbered(pages: usize) -> Memory {
    let memory = Memory::anonymous(pages);
    (0..pages).for_each(|page| memory.write(page, page as u8 + 1));
    memory
}

#[test]
fn fault_is_resolved_by_pages_that_are_gone_elsewhere() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = destination(2);
    let source = numbered(2);
    let byte = fault::during(
        &uffd,
        &memory,
        || memory.read(1),
        |faults| {
            assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 1));
            assert_eq!(move_pages(&uffd, &source, &memory, 2, PLAIN).unwrap(), 2 * page());
        },
    );
    assert_eq!((memory.read(0), byte), (1, 2));
    // The source isn't registered, so its holes are zeros.
    assert_eq!([0, 1].map(|page| source.state(page).present), [false; 2]);
    let bytes = fault::silently(&uffd, &source, || [0, 1].map(|page| source.read(page)));
    assert_eq!(bytes, [0; 2]);
}

#[test]
fn holes_of_a_registered_source_are_missing() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = destination(1);
    let source = numbered(1);
    uffd.register(source.start(), source.len()).unwrap();
    move_pages(&uffd, &source, &memory, 1, PLAIN).unwrap();
    let byte = fault::during(
        &uffd,
        &source,
        || source.read(0),
        |faults| {
            assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &source, 0));
            // And back again.
            move_pages(&uffd, &memory, &source, 1, PLAIN).unwrap();
        },
    );
    assert_eq!(byte, 1);
}

#[test]
fn holes_of_the_source_are_refused_or_skipped() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = destination(3);
    let source = numbered(3);
    source.advise(1, 1, libc::MADV_DONTNEED).unwrap();
    let result = move_pages(&uffd, &source, &memory, 3, PLAIN);
    assert!(matches!(result, Err(Error::Stopped { done, errno: Errno::EAGAIN, .. }) if done == page()));
    // SAFETY: both are only accessed by raw pointers.
    let rest = unsafe { uffd.move_pages(source.at(1), memory.at(1), 2 * page(), PLAIN) };
    assert_eq!(errno(rest), Errno::ENOENT);
    // They count as moved, and are missing where they were moved.
    let mode = MoveMode::ALLOW_SRC_HOLES;
    // SAFETY: as before.
    let rest = unsafe { uffd.move_pages(source.at(1), memory.at(1), 2 * page(), mode) };
    assert_eq!(rest.unwrap(), 2 * page());
    assert_eq!([0, 1, 2].map(|page| memory.state(page).present), [true, false, true]);
}

#[test]
fn zero_pages_move() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = destination(1);
    let source = Memory::anonymous(1);
    assert_eq!(source.read(0), 0);
    assert_eq!(move_pages(&uffd, &source, &memory, 1, PLAIN).unwrap(), page());
    assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 0);
}

#[test]
fn write_protection_of_the_source_is_lost() {
    require!(FeatureFlags::MOVE | FeatureFlags::PAGEFAULT_FLAG_WP);
    let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.register_with_mode(memory.start(), memory.len(), modes).unwrap();
    let source = numbered(1);
    uffd.register_with_mode(source.start(), source.len(), modes).unwrap();
    uffd.write_protect(source.start(), source.len()).unwrap();
    move_pages(&uffd, &source, &memory, 1, PLAIN).unwrap();
    assert!(!memory.state(0).protected);
    fault::silently(&uffd, &memory, || memory.write(0, 2));
}

#[test]
fn page_stays_where_it_is() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), numbered(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    assert_eq!(errno(move_pages(&uffd, &memory, &memory, 1, PLAIN)), Errno::EEXIST);
    assert_eq!(memory.read(0), 1);
}

#[test]
fn source_and_destination_must_be_alike() {
    require!(FeatureFlags::MOVE);
    let read_only = numbered(1);
    read_only.protect(0, 1, libc::PROT_READ);
    let executable = numbered(1);
    executable.protect(0, 1, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    let mut sources = vec![read_only, executable];
    for kind in [Kind::SharedAnonymous, Kind::Memfd, Kind::PrivateMemfd] {
        let memory = Memory::new(kind, 1);
        memory.write(0, 1);
        sources.push(memory);
    }
    let locked = numbered(1);
    // SAFETY: touches no memory.
    let lockable = check(unsafe { libc::mlock(locked.start(), locked.len()) });
    if has(test_name!(), "memory that may be locked", lockable.is_ok()) {
        sources.push(locked);
    }
    let (uffd, memory) = destination(1);
    for source in &sources {
        assert_eq!(errno(move_pages(&uffd, source, &memory, 1, PLAIN)), Errno::EINVAL, "{source:?}");
        assert!(source.state(0).present, "{source:?}");
    }
    // Both of them read-only are alike, but can't be written.
    memory.protect(0, 1, libc::PROT_READ);
    assert_eq!(errno(move_pages(&uffd, &sources[0], &memory, 1, PLAIN)), Errno::EINVAL);
}

#[test]
fn destination_must_be_this_userfaultfd_s() {
    require!(FeatureFlags::MOVE);
    let (_other, of_other) = destination(1);
    let nobody_s = Memory::anonymous(1);
    let uffd = uffd(FeatureFlags::empty());
    for memory in [of_other, nobody_s] {
        assert_eq!(errno(move_pages(&uffd, &numbered(1), &memory, 1, PLAIN)), Errno::EINVAL, "{memory:?}");
    }
}

#[test]
fn each_range_must_lie_in_one_mapping() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = destination(2);
    let source = numbered(2);
    source.protect(1, 1, libc::PROT_READ);
    assert_eq!(errno(move_pages(&uffd, &source, &memory, 2, PLAIN)), Errno::EINVAL);
    assert!(source.state(0).present);
    // SAFETY: the destination is only accessed by raw pointers, and the source is nothing.
    let result = unsafe { uffd.move_pages(nowhere(), memory.start(), page(), PLAIN) };
    assert_eq!(errno(result), Errno::ENOENT);
}

#[test]
fn modes_of_the_future_are_invalid() {
    require!(FeatureFlags::MOVE);
    let (uffd, memory) = destination(1);
    let mode = MoveMode::from_bits_retain(1 << 20);
    assert_eq!(errno(move_pages(&uffd, &numbered(1), &memory, 1, mode)), Errno::EINVAL);
}

/// For children that are killed.
fn wait_for_ever() {
    loop {
        // SAFETY: touches no memory.
        unsafe { libc::pause() };
    }
}

#[test]
fn page_shared_with_child_is_busy_until_it_is_written() {
    require!(FeatureFlags::MOVE);
    child::run_well(test_name!(), || {
        let (uffd, memory) = destination(1);
        let source = numbered(1);
        let child = child::fork(wait_for_ever);
        assert_eq!(errno(move_pages(&uffd, &source, &memory, 1, PLAIN)), Errno::EBUSY);
        child.kill();
        child.wait();
        // Nobody shares it any more, but the kernel doesn't know before it looks.
        assert_eq!(errno(move_pages(&uffd, &source, &memory, 1, PLAIN)), Errno::EBUSY);
        source.write(0, 4);
        move_pages(&uffd, &source, &memory, 1, PLAIN).unwrap();
        assert_eq!(memory.read(0), 4);
    });
}

#[test]
fn pages_are_moved_only_by_their_own_process() {
    require!(FeatureFlags::MOVE);
    child::run_well(test_name!(), || {
        let (memory, source) = (Memory::anonymous(1), numbered(1));
        let (here, there) = UnixStream::pair().unwrap();
        let child = child::fork(|| {
            let uffd = uffd(FeatureFlags::empty());
            uffd.register(memory.start(), memory.len()).unwrap();
            child::send_fd(&there, uffd.as_fd());
            wait_for_ever();
        });
        let uffd = Uffd::from(child::receive_fd(&here));
        assert_eq!(errno(move_pages(&uffd, &source, &memory, 1, PLAIN)), Errno::EINVAL);
        drop(child);
    });
}
