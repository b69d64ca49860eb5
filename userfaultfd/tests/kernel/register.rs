//! UFFDIO_REGISTER.

use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use userfaultfd::{Errno, Error, FaultKind, FeatureFlags, IoctlFlags, RegisterMode, UffdBuilder};

use crate::support::fault::{self, Fault};
use crate::support::mapping::{self, Mapping};
use crate::support::memory::{self, Kind, Memory};
use crate::support::raw::check;
use crate::support::{bad_ranges, child, errno, features, has, nowhere, page, require, test_name, uffd};

const MISSING: RegisterMode = RegisterMode::MISSING;
const WRITE_PROTECT: RegisterMode = RegisterMode::WRITE_PROTECT;
const MINOR: RegisterMode = RegisterMode::MINOR;
const READ_WRITE_PROTECT: RegisterMode = RegisterMode::READ_WRITE_PROTECT;

/// Every combination of modes.
fn combinations() -> impl Iterator<Item = RegisterMode> {
    (1..=RegisterMode::all().bits()).map(RegisterMode::from_bits_retain)
}

/// The operations of a registered range, as this kernel answers for memory of small pages, or of huge ones.
fn operations(hugetlb: bool, modes: RegisterMode) -> IoctlFlags {
    let small = |flag| if hugetlb { IoctlFlags::empty() } else { flag };
    let since = |feature, flag| if features().contains(feature) { flag } else { IoctlFlags::empty() };
    let with = |mode, flag| if modes.contains(mode) { flag } else { IoctlFlags::empty() };
    IoctlFlags::WAKE
        | IoctlFlags::COPY
        | small(IoctlFlags::ZEROPAGE)
        | small(since(FeatureFlags::MOVE, IoctlFlags::MOVE))
        | since(FeatureFlags::POISON, IoctlFlags::POISON)
        | with(WRITE_PROTECT, IoctlFlags::WRITE_PROTECT)
        | with(MINOR, IoctlFlags::CONTINUE)
        | with(READ_WRITE_PROTECT, IoctlFlags::READ_WRITE_PROTECT)
}

/// What registering memory of a kind answers on this kernel, `enabled` being the features of the userfaultfd.
fn answer(kind: Kind, modes: RegisterMode, enabled: FeatureFlags) -> Result<IoctlFlags, Errno> {
    let both = modes.contains(WRITE_PROTECT | READ_WRITE_PROTECT);
    let not_enabled = modes.contains(READ_WRITE_PROTECT) && !enabled.contains(FeatureFlags::RWP);
    match kind.needs(modes) {
        Some(needs) if features().contains(needs) && !both && !not_enabled => {
            Ok(operations(kind.is_hugetlb(), modes))
        }
        _ => Err(Errno::EINVAL),
    }
}

#[test]
fn every_memory_takes_its_modes_and_ioctls() {
    require!();
    for memory in Kind::ALL.into_iter().filter_map(|kind| Memory::try_new(test_name!(), kind, 1)) {
        for modes in combinations() {
            for enabled in [FeatureFlags::empty(), FeatureFlags::RWP & features()] {
                let uffd = uffd(enabled);
                let got = uffd.register_with_mode(memory.start(), memory.len(), modes);
                let got = got.map_err(|error| error.errno().unwrap());
                assert_eq!(got, answer(memory.kind(), modes, enabled), "{memory:?} {modes} {enabled}");
                // Closing would do, but another test's child may hold the descriptor for a moment.
                uffd.unregister(memory.start(), memory.len()).unwrap();
            }
        }
    }
}

#[test]
fn no_mode_and_modes_of_the_future_are_invalid() {
    require!();
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    for modes in [0, 1 << 10, 1 << 63 | 1].map(RegisterMode::from_bits_retain) {
        let result = uffd.register_with_mode(memory.start(), memory.len(), modes);
        assert_eq!(errno(result), Errno::EINVAL, "{modes}");
    }
}

