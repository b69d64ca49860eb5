//! Faults answered by a signal handler in the thread that faults.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;

use libc::{c_int, c_void, siginfo_t};
use memmap2::MmapMut;
use userfaultfd_sys::UFFD_FEATURE_SIGBUS;

use super::cpus::{self, Place};
use super::{CONTENT, Contender, FAULTS, Walk, bare, memory, raw};

/// What the handler must fill. One memory at a time is being touched.
static FD: AtomicI32 = AtomicI32::new(-1);
static START: AtomicUsize = AtomicUsize::new(0);
static LEN: AtomicUsize = AtomicUsize::new(0);
static SOURCE: AtomicUsize = AtomicUsize::new(0);
static PAGE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_sigbus(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO the structure.
    let info = unsafe { &*info };
    // SAFETY: of SIGBUS, this field is the valid one.
    let address = unsafe { info.si_addr() }.addr();
    let page = PAGE.load(Ordering::Relaxed);
    let address = address & !(page - 1);
    let at = address.wrapping_sub(START.load(Ordering::Relaxed));
    if at >= LEN.load(Ordering::Relaxed) {
        std::process::abort();
    }
    let source = ptr::with_exposed_provenance(SOURCE.load(Ordering::Relaxed) + at);
    let to = ptr::with_exposed_provenance_mut(address);
    // SAFETY: the content lives on, and it is what this thread must find.
    if unsafe { bare::copy(FD.load(Ordering::Relaxed), source, to, page) }.is_err() {
        std::process::abort();
    }
}

/// Memory whose faults are signals.
pub(crate) struct Signal {
    fd: OwnedFd,
    memory: MmapMut,
    content: Arc<[u8]>,
}

impl Signal {
    pub(crate) fn new(content: Arc<[u8]>) -> Self {
        let fd = raw::open(libc::O_NONBLOCK, UFFD_FEATURE_SIGBUS);
        let mut memory = memory(content.len());
        raw::register(&fd, &mut memory);
        Self { fd, memory, content }
    }

    /// The memory.
    pub(crate) fn start(&self) -> *const u8 {
        self.memory.as_ptr()
    }

    /// Does something with the handler in place, and puts the one back that was there before.
    pub(crate) fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        FD.store(self.fd.as_raw_fd(), Ordering::Relaxed);
        START.store(self.memory.as_ptr().expose_provenance(), Ordering::Relaxed);
        LEN.store(self.memory.len(), Ordering::Relaxed);
        SOURCE.store(self.content.as_ptr().expose_provenance(), Ordering::Relaxed);
        PAGE.store(userfaultfd::page_size(), Ordering::Relaxed);
        // SAFETY: no flags, an empty mask and no handler are all zero.
        let mut ours: libc::sigaction = unsafe { zeroed() };
        ours.sa_sigaction = (on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void)) as usize;
        ours.sa_flags = libc::SA_SIGINFO;
        let before = sigaction(&ours);
        let done = work();
        sigaction(&before);
        done
    }
}

fn sigaction(new: &libc::sigaction) -> libc::sigaction {
    // SAFETY: overwritten by the call.
    let mut old: libc::sigaction = unsafe { zeroed() };
    // SAFETY: the handler makes system calls and nothing else; both structures are borrowed for the call.
    let done = unsafe { libc::sigaction(libc::SIGBUS, new, &raw mut old) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    old
}

struct Ladder {
    signal: Signal,
    walk: Walk,
}

impl Contender for Ladder {
    fn round(&mut self) -> Duration {
        cpus::stay_on(Place::Same.faulting());
        let Self { signal, walk } = self;
        signal.during(|| walk.read(signal.start(), FAULTS))
    }
}

pub(crate) fn make() -> Result<Box<dyn Contender>, String> {
    let signal = Signal::new(Arc::clone(&CONTENT));
    Ok(Box::new(Ladder { signal, walk: Walk::new() }))
}
