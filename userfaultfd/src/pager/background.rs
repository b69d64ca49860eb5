//! Filling what nobody has touched yet, without being in the way of those who touch.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::control::spawn;
use super::descriptor::{Descriptor, lock};
use super::fill::Done;
use super::layout::Segment;
use super::load::alike;
use super::region::Served;
use super::run::Run;
use super::shared::{BACKGROUNDS, Shared};
use super::sigbus::Lazy;
use super::{Pager, Progress, RegionId, Result};
use crate::owner::Owner;

/// So many bytes are filled between two looks whether somebody waits, unless they take longer than that.
const STEP: usize = 64 << 10;
const STEP_TIME: Duration = Duration::from_micros(50);

/// So long it waits before it looks again whether faults are answered.
const PAUSE: Duration = Duration::from_micros(50);

/// What a background fill fills, in which order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// All of it, from the first page on.
    Ascending,
    /// These ranges, one after the other, and nothing else. They are in bytes from the start of the region, are
    /// extended to whole pages, and cut to the region.
    Ranges(Vec<Range<usize>>),
}

/// A thread that fills what is absent of a region, as long as no fault is to be answered.
///
/// Before each small step, of 64 KiB or 50 µs (a page or a read of the source if that is more), it looks whether a fault
/// waits or is being answered, and lets it go first. Ranges that the source
/// [knows to be zero](super::PageSource::zeros) are filled without being read, up to 4 MiB in one step. What the source
/// doesn't deliver is left absent, for whoever needs it.
///
/// Dropping it ends it, after the step that it is at.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{FileSource, Order};
///
/// let memory = LazyMemory::builder(FileSource::open(std::env::current_exe()?)?).build()?;
/// let background = memory.background(Order::Ascending)?;
/// background.limit(Some(1 << 30)); // bytes in a second
/// println!("{:?}", &memory[..4]); // doesn't wait for what is before it
/// let progress = background.wait();
/// assert_eq!(progress.done, progress.total);
/// assert_eq!(memory.statistics().absent_pages, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Background {
    control: Arc<Control>,
    /// None in another process.
    threads: Vec<JoinHandle<()>>,
}

struct Control {
    owner: Owner,
    state: Mutex<State>,
    changed: Condvar,
    /// What to go through, and what wasn't begun of it.
    ranges: Vec<Range<usize>>,
    next: Mutex<Place>,
    /// Pages that were gone through, of how many.
    done: AtomicUsize,
    total: usize,
    page_shift: u32,
    /// Threads that are at it.
    running: AtomicUsize,
}

#[derive(Debug)]
struct State {
    paused: bool,
    stopped: bool,
    /// Bytes in a second, and when there may be more.
    limit: Option<u64>,
    due: Instant,
}

/// A page of a range.
#[derive(Debug, Default)]
struct Place {
    range: usize,
    page: usize,
}

/// Where pages are filled.
pub(crate) enum Target {
    Pager { shared: Arc<Shared>, descriptor: Arc<Descriptor>, region: Arc<Served> },
    Sigbus(Arc<Lazy>),
}

/// What a step did.
struct Step {
    /// The first page that wasn't looked at.
    next: usize,
    /// Pages that were filled.
    filled: usize,
}

impl Background {
    /// Starts so many threads that fill a target. One alone goes in order.
    pub(crate) fn start(target: Target, order: Order, threads: usize) -> Result<Self> {
        let (count, shift) = (target.region().pages.count(), target.region().page_shift);
        let ranges = pages_of(order, count, shift);
        let state = State { paused: false, stopped: false, limit: None, due: Instant::now() };
        let control = Arc::new(Control {
            owner: Owner::current()?,
            state: Mutex::new(state),
            changed: Condvar::new(),
            done: AtomicUsize::new(0),
            total: ranges.iter().map(Range::len).sum(),
            next: Mutex::default(),
            ranges,
            page_shift: shift,
            running: AtomicUsize::new(threads),
        });
        let (target, mut background) = (Arc::new(target), Self { control, threads: Vec::new() });
        for thread in 0..threads {
            let (target, control) = (Arc::clone(&target), Arc::clone(&background.control));
            background.threads.push(spawn("uffd-background", move || {
                fill(&target, &control, thread);
                control.running.fetch_sub(1, Ordering::AcqRel);
            })?);
        }
        Ok(background)
    }

