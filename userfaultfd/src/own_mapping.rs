//! Memory of this process in which nothing is, whatever the process locks, until it is filled.

#![expect(unsafe_code, reason = "a mapping of its own")]

use std::io;
#[cfg(feature = "tracking")]
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::holder::{Held, Holder};
use crate::owner::Owner;
use crate::{Errno, sys};

/// Private memory, which only the process that made it has. It is unmapped when this is dropped there.
#[derive(Debug)]
pub(crate) struct OwnMapping {
    owner: Owner,
    start: NonNull<u8>,
    len: usize,
    /// Whether the process locks what it maps.
    locked: bool,
    /// For errors that others get.
    held: Held,
}

// SAFETY: the memory is this value's, as a slice of bytes in a box is.
unsafe impl Send for OwnMapping {}
// SAFETY: through a shared reference it is only read.
unsafe impl Sync for OwnMapping {}

impl OwnMapping {
    /// Maps `len` bytes, whole pages: of 2 to the power of `huge` bytes, or of the system's.
    pub(crate) fn new(len: usize, huge: Option<u8>) -> io::Result<Self> {
        Self::of(len, sys::map_empty(len, huge))
    }

    /// Maps the first `len` bytes of a file, whole pages, privately.
    #[cfg(feature = "tracking")]
    pub(crate) fn of_image(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::of(len, sys::map_image(file, len))
    }

    fn of(len: usize, mapped: Result<(NonNull<u8>, bool), Errno>) -> io::Result<Self> {
        let (start, locked) = mapped?;
        let unmap = |errno: Errno| {
            // SAFETY: it was mapped by the caller, and nothing uses it.
            unsafe { sys::unmap(start, len) };
            errno
        };
        let owner = Owner::current().map_err(unmap)?;
        Ok(Self { owner, start, len, locked, held: Held::new(owner, Holder::LazyMemory) })
    }

    /// Has each page locked once it is there, if the process locks what it maps.
    pub(crate) fn lock_on_fault(&self) -> io::Result<()> {
        if self.locked {
            sys::lock_on_fault(self.start, self.len)?;
        }
        Ok(())
    }

    /// Whether the process locks what it maps.
    pub(crate) fn is_locked(&self) -> bool {
        self.locked
    }

    /// Says that lazy memory lies there.
    pub(crate) fn hold(&self) {
        let start = self.start.as_ptr().addr();
        self.held.set(Some(start..start + self.len));
    }

    /// Whether this process has it.
    #[inline]
    pub(crate) fn is_here(&self) -> bool {
        self.owner.is_current()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Unmaps some parts, in bytes from the start, and leaves what other code has mapped in its place since: for memory that
    /// its user may unmap by a raw pointer. It has no bytes afterwards.
    #[cfg(feature = "tracking")]
    pub(crate) fn unmap_parts(&mut self, parts: &[std::ops::Range<usize>]) {
        let len = std::mem::take(&mut self.len);
        for part in parts.iter().filter(|part| self.is_here() && part.end <= len) {
            // SAFETY: within the mapping.
            let start = unsafe { self.start.add(part.start) };
            // SAFETY: the caller has seen that this part is still there. Nothing uses it after this: the memory has no bytes
            // any more.
            unsafe { sys::unmap(start, part.len()) };
        }
    }

    #[cfg(any(feature = "tracking", feature = "snapshot"))]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The bytes. Panics in any other process: something else may be at these addresses there.
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        self.check();
        // SAFETY: this number of bytes is mapped, initialised by the kernel, and this value's.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// Likewise.
    #[inline]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.check();
        // SAFETY: as for `bytes`, and it is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    #[inline]
    fn check(&self) {
        if !self.is_here() {
            not_here();
        }
    }
}

#[cold]
fn not_here() -> ! {
    panic!("this memory was made before a fork, by the parent process: a child hasn't got it")
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // In another process it isn't mapped.
        if self.is_here() && self.len > 0 {
            // SAFETY: it was mapped by `new`, and nothing uses it after this.
            unsafe { sys::unmap(self.start, self.len) };
        }
    }
}
