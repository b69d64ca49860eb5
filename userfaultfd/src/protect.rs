//! Protection against writes and against any access, and its asynchronous modes.

use std::ffi::c_void;
use std::os::fd::AsFd;

use crate::uffd::range;
use crate::{Errno, Error, FeatureFlags, IoctlFlags, Result, Uffd, sys};

impl Uffd {
    /// Protects a range against writes: each write to it is delivered as
    /// [`FaultKind::WriteProtected`](crate::FaultKind::WriteProtected) from now on, until it is lifted.
    ///
    /// The range must be registered for [`WRITE_PROTECT`](crate::RegisterMode::WRITE_PROTECT), all its
    /// mappings; holes are skipped. No thread is woken. Reads don't fault. The protection is this mapping's own:
    /// writes through another mapping or the file aren't delivered. On private anonymous memory it does
    /// nothing to pages that were never touched, unless [`WP_UNPOPULATED`](FeatureFlags::WP_UNPOPULATED) is
    /// enabled. It is gone after `MADV_DONTNEED` on private anonymous memory, in a forked child without
    /// [`EVENT_FORK`](FeatureFlags::EVENT_FORK), and after mremap(2) without
    /// [`EVENT_REMAP`](FeatureFlags::EVENT_REMAP). On other memory it outlives the page, also where a hole is
    /// punched into the file. Swapping ends it nowhere.
    ///
    /// From Linux 5.19 to 6.3 a forked child without `EVENT_FORK` faults for ever, at full load, when it writes to a
    /// hugetlb page that was protected when it was forked. It can be killed.
    ///
    /// With [`WP_ASYNC`](FeatureFlags::WP_ASYNC) nothing is delivered: the kernel lifts the protection of a
    /// page when it is written, and [`pagemap`](crate::pagemap) tells which pages that were.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size, of the huge page size on hugetlb memory.
    ///
    /// Since Linux 5.7 on private anonymous memory; 5.19 on shared and hugetlb memory
    /// ([`WP_HUGETLBFS_SHMEM`](FeatureFlags::WP_HUGETLBFS_SHMEM)).
    ///
    /// # Errors
    ///
    /// [`Refused`](Error::Refused), which tells the reason, or [`SystemError`](Error::SystemError), where it can't be
    /// found or comes by itself, with
    ///
    /// - `EAGAIN`: the memory layout is changing. Read the pending events, then try again.
    /// - `ENOENT`: nothing is mapped, or a mapping in the range isn't registered for it. **Mappings before
    ///   that one are protected already.** Up to a kernel between 6.1 and 6.12 also that the range isn't one
    ///   mapping, with nothing protected.
    /// - `EINVAL`: unaligned, empty, beyond the address space; a kernel or CPU without it.
    /// - `ESRCH`: the process of the range is gone.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{Event, FaultKind, FeatureFlags, RegisterMode, Support, UffdBuilder};
    ///
    /// if !Support::probe()?.features().contains(FeatureFlags::PAGEFAULT_FLAG_WP) {
    ///     return Ok(()); // this architecture doesn't have it
    /// }
    /// let page = userfaultfd::page_size();
    /// let mut memory = memmap2::MmapMut::map_anon(page)?;
    /// memory[0] = 1;
    /// let start = memory.as_mut_ptr().cast();
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register_with_mode(start, page, RegisterMode::WRITE_PROTECT)?;
    /// uffd.write_protect(start, page)?;
    /// assert_eq!(memory[0], 1); // reading is free
    ///
    /// std::thread::scope(|scope| -> userfaultfd::Result<()> {
    ///     scope.spawn(|| memory[0] = 2); // waits
    ///     if let Some(Event::Pagefault { kind, .. }) = uffd.read_event()? {
    ///         assert_eq!(kind, FaultKind::WriteProtected);
    ///         uffd.remove_write_protection(start, page, true)?;
    ///     }
    ///     Ok(())
    /// })?;
    /// assert_eq!(memory[0], 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source:
    /// [`UFFDIO_WRITEPROTECT(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_WRITEPROTECT.2const.html).
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    #[inline]
    pub fn write_protect(&self, start: *mut c_void, len: usize) -> Result<()> {
        self.write_protect_unexplained(start, len)
            .map_err(|error| self.explained(error, IoctlFlags::WRITE_PROTECT, start, len, None))
    }

