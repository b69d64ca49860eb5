//! The error type of the kernel's interface.
//!
//! The text of an error, here and in the other layers, is whole: it has the errno, or the text of its cause. So `source()`
//! returns `None`, and printing an error with its chain of causes repeats nothing. Programs use
//! [`errno`](Error::errno), or the variant's fields.

use std::io;

#[cfg(any(feature = "tracking", feature = "snapshot"))]
use crate::CreateInRefusal;
use crate::open::{self, OpenFailure};
use crate::{Errno, FeatureFlags, IoctlFlags, Pid, Refusal};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed.
///
/// A fault handler needs three methods, which work for every variant and on every kernel: [`errno`](Error::errno),
/// [`progress`](Error::progress) and [`is_retryable`](Error::is_retryable). The docs of each method of
/// [`Uffd`](crate::Uffd) give the meaning of each errno.
///
/// ```
/// use userfaultfd::{Errno, Error};
///
/// let stopped = Error::PartiallyCopied(8192);
/// assert_eq!(stopped.progress(), Some(8192));
/// assert_eq!(stopped.errno(), Some(Errno::EAGAIN));
/// assert!(stopped.is_retryable());
///
/// let occupied = Error::CopyFailed(Errno::EEXIST);
/// assert_eq!(occupied.progress(), Some(0));
/// assert!(!occupied.is_retryable());
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A copy failed without copying anything. `EAGAIN` is never here: that is `PartiallyCopied(0)`.
    /// [`Uffd::explain`](crate::Uffd::explain) finds the reason.
    #[error("copying into the range failed: {0}")]
    CopyFailed(Errno),

    /// A copy stopped after this many bytes, perhaps 0; go on with the rest.
    ///
    /// With 0 bytes the memory layout is changing: read the pending events, then retry. After some bytes the kernel hides
    /// the reason; the call for the rest returns it.
    #[error("copying into the range stopped after {0} bytes")]
    PartiallyCopied(usize),

    /// A message was cut short: the descriptor is not a userfaultfd.
    #[error("read {read} bytes of an event message of {expected}")]
    IncompleteMsg {
        /// Bytes of the incomplete message.
        read: usize,
        /// Bytes of a whole message.
        expected: usize,
    },

    /// A system call failed.
    #[error("system call failed: {0}")]
    SystemError(Errno),

    /// The kernel refused to register or unregister a range, or to protect it, and the reason was found. The text has the
    /// reason, and what would work.
    ///
    /// Where it can't be found, and for what happens by itself (`EAGAIN`, `ESRCH`, `ENOMEM`; `ENOENT` where nothing is
    /// mapped any more), these operations fail with [`SystemError`](Error::SystemError).
    #[error("{ioctl} failed, {errno:?}: {refusal}")]
    Refused {
        /// The operation.
        ioctl: IoctlFlags,
        /// The errno of the kernel.
        errno: Errno,
        /// The reason.
        refusal: Refusal,
    },

    /// The descriptor is at its end of file: it is not a userfaultfd.
    #[error("end of file on the descriptor")]
    ReadEof,

    /// A message of a kind that this version of the crate doesn't know. The other messages of the batch are
    /// good.
    #[error("unknown event {0:#x}")]
    UnrecognizedEvent(u8),

    /// A required ioctl is missing. The value has the ioctls that are supported.
    ///
    /// From [`UffdBuilder::create`](crate::UffdBuilder::create) for an ioctl of the descriptor; from
    /// [`Uffd::register_with_mode`](crate::Uffd::register_with_mode) for one of the range, which isn't
    /// registered then.
    #[error("a required ioctl is not supported; supported here: {0}")]
    UnsupportedIoctls(IoctlFlags),

    /// Filling with zeros failed. `EAGAIN`: nothing or a part was filled; [`zeropage_with`](crate::Uffd::zeropage_with)
    /// tells how much. [`Uffd::explain`](crate::Uffd::explain) finds the reason.
    #[error("filling the range with zeros failed: {0}")]
    ZeropageFailed(Errno),

    /// `/dev/userfaultfd` was asked for by [`OpenWith::Device`](crate::OpenWith::Device) and can't be opened.
    #[error(
        "cannot open /dev/userfaultfd (its file permissions decide who may; it exists since Linux 6.1): {0}"
    )]
    OpenDevUserfaultfd(io::Error),

    /// No way to create a descriptor worked. The text has each try with its errno, and the remedies.
    #[error(transparent)]
    OpenFailed(OpenFailure),

    /// Another process can't be made to create a userfaultfd: from
    /// [`UffdBuilder::create_in`](crate::UffdBuilder::create_in). The text has the reason, and what helps.
    #[cfg(any(feature = "tracking", feature = "snapshot"))]
    #[error("process {process} can't be made to create a userfaultfd, {errno:?}: {refusal}")]
    NotCreatedIn {
        /// The process.
        process: Pid,
        /// The errno.
        errno: Errno,
        /// The reason.
        refusal: CreateInRefusal,
    },

    /// The kernel lacks features that were required with
    /// [`require_features`](crate::UffdBuilder::require_features).
    #[error("this kernel lacks the required userfaultfd features {missing}; it offers {supported}")]
    UnsupportedFeatures {
        /// The required features that are missing.
        missing: FeatureFlags,
        /// The features that the kernel has.
        supported: FeatureFlags,
    },

    /// The features are there, but this process may not use them: `EVENT_FORK` takes `CAP_SYS_PTRACE` in the
    /// initial user namespace.
    #[error("not permitted to use {0}: CAP_SYS_PTRACE in the initial user namespace is needed")]
    FeatureNotPermitted(FeatureFlags),

    /// A required feature works only together with another one.
    #[error("{feature} must be required together with {needs}")]
    FeatureNeeds {
        /// The feature that was required.
        feature: FeatureFlags,
        /// What must be required with it.
        needs: FeatureFlags,
    },

    /// The handshake of the descriptor is done already. The kernel allows one.
    #[error("the descriptor's handshake is done already; adopt it with Uffd::from")]
    AlreadyHandshaken,

    /// The descriptor is something else than a userfaultfd.
    #[error("the descriptor is not a userfaultfd")]
    NotUserfaultfd,

    /// Reading would wait, since the descriptor was made without
    /// [`non_blocking`](crate::UffdBuilder::non_blocking): from [`try_read_event`](crate::Uffd::try_read_event) and
    /// [`try_read_batch`](crate::Uffd::try_read_batch). [`set_nonblocking`](crate::Uffd::set_nonblocking) helps.
    #[error("reading would wait: the descriptor was made without non_blocking(true)")]
    Blocking,

    /// The tokio runtime that an [`AsyncUffd`](crate::AsyncUffd) is registered with was shut down.
    #[cfg(feature = "tokio")]
    #[error("the tokio runtime that the userfaultfd is registered with was shut down")]
    RuntimeEnded,

    /// A buffer has no room: an [`EventBuffer`](crate::EventBuffer) of size 0, no regions for a scan.
    #[error("the buffer has no room")]
    EmptyBuffer,

    /// A forked child uses an object that its parent made before the fork. It works in the parent alone.
    #[error("made before a fork, by the parent process: it works there alone")]
    OtherProcess,

    /// Memory in a range is tracked or in a snapshot already: by this tracker; or by a tracker of the
    /// [`LazyMemory`](crate::LazyMemory) that it is of, which must be dropped first.
    #[error(
        "memory in {start:#x}..{end:#x} is tracked or in a snapshot already; drop the tracker or snapshot that has it, or \
         untrack the range"
    )]
    AlreadyTracked {
        /// The first address that is tracked.
        start: usize,
        /// The address behind the last.
        end: usize,
    },

    /// Nothing tracks memory in a range: it was never passed to [`track`](crate::DirtyTracker::track), or isn't part of the
    /// series.
    #[error("memory in {start:#x}..{end:#x} was never tracked")]
    NeverTracked {
        /// The first address that isn't tracked.
        start: usize,
        /// The address behind the last.
        end: usize,
    },

    /// The [`LazyMemory`](crate::LazyMemory) that a tracker is of was dropped.
    #[error("the memory that the tracker is of was dropped")]
    MemoryDropped,

    /// Another process can't be looked at, for its files in `/proc`.
    #[error("process {process} can't be looked at, {errno:?}: {}", no_access(*errno))]
    NoAccess {
        /// The process.
        process: Pid,
        /// The errno.
        errno: Errno,
    },

    /// Memory of another process can't be written from here: from [`DirtyTracker::reset`](crate::DirtyTracker::reset).
    #[error("the tracked memory is another process's: it can't be reset from here")]
    NotOwnMemory,

    /// The page map of this kernel doesn't tell which pages are protected (since Linux 5.13), which a tracker needs beside
    /// another handler of the same descriptor.
    #[error(
        "a tracker beside another handler needs a page map that tells which pages are protected: Linux 5.13"
    )]
    NeedsProtectionInPagemap,

    /// A snapshot couldn't begin: threads changed the memory's layout for 20 seconds without a pause.
    #[error("the memory's layout was changed for 20 s without a pause (mmap, munmap, mremap, madvise)")]
    AlwaysChanging,

    /// These features can't be switched, or were both switched on and off: from [`set_async`](crate::Uffd::set_async).
    #[error("{0} can't be switched: RWP_ASYNC alone can, either on or off")]
    NotSwitchable(FeatureFlags),

    /// A bound of a range lies inside a page of tracked memory, or of memory in a snapshot. Nothing was changed.
    #[error("{address:#x} lies inside a page: the pages there have {page_size} bytes")]
    InsidePage {
        /// The bound.
        address: usize,
        /// The size of the page that it lies in, in bytes: that of huge pages on hugetlb memory.
        page_size: usize,
    },

    /// A range to track isn't part of the [`LazyMemory`](crate::LazyMemory) that the tracker belongs to.
    #[error("{start:#x}..{end:#x} isn't part of the memory that this tracker is of")]
    OtherMemory {
        /// The first address.
        start: usize,
        /// The address behind the last.
        end: usize,
    },

    /// A tracked range has memory that isn't registered: another mapping was made there. Writes to it are unknown.
    /// [`untrack`](crate::DirtyTracker::untrack) the range, and track it again.
    #[error("memory in {start:#x}..{end:#x} isn't tracked any more: something else was mapped there")]
    NotTracked {
        /// The first address of the range.
        start: usize,
        /// The address behind the last.
        end: usize,
    },

    /// A part of a [`Pristine`](crate::Pristine) can't be brought back to its image. What is outside of the range may have been.
    ///
    /// `ENOMEM`: it was unmapped, or moved away. `ENOENT`: something else was mapped there. `EFAULT`: it can't be written,
    /// such as guard pages (`MADV_GUARD_INSTALL`).
    #[error("memory at {start:#x}..{end:#x} can't be brought back to its image: {errno}")]
    NotRestored {
        /// The first address.
        start: usize,
        /// The address behind the last.
        end: usize,
        /// The reason.
        errno: Errno,
    },

    /// An image to bring memory back to has another length than the memory.
    #[error("an image of {image} bytes for {memory} bytes of memory")]
    ImageLength {
        /// Bytes of the image.
        image: usize,
        /// Bytes of the memory.
        memory: usize,
    },

    /// A tracker of another process's memory was given no descriptor that was made in that process.
    #[error(
        "another process's memory is tracked through a descriptor that was made in it: pass one to Options::descriptor \
         (UffdBuilder::create_in makes one)"
    )]
    NoDescriptor,

    /// Private anonymous memory whose missing pages another handler fills can't be tracked through a descriptor
    /// without [`WP_UNPOPULATED`](FeatureFlags::WP_UNPOPULATED): a page that is missing can't be protected there, and
    /// what it will hold is the handler's to say.
    #[error(
        "private anonymous memory at {start:#x}..{end:#x} has missing pages that another handler fills; \
         to protect those the descriptor needs WP_UNPOPULATED (since Linux 6.4)"
    )]
    MissingServed {
        /// The first address of the mapping, as far as it was to be tracked.
        start: usize,
        /// The address behind the last.
        end: usize,
    },

    /// The accesses since the last report are unknown: the thread that resolves a tracker's faults failed, or ranges that
    /// were taken and not returned can't be marked again. Protection may be off. Make a new tracker, and treat all of its
    /// memory as accessed.
    #[error("tracking failed, and what was accessed isn't known: {0}")]
    TrackingFailed(Errno),

    /// An operation without a variant of its own stopped: [`move_pages`](crate::Uffd::move_pages),
    /// [`poison`](crate::Uffd::poison), [`zeropage_with`](crate::Uffd::zeropage_with).
    /// [`Uffd::explain`](crate::Uffd::explain) finds the reason.
    #[error("{ioctl} stopped after {done} bytes: {errno}")]
    Stopped {
        /// The operation, as the flag of its ioctl.
        ioctl: IoctlFlags,
        /// Bytes done before it stopped.
        done: usize,
        /// The errno. After some bytes this is `EAGAIN`, and the call for the rest returns the reason.
        errno: Errno,
    },
}

