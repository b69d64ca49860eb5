//! The pager: threads that resolve the faults of any number of processes from sources of content.
//!
//! A [`Pager`] owns userfaultfds and, for each, a table of [`Region`]s: ranges of addresses with the source of their
//! content. On the first access to a page, a worker of the pager reads it from the source and puts it in place. For
//! memory of your own process use [`LazyMemory`](crate::LazyMemory), which is built on a pager. The module
//! [`source`](crate::source) lists the sources; all of them can be imported from here, too.
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
//! 1. **No fault is lost.** Each fault ends filled, woken because another fill resolved it, poisoned, or dropped because
//!    its memory or its process is gone.
//! 2. **No page is filled twice**, and a present page is never read from its source again. Faults on a page that is
//!    loading join that load.
//! 3. **Changes come first.** Where the descriptor reports changes, a removed range reads as zeros from then on, an
//!    unmapped one is forgotten, a moved one moves along, and the child of a fork is served like its parent. No content
//!    is put where it no longer belongs.
//! 4. **A fill that must wait** (`EAGAIN`: the layout is changing) is deferred with its content and retried, while other
//!    faults go on.
//! 5. **A page that the kernel reports as present** although it faults again and again is reported with its address, and
//!    retried ever more rarely.
//! 6. **A failing or panicking source** is retried according to [`RetryPolicy`]. Then the page is poisoned, so that an
//!    access raises SIGBUS; Linux before 6.6 has no poison: there the faulting thread waits until the source delivers.
//!    For a process with another [`OnEnd`] the process is killed, or its thread waits.
//!    Both are reported to [`on_problem`](PagerBuilder::on_problem). Zeros are never substituted.
//! 7. **The end is a choice**: [`finish`](Pager::finish) fills all missing pages, [`detach`](Pager::detach) hands over
//!    the descriptors and the lists of missing pages, and dropping the pager poisons missing pages (before Linux 6.6:
//!    fills them), or does what [`OnEnd`] says. Closing a userfaultfd would show zeros instead.
//! 8. **Each region has its own page size** and its own [`FaultAround`].
//! 9. **[Statistics]** are always counted.
//!
//! # What the kernel doesn't report
//!
//! - Without `EVENT_REMOVE`, and where a hole is punched into a file, the kernel reports no removal. The pager takes a
//!   present page that faults again as removed, and fills it with zeros. A missing page gets its content.
//! - On shared memory a removal may be `MADV_DONTNEED`, which drops the mapping alone, or `MADV_REMOVE`, which drops the
//!   page. Present pages keep their content after the former and are zero after the latter, as they should be; missing
//!   pages count as removed in both cases. Set [`Region::shared`].
//! - No event reports guard pages (`MADV_GUARD_INSTALL`, Linux 6.13). Before Linux 7.2 a fill overwrites guards on
//!   missing pages: fills around a fault, in the background, and by [`finish`](Pager::finish). Where that matters, use
//!   [`FaultAround::Page`] and don't fill ranges with guards in the background, or guard by mprotect(2), which fills
//!   don't change. Since Linux 7.2 the kernel keeps guards. The pager doesn't look for guards (`PAGE_IS_GUARD`, Linux
//!   6.16): it could do so in memory of its own process only, and a guard installed between the look and the fill would
//!   be lost all the same. The look costs half as much as the fill of a page, and a twentieth of that of 64 KiB.
//! - The kernel queues an event after the change, so the events of two threads may come in another order than their
//!   changes. With `EVENT_UNMAP` the pager follows a thread that moves memory to where another thread has just moved or
//!   unmapped memory, in whatever order it reads the events: before memory is moved to a place, the memory there must have
//!   left. It can't tell the order of three changes of one place, made by three threads, if it reads the last before the
//!   first; nor whether a child was forked before or after a move that another thread made at the same time: what it reads
//!   first counts as earlier. Without `EVENT_UNMAP` the same holds for any two changes. [`Pager::add_region`] waits, for a
//!   second at most, until all changes are read, so that memory that was mapped anew isn't confused with the memory that
//!   lay there before. Changes that are unread when a descriptor is [added](Pager::add) are applied to its regions.
//! - Without `EVENT_FORK` the child of a fork reads zeros where pages are missing: use `MADV_DONTFORK`.
//! - No event reports the end of a process. The pager notices it within a second, or at once with [`Pager::watch`].
//!
//! # Forks
//!
//! A pager works in the process that made it. In a forked child its methods fail with [`NotServed`](Error::NotServed),
//! and dropping it closes the child's copies of its descriptors and changes nothing in the parent. A child may make
//! pagers of its own.
//!
//! # Monitoring
//!
//! [`Pager::statistics`] returns counters and histograms of latencies, [`PagerBuilder::on_problem`] is called with
//! problems. The cargo feature `tracing` adds spans `fault` and `load`, and events for fills, deferrals, changes and
//! problems, all with the target `userfaultfd::pager`. A subscriber runs on the workers: where the memory belongs to this
//! process, it must not take a lock that a faulting thread may hold.
//!
//! # How fast
//!
//! What a fault costs, and how to choose: [`tuning`].
//!
//! # Descriptors
//!
//! A descriptor may be blocking or not. While it is served, it is non-blocking, also for those that share its
//! description; [`detach`](Pager::detach) switches it back. Only the pager may read from it meanwhile.

