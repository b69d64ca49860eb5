//! What is shown of a run.

use std::fmt::Write;

/// How one thing went for a target.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It compiles, with a standard library that was had like this.
    Checked(&'static str),
    Tested {
        passed: usize,
        failed: usize,
        problems: Vec<String>,
    },
    Failed(String),
    NotAvailable(String),
    NotAsked,
}

#[derive(Debug)]
pub(super) struct Cell {
    pub(super) outcome: Outcome,
    pub(super) seconds: f32,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) target: &'static str,
    pub(super) check: Cell,
    pub(super) oldest: Cell,
    pub(super) tests: Cell,
}

impl Row {
    fn cells(&self) -> [(&'static str, &Cell); 3] {
        [("check", &self.check), ("oldest Rust", &self.oldest), ("tests", &self.tests)]
    }
}

impl Outcome {
    fn is_bad(&self) -> bool {
        match self {
            Self::Failed(_) => true,
            Self::Tested { failed, problems, .. } => *failed > 0 || !problems.is_empty(),
            _ => false,
        }
    }

    fn short(&self) -> String {
        match self {
            Self::Checked(how) => format!("ok ({how})"),
            Self::Tested { passed, failed: 0, problems } if problems.is_empty() => format!("{passed} passed"),
            Self::Tested { passed, failed, .. } => format!("{passed} passed, {failed} FAILED"),
            Self::Failed(_) => "FAILED".to_owned(),
            Self::NotAvailable(_) => "not available".to_owned(),
            Self::NotAsked => "-".to_owned(),
        }
    }

    fn remarks(&self) -> Vec<String> {
        match self {
            Self::NotAvailable(reason) => vec![format!("not available: {reason}")],
            Self::Failed(reason) => vec![format!("FAILED: {reason}")],
            Self::Tested { problems, .. } => {
                problems.iter().map(|problem| format!("FAILED: {problem}")).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The table, and beneath it the reasons. The versions are those of the current and of the oldest Rust.
pub(super) fn table([current, oldest]: [&str; 2], rows: &[Row]) -> String {
    let heads = [format!("Rust {current}"), format!("Rust {oldest}"), "tests".to_owned()];
    let mut text = format!("{:32}", "target");
    for head in &heads {
        let _ = write!(text, " {head:20} {:>5}", "s");
    }
    text.push('\n');
    for row in rows {
        let _ = write!(text, "{:32}", row.target);
        for (_, cell) in row.cells() {
            let _ = write!(text, " {:20} {:5.0}", cell.outcome.short(), cell.seconds);
        }
        text.push('\n');
    }
    for row in rows {
        for (what, cell) in row.cells() {
            for remark in cell.outcome.remarks() {
                let _ = write!(text, "\n{}, {what}: {remark}", row.target);
            }
        }
    }
    text
}

/// What the exit status says.
pub(super) fn verdict(rows: &[Row], require: bool) -> Result<(), String> {
    let is_bad =
        |cell: &Cell| cell.outcome.is_bad() || require && matches!(cell.outcome, Outcome::NotAvailable(_));
    let bad = rows.iter().filter(|row| row.cells().iter().any(|(_, cell)| is_bad(cell)));
    let bad: Vec<_> = bad.map(|row| row.target).collect();
    if bad.is_empty() { Ok(()) } else { Err(format!("failed: {}", bad.join(", "))) }
}

/// What a failed build means, by what cargo said.
pub(super) fn failure(errors: &str) -> Outcome {
    let named = errors.lines().filter_map(|line| line.strip_prefix("error: could not compile `"));
    let crates: Vec<_> = named.filter_map(|rest| rest.split('`').next()).collect();
    let first = errors.lines().find(|line| line.starts_with("error")).unwrap_or("cargo failed");
    let first = first.to_owned();
    match crates.first() {
        Some(name) if !LIBRARY.contains(name) => Outcome::Failed(format!("`{name}`: {first}")),
        Some(name) => {
            Outcome::NotAvailable(format!("its standard library does not build: `{name}`: {first}"))
        }
        None => Outcome::Failed(first),
    }
}

/// Crates whose failure tells about the standard library.
const LIBRARY: [&str; 8] =
    ["alloc", "compiler_builtins", "core", "panic_unwind", "proc_macro", "std", "test", "unwind"];

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(outcome: Outcome) -> Cell {
        Cell { outcome, seconds: 1.4 }
    }

    fn row(tests: Outcome) -> Row {
        let (check, oldest) = (cell(Outcome::Checked("source")), cell(Outcome::Checked("prebuilt")));
        Row { target: "s390x-unknown-linux-gnu", check, oldest, tests: cell(tests) }
    }

    fn tested(failed: usize, problems: &[&str]) -> Outcome {
        let problems = problems.iter().map(|problem| (*problem).to_owned()).collect();
        Outcome::Tested { passed: 40, failed, problems }
    }

    #[test]
    fn failures_and_what_is_required_make_a_bad_end() {
        let verdict = |outcome, require| verdict(&[row(outcome)], require).is_ok();
        assert!(verdict(tested(0, &[]), true));
        assert!(!verdict(tested(1, &["abi: 1 failed"]), false));
        assert!(!verdict(tested(0, &["abi: no end"]), false));
        assert!(!verdict(Outcome::Failed("no".to_owned()), false));
        assert!(verdict(Outcome::NotAvailable("no".to_owned()), false));
        assert!(!verdict(Outcome::NotAvailable("no".to_owned()), true));
        assert!(verdict(Outcome::NotAsked, true));
    }

    #[test]
    fn reasons_stand_beneath_the_table() {
        let rows = [row(tested(0, &[])), row(Outcome::NotAvailable("no linker".to_owned()))];
        let text = table(["1.96.0", "1.85.0"], &rows);
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let expected = "s390x-unknown-linux-gnu ok (source) 1 ok (prebuilt) 1 40 passed 1";
        assert_eq!(text.lines().nth(1).map(words), Some(words(expected)), "{text}");
        assert!(text.ends_with("s390x-unknown-linux-gnu, tests: not available: no linker"), "{text}");
    }

    #[test]
    fn unbuildable_standard_library_is_unavailable() {
        let of = |name: &str| {
            failure(&format!(
                "error[E0425]: no\nerror: could not compile `{name}` (lib) due to 1 previous error"
            ))
        };
        assert!(matches!(of("std"), Outcome::NotAvailable(reason) if reason.contains("E0425")));
        assert!(matches!(of("userfaultfd"), Outcome::Failed(reason) if reason.contains("`userfaultfd`")));
        assert!(matches!(failure(""), Outcome::Failed(_)));
    }
}
