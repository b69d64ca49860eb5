//! `cargo xtask mutants`: small faults are put into the library, and a test has to notice each.
//!
//! Those in functions are all in one build, which a [switch] turns on one at a time; each of the others takes a build.

mod switch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::command::{cargo, display};
use crate::tree;

pub(crate) const USAGE: &str = "\
  mutants [--list] [PART]...
      Put the faults of xtask/mutants.toml into a copy of the library, turn them on one at a time, and run the tests that
      must notice it. Fails if one isn't noticed, or if one is noticed that was said to be invisible.
      --list      only say whether each fault fits the code, and which ones can't be noticed, and why
      PART        only those whose file contains it
";

/// Where the list lies in the workspace.
const PATH: &str = "xtask/mutants.toml";

/// How long the tests of a fault may run: those that hang have a watchdog of their own.
const LIMIT: Duration = Duration::from_secs(180);

/// Seconds that a single test may take. Many faults make one hang.
const TEST_SECONDS: &str = "30";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// A fault.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// Below userfaultfd/src.
    file: String,
    /// What stands there exactly once.
    from: String,
    /// What is put in its place.
    to: String,
    /// What `cargo test --package userfaultfd` is told to run, `--`, and parts of the names of tests, of which one at least
    /// must fail.
    test: String,
    /// Why no test can see it. Then the tests must pass.
    invisible: Option<String>,
}

impl Mutant {
    fn name(&self) -> String {
        let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        format!("{}: {} → {}", self.file, line(&self.from), line(&self.to))
    }

    /// The file with the fault in it.
    fn apply(&self, text: &str) -> Result<String, String> {
        match text.matches(&self.from).count() {
            1 => Ok(text.replacen(&self.from, &self.to, 1)),
            count => Err(format!("what it replaces stands there {count} times, not once")),
        }
    }

    /// What cargo is told of the binaries, and the parts of the names of tests.
    fn target_and_filters(&self) -> (&str, &str) {
        self.test.split_once(" -- ").unwrap_or((&self.test, ""))
    }

    /// What cargo is told.
    fn arguments(&self, subcommand: &[&str], test: &str) -> Vec<String> {
        let words = subcommand.iter().copied().chain(["--package=userfaultfd", "--quiet"]);
        words.chain(test.split(' ')).map(str::to_owned).collect()
    }

    /// The filters that match none of some tests, as `--list` prints them. What is filtered by one would always pass.
    fn filters_without_tests<'a>(&'a self, listed: &str) -> Vec<&'a str> {
        let names: Vec<_> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
        let filters = self.target_and_filters().1.split(' ');
        filters.filter(|filter| !names.iter().any(|name| name.contains(filter))).collect()
    }
}

/// What came of a fault.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Noticed,
    Unnoticed,
}

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let mut parts = Vec::new();
    let mut only_list = false;
    for argument in arguments {
        match argument.as_str() {
            "--list" => only_list = true,
            part if !part.starts_with('-') => parts.push(part),
            _ => return Err(format!("mutants: unexpected argument `{argument}`")),
        }
    }
    let mut mutants = read()?;
    mutants.retain(|mutant| parts.is_empty() || parts.iter().any(|part| mutant.file.contains(part)));
    if mutants.is_empty() {
        return Err(format!("{PATH} has none of these"));
    }
    if only_list {
        return list(&mutants);
    }
    let copy = Copy::make()?;
    let switched = copy.put_in(&mutants)?;
    println!("{} faults, {} of them in one build", mutants.len(), switched.len());
    let tests: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.test.as_str()).collect();
    println!("without a fault: {} sets of tests", tests.len());
    let of_test = |test| mutants.iter().find(|mutant| mutant.test == test).ok_or("a test of no fault");
    for test in &tests {
        copy.check_filters(of_test(*test)?)?;
    }
    for test in &tests {
        if copy.judge(of_test(*test)?, 0)? == Found::Noticed {
            return Err(format!("without a fault this fails: cargo test --package=userfaultfd {test}"));
        }
    }
    let start = Instant::now();
    let mut problems = Vec::new();
    for (number, mutant) in mutants.iter().enumerate() {
        let begin = Instant::now();
        let result = match switched.contains(&(number + 1)) {
            true => copy.judge(mutant, number + 1),
            false => copy.try_out(mutant),
        };
        let verdict = match (&result, &mutant.invisible) {
            (Ok(Found::Noticed), None) => "noticed".to_owned(),
            (Ok(Found::Unnoticed), Some(reason)) => format!("not noticed, as expected: {reason}"),
            (Ok(Found::Unnoticed), None) => "NOT NOTICED".to_owned(),
            (Ok(Found::Noticed), Some(_)) => "NOTICED, though it is said to be invisible".to_owned(),
            (Err(reason), _) => format!("FAILED: {reason}"),
        };
        let seconds = begin.elapsed().as_secs();
        println!("{}/{} {} ({seconds} s): {verdict}", number + 1, mutants.len(), mutant.name());
        let expected = if mutant.invisible.is_some() { Found::Unnoticed } else { Found::Noticed };
        if result != Ok(expected) {
            problems.push(format!("{}: {verdict}", mutant.name()));
        }
    }
    let invisible = mutants.iter().filter(|mutant| mutant.invisible.is_some()).count();
    println!(
        "\n{} faults in {} s: {} that must be noticed, {invisible} that can't be",
        mutants.len(),
        start.elapsed().as_secs(),
        mutants.len() - invisible
    );
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

