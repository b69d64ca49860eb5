//! A number of resident pages that memories share, and which pages those are.
//!
//! A page that becomes resident takes a frame, by the thread that fills it; it gives the frame up when it has left, by the
//! thread that evicts. Room is reserved before content is loaded, so that what is in flight counts.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::policy::{Link, List, NO_STAMP, NONE, Policy, S3Fifo};
use super::residence::Residence;
use super::take;
use crate::lock_order::{LockGuard, RankedMutex, lock, rank};
use crate::mapped_vec::{self, MappedVec};
use crate::owner::Owner;
use crate::pager::memory::served::ServedRegion;
use crate::pager::serve::shared::Shared;
use crate::pager::serve::thread::Thread;
use crate::pager::{Error, Result};
use crate::sync::AtomicU64;
use crate::{Errno, Uffd};

/// Pages of the least budget: fewer leave no room for what is in flight.
const MIN_PAGES: usize = 16;

/// Pages that one fault fills at most, of a budget without an end: 2 MiB of 4 KiB.
const MAX_RUN_PAGES: usize = 512;

/// Pages of a budget for each that one fault may fill.
const RUN_SHARE: usize = 8;

/// Pages of a budget for each that may rest in the staging area: `benches/eviction` says what others cost.
const STAGED_SHARE: usize = 8;

/// Pages of a budget for each that stays free: below the first number pages leave, until there is the second.
const HIGH_SHARE: usize = 64;
const LOW_SHARE: usize = 32;

/// The staging area is short of its target by one page in this number before it is filled up.
const STAGE_SLACK: usize = 4;

/// Pages that the evicting thread has in hand at a time, of each kind.
pub(super) const BATCH: usize = 256;

/// Pages of the largest budget: half of what a [`Place`](super::residence::Place) can count.
const MAX_PAGES: usize = 1 << 27;

/// The delay until the evicting thread looks again whether what couldn't leave can.
const STUCK_INTERVAL: Duration = Duration::from_millis(100);

/// A limit for the resident memory of any number of [`LazyMemory`](crate::LazyMemory)s.
///
/// Clones are the same budget. When the memories that share it get close to the limit, a thread of the budget takes pages
/// away from them, those first that don't seem to be needed (S3-FIFO). A page that was written since it was filled goes
/// to an unlinked file of its memory, any other is dropped; both come back when they are touched. A fault that finds no
/// room waits until there is some.
///
/// A page on its way out rests in a staging area, which counts as resident, for an eighth of the budget. A fault takes it
/// back from there without reading anything; so the budget learns which pages are in use.
///
/// What is resident exceeds the limit by no more than what is in flight at the moment, but where pages can't leave: those
/// that are [pinned](crate::LazyMemory::pin), and written ones while the file can't be written, which is a
/// [`Problem::WriteBack`](crate::pager::Problem::WriteBack). A fault doesn't wait for such pages.
///
/// The page cache of a source that reads a file counts for a container, but not for the budget.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{Budget, FileSource};
///
/// let budget = Budget::new(1 << 20);
/// let path = std::env::current_exe()?;
/// let memory = match LazyMemory::builder(FileSource::open(&path)?).budget(&budget).build() {
///     Ok(memory) => memory,
///     Err(error) => return Ok(println!("{error}")), // no write protection here
/// };
/// assert!(memory.iter().copied().eq(std::fs::read(&path)?));
/// assert!(budget.resident() <= 1 << 20);
/// println!("{budget}: {:?}", budget.statistics());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Budget(Arc<Handle>);

/// What a [`Budget`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BudgetStatistics {
    /// Pages that have left memory.
    pub evictions: u64,
    /// Pages that were filled again after they had left.
    pub refaults: u64,
    /// Pages that were taken back from the staging area.
    pub second_chances: u64,
    /// Pages that were written to a spill file before they left.
    pub spilled: u64,
    /// Times that a page couldn't be written to its spill file, and stayed in memory.
    pub unwritten: u64,
    /// Faults that waited for room.
    pub waits: u64,
    /// How long they waited, altogether.
    pub waited: Duration,
    /// Pages of the staging area now.
    pub staged: usize,
}

