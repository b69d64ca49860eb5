//! A contender of the latency ladder, the one that is named by the argument, for the report: or for strace and perf.
//!
//! For each line on the standard input it has a round of faults answered, and tells the nanoseconds that took.

#[path = "../../contenders/mod.rs"]
#[expect(dead_code, reason = "the report uses the rest")]
mod contenders;

use std::io;

use crate::contenders::{CONTENDERS, ROUNDS};

fn main() -> Result<(), String> {
    let name = std::env::args().nth(1).unwrap_or_default();
    let Some((_, make)) = CONTENDERS.iter().find(|(known, _)| *known == name) else {
        let names: Vec<_> = CONTENDERS.iter().map(|(name, _)| *name).collect();
        return Err(format!("no contender is named {name:?}; there are {names:?}"));
    };
    let mut lines = io::stdin().lines();
    loop {
        let mut contender = make()?;
        for _ in 0..ROUNDS {
            let Some(line) = lines.next() else { return Ok(()) };
            line.map_err(|error| error.to_string())?;
            println!("{}", contender.round().as_nanos());
        }
    }
}
