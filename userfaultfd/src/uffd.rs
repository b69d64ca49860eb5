//! [`Uffd`]: the descriptor, registering ranges, and reading events.

use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use crate::error::errno_of;
use crate::event::{self, Event, EventBuffer, Message};
use crate::proc_maps::{self, Process};
use crate::refusal::Refusal;
use crate::refusal::examine::{self, Request};
use crate::{Errno, Error, FeatureFlags, IoctlFlags, Pid, RegisterMode, Result, Support, sys};

/// A userfaultfd: a descriptor through which page faults of one address space are delivered and resolved.
///
/// Create one with [`UffdBuilder`](crate::UffdBuilder), or adopt one: `Uffd::from` takes a descriptor that
/// another process has sent or a parent has left. A userfaultfd belongs to the address space of the process that
/// created it, wherever it is passed to. All methods take `&self` and can be called from any thread.
///
/// ```
/// use std::os::fd::OwnedFd;
/// use userfaultfd::{Uffd, UffdBuilder};
///
/// let fd: OwnedFd = UffdBuilder::new().create()?.into(); // to be sent over a Unix socket, say
/// let uffd = Uffd::from(fd);
/// # Ok::<(), userfaultfd::Error>(())
/// ```
///
/// # Closing
///
/// When the last descriptor of a userfaultfd is closed, also by the death of its process, the kernel unregisters all
/// its ranges and every waiting thread goes on: **missing pages then read as zeros**, without any error. Before you
/// close it, fill the missing pages, [`poison`](Uffd::poison) them, or hand the descriptor over.
pub struct Uffd {
    fd: OwnedFd,
    terms: Terms,
}

/// What is known about a descriptor beside its number. A fork's child inherits it.
///
/// No `Option` is in it: the compiler would keep the kind of an [`Event`] in the unused values of that, and telling
/// events apart would take twice the time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Terms {
    features: FeatureFlags,
    /// Empty for an adopted descriptor, never otherwise.
    ioctls: IoctlFlags,
    /// What every registration has to offer.
    pub(crate) range_ioctls: IoctlFlags,
    /// The process whose memory it is for: the one that made it, or the one that the caller named; 0 where it isn't known.
    process: u32,
}

impl Terms {
    /// With features enabled, operations of the descriptor, and what every registration has to offer.
    pub(crate) fn negotiated(support: Support, range_ioctls: IoctlFlags) -> Self {
        Self { features: support.features, ioctls: support.ioctls, range_ioctls, process: 0 }
    }

    /// The same, for a descriptor that this process has just made.
    pub(crate) fn made_here(self) -> Self {
        Self { process: std::process::id(), ..self }
    }

    /// Those of a child's descriptor.
    #[inline]
    pub(crate) fn of_child(self) -> Self {
        Self { process: 0, ..self }
    }

    /// Features enabled and operations of the descriptor; `None` for an adopted one, where the kernel is asked.
    #[inline]
    pub(crate) fn support(&self) -> Option<Support> {
        let Self { features, ioctls, .. } = *self;
        (!ioctls.is_empty()).then_some(Support { features, ioctls })
    }
}

/// An address as the kernel takes it.
#[inline]
pub(crate) fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// A range as the kernel takes it.
#[inline]
pub(crate) fn range(start: *mut c_void, len: usize) -> sys::uffdio_range {
    sys::uffdio_range { start: address(start), len: len as u64 }
}

impl Uffd {
    pub(crate) fn new(fd: OwnedFd, terms: Terms) -> Self {
        Self { fd, terms }
    }

    /// The same, which this process has just made.
    pub(crate) fn made_here(self) -> Self {
        Self { terms: self.terms.made_here(), ..self }
    }

    /// Returns the enabled features: the required ones, and those of the requested ones that the kernel has. For an
    /// adopted descriptor they are read from `/proc/self/fdinfo`; without `/proc` the result is empty.
    ///
    /// Later switches by [`set_async`](Self::set_async) don't show here. [`Support::probe`] returns what the kernel
    /// offers.
    ///
    /// ```
    /// use userfaultfd::{FeatureFlags, UffdBuilder};
    ///
    /// let uffd = UffdBuilder::new().request_features(FeatureFlags::THREAD_ID).create()?;
    /// assert!(uffd.features().contains(FeatureFlags::THREAD_ID));
    /// assert!(!uffd.features().contains(FeatureFlags::SIGBUS)); // the kernel has it, but it wasn't requested
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    #[must_use]
    pub fn features(&self) -> FeatureFlags {
        self.negotiated().features
    }

