//! [`AsyncUffd`]: reading events from async code.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
#[cfg(feature = "async-io")]
use std::sync::Arc;

#[cfg(feature = "tokio")]
use tokio::io::{Interest, unix::AsyncFd};

use crate::error::errno_of;
use crate::{Error, EventBuffer, Result, Uffd, sys};

/// A [`Uffd`] whose events are awaited, for programs that write their own fault loop on tokio or async-io.
///
/// [`with_tokio`](Self::with_tokio) (feature `tokio`) and [`with_async_io`](Self::with_async_io) (feature `async-io`) make one;
/// after that they are alike. [`read_batch`](Self::read_batch) waits for events and reads them,
/// [`ready`](Self::ready) waits until there is one. Everything else is that of the [`Uffd`], to which it dereferences: fills and
/// wakes never wait for an event, and need no `await`. All methods take `&self`: any number of tasks may wait and fill.
///
/// Content that only futures can fetch, without a loop of your own, is what `source::TokioSource` is for.
///
#[cfg_attr(feature = "tokio", doc = "```")]
#[cfg_attr(not(feature = "tokio"), doc = "```ignore")]
/// use userfaultfd::{AsyncUffd, Event, EventBuffer, UffdBuilder, page_size};
///
/// let mut memory = memmap2::MmapMut::map_anon(page_size())?;
/// let start = memory.as_mut_ptr();
/// let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create()?;
/// uffd.register(start.cast(), memory.len())?;
/// let reader = std::thread::spawn(move || memory[0]); // no thread of the runtime
///
/// let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
/// runtime.block_on(async {
///     let uffd = AsyncUffd::with_tokio(uffd)?;
///     let mut events = EventBuffer::new(64);
///     uffd.read_batch(&mut events).await?;
///     for event in events.changes_first().drain() {
///         let Event::Pagefault { addr, .. } = event? else { continue };
///         let content = vec![7; page_size()];
///         // SAFETY: the content is a page, and no thread has seen the memory yet.
///         unsafe { uffd.copy(content.as_ptr().cast(), addr, page_size(), true)? };
///     }
///     Ok::<_, userfaultfd::Error>(())
/// })?;
/// assert_eq!(reader.join().unwrap(), 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Non-blocking
///
/// The descriptor must be non-blocking, since a read that waits would hold up a thread of the runtime. Make it with
/// [`non_blocking(true)`](crate::UffdBuilder::non_blocking), or call [`set_nonblocking(true)`](Uffd::set_nonblocking), which
/// applies to duplicates in other processes, too. So it isn't done for you: a blocking descriptor is refused with
/// [`Error::Blocking`], when it is registered and at each read. The userfaultfd of a fork's child has the mode with which its
/// parent's was created.
///
/// # Cancel safety
///
/// [`ready`](Self::ready) and [`read_batch`](Self::read_batch) may be dropped at any moment, as `select!` does: nothing is lost.
/// A call reads when it is polled and returns in the same poll, so that an event is either queued in the kernel or in the
/// caller's buffer. The kernel reports a fault to one reader: don't drop the buffer with events in it.
///
/// # The runtime's own threads
///
/// A thread of the runtime must not access missing memory that a task of the same runtime resolves: it sleeps in the fault, and
/// the task may be queued on it. Access it in threads of your own, or in `spawn_blocking`. The same holds for changes that the
/// kernel reports (`fork`, `munmap`, `madvise`): the thread that makes them sleeps until the event is read.
///
/// A thread that forks by fork(3) holds the locks of the allocator until its event is read, and a runtime allocates. So read the
/// forks of your own process with a thread that doesn't allocate; those of other processes can be awaited.
///
/// # Dropping
///
/// As for a [`Uffd`]: if no duplicate is open, missing pages read as zeros from then on. [`into_inner`](Self::into_inner) returns
/// the [`Uffd`].
pub struct AsyncUffd {
    registered: Registered,
}

/// The kernel reports a blocking descriptor as an error alone, whatever is queued: without it a task would wait for ever once
/// another owner has made the descriptor a blocking one.
#[cfg(feature = "tokio")]
const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

/// The descriptor, as the runtime has registered it.
enum Registered {
    #[cfg(feature = "tokio")]
    Tokio(AsyncFd<Uffd>),
    /// One reference, but for a moment at either end: async-io drops what it can't register, or deregister.
    #[cfg(feature = "async-io")]
    AsyncIo(async_io::Async<Arc<Uffd>>),
}

