//! UFFDIO_RWPROTECT, of Linux 7.3.

use userfaultfd::pagemap::{Categories, Pagemap, Region, Scan};
use userfaultfd::{CopyMode, Errno, FaultKind, FeatureFlags, RegisterMode, Uffd};
use userfaultfd_sys as sys;

use crate::support::fault::{self, Fault};
use crate::support::handler::{self, Change};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{bad_ranges, child, errno, features, nowhere, page, raw, require, test_name, uffd};

const READ_WRITE_PROTECT: RegisterMode = RegisterMode::READ_WRITE_PROTECT;

/// Memory of every kind with `pages` pages that are there, registered for read-write protection, and its
/// userfaultfd.
fn each(test: &str, features: FeatureFlags, pages: usize) -> impl Iterator<Item = (Memory, Uffd)> {
    memory::each(test, READ_WRITE_PROTECT, pages).map(move |memory| {
        (0..pages).for_each(|page| memory.write(page, 1));
        let uffd = uffd(FeatureFlags::RWP | features);
        uffd.register_with_mode(memory.start(), memory.len(), READ_WRITE_PROTECT).unwrap();
        (memory, uffd)
    })
}

/// Which of the first `N` pages are protected.
fn protected<const N: usize>(memory: &Memory) -> [bool; N] {
    std::array::from_fn(|page| memory.state(page).protected)
}

#[test]
fn reads_and_writes_are_delivered() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 2) {
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        assert_eq!(protected(&memory), [true; 2], "{memory:?}");
        let lift = |page| uffd.remove_read_write_protection(memory.at(page), memory.page(), true).unwrap();
        let kind = FaultKind::ReadWriteProtected;
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                assert_eq!(faults.next(), Fault::read(kind, &memory, 0), "{memory:?}");
                lift(0);
            },
        );
        assert_eq!(byte, 1);
        fault::during(
            &uffd,
            &memory,
            || memory.write(1, 2),
            |faults| {
                assert_eq!(faults.next(), Fault::write(kind, &memory, 1), "{memory:?}");
                lift(1);
            },
        );
        // What the mapping permits is permitted again.
        memory.write(0, 3);
        assert_eq!((memory.read(0), memory.read(1)), (3, 2), "{memory:?}");
        assert_eq!(protected(&memory), [false; 2], "{memory:?}");
        fault::assert_silent(&uffd);
    }
}

/// What the kernel says of an access to a page of which nothing else is known than `name`: the flags of its message,
/// and none if it goes on without one.
fn expected(name: &str, modes: RegisterMode, is_async: bool, write: bool) -> Option<u64> {
    let reason = match name {
        "protected" | "protected, never written" if is_async => return None,
        "protected" | "protected, never written" => sys::UFFD_PAGEFAULT_FLAG_RWP,
        "missing" if modes.contains(RegisterMode::MISSING) => 0,
        "cached, not mapped" if modes.contains(RegisterMode::MINOR) => sys::UFFD_PAGEFAULT_FLAG_MINOR,
        _ => return None,
    };
    Some(reason | if write { sys::UFFD_PAGEFAULT_FLAG_WRITE } else { 0 })
}

