//! Files and descriptors of any kind: reading, holes, locks, names, flags.

#[cfg(feature = "pager")]
use std::ffi::CStr;
use std::ffi::CString;
use std::io;
#[cfg(feature = "pager")]
use std::os::fd::OwnedFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;
#[cfg(feature = "pager")]
use super::own;
use crate::Errno;

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
    check(unsafe { libc::fstat64(file.as_raw_fd(), &raw mut stat) })?;
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

pub(super) fn read_without_waiting(
    file: BorrowedFd<'_>,
    buffer: &mut [u8],
    offset: i64,
) -> Result<usize, Errno> {
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

/// Whether a file lies in memory, so that what a thread has written to a mapping of it is there when its process has ended at
/// any moment: tmpfs, ramfs. fstatfs(2).
#[cfg(feature = "pager")]
pub(crate) fn is_in_memory(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    // SAFETY: all zeros is such a structure.
    let mut stat: libc::statfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is borrowed for the call.
    check(unsafe { libc::fstatfs64(file.as_raw_fd(), &raw mut stat) })?;
    // Some C libraries have a signed number of 32 bits.
    let kind = stat.f_type as u64 & u64::from(u32::MAX);
    Ok(kind == TMPFS || kind == RAMFS)
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
    let asked = check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) });
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

/// Seals a memfd: neither its length nor its content can change any more, whatever is done with its descriptors. `EBUSY`:
/// a mapping could write to it.
#[cfg(all(feature = "pager", feature = "tracking"))]
pub(crate) fn seal_content(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: the system call takes integers and touches no memory of this process.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// write(2) of bytes that Rust must not look at: the kernel copies them, as a fill does.
#[cfg(test)]
pub(crate) fn write(fd: BorrowedFd<'_>, bytes: *const libc::c_void, len: usize) -> Result<usize, Errno> {
    // SAFETY: nothing of this process is written; an address that can't be read is EFAULT.
    let written = unsafe { libc::write(fd.as_raw_fd(), bytes, len) };
    usize::try_from(written).map_err(|_| Errno::last())
}
