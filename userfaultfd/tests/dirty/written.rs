//! What counts as written: the same in both modes, on every kind of memory.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{DirtyTracker, Errno, Error, FeatureFlags};

use crate::space::{self, Kind, MODES, Space, tracker};
use crate::support::memory::{self, Memory};
use crate::support::{child, errno, features, has, proc, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

#[test]
fn written_pages_are_reported_once() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 6, |tracker, space| {
        space.populate();
        tracker.track(space.all()).unwrap();
        assert_eq!(space.told(tracker.dirty()), []);
        for page in [1, 2, 5] {
            space.write(page, 2);
        }
        assert_eq!(space.told(tracker.dirty()), [1..3, 5..6]);
        assert_eq!(tracker.dirty_len().unwrap(), 3 * space.page);
        assert_eq!(space.told(tracker.take()), [1..3, 5..6]);
        assert_eq!(space.told(tracker.take()), []);
        assert_eq!(tracker.dirty_len().unwrap(), 0);
        space.write(2, 3);
        space.write(3, 3);
        assert_eq!(space.told(tracker.take()), [2..4]);
        assert_eq!((0..6).map(|page| space.read(page)).collect::<Vec<_>>(), [1, 2, 3, 3, 1, 2]);
    });
}

#[test]
fn pages_that_are_read_are_not_written() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space| {
        // Before it is tracked nobody, then a reader, has touched it.
        tracker.track(space.addresses(0..2)).unwrap();
        assert_eq!(space.read(0), space.read(1));
        space.write(2, 7);
        tracker.track(space.addresses(2..4)).unwrap();
        assert_eq!(space.read(2), 7);
        space.read(3);
        assert_eq!(space.told(tracker.take()), []);
    });
}

#[test]
fn untouched_pages_are_written_when_they_are() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space| {
        tracker.track(space.all()).unwrap();
        assert_eq!(space.told(tracker.dirty()), []);
        space.write(1, 1);
        space.read(2);
        space.write(2, 1);
        assert_eq!(space.told(tracker.take()), [1..3]);
        space.write(0, 1);
        space.write(1, 2);
        assert_eq!(space.told(tracker.take()), [0..2]);
    });
}

#[test]
fn dropped_pages_count_as_written_on_anonymous_memory() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space| {
        space.populate();
        tracker.track(space.all()).unwrap();
        if !space.drop_pages(1..3) {
            // Hugetlb memory before Linux 5.18.
            return;
        }
        let dropped = if space.kind.tells_drops() { vec![1..3] } else { vec![] };
        assert_eq!(space.told(tracker.take()), dropped);
        assert_eq!(space.told(tracker.take()), []);
        space.write(2, 5);
        space.read(1);
        assert_eq!(space.told(tracker.take()), [2..3]);
        // Dropped, and touched again before anybody looks.
        space.drop_pages(2..4);
        let read = [space.read(2), space.read(3)];
        let dropped = if space.kind.tells_drops() { vec![2..4] } else { vec![] };
        assert_eq!(space.told(tracker.take()), dropped, "{read:?}");
    });
}

#[test]
fn punched_holes_are_unseen_and_next_write_is_seen() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space| {
        let Kind::Of(memory::Kind::Memfd | memory::Kind::Hugetlb) = space.kind else { return };
        space.populate();
        tracker.track(space.all()).unwrap();
        space.memory().punch(1, 2);
        assert_eq!(space.told(tracker.take()), []);
        assert_eq!(space.read(1), 0);
        assert_eq!(space.told(tracker.take()), []);
        for page in 1..4 {
            space.write(page, 5);
        }
        assert_eq!(space.told(tracker.take()), [1..4]);
        space.memory().punch(3, 1);
        space.write(3, 6);
        assert_eq!(space.told(tracker.take()), [3..4]);
    });
}

#[test]
fn unmapped_pages_are_no_longer_reported() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 5, |tracker, space| {
            if !matches!(space.kind, Kind::Of(_)) {
                return;
            }
            space.populate();
            tracker.track(space.all()).unwrap();
            (0..5).for_each(|page| space.write(page, 2));
            space.memory().unmap(1, 2);
            assert_eq!(space.told(tracker.take()), [0..1, 3..5]);
            space.write(0, 3);
            assert_eq!(space.told(tracker.take()), [0..1]);
            tracker.untrack(space.all()).unwrap();
            assert_eq!(tracker.tracked(), []);
        });
    });
}

#[test]
fn locking_pages_is_a_write_in_async_mode() {
    require!(FeatureFlags::WP_ASYNC);
    let space = Space::from(Memory::anonymous(4));
    space.populate();
    let mut tracker = tracker(Mode::Async);
    tracker.track(space.all()).unwrap();
    // SAFETY: changes no content.
    let locked = unsafe { libc::mlock(space.at(1), 2 * space.page) };
    if !has(test_name!(), "memory that may be locked", locked == 0) {
        return;
    }
    assert_eq!(space.told(tracker.take()), [1..3]);
    assert_eq!(space.told(tracker.take()), []);
}

