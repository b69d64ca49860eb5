//! Another thread faults on the same page: it joins the load, and the source is read once.

use super::harness::{Act, PAGE, Reader, Scene, Seen, content, races};
use crate::FeatureFlags;
use crate::support::proc::wait_until;
use crate::sync_point::Point;

static SECOND: Act<()> = Act {
    features: FeatureFlags::empty(),
    act: |_| {},
    meanwhile: another,
    check: |scene, outcome| {
        outcome.readers_saw(content(PAGE));
        assert_eq!(outcome.meanwhile, [content(PAGE)]);
        scene.others_are(content);
        let reads: Vec<_> = (0..super::harness::PAGES).map(|page| scene.source.reads(page)).collect();
        assert!(reads.iter().all(|reads| *reads == 1), "{reads:?}");
    },
};

fn another(scene: &Scene, point: Point) -> Vec<Reader> {
    let reader = Reader::of(scene.at(PAGE));
    match point {
        Point::AfterRead | Point::AfterStart | Point::BeforeFill | Point::BeforeMap => {
            wait_until(|| scene.statistics().duplicates > 0);
        }
        // It is there, though the pager is busy with it still.
        Point::AfterKept
        | Point::BeforeClear
        | Point::BeforeAdopt
        | Point::AfterAdd
        | Point::BeforeForeign
        | Point::BeforeLend
        | Point::Watch(_)
        | Point::Evict(_) => {
            unreachable!("they aren't in the life of a fault")
        }
        Point::AfterFill | Point::BeforeWake => assert_eq!(reader.wait(), Seen::Byte(PAGE as u8 + 1)),
    }
    vec![reader]
}

races! {
    joins: SECOND;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
