//! `cargo xtask ci`: everything that has to pass before a change goes in. `.ci/run` is the same.

mod bare;
mod host;
mod require;
pub(crate) mod steps;
mod targets;
mod test;

use std::process::Command;
use std::time::{Duration, Instant};

use steps::STEPS;

/// How a step ended, if it didn't fail.
enum Outcome {
    Passed,
    Skipped(&'static str),
}

struct Step {
    name: &'static str,
    what: &'static str,
    run: fn() -> Result<Outcome, String>,
}

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

/// The cargo that runs this program, in the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(crate::root());
    command
}

/// Runs a command that shows its own output.
pub(crate) fn execute(command: &mut Command) -> Result<(), String> {
    println!("$ {}", display(command));
    let status = command.status().map_err(|e| format!("{}: {e}", display(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", display(command))) }
}

/// Runs a command for what it says.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{}: {e}", display(command)))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(format!("{}: {}: {}", display(command), output.status, errors.trim_end()))
    }
}

/// The command without the path of its program, and with the environment that is set for it.
pub(crate) fn display(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let mut words: Vec<_> = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={:?}", name.to_string_lossy(), value?)))
        .collect();
    words.push(program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned());
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}
