//! `cargo xtask cross`: the crates on other targets: compiled, and tested as far as that takes no kernel.

mod emulator;
mod report;
mod rust;
mod targets;
mod toolchain;
mod zig;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use emulator::Emulator;
use report::{Cell, Outcome, Row};
use rust::Library;
pub(crate) use rust::{HELP, Rust};
use targets::Target;
pub(crate) use toolchain::Toolchain;

use crate::tree;

pub(crate) const USAGE: &str = "\
  cross [TARGET]... [--list] [--require] [--no-tests]
      Check both crates and all examples for other targets, with a current Rust and with the oldest that is promised,
      and run the tests that take no kernel in an emulator. TARGET is a target of Rust or its architecture; all if none
      is named. Compilers, standard libraries and emulators are Debian packages, linkers Python packages, fetched into
      the target folder.
      --list      only show the targets
      --require   what can't be had is a failure
      --no-tests  check only, which takes a tenth of the time
";

/// What a user of the workspace's crates compiles.
const CHECKED: [&str; 9] = [
    "--quiet",
    "--package",
    "userfaultfd-sys",
    "--package",
    "userfaultfd",
    "--package",
    "userfaultfd-examples",
    "--lib",
    "--examples",
];

/// The tests of layouts and numbers, and of what is decided without a kernel.
const TESTED: [&str; 9] = [
    "--quiet",
    "--no-run",
    "--package",
    "userfaultfd-sys",
    "--package",
    "userfaultfd",
    "--lib",
    "--test=abi",
    "--message-format=json-render-diagnostics",
];

/// A tool chain that links static programs for a target of musl, for instance `s390x-unknown-linux-musl`.
pub(crate) fn toolchain(target: &str) -> Result<Toolchain, String> {
    Toolchain::linking(target, &Rust::current()?)
}

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let (mut names, mut require, mut tests) = (Vec::new(), false, true);
    for argument in arguments {
        match argument.as_str() {
            "--list" => {
                list();
                return Ok(());
            }
            "--require" => require = true,
            "--no-tests" => tests = false,
            name if !name.starts_with('-') => names.push(name.to_owned()),
            _ => return Err(format!("cross: unexpected argument `{argument}`")),
        }
    }
    let targets = targets::select(&names)?;
    let (current, oldest) = (Rust::current(), Rust::oldest());
    for rust in [&current, &oldest] {
        match rust {
            Ok(rust) => println!("Rust {}: {}", rust.version, rust.origin),
            Err(reason) => println!("{reason}"),
        }
    }
    let mut rows = Vec::new();
    for target in targets {
        println!("\n=== {}", target.name);
        let checked = timed(|| check(target, &current));
        let oldest = timed(|| check(target, &oldest));
        let tests = match tests {
            true => timed(|| test(target)),
            false => Cell { outcome: Outcome::NotAsked, seconds: 0.0 },
        };
        rows.push(Row { target: target.name, check: checked, oldest, tests });
    }
    let version = |rust: &Result<Rust, String>| rust.as_ref().map_or("?".to_owned(), |r| r.version.clone());
    println!("\n{}", report::table([&version(&current), &version(&oldest)], &rows));
    report::verdict(&rows, require)
}

fn list() {
    println!("{:32} tests for", "target");
    for target in targets::TARGETS {
        let tests =
            target.tests.map_or_else(|reason| format!("- ({reason})"), |tests| tests.target.to_owned());
        println!("{:32} {tests}", target.name);
    }
}

fn timed(act: impl FnOnce() -> Outcome) -> Cell {
    let start = Instant::now();
    let outcome = act();
    Cell { outcome, seconds: start.elapsed().as_secs_f32() }
}

fn check(target: &Target, rust: &Result<Rust, String>) -> Outcome {
    let toolchain =
        rust.as_ref().map_err(Clone::clone).and_then(|rust| Toolchain::checking(target.name, rust));
    let toolchain = match toolchain {
        Ok(toolchain) => toolchain,
        Err(reason) => return Outcome::NotAvailable(reason),
    };
    match build(&mut toolchain.cargo("check", &CHECKED)) {
        Ok(_) if toolchain.library() == Library::Prebuilt => Outcome::Checked("prebuilt"),
        Ok(_) => Outcome::Checked("source"),
        Err(outcome) => outcome,
    }
}

fn test(target: &Target) -> Outcome {
    let prepare = || {
        let tests = target.tests?;
        Ok((toolchain(tests.target)?, Emulator::of(tests.qemu)?))
    };
    let (toolchain, emulator) = match prepare() {
        Ok(tools) => tools,
        Err(reason) => return Outcome::NotAvailable(reason),
    };
    let binaries = match build(&mut toolchain.cargo("test", &TESTED)) {
        Ok(messages) => messages.lines().filter_map(program).collect::<Vec<_>>(),
        Err(outcome) => return outcome,
    };
    let (mut passed, mut failed, mut problems) = (0, 0, Vec::new());
    for (name, path) in &binaries {
        let log = tree::scratch().join("cross").join(format!("{}-{}.log", target.name, name));
        match emulator.test(path, &log) {
            Ok((good, bad)) => {
                (passed, failed) = (passed + good, failed + bad);
                println!("{name}: {good} passed, {bad} failed");
                if bad > 0 {
                    problems.push(format!("{}: {bad} failed: {}", name, log.display()));
                }
            }
            Err(reason) => problems.push(format!("{name}: {reason}")),
        }
    }
    if passed == 0 && problems.is_empty() {
        problems.push("no test ran".to_owned());
    }
    Outcome::Tested { passed, failed, problems }
}

/// Runs cargo for its messages. What doesn't compile is a failure if it is the workspace's, and a standard library
/// that isn't to be had otherwise.
fn build(command: &mut Command) -> Result<String, Outcome> {
    let shown = crate::command::display(command);
    println!("$ {shown}");
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|e| Outcome::NotAvailable(format!("{shown}: {e}")))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    eprint!("{errors}");
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(report::failure(&errors))
}

/// The program that one of cargo's messages is about, and a name for it.
fn program(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let path = message["executable"].as_str()?.into();
    Some((message["target"]["name"].as_str()?.to_owned(), path))
}
