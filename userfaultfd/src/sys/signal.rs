//! Signals: blocking them, and the handler of SIGBUS.

use super::check;
use crate::Errno;

/// Keeps the program's signals away from the calling thread, but for those that its own faults raise.
pub(crate) fn block_signals() {
    let mut signals = no_signals();
    // SAFETY: the set is borrowed for the call.
    unsafe { libc::sigfillset(&raw mut signals) };
    for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGABRT] {
        // SAFETY: as above.
        unsafe { libc::sigdelset(&raw mut signals, fault) };
    }
    // SAFETY: the set is read, and the old one isn't wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
}

/// A handler of a signal, as SA_SIGINFO calls it.
pub(crate) type Handler = unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// An action of which a C library may fill in a part alone: its set of signals is longer than the kernel's.
fn no_action() -> libc::sigaction {
    // SAFETY: all zeros is the default action, without flags and with nothing blocked.
    unsafe { std::mem::zeroed() }
}

/// A set of signals without any.
fn no_signals() -> libc::sigset_t {
    // SAFETY: all zeros is such a set.
    unsafe { std::mem::zeroed() }
}

/// The signals of a set, a bit for each from 1 on.
pub(crate) fn signals_of(set: &libc::sigset_t) -> u64 {
    // SAFETY: the set is borrowed for the call.
    let has = |signal: &libc::c_int| unsafe { libc::sigismember(set, *signal) } == 1;
    (1..=SIGNALS).filter(has).map(|signal| 1 << (signal - 1)).sum()
}

/// What is done on SIGBUS.
pub(crate) fn bus_action() -> Result<libc::sigaction, Errno> {
    let mut action = no_action();
    // SAFETY: the structure is borrowed for the call, which is told nothing new.
    check(unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut action) })?;
    Ok(action)
}

/// Has something done on SIGBUS, and tells what was before.
///
/// # Safety
///
/// The caller must make sure that a handler does but what a signal handler may.
pub(crate) unsafe fn set_bus_action(action: &libc::sigaction) -> Result<libc::sigaction, Errno> {
    let mut old = no_action();
    // SAFETY: both structures are borrowed for the call; the caller vouches for the handler.
    check(unsafe { libc::sigaction(libc::SIGBUS, action, &raw mut old) })?;
    Ok(old)
}

/// Has SIGBUS handled, on the stack of the thread that it is raised in, and with all signals blocked meanwhile: also
/// those that C libraries keep for themselves, by which a thread is cancelled.
///
/// # Safety
///
/// The caller must make sure that the handler does but what a signal handler may.
pub(crate) unsafe fn handle_bus(handler: Handler) -> Result<libc::sigaction, Errno> {
    let mut action = no_action();
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: any bits are a set.
    unsafe { (&raw mut action.sa_mask).cast::<u8>().write_bytes(!0, size_of::<libc::sigset_t>()) };
    // SAFETY: the caller's promise is the same.
    unsafe { set_bus_action(&action) }
}

/// The address and the code of a signal's information.
///
/// # Safety
///
/// The caller must make sure that `info` is what a handler of SIGBUS was given.
pub(crate) unsafe fn fault_of(info: *const libc::siginfo_t) -> (usize, libc::c_int) {
    // SAFETY: the kernel passes a valid structure, says the caller.
    let info = unsafe { &*info };
    // SAFETY: whatever the signal is for, the bytes of an address are there.
    (unsafe { info.si_addr() }.addr(), info.si_code)
}

#[cfg(not(target_os = "android"))]
use libc::__errno_location as errno_location;

#[cfg(target_os = "android")]
use libc::__errno as errno_location;

/// Keeps `errno` as it is while a signal handler runs.
#[derive(Debug)]
pub(crate) struct KeepErrno(libc::c_int);

impl KeepErrno {
    pub(crate) fn new() -> Self {
        // SAFETY: touches nothing but the thread's errno.
        let errno = unsafe { errno_location() };
        // SAFETY: the thread's own.
        Self(unsafe { *errno })
    }
}

