//! The operations that resolve missing and minor faults: copy, zeropage, continue, poison, move.

#![expect(unsafe_code, reason = "filling memory behind the compiler's back")]

use std::ffi::c_void;
use std::os::fd::AsFd;

use bitflags::bitflags;

use crate::uffd::{address, range};
use crate::{Errno, Error, IoctlFlags, Result, Uffd, sys};

bitflags! {
    /// Options of [`Uffd::copy_with`].
    #[derive(Copy, Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
    pub struct CopyMode: u64 {
        /// Leave the waiters asleep, for a [`wake`](Uffd::wake) later.
        #[doc(alias = "UFFDIO_COPY_MODE_DONTWAKE")]
        const DONT_WAKE = sys::UFFDIO_COPY_MODE_DONTWAKE;
        /// Map the pages write-protected, in the same step. The range must be registered for
        /// [`WRITE_PROTECT`](crate::RegisterMode::WRITE_PROTECT). Since Linux 5.7.
        #[doc(alias = "UFFDIO_COPY_MODE_WP")]
        const WRITE_PROTECT = sys::UFFDIO_COPY_MODE_WP;
    }
}

bitflags! {
    /// Options of [`Uffd::zeropage_with`].
    #[derive(Copy, Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
    pub struct ZeropageMode: u64 {
        /// Leave the waiters asleep, for a [`wake`](Uffd::wake) later.
        #[doc(alias = "UFFDIO_ZEROPAGE_MODE_DONTWAKE")]
        const DONT_WAKE = sys::UFFDIO_ZEROPAGE_MODE_DONTWAKE;
    }
}

bitflags! {
    /// Options of [`Uffd::continue_with`].
    #[derive(Copy, Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
    pub struct ContinueMode: u64 {
        /// Leave the waiters asleep, for a [`wake`](Uffd::wake) later.
        #[doc(alias = "UFFDIO_CONTINUE_MODE_DONTWAKE")]
        const DONT_WAKE = sys::UFFDIO_CONTINUE_MODE_DONTWAKE;
        /// Map the pages write-protected, in the same step. The range must be registered for
        /// [`WRITE_PROTECT`](crate::RegisterMode::WRITE_PROTECT). Since Linux 6.4; no feature tells of it,
        /// but kernels with [`WP_UNPOPULATED`](crate::FeatureFlags::WP_UNPOPULATED) have it.
        #[doc(alias = "UFFDIO_CONTINUE_MODE_WP")]
        const WRITE_PROTECT = sys::UFFDIO_CONTINUE_MODE_WP;
    }
}

bitflags! {
    /// Options of [`Uffd::move_pages`].
    #[derive(Copy, Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
    pub struct MoveMode: u64 {
        /// Leave the waiters asleep, for a [`wake`](Uffd::wake) later.
        #[doc(alias = "UFFDIO_MOVE_MODE_DONTWAKE")]
        const DONT_WAKE = sys::UFFDIO_MOVE_MODE_DONTWAKE;
        /// Skip pages that the source lacks. They count as moved, and are missing at the destination, too.
        #[doc(alias = "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES")]
        const ALLOW_SRC_HOLES = sys::UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES;
    }
}

/// Where a fill stopped, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stop {
    done: usize,
    errno: Errno,
}

/// What a fill did, from the ioctl's result and the field of its structure that the kernel writes.
///
/// The field holds the bytes done or a negative errno. It is left at the 0 that every call starts with where
/// the request was refused outright, and by kernels before mid-2025 also where page tables changed below the
/// call. So only a positive field is a count, and only the result tells whether the call failed.
#[inline]
fn outcome(result: Result<(), Errno>, field: i64) -> Result<usize, Stop> {
    let done = usize::try_from(field).unwrap_or(0);
    result.map(|()| done).map_err(|errno| Stop { done, errno })
}

/// The error of an operation that has no variant of its own.
#[inline]
fn stopped(ioctl: IoctlFlags) -> impl FnOnce(Stop) -> Error {
    move |Stop { done, errno }| Error::Stopped { ioctl, done, errno }
}

