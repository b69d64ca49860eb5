//! [`Listener`]: the host's end, for any number of monitors.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fmt, fs, io, process};

use super::connection::send_all;
use super::limits::{MAX_PENDING, max_descriptors};
use super::orphan::Orphan;
use super::{
    Connection, Credentials, Decoder, Dialect, Error, Handoff, Message, Parts, PeerError, Process, Received,
    region,
};
use crate::owner::Owner;
use crate::pager::OnEnd;
use crate::sys::socket;

/// Connections that are accepted before those that wait are looked at again.
const ACCEPTED_AT_ONCE: usize = 64;

/// Bytes that are read of one peer before another one's turn.
const READ_BYTES: usize = 64 << 10;

/// How long the listener accepts nobody after this process had no descriptor, or no memory, for a connection.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// Descriptors that systemd hands to a service begin with this number.
const FIRST_INHERITED: RawFd = 3;

/// The check of a peer's credentials.
type Check = Box<dyn Fn(&Credentials) -> bool + Send + Sync>;

/// What gives a CodeSandbox monitor its memory: a memfd and its length in bytes.
type Memory = Box<dyn FnMut(&Credentials) -> io::Result<(OwnedFd, u64)> + Send + Sync>;

/// A socket on which monitors hand memory over: one for the host, not for each virtual machine.
///
/// [`accept`](Self::accept) reads from all that are connected at the same time, so that a peer that is slow, silent or
/// malicious keeps no other one waiting.
///
/// It belongs to the process that made it. In a fork's child [`accept`](Self::accept) is an error, and dropping the
/// listener leaves the socket's file and the peers alone: a program that becomes a daemon makes it afterwards.
///
/// ```no_run
/// use std::sync::Arc;
/// use userfaultfd::handoff::Listener;
/// use userfaultfd::pager::{FileSource, Pager};
///
/// let image = Arc::new(FileSource::open("memory.snapshot")?);
/// let pager = Pager::new()?;
/// let mut listener = Listener::bind("/run/pager.sock")?;
/// loop {
///     match listener.accept() {
///         // Dropping the handle leaves the memory to the pager. What isn't served is killed.
///         Ok(handoff) => match pager.serve(handoff, |_| Arc::clone(&image)) {
///             Ok(served) => println!("serving {}", served.process().credentials),
///             Err(refused) => eprintln!("{refused}"),
///         },
///         Err(error) if error.is_of_peer() => eprintln!("{error}"),
///         Err(error) => return Err(error.into()),
///     }
/// }
/// # #[expect(unreachable_code)]
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Listener {
    owner: Owner,
    socket: UnixListener,
    /// The file that was made, with its device and inode.
    file: Option<(PathBuf, u64, u64)>,
    deadline: Duration,
    limit: usize,
    check: Option<Check>,
    dialects: Vec<Dialect>,
    memory: Option<Memory>,
    on_end: OnEnd,
    pending: Vec<Pending>,
    done: VecDeque<Result<Handoff, Error>>,
    /// Processes that were refused, and haven't ended yet.
    orphans: Vec<Orphan>,
    /// When connections are accepted again. Set while this process has no descriptor for one.
    full_until: Option<Instant>,
    /// Whether that was reported.
    is_full: bool,
    room: Vec<u8>,
}

/// A peer that has connected, and hasn't handed its memory over.
#[derive(Debug)]
struct Pending {
    connection: Connection,
    process: Process,
    since: Instant,
    /// The memory that was sent to it.
    memory: Option<OwnedFd>,
}

impl Listener {
    /// Listens on a new socket at a path. The file is removed when the listener is dropped.
    ///
    /// # Errors
    ///
    /// [`Listen`](Error::Listen): `AddrInUse`, there is a file already, perhaps of a handler that was killed (then connecting to
    /// it fails with `ConnectionRefused`, and the file can be removed); `InvalidInput`, the path has more than 107 bytes; and
    /// those of bind(2).
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let named = |error: io::Error| {
            Error::Listen(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        };
        let socket = UnixListener::bind(path).map_err(named)?;
        let metadata = fs::symlink_metadata(path).map_err(Error::Listen)?;
        let mut listener = Self::of(socket)?;
        listener.file = Some((path.to_owned(), metadata.dev(), metadata.ino()));
        Ok(listener)
    }

