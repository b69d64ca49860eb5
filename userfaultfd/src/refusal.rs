//! Why the kernel refused an operation: looked into once it has happened.
//!
//! The kernel answers with an errno, and one errno has many reasons. What is known without asking comes first (shape of
//! the range, modes, features), then what `/proc` tells of the mappings. Nothing here is on the way of an operation that
//! succeeds, and nothing allocates: the caller may handle the events of a fork, whose thread holds the allocator's locks
//! until its event is read.
//!
//! The layout may have changed since the refusal, and `/proc` doesn't tell whose registration a mapping has. So only what
//! explains the errno is told, and [`find`] answers with nothing rather than with a guess.

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::os::fd::AsFd;

use crate::holder::{self, Holder};
use crate::proc_maps::{Entry, Process, Source};
use crate::{Errno, Error, FeatureFlags, IoctlFlags, RegisterMode, Support, Uffd, page_size, sys};

/// Why the kernel refused an operation, and which part of the range the reason is about.
///
/// `Display` tells both, and what would work instead. From [`Error::Refused`](crate::Error::Refused), and from
/// [`Uffd::explain`] for the errors of operations that handle faults.
///
/// ```
/// use userfaultfd::{Errno, Error, MemoryKind, Reason, RegisterMode, UffdBuilder};
///
/// let mut memory = memmap2::MmapMut::map_anon(1 << 20)?;
/// let uffd = UffdBuilder::new().create()?;
/// let error = uffd
///     .register_with_mode(memory.as_mut_ptr().cast(), memory.len(), RegisterMode::MINOR)
///     .unwrap_err();
/// assert_eq!(error.errno(), Some(Errno::EINVAL));
/// println!("{error}"); // … private anonymous memory has no page cache …
/// # if !userfaultfd::Support::probe()?.features().contains(userfaultfd::FeatureFlags::MINOR_SHMEM) { return Ok(()) }
/// let Error::Refused { refusal, .. } = error else { panic!("{error:?}") };
/// let Reason::WrongMemory { memory, .. } = refusal.reason() else { panic!("{refusal:?}") };
/// assert_eq!(memory, MemoryKind::Anonymous);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    // A `Range` can't be copied.
    start: usize,
    end: usize,
    reason: Reason,
    holder: Option<Holder>,
}

impl Refusal {
    fn new(part: Range<usize>, reason: Reason) -> Self {
        Self { start: part.start, end: part.end, reason, holder: None }
    }

    /// The addresses that the reason is about: the range of the operation, or a part of it.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// What stood in the way.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// What of this library has registered it in this process, if it is known to have.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        self.holder
    }

    /// Whether it is about a registration.
    fn is_held(&self) -> bool {
        matches!(self.reason, Reason::OtherDescriptor { .. } | Reason::DropsMode { .. })
    }
}

