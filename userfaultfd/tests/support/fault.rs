//! Threads that run into faults, and the faults.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};
use std::{panic, thread};

use userfaultfd::{FaultKind, FeatureFlags, ReadWrite, RegisterMode, Uffd};

pub(crate) use super::handler::Fault;
use super::memory::{self, Memory};
use super::proc;

impl Fault {
    /// The fault that a read of `page` delivers.
    pub(crate) fn read(kind: FaultKind, memory: &Memory, page: usize) -> Self {
        Self { kind, rw: ReadWrite::Read, addr: memory.at(page).addr(), thread: 0 }
    }

    /// The fault that a write to `page` delivers.
    pub(crate) fn write(kind: FaultKind, memory: &Memory, page: usize) -> Self {
        Self { rw: ReadWrite::Write, ..Self::read(kind, memory, page) }
    }
}

/// The faults of the threads that [`during`] runs.
#[derive(Debug)]
pub(crate) struct Faults<'a> {
    uffd: &'a Uffd,
    /// Has reached its end when the threads are done.
    done: UnixStream,
    /// The ids of the threads, 0 before one has begun. Not under a lock: the wake of a thread that waited for one may
    /// come so late that it ends the thread's sleep in its fault.
    threads: &'a [AtomicI32],
}

impl Faults<'_> {
    /// Waits until the threads are through. Fails if there is an event.
    #[track_caller]
    fn none(&self) {
        let event = wait_readable(self.uffd, &self.done).then(|| self.uffd.read_event().unwrap());
        assert!(event.is_none(), "{event:?}");
    }

    /// Waits until a number of the threads sleep in a fault. A fault is told a moment before its thread sleeps, and
    /// one that is resolved in that moment takes no wake.
    pub(crate) fn wait_for_sleepers(&self, count: usize) {
        proc::wait_until(|| self.sleepers() == count);
    }

    fn ids(&self) -> impl Iterator<Item = libc::pid_t> {
        self.threads.iter().map(|id| id.load(Ordering::Relaxed)).filter(|id| *id != 0)
    }

    fn sleepers(&self) -> usize {
        self.ids().filter(|thread| proc::sleeps_in_fault(*thread)).count()
    }

    /// Runs something while all threads sleep in a fault. Returns whether none of them has run meanwhile.
    ///
    /// The kernel may wake a thread that sleeps in a fault though nobody resolved that: the wakes of its locks and of
    /// futexes come a moment after they have let the thread go on. It withdraws its fault then, and faults again.
    pub(crate) fn undisturbed(&self, run: impl FnOnce()) -> bool {
        self.wait_for_sleepers(self.threads.len());
        let before: Vec<_> = self.ids().map(proc::switches).collect();
        run();
        self.sleepers() == self.threads.len() && self.ids().map(proc::switches).eq(before)
    }

    /// Waits until there is an event. Tells whether there is one, or the threads are through.
    pub(crate) fn any(&self) -> bool {
        wait_readable(self.uffd, &self.done)
    }

    /// Waits for the next fault. Fails if the threads get through without one.
    #[track_caller]
    pub(crate) fn next(&self) -> Fault {
        loop {
            match self.uffd.read_event().unwrap() {
                Some(event) => return Fault::of(event),
                None => assert!(wait_readable(self.uffd, &self.done), "no fault was delivered"),
            }
        }
    }
}

/// Runs `access` in a thread of its own, which must get through without a fault. Returns what it returns.
#[track_caller]
pub(crate) fn silently<T: Send>(uffd: &Uffd, memory: &Memory, access: impl FnOnce() -> T + Send) -> T {
    during(uffd, memory, access, |faults| faults.none())
}

/// Waits until there is an event. Tells whether there is one, or it was `done` that got readable.
fn wait_readable(uffd: &Uffd, done: &UnixStream) -> bool {
    let poll = |fd: i32| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(uffd.as_raw_fd()), poll(done.as_raw_fd())];
    // SAFETY: the array lives until the call returns, and its length is right.
    while unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {}
    fds[0].revents & libc::POLLIN != 0
}