    /// How far it is, of the pages that it is to go through. Those that were there already are among them.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let Control { done, total, page_shift, .. } = &*self.control;
        let bytes = |pages: usize| (pages as u64) << page_shift;
        Progress { done: bytes(done.load(Ordering::Acquire)), total: bytes(*total) }
    }

    /// Whether it has ended: everything was gone through, or the region isn't served any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.control.running.load(Ordering::Acquire) == 0 || !self.control.owner.is_current()
    }

    /// Stops after the step that it is at, until it is [resumed](Self::resume).
    pub fn pause(&self) {
        self.control.change(|state| state.paused = true);
    }

    /// Goes on.
    pub fn resume(&self) {
        self.control.change(|state| state.paused = false);
    }

    /// Fills no more than so many bytes in a second from now on; with `None` as many as it can. Zeros count, too.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        self.control.change(|state| state.limit = bytes_per_second);
    }

    /// Waits until it has ended. If it was paused it is resumed.
    pub fn wait(mut self) -> Progress {
        self.finish()
    }

    pub(crate) fn finish(&mut self) -> Progress {
        self.resume();
        self.join();
        self.progress()
    }

    fn join(&mut self) {
        let is_there = self.control.owner.is_current();
        for thread in self.threads.drain(..) {
            if !is_there {
                std::mem::forget(thread);
                continue;
            }
            // A source that panics is an error like others; nothing else does.
            let _panicked = thread.join();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.control.change(|state| state.stopped = true);
        self.join();
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background")
            .field("progress", &self.progress())
            .field("finished", &self.is_finished())
            .field("state", &self.control.state)
            .finish_non_exhaustive()
    }
}

