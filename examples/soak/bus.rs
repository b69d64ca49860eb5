//! SIGBUS, which is what an access to a poisoned page raises.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

use crate::arena::Arena;

/// An access to a page of an arena, while it is going on.
#[derive(Debug)]
pub(crate) struct Access<'a> {
    pub(crate) arena: &'a Arena,
    pub(crate) page: usize,
    /// What the page is.
    pub(crate) state: Cell<u32>,
    /// Whether it is locked by this access.
    pub(crate) locked: bool,
    /// How often it was poisoned.
    pub(crate) hits: Cell<u32>,
    /// Whether it was, and must not have been.
    pub(crate) wrong: Cell<bool>,
}

thread_local! {
    static ACCESS: Cell<*const c_void> = const { Cell::new(ptr::null()) };
}

impl Access<'_> {
    /// Does what may raise SIGBUS.
    pub(crate) fn during<T>(&self, act: impl FnOnce() -> T) -> T {
        ACCESS.set(ptr::from_ref(self).cast());
        compiler_fence(Ordering::SeqCst);
        let result = act();
        compiler_fence(Ordering::SeqCst);
        ACCESS.set(ptr::null());
        result
    }
}

/// Has poison taken away by the thread that meets it. Any other SIGBUS ends the process.
pub(crate) fn install() -> io::Result<()> {
    // SAFETY: all zeros are an action: the default one, no flags, nothing blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action is borrowed for the call. Its handler makes system calls and touches atomics and what its
    // own thread has put on its stack.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    let access: *const Access = ACCESS.get().cast();
    // SAFETY: not null only while `during` has the access borrowed, on this very thread.
    let access = unsafe { access.as_ref() };
    // SAFETY: the kernel passes what it knows of the signal.
    let info = unsafe { &*info };
    // SAFETY: of a SIGBUS the address is told.
    let address = unsafe { info.si_addr() }.addr();
    match access {
        Some(access) if access.arena.has(access.page, address) => access.arena.poisoned(access, address),
        _ => {
            // SAFETY: touches no memory; the access is tried again, and ends the process.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        }
    }
}
