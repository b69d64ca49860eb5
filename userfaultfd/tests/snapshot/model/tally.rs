//! How often each thing happened.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// Stands before each line of a table that another process is to add to its own.
const MARK: &str = "as they were: ";

/// How often things happened, by what each is called.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally(BTreeMap<Cow<'static, str>, u64>);

impl Tally {
    pub(super) fn add(&mut self, what: &'static str, times: usize) {
        *self.0.entry(Cow::Borrowed(what)).or_default() += times as u64;
    }

    pub(super) fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or_default()
    }

    pub(super) fn join(&mut self, other: Self) {
        other.0.into_iter().for_each(|(what, times)| *self.0.entry(what).or_default() += times);
    }

    /// Lines for another process, which [`join_lines`](Self::join_lines) reads.
    pub(super) fn lines(&self) -> String {
        self.0.iter().map(|(what, times)| format!("{MARK}{times} {what}\n")).collect()
    }

    pub(super) fn join_lines(&mut self, text: &str) {
        for line in text.lines().filter_map(|line| line.split_once(MARK)) {
            let (times, what) = line.1.split_once(' ').expect("a number, and what it is of");
            *self.0.entry(Cow::Owned(what.to_owned())).or_default() +=
                times.parse::<u64>().expect("a number");
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(what, times)| writeln!(f, "{times:>12}  {what}"))
    }
}
