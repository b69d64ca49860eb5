//! All of the memory is moved by mremap(2): its content moves along, also that which is being loaded.

use std::sync::atomic::Ordering;

use super::harness::{
    Act, NOTHING_MAPPED, Outcome, PAGE, PAGES, Reader, Scene, Seen, clear, content, races, read, room,
};
use crate::FeatureFlags;
use crate::support::has;
use crate::support::proc::wait_until;
use crate::sync_point::Point;

static MOVED: Act<bool> = Act {
    features: FeatureFlags::EVENT_REMAP.union(FeatureFlags::EVENT_UNMAP),
    act: |scene| move_it(scene, 0),
    meanwhile: somebody_there,
    check: |scene, outcome| check(scene, outcome, NOTHING_MAPPED),
};

/// What is left behind stays mapped, empty.
static COPIED: Act<bool> = Act {
    features: FeatureFlags::EVENT_REMAP.union(FeatureFlags::EVENT_UNMAP),
    act: |scene| move_it(scene, libc::MREMAP_DONTUNMAP),
    meanwhile: somebody_there,
    check: |scene, outcome| {
        let left = if scene.flavour.is_shared() { content(PAGE) } else { Seen::ZERO };
        check(scene, outcome, left);
    },
};

fn move_it(scene: &Scene, flags: libc::c_int) -> bool {
    let to = room(&scene.memory);
    scene.moved.store(to.addr(), Ordering::SeqCst);
    // Hugetlb memory can be moved since Linux 5.16, and left behind never; files can be left behind since 5.13.
    let moved = scene.memory.try_move(0, PAGES, to, flags);
    let need = format!("mremap {flags} on {:?}", scene.memory.kind());
    let moved = has(scene.test, &need, moved.is_ok());
    if !moved {
        scene.moved.store(0, Ordering::SeqCst);
    }
    moved
}

fn there(scene: &Scene, page: usize) -> usize {
    scene.moved.load(Ordering::SeqCst) + page * scene.memory.page()
}

/// The readers that come to the new place while the page is loaded for one at the old place.
fn somebody_there(scene: &Scene, point: Point) -> Vec<Reader> {
    let moved = scene.moved.load(Ordering::SeqCst) != 0;
    if !moved || matches!(point, Point::AfterFill | Point::BeforeWake) {
        return Vec::new();
    }
    wait_until(|| scene.statistics().remaps == 1);
    let reader = Reader::of(there(scene, PAGE));
    wait_until(|| scene.statistics().duplicates > 0);
    vec![reader]
}

fn check(scene: &Scene, outcome: Outcome<bool>, left: Seen) {
    if !outcome.acted {
        return;
    }
    outcome.readers_saw(left);
    assert!(outcome.meanwhile.iter().all(|seen| *seen == content(PAGE)), "{outcome:?}");
    for page in 0..PAGES {
        assert_eq!(read(there(scene, page)), content(page), "page {page}");
    }
    match left {
        Seen::Byte(0) => (0..PAGES).for_each(|page| assert_eq!(read(scene.at(page)), left, "page {page}")),
        Seen::Byte(_) => (0..PAGES).for_each(|page| assert_eq!(read(scene.at(page)), content(page))),
        Seen::Signal(_) => assert_eq!(read(scene.at(0)), left),
    }
    assert_eq!(scene.statistics().remaps, 1);
    clear(there(scene, 0), scene.memory.len());
}

races! {
    moved: MOVED;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}

races! {
    left_behind: COPIED;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    async_load: Async,
}
