//! What faults of each kind are answered with, on memory of each kind.

use std::io::Write;

use userfaultfd::pager::{FaultAround, FileSource, PageData, Pager, Region, ZeroSource};
use userfaultfd::{FeatureFlags, RegisterMode, UffdBuilder};

use crate::scene::{self, Pages, check, eventually, memory, region, serve, served};
use crate::support::mapping::memfd;
use crate::support::memory::{self as kinds, Kind};
use crate::support::proc::wait_until;
use crate::support::{child, hugetlb, page, require, test_name, uffd};

#[test]
fn missing_pages_get_content_and_are_read_once() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 5) else { continue };
        let (pager, added, source) = served(&memory);
        for page in [3, 0, 4, 3, 1] {
            check(&memory, page, page);
        }
        source.were_read_once(4);
        let (address, len) = (memory.at(2).addr(), memory.page());
        let missing = || {
            let missing = pager.missing(added.regions[0]).unwrap();
            missing.iter().map(|part| (part.address, part.len, part.offset)).collect::<Vec<_>>()
        };
        eventually(missing, vec![(address, len, Some(2 * len as u64))]);
        eventually(|| pager.statistics().fault_latency.count(), 4);
        let statistics = pager.statistics();
        assert_eq!((statistics.missing_faults, statistics.fills, statistics.source_reads), (4, 4, 4));
        assert_eq!((statistics.present_pages, statistics.missing_pages), (4, 1));
        assert_eq!(statistics.bytes, 4 * len as u64);
    }
}

#[test]
fn write_to_a_missing_page_finds_its_content() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 2) else { continue };
        let (_pager, _, _) = served(&memory);
        memory.write(1, 99);
        let mut expected = vec![0; memory.page()];
        scene::fill(1, &mut expected);
        expected[0] = 99;
        assert!(memory.content(1) == expected, "{memory:?}");
    }
}

#[test]
fn source_that_says_zero_fills_with_zeros() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 3) else { continue };
        let pager = Pager::new().unwrap();
        serve(
            &pager,
            uffd(FeatureFlags::empty()),
            region(&memory, ZeroSource).fault_around(FaultAround::Block(3 * memory.page())),
        );
        assert!(memory.content(1).iter().all(|byte| *byte == 0));
        memory.write(2, 7);
        assert_eq!((memory.read(2), memory.read(0)), (7, 0));
        // Of huge pages there are no zero pages: zeros are copied, and count as what they are.
        eventually(|| (pager.statistics().zero_fills, pager.statistics().fills), (3, 0));
    }
}

#[test]
fn minor_faults_are_resolved_by_continue() {
    require!();
    let modes = RegisterMode::MISSING | RegisterMode::MINOR;
    for memory in kinds::each_of(test_name!(), &[Kind::Memfd, Kind::Hugetlb], modes, 4) {
        let alias = memory.alias();
        // What was written there before isn't the content.
        alias.write(1, 77);
        let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
        let file = memory.file().try_clone().unwrap().into();
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source.clone()).minor(file, 0));
        for page in [1, 3, 1] {
            check(&memory, page, page);
            check(&alias, page, page);
        }
        // Written elsewhere later, it is memory like any other.
        alias.write(3, 55);
        assert_eq!(memory.read(3), 55);
        source.were_read_once(2);
        eventually(|| (pager.statistics().continues, pager.statistics().fills), (2, 0));
        let statistics = pager.statistics();
        assert_eq!((statistics.minor_faults, statistics.missing_faults), (1, 1), "{statistics}");
        pager.finish(|_| {}).unwrap();
        for page in [0, 2] {
            check(&memory, page, page);
        }
    }
}

#[test]
fn minor_region_may_begin_inside_of_its_file() {
    require!(FeatureFlags::MINOR_SHMEM);
    let memory = kinds::Memory::new(Kind::Memfd, 5);
    let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
    let (start, len) = (memory.at(2).expose_provenance(), 3 * page());
    let file = memory.file().try_clone().unwrap().into();
    let region =
        Region::new(start, len, source).fault_around(FaultAround::Page).minor(file, 2 * page() as u64);
    serve(&pager, uffd(FeatureFlags::empty()), region);
    for number in 0..3 {
        check(&memory, 2 + number, number);
    }
    assert_eq!((memory.read(0), memory.read(1)), (0, 0));
}

