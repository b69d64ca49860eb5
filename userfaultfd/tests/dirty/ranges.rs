//! Which memory is tracked: many ranges, parts of them, none twice.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;

use userfaultfd::dirty::Mode;
use userfaultfd::{Errno, Error, FeatureFlags, Reason};

use crate::space::{self, Kind, MODES, Space};
use crate::support::mapping::Mapping;
use crate::support::memory::{self, Memory};
use crate::support::{child, errno, has, has_features, maps, nowhere, page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

#[test]
fn parts_are_untracked_and_tracked_again() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 6, |tracker, space| {
        space.populate();
        tracker.track(space.all()).unwrap();
        (0..6).for_each(|page| space.write(page, 2));
        tracker.untrack(space.addresses(2..4)).unwrap();
        assert_eq!(tracker.tracked(), [space.addresses(0..2), space.addresses(4..6)]);
        assert_eq!(tracker.statistics().tracked, 4 * space.page);
        space.write(3, 3);
        assert_eq!(space.told(tracker.take()), [0..2, 4..6]);
        // It begins anew.
        tracker.track(space.addresses(2..4)).unwrap();
        assert_eq!(tracker.tracked(), [space.all()]);
        assert_eq!(space.told(tracker.take()), []);
        // Ranges side by side are one in what is told.
        (1..5).for_each(|page| space.write(page, 4));
        assert_eq!(space.told(tracker.take()), [1..5]);
        tracker.untrack(0..usize::MAX).unwrap();
        space.write(0, 5);
        assert_eq!((space.told(tracker.take()), tracker.tracked()), (vec![], vec![]));
    });
}

#[test]
fn ranges_that_cannot_be_tracked_are_refused() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space| {
        space.populate();
        let all = space.all();
        tracker.track(space.addresses(1..2)).unwrap();
        for taken in [all.clone(), space.addresses(1..3)] {
            match tracker.track(taken.clone()) {
                Err(Error::AlreadyTracked { start, end }) => assert_eq!(start..end, space.addresses(1..2)),
                result => panic!("{result:?}"),
            }
        }
        let nowhere = nowhere().addr();
        let unaligned = all.start + 1..all.start + space.page;
        let empty = space.addresses(1..1);
        for bad in [unaligned, nowhere..nowhere + page(), all.start..all.start, empty, all.end..all.start] {
            assert_eq!(errno(tracker.track(bad.clone())), Errno::EINVAL, "{bad:x?}");
        }
        let page = space.addresses(1..2);
        for bad in [page.start + 1..page.end, page.start..page.end - 1] {
            let inside = tracker.untrack(bad).unwrap_err();
            assert!(
                matches!(inside, Error::InsidePage { page_size, .. } if page_size == page.len()),
                "{inside:?}"
            );
            assert_eq!(inside.errno(), Some(Errno::EINVAL));
        }
        assert_eq!(tracker.tracked(), [page]);
        space.write(0, 2);
        space.write(1, 2);
        assert_eq!(space.told(tracker.take()), [1..2]);
    });
}

#[test]
fn many_ranges_are_tracked_at_once() {
    require!(WRITE_PROTECT);
    for mode in MODES {
        if mode == Mode::Async && !has_features(test_name!(), FeatureFlags::WP_ASYNC) {
            continue;
        }
        // Of all kinds with small pages, in any order, and holes of untracked pages between.
        let spaces: Vec<_> = (0..100)
            .map(|index| memory::Kind::SMALL[index % 4])
            .filter(|kind| Kind::Of(*kind).tracked(test_name!(), mode))
            .map(|kind| Space::from(Memory::new(kind, 3)))
            .collect();
        let mut tracker = space::tracker(mode);
        for space in &spaces {
            tracker.track(space.addresses(0..2)).unwrap();
        }
        assert_eq!(tracker.statistics().tracked, 2 * page() * spaces.len());
        for space in spaces.iter().step_by(2) {
            space.write(1, 1);
            space.write(2, 1);
        }
        let told: Vec<_> = tracker.take().map(Result::unwrap).collect();
        assert!(told.windows(2).all(|two| two[0].end < two[1].start), "{told:x?}");
        let mut written: Vec<_> = spaces.iter().step_by(2).map(|space| space.addresses(1..2)).collect();
        written.sort_by_key(|range| range.start);
        let mut merged: Vec<std::ops::Range<usize>> = Vec::new();
        for range in written {
            match merged.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => merged.push(range),
            }
        }
        assert_eq!(told, merged, "{mode}");
        assert_eq!(tracker.dirty_len().unwrap(), 0);
    }
}

