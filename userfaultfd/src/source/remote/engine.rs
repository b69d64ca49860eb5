//! Reads of a remote object: queued, merged, sent by a limited number of threads, asked twice, retried, given up.
//!
//! A caller puts a [`Job`] into the queue and waits for it; a thread of the engine takes it, with the jobs beside it that can
//! go along, sends one request, and completes them. The caller decides what follows on a failure, since it is the one
//! that knows the time. No lock is held across a request. The buffers are the engine's, so that a caller that gives up leaves
//! nothing behind that a late answer could write to.

use std::cmp::{max, min};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{RemoteError, RemoteOptions, RemoteStatistics, lock};
use crate::source::PageData;
use crate::source::call::catch_panic;

/// A protocol: how one request is made.
pub(super) trait Fetch: Send + Sync + 'static {
    /// Fills `bytes` with those of the object from `offset` on, or fails by the time. The object is checked to be
    /// the one that was opened.
    fn fetch(&self, offset: u64, bytes: &mut [u8], timeout: Duration) -> Result<(), RemoteError>;
}

/// The most that a retry waits by itself.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// Longer than anything waits: a sum with a moment can't overflow.
pub(super) const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// As many answers tell what is usual.
const USUAL_COUNT: u32 = 8;

/// No second request comes before that: it would be noise.
const MIN_HEDGE: Duration = Duration::from_millis(2);

/// Bytes of the stack of a thread: more than TLS takes.
const STACK_BYTES: usize = 512 << 10;

/// A read that waits for its bytes.
struct Job {
    range: Range<u64>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The bytes, once they are there.
    bytes: Option<Vec<u8>>,
    /// What the last request ended with.
    error: Option<RemoteError>,
    /// Requests that wait or are under way.
    pending: u32,
    /// When the latest request was sent.
    sent: Option<Instant>,
    /// Nobody waits any more.
    over: bool,
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Takes note that a request is sent. `false` where none is needed any more.
    fn start(&self) -> bool {
        let mut state = self.lock();
        if state.over || state.bytes.is_some() {
            state.pending -= 1;
            return false;
        }
        state.sent = Some(Instant::now());
        self.changed.notify_all();
        true
    }

    fn complete(&self, result: Result<&[u8], &RemoteError>) {
        let mut state = self.lock();
        state.pending -= 1;
        match result {
            Ok(bytes) if state.bytes.is_none() => state.bytes = Some(bytes.to_vec()),
            Ok(_) => {}
            Err(error) => state.error = Some(error.clone()),
        }
        self.changed.notify_all();
    }
}

#[derive(Default)]
struct Queue {
    /// Threads wait for these.
    faults: VecDeque<Arc<Job>>,
    /// Nobody does yet.
    early: VecDeque<Arc<Job>>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Queue {
    fn lists(&mut self) -> [&mut VecDeque<Arc<Job>>; 2] {
        [&mut self.faults, &mut self.early]
    }

    /// Takes the next job, and those beside it: what is asked for, and from where to where.
    fn take(&mut self, options: &RemoteOptions) -> Option<(Vec<Arc<Job>>, Range<u64>)> {
        let first = loop {
            let job = self.faults.pop_front().or_else(|| self.early.pop_front())?;
            if job.start() {
                break job;
            }
        };
        let mut whole = first.range.clone();
        let mut jobs = vec![first];
        // Each that joins may let another one join.
        while let Some(job) = self.take_beside(&whole, options) {
            if job.start() {
                whole = min(whole.start, job.range.start)..max(whole.end, job.range.end);
                jobs.push(job);
            }
        }
        Some((jobs, whole))
    }

    fn take_beside(&mut self, whole: &Range<u64>, options: &RemoteOptions) -> Option<Arc<Job>> {
        let is_beside = |job: &Arc<Job>| {
            let (start, end) = (min(whole.start, job.range.start), max(whole.end, job.range.end));
            let gap = max(whole.start, job.range.start).saturating_sub(min(whole.end, job.range.end));
            gap <= options.merge_gap && end - start <= options.merge_len
        };
        self.lists()
            .into_iter()
            .find_map(|list| list.iter().position(is_beside).and_then(|at| list.remove(at)))
    }
}

/// How long answers usually take: mean and deviation, as TCP's retransmission timer estimates them.
#[derive(Default)]
struct Usual {
    count: u32,
    mean: Duration,
    deviation: Duration,
}

impl Usual {
    fn note(&mut self, took: Duration) {
        if self.count == 0 {
            (self.mean, self.deviation) = (took, took / 2);
        } else {
            self.deviation = (self.deviation * 3 + self.mean.abs_diff(took)) / 4;
            self.mean = (self.mean * 7 + took) / 8;
        }
        self.count = self.count.saturating_add(1);
    }

