//! Why the kernel refused an operation: looked into once it has happened.
//!
//! The kernel answers with an errno, and one errno has many reasons. What is known without asking comes first (shape of
//! the range, modes, features), then what `/proc` tells of the mappings. Nothing here is on the way of an operation that
//! succeeds, and nothing allocates: the caller may handle the events of a fork, whose thread holds the allocator's locks
//! until its event is read.
//!
//! The layout may have changed since the refusal, and `/proc` doesn't tell whose registration a mapping has. So only what
//! explains the errno is told, and [`find`] answers with nothing rather than with a guess.

use std::ops::{ControlFlow, Range};
use std::os::fd::AsFd;

use super::{MemoryKind, Reason, Refusal};
use crate::holder;
use crate::proc_maps::{Entry, Process, Source};
use crate::{Errno, Error, FeatureFlags, IoctlFlags, RegisterMode, Support, Uffd, page_size, sys};

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
/// or may, since it happens by itself: `ENOMEM` of a registration, by which crosvm learns that the process is gone (not in
/// [`explained_whole`]); `EAGAIN` and `ESRCH`; and `ENOENT` of a protection where nothing is mapped any more.
pub(crate) fn explained(
    uffd: &Uffd,
    error: Error,
    request: &Request,
    process: impl FnOnce() -> Option<Process>,
) -> Error {
    match error {
        Error::SystemError(Errno::ENOMEM) => error,
        error => explained_whole(uffd, error, request, process),
    }
}

/// The same for what 0.9 hasn't, where `ENOMEM` has its reason, too.
pub(crate) fn explained_whole(
    uffd: &Uffd,
    error: Error,
    request: &Request,
    process: impl FnOnce() -> Option<Process>,
) -> Error {
    use Errno::{EBUSY, EINVAL, ENOENT, ENOMEM, ENOTTY, EPERM};
    let Error::SystemError(errno @ (EINVAL | EBUSY | EPERM | ENOENT | ENOTTY | ENOMEM)) = error else {
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

/// Whether a process has no room for more mappings, so that none can be split.
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
