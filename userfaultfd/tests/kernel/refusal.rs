//! Why the kernel refused an operation: the part of the range, what lies there, and what would work.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use userfaultfd::{
    ContinueMode, CopyMode, Errno, Error, FeatureFlags, IoctlFlags, MemoryKind, MoveMode, Pid, Reason,
    Refusal, RegisterMode, Result, Uffd,
};

use crate::support::child;
use crate::support::mapping::{self, Mapping};
use crate::support::memory::{Kind, Memory};
use crate::support::raw;
use crate::support::{
    bad_ranges, dead, features, foreign, has_features, nowhere, page, require, test_name, uffd,
};

const MISSING: RegisterMode = RegisterMode::MISSING;
const WRITE_PROTECT: RegisterMode = RegisterMode::WRITE_PROTECT;
const MINOR: RegisterMode = RegisterMode::MINOR;
const READ_WRITE_PROTECT: RegisterMode = RegisterMode::READ_WRITE_PROTECT;

/// The refusal in an error, which has the errno.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T>, errno: Errno) -> Refusal {
    let error = result.expect_err("must fail");
    assert_eq!(error.errno(), Some(errno), "{error}");
    let Error::Refused { refusal, .. } = error else { panic!("no reason: {error:?}") };
    // Half of the use is the text.
    let text = error.to_string();
    assert!(text.contains(&refusal.to_string()) && text.contains(&format!("{errno:?}")), "{text}");
    refusal
}

/// Its reason.
#[track_caller]
fn reason<T: std::fmt::Debug>(result: Result<T>, errno: Errno) -> Reason {
    refusal(result, errno).reason()
}

/// The kernel's answer alone.
#[track_caller]
fn bare<T: std::fmt::Debug>(result: Result<T>, errno: Errno) {
    match result {
        Err(Error::SystemError(got)) => assert_eq!(got, errno),
        other => panic!("{other:?}"),
    }
}

/// Puts a page of a file over a page of memory, and tells its addresses.
fn put_over(memory: &Memory, at: usize, file: &OwnedFd, protection: libc::c_int) -> Range<usize> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: replaces a page that nobody refers to.
    let start = unsafe { libc::mmap(memory.at(at), page(), protection, flags, file.as_raw_fd(), 0) };
    assert_eq!(start, memory.at(at));
    memory.range(at, 1)
}

#[test]
fn malformed_range_differs_from_unmapped_memory() {
    require!();
    for memory in Kind::ALL.into_iter().filter_map(|kind| Memory::try_new(test_name!(), kind, 2)) {
        let uffd = uffd(FeatureFlags::empty());
        for (why, start, len) in bad_ranges(&memory) {
            let registered = reason(uffd.register(start, len), Errno::EINVAL);
            // The end of a huge page isn't looked at there.
            if let Err(error) = uffd.unregister(start, len) {
                assert_eq!(registered, reason(Err::<(), _>(error), Errno::EINVAL), "{why} {memory:?}");
            }
            match registered {
                Reason::Empty => assert_eq!(len, 0, "{why}"),
                Reason::BeyondAddressSpace => assert!(why.contains("end of addresses"), "{why}"),
                Reason::Unaligned { page_size } => {
                    let cut = start.addr() % page_size != 0 || len % page_size != 0;
                    assert!(cut && [page(), memory.page()].contains(&page_size), "{why} {memory:?}");
                }
                other => panic!("{why} {memory:?}: {other:?}"),
            }
        }
        let start = nowhere();
        for result in [uffd.register(start, page()).map(drop), uffd.unregister(start, page())] {
            let refusal = refusal(result, Errno::EINVAL);
            assert_eq!(refusal.reason(), Reason::NotMapped);
            assert_eq!(refusal.range(), start.addr()..start.addr() + page());
        }
    }
}