fn read() -> Result<Vec<Mutant>, String> {
    let text = fs::read_to_string(tree::root().join(PATH)).map_err(|e| format!("{PATH}: {e}"))?;
    let list: List = toml::from_str(&text).map_err(|e| format!("{PATH}: {e}"))?;
    Ok(list.mutant)
}

fn list(mutants: &[Mutant]) -> Result<(), String> {
    let mut stale = Vec::new();
    for mutant in mutants {
        let text = text(&source(tree::root()), mutant)?;
        let fits = mutant.apply(&text).err();
        let note = match (&fits, &mutant.invisible) {
            (Some(problem), _) => format!(": STALE: {problem}"),
            (None, Some(reason)) => format!(": invisible: {reason}"),
            (None, None) => String::new(),
        };
        println!("{}{note}", mutant.name());
        stale.extend(fits.map(|_| mutant.name()));
    }
    if stale.is_empty() { Ok(()) } else { Err(format!("stale:\n{}", stale.join("\n"))) }
}

/// The library's source in a tree.
fn source(tree: &Path) -> PathBuf {
    tree.join("userfaultfd/src")
}

fn text(source: &Path, mutant: &Mutant) -> Result<String, String> {
    let path = source.join(&mutant.file);
    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// A copy of the workspace, where faults do no harm.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

impl Copy {
    fn make() -> Result<Self, String> {
        let folder = tree::scratch().join("mutants");
        let copy = Self { tree: folder.join("source"), target: folder.join("target") };
        tree::remove(&copy.tree)?;
        tree::copy(tree::root(), &copy.tree)?;
        Ok(copy)
    }

    fn cargo(&self, arguments: &[String]) -> Command {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut command = cargo(&arguments);
        command.current_dir(&self.tree).env("CARGO_TARGET_DIR", &self.target);
        command.env("USERFAULTFD_TEST_SECONDS", TEST_SECONDS).env("CARGO_PROFILE_DEV_DEBUG", "0");
        command.env("CARGO_PROFILE_TEST_DEBUG", "0");
        // Faults leave variables unused, and branches alike.
        command.env("CARGO_BUILD_RUSTFLAGS", "--cap-lints=allow");
        command
    }

    /// Puts in all faults that can be turned on. Returns their numbers: places in the list, from 1 on.
    fn put_in(&self, mutants: &[Mutant]) -> Result<BTreeSet<usize>, String> {
        let source = source(&self.tree);
        let mut files: BTreeMap<&str, Vec<(usize, &Mutant)>> = BTreeMap::new();
        for (index, mutant) in mutants.iter().enumerate() {
            let text = text(&source, mutant)?;
            mutant.apply(&text).map_err(|problem| format!("{}: {problem}", mutant.name()))?;
            // The program isn't the library.
            if !mutant.file.starts_with("bin/") {
                files.entry(&mutant.file).or_default().push((index + 1, mutant));
            }
        }
        let mut switched = BTreeSet::new();
        let write = |file: &str, text: &str| {
            fs::write(source.join(file), text).map_err(|error| format!("{file}: {error}"))
        };
        for (file, faults) in files {
            let original = text(&source, faults[0].1)?;
            let (text, numbers) =
                switch::put_in(&original, &faults).map_err(|error| format!("{file}: {error}"))?;
            write(file, &text)?;
            switched.extend(numbers);
        }
        let root = source.join("lib.rs");
        let text = fs::read_to_string(&root).map_err(|error| format!("{}: {error}", root.display()))?;
        write("lib.rs", &(text + switch::MODULE))?;
        Ok(switched)
    }

    /// Fails if a filter of a fault matches no test.
    fn check_filters(&self, mutant: &Mutant) -> Result<(), String> {
        let (target, _) = mutant.target_and_filters();
        let mut command = self.cargo(&mutant.arguments(&["test"], &format!("{target} -- --list")));
        let output =
            command.stderr(Stdio::inherit()).output().map_err(|e| format!("{}: {e}", display(&command)))?;
        if !output.status.success() {
            return Err(format!("{}: {}", display(&command), output.status));
        }
        match mutant.filters_without_tests(&String::from_utf8_lossy(&output.stdout))[..] {
            [] => Ok(()),
            ref filters => Err(format!("no test's name contains {filters:?}, of `{}`", mutant.test)),
        }
    }

    /// Puts a fault in that can't be turned on, and takes it out.
    fn try_out(&self, mutant: &Mutant) -> Result<Found, String> {
        let original = text(&source(&self.tree), mutant)?;
        let path = source(&self.tree).join(&mutant.file);
        let write = |text: &str| fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()));
        write(&mutant.apply(&original)?)?;
        let found = self.judge(mutant, 0);
        write(&original)?;
        found
    }

    /// Builds, which must work, and runs the tests with the fault of that number turned on.
    fn judge(&self, mutant: &Mutant, number: usize) -> Result<Found, String> {
        let mut build = self.cargo(&mutant.arguments(&["test", "--no-run"], &mutant.test));
        let output = build.output().map_err(|e| format!("{}: {e}", display(&build)))?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let first = errors.lines().find(|line| line.starts_with("error"));
            return Err(format!("it doesn't build: {}", first.unwrap_or("no reason given")));
        }
        let mut test = self.cargo(&mutant.arguments(&["test"], &mutant.test));
        test.env(switch::VARIABLE, number.to_string());
        test.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let mut child = test.spawn().map_err(|e| format!("{}: {e}", display(&test)))?;
        // One that doesn't end has been noticed.
        let passed = wait(&mut child)?.is_some_and(|status| status.success());
        Ok(if passed { Found::Unnoticed } else { Found::Noticed })
    }
}

