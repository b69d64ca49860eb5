//! PAGEMAP_SCAN.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use userfaultfd::pagemap::{Categories, Pagemap, Region, Scan};
use userfaultfd::{Errno, Error, FeatureFlags, Pid, RegisterMode, Uffd};

use crate::support::memory::{self, Kind, Memory};
use crate::support::{child, errno, has, page, require, test_name, uffd};

/// This process's, if the kernel can scan it.
fn pagemap(test: &str) -> Option<Pagemap> {
    let pagemap = Pagemap::of_self().unwrap();
    let mut regions = [Region::default()];
    let scanned = Scan::new(0..0).next_regions(&pagemap, &mut regions).map(drop);
    has(test, "PAGEMAP_SCAN", !matches!(scanned, Err(Error::SystemError(Errno::ENOTTY)))).then_some(pagemap)
}

/// The addresses of some pages.
fn addresses(memory: &Memory, first: usize, end: usize) -> Range<usize> {
    memory.at(first).addr()..memory.at(end).addr()
}

fn all(memory: &Memory) -> Range<usize> {
    addresses(memory, 0, memory.pages())
}

/// What is left of a scan, by this number of regions a call.
fn run(scan: &mut Scan, pagemap: &Pagemap, room: usize) -> Vec<(Range<usize>, Categories)> {
    let mut regions = vec![Region::default(); room];
    let mut found = Vec::new();
    while let Some(some) = scan.next_regions(pagemap, &mut regions).unwrap() {
        found.extend(some.iter().map(|region| (region.range(), region.categories())));
    }
    found
}

/// What a scan finds, as numbers of pages.
fn pages_of(memory: &Memory, found: &[(Range<usize>, Categories)]) -> Vec<usize> {
    let number = |address: usize| (address - memory.start().addr()) / memory.page();
    found.iter().flat_map(|(range, _)| number(range.start)..number(range.end)).collect()
}

/// Memory with asynchronous write protection, protected, and its userfaultfd.
fn tracked(memory: Memory) -> (Memory, Uffd) {
    let uffd = uffd(FeatureFlags::WP_ASYNC);
    uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::WRITE_PROTECT).unwrap();
    uffd.write_protect(memory.start(), memory.len()).unwrap();
    (memory, uffd)
}

#[test]
fn scan_reports_categories_of_pages() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let reported = Categories::PRESENT | Categories::PFNZERO | Categories::FILE | Categories::HUGE;
    let present = Categories::PRESENT;
    for kind in Kind::ALL {
        let Some(memory) = Memory::try_new(test_name!(), kind, 3) else { continue };
        memory.write(0, 1);
        memory.read(1);
        let (written, read) = match kind {
            Kind::Anonymous => (present, present | Categories::PFNZERO),
            Kind::SharedAnonymous | Kind::Memfd => (present | Categories::FILE, present | Categories::FILE),
            // The written page is a copy, the other one the file's.
            Kind::PrivateMemfd => (present, present | Categories::FILE),
            Kind::Hugetlb => {
                let shared = present | Categories::FILE | Categories::HUGE;
                (shared, shared)
            }
            Kind::PrivateHugetlb => (present | Categories::HUGE, present | Categories::HUGE),
        };
        let mut expected = vec![(addresses(&memory, 0, 1), written), (addresses(&memory, 1, 2), read)];
        if written == read {
            expected = vec![(addresses(&memory, 0, 2), read)];
        }
        let mut scan = Scan::new(all(&memory));
        let found = run(scan.report(reported), &pagemap, 4);
        assert_eq!(found[..expected.len()], expected, "{memory:?}");
        // What isn't there is a page nevertheless. Of huge pages it is a huge one where there is a page
        // table.
        let [(hole, categories)] = &found[expected.len()..] else { panic!("{found:?} {memory:?}") };
        assert_eq!(*hole, addresses(&memory, 2, 3), "{memory:?}");
        let huge = if kind.is_hugetlb() { Categories::HUGE } else { Categories::empty() };
        assert!(huge.contains(*categories), "{found:?} {memory:?}");
    }
}