#[test]
fn malformed_or_unmapped_ranges_are_invalid() {
    require!();
    for memory in Kind::ALL.into_iter().filter_map(|kind| Memory::try_new(test_name!(), kind, 2)) {
        let uffd = uffd(FeatureFlags::empty());
        let unmapped = ("nothing mapped", nowhere(), page());
        for (why, start, len) in bad_ranges(&memory).into_iter().chain([unmapped]) {
            assert_eq!(errno(uffd.register(start, len)), Errno::EINVAL, "{why} {memory:?}");
        }
    }
}

#[test]
fn other_memory_is_refused() {
    require!();
    let uffd = uffd(FeatureFlags::empty());
    let file = mapping::regular_file(test_name!(), 1);
    let secret = mapping::secret(test_name!(), 1);
    // SAFETY: touches no memory.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    let mut memory = vec![
        ("a file, shared", file.as_ref().map(|file| Mapping::shared(1, file.as_fd()).unwrap())),
        ("a file, private", file.as_ref().map(|file| Mapping::private(1, file.as_fd()).unwrap())),
        ("secret memory", secret.and_then(|secret| Mapping::shared(1, secret.as_fd()).ok())),
        // Shared memory beneath, but the kernel doesn't look there.
        ("a segment of System V", mapping::system_v(test_name!(), 1)),
    ];
    let vdso = Mapping { start: ptr::without_provenance_mut(vdso), len: page() };
    let vdso = std::mem::ManuallyDrop::new(vdso);
    for modes in combinations() {
        for (what, mapping) in memory.iter().filter_map(|(what, mapping)| Some((what, mapping.as_ref()?))) {
            let result = uffd.register_with_mode(mapping.start, mapping.len, modes);
            assert_eq!(errno(result), Errno::EINVAL, "{what} {modes}");
        }
        // Some architectures have none.
        if !vdso.start.is_null() {
            let result = uffd.register_with_mode(vdso.start, vdso.len, modes);
            assert_eq!(errno(result), Errno::EINVAL, "the vDSO {modes}");
        }
    }
    memory.clear();

    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let droppable = Mapping::new(1, protection, libc::MAP_DROPPABLE, None);
    if has(test_name!(), "MAP_DROPPABLE", droppable.is_ok()) {
        let droppable = droppable.unwrap();
        // The first kernels that had such memory took it.
        match uffd.register(droppable.start, droppable.len) {
            Ok(_) => println!("{}: droppable memory is accepted", test_name!()),
            Err(error) => assert_eq!(error.errno(), Some(Errno::EINVAL)),
        }
    }
}

#[test]
fn file_takes_asynchronous_write_protection_alone() {
    require!(FeatureFlags::WP_ASYNC);
    let Some(file) = mapping::regular_file(test_name!(), 1) else { return };
    for mapping in [Mapping::shared(1, file.as_fd()), Mapping::private(1, file.as_fd())] {
        let (uffd, mapping) = (uffd(FeatureFlags::WP_ASYNC), mapping.unwrap());
        for modes in combinations().filter(|modes| *modes != WRITE_PROTECT) {
            let result = uffd.register_with_mode(mapping.start, mapping.len, modes);
            assert_eq!(errno(result), Errno::EINVAL, "{modes}");
        }
        let ioctls = uffd.register_with_mode(mapping.start, mapping.len, WRITE_PROTECT).unwrap();
        assert_eq!(ioctls, operations(false, WRITE_PROTECT));
    }
}

