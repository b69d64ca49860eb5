//! Every system call of the crate, and the only place that makes one.
//!
//! The functions are as thin as they can be: a number, a structure, an [`Errno`]. What the answers mean is
//! decided by the callers. The `unsafe` ones change what memory holds without the compiler knowing; the
//! others only change how faults on it are handled.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]
#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{CStr, CString};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
#[cfg(feature = "pager")]
use std::sync::atomic::AtomicBool;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

pub(crate) use userfaultfd_sys::*;

use crate::Errno;

#[cfg(all(target_arch = "x86_64", any(feature = "tracking", feature = "snapshot")))]
pub(crate) mod ptrace;
#[cfg(feature = "handoff")]
pub(crate) mod socket;

/// The device that creates descriptors for whom its file permissions admit. Linux 6.1.
pub(crate) const DEVICE: &CStr = c"/dev/userfaultfd";

/// Turns the C convention (-1 and `errno`) into a result.
#[inline]
fn check(returned: libc::c_int) -> Result<libc::c_int, Errno> {
    if returned == -1 { Err(Errno::last()) } else { Ok(returned) }
}

/// Takes ownership of a descriptor number that the kernel has just handed to this process.
///
/// # Safety
///
/// The caller must make sure that `fd` is open and that nothing else owns it.
#[inline]
pub(crate) unsafe fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller's promise is that of from_raw_fd.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

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
            let returned = unsafe { libc::ioctl(fd.as_raw_fd(), $number as libc::Ioctl, arg as *mut $arg) };
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
            let returned = unsafe { libc::ioctl(fd.as_raw_fd(), $number as libc::Ioctl, arg as *mut $arg) };
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
    let filled = unsafe { libc::ioctl(fd.as_raw_fd(), PAGEMAP_SCAN as libc::Ioctl, arg as *mut pm_scan_arg) };
    Ok(check(filled)? as usize)
}

/// read(2), again and again while signals interrupt it. Returns the number of bytes.
#[inline]
pub(crate) fn read(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    match read_once(fd, buf) {
        Err(Errno::EINTR) => read_again(fd, buf),
        result => result,
    }
}

#[inline]
fn read_once(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most buf.len() bytes to buf, which is borrowed for the call.
    let read = unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
    usize::try_from(read).map_err(|_| Errno::last())
}

/// Out of the way of [`read`].
#[cold]
fn read_again(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match read_once(fd, buf) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// lseek(2) with SEEK_DATA: where the next byte from `from` on is that isn't in a hole. ENXIO: nowhere.
///
/// Moves the file's offset, which all descriptors of the open file description share.
pub(crate) fn seek_data(file: BorrowedFd<'_>, from: u64) -> Result<u64, Errno> {
    let from = libc::off64_t::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the system call takes integers and touches no memory.
    let data = unsafe { libc::lseek64(file.as_raw_fd(), from, libc::SEEK_DATA) };
    u64::try_from(data).map_err(|_| Errno::last())
}

/// What fstat(2) tells of a file's content: where it differs the content may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileStamp {
    /// In bytes. 0 of a block device.
    pub(crate) len: u64,
    /// Memory or disk that it takes, in bytes.
    pub(crate) allocated: u64,
    /// Bytes of a block of the file system, as it says.
    pub(crate) block_len: u64,
    /// Seconds and nanoseconds of the last change of the content, and of anything.
    modified: (i64, i64),
    pub(crate) changed: (i64, i64),
}

/// Asks for the stamp of a file. It takes no lock of the file's, and leaves the offset alone. Async-signal-safe.
pub(crate) fn file_stamp(file: BorrowedFd<'_>) -> Result<FileStamp, Errno> {
    // SAFETY: all zeros is such a structure.
    let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is borrowed for the call.
    check(unsafe { libc::fstat64(file.as_raw_fd(), &mut stat) })?;
    Ok(FileStamp {
        len: stat.st_size as u64,
        allocated: (stat.st_blocks as u64).saturating_mul(512),
        block_len: stat.st_blksize as u64,
        modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
    })
}

/// lseek(2) with SEEK_HOLE: where the next hole from `from` on is, or the end of the file. ENXIO: that is before `from`.
///
/// Moves the file's offset, as [`seek_data`].
pub(crate) fn seek_hole(file: BorrowedFd<'_>, from: u64) -> Result<u64, Errno> {
    let from = libc::off64_t::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the system call takes integers and touches no memory.
    let hole = unsafe { libc::lseek64(file.as_raw_fd(), from, libc::SEEK_HOLE) };
    u64::try_from(hole).map_err(|_| Errno::last())
}

/// Whether a file is open with O_DIRECT: then only whole blocks can be read, to aligned memory.
pub(crate) fn is_direct(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: F_GETFL touches no memory.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    Ok(flags & libc::O_DIRECT != 0)
}

/// preadv2(2) with RWF_NOWAIT: reads what is in the page cache. EAGAIN: the first byte isn't. EOPNOTSUPP: the file system
/// can't tell.
pub(crate) fn read_cached(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    read_without_waiting(file, buffer, offset as i64)
}

