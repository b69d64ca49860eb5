//! An io_uring with one registered buffer, made of system calls: the kernel writes to its pages without a page fault.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// `IORING_OFF_SQES`.
const ENTRIES: libc::off_t = 0x1000_0000;
const IORING_OP_READ_FIXED: u8 = 4;
const IORING_ENTER_GETEVENTS: u32 = 1;
const IORING_REGISTER_BUFFERS: u32 = 0;

/// Words of `struct io_uring_params`: the sizes of the queues, and where what is in the common mapping.
const SUBMISSIONS: usize = 0;
const COMPLETIONS: usize = 1;
const SUBMISSION_TAIL: usize = 11;
const SUBMISSION_MASK: usize = 12;
const SUBMISSION_ARRAY: usize = 16;
const COMPLETION_HEAD: usize = 20;
const COMPLETION_MASK: usize = 22;
const COMPLETION_ENTRIES: usize = 25;

#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    queues: *mut u8,
    entries: *mut u8,
    params: [u32; 30],
}

impl Ring {
    /// Pins the buffer.
    pub(crate) fn new(buffer: *mut libc::c_void, len: usize) -> io::Result<Self> {
        let mut params = [0; 30];
        // SAFETY: the structure is borrowed for the call.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor of this process, owned by nothing else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        let map = |len: usize, offset| {
            let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
            let start =
                unsafe { libc::mmap(std::ptr::null_mut(), len, rights, flags, fd.as_raw_fd(), offset) };
            if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start.cast::<u8>()) }
        };
        // One mapping for both queues (IORING_FEAT_SINGLE_MMAP), another for the entries. They stay until the process
        // of the test ends.
        let array = params[SUBMISSION_ARRAY] + 4 * params[SUBMISSIONS];
        let completions = params[COMPLETION_ENTRIES] + 16 * params[COMPLETIONS];
        let queues = map(array.max(completions) as usize, 0)?;
        let entries = map(64 * params[SUBMISSIONS] as usize, ENTRIES)?;
        let vector = libc::iovec { iov_base: buffer, iov_len: len };
        let (number, vector) = (libc::SYS_io_uring_register, &raw const vector);
        // SAFETY: the vector lives until the call returns; nobody borrows the buffer.
        let registered = unsafe { libc::syscall(number, fd.as_raw_fd(), IORING_REGISTER_BUFFERS, vector, 1) };
        if registered < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, queues, entries, params })
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: an aligned word of a queue, which is mapped for as long as the process lives.
        unsafe { AtomicU32::from_ptr(self.queues.wrapping_add(offset as usize).cast()) }
    }

    /// Reads from the beginning of a file into a part of the buffer, and returns how many bytes.
    pub(crate) fn read(&self, file: &impl AsRawFd, to: *mut libc::c_void, len: usize) -> i32 {
        let tail = self.word(self.params[SUBMISSION_TAIL]);
        let slot =
            tail.load(Ordering::Relaxed) & self.word(self.params[SUBMISSION_MASK]).load(Ordering::Relaxed);
        let mut entry = [0; 64];
        entry[0] = IORING_OP_READ_FIXED;
        entry[4..8].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
        entry[16..24].copy_from_slice(&(to.addr() as u64).to_ne_bytes());
        entry[24..28].copy_from_slice(&(len as u32).to_ne_bytes());
        // SAFETY: a free entry of the ring, which the kernel doesn't read before the tail moves.
        unsafe { self.entries.wrapping_add(64 * slot as usize).cast::<[u8; 64]>().write(entry) };
        self.word(self.params[SUBMISSION_ARRAY] + 4 * slot).store(slot, Ordering::Relaxed);
        tail.fetch_add(1, Ordering::Release);
        let (number, fd) = (libc::SYS_io_uring_enter, self.fd.as_raw_fd());
        // SAFETY: the kernel writes to the buffer, which nobody borrows.
        let entered = unsafe { libc::syscall(number, fd, 1, 1, IORING_ENTER_GETEVENTS, 0_usize, 0_usize) };
        assert_eq!(entered, 1, "{}", io::Error::last_os_error());
        let head = self.word(self.params[COMPLETION_HEAD]);
        let done =
            head.load(Ordering::Acquire) & self.word(self.params[COMPLETION_MASK]).load(Ordering::Relaxed);
        let result = self.word(self.params[COMPLETION_ENTRIES] + 16 * done + 8).load(Ordering::Acquire);
        head.fetch_add(1, Ordering::Release);
        result as i32
    }
}
