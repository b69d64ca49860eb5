//! Background fills: missing pages are filled while no fault waits.
//!
//! A background fill has one thread, and more while its source is slow. One of them at a time has the turn: it waits until
//! no fault is being resolved, the limit is met and the fill isn't paused, takes the next step of the plan, and passes the
//! turn on. Sources are read without the turn and without any lock.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::fill_target::{FailedPages, STEP_BYTES, Target};
use super::plan::{FillOrder, Place, Plan};
use crate::lock_order::{RankedMutex, lock, rank};
use crate::owner::{Owner, abandon};
use crate::pager::activity::{Busy, Reads};
use crate::pager::thread::Thread;
use crate::pager::{Failed, Pager, Progress, RegionId, Result};

/// The longest interval between looks whether a fault waits, while less than [`STEP_BYTES`] is filled.
const STEP_TIME: Duration = Duration::from_micros(50);

/// The interval between looks whether a fault still waits.
const POLL_DELAY: Duration = Duration::from_micros(50);

/// Duration of a read of another region's source beyond which the fill no longer yields to it: such a read takes no CPU.
const HANGING_READ: Duration = Duration::from_millis(1);

/// The interval at which a paused or limited thread checks whether the region is still served.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A running background fill of a region's missing pages.
///
/// Before each step it checks whether a fault waits or is being resolved, and lets the fault go first, except one that
/// waits for a slow source of another region. A step is the region's [`Block`](crate::pager::FaultAround::Block);
/// otherwise 64 KiB, or, where reads of the source take longer than some 50 µs, as much as
/// [`Adaptive`](crate::pager::FaultAround::Adaptive) allows. With
/// [read-ahead threads](crate::pager::PagerBuilder::read_ahead_threads) a step is 1 MiB at most. Ranges that the source
/// [knows to be zero](crate::pager::PageSource::zeros) are filled without a read, up to 4 MiB in one step.
///
/// While the source is slow, several steps are read concurrently: four, or the pager's number of workers, or of
/// read-ahead threads plus one, whichever is most. They begin in order. A background fill, and the sources that it reads,
/// hold up no other region.
///
/// Pages that the source doesn't deliver stay missing until a fault needs them; [`wait`](Self::wait) returns them.
/// Before Linux 7.2 it overwrites [guard pages](crate::pager#what-the-kernel-doesnt-report).
///
/// Dropping it stops the fill, and waits for the steps that have begun, except for one whose source drops it.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{FileSource, FillOrder};
///
/// let memory = LazyMemory::builder(FileSource::open(std::env::current_exe()?)?).build()?;
/// let background = memory.background(FillOrder::Ascending)?;
/// background.limit(Some(1 << 30)); // bytes in a second
/// println!("{:?}", &memory[..4]); // doesn't wait for what is before it
/// let outcome = background.wait();
/// assert_eq!(outcome.done, outcome.total);
/// assert!(outcome.failed.is_empty());
/// assert_eq!(memory.statistics().missing_pages, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping it stops the fill"]
pub struct BackgroundFill {
    control: Arc<FillControl>,
}

/// The result of a [`BackgroundFill`] or a [`WorkingSetReplay`](crate::pager::WorkingSetReplay).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FillReport {
    /// Bytes handled, those of present pages included.
    pub done: u64,
    /// Bytes of the whole order. More than `done` if the region is no longer served.
    pub total: u64,
    /// Pages that couldn't be filled, ordered by address, mostly because the source failed. They are missing, unless a
    /// fault has filled or poisoned them since.
    pub failed: Vec<Failed>,
    /// The text of the first error of the source, if it failed.
    pub error: Option<String>,
}