fn read_without_waiting(file: BorrowedFd<'_>, buffer: &mut [u8], offset: i64) -> Result<usize, Errno> {
    let mut into = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let (low, high) = (offset as libc::c_long, (offset >> 32) as libc::c_long);
    // 64-bit kernels take the whole offset in the first half.
    let high = if cfg!(target_pointer_width = "64") { 0 } else { high };
    // SAFETY: the kernel writes to as many bytes as the vector says, which are borrowed for the call.
    let read = unsafe {
        libc::syscall(libc::SYS_preadv2, file.as_raw_fd(), &raw mut into, 1, low, high, libc::RWF_NOWAIT)
    };
    usize::try_from(read).map_err(|_| Errno::last())
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

/// posix_fadvise(2). A length of 0 is up to the end.
pub(crate) fn advise(file: BorrowedFd<'_>, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let offset = libc::off64_t::try_from(offset).map_err(too_large)?;
    let len = libc::off64_t::try_from(len).map_err(too_large)?;
    // SAFETY: the system call takes integers and touches no memory.
    match unsafe { libc::posix_fadvise64(file.as_raw_fd(), offset, len, advice) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// fallocate(2): has a range of a file exist, as it is or with zeros. The file gets no longer. Through signals.
pub(crate) fn allocate(file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<(), Errno> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let len = libc::off64_t::try_from(len).map_err(|_| Errno::EOVERFLOW)?;
    loop {
        // SAFETY: the system call takes integers and touches no memory of this process.
        let allocated =
            unsafe { libc::fallocate64(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, len) };
        match Errno::result(allocated) {
            Err(Errno::EINTR) => {}
            done => return done.map(drop),
        }
    }
}

/// fallocate(2) with FALLOC_FL_PUNCH_HOLE: gives the blocks of a range of a file back, which is a hole from now on. Through
/// signals.
pub(crate) fn punch_hole(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Errno> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let len = libc::off64_t::try_from(len).map_err(|_| Errno::EOVERFLOW)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: the system call takes integers and touches no memory of this process.
        match Errno::result(unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) }) {
            Err(Errno::EINTR) => {}
            done => return done.map(drop),
        }
    }
}

/// What becomes of a byte of a file that is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileLock {
    Shared,
    Exclusive,
    Unlocked,
}

/// Locks a byte of a file, below 2 to the power of 31, for an open file description, or changes or ends its lock, without a wait: fcntl(2) with
/// F_OFD_SETLK, Linux 3.15. Returns whether that could be done: `false` while another description has a lock in the way.
pub(crate) fn lock_byte(file: BorrowedFd<'_>, byte: u32, lock: FileLock) -> Result<bool, Errno> {
    /// Not everywhere in `libc`.
    const F_OFD_SETLK: libc::c_int = 37;
    // SAFETY: all zeros is such a structure.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = match lock {
        FileLock::Shared => libc::F_RDLCK,
        FileLock::Exclusive => libc::F_WRLCK,
        FileLock::Unlocked => libc::F_UNLCK,
    } as _;
    request.l_whence = libc::SEEK_SET as _;
    request.l_start = byte as libc::off_t;
    request.l_len = 1;
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    match check(unsafe { libc::fcntl(file.as_raw_fd(), F_OFD_SETLK, &raw const request) }) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Lets nobody read a part of a mapping, or lets it be read again: mprotect(2). The part is whole pages of it, but for the
/// mapping's end. `ENOMEM`: the process has as many mappings as it may.
#[cfg(any(feature = "pager", feature = "snapshot"))]
pub(crate) fn set_readable(map: &memmap2::MmapRaw, part: Range<usize>, readable: bool) -> Result<(), Errno> {
    assert!(part.start <= part.end && part.end <= map.len(), "{part:?} of {}", map.len());
    let start = map.as_mut_ptr().wrapping_add(part.start);
    let protection = if readable { libc::PROT_READ } else { libc::PROT_NONE };
    // SAFETY: the range is that of the mapping, to whose bytes no reference leads, and none of them changes.
    check(unsafe { libc::mprotect(start.cast(), part.len(), protection) }).map(drop)
}

/// Writes bytes to a mapping by process_vm_writev(2). What can't be written, such as pages behind the end of the file, is an
/// `EFAULT`, and would be a SIGBUS for a thread that wrote it.
#[cfg(feature = "pager")]
pub(crate) fn write_mapping(map: &memmap2::MmapRaw, at: usize, mut bytes: &[u8]) -> Result<(), Errno> {
    assert!(
        at <= map.len() && bytes.len() <= map.len() - at,
        "{} bytes at {at} of {}",
        bytes.len(),
        map.len()
    );
    let mut to = map.as_mut_ptr().wrapping_add(at);
    // SAFETY: touches no memory.
    let own = unsafe { libc::getpid() };
    loop {
        let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: to.cast(), iov_len: bytes.len() };
        // SAFETY: the kernel reads the bytes, borrowed for the call, and writes to that many of the mapping, as has been
        // asserted. No reference leads to them.
        let written = unsafe { libc::process_vm_writev(own, &local, 1, &remote, 1, 0) };
        match usize::try_from(written) {
            Ok(written) if written == bytes.len() => return Ok(()),
            Ok(0) => return Err(Errno::EFAULT),
            Ok(written) => (bytes, to) = (&bytes[written..], to.wrapping_add(written)),
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last()),
        }
    }
}

/// pidfd_send_signal(2) with SIGKILL. `ESRCH`: the process has ended.
#[cfg(feature = "pager")]
pub(crate) fn kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let (fd, no_info) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the system call takes integers, and no structure.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) } as libc::c_int)
        .map(drop)
}

