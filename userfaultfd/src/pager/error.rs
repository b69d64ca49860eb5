//! Errors of calls, and problems while a pager serves.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{DescriptorId, Failed, RegionId};
use crate::error::Whole;
use crate::{Errno, IoctlFlags, Uffd};

/// The result of the pager's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of a call to a pager.
///
/// The text includes the cause, so [`source`](std::error::Error::source) doesn't return it again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two regions of one descriptor share addresses; or a region lies where the mapping of another one has grown, and
    /// faults were resolved with zeros.
    #[error("the region at {address:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// The start of the region that was passed in.
        address: usize,
        /// The start of the region that it overlaps, or of what that one has grown by.
        other: usize,
    },

    /// A region has no bytes.
    #[error("the region{} is empty", At(*address))]
    EmptyRegion {
        /// The region's start.
        address: usize,
    },

    /// The source has no length, and the memory was given none.
    #[error("the source has no length, so the memory needs one: set it with `len`")]
    NoLength,

    /// The start or length of a region isn't a multiple of its page size, or it reaches beyond the address space.
    #[error("the region of {len:#x} bytes at {address:#x} isn't made of whole pages of {page_size:#x} bytes")]
    Unaligned {
        /// The region's start.
        address: usize,
        /// The region's length, in bytes.
        len: usize,
        /// Its page size, in bytes.
        page_size: usize,
    },

    /// The memory has pages of another size, or the machine has no pages of this size.
    #[error("{}", NoPages { address: *address, page_size: *page_size })]
    PageSize {
        /// The region's start, or 0 if no memory is mapped yet.
        address: usize,
        /// The page size that was passed in, in bytes.
        page_size: usize,
    },

    /// Too few huge pages of this size are free.
    #[error(
        "too few huge pages of {page_size:#x} bytes are free for {len:#x} bytes: an administrator reserves them in \
         /sys/kernel/mm/hugepages"
    )]
    NoHugePages {
        /// The size of the huge pages, in bytes.
        page_size: usize,
        /// The length of the memory, in bytes.
        len: usize,
    },

    /// A block isn't a multiple of the page size.
    #[error("a block of {block:#x} bytes isn't made of whole pages of {page_size:#x} bytes")]
    Block {
        /// The size of the block, in bytes.
        block: usize,
        /// The page size, in bytes.
        page_size: usize,
    },

    /// The region is longer than the source from the offset on.
    #[error(
        "the region of {len:#x} bytes{} goes beyond its source of {source_len:#x} bytes, from byte {offset:#x} on",
        At(*address)
    )]
    BeyondSource {
        /// The region's start, or 0 if no memory is mapped yet.
        address: usize,
        /// The region's length, in bytes.
        len: usize,
        /// Its offset in the source, in bytes.
        offset: u64,
        /// The length of the source, in bytes.
        source_len: u64,
    },

    /// A [minor](super::Region::minor) region doesn't begin at a whole page of its file, or ends beyond the largest possible
    /// file offset.
    #[error("the region of {len:#x} bytes at {address:#x} can't lie at byte {offset:#x} of a file")]
    FileRange {
        /// The region's start.
        address: usize,
        /// The region's length, in bytes.
        len: usize,
        /// Its offset in the file, in bytes.
        offset: u64,
    },

    /// The memory, or this kernel, lacks an operation that the pager needs.
    #[error("the memory at {address:#x} lacks {missing}")]
    MissingIoctls {
        /// The region's start.
        address: usize,
        /// The missing operations.
        missing: IoctlFlags,
    },

    /// The kernel refused to register the region. `EINVAL`: nothing is mapped there, or memory of a kind that can't
    /// be registered for these modes, or with pages of another size. `EBUSY`: it is registered with another userfaultfd, or
    /// for more modes than the pager uses. `EPERM`: a shared mapping that can't be written. Or the kernel lacks a feature
    /// that the region needs.
    #[error("registering the region at {address:#x} failed: {error}")]
    Register {
        /// The region's start.
        address: usize,
        /// The error of the kernel, with the reason where it could be found out.
        error: crate::Error,
    },

    /// Guest memory can't be served so.
    #[cfg(feature = "vm-memory")]
    #[error(transparent)]
    GuestMemory(crate::guest::LayoutError),

    /// The descriptor was made with the feature [`SIGBUS`](crate::FeatureFlags::SIGBUS), so the kernel delivers no faults.
    #[error("the descriptor delivers no faults: it was made with the feature SIGBUS")]
    NoMessages,

    /// The process of the descriptor has ended, or executed another program.
    #[error("the process that has the memory is gone")]
    TargetGone,

    /// The region may be memory of this process, where filling changes what references point to. Use
    /// [`LazyMemory`](crate::LazyMemory), or [`Pager::add_own`](super::Pager::add_own), which is `unsafe`.
    #[error("the memory at {address:#x} may be this process's own: use LazyMemory, or Pager::add_own")]
    OwnMemory {
        /// The region's start.
        address: usize,
    },

    /// The pager doesn't serve the descriptor or region: it was removed or finished, or its process is gone.
    #[error("the pager doesn't serve this: it was removed or finished, or its process is gone")]
    NotServed,

    /// The [`LazyMemory`](crate::LazyMemory) was [filled](crate::LazyMemory::fill): no page is missing, and none will be.
    #[error("the memory was filled before: no page is missing any more")]
    Filled,

    /// The region belongs to a [`LazyMemory`](crate::LazyMemory), which ends it when it is dropped.
    #[error("the region belongs to a LazyMemory: drop that instead")]
    OfLazyMemory,

    /// A parent of this process made the pager, the memory or the budget before a fork. It works there alone.
    #[error("made before a fork, by the parent process: it works there alone")]
    OtherProcess,

    /// Pages couldn't be filled, and this kernel can't poison them. The pager goes on serving them.
    #[error("{pages} pages can't be filled, nor poisoned before Linux 6.6{}", First(failed))]
    Unfilled {
        /// The number of pages.
        pages: usize,
        /// Their places, where known: others may be loading, or have moved.
        failed: Vec<Failed>,
    },

    /// Pages couldn't be filled, now or for an earlier fault, mostly because the source failed. They are poisoned. All other
    /// pages are filled, and the memory is unregistered.
    #[error("{pages} pages couldn't be filled and are poisoned{}", First(failed))]
    Poisoned {
        /// The number of pages.
        pages: usize,
        /// Their places.
        failed: Vec<Failed>,
    },

    /// The source failed to deliver bytes that had to be read during the call.
    #[error("the source failed at byte {offset:#x}: {}", Whole(.error))]
    Source {
        /// The offset in the source, in bytes.
        offset: u64,
        /// The error of the source.
        error: io::Error,
    },

    /// A [`WorkingSetRecorder`](super::WorkingSetRecorder) or [`WorkingSetReplay`](super::WorkingSetReplay) records the
    /// region's faults already; only one can at a time.
    #[error("the faults of the region are recorded already")]
    AlreadyRecorded,

    /// A page of a working set lies beyond its region.
    #[error("page {page} is beyond a region of {region_pages} pages")]
    BeyondRegion {
        /// The page, counted from the start of the region.
        page: usize,
        /// The number of pages of the region.
        region_pages: usize,
    },

    /// A working set belongs to another region: with another number of pages, or another page size.
    #[error(
        "a working set of {} pages of {:#x} bytes for a region of {} pages of {:#x} bytes: \
         with_region_pages and with_page_size adapt it",
        set.0, set.1, region.0, region.1
    )]
    OtherWorkingSet {
        /// The number of pages of the set's region, and their size in bytes.
        set: (usize, usize),
        /// The same of the region.
        region: (usize, usize),
    },

    /// A [budget](super::Budget) has fewer bytes than memory can be had with.
    #[error("a budget of {bytes:#x} bytes, in whole pages, is too small: the least is {least:#x}")]
    BudgetTooSmall {
        /// The budget, in bytes.
        bytes: usize,
        /// The least one, in bytes.
        least: usize,
    },

    /// The fraction of a [budget](super::Budget) isn't more than 0 and at most 1.
    #[error("{fraction} isn't a fraction of the memory limit: more than 0, at most 1")]
    Fraction {
        /// What was asked for.
        fraction: f64,
    },

    /// Something that memory with a [budget](super::Budget) can't do, or be.
    #[error("{option} doesn't go with a budget: {reason}")]
    NotWithBudget {
        /// What was asked for.
        option: &'static str,
        /// Why not.
        reason: &'static str,
    },

    /// The spill file of memory with a [budget](super::Budget) couldn't be made.
    #[error("no spill file could be made in {}: {error}", dir.display())]
    Spill {
        /// The folder.
        dir: PathBuf,
        /// Why.
        error: io::Error,
    },

    /// The memory of a store doesn't begin at a whole page of it.
    #[error("the memory begins at byte {offset:#x} of its store, which is no multiple of {page_size:#x}")]
    UnalignedStore {
        /// The offset in the store, in bytes.
        offset: u64,
        /// The size of a page, in bytes.
        page_size: usize,
    },

    /// An operation on the descriptor failed.
    #[error(transparent)]
    Uffd(#[from] crate::Error),

    /// The pager failed to create a thread, a descriptor or a mapping for itself.
    ///
    /// `EMFILE` or `ENFILE`: a descriptor. `EAGAIN`: a thread. `ENOMEM`: a mapping, or memory.
    #[error("failed to create a thread, descriptor or mapping for the pager: {_0}{}", lacking(_0))]
    System(io::Error),
}

