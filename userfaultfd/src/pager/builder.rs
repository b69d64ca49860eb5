//! How a pager comes into being: its options, and the start of its threads.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::activity::ThreadCounts;
use super::fill::buffers;
use super::prefetch::read_ahead;
use super::reports::{OnProblem, Reporter};
use super::serve::delivery::Delivery;
use super::serve::shared::Shared;
use super::serve::thread::Thread;
use super::serve::worker::Worker;
use super::serve::{control, shutdown, worker_pool};
use super::{Pager, Problem, Result, RetryPolicy};

/// How a [`Pager`] is to be.
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
}

/// The most threads of a kind. Each has counters and a place in every descriptor's table.
const MAX_THREADS: usize = 1024;

impl PagerBuilder {
    /// Sets the number of threads that resolve faults from the start, 1024 at most. The default is 1. While the source
    /// keeps all of them waiting, [more are added](Self::max_threads).
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads.clamp(1, MAX_THREADS);
        self
    }

    /// Sets the most threads that resolve faults, and so the most reads of sources that go on at the same time:
    /// 1024 at most. The default is 16, or [`threads`](Self::threads) if that is more.
    ///
    /// A thread is added while another fault is there and all others wait for a source: for one whose reads have taken
    /// longer than some 50 µs lately, or for one that was fast and hangs, which is noticed within some 30 ms. It ends
    /// when reads are fast again, or after a second without a fault. `max_threads(1)` never reads a source from
    /// two threads at the same time, unless something fills in the background or reads ahead.
    pub fn max_threads(mut self, threads: usize) -> Self {
        self.max_threads = Some(threads.clamp(1, MAX_THREADS));
        self
    }

    /// How faults reach the threads that answer them. The default is [`Delivery::Adaptive`].
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets the number of threads that read ahead, 1024 at most. The default is 0.
    ///
    /// Where access is sequential and the source slow (a network), what is filled for one fault beyond 1 MiB is read by
    /// these, a MiB each at the same time. Give the region a large [`FaultAround::Adaptive`](super::FaultAround::Adaptive), such as 16 MiB for 16 threads:
    /// a source that takes 6 ms for a read then delivers GB/s instead of MB/s.
    pub fn read_ahead_threads(mut self, read_ahead_threads: usize) -> Self {
        self.read_ahead_threads = read_ahead_threads.min(MAX_THREADS);
        self
    }

    /// How often a source is asked that fails. The default is [`RetryPolicy::default`].
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = RetryPolicy { attempts: retry.attempts.max(1), ..retry };
        self
    }

    /// What to call when something goes wrong while the pager serves. The default writes the first problem of each
    /// kind to standard error, other than [`TargetGone`](Problem::TargetGone).
    ///
    /// It is called on a thread of its own, one problem after the other, may take its time and any lock, and may end
    /// or drop the pager. Where problems come faster than it takes them they are counted in
    /// [`problems_lost`](super::Statistics::problems_lost). Before a page is poisoned that a thread waits for, the pager
    /// waits up to 100 ms for the call that reports why. It must not touch memory that the pager fills.
    pub fn on_problem(mut self, on_problem: impl Fn(&Problem) + Send + Sync + 'static) -> Self {
        self.on_problem = Some(Arc::new(on_problem));
        self
    }

    /// How often it is looked whether processes are still there.
    #[cfg(test)]
    pub(crate) fn look(mut self, look: Duration) -> Self {
        self.look = look;
        self
    }

    /// How long a call waits for the kernel at its end.
    #[cfg(test)]
    pub(crate) fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// [`System`](super::Error::System): a thread or a descriptor couldn't be had.
    pub fn build(self) -> Result<Pager> {
        buffers::prepare()?;
        let most = self.max_threads.unwrap_or(worker_pool::DEFAULT_MAX_THREADS).max(self.threads);
        let (workers, read_ahead) = (self.threads, self.read_ahead_threads);
        let threads = ThreadCounts { workers, read_ahead, added: most - workers };
        let shared = Arc::new(Shared::new(threads, self.retry)?);
        let added = Arc::new(worker_pool::Added::new(self.delivery));
        let mut pager = Pager {
            shared: Arc::clone(&shared),
            adding: Mutex::new(()),
            threads: Vec::new(),
            added: Arc::clone(&added),
            patience: self.patience,
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
