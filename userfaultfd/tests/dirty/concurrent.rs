//! Writers on other threads, while the tracker is asked.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use userfaultfd::FeatureFlags;

use crate::space::{self, Space};
use crate::support::{require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const WRITERS: usize = 3;

/// A counter of one writer's in a page.
fn counter(space: &Space, page: usize, writer: usize) -> &AtomicU64 {
    let at = space.at(page).cast::<AtomicU64>().wrapping_add(writer);
    // SAFETY: aligned, inside the mapping, which outlives the borrow and is accessed by these atomics alone.
    unsafe { &*at }
}

/// The rule that the kernel's own test has: all takes together cover every write. A program that copies what each take
/// tells has everything in the end.
#[test]
fn no_write_is_lost_while_take_loops() {
    require!(WRITE_PROTECT);
    const PAGES: usize = 12;
    space::each(test_name!(), PAGES, |tracker, space| {
        tracker.track(space.all()).unwrap();
        let (start, running) = (Barrier::new(WRITERS + 1), AtomicUsize::new(WRITERS));
        let mut copy = [[0; WRITERS]; PAGES];
        let mut takes = 0;
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (start, running) = (&start, &running);
                scope.spawn(move || {
                    start.wait();
                    for round in 1..=600_u64 {
                        let page = (round as usize * 7 + writer * 5) % PAGES;
                        counter(space, page, writer).store(round, Ordering::SeqCst);
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            start.wait();
            loop {
                // One take at least is after the last write.
                let last = running.load(Ordering::SeqCst) == 0;
                for range in tracker.take() {
                    for page in space.pages_of(&range.unwrap()) {
                        copy[page] =
                            std::array::from_fn(|writer| counter(space, page, writer).load(Ordering::SeqCst));
                    }
                }
                takes += 1;
                if last {
                    break;
                }
            }
        });
        let now: [[u64; WRITERS]; PAGES] = std::array::from_fn(|page| {
            std::array::from_fn(|writer| counter(space, page, writer).load(Ordering::SeqCst))
        });
        assert_eq!(copy, now, "after {takes} takes");
    });
}

/// Many threads write the same page at once, and all go on.
#[test]
fn writers_of_one_page_all_go_on() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 2, |tracker, space| {
        space.populate();
        tracker.track(space.all()).unwrap();
        for round in 1..=20 {
            let start = Barrier::new(8);
            thread::scope(|scope| {
                for writer in 0..8 {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        counter(space, 1, writer).store(round, Ordering::SeqCst);
                    });
                }
            });
            assert_eq!(space.told(tracker.take()), [1..2], "{round}");
            assert!((0..8).all(|writer| counter(space, 1, writer).load(Ordering::SeqCst) == round));
        }
    });
}

/// Ranges come and go while others are written.
#[test]
fn tracking_more_disturbs_no_writer() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 4, |tracker, space| {
        space.populate();
        tracker.track(space.addresses(0..2)).unwrap();
        let done = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=300_u64 {
                    (0..4).for_each(|page| counter(space, page, 0).store(round, Ordering::SeqCst));
                }
                done.store(1, Ordering::SeqCst);
            });
            while done.load(Ordering::SeqCst) == 0 {
                tracker.track(space.addresses(2..4)).unwrap();
                let told = tracker.take().count();
                assert!(told <= 4, "{told}");
                tracker.untrack(space.addresses(2..4)).unwrap();
            }
        });
        assert!((0..4).all(|page| counter(space, page, 0).load(Ordering::SeqCst) == 300));
    });
}

/// The same in a large hole, whose page tables appear meanwhile.
#[test]
fn no_write_to_a_hole_is_lost_while_take_loops() {
    require!(FeatureFlags::WP_ASYNC);
    const PAGES: usize = 16 << 10;
    const STEP: usize = 61;
    for _ in 0..3 {
        let space = Space::from(crate::support::memory::Memory::anonymous(PAGES));
        let mut tracker = space::tracker(userfaultfd::dirty::Mode::Async);
        tracker.track(space.all()).unwrap();
        let mut copy = vec![0; PAGES];
        let running = AtomicUsize::new(WRITERS);
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (space, running) = (&space, &running);
                scope.spawn(move || {
                    for round in 1..=4000 {
                        // Some pages are written by one writer, and some more than once.
                        let page = (round * (writer + 1) * STEP) % PAGES;
                        counter(space, page, 0).fetch_add(1, Ordering::SeqCst);
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            loop {
                let last = running.load(Ordering::SeqCst) == 0;
                for range in tracker.take() {
                    for page in space.pages_of(&range.unwrap()) {
                        copy[page] = counter(&space, page, 0).load(Ordering::SeqCst);
                    }
                }
                if last {
                    break;
                }
            }
        });
        let now = |page: usize| counter(&space, page, 0).load(Ordering::SeqCst);
        assert!((0..PAGES).all(|page| copy[page] == now(page)));
    }
}
