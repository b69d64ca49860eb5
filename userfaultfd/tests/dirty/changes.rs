//! The iterators: merged, bounded, and nothing lost that wasn't looked at. Against a model, step by step.

use std::collections::BTreeSet;
use std::ops::Range;

use userfaultfd::dirty::Mode;
use userfaultfd::{DirtyTracker, FeatureFlags};

use crate::space::{self, MODES, Space};
use crate::support::memory::Memory;
use crate::support::random::Random;
use crate::support::{has_features, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

fn pages(told: Vec<Range<usize>>) -> BTreeSet<usize> {
    assert!(told.windows(2).all(|two| two[0].end < two[1].start), "in order and merged: {told:?}");
    told.into_iter().flatten().collect()
}

/// None lost and none invented: what is told is what a model says, over many steps of all that can be done.
#[test]
fn ranges_report_the_pages_that_were_written() {
    require!(WRITE_PROTECT);
    const PAGES: usize = 12;
    space::each(test_name!(), PAGES, |tracker, space| {
        // Faults that a thread handles take their time, most of all in an emulated machine.
        let (seeds, steps) = if tracker.mode() == Mode::Sync { (2, 60) } else { (4, 200) };
        for seed in 0..seeds {
            let mut random = Random::new(seed);
            if random.below(2) == 0 {
                space.populate();
            }
            tracker.track(space.all()).unwrap();
            let mut model = BTreeSet::new();
            for step in 0..steps {
                let (page, range) = (random.below(PAGES), random.range(PAGES));
                match random.below(10) {
                    0..5 => {
                        space.write(page, step as u8);
                        model.insert(page);
                    }
                    5 => drop(space.read(page)),
                    6 => assert_eq!(pages(space.told(tracker.dirty())), model, "{seed} {step}"),
                    7 => {
                        let told = pages(space.told(tracker.take_in(space.addresses(range.clone()))));
                        let expected = model.extract(&range);
                        assert_eq!(told, expected, "{seed} {step} {range:?}");
                    }
                    8 if space.kind.tells_drops() => {
                        assert!(space.drop_pages(range.clone()));
                        model.extend(range);
                    }
                    _ => {
                        assert_eq!(pages(space.told(tracker.take())), model, "{seed} {step}");
                        model.clear();
                    }
                }
            }
            tracker.untrack(space.all()).unwrap();
        }
    });
}

trait Extract {
    /// Takes out what lies in a range.
    fn extract(&mut self, range: &Range<usize>) -> Self;
}

impl Extract for BTreeSet<usize> {
    fn extract(&mut self, range: &Range<usize>) -> Self {
        let (inside, outside) = self.iter().partition(|page| range.contains(page));
        *self = outside;
        inside
    }
}

#[test]
fn pages_not_taken_out_stay_written() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 9, |tracker, space| {
        space.populate();
        tracker.track(space.all()).unwrap();
        for taken in 0..=5 {
            let written = [0, 2, 4, 6, 8];
            written.iter().for_each(|page| space.write(*page, 2));
            let mut take = tracker.take();
            let mut told: Vec<_> =
                take.by_ref().take(taken).map(|range| space.pages_of(&range.unwrap()).start).collect();
            assert_eq!(told, written[..taken]);
            drop(take);
            told.extend(pages(space.told(tracker.take())));
            assert_eq!(told, written, "after {taken}");
        }
    });
}

/// More pages and ranges than are looked at at a time.
#[test]
fn ranges_are_merged_however_many_there_are() {
    require!(WRITE_PROTECT);
    const PAGES: usize = 4096 + 200;
    for mode in MODES {
        let needs = FeatureFlags::WP_ASYNC;
        if mode == Mode::Async && !has_features(test_name!(), needs) {
            continue;
        }
        let space = Space::from(Memory::anonymous(PAGES));
        space.populate();
        let mut tracker = space::tracker(mode);
        tracker.track(space.all()).unwrap();
        // One range over the border of what is looked at at a time.
        (4090..4110).for_each(|page| space.write(page, 2));
        assert_eq!(space.told(tracker.take()), [4090..4110], "{mode}");
        // More ranges than are told at a time, where that is limited.
        let step = if mode == Mode::Sync { 60 } else { 7 };
        (0..PAGES).step_by(step).for_each(|page| space.write(page, 3));
        let told = pages(space.told(tracker.take()));
        assert!(told.into_iter().eq((0..PAGES).step_by(step)), "{mode}");
        assert_eq!(space.told(tracker.take()), []);
    }
}

#[test]
fn unused_iterator_resets_nothing() {
    require!(WRITE_PROTECT);
    space::each(test_name!(), 2, |tracker: &mut DirtyTracker, space| {
        tracker.track(space.all()).unwrap();
        space.write(1, 1);
        drop(tracker.take());
        assert_eq!(space.told(tracker.take()), [1..2]);
    });
}
