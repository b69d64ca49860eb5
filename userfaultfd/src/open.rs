//! Opening a userfaultfd, and the error with its remedies when that fails.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::{Errno, Error, Result, sys};

/// How a descriptor is opened.
///
/// All ways lead to the same kind of descriptor; they need different rights. Access to the device file permits
/// everything. The system call permits every process to handle faults from user mode
/// ([`user_mode_only`](crate::UffdBuilder::user_mode_only)). Faults from kernel mode need `CAP_SYS_PTRACE`, or the
/// sysctl `vm.unprivileged_userfaultfd=1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OpenWith {
    /// `/dev/userfaultfd` first, then the system call if that is refused for any reason.
    #[default]
    Auto,
    /// `/dev/userfaultfd` alone. Since Linux 6.1.
    Device,
    /// The system call alone.
    Syscall,
}

/// The flags of a new descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OpenFlags {
    pub(crate) close_on_exec: bool,
    pub(crate) non_blocking: bool,
    pub(crate) user_mode_only: bool,
}

impl OpenFlags {
    pub(crate) fn bits(self) -> libc::c_int {
        let mut bits = 0;
        if self.close_on_exec {
            bits |= libc::O_CLOEXEC;
        }
        if self.non_blocking {
            bits |= libc::O_NONBLOCK;
        }
        if self.user_mode_only {
            bits |= sys::UFFD_USER_MODE_ONLY as libc::c_int;
        }
        bits
    }
}

/// Creates a descriptor, without the handshake.
pub(crate) fn open(with: OpenWith, flags: OpenFlags) -> Result<OwnedFd> {
    let mut failure = OpenFailure { user_mode_only: flags.user_mode_only, ..OpenFailure::default() };
    if with != OpenWith::Syscall {
        match sys::open_device() {
            Ok(device) => match new_from_device(device.as_fd(), flags) {
                Ok(fd) => return Ok(fd),
                Err(errno) => failure.device_ioctl = Some(errno),
            },
            Err(errno) if with == OpenWith::Device => return Err(Error::OpenDevUserfaultfd(errno.into())),
            Err(errno) => failure.device_open = Some(errno),
        }
    }
    if with != OpenWith::Device {
        match new_from_syscall(flags) {
            Ok(fd) => return Ok(fd),
            Err(errno) => failure.syscall = Some(errno),
        }
    }
    Err(Error::OpenFailed(failure))
}

/// Creates a descriptor through an open device.
pub(crate) fn open_from(device: BorrowedFd<'_>, flags: OpenFlags) -> Result<OwnedFd> {
    new_from_device(device, flags).map_err(|errno| {
        let user_mode_only = flags.user_mode_only;
        Error::OpenFailed(OpenFailure { device_ioctl: Some(errno), user_mode_only, ..OpenFailure::default() })
    })
}

fn new_from_device(device: BorrowedFd<'_>, flags: OpenFlags) -> Result<OwnedFd, Errno> {
    sys::new_from_device(device, flags.bits())
}

fn new_from_syscall(flags: OpenFlags) -> Result<OwnedFd, Errno> {
    match sys::userfaultfd(flags.bits()) {
        // The flag came with 5.11. Before it every descriptor handles both kinds of fault, so without the
        // flag the caller gets what was asked for and more.
        Err(Errno::EINVAL) if flags.user_mode_only => {
            sys::userfaultfd(OpenFlags { user_mode_only: false, ..flags }.bits())
        }
        result => result,
    }
}

/// What helps where the device can't be opened.
pub(crate) const DEVICE: &str = "access to the device, from an administrator: setfacl -m u:$USER:rw /dev/userfaultfd \
                                 (in a container: --device /dev/userfaultfd)";

/// The tries to create a descriptor, each with its errno.
///
/// `Display` prints them together with the remedies:
///
/// ```text
/// cannot create a userfaultfd
///   /dev/userfaultfd: open: EACCES: Permission denied
///   userfaultfd(2), faults from kernel mode too: EPERM: Operation not permitted
/// what helps, any one of:
///   - UffdBuilder::user_mode_only(true), if no system call has to touch missing pages
///   - access to the device, from an administrator: setfacl -m u:$USER:rw /dev/userfaultfd
///   - sysctl vm.unprivileged_userfaultfd=1, from an administrator
///   - the capability CAP_SYS_PTRACE
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenFailure {
    device_open: Option<Errno>,
    device_ioctl: Option<Errno>,
    syscall: Option<Errno>,
    user_mode_only: bool,
}

/// Why no descriptor could be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OpenRefusal {
    /// The kernel has no userfaultfd: it was built without `CONFIG_USERFAULTFD`, or a sandbox returns `ENOSYS`.
    NotBuiltIn,
    /// This process doesn't have the right.
    NotPermitted,
    /// Another reason, which the errno gives: too many open files, no memory.
    Other,
}

impl OpenFailure {
    /// Returns the errno of opening `/dev/userfaultfd` or of its ioctl. `None` if it wasn't tried.
    #[must_use]
    pub fn device(&self) -> Option<Errno> {
        self.device_open.or(self.device_ioctl)
    }