#[test]
fn file_opened_to_append_is_filled_in_place() {
    require!(FeatureFlags::MINOR_SHMEM);
    let memory = kinds::Memory::new(Kind::Memfd, 5);
    let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(memory.file()));
    let file = std::fs::OpenOptions::new().read(true).append(true).open(path).unwrap();
    let len = || file.metadata().unwrap().len();
    let region = region(&memory, source).minor(file.try_clone().unwrap(), 0);
    let added = serve(&pager, uffd(FeatureFlags::empty()), region);
    check(&memory, 3, 3);
    pager.finish_region(added.regions[0], |_| {}).unwrap();
    for number in 0..5 {
        check(&memory, number, number);
    }
    assert_eq!(len(), memory.len() as u64);
}

#[test]
fn protected_fill_stays_protected_until_written() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
    for memory in kinds::each(test_name!(), modes, 4) {
        let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
        let uffd = uffd(FeatureFlags::empty());
        serve(&pager, uffd, region(&memory, source.clone()).write_protected());
        for page in 0..3 {
            check(&memory, page, page);
        }
        if kinds::tells_protection(test_name!()) {
            assert!((0..3).all(|page| memory.state(page).protected), "{memory:?}");
        }
        memory.write(1, 99);
        assert_eq!(memory.read(1), 99);
        memory.write(3, 98);
        assert_eq!(memory.read(3), 98);
        memory.write(3, 97);
        if kinds::tells_protection(test_name!()) {
            let protected: Vec<_> = (0..4).map(|page| memory.state(page).protected).collect();
            assert_eq!(protected, [true, false, true, false], "{memory:?}");
        }
        source.were_read_once(4);
        eventually(|| (pager.statistics().write_protect_faults, pager.statistics().unprotected), (2, 2));
        pager.finish(|_| {}).unwrap();
        memory.write(0, 5);
        assert_eq!(memory.read(0), 5);
    }
}

#[test]
fn block_is_filled_for_fault_and_ends_with_its_region() {
    require!();
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::PrivateHugetlb] {
        // Blocks of four pages; the last has two.
        let Some(memory) = memory(test_name!(), kind, 6) else { continue };
        let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
        let added = serve(
            &pager,
            uffd(FeatureFlags::empty()),
            region(&memory, source.clone()).block(4 * memory.page()),
        );
        check(&memory, 5, 5);
        source.were_read_once(2);
        eventually(|| pager.missing(added.regions[0]).unwrap()[0].len, 4 * memory.page());
        check(&memory, 2, 2);
        source.were_read_once(6);
        eventually(|| (pager.statistics().missing_faults, pager.statistics().prefetched), (2, 4));
        (0..6).for_each(|page| check(&memory, page, page));
        assert_eq!(pager.statistics().source_reads, 2);
    }
}

/// A call of the kernel stays inside one mapping. What was read for both is used for both.
#[test]
fn block_over_two_mappings_is_read_once() {
    require!();
    child::run_well(test_name!(), || {
        let memory = kinds::Memory::new(Kind::Anonymous, 8);
        memory.protect(4, 4, libc::PROT_READ);
        let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
        let region = region(&memory, source.clone()).fault_around(FaultAround::Block(8 * page()));
        serve(&pager, uffd(FeatureFlags::empty()), region);
        (0..8).for_each(|page| check(&memory, page, page));
        source.were_read_once(8);
        eventually(|| (pager.statistics().missing_faults, pager.statistics().fills), (1, 8));
    });
}

#[test]
fn last_page_of_a_file_is_filled_up_with_zeros() {
    require!();
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::PrivateHugetlb] {
        let Some(memory) = memory(test_name!(), kind, 2) else { continue };
        let mut file = std::fs::File::from(memfd(0, 0));
        file.write_all(&vec![0xab; memory.page() + 5]).unwrap();
        let pager = Pager::new().unwrap();
        // The pager's buffers have had other content before.
        let other = kinds::Memory::new(Kind::Anonymous, 2 * memory.page() / page());
        let noise = |_: u64, bytes: &mut [u8]| {
            bytes.fill(0xee);
            Ok(PageData::Data)
        };
        let noise = region(&other, noise).block(other.len());
        serve(&pager, uffd(FeatureFlags::empty()), noise);
        assert_eq!(other.read(0), 0xee);
        let source = FileSource::new(file).unwrap();
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source).block(2 * memory.page()));
        let last = memory.content(1);
        assert!(last[..5] == [0xab; 5] && last[5..].iter().all(|byte| *byte == 0), "{memory:?}");
        assert!(memory.content(0).iter().all(|byte| *byte == 0xab));
    }
}

