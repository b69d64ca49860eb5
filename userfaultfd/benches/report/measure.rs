//! Rounds by turns, and what they come to.

use std::time::{Duration, Instant};

use crate::random::Random;

/// Does one round and tells what came out.
pub(crate) type Round = Box<dyn FnMut() -> f64>;

/// What is compared in one row, as it was set up. `None`: this one can't be had here.
pub(crate) type Setup = Vec<Option<Round>>;

/// Set-ups of a row that is measured: the fewest whose least and greatest median enclose the true one with 95 %.
const SETUPS: usize = 6;

/// For each contender, for each set-up, what each round told.
pub(crate) struct Samples(Vec<Vec<Vec<f64>>>);

impl Samples {
    /// Has contenders take turns in random order, until the time is over and [`SETUPS`] set-ups were used; without
    /// time, one.
    ///
    /// Rounds for which a set-up is good. The first of several is for warming up, and not counted.
    pub(crate) fn take(time: Duration, rounds: usize, mut setup: impl FnMut() -> Setup) -> Self {
        let (start, least) = (Instant::now(), if time.is_zero() { 1 } else { SETUPS });
        let mut samples: Vec<Vec<Vec<f64>>> = Vec::new();
        let mut random = Random::of_this_run();
        let (mut setups, warm_up) = (0, usize::from(rounds > 1));
        while setups < least || start.elapsed() < time {
            let mut contenders = setup();
            samples.resize_with(contenders.len(), Vec::new);
            for of_contender in &mut samples {
                of_contender.push(Vec::with_capacity(rounds));
            }
            for round in 0..rounds {
                for at in random.shuffled(contenders.len()) {
                    let Some(contender) = &mut contenders[at] else { continue };
                    let value = contender();
                    if round >= warm_up {
                        samples[at][setups].push(value);
                    }
                }
                // Long rounds end with the time, not with the set-up.
                if round > warm_up + 2 && start.elapsed() > time.mul_f64(1.2) {
                    break;
                }
            }
            setups += 1;
        }
        Self(samples)
    }

    /// What one contender came to.
    pub(crate) fn of(&self, contender: usize) -> Option<Summary> {
        Summary::of_setups(self.0[contender].iter().cloned())
    }

    /// How two contenders compare, by the rounds that were neighbours.
    pub(crate) fn ratio(&self, first: usize, second: usize) -> Option<Summary> {
        let setups = self.0[first].iter().zip(&self.0[second]);
        Summary::of_setups(
            setups.map(|(first, second)| first.iter().zip(second).map(|(a, b)| a / b).collect()),
        )
    }
}

/// Of many values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    /// Half of the values are between these.
    pub(crate) quartiles: [f64; 2],
    /// With 95 % confidence the median is between these, whatever the distribution. `None`: there are too few values.
    pub(crate) range: Option<[f64; 2]>,
}

impl Summary {
    /// Of the medians of set-ups. Rounds of one set-up have much in common, so they don't count as several values.
    fn of_setups(setups: impl Iterator<Item = Vec<f64>>) -> Option<Self> {
        Self::of(setups.filter_map(Self::of).map(|setup| setup.median).collect())
    }

    /// Of values that have nothing to do with each other.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let range = outside(values.len()).map(|outside| [values[outside], values[last - outside]]);
        let quartiles = [values[values.len() / 4], values[last - values.len() / 4]];
        Some(Self { median: values[values.len() / 2], quartiles, range })
    }
}

/// Of a number of sorted values, how many at each end can be left out so that those that are left enclose the median with 95 %
/// confidence. `None`: not even all of them do.
fn outside(values: usize) -> Option<usize> {
    // How many of n values lie below the median is binomial: exactly k do with a probability of (n over k) / 2^n.
    let mut exactly = 0.5_f64.powi(i32::try_from(values).ok()?);
    let (mut at_most, mut outside) = (exactly, None);
    for below in 0..values / 2 {
        if 2.0 * at_most > 0.05 {
            break;
        }
        outside = Some(below);
        exactly *= (values - below) as f64 / (below + 1) as f64;
        at_most += exactly;
    }
    outside
}

/// The program has no tests of its own: it checks what it says about itself whenever it starts.
pub(crate) fn check() {
    let known =
        [(1, None), (5, None), (6, Some(0)), (8, Some(0)), (9, Some(1)), (11, Some(1)), (12, Some(2))];
    for (values, expected) in known.into_iter().chain([(20, Some(5)), (100, Some(39))]) {
        assert_eq!(outside(values), expected, "{values} values");
    }
    let mut order = Random::of_this_run().shuffled(9);
    order.sort_unstable();
    assert!(order.into_iter().eq(0..9));
}