#[test]
fn modes_that_no_memory_takes_are_named() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    let register = |modes| uffd.register_with_mode(memory.start(), memory.len(), modes);
    assert_eq!(reason(register(RegisterMode::empty()), Errno::EINVAL), Reason::NoMode);
    let future = RegisterMode::from_bits_retain(1 << 10);
    assert_eq!(reason(register(MISSING | future), Errno::EINVAL), Reason::UnknownModes(future));
    let both = WRITE_PROTECT | READ_WRITE_PROTECT;
    assert_eq!(reason(register(both), Errno::EINVAL), Reason::ModesExclude);
    let expected = if features().contains(FeatureFlags::RWP) {
        Reason::FeatureOff(FeatureFlags::RWP)
    } else {
        Reason::KernelLacks(FeatureFlags::RWP)
    };
    let refusal = refusal(register(READ_WRITE_PROTECT), Errno::EINVAL);
    assert_eq!(refusal.reason(), expected);
    assert!(refusal.to_string().contains("RWP"), "{refusal}");
}

#[test]
fn mapping_without_mode_is_explained() {
    require!(FeatureFlags::MINOR_SHMEM);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::new(Kind::SharedAnonymous, 4));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: replaces a page that nobody refers to.
    let replaced = unsafe { libc::mmap(memory.at(2), page(), libc::PROT_READ, flags, -1, 0) };
    assert_eq!(replaced, memory.at(2));
    let refusal =
        refusal(uffd.register_with_mode(memory.start(), memory.len(), MISSING | MINOR), Errno::EINVAL);
    assert_eq!(refusal.reason(), Reason::WrongMemory { memory: MemoryKind::Anonymous, modes: MINOR });
    assert_eq!(refusal.range(), memory.range(2, 1));
}

#[test]
fn unregistrable_memory_is_explained_by_kind() {
    require!();
    let uffd = uffd(FeatureFlags::empty());
    let secret = mapping::secret(test_name!(), 1);
    // SAFETY: touches no memory.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    let vdso = Mapping { start: ptr::without_provenance_mut(vdso), len: page() };
    let vdso = std::mem::ManuallyDrop::new(vdso);
    let (secret, system_v) = (
        secret.and_then(|secret| Mapping::shared(1, secret.as_fd()).ok()),
        mapping::system_v(test_name!(), 1),
    );
    let cases = [
        (secret.as_ref(), MemoryKind::Secret),
        (system_v.as_ref(), MemoryKind::SystemV),
        (Some(&*vdso).filter(|vdso| !vdso.start.is_null()), MemoryKind::Special),
    ];
    for (mapping, memory) in cases {
        let Some(mapping) = mapping else { continue };
        for result in
            [uffd.register(mapping.start, mapping.len).map(drop), uffd.unregister(mapping.start, mapping.len)]
        {
            let expected = Reason::WrongMemory { memory, modes: RegisterMode::empty() };
            assert_eq!(reason(result, Errno::EINVAL), expected, "{memory:?}");
        }
    }
}

#[test]
fn file_is_explained_with_its_modes() {
    require!();
    let Some(file) = mapping::regular_file(test_name!(), 1) else { return };
    let can = features().contains(FeatureFlags::WP_ASYNC);
    for mapping in [Mapping::shared(1, file.as_fd()), Mapping::private(1, file.as_fd())] {
        let mapping = mapping.unwrap();
        for features in [FeatureFlags::empty(), FeatureFlags::WP_ASYNC & features()] {
            let uffd = uffd(features);
            let register = |modes| uffd.register_with_mode(mapping.start, mapping.len, modes);
            let refusal = refusal(register(MISSING), Errno::EINVAL);
            let expected = Reason::WrongMemory { memory: MemoryKind::File, modes: MISSING };
            assert_eq!(refusal.reason(), expected);
            assert!(refusal.to_string().contains("WP_ASYNC"), "{refusal}");
            match register(WRITE_PROTECT) {
                Ok(_) => assert!(features.contains(FeatureFlags::WP_ASYNC)),
                result if self::features().contains(FeatureFlags::PAGEFAULT_FLAG_WP) => {
                    let reason = reason(result, Errno::EINVAL);
                    assert_eq!(reason == Reason::FeatureOff(FeatureFlags::WP_ASYNC), can, "{reason:?}");
                }
                result => drop(result.unwrap_err()),
            }
        }
    }
}

#[test]
fn unwritable_shared_file_is_explained_by_part() {
    require!(FeatureFlags::MISSING_SHMEM);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(4));
    let part = put_over(&memory, 1, &mapping::read_only(mapping::memfd(0, 1)), libc::PROT_READ);
    let refusal = refusal(uffd.register(memory.start(), memory.len()), Errno::EPERM);
    assert_eq!((refusal.reason(), refusal.range()), (Reason::NotWritable, part));
}