/// The thread ends with the last one.
pub(super) struct Handle {
    pub(super) pool: Arc<Pool>,
    thread: RankedMutex<Option<Thread>, { rank::TURN }>,
}

/// What the evicting thread and all others share.
pub(super) struct Pool {
    owner: Option<Owner>,
    /// In pages.
    limit: AtomicUsize,
    /// Pages that are in frames, or in flight to one.
    resident: AtomicUsize,
    /// The number of resident pages at which the evicting thread has to be woken.
    wake_at: AtomicUsize,
    frames: RankedMutex<Frames, { rank::QUEUE }>,
    /// The evicting thread waits for something to do.
    work: Condvar,
    /// Others wait for room, or until the evicting thread has nothing in hand.
    pub(super) room: Condvar,
    pub(super) counters: Counters,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) evictions: AtomicU64,
    pub(super) refaults: AtomicU64,
    pub(super) second_chances: AtomicU64,
    pub(super) spilled: AtomicU64,
    pub(super) unwritten: AtomicU64,
    waits: AtomicU64,
    waited_ns: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

/// A memory that shares the budget.
pub(super) struct Member {
    pub(super) region: Arc<ServedRegion>,
    /// Where its first page lies.
    pub(super) start: usize,
    pub(super) uffd: Arc<Uffd>,
    /// For problems.
    pub(super) shared: Arc<Shared>,
}

impl Member {
    pub(super) fn residence(&self) -> &Residence {
        self.region.residence.as_deref().expect("a member has a residence")
    }
}

/// Whose page is in a frame.
#[derive(Clone, Copy, Debug)]
struct Tenant {
    member: u32,
    page: usize,
    is_staged: bool,
}

/// Pages that mustn't leave.
#[derive(Debug)]
struct Pin {
    member: u32,
    pages: Range<usize>,
}

/// A page that the evicting thread has claimed.
pub(super) struct Victim {
    pub(super) member: Arc<Member>,
    pub(super) page: usize,
    pub(super) frame: u32,
    /// For the policy, once the page has left.
    pub(super) stamp: u32,
    /// Whether it has got as far as it was to.
    pub(super) is_done: bool,
}

/// Which pages are resident. Nothing is allocated or freed while this is locked, no memory that is served is touched, and
/// no system call is made but those that map a vector's next part.
pub(super) struct Frames {
    links: MappedVec<Link>,
    tenants: MappedVec<Tenant>,
    /// The first of the free frames, each of which has the next one as its newer neighbour.
    free: u32,
    policy: S3Fifo,
    staged: List,
    /// How many frames have a page.
    used: usize,
    members: MappedVec<Option<Arc<Member>>>,
    pins: MappedVec<Pin>,
    pinned: usize,
    /// Threads that wait for room.
    pub(super) waiting: usize,
    /// Whether the evicting thread has pages in hand.
    pub(super) is_busy: bool,
    /// How often it had some.
    pub(super) passes: u64,
    /// Whether it can't get on: nothing that is resident may leave, or can.
    pub(super) is_stuck: bool,
    pub(super) is_stopping: bool,
}

/// What there is to do for the evicting thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// Pages to put into the staging area.
    pub(super) stage: usize,
    /// Pages to drop from there.
    pub(super) drop: usize,
}