#[test]
fn scan_reports_written_pages_and_protects_again() {
    require!(FeatureFlags::WP_ASYNC);
    let pagemap = pagemap(test_name!()).unwrap();
    for (memory, _uffd) in memory::each(test_name!(), RegisterMode::WRITE_PROTECT, 3).map(tracked) {
        let written = |protect| {
            let mut scan = Scan::new(all(&memory));
            scan.all_of(Categories::WRITTEN | Categories::WPALLOWED)
                .write_protect(protect)
                .require_async(true);
            pages_of(&memory, &run(&mut scan, &pagemap, 1))
        };
        assert!(written(false).is_empty(), "{memory:?}");
        memory.write(0, 1);
        memory.write(2, 1);
        assert_eq!(written(false), [0, 2], "{memory:?}");
        assert_eq!(written(true), [0, 2], "{memory:?}");
        assert!(written(true).is_empty(), "{memory:?}");
        memory.write(1, 1);
        assert_eq!(written(true), [1], "{memory:?}");
        assert!((0..3).all(|page| memory.state(page).protected), "{memory:?}");
    }
}

#[test]
fn pages_are_protected_without_room_for_regions() {
    require!(FeatureFlags::WP_ASYNC);
    let pagemap = pagemap(test_name!()).unwrap();
    let (memory, _uffd) = tracked(Memory::anonymous(2));
    memory.write(1, 1);
    let mut scan = Scan::new(all(&memory));
    scan.all_of(Categories::WRITTEN).write_protect(true);
    assert_eq!(scan.next_regions(&pagemap, &mut []).unwrap(), Some(&[][..]));
    assert!(memory.state(1).protected);
    assert_eq!(scan.next_regions(&pagemap, &mut []).unwrap(), None);
}

#[test]
fn no_room_is_an_error_where_nothing_else_is_done() {
    require!();
    let pagemap = Pagemap::of_self().unwrap();
    let result = Scan::new(0..page()).next_regions(&pagemap, &mut []).map(drop);
    assert!(matches!(result, Err(Error::EmptyBuffer)), "{result:?}");
}

#[test]
fn scan_goes_on_where_it_stopped() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let memory = Memory::anonymous(12);
    let written = [0, 2, 3, 4, 6, 8, 9, 11];
    written.iter().for_each(|page| memory.write(*page, 1));
    for room in 1..6 {
        for limit in 0..5 {
            let mut scan = Scan::new(all(&memory));
            scan.all_of(Categories::PRESENT).max_pages(limit);
            let mut regions = vec![Region::default(); room];
            let first = scan.next_regions(&pagemap, &mut regions).unwrap().unwrap();
            let first: Vec<_> = first.iter().map(|region| (region.range(), region.categories())).collect();
            assert!(first.len() <= room);
            let mut found = pages_of(&memory, &first);
            assert!(!found.is_empty() && (limit == 0 || found.len() <= limit), "{first:?}");
            // What is left begins where the call stopped.
            let remaining = scan.remaining();
            assert!(remaining.start >= first.last().unwrap().0.end && remaining.end == all(&memory).end);
            found.extend(pages_of(&memory, &run(&mut scan, &pagemap, room)));
            assert_eq!(found, written, "{room} {limit}");
            assert!(scan.remaining().is_empty());
        }
    }
}

