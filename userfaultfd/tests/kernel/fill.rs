//! What UFFDIO_COPY, ZEROPAGE, CONTINUE, POISON and MOVE have in common.

use std::os::fd::{AsFd, AsRawFd};

use userfaultfd::{Errno, FaultKind, FeatureFlags, RegisterMode};

use crate::support::fault::{self, Fault};
use crate::support::fill::{self, Fill, Filler};
use crate::support::handler::{self, Change};
use crate::support::memory::{Kind, Memory};
use crate::support::raw::check;
use crate::support::{self, bad_ranges, child, dead, mapping, nowhere, page, raw, require, test_name};

/// The kind of fault that an operation resolves.
fn kind_of(fill: Fill) -> FaultKind {
    if fill == Fill::Continue { FaultKind::Minor } else { FaultKind::Missing }
}

#[test]
fn each_operation_resolves_fault_on_its_memory() {
    require!();
    for filler in fill::each(test_name!(), 2).filter(|filler| filler.fill != Fill::Poison) {
        let (fill, memory) = (filler.fill, &filler.memory);
        let byte = fault::during(
            &filler.uffd,
            memory,
            || memory.read(1),
            |faults| {
                assert_eq!(faults.next(), Fault::read(kind_of(fill), memory, 1), "{filler:?}");
                assert_eq!(filler.run(1, 1, true).unwrap(), memory.page(), "{filler:?}");
            },
        );
        assert_eq!(byte, fill.byte(), "{filler:?}");
        assert!(!memory.state(0).present, "{filler:?}");
        fault::assert_silent(&filler.uffd);
    }
}

#[test]
fn each_operation_is_invalid_on_unfit_memory() {
    require!();
    for (fill, kind) in Fill::ALL.into_iter().flat_map(|fill| Kind::ALL.map(|kind| (fill, kind))) {
        let needs = fill.needs() | kind.needs(RegisterMode::MISSING).unwrap();
        if fill.fits(kind) || !support::has_features(test_name!(), needs) {
            continue;
        }
        let Some(memory) = Memory::try_new(test_name!(), kind, 2) else { continue };
        let filler = Filler::over(fill, support::uffd(FeatureFlags::empty()), memory);
        filler.uffd.register(filler.memory.start(), filler.memory.len()).unwrap();
        filler.assert_stopped(&filler.run(0, 2, true), 0, Errno::EINVAL);
        assert!(!filler.memory.state(0).present, "{filler:?}");
    }
}

#[test]
fn request_is_done_whole_or_reports_progress() {
    require!();
    for filler in fill::each(test_name!(), 4) {
        let whole = filler.memory.page();
        assert_eq!(filler.run(1, 1, true).unwrap(), whole, "{filler:?}");
        // The second of two pages is occupied, and the call for the rest tells that.
        filler.assert_stopped(&filler.run(0, 4, true), 1, Errno::EAGAIN);
        filler.assert_stopped(&filler.run(1, 3, true), 0, Errno::EEXIST);
        assert_eq!(filler.run(2, 2, true).unwrap(), 2 * whole, "{filler:?}");
        filler.assert_stopped(&filler.run(0, 4, true), 0, Errno::EEXIST);
    }
}

#[test]
fn malformed_ranges_are_invalid() {
    require!();
    for filler in fill::each(test_name!(), 2) {
        for (why, start, len) in bad_ranges(&filler.memory) {
            let result = filler.run_at(start, len, true);
            assert!(result.is_err(), "{why}: {filler:?}");
            filler.assert_stopped(&result, 0, Errno::EINVAL);
        }
        assert!((0..2).all(|page| !filler.memory.state(page).present), "{filler:?}");
    }
}

#[test]
fn range_across_mappings_is_enoent() {
    require!();
    for filler in fill::each(test_name!(), 4) {
        let memory = &filler.memory;
        // Registered, registered and read-only, not registered.
        memory.protect(1, 1, libc::PROT_READ);
        filler.uffd.unregister(memory.at(2), 2 * memory.page()).unwrap();
        let crossing = if filler.fill == Fill::Move { Errno::EINVAL } else { Errno::ENOENT };
        filler.assert_stopped(&filler.run(0, 2, true), 0, crossing);
        filler.assert_stopped(&filler.run(1, 2, true), 0, crossing);
        filler.assert_stopped(&filler.run(2, 2, true), 0, crossing);
        assert!((0..4).all(|page| !memory.state(page).present), "{filler:?}");
        assert_eq!(filler.run(0, 1, true).unwrap(), memory.page(), "{filler:?}");
    }
}

#[test]
fn address_where_nothing_is_mapped_is_not_there() {
    require!();
    for filler in fill::each(test_name!(), 1) {
        filler.assert_stopped(&filler.run_at(nowhere(), page(), true), 0, Errno::ENOENT);
    }
}