/// Every mode that goes with it, every state of a page, reads and writes, delivered or noted, on every memory.
#[test]
fn flags_tell_of_every_access_what_it_met() {
    require!(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    let names = ["protected", "protected, never written", "missing", "cached, not mapped", "present"];
    let (missing, minor) = (RegisterMode::MISSING, RegisterMode::MINOR);
    for others in [RegisterMode::empty(), missing, minor, missing | minor] {
        let modes = READ_WRITE_PROTECT | others;
        for (is_async, write) in [(false, false), (false, true), (true, false), (true, true)] {
            for memory in memory::each(test_name!(), modes, names.len()) {
                let features = if is_async { FeatureFlags::RWP_ASYNC } else { FeatureFlags::empty() };
                let uffd = uffd(FeatureFlags::RWP | features);
                // Private anonymous memory has no cache: a page is there or missing.
                let alias = (memory.kind() != Kind::Anonymous).then(|| memory.alias());
                memory.write(0, 1);
                memory.read(1);
                memory.write(4, 1);
                alias.iter().for_each(|alias| alias.write(3, 1));
                uffd.register_with_mode(memory.start(), memory.len(), modes).unwrap();
                uffd.read_write_protect(memory.start(), 2 * memory.page()).unwrap();
                assert_eq!(protected(&memory), [true, true, false, false, false], "{memory:?}");

                for (page, name) in names.into_iter().enumerate() {
                    let what = format!("{memory:?} {modes} {is_async} {write}: {name}");
                    let name = if alias.is_none() && page == 3 { "missing" } else { name };
                    let access = || match write {
                        true => memory.write(page, 9),
                        false => assert!(memory.read(page) < 9),
                    };
                    let mut told = None;
                    fault::during(&uffd, &memory, access, |faults| {
                        if !faults.any() {
                            return;
                        }
                        let (flags, address) = raw::fault(&uffd);
                        assert_eq!(address, memory.at(page).addr() as u64, "{what}");
                        told = Some(flags);
                        let (start, len) = (memory.at(page), memory.page());
                        match flags & !sys::UFFD_PAGEFAULT_FLAG_WRITE {
                            0 => handler::fill(&uffd, &memory, page, 1),
                            sys::UFFD_PAGEFAULT_FLAG_MINOR => {
                                assert_eq!(uffd.r#continue(start, len, true).unwrap(), len as u64);
                            }
                            _ => uffd.remove_read_write_protection(start, len, true).unwrap(),
                        }
                    });
                    assert_eq!(told, expected(name, modes, is_async, write), "{what}");
                    fault::assert_silent(&uffd);
                    if write {
                        assert_eq!(memory.read(page), 9, "{what}");
                    }
                }
                // One access has lifted the protection for all that follow.
                fault::silently(&uffd, &memory, || (0..names.len()).for_each(|page| memory.write(page, 2)));
            }
        }
    }
}

#[test]
fn kernel_access_fails_with_user_mode_only() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        assert_eq!(memory.read_by_kernel(0), Err(Errno::EFAULT), "{memory:?}");
        assert_eq!(handler::kernel_write(&memory, 0, 2), Err(Errno::EFAULT), "{memory:?}");
        fault::assert_silent(&uffd);
        assert_eq!(protected(&memory), [true], "{memory:?}");
        uffd.remove_read_write_protection(memory.start(), memory.len(), true).unwrap();
        assert_eq!(memory.read_by_kernel(0), Ok(1), "{memory:?}");
    }
}

#[test]
fn lifting_without_a_wake_leaves_that_to_wake() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                faults.next();
                faults.wait_for_sleepers(1);
                uffd.remove_read_write_protection(memory.start(), memory.len(), false).unwrap();
                assert_eq!(fault::waiters(&uffd), 1, "{memory:?}");
                uffd.wake(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(byte, 1, "{memory:?}");
    }
}

#[test]
fn missing_pages_are_not_protected_and_fault_as_such() {
    require!(FeatureFlags::RWP);
    for memory in memory::each(test_name!(), READ_WRITE_PROTECT | RegisterMode::MISSING, 1) {
        let uffd = uffd(FeatureFlags::RWP);
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, READ_WRITE_PROTECT | RegisterMode::MISSING).unwrap();
        uffd.read_write_protect(start, len).unwrap();
        assert_eq!(protected(&memory), [false], "{memory:?}");
        let byte = fault::during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 0), "{memory:?}");
                handler::fill(&uffd, &memory, 0, 5);
            },
        );
        assert_eq!(byte, 5, "{memory:?}");
        fault::assert_silent(&uffd);
    }
}

#[test]
fn dropped_pages_lose_it() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        assert_eq!(protected(&memory), [false], "{memory:?}");
        fault::silently(&uffd, &memory, || memory.write(0, 2));
    }
}

#[test]
fn protection_covers_the_whole_range_or_nothing() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 4) {
        // Registered, and another registered mapping, then two that aren't.
        memory.protect(0, 1, libc::PROT_READ);
        uffd.unregister(memory.at(2), 2 * memory.page()).unwrap();
        assert_eq!(errno(uffd.read_write_protect(memory.start(), memory.len())), Errno::ENOENT);
        assert_eq!(protected(&memory), [false; 4], "{memory:?}");
        uffd.read_write_protect(memory.start(), 2 * memory.page()).unwrap();
        assert_eq!(protected(&memory), [true, true, false, false], "{memory:?}");
        let lifted = uffd.remove_read_write_protection(memory.start(), memory.len(), true);
        assert_eq!(errno(lifted), Errno::ENOENT);
        assert_eq!(protected(&memory), [true, true, false, false], "{memory:?}");
    }
}

#[test]
fn write_protection_does_not_go_with_it() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        let (start, len) = (memory.start(), memory.len());
        assert_eq!(errno(uffd.write_protect(start, len)), Errno::ENOENT, "{memory:?}");
        let source = vec![0u8; memory.page()];
        let mode = CopyMode::WRITE_PROTECT;
        // SAFETY: the source lives on, and the memory is only accessed by raw pointers.
        let copied = unsafe { uffd.copy_with(source.as_ptr().cast(), start, len, mode) };
        assert_eq!(errno(copied), Errno::EINVAL, "{memory:?}");
        let both = RegisterMode::WRITE_PROTECT | READ_WRITE_PROTECT;
        assert_eq!(errno(uffd.register_with_mode(start, len, both)), Errno::EINVAL, "{memory:?}");
    }
}

