//! The descriptor is handed over, and another pager goes on with it.

#![expect(unsafe_code, reason = "the memory is the test's")]

use super::harness::{Act, Flavour, Outcome, PAGE, PAGES, Scene, content, nobody, races};
use crate::FeatureFlags;
use crate::pager::{Detached, MissingRange, Pager};
use crate::sync_point::Point;

static ALL: Act<Taken> = Act {
    features: FeatureFlags::EVENT_REMOVE,
    act: |scene| {
        let mut detached = scene.end().detach();
        assert_eq!(detached.len(), 1);
        take_over(scene, detached.remove(0))
    },
    meanwhile: nobody,
    check: |scene, outcome| check(scene, outcome, true),
};

static ONE: Act<Taken> = Act {
    features: FeatureFlags::EVENT_REMOVE,
    act: |scene| {
        let detached = scene.pager(|pager| pager.remove(scene.added.descriptor)).unwrap();
        take_over(scene, detached)
    },
    meanwhile: nobody,
    // The load goes on, and is dropped.
    check: |scene, outcome| {
        let kept = outcome.was_filled();
        check(scene, outcome, kept);
    },
};

#[derive(Debug)]
struct Taken {
    pager: Pager,
    missing: Vec<MissingRange>,
}

fn take_over(scene: &Scene, detached: Detached) -> Taken {
    assert_eq!(detached.descriptor, scene.added.descriptor);
    assert!(detached.uffd.is_nonblocking().unwrap(), "as it was");
    let missing = detached.missing();
    let (pager, region) = (Pager::new().unwrap(), scene.flavour.region(&scene.memory, scene.source.clone()));
    // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
    unsafe { pager.add_own(detached.uffd, [region]) }.unwrap();
    Taken { pager, missing }
}

/// `kept`: what the first pager was loading it has put in place.
fn check(scene: &Scene, outcome: Outcome<Taken>, kept: bool) {
    outcome.readers_saw(content(PAGE));
    let block = if scene.flavour == Flavour::Block { 0..3 } else { PAGE..PAGE + 1 };
    let missing: usize = outcome.acted.missing.iter().map(|missing| missing.len / scene.memory.page()).sum();
    // A load that isn't answered by then may be handed over instead, as missing.
    let may_keep =
        scene.flavour == Flavour::Async && matches!(outcome.point, Point::AfterRead | Point::AfterStart);
    let kept = kept && (!may_keep || missing < PAGES);
    assert_eq!(missing, PAGES - if kept { block.len() } else { 0 }, "{outcome:?}");
    let page = scene.memory.page();
    for part in &outcome.acted.missing {
        assert_eq!(part.offset, Some((part.address - scene.at(0)) as u64), "{outcome:?}");
        let pages = (part.address - scene.at(0)) / page..(part.address + part.len - scene.at(0)) / page;
        assert!(!kept || !pages.contains(&PAGE), "{outcome:?}");
    }
    scene.others_are(content);
    if kept {
        assert!((0..PAGES).all(|page| scene.source.reads(page) == 1), "{:?}", scene.source);
    }
    outcome.acted.pager.finish(|_| {}).unwrap();
    scene.others_are(content);
}

races! {
    all: ALL;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}

races! {
    one: ONE;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
