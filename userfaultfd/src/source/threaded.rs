//! Any source, read by threads of its own.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::call::catch_panic;
use super::{AsyncPageSource, Completion, Loaded, PageBuffer, PageData, PageSource};
use crate::owner::Owner;

/// Loads that the queue has room for from the start, of each kind.
const QUEUE_LEN: usize = 1024;

/// A [`PageSource`] whose reads are made by a fixed number of threads: an [`AsyncPageSource`] of a source that blocks, with
/// faults before what is read ahead.
///
/// A pager has threads of its own that read a blocking source, more of them when it is slow. This is for a source that takes
/// just that number of reads at a time, whatever the number of pagers that use it.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{AsyncSource, FileSource, ThreadedSource};
///
/// let file = FileSource::open(std::env::current_exe()?)?;
/// let source = AsyncSource::new(ThreadedSource::new(file, 8)?);
/// let memory = LazyMemory::builder(source).build()?;
/// assert_eq!(memory[1..4], *b"ELF");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Dropping it ends its threads as soon as their reads have ended. Loads that wait fail. In a forked child, which hasn't
/// got the threads, each load fails.
pub struct ThreadedSource<S: PageSource + 'static>(Arc<Shared<S>>);

struct Shared<S> {
    /// Of whom the threads are.
    owner: Owner,
    source: S,
    queue: Mutex<Queue>,
    arrived: Condvar,
}

struct Queue {
    faults: VecDeque<Job>,
    early: VecDeque<Job>,
    closed: bool,
}

struct Job {
    offset: u64,
    buffer: PageBuffer,
    done: Completion,
}

impl<S: PageSource + 'static> ThreadedSource<S> {
    /// Starts `threads` threads, at least one, that read `source`.
    ///
    /// # Errors
    ///
    /// That of [`thread::Builder::spawn`].
    pub fn new(source: S, threads: usize) -> io::Result<Self> {
        let owner = Owner::current().map_err(|errno| io::Error::from_raw_os_error(errno as i32))?;
        let room = || VecDeque::with_capacity(QUEUE_LEN);
        let queue = Mutex::new(Queue { faults: room(), early: room(), closed: false });
        // Dropped on an error, which ends the threads that there are.
        let this = Self(Arc::new(Shared { owner, source, queue, arrived: Condvar::new() }));
        for _ in 0..threads.max(1) {
            let shared = Arc::clone(&this.0);
            thread::Builder::new().name("uffd-source".into()).spawn(move || shared.run())?;
        }
        Ok(this)
    }

    /// Returns the number of loads that wait for a thread.
    #[must_use]
    pub fn waiting(&self) -> usize {
        if !self.0.owner.is_current() {
            return 0;
        }
        let queue = self.0.lock();
        queue.faults.len() + queue.early.len()
    }

    /// Returns the source.
    #[must_use]
    pub fn get_ref(&self) -> &S {
        &self.0.source
    }
}

impl<S: PageSource> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, job: Job, is_early: bool) {
        if !self.owner.is_current() {
            let text =
                "the threads of this source are those of the process that made it: make one in each child";
            return job.done.complete(Err(io::Error::other(text)));
        }
        let mut queue = self.lock();
        let list = if is_early { &mut queue.early } else { &mut queue.faults };
        list.push_back(job);
        drop(queue);
        self.arrived.notify_one();
    }

    fn next(&self) -> Option<(Job, bool)> {
        let nothing = |queue: &mut Queue| !queue.closed && queue.faults.is_empty() && queue.early.is_empty();
        let queue = self.arrived.wait_while(self.lock(), nothing);
        let mut queue = queue.unwrap_or_else(PoisonError::into_inner);
        if queue.closed {
            return None;
        }
        let fault = queue.faults.pop_front().map(|job| (job, false));
        fault.or_else(|| queue.early.pop_front().map(|job| (job, true)))
    }

    fn run(&self) {
        while let Some((Job { offset, mut buffer, done }, is_early)) = self.next() {
            let read = catch_panic(|| {
                if is_early {
                    self.source.read_early(offset, &mut buffer)
                } else {
                    self.source.read(offset, &mut buffer)
                }
            });
            done.complete(read.map(|data| match data {
                PageData::Data => Loaded::Data(buffer),
                PageData::Zero => Loaded::Zero,
            }));
        }
    }
}

impl<S: PageSource> AsyncPageSource for ThreadedSource<S> {
    fn start(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        self.0.put(Job { offset, buffer, done }, false);
    }

    fn start_early(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        self.0.put(Job { offset, buffer, done }, true);
    }

    fn len(&self) -> Option<u64> {
        self.0.source.len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.0.source.zeros(offset)
    }
}

impl<S: PageSource + 'static> Drop for ThreadedSource<S> {
    fn drop(&mut self) {
        if !self.0.owner.is_current() {
            // The lock may be held by a thread that isn't here.
            return;
        }
        let mut queue = self.0.lock();
        queue.closed = true;
        let left = (std::mem::take(&mut queue.faults), std::mem::take(&mut queue.early));
        drop(queue);
        self.0.arrived.notify_all();
        // Without the lock: their receivers take locks of their own.
        drop(left);
    }
}

impl<S: PageSource + 'static> fmt::Debug for ThreadedSource<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadedSource").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}
