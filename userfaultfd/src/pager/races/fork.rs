//! The process forks: the child's memory is filled like its parent's, each page for itself.

use super::harness::{Act, PAGE, PAGES, Scene, content, nobody, races};
use crate::FeatureFlags;
use crate::support::child;
use crate::support::proc::wait_until;

static FORK: Act<()> = Act {
    features: FeatureFlags::EVENT_FORK,
    act: |scene| {
        let first = scene.memory.at(PAGE).addr();
        child::fork(|| read_all(scene, first)).succeed();
    },
    meanwhile: nobody,
    check: |scene, outcome| {
        outcome.readers_saw(content(PAGE));
        scene.others_are(content);
        assert_eq!(scene.statistics().forks, 1);
        // The child's end is noticed.
        wait_until(|| scene.pager(|pager| pager.descriptors().len()) == 1);
    },
};

/// What the child does: it must not allocate.
fn read_all(scene: &Scene, first: usize) {
    assert_eq!(scene.at(PAGE), first);
    for page in [PAGE].into_iter().chain(0..PAGES) {
        assert_eq!(scene.memory.read(page), page as u8 + 1);
    }
}

races! {
    told: FORK;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
