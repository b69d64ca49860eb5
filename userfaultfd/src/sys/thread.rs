//! Threads, the CPUs that they run on, and ending a process.

use std::ffi::CStr;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::file::read;
use super::{check, own};
use crate::Errno;

/// A thread that was started by [`start_thread`], and neither joined nor detached.
#[derive(Debug)]
pub(crate) struct ThreadId(libc::pthread_t);

// SAFETY: it is a name for a thread, by which any thread may ask for it.
unsafe impl Send for ThreadId {}

// SAFETY: as above.
unsafe impl Sync for ThreadId {}

impl ThreadId {
    /// Whether it is the one that asks.
    pub(crate) fn is_current(&self) -> bool {
        // SAFETY: touches no memory.
        let own = unsafe { libc::pthread_self() };
        // SAFETY: both name threads that are there, or that nobody has joined.
        unsafe { libc::pthread_equal(self.0, own) != 0 }
    }

    /// Waits for its end.
    pub(crate) fn join(self) {
        // SAFETY: nobody has joined or detached it, and what it returns isn't wanted.
        let joined = unsafe { libc::pthread_join(self.0, std::ptr::null_mut()) };
        debug_assert_eq!(joined, 0);
    }

    /// Has it free what it has once it ends.
    pub(crate) fn detach(self) {
        // SAFETY: nobody has joined or detached it.
        let detached = unsafe { libc::pthread_detach(self.0) };
        debug_assert_eq!(detached, 0);
    }
}

/// Starts a thread with a stack of the given length in bytes, or of the C library's default length where it refuses that.
///
/// # Safety
///
/// The caller must make sure that the function may be called with the argument, on any thread, once.
pub(crate) unsafe fn start_thread(
    enter: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void,
    argument: *mut libc::c_void,
    stack: usize,
) -> std::io::Result<ThreadId> {
    let result = |errno: libc::c_int| match errno {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)),
    };
    let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: the structure is written by the call.
    result(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
    // SAFETY: it was initialised above.
    let _refused = unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), stack) };
    let mut thread = std::mem::MaybeUninit::<libc::pthread_t>::uninit();
    // SAFETY: both structures are borrowed for the call; the caller vouches for the function.
    let started = unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), enter, argument) };
    // SAFETY: it was initialised above, and isn't used any more.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    result(started)?;
    // SAFETY: the call, which has succeeded, has written it.
    Ok(ThreadId(unsafe { thread.assume_init() }))
}

/// Gives the calling thread a name, of 15 bytes at most.
pub(crate) fn name_thread(name: &CStr) {
    // SAFETY: the name is NUL-terminated.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// The CPU that a thread runs on, or ran on last. `None` where /proc doesn't tell. Allocates nothing.
pub(crate) fn last_cpu(thread: i32) -> Option<usize> {
    let mut path = [0; 32];
    write!(&mut path[..], "/proc/{thread}/stat\0").ok()?;
    // SAFETY: the path is NUL-terminated.
    let fd = check(unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) }).ok()?;
    // SAFETY: open returned a new descriptor that nothing else owns.
    let stat = unsafe { own(fd) };
    let mut text = [0; 512];
    let read = read(stat.as_fd(), &mut text).ok()?;
    cpu_of_stat(&text[..read])
}

/// The 39th field of /proc/PID/stat. The second is a name in parentheses, which may hold anything.
fn cpu_of_stat(stat: &[u8]) -> Option<usize> {
    let fields = stat.rsplit(|byte| *byte == b')').next()?;
    let mut fields = fields.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    std::str::from_utf8(fields.nth(36)?).ok()?.trim().parse().ok()
}