    /// The same, for callers that know what to do about a refusal.
    #[inline]
    pub(crate) fn write_protect_unexplained(&self, start: *mut c_void, len: usize) -> Result<()> {
        self.set_write_protection(start, len, sys::UFFDIO_WRITEPROTECT_MODE_WP)
    }

    /// Whether the kernel knows of a change of the layout that isn't read yet, or whose thread hasn't run since.
    #[cfg(any(feature = "pager", feature = "snapshot"))]
    pub(crate) fn is_layout_changing(&self) -> bool {
        // It says so before it says that an empty range is none.
        self.write_protect_unexplained(std::ptr::null_mut(), 0).is_err_and(|error| error.is_retryable())
    }

    /// Lifts the protection of [`write_protect`](Self::write_protect), and wakes the waiting threads if `wake`.
    ///
    /// A thread may be on its way into the fault at that moment, and wait after the protection was lifted: resolve each
    /// fault that is read, also on a page whose protection was lifted already.
    ///
    /// # Errors
    ///
    /// As [`write_protect`](Self::write_protect), always as [`SystemError`](Error::SystemError), since this is for
    /// handlers of faults; [`explain`](Self::explain) tells the reason.
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    #[inline]
    pub fn remove_write_protection(&self, start: *mut c_void, len: usize, wake: bool) -> Result<()> {
        let mode = if wake { 0 } else { sys::UFFDIO_WRITEPROTECT_MODE_DONTWAKE };
        self.set_write_protection(start, len, mode)
    }

    #[inline]
    fn set_write_protection(&self, start: *mut c_void, len: usize, mode: u64) -> Result<()> {
        let mut arg = sys::uffdio_writeprotect { range: range(start, len), mode };
        Ok(sys::write_protect(self.as_fd(), &mut arg)?)
    }

    /// Protects the pages of a range against any access: each access is delivered as
    /// [`FaultKind::ReadWriteProtected`](crate::FaultKind::ReadWriteProtected) from now on, until it is
    /// lifted.
    ///
    /// The range must be registered for [`READ_WRITE_PROTECT`](crate::RegisterMode::READ_WRITE_PROTECT). Only
    /// pages that are present are protected; missing ones fault as before (register for `MISSING`, too).
    /// Dropping or truncating pages ends it, and so does reclaim of shared memory; anonymous pages keep it
    /// when they are swapped out.
    ///
    /// With [`RWP_ASYNC`](FeatureFlags::RWP_ASYNC) nothing is delivered: the kernel lifts the protection of a
    /// page when it is accessed, and [`pagemap`](crate::pagemap) tells which pages that were.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size, of the huge page size on hugetlb memory.
    ///
    /// Since Linux 7.3: [`FeatureFlags::RWP`].
    ///
    /// # Errors
    ///
    /// [`Refused`](Error::Refused), which tells the reason, or [`SystemError`](Error::SystemError), where it can't be
    /// found or comes by itself, with
    ///
    /// - `EAGAIN`: the memory layout is changing. Read the pending events, then try again.
    /// - `ENOENT`: nothing is mapped, or a mapping in the range isn't registered for it. Nothing is changed
    ///   then.
    /// - `EINVAL`: unaligned, empty, beyond the address space; before 7.3.
    /// - `ESRCH`: the process of the range is gone.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{FeatureFlags, RegisterMode, Support, UffdBuilder};
    ///
    /// if Support::probe()?.features().contains(FeatureFlags::RWP) {
    ///     let mut memory = memmap2::MmapMut::map_anon(65536)?;
    ///     memory.fill(1);
    ///     let (start, len) = (memory.as_mut_ptr().cast(), memory.len());
    ///     let uffd = UffdBuilder::new().require_features(FeatureFlags::RWP).create()?;
    ///     uffd.register_with_mode(start, len, RegisterMode::READ_WRITE_PROTECT)?;
    ///     uffd.read_write_protect(start, len)?;
    ///     uffd.remove_read_write_protection(start, len, true)?;
    ///     assert_eq!(memory[0], 1);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source:
    /// [`UFFDIO_RWPROTECT(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_RWPROTECT.2const.html).
    #[doc(alias = "UFFDIO_RWPROTECT")]
    #[inline]
    pub fn read_write_protect(&self, start: *mut c_void, len: usize) -> Result<()> {
        self.read_write_protect_unexplained(start, len)
            .map_err(|error| self.explained(error, IoctlFlags::READ_WRITE_PROTECT, start, len, None))
    }

