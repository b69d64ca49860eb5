//! What can go wrong: at once, with what is handed to a pager, and later, with what it serves.

use std::fmt;
use std::io;
use std::time::Duration;

use super::{DescriptorId, Failed, RegionId};
use crate::error::Whole;
use crate::{Errno, IoctlFlags, Uffd};

/// The result of the pager's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a pager refused something, at once.
///
/// The text says why, so that the cause isn't [`source`](std::error::Error::source), too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two regions of one descriptor share addresses.
    #[error("the region at {address:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// The start of the region that was to be added.
        address: usize,
        /// The start of the one that is there.
        other: usize,
    },

    /// A region of no bytes.
    #[error("the region at {address:#x} is empty")]
    EmptyRegion {
        /// Its start.
        address: usize,
    },

    /// The start or length of a region isn't a multiple of its page size, or it reaches beyond the address space.
    #[error("the region of {len:#x} bytes at {address:#x} isn't made of whole pages of {page_size:#x} bytes")]
    Unaligned {
        /// Its start.
        address: usize,
        /// Its length, in bytes.
        len: usize,
        /// Its page size, in bytes.
        page_size: usize,
    },

    /// The memory has pages of another size, or there are no such pages.
    #[error("the memory at {address:#x} hasn't pages of {page_size:#x} bytes")]
    PageSize {
        /// The region's start.
        address: usize,
        /// The page size that was told, in bytes.
        page_size: usize,
    },

    /// A block isn't a multiple of the page size.
    #[error("a block of {block:#x} bytes isn't made of whole pages of {page_size:#x} bytes")]
    Block {
        /// The size of the block, in bytes.
        block: usize,
        /// The page size, in bytes.
        page_size: usize,
    },

    /// The region is longer than what the source has from the offset on.
    #[error(
        "the region of {len:#x} bytes at {address:#x} goes beyond its source of {source_len:#x} bytes, from byte {offset:#x} on"
    )]
    BeyondSource {
        /// The region's start.
        address: usize,
        /// Its length, in bytes.
        len: usize,
        /// Its offset in the source, in bytes.
        offset: u64,
        /// The length of the source, in bytes.
        source_len: u64,
    },

    /// A [minor](super::Region::minor) region doesn't begin at a whole page of its file, or ends beyond the largest offset
    /// that a file can have.
    #[error("the region of {len:#x} bytes at {address:#x} can't lie at byte {offset:#x} of a file")]
    FileRange {
        /// The region's start.
        address: usize,
        /// Its length, in bytes.
        len: usize,
        /// Its offset in the file, in bytes.
        offset: u64,
    },

    /// The memory, or this kernel, lacks an operation that serving it takes.
    #[error("the memory at {address:#x} lacks {missing}")]
    MissingIoctls {
        /// The region's start.
        address: usize,
        /// What it lacks.
        missing: IoctlFlags,
    },

    /// The kernel refused to register the region. `EINVAL`: nothing is mapped there, or memory of a kind that can't
    /// be registered so, or with pages of another size. `EBUSY`: it is registered with another userfaultfd, or for
    /// more than the pager would. `EPERM`: a shared mapping that can't be written. Or the kernel lacks what the region
    /// asks for.
    #[error("registering the region at {address:#x} failed: {error}")]
    Register {
        /// The region's start.
        address: usize,
        /// What the kernel said, and why where that could be found out.
        error: crate::Error,
    },

    /// The descriptor has the feature [`SIGBUS`](crate::FeatureFlags::SIGBUS), with which the kernel delivers no faults.
    #[error("the descriptor delivers no faults: it was made with the feature SIGBUS")]
    NoMessages,

    /// The process of the descriptor has ended, or executed another program.
    #[error("the process whose memory it is has gone")]
    TargetGone,

    /// The region is memory of this very process: filling it changes what references lead to. That is for
    /// [`LazyMemory`](crate::LazyMemory), or for [`Pager::add_own`](super::Pager::add_own), which is `unsafe`.
    #[error("the memory at {address:#x} may be this process's own: use LazyMemory, or Pager::add_own")]
    OwnMemory {
        /// The region's start.
        address: usize,
    },

    /// No such descriptor or region is served: it was removed, or its process has gone. Or the pager, or the memory,
    /// was made before a fork, by the parent of this process.
    #[error("the pager doesn't serve this any more")]
    NotServed,

    /// Pages couldn't be filled and can't be poisoned on this kernel. They are served on.
    #[error("{pages} pages can't be filled, nor poisoned before Linux 6.6{}", First(failed))]
    Unfilled {
        /// How many.
        pages: usize,
        /// Where they are, as far as they are known: others may be in work, or have moved.
        failed: Vec<Failed>,
    },

    /// Pages couldn't be filled, now or by a fault before: most often because the source failed. They are poisoned.
    /// Everything else is filled, and the memory is given back to the kernel.
    #[error("{pages} pages couldn't be filled and are poisoned{}", First(failed))]
    Poisoned {
        /// How many.
        pages: usize,
        /// Where they are.
        failed: Vec<Failed>,
    },

    /// The source failed to deliver what had to be read at once.
    #[error("the source failed at byte {offset:#x}: {}", Whole(.error))]
    Source {
        /// Where in the source, in bytes.
        offset: u64,
        /// What it said.
        error: io::Error,
    },

    /// Which faults come is noted for one at a time: a [`WorkingSetRecorder`](super::WorkingSetRecorder) or a [`WorkingSetReplay`](super::WorkingSetReplay).
    #[error("the faults of the region are recorded already")]
    AlreadyRecorded,

    /// A working set can't have such a page.
    #[error("page {page} is beyond a region of {region_pages} pages")]
    BeyondRegion {
        /// The page, counted from the start of the region.
        page: usize,
        /// How many pages the region has.
        region_pages: usize,
    },

    /// A working set is of another region: of more or fewer pages, or of pages of another size.
    #[error(
        "a working set of {} pages of {:#x} bytes for a region of {} pages of {:#x} bytes: \
         with_region_pages and with_page_size adapt it",
        set.0, set.1, region.0, region.1
    )]
    OtherWorkingSet {
        /// How many pages the region of the set has, and their size in bytes.
        set: (usize, usize),
        /// The same of the region.
        region: (usize, usize),
    },

    /// Memory whose faults are handled in the thread that makes them needs no pager, and asks for nothing twice.
    #[error("{option} doesn't go with LazyMemory::sigbus")]
    NotWithSigbus {
        /// The method of [`LazyBuilder`](crate::LazyBuilder).
        option: &'static str,
    },

    /// The kernel refused something about the descriptor.
    #[error(transparent)]
    Uffd(#[from] crate::Error),

    /// Memory, a thread or a descriptor for the pager itself couldn't be had.
    #[error("the pager failed to get memory, a thread or a descriptor: {0}")]
    System(io::Error),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// Tells where the first of some pages are.
struct First<'a>(&'a [Failed]);

