//! Memory that the kernel writes without a page fault.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use userfaultfd::{DirtyTracker, Error, FeatureFlags};

use crate::ring::Ring;
use crate::space::{self, Kind, Space};
use crate::support::{child, has, mapping, memory, page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// A file of one page of nines.
fn file() -> File {
    let mut file = File::from(mapping::memfd(0, 1));
    file.write_all(&vec![9; page()]).unwrap();
    file
}

#[test]
fn writes_to_declared_pinned_memory_are_reported() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 6, |tracker: &mut DirtyTracker, space| {
            if !matches!(space.kind, Kind::Of(memory::Kind::Anonymous | memory::Kind::Memfd)) {
                return;
            }
            space.populate();
            let ring = Ring::new(space.at(0), space.all().len());
            if !has(test_name!(), "io_uring", ring.is_ok()) {
                return;
            }
            let (ring, file) = (ring.unwrap(), file());
            tracker.track(space.all()).unwrap();
            tracker.set_always_dirty(space.addresses(4..6), true).unwrap();
            assert_eq!(space.told(tracker.take()), [4..6]);
            // An ordinary system call goes through the page table.
            if tracker.mode() == userfaultfd::dirty::Mode::Async {
                // SAFETY: the page is the space's, which nobody borrows.
                let read = unsafe { libc::pread(file.as_raw_fd(), space.at(1), page(), 0) };
                assert_eq!(read, page() as isize);
                assert_eq!(space.told(tracker.take()), [1..2, 4..6]);
            }
            assert_eq!(ring.read(&file, space.at(2), page()), page() as i32);
            assert_eq!(ring.read(&file, space.at(4), page()), page() as i32);
            assert_eq!((space.read(2), space.read(4)), (9, 9));
            // This is what the declaration is for.
            assert_eq!(space.told(tracker.take()), [4..6], "page 2 was written, and the kernel can't tell");
        });
    });
}

#[test]
fn always_written_range_stays_so_until_revoked() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 6, |tracker, space| {
            space.populate();
            tracker.track(space.all()).unwrap();
            let declared = space.addresses(2..4);
            tracker.set_always_dirty(declared.clone(), true).unwrap();
            space.write(1, 2);
            for written in [vec![1..4], vec![2..4]] {
                assert_eq!(space.told(tracker.dirty()), written);
                assert_eq!(tracker.dirty_len().unwrap(), space.page * written[0].len());
                assert_eq!(space.told(tracker.take_in(space.addresses(3..6))), [3..4]);
                assert_eq!(space.told(tracker.take()), written);
            }
            assert_eq!(tracker.tracked(), [space.all()]);
            // Once more, and then no more.
            tracker.set_always_dirty(space.addresses(3..5), false).unwrap();
            assert_eq!(space.told(tracker.take()), [2..4]);
            space.write(5, 2);
            assert_eq!(space.told(tracker.take()), [2..3, 5..6]);
            tracker.untrack(declared.clone()).unwrap();
            assert_eq!(space.told(tracker.take()), []);
            tracker.track(declared.clone()).unwrap();
            assert_eq!(space.told(tracker.take()), []);
            if let Kind::Of(_) = space.kind {
                tracker.set_always_dirty(declared, true).unwrap();
                space.memory().unmap(2, 1);
                assert_eq!(space.told(tracker.take()), [3..4]);
            }
        });
    });
}

#[test]
fn only_whole_pages_that_are_tracked_are_declared() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space: &Space| {
        tracker.track(space.addresses(0..2)).unwrap();
        let all = space.all();
        for (range, gap) in [(0..4, 2..4), (1..3, 2..3), (2..4, 2..4)] {
            let declared = tracker.set_always_dirty(space.addresses(range), true);
            let Err(Error::NeverTracked { start, end }) = declared else { panic!("{declared:?}") };
            assert_eq!(start..end, space.addresses(gap));
        }
        let inside = tracker.set_always_dirty(all.start..all.start + 1, true).unwrap_err();
        assert!(
            matches!(inside, Error::InsidePage { address, .. } if address == all.start + 1),
            "{inside:?}"
        );
        tracker.set_always_dirty(all.start..all.start, true).unwrap();
        assert_eq!(space.told(tracker.take()), []);
    });
}
