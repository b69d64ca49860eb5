//! [`Connection`]: a stream with a peer, of which messages and descriptors are taken.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{Decoder, Dialect, Message, PeerError};
use crate::sys::socket;
use crate::{Errno, Uffd, sys};

/// How long a peer may take to accept a confirmation, of a few bytes.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// A connection with a peer that hands memory over.
///
/// Its end is the end of the peer: monitors keep it open as long as they live.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    decoder: Decoder,
    /// Descriptors that came, and that no message has taken.
    descriptors: VecDeque<OwnedFd>,
    received: usize,
    closed: bool,
}

/// A message with its descriptors.
#[derive(Debug)]
#[non_exhaustive]
pub struct Received {
    /// The dialect.
    pub dialect: Dialect,
    /// The message.
    pub message: Message,
    /// The userfaultfd, if memory is handed over.
    pub userfaultfd: Option<Uffd>,
    /// The files that came with it: the memory, if it is a file.
    pub files: Vec<OwnedFd>,
}

impl Connection {
    pub(super) fn new(socket: UnixStream, decoder: Decoder) -> Self {
        Self { socket, decoder, descriptors: VecDeque::new(), received: 0, closed: false }
    }

    /// Returns the socket.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Returns the number of bytes that came so far.
    #[must_use]
    pub fn received(&self) -> usize {
        self.received
    }

    /// Confirms what was received.
    pub(super) fn confirm(&self, dialect: Dialect) -> io::Result<()> {
        send_all(&self.socket, dialect.wire().ready, &[], CONFIRM_TIMEOUT)
    }

    /// Whether it has a userfaultfd of the peer.
    pub(super) fn has_userfaultfd(&self) -> bool {
        self.descriptors.iter().any(|fd| sys::is_userfaultfd(fd.as_fd()))
    }

    /// How many descriptors of the peer no message has taken.
    pub(super) fn descriptors(&self) -> usize {
        self.descriptors.len()
    }

    /// Takes a userfaultfd that belongs to no message.
    pub(super) fn take_userfaultfd(&mut self) -> Option<Uffd> {
        let at = self.descriptors.iter().position(|fd| sys::is_userfaultfd(fd.as_fd()))?;
        self.descriptors.remove(at).map(Uffd::from)
    }

    /// Waits for the next message, `timeout` at most. `None`: the peer has closed the connection between two messages.
    ///
    /// # Errors
    ///
    /// After an error the connection has no messages any more.
    ///
    /// - [`Deadline`](PeerError::Deadline): none was complete in time. What came is kept: the call may be repeated.
    /// - [`Closed`](PeerError::Closed): the peer closed the connection within a message.
    /// - All other kinds of [`PeerError`].
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<Received>, PeerError> {
        let deadline = Instant::now().checked_add(timeout);
        let mut room = vec![0; READ_BYTES];
        loop {
            if let Some(received) = self.next_received()? {
                return Ok(Some(received));
            }
            if self.closed {
                let received = self.received;
                let whole = !self.decoder.has_rest() && self.descriptors.is_empty();
                return if whole { Ok(None) } else { Err(PeerError::Closed { received }) };
            }
            if self.read(&mut room)? {
                continue;
            }
            let rest = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if rest.is_some_and(|rest| rest.is_zero()) {
                return Err(PeerError::Deadline { after: timeout, received: self.received });
            }
            let millis = rest
                .map_or(-1, |rest| rest.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX));
            sys::wait_readable([self.socket.as_fd()], millis)
                .map_err(|errno| PeerError::Socket(errno.into()))?;
        }
    }

    /// Reads what has come, and doesn't wait. Returns whether there was something, the end included.
    pub(super) fn read(&mut self, room: &mut [u8]) -> Result<bool, PeerError> {
        let (bytes, lost) = match socket::receive(self.socket.as_fd(), room, &mut self.descriptors) {
            Ok((0, lost)) => {
                self.closed = true;
                (0, lost)
            }
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Ok(false),
            // The peer ended with unread bytes of ours.
            Err(Errno::ECONNRESET) => {
                self.closed = true;
                (0, false)
            }
            Err(errno) => return Err(PeerError::Socket(errno.into())),
        };
        if lost {
            return Err(PeerError::DescriptorsLost);
        }
        // A userfaultfd and files.
        let (found, most) = (self.descriptors.len(), 1 + self.decoder.max_files());
        if found > most {
            return Err(PeerError::TooManyDescriptors { found, most });
        }
        self.received += bytes;
        self.decoder.push(&room[..bytes]);
        Ok(true)
    }

    /// Whether the peer has closed it.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// The next message that came as a whole, with its descriptors.
    pub(super) fn next_received(&mut self) -> Result<Option<Received>, PeerError> {
        let Some(message) = self.decoder.next_message()? else { return Ok(None) };
        let Some(mut dialect) = self.decoder.dialect() else { return Ok(None) };
        let other = dialect.wire().with_memory_file.filter(|other| self.decoder.allows(*other));
        if let Some(other) = other.filter(|_| self.has_memory_file()) {
            dialect = other;
            self.decoder.set_dialect(dialect);
        }
        let wire = dialect.wire();
        let mut userfaultfd = None;
        if message.has_userfaultfd() {
            userfaultfd = self.take_userfaultfd();
            if userfaultfd.is_none() {
                let is_none = self.descriptors.is_empty();
                return Err(if is_none { PeerError::NoUserfaultfd } else { PeerError::NotUserfaultfd });
            }
        }
        let most = match &message {
            Message::Handoff { files: Some(files), .. } => (*files).min(wire.max_files),
            Message::Handoff { .. } => wire.max_files,
            _ => 0,
        };
        let (taken, left) = (usize::from(userfaultfd.is_some()), self.descriptors.len());
        let mut files = self.descriptors.iter().take(most);
        let error = if left > most && !self.decoder.has_rest() {
            Some(PeerError::TooManyDescriptors { found: taken + left, most: taken + most })
        } else if !files.all(|file| socket::is_memory_file(file.as_fd())) {
            Some(PeerError::NotMemory)
        } else {
            None
        };
        if let Some(error) = error {
            // By the end that was chosen for its process it isn't closed.
            self.descriptors.extend(userfaultfd.map(OwnedFd::from));
            return Err(error);
        }
        let files = self.descriptors.drain(..left.min(most)).collect();
        Ok(Some(Received { dialect, message, userfaultfd, files }))
    }

    fn has_memory_file(&self) -> bool {
        self.descriptors.iter().any(|fd| socket::is_memory_file(fd.as_fd()))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends bytes, and descriptors with the first of them, within a time.
pub(super) fn send_all(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut fds: &[BorrowedFd<'_>],
    timeout: Duration,
) -> io::Result<()> {
    let deadline = Instant::now() + timeout;
    while !bytes.is_empty() {
        match socket::send(stream.as_fd(), bytes, fds) {
            Ok(sent) => (bytes, fds) = (&bytes[sent..], &[]),
            Err(Errno::EAGAIN) => {
                let rest = deadline.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                let millis = rest.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX);
                socket::wait_writable(stream.as_fd(), millis)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
