//! The kernel's interface through the library and by hand, each measured by criterion.
//!
//! `cargo bench -p userfaultfd --bench interface`. The two ways of an operation are measured one after the other here, so
//! that a machine that isn't quiet makes a difference where there is none: the ratio of the two is what the benchmark
//! `overhead` is for.

mod pairs;

use std::time::Duration;

use criterion::{Bencher, Criterion};

use crate::pairs::{Case, DECODING, OPERATIONS, Pair, Way};

fn measure(bencher: &mut Bencher<'_>, pair: &mut dyn Pair, way: Way) {
    bencher.iter_custom(|operations| {
        let rounds = operations.div_ceil(u64::from(pair.count()));
        let time: Duration = (0..rounds).map(|_| pair.round(way)).sum();
        time.mul_f64(operations as f64 / (rounds * u64::from(pair.count())) as f64)
    });
}

fn measure_all(criterion: &mut Criterion, cases: &[Case], by_hand: &str) {
    for (name, make) in cases {
        let mut pair = make();
        let mut group = criterion.benchmark_group(*name);
        group.bench_function("userfaultfd", |bencher| measure(bencher, &mut *pair, Way::Library));
        group.bench_function(by_hand, |bencher| measure(bencher, &mut *pair, Way::ByHand));
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    measure_all(&mut criterion, OPERATIONS, "by hand");
    measure_all(&mut criterion, DECODING, "read(2) alone");
    criterion.final_summary();
}