#[test]
fn range_spans_mappings_and_holes() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 6, |tracker, space| {
            let Kind::Of(_) = space.kind else { return };
            space.populate();
            // Two mappings, a hole, and another mapping.
            space.memory().protect(0, 2, libc::PROT_READ);
            space.memory().unmap(3, 1);
            tracker.track(space.all()).unwrap();
            space.memory().protect(0, 2, libc::PROT_READ | libc::PROT_WRITE);
            assert_eq!(space.told(tracker.dirty()), []);
            for page in [1, 2, 4] {
                space.write(page, 2);
            }
            assert_eq!(space.told(tracker.take()), [1..3, 4..5]);
            assert_eq!(space.told(tracker.take()), []);
        });
    });
}

/// `/proc` is bytes: what a mapped file is called doesn't matter.
#[test]
fn mapped_file_may_have_any_name() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let mut path = std::env::temp_dir().into_os_string().into_vec();
        path.extend(format!("/userfaultfd-{}-", std::process::id()).as_bytes());
        path.extend(b"\xff\n\xc3 1000-2000 VmFlags: uw");
        let path = std::path::PathBuf::from(std::ffi::OsString::from_vec(path));
        let file = std::fs::File::create_new(&path).unwrap();
        file.set_len(page() as u64).unwrap();
        space::each(test_name!(), 4, |tracker, space| {
            let _mapped = below(space.all().start, file.as_fd());
            tracker.track(space.all()).unwrap();
            space.write(1, 1);
            assert_eq!(space.told(tracker.take()), [1..2]);
            tracker.untrack(space.all()).unwrap();
        });
        std::fs::remove_file(&path).unwrap();
    });
}

/// A mapping of a file at a free address below this one.
fn below(address: usize, file: std::os::fd::BorrowedFd<'_>) -> Mapping {
    let (flags, fd) = (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE, file.as_raw_fd());
    for step in 1..1 << 20 {
        let at = std::ptr::without_provenance_mut(address - step * (page() << 8));
        // SAFETY: replaces nothing.
        let start = unsafe { libc::mmap(at, page(), libc::PROT_READ, flags, fd, 0) };
        if start == at {
            return Mapping { start, len: page() };
        }
        assert_eq!(start, libc::MAP_FAILED, "the kernel knows MAP_FIXED_NOREPLACE");
    }
    panic!("no address is free below {address:#x}");
}

/// With as many mappings as there may be, the second of two can't be split, after the first was.
#[test]
fn partly_registrable_range_is_refused_whole() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let limit: usize = limit.trim().parse().unwrap();
        if !has(test_name!(), "a limit of mappings that can be reached", limit <= 1 << 17) {
            return;
        }
        for mode in MODES {
            if mode == Mode::Async && !has_features(test_name!(), FeatureFlags::WP_ASYNC) {
                continue;
            }
            let space = Space::from(Memory::anonymous(6));
            space.populate();
            space.memory().protect(0, 3, libc::PROT_READ);
            let mut tracker = space::tracker(mode);
            // Room for one mapping more; splitting both takes two.
            let filled = use_up_mappings(limit);
            let tracked = tracker.track(space.addresses(1..5));
            drop(filled);
            let Err(Error::Refused { errno: Errno::ENOMEM, refusal, .. }) = tracked else {
                panic!("{mode}: {tracked:?}")
            };
            assert_eq!(refusal.reason(), Reason::TooManyMappings { limit }, "{mode}");
            assert_eq!(tracker.tracked(), []);
            let other = crate::support::uffd(FeatureFlags::empty());
            other.register(space.at(0), space.all().len()).expect("nothing is registered");
        }
    });
}

/// Maps memory until there is room for one mapping more.
fn use_up_mappings(limit: usize) -> Mapping {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let all = Mapping::new(limit + 1, libc::PROT_NONE, flags, None).unwrap();
    let set = |index: usize, rights| {
        let at = all.start.wrapping_byte_add(index * page());
        // SAFETY: the page lies in the mapping, which nothing accesses.
        unsafe { libc::mprotect(at, page(), rights) == 0 }
    };
    let rights = |index: usize| [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE][index % 2];
    // From the end, each page is split off what is below it.
    let full = (0..limit).rev().find(|index| !set(*index, rights(*index))).expect("the limit is reached");
    assert!(set(full + 1, libc::PROT_NONE));
    all
}

