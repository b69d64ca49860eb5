//! [`Server`]: what a handler for a host waits for, in one place.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Error, Handoff, Listener, PeerError, Received, ServedProcess};
use crate::pager::DescriptorId;
use crate::pager::bell::Bell;

/// Messages of a process that are taken before another one's turn.
const MESSAGES_AT_ONCE: usize = 16;

/// The loop of a handler that serves any number of virtual machines: it waits for those that arrive, for messages of those
/// that are served, and for their ends, in one thread.
///
/// ```no_run
/// use std::sync::Arc;
/// use userfaultfd::handoff::{Listener, Server, ServerEvent};
/// use userfaultfd::pager::{FileSource, Pager};
///
/// let image = Arc::new(FileSource::open("memory.snapshot")?);
/// let pager = Pager::new()?;
/// let mut server = Server::new(Listener::bind("/run/pager.sock")?)?;
/// loop {
///     match server.wait()? {
///         ServerEvent::Handoff(handoff) => match pager.serve(handoff, |_| Arc::clone(&image)) {
///             Ok(served) => drop(server.add(served)),
///             Err(unserved) => eprintln!("{unserved}"),
///         },
///         ServerEvent::Ended(served) => println!("{} has ended", served.process().credentials),
///         other => eprintln!("{other:?}"),
///     }
/// }
/// # #[expect(unreachable_code)]
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    served: Vec<Guest>,
    /// Rings when a process isn't served any more.
    bell: Arc<Bell>,
    stop: Option<OwnedFd>,
    /// What has happened, and wasn't returned yet.
    events: VecDeque<ServerEvent>,
}

/// A process that is served.
#[derive(Debug)]
struct Guest {
    process: ServedProcess,
    /// Whether it may send messages: its connection is open, and had none that is wrong.
    speaks: bool,
    /// Whether more of them may have come than were taken.
    has_more: bool,
}

/// What a [`Server`] waits for.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServerEvent {
    /// A monitor has handed its memory over: give it to [`Pager::serve`](crate::pager::Pager::serve), and what that returns
    /// to [`Server::add`].
    Handoff(Handoff),
    /// A process that is served has sent a message: see [`ServedProcess::receive`].
    Message {
        /// The process: see [`Server::get_mut`].
        process: DescriptorId,
        /// The message.
        received: Received,
    },
    /// A process isn't served any more, since it has ended, or its memory was finished. The server has forgotten it.
    Ended(ServedProcess),
    /// A peer is refused. Or a process that is served has sent something that is no message: it is served on, and no further
    /// message of it is read.
    Refused(Error),
    /// The descriptor of [`Server::stop_on`] is readable.
    Stopped,
}

