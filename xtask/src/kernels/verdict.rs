//! What came of a guest's tests, from what it said.

use std::collections::{BTreeMap, BTreeSet};

use guest_init::{Ending, Record, Transcript, User};

use super::table::{Expectation, Features};

/// What came of one binary, run by one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) user: User,
    pub(super) binary: String,
    pub(super) passed: usize,
    pub(super) failed: BTreeSet<String>,
    /// By test, what it was skipped for, in whole or in part.
    pub(super) skipped: BTreeMap<String, BTreeSet<String>>,
    pub(super) milliseconds: u64,
    /// What is wrong beside tests that failed.
    pub(super) problems: Vec<String>,
    pub(super) output: Vec<String>,
}

/// What came of a guest.
#[derive(Clone, Debug, Default)]
pub(super) struct Verdict {
    /// The release, as uname(2) has it.
    pub(super) release: String,
    pub(super) outcomes: Vec<Outcome>,
    /// What is wrong with the guest as a whole.
    pub(super) problems: Vec<String>,
    /// What isn't wrong but worth knowing: what could not be set up, what the kernel warned of.
    pub(super) remarks: Vec<String>,
}

impl Verdict {
    pub(super) fn is_good(&self) -> bool {
        let good = |outcome: &Outcome| outcome.failed.is_empty() && outcome.problems.is_empty();
        self.problems.is_empty() && !self.outcomes.is_empty() && self.outcomes.iter().all(good)
    }
}

/// Judges what a guest said by what it was expected to find; `runs` is how many binaries it had to run, over all users.
pub(super) fn judge(
    transcript: &Transcript,
    runs: usize,
    expectation: impl Fn(User) -> Expectation,
    features: &Features,
) -> Verdict {
    let mut verdict = Verdict::default();
    let mut running: Option<(User, String, Vec<String>)> = None;
    for record in transcript.records() {
        match record {
            Record::Kernel { release, features } => {
                verdict.release.clone_from(release);
                let expected = expectation(User::Root).features;
                match features {
                    Ok(mask) if expected.is_none_or(|expected| expected == *mask) => {
                        verdict.remarks.push(format!("features {mask:#x}"));
                    }
                    Ok(mask) => verdict.problems.push(format!(
                        "it offers the features {mask:#x}, expected were {:#x}",
                        expected.unwrap_or_default()
                    )),
                    Err(reason) => verdict.problems.push(reason.clone()),
                }
            }
            Record::Note(note) => verdict.remarks.push(note.clone()),
            Record::Log(line) => verdict.remarks.push(format!("kernel: {line}")),
            Record::Start { user, binary } => {
                let name = binary.rsplit('/').next().unwrap_or(binary);
                running = Some((*user, name.to_owned(), Vec::new()));
            }
            Record::Output(line) => {
                if let Some((_, _, output)) = &mut running {
                    output.push(line.clone());
                }
            }
            Record::Done { ending, milliseconds } => {
                if let Some((user, binary, output)) = running.take() {
                    let mut outcome = outcome(user, binary, output, ending);
                    outcome.milliseconds = *milliseconds;
                    check_skips(&mut outcome, &expectation(user), features);
                    verdict.outcomes.push(outcome);
                }
            }
            Record::End => {}
        }
    }
    if let Some((user, binary, output)) = running {
        let mut outcome =
            outcome(user, binary, output, &Ending::NotRun("the guest ended before it".to_owned()));
        check_skips(&mut outcome, &expectation(user), features);
        verdict.outcomes.push(outcome);
    }
    if verdict.outcomes.len() < runs {
        verdict.problems.push(format!("{} of {runs} binaries ran", verdict.outcomes.len()));
    }
    match transcript.lost() {
        0 => {}
        lost => verdict.problems.push(format!("{lost} lines of the guest's report are lost")),
    }
    verdict
}

/// Reads what the test harness prints.
fn outcome(user: User, binary: String, output: Vec<String>, ending: &Ending) -> Outcome {
    let mut outcome = Outcome {
        user,
        binary,
        passed: 0,
        failed: BTreeSet::new(),
        skipped: BTreeMap::new(),
        milliseconds: 0,
        problems: Vec::new(),
        output: Vec::new(),
    };
    let mut passed = BTreeSet::new();
    let mut running = None;
    for line in &output {
        if let Some(count) = line.strip_prefix("running ") {
            let count = count.split(' ').next().and_then(|count| count.parse::<usize>().ok());
            running = running.or(count);
        } else if let Some((name, result)) =
            line.strip_prefix("test ").and_then(|test| test.split_once(" ... "))
        {
            let name = name.split(" - should panic").next().unwrap_or(name).to_owned();
            match result.split([',', ' ', '(']).next() {
                Some("ok") => drop(passed.insert(name)),
                Some("FAILED") => drop(outcome.failed.insert(name)),
                Some("ignored") => {
                    let reason = result.strip_prefix("ignored, ").unwrap_or("no reason given");
                    let reason = format!("{IGNORED}: {reason}");
                    outcome.skipped.entry(name).or_default().insert(reason);
                }
                _ => outcome.problems.push(format!("`{line}` is not understood")),
            }
        } else if let Some(skip) = line.strip_prefix("SKIP ") {
            match skip.split_once(": needs ") {
                Some((name, need)) => {
                    outcome.skipped.entry(name.to_owned()).or_default().insert(need.to_owned());
                }
                None => outcome.problems.push(format!("`{line}` is not understood")),
            }
        }
    }
    let reported = passed.len() + outcome.failed.len() + ignored(&outcome);
    match running {
        Some(running) if running != reported => {
            outcome.problems.push(format!("{reported} of {running} tests reported"));
        }
        Some(_) => {}
        // A test without the standard harness is one test.
        None if *ending == Ending::Exit(0) => drop(passed.insert(outcome.binary.clone())),
        None => drop(outcome.failed.insert(outcome.binary.clone())),
    }
    outcome.passed = passed.iter().filter(|name| !outcome.skipped.contains_key(*name)).count();
    match ending {
        Ending::Exit(0) => {}
        Ending::Exit(_) if !outcome.failed.is_empty() => {}
        Ending::Exit(code) => outcome.problems.push(format!("exit code {code}")),
        Ending::Signal(number) => outcome.problems.push(format!("killed by signal {number}")),
        Ending::Limit => outcome.problems.push("it ran for too long and was killed".to_owned()),
        Ending::NotRun(reason) => outcome.problems.push(reason.clone()),
    }
    outcome.output = output;
    outcome
}

const IGNORED: &str = "nothing: it is ignored";

fn ignored(outcome: &Outcome) -> usize {
    let is_ignored = |needs: &&BTreeSet<String>| needs.iter().any(|need| need.starts_with(IGNORED));
    outcome.skipped.values().filter(is_ignored).count()
}

/// A skip for something that should be there is a failure.
fn check_skips(outcome: &mut Outcome, expectation: &Expectation, features: &Features) {
    for (test, needs) in &outcome.skipped {
        for need in needs {
            if !need.starts_with(IGNORED) && !expectation.allows(need, features) {
                outcome
                    .problems
                    .push(format!("{test} was skipped for {need}, which isn't listed as lacking"));
            }
        }
    }
}
