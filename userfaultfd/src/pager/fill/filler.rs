//! The state machine that fills pages for one thread: each step returns the next one.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::buffers::MAX_SPARE_BUFFERS;
use super::context::FillContext;
use super::work::{Fault, FillContent, Outcome, Work, page_of};
use crate::pager::memory::descriptor::{Descriptor, wake};
use crate::pager::memory::page_run::{PageRun, Purpose};
use crate::pager::memory::served::ServedRegion;
use crate::pager::trace::span;
use crate::source::LoadId;

/// The next step of a piece of work.
///
/// ```text
/// fault ─ claimed ──▶ Load ── content ──▶ Install ── settled ──▶ Outcome::Settled
///    │                 │  ▲                 │   ▲
///    │                 │  └─ (put off) ◀────┤   └─ (put off, with its content) ◀─ the kernel can't now
///    │                 └─ the source fails for good: Install(Poison)
///    └─ nothing to load: Done
/// ```
#[derive(Debug)]
#[must_use]
pub(super) enum Next {
    /// The run's content must be loaded. The source failed this number of times.
    Load(PageRun, u32),
    /// The content is loaded, and must be installed.
    Install(PageRun, FillContent),
    /// No step for now.
    Done(Outcome),
}

/// Duration from which a read of a source counts as slow: about what a thread on another CPU takes to wake.
const SLOW_READ: Duration = Duration::from_micros(50);

/// Fills pages, for one thread.
#[derive(Debug)]
pub(crate) struct PageFiller {
    /// The number of the thread, of its shards and its counters.
    pub(crate) thread: usize,
    pub(crate) buffer: Option<MmapMut>,
    /// Spare buffers, whose content was kept and installed since.
    pub(crate) spare: [Option<MmapMut>; MAX_SPARE_BUFFERS],
    /// Zeros, as long as the longest run of them. Never written, so that they take no memory.
    pub(crate) zeros: Option<MmapMut>,
    /// The page on which faults come again and again though it is present.
    pub(crate) suspect: (usize, u8),
    /// The record of what the thread is doing, for workers and read-ahead threads.
    pub(crate) place: Option<usize>,
    /// The time that reads of sources have lately taken.
    pub(crate) pace: Duration,
    /// Number of pages that turned out to be unmapped.
    pub(crate) unmapped: usize,
    /// Number of pages that it has put in place, or found there.
    pub(crate) placed: usize,
    /// Why the source last failed where no thread waits, for the report of the fill.
    pub(crate) failure: Option<io::Error>,
}

impl PageFiller {
    pub(crate) fn new(thread: usize) -> Self {
        Self {
            thread,
            buffer: None,
            spare: [const { None }; MAX_SPARE_BUFFERS],
            zeros: None,
            suspect: (0, 0),
            place: None,
            pace: Duration::ZERO,
            unmapped: 0,
            placed: 0,
            failure: None,
        }
    }

    /// Makes this the filler of a worker, which notes when it waits for a source. Sources count as slow until one has
    /// delivered: otherwise faults that are read together with the first one would wait for it.
    pub(crate) fn begin_to_serve(&mut self, place: usize) {
        self.place = Some(place);
        self.pace = SLOW_READ + Duration::from_micros(1);
    }

    /// Whether sources keep this thread waiting, so that other workers should take the further faults.
    pub(crate) fn is_slow(&self) -> bool {
        self.pace > SLOW_READ
    }

    /// Notes that this thread begins to read a region's source.
    pub(super) fn set_reading(&self, context: &FillContext, region: &ServedRegion) {
        if let Some(place) = self.place {
            context.activities.set_reading(place, region.id, self.is_slow(), Instant::now());
        }
    }

    /// Does a piece of work until it is settled or must wait.
    pub(crate) fn resume(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        work: Work,
    ) -> Outcome {
        match work {
            Work::Fault(fault) => self.fault(context, descriptor, fault, None),
            Work::Stray { fault, tries, again } => {
                self.fault(context, descriptor, fault, Some((tries, again)))
            }
            Work::Read => Outcome::Settled,
            Work::Load(run, attempts) => self.run(context, descriptor, Next::Load(run, attempts)),
            Work::Answered { load, .. } => self.answered_later(context, descriptor, load),
            Work::Install(run, content) => self.run(context, descriptor, Next::Install(run, content)),
        }
    }

    /// Resolves a fault, as far as that is possible now. `stray`: no region was there before.
    fn fault(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        fault: Fault,
        stray: Option<(u32, bool)>,
    ) -> Outcome {
        span!(
            "fault",
            address = fault.address,
            kind = tracing::field::debug(fault.kind),
            thread = fault.thread,
            process = descriptor.process.get().map(tracing::field::display)
        );
        let next = match stray {
            None => self.look_up(context, descriptor, fault),
            Some((tries, again)) => self.stray_again(context, descriptor, fault, tries, again),
        };
        self.run(context, descriptor, next)
    }

    /// Gives up deferred work. The threads that wait for it fault again.
    pub(crate) fn give_up(&mut self, descriptor: &Descriptor, work: Work) {
        let serving = descriptor.lock_shard(self.thread);
        match work {
            Work::Read => {}
            Work::Fault(fault) | Work::Stray { fault, .. } => {
                if let Some(serving) = &*serving {
                    wake(&serving.uffd, page_of(fault.address));
                }
            }
            Work::Load(run, _) => run.give_up(serving.as_ref()),
            // Its run is given up by the thread that cancels it.
            Work::Answered { .. } => {}
            Work::Install(run, content) => {
                run.give_up(serving.as_ref());
                self.put_back(None, content);
            }
        }
    }

    /// Goes on with a load that a source has answered after it was started.
    fn answered_later(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        load: LoadId,
    ) -> Outcome {
        // Otherwise it was cancelled.
        let Some((run, answer)) = context.in_flight.take_queued(load) else { return Outcome::Settled };
        let is_ahead = run.purpose == Purpose::Ahead;
        let next = self.answered(context, descriptor, run, answer);
        match self.run(context, descriptor, next) {
            // A fault that needs the page reads it again.
            Outcome::Deferred(work, _) if is_ahead => {
                self.give_up(descriptor, work);
                Outcome::Settled
            }
            outcome => outcome,
        }
    }

    /// Takes steps until none is left for now.
    fn run(&mut self, context: &FillContext, descriptor: &Arc<Descriptor>, mut next: Next) -> Outcome {
        loop {
            next = match next {
                Next::Load(run, attempts) => self.load(context, descriptor, run, attempts),
                Next::Install(run, content) => {
                    let is_outside = matches!(content, FillContent::Outside(_));
                    if is_outside {
                        // The kernel may have to read it, as from a disk.
                        self.set_reading(context, &run.region);
                    }
                    let next = self.install(context, descriptor, run, content);
                    if let Some(place) = self.place.filter(|_| is_outside) {
                        context.activities.set_at_work(place, true);
                    }
                    next
                }
                Next::Done(done) => return done,
            }
        }
    }
}