/// Waits until one of the descriptors can be read, through signals, or until `timeout` milliseconds are over; -1 is without end.
/// Tells which can be.
pub(crate) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: libc::c_int,
) -> Result<[bool; N], Errno> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: the kernel writes to as many structures as are borrowed for the call.
        match check(unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) }) {
            Ok(_) => return Ok(polled.map(|polled| polled.revents != 0)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// process_vm_readv(2) of one range into a buffer that has room for it, from its beginning. Returns how many bytes were
/// read: fewer where something in the range can't be.
pub(crate) fn read_memory(
    pid: libc::pid_t,
    range: &Range<usize>,
    buffer: &mut Vec<u8>,
) -> Result<usize, Errno> {
    buffer.clear();
    let room = &mut buffer.spare_capacity_mut()[..range.len()];
    let local = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    let base = std::ptr::without_provenance_mut(range.start);
    let remote = libc::iovec { iov_base: base, iov_len: room.len() };
    // SAFETY: the kernel writes at most as many bytes as `room`, borrowed for the call, has. What it reads from is
    // an address that only the kernel looks at, and it says so where there is nothing.
    let read = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    let read = usize::try_from(read).map_err(|_| Errno::last())?;
    // SAFETY: the kernel has written this number of bytes of the room.
    unsafe { buffer.set_len(read) };
    Ok(read)
}

/// Gives a file another name, unless one has that: renameat2(2), Linux 3.15.
pub(crate) fn rename_new(from: &Path, to: &Path) -> Result<(), Errno> {
    let [from, to] = [from, to].map(|path| CString::new(path.as_os_str().as_bytes()));
    let (from, to) = (from.map_err(|_| Errno::EINVAL)?, to.map_err(|_| Errno::EINVAL)?);
    let at = libc::AT_FDCWD;
    // SAFETY: both paths are NUL-terminated and borrowed for the call.
    let renamed = unsafe {
        libc::syscall(libc::SYS_renameat2, at, from.as_ptr(), at, to.as_ptr(), libc::RENAME_NOREPLACE)
    };
    check(renamed as libc::c_int).map(drop)
}

/// Gives an open file a name, also one that has none: linkat(2).
pub(crate) fn link(file: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    // AT_EMPTY_PATH takes rights before Linux 6.10.
    let from = format!("/proc/self/fd/{}\0", file.as_raw_fd());
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both paths are NUL-terminated and borrowed for the call.
    let linked = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr().cast(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    check(linked).map(drop)
}

/// Has memory of this process that may have to be read from a file be there, as far as it can be read: MADV_POPULATE_READ,
/// Linux 5.14, or a byte of each page read by the kernel. Raises no signal.
pub(crate) fn populate(start: *const libc::c_void, len: usize) {
    let page = page_size();
    let pages = start.addr() & !(page - 1)..(start.addr() + len).next_multiple_of(page);
    let at = std::ptr::with_exposed_provenance_mut(pages.start);
    // SAFETY: no content changes.
    let populated = check(unsafe { libc::madvise(at, pages.len(), libc::MADV_POPULATE_READ) });
    if populated != Err(Errno::EINVAL) {
        return;
    }
    // SAFETY: touches no memory.
    let own = unsafe { libc::getpid() };
    for page in pages.step_by(page) {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(page), iov_len: 1 };
        // SAFETY: the kernel writes the byte. What it reads from is an address that only the kernel looks at.
        unsafe { libc::process_vm_readv(own, &local, 1, &remote, 1, 0) };
    }
}

/// Bytes that nobody can guess: getrandom(2).
pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N], Errno> {
    let mut bytes = [0; N];
    // SAFETY: the kernel writes at most `N` bytes to the array, borrowed for the call.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Up to 256 bytes come at once.
    if usize::try_from(got) == Ok(N) { Ok(bytes) } else { Err(Errno::last()) }
}

/// Whether something can be read. Of an epoll instance: whether it has events, none of which is taken.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the kernel writes to the structure, which is borrowed for the call.
    let ready = unsafe { libc::poll(&mut polled, 1, 0) };
    ready == 1 && polled.revents & libc::POLLIN != 0
}

/// Switches O_NONBLOCK of the open file description, so for every descriptor that shares it.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> Result<(), Errno> {
    // SAFETY: F_GETFL touches no memory.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let wanted = if nonblocking { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    if wanted != flags {
        // SAFETY: F_SETFL takes an integer and touches no memory.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted) })?;
    }
    Ok(())
}

/// Has a descriptor closed when this process executes a program.
pub(crate) fn close_on_exec(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: F_SETFD takes an integer and touches no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) }).map(drop)
}

/// The number of descriptors that this process may have (RLIMIT_NOFILE).
#[cfg(feature = "handoff")]
pub(crate) fn max_descriptors() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is borrowed for the call.
    let asked = check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) });
    asked.map_or(0, |_| usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

/// Whether O_NONBLOCK is set.
pub(crate) fn is_nonblocking(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(status_flags(fd)? & libc::O_NONBLOCK != 0)
}

/// Whether a file was opened to append: pwrite(2) then ignores the offset that it is given.
pub(crate) fn is_appending(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(status_flags(fd)? & libc::O_APPEND != 0)
}

/// Whether a file is open for writing.
pub(crate) fn is_writable(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(status_flags(fd)? & libc::O_ACCMODE != libc::O_RDONLY)
}

/// fcntl(2) with F_GETFL.
fn status_flags(fd: BorrowedFd<'_>) -> Result<libc::c_int, Errno> {
    // SAFETY: F_GETFL touches no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

/// A thread that was started by [`start_thread`], and neither joined nor detached.
#[derive(Debug)]
pub(crate) struct ThreadId(libc::pthread_t);

// SAFETY: it is a name for a thread, by which any thread may ask for it.
unsafe impl Send for ThreadId {}

// SAFETY: as above.
unsafe impl Sync for ThreadId {}

impl ThreadId {
    /// Whether it is the one that asks.
    pub(crate) fn is_current(&self) -> bool {
        // SAFETY: touches no memory.
        let own = unsafe { libc::pthread_self() };
        // SAFETY: both name threads that are there, or that nobody has joined.
        unsafe { libc::pthread_equal(self.0, own) != 0 }
    }

    /// Waits for its end.
    pub(crate) fn join(self) {
        // SAFETY: nobody has joined or detached it, and what it returns isn't wanted.
        let joined = unsafe { libc::pthread_join(self.0, std::ptr::null_mut()) };
        debug_assert_eq!(joined, 0);
    }

    /// Has it free what it has once it ends.
    pub(crate) fn detach(self) {
        // SAFETY: nobody has joined or detached it.
        let detached = unsafe { libc::pthread_detach(self.0) };
        debug_assert_eq!(detached, 0);
    }
}

/// Starts a thread with a stack of the given length in bytes, or of the C library's default length where it refuses that.
///
/// # Safety
///
/// The caller must make sure that the function may be called with the argument, on any thread, once.
pub(crate) unsafe fn start_thread(
    enter: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void,
    argument: *mut libc::c_void,
    stack: usize,
) -> std::io::Result<ThreadId> {
    let result = |errno: libc::c_int| match errno {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)),
    };
    let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: the structure is written by the call.
    result(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
    // SAFETY: it was initialised above.
    let _refused = unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), stack) };
    let mut thread = std::mem::MaybeUninit::<libc::pthread_t>::uninit();
    // SAFETY: both structures are borrowed for the call; the caller vouches for the function.
    let started = unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), enter, argument) };
    // SAFETY: it was initialised above, and isn't used any more.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    result(started)?;
    // SAFETY: the call, which has succeeded, has written it.
    Ok(ThreadId(unsafe { thread.assume_init() }))
}

