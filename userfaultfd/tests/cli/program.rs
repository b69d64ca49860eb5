//! Running the program.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

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

/// The program at work.
pub(crate) struct Running {
    child: Child,
    err: BufReader<ChildStderr>,
    /// What was read of its standard error.
    said: String,
}

impl Running {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = command(PATH, arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let err = BufReader::new(child.stderr.take().unwrap());
        Self { child, err, said: String::new() }
    }

    /// The next line of its standard error.
    pub(crate) fn line(&mut self) -> String {
        let from = self.said.len();
        let read = self.err.read_line(&mut self.said).unwrap();
        assert_ne!(read, 0, "it has ended: {}", self.said);
        self.said[from..].trim_end().to_owned()
    }

    /// Nobody reads its standard error any more.
    pub(crate) fn hang_up(&mut self) {
        let nothing = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: both are open, and what is read from stays the owner of its number.
        let closed = unsafe { libc::dup2(nothing.as_raw_fd(), self.err.get_ref().as_raw_fd()) };
        assert_ne!(closed, -1);
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        // SAFETY: touches no memory. The child isn't waited for yet, so the number is its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, signal) }, 0);
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Said {
        self.err.read_to_string(&mut self.said).unwrap();
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        Said { code: self.child.wait().unwrap().code(), out, err: self.said }
    }
}

/// A folder of a test. It goes with its files when it is dropped.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(test: &str) -> Self {
        let name = format!("userfaultfd-cli-{}-{}", std::process::id(), test.replace("::", "-"));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// The path of a file in it.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }

    /// A file in it.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }
}
