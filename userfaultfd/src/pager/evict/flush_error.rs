//! Why written pages didn't reach their store.

use std::fmt;
use std::io;
use std::ops::Range;

use crate::error::Whole;

/// The step of a flush that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlushStep {
    /// Pages couldn't be taken from memory.
    Memory,
    /// The hook [`before_write`](crate::PagedBuilder::before_write) refused.
    BeforeWrite,
    /// [`PageStore::write`](crate::pager::PageStore::write) failed, or panicked.
    Write,
    /// [`PageStore::sync`](crate::pager::PageStore::sync) failed, or panicked, now or before.
    Sync,
    /// A forked child called it, which doesn't have the memory.
    OtherProcess,
}

/// Written pages that aren't known to be durable in their store.
///
/// Nothing is lost by it: dirty pages stay in memory, and the next flush writes them again.
///
/// After a failed **sync** nothing is known of what was written since the last success. What of it is in memory still is
/// dirty again. What has left memory since is in [`lost`](Self::lost): the store may have it or not, and no copy remains.
/// Every flush fails with those ranges until they are written anew.
#[derive(Debug)]
pub struct FlushError {
    pub(crate) step: FlushStep,
    pub(crate) error: io::Error,
    pub(crate) dirty: Vec<Range<usize>>,
    pub(crate) lost: Vec<Range<usize>>,
}

impl FlushError {
    /// Returns the step that failed first.
    #[must_use]
    pub fn step(&self) -> FlushStep {
        self.step
    }

    /// Returns the first error.
    #[must_use]
    pub fn error(&self) -> &io::Error {
        &self.error
    }

    /// Returns the ranges of the flushed part that are still dirty: in bytes of the memory, whole pages, in order.
    #[must_use]
    pub fn dirty(&self) -> &[Range<usize>] {
        &self.dirty
    }

    /// Returns the ranges of all the memory that were written to the store, have left memory, and may not be durable: in
    /// bytes of the memory, whole pages, in order.
    #[must_use]
    pub fn lost(&self) -> &[Range<usize>] {
        &self.lost
    }

    pub(crate) fn in_child() -> Self {
        let error = io::Error::other("a fork's child hasn't got the memory");
        Self { step: FlushStep::OtherProcess, error, dirty: Vec::new(), lost: Vec::new() }
    }
}

/// The first of some ranges.
struct First<'a>(&'static str, &'a [Range<usize>]);

impl fmt::Display for First<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(what, ranges) = self;
        let Some(first) = ranges.first() else { return Ok(()) };
        write!(f, "; {what}: bytes {:#x}..{:#x}", first.start, first.end)?;
        match ranges.len() - 1 {
            0 => Ok(()),
            more => write!(f, " and {more} more ranges"),
        }
    }
}

impl fmt::Display for FlushError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.step {
            FlushStep::Memory => "written pages couldn't be read",
            FlushStep::BeforeWrite => "the hook before a write refused",
            FlushStep::Write => "the store couldn't be written",
            FlushStep::Sync => "the store couldn't be synced",
            FlushStep::OtherProcess => "nothing was flushed",
        };
        write!(f, "{what}: {}", Whole(&self.error))?;
        write!(f, "{}{}", First("still dirty", &self.dirty), First("perhaps lost", &self.lost))
    }
}

impl std::error::Error for FlushError {}
