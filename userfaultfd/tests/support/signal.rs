//! Signals sent to a thread. A handler is the whole process's, so this is for tests that run alone.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::raw::check;

/// How often [`count`]'s handler ran.
static COUNTED: AtomicUsize = AtomicUsize::new(0);

pub(crate) fn counted() -> usize {
    COUNTED.load(Ordering::SeqCst)
}

/// Counts a signal from now on, which interrupts system calls.
pub(crate) fn count(signal: libc::c_int) {
    extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
        COUNTED.fetch_add(1, Ordering::SeqCst);
    }
    handle(signal, handler);
}

/// Handles a signal from now on. System calls that it interrupts aren't restarted.
pub(crate) fn handle(
    signal: libc::c_int,
    handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void),
) {
    // SAFETY: all zeros is an action with no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action is borrowed for the call, and handlers do only what is safe in a signal handler.
    check(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) }).unwrap();
}

/// Sends a signal to a thread of this process.
pub(crate) fn send(thread: libc::pid_t, signal: libc::c_int) {
    let process = std::process::id();
    // SAFETY: touches no memory; the handler is as safe anywhere.
    check(unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) }).unwrap();
}