#[test]
fn other_userfaultfds_memory_is_explained_by_part() {
    require!();
    let (uffd, other) = (uffd(FeatureFlags::empty()), self::uffd(FeatureFlags::empty()));
    let memory = Memory::anonymous(5);
    other.register(memory.at(1), page()).unwrap();
    let refusal = self::refusal(uffd.register(memory.start(), memory.len()), Errno::EBUSY);
    assert_eq!(refusal.reason(), Reason::OtherDescriptor { has: MISSING });
    assert_eq!(refusal.range(), memory.range(1, 1));
    // Whose a registration is isn't told, so what lies between two that may be it is part.
    other.register(memory.at(3), page()).unwrap();
    let refusal = self::refusal(uffd.register(memory.start(), memory.len()), Errno::EBUSY);
    assert_eq!(refusal.range(), memory.range(1, 3));
    // Kernels before one between 6.12 and 6.18 let anybody unregister it.
    match uffd.unregister(memory.at(1), page()) {
        Ok(()) => println!("{}: anybody unregisters", test_name!()),
        result => {
            assert_eq!(reason(result, Errno::EINVAL), Reason::OtherDescriptor { has: MISSING });
        }
    }
}

#[test]
fn dropped_protection_is_explained() {
    require!(FeatureFlags::RWP);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(2));
    uffd.register_with_mode(memory.start(), page(), MISSING | WRITE_PROTECT).unwrap();
    let refusal = refusal(uffd.register(memory.start(), memory.len()), Errno::EBUSY);
    assert_eq!(refusal.reason(), Reason::DropsMode { has: WRITE_PROTECT });
    assert_eq!(refusal.range(), memory.range(0, 1));
}

#[test]
fn memory_without_permission_is_explained() {
    require!(FeatureFlags::RWP);
    let (uffd, memory) = (uffd(FeatureFlags::RWP), Memory::anonymous(3));
    memory.protect(1, 1, libc::PROT_NONE);
    let registered = uffd.register_with_mode(memory.start(), memory.len(), READ_WRITE_PROTECT);
    let refusal = refusal(registered, Errno::EINVAL);
    assert_eq!((refusal.reason(), refusal.range()), (Reason::NoAccess, memory.range(1, 1)));
}

#[test]
fn unprotectable_registration_is_explained() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
    let refusal = self::refusal(uffd.write_protect(memory.start(), memory.len()), Errno::ENOENT);
    assert_eq!(refusal.reason(), Reason::NotRegistered);
    uffd.register_with_mode(memory.at(1), 2 * page(), WRITE_PROTECT).unwrap();
    uffd.register_with_mode(memory.at(2), page(), MISSING).unwrap_or(IoctlFlags::empty());
    let part = self::refusal(uffd.write_protect(memory.start(), memory.len()), Errno::ENOENT).range();
    assert_eq!(part, memory.range(0, 1));

    let memory = Memory::anonymous(1);
    uffd.register(memory.start(), page()).unwrap();
    let refusal = self::refusal(uffd.write_protect(memory.start(), page()), Errno::ENOENT);
    assert_eq!(refusal.reason(), Reason::NotRegisteredFor { needs: WRITE_PROTECT, has: MISSING });
    assert!(refusal.to_string().contains("WRITE_PROTECT"), "{refusal}");
    let unaligned = uffd.write_protect(memory.start(), 1);
    assert_eq!(reason(unaligned, Errno::EINVAL), Reason::Unaligned { page_size: page() });
    if features().contains(FeatureFlags::RWP) {
        let refusal = self::refusal(uffd.read_write_protect(memory.start(), page()), Errno::ENOENT);
        assert_eq!(refusal.reason(), Reason::NotRegisteredFor { needs: READ_WRITE_PROTECT, has: MISSING });
    } else {
        let reason = reason(uffd.read_write_protect(memory.start(), page()), Errno::EINVAL);
        assert_eq!(reason, Reason::KernelLacksIoctl(IoctlFlags::READ_WRITE_PROTECT));
    }
}