/// What a tracker needs for itself lies elsewhere.
#[cfg(feature = "snapshot")]
#[test]
fn another_tracker_is_made_while_the_heap_is_tracked() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let heap = Box::new(1);
        let at = std::ptr::from_ref(&*heap).addr();
        let mut tracker = space::tracker(Mode::Async);
        tracker.track(maps::mapping_of(at).unwrap()).unwrap();
        let space = Space::from(Memory::anonymous(4));
        for mode in MODES {
            space::tracker(mode).track(space.all()).unwrap();
        }
        userfaultfd::Snapshot::begin(space.all(), |_, _: userfaultfd::snapshot::Content<'_>| Ok(()))
            .and_then(|snapshot| snapshot.wait().map(drop))
            .unwrap();
        assert!(tracker.dirty_len().unwrap() > 0);
    });
}

/// Memory that is reserved and holds nothing takes no page tables, and is tracked all the same.
#[test]
#[cfg(target_pointer_width = "64")]
fn vast_reservation_is_tracked_at_no_cost() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        const LEN: usize = 64 << 30;
        let tables = || maps::status_bytes("VmPTE");
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = Mapping::new(LEN / page(), rights, flags, None).unwrap();
        let start = mapping.start.cast::<u8>();
        let number = |far: usize, page_there: usize| (far << 30) / page() + page_there;
        let at = |number: usize| start.wrapping_add(number * page());
        // SAFETY: inside the mapping, which is accessed by raw pointers alone.
        let write = |number: usize| unsafe { at(number).write_volatile(1) };
        // SAFETY: as above.
        let read = |number: usize| unsafe { at(number).read_volatile() };
        let drop_page = |number: usize| {
            // SAFETY: as above.
            assert_eq!(unsafe { libc::madvise(at(number).cast(), page(), libc::MADV_DONTNEED) }, 0);
        };
        let mut tracker = space::tracker(Mode::Async);
        // SAFETY: changes no content.
        unsafe { libc::madvise(mapping.start, LEN, libc::MADV_NOHUGEPAGE) };
        write(number(3, 7));
        let before = tables();
        tracker.track(start.addr()..start.addr() + LEN).unwrap();
        assert_eq!(tracker.tracked(), [start.addr()..start.addr() + LEN]);
        assert!(tables() - before < 4 << 20, "{} bytes of page tables", tables() - before);
        let told = |ranges: userfaultfd::dirty::Ranges<'_>| -> Vec<usize> {
            let pages = |range: std::ops::Range<usize>| range.step_by(page());
            ranges.flat_map(|range| pages(range.unwrap())).map(|at| (at - start.addr()) / page()).collect()
        };
        assert_eq!(told(tracker.take()), [0; 0]);
        let written = [number(3, 7), number(3, 8), number(40, 0), number(40, 2), number(63, 1)];
        for round in 0..3 {
            written.into_iter().for_each(write);
            assert_eq!((read(number(40, 1)), read(number(50, 0))), (0, 0));
            assert_eq!(told(tracker.dirty()), written, "{round}");
            assert_eq!(told(tracker.take()), written, "{round}");
            assert_eq!(told(tracker.take()), [0; 0], "{round}");
        }
        // Read before, then written; dropped.
        write(number(40, 1));
        write(number(50, 0));
        assert_eq!(told(tracker.take()), [number(40, 1), number(50, 0)]);
        drop_page(number(40, 2));
        drop_page(number(50, 0));
        assert_eq!(told(tracker.dirty()), [number(40, 2), number(50, 0)]);
        // What is found and not taken out is told again.
        write(number(20, 5));
        write(number(30, 5));
        drop(tracker.take().next());
        let rest = told(tracker.take());
        assert!(rest.contains(&number(30, 5)) && rest.contains(&number(50, 0)), "{rest:?}");
        tracker.set_always_dirty(at(number(10, 0)).addr()..at(number(10, 2)).addr(), true).unwrap();
        assert_eq!(told(tracker.take()), [number(10, 0), number(10, 1)]);
        tracker.set_always_dirty(at(number(10, 0)).addr()..at(number(10, 2)).addr(), false).unwrap();
        assert_eq!(told(tracker.take()), [number(10, 0), number(10, 1)]);
        assert_eq!(told(tracker.take()), [0; 0]);
        assert!(tables() - before < 4 << 20, "{} bytes of page tables", tables() - before);
    });
}
