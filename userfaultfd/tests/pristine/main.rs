//! Memory that goes back to its image, by each method.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod damage;
mod forked;
mod model;

use std::ops::Range;

use support::{child, page, require, test_name};
use userfaultfd::pagemap::{Categories, Pagemap, Region, Scan};
use userfaultfd::{Errno, Error, FeatureFlags, Pristine, ResetMethod};

/// An image of some pages, none of which is another one's, or zeros.
fn image(pages: usize) -> Vec<u8> {
    (0..pages * page()).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 11) as u8 | 1).collect()
}

/// The methods that this kernel has.
fn methods(test: &str) -> Vec<ResetMethod> {
    let mut methods = vec![ResetMethod::Drop];
    if support::has_features(test, FeatureFlags::WP_ASYNC) {
        methods.push(ResetMethod::CopyBack);
    }
    methods
}

fn pristine(image: &[u8], method: ResetMethod) -> Pristine {
    Pristine::builder(image).method(method).build().unwrap()
}

/// An advice of madvise(2) for some pages.
#[track_caller]
fn advise(memory: &Pristine, pages: Range<usize>, advice: libc::c_int) {
    let start = memory.as_raw_slice().cast::<u8>().wrapping_add(pages.start * page());
    // SAFETY: within the memory, of which any content is valid and nothing is borrowed.
    let advised = unsafe { libc::madvise(start.cast(), pages.len() * page(), advice) };
    assert_eq!(advised, 0, "{:?}", Errno::last());
}

/// The number of pages in memory that are no other's.
fn copies(memory: &Pristine) -> usize {
    let start = memory.as_raw_slice().addr();
    let mut scan = Scan::new(start..start + memory.len());
    scan.all_of(Categories::PRESENT).none_of(Categories::FILE);
    let (pagemap, mut regions, mut copies) = (Pagemap::of_self().unwrap(), [Region::default(); 64], 0);
    while let Some(regions) = scan.next_regions(&pagemap, &mut regions).unwrap() {
        copies += regions.iter().map(|region| region.range().len() / page()).sum::<usize>();
    }
    copies
}

#[test]
fn reset_brings_back_what_was_written() {
    require!();
    for method in methods(test_name!()) {
        let image = image(600);
        let mut memory = pristine(&image, method);
        assert!(memory[..] == image && memory.method() == method);
        for run in 0..20 {
            memory[run] = 0;
            memory[7 * page()..9 * page()].fill(run as u8);
            memory[599 * page() + 5] = 0;
            memory[(100 + run) * page()] = 0;
            let report = memory.reset().unwrap();
            assert!(memory[..] == image, "{method:?} {run}");
            assert_eq!(report.method, method);
            match method {
                ResetMethod::Drop => assert_eq!((report.copied_pages, report.hot_pages), (0, 0)),
                // Pages that are written in each run; what was written in one of them is copied back once.
                _ => assert_eq!((report.copied_pages, report.hot_pages <= 4), (5, true), "{run}"),
            }
        }
    }
}

#[test]
fn image_may_be_shorter_or_longer_or_end_inside_a_page() {
    require!();
    for method in methods(test_name!()) {
        for (bytes, len) in
            [(1, 1), (3 * page() + 1, 3 * page() + 1), (5000, 9 * page() + 7), (9 * page(), 5)]
        {
            let all = &image(9)[..bytes];
            let mut expected = all.to_vec();
            expected.resize(len, 0);
            let mut memory = Pristine::builder(all).len(len).method(method).build().unwrap();
            assert!(memory[..] == expected);
            memory.fill(3);
            memory.reset().unwrap();
            assert!(memory[..] == expected, "{method:?} {bytes} {len}");
        }
    }
    for (image, len) in [(&[][..], 0), (&[], usize::MAX), (&[1], usize::MAX / 2 + 2), (&[1], 0)] {
        let refused = Pristine::builder(image).len(len).build().unwrap_err();
        assert!(matches!(refused, Error::SystemError(Errno::EINVAL)), "{refused}");
    }
}

#[test]
fn page_written_in_each_run_is_written_without_fault_and_restored() {
    require!(FeatureFlags::WP_ASYNC);
    let image = image(8);
    let mut memory = pristine(&image, ResetMethod::CopyBack);
    let mut hot = 0;
    for run in 0..24 {
        memory[3 * page()] = run;
        hot += memory.reset().unwrap().hot_pages;
        assert!(memory[..] == image);
    }
    assert!((18..24).contains(&hot), "{hot}");
    // It is copied back until it is checked, and then no more.
    let copied: usize = (0..24).map(|_| memory.reset().unwrap().copied_pages).sum();
    assert!(copied <= 9, "{copied}");
    assert_eq!(memory.reset().unwrap().copied_pages, 0);
}

