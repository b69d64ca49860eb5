//! What the thread that saves pages shares with its callers.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, OnceLock};
use std::time::Duration;

use super::bits::Bits;
use super::queue::Queue;
use crate::lock_order::{LockGuard, RankedMutex, lock, rank};
use crate::owner::{InheritedFd, Owner, abandon};
use crate::sync::AtomicU64;
use crate::{Errno, Error, Result};

/// What a snapshot has done so far, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) total: AtomicU64,
    pub(crate) saved: AtomicU64,
    pub(crate) on_write: AtomicU64,
    pub(crate) gone: AtomicU64,
    pub(crate) pause_ns: AtomicU64,
}

/// What the thread and its callers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) owner: Owner,
    /// What the thread owns, as long as it does.
    pub(crate) inherited: OnceLock<Vec<InheritedFd>>,
    /// Something to read there means that something changed.
    pub(crate) woken: UnixStream,
    /// Its other end, which the queue of each snapshot has, too.
    wake: Arc<UnixStream>,
    state: RankedMutex<State, { rank::QUEUE }>,
    pub(crate) answered: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) begin: Option<Begin>,
    /// The sink of the next snapshot is called to begin.
    pub(crate) sink_begins: bool,
    pub(crate) answer: Option<Result<()>>,
    /// A snapshot is at work.
    pub(crate) busy: bool,
    /// How many have been completed, on the last of which the next one may stand.
    pub(crate) completed: u64,
    /// The thread must end.
    pub(crate) end: bool,
    /// The thread has ended, perhaps by an error.
    pub(crate) ended: Option<Option<Errno>>,
}

/// A snapshot to begin.
#[derive(Debug)]
pub(crate) struct Begin {
    pub(crate) queue: Arc<Queue>,
    pub(crate) counts: Arc<Counts>,
    /// What counts as changed since the snapshot before, whatever the kernel reports.
    pub(crate) changed: Bits,
}

impl Shared {
    pub(crate) fn new() -> io::Result<Self> {
        let (woken, wake) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        wake.set_nonblocking(true)?;
        let (owner, inherited) = (Owner::current()?, OnceLock::new());
        let (wake, state) = (Arc::new(wake), RankedMutex::default());
        Ok(Self { owner, inherited, woken, wake, state, answered: Condvar::new() })
    }

    /// In a fork's child, which hasn't got the thread: closes what that has a share of.
    #[expect(unsafe_code, reason = "closes what the thread has a share of")]
    pub(crate) fn abandon(self: &Arc<Self>) {
        abandon(self);
        let of_both = [&self.woken, &*self.wake].map(|end| InheritedFd::new(end.as_fd()));
        for fd in self.inherited.get().into_iter().flatten().chain(&of_both) {
            // SAFETY: this is a child, without the thread, which forgets its numbers before it closes them; and this,
            // which the caller kept open and gives up, is dropped no more.
            unsafe { fd.close() };
        }
    }

    pub(crate) fn waker(&self) -> Arc<UnixStream> {
        Arc::clone(&self.wake)
    }

    pub(crate) fn lock(&self) -> LockGuard<'_, State> {
        lock(&self.state)
    }

    fn wake(&self) {
        // Full means woken already.
        let woken = (&*self.wake).write_all(&[0]);
        debug_assert!(woken.is_ok() || woken.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
    }

    /// Begins to work at a snapshot, unless one is at work. Returns how many have been completed.
    pub(crate) fn claim(&self) -> Option<u64> {
        let mut state = self.lock();
        let busy = std::mem::replace(&mut state.busy, true);
        (!busy).then_some(state.completed)
    }

    /// The snapshot isn't at work any more. It may have been completed.
    pub(crate) fn release(&self, well: bool) {
        let mut state = self.lock();
        state.busy = false;
        state.completed += u64::from(well);
        drop(state);
        self.answered.notify_all();
    }

    /// Waits until no snapshot is at work.
    pub(crate) fn wait_until_idle(&self) {
        let busy = |state: &mut State| state.busy && state.ended.is_none();
        drop(self.lock().wait_while(&self.answered, busy));
    }

    /// Says that the sink of a snapshot is called to begin, or has been.
    pub(crate) fn sink_begins(&self, begins: bool) {
        self.lock().sink_begins = begins;
        self.wake();
    }

    /// Has a snapshot begun, and waits until memory is protected.
    pub(crate) fn begin(&self, begin: Begin) -> Result<()> {
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
            state = state.wait(&self.answered);
        }
    }

    /// The thread has ended, perhaps by an error.
    pub(super) fn end_with(&self, errno: Option<Errno>) {
        let mut state = self.lock();
        state.busy = false;
        state.ended = Some(errno);
        drop(state);
        self.answered.notify_all();
    }

    /// Has the thread end.
    pub(crate) fn end(&self) {
        self.lock().end = true;
        self.wake();
    }
}

/// How long, from a counter of nanoseconds.
pub(crate) fn duration(counter: &AtomicU64) -> Duration {
    Duration::from_nanos(counter.load(Ordering::Relaxed))
}