impl Error {
    /// Returns the kernel's errno behind this error, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::CopyFailed(errno)
            | Error::SystemError(errno)
            | Error::ZeropageFailed(errno)
            | Error::TrackingFailed(errno) => Some(*errno),
            Error::Stopped { errno, .. }
            | Error::Refused { errno, .. }
            | Error::NotRestored { errno, .. } => Some(*errno),
            #[cfg(any(feature = "tracking", feature = "snapshot"))]
            Error::NotCreatedIn { errno, .. } => Some(*errno),
            Error::PartiallyCopied(_) => Some(Errno::EAGAIN),
            Error::OpenDevUserfaultfd(error) => Some(errno_of(error)),
            Error::OpenFailed(failure) => failure.errno(),
            Error::UnsupportedFeatures { .. } | Error::FeatureNeeds { .. } => Some(Errno::EINVAL),
            Error::AlreadyHandshaken
            | Error::Blocking
            | Error::EmptyBuffer
            | Error::AlreadyTracked { .. }
            | Error::NotSwitchable(_)
            | Error::InsidePage { .. }
            | Error::ImageLength { .. }
            | Error::OtherMemory { .. }
            | Error::MissingServed { .. } => Some(Errno::EINVAL),
            Error::NoDescriptor => Some(Errno::EBADF),
            Error::NotTracked { .. } | Error::NeverTracked { .. } | Error::MemoryDropped => {
                Some(Errno::ENOENT)
            }
            Error::NoAccess { errno, .. } => Some(*errno),
            Error::AlwaysChanging => Some(Errno::EAGAIN),
            Error::NotOwnMemory | Error::NeedsProtectionInPagemap => Some(Errno::EOPNOTSUPP),
            Error::OtherProcess => Some(Errno::ESRCH),
            Error::FeatureNotPermitted(_) => Some(Errno::EPERM),
            Error::NotUserfaultfd => Some(Errno::ENOTTY),
            Error::IncompleteMsg { .. }
            | Error::ReadEof
            | Error::UnrecognizedEvent(_)
            | Error::UnsupportedIoctls(_) => None,
            #[cfg(feature = "tokio")]
            Error::RuntimeEnded => None,
        }
    }

    /// Returns an iterator over what helps against a refusal to create a userfaultfd, any one of which is enough. Empty for
    /// every other error.
    pub fn remedies(&self) -> impl Iterator<Item = &'static str> {
        let (of_failure, others): (_, &[&str]) = match self {
            Error::OpenFailed(failure) => (Some(failure.remedies()), &[]),
            Error::OpenDevUserfaultfd(_) => (None, &[open::DEVICE]),
            Error::FeatureNotPermitted(_) => (
                None,
                &[
                    "being root, outside of a user namespace",
                    "the capability CAP_SYS_PTRACE, from an administrator: setcap cap_sys_ptrace=ep PROGRAM",
                ],
            ),
            _ => (None, &[]),
        };
        of_failure.into_iter().flatten().chain(others.iter().copied())
    }

    /// Returns the number of bytes that a fill (copy, zeropage, poison, move) did before it stopped; `None` for operations
    /// that don't count bytes, and where the kernel doesn't report them.
    ///
    /// Waiters on that part have been woken as asked. To go on, repeat the call for the rest.
    #[must_use]
    pub fn progress(&self) -> Option<usize> {
        match self {
            Error::PartiallyCopied(done) | Error::Stopped { done, .. } => Some(*done),
            // 0.9 has this also after a part, and so how much it was isn't told.
            Error::ZeropageFailed(Errno::EAGAIN) => None,
            Error::CopyFailed(_) | Error::ZeropageFailed(_) => Some(0),
            _ => None,
        }
    }

    /// Returns whether a retry of the call, for the part that isn't done, can succeed.
    ///
    /// That is so for `EAGAIN` (the memory layout is changing, or a fill did a part) and `EINTR`. Between two retries let
    /// the thread that changes the layout run, and read its event (see "Events" in the [crate docs](crate)). Bound the
    /// number of retries, since some kernels have a bug that returns `EAGAIN` for ever.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.errno(), Some(Errno::EAGAIN | Errno::EINTR))
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::SystemError(errno)
    }
}