/// Gives the calling thread a name, of 15 bytes at most.
pub(crate) fn name_thread(name: &CStr) {
    // SAFETY: the name is NUL-terminated.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Keeps the program's signals away from the calling thread, but for those that its own faults raise.
pub(crate) fn block_signals() {
    let mut signals = no_signals();
    // SAFETY: the set is borrowed for the call.
    unsafe { libc::sigfillset(&mut signals) };
    for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGABRT] {
        // SAFETY: as above.
        unsafe { libc::sigdelset(&mut signals, fault) };
    }
    // SAFETY: the set is read, and the old one isn't wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut()) };
}

/// The CPU that a thread runs on, or ran on last. `None` where /proc doesn't tell. Allocates nothing.
pub(crate) fn last_cpu(thread: i32) -> Option<usize> {
    let mut path = [0; 32];
    write!(&mut path[..], "/proc/{thread}/stat\0").ok()?;
    // SAFETY: the path is NUL-terminated.
    let fd = check(unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) }).ok()?;
    // SAFETY: open returned a new descriptor that nothing else owns.
    let stat = unsafe { own(fd) };
    let mut text = [0; 512];
    let read = read(stat.as_fd(), &mut text).ok()?;
    cpu_of_stat(&text[..read])
}

/// The 39th field of /proc/PID/stat. The second is a name in parentheses, which may hold anything.
fn cpu_of_stat(stat: &[u8]) -> Option<usize> {
    let fields = stat.rsplit(|byte| *byte == b')').next()?;
    let mut fields = fields.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    std::str::from_utf8(fields.nth(36)?).ok()?.trim().parse().ok()
}

/// The CPU that the calling thread runs on, for the moment.
pub(crate) fn own_cpu() -> Option<usize> {
    // SAFETY: touches no memory.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// The bits of a word of a [`CpuSet`].
const WORD_BITS: usize = libc::c_ulong::BITS as usize;

/// A bit for each CPU that there can be.
pub(crate) type CpuSet = [libc::c_ulong; 8192 / WORD_BITS];

/// The word of a set that has a CPU, and its bit there.
fn cpu_in(set: &mut CpuSet, cpu: usize) -> Option<(&mut libc::c_ulong, libc::c_ulong)> {
    Some((set.get_mut(cpu / WORD_BITS)?, 1 << (cpu % WORD_BITS)))
}

/// Has the calling thread run on one CPU alone.
pub(crate) fn run_on(cpu: usize) -> Result<(), Errno> {
    let mut set: CpuSet = [0; 8192 / WORD_BITS];
    let (word, bit) = cpu_in(&mut set, cpu).ok_or(Errno::EINVAL)?;
    *word = bit;
    set_affinity(0, &set)
}

/// Moves the calling thread to another CPU, of those that it may run on. Returns whether there is one. Afterwards it may
/// run where it might before.
pub(crate) fn leave_cpu() -> bool {
    let Ok(all) = affinity() else { return false };
    let mut others = all;
    let Some((word, bit)) = own_cpu().and_then(|cpu| cpu_in(&mut others, cpu)) else { return false };
    *word &= !bit;
    if others.iter().all(|word| *word == 0) || set_affinity(0, &others).is_err() {
        return false;
    }
    // It stays where it is now. What it was just allowed isn't refused.
    let restored = set_affinity(0, &all);
    debug_assert!(restored.is_ok(), "{restored:?}");
    true
}

/// Has a thread, or the calling one if that is 0, run on these CPUs alone.
pub(crate) fn set_affinity(thread: i32, set: &CpuSet) -> Result<(), Errno> {
    // SAFETY: the kernel reads the set, which is as long as is told.
    let returned =
        unsafe { libc::sched_setaffinity(thread, size_of_val(set), set.as_ptr().cast::<libc::cpu_set_t>()) };
    check(returned).map(drop)
}

/// The CPUs that the calling thread may run on.
pub(crate) fn affinity() -> Result<CpuSet, Errno> {
    let mut set: CpuSet = [0; 8192 / WORD_BITS];
    // SAFETY: the kernel writes at most as many bytes as are told to the set, borrowed for the call.
    let returned =
        unsafe { libc::sched_getaffinity(0, size_of_val(&set), set.as_mut_ptr().cast::<libc::cpu_set_t>()) };
    check(returned).map(|_| set)
}

/// The number of the calling thread.
pub(crate) fn own_thread() -> i32 {
    // SAFETY: touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    thread as i32
}

/// A page that nobody can read, as long as the process lives.
pub(crate) fn unreadable() -> Result<*const libc::c_void, Errno> {
    static PAGE: OnceLock<usize> = OnceLock::new();
    if let Some(page) = PAGE.get() {
        return Ok(std::ptr::without_provenance(*page));
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an address where nothing is.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), page_size(), libc::PROT_NONE, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // Another thread may have been faster: then this page stays, too.
    Ok(std::ptr::without_provenance(*PAGE.get_or_init(|| page.addr())))
}

/// Returns a number that is 0 in each process until that process sets it: a fork's child finds 0 again. Linux 4.14.
pub(crate) fn zero_after_fork() -> Result<&'static AtomicUsize, Errno> {
    static PAGE: AtomicPtr<AtomicUsize> = AtomicPtr::new(std::ptr::null_mut());
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        let new = map_wiped_on_fork(page_size())?.as_ptr().cast();
        // Another thread may be faster: then this page stays unused. Not a `OnceLock`, which a fork may find locked.
        let set = PAGE.compare_exchange(page, new, Ordering::AcqRel, Ordering::Acquire);
        page = set.map_or_else(|other| other, |_| new);
    }
    // SAFETY: the page is mapped as long as the process lives, aligned, and nothing but this atomic leads to it.
    Ok(unsafe { &*page })
}

