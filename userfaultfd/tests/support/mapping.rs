//! Memory that is out of the ordinary: most of it can't be registered.

use std::ffi::{CString, c_void};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use userfaultfd::Errno;

use super::raw::check;
use super::{has, mounts, page};

/// Some pages of the base size, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) start: *mut c_void,
    pub(crate) len: usize,
}

impl Mapping {
    /// mmap(2) at an address of the kernel's choice; without a file anonymous.
    pub(crate) fn new(
        pages: usize,
        protection: libc::c_int,
        flags: libc::c_int,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Self, Errno> {
        let len = pages * page();
        let (anonymous, fd) = file.map_or((libc::MAP_ANONYMOUS, -1), |file| (0, file.as_raw_fd()));
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags | anonymous, fd, 0) };
        if start == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(Self { start, len }) }
    }

    /// Uses up the mappings that this process may have, but for `pairs` pairs, and one if that is what is left. Nothing
    /// accesses the memory. `None` where the limit is out of reach.
    pub(crate) fn use_up(test: &str, pairs: usize) -> Option<Self> {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let limit: usize = limit.trim().parse().unwrap();
        if !has(test, "a limit of mappings that is soon reached", limit <= 1 << 17) {
            return None;
        }
        let all = Self::new(limit, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE, None).unwrap();
        let set = |index: usize, rights| {
            let at = all.start.wrapping_byte_add(index * page());
            // SAFETY: the page lies in the mapping, which nothing accesses.
            unsafe { libc::mprotect(at, page(), rights) == 0 }
        };
        // Each other page with another protection makes two more.
        let odd = || (1..limit).step_by(2);
        let split = odd().take_while(|index| set(*index, libc::PROT_READ)).count();
        assert!(split < odd().count(), "the limit isn't reached");
        let joined = odd().take(split).skip(split - pairs).all(|index| set(index, libc::PROT_NONE));
        assert!(joined);
        Some(all)
    }

    /// A shared mapping for reading and writing.
    pub(crate) fn shared(pages: usize, file: BorrowedFd<'_>) -> Result<Self, Errno> {
        Self::new(pages, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(file))
    }

    /// A private mapping for reading and writing.
    pub(crate) fn private(pages: usize, file: BorrowedFd<'_>) -> Result<Self, Errno> {
        Self::new(pages, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, Some(file))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is self's own.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// A nameless file of some pages on a file system that isn't shared memory. `None`, visibly, where the
/// temporary files lie in shared memory.
pub(crate) fn regular_file(test: &str, pages: usize) -> Option<File> {
    let path = format!("userfaultfd-{}-{test}", std::process::id()).replace(':', "-");
    let path = std::env::temp_dir().join(path);
    let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len((pages * page()) as u64).unwrap();
    // SAFETY: all zeros is a structure without meaning.
    let mut filesystem: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is borrowed for the call.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut filesystem) }).unwrap();
    has(test, "regular files", filesystem.f_type as u32 != libc::TMPFS_MAGIC as u32).then_some(file)
}

/// memfd_create(2), of some pages of the base size.
pub(crate) fn memfd(flags: libc::c_uint, pages: usize) -> OwnedFd {
    memfd_of_bytes(flags, pages * page())
}

/// memfd_create(2), of some bytes.
pub(crate) fn memfd_of_bytes(flags: libc::c_uint, len: usize) -> OwnedFd {
    // SAFETY: the name is NUL-terminated.
    let fd = check(unsafe { libc::memfd_create(c"test".as_ptr(), flags | libc::MFD_CLOEXEC) }).unwrap();
    sized(fd, len)
}

/// memfd_secret(2), which libc has not for every architecture. New system calls follow each other alike on all of them.
const MEMFD_SECRET: libc::c_long = libc::SYS_pidfd_open + (447 - 434);

/// memfd_secret(2), of some pages, where there is such a thing.
pub(crate) fn secret(test: &str, pages: usize) -> Option<OwnedFd> {
    // SAFETY: touches no memory.
    let fd = check(unsafe { libc::syscall(MEMFD_SECRET, libc::O_CLOEXEC) });
    has(test, "memfd_secret", fd.is_ok()).then(|| sized(fd.unwrap(), pages * page()))
}

/// An empty file in shared memory that has room for a number of pages. For tests that run alone as the superuser;
/// the file system hides the temporary files from them.
pub(crate) fn file_with_room_for(test: &str, pages: usize) -> Option<File> {
    let own = mounts::own();
    if !has(test, "mounts of its own", own) {
        return None;
    }
    mount_room_for(pages, 0);
    let path = std::env::temp_dir().join("crowded");
    Some(File::options().create_new(true).read(true).write(true).open(path).unwrap())
}

/// Mounts the file system of [`file_with_room_for`], or mounts it again with other room, as the flags tell.
pub(crate) fn mount_room_for(pages: usize, flags: libc::c_ulong) {
    let target = CString::new(std::env::temp_dir().as_os_str().as_bytes()).unwrap();
    let options = CString::new(format!("size={}", pages * page())).unwrap();
    let (source, options) = (c"tmpfs".as_ptr(), options.as_ptr().cast());
    // SAFETY: the strings are NUL-terminated and live until the call returns.
    check(unsafe { libc::mount(source, target.as_ptr(), source, flags, options) }).unwrap();
}

/// A segment of System V shared memory, where there is such a thing.
pub(crate) fn system_v(test: &str, pages: usize) -> Option<Mapping> {
    let len = pages * page();
    // SAFETY: touches no memory.
    let id = check(unsafe { libc::shmget(libc::IPC_PRIVATE, len, 0o600) });
    if !has(test, "System V shared memory", id.is_ok()) {
        return None;
    }
    let id = id.unwrap() as libc::c_int;
    // SAFETY: an address of the kernel's choice replaces nothing.
    let start = unsafe { libc::shmat(id, ptr::null(), 0) };
    // SAFETY: that command takes no structure. The segment goes with its last mapping.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) }).unwrap();
    assert!(start.addr() < usize::MAX, "shmat: {}", Errno::last());
    Some(Mapping { start, len })
}

fn sized(fd: i64, len: usize) -> OwnedFd {
    // SAFETY: a new descriptor of this process, owned by nothing else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    // SAFETY: touches no memory.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len as _) }).unwrap();
    fd
}

/// Another descriptor of a file, through which it can only be read.
pub(crate) fn read_only(file: impl AsFd) -> OwnedFd {
    File::open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())).unwrap().into()
}
