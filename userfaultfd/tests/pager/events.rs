//! Changes of the layout that the descriptor tells of, and those that it doesn't.

use userfaultfd::pager::{FaultAround, FillOrder, Pager, Region};
use userfaultfd::{FeatureFlags, RegisterMode};

use crate::reader::Seen;
use crate::scene::{Pages, check, content, memory, region, see, serve};
use crate::support::memory::{self as kinds, Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, features, page, require, test_name, uffd};

/// Everything that a descriptor can tell of but forks.
const CHANGES: FeatureFlags =
    FeatureFlags::EVENT_REMOVE.union(FeatureFlags::EVENT_REMAP).union(FeatureFlags::EVENT_UNMAP);

#[test]
fn removed_page_is_zero_whether_it_was_there_or_not() {
    require!(FeatureFlags::EVENT_REMOVE);
    for told in [true, false] {
        for kind in [Kind::Anonymous, Kind::PrivateMemfd] {
            let Some(memory) = memory(test_name!(), kind, 4) else { continue };
            let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
            let features = if told { FeatureFlags::EVENT_REMOVE } else { FeatureFlags::empty() };
            let added = serve(&pager, uffd(features), region(&memory, source.clone()));
            check(&memory, 0, 0);
            memory.advise(0, 2, libc::MADV_DONTNEED).unwrap();
            if told {
                let missing = pager.missing(added.regions[0]).unwrap();
                let offsets: Vec<_> =
                    missing.iter().map(|missing| (missing.len / page(), missing.offset)).collect();
                assert_eq!(offsets, [(2, None), (2, Some(2 * page() as u64))], "{missing:?}");
            }
            assert_eq!(see(&memory, 0), Seen::ZERO);
            // Without a word nobody can know that it was removed.
            assert_eq!(see(&memory, 1), if told { Seen::ZERO } else { content(1) });
            check(&memory, 2, 2);
            source.were_read_once(if told { 2 } else { 3 });
            // A page that was zero can be removed again, and be written.
            memory.write(0, 5);
            assert_eq!(memory.read(0), 5);
            memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
            assert_eq!(see(&memory, 0), Seen::ZERO);
        }
    }
}

#[test]
fn hole_punched_into_the_file_is_zero() {
    require!(FeatureFlags::MISSING_SHMEM);
    let memory = Memory::new(Kind::Memfd, 3);
    let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
    serve(&pager, uffd(CHANGES), region(&memory, source.clone()));
    check(&memory, 1, 1);
    memory.punch(1, 1);
    assert_eq!(see(&memory, 1), Seen::ZERO);
    check(&memory, 2, 2);
    source.were_read_once(2);
}

#[test]
fn file_writes_after_removal_stay() {
    require!(FeatureFlags::EVENT_REMOVE);
    let modes = RegisterMode::MISSING | RegisterMode::MINOR;
    for kind in [Kind::Memfd, Kind::Hugetlb] {
        for end in 0..3 {
            let Some(memory) = kinds::each_of(test_name!(), &[kind], modes, 4).next() else { continue };
            let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
            let file = memory.file().try_clone().unwrap().into();
            let region = region(&memory, source.clone()).minor(file, 0);
            let added = serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region);
            memory.advise(1, 2, libc::MADV_REMOVE).unwrap();
            // By another mapping, as the backend of a device does.
            memory.alias().write(1, 99);
            match end {
                0 => {}
                1 => drop(pager.background(added.regions[0], FillOrder::Ascending).unwrap().wait()),
                _ => pager.finish(|_| {}).unwrap(),
            }
            assert_eq!((memory.read(1), memory.alias().read(1)), (99, 99), "{memory:?}, {end}");
            assert_eq!(see(&memory, 2), Seen::ZERO);
            check(&memory, 3, 3);
            assert!(!source.reads().contains_key(&1), "{source:?}");
        }
    }
}

#[test]
fn whole_huge_pages_alone_are_removed() {
    require!(FeatureFlags::EVENT_REMOVE);
    let modes = RegisterMode::MISSING | RegisterMode::MINOR;
    let Some(memory) = kinds::each_of(test_name!(), &[Kind::Hugetlb], modes, 5).next() else { return };
    let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
    let file = memory.file().try_clone().unwrap().into();
    serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, source).minor(file, 0));
    // From the middle of page 1 to the middle of page 3, and a part of page 4.
    let middle = |page| memory.at(page).wrapping_byte_add(memory.page() / 2);
    for (start, len) in [(middle(1), 2 * memory.page()), (memory.at(4), page())] {
        // SAFETY: only raw pointers lead to the memory of tests.
        assert_eq!(unsafe { libc::madvise(start, len, libc::MADV_REMOVE) }, 0);
    }
    assert_eq!(see(&memory, 2), Seen::ZERO);
    for page in [0, 1, 3, 4] {
        check(&memory, page, page);
    }
}

