//! What the library costs above the same thing by hand: a table of ratios.
//!
//! `cargo bench -p userfaultfd --bench overhead [-- NAME]`. Rounds of the two ways alternate, a fraction of a
//! millisecond each, so whatever else the machine does meets both. Two neighbours give a ratio. Where memory happens
//! to lie makes a difference, too, so everything is set up anew many times; a set-up counts with the median of its ratios.
//! The table tells the median of the set-ups, the range that it is in with 95 % confidence, and the ratio of the
//! fastest rounds of all, which what else the machine does can't slow down. For decoding it tells the difference per
//! event in the same manner. The first line measures one way against itself: what it is away from 1 is not to be
//! believed of the others.
//!
//! All threads share one CPU, so that a fault takes the shortest and steadiest way.

mod pairs;

use std::time::{Duration, Instant};

use crate::pairs::{Case, DECODING, OPERATIONS, Pair, Way};

/// How often a line of the table is set up.
const SETUPS: usize = 40;

/// How long a set-up is measured.
const TIME: Duration = Duration::from_millis(100);

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let filter = args.iter().find(|arg| !arg.starts_with('-')).map_or("", String::as_str);
    let chosen = |(name, _): &&Case| name.contains(filter);
    share_one_cpu();

    // Cargo says what it runs this for. A test only looks whether everything works.
    if !args.iter().any(|arg| arg == "--bench") {
        for (name, make) in OPERATIONS.iter().chain(DECODING).filter(chosen) {
            alternate(&mut *make(), LIBRARY_AND_HAND, Duration::ZERO);
            println!("{name}: both ways work, not measured");
        }
        return;
    }

    println!("{:<26}{:>9}{:>10}{:>10}  {:<16}fastest", "ns each", "library", "by hand", "ratio", "95 %");
    let control = [("(by hand, twice)", OPERATIONS[0].1)];
    let rows = control.iter().map(|case| (case, [Way::ByHand; 2]));
    for (case, ways) in rows.chain(OPERATIONS.iter().map(|case| (case, LIBRARY_AND_HAND))) {
        if chosen(&case) {
            let [ratio, library, by_hand] = measure(case, ways, |library, by_hand| library / by_hand);
            println!(
                "{:<26}{:>9.1}{:>10.1}{:>8.3} ×  {:.3} … {:<7.3} {:.3}",
                case.0,
                library.median,
                by_hand.median,
                ratio.median,
                ratio.low,
                ratio.high,
                library.least / by_hand.least
            );
        }
    }

    println!("\n{:<26}{:>9}{:>10}{:>10}  {:<16}fastest", "ns an event", "all", "read(2)", "decoding", "95 %");
    for case in DECODING.iter().filter(chosen) {
        let [decoding, all, read] = measure(case, LIBRARY_AND_HAND, |all, read| all - read);
        println!(
            "{:<26}{:>9.2}{:>10.2}{:>10.2}  {:<5.2} … {:<8.2} {:.2}",
            case.0,
            all.median,
            read.median,
            decoding.median,
            decoding.low,
            decoding.high,
            all.least - read.least
        );
    }
}

const LIBRARY_AND_HAND: [Way; 2] = [Way::Library, Way::ByHand];

/// Compares two ways by `compare`. Over all set-ups: the comparison, and nanoseconds for an operation of each way.
fn measure(case: &Case, ways: [Way; 2], compare: fn(f64, f64) -> f64) -> [Summary; 3] {
    let mut summaries: [Vec<Summary>; 3] = Default::default();
    for _ in 0..SETUPS {
        let rounds = alternate(&mut *(case.1)(), ways, TIME);
        summaries[0].push(Summary::of(rounds.iter().map(|[first, second]| compare(*first, *second))));
        summaries[1].push(Summary::of(rounds.iter().map(|[first, _]| *first)));
        summaries[2].push(Summary::of(rounds.iter().map(|[_, second]| *second)));
    }
    summaries.map(|of_setups| {
        let least = of_setups.iter().map(|setup| setup.least).fold(f64::INFINITY, f64::min);
        Summary { least, ..Summary::of(of_setups.iter().map(|setup| setup.median)) }
    })
}

/// Does rounds of both ways by turns, as long as `time` lasts and three times at least. Nanoseconds for an operation.
fn alternate(pair: &mut dyn Pair, ways: [Way; 2], time: Duration) -> Vec<[f64; 2]> {
    let count = f64::from(pair.count());
    let mut round = |way| pair.round(way).as_nanos() as f64 / count;
    let _cold = ways.map(&mut round);
    let start = Instant::now();
    let mut rounds = Vec::new();
    while rounds.len() < 3 || start.elapsed() < time {
        // Each way is first as often as second.
        rounds.push(if rounds.len() % 2 == 0 {
            ways.map(&mut round)
        } else {
            let [second, first] = [ways[1], ways[0]].map(&mut round);
            [first, second]
        });
    }
    rounds
}

/// A median, the range that it is in with 95 % confidence whatever the distribution, and the least value.
struct Summary {
    median: f64,
    low: f64,
    high: f64,
    least: f64,
}

impl Summary {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        // How many of n values lie below the median is binomial, with a deviation of √n / 2.
        let (middle, reach) = (values.len() / 2, (1.96 * (values.len() as f64).sqrt() / 2.0).ceil() as usize);
        Self {
            median: values[middle],
            low: values[middle.saturating_sub(reach)],
            high: values[(middle + reach).min(values.len() - 1)],
            least: values[0],
        }
    }
}

/// Keeps this thread, and those that it will start, on the CPU that it is on.
fn share_one_cpu() {
    // SAFETY: touches no memory.
    let cpu = unsafe { libc::sched_getcpu() };
    // SAFETY: a set of CPUs is an array of bits, and all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let cpu = usize::try_from(cpu).expect("a CPU");
    // SAFETY: the kernel has no more CPUs than the set has room for.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is borrowed for the call.
    let pinned = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(pinned, 0, "{}", std::io::Error::last_os_error());
}