impl Control {
    fn change(&self, change: impl FnOnce(&mut State)) {
        if !self.owner.is_current() {
            return;
        }
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// Waits until it is to go on, and tells the limit. `None`: it is to end.
    fn go_on(&self) -> Option<Option<u64>> {
        let mut state = lock(&self.state);
        loop {
            let rest = state.due.saturating_duration_since(Instant::now());
            if state.stopped {
                return None;
            } else if state.paused {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else if state.limit.is_some() && !rest.is_zero() {
                let waited = self.changed.wait_timeout(state, rest);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                return Some(state.limit);
            }
        }
    }

    /// Notes that so many pages were filled, for which there is a limit.
    fn filled(&self, pages: usize, limit: u64) {
        let nanos = (pages << self.page_shift) as u128 * 1_000_000_000 / u128::from(limit.max(1));
        let took = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut state = lock(&self.state);
        state.due = state.due.max(Instant::now()).checked_add(took).unwrap_or(state.due);
    }

    /// Takes what comes next: `most` pages at most, of what is left of a range.
    fn take(&self, most: impl FnOnce(Range<usize>) -> usize) -> Option<Range<usize>> {
        let mut next = lock(&self.next);
        let rest = loop {
            let range = self.ranges.get(next.range)?;
            let start = next.page.max(range.start);
            if start < range.end {
                break start..range.end;
            }
            *next = Place { range: next.range + 1, page: 0 };
        };
        let end = rest.end.min(rest.start + most(rest.clone()));
        next.page = end;
        Some(rest.start..end)
    }
}

/// The ranges of pages to go through, in a region of so many.
fn pages_of(order: Order, count: usize, shift: u32) -> Vec<Range<usize>> {
    match order {
        Order::Ascending => std::iter::once(0..count).collect(),
        Order::Ranges(ranges) => {
            let pages = |range: Range<usize>| {
                let end = (range.end >> shift) + usize::from(range.end & ((1 << shift) - 1) != 0);
                range.start >> shift..end.min(count)
            };
            let ranges = ranges.into_iter().filter(|range| !range.is_empty()).map(pages);
            ranges.filter(|pages| !pages.is_empty()).collect()
        }
    }
}

fn fill(target: &Target, control: &Control, thread: usize) {
    let mut limit = None;
    // How much is left of a step, and when it began.
    let (mut left, mut since) = (0, Instant::now());
    while !target.is_over() {
        let now = Instant::now();
        if left == 0 || limit.is_some() || now - since > STEP_TIME {
            let Some(now_limited) = control.go_on() else { return };
            limit = now_limited;
            if target.is_busy() {
                std::thread::park_timeout(PAUSE);
                left = 0;
                continue;
            }
            (left, since) = (STEP, now);
        }
        let Some(pages) = control.take(|rest| target.most(rest)) else { return };
        let mut next = pages.start;
        while next < pages.end {
            let Some(step) = target.step(next..pages.end, thread) else { return };
            if let Some(limit) = limit {
                control.filled(step.filled, limit);
            }
            next = step.next;
        }
        left = left.saturating_sub(pages.len() << control.page_shift);
        control.done.fetch_add(pages.len(), Ordering::AcqRel);
    }
}

impl Target {
    pub(crate) fn region(&self) -> &Arc<Served> {
        match self {
            Self::Pager { region, .. } => region,
            Self::Sigbus(lazy) => lazy.region(),
        }
    }

    /// Whether there is nothing to fill any more.
    fn is_over(&self) -> bool {
        match self {
            Self::Pager { shared, region, .. } => shared.is_stopping() || region.is_ending(),
            Self::Sigbus(lazy) => lazy.is_closed(),
        }
    }

    /// Whether a fault waits or is being answered.
    fn is_busy(&self) -> bool {
        match self {
            Self::Pager { shared, .. } => shared.is_busy(),
            Self::Sigbus(_) => Lazy::is_busy(),
        }
    }

    /// How many pages to fill in one step, of those that are left of a range.
    fn most(&self, rest: Range<usize>) -> usize {
        let region = self.region();
        let most = (STEP >> region.page_shift).max(1);
        if rest.len() > most { alike(region, rest.start, most) } else { most }
    }

    /// Fills the first absent pages of a range. `None`: the region isn't served any more.
    fn step(&self, pages: Range<usize>, thread: usize) -> Option<Step> {
        match self {
            Self::Pager { shared, descriptor, region } => step(shared, descriptor, region, pages, thread),
            Self::Sigbus(lazy) => {
                let (before, most) = (lazy.absent_pages(), pages.len() << self.region().page_shift);
                let next = lazy.fill_some(pages, most);
                Some(Step { next, filled: before.saturating_sub(lazy.absent_pages()) })
            }
        }
    }

    /// How many threads fill it at the same time where the order doesn't matter.
    pub(crate) fn parallel(&self) -> usize {
        match self {
            Self::Pager { .. } => BACKGROUNDS,
            // There they would be taken for faults.
            Self::Sigbus(_) => 1,
        }
    }
}

/// Fills the first absent pages of a range that lie in one place.
fn step(
    shared: &Shared,
    descriptor: &Arc<Descriptor>,
    region: &Arc<Served>,
    pages: Range<usize>,
    thread: usize,
) -> Option<Step> {
    let mut filler = shared.background(thread);
    let segment = match segment_from(descriptor, filler.thread, region, pages.start)? {
        Some(segment) => segment,
        None => return Some(Step { next: pages.end, filled: 0 }),
    };
    let within = pages.start.max(segment.first)..pages.end.min(segment.pages().end);
    if within.is_empty() {
        return Some(Step { next: pages.end, filled: 0 });
    }
    let (run, next) = filler.claim_ahead(&segment, within, usize::MAX);
    let Some(run) = run else { return Some(Step { next, filled: 0 }) };
    let claimed = run.pages();
    let mut load = |run: Run| match filler.load(shared, descriptor, run.early(), 0) {
        Done::Yes => true,
        // Who needs it asks for it.
        Done::Later(work, _) => {
            filler.give_up(descriptor, work);
            true
        }
        Done::Gone => false,
    };
    let mut alive = load(run);
    let states = &region.pages;
    if claimed.len() > 1 {
        // Among pages that couldn't be had together, one may be what is wrong.
        for page in claimed.clone() {
            let removed = states.claim_absent(page);
            let run = removed.map(|removed| Run::new(&segment, page..page + 1, removed));
            alive = alive && run.is_none_or(&mut load);
        }
    }
    if !alive {
        shared.gone(descriptor);
        return None;
    }
    let filled = claimed.filter(|page| !states.is_absent(*page)).count();
    Some(Step { next, filled })
}

/// The segment of a region that a page is in, or else the first behind it. `None`: the descriptor isn't served any
/// more. Nothing is allocated while the layout is locked.
fn segment_from(
    descriptor: &Descriptor,
    thread: usize,
    region: &Arc<Served>,
    page: usize,
) -> Option<Option<Segment>> {
    let serving = descriptor.enter(thread);
    let segments = serving.as_ref()?.layout.segments().iter();
    let here = segments.filter(|segment| Arc::ptr_eq(&segment.region, region) && page < segment.pages().end);
    Some(here.min_by_key(|segment| segment.first).cloned())
}

impl Pager {
    /// Fills what is absent of a region in the background: see [`Background`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](super::Error::NotServed): the region isn't served any more.
    /// - [`System`](super::Error::System): a thread couldn't be had.
    pub fn background(&self, region: RegionId, order: Order) -> Result<Background> {
        Background::start(self.target(region)?, order, 1)
    }

    /// A region to fill.
    pub(crate) fn target(&self, region: RegionId) -> Result<Target> {
        let descriptor = self.of_region(region)?;
        let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
        let region = segments.into_iter().next().ok_or(super::Error::NotServed)?.region;
        Ok(Target::Pager { shared: Arc::clone(&self.shared), descriptor, region })
    }
}