#[test]
fn registering_again_cannot_drop_it() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 1) {
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, READ_WRITE_PROTECT | RegisterMode::MISSING).unwrap();
        for modes in [RegisterMode::MISSING, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT] {
            let result = uffd.register_with_mode(start, len, modes);
            assert_eq!(errno(result), Errno::EBUSY, "{memory:?} {modes}");
        }
        uffd.read_write_protect(start, len).unwrap();
        uffd.unregister(start, len).unwrap();
        assert_eq!(protected(&memory), [false], "{memory:?}");
        memory.write(0, 2);
        uffd.register_with_mode(start, len, RegisterMode::MISSING).unwrap();
    }
}

#[test]
fn asynchronous_protection_is_lifted_by_access_itself() {
    require!(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    let pagemap = Pagemap::of_self().unwrap();
    for (memory, uffd) in each(test_name!(), FeatureFlags::RWP_ASYNC, 3) {
        let addresses = memory.start().addr()..memory.start().addr() + memory.len();
        let accessed = || {
            let mut regions = [Region::default(); 3];
            let mut scan = Scan::new(addresses.clone());
            let found = scan.all_of(Categories::ACCESSED).next_regions(&pagemap, &mut regions);
            found.unwrap().unwrap().iter().map(Region::range).collect::<Vec<_>>()
        };
        let range = |first: usize, end: usize| memory.at(first).addr()..memory.at(end).addr();
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        assert_eq!(accessed(), [], "{memory:?}");
        assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 1);
        assert_eq!(accessed(), [range(0, 1)], "{memory:?}");
        fault::silently(&uffd, &memory, || memory.write(2, 2));
        assert_eq!(accessed(), [range(0, 1), range(2, 3)], "{memory:?}");
        assert_eq!(protected(&memory), [false, true, false], "{memory:?}");
    }
}

#[test]
fn holes_are_skipped() {
    require!(FeatureFlags::RWP);
    child::run_well(test_name!(), || {
        let (uffd, memory) = (uffd(FeatureFlags::RWP), Memory::anonymous(3));
        [0, 2].into_iter().for_each(|page| memory.write(page, 1));
        memory.unmap(1, 1);
        uffd.register_with_mode(memory.start(), memory.len(), READ_WRITE_PROTECT).unwrap();
        uffd.read_write_protect(memory.start(), memory.len()).unwrap();
        assert_eq!([0, 2].map(|page| memory.state(page).protected), [true; 2]);
    });
}

#[test]
fn malformed_or_unregistered_ranges_are_refused() {
    require!(FeatureFlags::RWP);
    for (memory, uffd) in each(test_name!(), FeatureFlags::empty(), 2) {
        for (why, start, len) in bad_ranges(&memory) {
            assert_eq!(errno(uffd.read_write_protect(start, len)), Errno::EINVAL, "{why} {memory:?}");
            let lifted = uffd.remove_read_write_protection(start, len, true);
            assert_eq!(errno(lifted), Errno::EINVAL, "{why} {memory:?}");
        }
        assert_eq!(protected(&memory), [false; 2], "{memory:?}");
        assert_eq!(errno(uffd.read_write_protect(nowhere(), page())), Errno::ENOENT);
    }
    let (uffd, memory) = (uffd(FeatureFlags::RWP), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    assert_eq!(errno(uffd.read_write_protect(memory.start(), memory.len())), Errno::ENOENT);
}

#[test]
fn protection_is_retryable_while_layout_changes() {
    require!(FeatureFlags::RWP | FeatureFlags::EVENT_REMOVE);
    let (uffd, memory) = (uffd(FeatureFlags::RWP | FeatureFlags::EVENT_REMOVE), Memory::anonymous(2));
    memory.write(1, 1);
    uffd.register_with_mode(memory.start(), memory.len(), READ_WRITE_PROTECT).unwrap();
    let remove = || memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
    handler::while_changing(&uffd, remove, |_| {
        raw::wait_for_event(&uffd);
        let protected = uffd.read_write_protect(memory.at(1), page());
        let lifted = uffd.remove_read_write_protection(memory.at(1), page(), true);
        assert_eq!(Change::next(&uffd), Change::Remove(memory.range(0, 1)));
        assert_eq!([errno(protected), errno(lifted)], [Errno::EAGAIN; 2]);
    });
    uffd.read_write_protect(memory.at(1), page()).unwrap();
}

#[test]
fn kernel_without_it_says_that_it_is_invalid() {
    require!();
    if features().contains(FeatureFlags::RWP) {
        return;
    }
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    let (start, len) = (memory.start(), memory.len());
    assert_eq!(errno(uffd.read_write_protect(start, len)), Errno::EINVAL);
    assert_eq!(errno(uffd.remove_read_write_protection(start, len, true)), Errno::EINVAL);
}
