//! How the program ends: the exit codes, and errors with what helps.

use std::fmt;
use std::io;
use std::process::ExitCode;

/// The codes, as help and the manual say them.
pub(crate) const CODES: &str = "\
Exit codes:
  0  success
  1  failure: the standard error has the reason, and what helps
  2  invalid arguments
  3  this machine or process lacks what is needed
  4  virtual machines were ended, because their memory could not be supplied";

/// Why the program ends without having done what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something failed. The text says what and why, and what helps where that is known.
    Failed(String),
    /// The standard output can't be written.
    Output(io::Error),
    /// Arguments that can't be together.
    Arguments(&'static str),
    /// Something is needed that isn't here. The text names it.
    Unmet(String),
    /// A number of virtual machines ended since their memory couldn't be had.
    Lost(usize),
}

impl Failure {
    /// Something failed that concerns `what`: a path, an address.
    pub(crate) fn of<E: fmt::Display>(what: impl fmt::Display) -> impl FnOnce(E) -> Self {
        move |error| Self::Failed(format!("{what}: {error}"))
    }

    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed(_) | Self::Output(_) => 1,
            Self::Arguments(_) => 2,
            Self::Unmet(_) => 3,
            Self::Lost(_) => 4,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(text) | Self::Unmet(text) => f.write_str(text),
            Self::Output(error) => write!(f, "the standard output can't be written: {error}"),
            Self::Arguments(text) => write!(f, "{text}; `uffd --help` says more"),
            Self::Lost(machines) => {
                let machines = Count(*machines, "virtual machine");
                write!(f, "{machines} ended, because the memory could not be supplied: see above")
            }
        }
    }
}

/// A number of things, as it is written.
pub(crate) struct Count(pub(crate) usize, pub(crate) &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, thing) = *self;
        write!(f, "{count} {thing}{}", if count == 1 { "" } else { "s" })
    }
}
