//! Running a program with a time limit, and what it may find missing.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use userfaultfd::{Error, FeatureFlags, Support, UffdBuilder};
use userfaultfd_examples::UNMET;

/// An example that runs longer hangs: a fault that nobody resolves.
pub(crate) fn limit() -> Duration {
    let seconds = env::var("USERFAULTFD_TEST_SECONDS");
    Duration::from_secs(seconds.map_or(60, |seconds| seconds.parse().expect("a number of seconds")))
}

/// What an example said, and how it ended.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// What an example may find missing.
#[derive(Debug)]
pub(crate) enum Need {
    Features(FeatureFlags),
    /// `CAP_SYS_PTRACE`.
    Ptrace,
    /// A number of free huge pages.
    HugePages(u64),
}

impl Need {
    /// Whether this run was told that it is met.
    fn is_expected(&self) -> bool {
        let named = |name: &str| {
            env::var("USERFAULTFD_EXPECT")
                .is_ok_and(|names| names.split(',').any(|expected| expected == name))
        };
        match self {
            Need::Features(features) => env::var("USERFAULTFD_EXPECT_FEATURES").is_ok_and(|mask| {
                let mask =
                    u64::from_str_radix(mask.trim_start_matches("0x"), 16).expect("a mask in hexadecimal");
                FeatureFlags::from_bits_retain(mask).contains(*features)
            }),
            Need::Ptrace => named("CAP_SYS_PTRACE"),
            Need::HugePages(_) => named("hugetlb"),
        }
    }

    /// Whether the kernel says that it is met.
    fn is_met(&self) -> bool {
        match self {
            Need::Features(features) => {
                Support::probe().is_ok_and(|support| support.features().contains(*features))
            }
            Need::Ptrace => {
                let forks = FeatureFlags::EVENT_FORK;
                let uffd = UffdBuilder::new().close_on_exec(true).require_features(forks).create();
                !matches!(uffd, Err(Error::FeatureNotPermitted(_) | Error::UnsupportedFeatures { .. }))
            }
            Need::HugePages(pages) => free_huge_pages() >= *pages,
        }
    }
}

impl Output {
    /// The output of a success. `None`, visibly, if a need isn't met.
    pub(crate) fn unless_unmet(self, test: &str, need: Need) -> Option<Self> {
        if self.status.code() == Some(UNMET.into()) && !need.is_expected() && !need.is_met() {
            let needs = self.err.lines().last().unwrap_or_default();
            skip(test, needs.strip_prefix("needs ").expect("the last line tells what is needed"));
            return None;
        }
        assert!(self.status.success(), "{self:?}");
        Some(self)
    }
}

/// Says it, past the test harness unless that was told to show what a passing test prints.
pub(crate) fn skip(test: &str, needs: &str) {
    if env::args().any(|argument| argument == "--show-output") {
        println!("SKIP {test}: needs {needs}");
    } else {
        writeln!(io::stderr(), "SKIP {test}: needs {needs}").expect("standard error is open");
    }
}

/// The command of a built example.
pub(crate) fn command(example: &str) -> Command {
    Command::new(path(example))
}

/// The same, run by the user nobody.
pub(crate) fn nobodys_command(example: &str) -> Command {
    // By a descriptor, since a directory on the way may be closed to that user.
    let file = File::open(path(example)).expect("an example that is there");
    let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.uid(NOBODY).gid(NOBODY);
    let keep_open = move || {
        let _ = &file;
        Ok(())
    };
    // SAFETY: the closure does nothing; it owns the file as long as there is the command.
    unsafe { command.pre_exec(keep_open) };
    command
}

const NOBODY: u32 = 65534;

/// `target/PROFILE/examples/EXAMPLE`, from `target/PROFILE/deps/run-HASH`.
fn path(example: &str) -> PathBuf {
    let directory = env::var_os("USERFAULTFD_EXAMPLES").map_or_else(
        || {
            let test = env::current_exe().expect("the path of this program");
            test.parent().and_then(|deps| deps.parent()).expect("a directory of the profile").join("examples")
        },
        PathBuf::from,
    );
    let path = directory.join(example);
    assert!(
        path.exists(),
        "{} isn't there: `cargo test --test` builds no examples, `cargo build --examples` does",
        path.display()
    );
    path
}

/// Has userfaultfd(2) refused with `EPERM`, as the filters of containers do.
pub(crate) fn forbid_userfaultfd(command: &mut Command) {
    const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }
    static FILTER: [libc::sock_filter; 4] = [
        // The number of the system call is the first word. If it isn't this one, skip an instruction.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = || {
        let program = libc::sock_fprog { len: FILTER.len() as u16, filter: FILTER.as_ptr().cast_mut() };
        // SAFETY: takes numbers and touches no memory. Without it a filter takes rights.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel reads the program and its instructions, which are static.
        match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes two system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(install) };
}

/// Runs a command, which is killed with all that it has started if it hangs.
pub(crate) fn run(command: &mut Command) -> Output {
    start(command).output()
}

/// A command that runs.
pub(crate) struct Running {
    /// For messages.
    command: String,
    child: Child,
    out: BufReader<ChildStdout>,
    /// What was taken from there.
    taken: String,
    err: JoinHandle<String>,
    done: Sender<()>,
    watchdog: JoinHandle<bool>,
}

