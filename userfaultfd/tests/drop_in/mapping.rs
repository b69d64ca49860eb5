//! Memory from mmap(2), as programs have it that don't want more.

use std::ptr;

use libc::c_void;

/// A mapping, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) ptr: *mut c_void,
    pub(crate) len: usize,
}

// SAFETY: the memory isn't bound to a thread; its users agree on which thread writes when.
unsafe impl Send for Mapping {}

// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private anonymous memory.
    pub(crate) fn anonymous(pages: usize) -> Self {
        Self::new(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Shared memory of a file.
    pub(crate) fn shared(pages: usize, fd: i32) -> Self {
        Self::new(pages, libc::MAP_SHARED, fd)
    }

    fn new(pages: usize, flags: i32, fd: i32) -> Self {
        let (len, prot) = (pages * page_size(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let ptr = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, 0) };
        assert_ne!(ptr, libc::MAP_FAILED, "mmap");
        Self { ptr, len }
    }

    /// The address of a page.
    pub(crate) fn page(&self, index: usize) -> *mut c_void {
        self.ptr.wrapping_byte_add(index * page_size())
    }

    /// Reads the first byte of a page.
    pub(crate) fn get(&self, page: usize) -> u8 {
        // SAFETY: inside the mapping.
        unsafe { self.page(page).cast::<u8>().read_volatile() }
    }

    /// Writes the first byte of a page.
    pub(crate) fn set(&self, page: usize, byte: u8) {
        // SAFETY: inside the mapping, to which nothing refers.
        unsafe { self.page(page).cast::<u8>().write_volatile(byte) };
    }

    /// Drops the content of a page.
    pub(crate) fn discard(&self, page: usize) {
        // SAFETY: inside the mapping, to which nothing refers.
        let result = unsafe { libc::madvise(self.page(page), page_size(), libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "madvise");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and nothing refers to it.
        unsafe { libc::munmap(self.ptr, self.len) };
    }
}

pub(crate) fn page_size() -> usize {
    // SAFETY: touches no memory.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// A memfd of a number of pages.
pub(crate) fn memfd(pages: usize) -> std::fs::File {
    use std::os::unix::io::FromRawFd;
    // SAFETY: the name is NUL-terminated.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create");
    // SAFETY: the descriptor is new, and nothing else owns it.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len((pages * page_size()) as u64).expect("a size");
    file
}
