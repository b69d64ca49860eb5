//! A descriptor that somebody else reads, who fills missing pages of the same memory: a VM monitor.

use std::thread;

use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{DirtyTracker, Errno, Event, FaultKind, FeatureFlags, RegisterMode};

use crate::space::Space;
use crate::support::memory::{self, Kind};
use crate::support::{errno, fault, has, require, test_name, uffd};

const MISSING: RegisterMode = RegisterMode::MISSING;

fn tracker(features: FeatureFlags) -> (userfaultfd::Uffd, userfaultfd::Result<DirtyTracker>) {
    let uffd = uffd(features);
    let descriptor = uffd.try_clone().unwrap();
    (uffd, DirtyTracker::with(Options::new().descriptor(descriptor).read_elsewhere(MISSING)))
}

#[test]
fn missing_pages_are_filled_by_whoever_reads_and_count_as_written() {
    require!(FeatureFlags::WP_ASYNC);
    for memory in memory::each(test_name!(), MISSING | RegisterMode::WRITE_PROTECT, 3) {
        let (uffd, tracker) = tracker(FeatureFlags::WP_ASYNC);
        let mut tracker = tracker.unwrap();
        assert_eq!(tracker.mode(), Mode::Async);
        let space = Space::from(memory);
        tracker.track(space.all()).unwrap();
        let memory = space.memory();
        let fill = |page: usize, byte: u8| {
            let content = vec![byte; memory.page()];
            // SAFETY: the source lives on, and the memory is only accessed by raw pointers.
            unsafe { uffd.copy(content.as_ptr().cast(), memory.at(page), memory.page(), true) }.unwrap();
        };
        let byte = fault::during(
            &uffd,
            memory,
            || memory.read(1),
            |faults| {
                assert_eq!(faults.next(), fault::Fault::read(FaultKind::Missing, memory, 1));
                fill(1, 7);
            },
        );
        assert_eq!(byte, 7);
        assert_eq!(space.told(tracker.take()), [1..2], "{memory:?}");
        fault::silently(&uffd, memory, || memory.write(1, 8));
        assert_eq!(space.told(tracker.take()), [1..2], "{memory:?}");
        assert_eq!(space.told(tracker.take()), [], "{memory:?}");
    }
}

#[test]
fn events_read_elsewhere_are_handed_over() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (uffd, tracker) = tracker(crate::support::features() & FeatureFlags::WP_UNPOPULATED);
    let mut tracker = match tracker {
        Ok(tracker) => tracker,
        Err(error) => {
            assert!(!memory::tells_protection(test_name!()));
            assert_eq!(errno::<()>(Err(error)), Errno::EOPNOTSUPP);
            return;
        }
    };
    assert!(has(test_name!(), "protection in pagemap", tracker.mode() == Mode::Sync));
    let space = Space::from(memory::Memory::new(Kind::Anonymous, 3));
    space.populate();
    tracker.track(space.all()).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| space.write(2, 7));
        let event = loop {
            match uffd.read_event().unwrap() {
                Some(event) => break event,
                None => thread::yield_now(),
            }
        };
        assert!(tracker.resolve(&event).unwrap(), "{event:?}");
        writer.join().unwrap();
        // What isn't a write to its memory is somebody else's.
        let Event::Pagefault { kind, rw, thread_id, .. } = event else { panic!("{event:?}") };
        let addr = std::ptr::without_provenance_mut(16 * crate::support::page());
        assert!(!tracker.resolve(&Event::Pagefault { kind, rw, addr, thread_id }).unwrap());
        let (kind, addr) = (FaultKind::Missing, space.at(0));
        assert!(!tracker.resolve(&Event::Pagefault { kind, rw, addr, thread_id }).unwrap());
    });
    assert_eq!(space.told(tracker.take()), [2..3]);
    assert_eq!(tracker.stats().writes, 1);
}
