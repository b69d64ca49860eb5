//! The pager: threads that answer the faults of any number of processes from sources of content.
//!
//! A [`Pager`] owns userfaultfds and, for each, a table of [`Region`]s: ranges of addresses with the source of what
//! belongs there. When a page is touched for the first time, a thread of the pager reads it from its source and puts
//! it in place. Memory of this very process that fills itself is [`LazyMemory`](crate::LazyMemory), which is made of
//! a pager.
//!
//! ```no_run
//! use std::os::fd::OwnedFd;
//! use userfaultfd::Uffd;
//! use userfaultfd::pager::{FileSource, Pager, Region};
//!
//! # fn receive() -> (OwnedFd, usize, usize) { unimplemented!() }
//! // From the process whose memory it is, over a Unix socket: its userfaultfd, and where the memory is.
//! let (fd, start, len) = receive();
//!
//! let pager = Pager::builder().threads(2).on_problem(|problem| eprintln!("{problem}")).build()?;
//! let region = Region::new(start, len, FileSource::open("snapshot")?).block(64 << 10);
//! pager.add(Uffd::from(fd), [region])?;
//! pager.join(); // until the process ends
//! println!("{}", pager.statistics());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it promises
//!
//! 1. **No fault is lost.** Each ends filled, waked because another fill answered it, poisoned, or dropped because
//!    its memory or its process has gone.
//! 2. **No page is filled twice**, and none is read from its source again once it is there. Faults that come while a
//!    page is loaded join that load.
//! 3. **Changes come first.** Where the descriptor tells of changes, a removed range is zero from then on, an
//!    unmapped one is forgotten, a moved one moves along, and a fork's child is served like its parent: no content
//!    is put where it doesn't belong any more.
//! 4. **A fill that must wait** (`EAGAIN`, the layout is changing) is put off with its content while other faults go
//!    on, and tried again.
//! 5. **A page that the kernel says is there** although it faults again and again is told with its address, and tried
//!    ever more rarely.
//! 6. **A source that fails**, or panics, is asked again as [`RetryPolicy`] says. Then the page is poisoned, so that an
//!    access is SIGBUS; before Linux 6.6, which can't poison, whoever accesses it waits until the source delivers.
//!    Both are told to [`on_problem`](PagerBuilder::on_problem). Never is it zeros.
//! 7. **The end is a choice**: [`finish`](Pager::finish) fills all that is missing,
//!    [`detach`](Pager::detach) hands the descriptors and the list of what is missing over, and dropping the pager
//!    poisons what is missing (before 6.6: fills it). Closing a userfaultfd would show zeros instead.
//! 8. **Page sizes are each region's**, and so is the block that is filled for a fault.
//! 9. **[Statistics]** are always counted.
//!
//! # What can't be told
//!
//! - Without `EVENT_REMOVE`, and where a hole is punched into a file, the kernel tells of no removal. A page that was
//!   there and faults again is taken for such a one, and zero. One that was missing gets its content.
//! - Of shared memory a removal may be `MADV_DONTNEED`, which takes only the mapping away, or `MADV_REMOVE`, which
//!   takes the page. Pages that are there stay in the one case, and are zero in the other, as it should be; those that
//!   are missing are taken for removed. Say [`Region::shared`].
//! - Guard pages (`MADV_GUARD_INSTALL`, Linux 6.13) are told by no event. Before Linux 7.2 a fill overwrites the guards of
//!   missing pages: what is filled around a fault, in the background, and by [`finish`](Pager::finish). Where that
//!   matters, use [`FaultAround::Page`] and leave ranges with guards out of a background, or guard by mprotect(2), which
//!   fills don't change. Since Linux 7.2 the kernel keeps guards. The pager doesn't ask the page map for them
//!   (`PAGE_IS_GUARD`, Linux 6.16): it could do so for memory of its own process only, and a guard that is installed
//!   between the question and the fill is lost all the same. The question costs half as much as the fill of a page, and a
//!   twentieth of that of 64 KiB.
//! - Without `EVENT_FORK` a child reads zeros where pages are missing: use `MADV_DONTFORK`.
//! - When a process ends nothing tells. It is noticed within a second, or at once with [`Pager::watch`].
//!
//! # Forks
//!
//! A pager works in the process that made it. In the child of a fork its methods fail with
//! [`NotServed`](Error::NotServed), and dropping it closes the child's copies of its descriptors, and changes nothing
//! in the parent. A child may make pagers of its own.
//!
//! # Watching it
//!
//! [`Pager::statistics`] has counters and histograms of latencies, [`PagerBuilder::on_problem`] what goes wrong. With the
//! cargo feature `tracing` there are spans `fault` and `load` and events for what is filled, put off and changed, and
//! for problems, all of target `userfaultfd::pager`. A subscriber runs on the threads that answer faults: where the
//! memory is this process's own it must not take a lock that a thread which waits for a page may hold.
//!
//! # How fast
//!
//! What costs what, and how to choose: [`tuning`].
//!
//! # Descriptors
//!
//! A descriptor may be blocking or not. While it is served it is switched to non-blocking, for all that share its
//! description, and [`detach`](Pager::detach) switches it back. Nobody else may read it meanwhile.

/// Threads, locks and their order, and what each atomic pairs with.
#[cfg(doc)]
#[doc = include_str!("CONCURRENCY.md")]
mod concurrency {}

mod activity;
mod bell;
mod builder;
mod error;
mod evict;
mod fill;
mod handover;
mod id;
pub(crate) mod memory;
#[expect(clippy::module_inception, reason = "the room is named after what lives in it")]
mod pager;
pub(crate) mod prefetch;
mod progress;
#[cfg(test)]
pub(crate) mod races;
mod reports;
pub(crate) mod serve;
pub(crate) mod stats;
mod target;
mod trace;

#[doc = include_str!("tuning.md")]
pub mod tuning {}

pub use self::builder::PagerBuilder;
pub use self::error::{Error, Problem, Refused, Result, RetryPolicy};
pub use self::handover::Detached;
pub use self::id::{DescriptorId, RegionId};
pub use self::memory::fault_around::FaultAround;
pub use self::memory::missing_range::MissingRange;
pub(crate) use self::memory::region::ADAPTIVE;
pub use self::memory::region::Region;
pub use self::pager::{Added, Pager};
pub(crate) use self::prefetch::background::Target;
pub use self::prefetch::background::{BackgroundFill, FillOrder, FillReport};
pub use self::prefetch::record::WorkingSetRecorder;
pub use self::prefetch::replay::{ReplayReport, WorkingSetReplay};
pub use self::prefetch::working_set::WorkingSet;
pub use self::progress::{Failed, Progress};
pub use self::serve::delivery::Delivery;
pub use self::stats::{Histogram, Statistics};
pub use crate::lazy::sigbus::{SignalSafe, SignalSafeConcat};
pub use crate::source::{
    BytesSource, ConcatSource, FileSource, MappedFileSource, PageData, PageSource, SourceBytes, ZeroSource,
};