    /// Listens on a socket that systemd has made for this service (`LISTEN_FDS`): the first Unix stream socket, or the one
    /// of a name (`FileDescriptorName=`).
    ///
    /// The inherited descriptor stays open, since other code may use it, too; this works with a duplicate.
    ///
    /// # Errors
    ///
    /// [`Inherited`](Error::Inherited): none was handed to this process, or none that is a listening Unix stream socket.
    pub fn inherited(name: Option<&str>) -> Result<Self, Error> {
        let variable = |name| env::var(name).ok();
        let (pid, fds, names) = (variable("LISTEN_PID"), variable("LISTEN_FDS"), variable("LISTEN_FDNAMES"));
        let found = inherited(pid.as_deref(), fds.as_deref(), names.as_deref(), process::id());
        let found = found.map_err(|reason| Error::Inherited { reason })?;
        for (number, _) in found.iter().filter(|(_, found)| name.is_none_or(|name| found == name)) {
            if let Ok(Some(socket)) = socket::inherited_listener(*number) {
                return Self::of(socket.into());
            }
        }
        let which = name.map_or(String::new(), |name| format!(" of the name {name}"));
        let reason = format!("of {} descriptors none{which} is a listening Unix stream socket", found.len());
        Err(Error::Inherited { reason })
    }

    fn of(socket: UnixListener) -> Result<Self, Error> {
        socket.set_nonblocking(true).map_err(Error::Listen)?;
        Ok(Self {
            owner: Owner::current().map_err(|errno| Error::Listen(errno.into()))?,
            socket,
            file: None,
            deadline: Duration::from_secs(5),
            limit: 1 << 20,
            check: None,
            dialects: Dialect::ALL.to_vec(),
            memory: None,
            on_end: OnEnd::Kill,
            pending: Vec::new(),
            done: VecDeque::new(),
            orphans: Vec::new(),
            full_until: None,
            is_full: false,
            room: vec![0; READ_BYTES],
        })
    }

    /// Sets how long a peer may take from its connection until it has handed its memory over. The default is 5 s.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets the length of the longest message, in bytes. The default is 1 MiB.
    #[must_use]
    pub fn message_limit(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self
    }

    /// Sets a check of the process at the other end, before anything is read from it. It is refused if `check` returns
    /// false. By default the permissions of the socket's file decide alone.
    #[must_use]
    pub fn peer(mut self, check: impl Fn(&Credentials) -> bool + Send + Sync + 'static) -> Self {
        self.check = Some(Box::new(check));
        self
    }

    /// Sets the dialects that are understood. With several, the first bytes decide; of those that begin alike the
    /// first of the list is chosen. With one alone it is taken for that. The default is all; those that aren't
    /// [recognised](Dialect::is_recognised) must be alone.
    #[must_use]
    pub fn dialects(mut self, dialects: impl IntoIterator<Item = Dialect>) -> Self {
        self.dialects = dialects.into_iter().collect();
        self
    }

    /// Sets the function that makes the memory for a monitor that gets it from the handler
    /// ([`CodeSandbox`](Dialect::CodeSandbox)): a memfd, and its length in bytes.
    #[must_use]
    pub fn memory(
        mut self,
        memory: impl FnMut(&Credentials) -> io::Result<(OwnedFd, u64)> + Send + Sync + 'static,
    ) -> Self {
        self.memory = Some(Box::new(memory));
        self
    }

    /// Sets how a process ends whose message is refused after it has sent a userfaultfd, and what a [`Handoff`] has at first.
    /// The default is [`OnEnd::Kill`]. A peer that has sent no userfaultfd is disconnected, and nothing more.
    #[must_use]
    pub fn on_end(mut self, on_end: OnEnd) -> Self {
        self.on_end = on_end;
        self
    }