#[test]
fn huge_page_of_a_gibibyte_is_filled() {
    require!();
    const GIB: usize = 1 << 30;
    let Some((memory, _pages)) = hugetlb_gigantic(test_name!()) else { return };
    let (start, pager) = (memory.as_ptr(), Pager::new().unwrap());
    let source = |offset: u64, bytes: &mut [u8]| {
        assert_eq!((offset, bytes.len()), (0, GIB));
        bytes[GIB - 1] = 42;
        bytes[0] = 41;
        Ok(PageData::Data)
    };
    let region = Region::new(start.expose_provenance(), GIB, source).page_size(GIB);
    serve(&pager, uffd(FeatureFlags::empty()), region);
    assert_eq!((memory[GIB - 1], memory[0]), (42, 41));
    assert_eq!(pager.statistics().missing_faults, 1);
}

/// A page of a GiB, and what gives it back to the system. `None`, visibly, where it can't be had.
fn hugetlb_gigantic(test: &str) -> Option<(memmap2::MmapMut, impl Drop)> {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    struct GiveBack(String, Option<hugetlb::HugePages>);
    impl Drop for GiveBack {
        fn drop(&mut self) {
            std::fs::write(POOL, &self.0).unwrap();
            drop(self.1.take());
        }
    }
    // One test at a time has huge pages, of any size.
    let lock = hugetlb::reserve(test, 0)?;
    let before = std::fs::read_to_string(POOL).ok().and_then(|text| text.trim().parse::<usize>().ok());
    // A copy takes a spare page.
    let wrote = before.filter(|before| std::fs::write(POOL, (before + 2).to_string()).is_ok());
    let give_back = wrote.map(|before| GiveBack(before.to_string(), Some(lock)));
    let reserved =
        wrote.is_some_and(|before| std::fs::read_to_string(POOL).unwrap().trim().parse() == Ok(before + 2));
    if !crate::support::has(test, "huge pages of a GiB", reserved) {
        return None;
    }
    let memory = memmap2::MmapOptions::new().len(1 << 30).huge(Some(30)).map_anon().unwrap();
    Some((memory, give_back?))
}

/// Whether the thread of this name sleeps.
fn thread_sleeps(name: &str) -> bool {
    std::fs::read_dir("/proc/self/task").unwrap().any(|task| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        stat.contains(&format!("({name}) S "))
    })
}

#[test]
fn blocking_descriptors_are_returned_blocking() {
    require!();
    // Alone, so that there is one thread of a pager.
    child::run_well(test_name!(), || {
        [false, true].into_iter().for_each(serve_and_give_back);
    });

    fn serve_and_give_back(non_blocking: bool) {
        let memory = kinds::Memory::anonymous(2);
        let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(non_blocking).create().unwrap();
        let kept = uffd.try_clone().unwrap();
        let pager = Pager::builder().max_threads(1).build().unwrap();
        let added = serve(&pager, uffd, region(&memory, Pages::new(page())));
        check(&memory, 0, 0);
        // Another owner of the description makes it blocking meanwhile. If the pager's thread read it just then, before
        // Linux 6.10 it would stay there until there is something to be read.
        wait_until(|| thread_sleeps("uffd-pager"));
        kept.set_nonblocking(false).unwrap();
        check(&memory, 1, 1);
        kept.set_nonblocking(true).unwrap();
        let detached = pager.remove(added.descriptor).unwrap();
        assert_eq!(detached.uffd.is_nonblocking().unwrap(), non_blocking);
    }
}

#[test]
fn owner_that_makes_a_descriptor_blocking_stops_no_pager() {
    require!();
    // A monitor that means harm has the same description, and one thread of the pager serves all.
    for features in [FeatureFlags::empty(), FeatureFlags::EVENT_REMOVE] {
        let memories = [kinds::Memory::anonymous(3), kinds::Memory::anonymous(3)];
        let uffds = [uffd(features), uffd(features)];
        let kept = uffds[0].try_clone().unwrap();
        let pager = Pager::builder().max_threads(1).build().unwrap();
        // While its fault is handled: the thread reads once more afterwards.
        let source = move |offset: u64, page: &mut [u8]| {
            kept.set_nonblocking(false).unwrap();
            scene::fill(offset as usize / page.len(), page);
            Ok(PageData::Data)
        };
        let [harmful, other] = uffds;
        let harmful = serve(&pager, harmful, region(&memories[0], source));
        serve(&pager, other, region(&memories[1], Pages::new(page())));
        for number in 0..3 {
            check(&memories[0], number, number);
            check(&memories[1], number, number);
        }
        pager.remove(harmful.descriptor).unwrap();
    }
}