/// Programs look for these in the variant that 0.9 has.
#[test]
fn common_errors_keep_old_variant() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(1);
        let gone = dead::uffd(&memory);
        bare(gone.register(memory.start(), memory.len()), Errno::ENOMEM);
        bare(gone.unregister(memory.start(), memory.len()), Errno::ENOMEM);
        let error = gone.write_protect(memory.start(), memory.len());
        bare(error, Errno::ESRCH);
        let error = gone.write_protect(memory.start(), memory.len()).unwrap_err();
        let refusal = gone.explain(&error, IoctlFlags::WRITE_PROTECT, memory.start(), memory.len()).unwrap();
        assert_eq!(refusal.reason(), Reason::ProcessGone);

        if has_features(test_name!(), FeatureFlags::PAGEFAULT_FLAG_WP) {
            let uffd = uffd(FeatureFlags::empty());
            uffd.register_with_mode(memory.start(), memory.len(), WRITE_PROTECT).unwrap();
            memory.unmap(0, 1);
            bare(uffd.write_protect(memory.start(), memory.len()), Errno::ENOENT);
        }
    });
}

#[test]
fn useless_descriptor_is_explained() {
    require!();
    let memory = Memory::anonymous(1);
    let early = Uffd::from(raw::unshaken(0));
    assert_eq!(reason(early.register(memory.start(), memory.len()), Errno::EINVAL), Reason::NoHandshake);
    for (what, fd) in foreign::descriptors() {
        let foreign = Uffd::from(fd);
        let error = foreign.register(memory.start(), memory.len()).unwrap_err();
        let refusal = foreign.explain(&error, IoctlFlags::REGISTER, memory.start(), memory.len());
        if error.errno() == Some(Errno::ENOTTY) {
            let Error::Refused { refusal, .. } = &error else { panic!("{what}: {error:?}") };
            assert_eq!(refusal.reason(), Reason::NotUserfaultfd, "{what}");
        }
        if matches!(error.errno(), Some(Errno::EINVAL | Errno::ENOTTY)) {
            assert_eq!(refusal.map(|refusal| refusal.reason()), Some(Reason::NotUserfaultfd), "{what}");
        }
    }
}

/// What is told of an operation that failed.
#[track_caller]
fn explained<T: std::fmt::Debug>(
    uffd: &Uffd,
    result: Result<T>,
    ioctl: IoctlFlags,
    range: Range<usize>,
) -> Option<Refusal> {
    let start = ptr::without_provenance_mut(range.start);
    uffd.explain(&result.unwrap_err(), ioctl, start, range.len())
}

fn copy(uffd: &Uffd, memory: &Memory, first: usize, pages: usize, mode: CopyMode) -> Result<usize> {
    let content = vec![7u8; pages * memory.page()];
    // SAFETY: the content is readable, and the memory is only accessed by raw pointers.
    unsafe { uffd.copy_with(content.as_ptr().cast(), memory.at(first), content.len(), mode) }
}

fn zeropage(uffd: &Uffd, memory: &Memory) -> Result<usize> {
    // SAFETY: the memory is only accessed by raw pointers.
    unsafe { uffd.zeropage(memory.start(), memory.len(), true) }
}

fn move_pages(uffd: &Uffd, src: *mut c_void, dst: *mut c_void) -> Result<usize> {
    // SAFETY: the memory is only accessed by raw pointers.
    unsafe { uffd.move_pages(src, dst, page(), MoveMode::empty()) }
}