/// What stood in the way of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The range has no bytes.
    Empty,
    /// The range ends beyond the address space.
    BeyondAddressSpace,
    /// The start or the length isn't a multiple of the page size.
    Unaligned {
        /// The size of the memory's pages, in bytes: that of huge pages on hugetlb memory.
        page_size: usize,
    },
    /// Nothing is mapped there.
    NotMapped,
    /// No mode was asked for.
    NoMode,
    /// Modes that this version of the crate doesn't know, and the kernel neither.
    UnknownModes(RegisterMode),
    /// `WRITE_PROTECT` and `READ_WRITE_PROTECT` exclude each other.
    ModesExclude,
    /// The descriptor was made without these features.
    FeatureOff(FeatureFlags),
    /// The kernel, or the CPU, lacks these features.
    KernelLacks(FeatureFlags),
    /// The kernel, or the CPU, lacks the operation.
    KernelLacksIoctl(IoctlFlags),
    /// Memory of this kind can't be registered so, ever.
    WrongMemory {
        /// What is mapped there.
        memory: MemoryKind,
        /// The modes that it can't have. Empty where it can't be registered at all.
        modes: RegisterMode,
    },
    /// Memory of this kind doesn't take the operation.
    WrongMemoryFor {
        /// What is mapped there.
        memory: MemoryKind,
        /// The operation.
        ioctl: IoctlFlags,
    },
    /// A shared mapping of a file that was opened read-only, or sealed against writing.
    NotWritable,
    /// Memory without any permission (`PROT_NONE`), which can't be registered for `READ_WRITE_PROTECT`.
    NoAccess,
    /// Another userfaultfd has registered it.
    OtherDescriptor {
        /// For these modes.
        has: RegisterMode,
    },
    /// It is registered for modes that the request leaves out, of which protection can't be dropped so since Linux
    /// 7.3; or another userfaultfd has registered it.
    DropsMode {
        /// The modes that the request leaves out.
        has: RegisterMode,
    },
    /// It isn't registered with any userfaultfd.
    NotRegistered,
    /// It is registered, but not for what the operation takes.
    NotRegisteredFor {
        /// What the operation takes.
        needs: RegisterMode,
        /// What it is registered for.
        has: RegisterMode,
    },
    /// The range goes from one mapping into the next, at the start of this part.
    SeveralMappings,
    /// The descriptor's handshake isn't done.
    NoHandshake,
    /// The descriptor is something else than a userfaultfd.
    NotUserfaultfd,
    /// The memory is another process's, and the operation works within one.
    OtherProcess,
    /// The process whose memory it is has ended, or executed another program.
    ProcessGone,
    /// The process has as many mappings as it may have.
    TooManyMappings {
        /// The limit: `vm.max_map_count`.
        limit: usize,
    },
    /// Something is there already: a page, or a marker of write protection, poison or a guard.
    Occupied,
    /// The page cache holds no page there.
    NotCached,
    /// The memory layout is changing.
    LayoutChanging,
}

/// What a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Private anonymous memory.
    Anonymous,
    /// Shared anonymous memory, or a memfd. (A file of tmpfs can be registered likewise, and counts as a
    /// [`File`](Self::File) here.)
    Shared,
    /// Huge pages of hugetlb.
    Hugetlb,
    /// A file.
    File,
    /// A shared memory segment of System V.
    SystemV,
    /// Memory of memfd_secret(2).
    Secret,
    /// Memory of `MAP_DROPPABLE`.
    Droppable,
    /// A shadow stack.
    ShadowStack,
    /// A mapping of the kernel's own or of a device: the vDSO, rings, guest memory of a guest_memfd.
    Special,
}

impl MemoryKind {
    /// The feature that tells of faults of one mode on it. `None` where there are none, ever.
    fn feature(self, mode: RegisterMode) -> Option<FeatureFlags> {
        let of = |anonymous, shared, hugetlb| match self {
            Self::Anonymous => anonymous,
            Self::Shared => Some(shared),
            Self::Hugetlb => Some(hugetlb),
            _ => None,
        };
        let (shmem_wp, anonymous_wp) = (FeatureFlags::WP_HUGETLBFS_SHMEM, FeatureFlags::PAGEFAULT_FLAG_WP);
        match mode {
            RegisterMode::MISSING => {
                of(Some(FeatureFlags::empty()), FeatureFlags::MISSING_SHMEM, FeatureFlags::MISSING_HUGETLBFS)
            }
            RegisterMode::WRITE_PROTECT => of(Some(anonymous_wp), shmem_wp, shmem_wp),
            RegisterMode::MINOR => of(None, FeatureFlags::MINOR_SHMEM, FeatureFlags::MINOR_HUGETLBFS),
            _ => of(Some(FeatureFlags::RWP), FeatureFlags::RWP, FeatureFlags::RWP),
        }
    }

    fn is_registrable(self) -> bool {
        self.feature(RegisterMode::MISSING).is_some()
    }
}

/// What was asked of the kernel.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) ioctl: IoctlFlags,
    pub(crate) range: Range<usize>,
    /// Of a registration, where they are known.
    pub(crate) modes: Option<RegisterMode>,
}

impl Request {
    pub(crate) fn new(
        ioctl: IoctlFlags,
        start: *const std::ffi::c_void,
        len: usize,
        modes: Option<RegisterMode>,
    ) -> Self {
        Self { ioctl, range: start.addr()..start.addr().wrapping_add(len), modes }
    }
}