/// The CPU that the calling thread runs on, for the moment.
pub(crate) fn own_cpu() -> Option<usize> {
    // SAFETY: touches no memory.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// The bits of a word of a [`CpuSet`].
const WORD_BITS: usize = libc::c_ulong::BITS as usize;

/// A bit for each CPU that there can be.
pub(crate) type CpuSet = [libc::c_ulong; 8192 / WORD_BITS];

/// The word of a set that has a CPU, and its bit there.
fn cpu_in(set: &mut CpuSet, cpu: usize) -> Option<(&mut libc::c_ulong, libc::c_ulong)> {
    Some((set.get_mut(cpu / WORD_BITS)?, 1 << (cpu % WORD_BITS)))
}

/// Has the calling thread run on one CPU alone.
pub(crate) fn run_on(cpu: usize) -> Result<(), Errno> {
    let mut set: CpuSet = [0; 8192 / WORD_BITS];
    let (word, bit) = cpu_in(&mut set, cpu).ok_or(Errno::EINVAL)?;
    *word = bit;
    set_affinity(0, &set)
}

/// Moves the calling thread to another CPU, of those that it may run on. Returns whether there is one. Afterwards it may
/// run where it might before.
pub(crate) fn leave_cpu() -> bool {
    let Ok(all) = affinity() else { return false };
    let mut others = all;
    let Some((word, bit)) = own_cpu().and_then(|cpu| cpu_in(&mut others, cpu)) else { return false };
    *word &= !bit;
    if others.iter().all(|word| *word == 0) || set_affinity(0, &others).is_err() {
        return false;
    }
    // It stays where it is now. What it was just allowed isn't refused.
    let restored = set_affinity(0, &all);
    debug_assert!(restored.is_ok(), "{restored:?}");
    true
}

/// Has a thread, or the calling one if that is 0, run on these CPUs alone.
pub(crate) fn set_affinity(thread: i32, set: &CpuSet) -> Result<(), Errno> {
    // SAFETY: the kernel reads the set, which is as long as is told.
    let returned =
        unsafe { libc::sched_setaffinity(thread, size_of_val(set), set.as_ptr().cast::<libc::cpu_set_t>()) };
    check(returned).map(drop)
}

/// The CPUs that the calling thread may run on.
pub(crate) fn affinity() -> Result<CpuSet, Errno> {
    let mut set: CpuSet = [0; 8192 / WORD_BITS];
    // SAFETY: the kernel writes at most as many bytes as are told to the set, borrowed for the call.
    let returned =
        unsafe { libc::sched_getaffinity(0, size_of_val(&set), set.as_mut_ptr().cast::<libc::cpu_set_t>()) };
    check(returned).map(|_| set)
}

/// The number of the calling thread.
pub(crate) fn own_thread() -> i32 {
    // SAFETY: touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    thread as i32
}

/// pidfd_send_signal(2) with SIGKILL. `ESRCH`: the process has ended.
#[cfg(feature = "pager")]
pub(crate) fn kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let (fd, no_info) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the system call takes integers, and no structure.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) } as libc::c_int)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_of_thread_is_returned() {
        crate::support::require!();
        let stat = b"1234 (a ) b) S 1 1234 1234 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 100 200 300 18446744073709551615 \
            1 1 0 0 0 0 0 4096 0 0 0 0 17 13 0 0 0 0 0\n";
        assert_eq!(cpu_of_stat(stat), Some(13));
        assert_eq!(cpu_of_stat(b"1234 (a) S 1"), None);
        let here = nix::unistd::gettid().as_raw();
        let cpu = last_cpu(here).expect("this thread runs somewhere");
        run_on(cpu).unwrap();
        assert_eq!(last_cpu(here), Some(cpu));
        assert_eq!(run_on(1 << 20), Err(Errno::EINVAL));
        assert!(!leave_cpu(), "there is no other that it may run on");
    }

    #[test]
    fn thread_moves_to_another_cpu() {
        crate::support::require!();
        let allowed = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            status.lines().find(|line| line.starts_with("Cpus_allowed:")).unwrap().to_owned()
        };
        let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        if !crate::support::has(crate::support::test_name!(), "several CPUs", several) {
            return;
        }
        let before = allowed();
        // Afterwards it may go back, if another thread wants the CPU.
        let moves = (0..100).filter(|_| {
            let here = own_cpu();
            assert!(leave_cpu());
            own_cpu() != here
        });
        assert!(moves.count() > 50);
        assert_eq!(allowed(), before);
    }
}
