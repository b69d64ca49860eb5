//! What handlers of faults do, in the short form that tests want.

use std::io::Write;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::{panic, thread};

use userfaultfd::{Errno, Event, FaultKind, ReadWrite, Uffd};

use super::memory::Memory;
use super::proc::{thread_id, wait_until};
use super::raw::{check, pipe, wait_for_event};

/// An [`Event::Pagefault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: FaultKind,
    pub(crate) rw: ReadWrite,
    pub(crate) addr: usize,
    pub(crate) thread: libc::pid_t,
}

impl Fault {
    /// An event that must be a fault.
    pub(crate) fn of(event: Event) -> Self {
        let Event::Pagefault { kind, rw, addr, thread_id } = event else { panic!("{event:?}") };
        Self { kind, rw, addr: addr.addr(), thread: thread_id.as_raw() }
    }

    /// Reads an event, which must be a fault. Waits for it on a blocking descriptor.
    pub(crate) fn next(uffd: &Uffd) -> Self {
        Self::of(uffd.read_event().unwrap().expect("an event"))
    }
}

/// An event that tells of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Remap { from: usize, to: usize, len: usize },
    Remove(Range<usize>),
    Unmap(Range<usize>),
}

impl Change {
    /// Waits for an event, which must be such a one, on a non-blocking descriptor.
    pub(crate) fn next(uffd: &Uffd) -> Self {
        wait_for_event(uffd);
        match uffd.read_event().unwrap().expect("an event") {
            Event::Remap { from, to, len } => Self::Remap { from: from.addr(), to: to.addr(), len },
            Event::Remove { start, end } => Self::Remove(start.addr()..end.addr()),
            Event::Unmap { start, end } => Self::Unmap(start.addr()..end.addr()),
            event => panic!("{event:?}"),
        }
    }
}

/// Runs `change` in a thread of its own, and meanwhile `test` here, which gets that thread's id and must read
/// the events that the change waits for. Returns what `change` returns. The descriptor must not be a blocking
/// one.
///
/// If the change is a fork, it waits with the allocator's locks held: until its event is read, `test` must
/// not allocate.
pub(crate) fn while_changing<T: Send>(
    uffd: &Uffd,
    change: impl FnOnce() -> T + Send,
    test: impl FnOnce(libc::pid_t),
) -> T {
    let (id, go) = (AtomicI32::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            id.store(thread_id(), Ordering::SeqCst);
            wait_until(|| go.load(Ordering::SeqCst));
            change()
        });
        wait_until(|| id.load(Ordering::SeqCst) != 0);
        // From here on nothing is allocated.
        go.store(true, Ordering::SeqCst);
        let tested = panic::catch_unwind(panic::AssertUnwindSafe(|| test(id.load(Ordering::SeqCst))));
        // The thread must not wait on, or the test would hang instead of failing.
        while tested.is_err() && !thread.is_finished() {
            let _ = uffd.read_event();
        }
        tested.unwrap_or_else(|panic| panic::resume_unwind(panic));
        thread.join().unwrap()
    })
}

/// Fills a missing page with a byte, and wakes the threads that wait for it.
pub(crate) fn fill(uffd: &Uffd, memory: &Memory, page: usize, byte: u8) {
    let content = vec![byte; memory.page()];
    // SAFETY: the content lives on, and the memory is only accessed by raw pointers.
    let copied = unsafe { uffd.copy(content.as_ptr().cast(), memory.at(page), memory.page(), true) };
    assert_eq!(copied.unwrap(), memory.page());
}

/// Fills missing pages with zeros, and wakes the threads that wait for them.
pub(crate) fn zero(uffd: &Uffd, memory: &Memory, first: usize, pages: usize) {
    let len = pages * memory.page();
    // SAFETY: the memory is only accessed by raw pointers.
    let zeroed = unsafe { uffd.zeropage(memory.at(first), len, true) };
    assert_eq!(zeroed.unwrap(), len);
}

/// Has the kernel write a byte to a page: read(2) from a pipe.
pub(crate) fn kernel_write(memory: &Memory, page: usize, byte: u8) -> Result<(), Errno> {
    let (reader, mut writer) = pipe();
    writer.write_all(&[byte]).unwrap();
    // SAFETY: the byte lies in the memory, which is only accessed by raw pointers.
    check(unsafe { libc::read(reader.as_raw_fd(), memory.at(page), 1) } as i64).map(drop)
}
