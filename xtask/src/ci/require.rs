//! Every test puts a limit on its time and says what it needs: it begins with `require!`.

use std::fs;
use std::path::{Path, PathBuf};

use super::step::Outcome;

use crate::tree;

/// Where the packages lie that have tests.
const PACKAGES: [&str; 4] = ["examples", "userfaultfd", "userfaultfd-sys", "xtask"];

/// Files and folders whose tests don't begin with it, and why.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("examples/src", "sockets between two ends that one thread holds: nothing waits for another thread"),
    ("examples/tests", "`run` and `start` of its support limit the time of each program that is started"),
    ("userfaultfd-sys/tests", "constants and layouts are compared; nothing waits"),
    ("userfaultfd/tests/drop_in/interface.rs", "items are named with their types; nothing waits"),
    ("xtask", "texts are read and compared, and a program that refuses to start is started; nothing waits"),
];

pub(super) fn run() -> Result<Outcome, String> {
    let mut files = Vec::new();
    for package in PACKAGES {
        find(&tree::root().join(package), &mut files)?;
    }
    files.sort();
    let (mut tests, mut without, mut met) = (0, Vec::new(), Vec::new());
    for path in files {
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let path = path.strip_prefix(tree::root()).unwrap_or(&path);
        let exception = EXCEPTIONS.iter().position(|(exception, _)| path.starts_with(exception));
        for test in of(&text) {
            tests += 1;
            match exception {
                Some(exception) => met.push(exception),
                None if test.requires => {}
                None => without.push(format!("{}:{}: {}", path.display(), test.line, test.name)),
            }
        }
    }
    println!("{tests} tests, {} of them in files that are listed as exceptions", met.len());
    let stale = EXCEPTIONS.iter().enumerate().filter(|(i, _)| !met.contains(i));
    let stale: Vec<_> = stale.map(|(_, (exception, _))| *exception).collect();
    if !stale.is_empty() {
        return Err(format!("exceptions without a test: {}", stale.join(", ")));
    }
    if !without.is_empty() {
        let without = without.join("\n  ");
        return Err(format!(
            "tests that don't begin with `require!`, so that a hang has no end:\n  {without}"
        ));
    }
    Ok(Outcome::Passed)
}

/// Adds the files of Rust below a folder, but for what cargo made.
fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let error = |e| format!("{}: {e}", folder.display());
    for entry in fs::read_dir(folder).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.is_dir() {
            if !path.join("CACHEDIR.TAG").exists() {
                find(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// A function that the test harness runs.
#[derive(Debug, PartialEq, Eq)]
struct Test {
    name: String,
    /// Of the file, from 1: where its attribute stands.
    line: usize,
    /// Whether its first statement is `require!`.
    requires: bool,
}

/// Stands before a module of models for loom, which explores a bounded number of steps.
const MODELS: &str = "#[cfg(all(test, userfaultfd_loom))]\n";

/// Empties the lines of the models.
fn without_models(text: &str) -> String {
    let mut parts = text.split(MODELS);
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // A module at the top level ends with a brace of its own.
        let end = part.find("\n}\n").map_or(part.len(), |end| end + 1);
        let lines = MODELS.matches('\n').count() + part[..end].matches('\n').count();
        kept.extend(std::iter::repeat_n('\n', lines));
        kept.push_str(&part[end..]);
    }
    kept
}

/// The tests of a file, as rustfmt writes it.
fn of(text: &str) -> Vec<Test> {
    let text = without_models(text);
    let mut lines = text.lines().map(str::trim).enumerate();
    let mut tests = Vec::new();
    while let Some((i, line)) = lines.next() {
        // In a macro that makes several, `$(` stands before it.
        if line.trim_start_matches("$(") != "#[test]" {
            continue;
        }
        let Some((_, function)) = lines.find(|(_, line)| line.contains("fn ")) else { break };
        let name = function.split_once("fn ").map_or("", |(_, rest)| rest);
        let name = name.split('(').next().unwrap_or(name).to_owned();
        // The body may begin on the same line.
        let rest = function.split_once('{').map_or("", |(_, rest)| rest.trim());
        let first = Some(rest).filter(|rest| !rest.is_empty()).or_else(|| {
            lines.by_ref().map(|(_, line)| line).find(|line| !line.is_empty() && !line.starts_with("//"))
        });
        let call = first.and_then(|first| first.split_once("require!"));
        let requires = call.is_some_and(|(path, _)| path.is_empty() || path.ends_with("::"));
        tests.push(Test { name, line: i + 1, requires });
    }
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_statement_of_a_test_counts() {
        let text = "\
#[test]
fn good() {
    // Why it needs that.
    require!(FeatureFlags::MOVE);
}
fn helper() {}
    #[test]
    #[should_panic]
    fn by_path() {
        crate::support::require!();
    }
    $(#[test]
    fn $name() {
        let late = 1;
        require!();
    })*
#[test]
fn short() { require!() }
#[test]
fn without() { drop(1) }
#[test]
fn empty() {
}
#[cfg(all(test, userfaultfd_loom))]
mod loom_models {
    #[test]
    fn bounded() {}
}
#[test]
fn behind() {}
";
        let found = of(text);
        let seen: Vec<_> = found.iter().map(|test| (&*test.name, test.line, test.requires)).collect();
        let expected = [
            ("good", 1, true),
            ("by_path", 7, true),
            ("$name", 12, false),
            ("short", 17, true),
            ("without", 19, false),
            ("empty", 21, false),
            ("behind", 29, false),
        ];
        assert_eq!(seen, expected);
    }
}