impl fmt::Display for First<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Failed { range, .. }) = self.0.first() else { return Ok(()) };
        let more = if self.0.len() > 1 { ", and elsewhere" } else { "" };
        write!(f, ": bytes {:#x}..{:#x} of a region{more}", range.start, range.end)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::System(io::Error::from(errno))
    }
}

/// A descriptor that a pager refused, and why.
///
/// It comes back, since closing it would show zeros to whoever waits for its pages.
#[derive(Debug, thiserror::Error)]
#[error("a descriptor was refused: {error}")]
pub struct Refused {
    /// The descriptor. Regions that were to be served may be registered with it.
    pub uffd: Uffd,
    /// Why.
    pub error: Error,
}

/// Something that went wrong while a pager served, for the callback of
/// [`PagerBuilder::on_problem`](super::PagerBuilder::on_problem). The pager goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Problem {
    /// The source didn't deliver a page, as often as it was asked.
    Source {
        /// The region.
        region: RegionId,
        /// Where the page is, or was to be.
        address: usize,
        /// Where in the source, in bytes.
        offset: u64,
        /// The last error. A panic is one of kind `Other`.
        error: io::Error,
        /// How often it was asked.
        attempts: u32,
    },
    /// A page couldn't be filled for another reason: it is poisoned if the kernel can do that.
    ///
    /// `EEXIST`: the kernel says again and again that something is there, and the fault comes back; on hugetlb memory
    /// the pool of huge pages may be empty. `EINVAL`: the memory isn't what the region said. `ENOMEM`: no memory.
    /// `EAGAIN`: the layout has been changing all the time; it is tried on.
    Stuck {
        /// The region.
        region: RegionId,
        /// The page.
        address: usize,
        /// What the kernel says.
        errno: Errno,
    },
    /// A page was poisoned: its content couldn't be had, as the problem before this one told.
    Poisoned {
        /// The region.
        region: RegionId,
        /// The page.
        address: usize,
    },
    /// The kernel can't poison (before Linux 6.6), so the fault stays unanswered until the source delivers.
    Unanswered {
        /// The region.
        region: RegionId,
        /// The page.
        address: usize,
    },
    /// A fault on memory that is registered with the descriptor and belongs to no region, nor to what the mapping of a
    /// region has grown by. It waits until there is one. Reported once as long as the thread waits.
    NoRegion {
        /// The descriptor.
        descriptor: DescriptorId,
        /// The address.
        address: usize,
    },
    /// A process has ended, or executed another program; its descriptor was dropped. That is what happens in the end
    /// unless pagers are stopped first.
    TargetGone {
        /// The descriptor.
        descriptor: DescriptorId,
    },
    /// A descriptor couldn't be read.
    Read {
        /// The descriptor.
        descriptor: DescriptorId,
        /// Why. With `EMFILE` the pager tries again: a fork waits for a descriptor for its child.
        error: crate::Error,
    },
    /// A fork's child can't be served, for want of memory. Its missing pages stay unanswered.
    Fork {
        /// The descriptor of the parent.
        descriptor: DescriptorId,
        /// Why.
        error: io::Error,
    },
    /// A thread of the pager panicked. Its faults are answered anew, and the thread goes on.
    Panicked {
        /// What it said.
        message: String,
    },
}