#[test]
fn unwritable_shared_mapping_is_eperm() {
    require!(FeatureFlags::MISSING_SHMEM);
    let uffd = uffd(FeatureFlags::empty());
    let sealed = mapping::memfd(libc::MFD_ALLOW_SEALING, 1);
    // SAFETY: touches no memory.
    check(unsafe { libc::fcntl(sealed.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }).unwrap();
    for file in [mapping::read_only(mapping::memfd(0, 1)), sealed] {
        match Mapping::new(1, libc::PROT_READ, libc::MAP_SHARED, Some(file.as_fd())) {
            Ok(mapping) => {
                assert_eq!(errno(uffd.register(mapping.start, mapping.len)), Errno::EPERM);
            }
            // Before Linux 6.7 a sealed file can't be mapped shared at all.
            Err(error) => assert_eq!(error, Errno::EPERM),
        }
        let private = Mapping::new(1, libc::PROT_READ, libc::MAP_PRIVATE, Some(file.as_fd())).unwrap();
        uffd.register(private.start, private.len).unwrap();
    }
}

#[test]
fn permissions_of_private_memory_do_not_matter() {
    require!();
    for protection in [libc::PROT_NONE, libc::PROT_READ] {
        let memory = Memory::anonymous(1);
        memory.protect(0, 1, protection);
        for modes in combinations() {
            let uffd = uffd(FeatureFlags::RWP & features());
            let got = uffd.register_with_mode(memory.start(), memory.len(), modes);
            let expected = match answer(Kind::Anonymous, modes, uffd.features()) {
                // Its protection is one that lets nobody in.
                Ok(_) if protection == libc::PROT_NONE && modes.contains(READ_WRITE_PROTECT) => {
                    Err(Errno::EINVAL)
                }
                answer => answer,
            };
            assert_eq!(got.map_err(|error| error.errno().unwrap()), expected, "{modes}");
            uffd.unregister(memory.start(), memory.len()).unwrap();
        }
    }
}

#[test]
fn pages_that_are_present_raise_no_missing_fault() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = Memory::try_new(test_name!(), kind, 1) else { continue };
        memory.write(0, 1);
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        assert_eq!(fault::silently(&uffd, &memory, || memory.read(0)), 1);
        fault::silently(&uffd, &memory, || memory.write(0, 2));
    }
}

/// Checks that the pages are delivered, or aren't, when they are missing and read; and fills them.
fn assert_delivered(uffd: &userfaultfd::Uffd, memory: &Memory, pages: &[(usize, bool)]) {
    for &(page, delivered) in pages {
        if !delivered {
            assert_eq!(fault::silently(uffd, memory, || memory.read(page)), 0, "page {page}");
            continue;
        }
        fault::during(
            uffd,
            memory,
            || memory.read(page),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Missing, memory, page));
                // SAFETY: the memory is only accessed by raw pointers.
                unsafe { uffd.zeropage(memory.at(page), memory.page(), true) }.unwrap();
            },
        );
    }
}

#[test]
fn refusal_leaves_the_whole_range_unregistered() {
    require!(FeatureFlags::MISSING_SHMEM);
    let uffd = uffd(FeatureFlags::empty());
    let memory = Memory::anonymous(2);
    let file = mapping::read_only(mapping::memfd(0, 1));
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let fd = file.as_raw_fd();
    // SAFETY: replaces the second page, which nobody refers to.
    let replaced = unsafe { libc::mmap(memory.at(1), page(), libc::PROT_READ, flags, fd, 0) };
    assert_eq!(replaced, memory.at(1));
    assert_eq!(errno(uffd.register(memory.start(), memory.len())), Errno::EPERM);
    assert_delivered(&uffd, &memory, &[(0, false)]);
}

#[test]
fn memory_of_another_userfaultfd_is_busy() {
    require!();
    let (uffd, other) = (uffd(FeatureFlags::empty()), self::uffd(FeatureFlags::empty()));
    let memory = Memory::anonymous(3);
    other.register(memory.at(1), page()).unwrap();
    assert_eq!(errno(uffd.register(memory.start(), memory.len())), Errno::EBUSY);
    assert_eq!(errno(uffd.register(memory.at(1), page())), Errno::EBUSY);
    assert_delivered(&uffd, &memory, &[(0, false), (2, false)]);
    assert_delivered(&other, &memory, &[(1, true)]);
    other.unregister(memory.at(1), page()).unwrap();
    uffd.register(memory.start(), memory.len()).unwrap();
}

