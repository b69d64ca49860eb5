//! The README's test command, told what this machine has: a test that is skipped for what is there is a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::host::Host;
use super::step::Outcome;
use crate::command::{cargo, display};
use crate::kernels::table::{Expectation, Features, Table};

/// By need, the tests that were skipped for it.
type Skips = BTreeMap<String, BTreeSet<String>>;

pub(super) fn run() -> Result<Outcome, String> {
    judge(cargo(&["test", "--workspace"]))
}

/// Runs tests, which are told what this machine has, and looks why any was skipped.
pub(super) fn judge(mut command: Command) -> Result<Outcome, String> {
    let (table, features) = (Table::read()?, Features::read()?);
    let host = Host::ask(&table.needs)?;
    let expectation = table.expect_here(&host.release, host.features, &host.unmet);
    let unmet = if host.unmet.is_empty() { "nothing".to_owned() } else { host.unmet.join(", ") };
    println!("Linux {}, features {:#x}, lacking: {unmet}", host.release, host.features);

    // Skips are told past the test harness, on the standard error.
    command.envs(expectation.environment()).stderr(Stdio::piped());
    let shown = display(&command);
    println!("$ {shown}");
    let error = |e| format!("{shown}: {e}");
    let mut child = command.spawn().map_err(error)?;
    let mut skips = Skips::new();
    let mut problems = Vec::new();
    if let Some(errors) = child.stderr.take() {
        for line in BufReader::new(errors).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            eprintln!("{line}");
            problems.extend(note(&mut skips, &line));
        }
    }
    let status = child.wait().map_err(error)?;
    println!();
    for (need, tests) in &skips {
        println!("skipped for {need}: {}", tests.len());
    }
    problems.extend(unexpected(&skips, &expectation, &features));
    if !status.success() {
        problems.push(format!("{shown}: {status}"));
    }
    if problems.is_empty() { Ok(Outcome::Passed) } else { Err(problems.join("\n  ")) }
}

/// Notes a line that tells of a skip. Returns what is wrong with it.
fn note(skips: &mut Skips, line: &str) -> Option<String> {
    let skip = line.strip_prefix("SKIP ")?;
    match skip.split_once(": needs ") {
        Some((test, need)) => {
            skips.entry(need.to_owned()).or_default().insert(test.to_owned());
            None
        }
        None => Some(format!("`{line}` is not understood")),
    }
}

/// Skips for what this machine should have.
fn unexpected(skips: &Skips, expectation: &Expectation, features: &Features) -> Vec<String> {
    let wrong = skips.iter().filter(|(need, _)| !expectation.allows(need, features));
    let describe = |(need, tests): (&String, &BTreeSet<String>)| {
        let tests: Vec<_> = tests.iter().map(String::as_str).collect();
        format!(
            "skipped for {need}, which this machine has, or which xtask/kernels.toml doesn't list as lacking: {}",
            tests.join(", ")
        )
    };
    wrong.map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skip_for_what_is_there_is_a_failure() {
        let (table, features) = (Table::read().unwrap(), Features::read().unwrap());
        let mut skips = Skips::new();
        for line in [
            "warning: SKIP is a word",
            "SKIP a::b: needs MOVE",
            "SKIP a::c: needs MOVE",
            "SKIP a::c: needs swap",
            "SKIP a::d: needs hugetlb",
            "SKIP a::e: needs transparent huge pages",
            "SKIP a::f: needs something new",
        ] {
            assert_eq!(note(&mut skips, line), None);
        }
        assert!(note(&mut skips, "SKIP a::b for MOVE").is_some());
        assert_eq!(skips["MOVE"].len(), 2);
        let unmet = vec!["swap".to_owned()];
        let without_move = table.expect_here("6.6.1", 0xffff, &unmet);
        let found = unexpected(&skips, &without_move, &features);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("hugetlb") && found[0].contains("a::d"), "{found:?}");
        assert!(found[1].contains("something new"), "{found:?}");
        let with_move = table.expect_here("6.8.1", 0x1ffff, &unmet);
        let found = unexpected(&skips, &with_move, &features);
        assert!(found.len() == 3 && found[0].contains("MOVE, which") && found[0].contains("a::b, a::c"));
    }
}
