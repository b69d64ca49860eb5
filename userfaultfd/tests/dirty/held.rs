//! Memory that something else of this library has registered: the error names it, and says what would work.

use userfaultfd::dirty::Mode;
use userfaultfd::pager::{Pager, Region, ZeroSource};
use userfaultfd::snapshot::{self, Content};
use userfaultfd::{DirtyTracker, Errno, Error, FeatureFlags, Holder, LazyMemory, Reason, Snapshot};

use crate::space::{self, Space};
use crate::support::memory::Memory;
use crate::support::{child, page, require, test_name, uffd};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// Checks what holds memory that can't be tracked or saved, from what the error says.
#[track_caller]
fn is_held(range: std::ops::Range<usize>, holder: Option<Holder>, text: &str) {
    let check = |error: Error| {
        assert_eq!(error.errno(), Some(Errno::EBUSY), "{error}");
        assert!(error.to_string().contains(text), "{error}");
        let Error::Refused { refusal, .. } = error else { panic!("{error:?}") };
        assert!(matches!(refusal.reason(), Reason::OtherDescriptor { .. } | Reason::DropsMode { .. }));
        assert_eq!((refusal.holder(), refusal.range()), (holder, range.clone()));
    };
    check(DirtyTracker::new().unwrap().track(range.clone()).unwrap_err());
    match Snapshot::begin(range.clone(), |_, _: Content<'_>| Ok(())) {
        Err(snapshot::Error::Kernel(error)) => check(error),
        result => panic!("{result:?}"),
    }
}

/// Checks that nothing holds memory.
#[track_caller]
fn is_free(range: std::ops::Range<usize>) {
    DirtyTracker::new().unwrap().track(range.clone()).unwrap();
    let finished = Snapshot::begin(range.clone(), |_, _: Content<'_>| Ok(())).unwrap().wait().unwrap();
    assert_eq!(finished.progress.saved, range.len() as u64);
}

#[test]
fn refusal_names_what_holds_the_memory() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let space = Space::from(Memory::anonymous(4));
        space.populate();
        let all = space.all();
        for mode in space::MODES {
            if mode == Mode::Async && !crate::support::has_features(test_name!(), FeatureFlags::WP_ASYNC) {
                continue;
            }
            let mut tracker = space::tracker(mode);
            tracker.track(all.clone()).unwrap();
            is_held(all.clone(), Some(Holder::DirtyTracker), "a DirtyTracker: untrack the range");
            tracker.untrack(all.clone()).unwrap();
            is_free(all.clone());
        }

        let series = snapshot::Options::new().range(all.clone()).series().unwrap();
        is_held(all.clone(), Some(Holder::Snapshot), "a snapshot: wait for it");
        drop(series);
        is_free(all.clone());
        let other = uffd(FeatureFlags::empty());
        other.register(space.at(0), all.len()).unwrap();
        is_held(all.clone(), None, "another userfaultfd");
        other.unregister(space.at(0), all.len()).unwrap();
        is_free(all);
    });
}

#[test]
fn memory_that_is_filled_lazily_is_named() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        for sigbus in [false, true] {
            let len = 4 * page();
            let memory = if sigbus {
                LazyMemory::sigbus(ZeroSource).len(len).build()
            } else {
                LazyMemory::builder(ZeroSource).len(len).build()
            };
            let memory = memory.unwrap();
            let all = memory.as_ptr().addr()..memory.as_ptr().addr() + len;
            is_held(
                all.clone(),
                Some(Holder::LazyMemory),
                "a LazyMemory: use its tracker(), snapshot() or series()",
            );
            if !sigbus {
                let tracker = memory.tracker();
                if tracker.is_ok() {
                    is_held(all.clone(), Some(Holder::DirtyTracker), "a DirtyTracker");
                }
            }
            memory.fill(|_| {}).unwrap();
            is_free(all);
        }
        let memory = Memory::anonymous(4);
        let pager = Pager::new().unwrap();
        let region = Region::new(memory.start().expose_provenance(), memory.len(), ZeroSource);
        // SAFETY: the memory is accessed by raw pointers alone, and zeros are good.
        unsafe { pager.add_own(uffd(FeatureFlags::empty()), [region]) }
            .map_err(|refused| refused.error)
            .unwrap();
        is_held(memory.range(0, 4), Some(Holder::Pager), "a Pager");
        pager.finish(|_| {}).unwrap();
        is_free(memory.range(0, 4));
    });
}
