//! A descriptor that another program reads, which fills missing pages of the same memory: a VM monitor.

use std::thread;

use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{DirtyTracker, Errno, Error, Event, FaultKind, FeatureFlags, RegisterMode};

use crate::space::Space;
use crate::support::memory::{self, Kind, Memory};
use crate::support::{child, errno, fault, has, has_features, require, test_name, uffd};

const MISSING: RegisterMode = RegisterMode::MISSING;

fn tracker(features: FeatureFlags) -> (userfaultfd::Uffd, userfaultfd::Result<DirtyTracker>) {
    let uffd = uffd(features);
    let descriptor = uffd.try_clone().unwrap();
    (uffd, DirtyTracker::with(Options::new().descriptor(descriptor).read_elsewhere(MISSING)))
}

#[test]
fn missing_pages_filled_by_a_read_count_as_written() {
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
    let tracked = tracker.track(space.all());
    if !crate::support::features().contains(FeatureFlags::WP_UNPOPULATED) {
        // A page that is dropped later is missing, and can't be protected there.
        assert!(matches!(tracked, Err(Error::MissingServed { .. })), "{tracked:?}");
        return;
    }
    tracked.unwrap();
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
        // What isn't a write to its memory is the other program's.
        let Event::Pagefault { kind, rw, thread_id, .. } = event else { panic!("{event:?}") };
        let addr = std::ptr::without_provenance_mut(16 * crate::support::page());
        assert!(!tracker.resolve(&Event::Pagefault { kind, rw, addr, thread_id }).unwrap());
        let (kind, addr) = (FaultKind::Missing, space.at(0));
        assert!(!tracker.resolve(&Event::Pagefault { kind, rw, addr, thread_id }).unwrap());
    });
    assert_eq!(space.told(tracker.take()), [2..3]);
    assert_eq!(tracker.statistics().writes, 1);
}

/// A page that is missing holds what its handler puts there, never zeros that a tracker filled in.
#[test]
fn tracker_never_fills_what_a_handler_serves() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let modes = MISSING | RegisterMode::WRITE_PROTECT;
    for unpopulated in [FeatureFlags::empty(), FeatureFlags::WP_UNPOPULATED] {
        if !has_features(test_name!(), unpopulated) {
            continue;
        }
        for memory in memory::each(test_name!(), modes, 4) {
            let (uffd, tracker) = tracker(unpopulated);
            let Ok(mut tracker) = tracker else { return };
            let space = Space::from(memory);
            uffd.register_with_mode(space.at(0), space.all().len(), MISSING).unwrap();
            let tracked = tracker.track(space.all());
            let anonymous = matches!(space.kind, crate::space::Kind::Of(Kind::Anonymous));
            if anonymous && unpopulated.is_empty() {
                let error = tracked.unwrap_err();
                assert!(matches!(error, Error::MissingServed { .. }), "{error}");
                assert!(error.to_string().contains("WP_UNPOPULATED"), "{error}");
                assert_eq!(tracker.tracked(), []);
            } else {
                tracked.unwrap();
                assert_eq!(space.told(tracker.take()), [], "{:?}", space.kind);
            }
            let serve = |faults: &fault::Faults<'_>| {
                assert_eq!(faults.next(), fault::Fault::read(FaultKind::Missing, space.memory(), 3));
                fill(&uffd, space.memory(), 3, 7);
            };
            assert_eq!(fault::during(&uffd, space.memory(), || space.read(3), serve), 7, "{:?}", space.kind);
            // Nor does it end, with the tracker, that missing pages are served.
            drop(tracker);
            let serve = |faults: &fault::Faults<'_>| {
                assert_eq!(faults.next(), fault::Fault::read(FaultKind::Missing, space.memory(), 2));
                fill(&uffd, space.memory(), 2, 6);
            };
            assert_eq!(fault::during(&uffd, space.memory(), || space.read(2), serve), 6, "{:?}", space.kind);
            fault::silently(&uffd, space.memory(), || space.write(3, 8));
        }
    }
}

/// Without `WP_UNPOPULATED` pages are filled to be protected: only where memory is still the tracker's.
#[test]
fn memory_mapped_anew_for_handler_is_not_filled() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        // Registered by another handler before the tracker looks, or only then.
        for modes in [MISSING, MISSING | RegisterMode::WRITE_PROTECT, RegisterMode::empty()] {
            let space = Space::from(Memory::new(Kind::Anonymous, 4));
            let descriptor = uffd(FeatureFlags::PAGEFAULT_FLAG_WP);
            let mut tracker = DirtyTracker::with(Options::new().descriptor(descriptor)).unwrap();
            tracker.track(space.all()).unwrap();
            let other = Memory::anonymous(2);
            let handler = uffd(FeatureFlags::empty());
            other.try_move(0, 2, space.at(1).cast(), 0).unwrap();
            if !modes.is_empty() {
                handler.register_with_mode(space.at(1), 2 * space.page, modes).unwrap();
            }
            let told: Vec<_> = tracker.take().collect();
            assert!(matches!(told.last(), Some(Err(Error::NotTracked { .. }))), "{told:?}");
            if modes.is_empty() {
                handler.register_with_mode(space.at(1), 2 * space.page, MISSING).unwrap();
            }
            let tracked = tracker.untrack(space.all()).and_then(|()| tracker.track(space.all()));
            assert_eq!(errno(tracked), Errno::EBUSY);
            for page in [1, 2] {
                let serve = |faults: &fault::Faults<'_>| {
                    assert_eq!(faults.next(), fault::Fault::read(FaultKind::Missing, space.memory(), page));
                    fill(&handler, space.memory(), page, 7);
                };
                let read = fault::during(&handler, space.memory(), || space.read(page), serve);
                assert_eq!(read, 7, "{modes:?}");
            }
        }
    });
}

/// Fills a page with a byte.
fn fill(uffd: &userfaultfd::Uffd, memory: &Memory, page: usize, byte: u8) {
    let content = vec![byte; memory.page()];
    // SAFETY: the source lives on, and the memory is only accessed by raw pointers.
    unsafe { uffd.copy(content.as_ptr().cast(), memory.at(page), memory.page(), true) }.unwrap();
}