#[test]
fn moved_memory_takes_its_content_along() {
    require!(CHANGES);
    for kind in [Kind::Anonymous, Kind::PrivateMemfd] {
        let Some(memory) = memory(test_name!(), kind, 6) else { continue };
        let elsewhere = Memory::new(kind, 2);
        let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
        let region = region(&memory, source.clone()).fault_around(FaultAround::Block(6 * page()));
        serve(&pager, uffd(CHANGES), region);
        // Pages 2 and 3 go over another mapping's; then what is left of a block is two.
        memory.move_over(2, 2, &elsewhere, 0);
        check(&elsewhere, 0, 2);
        check(&memory, 5, 5);
        check(&memory, 0, 0);
        check(&elsewhere, 1, 3);
        (0..2).for_each(|page| check(&memory, page, page));
        source.were_read_once(6);
        let statistics = pager.statistics();
        assert_eq!((statistics.remaps, statistics.unmaps), (1, 1), "{statistics}");
        pager.finish(|_| {}).unwrap();
    }
}

#[test]
fn memory_mapped_anew_is_a_new_region() {
    require!(FeatureFlags::EVENT_UNMAP);
    let memory = Memory::anonymous(3);
    let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
    let added = serve(&pager, uffd(CHANGES), region(&memory, source));
    check(&memory, 1, 1);
    let region = || {
        let other = |_: u64, bytes: &mut [u8]| {
            bytes.fill(99);
            Ok(userfaultfd::pager::PageData::Data)
        };
        Region::new(memory.at(1).addr(), page(), other)
    };
    // In one call: what is unmapped before, another thread may map something to.
    // SAFETY: what is there is the test's, and no reference leads to it.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        libc::mmap(memory.at(1), page(), libc::PROT_READ, flags, -1, 0)
    };
    assert_eq!(mapped, memory.at(1));
    // SAFETY: only raw pointers lead there.
    unsafe { pager.add_own_region(added.descriptor, region()) }.unwrap();
    assert_eq!(memory.read(1), 99);
    check(&memory, 0, 0);
    check(&memory, 2, 2);
    // SAFETY: the page that was mapped above.
    assert_eq!(unsafe { libc::munmap(memory.at(1), page()) }, 0);
}

#[test]
fn forked_children_and_grandchildren_are_served() {
    require!(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let features = CHANGES | FeatureFlags::EVENT_FORK;
        for kind in [Kind::Anonymous, Kind::Memfd, Kind::PrivateHugetlb] {
            let Some(memory) = memory(test_name!(), kind, 5) else { continue };
            let (pager, source) = (Pager::builder().threads(2).build().unwrap(), Pages::new(memory.page()));
            serve(&pager, uffd(features), region(&memory, source));
            check(&memory, 0, 0);
            // Not of hugetlb memory before Linux 5.18.
            let removes = memory.advise(1, 1, libc::MADV_DONTNEED).is_ok();
            let removed = (removes && !kind.is_shared()).then_some(0);
            child::fork(|| {
                assert_eq!(memory.read(0), crate::scene::byte(0));
                assert!(removed.is_none_or(|zero| memory.read(1) == zero));
                assert_eq!(memory.read(2), crate::scene::byte(2));
                memory.write(2, 99);
                child::fork(|| {
                    assert_eq!(memory.read(2), 99);
                    assert_eq!(memory.read(3), crate::scene::byte(3));
                })
                .succeed();
                assert_eq!(memory.read(3), crate::scene::byte(3));
            })
            .succeed();
            if !kind.is_shared() {
                check(&memory, 2, 2);
            }
            check(&memory, 4, 4);
            wait_until(|| pager.descriptors().len() == 1);
            assert_eq!(pager.statistics().forks, 2);
            pager.finish(|_| {}).unwrap();
            check(&memory, 3, 3);
        }
    });
}

