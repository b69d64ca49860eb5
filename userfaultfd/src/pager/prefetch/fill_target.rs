//! The target of a background fill, which is filled a step at a time: a region of a pager, or sigbus memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Whole;
use crate::lazy::sigbus::{Lazy, Lost};
use crate::lock_order::{RankedMutex, lock, rank};
use crate::pager::activity::Busy;
use crate::pager::fill::ahead_queue::CHUNK_BYTES;
use crate::pager::fill::filler::PageFiller;
use crate::pager::fill::lease::Lease;
use crate::pager::fill::load::fill_batch_len;
use crate::pager::fill::retry;
use crate::pager::fill::work::{Outcome, RetryAfter, Work};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Descriptor, LOOK_SHARD};
use crate::pager::memory::fault_around::FaultAround;
use crate::pager::memory::page_run::PageRun;
use crate::pager::memory::served::ServedRegion;
use crate::pager::serve::shared::Shared;
use crate::pager::{Error, Pager, RegionId, Result, RetryPolicy};
use crate::sync_point::{Departure, Point, reach};
use crate::sys;

/// Bytes of one step where the source is fast, and between two looks whether a fault waits.
pub(super) const STEP_BYTES: usize = 64 << 10;

/// Concurrent reads of a slow source that are always allowed. More if the pager has more threads of a kind.
const MIN_READS_AT_ONCE: usize = 4;

/// Duration of a read below which a source is fast again. The limit of [`PageFiller::is_slow`] is higher, so that threads
/// don't come and go all the time.
const FAST_READ: Duration = Duration::from_micros(25);

/// Pages that couldn't be filled, and why the source failed first.
#[derive(Debug, Default)]
pub(super) struct FailedPages(RankedMutex<Failures, { rank::STORE }>);

#[derive(Debug, Default)]
struct Failures {
    /// In the order in which they were tried.
    pages: Vec<Range<usize>>,
    error: Option<io::Error>,
}

impl FailedPages {
    fn note(&self, pages: Range<usize>, error: Option<io::Error>) {
        let mut failed = lock(&self.0);
        match failed.pages.last_mut().filter(|last| last.end == pages.start) {
            Some(last) => last.end = pages.end,
            None => failed.pages.push(pages),
        }
        if failed.error.is_none() {
            failed.error = error;
        }
    }

    pub(super) fn sorted(&self) -> Vec<Range<usize>> {
        let mut pages = lock(&self.0).pages.clone();
        pages.sort_unstable_by_key(|pages| pages.start);
        pages
    }

    /// The first error of the source, as text.
    pub(super) fn error(&self) -> Option<String> {
        lock(&self.0).error.as_ref().map(|error| Whole(error).to_string())
    }

    fn take_error(&self) -> Option<io::Error> {
        lock(&self.0).error.take()
    }
}

/// The memory that is filled.
pub(crate) enum Target {
    Pager { shared: Arc<Shared>, descriptor: Arc<Descriptor>, region: Arc<ServedRegion> },
    Sigbus(Arc<Lazy>),
}

/// What a thread needs to fill.
#[expect(clippy::large_enum_variant, reason = "there is one for each thread, on its stack")]
pub(super) enum Hands<'a> {
    Pager(Lease<'a>),
    Sigbus,
}

/// The result of a step.
pub(super) struct Step {
    /// The first page that wasn't looked at.
    pub(super) next: usize,
    /// Pages that were filled.
    pub(super) filled: usize,
    /// The source failed for some. Others may not have been filled since the kernel or another thread was busy with them.
    has_failed: bool,
}

impl Step {
    fn nothing(next: usize) -> Self {
        Self { next, filled: 0, has_failed: false }
    }
}

impl Hands<'_> {
    pub(super) fn is_slow(&self) -> bool {
        matches!(self, Self::Pager(filler) if filler.is_slow())
    }

    pub(super) fn is_fast(&self) -> bool {
        !matches!(self, Self::Pager(filler) if filler.pace >= FAST_READ)
    }
}

impl Target {
    pub(crate) fn region(&self) -> &Arc<ServedRegion> {
        match self {
            Self::Pager { region, .. } => region,
            Self::Sigbus(lazy) => lazy.region(),
        }
    }