impl Uffd {
    /// Fills missing pages with a copy: [`copy_with`](Self::copy_with) with [`CopyMode::DONT_WAKE`] unless
    /// `wake`.
    ///
    /// # Errors
    ///
    /// As [`copy_with`](Self::copy_with).
    ///
    /// # Safety
    ///
    /// As [`copy_with`](Self::copy_with).
    #[doc(alias = "UFFDIO_COPY")]
    #[inline]
    pub unsafe fn copy(&self, src: *const c_void, dst: *mut c_void, len: usize, wake: bool) -> Result<usize> {
        let mode = if wake { CopyMode::empty() } else { CopyMode::DONT_WAKE };
        // SAFETY: the caller's promises are the same.
        unsafe { self.copy_with(src, dst, len, mode) }
    }

    /// Fills missing pages with a copy of `src`, and wakes the threads that wait for them.
    ///
    /// Each page appears whole: no thread sees it half-filled. Permissions of the destination don't matter.
    /// On shared memory the page goes into the page cache, so every mapping has it. Write protection that was
    /// set on the missing page is lost unless `mode` sets it again, and poison is healed.
    ///
    /// `dst` is an address in the process that created the userfaultfd, `src` one in the calling process.
    /// `dst` and `len` are multiples of the page size, of the huge page size on hugetlb memory; `src` may be
    /// unaligned. One call must stay inside one mapping, and mprotect(2) or another registration split a
    /// mapping in two.
    ///
    /// If `src` is itself a missing page of a range that the calling thread handles, the call never returns.
    ///
    /// Since Linux 4.3; on shared and hugetlb memory 4.11.
    ///
    /// # Errors
    ///
    /// [`PartiallyCopied`](Error::PartiallyCopied) with the bytes done, perhaps 0, if the memory layout is
    /// changing (read the pending events, then try again) or a later page can't be filled (the call for the
    /// rest tells why). [`CopyFailed`](Error::CopyFailed), with nothing copied, and
    ///
    /// - `EEXIST`: the page is present, perhaps in the page cache without being mapped here;
    ///   since Linux 7.2 a guard marker; on hugetlb memory since a kernel between 6.12 and 6.18 also an
    ///   exhausted pool. [`wake`](Uffd::wake) the range, and escalate if the same fault comes back.
    /// - `ENOENT`: the range isn't mapped, isn't registered, or crosses the end of a mapping.
    /// - `EINVAL`: unaligned, empty, beyond the address space; `WRITE_PROTECT` without that registration;
    ///   memory that can't be filled.
    /// - `EFAULT`: `src` can't be read; or the end of the file lies before the page. (Of private hugetlb
    ///   mappings that isn't asked.)
    /// - `ENOMEM`: no memory, no room in the file system; since 7.2, for shared mappings of small pages, also
    ///   that the end of the file lies before the page.
    /// - `ESRCH`: the process of the range is gone.
    ///
    /// # Safety
    ///
    /// The caller must make sure that
    ///
    /// - `src` is valid for reads of `len` bytes during the call, if the page shall hold them. (The
    ///   kernel answers `EFAULT` where nothing is mapped.)
    /// - every holder of a reference into the missing pages, in whatever process, expects what is copied
    ///   there: the content is valid for its type, and no page that was seen as something else is replaced.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{CopyMode, RegisterMode, UffdBuilder};
    ///
    /// let page = 65536; // a multiple of every page size
    /// let mut memory = memmap2::MmapMut::map_anon(page)?;
    /// let start = memory.as_mut_ptr().cast();
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register(start, page)?;
    /// let content = vec![42u8; page];
    /// // SAFETY: `content` outlives the call, and any bytes are good for `memory`, which nothing has read.
    /// let copied = unsafe { uffd.copy_with(content.as_ptr().cast(), start, page, CopyMode::empty())? };
    /// assert_eq!(copied, page);
    /// assert_eq!(memory[..], content[..]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source: [`UFFDIO_COPY(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_COPY.2const.html).
    #[doc(alias = "UFFDIO_COPY")]
    #[inline]
    pub unsafe fn copy_with(
        &self,
        src: *const c_void,
        dst: *mut c_void,
        len: usize,
        mode: CopyMode,
    ) -> Result<usize> {
        let mut arg = sys::uffdio_copy {
            dst: address(dst),
            src: address(src),
            len: len as u64,
            mode: mode.bits(),
            copy: 0,
        };
        // SAFETY: the caller vouches for both ranges.
        let result = unsafe { sys::copy(self.as_fd(), &mut arg) };
        outcome(result, arg.copy).map_err(|Stop { done, errno }| match errno {
            Errno::EAGAIN => Error::PartiallyCopied(done),
            _ if done > 0 => Error::PartiallyCopied(done),
            errno => Error::CopyFailed(errno),
        })
    }