    /// Longer than that isn't usual.
    fn limit(&self) -> Option<Duration> {
        (self.count >= USUAL_COUNT).then(|| max(MIN_HEDGE, self.mean + self.deviation * 4))
    }
}

/// Each by itself: nothing else is ordered by them.
#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    retries: AtomicU64,
    hedges: AtomicU64,
    merged: AtomicU64,
    bytes: AtomicU64,
}

struct Shared {
    fetch: Box<dyn Fetch>,
    options: RemoteOptions,
    queue: Mutex<Queue>,
    arrived: Condvar,
    usual: Mutex<Usual>,
    counters: Counters,
}

/// The reads of one object. Dropping it ends its threads as soon as their requests have.
pub(super) struct Engine(Arc<Shared>);

impl Engine {
    pub(super) fn new(fetch: impl Fetch, options: RemoteOptions) -> Self {
        Self(Arc::new(Shared {
            fetch: Box::new(fetch),
            options,
            queue: Mutex::default(),
            arrived: Condvar::new(),
            usual: Mutex::default(),
            counters: Counters::default(),
        }))
    }

    /// Reads a page of an object of `len` bytes: zeros follow its end.
    pub(super) fn read_page(
        &self,
        len: u64,
        offset: u64,
        page: &mut [u8],
        is_early: bool,
    ) -> io::Result<PageData> {
        let rest = len.saturating_sub(offset);
        let inside = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len()));
        if inside == 0 {
            return Ok(PageData::Zero);
        }
        self.read(offset, &mut page[..inside], is_early)?;
        page[inside..].fill(0);
        Ok(PageData::Data)
    }

    /// Reads bytes, which the object has. `is_early`: no thread waits for them, so faults go first.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8], is_early: bool) -> io::Result<()> {
        let range = offset..offset + bytes.len() as u64;
        let job = Arc::new(Job { range, state: Mutex::default(), changed: Condvar::new() });
        let result = self.wait(&job, is_early);
        let mut state = job.lock();
        state.over = true;
        match (state.bytes.take(), result) {
            (Some(found), _) => bytes.copy_from_slice(&found),
            (None, Err(error)) => return Err(error.into()),
            (None, Ok(())) => unreachable!("the wait ends with bytes or an error"),
        }
        Ok(())
    }

    pub(super) fn statistics(&self) -> RemoteStatistics {
        let Counters { requests, retries, hedges, merged, bytes } = &self.0.counters;
        let [requests, retries, hedges, merged, bytes] =
            [requests, retries, hedges, merged, bytes].map(|counter| counter.load(Ordering::Relaxed));
        RemoteStatistics { requests, retries, hedges, merged, bytes }
    }

    /// Has requests made until there are bytes, an error that stays, or no time left.
    fn wait(&self, job: &Arc<Job>, is_early: bool) -> Result<(), RemoteError> {
        let Shared { options, counters, usual, .. } = &*self.0;
        let begun = Instant::now();
        let end = begun + min(options.give_up_after, FOREVER);
        let (mut attempts, mut delay, mut hedged, mut again) = (0, options.first_delay, false, Some(begun));
        let mut state = job.lock();
        loop {
            let now = Instant::now();
            if state.bytes.is_some() {
                return Ok(());
            }
            if let Some(error) = state.error.take_if(|error| !error.is_retryable()) {
                return Err(error);
            }
            if state.pending == 0 && again.is_none() {
                // All that were sent have failed.
                let wait = state.error.as_ref().and_then(RemoteError::retry_after).unwrap_or_default();
                again = Some(now + max(delay, wait));
                delay = min(delay * 2, MAX_DELAY);
            }
            if now >= end || again.is_some_and(|again| again > end) {
                let last = state.error.take().unwrap_or(RemoteError::TimedOut(options.request_timeout));
                return Err(RemoteError::GaveUp { after: begun.elapsed(), attempts, last: Box::new(last) });
            }
            let mut until = end;
            if let Some(at) = again {
                if at <= now {
                    again = None;
                    counters.retries.fetch_add(u64::from(attempts > 0), Ordering::Relaxed);
                    attempts += 1;
                    state = self.send(job, state, is_early)?;
                    continue;
                }
                until = min(until, at);
            }
            let limit = lock(usual).limit();
            if let (Some(sent), Some(limit)) = (state.sent, limit) {
                if options.hedge && !is_early && !hedged && state.pending == 1 {
                    if sent + limit <= now {
                        hedged = true;
                        counters.hedges.fetch_add(1, Ordering::Relaxed);
                        attempts += 1;
                        state = self.send(job, state, is_early)?;
                        continue;
                    }
                    until = min(until, sent + limit);
                }
            }
            let rest = until.saturating_duration_since(now);
            state = job.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Puts a job into the queue once more. The queue is locked before a job, so the job's lock is let go meanwhile.
    fn send<'a>(
        &self,
        job: &'a Arc<Job>,
        mut state: MutexGuard<'a, State>,
        is_early: bool,
    ) -> Result<MutexGuard<'a, State>, RemoteError> {
        state.pending += 1;
        state.sent = None;
        drop(state);
        let shared = &self.0;
        let mut queue = shared.lock();
        // Threads that were notified and don't run yet are idle still: each has a job that waits.
        let waiting = queue.faults.len() + queue.early.len();
        let starts = queue.idle <= waiting && queue.threads < shared.options.connections;
        if starts {
            let running = Arc::clone(shared);
            let thread = thread::Builder::new().name("uffd-remote".into()).stack_size(STACK_BYTES);
            match thread.spawn(move || running.run()) {
                Ok(_) => queue.threads += 1,
                // Those that there are will do it.
                Err(_) if queue.threads > 0 => {}
                Err(error) => return Err(RemoteError::Connection(format!("no thread for it: {error}"))),
            }
        }
        queue.lists()[usize::from(is_early)].push_back(Arc::clone(job));
        drop(queue);
        shared.arrived.notify_one();
        Ok(job.lock())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.arrived.notify_all();
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("options", &self.0.options)
            .field("statistics", &self.statistics())
            .finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    /// What a thread of the engine does.
    fn run(&self) {
        loop {
            let mut queue = self.lock();
            let (jobs, range) = loop {
                if queue.closed {
                    queue.threads -= 1;
                    return;
                }
                if let Some(taken) = queue.take(&self.options) {
                    break taken;
                }
                queue.idle += 1;
                queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            };
            drop(queue);
            self.request(&jobs, range);
        }
    }

    fn request(&self, jobs: &[Arc<Job>], range: Range<u64>) {
        let count = |counter: &AtomicU64, more: u64| counter.fetch_add(more, Ordering::Relaxed);
        count(&self.counters.requests, 1);
        count(&self.counters.merged, jobs.len() as u64 - 1);
        count(&self.counters.bytes, range.end - range.start);
        let begun = Instant::now();
        let mut bytes = vec![0; (range.end - range.start) as usize];
        // A panic of a protocol's library must not leave callers without an answer.
        let fetched =
            catch_panic(|| Ok(self.fetch.fetch(range.start, &mut bytes, self.options.request_timeout)));
        let fetched = fetched.unwrap_or_else(|panic| Err(RemoteError::Unusable(panic.to_string())));
        if fetched.is_ok() {
            lock(&self.usual).note(begun.elapsed());
        }
        for job in jobs {
            let at = (job.range.start - range.start) as usize;
            let len = (job.range.end - job.range.start) as usize;
            job.complete(fetched.as_ref().map(|()| &bytes[at..at + len]));
        }
    }
}