impl AsyncUffd {
    /// Registers a userfaultfd with the tokio runtime of the caller.
    ///
    /// # Errors
    ///
    /// [`NotRegistered`], which has the userfaultfd, with
    ///
    /// - [`Blocking`](Error::Blocking): the descriptor is a blocking one.
    /// - [`SystemError`](Error::SystemError) with the errno of epoll_ctl(2): `ENOSPC` or `ENOMEM`; `EPERM` and the like for
    ///   what isn't a userfaultfd.
    ///
    /// # Panics
    ///
    /// As all of tokio's types: outside of a runtime, and in one that was built without
    /// [`enable_io`](tokio::runtime::Builder::enable_io).
    #[cfg(feature = "tokio")]
    pub fn with_tokio(uffd: Uffd) -> Result<Self, NotRegistered> {
        let uffd = check_nonblocking(uffd)?;
        #[expect(unsafe_code, reason = "tokio relies on the descriptor to stay as it is")]
        // SAFETY: a `Uffd` owns one open descriptor, which no method changes or closes before the `Uffd` is dropped; no
        // `&mut` to it is given out, so that it can't be replaced while it is registered.
        let registered = unsafe { AsyncFd::register_with_interest(uffd, INTEREST) };
        match registered {
            Ok(registered) => Ok(Self { registered: Registered::Tokio(registered) }),
            Err(error) => {
                let (uffd, error) = error.into_parts();
                Err(NotRegistered { uffd, error: Error::SystemError(errno_of(&error)) })
            }
        }
    }

    /// Registers a userfaultfd with the reactor of async-io, which has a thread of its own and works with any executor.
    ///
    /// # Errors
    ///
    /// As `with_tokio`.
    ///
    /// ```
    /// use userfaultfd::{AsyncUffd, Error, UffdBuilder};
    ///
    /// let refused = AsyncUffd::with_async_io(UffdBuilder::new().create()?).unwrap_err();
    /// let (uffd, error) = refused.into_parts();
    /// assert!(matches!(error, Error::Blocking));
    /// uffd.set_nonblocking(true)?;
    /// let uffd = AsyncUffd::with_async_io(uffd)?;
    /// # drop(uffd);
    /// # Ok::<(), Error>(())
    /// ```
    #[cfg(feature = "async-io")]
    pub fn with_async_io(uffd: Uffd) -> Result<Self, NotRegistered> {
        let uffd = Arc::new(check_nonblocking(uffd)?);
        match async_io::Async::new_nonblocking(Arc::clone(&uffd)) {
            Ok(registered) => Ok(Self { registered: Registered::AsyncIo(registered) }),
            Err(error) => {
                Err(NotRegistered { uffd: sole_owner(uffd), error: Error::SystemError(errno_of(&error)) })
            }
        }
    }

    /// Waits until there is an event to be read.
    ///
    /// Another task, or another owner of the descriptor, may read it first. So read with
    /// [`try_read_batch`](Uffd::try_read_batch) or [`try_read_event`](Uffd::try_read_event), which return if there is none, and
    /// wait again. However the events are read: this asks the kernel whether one is queued, and returns at once as long as
    /// one is.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// - [`Blocking`](Error::Blocking): another owner has made the descriptor a blocking one.
    /// - `RuntimeEnded`: the tokio runtime that it is registered with was shut down.
    /// - [`SystemError`](Error::SystemError): poll(2) failed.
    pub async fn ready(&self) -> Result<()> {
        self.until(|uffd| {
            uffd.check_nonblocking()?;
            let [is_readable] = sys::wait_readable([uffd.as_fd()], 0)?;
            Ok(is_readable.then_some(()))
        })
        .await
    }

    /// Waits until there is an event, reads as many as are queued and fit behind those that the buffer still holds, and returns
    /// the number of events read: [`Uffd::read_batch`], which waits in the runtime.
    ///
    /// It never returns 0, except at once for a full buffer: a fault that was reported and resolved before it could be read is
    /// no reason to return. Take the events out [changes first](EventBuffer::changes_first).
    ///
    /// Cancel safe: see [the type](Self#cancel-safety).
    ///
    /// # Errors
    ///
    /// As [`ready`](Self::ready) and [`Uffd::read_batch`]. After `EMFILE` or `ENFILE` the event stays queued, and the next call
    /// tries again at once: close descriptors first.
    pub async fn read_batch(&self, buf: &mut EventBuffer) -> Result<usize> {
        match buf.capacity() - buf.len() {
            0 if buf.is_empty() => return Err(Error::EmptyBuffer),
            0 => return Ok(0),
            _ => {}
        }
        self.until(|uffd| {
            let read = uffd.try_read_batch(buf)?;
            Ok((read > 0).then_some(read))
        })
        .await
    }

