//! The vocabulary of filling: a fault, what belongs into pages, what is left to do, and how far a piece of work got.

#![expect(unsafe_code, reason = "a pointer that only the kernel follows")]

use std::ffi::c_void;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::buffers::Aside;
use crate::pager::memory::page_run::PageRun;
use crate::{Errno, FaultKind};

/// A fault that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: usize,
    pub(crate) kind: FaultKind,
    /// The thread that faulted, or 0.
    pub(crate) thread: i32,
    /// When it was read.
    pub(crate) since: Instant,
    /// Whether it was counted as one that joined a load.
    pub(crate) joined: bool,
}

/// What belongs into a run.
#[derive(Debug)]
pub(crate) enum FillContent {
    /// Zero pages.
    Zero,
    /// Zeros that are copied, where zero pages can't be had.
    Zeros,
    /// What the memory's file holds, and zeros where it holds nothing: the page was removed, and another mapping or
    /// write(2) may have written the file since.
    File,
    /// Poison: what belongs there can't be had.
    Poison,
    /// In the filler's buffer.
    Buffer,
    /// In a buffer that was put aside.
    Aside(Aside),
    /// In the source's own memory, as long as the region lives.
    Outside(*const c_void),
}

// SAFETY: the pointer leads to bytes of the source, which is `Sync`; only the kernel follows it.
unsafe impl Send for FillContent {}

/// What is left to be done, later.
#[derive(Debug)]
pub(crate) enum Work {
    /// The fault is to be looked up again.
    Fault(Fault),
    /// Likewise, and no region was there. The number of times its waiters were woken to find that out; `again`: one of them
    /// has faulted again since.
    Stray { fault: Fault, tries: u32, again: bool },
    /// The descriptor is to be read again.
    Read,
    /// The run's content is to be loaded. The source failed this number of times.
    Load(PageRun, u32),
    /// The content is there, and is to be put in place.
    Install(PageRun, FillContent),
}

impl Work {
    /// Whether it is for a region that is [ending](crate::pager::memory::served::ServedRegion::is_ending): it isn't put off any longer then.
    pub(crate) fn is_ending(&self) -> bool {
        match self {
            Self::Load(run, _) | Self::Install(run, _) => run.region.is_ending(),
            Self::Fault(_) | Self::Stray { .. } | Self::Read => false,
        }
    }
}

/// How far a piece of work got.
#[derive(Debug)]
#[must_use]
pub(crate) enum Outcome {
    /// To its end.
    Settled,
    /// The rest is to be done later, not before the time has passed.
    Deferred(Work, RetryAfter),
    /// The process has gone.
    TargetGone,
}

/// What has to happen first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryAfter {
    /// The kernel can't do it now. `EAGAIN`: when events were read it is worth trying again. More and more rarely.
    KernelBusy(Errno),
    /// Another process has to do something; more and more rarely.
    OtherLoad,
    /// So much time.
    Delay(Duration),
    /// It was reported, and is tried on rarely.
    LongDelay,
}

/// The page of the base size at an address.
pub(crate) fn page_of(address: usize) -> Range<usize> {
    let page = crate::page_size();
    let start = address & !(page - 1);
    start..start + page
}
