//! Threads under SCHED_FIFO: what they don't leave, no other thread gets of their CPU.

#![expect(unsafe_code, reason = "system calls of a test")]

use std::time::Duration;

use crate::support::has;

/// Puts the calling thread under SCHED_FIFO. Returns whether that is allowed.
pub(crate) fn enter() -> bool {
    set(libc::SCHED_FIFO, 1)
}

fn set(policy: libc::c_int, priority: libc::c_int) -> bool {
    // SAFETY: all zeros is such a structure.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = priority;
    // Not the C library's function, which musl doesn't have.
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const parameters) == 0 }
}

/// Two CPUs that this thread may run on, if threads may be put under SCHED_FIFO.
pub(crate) fn cpus(test: &str) -> Option<[usize; 2]> {
    let allowed = enter();
    if allowed {
        assert!(set(libc::SCHED_OTHER, 0));
    }
    if !has(test, "real-time scheduling", allowed) {
        return None;
    }
    // SAFETY: all zeros is a set without any.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes to the set, which is borrowed for the call.
    assert_eq!(unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) }, 0);
    // SAFETY: the set is borrowed, and as long as the numbers go.
    let mut cpus = (0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) });
    let two = cpus.next().zip(cpus.next());
    if !has(test, "two CPUs", two.is_some()) {
        return None;
    }
    two.map(|(one, other)| [one, other])
}

/// How long the calling thread has run.
pub(crate) fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes the structure, which is borrowed for the call.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
