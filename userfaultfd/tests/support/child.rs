//! Tests that need a process of their own: that drop rights, fork, exhaust descriptors or die.

use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::thread;

use super::raw::check;

/// Names the test whose child this process is.
const CHILD: &str = "USERFAULTFD_TEST_CHILD";

/// What that process was told when it was executed once more.
const STAGE: &str = "USERFAULTFD_TEST_STAGE";

/// Runs the test `test` once more, alone in a process of its own, with `body` there and nothing else. Returns
/// what that process said and how it ended; `None` in that process itself, which is done then.
///
/// ```ignore
/// let Some(output) = child::run(test_name!(), || { … }) else { return };
/// assert!(output.status.success(), "{output:?}");
/// ```
pub(crate) fn run(test: &'static str, body: impl FnOnce()) -> Option<Output> {
    run_with(test, |command| command.arg("--nocapture"), body)
}

/// Like [`run`], with a command that `prepare` has changed: it doesn't have `--nocapture`.
pub(crate) fn run_with(
    test: &'static str,
    prepare: impl FnOnce(&mut Command) -> &mut Command,
    body: impl FnOnce(),
) -> Option<Output> {
    if std::env::var(CHILD).is_ok_and(|child| child == test) {
        // Not to be left behind if the parent runs into its time limit.
        // SAFETY: touches no memory.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) };
        body();
        return None;
    }
    // The child has a watchdog of its own, which may be paused.
    let _pause = super::pause_watchdog();
    Some(prepare(alone(test).stdin(Stdio::null())).output().unwrap())
}

/// Like [`run`], in some processes at once, whose commands `prepare` may change by their numbers. Once one of them has
/// failed the others are killed, and only that one is returned.
#[allow(dead_code, reason = "one model of all tests needs several")]
pub(crate) fn run_several(
    test: &'static str,
    processes: usize,
    prepare: impl Fn(usize, &mut Command),
    body: impl FnOnce(),
) -> Option<Vec<(ExitStatus, String)>> {
    if std::env::var(CHILD).is_ok_and(|child| child == test) {
        return run(test, body).map(|_| unreachable!("this is the child"));
    }
    let _pause = super::pause_watchdog();
    let (tell, told) = mpsc::channel();
    let mut children: Vec<_> = (0..processes)
        .map(|number| {
            let mut command = alone(test);
            command.arg("--nocapture").stdin(Stdio::null());
            prepare(number, &mut command);
            // One way for both outputs: it ends when all have closed it, and no process waits for a reader.
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            command.stdout(OwnedFd::from(theirs.try_clone().unwrap())).stderr(OwnedFd::from(theirs));
            let child = command.spawn().unwrap();
            let tell = tell.clone();
            thread::spawn(move || {
                let mut said = Vec::new();
                ours.read_to_end(&mut said).unwrap();
                drop(tell.send((number, String::from_utf8_lossy(&said).into_owned())));
            });
            child
        })
        .collect();
    let mut ended = Vec::new();
    for (number, said) in told.iter().take(processes) {
        ended.push((children[number].wait().unwrap(), said));
        if ended.last().is_some_and(|(status, _)| !status.success()) {
            for child in &mut children {
                // It may have ended.
                drop(child.kill());
                child.wait().unwrap();
            }
            return ended.pop().map(|failed| vec![failed]);
        }
    }
    Some(ended)
}

/// This program, with one test alone.
fn alone(test: &'static str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--test-threads=1"]).env(CHILD, test);
    command
}

/// Like [`run`], and passes on what the process said unless it succeeded.
pub(crate) fn run_well(test: &'static str, body: impl FnOnce()) {
    if let Some(output) = run(test, body) {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        for skip in err.lines().filter(|line| line.starts_with("SKIP ")) {
            super::show(skip);
        }
        assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    }
}

/// Replaces this process by another one that runs the test `test` alone, where [`stage`] is `stage`.
pub(crate) fn execute(test: &'static str, stage: &str) -> ! {
    let error = alone(test).arg("--nocapture").env(STAGE, stage).exec();
    panic!("execve: {error}");
}

/// What [`execute`] was told, in the process that it executed.
pub(crate) fn stage() -> Option<String> {
    std::env::var(STAGE).ok()
}

/// Forks this process, runs `body` in the child, which exits with 0 if it returns, and returns the child.
///
/// The child has only this thread: `body` must not take a lock that another thread may have held, so it
/// must not allocate either unless the test runs alone ([`run`]).
pub(crate) fn fork(body: impl FnOnce()) -> Forked {
    // SAFETY: the caller keeps to what a forked child may do.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: ends the child without running the parent's handlers.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        pid => Forked(Some(pid)),
    }
}

/// A forked child, killed and waited for when dropped.
#[derive(Debug)]
pub(crate) struct Forked(Option<libc::pid_t>);

impl Forked {
    pub(crate) fn pid(&self) -> libc::pid_t {
        self.0.expect("not waited for yet")
    }

