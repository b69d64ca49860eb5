//! The handler of SIGBUS.

#![expect(unsafe_code, reason = "a signal handler")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use super::table::with_memory_at;
use crate::pager::Result;
use crate::pager::descriptor::lock;
use crate::sys;

/// What was done on SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Whether that was to be done once (SA_RESETHAND), and has been.
static SPENT: AtomicBool = AtomicBool::new(false);

/// Installs the handler, the first time.
pub(super) fn install() -> Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = lock(&INSTALLED);
    if !*installed {
        // Asked before, so that a signal that comes at once finds it.
        BEFORE.get_or_init(|| sys::bus_action().unwrap_or_else(|errno| unreachable!("SIGBUS: {errno}")));
        // SAFETY: the handler and all that it calls allocate nothing, take no lock, and keep errno.
        unsafe { sys::handle_bus(handle) }?;
        *installed = true;
    }
    Ok(())
}

unsafe extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let _errno = sys::KeepErrno::new();
    // SAFETY: it is what this handler was given.
    let (address, code) = unsafe { sys::fault_of(info) };
    // A missing page of a userfaultfd. So are other things, which no memory of ours is at.
    if code == libc::BUS_ADRERR {
        // Nothing is held afterwards: the handler before may never return.
        if with_memory_at(address, |lazy, shard| lazy.fault(address, shard)) == Some(true) {
            return;
        }
    }
    // SAFETY: both are what this handler was given.
    unsafe { foreign(info, context) }
}

/// What is done with a SIGBUS that isn't ours: what was done before.
unsafe fn foreign(info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let before = BEFORE.get();
    // SAFETY: it is what the handler was given.
    let (_, code) = unsafe { sys::fault_of(info) };
    match before {
        // Ignored is what somebody sent, not what the kernel raises.
        Some(action) if action.sa_sigaction == libc::SIG_IGN && code <= 0 => {}
        Some(action) if action.sa_sigaction != libc::SIG_IGN && action.sa_sigaction != libc::SIG_DFL => {
            let once = action.sa_flags & libc::SA_RESETHAND != 0;
            if once && SPENT.swap(true, Ordering::Relaxed) {
                // SAFETY: it is what the handler was given.
                return unsafe { sys::die_of_bus(info) };
            }
            // SAFETY: the action was installed for SIGBUS; the rest is what the handler was given.
            unsafe { sys::call_handler(action, info, context) };
        }
        // SAFETY: it is what the handler was given.
        _ => unsafe { sys::die_of_bus(info) },
    }
}