/// Starts a command, which is killed with all that it has started if it hangs.
pub(crate) fn start(command: &mut Command) -> Running {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().expect("a program that can be started");
    let group = child.id() as libc::pid_t;
    let (done, watched) = mpsc::channel::<()>();
    let limit = limit();
    let watchdog = thread::spawn(move || {
        // A test that fails drops the other end.
        let ended = watched.recv_timeout(limit);
        if ended.is_err() {
            // SAFETY: touches no memory. The child is waited for after this thread, so the number is still its own.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        ended == Err(RecvTimeoutError::Timeout)
    });
    let mut err = child.stderr.take().expect("a pipe");
    let out = BufReader::new(child.stdout.take().expect("a pipe"));
    let err = thread::spawn(move || read(&mut err));
    let command = format!("{command:?}");
    Running { command, child, out, taken: String::new(), err, done, watchdog }
}

impl Running {
    /// The next line that it says, with its end. Empty if it ends without one.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("text");
        self.taken += &line;
        line
    }

    /// What its descriptors are, as `/proc` names it.
    pub(crate) fn open_files(&self) -> Vec<PathBuf> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("a process that runs");
        // One may be closed between a look at the list and a look at it.
        descriptors.filter_map(|descriptor| fs::read_link(descriptor.ok()?.path()).ok()).collect()
    }

    /// All that it says, when it has ended.
    pub(crate) fn output(mut self) -> Output {
        let out = self.taken + &read(&mut self.out);
        let err = self.err.join().expect("a reader doesn't panic");
        // A watchdog that has killed it doesn't listen any more.
        let _killed = self.done.send(());
        let hangs = self.watchdog.join().expect("the watchdog doesn't panic");
        let status = self.child.wait().expect("a child to wait for");
        assert!(!hangs, "{} hangs; it said\n{out}\n{err}", self.command);
        Output { status, out, err }
    }
}

fn read(pipe: &mut impl Read) -> String {
    let mut text = String::new();
    pipe.read_to_string(&mut text).expect("text");
    text
}

pub(crate) fn is_root() -> bool {
    // SAFETY: touches no memory.
    unsafe { libc::geteuid() == 0 }
}

/// The text with every address as `0x…`.
pub(crate) fn masked(text: &str) -> String {
    let mut parts = text.split("0x");
    let mut masked = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|digit: char| digit.is_ascii_hexdigit() || digit == '…');
        masked.extend(["0x…", rest]);
    }
    masked
}

/// The code blocks of a Markdown text: their language, and what is in them.
pub(crate) fn blocks(markdown: &str) -> Vec<(&str, &str)> {
    // Text and blocks take turns.
    let blocks = markdown.split("```").skip(1).step_by(2);
    blocks.map(|block| block.split_once('\n').expect("a line of its own")).collect()
}

/// Where the size of the pool of huge pages stands, for pages of the default size.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages, given back when dropped.
pub(crate) struct Reserved {
    before: Option<String>,
    /// Held until the pages are given back.
    _lock: Option<File>,
}

/// Makes sure that a number of huge pages are free, as far as this process may.
pub(crate) fn reserve_huge_pages(pages: u64) -> Reserved {
    let lock = lock_pool();
    let before = fs::read_to_string(POOL).ok();
    let size = before.as_ref().and_then(|size| size.trim().parse::<u64>().ok()).unwrap_or(0);
    let more = pages.saturating_sub(free_huge_pages());
    let grown = more != 0 && fs::write(POOL, (size + more).to_string()).is_ok();
    Reserved { before: before.filter(|_| grown), _lock: lock }
}

fn free_huge_pages() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    free.and_then(|free| free.trim().parse().ok()).unwrap_or(0)
}

/// Waits until no other test of this workspace holds huge pages.
fn lock_pool() -> Option<File> {
    let path = env::temp_dir().join("userfaultfd-hugetlb.lock");
    // Another user's file in a sticky directory can be opened, but not with O_CREAT, not even by root
    // (fs.protected_regular).
    let file = File::open(&path).or_else(|_| File::create_new(&path)).or_else(|_| File::open(&path)).ok()?;
    // SAFETY: touches no memory.
    let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    (locked == 0).then_some(file)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let Some(before) = &self.before else { return };
        if let Err(error) = fs::write(POOL, before) {
            eprintln!("huge pages are not given back: {POOL} should be {before}: {error}");
        }
    }
}

/// A group of processes that together may have so much memory. It goes when this is dropped, once they have ended.
#[derive(Debug)]
pub(crate) struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// `None`, and a word about it, where no group can be made.
    pub(crate) fn new(name: &str, bytes: usize) -> Option<Self> {
        let name = format!("userfaultfd-{name}-{}", std::process::id());
        let kinds = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        let made = kinds.iter().find_map(|(parent, limit)| {
            let group = Self(PathBuf::from(parent).join(&name));
            // Of version 2 a group has the file if its parent gives its children such limits.
            fs::create_dir(&group.0).ok()?;
            fs::write(group.0.join(limit), bytes.to_string()).is_ok().then_some(group)
        });
        if made.is_none() {
            eprintln!(
                "{name}: no memory cgroup can be made here, so that nothing but the program holds the limit"
            );
        }
        made
    }

    /// Has a program run in the group.
    pub(crate) fn holds(&self, command: &mut Command) {
        let processes = File::options().write(true).open(self.0.join("cgroup.procs")).expect("a group");
        // SAFETY: between fork and exec it makes one system call, with a descriptor that it owns.
        unsafe { command.pre_exec(move || (&processes).write_all(b"0")) };
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.0);
        if !thread::panicking() {
            removed.expect("all of its processes have ended");
        }
    }
}