/// The error of a request that sets something up, with the reason if it can be found: [`Error::Refused`].
///
/// That an errno stays a [`SystemError`](Error::SystemError) is where programs written for 0.9 are known to look for it,
/// or may, since it happens by itself: `ENOMEM` of a registration, by which crosvm learns that the process is gone;
/// `EAGAIN` and `ESRCH`; and `ENOENT` of a protection where nothing is mapped any more.
pub(crate) fn explained(
    uffd: &Uffd,
    error: Error,
    request: &Request,
    process: impl FnOnce() -> Option<Process>,
) -> Error {
    let Error::SystemError(errno @ (Errno::EINVAL | Errno::EBUSY | Errno::EPERM | Errno::ENOENT)) = error
    else {
        return error;
    };
    match find(uffd, request, errno, process) {
        Some(Refusal { reason: Reason::NotMapped, .. }) if errno == Errno::ENOENT => error,
        Some(refusal) => Error::Refused { ioctl: request.ioctl, errno, refusal },
        None => error,
    }
}

/// The reason of an error, if it can be found.
pub(crate) fn of(
    uffd: &Uffd,
    error: &Error,
    request: &Request,
    process: impl FnOnce() -> Option<Process>,
) -> Option<Refusal> {
    match error {
        Error::Refused { refusal, .. } => Some(*refusal),
        // The call for the rest tells.
        error if error.progress().is_some_and(|done| done > 0) => None,
        error => find(uffd, request, error.errno()?, process),
    }
}

/// Finds out why the kernel refused a request, if it can be told. `process` says whose memory it is, where that is known.
///
/// Without the process only what needs no look at mappings is told.
pub(crate) fn find(
    uffd: &Uffd,
    request: &Request,
    errno: Errno,
    process: impl FnOnce() -> Option<Process>,
) -> Option<Refusal> {
    let Request { ioctl, range, modes } = request;
    let whole = |reason| Some(Refusal::new(range.clone(), reason));
    let kernel = || Support::probe().ok().map(|support| support.features());
    let looked = |process: Option<Process>| Look { uffd, request, errno, kernel: kernel()? }.at(process?);
    match errno {
        Errno::EAGAIN => whole(Reason::LayoutChanging),
        Errno::EEXIST => whole(Reason::Occupied),
        Errno::ESRCH => whole(Reason::ProcessGone),
        Errno::EFAULT if *ioctl == IoctlFlags::CONTINUE => whole(Reason::NotCached),
        Errno::ENOTTY if !sys::is_userfaultfd(uffd.as_fd()) => whole(Reason::NotUserfaultfd),
        Errno::ENOMEM => too_many_mappings(process()?).and_then(whole),
        Errno::EINVAL => {
            let reason = shape(range).or_else(|| state(uffd)).or_else(|| match *ioctl {
                IoctlFlags::REGISTER => of_modes(uffd, (*modes)?, kernel()?),
                IoctlFlags::MOVE if uffd.is_own() == Some(false) => Some(Reason::OtherProcess),
                ioctl => of_kernel(ioctl, kernel()?),
            });
            reason.and_then(whole).or_else(|| looked(process()))
        }
        Errno::ENOENT | Errno::EBUSY | Errno::EPERM => looked(process()),
        _ => None,
    }
}

/// What is wrong with a range on any memory.
fn shape(range: &Range<usize>) -> Option<Reason> {
    let page_size = page_size();
    if range.start == range.end {
        Some(Reason::Empty)
    } else if range.start > range.end {
        Some(Reason::BeyondAddressSpace)
    } else if range.start % page_size != 0 || range.end % page_size != 0 {
        Some(Reason::Unaligned { page_size })
    } else {
        None
    }
}

/// What is wrong with a descriptor that answers `EINVAL` to everything.
fn state(uffd: &Uffd) -> Option<Reason> {
    // A wake that wakes nobody: nothing that this process has lies there, and a spurious one does no harm.
    let mut nowhere = sys::uffdio_range { start: 1 << 28, len: page_size() as u64 };
    match sys::wake(uffd.as_fd(), &mut nowhere) {
        Ok(()) => None,
        Err(_) if sys::is_userfaultfd(uffd.as_fd()) => Some(Reason::NoHandshake),
        Err(_) => Some(Reason::NotUserfaultfd),
    }
}