#[test]
fn every_change_and_fault_at_once_keeps_content() {
    require!(CHANGES);
    child::run_well(test_name!(), || {
        let forks = features() & FeatureFlags::EVENT_FORK;
        let forks = if crate::support::may_watch_forks() { forks } else { FeatureFlags::empty() };
        const PAGES: usize = 64;
        let memory = Memory::anonymous(PAGES);
        let pager = Pager::builder().threads(2).build().unwrap();
        let source = Pages::new(page());
        serve(
            &pager,
            uffd(CHANGES | forks),
            region(&memory, source).fault_around(FaultAround::Block(8 * page())),
        );
        // Each thread has a quarter of the memory, so that it knows what is there.
        std::thread::scope(|scope| {
            for part in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    let first = part * PAGES / 4;
                    let mut zero = [false; PAGES / 4];
                    for step in 0..200 {
                        let at = (step * 7 + part) % (PAGES / 4);
                        let expected = if zero[at] { 0 } else { crate::scene::byte(first + at) };
                        assert_eq!(memory.read(first + at), expected, "page {} in step {step}", first + at);
                        if step % 3 == 0 {
                            let at = (step * 5 + 1) % (PAGES / 4);
                            memory.advise(first + at, 1, libc::MADV_DONTNEED).unwrap();
                            zero[at] = true;
                        }
                    }
                });
            }
            if !forks.is_empty() {
                for _ in 0..10 {
                    child::fork(|| {
                        let seen = memory.read(PAGES / 2 + 3);
                        assert!(seen == 0 || seen == crate::scene::byte(PAGES / 2 + 3), "{seen}");
                    })
                    .succeed();
                }
            }
        });
        pager.finish(|_| {}).unwrap();
    });
}

#[test]
fn grown_part_of_mapping_shows_what_kernel_would() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP);
    for kind in [Kind::Anonymous, Kind::Memfd] {
        for moves in [false, true] {
            // Alone: another test might map something where this one grows.
            child::run_well(test_name!(), || {
                let memory = Memory::new(kind, 8);
                let pager = Pager::new().unwrap();
                let source = Pages::new(page());
                let start = memory.start().expose_provenance();
                let region = Region::new(start, 4 * page(), source.clone()).fault_around(FaultAround::Page);
                let region = if kind.is_shared() { region.shared() } else { region };
                serve(&pager, uffd(CHANGES), region);
                check(&memory, 0, 0);
                if kind.is_shared() {
                    memory.alias().write(5, 55);
                }
                if moves {
                    // SAFETY: the pages are the test's, and no reference leads to them.
                    let protected = unsafe { libc::mprotect(memory.at(4), 4 * page(), libc::PROT_NONE) };
                    assert_eq!(protected, 0);
                } else {
                    memory.unmap(4, 4);
                }
                let flags = if moves { libc::MREMAP_MAYMOVE } else { 0 };
                // SAFETY: the memory is the test's, and no reference leads to it.
                let grown = unsafe { libc::mremap(memory.start(), 4 * page(), 8 * page(), flags) };
                assert_ne!(grown, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
                let see = |number: usize| crate::reader::read(grown.addr() + number * page());
                for number in 0..4 {
                    assert_eq!(see(number), content(number), "{kind:?}, {moves}");
                }
                assert_eq!(see(5), if kind.is_shared() { Seen::Byte(55) } else { Seen::ZERO });
                assert_eq!([4, 6, 7].map(see), [Seen::ZERO; 3], "{kind:?}, {moves}");
                source.were_read_once(4);
                pager.finish(|_| {}).unwrap();
            });
        }
    }
}