    /// A pidfd of it.
    pub(crate) fn pidfd(&self) -> OwnedFd {
        // SAFETY: touches no memory; the child isn't waited for yet, so the id is its own.
        let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid(), 0) }).expect("Linux 5.3");
        // SAFETY: the descriptor is new, and nothing else owns it.
        unsafe { OwnedFd::from_raw_fd(fd as i32) }
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        // SAFETY: touches no memory; the child isn't waited for yet, so the id is its own.
        unsafe { libc::kill(self.pid(), libc::SIGKILL) };
    }

    /// Waits for its end and returns the wait status.
    pub(crate) fn wait(mut self) -> i32 {
        wait(self.0.take().expect("waited for once"))
    }

    /// Waits for its end, which must be a success.
    pub(crate) fn succeed(self) {
        assert_eq!(self.wait(), 0, "wait status of the child");
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.kill();
            wait(self.pid());
        }
    }
}

fn wait(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: status is borrowed for the call.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid, "{}", std::io::Error::last_os_error());
    status
}

/// Gives up the rights of the superuser: becomes the user nobody, in no group, without a way back.
pub(crate) fn drop_rights() {
    // SAFETY: an empty list of groups.
    assert_eq!(unsafe { libc::setgroups(0, std::ptr::null()) }, 0);
    // SAFETY: touches no memory.
    assert_eq!(unsafe { libc::setresgid(65534, 65534, 65534) }, 0);
    // SAFETY: touches no memory.
    assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0);
}

/// Lowers the limit of open files so that none can be opened, until dropped.
pub(crate) fn use_up_descriptors() -> Full {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is borrowed for the call.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut before) }).unwrap();
    // A limit below the number that a duplicate starts at, 3, would be another error. These fill what is free
    // there. No allocation here: see `proc::read`.
    let mut fillers = [const { None }; 4];
    let free = std::iter::repeat_with(lowest_free).take_while(|fd| fd.as_raw_fd() <= 3);
    fillers.iter_mut().zip(free).for_each(|(filler, fd)| *filler = Some(fd));
    let limit = lowest_free().as_raw_fd() as libc::rlim_t;
    Full::limit(libc::rlimit { rlim_cur: limit, ..before });
    Full { before, _fillers: fillers }
}

/// Opens the lowest number that is free.
fn lowest_free() -> OwnedFd {
    // SAFETY: touches no memory.
    let fd = check(unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 0) }).unwrap();
    // SAFETY: it was just opened, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

/// No descriptor can be opened.
#[derive(Debug)]
pub(crate) struct Full {
    before: libc::rlimit,
    _fillers: [Option<OwnedFd>; 4],
}

impl Full {
    fn limit(limit: libc::rlimit) {
        // SAFETY: the structure is borrowed for the call.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).unwrap();
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        Self::limit(self.before);
    }
}

/// Sends a descriptor over a Unix socket.
pub(crate) fn send_fd(socket: &std::os::unix::net::UnixStream, fd: BorrowedFd<'_>) {
    let mut byte = [0u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = Control::new();
    let message = control.message(&mut data);
    // SAFETY: the message was just set up.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: the control buffer has room for one header and one descriptor, and nothing else refers to it.
    let header = unsafe { &mut *header };
    header.cmsg_level = libc::SOL_SOCKET;
    header.cmsg_type = libc::SCM_RIGHTS;
    // SAFETY: computes a length.
    header.cmsg_len = unsafe { libc::CMSG_LEN(4) } as _;
    // SAFETY: the address behind the header, inside the control buffer.
    let place = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: the data of the header has room for a descriptor number.
    unsafe { place.cast::<i32>().write_unaligned(fd.as_raw_fd()) };
    // SAFETY: everything that the message points to lives until the call returns.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
    assert_eq!(sent, 1, "{}", std::io::Error::last_os_error());
}

/// Receives a descriptor from a Unix socket.
pub(crate) fn receive_fd(socket: &std::os::unix::net::UnixStream) -> OwnedFd {
    let mut byte = [0u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = Control::new();
    let mut message = control.message(&mut data);
    // SAFETY: everything that the message points to lives until the call returns.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    assert_eq!(received, 1, "{}", std::io::Error::last_os_error());
    // SAFETY: the message was just received.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    assert!(!header.is_null(), "no descriptor came");
    // SAFETY: the address behind the header.
    let place = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: a descriptor's number is there, since one was sent.
    let fd = unsafe { place.cast::<i32>().read_unaligned() };
    // SAFETY: the kernel opened it for this call.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Room for the control message of one descriptor, aligned as its header is.
struct Control([u64; 8]);

impl Control {
    fn new() -> Self {
        Self([0; 8])
    }

    fn message(&mut self, data: &mut libc::iovec) -> libc::msghdr {
        // SAFETY: all zeros is an empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = data;
        message.msg_iovlen = 1 as _;
        message.msg_control = self.0.as_mut_ptr().cast();
        // SAFETY: computes a length.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
        message
    }
}
