//! Memory of another process: its descriptor, sent by it, and its pagemap.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{DirtyTracker, Errno, Error, FeatureFlags, Pid, Uffd};

use crate::space::{self, MODES, Space};
use crate::support::{child, features, require, test_name, uffd};

#[test]
fn memory_of_another_process_is_tracked() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        for mode in MODES {
            for kind in space::KINDS.into_iter().filter(|kind| kind.tracked(test_name!(), mode)) {
                if let Some(space) = Space::new(test_name!(), kind, 4) {
                    println!("{mode} {kind:?}");
                    track(mode, &space);
                }
            }
        }
    });
}

/// Tracks the memory of a child, which writes to the pages that it is told.
fn track(mode: Mode, space: &Space) {
    space.populate();
    let wanted = match mode {
        Mode::Async => FeatureFlags::WP_ASYNC,
        _ => features() & FeatureFlags::WP_UNPOPULATED,
    };
    let (mut here, there) = UnixStream::pair().unwrap();
    let child = child::fork(|| {
        let own = uffd(wanted);
        child::send_fd(&there, own.as_fd());
        let mut page = [0];
        while (&there).read(&mut page).unwrap() == 1 && page[0] != 9 {
            space.write(page[0].into(), 5);
            (&there).write_all(&page).unwrap();
        }
    });
    let descriptor = Uffd::from(child::receive_fd(&here));
    let pid = Pid::from_raw(child.pid());
    let options = Options::new().descriptor(descriptor).process(pid);
    let mut tracker = DirtyTracker::with(options).unwrap();
    assert_eq!(tracker.mode(), mode);
    tracker.track(space.all()).unwrap();
    let mut write_there = |page: u8| {
        here.write_all(&[page]).unwrap();
        here.read_exact(&mut [0]).unwrap();
    };
    write_there(1);
    write_there(2);
    // What is written here isn't seen there, unless it is the same page; that isn't the mapping.
    space.write(0, 7);
    assert_eq!(space.told(tracker.take()), [1..3]);
    write_there(3);
    assert_eq!(space.told(tracker.dirty()), [3..4]);
    assert_eq!(space.told(tracker.take()), [3..4]);
    assert_eq!(space.told(tracker.take()), []);
    child.kill();
    child.wait();
    // Nothing is left to be tracked. Some kernels say so.
    let told: Vec<_> = tracker.take().collect();
    let gone = |error: &Error| matches!(error.errno(), Some(Errno::ESRCH | Errno::ENOENT));
    assert!(told.iter().all(|range| range.as_ref().is_err_and(gone)), "{told:?}");
}
