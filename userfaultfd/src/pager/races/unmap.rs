//! The page is unmapped: a thread that waits for it gets the signal, and the others what is theirs.

use super::harness::{Act, NOTHING_MAPPED, Outcome, PAGE, Scene, content, nobody, races, read};
use crate::FeatureFlags;

static TOLD: Act<()> = Act { features: FeatureFlags::EVENT_UNMAP, act: unmap, meanwhile: nobody, check };

static UNTOLD: Act<()> = Act { features: FeatureFlags::empty(), act: unmap, meanwhile: nobody, check };

fn unmap(scene: &Scene) {
    scene.memory.unmap(PAGE, 1);
}

fn check(scene: &Scene, outcome: Outcome<()>) {
    outcome.readers_saw(NOTHING_MAPPED);
    assert_eq!(read(scene.at(PAGE)), NOTHING_MAPPED);
    assert_eq!(read(scene.at(PAGE - 1)), content(PAGE - 1));
    // The page that is gone is nothing to wait for.
    scene.end().finish(|_| {}).unwrap();
    assert_eq!(read(scene.at(PAGE)), NOTHING_MAPPED);
    scene.others_are(content);
}

races! {
    told: TOLD;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}

races! {
    untold: UNTOLD;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
