//! Content from futures, on a tokio runtime.

use std::fmt;
use std::future::{self, Future};
use std::io;
use std::panic::{self, AssertUnwindSafe};

use tokio::runtime::{Handle, RuntimeFlavor};

use super::{AsyncPageSource, Completion, Loaded, PageBuffer};

/// A closure that returns a future as an [`AsyncPageSource`]: each load is a task of a tokio runtime of the program's, so that a
/// thousand are in flight on its few threads.
///
/// ```
/// use std::time::Duration;
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{AsyncSource, Loaded, PageBuffer, TokioSource};
///
/// let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build()?;
/// let source = TokioSource::new(runtime.handle().clone(), |offset, mut page: PageBuffer| async move {
///     tokio::task::yield_now().await; // a request, say
///     page.fill((offset >> 20) as u8);
///     Ok(Loaded::Data(page))
/// })?;
/// let memory = LazyMemory::builder(AsyncSource::new(source)).len(8 << 20).build()?;
/// assert_eq!(memory[5 << 20], 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A future that panics, or is dropped since its runtime ends, is a failed read. Starting a task allocates: not a source for
/// memory whose descriptor reports forks.
///
/// # The runtime's own threads
///
/// A task that touches missing memory keeps its thread asleep in the kernel until the load is there, and the runtime knows
/// nothing of it. If all threads of the runtime do that, no thread is left to run the loads, and they sleep for ever. So a
/// thread of the runtime that runs the loads must not touch the memory: read it in
/// [`spawn_blocking`](tokio::task::spawn_blocking), in a thread of the program, or on another runtime. What can be seen is refused:
/// a runtime of one thread, which is the program's ([`new`](Self::new)); and a call that waits for content
/// ([`fill`](crate::LazyMemory::fill), say) within a task, which ends with an error of the kind
/// [`Deadlock`](io::ErrorKind::Deadlock). An access isn't seen. In a program whose panics abort, such a call in that
/// runtime's `spawn_blocking` is refused, too.
pub struct TokioSource<F> {
    runtime: Handle,
    load: F,
    len: Option<u64>,
}

impl<F, L> TokioSource<F>
where
    F: Fn(u64, PageBuffer) -> L + Send + Sync,
    L: Future<Output = io::Result<Loaded>> + Send + 'static,
{
    /// Returns a source whose loads are the futures that `load` returns for an offset and a buffer.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the runtime is a
    /// [current-thread](RuntimeFlavor::CurrentThread) one. It runs tasks only while a thread of the program waits for one, which
    /// that thread doesn't while it touches the memory.
    pub fn new(runtime: Handle, load: F) -> io::Result<Self> {
        if runtime.runtime_flavor() == RuntimeFlavor::CurrentThread {
            let text = "a current-thread runtime runs no load while its thread waits for memory: use a \
                        multi-thread runtime";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self { runtime, load, len: None })
    }

    /// Sets the length of the source in bytes. By default it has no end.
    #[must_use]
    pub fn with_len(mut self, len: u64) -> Self {
        self.len = Some(len);
        self
    }
}

impl<F, L> AsyncPageSource for TokioSource<F>
where
    F: Fn(u64, PageBuffer) -> L + Send + Sync,
    L: Future<Output = io::Result<Loaded>> + Send + 'static,
{
    fn start(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        let load = (self.load)(offset, buffer);
        // Not waited for: if it is dropped or panics, so is the completion.
        let _task = self.runtime.spawn(async move { done.complete(load.await) });
    }

    fn len(&self) -> Option<u64> {
        self.len
    }

    fn check_wait(&self) -> io::Result<()> {
        let is_here = Handle::try_current().is_ok_and(|current| current.id() == self.runtime.id());
        // In `spawn_blocking` a thread may wait. The runtime alone knows the difference, and tells it by a panic.
        // Where a panic ends the process, it isn't asked.
        let may_wait = || {
            cfg!(panic = "unwind")
                && panic::catch_unwind(AssertUnwindSafe(|| self.runtime.block_on(future::ready(())))).is_ok()
        };
        if is_here && !may_wait() {
            let text = "a task would wait for memory that its own runtime must load: wait in spawn_blocking";
            return Err(io::Error::new(io::ErrorKind::Deadlock, text));
        }
        Ok(())
    }
}

impl<F> fmt::Debug for TokioSource<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioSource").field("len", &self.len).finish_non_exhaustive()
    }
}