    /// Waits until a peer has handed its memory over.
    ///
    /// # Errors
    ///
    /// - [`Peer`](Error::Peer): a peer is refused. All others are served on: call it again. With
    ///   [`Socket`](PeerError::Socket) and `EMFILE` this process may open no more files: the peer waits to be connected until
    ///   it may. That is reported once.
    /// - [`Listen`](Error::Listen): the socket failed; or another process made the listener, before a fork.
    pub fn accept(&mut self) -> Result<Handoff, Error> {
        loop {
            if let Some(handoff) = self.step(None, &mut [])? {
                return Ok(handoff);
            }
        }
    }

    /// Waits like [`accept`](Self::accept), but for at most `timeout`. Returns `None` if no peer has handed memory over in time.
    ///
    /// # Errors
    ///
    /// Those of [`accept`](Self::accept).
    pub fn accept_timeout(&mut self, timeout: Duration) -> Result<Option<Handoff>, Error> {
        let until = Instant::now().checked_add(timeout);
        loop {
            let handoff = self.step(until, &mut [])?;
            if handoff.is_some() || until.is_some_and(|until| until <= Instant::now()) {
                return Ok(handoff);
            }
        }
    }

    /// Returns the number of peers that are connected and haven't handed their memory over.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Waits for anything once, and handles it. `others` are descriptors that are waited for, too.
    pub(super) fn step(
        &mut self,
        until: Option<Instant>,
        others: &mut [libc::pollfd],
    ) -> Result<Option<Handoff>, Error> {
        if !self.owner.is_current() {
            return Err(Error::Listen(io::Error::other("another process made the listener, before a fork")));
        }
        let poll = |fds: &mut [libc::pollfd], millis| {
            socket::poll_readable(fds, millis).map_err(|errno| Error::Listen(errno.into()))
        };
        if let Some(done) = self.done.pop_front() {
            poll(others, 0)?;
            return done.map(Some);
        }
        let now = Instant::now();
        let deadlines = self.pending.iter().filter_map(|pending| pending.since.checked_add(self.deadline));
        self.full_until = self.full_until.filter(|until| *until > now);
        let millis = deadlines.chain(until).chain(self.full_until).min().map_or(-1, |first| {
            let rest = first.saturating_duration_since(now);
            rest.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX)
        });
        let polled = |fd: BorrowedFd<'_>| libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
        let mut fds: Vec<_> = self.pending.iter().map(|pending| polled(pending.connection.as_fd())).collect();
        fds.extend(self.orphans.iter().filter_map(Orphan::pidfd).map(polled));
        if self.full_until.is_none() {
            fds.push(polled(self.socket.as_fd()));
        }
        let own = fds.len();
        fds.extend_from_slice(others);
        poll(&mut fds, millis)?;
        others.copy_from_slice(&fds[own..]);
        fds.truncate(own);
        let listens = self.full_until.is_none() && fds.pop().is_some_and(|fd| fd.revents != 0);
        let mut ready = fds.iter().map(|fd| fd.revents != 0);
        let now = Instant::now();
        for mut pending in std::mem::take(&mut self.pending) {
            let is_ready = ready.next().unwrap_or(false);
            let result = if is_ready { pending.advance(&mut self.room) } else { Ok(None) };
            match result {
                Ok(Some(received)) => {
                    let done = self.hand_over(pending, received);
                    self.done.push_back(done);
                }
                Ok(None) if now.duration_since(pending.since) < self.deadline => self.pending.push(pending),
                Ok(None) => {
                    let received = pending.connection.received();
                    self.refuse(pending, PeerError::Deadline { after: self.deadline, received });
                }
                Err(error) => self.refuse(pending, error),
            }
        }
        // Those that were polled are the first ones; all of them have a pidfd.
        self.orphans.retain(|_| !ready.next().unwrap_or(false));
        self.bound_descriptors();
        if listens {
            self.accept_all()?;
        }
        Ok(None)
    }

    /// Accepts those that wait to be connected.
    fn accept_all(&mut self) -> Result<(), Error> {
        for _ in 0..ACCEPTED_AT_ONCE {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    self.is_full = false;
                    match self.admit(stream) {
                        Ok(pending) => self.pending.push(pending),
                        Err(error) => self.done.push_back(Err(error)),
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => break,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ if !is_shortage(&error) => return Err(Error::Listen(error)),
                    // One that has much, or sends nothing, makes room for the next call.
                    _ if self.refuse_largest() || self.give_way() => break,
                    _ => {
                        self.full_until = Instant::now().checked_add(FULL_PAUSE);
                        if !std::mem::replace(&mut self.is_full, true) {
                            let error = PeerError::Socket(error);
                            self.done.push_back(Err(Error::Peer { peer: Credentials::UNKNOWN, error }));
                        }
                        break;
                    }
                },
            }
            if self.pending.len() > MAX_PENDING {
                self.give_way();
            }
        }
        Ok(())
    }

    /// Keeps peers that have handed nothing over from holding too many descriptors of this process, together.
    fn bound_descriptors(&mut self) {
        let most = max_descriptors();
        let held = |pending: &[Pending]| -> usize {
            pending.iter().map(|pending| pending.connection.descriptors()).sum()
        };
        while held(&self.pending) > most && self.refuse_largest() {}
    }

    /// Refuses the peer that has sent the most descriptors. Returns whether there is one that has sent more than a userfaultfd.
    fn refuse_largest(&mut self) -> bool {
        let held = |at: &usize| self.pending[*at].connection.descriptors();
        // Of several the first.
        let Some(at) = (0..self.pending.len()).rev().max_by_key(held).filter(|at| held(at) > 1) else {
            return false;
        };
        let (found, most) = (held(&at), max_descriptors());
        let pending = self.pending.remove(at);
        self.refuse(pending, PeerError::TooManyDescriptors { found, most });
        true
    }

    /// Refuses the peer that is connected longest, of those that have sent no userfaultfd. Returns whether there is one.
    fn give_way(&mut self) -> bool {
        let Some(at) = self.pending.iter().position(|pending| !pending.connection.has_userfaultfd()) else {
            return false;
        };
        let error = PeerError::Crowded { connections: self.pending.len() - 1 };
        let pending = self.pending.remove(at);
        self.refuse(pending, error);
        true
    }

    /// Checks the first message.
    fn hand_over(&mut self, pending: Pending, received: Received) -> Result<Handoff, Error> {
        let peer = pending.process.credentials;
        let Received { dialect, message, userfaultfd, mut files } = received;
        let (Message::Handoff { regions, mode, pid, .. }, Some(userfaultfd)) = (&message, userfaultfd) else {
            self.end(pending);
            return Err(Error::Peer { peer, error: PeerError::Unexpected { message } });
        };
        let Pending { connection, process, memory, .. } = pending;
        let checked = if dialect.wire().has_no_regions { Ok(()) } else { region::check(regions) };
        if let Err(error) = checked {
            self.orphans.extend(Orphan::end(self.on_end, userfaultfd, &[], process).filter(is_awaited));
            return Err(Error::Peer { peer, error });
        }
        files.extend(memory);
        let parts = Parts {
            state: None,
            dialect,
            userfaultfd,
            regions: regions.clone(),
            mode: *mode,
            memfds: files,
            process,
            pid: *pid,
            stream: Some(connection),
            missing: None,
        };
        Ok(Handoff::of(Some(self.owner), parts, self.on_end))
    }

    /// Ends a peer that handed nothing over that can be served, and reports it.
    fn refuse(&mut self, pending: Pending, error: PeerError) {
        let peer = pending.process.credentials;
        self.end(pending);
        self.done.push_back(Err(Error::Peer { peer, error }));
    }

    fn end(&mut self, mut pending: Pending) {
        if let Some(userfaultfd) = pending.connection.take_userfaultfd() {
            let orphan = Orphan::end(self.on_end, userfaultfd, &[], pending.process);
            self.orphans.extend(orphan.filter(is_awaited));
        }
    }

    /// Checks which process has connected.
    fn admit(&mut self, stream: UnixStream) -> Result<Pending, Error> {
        let failed = |peer, error| Error::Peer { peer, error: PeerError::Socket(error) };
        let process = Process::of_peer(&stream).map_err(|error| failed(Credentials::UNKNOWN, error))?;
        let peer = process.credentials;
        if self.check.as_ref().is_some_and(|check| !check(&peer)) {
            return Err(Error::Peer { peer, error: PeerError::NotAdmitted });
        }
        let mut memory = None;
        if let [only] = self.dialects[..] {
            if let Some(make) = self.memory.as_mut().filter(|_| only.wire().sends_memory) {
                let (file, len) = make(&peer).map_err(|error| failed(peer, error))?;
                // A new connection has room for a few bytes.
                send_all(&stream, &len.to_le_bytes(), &[file.as_fd()], Duration::ZERO)
                    .map_err(|error| failed(peer, error))?;
                memory = Some(file);
            }
        }
        let decoder = Decoder::new(self.dialects.iter().copied()).limit(self.limit);
        Ok(Pending { connection: Connection::new(stream, decoder), process, since: Instant::now(), memory })
    }
}

