//! The pager's threads.
//!
//! Not the standard library's: a thread of its ends the process where there is no memory for the stack of its signal
//! handlers, and one that is added while memory is out must be an error. So these have no such stack; one whose own stack
//! overflows ends the process all the same, without a word. [`std::thread::current`] has no name for them, the system has.

#![expect(unsafe_code, reason = "an allocation that may fail, and what is passed through it")]

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CStr, c_void};
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::ptr::NonNull;
use std::sync::{Condvar, OnceLock};

use crate::lock_order::{RankedMutex, lock, rank};
use crate::sys;

/// The size of a stack in bytes, as the standard library has it, unless `RUST_MIN_STACK` says otherwise.
const STACK_BYTES: usize = 2 << 20;

/// Bytes that a thread must be able to allocate. More than what is allocated for it then.
const MIN_HEAP_BYTES: usize = 4096;

/// A thread, which goes on when this is dropped.
#[derive(Debug)]
pub(crate) struct Thread(Option<sys::ThreadId>);

/// Workers that are on their way to read, of which the pager waits for those that serve from the start. One that starts takes
/// the allocator's locks, which a fork holds until its event is read.
#[derive(Debug, Default)]
pub(crate) struct StartBarrier {
    started: RankedMutex<usize, { rank::QUEUE }>,
    changed: Condvar,
}

impl StartBarrier {
    /// The calling thread allocates nothing from here on.
    pub(crate) fn arrive(&self) {
        *lock(&self.started) += 1;
        self.changed.notify_all();
    }

    pub(crate) fn wait_for(&self, threads: usize) {
        drop(lock(&self.started).wait_while(&self.changed, |started| *started < threads));
    }
}

/// What a thread runs, and its name.
struct Start<F> {
    run: F,
    name: &'static CStr,
}

impl Thread {
    /// Starts a thread, which takes no signal of the program's. Fails where there is no memory.
    pub(crate) fn spawn<F: FnOnce() + Send + 'static>(name: &'static CStr, run: F) -> io::Result<Self> {
        let layout = const { Layout::new::<Start<F>>() };
        // SAFETY: the layout isn't empty: it has at least the name's address.
        let start =
            NonNull::new(unsafe { alloc(layout) }).ok_or(io::ErrorKind::OutOfMemory)?.cast::<Start<F>>();
        // SAFETY: it was allocated for this, and nothing else leads to it.
        unsafe { start.write(Start { run, name }) };
        // SAFETY: the function takes what was written there, once.
        let started = unsafe { sys::start_thread(enter::<F>, start.as_ptr().cast(), stack()) };
        match started {
            Ok(thread) => Ok(Self(Some(thread))),
            Err(error) => {
                // SAFETY: no thread has it.
                drop(unsafe { take(start) });
                Err(error)
            }
        }
    }

    /// Whether it is the one that asks.
    pub(crate) fn is_current(&self) -> bool {
        self.0.as_ref().is_some_and(sys::ThreadId::is_current)
    }

    /// Waits for its end, unless it is the one that asks: a source, or a callback, may be the last that has the pager. Then
    /// it ends by itself.
    pub(crate) fn join(mut self) {
        if !self.is_current() {
            self.0.take().into_iter().for_each(sys::ThreadId::join);
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(sys::ThreadId::detach);
    }
}

/// Takes what a thread runs out of its allocation.
///
/// # Safety
///
/// The caller must make sure that [`Thread::spawn`] has written it, and that nothing else takes it.
unsafe fn take<F>(start: NonNull<Start<F>>) -> Start<F> {
    // SAFETY: it was written, and is taken once.
    let taken = unsafe { start.read() };
    // SAFETY: it was allocated with this layout.
    unsafe { dealloc(start.as_ptr().cast(), const { Layout::new::<Start<F>>() }) };
    taken
}

/// What a thread does.
extern "C" fn enter<F: FnOnce()>(start: *mut c_void) -> *mut c_void {
    sys::block_signals();
    if let Some(start) = NonNull::new(start.cast::<Start<F>>()) {
        // SAFETY: `spawn` has passed this, for one thread.
        let Start { run, name } = unsafe { take(start) };
        sys::name_thread(name);
        // Where it fails the thread does without, as far as it can.
        has_heap();
        if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(run)) {
            // It has been printed; what it left may panic in turn.
            std::mem::forget(panic);
        }
    }
    std::ptr::null_mut()
}

/// Whether this thread can allocate: an allocator may have to map memory for its first time. Then also has the standard
/// library make what it knows a thread by, which it does when it is first asked for otherwise: by a source, perhaps, while
/// the process forks and the allocator is locked until this thread has read of it.
pub(crate) fn has_heap() -> bool {
    let mut bytes = Vec::<u8>::new();
    let allocated = bytes.try_reserve_exact(MIN_HEAP_BYTES).is_ok();
    drop(std::hint::black_box(bytes));
    if allocated {
        std::hint::black_box(std::thread::current());
    }
    allocated
}

fn stack() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    // Asked when the first pager is made, and not when a worker is added: that allocates nothing.
    *SIZE.get_or_init(|| {
        let asked = std::env::var("RUST_MIN_STACK").ok().and_then(|size| size.parse().ok());
        asked.unwrap_or(STACK_BYTES)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_thread_runs_with_its_name_and_without_signals() {
        crate::support::require!();
        let (told, tell) = mpsc::channel();
        let thread = Thread::spawn(c"a thread", move || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            told.send(status).unwrap();
        });
        let status = tell.recv().unwrap();
        thread.unwrap().join();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        assert_eq!(field("Name:"), "a thread");
        let blocked = u64::from_str_radix(&field("SigBlk:"), 16).unwrap();
        let is_blocked = |signal: i32| blocked & 1 << (signal - 1) != 0;
        assert!(is_blocked(libc::SIGUSR1) && is_blocked(libc::SIGTERM) && !is_blocked(libc::SIGSEGV));
    }

    #[test]
    fn thread_that_panics_ends_and_self_join_returns() {
        crate::support::require!();
        Thread::spawn(c"panics", || std::panic::resume_unwind(Box::new("on purpose"))).unwrap().join();
        let (send, receive) = mpsc::channel::<Thread>();
        let (ended, end) = mpsc::channel();
        let thread = Thread::spawn(c"joins itself", move || {
            let own = receive.recv().unwrap();
            assert!(own.is_current());
            own.join();
            ended.send(()).unwrap();
        });
        let thread = thread.unwrap();
        assert!(!thread.is_current());
        send.send(thread).unwrap();
        end.recv().unwrap();
    }
}