    /// Returns the operations of the descriptor (API, REGISTER, UNREGISTER, SET_MODE) that this kernel has.
    /// [`register_with_mode`](Self::register_with_mode) returns those of a range.
    ///
    /// ```
    /// use userfaultfd::{IoctlFlags, UffdBuilder};
    ///
    /// let uffd = UffdBuilder::new().create()?;
    /// assert!(uffd.ioctls().contains(IoctlFlags::REGISTER | IoctlFlags::UNREGISTER));
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    #[must_use]
    pub fn ioctls(&self) -> IoctlFlags {
        self.negotiated().ioctls
    }

    fn negotiated(&self) -> Support {
        self.terms.support().unwrap_or_else(|| {
            proc_maps::fdinfo(self.as_raw_fd(), b"API:", parse_api)
                .unwrap_or(Support { features: FeatureFlags::empty(), ioctls: IoctlFlags::empty() })
        })
    }

    /// Whether the descriptor is for memory of this process, where that can be told.
    pub(crate) fn is_own(&self) -> Option<bool> {
        if self.terms.process == std::process::id() {
            return Some(true);
        }
        let can_move = Support::probe().ok()?.features().contains(FeatureFlags::MOVE);
        if can_move { sys::is_of_this_process(self.as_fd()) } else { None }
    }

    /// Whose memory it is for, if that is known.
    pub(crate) fn process(&self) -> Option<Process> {
        let named = i32::try_from(self.terms.process).ok().filter(|pid| *pid > 0);
        match self.is_own() {
            Some(true) => Some(Process::Own),
            // In a fork's child that is its parent, which made it.
            _ => named.map(|pid| Process::Other(Pid::from_raw(pid))),
        }
    }

    /// Sets the id of the process that has the descriptor's memory, so that errors can give the reason. Nothing else depends on it.
    ///
    /// A userfaultfd doesn't tell whose it is. So the kernel's refusals on a descriptor that came from another process have
    /// a reason only where it lies in the arguments, until the process is named here. From then on
    /// [`register_with_mode`](Self::register_with_mode), the other operations that [`explain`](Self::explain) lists, and a
    /// [`Pager`](crate::pager::Pager) that serves the descriptor look at `/proc/PID/smaps` after a failure, and return
    /// [`Error::Refused`]. That takes the right to read the process's memory by ptrace(2); without it errors stay as they
    /// were. [`Pager::watch`](crate::pager::Pager::watch) learns the process from its pidfd.
    ///
    /// ```no_run
    /// use userfaultfd::{Pid, Uffd};
    ///
    /// # fn receive() -> (std::os::fd::OwnedFd, i32, *mut std::ffi::c_void, usize) { unimplemented!() }
    /// let (descriptor, pid, start, len) = receive();
    /// let mut uffd = Uffd::from(descriptor);
    /// uffd.set_process(Pid::from_raw(pid));
    /// if let Err(error) = uffd.register(start, len) {
    ///     println!("{error}"); // … 0x7f…000..0x7f…000 is registered with another userfaultfd, for MISSING
    /// }
    /// ```
    pub fn set_process(&mut self, pid: Pid) {
        self.terms.process = u32::try_from(pid.as_raw()).unwrap_or(0);
    }