/// Memory of a mapping's own, all zero. Without the allocator.
pub(crate) fn map(len: usize) -> Result<std::ptr::NonNull<u8>, Errno> {
    map_near(std::ptr::null_mut(), len)
}

/// The same, at an address that isn't like those that other mappings have, here or in other processes.
pub(crate) fn map_somewhere(len: usize) -> Result<std::ptr::NonNull<u8>, Errno> {
    let chance = usize::from_ne_bytes(random_bytes()?);
    // From 64 to 256 GiB, or the middle of a small address space. It is a hint, where something is already.
    #[cfg(target_pointer_width = "64")]
    let (start, len_of_all) = (64 << 30, 192 << 30);
    #[cfg(not(target_pointer_width = "64"))]
    let (start, len_of_all) = (512 << 20, 1 << 30);
    let address: usize = (start + chance % len_of_all) & !(page_size() - 1);
    map_near(std::ptr::without_provenance_mut(address), len)
}

fn map_near(hint: *mut libc::c_void, len: usize) -> Result<std::ptr::NonNull<u8>, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an address where nothing is.
    let start = unsafe { libc::mmap(hint, len, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    std::ptr::NonNull::new(start.cast()).ok_or(Errno::ENOMEM)
}

/// Gives such memory back.
///
/// # Safety
///
/// - `len` bytes from `start` on are one or more pages that [`map`] returned, and that nobody uses any more.
pub(crate) unsafe fn unmap(start: std::ptr::NonNull<u8>, len: usize) {
    // SAFETY: as the caller has made sure.
    let unmapped = check(unsafe { libc::munmap(start.as_ptr().cast(), len) });
    if unmapped == Err(Errno::ENOMEM) {
        // The kernel has merged it with its neighbours, and the process has as many mappings as it may: none can be
        // split. The memory is given back, and the addresses stay taken.
        // SAFETY: as the caller has made sure.
        let dropped = check(unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTNEED) });
        debug_assert!(dropped.is_ok(), "{dropped:?}");
        return;
    }
    debug_assert!(unmapped.is_ok(), "{unmapped:?}");
}

/// Drops the pages of private anonymous memory: MADV_DONTNEED.
///
/// # Safety
///
/// - `len` bytes from `start` on are whole pages, whose content nobody needs any more, or finds again elsewhere.
#[cfg(feature = "pager")]
pub(crate) unsafe fn discard(start: *mut u8, len: usize) -> Result<(), Errno> {
    // SAFETY: as the caller has made sure.
    check(unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) }).map(drop)
}

/// Waits until a number isn't this one, or a wake; or for no reason. Async-signal-safe.
pub(crate) fn futex_wait(number: &AtomicU32, expected: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let forever = std::ptr::null::<libc::timespec>();
    // SAFETY: the kernel reads the number, which is borrowed for the call.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), operation, expected, forever) };
}

/// Wakes one thread that waits for a number to change. Async-signal-safe.
pub(crate) fn futex_wake(number: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the address is a key; no memory is touched.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), operation, 1) };
}

/// Waits until a number isn't this one, a wake, or the end of `timeout`, which is less than a second; or for no reason.
/// The number may lie in a file that other processes have mapped.
pub(crate) fn futex_wait_shared(number: &AtomicU32, expected: u32, timeout: Duration) {
    // What this system call takes, whatever the C library's structure is.
    let time: [libc::c_long; 2] = [0, timeout.subsec_nanos() as libc::c_long];
    // SAFETY: the kernel reads the number and the time, which are borrowed for the call.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), libc::FUTEX_WAIT, expected, time.as_ptr()) };
}

/// Wakes all threads, of all processes, that wait for a number by [`futex_wait_shared`].
pub(crate) fn futex_wake_shared(number: &AtomicU32) {
    // SAFETY: the address is a key; no memory is touched.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), libc::FUTEX_WAKE, libc::c_int::MAX) };
}

/// Waiting for another thread by looking again and again: at once at first, then after sleeping for ever longer, so that
/// a thread with a lower priority gets the CPU.
#[derive(Debug)]
pub(crate) struct Pause(u32);

impl Pause {
    /// Number of looks before the first rest.
    const SPINS: u32 = 100;
    /// Then it sleeps for 20 µs, twice as long each time, up to 1.28 ms.
    const SHORTEST: libc::c_long = 20_000;
    const DOUBLINGS: u32 = 6;

    pub(crate) fn new() -> Self {
        Self(0)
    }

    /// Lets some time pass. Async-signal-safe, and no point at which a thread is cancelled.
    pub(crate) fn rest(&mut self) {
        match self.0.checked_sub(Self::SPINS) {
            None => std::hint::spin_loop(),
            Some(sleeps) => sleep(Self::SHORTEST << sleeps.min(Self::DOUBLINGS)),
        }
        self.0 = self.0.saturating_add(1);
    }

    /// Sleeps for as long as [`rest`](Self::rest) does in the end. Async-signal-safe.
    pub(crate) fn long() {
        sleep(Self::SHORTEST << Self::DOUBLINGS);
    }
}

/// Sleeps for `nanos` nanoseconds, less than a second, or until a signal comes. Not by the C library's function, where
/// a thread may be cancelled.
fn sleep(nanos: libc::c_long) {
    // What this system call takes, whatever the C library's structure is.
    let time: [libc::c_long; 2] = [0, nanos];
    // SAFETY: the kernel reads the two numbers, which are borrowed for the call.
    unsafe { libc::syscall(libc::SYS_nanosleep, time.as_ptr(), std::ptr::null_mut::<libc::c_long>()) };
}

// memmap2 gives no such advice on Android.

/// `len` bytes of new memory, which is zeros in the children of forks. Linux 4.14.
pub(crate) fn map_wiped_on_fork(len: usize) -> Result<std::ptr::NonNull<u8>, Errno> {
    let start = map(len)?;
    // SAFETY: the range is that of a mapping that nobody has seen yet.
    let wiped = check(unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_WIPEONFORK) });
    if wiped.is_err() {
        // SAFETY: as above.
        unsafe { unmap(start, len) };
    }
    wiped.map(|_| start)
}