/// What is wrong with modes on any memory.
fn of_modes(uffd: &Uffd, modes: RegisterMode, kernel: FeatureFlags) -> Option<Reason> {
    let read_write = modes.contains(RegisterMode::READ_WRITE_PROTECT);
    let unknown = modes.difference(RegisterMode::all());
    if modes.is_empty() {
        return Some(Reason::NoMode);
    }
    if !unknown.is_empty() {
        return Some(Reason::UnknownModes(unknown));
    }
    if read_write && modes.contains(RegisterMode::WRITE_PROTECT) {
        return Some(Reason::ModesExclude);
    }
    // Each mode is there if it is on one kind of memory.
    let some = FeatureFlags::MINOR_SHMEM | FeatureFlags::MINOR_HUGETLBFS;
    if modes.contains(RegisterMode::MINOR) && !kernel.intersects(some) {
        return Some(Reason::KernelLacks(FeatureFlags::MINOR_SHMEM));
    }
    for (mode, feature) in [
        (RegisterMode::WRITE_PROTECT, FeatureFlags::PAGEFAULT_FLAG_WP),
        (RegisterMode::READ_WRITE_PROTECT, FeatureFlags::RWP),
    ] {
        if modes.contains(mode) && !kernel.contains(feature) {
            return Some(Reason::KernelLacks(feature));
        }
    }
    (read_write && !uffd.features().contains(FeatureFlags::RWP))
        .then_some(Reason::FeatureOff(FeatureFlags::RWP))
}

/// Whether the kernel has an operation at all.
fn of_kernel(ioctl: IoctlFlags, kernel: FeatureFlags) -> Option<Reason> {
    let feature = match ioctl {
        IoctlFlags::POISON => FeatureFlags::POISON,
        IoctlFlags::MOVE => FeatureFlags::MOVE,
        IoctlFlags::WRITE_PROTECT => FeatureFlags::PAGEFAULT_FLAG_WP,
        IoctlFlags::READ_WRITE_PROTECT => FeatureFlags::RWP,
        IoctlFlags::CONTINUE => FeatureFlags::MINOR_SHMEM | FeatureFlags::MINOR_HUGETLBFS,
        _ => return None,
    };
    (!kernel.intersects(feature)).then_some(Reason::KernelLacksIoctl(ioctl))
}

/// Whether a process has so many mappings that none can be split.
fn too_many_mappings(process: Process) -> Option<Reason> {
    let mut count = 0;
    let counted = process.each_mapping(Source::Maps, &(0..usize::MAX), |_| {
        count += 1;
        ControlFlow::Continue(())
    });
    // A registration splits off two parts at most.
    let limit = crate::proc_maps::max_mappings()?;
    (counted.is_ok() && count + 2 > limit).then_some(Reason::TooManyMappings { limit })
}

/// A look at the mappings of a range.
struct Look<'a> {
    uffd: &'a Uffd,
    request: &'a Request,
    errno: Errno,
    kernel: FeatureFlags,
}