    /// Duplicates the descriptor; the duplicate is closed on exec. Each event goes to the first descriptor that reads it.
    ///
    /// # Errors
    ///
    /// [`SystemError`](Error::SystemError) with `EMFILE`: no more descriptors.
    ///
    /// ```
    /// let uffd = userfaultfd::UffdBuilder::new().create()?;
    /// let another = uffd.try_clone()?;
    /// drop(uffd); // registered ranges stay so: `another` keeps the userfaultfd open
    /// # drop(another);
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    #[doc(alias = "dup")]
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().map_err(|error| Error::SystemError(errno_of(&error)))?;
        Ok(Self { fd, terms: self.terms })
    }

    /// Returns whether reading returns at once when there is no event: see [`set_nonblocking`](Self::set_nonblocking),
    /// which other owners of the description may also have called.
    ///
    /// # Errors
    ///
    /// [`SystemError`](Error::SystemError), which doesn't happen on an open descriptor.
    ///
    /// ```
    /// let uffd = userfaultfd::UffdBuilder::new().non_blocking(true).create()?;
    /// assert!(uffd.is_nonblocking()?);
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    pub fn is_nonblocking(&self) -> Result<bool> {
        Ok(sys::is_nonblocking(self.as_fd())?)
    }

    /// Sets whether reading returns at once when there is no event, as [`UffdBuilder::non_blocking`](crate::UffdBuilder::non_blocking)
    /// does, for every descriptor that shares this one's description: duplicates and passed ones.
    ///
    /// # Errors
    ///
    /// [`SystemError`](Error::SystemError), which doesn't happen on a userfaultfd.
    ///
    /// ```
    /// let uffd = userfaultfd::UffdBuilder::new().create()?;
    /// uffd.set_nonblocking(true)?;
    /// assert!(uffd.read_event()?.is_none()); // doesn't wait
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    #[doc(alias = "O_NONBLOCK")]
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<()> {
        Ok(sys::set_nonblocking(self.as_fd(), nonblocking)?)
    }

    /// Registers a range for missing faults: [`register_with_mode`](Self::register_with_mode) with
    /// [`RegisterMode::MISSING`].
    ///
    /// # Errors
    ///
    /// As [`register_with_mode`](Self::register_with_mode).
    #[doc(alias = "UFFDIO_REGISTER")]
    pub fn register(&self, start: *mut c_void, len: usize) -> Result<IoctlFlags> {
        self.register_with_mode(start, len, RegisterMode::MISSING)
    }

    /// Registers a range, so that its faults are delivered, and returns the operations that the range accepts.
    ///
    /// The range may span mappings and holes; the mappings that are there now are registered, memory mapped
    /// into a hole later isn't. Pages that are present, or swapped out, stay so and raise no missing fault. The
    /// kernel splits mappings at the ends of the range, turns off transparent huge pages and fault-around on it, and grows
    /// the registration with a mapping that mremap(2) grows in place.
    ///
    /// **Registering again replaces the modes, it doesn't add to them**: a range registered for `MISSING` and
    /// then for `WRITE_PROTECT` is registered for `WRITE_PROTECT` alone. Asking for fewer modes than before
    /// may silently change nothing, though the returned operations are those of the smaller set; since Linux
    /// 7.3 dropping a protection mode is `EBUSY`. This library keeps no record, so always pass all modes that the range
    /// must have.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size; of the huge page size on hugetlb memory.
    ///
    /// Since Linux 4.3; the modes since the releases given at [`RegisterMode`].
    ///
    /// # Errors
    ///
    /// [`UnsupportedIoctls`](Error::UnsupportedIoctls) if the range lacks an operation that
    /// [`require_ioctls`](crate::UffdBuilder::require_ioctls) asked for: the range is unregistered then,
    /// whatever it was before. [`Refused`](Error::Refused), which tells the reason, or
    /// [`SystemError`](Error::SystemError), where it can't be found, with
    ///
    /// - `EINVAL`: the range is empty, unaligned or beyond the address space; nothing is mapped there; a
    ///   mapping in it is of a kind that can't have this mode (files, `MINOR` on private anonymous memory);
    ///   no mode, a mode unknown to this kernel or CPU, `READ_WRITE_PROTECT` without its feature or together
    ///   with `WRITE_PROTECT`. Nothing is registered then.
    /// - `EPERM`: a shared mapping of a file that was opened read-only or sealed against writing.
    /// - `EBUSY`: another userfaultfd has registered a part; Linux 7.3: a protection mode would be dropped.
    /// - `ENOMEM`, always as `SystemError`: the process of the range is gone; or the limit of mappings is reached
    ///   (`vm.max_map_count`), with a first part of the range perhaps registered.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{IoctlFlags, RegisterMode, UffdBuilder};
    ///
    /// let mut memory = memmap2::MmapMut::map_anon(1 << 20)?;
    /// let uffd = UffdBuilder::new().create()?;
    /// let ioctls = uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), RegisterMode::MISSING)?;
    /// assert!(ioctls.contains(IoctlFlags::COPY | IoctlFlags::ZEROPAGE));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source:
    /// [`UFFDIO_REGISTER(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_REGISTER.2const.html).
    #[doc(alias = "UFFDIO_REGISTER")]
    pub fn register_with_mode(
        &self,
        start: *mut c_void,
        len: usize,
        mode: RegisterMode,
    ) -> Result<IoctlFlags> {
        let registered = self.register_unexplained(start, len, mode);
        registered.map_err(|error| self.explained(error, IoctlFlags::REGISTER, start, len, Some(mode)))
    }

    /// The same, where the process that has the memory may be known from elsewhere.
    #[cfg(any(feature = "pager", feature = "tracking", feature = "snapshot"))]
    pub(crate) fn register_in(
        &self,
        process: Option<Process>,
        start: *mut c_void,
        len: usize,
        mode: RegisterMode,
    ) -> Result<IoctlFlags> {
        self.register_unexplained(start, len, mode).map_err(|error| {
            let request = Request::new(IoctlFlags::REGISTER, start, len, Some(mode));
            examine::explained_whole(self, error, &request, || process.or_else(|| self.process()))
        })
    }

    /// The same, for callers that know what to do about a refusal.
    pub(crate) fn register_unexplained(
        &self,
        start: *mut c_void,
        len: usize,
        mode: RegisterMode,
    ) -> Result<IoctlFlags> {
        let mut arg = sys::uffdio_register { range: range(start, len), mode: mode.bits(), ioctls: 0 };
        sys::register(self.as_fd(), &mut arg)?;
        let ioctls = IoctlFlags::from_bits_retain(arg.ioctls);
        if !ioctls.contains(self.terms.range_ioctls) {
            self.unregister_unexplained(start, len)?;
            return Err(Error::UnsupportedIoctls(ioctls));
        }
        Ok(ioctls)
    }

    /// With the reason, if it can be found.
    #[cold]
    pub(crate) fn explained(
        &self,
        error: Error,
        ioctl: IoctlFlags,
        start: *mut c_void,
        len: usize,
        modes: Option<RegisterMode>,
    ) -> Error {
        examine::explained(self, error, &Request::new(ioctl, start, len, modes), || self.process())
    }

    /// Unregisters a range, and wakes every thread that waits there. The kernel resolves later faults itself.
    ///
    /// The kernel itself wakes only waiters of missing faults here; this method wakes all of them, whether it
    /// succeeds or not. Missing pages read as zeros from now on. Protection is lifted; poison stays. Parts
    /// that aren't registered are skipped, so doing it twice is fine.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size; of the huge page size on hugetlb memory.
    ///
    /// Since Linux 4.3.
    ///
    /// # Errors
    ///
    /// [`Refused`](Error::Refused), which tells the reason, or [`SystemError`](Error::SystemError), where it can't be
    /// found, with
    ///
    /// - `EINVAL`: the range is empty, unaligned or beyond the address space; nothing is mapped there; a
    ///   mapping in it can't be registered at all; since a kernel between 6.12 and 6.18, another userfaultfd
    ///   has registered a part.
    /// - `ENOMEM`, always as `SystemError`: the process of the range is gone, or the limit of mappings is reached
    ///   (`vm.max_map_count`).
    ///
    /// # Examples
    ///
    /// ```
    /// let mut memory = memmap2::MmapMut::map_anon(1 << 20)?;
    /// let (start, len) = (memory.as_mut_ptr().cast(), memory.len());
    /// let uffd = userfaultfd::UffdBuilder::new().create()?;
    /// uffd.register(start, len)?;
    /// uffd.unregister(start, len)?;
    /// assert_eq!(memory[0], 0); // no fault is delivered any more
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source:
    /// [`UFFDIO_UNREGISTER(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_UNREGISTER.2const.html).
    #[doc(alias = "UFFDIO_UNREGISTER")]
    pub fn unregister(&self, start: *mut c_void, len: usize) -> Result<()> {
        self.unregister_unexplained(start, len)
            .map_err(|error| self.explained(error, IoctlFlags::UNREGISTER, start, len, None))
    }

    /// The same, for callers that know what to do about a refusal.
    pub(crate) fn unregister_unexplained(&self, start: *mut c_void, len: usize) -> Result<()> {
        let unregistered = sys::unregister(self.as_fd(), &mut range(start, len));
        // Waiters of WP, MINOR and RWP faults would sleep on; so would those of a half-done ENOMEM.
        let woken = sys::wake(self.as_fd(), &mut range(start, len));
        Ok(unregistered.and(woken)?)
    }

    /// Wakes every thread that waits for a fault in the range. The threads repeat their access.
    ///
    /// Use it after fills that don't wake, and after `EEXIST`, where another fill has done the work. Only waiters of this
    /// userfaultfd are woken. A thread whose fault isn't resolved faults again, with a new event.
    ///
    /// `start` and `len`, in bytes, are multiples of the page size. The range need be neither registered nor
    /// mapped.
    ///
    /// Since Linux 4.3.
    ///
    /// # Errors
    ///
    /// [`SystemError`](Error::SystemError) with `EINVAL`: the range is empty, unaligned or beyond the address
    /// space.
    ///
    /// # Examples
    ///
    /// ```
    /// # let mut memory = memmap2::MmapMut::map_anon(1 << 20)?;
    /// # let (start, len) = (memory.as_mut_ptr().cast(), memory.len());
    /// # let uffd = userfaultfd::UffdBuilder::new().create()?;
    /// # uffd.register(start, len)?;
    /// // SAFETY: nothing refers to the memory yet.
    /// unsafe { uffd.zeropage(start, len, false)? };
    /// uffd.wake(start, len)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source: [`UFFDIO_WAKE(2const)`](https://man7.org/linux/man-pages/man2/UFFDIO_WAKE.2const.html).
    #[doc(alias = "UFFDIO_WAKE")]
    #[inline]
    pub fn wake(&self, start: *mut c_void, len: usize) -> Result<()> {
        Ok(sys::wake(self.as_fd(), &mut range(start, len))?)
    }

    /// Examines why an operation on a range of memory failed, and returns the reason if it can be found: the
    /// part of the range, the memory there, and what would work.
    ///
    /// [`register_with_mode`](Self::register_with_mode), [`unregister`](Self::unregister),
    /// [`write_protect`](Self::write_protect) and [`read_write_protect`](Self::read_write_protect) do so themselves, and
    /// return [`Error::Refused`]. Operations that resolve faults (fills, wakes, lifting protection) don't, since their
    /// refusals are mostly part of normal work. For the others call this right after the failure, with the error, the
    /// operation and its range (for [`move_pages`](Self::move_pages) the destination).
    ///
    /// It reads `/proc/self/smaps`, whose time grows with the memory of the process, and probes the kernel's features with a
    /// descriptor that it opens and closes. For an adopted descriptor, which may belong to another process, it finds
    /// only reasons that need no look at mappings, unless the process is named by [`set_process`](Self::set_process) or
    /// [`explain_in`](Self::explain_in); that it is this process, the kernel tells since Linux 6.8.
    ///
    /// ```
    /// use userfaultfd::{IoctlFlags, Reason, UffdBuilder, page_size};
    ///
    /// let mut memory = memmap2::MmapMut::map_anon(page_size())?;
    /// let (start, len) = (memory.as_mut_ptr().cast(), memory.len());
    /// let uffd = UffdBuilder::new().create()?;
    /// // SAFETY: nothing refers to the memory yet.
    /// let error = unsafe { uffd.zeropage(start, len, true) }.unwrap_err();
    /// let refusal = uffd.explain(&error, IoctlFlags::ZEROPAGE, start, len).expect("a reason");
    /// assert_eq!(refusal.reason(), Reason::NotRegistered);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn explain(
        &self,
        error: &Error,
        ioctl: IoctlFlags,
        start: *mut c_void,
        len: usize,
    ) -> Option<Refusal> {
        examine::of(self, error, &Request::new(ioctl, start, len, None), || self.process())
    }

    /// Examines why an operation failed, like [`explain`](Self::explain), on memory of the process `pid`. Without the right
    /// to read that process's memory by ptrace(2), it finds only reasons that need no look at mappings.
    #[must_use]
    pub fn explain_in(
        &self,
        pid: Pid,
        error: &Error,
        ioctl: IoctlFlags,
        start: *mut c_void,
        len: usize,
    ) -> Option<Refusal> {
        let request = Request::new(ioctl, start, len, None);
        examine::of(self, error, &request, || Some(Process::Other(pid)))
    }

    /// Reads one event.
    ///
    /// On a blocking descriptor it waits for an event, and goes on waiting after signals. On a non-blocking one it returns
    /// `None` if there is no event, also if a fault that poll(2) has reported was resolved meanwhile.
    ///
    /// **Faults are delivered before other events**, whatever happened first: see "Events" in the [crate
    /// docs](crate). A message is delivered once, to one reader, and the faulting thread waits until it is
    /// resolved. The same address may be delivered several times: once for each thread that waits, once more
    /// after each wake without a resolution and after each signal that a waiting thread takes.
    ///
    /// # Errors
    ///
    /// - [`UnrecognizedEvent`](Error::UnrecognizedEvent): a kind of event that this crate doesn't know; or the descriptor is
    ///   something else, whose bytes begin so.
    /// - [`SystemError`](Error::SystemError) with `EINVAL`: the handshake isn't done. With `EMFILE` or
    ///   `ENFILE`: no descriptor is free for a fork event; it stays queued, so close some and read again.
    /// - [`NotUserfaultfd`](Error::NotUserfaultfd), [`IncompleteMsg`](Error::IncompleteMsg),
    ///   [`ReadEof`](Error::ReadEof): the descriptor is something else.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{Event, UffdBuilder};
    ///
    /// let page = 65536; // a multiple of every page size
    /// let mut memory = memmap2::MmapMut::map_anon(page)?;
    /// let start = memory.as_mut_ptr().cast();
    /// let uffd = UffdBuilder::new().create()?;
    /// uffd.register(start, page)?;
    /// std::thread::scope(|scope| -> userfaultfd::Result<()> {
    ///     scope.spawn(|| assert_eq!(memory[0], 0));
    ///     if let Some(Event::Pagefault { addr, .. }) = uffd.read_event()? {
    ///         assert_eq!(addr, start);
    ///         // SAFETY: zero is what the memory holds for all that refers to it.
    ///         unsafe { uffd.zeropage(start, page, true)? };
    ///     }
    ///     Ok(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Source: [`userfaultfd(2)`](https://man7.org/linux/man-pages/man2/userfaultfd.2.html).
    #[inline(always)]
    pub fn read_event(&self) -> Result<Option<Event>> {
        let mut message = [event::EMPTY];
        match self.read_messages(&mut message)? {
            0 => Ok(None),
            _ => event::claim(&message[0], &self.terms).map(Some),
        }
    }

    /// Reads one event, like [`read_event`](Self::read_event), but never waits: for event loops and async runtimes.
    ///
    /// # Errors
    ///
    /// [`Blocking`](Error::Blocking), with nothing read, on a descriptor that was made without
    /// [`non_blocking`](crate::UffdBuilder::non_blocking), or that another owner of its description has switched;
    /// else as [`read_event`](Self::read_event).
    ///
    /// ```
    /// use userfaultfd::{Error, UffdBuilder};
    ///
    /// let uffd = UffdBuilder::new().create()?;
    /// assert!(matches!(uffd.try_read_event(), Err(Error::Blocking))); // read_event would wait for ever
    /// uffd.set_nonblocking(true)?;
    /// assert!(uffd.try_read_event()?.is_none());
    /// # Ok::<(), Error>(())
    /// ```
    pub fn try_read_event(&self) -> Result<Option<Event>> {
        self.check_nonblocking()?;
        self.read_event()
    }

    /// Reads as many events as are queued and fit, like [`read_batch`](Self::read_batch), but never waits.
    ///
    /// # Errors
    ///
    /// [`Blocking`](Error::Blocking), as [`try_read_event`](Self::try_read_event); else as
    /// [`read_batch`](Self::read_batch).
    pub fn try_read_batch(&self, buf: &mut EventBuffer) -> Result<usize> {
        self.check_nonblocking()?;
        self.read_batch(buf)
    }

    pub(crate) fn check_nonblocking(&self) -> Result<()> {
        if self.is_nonblocking()? { Ok(()) } else { Err(Error::Blocking) }
    }

    /// Reads as many events as are queued and fit into the buffer, in one system call, and returns an iterator over them in
    /// the order of delivery.
    ///
    /// On a blocking descriptor it waits for the first event, and goes on waiting after signals; on a non-blocking one the
    /// iterator may be empty. An event that can't be decoded is an `Err` item; the items behind it are valid. Dropping the
    /// iterator early drops the remaining events, and closes the descriptors of forks among them;
    /// [`read_batch`](Self::read_batch) and [`EventBuffer::pop`] lose none.
    ///
    /// # Errors
    ///
    /// As [`read_event`](Self::read_event); also [`EmptyBuffer`](Error::EmptyBuffer).
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{EventBuffer, UffdBuilder};
    ///
    /// let uffd = UffdBuilder::new().non_blocking(true).create()?;
    /// let mut buffer = EventBuffer::new(64);
    /// for event in uffd.read_events(&mut buffer)? {
    ///     println!("{:?}", event?);
    /// }
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    #[inline]
    pub fn read_events<'a>(
        &self,
        buf: &'a mut EventBuffer,
    ) -> Result<impl Iterator<Item = Result<Event>> + use<'a>> {
        self.read_batch(buf)?;
        Ok(buf.drain())
    }

    /// Reads as many events as are queued and fit behind those that the buffer still holds, in one system call, and returns
    /// the number of events read. Take them out of the [`EventBuffer`] in the order of delivery or changes first.
    ///
    /// On a blocking descriptor it waits for the first event, and goes on waiting after signals; on a non-blocking one it
    /// returns 0 if there is none. It also returns 0, without a read, if the buffer is full.
    ///
    /// # Errors
    ///
    /// As [`read_event`](Self::read_event), except that an event of an unknown kind is an error when it is taken out; also
    /// [`EmptyBuffer`](Error::EmptyBuffer). The buffer keeps its events.
    ///
    /// # Examples
    ///
    /// ```
    /// use userfaultfd::{EventBuffer, UffdBuilder};
    ///
    /// let uffd = UffdBuilder::new().non_blocking(true).create()?;
    /// let mut buffer = EventBuffer::new(64);
    /// let read = uffd.read_batch(&mut buffer)?;
    /// assert_eq!(buffer.len(), read);
    /// buffer.changes_first();
    /// while let Some(event) = buffer.pop() {
    ///     println!("{:?}", event?); // leaving the loop here keeps the other events in the buffer
    /// }
    /// # Ok::<(), userfaultfd::Error>(())
    /// ```
    #[inline]
    pub fn read_batch(&self, buf: &mut EventBuffer) -> Result<usize> {
        buf.receive(self.terms, |messages| self.read_messages(messages))
    }

    /// Does the same, and never waits, also on a blocking descriptor: see [`sys::read_now`].
    #[cfg(feature = "pager")]
    #[inline]
    pub(crate) fn read_batch_now(&self, buf: &mut EventBuffer) -> Result<usize> {
        self.read_batch_via(buf, |messages, read| read(messages))
    }

    /// Does the same by `via`, which gets the room for events, and what reads them to any such room.
    #[cfg(feature = "pager")]
    #[inline]
    pub(crate) fn read_batch_via(
        &self,
        buf: &mut EventBuffer,
        via: impl FnOnce(&mut [Message], &dyn Fn(&mut [Message]) -> Result<usize>) -> Result<usize>,
    ) -> Result<usize> {
        buf.receive(self.terms, |messages| {
            via(messages, &|messages| {
                let read = sys::read_now(self.as_fd(), messages.as_flattened_mut());
                self.check_messages(read, messages)
            })
        })
    }

    #[inline]
    fn read_messages(&self, messages: &mut [Message]) -> Result<usize> {
        let read = sys::read(self.as_fd(), messages.as_flattened_mut());
        self.check_messages(read, messages)
    }

    /// Makes sure that descriptors in messages that were read are from the kernel.
    #[inline]
    fn check_messages(&self, read: Result<usize, Errno>, messages: &[Message]) -> Result<usize> {
        let read = match read {
            Ok(read) => read,
            Err(Errno::EAGAIN) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        };
        if self.terms.support().is_none() || read == 0 || read % size_of::<Message>() != 0 {
            self.verify(read, messages)?;
        }
        Ok(read / size_of::<Message>())
    }

    /// Makes sure that messages of this length may be from a userfaultfd.
    #[inline(never)]
    fn verify(&self, read: usize, messages: &[Message]) -> Result<()> {
        let expected = size_of::<Message>();
        match read % expected {
            _ if read == 0 => Err(Error::ReadEof),
            // A pipe can say anything, and a number in a forged fork message might be anybody's descriptor.
            0 if messages[..read / expected].iter().any(event::is_fork)
                && !sys::is_userfaultfd(self.as_fd()) =>
            {
                Err(Error::NotUserfaultfd)
            }
            0 => Ok(()),
            rest => Err(Error::IncompleteMsg { read: rest, expected }),
        }
    }
}

