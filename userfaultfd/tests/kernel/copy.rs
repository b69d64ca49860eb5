//! UFFDIO_COPY. What it has in common with other fills is tested in `fill`.

use std::ffi::c_void;
use std::os::fd::AsFd;

use userfaultfd::{CopyMode, Errno, Error, FaultKind, FeatureFlags, RegisterMode, Result, Uffd};

use crate::support::fault::{self, Fault};
use crate::support::mapping::{self, Mapping};
use crate::support::memory::{self, Kind, Memory};
use crate::support::raw::check;
use crate::support::{child, errno, has, nowhere, page, require, test_name, uffd};

/// Bytes that differ from page to page and within a page.
fn pattern(len: usize) -> Vec<u8> {
    let mut page: Vec<u8> = (0..self::page()).map(|at| (at % 251) as u8).collect();
    let mut pattern = Vec::with_capacity(len);
    while pattern.len() < len {
        page[1] = page[1].wrapping_add(1);
        pattern.extend_from_slice(&page[..page.len().min(len - pattern.len())]);
    }
    pattern
}

/// Copies to the beginning of memory.
fn copy(uffd: &Uffd, source: &[u8], memory: &Memory, mode: CopyMode) -> Result<usize> {
    // SAFETY: the source is borrowed, and the memory is only accessed by raw pointers.
    unsafe { uffd.copy_with(source.as_ptr().cast(), memory.start(), source.len(), mode) }
}

/// Copies from any address.
fn copy_from(uffd: &Uffd, source: *const c_void, memory: &Memory, len: usize) -> Result<usize> {
    // SAFETY: the kernel says so if the source can't be read, and the memory is only accessed by raw
    // pointers.
    unsafe { uffd.copy(source, memory.start(), len, true) }
}

#[test]
fn missing_fault_is_resolved_by_copy() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 2) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        let content = pattern(memory.page());
        let fill = |addr| {
            // SAFETY: the content lives on, and the memory is only accessed by raw pointers.
            let copied = unsafe { uffd.copy(content.as_ptr().cast(), addr, memory.page(), true) };
            assert_eq!(copied.unwrap(), memory.page());
        };
        let read = fault::during(
            &uffd,
            &memory,
            || memory.content(1),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 1));
                fill(memory.at(1));
            },
        );
        assert!(read == content, "{memory:?}");
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, !content[0]),
            |faults| {
                assert_eq!(faults.next(), Fault::write(FaultKind::Missing, &memory, 0));
                fill(memory.at(0));
            },
        );
        let read = memory.content(0);
        assert_eq!(read[0], !content[0]);
        assert!(read[1..] == content[1..], "{memory:?}");
        fault::assert_silent(&uffd);
    }
}

#[test]
fn many_pages_are_copied_from_an_unaligned_source() {
    require!();
    for odd in [1, 8, 13] {
        for memory in memory::each(test_name!(), RegisterMode::MISSING, 3) {
            let uffd = uffd(FeatureFlags::empty());
            uffd.register(memory.start(), memory.len()).unwrap();
            let content = pattern(memory.len() + page());
            let source = &content[odd..][..memory.len()];
            assert_eq!(copy(&uffd, source, &memory, CopyMode::empty()).unwrap(), memory.len());
            for (number, expected) in source.chunks(memory.page()).enumerate() {
                assert!(memory.content(number) == expected, "page {number} of {memory:?}");
            }
        }
    }
}

#[test]
fn permissions_of_the_destination_do_not_matter() {
    require!();
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::PrivateMemfd] {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::new(kind, 1));
        uffd.register(memory.start(), memory.len()).unwrap();
        memory.protect(0, 1, libc::PROT_READ);
        let content = pattern(page());
        copy(&uffd, &content, &memory, CopyMode::empty()).unwrap();
        assert!(memory.content(0) == content);
    }
}

#[test]
fn shared_memory_is_filled_for_every_mapping() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 1) {
        if memory.kind() == Kind::Anonymous {
            continue;
        }
        let alias = memory.alias();
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        let content = pattern(memory.page());
        copy(&uffd, &content, &memory, CopyMode::empty()).unwrap();
        let expected = if memory.kind().is_shared() { content } else { vec![0; memory.page()] };
        assert!(alias.content(0) == expected, "{memory:?}");
    }
}

