//! What was accessed: Linux 7.3.

use std::ops::Range;

use userfaultfd::dirty::{Mode, Options, Ranges};
use userfaultfd::{AccessTracker, Error, FeatureFlags, RegisterMode};

use crate::space::{MODES, Space};
use crate::support::memory::{self, Kind};
use crate::support::{features, require, test_name};

fn told(space: &Space, ranges: Ranges<'_>) -> Vec<Range<usize>> {
    space.told(ranges)
}

/// In both modes, on every kind of memory, whose pages are there.
fn each(test: &str, pages: usize, body: impl Fn(&mut AccessTracker, &Space)) {
    for mode in MODES {
        for memory in memory::each(test, RegisterMode::READ_WRITE_PROTECT, pages) {
            println!("{test}: {mode} {memory:?}");
            let space = Space::from(memory);
            space.populate();
            let mut tracker = AccessTracker::with(Options::new().mode(mode)).unwrap();
            assert_eq!(tracker.mode(), mode);
            body(&mut tracker, &space);
        }
    }
}

#[test]
fn older_kernel_is_refused_with_reason() {
    require!();
    if features().contains(FeatureFlags::RWP) {
        return;
    }
    for options in [Options::new(), Options::new().mode(Mode::Async), Options::new().mode(Mode::Sync)] {
        let error = AccessTracker::with(options).unwrap_err();
        assert!(
            matches!(&error, Error::UnsupportedFeatures { missing, .. } if missing.contains(FeatureFlags::RWP)),
            "{error:?}"
        );
        assert!(error.to_string().contains("RWP"), "{error}");
    }
}

#[test]
fn pages_read_or_written_are_hot_until_reset() {
    require!(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    each(test_name!(), 6, |tracker, space| {
        tracker.track(space.all()).unwrap();
        assert_eq!(told(space, tracker.hot()), []);
        assert_eq!(space.read(1), 1);
        space.write(2, 2);
        assert_eq!(space.read(5), 1);
        assert_eq!(told(space, tracker.hot()), [1..3, 5..6]);
        assert_eq!(told(space, tracker.hot_in(space.addresses(2..6))), [2..3, 5..6]);
        assert_eq!(tracker.hot_len().unwrap(), 3 * space.page);
        // Looking doesn't reset it.
        assert_eq!(told(space, tracker.hot()), [1..3, 5..6]);
        tracker.reset().unwrap();
        assert_eq!(told(space, tracker.hot()), []);
        assert_eq!(space.read(2), 2);
        assert_eq!(told(space, tracker.hot()), [2..3]);
        let stats = tracker.statistics();
        let counted = if tracker.mode() == Mode::Sync { (3, 1) } else { (0, 0) };
        assert_eq!((stats.reads, stats.writes, stats.tracked), (counted.0, counted.1, 6 * space.page));
    });
}

#[test]
fn pages_that_are_not_there_are_not_hot() {
    require!(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    each(test_name!(), 3, |tracker, space| {
        tracker.track(space.all()).unwrap();
        assert!(space.drop_pages(1..2));
        assert_eq!(told(space, tracker.hot()), []);
        space.read(1);
        assert_eq!(told(space, tracker.hot()), [1..2]);
    });
}

#[test]
fn memory_that_is_tracked_no_longer_is_free() {
    require!(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    each(test_name!(), 4, |tracker, space| {
        tracker.track(space.all()).unwrap();
        tracker.untrack(space.addresses(0..2)).unwrap();
        assert_eq!(tracker.tracked(), [space.addresses(2..4)]);
        (0..3).for_each(|page| assert_eq!(space.read(page), 1));
        assert_eq!(told(space, tracker.hot()), [2..3]);
        let mut other = AccessTracker::with(Options::new().mode(tracker.mode())).unwrap();
        other.track(space.addresses(0..2)).unwrap();
        drop(other);
        assert_eq!(space.read(0), 1);
    });
}

#[test]
fn hugetlb_memory_is_tracked_by_huge_page() {
    require!(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    for kind in [Kind::Hugetlb, Kind::PrivateHugetlb] {
        let Some(memory) = memory::Memory::try_new(test_name!(), kind, 2) else { return };
        let space = Space::from(memory);
        space.populate();
        let mut tracker = AccessTracker::new().unwrap();
        tracker.track(space.all()).unwrap();
        // SAFETY: inside the mapping, which is only accessed by raw pointers.
        let last = unsafe { space.at(2).cast::<u8>().wrapping_sub(1).read_volatile() };
        assert_eq!((last, told(&space, tracker.hot())), (0, vec![1..2]), "{kind:?}");
    }
}