#[test]
fn holes_are_skipped_and_stay_unregistered() {
    require!();
    child::run_well(test_name!(), || {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
        memory.unmap(1, 1);
        uffd.register(memory.start(), memory.len()).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: fills the hole, which this process, alone with the test, has left open.
        let filled = unsafe { libc::mmap(memory.at(1), page(), protection, flags, -1, 0) };
        assert_eq!(filled, memory.at(1));
        assert_delivered(&uffd, &memory, &[(0, true), (1, false), (2, true)]);
    });
}

#[test]
fn memory_that_grows_in_place_is_registered() {
    require!();
    child::run_well(test_name!(), || {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
        memory.unmap(1, 2);
        uffd.register(memory.start(), page()).unwrap();
        // SAFETY: grows into the hole, which this process, alone with the test, has left open.
        let grown = unsafe { libc::mremap(memory.start(), page(), 3 * page(), 0) };
        assert_eq!(grown, memory.start());
        assert_delivered(&uffd, &memory, &[(0, true), (1, true), (2, true)]);
    });
}

#[test]
fn registering_again_replaces_the_modes() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(3));
    let (start, len) = (memory.start(), memory.len());
    uffd.register_with_mode(start, len, MISSING).unwrap();
    assert_delivered(&uffd, &memory, &[(0, true)]);
    uffd.register_with_mode(start, len, WRITE_PROTECT).unwrap();
    assert_delivered(&uffd, &memory, &[(1, false)]);
    uffd.register_with_mode(start, len, MISSING | WRITE_PROTECT).unwrap();
    assert_delivered(&uffd, &memory, &[(2, true)]);
}

#[test]
fn registering_for_less_drops_no_write_protection() {
    require!();
    for memory in memory::each(test_name!(), MISSING | WRITE_PROTECT, 1) {
        let uffd = uffd(FeatureFlags::empty());
        let (start, len) = (memory.start(), memory.len());
        uffd.register_with_mode(start, len, MISSING | WRITE_PROTECT).unwrap();
        match uffd.register_with_mode(start, len, MISSING) {
            // The answer is that of the smaller set, and nothing has changed.
            Ok(ioctls) => {
                assert!(!features().contains(FeatureFlags::RWP), "{memory:?}");
                assert!(!ioctls.contains(IoctlFlags::WRITE_PROTECT), "{memory:?}");
            }
            // Since Linux 7.3.
            Err(error) => assert_eq!(error.errno(), Some(Errno::EBUSY), "{memory:?}"),
        }
        uffd.write_protect(start, len).unwrap();
    }
}

#[test]
fn range_without_required_operation_is_not_registered() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = Memory::try_new(test_name!(), kind, 1) else { continue };
        let build = |ioctls| UffdBuilder::new().non_blocking(true).require_ioctls(ioctls).create().unwrap();
        // Only a registration for minor faults has it.
        let uffd = build(IoctlFlags::COPY | IoctlFlags::CONTINUE);
        match uffd.register(memory.start(), memory.len()) {
            Err(Error::UnsupportedIoctls(ioctls)) => {
                assert_eq!(ioctls, operations(kind.is_hugetlb(), MISSING));
            }
            other => panic!("{other:?}"),
        }
        assert_delivered(&uffd, &memory, &[(0, false)]);
        build(IoctlFlags::COPY | IoctlFlags::WAKE).register(memory.start(), memory.len()).unwrap();
    }
}

#[test]
fn mappings_at_their_limit_cannot_be_split() {
    require!();
    child::run_well(test_name!(), || {
        let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(5));
        uffd.register(memory.at(2), 3 * page()).unwrap();
        let Some(many) = Mapping::use_up(test_name!(), 0) else { return };
        let registered = uffd.register(memory.at(0), page());
        let unregistered = uffd.unregister(memory.at(3), page());
        drop(many);
        assert_eq!(errno(registered), Errno::ENOMEM);
        assert_eq!(errno(unregistered), Errno::ENOMEM);
        assert_delivered(&uffd, &memory, &[(0, false), (3, true)]);
    });
}
