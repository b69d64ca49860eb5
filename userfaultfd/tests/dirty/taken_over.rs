//! Memory that was unmapped, and what was mapped in its place is tracked or saved by another one: the older one leaves it
//! alone and says so.

use std::ops::Range;

use userfaultfd::dirty::{Mode, Options};
use userfaultfd::{AccessTracker, DirtyTracker, Error, FeatureFlags, Result};

use crate::space::{self, MODES, Space, tracker};
use crate::support::memory::Memory;
use crate::support::{child, features, page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// The pages that are mapped anew.
const ANEW: Range<usize> = 1..3;

/// Maps private anonymous memory in the place of some pages.
fn map_anew(space: &Space) {
    let bytes = ANEW.len() * space.page;
    let other = Memory::anonymous(bytes / page());
    other.try_move(0, bytes / page(), space.at(ANEW.start), 0).unwrap();
    ANEW.for_each(|page| space.write(page, 1));
}

/// The modes that the kernel has.
fn modes() -> impl Iterator<Item = Mode> {
    MODES.into_iter().filter(|mode| *mode == Mode::Sync || features().contains(FeatureFlags::WP_ASYNC))
}

/// Tries each mode on each kind of memory, in a process of its own: four pages, which the older tracker has.
fn each_mode(test: &'static str, test_it: impl Fn(Mode, &mut DirtyTracker, &Space)) {
    child::run_well(test, || {
        for mode in modes() {
            space::each(test, 4, |older, space| {
                space.populate();
                older.track(space.all()).unwrap();
                test_it(mode, older, space);
            });
        }
    });
}

/// What a take tells that isn't of the pages that were mapped anew. Of those it must tell that they aren't tracked.
#[track_caller]
fn refused(space: &Space, told: Vec<Result<Range<usize>>>) -> Vec<Range<usize>> {
    let lost = space.addresses(ANEW);
    let is_of_others = |range: &Range<usize>| range.end <= lost.start || lost.end <= range.start;
    let Some(Err(Error::NotTracked { start, end })) = told.last() else { panic!("{told:?}") };
    assert_eq!(*start..*end, lost);
    let told: Vec<_> = told.into_iter().filter_map(Result::ok).collect();
    assert!(told.iter().all(is_of_others), "{told:?} of {lost:?}");
    told
}

/// The first small page of each of some pages.
fn first(space: &Space, pages: Range<usize>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for start in pages.map(|page| space.at(page).addr()) {
        match all.last_mut() {
            Some(last) if last.end == start => last.end += page(),
            _ => all.push(start..start + page()),
        }
    }
    all
}

fn take(tracker: &mut DirtyTracker) -> Vec<Range<usize>> {
    tracker.take().collect::<Result<_>>().unwrap()
}

#[test]
fn later_tracker_keeps_writes_to_memory_mapped_anew() {
    require!(WRITE_PROTECT);
    each_mode(test_name!(), |mode, older, space| {
        map_anew(space);
        let mut later = tracker(mode);
        later.track(space.addresses(ANEW)).unwrap();
        (0..3).for_each(|page| space.write(page, 2));
        let mut told = refused(space, older.take().collect());
        assert_eq!(take(&mut later), first(space, ANEW), "{mode}");
        ANEW.for_each(|page| space.write(page, 3));
        // What the older one still has.
        older.untrack(space.addresses(ANEW)).unwrap();
        told.extend(take(older));
        assert_eq!(told, std::slice::from_ref(&space.addresses(0..1)), "{mode}");
        space.write(3, 2);
        assert_eq!(take(older), std::slice::from_ref(&space.addresses(3..4)), "{mode}");
        // And nothing of the later one's ends with it.
        older.untrack(space.all()).unwrap();
        assert_eq!(take(&mut later), first(space, ANEW), "{mode}");
        space.write(2, 4);
        assert_eq!(take(&mut later), first(space, 2..3), "{mode}");
    });
}

#[test]
fn older_tracker_keeps_newer_registration() {
    require!(WRITE_PROTECT);
    each_mode(test_name!(), |mode, older, space| {
        space.write(2, 2);
        // It is reset, and stays in the iterator until that is dropped.
        let mut taking = older.take();
        assert_eq!(taking.next().unwrap().unwrap(), space.addresses(2..3));
        space.write(1, 2);
        map_anew(space);
        let mut later = tracker(mode);
        later.track(space.addresses(ANEW)).unwrap();
        drop(taking);
        assert!(older.set_always_dirty(space.all(), true).is_err());
        assert_eq!(take(&mut later), [], "{mode}");
        // Nor when the later one has ended: it isn't the memory that was tracked.
        drop(later);
        ANEW.for_each(|page| space.write(page, 2));
        refused(space, older.take().collect());
        older.untrack(space.all()).unwrap();
        older.track(space.all()).unwrap();
        space.write(1, 3);
        assert_eq!(take(older), first(space, 1..2), "{mode}");
    });
}

#[test]
fn later_tracker_keeps_accesses_to_new_mapping() {
    require!(FeatureFlags::RWP);
    child::run_well(test_name!(), || {
        for (mode, of_later) in MODES.into_iter().flat_map(|mode| MODES.map(|of_later| (mode, of_later))) {
            let space = Space::from(Memory::anonymous(4));
            space.populate();
            let [mut older, mut later] =
                [mode, of_later].map(|mode| AccessTracker::with(Options::new().mode(mode)).unwrap());
            older.track(space.all()).unwrap();
            map_anew(&space);
            later.track(space.addresses(ANEW)).unwrap();
            space.read(2);
            assert!(matches!(older.reset(), Err(Error::NotTracked { .. })));
            refused(&space, older.hot().collect());
            drop(older);
            let hot: Vec<_> = later.hot().collect::<Result<_>>().unwrap();
            assert_eq!(hot, first(&space, 2..3), "{mode} {of_later}");
        }
    });
}

#[cfg(feature = "snapshot")]
#[test]
fn series_saves_writes_to_new_mapping() {
    require!(WRITE_PROTECT);
    use std::sync::{Arc, Mutex};
    use userfaultfd::snapshot::{self, Content};

    child::run_well(test_name!(), || {
        let saved = Arc::new(Mutex::new(Vec::new()));
        let take = |series: &mut snapshot::Series| {
            let sink = Arc::clone(&saved);
            let sink = move |offset: u64, content: Content<'_>| {
                let is_data = !matches!(content, Content::Gone(_));
                let mut sink = sink.lock().unwrap();
                sink.extend((offset..offset + content.len()).step_by(page()).map(|at| (at, is_data)));
                Ok(())
            };
            series.begin(sink).unwrap().wait().unwrap();
            let mut saved = std::mem::take(&mut *saved.lock().unwrap());
            saved.sort_unstable();
            saved
        };
        for mode in modes() {
            let space = Space::from(Memory::anonymous(4));
            space.populate();
            let mut older = tracker(mode);
            older.track(space.all()).unwrap();
            map_anew(&space);
            let mut series = snapshot::Options::new().range(space.addresses(ANEW)).series().unwrap();
            take(&mut series);
            space.write(1, 7);
            refused(&space, older.take().collect());
            assert_eq!(take(&mut series), [(0, true)], "{mode}");
            space.write(2, 8);
            drop(older);
            assert_eq!(take(&mut series), [(page() as u64, true)], "{mode}");

            // The other way round.
            map_anew(&space);
            let mut later = tracker(mode);
            later.track(space.addresses(ANEW)).unwrap();
            space.write(2, 9);
            take(&mut series);
            drop(series);
            assert_eq!(self::take(&mut later), first(&space, 2..3), "{mode}");
        }
    });
}