// # The rooms
//
// Each room uses those above it in this list, and none below; but a region of `memory` has its residence in `evict`, where a
// budget has the regions that share it.
//
// | room | what | where to begin |
// | --- | --- | --- |
// | `memory` | WHAT is served: descriptors and regions, where they lie, the states of their pages; no threads | `served`, `page_state`, `descriptor`, `table` |
// | `stats`, `trace`, `activity`, `bell`, `reports`, `thread` | what is counted, traced and reported; what each thread is doing; how one starts | `stats`, `reports` |
// | `evict` | HOW a page gets out again. Of the pager it knows its `EvictContext` | `policy` |
// | `fill` | HOW a page gets in: claim, load, install, poison, retry. Of the pager it knows its `FillContext` | `filler` |
// | `serve` | WHICH THREAD does it: workers and how faults reach them, the control thread, how serving ends; `shared` is what these threads share, a file for each part | `worker`, `control`, `shutdown` |
// | `prefetch` | WITHOUT being asked: reading ahead, filling in the background, working sets | `background`, `read_ahead` |
// | `pager`, `add`, `remove`, `builder`, `handover`, `error`, `target` | what is public: a pager's life, what comes to it and leaves it, and what can go wrong | `pager` |

/// Threads, locks and their order, and what each atomic pairs with.
#[cfg(doc)]
#[doc = include_str!("CONCURRENCY.md")]
mod concurrency {}

mod activity;
mod add;
pub(crate) mod bell;
mod builder;
mod error;
pub(crate) mod evict;
mod fill;
mod handover;
mod id;
pub(crate) mod memory;
#[cfg(feature = "metrics")]
mod metrics;
pub(crate) mod on_end;
#[expect(clippy::module_inception, reason = "the room is named after what lives in it")]
mod pager;
pub(crate) mod prefetch;
mod progress;
#[cfg(test)]
pub(crate) mod races;
mod remove;
mod reports;
pub(crate) mod serve;
pub(crate) mod stats;
mod target;
mod thread;
mod trace;

#[doc = include_str!("tuning.md")]
pub mod tuning {}

pub use self::add::Added;
pub use self::builder::PagerBuilder;
pub use self::error::{Error, Problem, Refused, Result, RetryPolicy};
pub use self::evict::budget::{Budget, BudgetStatistics};
pub use self::evict::flush_error::{FlushError, FlushStep};
pub use self::evict::store::WriteBack;
pub use self::handover::Detached;
pub use self::id::{DescriptorId, RegionId};
pub use self::memory::fault_around::FaultAround;
pub use self::memory::missing_range::MissingRange;
pub use self::memory::region::{OnRemoval, Region};
pub use self::memory::shared_image::SharedImage;
#[cfg(feature = "metrics")]
pub use self::metrics::MetricsPublisher;
pub use self::on_end::OnEnd;
pub use self::pager::Pager;
pub use self::prefetch::background::{BackgroundFill, FillReport};
pub(crate) use self::prefetch::fill_target::Target;
pub use self::prefetch::plan::FillOrder;
pub use self::prefetch::record::WorkingSetRecorder;
pub use self::prefetch::replay::{ReplayReport, WorkingSetReplay};
pub use self::prefetch::working_set::WorkingSet;
pub use self::progress::{Failed, Progress};
pub use self::serve::delivery::Delivery;
pub use self::stats::{Histogram, Metric, Statistics};
pub use crate::lazy::sigbus::{SignalSafe, SignalSafeConcat};
// Every source and store: a new one is a file in that room, and its line there.
pub use crate::source::*;