    /// Ends the registration, and returns the userfaultfd.
    #[must_use]
    pub fn into_inner(self) -> Uffd {
        match self.registered {
            #[cfg(feature = "tokio")]
            Registered::Tokio(registered) => registered.into_inner(),
            #[cfg(feature = "async-io")]
            Registered::AsyncIo(registered) => {
                let uffd = Arc::clone(registered.get_ref());
                drop(registered);
                sole_owner(uffd)
            }
        }
    }

    /// Calls `attempt` until it has a result, and waits after each time that it has none.
    ///
    /// Readiness ends with such an attempt alone, never with one that has read something: more may be queued than was read, and
    /// the kernel tells of a message once.
    async fn until<T>(&self, mut attempt: impl FnMut(&Uffd) -> Result<Option<T>>) -> Result<T> {
        let attempt = |uffd: &Uffd| match attempt(uffd) {
            Ok(None) => Err(io::Error::from(io::ErrorKind::WouldBlock)),
            Ok(Some(value)) => Ok(Ok(value)),
            Err(error) => Ok(Err(error)),
        };
        match &self.registered {
            #[cfg(feature = "tokio")]
            Registered::Tokio(registered) => {
                // The only error of its own.
                let done = registered.async_io(INTEREST, attempt).await;
                done.unwrap_or(Err(Error::RuntimeEnded))
            }
            #[cfg(feature = "async-io")]
            Registered::AsyncIo(registered) => {
                let mut attempt = attempt;
                let done = registered.read_with(|uffd| attempt(uffd)).await;
                done.unwrap_or_else(|error| Err(Error::SystemError(errno_of(&error))))
            }
        }
    }
}

fn check_nonblocking(uffd: Uffd) -> Result<Uffd, NotRegistered> {
    match uffd.check_nonblocking() {
        Ok(()) => Ok(uffd),
        Err(error) => Err(NotRegistered { uffd, error }),
    }
}

#[cfg(feature = "async-io")]
fn sole_owner(uffd: Arc<Uffd>) -> Uffd {
    Arc::into_inner(uffd).expect("the other reference was the registration's")
}

impl Deref for AsyncUffd {
    type Target = Uffd;

    fn deref(&self) -> &Uffd {
        match &self.registered {
            #[cfg(feature = "tokio")]
            Registered::Tokio(registered) => registered.get_ref(),
            #[cfg(feature = "async-io")]
            Registered::AsyncIo(registered) => registered.get_ref(),
        }
    }
}

impl AsRef<Uffd> for AsyncUffd {
    fn as_ref(&self) -> &Uffd {
        self
    }
}

impl AsFd for AsyncUffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.deref().as_fd()
    }
}

impl fmt::Debug for AsyncUffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runtime = match &self.registered {
            #[cfg(feature = "tokio")]
            Registered::Tokio(_) => "tokio",
            #[cfg(feature = "async-io")]
            Registered::AsyncIo(_) => "async-io",
        };
        f.debug_struct("AsyncUffd").field("runtime", &runtime).field("uffd", self.deref()).finish()
    }
}

/// A userfaultfd that couldn't be made an [`AsyncUffd`], and the reason.
///
/// Threads may wait for the userfaultfd already, and would read zeros if it were closed. `?` in a function that returns
/// [`Error`] closes it.
#[derive(Debug, thiserror::Error)]
#[error("can't await events: {error}")]
pub struct NotRegistered {
    uffd: Uffd,
    error: Error,
}

impl NotRegistered {
    /// Returns the reason.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Returns the userfaultfd, as it was, and the reason.
    #[must_use]
    pub fn into_parts(self) -> (Uffd, Error) {
        (self.uffd, self.error)
    }
}

impl From<NotRegistered> for Error {
    /// Returns the reason. Closes the userfaultfd.
    fn from(refused: NotRegistered) -> Self {
        refused.error
    }
}
