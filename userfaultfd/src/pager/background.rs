//! Filling what nobody has touched yet, without being in the way of those who touch.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::control::spawn;
use super::descriptor::{Descriptor, lock};
use super::fill::Done;
use super::layout::Segment;
use super::load::alike;
use super::region::Served;
use super::run::Run;
use super::shared::Shared;
use super::sigbus::Lazy;
use super::{Pager, Progress, RegionId, Result};

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
/// waits or is being answered, and lets it go first. Ranges that the source [knows to be zero](super::PageSource::zeros) are filled without being read,
/// up to 4 MiB in one step. What the source doesn't deliver is left absent, for whoever needs it.
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
    thread: Option<JoinHandle<()>>,
}

struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// Pages that were gone through, of how many.
    done: AtomicUsize,
    total: usize,
    page_shift: u32,
    finished: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    stopped: bool,
    /// Bytes in a second.
    limit: Option<u64>,
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
    /// Starts a thread that fills a target.
    pub(crate) fn start(target: Target, order: Order) -> Result<Self> {
        let (count, shift) = (target.region().pages.count(), target.region().page_shift);
        let ranges = pages_of(order, count, shift);
        let control = Arc::new(Control {
            state: Mutex::default(),
            changed: Condvar::new(),
            done: AtomicUsize::new(0),
            total: ranges.iter().map(Range::len).sum(),
            page_shift: shift,
            finished: AtomicBool::new(false),
        });
        let filling = Arc::clone(&control);
        let thread = spawn("uffd-background", move || {
            fill(&target, &filling, ranges);
            filling.finished.store(true, Ordering::Release);
        })?;
        Ok(Self { control, thread: Some(thread) })
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
        self.control.finished.load(Ordering::Acquire)
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
        if let Some(thread) = self.thread.take() {
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
            .field("state", &*lock(&self.control.state))
            .finish_non_exhaustive()
    }
}

impl Control {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// Waits until it is to go on, not before `due` unless there is no limit any more. `None`: it is to end.
    fn go_on(&self, due: Instant) -> Option<MutexGuard<'_, State>> {
        let mut state = lock(&self.state);
        loop {
            let rest = due.saturating_duration_since(Instant::now());
            if state.stopped {
                return None;
            } else if state.paused {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else if state.limit.is_some() && !rest.is_zero() {
                let waited = self.changed.wait_timeout(state, rest);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                return Some(state);
            }
        }
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

fn fill(target: &Target, control: &Control, ranges: Vec<Range<usize>>) {
    let mut due = Instant::now();
    let mut gone_through = 0;
    let mut limit = None;
    // How much is left of a step, and when it began.
    let (mut left, mut since) = (0, due);
    for pages in ranges {
        let mut next = pages.start;
        while next < pages.end {
            if target.is_over() {
                return;
            }
            let now = Instant::now();
            if left == 0 || limit.is_some() || now - since > STEP_TIME {
                let Some(state) = control.go_on(due) else { return };
                limit = state.limit;
                drop(state);
                if target.is_busy() {
                    std::thread::park_timeout(PAUSE);
                    left = 0;
                    continue;
                }
                (left, since) = (STEP, now);
            }
            let Some(step) = target.step(next..pages.end) else { return };
            left = left.saturating_sub((step.next - next) << control.page_shift);
            if let Some(limit) = limit {
                let nanos =
                    (step.filled << control.page_shift) as u128 * 1_000_000_000 / u128::from(limit.max(1));
                let took = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
                due = due.max(Instant::now()).checked_add(took).unwrap_or(due);
            }
            gone_through += step.next - next;
            next = step.next;
            control.done.store(gone_through, Ordering::Release);
        }
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

    /// Fills the first absent pages of a range. `None`: the region isn't served any more.
    fn step(&self, pages: Range<usize>) -> Option<Step> {
        let region = self.region();
        let mut most = (STEP >> region.page_shift).max(1);
        if pages.len() > most {
            // It is asked outside of all locks. What is absent may come later; then this is but a size.
            most = alike(region, pages.start, most);
        }
        match self {
            Self::Pager { shared, descriptor, region } => step(shared, descriptor, region, pages, most),
            Self::Sigbus(lazy) => {
                let before = lazy.absent_pages();
                let next = lazy.fill_some(pages, most << region.page_shift);
                Some(Step { next, filled: before.saturating_sub(lazy.absent_pages()) })
            }
        }
    }
}

/// Fills the first absent pages of a range that lie in one place.
fn step(
    shared: &Shared,
    descriptor: &Arc<Descriptor>,
    region: &Arc<Served>,
    pages: Range<usize>,
    most: usize,
) -> Option<Step> {
    let mut filler = shared.outside();
    let segment = match segment_from(descriptor, shared.outside_id(), region, pages.start)? {
        Some(segment) => segment,
        None => return Some(Step { next: pages.end, filled: 0 }),
    };
    let within = pages.start.max(segment.first)..pages.end.min(segment.pages().end);
    if within.is_empty() {
        return Some(Step { next: pages.end, filled: 0 });
    }
    let (run, next) = filler.claim_ahead(&segment, within, most);
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
        Background::start(self.target(region)?, order)
    }

    /// A region to fill.
    pub(crate) fn target(&self, region: RegionId) -> Result<Target> {
        let descriptor = self.of_region(region)?;
        let segments = descriptor.segments(self.shared.outside_id(), Some(region.0));
        let region = segments.into_iter().next().ok_or(super::Error::NotServed)?.region;
        Ok(Target::Pager { shared: Arc::clone(&self.shared), descriptor, region })
    }
}
