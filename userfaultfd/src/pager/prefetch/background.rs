//! Filling what nobody has touched yet, without being in the way of those who touch.
//!
//! A background has one thread, and more while its source is slow. One of them at a time has the turn: it waits until no
//! fault is being resolved, the limit is met and nothing is paused, takes the next step of the plan, and lets the next
//! thread have the turn. Sources are read without the turn, or any lock.

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
use crate::pager::serve::thread::Thread;
use crate::pager::{Failed, Pager, Progress, RegionId, Result};

/// The longest time between two looks whether a fault waits, while fewer than [`STEP_BYTES`] are filled.
const STEP_TIME: Duration = Duration::from_micros(50);

/// The delay until it is looked again whether a fault waits.
const POLL_DELAY: Duration = Duration::from_micros(50);

/// A read of another region's source that takes longer is given way to no more: it takes no CPU.
const HANGS: Duration = Duration::from_millis(1);

/// The delay until a thread that is paused, or has reached the limit, looks whether the region is still served.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Fills the missing pages of a region while no fault waits to be resolved.
///
/// Before each step it looks whether a fault waits or is being resolved, and lets it go first; but not one that waits for
/// a slow source of another region. A step is the region's
/// [`Block`](crate::pager::FaultAround::Block); otherwise 64 KiB, and where reads of the source take longer than some 50 µs, as much as
/// [`Adaptive`](crate::pager::FaultAround::Adaptive) allows. If the pager has [readers](crate::pager::PagerBuilder::read_ahead_threads), a step is
/// 1 MiB at most, as for them. Ranges that the source [knows to be zero](crate::pager::PageSource::zeros) are filled without
/// being read, up to 4 MiB in one step.
///
/// While the source is slow, several steps are read at the same time: four, or as many as the pager has threads, or
/// readers and one more. They begin in order. The steps of a background, and the sources that they read, keep no other
/// region waiting.
///
/// Pages that the source doesn't deliver stay missing until they are touched; [`wait`](Self::wait) returns which.
///
/// Dropping it ends it, after the steps that have begun, but for one whose source drops it.
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
pub struct BackgroundFill {
    control: Arc<FillControl>,
}

/// What a [`BackgroundFill`] or a [`WorkingSetReplay`](crate::pager::WorkingSetReplay) has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FillReport {
    /// Bytes gone through, present ones included.
    pub done: u64,
    /// Bytes to go through. More than `done` if the region isn't served any more.
    pub total: u64,
    /// Pages that couldn't be filled, by address: most often because the source failed. They are missing, unless a fault
    /// has filled or poisoned them since.
    pub failed: Vec<Failed>,
}

struct FillControl {
    owner: Owner,
    state: RankedMutex<State, { rank::STORE }>,
    changed: Condvar,
    /// Held by the thread that waits for its turn, and then takes the next step.
    turn: RankedMutex<Turn, { rank::TURN }>,
    plan: Plan,
    /// Pages gone through, of how many.
    done: AtomicUsize,
    total: usize,
    /// Pages that couldn't be filled.
    failed: FailedPages,
    region: RegionId,
    page_shift: u32,
    threads: RankedMutex<Vec<Thread>, { rank::STORE }>,
    /// Threads at work, and how many there may be.
    running: AtomicUsize,
    most_threads: usize,
}

#[derive(Debug)]
struct State {
    paused: bool,
    stopped: bool,
    /// Bytes a second.
    limit: Option<u64>,
    /// Bytes ahead of the limit at a moment. Not a time, so that another limit changes how long they last.
    owed: u128,
    since: Instant,
}

/// The next step.
#[derive(Debug)]
struct Turn {
    place: Place,
    /// Bytes until it is looked again whether a fault waits, and when it was looked last.
    left: usize,
    since: Instant,
    /// The reads of other regions' sources that it last gave way to, and since when.
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

    /// How far it is, of the pages that it is to go through. Those that were there already are among them.
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

    /// Whether it has ended: everything was gone through, or the region isn't served any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.control.running.load(Ordering::Acquire) == 0 || !self.control.owner.is_current()
    }

    /// Stops after the steps that have begun, until it is [resumed](Self::resume).
    pub fn pause(&self) {
        self.control.change(|state| state.paused = true);
    }

    /// Goes on.
    pub fn resume(&self) {
        self.control.change(|state| state.paused = false);
    }

    /// Limits how many bytes are filled in a second from now on; `None` lifts the limit. Zeros count, too.
    ///
    /// What was filled ahead of a limit is made up for at the speed of the new one.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        self.control.change(|state| {
            state.settle(Instant::now());
            state.limit = bytes_per_second;
        });
    }

    /// Waits until it has ended. If it was paused it is resumed.
    pub fn wait(mut self) -> FillReport {
        self.finish()
    }

    pub(crate) fn finish(&mut self) -> FillReport {
        self.resume();
        self.join();
        let Progress { done, total } = self.progress();
        FillReport { done, total, failed: self.failed() }
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
    /// Takes off what the time has paid.
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

    /// How long it takes until the limit is met.
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
    /// Returns whether to take a step, or to give way to faults.
    fn advance_stream(&mut self, busy: Busy, now: Instant) -> bool {
        let Busy::Elsewhere(reads) = busy else {
            self.reads = None;
            return busy == Busy::No;
        };
        let since = self.reads.filter(|(before, _)| *before == reads).map_or(now, |(_, since)| since);
        self.reads = Some((reads, since));
        now.saturating_duration_since(since) >= HANGS
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

    /// Waits while it is paused, or ahead of its limit. Returns whether there is a limit; `None`: it ends.
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

    /// Notes how much of a step was filled, for which there is a limit.
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
        let pages = self.plan.next(&mut turn.place, target.step(is_slow && !limited))?;
        let bytes = pages.len() << self.page_shift;
        turn.left = turn.left.saturating_sub(bytes);
        let reserved = if limited { bytes } else { 0 };
        lock(&self.state).owed += reserved as u128;
        Some(Taken { pages, reserved })
    }

    /// Takes more, up to a page, if what is taken ends where the next step begins. Returns the new end.
    fn extend(&self, taken: &Range<usize>, to: usize) -> usize {
        let mut turn = lock(&self.turn);
        let Place { range, page } = turn.place;
        let most = self.plan.ranges.get(range).filter(|range| page == taken.end && range.contains(&page));
        let Some(most) = most.filter(|_| self.plan.leave_out.is_none()) else { return taken.end };
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

    /// Whether one more thread may start. It counts from then on.
    fn may_start(&self) -> bool {
        let more = |running| (running < self.most_threads).then_some(running + 1);
        self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }
}

/// Starts a thread, if there may be one more.
fn start_thread(target: &Arc<Target>, control: &Arc<FillControl>) -> std::io::Result<()> {
    if !control.may_start() {
        return Ok(());
    }
    let (target, here) = (Arc::clone(target), Arc::clone(control));
    let started = Thread::spawn(c"uffd-background", move || {
        fill(&target, &here);
        // The source is let go of before it counts as ended.
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
            // Where there is no thread to be had, those that there are go on.
            let _refused = start_thread(target, control);
        } else if !is_first && hands.is_fast() {
            return;
        }
    }
}

impl Pager {
    /// Fills the missing pages of a region in the background: see [`BackgroundFill`].
    ///
    /// # Errors
    ///
    /// - [`NotServed`](crate::pager::Error::NotServed): the region isn't served any more.
    /// - [`System`](crate::pager::Error::System): a thread couldn't be had.
    pub fn background(&self, region: RegionId, order: FillOrder) -> Result<BackgroundFill> {
        BackgroundFill::start(self.target(region)?, order)
    }
}