impl Server {
    /// Returns a server of those that connect to a listener.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`: this process, or the system, may open no more files.
    pub fn new(listener: Listener) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        Ok(Self { listener, served: Vec::new(), bell, stop: None, events: VecDeque::new() })
    }

    /// Sets a descriptor that ends the loop: as long as it is readable, [`wait`](Self::wait) returns
    /// [`Stopped`](ServerEvent::Stopped) at once. For example a signalfd(2), or a socket that a signal handler writes to.
    #[must_use]
    pub fn stop_on(mut self, descriptor: impl Into<OwnedFd>) -> Self {
        self.stop = Some(descriptor.into());
        self
    }

    /// Adds a process, whose messages and end are waited for from now on. Returns its id, for [`get_mut`](Self::get_mut).
    ///
    /// A process that has ended meanwhile is the next event.
    pub fn add(&mut self, process: ServedProcess) -> DescriptorId {
        let id = process.descriptor();
        process.ring_at_end(&self.bell);
        self.served.push(Guest { process, speaks: true, has_more: false });
        // It may have ended before it was known whom to ring.
        self.bell.ring();
        id
    }

    /// Returns the processes that are served.
    #[must_use]
    pub fn processes(&self) -> impl ExactSizeIterator<Item = &ServedProcess> {
        self.served.iter().map(|guest| &guest.process)
    }

    /// Returns a served process by its id, or `None` once it has ended.
    pub fn get_mut(&mut self, process: DescriptorId) -> Option<&mut ServedProcess> {
        self.served.iter_mut().map(|guest| &mut guest.process).find(|served| served.descriptor() == process)
    }

    /// Ends the loop: closes the listener, and returns the processes that are served.
    #[must_use]
    pub fn into_processes(self) -> impl ExactSizeIterator<Item = ServedProcess> {
        self.served.into_iter().map(|guest| guest.process)
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// [`Listen`](Error::Listen): the socket failed; or another process made the listener, before a fork.
    pub fn wait(&mut self) -> Result<ServerEvent, Error> {
        loop {
            if let Some(event) = self.step(None)? {
                return Ok(event);
            }
        }
    }

    /// Waits like [`wait`](Self::wait), but for at most `timeout`. Returns `None` if nothing happened in time.
    ///
    /// # Errors
    ///
    /// Those of [`wait`](Self::wait).
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<ServerEvent>, Error> {
        let until = Instant::now().checked_add(timeout);
        loop {
            let event = self.step(until)?;
            if event.is_some() || until.is_some_and(|until| until <= Instant::now()) {
                return Ok(event);
            }
        }
    }

    /// Waits for anything once, and handles it.
    fn step(&mut self, until: Option<Instant>) -> Result<Option<ServerEvent>, Error> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let polled = |fd: BorrowedFd<'_>| libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
        // One with a negative number is left out.
        let none = libc::pollfd { fd: -1, events: 0, revents: 0 };
        let stop = self.stop.as_ref().map_or(none, |stop| polled(stop.as_fd()));
        let mut fds = vec![stop, polled(self.bell.as_fd())];
        fds.extend(self.served.iter().map(|guest| guest.stream().map_or(none, polled)));
        // Those that were read may be complete without anything to be read.
        let has_more = self.served.iter().any(|guest| guest.has_more);
        let until = if has_more { Some(Instant::now()) } else { until };
        let arrived = match self.listener.step(until, &mut fds) {
            Ok(handoff) => handoff.map(ServerEvent::Handoff),
            Err(error) if error.is_of_peer() => Some(ServerEvent::Refused(error)),
            Err(error) => return Err(error),
        };
        self.events.extend(arrived);
        let ready = |at: usize| fds[at].revents != 0;
        if ready(0) {
            // Before what else there is: a thousand connections a second must not keep it from ending.
            self.events.push_front(ServerEvent::Stopped);
        }
        for (at, guest) in self.served.iter_mut().enumerate() {
            if ready(2 + at) || guest.has_more {
                guest.receive(&mut self.events);
            }
        }
        if ready(1) {
            self.bell.hush();
            let (served, ended) =
                std::mem::take(&mut self.served).into_iter().partition(|guest| guest.process.is_served());
            self.served = served;
            let ended: Vec<Guest> = ended;
            self.events.extend(ended.into_iter().map(|guest| ServerEvent::Ended(guest.process)));
        }
        Ok(self.events.pop_front())
    }
}

impl Guest {
    /// The connection, if messages may come.
    fn stream(&self) -> Option<BorrowedFd<'_>> {
        self.process.stream().filter(|_| self.speaks)
    }

    /// Receives what has come, or a part of it: a process that sends without an end keeps nothing else waiting.
    fn receive(&mut self, events: &mut VecDeque<ServerEvent>) {
        self.has_more = false;
        for _ in 0..MESSAGES_AT_ONCE {
            match self.process.receive(Duration::ZERO) {
                Ok(Some(received)) => {
                    events.push_back(ServerEvent::Message { process: self.process.descriptor(), received });
                }
                // Only a part of a message.
                Err(PeerError::Deadline { .. }) => return,
                // The pager notices whether that is the end.
                Ok(None) => self.speaks = false,
                Err(error) => {
                    self.speaks = false;
                    let peer = self.process.process().credentials;
                    events.push_back(ServerEvent::Refused(Error::Peer { peer, error }));
                }
            }
            if !self.speaks {
                return;
            }
        }
        self.has_more = true;
    }
}
