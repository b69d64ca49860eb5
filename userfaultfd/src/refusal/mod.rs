//! The reason for which the kernel refused an operation, as a value: the part of the range, the reason, and what would
//! work instead. [`examine`] finds it.

pub(crate) mod examine;

use std::fmt;
use std::ops::Range;

use crate::holder::Holder;
use crate::{FeatureFlags, IoctlFlags, RegisterMode};

/// Why the kernel refused an operation, and which part of the range the reason is about.
///
/// `Display` tells both, and what would work instead. From [`Error::Refused`](crate::Error::Refused), and from
/// [`Uffd::explain`](crate::Uffd::explain) for the errors of operations that handle faults.
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

    /// Returns the addresses that the reason concerns: the range of the operation, or a part of it.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Returns the reason.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Returns the part of this library that has registered the memory in this process, if known.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        self.holder
    }

    /// Whether it is about a registration.
    fn is_held(&self) -> bool {
        matches!(self.reason, Reason::OtherDescriptor { .. } | Reason::DropsMode { .. })
    }
}

/// The reason for which an operation was refused.
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
    /// The process that has the memory has ended, or executed another program.
    ProcessGone,
    /// The process has as many mappings as it may have.
    TooManyMappings {
        /// The limit: `vm.max_map_count`.
        limit: usize,
    },
    /// The page is present, or has a marker of write protection, poison or a guard.
    Occupied,
    /// The page cache holds no page there.
    NotCached,
    /// The memory layout is changing.
    LayoutChanging,
}

/// The kind of memory of a mapping.
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
                write!(f, "the process that has the memory has ended, or executed another program")
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
    /// Prints the same as `Display`, since a failed `unwrap` or `main` prints this.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
