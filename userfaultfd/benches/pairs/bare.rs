//! What a program without the library writes: structures of `userfaultfd-sys`, system calls of `libc`.

use std::io;
use std::mem::size_of_val;
use std::os::fd::RawFd;

use userfaultfd_sys::*;

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// UFFDIO_COPY: the bytes copied, or the errno.
///
/// # Safety
///
/// The caller must make sure that `src` is readable, and that what is copied may be found in the range.
pub(crate) unsafe fn copy(fd: RawFd, src: *const u8, dst: *mut u8, len: usize) -> Result<usize, i32> {
    let mut arg = uffdio_copy { dst: dst as u64, src: src as u64, len: len as u64, mode: 0, copy: 0 };
    // SAFETY: the structure is the one of this number; the caller vouches for the ranges.
    match unsafe { libc::ioctl(fd, UFFDIO_COPY as libc::Ioctl, &mut arg) } {
        -1 => Err(errno()),
        _ => Ok(arg.copy as usize),
    }
}

/// UFFDIO_WAKE.
pub(crate) fn wake(fd: RawFd, start: *mut u8, len: usize) -> Result<(), i32> {
    let mut arg = uffdio_range { start: start as u64, len: len as u64 };
    // SAFETY: the structure is the one of this number.
    match unsafe { libc::ioctl(fd, UFFDIO_WAKE as libc::Ioctl, &mut arg) } {
        -1 => Err(errno()),
        _ => Ok(()),
    }
}

/// read(2): how many messages came, or the errno.
pub(crate) fn read(fd: RawFd, messages: &mut [uffd_msg]) -> Result<usize, i32> {
    // SAFETY: the kernel writes at most the size of the slice, and any bytes make a message.
    match unsafe { libc::read(fd, messages.as_mut_ptr().cast(), size_of_val(messages)) } {
        -1 => Err(errno()),
        read => Ok(read as usize / size_of::<uffd_msg>()),
    }
}

/// What a handler needs to know of a fault: where, a write?, missing? For other events where, and no twice.
pub(crate) fn decode(message: &uffd_msg) -> Result<(u64, bool, bool), u8> {
    match message.event {
        UFFD_EVENT_PAGEFAULT => {
            // SAFETY: the event says that this field is the valid one.
            let fault = unsafe { message.arg.pagefault };
            let reasons = UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_MINOR | UFFD_PAGEFAULT_FLAG_RWP;
            Ok((fault.address, fault.flags & UFFD_PAGEFAULT_FLAG_WRITE != 0, fault.flags & reasons == 0))
        }
        UFFD_EVENT_REMAP => {
            // SAFETY: the event says that this field is the valid one.
            let remap = unsafe { message.arg.remap };
            Ok((remap.to, false, false))
        }
        UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP => {
            // SAFETY: the event says that this field is the valid one.
            let range = unsafe { message.arg.remove };
            Ok((range.start, false, false))
        }
        event => Err(event),
    }
}