#[test]
fn fills_are_explained_on_request() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(4));
    let range = |first, pages| memory.range(first, pages);
    let explained = |result, ioctl, range| explained(&uffd, result, ioctl, range).expect("a reason");

    // SAFETY: nothing is mapped there.
    let result = unsafe { uffd.zeropage(nowhere(), page(), true) };
    let nowhere = nowhere().addr()..nowhere().addr() + page();
    assert_eq!(explained(result, IoctlFlags::ZEROPAGE, nowhere).reason(), Reason::NotMapped);
    let result = copy(&uffd, &memory, 0, 1, CopyMode::empty());
    assert_eq!(explained(result, IoctlFlags::COPY, range(0, 1)).reason(), Reason::NotRegistered);
    uffd.register(memory.start(), memory.len()).unwrap();
    let result = copy(&uffd, &memory, 0, 1, CopyMode::WRITE_PROTECT);
    assert_eq!(
        explained(result, IoctlFlags::COPY, range(0, 1)).reason(),
        Reason::NotRegisteredFor { needs: WRITE_PROTECT, has: MISSING }
    );
    // Other permissions make another mapping.
    memory.protect(2, 1, libc::PROT_READ);
    let refusal = explained(copy(&uffd, &memory, 1, 2, CopyMode::empty()), IoctlFlags::COPY, range(1, 2));
    assert_eq!((refusal.reason(), refusal.range()), (Reason::SeveralMappings, range(2, 1)));
    assert_eq!(copy(&uffd, &memory, 0, 1, CopyMode::empty()).unwrap(), page());
    let result = copy(&uffd, &memory, 0, 1, CopyMode::empty());
    assert_eq!(explained(result, IoctlFlags::COPY, range(0, 1)).reason(), Reason::Occupied);
    if has_features(test_name!(), FeatureFlags::MINOR_SHMEM) {
        let result = uffd.continue_with(memory.at(3), page(), ContinueMode::empty()).map(|_| 0);
        assert_eq!(
            explained(result, IoctlFlags::CONTINUE, range(3, 1)).reason(),
            Reason::WrongMemoryFor { memory: MemoryKind::Anonymous, ioctl: IoctlFlags::CONTINUE }
        );
    }
    if !features().contains(FeatureFlags::POISON) {
        // SAFETY: nobody accesses the page any more.
        let result = unsafe { uffd.poison(memory.at(3), page(), true) };
        assert_eq!(
            explained(result, IoctlFlags::POISON, range(3, 1)).reason(),
            Reason::KernelLacksIoctl(IoctlFlags::POISON)
        );
    }
}

#[test]
fn fills_of_other_memory_are_explained() {
    require!(FeatureFlags::MINOR_SHMEM);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::new(Kind::Memfd, 1));
    uffd.register_with_mode(memory.start(), memory.len(), MINOR).unwrap();
    let result = uffd.continue_with(memory.start(), memory.len(), ContinueMode::empty());
    let refusal = explained(&uffd, result, IoctlFlags::CONTINUE, memory.range(0, 1)).unwrap();
    assert_eq!(refusal.reason(), Reason::NotCached);
    if has_features(test_name!(), FeatureFlags::MOVE) {
        let source = Memory::anonymous(1);
        source.write(0, 1);
        let result = move_pages(&uffd, source.start(), memory.start());
        let refusal = explained(&uffd, result, IoctlFlags::MOVE, memory.range(0, 1)).unwrap();
        let (memory, ioctl) = (MemoryKind::Shared, IoctlFlags::MOVE);
        assert_eq!(refusal.reason(), Reason::WrongMemoryFor { memory, ioctl });
    }
    if let Some(huge) = Memory::try_new(test_name!(), Kind::Hugetlb, 1) {
        uffd.register(huge.start(), huge.len()).unwrap();
        let refusal = explained(&uffd, zeropage(&uffd, &huge), IoctlFlags::ZEROPAGE, huge.range(0, 1));
        let (memory, ioctl) = (MemoryKind::Hugetlb, IoctlFlags::ZEROPAGE);
        assert_eq!(refusal.unwrap().reason(), Reason::WrongMemoryFor { memory, ioctl });
    }
}

#[test]
fn process_at_limit_of_mappings_is_explained() {
    require!();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    child::run_well(test_name!(), || {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
        let Some(many) = Mapping::use_up(test_name!(), 0) else { return };
        let error = uffd.register(memory.at(1), page()).unwrap_err();
        let refusal = uffd.explain(&error, IoctlFlags::REGISTER, memory.at(1), page());
        drop(many);
        assert!(matches!(error, Error::SystemError(Errno::ENOMEM)), "{error}");
        assert_eq!(refusal.unwrap().reason(), Reason::TooManyMappings { limit });
    });
}