/// Runs `access` in a thread of its own, and meanwhile `answer` here, which gets the faults of it and must
/// resolve them. Returns what `access` returns, and the faults are over then. The descriptor must not be a
/// blocking one.
pub(crate) fn during<T: Send>(
    uffd: &Uffd,
    memory: &Memory,
    access: impl FnOnce() -> T + Send,
    answer: impl FnOnce(&Faults<'_>),
) -> T {
    during_all(uffd, memory, [access], answer).pop().unwrap()
}

/// [`during`] with several threads.
pub(crate) fn during_all<T: Send, A: FnOnce() -> T + Send>(
    uffd: &Uffd,
    memory: &Memory,
    accesses: impl IntoIterator<Item = A>,
    answer: impl FnOnce(&Faults<'_>),
) -> Vec<T> {
    let (done, end) = UnixStream::pair().unwrap();
    let accesses: Vec<_> = accesses.into_iter().collect();
    let begun: Vec<_> = accesses.iter().map(|_| AtomicI32::new(0)).collect();
    thread::scope(|scope| {
        let threads: Vec<_> = accesses
            .into_iter()
            .zip(&begun)
            .map(|(access, id)| {
                let end = end.try_clone().unwrap();
                scope.spawn(move || {
                    let _end = end;
                    id.store(proc::thread_id(), Ordering::Relaxed);
                    access()
                })
            })
            .collect();
        drop(end);
        let faults = Faults { uffd, done, threads: &begun };
        let answered = panic::catch_unwind(panic::AssertUnwindSafe(|| answer(&faults)));
        if let Err(panic) = answered {
            // The threads must not wait on, or the test would hang instead of failing.
            let _ = uffd.unregister(memory.start(), memory.len());
            panic::resume_unwind(panic);
        }
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// How many threads wait for a fault to be resolved, whether or not it was read.
pub(crate) fn waiters(uffd: &Uffd) -> usize {
    proc::fdinfo(uffd).total
}

/// Checks that there is no event. For an access that is over and wasn't to be delivered.
#[track_caller]
pub(crate) fn assert_silent(uffd: &Uffd) {
    let event = uffd.read_event().unwrap();
    assert!(event.is_none(), "{event:?}");
}

/// Registers memory for one kind of fault, and sees to it that the next write to the first page delivers one.
/// Returns its kind.
pub(crate) fn provoke(uffd: &Uffd, memory: &Memory, mode: RegisterMode) -> FaultKind {
    let (start, len) = (memory.start(), memory.len());
    match mode {
        RegisterMode::MINOR => memory.alias().write(0, 1),
        RegisterMode::WRITE_PROTECT | RegisterMode::READ_WRITE_PROTECT => memory.write(0, 1),
        _ => {}
    }
    uffd.register_with_mode(start, len, mode).unwrap();
    match mode {
        RegisterMode::MISSING => FaultKind::Missing,
        RegisterMode::MINOR => FaultKind::Minor,
        RegisterMode::WRITE_PROTECT => {
            uffd.write_protect(start, len).unwrap();
            FaultKind::WriteProtected
        }
        RegisterMode::READ_WRITE_PROTECT => {
            uffd.read_write_protect(start, len).unwrap();
            FaultKind::ReadWriteProtected
        }
        other => panic!("not one mode: {other}"),
    }
}

/// Every mode with memory of every kind that can be registered for it, of `pages` pages, and a userfaultfd
/// for that.
pub(crate) fn each_mode(test: &str, pages: usize) -> impl Iterator<Item = (RegisterMode, Memory, Uffd)> {
    let modes = RegisterMode::all().iter().filter_map(move |mode| {
        let rwp =
            if mode == RegisterMode::READ_WRITE_PROTECT { FeatureFlags::RWP } else { FeatureFlags::empty() };
        super::has_features(test, rwp).then_some((mode, rwp))
    });
    modes.flat_map(move |(mode, features)| {
        memory::each(test, mode, pages).map(move |memory| (mode, memory, super::uffd(features)))
    })
}