/// `len` bytes of new private memory, in pages of 2 to the power of `huge` bytes or of the base size, which isn't there
/// in the children of forks. No page is there, although the process may lock all that it maps: mlockall(2) has the kernel
/// fill such mappings at once. Also tells whether that is so; then [`lock_on_fault`] has to lock it again.
pub(crate) fn map_empty(len: usize, huge: Option<u8>) -> Result<(std::ptr::NonNull<u8>, bool), Errno> {
    let kind = match huge {
        Some(bits) => libc::MAP_HUGETLB | libc::c_int::from(bits) << libc::MAP_HUGE_SHIFT,
        None => libc::MAP_NORESERVE,
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | kind;
    // The kernel fills nothing that can't be accessed.
    // SAFETY: the kernel chooses an address where nothing is.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let empty = || {
        // SAFETY: the range is that of the mapping above, to which nothing leads yet, here and below.
        check(unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) })?;
        // Of what can be wrong with it, it can only be locked, which huge pages never are.
        // SAFETY: as above.
        let locked = huge.is_none() && unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) } == -1;
        if locked {
            // SAFETY: as above.
            check(unsafe { libc::munlock(start, len) })?;
        }
        // SAFETY: as above.
        check(unsafe { libc::mprotect(start, len, libc::PROT_READ | libc::PROT_WRITE) })?;
        Ok((std::ptr::NonNull::new(start.cast()).ok_or(Errno::ENOMEM)?, locked))
    };
    empty().inspect_err(|_| {
        // SAFETY: as above.
        unsafe { libc::munmap(start, len) };
    })
}

/// Has each page of a range locked once it is there: mlock2(2). Linux 4.4.
pub(crate) fn lock_on_fault(start: std::ptr::NonNull<u8>, len: usize) -> Result<(), Errno> {
    const MLOCK_ONFAULT: libc::c_int = 1;
    // SAFETY: nothing of the memory changes.
    let locked = unsafe { libc::syscall(libc::SYS_mlock2, start.as_ptr(), len, MLOCK_ONFAULT) };
    Errno::result(locked).map(drop)
}

/// Has a mapping take memory in pages of the base size. `EINVAL`: the kernel has no others.
#[cfg(all(feature = "pager", not(all(test, userfaultfd_loom))))]
pub(crate) fn no_huge_pages(map: &memmap2::MmapRaw) -> Result<(), Errno> {
    // SAFETY: the range is that of the mapping, in which nothing changes.
    check(unsafe { libc::madvise(map.as_mut_ptr().cast(), map.len(), libc::MADV_NOHUGEPAGE) }).map(drop)
}

/// Whether a page is mapped, or at least there to be. Where the kernel won't tell it is taken to be. Async-signal-safe.
pub(crate) fn is_resident(page: *mut std::ffi::c_void) -> bool {
    let mut resident = 1_u8;
    // SAFETY: the kernel writes a byte for the page, which is borrowed for the call.
    let _refused = check(unsafe { libc::mincore(page, 1, (&raw mut resident).cast()) });
    resident & 1 != 0
}

/// A handler of a signal, as SA_SIGINFO calls it.
pub(crate) type Handler = unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// An action of which a C library may fill in a part alone: its set of signals is longer than the kernel's.
fn no_action() -> libc::sigaction {
    // SAFETY: all zeros is the default action, without flags and with nothing blocked.
    unsafe { std::mem::zeroed() }
}

/// A set of signals without any.
fn no_signals() -> libc::sigset_t {
    // SAFETY: all zeros is such a set.
    unsafe { std::mem::zeroed() }
}

/// The signals of a set, a bit for each from 1 on.
pub(crate) fn signals_of(set: &libc::sigset_t) -> u64 {
    // SAFETY: the set is borrowed for the call.
    let has = |signal: &libc::c_int| unsafe { libc::sigismember(set, *signal) } == 1;
    (1..=SIGNALS).filter(has).map(|signal| 1 << (signal - 1)).sum()
}

/// What is done on SIGBUS.
pub(crate) fn bus_action() -> Result<libc::sigaction, Errno> {
    let mut action = no_action();
    // SAFETY: the structure is borrowed for the call, which is told nothing new.
    check(unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut action) })?;
    Ok(action)
}

/// Has something done on SIGBUS, and tells what was before.
///
/// # Safety
///
/// The caller must make sure that a handler does but what a signal handler may.
pub(crate) unsafe fn set_bus_action(action: &libc::sigaction) -> Result<libc::sigaction, Errno> {
    let mut old = no_action();
    // SAFETY: both structures are borrowed for the call; the caller vouches for the handler.
    check(unsafe { libc::sigaction(libc::SIGBUS, action, &mut old) })?;
    Ok(old)
}

/// Has SIGBUS handled, on the stack of the thread that it is raised in, and with all signals blocked meanwhile: also
/// those that C libraries keep for themselves, by which a thread is cancelled.
///
/// # Safety
///
/// The caller must make sure that the handler does but what a signal handler may.
pub(crate) unsafe fn handle_bus(handler: Handler) -> Result<libc::sigaction, Errno> {
    let mut action = no_action();
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: any bits are a set.
    unsafe { (&raw mut action.sa_mask).cast::<u8>().write_bytes(!0, size_of::<libc::sigset_t>()) };
    // SAFETY: the caller's promise is the same.
    unsafe { set_bus_action(&action) }
}

/// The address and the code of a signal's information.
///
/// # Safety
///
/// The caller must make sure that `info` is what a handler of SIGBUS was given.
pub(crate) unsafe fn fault_of(info: *const libc::siginfo_t) -> (usize, libc::c_int) {
    // SAFETY: the kernel passes a valid structure, says the caller.
    let info = unsafe { &*info };
    // SAFETY: whatever the signal is for, the bytes of an address are there.
    (unsafe { info.si_addr() }.addr(), info.si_code)
}