/// What lacks, and what helps.
fn lacking(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => ": the process has as many descriptors as RLIMIT_NOFILE allows (ulimit -n)",
        Some(libc::ENFILE) => ": the system has as many open files as fs.file-max allows",
        Some(libc::EAGAIN) => {
            ": there are as many threads as RLIMIT_NPROC (ulimit -u), the cgroup (pids.max) or kernel.threads-max allows"
        }
        Some(libc::ENOMEM) => {
            ": there is no memory, or the process has as many mappings as vm.max_map_count allows, or as much address space as \
             RLIMIT_AS"
        }
        _ => "",
    }
}

/// ` at ADDRESS`, or nothing where no memory is mapped yet.
struct At(usize);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " at {:#x}", self.0) }
    }
}

/// That the memory, or the machine, has no pages of a size.
struct NoPages {
    address: usize,
    page_size: usize,
}

impl fmt::Display for NoPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, page_size } = self;
        if *address == 0 {
            write!(
                f,
                "there are no pages of {page_size:#x} bytes: /sys/kernel/mm/hugepages lists the sizes of huge pages"
            )
        } else {
            write!(f, "the memory at {address:#x} doesn't have pages of {page_size:#x} bytes")
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// Prints the places of the first of some pages.
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

/// A descriptor that a pager refused, with the reason.
///
/// It is returned because closing it would show zeros to the threads that wait for its pages.
#[derive(Debug, thiserror::Error)]
#[error("a descriptor was refused: {error}")]
pub struct Refused {
    /// The descriptor. Regions that were passed in may be registered with it.
    pub uffd: Uffd,
    /// The reason.
    pub error: Error,
}

/// A problem while a pager serves, reported to the callback of
/// [`PagerBuilder::on_problem`](super::PagerBuilder::on_problem). The pager goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Problem {
    /// The source failed to deliver a page, after all retries.
    Source {
        /// The region.
        region: RegionId,
        /// The address of the page.
        address: usize,
        /// The offset in the source, in bytes.
        offset: u64,
        /// The last error. A panic is an error of the kind `Other`.
        error: io::Error,
        /// The number of reads that failed.
        attempts: u32,
    },
    /// A page couldn't be filled for another reason. It is poisoned where the kernel can do that.
    ///
    /// `EEXIST`: the kernel reports the page as present again and again, and the fault comes back; on hugetlb memory the
    /// pool of huge pages may be empty. `EINVAL`: the memory isn't of the kind that the region was declared as. `ENOMEM`: no
    /// memory. `EAGAIN`: the layout keeps changing; the pager goes on retrying.
    Stuck {
        /// The region.
        region: RegionId,
        /// The page.
        address: usize,
        /// The error of the kernel.
        errno: Errno,
    },
    /// A page was poisoned, for the reason that the problem before this one gave.
    Poisoned {
        /// The region.
        region: RegionId,
        /// The page.
        address: usize,
    },
    /// A page couldn't be poisoned (Linux before 6.6), so the faulting thread waits until the source delivers.
    Unresolved {
        /// The region.
        region: RegionId,
        /// The page.
        address: usize,
    },
    /// A fault on memory that is registered with the descriptor, but belongs to no region nor to the grown part of a
    /// region's mapping. The faulting thread waits until a region is added. Reported once while the thread waits.
    NoRegion {
        /// The descriptor.
        descriptor: DescriptorId,
        /// The address.
        address: usize,
    },
    /// A process has ended, or executed another program; its descriptor was dropped. This is the normal end of service to
    /// a process.
    TargetGone {
        /// The descriptor.
        descriptor: DescriptorId,
    },
    /// A descriptor couldn't be read.
    Read {
        /// The descriptor.
        descriptor: DescriptorId,
        /// The reason. After `EMFILE` the pager retries: a fork waits for a descriptor for its child.
        error: crate::Error,
    },
    /// The child of a fork can't be served, for lack of memory. Faults on its missing pages stay unresolved.
    Fork {
        /// The descriptor of the parent.
        descriptor: DescriptorId,
        /// The reason.
        error: io::Error,
    },
    /// A thread of the pager panicked. Its faults are resolved anew, and the thread goes on.
    Panicked {
        /// The message of the panic.
        message: String,
    },
    /// Written pages of memory with a [budget](super::Budget) couldn't be written to its spill file or store: a full disk,
    /// for example; `TimedOut`: a write of the store takes longer than a second. They stay in memory, count as resident, and
    /// are retried. Faults don't wait for them, so that more may be resident than the budget has.
    WriteBack {
        /// The region.
        region: RegionId,
        /// The first of the pages.
        address: usize,
        /// Their length, in bytes.
        len: usize,
        /// Why.
        error: io::Error,
    },
    /// A [budget](super::Budget) is full of written pages that must stay until a flush:
    /// [`WriteBack::OnFlush`](crate::WriteBack::OnFlush). Faults don't wait for them, so that more is resident than the
    /// budget has, until [`PagedMemory::flush`](crate::PagedMemory::flush) is called.
    BudgetFull {
        /// The region.
        region: RegionId,
        /// Its written pages, in bytes.
        dirty: usize,
    },
    /// A [`PagedMemory`](crate::PagedMemory) was dropped with written pages that may reach the store by a flush alone. Their
    /// content is gone.
    Discarded {
        /// The region.
        region: RegionId,
        /// Its written pages, in bytes.
        dirty: usize,
    },
    /// A process was killed, since its content can't be had, for the reason that the problem before this one gave: see
    /// [`OnEnd::Kill`](super::OnEnd::Kill).
    Killed {
        /// The descriptor.
        descriptor: DescriptorId,
        /// The page that it waited for.
        address: usize,
    },
}

