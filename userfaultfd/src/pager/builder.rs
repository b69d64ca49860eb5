//! The builder of a pager: its options, and the start of its threads.

use std::fmt;
#[cfg(feature = "handoff")]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::activity::ThreadCounts;
use super::fill::buffers;
use super::prefetch::read_ahead;
use super::reports::{OnProblem, Reporter};
use super::serve::delivery::Delivery;
use super::serve::shared::Shared;
use super::serve::worker::Worker;
use super::serve::{control, shutdown, worker_pool};
use super::thread::Thread;
use super::{Pager, Problem, Result, RetryPolicy};
use crate::lock_order::RankedMutex;

/// Builder for a [`Pager`].
///
/// ```
/// use std::time::Duration;
/// use userfaultfd::pager::{Pager, RetryPolicy};
///
/// let pager = Pager::builder()
///     .threads(4)
///     .retry(RetryPolicy { attempts: 10, delay: Duration::from_millis(1) })
///     .on_problem(|problem| eprintln!("{problem}"))
///     .build()?;
/// # Ok::<(), userfaultfd::pager::Error>(())
/// ```
#[derive(Clone)]
#[must_use = "a pager is made by build"]
pub struct PagerBuilder {
    threads: usize,
    max_threads: Option<usize>,
    read_ahead_threads: usize,
    delivery: Delivery,
    retry: RetryPolicy,
    on_problem: Option<OnProblem>,
    look: Duration,
    patience: Duration,
    #[cfg(feature = "handoff")]
    state: Option<PathBuf>,
}

/// Threads of one kind at most. Each has counters, and a shard in every descriptor.
const MAX_THREADS: usize = 1024;

