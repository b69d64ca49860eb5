//! What a fork's child inherits is the parent's: it can neither use it nor harm it.

use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{AccessTracker, DirtyTracker, Error, FeatureFlags};

use crate::support::memory::Memory;
use crate::support::{child, features, page, require, test_name};

/// The userfaultfds, sockets and files of /proc that this process has open.
fn open() -> Vec<String> {
    let link = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    let links = (3..64).filter_map(link).map(|link| link.to_string_lossy().into_owned());
    links
        .filter(|link| ["anon_inode:", "socket:", "/proc/"].iter().any(|start| link.starts_with(start)))
        .collect()
}

#[track_caller]
fn refused<T>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::OtherProcess)));
}

#[test]
fn tracker_in_child_is_refused_and_stays_parents() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        for mode in [Mode::Sync, Mode::Async] {
            if mode == Mode::Async && !features().contains(FeatureFlags::WP_ASYNC) {
                continue;
            }
            let (memory, before) = (Memory::anonymous(8), open());
            (0..8).for_each(|page| memory.write(page, 1));
            let mut tracker = DirtyTracker::with(Options::new().mode(mode)).unwrap();
            let start = memory.start().addr();
            let all = start..start + memory.len();
            tracker.track(all.clone()).unwrap();
            memory.write(3, 2);
            let mut tracker = Some(tracker);
            child::fork(|| {
                let mut inherited = tracker.take().unwrap();
                refused(inherited.track(all.clone()));
                refused(inherited.untrack(all.clone()));
                refused(inherited.dirty_len());
                refused(inherited.take().next().unwrap());
                assert_eq!((inherited.tracked(), inherited.statistics().tracked), (vec![], 0));
                // Its own, of the same memory.
                let mut own = DirtyTracker::with(Options::new().mode(mode)).unwrap();
                own.track(all.clone()).unwrap();
                drop(inherited);
                memory.write(5, 3);
                let told: Vec<_> = own.take().collect::<Result<_, _>>().unwrap();
                assert_eq!(told, [start + 5 * page()..start + 6 * page()]);
                drop(own);
                assert_eq!(open(), before, "{mode}");
            })
            .succeed();
            let mut tracker = tracker.unwrap();
            memory.write(6, 2);
            let told: Vec<_> = tracker.take().collect::<Result<_, _>>().unwrap();
            let pages = |page: usize| start + page * self::page()..start + (page + 1) * self::page();
            assert_eq!(told, [pages(3), pages(6)], "{mode}");
            // An iterator that comes along.
            memory.write(1, 2);
            let mut taking = Some(tracker.take());
            child::fork(|| {
                let mut inherited = taking.take().unwrap();
                refused(inherited.next().unwrap());
            })
            .succeed();
            assert_eq!(taking.take().unwrap().next().unwrap().unwrap(), pages(1));
        }
    });
}

#[test]
fn access_tracker_in_child_is_refused() {
    require!(FeatureFlags::RWP);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        (0..4).for_each(|page| memory.write(page, 1));
        let start = memory.start().addr();
        let mut tracker = AccessTracker::with(Options::new().mode(Mode::Sync)).unwrap();
        tracker.track(start..start + memory.len()).unwrap();
        let mut tracker = Some(tracker);
        child::fork(|| {
            let mut inherited = tracker.take().unwrap();
            refused(inherited.hot_len());
            refused(inherited.reset());
        })
        .succeed();
        memory.read(2);
        assert_eq!(tracker.unwrap().hot_len().unwrap(), page());
    });
}
