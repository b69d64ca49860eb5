//! What the thread that saves pages shares with those who ask something of it.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::bits::Bits;
use super::queue::Queue;
use crate::owner::{InheritedFd, Owner, abandon};
use crate::sync::AtomicU64;
use crate::{Errno, Error, Result};

/// What a snapshot has done so far, in bytes.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) total: AtomicU64,
    pub(super) saved: AtomicU64,
    pub(super) on_write: AtomicU64,
    pub(super) gone: AtomicU64,
    pub(super) pause_ns: AtomicU64,
}

/// What the thread and those who ask something of it share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) owner: Owner,
    /// What the thread owns, as long as it does.
    pub(super) inherited: OnceLock<Vec<InheritedFd>>,
    /// Something to read there means that something changed.
    pub(super) woken: UnixStream,
    /// Its other end, which the queue of each snapshot has, too.
    wake: Arc<UnixStream>,
    state: Mutex<State>,
    pub(super) answered: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) begin: Option<Begin>,
    pub(super) answer: Option<Result<()>>,
    /// A snapshot is at work.
    pub(super) busy: bool,
    /// How many have been completed, on the last of which the next one may stand.
    pub(super) completed: u64,
    /// The thread is to end.
    pub(super) end: bool,
    /// The thread has ended, perhaps by an error.
    pub(super) ended: Option<Option<Errno>>,
}

/// A snapshot to begin.
#[derive(Debug)]
pub(super) struct Begin {
    pub(super) queue: Arc<Queue>,
    pub(super) counts: Arc<Counts>,
    /// What counts as changed since the snapshot before, whatever the kernel reports.
    pub(super) changed: Bits,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let (woken, wake) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        wake.set_nonblocking(true)?;
        let (owner, inherited) = (Owner::current()?, OnceLock::new());
        let (wake, state) = (Arc::new(wake), Mutex::default());
        Ok(Self { owner, inherited, woken, wake, state, answered: Condvar::new() })
    }

    /// In a fork's child, which hasn't got the thread: closes what that has a share of.
    #[expect(unsafe_code, reason = "closes what the thread has a share of")]
    pub(super) fn abandon(self: &Arc<Self>) {
        abandon(self);
        let of_both = [&self.woken, &*self.wake].map(|end| InheritedFd::new(end.as_fd()));
        for fd in self.inherited.get().into_iter().flatten().chain(&of_both) {
            // SAFETY: this is a child, without the thread, which forgets its numbers before it closes them; and this,
            // which the caller kept open and gives up, is dropped no more.
            unsafe { fd.close() };
        }
    }

    pub(super) fn waker(&self) -> Arc<UnixStream> {
        Arc::clone(&self.wake)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Full means woken already.
        let woken = (&*self.wake).write_all(&[0]);
        debug_assert!(woken.is_ok() || woken.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
    }

    /// Begins to work at a snapshot, unless one is at work. Returns how many have been completed.
    pub(super) fn claim(&self) -> Option<u64> {
        let mut state = self.lock();
        let busy = std::mem::replace(&mut state.busy, true);
        (!busy).then_some(state.completed)
    }

    /// The snapshot isn't at work any more. It may have been completed.
    pub(super) fn release(&self, well: bool) {
        let mut state = self.lock();
        state.busy = false;
        state.completed += u64::from(well);
        drop(state);
        self.answered.notify_all();
    }

    /// Waits until no snapshot is at work.
    pub(super) fn wait_until_idle(&self) {
        let busy = |state: &mut State| state.busy && state.ended.is_none();
        drop(self.answered.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner));
    }

    /// Has a snapshot begun, and waits until memory is protected.
    pub(super) fn begin(&self, begin: Begin) -> Result<()> {
        self.lock().begin = Some(begin);
        self.wake();
        let mut state = self.lock();
        loop {
            if let Some(answer) = state.answer.take() {
                return answer;
            }
            if let Some(ended) = state.ended {
                return Err(Error::TrackingFailed(ended.unwrap_or(Errno::ESRCH)));
            }
            state = self.answered.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has the thread end.
    pub(super) fn end(&self) {
        self.lock().end = true;
        self.wake();
    }
}

/// How long, from a counter of nanoseconds.
pub(super) fn duration(counter: &AtomicU64) -> Duration {
    Duration::from_nanos(counter.load(Ordering::Relaxed))
}