impl PagerBuilder {
    /// Sets the number of workers at the start, 1024 at most. The default is 1. While sources keep all of them waiting,
    /// the pager [adds more](Self::max_threads).
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads.clamp(1, MAX_THREADS);
        self
    }

    /// Sets the maximum number of workers, and so of concurrent reads of sources: 1024 at most. The default is 16, or
    /// [`threads`](Self::threads) if that is more.
    ///
    /// The pager adds a worker when a fault waits while all workers wait for a source: one whose reads have lately taken
    /// longer than some 50 µs, or one that was fast and hangs, which is noticed within some 30 ms. An added worker ends when
    /// reads are fast again, or after a second without a fault. With `max_threads(1)` no two threads read sources at the same
    /// time, unless a background fill or read-ahead runs.
    pub fn max_threads(mut self, threads: usize) -> Self {
        self.max_threads = Some(threads.clamp(1, MAX_THREADS));
        self
    }

    /// Sets how faults reach the workers. The default is [`Delivery::Adaptive`].
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets the number of threads that read ahead, 1024 at most. The default is 0.
    ///
    /// They are for sequential access to a slow source, such as a network: what is filled for one fault beyond 1 MiB is split
    /// among them, 1 MiB each, and read concurrently. Give the region a large
    /// [`FaultAround::Adaptive`](super::FaultAround::Adaptive), such as 16 MiB for 16 threads: a source that takes 6 ms for
    /// a read then delivers GB/s instead of MB/s ([tuning](super::tuning)).
    pub fn read_ahead_threads(mut self, read_ahead_threads: usize) -> Self {
        self.read_ahead_threads = read_ahead_threads.min(MAX_THREADS);
        self
    }

    /// Sets how a failing source is retried. The default is [`RetryPolicy::default`].
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = RetryPolicy { attempts: retry.attempts.max(1), ..retry };
        self
    }

    /// Sets the function that is called when something goes wrong while the pager serves. The default writes the first
    /// problem of each kind, except [`TargetGone`](Problem::TargetGone), to standard error.
    ///
    /// A thread of its own calls it, one problem after the other. It may block, take any lock, and end or drop the pager,
    /// but must not touch memory that the pager fills. Problems that come faster than it returns are dropped, and counted in
    /// [`problems_lost`](super::Statistics::problems_lost). Before the pager poisons a page that a thread waits for, it waits
    /// up to 100 ms for the call that reports the reason.
    pub fn on_problem(mut self, on_problem: impl Fn(&Problem) + Send + Sync + 'static) -> Self {
        self.on_problem = Some(Arc::new(on_problem));
        self
    }

    /// Keeps the states of the pages that [`Pager::serve`] serves in files in the directory `dir`, one for each process, so that
    /// another process can go on with them when this one has died: see [`adopt`](crate::handoff::adopt). The default is to
    /// keep them in memory of this process alone.
    ///
    /// The directory must exist, and lie on a file system in memory, such as tmpfs: what a thread has stored there stays when
    /// its process is killed, without a flush. A file takes a byte for each page of the memory, which is allocated when the
    /// memory is handed over, and some pages more. It is removed when the process has ended, or its memory was
    /// [finished](crate::handoff::ServedProcess::finish) or [detached](crate::handoff::ServedProcess::detach). Keep other
    /// users from writing to the directory.
    #[cfg(feature = "handoff")]
    pub fn state(mut self, dir: impl Into<PathBuf>) -> Self {
        self.state = Some(dir.into());
        self
    }

    /// Sets the interval between checks whether processes still exist.
    #[cfg(test)]
    pub(crate) fn look(mut self, look: Duration) -> Self {
        self.look = look;
        self
    }

    /// Sets how long a call waits for the kernel at the end of service.
    #[cfg(test)]
    pub(crate) fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts the pager's threads.
    ///
    /// # Errors
    ///
    /// [`System`](super::Error::System): failed to create a thread or a descriptor.
    pub fn build(self) -> Result<Pager> {
        buffers::prepare()?;
        let most = self.max_threads.unwrap_or(worker_pool::DEFAULT_MAX_THREADS).max(self.threads);
        let (workers, read_ahead) = (self.threads, self.read_ahead_threads);
        let threads = ThreadCounts { workers, read_ahead, added: most - workers };
        let shared = Arc::new(Shared::new(threads, self.retry)?);
        let added = Arc::new(worker_pool::Added::new(self.delivery));
        let mut pager = Pager {
            shared: Arc::clone(&shared),
            adding: Arc::new(RankedMutex::new(())),
            threads: Vec::new(),
            added: Arc::clone(&added),
            patience: self.patience,
            #[cfg(feature = "handoff")]
            state: self.state.map(Arc::from),
        };
        let of_control = Arc::clone(&shared);
        let look = self.look;
        pager.threads.push(Thread::spawn(c"uffd-control", move || control::run(&of_control, &added, look))?);
        let (of_reports, reporter) = (Arc::clone(&shared), Reporter::new(self.on_problem));
        pager.threads.push(Thread::spawn(c"uffd-reports", move || of_reports.fill.reports.run(reporter))?);
        for thread in 0..self.threads {
            let worker = Worker::new(Arc::clone(&shared), thread, self.delivery)?;
            pager.threads.push(Thread::spawn(c"uffd-pager", move || worker.run())?);
        }
        for reader in self.threads..self.threads + self.read_ahead_threads {
            let shared = Arc::clone(&shared);
            pager.threads.push(Thread::spawn(c"uffd-ahead", move || read_ahead::read(&shared, reader))?);
        }
        shared.started.wait_for(self.threads);
        Ok(pager)
    }
}

impl Default for PagerBuilder {
    fn default() -> Self {
        Self {
            threads: 1,
            max_threads: None,
            read_ahead_threads: 0,
            delivery: Delivery::default(),
            retry: RetryPolicy::default(),
            on_problem: None,
            look: control::POLL_INTERVAL,
            patience: shutdown::LONG_PATIENCE,
            #[cfg(feature = "handoff")]
            state: None,
        }
    }
}

impl fmt::Debug for PagerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            threads,
            max_threads,
            read_ahead_threads,
            delivery,
            retry,
            on_problem,
            look: _,
            patience: _,
            #[cfg(feature = "handoff")]
                state: _,
        } = self;
        f.debug_struct("PagerBuilder")
            .field("threads", threads)
            .field("max_threads", max_threads)
            .field("read_ahead_threads", read_ahead_threads)
            .field("delivery", delivery)
            .field("retry", retry)
            .field("on_problem", &on_problem.is_some())
            .finish()
    }
}