#[cfg(not(target_os = "android"))]
use libc::__errno_location as errno_location;

#[cfg(target_os = "android")]
use libc::__errno as errno_location;

/// Keeps `errno` as it is while a signal handler runs.
#[derive(Debug)]
pub(crate) struct KeepErrno(libc::c_int);

impl KeepErrno {
    pub(crate) fn new() -> Self {
        // SAFETY: touches nothing but the thread's errno.
        let errno = unsafe { errno_location() };
        // SAFETY: the thread's own.
        Self(unsafe { *errno })
    }
}

impl Drop for KeepErrno {
    fn drop(&mut self) {
        // SAFETY: touches nothing but the thread's errno.
        let errno = unsafe { errno_location() };
        // SAFETY: the thread's own.
        unsafe { *errno = self.0 };
    }
}

/// Ends the process by SIGBUS, with the information of the one that is being handled: as soon as its handler returns.
///
/// # Safety
///
/// The caller must make sure that `info` is what the handler was given.
pub(crate) unsafe fn die_of_bus(info: *mut libc::siginfo_t) {
    // SAFETY: the default action runs no code of the process.
    let _set = unsafe { set_bus_action(&no_action()) };
    // SAFETY: touches no memory.
    let process = unsafe { libc::getpid() };
    // SAFETY: touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // If it fails, a fault comes again by itself, and the default action ends the process all the same.
    // SAFETY: the kernel reads the structure, which is what it gave to the handler.
    unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, info) };
}

/// Calls a handler of SIGBUS that was there before, with the signals blocked that it asked for: those of the
/// interrupted thread, its own, and SIGBUS unless it has SA_NODEFER. What the kernel restores when this returns isn't
/// touched.
///
/// # Safety
///
/// The caller must make sure that `action` was installed for SIGBUS, and that `info` and `context` are what the
/// handler that runs was given.
pub(crate) unsafe fn call_handler(
    action: &libc::sigaction,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the caller's promise.
    if let Some(mut mask) = unsafe { interrupted_mask(context) } {
        for signal in 1..=SIGNALS {
            // SAFETY: a set that was installed.
            let blocked = unsafe { libc::sigismember(&action.sa_mask, signal) } == 1;
            if blocked || (signal == libc::SIGBUS && action.sa_flags & libc::SA_NODEFER == 0) {
                // SAFETY: the set is borrowed for the call.
                unsafe { libc::sigaddset(&mut mask, signal) };
            }
        }
        // SAFETY: the set is read, and the old one isn't wanted.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut()) };
    }
    if action.sa_flags & libc::SA_SIGINFO == 0 {
        // SAFETY: without SA_SIGINFO, and neither of the two special values, it is such a function.
        let handler: extern "C" fn(libc::c_int) =
            unsafe { std::mem::transmute(std::ptr::with_exposed_provenance::<()>(action.sa_sigaction)) };
        handler(libc::SIGBUS);
    } else {
        // SAFETY: with SA_SIGINFO it is such a function.
        let handler: Handler =
            unsafe { std::mem::transmute(std::ptr::with_exposed_provenance::<()>(action.sa_sigaction)) };
        // SAFETY: the arguments are those that the kernel gave.
        unsafe { handler(libc::SIGBUS, info, context) };
    }
}

/// Number of signals that have a bit in the kernel's sets.
const SIGNALS: libc::c_int = 64;

/// The signals that were blocked when a handler was called, where the layout of its context is known.
///
/// # Safety
///
/// The caller must make sure that `context` is what the handler was given.
#[cfg(any(
    target_arch = "x86_64",
    target_arch = "x86",
    target_arch = "aarch64",
    target_arch = "arm",
    target_arch = "riscv64",
    target_arch = "s390x",
))]
unsafe fn interrupted_mask(context: *mut libc::c_void) -> Option<libc::sigset_t> {
    let mut mask = no_signals();
    // SAFETY: the kernel passes a valid structure, of which a field's address is taken.
    let set = unsafe { &raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask };
    // The kernel's set is shorter than the C library's, and other things follow it.
    let len = (SIGNALS / 8) as usize;
    // SAFETY: both have this number of bytes, and are different objects.
    unsafe { std::ptr::copy_nonoverlapping(set.cast::<u8>(), (&raw mut mask).cast::<u8>(), len) };
    Some(mask)
}

#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "x86",
    target_arch = "aarch64",
    target_arch = "arm",
    target_arch = "riscv64",
    target_arch = "s390x",
)))]
unsafe fn interrupted_mask(_context: *mut libc::c_void) -> Option<libc::sigset_t> {
    None
}

/// An epoll(7) instance.
pub(crate) fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory.
    let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// epoll_ctl(2). `operation`: EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL.
pub(crate) fn epoll_control(
    epoll: BorrowedFd<'_>,
    operation: libc::c_int,
    fd: BorrowedFd<'_>,
    events: libc::c_int,
    token: u64,
) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events: events as u32, u64: token };
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    check(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), operation, fd.as_raw_fd(), &mut event) }).map(drop)
}

/// epoll_wait(2), for `timeout` milliseconds at most, or for ever with -1. Returns how many events there are; none if a
/// signal came.
pub(crate) fn epoll_wait(
    epoll: BorrowedFd<'_>,
    events: &mut [libc::epoll_event],
    timeout: libc::c_int,
) -> Result<usize, Errno> {
    let room = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the kernel writes at most `room` structures, of which `events`, borrowed for the call, has that many.
    let ready = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), room, timeout) };
    match check(ready) {
        Err(Errno::EINTR) => Ok(0),
        ready => ready.map(|ready| ready as usize),
    }
}