#[test]
fn categories_are_required_excluded_and_chosen_from() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let memory = Memory::anonymous(3);
    memory.write(0, 1);
    memory.read(1);
    let picked = |choose: &dyn Fn(&mut Scan) -> &mut Scan| {
        let mut scan = Scan::new(all(&memory));
        pages_of(&memory, &run(choose(&mut scan), &pagemap, 3))
    };
    let (present, zero) = (Categories::PRESENT, Categories::PFNZERO);
    assert_eq!(picked(&|scan| scan.all_of(present)), [0, 1]);
    assert_eq!(picked(&|scan| scan.all_of(present | zero)), [1]);
    assert_eq!(picked(&|scan| scan.all_of(present).none_of(zero)), [0]);
    assert_eq!(picked(&|scan| scan.any_of(present | zero)), [0, 1]);
    assert_eq!(picked(&|scan| scan.any_of(zero | Categories::SWAPPED)), [1]);
    assert_eq!(picked(&|scan| scan.none_of(present)), [2]);
    assert!(picked(&|scan| scan.all_of(present).any_of(Categories::SWAPPED)).is_empty());
    // Of what is picked only what was asked for is reported, and equal neighbours are one.
    let mut scan = Scan::new(all(&memory));
    let found = run(scan.none_of(Categories::SWAPPED).any_of(present), &pagemap, 3);
    assert_eq!(found, [(addresses(&memory, 0, 2), present)]);
}

/// The point of scanning and protecting in one step: a program that copies the pages that a scan tells, scan after
/// scan, has everything in the end.
#[test]
fn no_write_falls_between_scanning_and_protecting() {
    require!(FeatureFlags::WP_ASYNC);
    let pagemap = pagemap(test_name!()).unwrap();
    const PAGES: usize = 16;
    let (memory, _uffd) = tracked(Memory::anonymous(PAGES));
    let done = AtomicBool::new(false);
    let mut copy = [0; PAGES];
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..20_000_usize {
                memory.write(round * 7 % PAGES, (round / PAGES % 255 + 1) as u8);
            }
            done.store(true, Ordering::SeqCst);
        });
        loop {
            // One scan at least is after the last write.
            let last = done.load(Ordering::SeqCst);
            let mut scan = Scan::new(all(&memory));
            scan.all_of(Categories::WRITTEN).write_protect(true);
            for page in pages_of(&memory, &run(&mut scan, &pagemap, 4)) {
                copy[page] = memory.read(page);
            }
            if last {
                break;
            }
        }
    });
    assert_eq!(copy, std::array::from_fn(|page| memory.read(page)));
}

#[test]
fn other_memory_is_skipped_or_not_permitted() {
    require!(FeatureFlags::WP_ASYNC);
    let pagemap = pagemap(test_name!()).unwrap();
    let (memory, uffd) = tracked(Memory::anonymous(2));
    memory.write(0, 1);
    memory.write(1, 1);
    uffd.unregister(memory.at(1), page()).unwrap();
    let mut scan = Scan::new(all(&memory));
    scan.all_of(Categories::WRITTEN | Categories::WPALLOWED);
    assert_eq!(pages_of(&memory, &run(&mut scan.clone(), &pagemap, 2)), [0]);
    let mut regions = [Region::default(); 2];
    let result = scan.require_async(true).next_regions(&pagemap, &mut regions).map(drop);
    assert_eq!(errno(result), Errno::EPERM);
    assert_eq!(scan.remaining(), all(&memory));

    // Up to Linux 7.2 other memory counts as written.
    let mut scan = Scan::new(addresses(&memory, 1, 2));
    let written = !run(scan.all_of(Categories::WRITTEN), &pagemap, 1).is_empty();
    println!("{}: other memory is told as written: {written}", test_name!());
}

#[test]
fn categories_of_newer_kernels_are_invalid() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let memory = Memory::anonymous(1);
    let scan = |categories| {
        let mut regions = [Region::default()];
        let mut scan = Scan::new(all(&memory));
        scan.any_of(categories).next_regions(&pagemap, &mut regions).map(|found| found.map(<[_]>::len))
    };
    assert_eq!(errno(scan(Categories::from_bits_retain(1 << 40))), Errno::EINVAL);
    for newer in [Categories::GUARD, Categories::ACCESSED] {
        match scan(newer) {
            Ok(found) => assert_eq!(found, Some(0)),
            Err(error) => {
                println!("{}: {newer} is unknown", test_name!());
                assert_eq!(error.errno(), Some(Errno::EINVAL));
            }
        }
    }
}