impl Look<'_> {
    fn at(&self, process: Process) -> Option<Refusal> {
        let Request { ioctl, range, .. } = self.request;
        // What isn't mapped is told by the cheap file.
        let gap = gap(process, range).map(|gap| Refusal::new(gap, Reason::NotMapped));
        // All but fills go over holes, protection since a kernel between 6.1 and 6.12.
        let goes_over = IoctlFlags::REGISTER
            | IoctlFlags::UNREGISTER
            | IoctlFlags::WRITE_PROTECT
            | IoctlFlags::READ_WRITE_PROTECT;
        if gap.is_some_and(|gap| gap.range() == *range || !goes_over.contains(*ioctl)) {
            return gap;
        }
        let (mut found, mut before) = (None::<Refusal>, None);
        let visited = process.each_mapping(Source::Smaps, range, |entry| {
            let part = entry.range.start.max(range.start)..entry.range.end.min(range.end);
            let before = before.replace(entry.range.end);
            let refusal = self.judge(entry, &part).or_else(|| self.border(before?, &part));
            match (refusal, &mut found) {
                (None, _) => return ControlFlow::Continue(()),
                // Whose registration it is isn't told: so all that comes into question is one part.
                (Some(Refusal { end, .. }), Some(found)) => found.end = end,
                (refusal, found) => *found = refusal,
            }
            if found.is_some_and(|found| found.is_held()) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        visited.ok()?;
        if let Some(found) = found.as_mut().filter(|found| found.is_held() && process == Process::Own) {
            found.holder = holder::of(&found.range());
        }
        found.or(gap.filter(|_| self.errno == Errno::ENOENT))
    }

    /// What a mapping has against the operation.
    fn judge(&self, entry: &Entry, part: &Range<usize>) -> Option<Refusal> {
        let Request { ioctl, range, modes } = self.request;
        let modes = modes.unwrap_or(RegisterMode::empty());
        let flags = entry.flags?;
        let (memory, has) = (entry.memory, flags.modes());
        let here = |reason| Some(Refusal::new(part.clone(), reason));
        match (self.errno, *ioctl) {
            (Errno::EPERM, IoctlFlags::REGISTER) => {
                let writable = flags.contains(crate::proc_maps::VmFlags::MAY_WRITE);
                if writable { None } else { here(Reason::NotWritable) }
            }
            (Errno::EBUSY, IoctlFlags::REGISTER) => {
                let left =
                    has.difference(modes) & (RegisterMode::WRITE_PROTECT | RegisterMode::READ_WRITE_PROTECT);
                // Kernels that refuse to drop protection are those that have the other one.
                let can_be_own = !left.is_empty() && self.kernel.contains(FeatureFlags::RWP);
                match has.is_empty() {
                    true => None,
                    false if can_be_own => here(Reason::DropsMode { has: left }),
                    false => here(Reason::OtherDescriptor { has }),
                }
            }
            (Errno::EINVAL, IoctlFlags::REGISTER) => {
                let unaligned = unaligned(range, part, entry.page);
                unaligned.or_else(|| self.cannot_have(entry, modes)).and_then(here)
            }
            (Errno::EINVAL, IoctlFlags::UNREGISTER) => match unaligned(range, part, entry.page) {
                Some(reason) => here(reason),
                None if !has.is_empty() => here(Reason::OtherDescriptor { has }),
                None if !memory.is_registrable() => {
                    here(Reason::WrongMemory { memory, modes: RegisterMode::empty() })
                }
                None => None,
            },
            (Errno::EINVAL, ioctl) => {
                let unaligned = unaligned(range, part, entry.page);
                unaligned.or_else(|| does_not_take(memory, ioctl, has)).and_then(here)
            }
            (Errno::ENOENT, ioctl) => {
                let needs = needs(ioctl);
                if has.is_empty() {
                    here(Reason::NotRegistered)
                } else if !has.contains(needs) {
                    here(Reason::NotRegisteredFor { needs, has })
                } else {
                    None
                }
            }
            _ => None,
        }
    }

    /// Why a mapping can't be registered for these modes.
    fn cannot_have(&self, entry: &Entry, modes: RegisterMode) -> Option<Reason> {
        let memory = entry.memory;
        if memory == MemoryKind::File && modes == RegisterMode::WRITE_PROTECT {
            let asynchronous = FeatureFlags::WP_ASYNC;
            return match (self.kernel.contains(asynchronous), self.uffd.features().contains(asynchronous)) {
                (false, _) => Some(Reason::WrongMemory { memory, modes }),
                (true, false) => Some(Reason::FeatureOff(asynchronous)),
                (true, true) => None,
            };
        }
        if modes.contains(RegisterMode::READ_WRITE_PROTECT) && memory.is_registrable() && !entry.accessible {
            return Some(Reason::NoAccess);
        }
        let each = || modes.iter().map(|mode| (mode, memory.feature(mode)));
        let never = each().filter(|(_, feature)| feature.is_none());
        let never = never.fold(RegisterMode::empty(), |never, (mode, _)| never | mode);
        if !memory.is_registrable() {
            // A file takes one mode alone.
            let modes = if memory == MemoryKind::File { modes } else { RegisterMode::empty() };
            return Some(Reason::WrongMemory { memory, modes });
        }
        if !never.is_empty() {
            return Some(Reason::WrongMemory { memory, modes: never });
        }
        let lacks =
            each().filter_map(|(_, feature)| feature).fold(FeatureFlags::empty(), |all, one| all | one);
        let lacks = lacks.difference(self.kernel);
        (!lacks.is_empty()).then_some(Reason::KernelLacks(lacks))
    }

    /// Whether a fill, or on older kernels a protection, stops where one mapping ends and the next begins.
    fn border(&self, before: usize, part: &Range<usize>) -> Option<Refusal> {
        let stops = self.errno == Errno::ENOENT && before == part.start;
        stops.then(|| Refusal::new(part.clone(), Reason::SeveralMappings))
    }
}

/// Whether the ends of a range cut a page of a mapping that they lie in.
fn unaligned(range: &Range<usize>, part: &Range<usize>, page_size: usize) -> Option<Reason> {
    let cuts = |end: usize| page_size != 0 && end % page_size != 0;
    let cut = (part.start == range.start && cuts(range.start)) || (part.end == range.end && cuts(range.end));
    cut.then_some(Reason::Unaligned { page_size })
}

/// What a range must be registered for to take an operation.
fn needs(ioctl: IoctlFlags) -> RegisterMode {
    match ioctl {
        IoctlFlags::WRITE_PROTECT => RegisterMode::WRITE_PROTECT,
        IoctlFlags::READ_WRITE_PROTECT => RegisterMode::READ_WRITE_PROTECT,
        _ => RegisterMode::empty(),
    }
}

/// Why a mapping, registered so, doesn't take an operation.
fn does_not_take(memory: MemoryKind, ioctl: IoctlFlags, has: RegisterMode) -> Option<Reason> {
    let wrong = match ioctl {
        IoctlFlags::ZEROPAGE => memory == MemoryKind::Hugetlb,
        IoctlFlags::CONTINUE => memory == MemoryKind::Anonymous,
        IoctlFlags::MOVE => memory != MemoryKind::Anonymous,
        _ => false,
    };
    // Files are registered for asynchronous write protection only.
    let wrong = wrong || (memory == MemoryKind::File && has == RegisterMode::WRITE_PROTECT);
    if wrong {
        return Some(Reason::WrongMemoryFor { memory, ioctl });
    }
    // What is left, for those that have it: pages to be mapped protected.
    let protects = IoctlFlags::COPY | IoctlFlags::CONTINUE;
    (protects.contains(ioctl) && !has.is_empty() && !has.contains(RegisterMode::WRITE_PROTECT))
        .then_some(Reason::NotRegisteredFor { needs: RegisterMode::WRITE_PROTECT, has })
}

/// The first part of a range where nothing is mapped.
fn gap(process: Process, range: &Range<usize>) -> Option<Range<usize>> {
    let (mut from, mut to) = (range.start, range.end);
    let visited = process.each_mapping(Source::Maps, range, |entry| {
        if entry.range.start > from {
            to = entry.range.start;
            return ControlFlow::Break(());
        }
        from = entry.range.end;
        ControlFlow::Continue(())
    });
    (visited.is_ok() && from < to).then_some(from..to)
}

/// The releases that brought features, as `Linux 6.7`.
struct Since(FeatureFlags);

impl fmt::Display for Since {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = FeatureFlags::known().iter().filter(|known| self.0.contains(known.flag));
        match known.map(|known| known.since).max() {
            Some((major, minor)) => write!(f, "Linux {major}.{minor}"),
            None => f.write_str("a newer Linux"),
        }
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "private anonymous memory",
            Self::Shared => "shared memory",
            Self::Hugetlb => "hugetlb memory",
            Self::File => "a file",
            Self::SystemV => "a segment of System V",
            Self::Secret => "secret memory",
            Self::Droppable => "droppable memory",
            Self::ShadowStack => "a shadow stack",
            Self::Special => "a mapping of the kernel or a device",
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_reason(f)?;
        match self.holder {
            Some(holder) => write!(f, "; in this process it is held by {holder}"),
            None => Ok(()),
        }
    }
}

