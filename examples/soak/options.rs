//! What this program is told.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::SLOTS;
use crate::target::Orders;

pub(crate) const USAGE: &str = "usage: cargo run --release --example soak -- [--seconds N] [--seed N] [--processes N] [--threads N] [--limit N]";

#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) time: Duration,
    pub(crate) seed: u64,
    pub(crate) processes: usize,
    /// Of each process.
    pub(crate) threads: usize,
    /// An act that takes longer hangs.
    pub(crate) limit: Duration,
}

impl Options {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let mut options = Self {
            time: Duration::from_secs(60),
            seed: now % 1_000_000,
            processes: 3,
            threads: 4,
            limit: Duration::from_secs(30),
        };
        while let Some(argument) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{argument} needs a number"))?;
            let number: u64 = value.parse().map_err(|error| format!("{argument} {value}: {error}"))?;
            match argument.as_str() {
                "--seconds" => options.time = Duration::from_secs(number),
                "--seed" => options.seed = number,
                "--limit" => options.limit = Duration::from_secs(number),
                "--processes" if (1..=64).contains(&number) => options.processes = number as usize,
                "--threads" if (1..=SLOTS as u64 / 2).contains(&number) => options.threads = number as usize,
                _ => return Err(format!("{argument} {value} is none of the options")),
            }
        }
        Ok(options)
    }
}

/// The arguments of a target.
pub(crate) fn to_arguments(orders: &Orders) -> [String; 8] {
    let Orders { seed, process, life, threads, time, kernel, forks, huge_pages } = *orders;
    let numbers = [process as u64, life as u64, threads as u64, time.as_millis() as u64];
    let [process, life, threads, time] = numbers.map(|number| number.to_string());
    let [kernel, forks] = [kernel, forks].map(|flag| u64::from(flag).to_string());
    [seed.to_string(), process, life, threads, time, kernel, forks, huge_pages.to_string()]
}

/// What [`to_arguments`] made arguments of.
pub(crate) fn orders(arguments: impl Iterator<Item = String>) -> Option<Orders> {
    let numbers: Option<Vec<u64>> = arguments.map(|argument| argument.parse().ok()).collect();
    let [seed, process, life, threads, time, kernel, forks, huge_pages] = *numbers?.first_chunk()?;
    let [process, life, threads, huge_pages] =
        [process, life, threads, huge_pages].map(|number| number as usize);
    let (time, kernel, forks) = (Duration::from_millis(time), kernel != 0, forks != 0);
    Some(Orders { seed, process, life, threads, time, kernel, forks, huge_pages })
}