/// Waits for the end of a child, and ends it with all that it has started if that takes too long.
fn wait(child: &mut Child) -> Result<Option<ExitStatus>, String> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let group = format!("-{}", child.id());
    let _ended = Command::new("kill").args(["-KILL", "--", &group]).status();
    child.wait().map_err(|e| e.to_string())?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_replaces_what_stands_there_once() {
        let mutant = Mutant {
            file: "a.rs".to_owned(),
            from: "a <\n    b".to_owned(),
            to: "a <= b".to_owned(),
            test: "--lib -- a:: b::".to_owned(),
            invisible: None,
        };
        assert_eq!(mutant.apply("if a <\n    b {}").as_deref(), Ok("if a <= b {}"));
        assert!(mutant.apply("if a < b {}").is_err() && mutant.apply("a <\n    b a <\n    b").is_err());
        assert_eq!(mutant.name(), "a.rs: a < b → a <= b");
        let arguments = mutant.arguments(&["test", "--no-run"], &mutant.test);
        assert_eq!(
            arguments,
            ["test", "--no-run", "--package=userfaultfd", "--quiet", "--lib", "--", "a::", "b::"]
        );
        let listed = "a::tests::one: test\nc::b: test\nb::bench: benchmark\n\n2 tests, 1 benchmark\n";
        assert_eq!(mutant.filters_without_tests(listed), ["b::"]);
        assert_eq!(mutant.filters_without_tests("b::a::two: test"), [""; 0]);
    }

    #[test]
    fn list_of_the_tree_names_files_and_tests() {
        for mutant in read().unwrap() {
            assert!(source(tree::root()).join(&mutant.file).is_file(), "{}", mutant.name());
            assert!(mutant.test.starts_with("--"), "{}", mutant.name());
            assert!(!mutant.target_and_filters().1.is_empty(), "{}", mutant.name());
            assert!(mutant.from != mutant.to && !mutant.from.is_empty(), "{}", mutant.name());
            assert!(mutant.invisible.is_none_or(|reason| reason.len() > 20), "a reason");
        }
    }
}