impl Budget {
    /// A budget of `bytes` bytes. Memory needs one of 16 pages at least.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let pages = pages_of(bytes);
        let pool = Pool {
            owner: Owner::current().ok(),
            limit: AtomicUsize::new(pages),
            resident: AtomicUsize::new(0),
            wake_at: AtomicUsize::new(0),
            frames: RankedMutex::new(Frames::new(pages)),
            work: Condvar::new(),
            room: Condvar::new(),
            counters: Counters::default(),
        };
        Self(Arc::new(Handle { pool: Arc::new(pool), thread: RankedMutex::default() }))
    }

    /// Changes the budget to `bytes` bytes. If more is resident, the thread of the budget evicts what exceeds it.
    ///
    /// # Errors
    ///
    /// [`BudgetTooSmall`](Error::BudgetTooSmall): fewer than 16 pages.
    pub fn resize(&self, bytes: usize) -> Result<()> {
        let pages = check(pages_of(bytes))?;
        let pool = &self.0.pool;
        if !pool.is_here() {
            return Err(Error::NotServed);
        }
        let mut frames = pool.lock();
        pool.limit.store(pages, Ordering::SeqCst);
        frames.policy.resize(pages);
        frames.is_stuck = false;
        pool.work.notify_one();
        pool.room.notify_all();
        Ok(())
    }

    /// The limit, in bytes: whole pages.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.pool.limit() * crate::page_size()
    }

    /// Bytes that are resident now, with those that are in flight.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.0.pool.resident.load(Ordering::Relaxed) * crate::page_size()
    }

    /// What was done so far.
    #[must_use]
    pub fn statistics(&self) -> BudgetStatistics {
        let (pool, get) = (&self.0.pool, |counter: &AtomicU64| counter.load(Ordering::Relaxed));
        let counters = &pool.counters;
        BudgetStatistics {
            evictions: get(&counters.evictions),
            refaults: get(&counters.refaults),
            second_chances: get(&counters.second_chances),
            spilled: get(&counters.spilled),
            unwritten: get(&counters.unwritten),
            waits: get(&counters.waits),
            waited: Duration::from_nanos(get(&counters.waited_ns)),
            staged: if pool.is_here() { pool.lock().staged.len() } else { 0 },
        }
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.0.pool
    }

    /// Checks that memory can be had under it.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.0.pool.is_here() {
            return Err(Error::NotServed);
        }
        check(self.0.pool.limit()).map(drop)
    }

    /// Counts the pages of a region from now on. Its residence was made for this budget.
    pub(super) fn attach(&self, member: Member) -> Result<()> {
        let pool = &self.0.pool;
        let mut thread = lock(&self.0.thread);
        if thread.is_none() {
            let pool = Arc::clone(pool);
            *thread = Some(Thread::spawn(c"uffd-evict", move || take::run(&pool))?);
        }
        let member = Arc::new(member);
        let mut frames = pool.lock();
        let free = frames.members.iter().position(Option::is_none);
        let slot = match free {
            Some(slot) => slot,
            None if !mapped_vec::try_reserve(&mut frames.members) => return Err(Errno::ENOMEM.into()),
            None => {
                frames.members.push(None);
                frames.members.len() - 1
            }
        };
        member.residence().set_member(Some(slot as u32));
        frames.members[slot] = Some(member);
        Ok(())
    }

    /// Counts a region no longer, and lets go of its pages, which stay as they are. The evicting thread has none of them in
    /// hand when this returns.
    pub(super) fn detach(&self, residence: &Residence) {
        let pool = &self.0.pool;
        let mut frames = pool.lock();
        // From now on nothing of it becomes a victim, nor gets a frame.
        let Some(slot) = residence.member() else { return };
        residence.set_member(None);
        frames = pool.wait_for_pass(frames);
        let member = frames.members[slot as usize].take();
        let Frames { pins, pinned, .. } = &mut *frames;
        pins.retain(|pin| pin.member != slot);
        *pinned = pins.iter().map(|pin| pin.pages.len()).sum();
        let mut given_up = 0;
        for frame in 0..frames.tenants.len() as u32 {
            let tenant = frames.tenants[frame as usize];
            if tenant.member == slot {
                frames.unlink(frame);
                frames.release(frame);
                given_up += 1;
            }
        }
        pool.uncharge(given_up);
        frames.is_stuck = false;
        pool.room.notify_all();
        drop(frames);
        drop(member);
    }
}

fn pages_of(bytes: usize) -> usize {
    (bytes / crate::page_size()).min(MAX_PAGES)
}

fn check(pages: usize) -> Result<usize> {
    let page = crate::page_size();
    match pages {
        MIN_PAGES.. => Ok(pages),
        _ => Err(Error::BudgetTooSmall { bytes: pages * page, least: MIN_PAGES * page }),
    }
}

