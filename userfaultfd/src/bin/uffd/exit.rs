//! How the program ends: the exit codes, and errors with what helps.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// Writes a line to the standard error. What can't be written is lost: the reader of a pipe may have gone, and a disk may be
/// full, and machines that are served are worth more.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::exit::write_line(format!($($text)*))
    };
}

pub(crate) use say;

/// For [`say`].
pub(crate) fn write_line(mut text: String) {
    text.push('\n');
    let _lost = io::stderr().lock().write_all(text.as_bytes());
}

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