impl Pending {
    /// Reads once, and returns the first message if it is complete.
    fn advance(&mut self, room: &mut [u8]) -> Result<Option<Received>, PeerError> {
        self.connection.read(room)?;
        let received = loop {
            match self.connection.next_received()? {
                // A process that needs no memory, of CRIU: one of those that follow does.
                Some(Received { message: Message::Zombie { .. }, .. }) => {}
                received => break received,
            }
        };
        match received {
            None if self.connection.is_closed() => {
                Err(PeerError::Closed { received: self.connection.received() })
            }
            received => Ok(received),
        }
    }
}

/// Whether the end of a process can be noticed. A userfaultfd without that is kept open for ever, as it is dropped.
fn is_awaited(orphan: &Orphan) -> bool {
    orphan.pidfd().is_some()
}

/// Whether an error of accept(2) is a lack of descriptors or memory, which passes.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error.raw_os_error().is_some_and(|errno| shortages.contains(&errno))
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("socket", &self.socket)
            .field("deadline", &self.deadline)
            .field("dialects", &self.dialects)
            .field("on_end", &self.on_end)
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if !self.owner.is_current() {
            // A child's other copies are closed with the fields.
            return self.orphans.drain(..).for_each(Orphan::abandon);
        }
        for pending in std::mem::take(&mut self.pending) {
            self.end(pending);
        }
        // All of them are killed by now.
        self.orphans.drain(..).for_each(Orphan::wait);
        let Some((path, dev, ino)) = &self.file else { return };
        // Not another handler's, which has taken the place.
        let is_ours = fs::symlink_metadata(path).is_ok_and(|file| (file.dev(), file.ino()) == (*dev, *ino));
        if is_ours {
            // Nothing can be done about a folder that can't be written any more.
            let _removed = fs::remove_file(path);
        }
    }
}

