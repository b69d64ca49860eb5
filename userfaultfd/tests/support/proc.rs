//! What /proc tells of descriptors and threads: the way to see that something waits, without waiting for a
//! time.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use userfaultfd::{FeatureFlags, IoctlFlags};

use super::maps;

/// What the kernel tells of a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fdinfo {
    /// Faults that nobody has read.
    pub(crate) pending: usize,
    /// Those and the ones read whose threads still wait.
    pub(crate) total: usize,
    /// What is enabled, without the bit that says that the handshake is done.
    pub(crate) features: FeatureFlags,
    /// What descriptors and ranges have in this kernel, all together.
    pub(crate) ioctls: IoctlFlags,
}

/// Reads a small file of /proc, without allocating: a thread that waits in fork(2) for its event to be read
/// holds the locks of the allocator meanwhile.
pub(crate) fn read<'a>(path: fmt::Arguments<'_>, text: &'a mut [u8; 512]) -> Option<&'a str> {
    let mut name = [0; 64];
    let mut rest = &mut name[..];
    rest.write_fmt(path).unwrap();
    let unused = rest.len();
    let name = std::str::from_utf8(&name[..64 - unused]).unwrap();
    let len = File::open(name).ok()?.read(text).ok()?;
    std::str::from_utf8(&text[..len]).ok()
}

/// Looks a userfaultfd up in fdinfo.
pub(crate) fn fdinfo(fd: impl AsFd) -> Fdinfo {
    let mut text = [0; 512];
    let text = read(format_args!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()), &mut text).unwrap();
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).trim()
    };
    let mut api = field("API:").split(':').map(|number| u64::from_str_radix(number, 16).unwrap()).skip(1);
    Fdinfo {
        pending: field("pending:").parse().unwrap(),
        total: field("total:").parse().unwrap(),
        features: FeatureFlags::from_bits_retain(api.next().unwrap() & !(1 << 31)),
        ioctls: IoctlFlags::from_bits_retain(api.next().unwrap()),
    }
}

/// Waits until `faults` faults wait to be read.
pub(crate) fn wait_for_pending(fd: impl AsFd, faults: usize) {
    wait_until(|| fdinfo(&fd).pending == faults);
}

/// Waits until a condition holds that nothing tells of. The time limit of the test bounds it.
pub(crate) fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// The calling thread's id.
pub(crate) fn thread_id() -> libc::pid_t {
    // SAFETY: touches no memory.
    unsafe { libc::syscall(libc::SYS_gettid) as libc::pid_t }
}

/// Waits until a thread of this process sleeps in a system call.
pub(crate) fn wait_until_in(thread: libc::pid_t, syscall: libc::c_long) {
    wait_until(|| is_in(thread, syscall).expect("a kernel that tells of system calls"));
}

/// Whether a thread of this process sleeps in a system call. `None` if it is gone.
pub(crate) fn is_in(thread: libc::pid_t, syscall: libc::c_long) -> Option<bool> {
    let mut text = [0; 512];
    let text = read(format_args!("/proc/self/task/{thread}/syscall"), &mut text)?;
    // "running" while it isn't asleep, else the number and the arguments.
    Some(text.split_whitespace().next()?.parse() == Ok(syscall))
}

/// Whether a thread of this process sleeps, and not in a system call. Those that are gone don't.
pub(crate) fn sleeps_in_fault(thread: libc::pid_t) -> bool {
    let mut text = [0; 512];
    read(format_args!("/proc/self/task/{thread}/syscall"), &mut text)
        .is_some_and(|text| text.starts_with("-1 "))
}

/// How often a thread of this process has stopped running.
pub(crate) fn switches(thread: libc::pid_t) -> u64 {
    let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
    counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum()
}

/// How many descriptors this process has open. For processes with one test only.
pub(crate) fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Whether a descriptor number is an open userfaultfd of this process.
pub(crate) fn is_userfaultfd(fd: libc::c_int) -> bool {
    fs::read_link(format!("/proc/self/fd/{fd}"))
        .is_ok_and(|name| name.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Whether this machine has something to swap to.
pub(crate) fn has_swap() -> bool {
    // The first line is the head of the table.
    fs::read_to_string("/proc/swaps").is_ok_and(|table| table.lines().count() > 1)
}

/// How many bytes of the mappings that begin in a range of addresses are swapped out.
pub(crate) fn swapped(range: Range<usize>) -> usize {
    maps::sum_of(range, "Swap")
}
