//! The monitor's side.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::connection::send_all;
use super::{Dialect, Error, MemoryRegion, Message};
use crate::sys::{self, socket};
use crate::{Errno, RegisterMode};

/// How long a step of the hand-over may take: the patience of Cloud Hypervisor.
const STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// What a monitor hands over.
#[derive(Clone, Debug)]
#[must_use = "it is handed over by `send`"]
pub struct Offer<'a> {
    userfaultfd: BorrowedFd<'a>,
    regions: Vec<MemoryRegion>,
    files: Vec<BorrowedFd<'a>>,
    mode: RegisterMode,
}

impl<'a> Offer<'a> {
    /// Returns an offer of memory that is registered with a userfaultfd for missing faults.
    pub fn new(userfaultfd: &'a impl AsFd, regions: impl Into<Vec<MemoryRegion>>) -> Self {
        let userfaultfd = userfaultfd.as_fd();
        Self { userfaultfd, regions: regions.into(), files: Vec::new(), mode: RegisterMode::MISSING }
    }

    /// Adds a file that is the memory, or a region of it.
    pub fn file(mut self, file: &'a impl AsFd) -> Self {
        self.files.push(file.as_fd());
        self
    }

    /// Sets the modes for which the memory is registered. The default is [`RegisterMode::MISSING`].
    pub fn mode(mut self, mode: RegisterMode) -> Self {
        self.mode = mode;
        self
    }
}

/// Hands memory over, in a dialect, and waits until the handler has confirmed it, if the dialect has a confirmation.
///
/// The memory must be registered before. Keep `stream` open: its end is the end of the virtual machine for the handler. Keep
/// the userfaultfd open, too, unless zeros may show in missing pages when the handler dies.
///
/// In [`CodeSandbox`](Dialect::CodeSandbox)'s dialect the handler gives the memory: see [`receive_memory`].
///
/// ```no_run
/// use std::os::unix::net::UnixStream;
/// use userfaultfd::UffdBuilder;
/// use userfaultfd::handoff::{Dialect, MemoryRegion, Offer, send};
///
/// # fn map() -> (*mut std::ffi::c_void, usize) { unimplemented!() }
/// let (start, len) = map();
/// let uffd = UffdBuilder::new().create()?;
/// uffd.register(start, len)?;
/// let stream = UnixStream::connect("/run/pager.sock")?;
/// let region = MemoryRegion::new(start.expose_provenance(), len, 0);
/// send(Dialect::Firecracker, &stream, &Offer::new(&uffd, [region]))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// - [`NoMessage`](Error::NoMessage): the dialect hands over no userfaultfd, or can't say what is offered.
/// - [`Send`](Error::Send): the handler has closed the connection (`BrokenPipe`), or reads nothing for two seconds
///   (`TimedOut`).
/// - [`NotConfirmed`](Error::NotConfirmed): the handler has refused, or hasn't confirmed within two seconds.
pub fn send(dialect: Dialect, stream: &UnixStream, offer: &Offer<'_>) -> Result<(), Error> {
    let wire = dialect.wire();
    if offer.files.len() > wire.max_files {
        return Err(Error::NoMessage { dialect, what: "so many files" });
    }
    let message = Message::Handoff {
        regions: offer.regions.clone(),
        mode: offer.mode,
        pid: None,
        files: Some(offer.files.len()),
    };
    let bytes = dialect.encode(&message).ok_or(Error::NoMessage { dialect, what: "a userfaultfd" })?;
    let fds: Vec<_> = [offer.userfaultfd].into_iter().chain(offer.files.iter().copied()).collect();
    let first = if wire.descriptors_last { bytes.len() - 1 } else { 0 };
    send_all(stream, &bytes[..first], &[], STEP_TIMEOUT).map_err(Error::Send)?;
    send_all(stream, &bytes[first..], &fds, STEP_TIMEOUT).map_err(Error::Send)?;
    let mut confirmation = vec![0; wire.ready.len()];
    receive_exact(stream, &mut confirmation, &mut Vec::new()).map_err(Error::NotConfirmed)
}

/// Sends a message without descriptors, such as one that adds memory.
///
/// # Errors
///
/// Those of [`send`].
pub fn send_message(dialect: Dialect, stream: &UnixStream, message: &Message) -> Result<(), Error> {
    if message.has_userfaultfd() {
        return Err(Error::NoMessage { dialect, what: "memory without its userfaultfd" });
    }
    let bytes = dialect.encode(message).ok_or(Error::NoMessage { dialect, what: "this" })?;
    send_all(stream, &bytes, &[], STEP_TIMEOUT).map_err(Error::Send)
}

/// Receives the memory that a handler gives to a [`CodeSandbox`](Dialect::CodeSandbox) monitor: a file, and its length in
/// bytes.
///
/// # Errors
///
/// [`NotConfirmed`](Error::NotConfirmed): the handler gave none within two seconds.
pub fn receive_memory(stream: &UnixStream) -> Result<(OwnedFd, u64), Error> {
    let (mut len, mut files) = ([0; 8], Vec::new());
    receive_exact(stream, &mut len, &mut files).map_err(Error::NotConfirmed)?;
    match files.pop() {
        Some(file) => Ok((file, u64::from_le_bytes(len))),
        None => {
            let error = io::Error::new(io::ErrorKind::InvalidData, "no file came with its length");
            Err(Error::NotConfirmed(error))
        }
    }
}

/// Receives as many bytes as `bytes` has, in the time of a step.
fn receive_exact(stream: &UnixStream, mut bytes: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<()> {
    let deadline = Instant::now() + STEP_TIMEOUT;
    while !bytes.is_empty() {
        match socket::receive(stream.as_fd(), bytes, files) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((received, _)) => bytes = &mut bytes[received..],
            Err(Errno::EAGAIN) => {
                let rest = deadline.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                sys::wait_readable([stream.as_fd()], rest.as_micros().div_ceil(1000) as libc::c_int)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
