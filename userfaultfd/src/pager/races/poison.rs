//! What is missing is poisoned, as nobody will fill it any more. Before Linux 6.6 it is filled, or the end refused.

use super::harness::{Act, Flavour, Outcome, PAGE, Scene, Seen, content, nobody, races};
use crate::FeatureFlags;
use crate::pager::Error;
use crate::support::features;
use crate::sync_point::Point;

static DROP: Act<bool> = Act {
    features: FeatureFlags::EVENT_REMOVE,
    act: |scene| {
        drop(scene.end());
        can_poison()
    },
    meanwhile: nobody,
    check,
};

static REGION: Act<bool> = Act {
    features: FeatureFlags::empty(),
    act: |scene| {
        let (pager, region) = (scene.end(), scene.added.regions[0]);
        let removed = pager.remove_region(region);
        let refused = matches!(removed, Err(Error::Unfilled { .. }));
        assert!(if can_poison() { removed.is_ok() } else { refused }, "{removed:?}");
        // Without poison it is filled now.
        drop(pager);
        can_poison()
    },
    meanwhile: nobody,
    check,
};

fn can_poison() -> bool {
    features().contains(FeatureFlags::POISON)
}

fn check(scene: &Scene, outcome: Outcome<bool>) {
    // A load that isn't started by then never is, and one that isn't answered isn't waited for.
    let is_async = scene.flavour == Flavour::Async && outcome.acted;
    outcome.readers_saw(match outcome.point {
        Point::AfterRead if is_async => Seen::POISON,
        Point::AfterStart if is_async && outcome.first == Seen::POISON => Seen::POISON,
        _ => content(PAGE),
    });
    let block = if scene.flavour == Flavour::Block { 0..3 } else { PAGE..PAGE + 1 };
    let filled = |page: usize| !outcome.acted || block.contains(&page);
    scene.others_are(|page| if filled(page) { content(page) } else { Seen::POISON });
}

races! {
    dropped: DROP;
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
