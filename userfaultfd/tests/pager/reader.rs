//! Threads that read memory, and tell what they saw: a byte, or a signal.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use crate::support::proc::wait_until;
use crate::support::signal;

/// What a thread saw that read a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Byte(u8),
    Signal(c_int),
}

impl Seen {
    pub(crate) const ZERO: Self = Self::Byte(0);
    pub(crate) const POISON: Self = Self::Signal(libc::SIGBUS);
}

/// A thread that reads a byte, and tells what it saw. One that gets a signal never goes on.
#[derive(Debug)]
pub(crate) struct Reader {
    slot: Arc<AtomicU32>,
}

const BYTE: u32 = 1 << 8;
const SIGNAL: u32 = 1 << 9;

thread_local! {
    /// Where the reader that this thread is tells what it saw.
    static SLOT: Cell<*const AtomicU32> = const { Cell::new(ptr::null()) };
}

extern "C" fn tell_signal(signal: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: null, or the slot of this thread, which lives as long as it.
    let Some(slot) = (unsafe { SLOT.get().as_ref() }) else {
        // SAFETY: touches no memory. The access happens again, and is fatal then.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    };
    slot.store(SIGNAL | signal as u32, Ordering::SeqCst);
    loop {
        // SAFETY: touches no memory.
        unsafe { libc::pause() };
    }
}

impl Reader {
    pub(crate) fn of(address: usize) -> Self {
        let slot = Arc::new(AtomicU32::new(0));
        let told = Arc::clone(&slot);
        thread::spawn(move || {
            SLOT.set(&raw const *told);
            let address: *const u8 = ptr::with_exposed_provenance(address);
            // SAFETY: whether it can be read is what the test wants to know.
            let byte = unsafe { address.read_volatile() };
            told.store(BYTE | u32::from(byte), Ordering::SeqCst);
        });
        Self { slot }
    }

    pub(crate) fn has_seen(&self) -> bool {
        self.slot.load(Ordering::SeqCst) != 0
    }

    /// What it sees in the end. The time limit of the test is that of a reader that nobody wakes.
    pub(crate) fn wait(&self) -> Seen {
        wait_until(|| self.has_seen());
        let seen = self.slot.load(Ordering::SeqCst);
        if seen & BYTE != 0 { Seen::Byte(seen as u8) } else { Seen::Signal((seen & !SIGNAL) as c_int) }
    }
}

/// What is read at an address, now.
pub(crate) fn read(address: usize) -> Seen {
    Reader::of(address).wait()
}

/// Has readers and faults tell of signals.
pub(crate) fn tell_signals() {
    for fault in [libc::SIGSEGV, libc::SIGBUS] {
        signal::handle(fault, tell_signal);
    }
}