#[test]
fn source_that_cannot_be_read_stops_the_copy() {
    require!();
    let source = Mapping::new(2, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, None).unwrap();
    let closed = source.start.wrapping_byte_add(page());
    // SAFETY: nobody refers to the page.
    check(unsafe { libc::mprotect(closed, page(), libc::PROT_NONE) }).unwrap();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 2) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        for source in [closed, nowhere()] {
            let result = copy_from(&uffd, source, &memory, memory.page());
            assert!(matches!(result, Err(Error::CopyFailed(Errno::EFAULT))), "{memory:?} {result:?}");
        }
        if !memory.kind().is_hugetlb() {
            let result = copy_from(&uffd, source.start, &memory, 2 * page());
            assert!(
                matches!(result, Err(Error::PartiallyCopied(done)) if done == page()),
                "{memory:?} {result:?}"
            );
            assert_eq!([0, 1].map(|number| memory.state(number).present), [true, false], "{memory:?}");
        }
    }
}

#[test]
fn pages_are_write_protected_as_they_appear() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING | RegisterMode::WRITE_PROTECT, 1) {
        let uffd = uffd(FeatureFlags::empty());
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT).unwrap();
        let content = pattern(len);
        fault::during(
            &uffd,
            &memory,
            || memory.write(0, 9),
            |faults| {
                assert_eq!(faults.next(), Fault::write(FaultKind::Missing, &memory, 0));
                copy(&uffd, &content, &memory, CopyMode::WRITE_PROTECT).unwrap();
                assert_eq!(faults.next(), Fault::write(FaultKind::WriteProtected, &memory, 0));
                assert!(memory.content(0) == content, "{memory:?}");
                uffd.remove_write_protection(start, len, true).unwrap();
            },
        );
        assert_eq!(memory.read(0), 9, "{memory:?}");
    }
}

#[test]
fn protecting_takes_that_registration() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 1) {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        let content = pattern(memory.len());
        assert_eq!(errno(copy(&uffd, &content, &memory, CopyMode::WRITE_PROTECT)), Errno::EINVAL);
        let future = CopyMode::from_bits_retain(1 << 20);
        assert_eq!(errno(copy(&uffd, &content, &memory, future)), Errno::EINVAL);
        assert!(!memory.state(0).present, "{memory:?}");
    }
}

#[test]
fn page_that_the_cache_got_meanwhile_takes_but_a_wake() {
    require!();
    for memory in memory::each(test_name!(), RegisterMode::MISSING, 1) {
        if !memory.kind().is_shared() {
            continue;
        }
        let (uffd, alias) = (uffd(FeatureFlags::empty()), memory.alias());
        uffd.register(memory.start(), memory.len()).unwrap();
        let content = pattern(memory.page());
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                faults.next();
                alias.write(0, 5);
                assert!(!memory.state(0).present);
                assert_eq!(errno(copy(&uffd, &content, &memory, CopyMode::empty())), Errno::EEXIST);
                uffd.wake(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(byte, 5, "{memory:?}");
    }
}

#[test]
fn file_system_without_room_stops_the_copy() {
    require!(FeatureFlags::MISSING_SHMEM, root);
    child::run_well(test_name!(), || {
        let Some(file) = mapping::file_with_room_for(test_name!(), 2) else { return };
        file.set_len(4 * page() as u64).unwrap();
        let mapping = Mapping::shared(4, file.as_fd()).unwrap();
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(mapping.start, mapping.len).unwrap();
        let content = pattern(4 * page());
        // SAFETY: the content lives on, and nobody refers to the mapping.
        let whole = unsafe { uffd.copy(content.as_ptr().cast(), mapping.start, mapping.len, true) };
        assert!(matches!(whole, Err(Error::PartiallyCopied(done)) if done == 2 * page()), "{whole:?}");
        let rest = mapping.start.wrapping_byte_add(2 * page());
        // SAFETY: as before.
        let result = unsafe { uffd.copy(content.as_ptr().cast(), rest, page(), true) };
        assert!(matches!(result, Err(Error::CopyFailed(Errno::ENOMEM))), "{result:?}");
        // SAFETY: nobody refers to the mapping.
        let result = unsafe { uffd.zeropage(rest, page(), true) };
        assert!(matches!(result, Err(Error::ZeropageFailed(Errno::ENOMEM))), "{result:?}");
    });
}

#[test]
fn exhausted_pool_of_huge_pages_is_reported() {
    require!(FeatureFlags::MISSING_HUGETLBFS, root);
    let Some(memory) = Memory::unpromised_hugetlb(test_name!(), 1) else { return };
    if !has(test_name!(), "a pool of huge pages that can be emptied", memory.huge_pages().exhaust()) {
        return;
    }
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    let errno = errno(copy(&uffd, &pattern(memory.len()), &memory, CopyMode::empty()));
    println!("{}: {errno:?}", test_name!());
    // The second since a kernel between 6.12 and 6.18.
    assert!(matches!(errno, Errno::ENOMEM | Errno::EEXIST), "{errno:?}");
}
