//! How the program ends: the exit codes, and errors with what helps.

use std::fmt;
use std::io;
use std::process::ExitCode;

/// The codes, as help and the manual say them.
pub(crate) const CODES: &str = "\
Exit codes:
  0  it did what was asked
  1  it failed: the standard error says why, and what helps
  2  the arguments can't be
  3  this machine or process lacks what is needed";

/// Why the program ends without having done what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The standard output can't be written.
    Output(io::Error),
    /// Something is needed that isn't here. The text names it.
    Unmet(String),
}

impl Failure {
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Output(_) => 1,
            Self::Unmet(_) => 3,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Output(error) => write!(f, "the standard output can't be written: {error}"),
            Self::Unmet(text) => f.write_str(text),
        }
    }
}
