//! Which CPUs the thread that faults and the one that answers may use.

use std::io;
use std::mem::{size_of_val, zeroed};
use std::sync::LazyLock;

/// Where the thread that answers runs, seen from the one that faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the scheduler puts them.
    Anywhere,
    /// On another CPU.
    Other,
    /// On the same CPU.
    Same,
    /// It finds the same CPU itself.
    Beside,
}

impl Place {
    /// The CPUs of the thread that faults.
    pub(crate) fn faulting(self) -> &'static [usize] {
        match self {
            Self::Anywhere => &ALLOWED,
            Self::Other | Self::Same | Self::Beside => &ALLOWED[..1],
        }
    }

    /// The CPUs of the thread that answers. `None`: there is no other.
    pub(crate) fn answering(self) -> Option<&'static [usize]> {
        match self {
            Self::Anywhere | Self::Beside => Some(&ALLOWED),
            Self::Other => ALLOWED.get(1..2),
            Self::Same => Some(&ALLOWED[..1]),
        }
    }
}

/// The CPUs that this process may use.
pub(crate) static ALLOWED: LazyLock<Vec<usize>> = LazyLock::new(|| {
    // SAFETY: a set of CPUs is an array of bits, and all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { zeroed() };
    // SAFETY: the kernel writes at most the size of the set.
    let got = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    // SAFETY: the numbers are those that the set has room for.
    (0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect()
});

/// Keeps this thread, and those that it will start, on these CPUs.
pub(crate) fn stay_on(cpus: &[usize]) {
    LazyLock::force(&ALLOWED);
    keep_on(0, cpus);
}

/// Keeps a thread on these CPUs. 0 is this one.
fn keep_on(thread: libc::pid_t, cpus: &[usize]) {
    // SAFETY: a set of CPUs is an array of bits, and all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { zeroed() };
    for cpu in cpus {
        // SAFETY: the number came out of a set.
        unsafe { libc::CPU_SET(*cpu, &mut set) };
    }
    // SAFETY: the set is borrowed for the call.
    let done = unsafe { libc::sched_setaffinity(thread, size_of_val(&set), &raw const set) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Starts threads, and moves those of a name to the CPUs of the one that answers.
pub(crate) fn moved<T>(place: Place, name: &str, start: impl FnOnce() -> T) -> Result<T, String> {
    let cpus = place.answering().ok_or("needs two CPUs")?;
    let threads = || -> Vec<libc::pid_t> {
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc").flatten();
        let named = tasks.filter(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        });
        named.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
    };
    let before = threads();
    let started = start();
    threads().into_iter().filter(|thread| !before.contains(thread)).for_each(|thread| keep_on(thread, cpus));
    Ok(started)
}

/// Starts threads on the CPUs of the one that answers.
pub(crate) fn answering<T>(place: Place, start: impl FnOnce() -> T) -> Result<T, String> {
    stay_on(place.answering().ok_or("needs two CPUs")?);
    let started = start();
    stay_on(&ALLOWED);
    Ok(started)
}
