//! The vocabulary of filling: a fault, the content of pages, the work that is left, and the outcome of a piece of work.

#![expect(unsafe_code, reason = "a pointer that only the kernel follows")]

use std::ffi::c_void;
use std::ops::Range;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::buffers::Aside;
use crate::pager::memory::page_run::PageRun;
use crate::source::LoadId;
use crate::{Errno, FaultKind};

/// A fault that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: usize,
    pub(crate) kind: FaultKind,
    /// Whether the access was a write.
    pub(crate) is_write: bool,
    /// The thread that faulted, or 0.
    pub(crate) thread: i32,
    /// When it was read.
    pub(crate) since: Instant,
    /// Whether it was counted as one that joined a load.
    pub(crate) joined: bool,
}

/// The content of a run.
#[derive(Debug)]
pub(crate) enum FillContent {
    /// Zero pages.
    Zero,
    /// Zeros that are copied, where the kernel can't map zero pages.
    Zeros,
    /// The file's content: the page was removed, and another mapping or write(2) may have written the file since. Zeros where
    /// it has none, unless the source has what belongs there.
    File,
    /// Poison: the content can't be loaded.
    Poison,
    /// Content in the filler's buffer.
    Buffer,
    /// Content in a buffer that was kept.
    Aside(Aside),
    /// Content in the buffer of a load that was answered.
    Loaded(MmapMut),
    /// Content in the source's own memory, valid while the region lives.
    Outside(*const c_void),
}

// SAFETY: the pointer leads to bytes of the source, which is `Sync`; only the kernel follows it.
unsafe impl Send for FillContent {}

/// Work that is left for later.
#[derive(Debug)]
pub(crate) enum Work {
    /// The fault must be looked up again.
    Fault(Fault),
    /// The same, where no region was found: with the number of times that its waiters were woken to find that out, and
    /// whether one of them has faulted again since.
    Stray { fault: Fault, tries: u32, again: bool },
    /// The descriptor must be read again.
    Read,
    /// The run's content must be loaded. The source failed this number of times.
    Load(PageRun, u32),
    /// An asynchronous source has answered a load.
    Answered { load: LoadId, is_early: bool },
    /// The content is loaded, and must be installed.
    Install(PageRun, FillContent),
}

impl Work {
    /// Whether it is for a region that is [ending](crate::pager::memory::served::ServedRegion::is_ending): it isn't put off any longer then.
    pub(crate) fn is_ending(&self) -> bool {
        match self {
            Self::Load(run, _) | Self::Install(run, _) => run.region.is_ending(),
            // It is due at once.
            Self::Answered { .. } => false,
            Self::Fault(_) | Self::Stray { .. } | Self::Read => false,
        }
    }

    /// Whether no thread waits for it, as far as is known.
    pub(super) fn is_early(&self) -> bool {
        match self {
            Self::Load(run, _) | Self::Install(run, _) => run.demand.is_none(),
            Self::Answered { is_early, .. } => *is_early,
            Self::Fault(_) | Self::Stray { .. } | Self::Read => false,
        }
    }
}

/// The outcome of a piece of work.
#[derive(Debug)]
#[must_use]
pub(crate) enum Outcome {
    /// The work is done, or goes on when a source answers.
    Settled,
    /// The rest must be done later, not before the delay has passed.
    Deferred(Work, RetryAfter),
    /// The process is gone.
    TargetGone,
}

/// What must happen before the retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryAfter {
    /// The kernel can't do it now. After `EAGAIN` a retry is worth it once events were read. The delay grows.
    KernelBusy(Errno),
    /// Another thread or process must act first. The delay grows.
    OtherLoad,
    /// This delay must pass.
    Delay(Duration),
    /// It was reported, and is retried rarely.
    LongDelay,
}

/// The base page at an address.
pub(crate) fn page_of(address: usize) -> Range<usize> {
    let page = crate::page_size();
    let start = address & !(page - 1);
    start..start + page
}

/// The bytes that an operation did, and the error on which it stopped.
pub(crate) fn answer(result: crate::Result<usize>, len: usize) -> (usize, Option<Errno>) {
    match result {
        Ok(done) if done == len => (done, None),
        // A CONTINUE that stopped half-way.
        Ok(done) => (done, Some(Errno::EAGAIN)),
        Err(error) => (error.progress().unwrap_or(0), error.errno().or(Some(Errno::EINVAL))),
    }
}
