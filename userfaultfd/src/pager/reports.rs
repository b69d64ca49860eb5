//! The reports thread, which runs the program's code: it calls [`on_problem`](crate::pager::PagerBuilder::on_problem), and
//! frees sources.
//!
//! Both may block, take any lock, panic, or end the pager. So no other thread does either, and none waits for this one
//! except briefly before a page is poisoned.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::Duration;

use crate::lock_order::{RankedMutex, lock, rank};
use crate::pager::Problem;
use crate::pager::error::PROBLEM_KINDS;
use crate::pager::memory::served::ServedRegion;
use crate::pager::trace::event;
use crate::source::call::message;

/// The function that is called with each problem.
pub(crate) type OnProblem = Arc<dyn Fn(&Problem) + Send + Sync>;

/// Problems that wait to be reported, at most. Further ones are dropped and counted.
const QUEUE_LEN: usize = 1024;

/// The longest delay of poison, so that its problem is reported first: the access that follows may end the process.
const MAX_POISON_DELAY: Duration = Duration::from_millis(100);

/// The problems to report and the regions to free.
#[derive(Debug)]
pub(crate) struct Reports {
    queue: RankedMutex<Queue, { rank::QUEUE }>,
    changed: Condvar,
    /// Unreferenced regions. Apart from the queue, since it grows in the allocator, which a fork may have locked until the
    /// workers that report problems read its event.
    freed: RankedMutex<Vec<Arc<ServedRegion>>, { rank::STORE }>,
    /// Number of dropped problems.
    lost: AtomicUsize,
}

/// Nothing here allocates: see `mapped_vec`.
#[derive(Debug)]
struct Queue {
    problems: VecDeque<Problem>,
    some_freed: bool,
    /// Numbers of problems that were posted, and reported.
    posted: u64,
    reported: u64,
    /// A worker has waited for a report in vain. No worker waits until all are made.
    is_late: bool,
    stopped: bool,
}

enum Task {
    Report(Problem),
    Free,
    Stop,
}

impl Reports {
    pub(crate) fn new() -> Self {
        let problems = VecDeque::with_capacity(QUEUE_LEN);
        let (posted, reported) = (0, 0);
        let queue = Queue { problems, some_freed: false, posted, reported, is_late: false, stopped: false };
        Self {
            queue: RankedMutex::new(queue),
            changed: Condvar::new(),
            freed: RankedMutex::default(),
            lost: AtomicUsize::new(0),
        }
    }

    /// Posts a problem to be reported. Without room it is dropped.
    pub(crate) fn post(&self, problem: Problem) {
        let mut queue = lock(&self.queue);
        if queue.problems.len() == QUEUE_LEN {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.problems.push_back(problem);
        queue.posted += 1;
        drop(queue);
        self.changed.notify_all();
    }

    /// Number of dropped problems.
    pub(crate) fn lost(&self) -> u64 {
        // Relaxed: a count, which nothing else is read by. No lock: a fork's child asks, too.
        self.lost.load(Ordering::Relaxed) as u64
    }

    /// Waits until the posted problems are reported, at most for [`MAX_POISON_DELAY`].
    pub(crate) fn wait(&self) {
        let mut queue = lock(&self.queue);
        let posted = queue.posted;
        if queue.is_late {
            return;
        }
        let unreported = |queue: &mut Queue| queue.reported < posted && !queue.stopped;
        queue = queue.wait_timeout_while(&self.changed, MAX_POISON_DELAY, unreported);
        queue.is_late = queue.reported < posted;
    }

    /// Posts regions to be freed, which the caller alone owns.
    pub(crate) fn free(&self, regions: Vec<Arc<ServedRegion>>) {
        lock(&self.freed).extend(regions);
        lock(&self.queue).some_freed = true;
        self.changed.notify_all();
    }

    /// Makes the thread end when nothing is left.
    pub(crate) fn stop(&self) {
        lock(&self.queue).stopped = true;
        self.changed.notify_all();
    }

    fn next(&self) -> Task {
        let nothing = |queue: &mut Queue| queue.problems.is_empty() && !queue.some_freed && !queue.stopped;
        let mut queue = lock(&self.queue).wait_while(&self.changed, nothing);
        if let Some(problem) = queue.problems.pop_front() {
            Task::Report(problem)
        } else if std::mem::take(&mut queue.some_freed) {
            Task::Free
        } else {
            Task::Stop
        }
    }

    /// Reports and frees until it is stopped.
    pub(crate) fn run(&self, mut reporter: Reporter) {
        loop {
            match self.next() {
                Task::Report(problem) => {
                    reporter.report(&problem);
                    let mut queue = lock(&self.queue);
                    queue.reported += 1;
                    queue.is_late &= queue.reported < queue.posted;
                    drop(queue);
                    self.changed.notify_all();
                }
                Task::Free => {
                    let freed = std::mem::take(&mut *lock(&self.freed));
                    for region in freed {
                        if let Err(panic) = contain(|| drop(region)) {
                            reporter.report(&Problem::Panicked { message: message(&*panic).to_owned() });
                            forget_panic(panic);
                        }
                    }
                }
                Task::Stop => return,
            }
        }
    }
}

/// Where problems are reported: the program's callback, or else standard error.
pub(crate) struct Reporter {
    on_problem: Option<OnProblem>,
    /// The kinds of problems that were printed.
    printed: [bool; PROBLEM_KINDS],
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter").field("printed", &self.printed).finish_non_exhaustive()
    }
}

impl Reporter {
    pub(crate) fn new(on_problem: Option<OnProblem>) -> Self {
        Self { on_problem, printed: [false; PROBLEM_KINDS] }
    }

    fn report(&mut self, problem: &Problem) {
        event!(WARN, "problem", problem = tracing::field::display(problem));
        let reported = match &self.on_problem {
            Some(on_problem) => contain(|| on_problem(problem)),
            None => contain(|| self.print(problem)),
        };
        if let Err(panic) = reported {
            // The panic was printed, and further problems come here all the same.
            forget_panic(panic);
        }
    }

    /// Prints the first problem of each kind, but not the end of a process.
    fn print(&mut self, problem: &Problem) {
        if matches!(problem, Problem::TargetGone { .. })
            || std::mem::replace(&mut self.printed[problem.kind()], true)
        {
            return;
        }
        let line = format!("userfaultfd: {problem} (printed once; PagerBuilder::on_problem gets all)\n");
        // Not through the standard library: a thread that prints missing memory holds its lock.
        crate::sys::print_error(line.as_bytes());
    }
}

fn contain(run: impl FnOnce()) -> Result<(), Box<dyn Any + Send>> {
    panic::catch_unwind(AssertUnwindSafe(run))
}

/// Drops the payload of a panic, which may panic in turn.
fn forget_panic(panic: Box<dyn Any + Send>) {
    if let Err(again) = contain(|| drop(panic)) {
        std::mem::forget(again);
    }
}
