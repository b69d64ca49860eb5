//! Rounds by turns, and what they come to.

use std::time::{Duration, Instant};

/// Does one round and tells what came out.
pub(crate) type Round = Box<dyn FnMut() -> f64>;

/// What is compared in one row, as it was set up. `None`: this one can't be had here.
pub(crate) type Setup = Vec<Option<Round>>;

/// For each contender, for each set-up, what each round told.
pub(crate) struct Samples(Vec<Vec<Vec<f64>>>);

impl Samples {
    /// Has contenders take turns, until the time is over and three set-ups were used. Each contender is first as
    /// often as any other.
    ///
    /// A set-up is good for so many rounds. The first of several is for warming up, and not counted.
    pub(crate) fn take(time: Duration, rounds: usize, mut setup: impl FnMut() -> Setup) -> Self {
        let start = Instant::now();
        let mut samples: Vec<Vec<Vec<f64>>> = Vec::new();
        let mut turn = 0;
        let (mut setups, warm_up) = (0, usize::from(rounds > 1));
        while setups < 3 || start.elapsed() < time {
            let mut contenders = setup();
            samples.resize_with(contenders.len(), Vec::new);
            for of_contender in &mut samples {
                of_contender.push(Vec::with_capacity(rounds));
            }
            for round in 0..rounds {
                for at in 0..contenders.len() {
                    let at = (at + turn) % contenders.len();
                    let Some(contender) = &mut contenders[at] else { continue };
                    let value = contender();
                    if round >= warm_up {
                        samples[at][setups].push(value);
                    }
                }
                turn += 1;
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
    /// With 95 % confidence the median is between these, whatever the distribution.
    pub(crate) range: [f64; 2],
}

impl Summary {
    /// Of the medians of set-ups, where there are enough of them; otherwise of all rounds.
    fn of_setups(setups: impl Iterator<Item = Vec<f64>>) -> Option<Self> {
        let setups: Vec<Vec<f64>> = setups.filter(|setup| !setup.is_empty()).collect();
        if setups.len() < 8 {
            return Self::of(setups.into_iter().flatten().collect());
        }
        Self::of(setups.into_iter().filter_map(Self::of).map(|setup| setup.median).collect())
    }

    /// Of values.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        // How many of n values lie below the median is binomial, with a deviation of √n / 2.
        let (middle, reach) = (values.len() / 2, (1.96 * (values.len() as f64).sqrt() / 2.0).ceil() as usize);
        Some(Self {
            median: values[middle],
            quartiles: [values[values.len() / 4], values[last - values.len() / 4]],
            range: [values[middle.saturating_sub(reach)], values[(middle + reach).min(last)]],
        })
    }
}