impl Pool {
    pub(super) fn lock(&self) -> LockGuard<'_, Frames> {
        lock(&self.frames)
    }

    /// Whether this is the process that made it: a fork's child may find it locked for ever.
    pub(super) fn is_here(&self) -> bool {
        self.owner.is_some_and(|owner| owner.is_current())
    }

    pub(super) fn limit(&self) -> usize {
        self.limit.load(Ordering::SeqCst)
    }

    /// Waits until the evicting thread has nothing in hand that it has chosen before.
    pub(super) fn wait_for_pass<'a>(&self, frames: LockGuard<'a, Frames>) -> LockGuard<'a, Frames> {
        let passes = frames.passes;
        let waits = |frames: &mut Frames| frames.is_busy && frames.passes == passes;
        frames.wait_while(&self.room, waits)
    }

    /// Pages that one fault fills at most.
    pub(super) fn max_run(&self) -> usize {
        (self.limit() / RUN_SHARE).clamp(1, MAX_RUN_PAGES)
    }

    /// Reserves room for some pages, and waits for it as long as others can leave. Not with a lock held.
    pub(super) fn reserve(&self, pages: usize) {
        let now = self.resident.fetch_add(pages, Ordering::SeqCst) + pages;
        if now >= self.wake_at.load(Ordering::SeqCst) {
            // Under the lock: it may be about to wait.
            let _frames = self.lock();
            self.work.notify_one();
        }
        if now > self.limit() {
            self.uncharge(pages);
            self.wait_for_room(pages);
        }
    }

    #[cold]
    fn wait_for_room(&self, pages: usize) {
        let since = Instant::now();
        let mut frames = self.lock();
        frames.waiting += 1;
        loop {
            let now = self.resident.fetch_add(pages, Ordering::SeqCst) + pages;
            // Nothing is waited for that can't leave: the thread that would let it may be this one, or wait for it.
            // Nor more than is ever made free: the budget has become smaller since the pages were claimed.
            if now <= self.limit() || pages > self.max_run() || !frames.may_shrink() {
                break;
            }
            self.uncharge(pages);
            // Also where another thread has taken the room that was made.
            self.work.notify_one();
            frames = frames.wait(&self.room);
        }
        frames.waiting -= 1;
        drop(frames);
        count(&self.counters.waits, 1);
        count(&self.counters.waited_ns, since.elapsed().as_nanos() as usize);
    }

    /// Takes room without waiting for it.
    pub(super) fn charge(&self, pages: usize) {
        self.resident.fetch_add(pages, Ordering::SeqCst);
    }

    fn uncharge(&self, pages: usize) {
        self.resident.fetch_sub(pages, Ordering::SeqCst);
    }

    /// Gives up room that was reserved and isn't needed, for which another thread may wait.
    pub(super) fn give_back(&self, pages: usize) {
        if pages > 0 {
            let frames = self.lock();
            self.uncharge(pages);
            if frames.waiting > 0 {
                self.room.notify_all();
            }
        }
    }

    /// Waits until there may be something to do for the evicting thread, or for no reason; with a timeout, while it is
    /// stuck.
    pub(super) fn wait_for_work<'a>(&self, mut frames: LockGuard<'a, Frames>) -> LockGuard<'a, Frames> {
        if frames.is_stuck {
            return frames.wait_timeout(&self.work, STUCK_INTERVAL);
        }
        self.wake_at.store(frames.wake_at(self), Ordering::SeqCst);
        // Either this sees what was reserved before, or the thread that reserves sees when to wake this.
        if frames.need(self) == Need::default() {
            frames = frames.wait(&self.work);
        }
        self.wake_at.store(usize::MAX, Ordering::SeqCst);
        frames
    }

    /// Stops the evicting thread.
    fn stop(&self) {
        self.lock().is_stopping = true;
        self.work.notify_one();
    }
}

impl Frames {
    fn new(limit: usize) -> Self {
        Self {
            links: mapped_vec::none(),
            tenants: mapped_vec::none(),
            free: NONE,
            policy: S3Fifo::new(limit),
            staged: List::new(),
            used: 0,
            members: mapped_vec::none(),
            pins: mapped_vec::none(),
            pinned: 0,
            waiting: 0,
            is_busy: false,
            passes: 0,
            is_stuck: false,
            is_stopping: false,
        }
    }

    /// Whether what is resident can become less.
    fn may_shrink(&self) -> bool {
        self.used > 0 && !self.is_stuck
    }

