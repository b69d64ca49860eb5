//! Which pages are resident, in which order they leave, and which mustn't.
//!
//! A page that becomes resident takes a frame, by the thread that fills it; it gives the frame up when it has left, by the
//! thread that evicts.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::context::EvictContext;
use super::pins::{PinTerm, Pins};
use super::policy::{Link, List, NO_STAMP, NONE, Policy, S3Fifo};
use super::pool::{Pool, RUN_SHARE};
use super::residence::{Place, Residence};
use super::shared::wake_all;
use super::store::WriteBack;
use crate::Uffd;
use crate::mapped_vec::{self, MappedVec};
use crate::pager::memory::descriptor::wake;
use crate::pager::memory::served::ServedRegion;

mod writes;

/// Pages of a budget for each that may rest in the staging area: `benches/eviction` says what others cost.
const STAGED_SHARE: usize = 8;

/// Pages of a budget for each that stays free: below the first number pages leave, until there is the second.
const HIGH_SHARE: usize = 64;
const LOW_SHARE: usize = 32;

/// The staging area is short of its target by one page in this number before it is filled up.
const STAGE_SLACK: usize = 4;

/// Pages that the evicting thread has in hand at a time, of each kind.
pub(super) const BATCH_PAGES: usize = 256;

/// Pages that a caller wants out of memory and that are looked at with the frames locked.
const REQUEST_PAGES: usize = 4096;

/// Pages that wait to be written to a store, at most. Further ones are found again when they come to leave.
const QUEUE_PAGES: usize = 1024;

/// Duration for which threads wait for the evicting thread though nothing can leave, and the tries that it makes meanwhile:
/// on a busy machine it may not run for as long.
pub(super) const STUCK_PATIENCE: Duration = Duration::from_millis(30);
pub(super) const STUCK_TRIES: u32 = 8;

/// A memory that shares the budget.
pub(super) struct Member {
    pub(super) region: Arc<ServedRegion>,
    /// Where its first page lies.
    pub(super) start: usize,
    /// The descriptor of private memory, which doesn't end before the budget has let go of that.
    pub(super) uffd: Option<Arc<Uffd>>,
    pub(super) pager: EvictContext,
    /// The thread that writes to its store waits for pages.
    pub(super) write_work: Condvar,
}

impl Member {
    pub(super) fn residence(&self) -> &Residence {
        self.region.residence.as_deref().expect("a member has a residence")
    }

    /// The descriptor of private memory.
    pub(super) fn uffd(&self) -> &Uffd {
        self.uffd.as_deref().expect("it is private memory's")
    }

    /// Wakes the threads that wait for a page.
    pub(super) fn wake(&self, page: usize) {
        let address = self.start + page * crate::page_size();
        match self.residence().places() {
            Some(places) => wake_all(self, places, page),
            None => wake(self.uffd(), address..address + crate::page_size()),
        }
    }
}

/// Whose page is in a frame.
#[derive(Clone, Copy, Debug)]
struct Tenant {
    member: u32,
    page: usize,
    is_staged: bool,
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
    /// Whether a caller wants it out, who has it written.
    pub(super) is_requested: bool,
}

/// A member, and what there is to write to its store.
struct Slot {
    member: Arc<Member>,
    /// Pages that are about to leave and must be written before.
    queue: MappedVec<usize>,
    /// Threads that write its pages now.
    writers: usize,
    /// The pages that are being written.
    in_hand: Range<usize>,
    /// The pages that are being copied to be written, and whether the program has pinned any since that began.
    copied: (Range<usize>, bool),
    is_stopping: bool,
    /// Whether the last pages couldn't be written: nothing waits for the next ones.
    has_failed: bool,
    /// Whether it was reported that its pages can't leave.
    is_reported: bool,
}

/// A step of pages on their way out of memory, which a caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// From memory to the staging area.
    Stage,
    /// From there to where their content comes from.
    Drop,
}