    /// Returns the errno of userfaultfd(2). `None` if it wasn't tried.
    #[must_use]
    pub fn syscall(&self) -> Option<Errno> {
        self.syscall
    }

    /// Returns the errno of the last try.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        self.syscall.or(self.device())
    }

    /// Returns the kind of the reason: the kernel, the rights, or another one.
    #[must_use]
    pub fn reason(&self) -> OpenRefusal {
        match self.errno() {
            Some(Errno::ENOSYS) => OpenRefusal::NotBuiltIn,
            Some(Errno::EPERM | Errno::EACCES) => OpenRefusal::NotPermitted,
            _ => OpenRefusal::Other,
        }
    }

    /// Returns an iterator over the remedies, any one of which helps: those of [`Error::remedies`](crate::Error::remedies).
    pub fn remedies(&self) -> impl Iterator<Item = &'static str> {
        let remedies: &[&str] = match (self.reason(), self.user_mode_only) {
            (OpenRefusal::NotBuiltIn, _) => &[
                "a kernel with CONFIG_USERFAULTFD=y; in a container, a seccomp profile that allows userfaultfd",
            ],
            (OpenRefusal::NotPermitted, false) => &[
                "UffdBuilder::user_mode_only(true), if no system call has to touch missing pages",
                DEVICE,
                "sysctl vm.unprivileged_userfaultfd=1, from an administrator",
                "the capability CAP_SYS_PTRACE",
            ],
            // Since 5.11 the system call denies this to nobody, so something before it did.
            (OpenRefusal::NotPermitted, true) => &[
                "in a container, a seccomp profile that allows userfaultfd: \
                 user_mode_only(true) needs no rights, so a filter refused it",
                DEVICE,
                "before Linux 5.11: sysctl vm.unprivileged_userfaultfd=1, from an administrator, or CAP_SYS_PTRACE",
            ],
            (OpenRefusal::Other, _) if self.errno() == Some(Errno::EMFILE) => {
                &["closing descriptors, or a higher limit: ulimit -n"]
            }
            (OpenRefusal::Other, _) => &[],
        };
        remedies.iter().copied()
    }
}

impl std::error::Error for OpenFailure {}

impl fmt::Debug for OpenFailure {
    /// Prints the same as `Display`, since a failed `unwrap` or `main` prints this.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An errno as its name and its text.
struct Named(Errno);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0, self.0.desc())
    }
}

impl fmt::Display for OpenFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot create a userfaultfd")?;
        let scope = if self.user_mode_only { "faults from user mode" } else { "faults from kernel mode too" };
        if let Some(errno) = self.device_open {
            write!(f, "\n  /dev/userfaultfd: open: {}", Named(errno))?;
        }
        if let Some(errno) = self.device_ioctl {
            write!(f, "\n  /dev/userfaultfd: USERFAULTFD_IOC_NEW: {}", Named(errno))?;
        }
        if let Some(errno) = self.syscall {
            write!(f, "\n  userfaultfd(2), {scope}: {}", Named(errno))?;
        }
        let mut remedies = self.remedies().peekable();
        if remedies.peek().is_some() {
            write!(f, "\nwhat helps, any one of:")?;
        }
        for remedy in remedies {
            write!(f, "\n  - {remedy}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(device: Errno, syscall: Errno, user_mode_only: bool) -> OpenFailure {
        OpenFailure {
            device_open: Some(device),
            syscall: Some(syscall),
            user_mode_only,
            ..OpenFailure::default()
        }
    }

    #[test]
    fn refusal_of_rights_names_every_way_out() {
        crate::support::require!();
        let failure = refused(Errno::EACCES, Errno::EPERM, false);
        assert_eq!(failure.reason(), OpenRefusal::NotPermitted);
        assert_eq!((failure.device(), failure.syscall()), (Some(Errno::EACCES), Some(Errno::EPERM)));
        let text = failure.to_string();
        for part in
            ["/dev/userfaultfd", "EACCES", "EPERM", "vm.unprivileged_userfaultfd", "user_mode_only", "PTRACE"]
        {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn refusal_of_user_mode_points_at_a_filter() {
        crate::support::require!();
        let text = refused(Errno::ENOENT, Errno::EPERM, true).to_string();
        assert!(text.contains("seccomp"), "{text}");
        assert!(text.contains("/dev/userfaultfd"), "{text}");
    }

    #[test]
    fn kernel_without_userfaultfd_is_no_missing_right() {
        crate::support::require!();
        assert_eq!(refused(Errno::ENOENT, Errno::ENOSYS, true).reason(), OpenRefusal::NotBuiltIn);
        assert_eq!(refused(Errno::EACCES, Errno::EMFILE, true).reason(), OpenRefusal::Other);
    }

    #[test]
    fn device_that_may_not_be_opened_is_a_missing_right() {
        crate::support::require!();
        let failure = OpenFailure { device_open: Some(Errno::EACCES), ..OpenFailure::default() };
        assert_eq!(failure.reason(), OpenRefusal::NotPermitted);
    }
}