    pub(super) fn hands(&self) -> Hands<'_> {
        match self {
            Self::Pager { shared, .. } => Hands::Pager(shared.lease()),
            Self::Sigbus(_) => Hands::Sigbus,
        }
    }

    /// Whether no page is left to fill.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Self::Pager { shared, region, descriptor } => {
                shared.is_stopping() || region.is_ending() || descriptor.is_closed()
            }
            Self::Sigbus(lazy) => lazy.is_closed(),
        }
    }

    /// Returns whether a fault waits or is being resolved.
    pub(super) fn busy(&self) -> Busy {
        match self {
            Self::Pager { shared, region, .. } => shared.busy(region.id),
            Self::Sigbus(lazy) if lazy.is_resolving() => Busy::Yes,
            Self::Sigbus(_) => Busy::No,
        }
    }

    /// Pages of a step.
    pub(super) fn step(&self, is_slow: bool) -> usize {
        let region = self.region();
        let bytes = match (region.around, self) {
            (FaultAround::Block(block), _) => block,
            (FaultAround::Adaptive { most }, Self::Pager { shared, .. }) if is_slow => {
                STEP_BYTES.max(if shared.fill.threads.read_ahead > 0 { most.min(CHUNK_BYTES) } else { most })
            }
            _ => STEP_BYTES,
        };
        (bytes >> region.page_shift).max(1)
    }

    /// The number of pages from one on that are known to be zero, of which many are filled at once.
    pub(super) fn zeros(&self, page: usize) -> usize {
        fill_batch_len(self.region(), page, 0)
    }

    /// Fills the first missing pages of a range, and notes those that fail. `None`: the region is no longer served.
    pub(super) fn fill(
        &self,
        hands: &mut Hands<'_>,
        pages: Range<usize>,
        failed: &FailedPages,
        is_stopped: impl Fn() -> bool,
    ) -> Option<Step> {
        match (self, hands) {
            (Self::Pager { shared, descriptor, region }, Hands::Pager(filler)) => {
                step(shared, (descriptor, region), filler, pages, failed, is_stopped)
            }
            (Self::Sigbus(lazy), _) => {
                let (start, most) = (pages.start, pages.len() << self.region().page_shift);
                let step = lazy.fill_some(pages, most, Lost::Missing)?;
                let states = &self.region().pages;
                let mut has_failed = false;
                for page in (start..step.next).filter(|page| states.is_failed(*page)) {
                    failed.note(page..page + 1, None);
                    has_failed = true;
                }
                Some(Step { next: step.next, filled: step.filled, has_failed })
            }
            (Self::Pager { .. }, Hands::Sigbus) => unreachable!("hands of another target"),
        }
    }

    /// Fills missing pages in the calling thread, without yielding to faults. Pages that the source doesn't deliver after
    /// all retries stay missing. Returns the first error of the source in the last attempt.
    pub(crate) fn fill_now(&self, pages: Range<usize>) -> Result<Option<io::Error>> {
        let mut failed = FailedPages::default();
        let retry = match self {
            Self::Pager { shared, .. } => shared.fill.retry,
            // The source is in memory: a retry can't help.
            Self::Sigbus(_) => RetryPolicy { attempts: 1, delay: Duration::ZERO },
        };
        let (mut attempt, mut pause, since) = (1, sys::Pause::new(), Instant::now());
        loop {
            let (mut next, mut hands, mut has_failed) = (pages.start, self.hands(), false);
            while next < pages.end {
                let end = pages.end.min(next.saturating_add(self.step(false)));
                let step = self.fill(&mut hands, next..end, &failed, || false).ok_or(Error::NotServed)?;
                next = step.next;
                has_failed |= step.has_failed;
            }
            drop(hands);
            let states = &self.region().pages;
            for page in pages.clone() {
                let mut pause = sys::Pause::new();
                while states.is_in_work(page) {
                    pause.rest();
                }
            }
            let mut missing = pages.clone().filter(|page| states.is_missing(*page)).peekable();
            if self.is_over() || missing.peek().is_none() {
                break;
            }
            // That was no attempt of the source.
            if !has_failed
                && since.elapsed() < retry::SHORT_PATIENCE
                && missing.any(|page| self.is_mapped(page))
            {
                pause.rest();
                continue;
            }
            let Some(delay) = retry.delay_after(attempt) else { break };
            attempt += 1;
            failed = FailedPages::default();
            std::thread::sleep(delay);
        }
        Ok(failed.take_error())
    }

    /// Whether a page has an address.
    fn is_mapped(&self, page: usize) -> bool {
        match self {
            Self::Pager { descriptor, region, .. } => segment_from(descriptor, LOOK_SHARD, region, page)
                .flatten()
                .is_some_and(|segment| segment.pages().contains(&page)),
            Self::Sigbus(_) => true,
        }
    }

    /// The number of threads that may fill it concurrently.
    pub(super) fn most_threads(&self) -> usize {
        match self {
            Self::Pager { shared, .. } => {
                MIN_READS_AT_ONCE.max(shared.fill.threads.workers).max(shared.fill.threads.read_ahead + 1)
            }
            // The kernel reads the source's pages, with the read-ahead of mappings.
            Self::Sigbus(_) => 1,
        }
    }
}