#[test]
fn scan_reports_guard_pages() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let memory = Memory::anonymous(3);
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    let guarded = memory.advise(1, 1, MADV_GUARD_INSTALL).is_ok();
    let mut regions = [Region::default(); 3];
    let mut scan = Scan::new(all(&memory));
    let found = scan.all_of(Categories::GUARD).next_regions(&pagemap, &mut regions);
    if has(test_name!(), "PAGE_IS_GUARD", guarded && found.is_ok()) {
        let found: Vec<_> = found.unwrap().unwrap().iter().map(Region::range).collect();
        assert_eq!(found, [addresses(&memory, 1, 2)]);
    }
}

#[test]
fn malformed_ranges_are_refused() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let memory = Memory::anonymous(2);
    let Range { start, end } = all(&memory);
    let mut regions = [Region::default()];
    let mut scan = |range| Scan::new(range).next_regions(&pagemap, &mut regions).map(drop);
    assert_eq!(errno(scan(start + 1..end)), Errno::EINVAL);
    // On s390x every address is a process's, so nothing is too long: the kernel has a space of its own.
    if !cfg!(target_arch = "s390x") {
        assert_eq!(errno(scan(end..start)), Errno::EFAULT);
        assert_eq!(errno(scan(start..usize::MAX)), Errno::EFAULT);
    }
}

#[test]
fn end_inside_a_page_is_the_end_of_the_page() {
    require!();
    let Some(pagemap) = pagemap(test_name!()) else { return };
    let memory = Memory::anonymous(2);
    (0..2).for_each(|page| memory.write(page, 1));
    let Range { start, .. } = all(&memory);
    let mut scan = Scan::new(start..start + 1);
    assert_eq!(pages_of(&memory, &run(scan.all_of(Categories::PRESENT), &pagemap, 1)), [0]);
    assert_eq!(scan.remaining(), start + 1..start + 1);
    // Nothing to look at is nothing, once.
    let mut scan = Scan::new(start..start);
    let mut regions = [Region::default()];
    assert_eq!(scan.next_regions(&pagemap, &mut regions).unwrap(), Some(&[][..]));
    assert_eq!(scan.next_regions(&pagemap, &mut regions).unwrap(), None);
}

#[test]
fn another_file_is_no_pagemap() {
    require!();
    let mut regions = [Region::default()];
    for path in ["/dev/null", "/proc/self/status", "/proc/self"] {
        let file = Pagemap::from(OwnedFd::from(File::open(path).unwrap()));
        let result = Scan::new(0..page()).next_regions(&file, &mut regions).map(drop);
        assert_eq!(errno(result), Errno::ENOTTY, "{path}");
    }
    let none = Pagemap::of(Pid::from_raw(i32::MAX)).unwrap_err();
    assert!(matches!(none, Error::NoAccess { errno: Errno::ENOENT, .. }), "{none:?}");
    assert!(none.to_string().contains("there is no such process"), "{none}");
}

#[test]
fn another_process_is_looked_at_until_it_is_gone() {
    require!();
    child::run_well(test_name!(), || {
        if pagemap(test_name!()).is_none() {
            return;
        }
        let memory = Memory::anonymous(2);
        memory.write(1, 1);
        let child = child::fork(|| {
            loop {
                // SAFETY: touches no memory.
                unsafe { libc::pause() };
            }
        });
        let of_child = Pagemap::of(Pid::from_raw(child.pid())).unwrap();
        // What happens here isn't seen there.
        memory.write(0, 1);
        let mut scan = Scan::new(all(&memory));
        scan.all_of(Categories::PRESENT);
        assert_eq!(pages_of(&memory, &run(&mut scan.clone(), &of_child, 2)), [1]);
        child.kill();
        child.wait();
        let mut regions = [Region::default()];
        // Its memory is gone, and so are the mappings; some kernels say so.
        match scan.next_regions(&of_child, &mut regions) {
            Ok(found) => assert_eq!(found, Some(&[][..])),
            Err(error) => assert_eq!(error.errno(), Some(Errno::ESRCH)),
        }
    });
}