impl From<Error> for io::Error {
    /// Converts to the kind of the errno, with the error itself as the inner one.
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::ReadEof => io::ErrorKind::UnexpectedEof,
            Error::IncompleteMsg { .. } | Error::UnrecognizedEvent(_) => io::ErrorKind::InvalidData,
            Error::UnsupportedIoctls(_) | Error::UnsupportedFeatures { .. } => io::ErrorKind::Unsupported,
            other => other.errno().map_or(io::ErrorKind::Other, |errno| io::Error::from(errno).kind()),
        };
        io::Error::new(kind, error)
    }
}

/// Why a process can't be looked at, and what helps.
fn no_access(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOENT | Errno::ESRCH => "there is no such process, or /proc isn't mounted",
        Errno::EACCES | Errno::EPERM => {
            "it takes the rights to trace it by ptrace(2): be its user or the superuser; where kernel.yama.ptrace_scope is 1 \
             or more, CAP_SYS_PTRACE is needed"
        }
        errno => errno.desc(),
    }
}

/// An error that comes from outside, such as a source's or a sink's, with its causes behind it: their texts may leave
/// them out. Each is said once.
#[cfg(any(feature = "pager", feature = "snapshot"))]
#[derive(Debug)]
pub(crate) struct Whole<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

#[cfg(any(feature = "pager", feature = "snapshot"))]
impl std::fmt::Display for Whole<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut said = self.0.to_string();
        for cause in std::iter::successors(self.0.source(), |error| error.source()) {
            let cause = cause.to_string();
            if !said.contains(&cause) {
                said.push_str(": ");
                said.push_str(&cause);
            }
        }
        f.write_str(&said)
    }
}