    /// The number of resident pages up to which nothing is evicted, and to which then.
    fn watermarks(&self, pool: &Pool) -> (usize, usize) {
        let limit = pool.limit();
        if self.waiting > 0 {
            let goal = limit.saturating_sub(pool.max_run());
            return (goal, goal);
        }
        let below = |share: usize| limit.saturating_sub((limit / share).max(1));
        (below(HIGH_SHARE), below(LOW_SHARE))
    }

    /// Pages that the staging area is to have: the more, the less room is left.
    fn staged_target(limit: usize, resident: usize) -> usize {
        let most = limit / STAGED_SHARE;
        (resident.saturating_sub(limit.saturating_sub(2 * most)) / 2).min(most)
    }

    /// What there is to do.
    pub(super) fn need(&self, pool: &Pool) -> Need {
        let (resident, staged) = (pool.resident.load(Ordering::SeqCst), self.staged.len());
        let (high, low) = self.watermarks(pool);
        let target = Self::staged_target(pool.limit(), resident);
        let over = if resident > high { resident - low } else { 0 };
        let spare = match self.waiting {
            0 if self.used > staged => staged.saturating_sub(target),
            // At once, and not only after others have been put there.
            _ => staged,
        };
        let drop = over.min(spare);
        let wanted = target + over - drop;
        let stage = wanted.saturating_sub(staged - drop).min(self.used - staged);
        if over == 0 && stage <= target / STAGE_SLACK {
            return Need::default();
        }
        Need { stage: stage.min(BATCH), drop: drop.min(BATCH) }
    }

    /// The number of resident pages at which there will be something to do.
    fn wake_at(&self, pool: &Pool) -> usize {
        let (limit, resident) = (pool.limit(), pool.resident.load(Ordering::SeqCst));
        let next = (resident + limit / HIGH_SHARE).max(limit - 2 * (limit / STAGED_SHARE));
        next.min(self.watermarks(pool).0) + 1
    }

    /// Claims pages that may leave, in the order of the policy, and puts them to `victims`.
    pub(super) fn choose_to_stage(&mut self, wanted: usize, victims: &mut MappedVec<Victim>) {
        // Every page twice, where most are pinned.
        let mut tries = 2 * (self.used - self.staged.len());
        while victims.len() < wanted && tries > 0 {
            tries -= 1;
            let Some((frame, stamp)) = self.policy.evict(&mut self.links) else { return };
            let Tenant { member, page, .. } = self.tenants[frame as usize];
            let owner = self.members[member as usize].as_ref();
            let owner = owner.filter(|member| member.residence().member().is_some());
            if owner.is_some_and(|member| self.is_pinned(member.residence(), page)) {
                // To where it is met less often.
                self.policy.restore(&mut self.links, frame);
                continue;
            }
            match owner.filter(|member| member.region.pages.try_claim_present(page)) {
                Some(member) => {
                    victims.push(Victim { member: Arc::clone(member), page, frame, stamp, is_done: false })
                }
                // A worker has it: it has just been filled, or is being written for the first time.
                None => self.policy.insert(&mut self.links, frame, NO_STAMP),
            }
        }
    }

    /// Claims the oldest pages of the staging area, and puts them to `victims`.
    pub(super) fn choose_to_drop(&mut self, wanted: usize, victims: &mut MappedVec<Victim>) {
        let mut tries = self.staged.len();
        while victims.len() < wanted && tries > 0 {
            tries -= 1;
            let Some(frame) = self.staged.pop(&mut self.links) else { return };
            let Tenant { member, page, .. } = self.tenants[frame as usize];
            let owner = self.members[member as usize].as_ref().filter(|member| {
                // A fault that has claimed it takes it back.
                member.residence().member().is_some() && member.region.pages.claim_missing(page).is_some()
            });
            match owner {
                Some(member) => {
                    let (member, stamp) = (Arc::clone(member), 0);
                    victims.push(Victim { member, page, frame, stamp, is_done: false });
                }
                None => self.staged.push(&mut self.links, frame),
            }
        }
    }