impl Refusal {
    fn write_reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, end, reason, .. } = *self;
        let part = format_args!("{start:#x}..{end:#x}");
        match reason {
            Reason::Empty => write!(f, "the range at {start:#x} has no bytes"),
            Reason::BeyondAddressSpace => {
                write!(f, "the range from {start:#x} on ends beyond the address space")
            }
            Reason::Unaligned { page_size } => {
                write!(f, "{part} isn't made of whole pages, which are of {page_size:#x} bytes there")
            }
            Reason::NotMapped => write!(f, "nothing is mapped at {part}"),
            Reason::NoMode => write!(f, "no mode was given"),
            Reason::UnknownModes(modes) => write!(f, "the kernel doesn't know the mode {modes}"),
            Reason::ModesExclude => write!(f, "WRITE_PROTECT and READ_WRITE_PROTECT exclude each other"),
            Reason::FeatureOff(features) => write!(
                f,
                "the descriptor was made without {features}: have UffdBuilder::require_features ask for it"
            ),
            Reason::KernelLacks(features) => {
                write!(f, "the kernel, or the CPU, lacks {features} ({})", Since(features))
            }
            Reason::KernelLacksIoctl(ioctl) => {
                let since = IoctlFlags::known().iter().find(|known| known.flag == ioctl);
                let (major, minor) = since.map_or((0, 0), |known| known.since);
                write!(f, "the kernel, or the CPU, lacks {ioctl} (Linux {major}.{minor})")
            }
            Reason::WrongMemory { memory: MemoryKind::Anonymous, .. } => write!(
                f,
                "{part} is private anonymous memory, which has no page cache: MINOR takes a memfd, tmpfs, shared \
                 anonymous or hugetlb memory"
            ),
            Reason::WrongMemory { memory: MemoryKind::File, modes } if !modes.is_empty() => write!(
                f,
                "{part} is a file, which takes WRITE_PROTECT alone, with WP_ASYNC (Linux 6.7): read it into \
                 anonymous memory, or put it into a memfd or tmpfs"
            ),
            Reason::WrongMemory { memory: MemoryKind::SystemV, .. } => {
                write!(f, "{part} is a segment of System V, which can't be registered: use a memfd")
            }
            Reason::WrongMemory { memory, .. } => {
                write!(f, "{part} is {memory}, which can't be registered: leave it out of the range")
            }
            Reason::WrongMemoryFor { memory: MemoryKind::Hugetlb, ioctl: IoctlFlags::ZEROPAGE } => {
                write!(f, "{part} is hugetlb memory, which has no zero page: copy zeros there")
            }
            Reason::WrongMemoryFor { memory, ioctl } => {
                write!(f, "{part} is {memory}, which doesn't take {ioctl}")
            }
            Reason::NotWritable => write!(
                f,
                "{part} is a shared mapping of a file that can't be written: open it for writing, or map it private"
            ),
            Reason::NoAccess => {
                write!(f, "{part} is PROT_NONE, which can't be protected further: allow access first")
            }
            Reason::OtherDescriptor { has } => {
                write!(f, "{part} is registered with another userfaultfd, for {has}")
            }
            Reason::DropsMode { has } => write!(
                f,
                "{part} is registered for {has}, which a further registration must keep (or unregister it first), or \
                 is another userfaultfd's"
            ),
            Reason::NotRegistered => write!(f, "{part} isn't registered"),
            Reason::NotRegisteredFor { needs, has } => {
                write!(f, "{part} is registered for {has}: this takes a registration for {needs}, too")
            }
            Reason::SeveralMappings => write!(
                f,
                "another mapping begins at {start:#x}: split the range there, since one call stays in one mapping"
            ),
            Reason::NoHandshake => {
                write!(f, "the descriptor's handshake isn't done: UffdBuilder::handshake does it")
            }
            Reason::NotUserfaultfd => write!(f, "the descriptor is not a userfaultfd"),
            Reason::OtherProcess => write!(f, "the memory is another process's, where this doesn't work"),
            Reason::ProcessGone => {
                write!(f, "the process whose memory it is has ended, or executed another program")
            }
            Reason::TooManyMappings { limit } => {
                write!(f, "the process has as many mappings as vm.max_map_count allows: {limit}")
            }
            Reason::Occupied => {
                write!(
                    f,
                    "something is at {part} already: a page, or a marker of protection, poison or a guard"
                )
            }
            Reason::NotCached => write!(f, "the page cache holds no page for {part}"),
            Reason::LayoutChanging => {
                write!(f, "the memory layout is changing: read the pending events, then try again")
            }
        }
    }
}

impl fmt::Debug for Refusal {
    /// The same as `Display`: this is what a failed `unwrap` or `main` shows.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