    /// Fills missing pages with zeros: [`zeropage_with`](Self::zeropage_with) with [`ZeropageMode::DONT_WAKE`] unless
    /// `wake`, and with the errors that 0.9 has.
    ///
    /// # Errors
    ///
    /// [`ZeropageFailed`](Error::ZeropageFailed) with the errno of [`zeropage_with`](Self::zeropage_with). After a partial
    /// fill that is `EAGAIN`, as when the memory layout is changing, and the bytes done aren't returned; use `zeropage_with`
    /// for them.
    ///
    /// # Safety
    ///
    /// As [`zeropage_with`](Self::zeropage_with).
    #[doc(alias = "UFFDIO_ZEROPAGE")]
    #[inline]
    pub unsafe fn zeropage(&self, start: *mut c_void, len: usize, wake: bool) -> Result<usize> {
        let mode = if wake { ZeropageMode::empty() } else { ZeropageMode::DONT_WAKE };
        // SAFETY: the caller's promises are the same.
        unsafe { self.fill_with_zeros(start, len, mode) }.map_err(|stop| Error::ZeropageFailed(stop.errno))
    }

    /// Fills missing pages with zeros, and wakes the threads that wait for them.
    ///
    /// On private memory the kernel's shared zero page is mapped, so nothing is allocated until a write. In a
    /// range that is registered for `MISSING` alone, that write isn't delivered.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size. One call must stay inside one mapping.
    ///
    /// Since Linux 4.3; on shared memory 4.11; never on hugetlb memory.
    ///
    /// # Errors
    ///
    /// [`Stopped`](Error::Stopped), with the bytes done and
    ///
    /// - `EAGAIN`: the memory layout is changing (read the pending events, then try again), or a later page can't be
    ///   filled (the call for the rest tells why).
    /// - `EEXIST`: something is there already: a page; on private memory also a marker of write protection or
    ///   poison, so that waking makes the fault come back for ever: use [`copy_with`](Self::copy_with) and
    ///   [`CopyMode::WRITE_PROTECT`] there. On shared memory zeros replace such a marker, before Linux 7.2 also
    ///   a guard's.
    /// - `ENOENT`: the range isn't mapped, isn't registered, or crosses the end of a mapping.
    /// - `EINVAL`: unaligned, empty, beyond the address space; hugetlb memory, files.
    /// - `EFAULT`: the end of the file lies before the page.
    /// - `ENOMEM`: no memory, no room in the file system; since 7.2, on shared mappings, also that the end of
    ///   the file lies before the page.
    /// - `ESRCH`: the process of the range is gone.
    ///
    /// # Safety
    ///
    /// The caller must make sure that every holder of a reference into the missing pages, in whatever process,
    /// expects zeros there: they are valid for its type, and no page that was seen as something else is
    /// replaced.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{UffdBuilder, ZeropageMode};
    ///
    /// let page = 65536; // a multiple of every page size
    /// let mut memory = memmap2::MmapMut::map_anon(page)?;
    /// let start = memory.as_mut_ptr().cast();
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register(start, page)?;
    /// // SAFETY: nothing has read the memory yet, and zeros are good for bytes.
    /// assert_eq!(unsafe { uffd.zeropage_with(start, page, ZeropageMode::empty())? }, page);
    /// assert_eq!(memory[page - 1], 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source:
    /// [`UFFDIO_ZEROPAGE(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_ZEROPAGE.2const.html).
    #[doc(alias = "UFFDIO_ZEROPAGE")]
    #[inline]
    pub unsafe fn zeropage_with(&self, start: *mut c_void, len: usize, mode: ZeropageMode) -> Result<usize> {
        // SAFETY: the caller's promises are the same.
        unsafe { self.fill_with_zeros(start, len, mode) }.map_err(stopped(IoctlFlags::ZEROPAGE))
    }

