//! The page is removed by madvise(2): what belongs there is zero from then on.

use super::harness::{Act, Flavour, Outcome, PAGE, Reader, Scene, Seen, content, nobody, races, read};
use crate::FeatureFlags;
use crate::support::has;
use crate::support::proc::wait_until;
use crate::sync_point::Point;

static TOLD: Act<bool> = Act {
    features: FeatureFlags::EVENT_REMOVE,
    act: remove,
    meanwhile: nobody,
    check: |scene, outcome| {
        if !outcome.acted {
            return;
        }
        if scene.flavour.reloads() {
            outcome.readers_saw(content(PAGE));
            assert_eq!(read(scene.at(PAGE)), content(PAGE));
        } else if scene.flavour.is_shared() {
            // Only the mapping is removed: what the page cache has it has still, also where the kernel put off mapping
            // it because of the removal.
            let file = read(scene.memory.alias().at(PAGE).addr());
            assert!(!outcome.was_filled() || file == content(PAGE), "{outcome:?}");
            outcome.readers_saw(file);
            assert_eq!(read(scene.at(PAGE)), file);
        } else {
            outcome.readers_saw(Seen::ZERO);
            assert_eq!(read(scene.at(PAGE)), Seen::ZERO);
        }
        scene.others_are(content);
        assert_eq!(scene.statistics().removes, 1);
    },
};

/// Nothing tells of it: a page that is being loaded gets its content.
static UNTOLD: Act<bool> = Act {
    features: FeatureFlags::empty(),
    act: remove,
    meanwhile: whoever_comes_too_late,
    check: check_untold,
};

/// A thread that faults on a page that was filled and removed again, before the pager has noted that it is there.
fn whoever_comes_too_late(scene: &Scene, point: Point) -> Vec<Reader> {
    if point != Point::AfterFill {
        return Vec::new();
    }
    let reader = Reader::of(scene.at(PAGE));
    wait_until(|| scene.statistics().duplicates > 0 || reader.has_seen());
    vec![reader]
}

fn check_untold(scene: &Scene, outcome: Outcome<bool>) {
    if !outcome.acted {
        return;
    }
    let stays = !outcome.was_filled() || scene.flavour.is_shared() || scene.flavour.reloads();
    let expected = if stays { content(PAGE) } else { Seen::ZERO };
    outcome.readers_saw(expected);
    assert!(outcome.meanwhile.iter().all(|seen| *seen == expected), "{outcome:?}");
    assert_eq!(read(scene.at(PAGE)), expected);
    scene.others_are(content);
}

fn remove(scene: &Scene) -> bool {
    // Of hugetlb memory since Linux 5.18.
    let advice = if scene.flavour == Flavour::ReloadMinor { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let removed = scene.memory.advise(PAGE, 1, advice);
    let need = format!("madvise {advice} on {:?}", scene.memory.kind());
    has(scene.test, &need, removed.is_ok())
}

races! {
    told: TOLD;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
    reload: Reload,
    reload_minor: ReloadMinor,
}

races! {
    untold: UNTOLD;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
    reload: Reload,
    reload_minor: ReloadMinor,
}
