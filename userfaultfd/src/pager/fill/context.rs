//! What fillers of a pager have in common. Filling knows nothing else of the pager: not which threads there are, nor how
//! faults reach them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ahead_queue::AheadQueue;
use super::in_flight::InFlight;
use crate::pager::activity::{Activities, ThreadCounts};
use crate::pager::bell::Bell;
use crate::pager::reports::Reports;
use crate::pager::stats::{Counters, ThreadCounters};
use crate::pager::{Problem, RetryPolicy};

/// The pager makes one, and hands it to each step of a fill.
pub(crate) struct FillContext {
    pub(crate) threads: ThreadCounts,
    pub(crate) retry: RetryPolicy,
    /// Problems that wait to be reported.
    pub(crate) reports: Arc<Reports>,
    /// Where a filler notes that its thread reads a source.
    pub(crate) activities: Activities,
    /// What faults leave to threads that read ahead.
    pub(crate) ahead: AheadQueue,
    /// Loads that asynchronous sources will answer.
    pub(crate) in_flight: Arc<InFlight>,
    pub(crate) counters: ThreadCounters,
    stopping: AtomicBool,
}

impl FillContext {
    pub(crate) fn new(
        threads: ThreadCounts,
        retry: RetryPolicy,
        bell: Arc<Bell>,
        in_flight: Arc<InFlight>,
    ) -> Self {
        Self {
            threads,
            retry,
            reports: Arc::new(Reports::new()),
            activities: Activities::new(threads, bell),
            ahead: AheadQueue::new(),
            in_flight,
            counters: ThreadCounters::new(threads.initial()),
            stopping: AtomicBool::new(false),
        }
    }

    /// The counters of a thread, for that thread.
    pub(crate) fn counters(&self, thread: usize) -> &Counters {
        self.counters.of(thread)
    }

    /// Has a problem reported.
    pub(crate) fn report(&self, problem: Problem) {
        self.reports.post(problem);
    }

    /// Whether workers and read-ahead threads must end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Has read-ahead threads end, and workers as soon as they wake.
    pub(crate) fn stop(&self) {
        // Before what wakes a thread, which finds it then.
        self.stopping.store(true, Ordering::Release);
        self.ahead.close();
    }
}