    /// # Safety
    ///
    /// As [`zeropage_with`](Self::zeropage_with).
    #[inline]
    unsafe fn fill_with_zeros(
        &self,
        start: *mut c_void,
        len: usize,
        mode: ZeropageMode,
    ) -> Result<usize, Stop> {
        let mut arg = sys::uffdio_zeropage { range: range(start, len), mode: mode.bits(), zeropage: 0 };
        // SAFETY: the caller vouches for the range.
        let result = unsafe { sys::zeropage(self.as_fd(), &mut arg) };
        outcome(result, arg.zeropage)
    }

    /// Maps what the page cache holds: [`continue_with`](Self::continue_with) with
    /// [`ContinueMode::DONT_WAKE`] unless `wake`.
    ///
    /// # Errors
    ///
    /// As [`continue_with`](Self::continue_with).
    #[doc(alias = "UFFDIO_CONTINUE")]
    #[inline]
    pub fn r#continue(&self, start: *mut c_void, len: usize, wake: bool) -> Result<u64> {
        let mode = if wake { ContinueMode::empty() } else { ContinueMode::DONT_WAKE };
        self.continue_with(start, len, mode)
    }

    /// Resolves minor faults: maps what the page cache holds, and wakes the threads that wait for it. Returns the bytes
    /// mapped.
    ///
    /// The content is what was written through another mapping or the file; it is visible before the pages
    /// are. Stopping part-way isn't an error: **compare the result with `len`**, and call again for the rest,
    /// to learn why.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size, of the huge page size on hugetlb memory.
    /// One call must stay inside one mapping.
    ///
    /// Since Linux 5.13 on hugetlb memory, 5.14 on shared memory (also its private mappings); never on
    /// anonymous private.
    ///
    /// # Errors
    ///
    /// [`SystemError`](Error::SystemError), with nothing mapped, and
    ///
    /// - `EAGAIN`: the memory layout is changing. Read the pending events, then try again.
    /// - `EEXIST`: something is there already. [`wake`](Uffd::wake) the range.
    /// - `EFAULT`: the page cache holds no page there.
    /// - `ENOENT`: the range isn't mapped, isn't registered, or crosses the end of a mapping.
    /// - `EINVAL`: unaligned, empty, beyond the address space; private anonymous memory, files;
    ///   `WRITE_PROTECT` without that registration or before 6.4; up to 6.18, on small pages, also that the
    ///   end of the file lies before the page, which is `EFAULT` elsewhere.
    /// - `EIO`: the page is damaged (hardware).
    /// - `ENOMEM`: no memory.
    /// - `ESRCH`: the process of the range is gone.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{ContinueMode, FeatureFlags, RegisterMode, Support, UffdBuilder};
    ///
    /// if !Support::probe()?.features().contains(FeatureFlags::MINOR_SHMEM) {
    ///     return Ok(()); // before Linux 5.14
    /// }
    /// # use std::os::fd::{FromRawFd, OwnedFd};
    /// let page = userfaultfd::page_size();
    /// # let memfd = || {
    /// #     // SAFETY: the name is NUL-terminated.
    /// #     let fd = unsafe { libc::memfd_create(c"example".as_ptr(), libc::MFD_CLOEXEC) };
    /// #     // SAFETY: a new descriptor, owned by nothing else.
    /// #     unsafe { std::fs::File::from_raw_fd(fd) }
    /// # };
    /// let file = memfd();
    /// file.set_len(page as u64)?;
    /// // SAFETY: the file is this program's alone.
    /// let (mut memory, mut handler) =
    ///     unsafe { (memmap2::MmapMut::map_mut(&file)?, memmap2::MmapMut::map_mut(&file)?) };
    /// let start = memory.as_mut_ptr().cast();
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register_with_mode(start, page, RegisterMode::MINOR)?;
    ///
    /// handler[0] = 42; // in the page cache now, and not yet mapped at `start`
    /// assert_eq!(uffd.continue_with(start, page, ContinueMode::empty())?, page as u64);
    /// assert_eq!(memory[0], 42);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// The example `minor` resolves faults so.
    ///
    /// Source:
    /// [`UFFDIO_CONTINUE(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_CONTINUE.2const.html).
    #[doc(alias = "UFFDIO_CONTINUE")]
    #[inline]
    pub fn continue_with(&self, start: *mut c_void, len: usize, mode: ContinueMode) -> Result<u64> {
        let mut arg = sys::uffdio_continue { range: range(start, len), mode: mode.bits(), mapped: 0 };
        let result = sys::r#continue(self.as_fd(), &mut arg);
        match outcome(result, arg.mapped) {
            Ok(done) => Ok(done as u64),
            Err(Stop { done, .. }) if done > 0 => Ok(done as u64),
            Err(Stop { errno, .. }) => Err(Error::SystemError(errno)),
        }
    }

    /// Poisons missing pages: any access to them raises SIGBUS, or is `EFAULT` from a system call. Wakes the
    /// threads that wait for them if `wake`. Returns the bytes poisoned.
    ///
    /// For content that is lost for good: a source that fails, memory with hardware errors. No event is
    /// delivered for a poisoned page. Poison survives [`unregister`](Uffd::unregister); madvise(2) with
    /// `MADV_DONTNEED`, or a copy or continue over it, on shared memory also zeros, ends it. `si_code` is
    /// `BUS_MCEERR_AR` on kernels with `CONFIG_MEMORY_FAILURE`, `BUS_ADRERR` on others.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size, of the huge page size on hugetlb memory.
    /// One call must stay inside one mapping.
    ///
    /// Since Linux 6.6: [`FeatureFlags::POISON`](crate::FeatureFlags::POISON).
    ///
    /// # Errors
    ///
    /// [`Stopped`](Error::Stopped), with the bytes done and
    ///
    /// - `EAGAIN`: the memory layout is changing, or a later page can't be poisoned (the call for the rest
    ///   tells why).
    /// - `EEXIST`: something is there: a page, a marker.
    /// - `ENOENT`: the range isn't mapped, isn't registered, or crosses the end of a mapping.
    /// - `EINVAL`: unaligned, empty, beyond the address space; memory that can't be poisoned; before 6.6.
    /// - `EFAULT`: the end of the file lies before the page. (Of huge pages that isn't asked.)
    /// - `ENOMEM`: no memory.
    /// - `ESRCH`: the process of the range is gone.
    ///
    /// # Safety
    ///
    /// The caller must make sure that no reference into the pages is used any more as if it led to memory, or
    /// that the process may die of SIGBUS.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{Errno, FeatureFlags, Support, UffdBuilder};
    ///
    /// if !Support::probe()?.features().contains(FeatureFlags::POISON) {
    ///     return Ok(()); // before Linux 6.6
    /// }
    /// let page = userfaultfd::page_size();
    /// let mut memory = memmap2::MmapMut::map_anon(page)?;
    /// let start = memory.as_mut_ptr().cast();
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register(start, page)?;
    /// // SAFETY: nothing accesses the memory any more.
    /// assert_eq!(unsafe { uffd.poison(start, page, true)? }, page);
    /// // SAFETY: as above.
    /// let again = unsafe { uffd.poison(start, page, true) };
    /// assert_eq!(again.unwrap_err().errno(), Some(Errno::EEXIST));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// The example `poison` shows what an access meets.
    ///
    /// Source: [`UFFDIO_POISON(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_POISON.2const.html).
    #[doc(alias = "UFFDIO_POISON")]
    #[inline]
    pub unsafe fn poison(&self, start: *mut c_void, len: usize, wake: bool) -> Result<usize> {
        let mode = if wake { 0 } else { sys::UFFDIO_POISON_MODE_DONTWAKE };
        let mut arg = sys::uffdio_poison { range: range(start, len), mode, updated: 0 };
        // SAFETY: the caller vouches for the range.
        let result = unsafe { sys::poison(self.as_fd(), &mut arg) };
        outcome(result, arg.updated).map_err(stopped(IoctlFlags::POISON))
    }

    /// Fills missing pages by moving others there, without a copy, and wakes the threads that wait for them. Returns the
    /// bytes moved.
    ///
    /// The source becomes a hole: zeros where it isn't registered, missing where it is. Write protection of
    /// the source is lost. On `EBUSY`, which can happen at any time, fall back to [`copy`](Self::copy).
    ///
    /// Source and destination are private anonymous memory of the calling process with the same protection,
    /// writable, both or neither locked; the destination is registered with this userfaultfd, the source need
    /// not be. `src`, `dst` and `len`, in bytes, are multiples of the page size; each range lies inside one
    /// mapping.
    ///
    /// Since Linux 6.8: [`FeatureFlags::MOVE`](crate::FeatureFlags::MOVE).
    ///
    /// # Errors
    ///
    /// [`Stopped`](Error::Stopped), with the bytes done and
    ///
    /// - `EAGAIN`: the memory layout is changing, or a later page can't be moved (the call for the rest tells
    ///   why).
    /// - `EBUSY`: a source page is shared with a child (also after its death, until written again), pinned,
    ///   or part of a large folio that can't be split. madvise(2) with `MADV_DONTFORK` keeps children out.
    /// - `EEXIST`: something is at the destination: a page, a marker; `src` is `dst`. Linux 6.18 may also return it, with 0
    ///   bytes done, **after it has moved** a page out of a transparent huge page. To tell one from the other, move the
    ///   page back: that succeeds if it had been moved, and is `EEXIST` if the source still has it.
    /// - `ENOENT`: the source has a hole, and [`MoveMode::ALLOW_SRC_HOLES`] isn't set; a range isn't mapped.
    /// - `EINVAL`: one of the rules above is broken, also where the process of the userfaultfd is another,
    ///   alive or gone; unaligned, empty; before 6.8.
    /// - `ENOMEM`: no memory.
    ///
    /// # Safety
    ///
    /// The caller must make sure that
    ///
    /// - no reference into the source is alive: its content is gone afterwards.
    /// - every holder of a reference into the missing pages expects there what is moved: the content is
    ///   valid for its type.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{FeatureFlags, MoveMode, Support, UffdBuilder};
    ///
    /// if !Support::probe()?.features().contains(FeatureFlags::MOVE) {
    ///     return Ok(()); // before Linux 6.8
    /// }
    /// let page = userfaultfd::page_size();
    /// let mut memory = memmap2::MmapMut::map_anon(page)?;
    /// let mut staging = memmap2::MmapMut::map_anon(page)?;
    /// staging.fill(42);
    /// let (src, dst) = (staging.as_mut_ptr().cast(), memory.as_mut_ptr().cast());
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register(dst, page)?;
    /// // SAFETY: nothing refers to the staging page's content, and any bytes are good for `memory`.
    /// assert_eq!(unsafe { uffd.move_pages(src, dst, page, MoveMode::empty())? }, page);
    /// assert_eq!((memory[0], staging[0]), (42, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source: [`UFFDIO_MOVE(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_MOVE.2const.html).
    #[doc(alias = "UFFDIO_MOVE")]
    #[inline]
    pub unsafe fn move_pages(
        &self,
        src: *mut c_void,
        dst: *mut c_void,
        len: usize,
        mode: MoveMode,
    ) -> Result<usize> {
        let mut arg = sys::uffdio_move {
            dst: address(dst),
            src: address(src),
            len: len as u64,
            mode: mode.bits(),
            move_: 0,
        };
        // SAFETY: the caller vouches for both ranges.
        let result = unsafe { sys::move_pages(self.as_fd(), &mut arg) };
        outcome(result, arg.move_).map_err(stopped(IoctlFlags::MOVE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EAGAIN: i64 = libc::EAGAIN as i64;

    #[test]
    fn errno_or_untouched_field_is_no_progress() {
        crate::support::require!();
        for field in [0, -EAGAIN, -1, i64::MIN] {
            let stop = outcome(Err(Errno::EAGAIN), field);
            assert_eq!(stop, Err(Stop { done: 0, errno: Errno::EAGAIN }), "{field}");
        }
    }

    #[test]
    fn positive_field_counts_whether_or_not_call_failed() {
        crate::support::require!();
        assert_eq!(outcome(Ok(()), 8192), Ok(8192));
        assert_eq!(outcome(Err(Errno::EAGAIN), 4096), Err(Stop { done: 4096, errno: Errno::EAGAIN }));
        assert_eq!(outcome(Err(Errno::EINTR), 4096), Err(Stop { done: 4096, errno: Errno::EINTR }));
    }

    #[test]
    fn errno_is_the_call_s_and_not_the_field_s() {
        crate::support::require!();
        assert_eq!(outcome(Err(Errno::EFAULT), -EAGAIN), Err(Stop { done: 0, errno: Errno::EFAULT }));
    }
}
