//! An image that is copied back over what was written.

use userfaultfd::{Errno, Error, FeatureFlags};

use crate::space;
use crate::support::memory::Memory;
use crate::support::{has_features, page, require, test_name};

/// More runs of pages than one batch has.
const PAGES: usize = 2600;

#[test]
fn reset_copies_back_what_was_written_and_nothing_else() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for mode in space::MODES {
        if mode == userfaultfd::dirty::Mode::Async && !has_features(test_name!(), FeatureFlags::WP_ASYNC) {
            continue;
        }
        let memory = Memory::anonymous(PAGES);
        (0..PAGES).for_each(|page| memory.write(page, 1));
        let all = memory.range(0, PAGES);
        let mut tracker = space::tracker(mode);
        tracker.track(all.clone()).unwrap();
        // Bytes that the memory never had show what is copied.
        let image = vec![7; all.len()];
        for round in 0..3 {
            let written: Vec<usize> = (0..PAGES).filter(|page| page % 2 == 0 || *page % 97 < 40).collect();
            written.iter().for_each(|page| memory.write(*page, 2));
            // A part first.
            let part = memory.range(100, 300);
            let of_part = written.iter().filter(|page| (100..400).contains(*page)).count();
            // SAFETY: memory of this test, which nothing borrows or writes to; any bytes are valid there.
            let copied = unsafe { tracker.reset_in(part, &image[..300 * page()]) }.unwrap();
            assert_eq!(copied, of_part * page(), "{mode} {round}");
            assert_eq!(tracker.dirty_len().unwrap(), (written.len() - of_part) * page());
            // SAFETY: as above.
            let copied = unsafe { tracker.reset(&image) }.unwrap();
            assert_eq!(copied, (written.len() - of_part) * page(), "{mode} {round}");
            assert_eq!(tracker.dirty_len().unwrap(), 0, "{mode} {round}");
            for page in 0..PAGES {
                let expected = if written.contains(&page) { 7 } else { 1 };
                assert_eq!(memory.read(page), expected, "{mode} {round} {page}");
            }
            // A page alone, far from others.
            memory.write(PAGES - 1, 3);
            memory.write(1, 3);
            // SAFETY: as above.
            assert_eq!(unsafe { tracker.reset(&image) }.unwrap(), 2 * page());
            assert_eq!(tracker.dirty_len().unwrap(), 0);
            memory.write(1, 1);
            memory.write(PAGES - 1, 1);
            tracker.take().for_each(|range| assert!(range.is_ok()));
        }
    }
}

#[test]
fn reset_refuses_other_images_and_bounds_inside_pages() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let memory = Memory::anonymous(4);
    (0..4).for_each(|page| memory.write(page, 1));
    let all = memory.range(0, 4);
    let mut tracker = userfaultfd::DirtyTracker::new().unwrap();
    tracker.track(all.clone()).unwrap();
    memory.write(2, 2);
    let image = vec![7; all.len()];
    // SAFETY: memory of this test, which nothing borrows; any bytes are valid there. So below.
    let refused = unsafe { tracker.reset(&image[1..]) }.unwrap_err();
    assert!(matches!(refused, Error::ImageLength { image, memory } if image + 1 == memory), "{refused}");
    assert_eq!(refused.errno(), Some(Errno::EINVAL));
    // SAFETY: as above.
    let refused = unsafe { tracker.reset_in(all.start + 1..all.end, &image[1..]) }.unwrap_err();
    assert!(matches!(refused, Error::InsidePage { .. }), "{refused}");
    assert_eq!((memory.read(2), tracker.dirty_len().unwrap()), (2, page()));
}
