//! The userfaultfd itself: opening one, its ioctls, what it has queued, and telling it from other descriptors.

use std::ffi::CStr;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
#[cfg(feature = "pager")]
use std::sync::atomic::{AtomicBool, Ordering};

use userfaultfd_sys::*;

#[cfg(feature = "pager")]
use super::file::{read, read_without_waiting, set_nonblocking};
use super::memory::{page_size, unreadable};
use super::{check, own};
use crate::Errno;

/// The device that creates descriptors for whom its file permissions admit. Linux 6.1.
pub(crate) const DEVICE: &CStr = c"/dev/userfaultfd";

/// userfaultfd(2). `flags`: O_CLOEXEC, O_NONBLOCK, UFFD_USER_MODE_ONLY.
pub(crate) fn userfaultfd(flags: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes one integer and touches no memory of the caller.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    // Descriptor numbers are far below i32::MAX, and so is -1.
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// Opens [`DEVICE`].
pub(crate) fn open_device() -> Result<OwnedFd, Errno> {
    // Reading is enough for the ioctl, so that a read-only permission is too.
    // SAFETY: the path is a NUL-terminated constant.
    let fd = unsafe { libc::open(DEVICE.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    let fd = check(fd)?;
    // SAFETY: open returned a new descriptor that nothing else owns.
    Ok(unsafe { own(fd) })
}

/// USERFAULTFD_IOC_NEW on an open [`DEVICE`]: what [`userfaultfd`] does, admitted by the file's permissions. `ENOTTY`: it
/// is something else.
///
/// A file of FUSE answers an ioctl with any number, which may be a descriptor that belongs to other code.
pub(crate) fn new_from_device(device: BorrowedFd<'_>, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    if !is_misc_device(device)? {
        return Err(Errno::ENOTTY);
    }
    // SAFETY: this ioctl takes its flags by value and touches no memory of the caller; a foreign descriptor
    // answers with an errno.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as libc::Ioctl, flags) };
    let fd = check(fd)?;
    if has_userfaultfd_name(fd) == Some(false) {
        return Err(Errno::ENOTTY);
    }
    // SAFETY: a device of the kernel's returned it, and it is a userfaultfd as far as can be told: so it is a new
    // descriptor that nothing else owns.
    Ok(unsafe { own(fd) })
}

/// Whether a descriptor is of one of the kernel's miscellaneous devices, among which is [`DEVICE`]: its minor number is
/// given out as it loads.
fn is_misc_device(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    const MISC_MAJOR: libc::c_uint = 10;
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel writes the structure, which is borrowed for the call.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: zeroed, and written by the call.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFCHR && libc::major(stat.st_rdev as _) == MISC_MAJOR)
}

/// One line per ioctl: its function, its number, its structure. A new one of the kernel's is one more line.
macro_rules! ioctls {
    ($($(#[$meta:meta])* $name:ident: $number:ident($arg:ty);)*) => {$(
        $(#[$meta])*
        #[inline]
        pub(crate) fn $name(fd: BorrowedFd<'_>, arg: &mut $arg) -> Result<(), Errno> {
            // SAFETY: the number encodes the size of this very structure, which is borrowed for the call; the
            // kernel reads and writes nothing else, and memory contents are left alone.
            let returned = unsafe { libc::ioctl(fd.as_raw_fd(), $number as libc::Ioctl, std::ptr::from_mut(arg)) };
            check(returned).map(drop)
        }
    )*};
    ($($(#[$meta:meta])* unsafe $name:ident: $number:ident($arg:ty);)*) => {$(
        $(#[$meta])*
        ///
        /// # Safety
        ///
        /// The caller must make sure that no Rust reference is invalidated by what the call puts into the
        /// destination, and that a source is readable.
        #[inline]
        pub(crate) unsafe fn $name(fd: BorrowedFd<'_>, arg: &mut $arg) -> Result<(), Errno> {
            // SAFETY: the number encodes the size of this very structure, which is borrowed for the call; the
            // caller vouches for the ranges that it names.
            let returned = unsafe { libc::ioctl(fd.as_raw_fd(), $number as libc::Ioctl, std::ptr::from_mut(arg)) };
            check(returned).map(drop)
        }
    )*};
}

ioctls! {
    /// The handshake.
    api: UFFDIO_API(uffdio_api);
    /// Faults on the range are delivered from now on.
    register: UFFDIO_REGISTER(uffdio_register);
    /// Faults on the range are the kernel's business again.
    unregister: UFFDIO_UNREGISTER(uffdio_range);
    /// Waiters on the range try again.
    wake: UFFDIO_WAKE(uffdio_range);
    /// Maps what the page cache holds already.
    r#continue: UFFDIO_CONTINUE(uffdio_continue);
    /// Protects against writes, or lifts that.
    write_protect: UFFDIO_WRITEPROTECT(uffdio_writeprotect);
    /// Protects against any access, or lifts that.
    read_write_protect: UFFDIO_RWPROTECT(uffdio_rwprotect);
    /// Switches asynchronous modes.
    set_mode: UFFDIO_SET_MODE(uffdio_set_mode);
}

ioctls! {
    /// Fills missing pages with bytes of the caller.
    unsafe copy: UFFDIO_COPY(uffdio_copy);
    /// Fills missing pages with zeros.
    unsafe zeropage: UFFDIO_ZEROPAGE(uffdio_zeropage);
    /// Makes any access to the pages a SIGBUS.
    unsafe poison: UFFDIO_POISON(uffdio_poison);
    /// Moves pages within the address space.
    unsafe move_pages: UFFDIO_MOVE(uffdio_move);
}

/// What is a `page_region` to the kernel.
///
/// # Safety
///
/// It is laid out as one, and any that the kernel writes is valid.
pub(crate) unsafe trait PageRegion {}

/// PAGEMAP_SCAN on a descriptor of /proc/PID/pagemap. Returns how many regions were filled.
pub(crate) fn pagemap_scan<R: PageRegion>(
    fd: BorrowedFd<'_>,
    arg: &mut pm_scan_arg,
    regions: &mut [R],
) -> Result<usize, Errno> {
    arg.vec_len = regions.len() as u64;
    // Without room the kernel wants no address either.
    arg.vec = if regions.is_empty() { 0 } else { regions.as_mut_ptr().expose_provenance() as u64 };
    // SAFETY: the number encodes the size of `arg`, which is borrowed for the call. The kernel writes at most
    // vec_len structures at `vec`, of which `regions`, borrowed for the call, has that many in the same
    // layout.
    let filled = unsafe { libc::ioctl(fd.as_raw_fd(), PAGEMAP_SCAN as libc::Ioctl, std::ptr::from_mut(arg)) };
    Ok(check(filled)? as usize)
}

/// Reads what a userfaultfd has queued, and never waits: `EAGAIN` if that is nothing, also on a descriptor that blocks.
///
/// Before Linux 6.10, which is asked once, the descriptor is made non-blocking for each read. Another owner of its description
/// that makes it blocking again just then lets the read wait.
#[cfg(feature = "pager")]
#[inline]
pub(crate) fn read_now(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    /// Where a file has a position: there. A userfaultfd has none, and takes no other value.
    const HERE: i64 = -1;
    /// Whether the kernel, or a filter, has refused. Relaxed: a thread that doesn't see it asks once more.
    static IS_REFUSED: AtomicBool = AtomicBool::new(false);
    if IS_REFUSED.load(Ordering::Relaxed) {
        return read_nonblocking(fd, buf);
    }
    loop {
        match read_without_waiting(fd, buf, HERE) {
            Err(Errno::EINTR) => {}
            // Linux before 6.10; or a filter of system calls.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EPERM) => {
                IS_REFUSED.store(true, Ordering::Relaxed);
                return read_nonblocking(fd, buf);
            }
            // Before Linux 4.14; and what read(2) says, too.
            Err(Errno::EINVAL) => return read_nonblocking(fd, buf),
            result => return result,
        }
    }
}

/// read(2) of a descriptor that is made non-blocking.
#[cfg(feature = "pager")]
fn read_nonblocking(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    set_nonblocking(fd, true)?;
    read(fd, buf)
}

/// Whether a descriptor is a userfaultfd, without changing its state.
///
/// Its name in /proc decides. Where there is no /proc, the handshake with a version that no kernel accepts tells: a
/// userfaultfd answers EINVAL and clears the structure (contract of UFFDIO_API since 5.15), and so does a file of FUSE if
/// it likes. Older kernels leave the structure alone once the handshake is done; then it counts as something else.
pub(crate) fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    has_userfaultfd_name(fd.as_raw_fd()).unwrap_or_else(|| {
        let mut arg = uffdio_api { api: 0, features: 1 << 63, ioctls: !0 };
        api(fd, &mut arg) == Err(Errno::EINVAL) && arg.features == 0
    })
}

/// Whether a userfaultfd is for memory of this process. `None` where the kernel doesn't tell; it must have UFFDIO_MOVE.
///
/// Moving a page that can't be written is refused either way, and nothing is changed. Of another process's descriptor the
/// kernel says so before it looks at the memory (contract of UFFDIO_MOVE), and so leaves the field alone.
pub(crate) fn is_of_this_process(fd: BorrowedFd<'_>) -> Option<bool> {
    let page = unreadable().ok()?.expose_provenance() as u64;
    let mut arg = uffdio_move { dst: page, src: page, len: page_size() as u64, mode: 0, move_: 0 };
    // SAFETY: source and destination are a page without permissions that nothing refers to.
    match unsafe { move_pages(fd, &mut arg) } {
        Err(Errno::EINVAL) => Some(arg.move_ != 0),
        _ => None,
    }
}

/// Whether /proc has a userfaultfd's name for a descriptor. No file has such a name, since theirs begin with a slash.
/// `None` where /proc isn't there. Allocates nothing: this may be asked about a fork event, and the forking thread holds
/// the allocator's locks until that is read.
fn has_userfaultfd_name(fd: RawFd) -> Option<bool> {
    const NAME: &[u8] = b"anon_inode:[userfaultfd]";
    let mut path = [0; 32];
    write!(&mut path[..], "/proc/self/fd/{fd}\0").ok()?;
    // One byte more tells a longer name.
    let mut name = [0; NAME.len() + 1];
    // SAFETY: the path is NUL-terminated, and the kernel writes at most name.len() bytes to name.
    let len = unsafe { libc::readlink(path.as_ptr().cast(), name.as_mut_ptr().cast(), name.len()) };
    Some(&name[..usize::try_from(len).ok()?] == NAME)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn userfaultfd_is_recognised_by_name() {
        crate::support::require!();
        let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY as libc::c_int;
        match userfaultfd(flags).or_else(|_| userfaultfd(libc::O_CLOEXEC)) {
            Ok(uffd) => assert_eq!(has_userfaultfd_name(uffd.as_raw_fd()), Some(true)),
            Err(errno) => panic!("a userfaultfd for faults from user mode: {errno}"),
        }
        for path in ["/proc/self/exe", "/proc/self/fd", "/"] {
            assert_eq!(has_userfaultfd_name(File::open(path).unwrap().as_raw_fd()), Some(false), "{path}");
        }
    }

    #[cfg(feature = "pager")]
    #[test]
    fn read_of_nothing_never_waits() {
        crate::support::require!();
        let uffd = crate::UffdBuilder::new().close_on_exec(true).create().unwrap();
        let mut bytes = [0; 64];
        for read in [read_now, read_nonblocking] {
            set_nonblocking(uffd.as_fd(), false).unwrap();
            assert_eq!(read(uffd.as_fd(), &mut bytes), Err(Errno::EAGAIN));
        }
        // What isn't for a userfaultfd stays an error.
        assert_eq!(read_now(uffd.as_fd(), &mut bytes[..7]), Err(Errno::EINVAL));
    }
}
