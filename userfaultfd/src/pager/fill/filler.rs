//! The state machine that fills pages for one thread: each step says what comes next.

use std::sync::Arc;
use std::time::Duration;

use memmap2::MmapMut;

use super::buffers::MAX_SPARE_BUFFERS;
use super::context::FillContext;
use super::work::{Fault, FillContent, Outcome, Work, page_of};
use crate::pager::memory::descriptor::{Descriptor, wake};
use crate::pager::memory::page_run::PageRun;
use crate::pager::memory::served::ServedRegion;
use crate::pager::trace::span;

/// What comes next for a piece of work.
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
    /// The run's content has to be loaded. The source failed this number of times.
    Load(PageRun, u32),
    /// The content is there, and has to be put in place.
    Install(PageRun, FillContent),
    /// Nothing, for now.
    Done(Outcome),
}

/// A read of a source that takes longer keeps a thread waiting: about as long as a thread of another CPU takes to wake.
const SLOW_READ: Duration = Duration::from_micros(50);

/// Fills pages, for one thread.
#[derive(Debug)]
pub(crate) struct PageFiller {
    /// The number of the thread: its shards, its counters.
    pub(crate) thread: usize,
    pub(crate) buffer: Option<MmapMut>,
    /// Buffers whose content was put aside and used since.
    pub(crate) spare: [Option<MmapMut>; MAX_SPARE_BUFFERS],
    /// As long as the longest run of zeros. Nothing is ever written, so that it takes no memory.
    pub(crate) zeros: Option<MmapMut>,
    /// Where faults come again and again though something is there.
    pub(crate) suspect: (usize, u8),
    /// Where it is noted what the thread is doing, of a worker and of a thread that reads ahead.
    pub(crate) place: Option<usize>,
    /// How long a read of a source has taken lately.
    pub(crate) pace: Duration,
    /// How many pages were found where nothing is mapped.
    pub(crate) unmapped: usize,
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
        }
    }

    /// Begins to fill for a worker, and to note there when it waits for a source. Sources are taken for slow until one has
    /// delivered: what is read together with the first fault would wait for it.
    pub(crate) fn begin_to_serve(&mut self, place: usize) {
        self.place = Some(place);
        self.pace = SLOW_READ + Duration::from_micros(1);
    }

    /// Whether sources keep this thread waiting, so that faults are better left to the others.
    pub(crate) fn is_slow(&self) -> bool {
        self.pace > SLOW_READ
    }

    /// Notes that this thread begins to read a region's source.
    pub(super) fn set_reading(&self, context: &FillContext, region: &ServedRegion) {
        if let Some(place) = self.place {
            context.activities.set_reading(place, region.id, self.is_slow());
        }
    }

    /// Does a piece of work, as far as it gets.
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
            thread = fault.thread
        );
        let next = match stray {
            None => self.look_up(context, descriptor, fault),
            Some((tries, again)) => self.stray_again(context, descriptor, fault, tries, again),
        };
        self.run(context, descriptor, next)
    }

    /// Gives up what was put off. The threads that wait for it fault again.
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
            Work::Install(run, content) => {
                run.give_up(serving.as_ref());
                self.put_back(content);
            }
        }
    }

    /// Takes steps until nothing is left to do for now.
    fn run(&mut self, context: &FillContext, descriptor: &Descriptor, mut next: Next) -> Outcome {
        loop {
            next = match next {
                Next::Load(run, attempts) => self.load(context, descriptor, run, attempts),
                Next::Install(run, content) => {
                    let is_outside = matches!(content, FillContent::Outside(_));
                    if is_outside {
                        // It may have to be read, as from a disk.
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
