//! The page is removed by madvise(2): what belongs there is zero from then on.

use super::harness::{Act, Outcome, PAGE, Scene, Seen, content, nobody, races, read};
use crate::FeatureFlags;
use crate::support::has;

static TOLD: Act<bool> = Act {
    features: FeatureFlags::EVENT_REMOVE,
    act: remove,
    meanwhile: nobody,
    check: |scene, outcome| {
        if !outcome.acted {
            return;
        }
        outcome.readers_saw(Seen::ZERO);
        // Of shared memory only the mapping is removed: what the page cache has it has still.
        let stays = outcome.was_filled() && scene.flavour.is_shared();
        assert_eq!(read(scene.at(PAGE)), if stays { content(PAGE) } else { Seen::ZERO });
        scene.others_are(content);
        assert_eq!(scene.statistics().removes, 1);
    },
};

/// Nothing tells of it: a page that is being loaded gets its content.
static UNTOLD: Act<bool> =
    Act { features: FeatureFlags::empty(), act: remove, meanwhile: nobody, check: check_untold };

fn check_untold(scene: &Scene, outcome: Outcome<bool>) {
    if !outcome.acted {
        return;
    }
    let stays = !outcome.was_filled() || scene.flavour.is_shared();
    let expected = if stays { content(PAGE) } else { Seen::ZERO };
    outcome.readers_saw(expected);
    assert_eq!(read(scene.at(PAGE)), expected);
    scene.others_are(content);
}

fn remove(scene: &Scene) -> bool {
    // Of hugetlb memory since Linux 5.18.
    let removed = scene.memory.advise(PAGE, 1, libc::MADV_DONTNEED);
    let need = format!("madvise {} on {:?}", libc::MADV_DONTNEED, scene.memory.kind());
    has(scene.test, &need, removed.is_ok())
}

races! {
    told: TOLD;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
}

races! {
    untold: UNTOLD;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
}