#[test]
fn dropped_pages_hold_the_image_and_take_no_memory() {
    require!(FeatureFlags::WP_ASYNC);
    let image = image(200);
    let mut memory = pristine(&image, ResetMethod::CopyBack);
    memory.fill(1);
    assert_eq!(copies(&memory), 200);
    advise(&memory, 20..200, libc::MADV_DONTNEED);
    memory[150 * page()] = 1;
    let report = memory.reset().unwrap();
    assert_eq!((report.copied_pages, copies(&memory)), (21, 21));
    assert!(memory[..] == image);
    // What was dropped is protected again.
    memory[100 * page()] = 1;
    assert_eq!(memory.reset().unwrap().copied_pages, 1);
    assert!(memory[..] == image);
}

#[test]
fn release_gives_memory_back() {
    require!();
    for method in methods(test_name!()) {
        let image = image(100);
        let mut memory = pristine(&image, method);
        for _ in 0..3 {
            memory.fill(1);
            memory.reset().unwrap();
        }
        memory[0] = 0;
        assert_eq!(memory.release().unwrap().method, ResetMethod::Drop);
        assert!(memory[..] == image, "{method:?}");
        if method == ResetMethod::CopyBack {
            assert_eq!(copies(&memory), 0);
            memory[5 * page()] = 0;
            assert_eq!(memory.reset().unwrap().copied_pages, 1);
        }
    }
}

#[test]
fn locked_memory_is_restored() {
    require!();
    for method in methods(test_name!()) {
        let image = image(4);
        let mut memory = pristine(&image, method);
        // SAFETY: changes no content.
        let locked = unsafe { libc::mlock(memory.as_ptr().cast(), memory.len()) };
        assert_eq!(locked, 0, "{:?}", Errno::last());
        for run in 0..3 {
            memory.fill(run);
            let report = if run == 1 { memory.release() } else { memory.reset() }.unwrap();
            assert_eq!(report.copied_pages, 4, "{method:?}");
            assert!(memory[..] == image);
        }
    }
}

#[test]
fn always_dirty_range_is_copied_back_each_time() {
    require!(FeatureFlags::WP_ASYNC);
    let mut memory = pristine(&image(8), ResetMethod::CopyBack);
    memory.set_always_dirty(2 * page()..5 * page(), true).unwrap();
    memory[..].iter().for_each(|byte| assert!(*byte != 0));
    memory[2 * page()] = 0;
    for run in 0..20 {
        assert_eq!(memory.reset().unwrap().copied_pages, 3, "{run}");
    }
    memory.set_always_dirty(2 * page()..5 * page(), false).unwrap();
    let copied: usize = (0..20).map(|_| memory.reset().unwrap().copied_pages).sum();
    assert!((3..=27).contains(&copied), "{copied}");
    assert_eq!(memory.reset().unwrap().copied_pages, 0);
    let refused = memory.set_always_dirty(5..page(), true).unwrap_err();
    assert!(matches!(refused, Error::InsidePage { .. }), "{refused}");
    let refused = memory.set_always_dirty(7 * page()..9 * page(), true).unwrap_err();
    assert!(matches!(refused, Error::NeverTracked { .. }), "{refused}");
}

#[test]
fn threads_write_between_resets() {
    require!();
    for method in methods(test_name!()) {
        let image = image(256);
        let mut memory = pristine(&image, method);
        for run in 0..30 {
            std::thread::scope(|scope| {
                for (thread, part) in memory.chunks_mut(64 * page()).enumerate() {
                    scope.spawn(move || {
                        let mut random = support::random::Random::new(run * 4 + thread as u64);
                        for _ in 0..40 {
                            part[random.below(64 * page())] = 0;
                        }
                    });
                }
            });
            memory.reset().unwrap();
            assert!(memory[..] == image, "{method:?} {run}");
        }
    }
}

#[test]
fn process_without_userfaultfd_drops() {
    require!();
    child::run_well(test_name!(), || {
        if support::is_root() {
            child::drop_rights(); // nor by the device
        }
        let refused = support::seccomp::refuse_userfaultfd(Errno::EPERM);
        if !support::has(test_name!(), "seccomp", refused) {
            return;
        }
        let required = Pristine::builder(&[1]).method(ResetMethod::CopyBack).build();
        if !support::has(test_name!(), "a device that is the superuser's", required.is_err()) {
            return;
        }
        let mut memory = Pristine::new(&[1, 2, 3]).unwrap();
        assert_eq!(memory.method(), ResetMethod::Drop);
        memory.fill(0);
        memory.reset().unwrap();
        assert_eq!(memory[..], [1, 2, 3]);
    });
}
