//! What is shown of a run.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use guest_init::User;

use super::verdict::{Outcome, Verdict};

/// Lines of a failed test that are shown; the log has all.
const SHOWN: usize = 40;

/// Characters of a line that are shown.
const WIDTH: usize = 180;

const USERS: [User; 2] = [User::Root, User::Nobody];

/// The table, and beneath it what it leaves open.
pub(super) fn report(guests: &[(String, Verdict)]) -> String {
    let mut text = table(guests);
    section(&mut text, "skipped", guests, |verdict| skips(&verdict.outcomes));
    section(&mut text, "remarks", guests, |verdict| counted(&verdict.remarks));
    section(&mut text, "FAILED", guests, failures);
    text
}

fn table(guests: &[(String, Verdict)]) -> String {
    let mut rows =
        vec![["kernel", "test binary", "as root", "", "", "", "as nobody", "", "", ""].map(str::to_owned)];
    let counts = ["passed", "failed", "skipped", "seconds"];
    let heads = ["", ""].into_iter().chain(counts).chain(counts);
    rows.extend(heads.map(str::to_owned).collect::<Vec<_>>().try_into().ok());
    for (name, verdict) in guests {
        let with_tests = verdict.outcomes.iter().filter(|outcome| !outcome.is_empty());
        let mut binaries: Vec<&String> = with_tests.map(|outcome| &outcome.binary).collect();
        binaries.sort();
        binaries.dedup();
        for binary in &binaries {
            let mut row = vec![name.clone(), (*binary).clone()];
            for user in USERS {
                let mut found = verdict.outcomes.iter().filter(|o| o.user == user && o.binary == **binary);
                row.extend(found.next().map_or_else(|| ["-"; 4].map(str::to_owned), cells));
            }
            rows.extend(row.try_into().ok());
        }
        if binaries.is_empty() {
            rows.push([name.as_str(), "(nothing ran)", "", "", "", "", "", "", "", ""].map(str::to_owned));
        }
    }
    let mut widths = [0; 10];
    for (i, row) in rows.iter().enumerate() {
        // The heads of the users stand over several columns.
        let columns = if i == 0 { 2 } else { row.len() };
        row.iter().zip(&mut widths).take(columns).for_each(|(cell, width)| *width = cell.len().max(*width));
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (i, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = if i < 2 {
                write!(line, "{cell:width$}  ")
            } else if cell.starts_with("as ") {
                write!(line, "| {cell:width$} ")
            } else if i % 4 == 2 {
                write!(line, "| {cell:>width$} ")
            } else {
                write!(line, "{cell:>width$} ")
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn cells(outcome: &Outcome) -> [String; 4] {
    // What is wrong beside tests that failed is a failure, too.
    let failed = outcome.failed.len() + outcome.problems.len();
    let failed = if failed == 0 { "0".to_owned() } else { format!("{failed}!") };
    let seconds = format!("{:.1}", Duration::from_millis(outcome.milliseconds).as_secs_f32());
    [outcome.passed.to_string(), failed, outcome.skipped.len().to_string(), seconds]
}

/// A part about every guest of which there is anything to say.
fn section(
    text: &mut String,
    title: &str,
    guests: &[(String, Verdict)],
    lines: impl Fn(&Verdict) -> Vec<String>,
) {
    let mut empty = true;
    for (name, verdict) in guests {
        let lines = lines(verdict);
        if lines.is_empty() {
            continue;
        }
        if std::mem::take(&mut empty) {
            let _ = writeln!(text, "\n{title}");
        }
        let _ = writeln!(text, "  {name} ({})", verdict.release);
        for line in lines {
            let shown: String = line.chars().take(WIDTH).collect();
            let more = if shown.len() < line.len() { "…" } else { "" };
            let _ = writeln!(text, "    {shown}{more}");
        }
    }
}

/// What tests were skipped for, and how many.
fn skips(outcomes: &[Outcome]) -> Vec<String> {
    let mut lines = Vec::new();
    for user in USERS {
        let mut needs: BTreeMap<&str, usize> = BTreeMap::new();
        for outcome in outcomes.iter().filter(|outcome| outcome.user == user) {
            for need in outcome.skipped.values().flatten() {
                *needs.entry(need).or_default() += 1;
            }
        }
        lines.extend(needs.iter().map(|(need, count)| format!("as {user}: {count:3} needs {need}")));
    }
    lines
}

/// The lines, each in the place of the first that says the same but for numbers.
fn counted(lines: &[String]) -> Vec<String> {
    let mut counts: Vec<(String, &String, usize)> = Vec::new();
    for line in lines {
        let key = without_numbers(line);
        match counts.iter_mut().find(|(known, ..)| *known == key) {
            Some((.., count)) => *count += 1,
            None => counts.push((key, line, 1)),
        }
    }
    let show = |(_, line, count): (String, &String, usize)| match count {
        1 => line.clone(),
        _ => format!("{line} (and {} like this)", count - 1),
    };
    counts.into_iter().map(show).collect()
}

/// The words that have no digit.
fn without_numbers(line: &str) -> String {
    let words = line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.contains(char::is_numeric));
    words.collect::<Vec<_>>().join(" ")
}

fn failures(verdict: &Verdict) -> Vec<String> {
    let mut lines = verdict.problems.clone();
    for outcome in &verdict.outcomes {
        let head = format!("as {}: {}", outcome.user, outcome.binary);
        lines.extend(outcome.problems.iter().map(|problem| format!("{head}: {problem}")));
        for test in &outcome.failed {
            lines.push(format!("{head}: {test}"));
            lines.extend(said(outcome, test).map(|line| format!("  {line}")));
        }
        if outcome.failed.is_empty()
            && outcome.problems.iter().any(|problem| !problem.contains("was skipped"))
        {
            let from = outcome.output.len().saturating_sub(SHOWN);
            lines.extend(outcome.output[from..].iter().map(|line| format!("  {line}")));
        }
    }
    lines
}

/// What a test printed, as far as the harness shows it.
fn said<'a>(outcome: &'a Outcome, test: &str) -> impl Iterator<Item = &'a String> {
    let start = format!("---- {test} stdout ----");
    // A test that runs itself in a process of its own has such lines in what it prints.
    let own = format!("---- {test} ");
    let lines = outcome.output.iter().skip_while(move |line| **line != start).skip(1);
    lines.take_while(move |line| !line.starts_with("---- ") || line.starts_with(&own)).take(SHOWN)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn outcome(user: User, failed: &[&str]) -> Outcome {
        let skip = ("b".to_owned(), BTreeSet::from(["MOVE".to_owned()]));
        Outcome {
            user,
            binary: "kernel".to_owned(),
            passed: 3,
            failed: failed.iter().map(|test| (*test).to_owned()).collect(),
            skipped: BTreeMap::from([skip]),
            filtered_out: 0,
            milliseconds: 1540,
            problems: Vec::new(),
            output: [
                "---- c stdout ----",
                "it broke",
                "---- c stdout ----",
                "inside",
                "---- d stdout ----",
                "no",
            ]
            .map(str::to_owned)
            .to_vec(),
        }
    }

    #[test]
    fn table_shows_both_users_and_beneath_it_is_why() {
        let verdict = Verdict {
            release: "6.1.0".to_owned(),
            outcomes: vec![outcome(User::Root, &["c"]), outcome(User::Nobody, &[])],
            ..Verdict::default()
        };
        let text = report(&[("6.1".to_owned(), verdict)]);
        let row = text.lines().find(|line| line.starts_with("6.1")).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells, ["6.1", "kernel", "|", "3", "1!", "1", "1.5", "|", "3", "0", "1", "1.5"]);
        assert!(text.contains("as nobody:   1 needs MOVE"), "{text}");
        assert!(text.contains("as root: kernel: c\n      it broke\n"), "{text}");
        assert!(text.contains("inside") && !text.contains("      no\n"), "{text}");
    }

    #[test]
    fn lines_that_differ_in_numbers_are_one() {
        let lines = ["killing a:1 at 7ff0", "other", "killing a:2 at 0x7ff1"].map(str::to_owned);
        assert_eq!(counted(&lines), ["killing a:1 at 7ff0 (and 1 like this)", "other"]);
    }

    #[test]
    fn guest_that_ran_nothing_is_in_the_table() {
        let verdict = Verdict { problems: vec!["it ended early".to_owned()], ..Verdict::default() };
        let text = report(&[("5.10".to_owned(), verdict)]);
        assert!(
            text.contains("5.10") && text.contains("(nothing ran)") && text.contains("it ended early"),
            "{text}"
        );
    }
}
