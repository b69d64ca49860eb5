//! Everything is filled, and given back to the kernel.

use super::harness::{Act, Outcome, PAGE, PAGES, Scene, content, nobody, races};
use crate::FeatureFlags;
use crate::pager::Progress;

static ALL: Act<Vec<Progress>> = Act {
    features: FeatureFlags::empty(),
    act: |scene| {
        let mut told = Vec::new();
        scene.end().finish(|progress| told.push(progress)).unwrap();
        told
    },
    meanwhile: nobody,
    check,
};

static REGION: Act<Vec<Progress>> = Act {
    features: FeatureFlags::EVENT_REMOVE,
    act: |scene| {
        let (mut told, region) = (Vec::new(), scene.added.regions[0]);
        let pager = scene.end();
        pager.finish_region(region, |progress| told.push(progress)).unwrap();
        assert_eq!(
            pager.missing(region).unwrap_err().to_string(),
            "the pager doesn't serve this: it was removed or finished, or its process is gone"
        );
        told
    },
    meanwhile: nobody,
    check,
};

fn check(scene: &Scene, outcome: Outcome<Vec<Progress>>) {
    outcome.readers_saw(content(PAGE));
    scene.others_are(content);
    assert!((0..PAGES).all(|page| scene.source.reads(page) == 1), "{:?}", scene.source);
    let (first, last) = (outcome.acted[0], outcome.acted[outcome.acted.len() - 1]);
    assert!(first.done == 0 && last.done == last.total && last.total == first.total, "{outcome:?}");
    assert!(outcome.acted.is_sorted_by_key(|progress| progress.done), "{outcome:?}");
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
    region: REGION;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