impl Drop for KeepErrno {
    fn drop(&mut self) {
        // SAFETY: touches nothing but the thread's errno.
        let errno = unsafe { errno_location() };
        // SAFETY: the thread's own.
        unsafe { *errno = self.0 };
    }
}

/// Ends the process by SIGBUS, with the information of the one that is being handled: as soon as its handler returns.
///
/// # Safety
///
/// The caller must make sure that `info` is what the handler was given.
pub(crate) unsafe fn die_of_bus(info: *mut libc::siginfo_t) {
    // SAFETY: the default action runs no code of the process.
    let _set = unsafe { set_bus_action(&no_action()) };
    // SAFETY: touches no memory.
    let process = unsafe { libc::getpid() };
    // SAFETY: touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // If it fails, a fault comes again by itself, and the default action ends the process all the same.
    // SAFETY: the kernel reads the structure, which is what it gave to the handler.
    unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, info) };
}

/// Calls a handler of SIGBUS that was there before, with the signals blocked that it asked for: those of the
/// interrupted thread, its own, and SIGBUS unless it has SA_NODEFER. What the kernel restores when this returns isn't
/// touched.
///
/// # Safety
///
/// The caller must make sure that `action` was installed for SIGBUS, and that `info` and `context` are what the
/// handler that runs was given.
pub(crate) unsafe fn call_handler(
    action: &libc::sigaction,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the caller's promise.
    if let Some(mut mask) = unsafe { interrupted_mask(context) } {
        for signal in 1..=SIGNALS {
            // SAFETY: a set that was installed.
            let blocked = unsafe { libc::sigismember(&raw const action.sa_mask, signal) } == 1;
            if blocked || (signal == libc::SIGBUS && action.sa_flags & libc::SA_NODEFER == 0) {
                // SAFETY: the set is borrowed for the call.
                unsafe { libc::sigaddset(&raw mut mask, signal) };
            }
        }
        // SAFETY: the set is read, and the old one isn't wanted.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) };
    }
    if action.sa_flags & libc::SA_SIGINFO == 0 {
        // SAFETY: without SA_SIGINFO, and neither of the two special values, it is such a function.
        let handler: extern "C" fn(libc::c_int) =
            unsafe { std::mem::transmute(std::ptr::with_exposed_provenance::<()>(action.sa_sigaction)) };
        handler(libc::SIGBUS);
    } else {
        // SAFETY: with SA_SIGINFO it is such a function.
        let handler: Handler =
            unsafe { std::mem::transmute(std::ptr::with_exposed_provenance::<()>(action.sa_sigaction)) };
        // SAFETY: the arguments are those that the kernel gave.
        unsafe { handler(libc::SIGBUS, info, context) };
    }
}

/// Number of signals that have a bit in the kernel's sets.
const SIGNALS: libc::c_int = 64;

/// The signals that were blocked when a handler was called, where the layout of its context is known.
///
/// # Safety
///
/// The caller must make sure that `context` is what the handler was given.
#[cfg(any(
    target_arch = "x86_64",
    target_arch = "x86",
    target_arch = "aarch64",
    target_arch = "arm",
    target_arch = "riscv64",
    target_arch = "s390x",
))]
unsafe fn interrupted_mask(context: *mut libc::c_void) -> Option<libc::sigset_t> {
    let mut mask = no_signals();
    // SAFETY: the kernel passes a valid structure, of which a field's address is taken.
    let set = unsafe { &raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask };
    // The kernel's set is shorter than the C library's, and other things follow it.
    let len = (SIGNALS / 8) as usize;
    // SAFETY: both have this number of bytes, and are different objects.
    unsafe { std::ptr::copy_nonoverlapping(set.cast::<u8>(), (&raw mut mask).cast::<u8>(), len) };
    Some(mask)
}

#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "x86",
    target_arch = "aarch64",
    target_arch = "arm",
    target_arch = "riscv64",
    target_arch = "s390x",
)))]
unsafe fn interrupted_mask(_context: *mut libc::c_void) -> Option<libc::sigset_t> {
    None
}
