//! Regions larger than any memory: what they take is what is touched.

use userfaultfd::FeatureFlags;
use userfaultfd::pager::{Pager, Region};

use crate::scene::{Pages, eventually, fill, serve};
use crate::support::mapping::Mapping;
use crate::support::{child, maps, page, require, test_name, uffd};

/// Bytes of memory that this process has, and of its page tables.
fn resident() -> (usize, usize) {
    (maps::status_bytes("VmRSS"), maps::status_bytes("VmPTE"))
}

#[test]
#[cfg(target_pointer_width = "64")]
fn tebibyte_region_takes_memory_for_accessed_pages() {
    require!();
    child::run_well(test_name!(), || {
        const TIB: usize = 1 << 40;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Mapping::new(TIB / page(), protection, flags, None).unwrap();
        let pager = Pager::new().unwrap();
        let (before, tables) = resident();
        let region = Region::new(memory.start.expose_provenance(), TIB, Pages::new(page()));
        serve(
            &pager,
            uffd(FeatureFlags::empty()),
            region.fault_around(userfaultfd::pager::FaultAround::Page),
        );
        let touched = 1000;
        for step in 0..touched {
            let number = step * (TIB / page() / touched);
            let mut expected = [0; 16];
            fill(number, &mut expected);
            // SAFETY: within the mapping, which only raw pointers lead to.
            let seen = unsafe { memory.start.wrapping_byte_add(number * page()).cast::<[u8; 16]>().read() };
            assert_eq!(seen, expected);
        }
        // A page of content for each, and a page of states.
        let (after, tables_after) = resident();
        assert!(after - before < touched * 3 * page() + (4 << 20), "{before} {after}");
        // Page tables are the kernel's: three levels for each at most, of the memory and of the states.
        assert!(tables_after - tables < touched * 6 * page() + (4 << 20), "{tables} {tables_after}");
        eventually(|| pager.statistics().present_pages, touched as u64);
        assert_eq!(pager.statistics().missing_pages, (TIB / page() - touched) as u64);
        drop(pager.detach());
    });
}

#[test]
fn states_take_a_byte_for_each_page() {
    require!();
    child::run_well(test_name!(), || {
        // All states are touched, and little else: zero pages.
        let pages = (256 << 20) / page();
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let memory = Mapping::new(pages, libc::PROT_READ | libc::PROT_WRITE, flags, None).unwrap();
        let pager = Pager::new().unwrap();
        let region =
            Region::new(memory.start.expose_provenance(), memory.len, userfaultfd::pager::ZeroSource);
        serve(&pager, uffd(FeatureFlags::empty()), region.block(64 * page()));
        // SAFETY: within the mapping, which only raw pointers lead to.
        let touch = |number: usize| unsafe {
            memory.start.wrapping_byte_add(number * page()).cast::<u8>().read_volatile()
        };
        assert_eq!(touch(0), 0);
        let (before, _) = resident();
        assert!((0..pages).step_by(64).all(|number| touch(number) == 0));
        let (after, _) = resident();
        eventually(|| pager.statistics().present_pages, pages as u64);
        assert!(after - before <= pages + (2 << 20), "{pages} pages: {before} {after}");
        drop(pager.detach());
    });
}