/// The error number of an operating system's error.
#[allow(deprecated, reason = "nix 0.28 renamed from_i32 to from_raw, and 0.27 is accepted too")]
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(all(test, feature = "pager", feature = "snapshot"))]
mod tests {
    use super::*;
    use crate::{pager, snapshot};

    #[test]
    fn remedies_are_those_of_the_refusal() {
        crate::support::require!();
        let remedies = |error: Error| error.remedies().collect::<Vec<_>>().join("; ");
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        assert!(remedies(Error::OpenDevUserfaultfd(denied)).contains("setfacl"));
        let fork = Error::FeatureNotPermitted(crate::FeatureFlags::EVENT_FORK);
        assert!(remedies(fork).contains("CAP_SYS_PTRACE"));
        assert_eq!(remedies(Error::ReadEof), "");
    }

    /// As `anyhow` and others print an error with `{:#}`.
    fn with_causes(error: &dyn std::error::Error) -> String {
        let causes = std::iter::successors(Some(error), |error| error.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the store is away")]
    struct Away(#[source] io::Error);

    fn away() -> io::Error {
        io::Error::other(Away(io::Error::from_raw_os_error(libc::ECONNRESET)))
    }

    /// Each with what its text must have.
    fn errors() -> Vec<(Box<dyn std::error::Error>, Vec<&'static str>)> {
        let einval = || Error::SystemError(Errno::EINVAL);
        let io = || io::Error::from_raw_os_error(libc::EMFILE);
        let (ioctl, errno) = (IoctlFlags::POISON, Errno::EINVAL);
        let (address, offset) = (0x1000, 0x2000);
        vec![
            (einval().into(), vec!["EINVAL"]),
            (Error::CopyFailed(errno).into(), vec!["EINVAL"]),
            (Error::ZeropageFailed(errno).into(), vec!["EINVAL"]),
            (Error::TrackingFailed(errno).into(), vec!["EINVAL"]),
            (Error::Stopped { ioctl, done: 4096, errno }.into(), vec!["EINVAL", "POISON", "4096"]),
            (Error::OpenDevUserfaultfd(io()).into(), vec!["/dev/userfaultfd", "(os error 24)"]),
            (pager::Error::Register { address, error: einval() }.into(), vec!["0x1000", "EINVAL"]),
            (pager::Error::Uffd(einval()).into(), vec!["EINVAL"]),
            (pager::Error::System(io()).into(), vec!["(os error 24)"]),
            (
                pager::Error::Source { offset, error: away() }.into(),
                vec!["0x2000", "the store is away", "(os error 104)"],
            ),
            (snapshot::Error::Kernel(einval()).into(), vec!["EINVAL"]),
            (snapshot::Error::Sink(away()).into(), vec!["the store is away", "(os error 104)"]),
            (snapshot::Error::Thread(io()).into(), vec!["(os error 24)"]),
            (snapshot::Error::Fill(pager::Error::Uffd(einval())).into(), vec!["EINVAL"]),
            (snapshot::FormatError::Io(io()).into(), vec!["(os error 24)"]),
        ]
    }

    #[test]
    fn texts_have_the_cause_and_have_it_once() {
        crate::support::require!();
        for (error, parts) in errors() {
            let (text, chain) = (error.to_string(), with_causes(&*error));
            for part in parts {
                assert_eq!(text.matches(part).count(), 1, "{part} in: {text}");
                assert_eq!(chain.matches(part).count(), 1, "{part} in: {chain}");
            }
        }
    }
}