#[test]
fn access_rights_change_nothing() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 4, |tracker, space| {
            if !matches!(space.kind, Kind::Of(_)) {
                return;
            }
            space.populate();
            tracker.track(space.all()).unwrap();
            space.write(1, 2);
            space.memory().protect(0, 4, libc::PROT_NONE);
            assert_eq!(space.told(tracker.take()), [1..2]);
            assert_eq!(space.told(tracker.take()), []);
            space.memory().protect(0, 4, libc::PROT_READ | libc::PROT_WRITE);
            assert_eq!(space.told(tracker.dirty()), []);
            space.write(1, 3);
            assert_eq!(space.told(tracker.take()), [1..2]);
        });
    });
}

#[test]
fn memory_mapped_in_place_is_not_tracked() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        // Before what was written, and behind it, where the kernel has reset that and doesn't report it.
        for place in [0, 3] {
            space::each(test_name!(), 4, |tracker, space| {
                if !matches!(space.kind, Kind::Of(kind) if !kind.is_hugetlb()) {
                    return;
                }
                space.populate();
                tracker.track(space.all()).unwrap();
                space.write(place, 2);
                let other = Memory::anonymous(1);
                other.write(0, 9);
                other.try_move(0, 1, space.memory().at(place).cast(), 0).unwrap();
                space.write(1, 2);
                // This page is another one now; what was written is told before or after the error.
                let told: Vec<_> = tracker.take().collect();
                let Some(Err(Error::NotTracked { start, end })) = told.last() else { panic!("{told:?}") };
                assert!(space.all().start <= *start && *end <= space.all().end);
                tracker.untrack(space.addresses(place..place + 1)).unwrap();
                let mut pages: Vec<_> =
                    told.into_iter().flatten().flat_map(|range| space.pages_of(&range)).collect();
                pages.extend(space.told(tracker.take()).into_iter().flatten());
                assert!(pages.contains(&1), "{pages:?}");
                assert_eq!(space.told(tracker.take()), []);
                tracker.track(space.addresses(place..place + 1)).unwrap();
                space.write(place, 3);
                assert_eq!(space.told(tracker.take()), std::slice::from_ref(&(place..place + 1)));
            });
        }
    });
}

#[test]
fn moved_pages_are_no_longer_reported() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 4, |tracker, space| {
            let Kind::Of(kind) = space.kind else { return };
            let Some(target) = Space::new(test_name!(), Kind::Of(memory::Kind::Anonymous), 2) else { return };
            if kind.is_hugetlb() {
                return;
            }
            space.populate();
            tracker.track(space.all()).unwrap();
            (0..4).for_each(|page| space.write(page, 2));
            space.memory().move_over(1, 2, target.memory(), 0);
            assert_eq!(space.told(tracker.take()), [0..1, 3..4]);
            target.write(0, 3);
            assert_eq!(target.read(1), 2);
            assert_eq!(space.told(tracker.take()), []);
            tracker.untrack(space.all()).unwrap();
        });
    });
}

#[test]
fn parent_of_a_fork_is_tracked_and_the_child_is_not() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        space::each(test_name!(), 4, |tracker, space| {
            space.populate();
            tracker.track(space.all()).unwrap();
            space.write(0, 2);
            // Before Linux 6.4 the child would fault for ever.
            let is_huge = matches!(space.kind, Kind::Of(kind) if kind.is_hugetlb());
            let writes = !is_huge || features().contains(FeatureFlags::WP_UNPOPULATED);
            let (here, there) = UnixStream::pair().unwrap();
            let child = child::fork(|| {
                // Nobody would answer a fault of this process.
                assert_eq!(space.read(1), 1);
                if writes {
                    space.write(1, 7);
                    space.write(3, 7);
                }
                io(&there, true);
            });
            io(&here, false);
            child.succeed();
            // What is shared the child has written, too; that mapping isn't this one.
            assert_eq!(space.told(tracker.dirty()), [0..1]);
            space.write(2, 3);
            assert_eq!(space.told(tracker.take()), [0..1, 2..3]);
            space.write(0, 3);
            assert_eq!(space.told(tracker.take()), [0..1]);
        });
    });
}

/// A byte through a socket, without an allocation.
fn io(mut socket: &UnixStream, write: bool) {
    use std::io::{Read, Write};
    if write {
        socket.write_all(&[1]).unwrap();
    } else {
        socket.read_exact(&mut [0]).unwrap();
    }
}

/// Has the kernel write a byte to a page.
fn write_by_kernel(space: &Space, page: usize) -> Result<(), Errno> {
    use std::io::Write;
    let (reader, mut writer) = UnixStream::pair().unwrap();
    writer.write_all(&[9]).unwrap();
    // SAFETY: inside the mapping, which is only accessed by raw pointers.
    match unsafe { libc::read(reader.as_raw_fd(), space.at(page), 1) } {
        1 => Ok(()),
        _ => Err(Errno::last()),
    }
}