/// Pages that a caller wants out of memory.
struct Request {
    number: u64,
    member: u32,
    /// Those that are left of it.
    pages: Range<usize>,
    step: Step,
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
    members: MappedVec<Option<Slot>>,
    requests: MappedVec<Request>,
    /// The number of the last request.
    requested: u64,
    /// When a store was last written, or began to be.
    write_progress: Instant,
    pub(super) pins: Pins,
    /// Threads that wait for room.
    pub(super) waiting: usize,
    /// Whether the evicting thread has pages in hand.
    pub(super) is_busy: bool,
    /// Threads that keep it from taking some: see [`Pool::pause`](super::pool::Pool::pause).
    pub(super) pauses: usize,
    /// How often it had some.
    pub(super) passes: u64,
    /// Since when it can't get on, as nothing that is resident may leave, or can; and how often it has tried.
    stuck: Option<(Instant, u32)>,
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

impl Frames {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            links: mapped_vec::none(),
            tenants: mapped_vec::none(),
            free: NONE,
            policy: S3Fifo::new(limit),
            staged: List::new(),
            used: 0,
            members: mapped_vec::none(),
            requests: mapped_vec::none(),
            requested: 0,
            write_progress: Instant::now(),
            pins: Pins::new(),
            waiting: 0,
            is_busy: false,
            pauses: 0,
            passes: 0,
            stuck: None,
            is_stopping: false,
        }
    }

    pub(super) fn resize(&mut self, limit: usize) {
        self.policy.resize(limit);
        self.make_room(limit);
    }

    /// Maps as many frames as there may be. Otherwise the thread that fills a page would wait for a mapping, with this locked,
    /// where the process has as many as it may. What can't be mapped now is mapped when it is needed.
    fn make_room(&mut self, limit: usize) {
        let members = self.members.iter().flatten();
        let pages: usize = members.map(|slot| slot.member.residence().page_count()).sum();
        // With what is in flight.
        let more = pages.min(limit + limit / RUN_SHARE).saturating_sub(self.links.len());
        let _as_far_as_possible = (self.links.try_reserve_exact(more), self.tenants.try_reserve_exact(more));
    }

    pub(super) fn staged_len(&self) -> usize {
        self.staged.len()
    }

    /// Takes a member in, of a budget of `limit` pages. Returns whether there was memory for it.
    pub(super) fn join(&mut self, member: Arc<Member>, limit: usize) -> bool {
        let slot = match self.members.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if !mapped_vec::try_reserve(&mut self.members) => return false,
            None => {
                self.members.push(None);
                self.members.len() - 1
            }
        };
        let mut queue = mapped_vec::none();
        if member.residence().store().is_some() {
            match mapped_vec::try_with_room(QUEUE_PAGES) {
                Some(room) => queue = room,
                None => return false,
            }
        }
        member.residence().set_member(Some(slot as u32));
        self.members[slot] = Some(Slot {
            member,
            queue,
            writers: 0,
            in_hand: 0..0,
            copied: (0..0, false),
            is_stopping: false,
            has_failed: false,
            is_reported: false,
        });
        self.make_room(limit);
        true
    }

    /// Lets go of a member, of its pins, and of its pages, whose number is returned.
    pub(super) fn leave(&mut self, slot: u32) -> (Option<Arc<Member>>, usize) {
        // Its queue is a mapping, which may be unmapped here.
        let member = self.members[slot as usize].take().map(|slot| slot.member);
        self.requests.retain(|request| request.member != slot);
        self.pins.leave(slot);
        let mut given_up = 0;
        for frame in 0..self.tenants.len() as u32 {
            if self.tenants[frame as usize].member == slot {
                self.unlink(frame);
                self.release(frame);
                given_up += 1;
            }
        }
        (member, given_up)
    }

    pub(super) fn member(&self, slot: u32) -> Option<Arc<Member>> {
        self.members[slot as usize].as_ref().map(|slot| Arc::clone(&slot.member))
    }

    /// The member that a frame's page is of, unless that ends.
    fn owner(&self, member: u32) -> Option<&Arc<Member>> {
        let slot = self.members[member as usize].as_ref()?;
        Some(&slot.member).filter(|member| member.residence().member().is_some())
    }

    /// The evicting thread has let go of what it had in hand.
    pub(super) fn end_pass(&mut self, pool: &Pool) {
        self.is_busy = false;
        self.passes += 1;
        pool.room.notify_all();
    }

    /// Whether what is resident can become less.
    pub(super) fn may_shrink(&self) -> bool {
        self.used > 0 && !self.is_stuck_for_long()
    }

    /// Notes whether the evicting thread can't get on, after each of its tries.
    pub(super) fn set_stuck(&mut self, is_stuck: bool) {
        self.stuck = is_stuck.then(|| {
            let (since, tries) = self.stuck.unwrap_or_else(|| (Instant::now(), 0));
            (since, tries.saturating_add(1))
        });
    }

    /// The same, since a moment that may be still to come, and after some tries.
    #[cfg(test)]
    pub(super) fn set_stuck_since(&mut self, since: Instant, tries: u32) {
        self.stuck = Some((since, tries));
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.is_some()
    }

    /// The same for so long that no thread waits for it any more. Often other threads have the pages for a moment, or a
    /// change of the layout keeps them: meanwhile threads that didn't wait would fill far more than the limit.
    pub(super) fn is_stuck_for_long(&self) -> bool {
        self.stuck.is_some_and(|(since, tries)| tries >= STUCK_TRIES && since.elapsed() >= STUCK_PATIENCE)
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

    /// Pages that the staging area should have: the more, the less room is left.
    fn staged_target(limit: usize, resident: usize) -> usize {
        let most = limit / STAGED_SHARE;
        (resident.saturating_sub(limit.saturating_sub(2 * most)) / 2).min(most)
    }

    /// What there is to do.
    pub(super) fn need(&self, pool: &Pool) -> Need {
        let (resident, staged) = (pool.resident(), self.staged.len());
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
        Need { stage: stage.min(BATCH_PAGES), drop: drop.min(BATCH_PAGES) }
    }

    /// The number of resident pages at which there will be something to do.
    pub(super) fn wake_at(&self, pool: &Pool) -> usize {
        let (limit, resident) = (pool.limit(), pool.resident());
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
            let owner = self.owner(member);
            if owner.is_some_and(|member| self.must_stay(member.residence(), page)) {
                // To where it is met less often.
                self.policy.restore(&mut self.links, frame);
                continue;
            }
            match owner.filter(|member| member.region.pages.try_claim_present(page)) {
                Some(member) => {
                    victims.push(Victim {
                        member: Arc::clone(member),
                        page,
                        frame,
                        stamp,
                        is_done: false,
                        is_requested: false,
                    });
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
            if self.must_be_written(member, page) {
                self.staged.push(&mut self.links, frame);
                continue;
            }
            let owner = self.owner(member);
            // A fault that has claimed it takes it back.
            match owner.filter(|member| member.region.pages.claim_missing(page).is_some()) {
                Some(member) => {
                    let (member, stamp) = (Arc::clone(member), NO_STAMP);
                    victims.push(Victim { member, page, frame, stamp, is_done: false, is_requested: false });
                }
                None => self.staged.push(&mut self.links, frame),
            }
        }
    }

    /// Whether a page can't leave: it is pinned, or was written and its store mustn't be.
    fn must_stay(&self, residence: &Residence, page: usize) -> bool {
        let is_kept = residence.store().is_some_and(|store| store.write_back == WriteBack::OnFlush);
        is_kept && residence.place(page).is_dirty() || self.is_pinned(residence, page)
    }

    fn is_pinned(&self, residence: &Residence, page: usize) -> bool {
        residence.member().is_some_and(|member| self.pins.has(member, page))
    }

    /// Notes which pages have come to the staging area, before their claims end; the others stay where they were.
    pub(super) fn staged(&mut self, victims: &[Victim]) {
        for victim in victims {
            let frame = victim.frame;
            if victim.is_done {
                let residence = victim.member.residence();
                let place = residence.change(victim.page, Place::staged);
                residence.set_stamp(victim.page, victim.stamp);
                let Tenant { member, is_staged, .. } = &mut self.tenants[frame as usize];
                *is_staged = true;
                let member = *member;
                self.staged.push(&mut self.links, frame);
                if place.is_written() && !victim.is_requested {
                    self.enqueue(member, victim.page);
                }
            } else {
                self.policy.restore(&mut self.links, frame);
            }
        }
    }

    /// Notes which pages have left, before their claims end; the others are in the staging area still.
    pub(super) fn dropped(&mut self, pool: &Pool, victims: &[Victim]) {
        let mut all = 0;
        for victims in victims.chunk_by(|one, next| Arc::ptr_eq(&one.member, &next.member)) {
            let (residence, mut left) = (victims[0].member.residence(), 0);
            for Victim { page, frame, is_done, .. } in victims {
                if *is_done {
                    residence.change(*page, Place::left);
                    self.release(*frame);
                    left += 1;
                } else {
                    self.staged.push(&mut self.links, *frame);
                }
            }
            residence.count(|counters| &counters.evictions, left);
            residence.resident.fetch_sub(left, Ordering::Relaxed);
            all += left;
        }
        pool.uncharge(all);
    }

    /// Pins pages, unless more would be pinned than a half of `limit`.
    pub(super) fn pin(&mut self, limit: usize, member: u32, pages: &Range<usize>, term: PinTerm) -> bool {
        let is_pinned = self.pins.pin(limit / 2, member, pages.clone(), term);
        if let Some(Slot { copied: (copied, is_noted), .. }) = self.members[member as usize].as_mut() {
            let overlaps = pages.start < copied.end && copied.start < pages.end;
            *is_noted |= is_pinned && term == PinTerm::Program && overlaps;
        }
        is_pinned
    }

    /// The frames of a member that have a page, from one frame on: as many as there is room for. Returns where to go on.
    pub(super) fn pages_of(
        &self,
        member: u32,
        mut frame: usize,
        pages: &mut Vec<usize>,
        mut wanted: impl FnMut(usize) -> bool,
    ) -> Option<usize> {
        while let Some(tenant) = self.tenants.get(frame) {
            if pages.len() == pages.capacity() {
                return Some(frame);
            }
            if tenant.member == member && wanted(tenant.page) {
                pages.push(tenant.page);
            }
            frame += 1;
        }
        None
    }

    /// How many frames there are, used or not.
    pub(super) fn frame_count(&self) -> usize {
        self.tenants.len()
    }

    /// Wants a step of pages on their way out of memory: requests are served in order. Returns the number of the request;
    /// `None` where there is no memory.
    pub(super) fn request(&mut self, member: u32, pages: Range<usize>, step: Step) -> Option<u64> {
        if !mapped_vec::try_reserve(&mut self.requests) {
            return None;
        }
        self.requested += 1;
        self.requests.push(Request { number: self.requested, member, pages, step });
        Some(self.requested)
    }

    pub(super) fn has_requests(&self) -> bool {
        !self.requests.is_empty()
    }

    pub(super) fn is_requested(&self, number: u64) -> bool {
        self.requests.iter().any(|request| request.number == number)
    }

    /// Claims pages that a caller wants out of memory, for the step that comes first. Returns whether that was all of it.
    pub(super) fn choose_requested(
        &mut self,
        to_stage: &mut MappedVec<Victim>,
        to_drop: &mut MappedVec<Victim>,
    ) -> bool {
        let Some(Request { member, pages, step, .. }) = self.requests.first() else { return false };
        let (slot, step) = (*member, *step);
        let next = pages.start..pages.end.min(pages.start + REQUEST_PAGES);
        let Some(member) = self.owner(slot).cloned() else { return false };
        let (residence, states) = (member.residence(), &member.region.pages);
        let victims = if step == Step::Stage { to_stage } else { to_drop };
        let mut next_page = next.start;
        while next_page < next.end && victims.len() < BATCH_PAGES {
            let page = next_page;
            next_page += 1;
            let (place, stamp) = (residence.place(page), NO_STAMP);
            let frame = place.frame();
            let tenant = self.tenants.get(frame as usize).filter(|tenant| {
                (tenant.member, tenant.page, tenant.is_staged) == (slot, page, place.is_staged())
            });
            if tenant.is_none() || self.must_stay(residence, page) {
                continue;
            }
            let is_claimed = match (step, place.is_staged()) {
                (Step::Stage, false) => states.try_claim_present(page),
                (Step::Drop, true) => {
                    // What its store doesn't have stays there.
                    let is_unwritten = residence.store().is_some() && place.is_dirty();
                    !is_unwritten && states.claim_missing(page).is_some()
                }
                _ => false,
            };
            if is_claimed {
                self.unlink(frame);
                let member = Arc::clone(&member);
                victims.push(Victim { member, page, frame, stamp, is_done: false, is_requested: true });
            }
        }
        let Some(Request { pages, .. }) = self.requests.first_mut() else { return false };
        pages.start = next_page;
        if next_page < pages.end {
            return false;
        }
        self.requests.remove(0);
        true
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
            residence.resident.fetch_add(1, Ordering::Relaxed);
            self.policy.insert(&mut self.links, frame, residence.stamp(page));
            frame
        };
        self.tenants[frame as usize] = Tenant { member, page, is_staged: false };
        residence.change(page, |place| place.entered(frame, is_written));
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
}