/// Fills the first missing pages of a range that lie in one segment.
fn step(
    shared: &Shared,
    (descriptor, region): (&Arc<Descriptor>, &Arc<ServedRegion>),
    filler: &mut PageFiller,
    pages: Range<usize>,
    failed: &FailedPages,
    is_stopped: impl Fn() -> bool,
) -> Option<Step> {
    let segment = match segment_from(descriptor, filler.thread, region, pages.start)? {
        Some(segment) => segment,
        None => return Some(Step::nothing(pages.end)),
    };
    let within = pages.start.max(segment.first)..pages.end.min(segment.pages().end);
    if within.is_empty() {
        return Some(Step::nothing(pages.end));
    }
    let (run, next) = PageRun::claim(&segment, within, usize::MAX);
    let Some(run) = run else { return Some(Step::nothing(next)) };
    let (claimed, thread) = (run.pages(), filler.thread);
    let mut put_off = false;
    // Returns whether the process is there, whether all of the run was put in place, and why the source failed. Where a
    // budget limits its region the run may have left again since.
    let mut load = |run: PageRun| {
        let (placed, pages) = (filler.placed, run.pages().len());
        filler.failure = None;
        let alive = match filler.resume(&shared.fill, descriptor, Work::Load(run.early(), 0)) {
            Outcome::Settled => true,
            // A fault that needs the page reads it again.
            Outcome::Deferred(work, retry) => {
                // A load ahead that waits for nothing but another one is one whose source has failed.
                put_off |= !(matches!(work, Work::Load(..)) && retry == RetryAfter::OtherLoad);
                filler.give_up(descriptor, work);
                true
            }
            Outcome::TargetGone => false,
        };
        (alive, filler.placed - placed == pages, filler.failure.take())
    };
    let states = &region.pages;
    let has_failed_now =
        |page: usize| region.is_wanted(page) && !states.is_loading(page) && !states.is_poisoned(page);
    let is_failed = |page: usize| has_failed_now(page) && is_there(descriptor, thread, &segment, page);
    let address = run.address();
    let (mut alive, is_placed, mut failure) = load(run);
    reach(Point::Evict(Departure::AfterPrefetch), address);
    let (mut filled, mut has_failed) = (if is_placed { claimed.len() } else { 0 }, false);
    let rest = if is_placed { claimed.end..claimed.end } else { claimed.clone() };
    for page in rest {
        // Of pages that failed together, one may be the cause.
        let mut is_placed = false;
        if claimed.len() > 1 {
            if !alive {
                break;
            }
            match states.claim_missing(page) {
                Some(removed) => {
                    let run = PageRun::new(&segment, page..page + 1, removed);
                    if region.is_ending() || shared.is_stopping() || is_stopped() {
                        run.give_up(descriptor.lock_shard(thread).as_ref());
                        return None;
                    }
                    (alive, is_placed, failure) = load(run);
                }
                None => is_placed = !states.is_poisoned(page),
            }
        }
        if !is_placed && is_failed(page) {
            failed.note(page..page + 1, failure.take());
            has_failed = true;
        }
        filled += usize::from(is_placed || !states.is_missing(page));
    }
    if !alive {
        shared.retire(descriptor);
        return None;
    }
    Some(Step { next, filled, has_failed: has_failed && !put_off })
}

/// Whether a page is still at its address.
fn is_there(descriptor: &Descriptor, thread: usize, segment: &Segment, page: usize) -> bool {
    let serving = descriptor.lock_shard(thread);
    let address = segment.address_of(page);
    let now = serving.as_ref().zip(address).and_then(|(serving, address)| serving.layout.find(address));
    now.is_some_and(|now| Arc::ptr_eq(&now.region, &segment.region) && now.address_of(page) == address)
}

/// The segment of a region that has a page, or else the first one behind it. `None`: the descriptor is no longer served.
/// Nothing is allocated while the layout is locked.
fn segment_from(
    descriptor: &Descriptor,
    thread: usize,
    region: &Arc<ServedRegion>,
    page: usize,
) -> Option<Option<Segment>> {
    let serving = descriptor.lock_shard(thread);
    let segments = serving.as_ref()?.layout.segments().iter();
    let here = segments.filter(|segment| Arc::ptr_eq(&segment.region, region) && page < segment.pages().end);
    Some(here.min_by_key(|segment| segment.first).cloned())
}

impl Pager {
    /// Returns the target for a region.
    pub(crate) fn target(&self, region: RegionId) -> Result<Target> {
        let descriptor = self.of_region(region)?;
        let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
        let region = segments.into_iter().next().ok_or(Error::NotServed)?.region;
        Ok(Target::Pager { shared: Arc::clone(&self.shared), descriptor, region })
    }
}