    /// The same, for callers that know what to do about a refusal.
    #[inline]
    pub(crate) fn read_write_protect_unexplained(&self, start: *mut c_void, len: usize) -> Result<()> {
        self.set_read_write_protection(start, len, sys::UFFDIO_RWPROTECT_MODE_RWP)
    }

    /// Lifts the protection of [`read_write_protect`](Self::read_write_protect), and wakes the waiting threads if `wake`.
    ///
    /// # Errors
    ///
    /// As [`read_write_protect`](Self::read_write_protect), always as [`SystemError`](Error::SystemError), since this
    /// is for handlers of faults; [`explain`](Self::explain) tells the reason.
    #[doc(alias = "UFFDIO_RWPROTECT")]
    #[inline]
    pub fn remove_read_write_protection(&self, start: *mut c_void, len: usize, wake: bool) -> Result<()> {
        let mode = if wake { 0 } else { sys::UFFDIO_RWPROTECT_MODE_DONTWAKE };
        self.set_read_write_protection(start, len, mode)
    }

    #[inline]
    fn set_read_write_protection(&self, start: *mut c_void, len: usize, mode: u64) -> Result<()> {
        let mut arg = sys::uffdio_rwprotect { range: range(start, len), mode };
        Ok(sys::read_write_protect(self.as_fd(), &mut arg)?)
    }

    /// Switches asynchronous modes on (`enable`) and off (`disable`) at run time.
    ///
    /// The kernel has one such mode: [`FeatureFlags::RWP_ASYNC`]. Switching it on wakes every thread that waits on this
    /// userfaultfd; the threads repeat their access.
    ///
    /// Since Linux 7.3.
    ///
    /// # Errors
    ///
    /// [`UnsupportedIoctls`](Error::UnsupportedIoctls) before Linux 7.3. [`SystemError`](Error::SystemError)
    /// with
    ///
    /// - `EINVAL`: another feature than `RWP_ASYNC`; the same one in both; switching on without
    ///   [`FeatureFlags::RWP`].
    /// - `ESRCH`: the process of the userfaultfd is gone.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{Error, FeatureFlags, UffdBuilder};
    ///
    /// let uffd = UffdBuilder::new().request_features(FeatureFlags::RWP).create()?;
    /// match uffd.set_async(FeatureFlags::RWP_ASYNC, FeatureFlags::empty()) {
    ///     Ok(()) => println!("accesses are noted and not delivered"),
    ///     Err(Error::UnsupportedIoctls(_)) => println!("this takes Linux 7.3"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// Source:
    /// [`UFFDIO_SET_MODE(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_SET_MODE.2const.html).
    #[doc(alias = "UFFDIO_SET_MODE")]
    pub fn set_async(&self, enable: FeatureFlags, disable: FeatureFlags) -> Result<()> {
        let mut arg = sys::uffdio_set_mode { enable: enable.bits(), disable: disable.bits() };
        sys::set_mode(self.as_fd(), &mut arg).map_err(|errno| match errno {
            // What a kernel without the operation answers, too.
            Errno::EINVAL if !self.ioctls().contains(IoctlFlags::SET_MODE) => {
                Error::UnsupportedIoctls(self.ioctls())
            }
            Errno::EINVAL => {
                let (both, either) = (enable & disable, enable | disable);
                match either.difference(FeatureFlags::RWP_ASYNC) | both {
                    wrong if !wrong.is_empty() => Error::NotSwitchable(wrong),
                    _ => Error::FeatureNeeds { feature: FeatureFlags::RWP_ASYNC, needs: FeatureFlags::RWP },
                }
            }
            errno => Error::SystemError(errno),
        })
    }
}
