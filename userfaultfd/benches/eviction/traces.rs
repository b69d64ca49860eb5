//! Accesses to pages, in order.

use crate::random::Random;

/// Pages of which the `n`th most popular is accessed in proportion to `n` to the power of minus `skew`.
pub(crate) struct Zipf {
    sums: Vec<f64>,
    pages: Vec<u32>,
}

impl Zipf {
    pub(crate) fn new(count: usize, skew: f64, random: &mut Random) -> Self {
        let mut sum = 0.0;
        let sums = (1..=count).map(|rank| {
            sum += (rank as f64).powf(-skew);
            sum
        });
        Self {
            sums: sums.collect(),
            pages: random.shuffled(count).into_iter().map(|page| page as u32).collect(),
        }
    }

    pub(crate) fn next(&self, random: &mut Random) -> u32 {
        let at = random.fraction() * self.sums.last().copied().unwrap_or_default();
        self.pages[self.sums.partition_point(|sum| *sum <= at).min(self.pages.len() - 1)]
    }
}

/// A trace.
pub(crate) struct Trace {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) accesses: Vec<u32>,
    /// Pages below this number are a hot set, whose misses are counted apart.
    pub(crate) hot: u32,
}

/// All traces over `pages` pages, for `frames` frames, with `len` accesses.
pub(crate) fn all(pages: usize, frames: usize, len: usize) -> Vec<Trace> {
    let mut random = Random::new(1);
    let mut traces = Vec::new();
    let mut add = |name, what, hot, accesses: Vec<u32>| {
        assert!(accesses.iter().all(|page| (*page as usize) < pages));
        traces.push(Trace { name, what, accesses, hot });
    };
    for (name, skew) in [("zipf 0.8", 0.8), ("zipf 1.0", 1.0)] {
        let zipf = Zipf::new(pages, skew, &mut random);
        add(name, "independent accesses, scattered", 0, (0..len).map(|_| zipf.next(&mut random)).collect());
    }
    add("scan", "all pages in order, again and again", 0, (0..len).map(|at| (at % pages) as u32).collect());
    let around = frames * 21 / 20;
    add(
        "loop",
        "5 % more pages than memory, again and again",
        0,
        (0..len).map(|at| (at % around) as u32).collect(),
    );
    let zipf = Zipf::new(pages, 1.0, &mut random);
    let mut next = 0;
    let mixed = (0..len).map(|_| {
        if random.below(4) > 0 {
            return zipf.next(&mut random);
        }
        next = (next + 1) % pages;
        next as u32
    });
    add("mixed", "three quarters zipf 1.0, a quarter one scan", 0, mixed.collect());
    let phase = frames * 20;
    let set = frames * 4 / 5;
    let zipf = Zipf::new(set, 0.8, &mut random);
    let phases = (0..len).map(|at| {
        let first = (at / phase) * set / 2;
        ((first + zipf.next(&mut random) as usize) % pages) as u32
    });
    add(
        "phases",
        "zipf 0.8 over a set of 0.8 of memory, half of which changes at times",
        0,
        phases.collect(),
    );
    traces.push(hot_set(pages, frames, len));
    traces
}

/// A set of half the memory at random, beside a scan of all the rest.
pub(crate) fn hot_set(pages: usize, frames: usize, len: usize) -> Trace {
    let (hot, mut random) = (frames / 2, Random::new(2));
    let mut next = hot;
    let accesses = (0..len).map(|_| {
        if random.below(2) == 0 {
            return random.below(hot) as u32;
        }
        next = if next + 1 == pages { hot } else { next + 1 };
        next as u32
    });
    Trace {
        name: "hot set",
        what: "half of memory at random, beside an endless scan",
        accesses: accesses.collect(),
        hot: hot as u32,
    }
}