/// The numbers and names of the descriptors that systemd has handed to a process.
fn inherited(
    pid: Option<&str>,
    fds: Option<&str>,
    names: Option<&str>,
    own: u32,
) -> Result<Vec<(RawFd, String)>, String> {
    let (Some(pid), Some(fds)) = (pid, fds) else {
        return Err("LISTEN_PID and LISTEN_FDS aren't set".to_owned());
    };
    if pid.parse() != Ok(own) {
        return Err(format!("LISTEN_PID is {pid}, another process"));
    }
    let count: RawFd = fds.parse().map_err(|_| format!("LISTEN_FDS is {fds}, no number"))?;
    let mut names = names.unwrap_or_default().split(':');
    let numbers = FIRST_INHERITED..FIRST_INHERITED.saturating_add(count.clamp(0, 1024));
    Ok(numbers.map(|number| (number, names.next().unwrap_or_default().to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::require;

    #[test]
    fn descriptors_of_systemd_are_this_process_alone() {
        require!();
        let found = inherited(Some("7"), Some("2"), Some("pager"), 7).unwrap();
        assert_eq!(found, [(3, "pager".to_owned()), (4, String::new())]);
        assert!(inherited(Some("8"), Some("2"), None, 7).unwrap_err().contains("another process"));
        assert!(inherited(None, Some("2"), None, 7).unwrap_err().contains("aren't set"));
        assert!(inherited(Some("7"), Some("x"), None, 7).unwrap_err().contains("no number"));
        assert_eq!(inherited(Some("7"), Some("-1"), None, 7).unwrap(), []);
        assert_eq!(inherited(Some("7"), Some("2147483647"), None, 7).unwrap().len(), 1024);
    }
}