/// Reads `aa:<features>:<ioctls>`, what is behind `API:` in a userfaultfd's /proc/PID/fdinfo, all in hexadecimal. The
/// features are those enabled, with bit 31 set once the handshake is done; the ioctls are those of a descriptor and of
/// ranges together.
fn parse_api(api: &[u8]) -> Option<Support> {
    const INITIALIZED: u64 = 1 << 31;
    let mut fields = std::str::from_utf8(api).ok()?.trim().split(':');
    let mut next = || u64::from_str_radix(fields.next()?, 16).ok();
    let (_version, features, ioctls) = (next()?, next()?, next()?);
    Some(Support {
        features: FeatureFlags::from_bits_retain(features & !INITIALIZED),
        ioctls: IoctlFlags::from_bits_retain(ioctls & !sys::UFFD_API_RANGE_IOCTLS),
    })
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd").field("fd", &self.as_raw_fd()).field("features", &self.features()).finish()
    }
}

impl AsFd for Uffd {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Uffd {
    #[inline]
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl IntoRawFd for Uffd {
    /// The descriptor stays open and is the caller's to close.
    fn into_raw_fd(self) -> RawFd {
        self.fd.into_raw_fd()
    }
}

#[expect(unsafe_code, reason = "the trait is unsafe")]
impl FromRawFd for Uffd {
    /// Adopts a userfaultfd whose handshake is done.
    ///
    /// # Safety
    ///
    /// The caller must make sure that `fd` is open and that nothing else owns it.
    unsafe fn from_raw_fd(fd: RawFd) -> Self {
        // SAFETY: the caller's promise is that of OwnedFd::from_raw_fd.
        Self::from(unsafe { sys::own(fd) })
    }
}

impl From<OwnedFd> for Uffd {
    /// Adopts a userfaultfd whose handshake is done: one received over a Unix socket, inherited, or fetched
    /// with pidfd_getfd(2). Use [`UffdBuilder::handshake`](crate::UffdBuilder::handshake) if it isn't done. Operations on a
    /// descriptor of another kind fail.
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd, Terms::default())
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_shows_enabled_features() {
        crate::support::require!();
        let support = parse_api(b"\taa:80010100:80000000000005ff").unwrap();
        assert_eq!(support.features, FeatureFlags::MOVE | FeatureFlags::THREAD_ID);
        assert_eq!(support.ioctls, IoctlFlags::OF_DESCRIPTOR);
        for broken in [&b""[..], b"\taa", b"\taa:zz:0", b"\xff:0:0"] {
            assert_eq!(parse_api(broken), None, "{broken:?}");
        }
    }
}