/// An eventfd(2) whose counter is 0, or 1 from the start.
pub(crate) fn eventfd(initially: bool) -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory.
    let fd = unsafe { libc::eventfd(initially.into(), libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    let fd = check(fd)?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// A timerfd(2) that isn't armed.
pub(crate) fn timer() -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
    let fd = check(fd)?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// Arms a timerfd(2) to expire once, in so much time; with `None` it is disarmed.
pub(crate) fn set_timer(timer: BorrowedFd<'_>, rest: Option<Duration>) {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // Zero would disarm it.
    let rest = rest.map(|rest| rest.max(Duration::from_nanos(1)));
    let value = rest.map_or(zero, |rest| libc::timespec {
        tv_sec: libc::time_t::try_from(rest.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: rest.subsec_nanos() as _,
    });
    let new = libc::itimerspec { it_interval: zero, it_value: value };
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    let set = check(unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &new, std::ptr::null_mut()) });
    debug_assert!(set.is_ok(), "{set:?}");
}

/// Makes an eventfd readable.
pub(crate) fn ring(eventfd: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: the kernel reads the number, which is borrowed for the call.
    let written = unsafe { libc::write(eventfd.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
    // It is full, and so readable, after 2^64 - 2 of them.
    debug_assert!(written == 8 || Errno::last() == Errno::EAGAIN);
}

/// Writes to standard error, past the locks and buffers of the standard library. What can't be written is lost.
pub(crate) fn print_error(mut text: &[u8]) {
    while !text.is_empty() {
        // SAFETY: the kernel reads the text, which is borrowed for the call.
        let written = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
        match usize::try_from(written) {
            Ok(written) => text = &text[written..],
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return,
        }
    }
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

/// The page size of the system, in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf touches no memory of the caller.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every Linux system has a page size")
}

/// A file in memory that can be sealed, of length 0: memfd_create(2).
#[cfg(feature = "pager")]
pub(crate) fn sealable_memfd(name: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: the name ends with a NUL, and the kernel copies it.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    let fd = check(fd)?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// Seals a memfd: it keeps its length, and only mappings that exist already can write to it. Linux 5.1.
#[cfg(feature = "pager")]
pub(crate) fn seal_as_image(file: BorrowedFd<'_>) -> Result<(), Errno> {
    /// Not everywhere in `libc`.
    const F_SEAL_FUTURE_WRITE: libc::c_int = 0x10;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL | F_SEAL_FUTURE_WRITE;
    // SAFETY: the system call takes integers and touches no memory of this process.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// A file that is in memory and nowhere else. It can have holes.
#[cfg(test)]
pub(crate) fn memfd() -> OwnedFd {
    // SAFETY: the name is a NUL-terminated constant.
    let fd = unsafe { libc::memfd_create(c"userfaultfd-test".as_ptr(), libc::MFD_CLOEXEC) };
    let fd = check(fd).expect("a memfd");
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    unsafe { own(fd) }
}

/// write(2) of bytes that Rust must not look at: the kernel copies them, as a fill does.
#[cfg(test)]
pub(crate) fn write(fd: BorrowedFd<'_>, bytes: *const libc::c_void, len: usize) -> Result<usize, Errno> {
    // SAFETY: nothing of this process is written; an address that can't be read is EFAULT.
    let written = unsafe { libc::write(fd.as_raw_fd(), bytes, len) };
    usize::try_from(written).map_err(|_| Errno::last())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn cpu_of_thread_is_returned() {
        crate::support::require!();
        let stat = b"1234 (a ) b) S 1 1234 1234 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 100 200 300 18446744073709551615 \
            1 1 0 0 0 0 0 4096 0 0 0 0 17 13 0 0 0 0 0\n";
        assert_eq!(cpu_of_stat(stat), Some(13));
        assert_eq!(cpu_of_stat(b"1234 (a) S 1"), None);
        let here = nix::unistd::gettid().as_raw();
        let cpu = last_cpu(here).expect("this thread runs somewhere");
        run_on(cpu).unwrap();
        assert_eq!(last_cpu(here), Some(cpu));
        assert_eq!(run_on(1 << 20), Err(Errno::EINVAL));
        assert!(!leave_cpu(), "there is no other that it may run on");
    }

    #[test]
    fn thread_moves_to_another_cpu() {
        crate::support::require!();
        let allowed = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            status.lines().find(|line| line.starts_with("Cpus_allowed:")).unwrap().to_owned()
        };
        let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        if !crate::support::has(crate::support::test_name!(), "several CPUs", several) {
            return;
        }
        let before = allowed();
        // Afterwards it may go back, if another thread wants the CPU.
        let moves = (0..100).filter(|_| {
            let here = own_cpu();
            assert!(leave_cpu());
            own_cpu() != here
        });
        assert!(moves.count() > 50);
        assert_eq!(allowed(), before);
    }

    /// Mappings side by side are one to the kernel, which can't be split where the process has as many as it may.
    #[test]
    fn unmap_succeeds_at_limit_of_mappings() {
        crate::support::require!();
        let limit = crate::proc_maps::max_mappings().expect("/proc tells");
        let few = limit < 100_000;
        if !crate::support::has(crate::support::test_name!(), "a limit of mappings that is soon reached", few)
        {
            return;
        }
        crate::support::child::run_well(crate::support::test_name!(), || {
            let page = page_size();
            let start = map(3 * page).unwrap();
            let middle = start.map_addr(|address| address.saturating_add(page));
            // SAFETY: a page that was just mapped, and is nobody else's.
            unsafe { middle.write_volatile(7) };
            let many = memmap2::MmapOptions::new().len(limit * page).no_reserve_swap().map_anon().unwrap();
            let many = memmap2::MmapRaw::from(many);
            for odd in (1..limit).step_by(2) {
                let odd = many.as_mut_ptr().wrapping_add(odd * page).cast();
                // SAFETY: a page of the mapping, which nobody refers to.
                if unsafe { libc::mprotect(odd, page, libc::PROT_READ) } == -1 {
                    break;
                }
            }
            // SAFETY: of what was mapped above, and not used any more.
            unsafe { unmap(middle, page) };
            // SAFETY: it is mapped still, as the process has no mapping to spare.
            assert_eq!(unsafe { middle.read_volatile() }, 0);
            drop(many);
            // SAFETY: as mapped above, and not used any more.
            unsafe { unmap(start, 3 * page) };
        });
    }

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