#[test]
fn fill_that_does_not_wake_leaves_that_to_wake() {
    require!();
    for filler in fill::each(test_name!(), 1).filter(|filler| filler.fill != Fill::Poison) {
        let (uffd, memory) = (&filler.uffd, &filler.memory);
        let byte = fault::during(
            uffd,
            memory,
            || memory.read(0),
            |faults| {
                faults.next();
                faults.wait_for_sleepers(1);
                filler.run(0, 1, false).unwrap();
                assert!(memory.state(0).present);
                assert_eq!(fault::waiters(uffd), 1, "{filler:?}");
                uffd.wake(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(byte, filler.fill.byte(), "{filler:?}");
    }
}

#[test]
fn partial_fill_wakes_the_part() {
    require!();
    for filler in fill::each(test_name!(), 3).filter(|filler| filler.fill != Fill::Poison) {
        let (uffd, memory) = (&filler.uffd, &filler.memory);
        filler.run(2, 1, true).unwrap();
        let read = |page| move || memory.read(page);
        let bytes = fault::during_all(uffd, memory, [read(0), read(1)], |faults| {
            faults.next();
            faults.next();
            filler.assert_stopped(&filler.run(0, 3, true), 2, Errno::EAGAIN);
        });
        assert_eq!(bytes, [filler.fill.byte(); 2], "{filler:?}");
    }
}

#[test]
fn other_userfaultfd_fills_and_wakes_own_waiters() {
    require!();
    for filler in fill::each(test_name!(), 1).filter(|filler| filler.fill != Fill::Poison) {
        let (uffd, memory) = (&filler.uffd, &filler.memory);
        let foreign = support::uffd(FeatureFlags::empty());
        let byte = fault::during(
            uffd,
            memory,
            || memory.read(0),
            |faults| {
                faults.next();
                faults.wait_for_sleepers(1);
                let result = filler.run_by(&foreign, memory.start(), memory.len(), true);
                if filler.fill == Fill::Move {
                    filler.assert_stopped(&result, 0, Errno::EINVAL);
                    filler.run(0, 1, false).unwrap();
                } else {
                    assert_eq!(result.unwrap(), memory.len(), "{filler:?}");
                }
                foreign.wake(memory.start(), memory.len()).unwrap();
                assert_eq!(fault::waiters(uffd), 1, "{filler:?}");
                uffd.wake(memory.start(), memory.len()).unwrap();
            },
        );
        assert_eq!(byte, filler.fill.byte(), "{filler:?}");
    }
}

#[test]
fn fills_are_to_be_tried_again_while_layout_changes() {
    require!(FeatureFlags::EVENT_REMOVE);
    for fill in Fill::ALL {
        let filler = Filler::try_with(test_name!(), fill, fill.home(), 2, FeatureFlags::EVENT_REMOVE);
        let Some(filler) = filler else { continue };
        let (uffd, memory) = (&filler.uffd, &filler.memory);
        let remove = || memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        handler::while_changing(uffd, remove, |_| {
            raw::wait_for_event(uffd);
            let attempt = filler.run(1, 1, true);
            assert_eq!(Change::next(uffd), Change::Remove(memory.range(0, 1)));
            filler.assert_stopped(&attempt, 0, Errno::EAGAIN);
        });
        // The remover is through, so it isn't changing any more.
        assert_eq!(filler.run(1, 1, true).unwrap(), memory.page(), "{filler:?}");
    }
}

#[test]
fn fills_of_a_process_that_is_gone_find_none() {
    require!();
    child::run_well(test_name!(), || {
        for fill in Fill::ALL {
            let needs = fill.needs() | fill.home().needs(fill.modes()).unwrap();
            if !support::has_features(test_name!(), needs) {
                continue;
            }
            let memory = Memory::new(fill.home(), 2);
            let gone = dead::uffd(&memory);
            let filler = Filler::over(fill, gone, memory);
            // Pages are moved only within the caller's own memory, and that is asked first.
            let errno = if fill == Fill::Move { Errno::EINVAL } else { Errno::ESRCH };
            filler.assert_stopped(&filler.run(0, 1, true), 0, errno);
        }
    });
}

#[test]
fn kernel_without_operation_says_that_it_is_invalid() {
    require!();
    for fill in [Fill::Poison, Fill::Move] {
        if support::features().contains(fill.needs()) {
            continue;
        }
        let filler = Filler::over(fill, support::uffd(FeatureFlags::empty()), Memory::anonymous(1));
        filler.uffd.register(filler.memory.start(), page()).unwrap();
        filler.assert_stopped(&filler.run(0, 1, true), 0, Errno::EINVAL);
    }
}

#[test]
fn fill_beyond_end_of_file_fails() {
    require!();
    for filler in fill::each(test_name!(), 2) {
        let (memory, kind) = (&filler.memory, filler.memory.kind());
        if matches!(kind, Kind::Anonymous | Kind::SharedAnonymous) {
            continue;
        }
        let possible: &[Errno] = match (filler.fill, kind.is_hugetlb()) {
            // The second on shared memory since Linux 7.2.
            (Fill::Copy | Fill::Zeropage, false) => &[Errno::EFAULT, Errno::ENOMEM],
            // The first on small pages, of which the cache can't have one there.
            (Fill::Continue, _) => &[Errno::EINVAL, Errno::EFAULT],
            (Fill::Copy, true) if kind == Kind::PrivateHugetlb => continue, // The kernel doesn't ask.
            (Fill::Poison, true) => continue,                               // Nor here.
            _ => &[Errno::EFAULT],
        };
        // SAFETY: touches no memory that is accessed afterwards.
        check(unsafe { libc::ftruncate(memory.file().as_raw_fd(), memory.page() as _) }).unwrap();
        filler.assert_stopped(&filler.run(0, 2, true), 1, Errno::EAGAIN);
        let rest = filler.run(1, 1, true);
        let errno = rest.as_ref().expect_err("beyond the end").errno().unwrap();
        println!("{}: {errno:?}: {filler:?}", test_name!());
        assert!(possible.contains(&errno), "{errno:?}: {filler:?}");
        filler.assert_stopped(&rest, 0, errno);
    }
}

/// What can be in the slot of a page that isn't there.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Marker {
    WriteProtection,
    Poison,
    Guard,
}

impl Marker {
    /// The features that putting it into memory of a kind takes.
    fn needs(self, kind: Kind) -> FeatureFlags {
        match self {
            Marker::WriteProtection if kind == Kind::Anonymous => FeatureFlags::WP_UNPOPULATED,
            Marker::WriteProtection => FeatureFlags::WP_HUGETLBFS_SHMEM,
            Marker::Poison => FeatureFlags::POISON,
            Marker::Guard => FeatureFlags::empty(),
        }
    }

    /// Puts it into the first page. Tells whether the kernel can.
    fn put(self, filler: &Filler) -> bool {
        let (uffd, memory) = (&filler.uffd, &filler.memory);
        let (start, len) = (memory.start(), memory.len());
        match self {
            Marker::WriteProtection => {
                let modes = filler.fill.modes() | RegisterMode::WRITE_PROTECT;
                uffd.register_with_mode(start, len, modes).unwrap();
                uffd.write_protect(start, memory.page()).unwrap();
                true
            }
            // SAFETY: nobody accesses the page before it is filled.
            Marker::Poison => unsafe { uffd.poison(start, memory.page(), true) }.is_ok(),
            Marker::Guard => memory.advise(0, 1, MADV_GUARD_INSTALL).is_ok(),
        }
    }
}

const MADV_GUARD_INSTALL: libc::c_int = 102;

/// Whether an operation replaces markers that it finds.
fn replaces_markers(fill: Fill, kind: Kind) -> bool {
    match fill {
        Fill::Copy | Fill::Continue => true,
        Fill::Zeropage => kind.is_shared(),
        Fill::Poison | Fill::Move => false,
    }
}

#[test]
fn marker_is_replaced_or_in_the_way() {
    require!();
    let markers = [Marker::WriteProtection, Marker::Poison, Marker::Guard];
    let fills = Fill::ALL.into_iter().flat_map(|fill| Kind::ALL.map(|kind| (fill, kind)));
    for ((fill, kind), marker) in fills.flat_map(|pair| markers.map(|marker| (pair, marker))) {
        if !fill.fits(kind) || marker == Marker::Guard && kind.is_hugetlb() {
            continue;
        }
        let part = format!("{} ({marker:?})", test_name!());
        let Some(filler) = Filler::try_with(&part, fill, kind, 2, marker.needs(kind)) else { continue };
        let put = marker.put(&filler);
        if marker == Marker::Guard && !support::has(test_name!(), "MADV_GUARD_INSTALL", put) {
            continue;
        }
        let result = filler.run(0, 1, true);
        let memory = &filler.memory;
        let protected = memory.state(0).protected;
        if replaces_markers(fill, kind) && (result.is_ok() || marker != Marker::Guard) {
            assert_eq!(result.unwrap(), memory.page(), "{marker:?} {filler:?}");
            // Protection is lost, and the page can be read.
            assert!(!protected, "{filler:?}");
            assert_eq!(memory.read(0), fill.byte(), "{marker:?} {filler:?}");
        } else {
            // Since Linux 7.2 guards stay whatever the operation.
            filler.assert_stopped(&result, 0, Errno::EEXIST);
            assert!(!memory.state(0).present, "{marker:?} {filler:?}");
            assert_eq!(protected, marker == Marker::WriteProtection, "{marker:?} {filler:?}");
        }
    }
}

#[test]
fn async_protected_files_cannot_be_filled() {
    require!(FeatureFlags::WP_ASYNC);
    let Some(file) = mapping::regular_file(test_name!(), 1) else { return };
    let mapping = mapping::Mapping::shared(1, file.as_fd()).unwrap();
    for fill in Fill::ALL {
        if !support::has_features(test_name!(), fill.needs()) {
            continue;
        }
        let filler = Filler::over(fill, support::uffd(FeatureFlags::WP_ASYNC), Memory::anonymous(1));
        filler.uffd.register_with_mode(mapping.start, page(), RegisterMode::WRITE_PROTECT).unwrap();
        let result = filler.run_at(mapping.start, page(), true);
        filler.assert_stopped(&result, 0, Errno::EINVAL);
    }
}