#[test]
fn writes_of_system_calls_are_reported() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 3, |tracker, space| {
        space.populate();
        tracker.track(space.all()).unwrap();
        let written = write_by_kernel(space, 1);
        match tracker.mode() {
            Mode::Async => {
                assert_eq!((written, space.read(1)), (Ok(()), 9));
                assert_eq!(space.told(tracker.take()), [1..2]);
            }
            // Faults of the kernel's aren't this descriptor's, if the kernel has such descriptors.
            _ if written.is_ok() => assert_eq!(space.told(tracker.take()), [1..2]),
            _ => {
                assert_eq!((written, space.read(1)), (Err(Errno::EFAULT), 1));
                assert_eq!(space.told(tracker.take()), []);
            }
        }
    });
}

#[test]
fn system_calls_wait_for_tracker_with_right() {
    require!(WRITE_PROTECT, root);
    for kind in space::KINDS {
        let test = test_name!();
        if !kind.tracked(test, Mode::Sync) {
            continue;
        }
        let Some(space) = Space::new(test, kind, 3) else { continue };
        let options = Options::new().mode(Mode::Sync).user_mode_only(false);
        let mut tracker = DirtyTracker::with(options).unwrap();
        space.populate();
        tracker.track(space.all()).unwrap();
        write_by_kernel(&space, 1).unwrap();
        assert_eq!(space.read(1), 9);
        assert_eq!(space.told(tracker.take()), [1..2]);
        assert_eq!((tracker.statistics().reads, tracker.statistics().writes), (0, 1));
    }
}

#[test]
fn another_mapping_of_the_file_is_not_seen() {
    require!(FeatureFlags::WP_HUGETLBFS_SHMEM);
    for mode in MODES.into_iter().filter(|mode| {
        let needs = if *mode == Mode::Async { FeatureFlags::WP_ASYNC } else { WRITE_PROTECT };
        crate::support::has_features(test_name!(), needs)
    }) {
        let space = Space::from(Memory::new(memory::Kind::Memfd, 2));
        let alias = space.memory().alias();
        space.populate();
        let mut tracker = tracker(mode);
        tracker.track(space.all()).unwrap();
        alias.write(0, 7);
        assert_eq!(space.read(0), 7);
        assert_eq!(space.told(tracker.take()), [], "{mode}");
    }
}

#[test]
fn files_are_tracked_in_async_mode_alone() {
    require!(WRITE_PROTECT);
    for kind in [Kind::PrivateFile, Kind::File] {
        let Some(space) = Space::new(test_name!(), kind, 1) else { return };
        let mut tracker = tracker(Mode::Sync);
        assert_eq!(errno(tracker.track(space.all())), Errno::EINVAL, "{kind:?}");
        assert_eq!(tracker.tracked(), []);
        space.write(0, 1);
    }
}

#[test]
fn swapped_pages_are_not_written() {
    require!(WRITE_PROTECT);
    if !has(test_name!(), "swap", proc::has_swap()) {
        return;
    }
    space::each(test_name!(), 3, |tracker, space| {
        let Kind::Of(kind) = space.kind else { return };
        if kind.is_hugetlb() {
            return;
        }
        space.populate();
        tracker.track(space.all()).unwrap();
        space.write(0, 2);
        space.memory().swap_out(0, 3);
        assert_eq!(space.told(tracker.dirty()), [0..1]);
        assert_eq!((0..3).map(|page| space.read(page)).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!(space.told(tracker.take()), [0..1]);
        space.write(2, 3);
        assert_eq!(space.told(tracker.take()), [2..3]);
    });
}

#[test]
fn tracker_that_is_dropped_leaves_nothing_behind() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 3, |tracker, space| {
        space.populate();
        let mode = tracker.mode();
        let mut first = space::tracker(mode);
        first.track(space.all()).unwrap();
        assert_eq!(errno(tracker.track(space.all())), Errno::EBUSY);
        drop(first);
        space.write(0, 2);
        tracker.track(space.all()).unwrap();
        assert_eq!(space.told(tracker.take()), []);
        space.write(1, 2);
        assert_eq!(space.told(tracker.take()), [1..2]);
    });
}

#[test]
fn best_mode_is_chosen_and_a_missing_one_is_named() {
    require!(WRITE_PROTECT);
    let asynchronous = crate::support::features().contains(FeatureFlags::WP_ASYNC);
    let best = if asynchronous { Mode::Async } else { Mode::Sync };
    assert_eq!(DirtyTracker::new().unwrap().mode(), best);
    if !asynchronous {
        let error = DirtyTracker::with(Options::new().mode(Mode::Async)).unwrap_err();
        assert!(
            matches!(error, Error::UnsupportedFeatures { missing: FeatureFlags::WP_ASYNC, .. }),
            "{error:?}"
        );
    }
}

#[test]
fn architecture_without_write_protection_says_so() {
    require!();
    if !crate::support::features().contains(WRITE_PROTECT) {
        let error = DirtyTracker::new().unwrap_err();
        assert!(matches!(error, Error::UnsupportedFeatures { missing: WRITE_PROTECT, .. }), "{error:?}");
    }
    // Without its descriptor another process's memory can't be.
    let options = Options::new().process(userfaultfd::Pid::from_raw(1));
    assert!(matches!(DirtyTracker::with(options), Err(Error::NoDescriptor)));
}