struct FillControl {
    owner: Owner,
    state: RankedMutex<State, { rank::STORE }>,
    changed: Condvar,
    /// Held by the thread that waits for its turn, and then takes the next step.
    turn: RankedMutex<Turn, { rank::TURN }>,
    plan: Plan,
    /// Pages handled, and the number of pages of the order.
    done: AtomicUsize,
    total: usize,
    /// Pages that couldn't be filled.
    failed: FailedPages,
    region: RegionId,
    page_shift: u32,
    threads: RankedMutex<Vec<Thread>, { rank::STORE }>,
    /// Running threads, and their maximum.
    running: AtomicUsize,
    most_threads: usize,
}

#[derive(Debug)]
struct State {
    paused: bool,
    stopped: bool,
    /// Bytes per second.
    limit: Option<u64>,
    /// Bytes ahead of the limit at a moment. Not a duration, so that a new limit applies to them.
    owed: u128,
    since: Instant,
}

/// The next step.
#[derive(Debug)]
struct Turn {
    place: Place,
    /// Bytes until the next look whether a fault waits, and the time of the last look.
    left: usize,
    since: Instant,
    /// The reads of other regions' sources to which it last yielded, and since when.
    reads: Option<(Reads, Instant)>,
}

/// A step that a thread has taken.
struct Taken {
    pages: Range<usize>,
    /// Bytes that count for the limit until it is known what was filled.
    reserved: usize,
}

impl BackgroundFill {
    /// Starts to fill a target.
    pub(crate) fn start(target: Target, order: FillOrder) -> Result<Self> {
        let (count, shift) = (target.region().pages.count(), target.region().page_shift);
        Self::start_plan(target, Plan::new(order, count, shift))
    }

    pub(crate) fn start_plan(target: Target, plan: Plan) -> Result<Self> {
        let control = Arc::new(FillControl::new(&target, plan)?);
        start_thread(&Arc::new(target), &control)?;
        Ok(Self { control })
    }

    /// Returns the progress. Pages that were present already count as done.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let FillControl { done, total, page_shift, .. } = &*self.control;
        let bytes = |pages: usize| (pages as u64) << page_shift;
        Progress { done: bytes(done.load(Ordering::Acquire)), total: bytes(*total) }
    }

    /// Returns the pages that couldn't be filled so far: see [`FillReport::failed`].
    #[must_use]
    pub fn failed(&self) -> Vec<Failed> {
        if !self.control.owner.is_current() {
            return Vec::new();
        }
        let pages = self.control.failed.sorted();
        Failed::in_bytes(self.control.region, self.control.page_shift, pages)
    }

    /// Returns whether the fill has ended: all pages were handled, or the region is no longer served.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.control.running.load(Ordering::Acquire) == 0 || !self.control.owner.is_current()
    }

    /// Pauses the fill after the steps that have begun, until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.control.change(|state| state.paused = true);
    }

    /// Resumes a paused fill.
    pub fn resume(&self) {
        self.control.change(|state| state.paused = false);
    }

    /// Limits the bytes that are filled per second from now on; `None` lifts the limit. Zeros count, too.
    ///
    /// Bytes that were filled ahead of the old limit are paid off at the new one.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        self.control.change(|state| {
            state.settle(Instant::now());
            state.limit = bytes_per_second;
        });
    }

    /// Waits until the fill has ended. Resumes a paused fill.
    #[expect(clippy::must_use_candidate, reason = "waiting is a use of it")]
    pub fn wait(mut self) -> FillReport {
        self.finish()
    }

    pub(crate) fn finish(&mut self) -> FillReport {
        self.resume();
        self.join();
        let Progress { done, total } = self.progress();
        FillReport { done, total, failed: self.failed(), error: self.control.failed.error() }
    }

    fn join(&mut self) {
        if !self.control.owner.is_current() {
            // The threads aren't there, and one that had locked the list may not be either. Their handles may stand for
            // threads that this process has started since: they are never dropped.
            return abandon(&self.control);
        }
        // One may start another one until it ends.
        while let Some(thread) = { lock(&self.control.threads).pop() } {
            thread.join();
        }
    }
}

impl Drop for BackgroundFill {
    fn drop(&mut self) {
        self.control.change(|state| state.stopped = true);
        self.join();
    }
}