/// Of another process's memory nothing is told that was found in this one's.
#[test]
fn memory_of_another_process_is_examined_there() {
    require!();
    child::run_well(test_name!(), || {
        // Registered in the child and not here, and the other way round; and one is mapped here alone.
        let memory = Memory::anonymous(4);
        let (here, there) = UnixStream::pair().unwrap();
        let child = child::fork(|| {
            let (uffd, other) = (uffd(FeatureFlags::empty()), self::uffd(FeatureFlags::empty()));
            other.register(memory.at(1), page()).unwrap();
            memory.unmap(3, 1);
            child::send_fd(&there, uffd.as_fd());
            // Until it is killed.
            loop {
                // SAFETY: touches no memory.
                unsafe { libc::pause() };
            }
        });
        let mut theirs = Uffd::from(child::receive_fd(&here));
        let own = uffd(FeatureFlags::empty());
        own.register_with_mode(memory.start(), page(), MISSING).unwrap();

        let (start, len) = (memory.start(), 3 * page());
        bare(theirs.register(start, len), Errno::EBUSY);
        let error = theirs.register(start, len).unwrap_err();
        assert_eq!(theirs.explain(&error, IoctlFlags::REGISTER, start, len), None);
        let pid = Pid::from_raw(child.pid());
        let found = theirs.explain_in(pid, &error, IoctlFlags::REGISTER, start, len).expect("a reason");
        assert_eq!(found.range(), memory.range(1, 1));
        let unaligned = reason(theirs.register(start, 1), Errno::EINVAL);
        assert_eq!(unaligned, Reason::Unaligned { page_size: page() });
        if has_features(test_name!(), FeatureFlags::MOVE) {
            let error = move_pages(&theirs, memory.at(1), memory.at(2));
            let refusal = explained(&theirs, error, IoctlFlags::MOVE, memory.range(2, 1));
            assert_eq!(refusal.unwrap().reason(), Reason::OtherProcess);
            // An adopted one of this process is known by the same.
            let adopted = Uffd::from(own.as_fd().try_clone_to_owned().unwrap());
            let registered = adopted.register_with_mode(start, page(), MINOR);
            let wrong = Reason::WrongMemory { memory: MemoryKind::Anonymous, modes: MINOR };
            assert_eq!(reason(registered, Errno::EINVAL), wrong);
        }

        // From now on the process is known.
        theirs.set_process(pid);
        let other = |has| Reason::OtherDescriptor { has };
        let refused = refusal(theirs.register(start, len), Errno::EBUSY);
        assert_eq!(
            (refused.range(), refused.reason(), refused.holder()),
            (memory.range(1, 1), other(MISSING), None)
        );
        let minor = theirs.register_with_mode(start, page(), MINOR);
        let wrong = if features().contains(FeatureFlags::MINOR_SHMEM) {
            Reason::WrongMemory { memory: MemoryKind::Anonymous, modes: MINOR }
        } else {
            Reason::KernelLacks(FeatureFlags::MINOR_SHMEM)
        };
        assert_eq!(reason(minor, Errno::EINVAL), wrong);
        let unmapped = refusal(theirs.register(memory.at(3), page()), Errno::EINVAL);
        assert_eq!((unmapped.range(), unmapped.reason()), (memory.range(3, 1), Reason::NotMapped));
        if features().contains(FeatureFlags::PAGEFAULT_FLAG_WP) {
            let protected = refusal(theirs.write_protect(start, page()), Errno::ENOENT);
            assert_eq!((protected.range(), protected.reason()), (memory.range(0, 1), Reason::NotRegistered));
        }
        let copy = theirs.try_clone().unwrap();
        assert_eq!(refusal(copy.register(start, len), Errno::EBUSY).range(), memory.range(1, 1));
        // Whose mappings can't be read isn't guessed at.
        let gone = child::fork(|| {});
        theirs.set_process(Pid::from_raw(gone.pid()));
        gone.succeed();
        bare(theirs.register(start, len), Errno::EBUSY);
    });
}

/// A fork's child has its parent's descriptors, which are for the parent's memory.
#[test]
fn refusal_in_a_forked_child_is_explained_by_the_parent() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(3);
        let (own, other) = (uffd(FeatureFlags::empty()), self::uffd(FeatureFlags::empty()));
        other.register(memory.at(2), page()).unwrap();
        let child = child::fork(|| {
            let refused = refusal(own.register(memory.start(), memory.len()), Errno::EBUSY);
            let reason = Reason::OtherDescriptor { has: MISSING };
            assert_eq!((refused.range(), refused.reason()), (memory.range(2, 1), reason));
        });
        child.succeed();
    });
}
