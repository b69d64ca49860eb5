//! One fault on a 4 KiB page, answered in each delivery of the pager and by bare loops, each measured by criterion.
//!
//! `cargo bench -p userfaultfd --bench pager`. They are measured one after the other here, so that a machine that isn't
//! quiet makes a difference where there is none: ratios are what the benchmark `report` is for.

#[path = "contenders/mod.rs"]
#[expect(dead_code, reason = "the report uses the rest")]
mod contenders;

use std::time::Duration;

use criterion::Criterion;

use crate::contenders::{CONTENDERS, FAULTS, ROUNDS};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("fault");
    for (name, make) in CONTENDERS {
        // Made only if it is chosen.
        group.bench_function(*name, |bencher| {
            bencher.iter_custom(|faults| {
                let rounds = (faults as usize).div_ceil(FAULTS);
                let mut time = Duration::ZERO;
                for first in (0..rounds).step_by(ROUNDS) {
                    let mut contender = make().expect("a contender");
                    time += (first..rounds.min(first + ROUNDS)).map(|_| contender.round()).sum::<Duration>();
                }
                time.mul_f64(faults as f64 / (rounds * FAULTS) as f64)
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