impl fmt::Debug for BackgroundFill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackgroundFill")
            .field("progress", &self.progress())
            .field("finished", &self.is_finished())
            .field("state", &self.control.state)
            .finish_non_exhaustive()
    }
}

impl State {
    /// Subtracts the bytes that the passed time allows.
    fn settle(&mut self, now: Instant) {
        const SECOND: u128 = 1_000_000_000;
        let Some(limit) = self.limit.map(|limit| u128::from(limit.max(1))) else {
            (self.owed, self.since) = (0, now);
            return;
        };
        let paid = now.saturating_duration_since(self.since).as_nanos() * limit / SECOND;
        if paid >= self.owed {
            (self.owed, self.since) = (0, now);
        } else {
            // To the nanosecond, so that nothing is lost however often this is called.
            self.since += nanos(paid * SECOND / limit);
            self.owed -= paid;
        }
    }

    /// The delay until the limit is met.
    fn rest(&self, now: Instant) -> Duration {
        let Some(limit) = self.limit.filter(|_| self.owed > 0) else { return Duration::ZERO };
        let whole = nanos((self.owed * 1_000_000_000).div_ceil(u128::from(limit.max(1))));
        whole.saturating_sub(now.saturating_duration_since(self.since)).max(Duration::from_nanos(1))
    }
}