/// How many kinds of problems there are.
pub(crate) const PROBLEM_KINDS: usize = 9;

impl Problem {
    /// The number of its kind.
    pub(crate) fn kind(&self) -> usize {
        match self {
            Self::Source { .. } => 0,
            Self::Stuck { .. } => 1,
            Self::Poisoned { .. } => 2,
            Self::Unanswered { .. } => 3,
            Self::NoRegion { .. } => 4,
            Self::TargetGone { .. } => 5,
            Self::Read { .. } => 6,
            Self::Fork { .. } => 7,
            Self::Panicked { .. } => 8,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source { address, offset, error, attempts, .. } => write!(
                f,
                "the source failed {attempts} times at byte {offset:#x}, for the page at {address:#x}: {}",
                Whole(error)
            ),
            Self::Stuck { address, errno, .. } => {
                write!(f, "the page at {address:#x} can't be filled: {errno}")
            }
            Self::Poisoned { address, .. } => write!(f, "the page at {address:#x} is poisoned"),
            Self::Unanswered { address, .. } => {
                write!(
                    f,
                    "the page at {address:#x} can't be poisoned before Linux 6.6: who accesses it waits"
                )
            }
            Self::NoRegion { address, .. } => {
                write!(f, "a fault at {address:#x}, which belongs to no region")
            }
            Self::TargetGone { descriptor } => write!(f, "the process of {descriptor:?} has gone"),
            Self::Read { descriptor, error } => write!(f, "reading {descriptor:?} failed: {error}"),
            Self::Fork { descriptor, error } => {
                write!(f, "a child of {descriptor:?} can't be served: {error}")
            }
            Self::Panicked { message } => write!(f, "a thread of the pager panicked: {message}"),
        }
    }
}

/// How often a source is asked for a page that it fails to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How often it is asked in all, 1 or more.
    pub attempts: u32,
    /// How long to wait before the second time; twice as long before each further one. Other faults are answered
    /// meanwhile.
    pub delay: Duration,
}

impl Default for RetryPolicy {
    /// Four times: at once, and after 10, 20 and 40 ms more.
    fn default() -> Self {
        Self { attempts: 4, delay: Duration::from_millis(10) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::require;

    #[test]
    fn the_text_has_the_cause_and_has_it_once() {
        require!();
        let cause = || crate::Error::SystemError(Errno::EBUSY);
        let errors: [Error; 5] = [
            Error::Register { address: 0x1000, error: cause() },
            Error::Source { offset: 1, error: io::Error::other("EBUSY") },
            Error::Uffd(cause()),
            Error::System(io::Error::other("EBUSY")),
            Error::from(cause()),
        ];
        for error in errors {
            let text = error.to_string();
            assert_eq!(text.matches("EBUSY").count(), 1, "{text}");
            // What prints a chain of causes has nothing to repeat.
            assert!(std::error::Error::source(&error).is_none(), "{text}");
        }
    }
}