/// Maps private anonymous memory where the kernel puts nothing of its own accord, so that there is room to grow.
fn map_with_room(pages: usize) -> *mut libc::c_void {
    const FREE: *mut libc::c_void = std::ptr::without_provenance_mut(0x2000_0000);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel takes the address if it is free, and another one if not.
    let start = unsafe { libc::mmap(FREE, pages * page(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    start
}

fn grow(start: *mut libc::c_void, from: usize, to: usize) {
    // SAFETY: the memory is the test's, and no reference leads to it.
    let grown = unsafe { libc::mremap(start, from * page(), to * page(), 0) };
    assert_eq!(grown, start, "{}", std::io::Error::last_os_error());
}

#[test]
fn unaccessed_growth_is_unregistered_with_region() {
    require!(FeatureFlags::EVENT_REMAP);
    child::run_well(test_name!(), || {
        for finish in [false, true] {
            let (start, pager) = (map_with_room(4), Pager::new().unwrap());
            let address = start.expose_provenance();
            let see = |number: usize| crate::reader::read(address + number * page());
            let region = Region::new(address, 4 * page(), Pages::new(page()));
            let added = serve(&pager, uffd(FeatureFlags::EVENT_REMAP), region);
            // The second growth is the one that no access adopts.
            grow(start, 4, 8);
            assert_eq!(see(5), Seen::ZERO);
            grow(start, 8, 12);
            if finish {
                pager.finish_region(added.regions[0], |_| {}).unwrap();
            } else {
                pager.remove_region(added.regions[0]).unwrap();
            }
            assert_eq!([4, 8, 11].map(see), [Seen::ZERO; 3]);
            drop(pager);
            // SAFETY: no reference leads to the memory.
            assert_eq!(unsafe { libc::munmap(start, 12 * page()) }, 0);
        }
    });
}

/// What lies behind a region in the same mapping is another region's, and no growth.
#[test]
fn adjoining_region_stays_when_one_ends() {
    require!();
    for finish in [false, true] {
        let (memory, source) = (Memory::anonymous(8), Pages::new(page()));
        let pager = Pager::new().unwrap();
        let part = |first: usize| {
            let start = memory.at(first).expose_provenance();
            Region::new(start, 4 * page(), source.clone()).offset((first * page()) as u64)
        };
        let added = serve(&pager, uffd(FeatureFlags::empty()), part(0));
        // SAFETY: only raw pointers lead to the memory of tests.
        unsafe { pager.add_own_region(added.descriptor, part(4)) }.unwrap();
        if finish {
            pager.finish_region(added.regions[0], |_| {}).unwrap();
        } else {
            pager.remove_region(added.regions[0]).unwrap();
        }
        let seen = [4, 7].map(|number| crate::reader::read(memory.at(number).addr()));
        assert_eq!(seen, [content(4), content(7)]);
    }
}

#[test]
fn memory_registered_beforehand_waits_for_its_region() {
    require!();
    let memory = Memory::anonymous(4);
    let (pager, problems) = {
        let problems = crate::scene::Problems::default();
        (Pager::builder().threads(2).on_problem(problems.callback()).build().unwrap(), problems)
    };
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    let part = |first: usize, pages: usize| {
        let start = memory.at(first).expose_provenance();
        Region::new(start, pages * page(), Pages::new(page())).offset((first * page()) as u64)
    };
    let added = serve(&pager, uffd, part(0, 2));
    let readers = [2, 3].map(|page| crate::reader::Reader::of(memory.at(page).addr()));
    // Each page is reported once, and nothing is put there.
    wait_until(|| problems.count("NoRegion") == 2);
    assert!(readers.iter().all(|reader| !reader.has_seen()));
    // SAFETY: only raw pointers lead to the memory of tests.
    unsafe { pager.add_own_region(added.descriptor, part(2, 2)) }.unwrap();
    assert_eq!(readers.each_ref().map(crate::reader::Reader::wait), [content(2), content(3)]);
    assert_eq!(problems.all().len(), 2, "{:?}", problems.all());
}

#[test]
fn region_is_unregistered_around_mapped_over_file() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(8);
        let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
        let added = serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source));
        let Some(file) = crate::support::mapping::regular_file(test_name!(), 1) else { return };
        let (read, fixed) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: the page is the test's, and no reference leads to it.
        let over = unsafe { libc::mmap(memory.at(2), page(), read, fixed, fd, 0) };
        assert_eq!(over, memory.at(2));
        pager.finish_region(added.regions[0], |_| {}).unwrap();
        for number in [0, 1, 3, 4, 5, 6, 7] {
            check(&memory, number, number);
            memory.advise(number, 1, libc::MADV_DONTNEED).unwrap();
            assert_eq!(see(&memory, number), Seen::ZERO);
        }
        assert_eq!(pager.statistics().faults(), 0, "the kernel's own business");
    });
}

/// A program may register the memory behind a region itself, before it adds that. The kernel makes one mapping of both.
#[test]
fn region_taken_for_growth_of_another_is_refused() {
    require!();
    child::run_well(test_name!(), || {
        for is_touched in [false, true] {
            let memory = Memory::new(Kind::Anonymous, 8);
            let (pager, uffd) = (Pager::new().unwrap(), uffd(FeatureFlags::empty()));
            let registers = uffd.try_clone().unwrap();
            let at = |number| memory.at(number).expose_provenance();
            let region = |number| {
                Region::new(at(number), 4 * page(), Pages::new(page())).fault_around(FaultAround::Page)
            };
            let added = serve(&pager, uffd, region(0));
            registers.register(memory.at(4), 4 * page()).unwrap();
            if is_touched {
                assert_eq!(memory.read(6), 0);
            }
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            let behind = unsafe { pager.add_own_region(added.descriptor, region(4)) };
            match behind {
                Err(userfaultfd::pager::Error::Overlap { address, other }) if is_touched => {
                    assert_eq!((address, other), (at(4), at(4)));
                    assert_eq!(memory.read(5), 0, "served on as before");
                }
                Ok(_) if !is_touched => assert_eq!(memory.read(6), crate::scene::byte(2)),
                other => panic!("{is_touched}: {other:?}"),
            }
            assert_eq!(memory.read(1), crate::scene::byte(1));
            pager.finish(|_| {}).unwrap();
        }
    });
}