fn nanos(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

impl Turn {
    /// Returns whether to take a step, or to yield to faults.
    fn advance_stream(&mut self, busy: Busy, now: Instant) -> bool {
        let Busy::Elsewhere(reads) = busy else {
            self.reads = None;
            return busy == Busy::No;
        };
        let since = self.reads.filter(|(before, _)| *before == reads).map_or(now, |(_, since)| since);
        self.reads = Some((reads, since));
        now.saturating_duration_since(since) >= HANGING_READ
    }
}

impl FillControl {
    fn change(&self, change: impl FnOnce(&mut State)) {
        if !self.owner.is_current() {
            return;
        }
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// Waits while the fill is paused or ahead of its limit. Returns whether there is a limit; `None`: the fill ends.
    fn go_on(&self, target: &Target) -> Option<bool> {
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            state.settle(now);
            let rest = if state.paused { POLL_INTERVAL } else { state.rest(now) };
            if state.stopped || target.is_over() {
                return None;
            } else if rest.is_zero() {
                return Some(state.limit.is_some());
            }
            state = state.wait_timeout(&self.changed, rest.min(POLL_INTERVAL));
        }
    }

    /// Whether it was dropped.
    fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Counts the filled bytes of a step towards the limit.
    fn filled(&self, reserved: usize, filled: usize) {
        if reserved > filled {
            let mut state = lock(&self.state);
            state.owed = state.owed.saturating_sub((reserved - filled) as u128);
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Waits for the turn of a thread, and takes the next step. `None`: there is none.
    fn take(&self, target: &Target, is_slow: bool) -> Option<Taken> {
        let mut turn = lock(&self.turn);
        let limited = loop {
            let limited = self.go_on(target)?;
            let now = Instant::now();
            if turn.left > 0 && !limited && now.saturating_duration_since(turn.since) <= STEP_TIME {
                break limited;
            }
            if turn.advance_stream(target.busy(), now) {
                (turn.left, turn.since) = (STEP_BYTES, now);
                break limited;
            }
            std::thread::park_timeout(POLL_DELAY);
            turn.left = 0;
        };
        let is_slow = is_slow && !limited;
        let long = if is_slow { self.plan.read_bytes >> self.page_shift } else { 0 };
        let pages = self.plan.next(&mut turn.place, target.step(is_slow).max(long))?;
        let bytes = pages.len() << self.page_shift;
        turn.left = turn.left.saturating_sub(bytes);
        let reserved = if limited { bytes } else { 0 };
        lock(&self.state).owed += reserved as u128;
        Some(Taken { pages, reserved })
    }

    /// Extends a step, up to a page, if it ends where the next step begins. Returns the new end.
    fn extend(&self, taken: &Range<usize>, to: usize) -> usize {
        let mut turn = lock(&self.turn);
        let Place { range, page } = turn.place;
        let most = self.plan.ranges.get(range).filter(|range| page == taken.end && range.contains(&page));
        let Some(most) = most else { return taken.end };
        turn.place.page = to.min(most.end).max(page);
        turn.place.page
    }

    fn new(target: &Target, plan: Plan) -> Result<Self> {
        let now = Instant::now();
        Ok(Self {
            owner: Owner::current()?,
            state: RankedMutex::new(State {
                paused: false,
                stopped: false,
                limit: None,
                owed: 0,
                since: now,
            }),
            changed: Condvar::new(),
            turn: RankedMutex::new(Turn { place: Place::default(), left: 0, since: now, reads: None }),
            done: AtomicUsize::new(0),
            total: plan.pages(),
            plan,
            failed: FailedPages::default(),
            region: RegionId(target.region().id),
            page_shift: target.region().page_shift,
            threads: RankedMutex::default(),
            running: AtomicUsize::new(0),
            most_threads: target.most_threads(),
        })
    }

    /// Whether one more thread may start. If so, it counts as running.
    fn may_start(&self) -> bool {
        let more = |running| (running < self.most_threads).then_some(running + 1);
        self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }
}

/// Starts one more thread, if the maximum allows it.
fn start_thread(target: &Arc<Target>, control: &Arc<FillControl>) -> std::io::Result<()> {
    if !control.may_start() {
        return Ok(());
    }
    let (target, here) = (Arc::clone(target), Arc::clone(control));
    let started = Thread::spawn(c"uffd-background", move || {
        fill(&target, &here);
        // The source is dropped before the thread counts as ended.
        drop(target);
        here.running.fetch_sub(1, Ordering::AcqRel);
    });
    match started {
        Ok(thread) => lock(&control.threads).push(thread),
        Err(error) => {
            control.running.fetch_sub(1, Ordering::AcqRel);
            return Err(error);
        }
    }
    Ok(())
}

/// Takes one step after the other.
fn fill(target: &Arc<Target>, control: &Arc<FillControl>) {
    let mut hands = target.hands();
    // The first thread stays however fast the source is.
    let is_first = control.running.load(Ordering::Acquire) == 1;
    while let Some(Taken { pages: taken, reserved }) = control.take(target, hands.is_slow()) {
        let (mut pages, mut filled) = (taken.clone(), 0);
        while pages.start < pages.end {
            if target.is_over() || control.is_stopped() {
                return;
            }
            let zeros = target.zeros(pages.start);
            let end = if zeros == 0 {
                pages.end
            } else if zeros > pages.len() && reserved == 0 {
                pages.end = control.extend(&pages, pages.start + zeros);
                pages.end
            } else {
                pages.end.min(pages.start + zeros)
            };
            let Some(step) =
                target.fill(&mut hands, pages.start..end, &control.failed, || control.is_stopped())
            else {
                return;
            };
            filled += step.filled;
            pages.start = step.next;
        }
        control.filled(reserved, filled << control.page_shift);
        control.done.fetch_add(pages.end - taken.start, Ordering::AcqRel);
        if hands.is_slow() {
            // Where no thread can be created, the running ones go on.
            let _refused = start_thread(target, control);
        } else if !is_first && hands.is_fast() {
            return;
        }
    }
}

impl Pager {
    /// Starts to fill the missing pages of a region in the background: see [`BackgroundFill`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](crate::pager::Error::NotServed): the region isn't served.
    /// - [`System`](crate::pager::Error::System): the thread couldn't be created.
    pub fn background(&self, region: RegionId, order: FillOrder) -> Result<BackgroundFill> {
        BackgroundFill::start(self.target(region)?, order)
    }
}
