//! `cargo xtask ci`: everything that has to pass before a change goes in. `.ci/run` is the same.

mod bare;
mod deny;
mod host;
mod require;
mod servers;
mod step;
mod steps;
mod targets;
mod test;
mod words;

use std::time::{Duration, Instant};

use step::{Outcome, Step};
use steps::STEPS;

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let mut selected = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" => {
                STEPS.iter().for_each(|step| println!("{:10} {}", step.name, step.what));
                return Ok(());
            }
            "--step" => {
                let name = arguments.next().ok_or("--step needs a name: see --list")?;
                let step = STEPS.iter().find(|step| step.name == name);
                selected.push(step.ok_or_else(|| format!("no step `{name}`: see --list"))?);
            }
            _ => return Err(format!("ci: unexpected argument `{argument}`")),
        }
    }
    if selected.is_empty() {
        selected = STEPS.iter().collect();
    }

    // A failed step doesn't hide what the later ones have to say.
    let results: Vec<_> = selected.into_iter().map(|step| (step, timed(step))).collect();

    println!("\n{:10} {:>7}  result", "step", "seconds");
    for (step, (result, time)) in &results {
        let result = match result {
            Ok(Outcome::Passed) => "passed".to_owned(),
            Ok(Outcome::Skipped(reason)) => format!("SKIPPED: {reason}"),
            Err(message) => format!("FAILED: {message}"),
        };
        println!("{:10} {:7.1}  {result}", step.name, time.as_secs_f32());
    }
    let failed: Vec<_> = results.iter().filter(|(_, (r, _))| r.is_err()).map(|(s, _)| s.name).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

fn timed(step: &Step) -> (Result<Outcome, String>, Duration) {
    println!("\n=== {}: {}", step.name, step.what);
    let start = Instant::now();
    let result = (step.run)();
    match &result {
        Ok(Outcome::Passed) => {}
        Ok(Outcome::Skipped(reason)) => println!("SKIPPED: {reason}"),
        Err(message) => println!("FAILED: {message}"),
    }
    (result, start.elapsed())
}
