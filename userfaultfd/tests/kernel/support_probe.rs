//! What the kernel offers.

use userfaultfd::{FeatureFlags, Support, UffdBuilder};

use crate::support::{self, child, has, proc, raw, require, test_name};

#[test]
fn support_is_what_the_handshake_answers() {
    require!();
    let descriptor = raw::unshaken(0);
    let (features, ioctls) = raw::api(&descriptor, FeatureFlags::empty()).unwrap();
    let support = Support::probe().unwrap();
    assert_eq!((support.features(), support.ioctls()), (features, ioctls));
    assert!(proc::fdinfo(&descriptor).ioctls.contains(support.ioctls()));
}

#[test]
fn kernel_offers_what_is_expected() {
    require!();
    let expected = support::expected_features();
    if has(test_name!(), support::EXPECTED_FEATURES, expected.is_some()) {
        assert_eq!(Support::probe().unwrap().features(), expected.unwrap());
    }
}

#[test]
fn every_feature_that_is_offered_can_be_enabled() {
    require!();
    let offered = Support::probe().unwrap().features();
    for known in FeatureFlags::known().iter().filter(|known| offered.contains(known.flag)) {
        if !support::has_features(test_name!(), known.flag) {
            continue; // EVENT_FORK without the capability
        }
        let features = match known.flag {
            FeatureFlags::RWP_ASYNC => FeatureFlags::RWP_ASYNC | FeatureFlags::RWP,
            feature => feature,
        };
        let uffd = UffdBuilder::new().require_features(features).create().unwrap();
        assert!(uffd.features().contains(features), "{features}");
        assert!(proc::fdinfo(&uffd).features.contains(features), "{features}");
    }
}

#[test]
fn support_shows_every_feature_once() {
    require!();
    let support = Support::probe().unwrap();
    let table = support.to_string();
    for known in FeatureFlags::known() {
        let mut rows = table.lines().filter(|row| row.split_whitespace().next() == Some(known.name));
        let row = rows.next().unwrap_or_else(|| panic!("no {} in {table}", known.name));
        assert_eq!(rows.next(), None, "{} twice in {table}", known.name);
        let here = if support.features().contains(known.flag) { "yes" } else { "no" };
        assert_eq!(row.split_whitespace().nth(2), Some(here), "{row}");
    }
}

#[test]
fn probing_leaves_no_descriptor_open() {
    require!();
    child::run_well(test_name!(), || {
        let before = proc::open_descriptors();
        Support::probe().unwrap();
        UffdBuilder::new().request_features(FeatureFlags::all()).create().unwrap();
        UffdBuilder::new().require_features(FeatureFlags::from_bits_retain(1 << 40)).create().unwrap_err();
        assert_eq!(proc::open_descriptors(), before);
    });
}