    fn is_pinned(&self, residence: &Residence, page: usize) -> bool {
        self.pins.iter().any(|pin| Some(pin.member) == residence.member() && pin.pages.contains(&page))
    }

    /// Notes which pages have come to the staging area, before their claims end; the others stay where they were.
    pub(super) fn staged(&mut self, victims: &[Victim]) {
        for victim in victims {
            let frame = victim.frame;
            if victim.is_done {
                let residence = victim.member.residence();
                residence.set_place(victim.page, residence.place(victim.page).staged());
                residence.set_stamp(victim.page, victim.stamp);
                self.tenants[frame as usize].is_staged = true;
                self.staged.push(&mut self.links, frame);
            } else {
                self.policy.restore(&mut self.links, frame);
            }
        }
    }

    /// Notes which pages have left, before their claims end; the others are in the staging area still.
    pub(super) fn dropped(&mut self, pool: &Pool, victims: &[Victim]) {
        let mut left = 0;
        for victim in victims {
            let (residence, frame) = (victim.member.residence(), victim.frame);
            if victim.is_done {
                residence.set_place(victim.page, residence.place(victim.page).left());
                self.release(frame);
                left += 1;
            } else {
                self.staged.push(&mut self.links, frame);
            }
        }
        pool.uncharge(left);
        count(&pool.counters.evictions, left);
    }

    /// Gives a page that was filled a frame, or puts it back to the others if it was in the staging area. Returns whether
    /// it was charged for.
    pub(super) fn enter(&mut self, residence: &Residence, page: usize, is_written: bool) -> bool {
        let Some(member) = residence.member() else { return false };
        let place = residence.place(page);
        let frame = if place.is_staged() {
            let frame = place.frame();
            self.staged.unlink(&mut self.links, frame);
            self.policy.restore(&mut self.links, frame);
            frame
        } else {
            let frame = self.take(member, page);
            self.policy.insert(&mut self.links, frame, residence.stamp(page));
            frame
        };
        self.tenants[frame as usize] = Tenant { member, page, is_staged: false };
        residence.set_place(page, place.entered(frame, is_written));
        true
    }

    fn take(&mut self, member: u32, page: usize) -> u32 {
        self.used += 1;
        if self.free != NONE {
            let frame = self.free;
            self.free = self.links[frame as usize].newer;
            return frame;
        }
        mapped_vec::reserve(&mut self.links, 1);
        mapped_vec::reserve(&mut self.tenants, 1);
        self.links.push(Link::new());
        self.tenants.push(Tenant { member, page, is_staged: false });
        self.links.len() as u32 - 1
    }

    fn release(&mut self, frame: u32) {
        self.used -= 1;
        self.tenants[frame as usize].member = NONE;
        self.links[frame as usize].newer = self.free;
        self.free = frame;
    }

    fn unlink(&mut self, frame: u32) {
        if self.tenants[frame as usize].is_staged {
            self.staged.unlink(&mut self.links, frame);
        } else {
            self.policy.remove(&mut self.links, frame);
        }
    }

    /// Pins pages, unless more would be pinned than the limit leaves room beside.
    pub(super) fn pin(&mut self, pool: &Pool, member: u32, pages: Range<usize>) -> bool {
        let pinned = self.pinned + pages.len();
        if pinned > pool.limit() / 2 || !mapped_vec::try_reserve(&mut self.pins) {
            return false;
        }
        self.pinned = pinned;
        self.pins.push(Pin { member, pages });
        true
    }

    /// Ends a pin of these pages.
    pub(super) fn unpin(&mut self, member: u32, pages: &Range<usize>) {
        let at = self.pins.iter().position(|pin| pin.member == member && pin.pages == *pages);
        if let Some(at) = at {
            self.pins.swap_remove(at);
            self.pinned -= pages.len();
            self.is_stuck = false;
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let thread = self.thread.get_mut().take();
        if !self.pool.is_here() {
            // A fork's child hasn't got the thread.
            thread.into_iter().for_each(std::mem::forget);
        } else if let Some(thread) = thread {
            self.pool.stop();
            thread.join();
        }
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget")
            .field("bytes", &self.bytes())
            .field("resident", &self.resident())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes resident", self.resident(), self.bytes())
    }
}
