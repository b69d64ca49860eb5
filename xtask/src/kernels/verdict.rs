//! What came of a guest's tests, from what it said.

use std::collections::{BTreeMap, BTreeSet};

use guest_init::{Ending, Record, Transcript, User};

use super::table::{Expectation, Features, covers};

/// What came of one binary, run by one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) user: User,
    pub(super) binary: String,
    pub(super) passed: usize,
    pub(super) failed: BTreeSet<String>,
    /// How many tests were not asked for.
    pub(super) filtered_out: usize,
    /// By test, what it was skipped for, in whole or in part.
    pub(super) skipped: BTreeMap<String, BTreeSet<String>>,
    pub(super) milliseconds: u64,
    /// What is wrong beside tests that failed.
    pub(super) problems: Vec<String>,
    pub(super) output: Vec<String>,
}

impl Outcome {
    /// Whether there was no test, and nothing wrong with that.
    pub(super) fn is_empty(&self) -> bool {
        self.passed == 0 && self.failed.is_empty() && self.skipped.is_empty() && self.problems.is_empty()
    }
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
    whole: bool,
    expectation: impl Fn(User) -> Expectation,
    features: &Features,
) -> Verdict {
    let mut verdict = Verdict::default();
    let mut offered = None;
    // Where the features weren't known before, they are those that the kernel offers.
    let judging = |user, offered| {
        let expectation = expectation(user);
        Expectation { features: expectation.features.or(offered), ..expectation }
    };
    let mut running: Option<(User, String, Vec<String>)> = None;
    for record in transcript.records() {
        match record {
            Record::Kernel { release, features } => {
                verdict.release.clone_from(release);
                let expected = expectation(User::Root).features;
                match features {
                    Ok(mask) if expected.is_none_or(|expected| expected == *mask) => {
                        offered = Some(*mask);
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
                    check_skips(&mut outcome, &judging(user, offered), features);
                    verdict.outcomes.push(outcome);
                }
            }
            Record::End => {}
        }
    }
    if let Some((user, binary, output)) = running {
        let mut outcome =
            outcome(user, binary, output, &Ending::NotRun("the guest ended before it".to_owned()));
        check_skips(&mut outcome, &judging(user, offered), features);
        verdict.outcomes.push(outcome);
    }
    if whole {
        check_lacks(&mut verdict, &expectation(User::Nobody));
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
        filtered_out: 0,
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
        } else if let Some(result) = line.strip_prefix("test result: ") {
            outcome.filtered_out = filtered_out(result);
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

/// The number in `ok. 3 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.50s`.
fn filtered_out(result: &str) -> usize {
    let before = result.split_once(" filtered out").map_or("", |(before, _)| before);
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
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

/// What is listed as lacking, and isn't, would hide a skip some day. Known only where all tests ran to their end.
fn check_lacks(verdict: &mut Verdict, expectation: &Expectation) {
    let all_ran = |outcome: &Outcome| outcome.problems.is_empty() && outcome.filtered_out == 0;
    if verdict.outcomes.is_empty() || !verdict.outcomes.iter().all(all_ran) {
        return;
    }
    let needs: BTreeSet<&String> =
        verdict.outcomes.iter().flat_map(|o| o.skipped.values().flatten()).collect();
    let stale = expectation.lacks.iter().filter(|lack| !needs.iter().any(|need| covers(lack, need)));
    verdict
        .problems
        .extend(stale.map(|lack| format!("no test was skipped for {lack}, which is listed as lacking")));
}

#[cfg(test)]
mod tests {
    use guest_init::encode;

    use super::*;
    use crate::kernels::table;

    const OUTPUT: &str = "
running 5 tests
test a::one ... ok
test a::two - should panic ... ok
test a::three ... FAILED
test a::four ... ok
test a::five ... ignored, takes a day

successes:

---- a::four stdout ----
SKIP a::four: needs MOVE
SKIP a::four: needs hugetlb

failures:
    a::three

test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.50s
";

    fn judged(output: &str, ending: Ending, lacks: &[&str]) -> Verdict {
        let mut records = vec![
            Record::Kernel { release: "6.1".to_owned(), features: Ok(0x1fff) },
            Record::Start { user: User::Root, binary: "/tests/kernel".to_owned() },
        ];
        records.extend(output.lines().map(|line| Record::Output(line.to_owned())));
        records.extend([Record::Done { ending, milliseconds: 7 }, Record::End]);
        judge_records(&records, 1, lacks)
    }

    fn judge_records(records: &[Record], runs: usize, lacks: &[&str]) -> Verdict {
        let lines: Vec<_> = (0..).zip(records).map(|(number, record)| encode(number, record)).collect();
        let transcript = Transcript::read(lines.join("\r\n").as_bytes());
        let lacks: Vec<_> = lacks.iter().map(|lack| (*lack).to_owned()).collect();
        let expectation =
            |_| table::Expectation { features: Some(0x1fff), needs: Vec::new(), lacks: lacks.clone() };
        judge(&transcript, runs, true, expectation, &Features::read().unwrap())
    }

    #[test]
    fn results_are_counted() {
        let verdict = judged(OUTPUT, Ending::Exit(101), &["hugetlb"]);
        let outcome = &verdict.outcomes[0];
        assert_eq!((outcome.passed, outcome.milliseconds), (2, 7));
        assert!(outcome.failed.iter().eq(["a::three"]));
        assert!(outcome.skipped.keys().eq(["a::five", "a::four"]));
        assert_eq!(outcome.problems, <[String; 0]>::default());
        assert!(!verdict.is_good());
        let verdict = judged(&OUTPUT.replace("FAILED", "ok"), Ending::Exit(0), &["hugetlb"]);
        assert!(verdict.is_good(), "{verdict:?}");
    }

    #[test]
    fn skip_that_nobody_expects_is_a_failure() {
        let verdict = judged(&OUTPUT.replace("FAILED", "ok"), Ending::Exit(0), &[]);
        assert!(!verdict.is_good());
        assert!(verdict.outcomes[0].problems[0].contains("a::four was skipped for hugetlb"), "{verdict:?}");
        // A feature that the kernel offers.
        let output = OUTPUT.replace("FAILED", "ok").replace("MOVE", "MINOR_SHMEM");
        assert!(!judged(&output, Ending::Exit(0), &["hugetlb"]).is_good());
        // A line that looks like one but isn't.
        let output = OUTPUT.replace("FAILED", "ok").replace("a::four: needs MOVE", "a::four for MOVE");
        assert!(!judged(&output, Ending::Exit(0), &["hugetlb"]).is_good());
    }

    #[test]
    fn lack_that_no_test_met_is_a_failure() {
        let output = OUTPUT.replace("FAILED", "ok");
        let verdict = judged(&output, Ending::Exit(0), &["hugetlb", "swap"]);
        assert!(verdict.problems[0].contains("skipped for swap"), "{verdict:?}");
        assert!(!verdict.is_good());
        // Where not all tests ran, that tells nothing.
        let part = output.replace("0 filtered out", "1 filtered out");
        assert!(judged(&part, Ending::Exit(0), &["hugetlb", "swap"]).is_good());
        let crashed = judged(&output, Ending::Signal(6), &["hugetlb", "swap"]);
        assert_eq!(crashed.problems, <[String; 0]>::default());
    }

    /// A user without rights lacks what the other one has.
    #[test]
    fn skips_are_judged_by_each_users_needs() {
        let run = |user, need: &str| {
            let output = format!("running 1 test\ntest a ... ok\nSKIP a: needs {need}\ntest result: ok.");
            let mut records = vec![Record::Start { user, binary: "/tests/kernel".to_owned() }];
            records.extend(output.lines().map(|line| Record::Output(line.to_owned())));
            records.push(Record::Done { ending: Ending::Exit(0), milliseconds: 0 });
            records
        };
        let judged = |offered, skips: &[(User, &str)]| {
            let mut records = vec![Record::Kernel { release: "6.1".to_owned(), features: Ok(offered) }];
            records.extend(skips.iter().flat_map(|(user, need)| run(*user, need)));
            records.push(Record::End);
            let lines: Vec<_> = (0..).zip(&records).map(|(number, record)| encode(number, record)).collect();
            let lacks = |user| if user == User::Nobody { vec!["root".to_owned()] } else { Vec::new() };
            let expectation =
                |user| table::Expectation { features: None, needs: Vec::new(), lacks: lacks(user) };
            let transcript = Transcript::read(lines.join("\n").as_bytes());
            judge(&transcript, skips.len(), true, expectation, &Features::read().unwrap())
        };
        let nobody = |need| judged(0x1ff, &[(User::Nobody, need), (User::Nobody, "root")]);
        assert!(nobody("root").is_good() && nobody("MOVE").is_good());
        for need in ["hugetlb", "MISSING_SHMEM"] {
            let verdict = nobody(need);
            assert!(!verdict.is_good(), "{need}");
            let problem = format!("a was skipped for {need}, which isn't listed as lacking");
            assert_eq!(verdict.outcomes[0].problems, [problem]);
        }
        // What only the other user lacks.
        let verdict = judged(0x1ff, &[(User::Root, "root"), (User::Nobody, "root")]);
        assert!(!verdict.is_good() && verdict.outcomes[1].problems.is_empty(), "{verdict:?}");
        assert_eq!(verdict.outcomes[0].problems.len(), 1);
        // What is listed as lacking, and nobody met.
        let verdict = judged(0x1ff, &[(User::Nobody, "MOVE")]);
        assert!(verdict.problems[0].contains("no test was skipped for root"), "{verdict:?}");
    }

    #[test]
    fn tests_that_do_not_report_are_a_failure() {
        let part: String = OUTPUT.lines().take(4).map(|line| format!("{line}\n")).collect();
        for ending in [Ending::Signal(6), Ending::Limit, Ending::Exit(0)] {
            let verdict = judged(&part, ending, &[]);
            assert!(verdict.outcomes[0].problems[0].contains("2 of 5"), "{verdict:?}");
        }
        assert!(!judged("", Ending::NotRun("no such file".to_owned()), &[]).is_good());
    }

    #[test]
    fn test_without_harness_is_one_test() {
        let verdict = judged("all is well\n", Ending::Exit(0), &[]);
        assert_eq!((verdict.is_good(), verdict.outcomes[0].passed), (true, 1));
        assert!(!judged("it is not\n", Ending::Exit(1), &[]).is_good());
    }

    #[test]
    fn other_features_a_crash_and_lost_lines_are_failures() {
        let kernel = |mask| Record::Kernel { release: "6.1".to_owned(), features: mask };
        let start = Record::Start { user: User::Root, binary: "/tests/a".to_owned() };
        let done = Record::Done { ending: Ending::Exit(0), milliseconds: 0 };
        let all = |mask| vec![kernel(mask), start.clone(), done.clone(), Record::End];
        assert!(judge_records(&all(Ok(0x1fff)), 1, &[]).is_good());
        assert!(!judge_records(&all(Ok(0x1ff)), 1, &[]).is_good());
        assert!(!judge_records(&all(Err("ENOSYS".to_owned())), 1, &[]).is_good());
        assert!(!judge_records(&all(Ok(0x1fff)), 2, &[]).is_good());
        let crashed = judge_records(&all(Ok(0x1fff))[..2], 1, &[]);
        assert!(crashed.outcomes[0].problems[0].contains("the guest ended before it"), "{crashed:?}");
        let log =
            [encode(0, &kernel(Ok(0x1fff))), encode(2, &start), encode(3, &done), encode(4, &Record::End)];
        let transcript = Transcript::read(log.join("\n").as_bytes());
        let verdict = judge(&transcript, 1, true, |_| Expectation::default(), &Features::read().unwrap());
        assert!(verdict.problems[0].contains("1 lines"), "{verdict:?}");
    }
}
