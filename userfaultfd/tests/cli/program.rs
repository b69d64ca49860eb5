//! Running the program.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

/// The built program.
pub(crate) const PATH: &str = env!("CARGO_BIN_EXE_uffd");

/// The command of the program at a path, with arguments. It ends when this thread does.
pub(crate) fn command(path: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::null());
    let end_with_parent = || {
        // SAFETY: touches no memory.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) } {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes a system call, and neither allocates nor locks.
    unsafe { command.pre_exec(end_with_parent) };
    command
}

/// How the program ended, and what it said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Runs it.
pub(crate) fn run(arguments: &[&str]) -> Said {
    command(PATH, arguments).output().unwrap().into()
}