/// Number of the variants of [`Problem`].
pub(crate) const PROBLEM_KINDS: usize = 13;

impl Problem {
    /// The number of its kind.
    pub(crate) fn kind(&self) -> usize {
        match self {
            Self::Source { .. } => 0,
            Self::Stuck { .. } => 1,
            Self::Poisoned { .. } => 2,
            Self::Unresolved { .. } => 3,
            Self::NoRegion { .. } => 4,
            Self::TargetGone { .. } => 5,
            Self::Read { .. } => 6,
            Self::Fork { .. } => 7,
            Self::Panicked { .. } => 8,
            Self::WriteBack { .. } => 9,
            Self::BudgetFull { .. } => 10,
            Self::Discarded { .. } => 11,
            Self::Killed { .. } => 12,
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
                let reason = match errno {
                    Errno::EEXIST => {
                        "the kernel has a page there, or a marker of protection or of a guard, and the thread faults all the \
                         same; in memory of huge pages their pool may be empty (vm.nr_hugepages)"
                    }
                    Errno::ENOSPC => "the file system of the memory's file is full",
                    Errno::ENOMEM => "there is no memory for it, or the limit of a memory cgroup is reached",
                    Errno::EAGAIN => "the process changes its layout without a pause",
                    Errno::EINVAL => {
                        "the memory isn't of the kind, or hasn't got the page size, that the region was declared with"
                    }
                    errno => errno.desc(),
                };
                write!(f, "the page at {address:#x} can't be filled, {errno:?}: {reason}")
            }
            Self::Poisoned { address, .. } => write!(f, "the page at {address:#x} is poisoned"),
            Self::Unresolved { address, .. } => {
                write!(
                    f,
                    "the page at {address:#x} can't be poisoned before Linux 6.6: a thread that accesses it waits"
                )
            }
            Self::NoRegion { address, .. } => {
                write!(f, "a fault at {address:#x}, which belongs to no region")
            }
            Self::TargetGone { descriptor } => write!(f, "the process of descriptor {descriptor} is gone"),
            Self::Read { descriptor, error } => write!(f, "reading descriptor {descriptor} failed: {error}"),
            Self::Fork { descriptor, error } => {
                write!(f, "a forked child of descriptor {descriptor} can't be served: {error}")
            }
            Self::Panicked { message } => write!(f, "a thread of the pager panicked: {message}"),
            Self::Killed { descriptor, address } => {
                write!(
                    f,
                    "the process of descriptor {descriptor} was killed: its page at {address:#x} can't be filled"
                )
            }
            Self::WriteBack { address, len, error, .. } => {
                write!(f, "{len:#x} bytes at {address:#x} couldn't be written back: {}", Whole(error))
            }
            Self::BudgetFull { dirty, .. } => {
                write!(f, "the budget is full: {dirty:#x} bytes were written and must stay until a flush")
            }
            Self::Discarded { dirty, .. } => {
                write!(f, "memory was dropped with {dirty:#x} bytes that were written and not flushed")
            }
        }
    }
}

impl std::error::Error for Problem {}

/// How a failing read of a source is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The number of reads in all, at least 1.
    pub attempts: u32,
    /// The delay before the second read; it doubles before each further one. Other faults are resolved meanwhile.
    pub delay: Duration,
}

impl Default for RetryPolicy {
    /// Returns a policy of four reads: the retries follow after 10, 20 and 40 ms.
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
            // A printer of chains of causes repeats nothing.
            assert!(std::error::Error::source(&error).is_none(), "{text}");
        }
    }
}
