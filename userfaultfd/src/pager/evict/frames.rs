//! Which pages are resident, in which order they leave, and which mustn't.
//!
//! A page that becomes resident takes a frame, by the thread that fills it; it gives the frame up when it has left, by the
//! thread that evicts.

use std::ops::Range;
use std::sync::Arc;

use super::policy::{Link, List, NO_STAMP, NONE, Policy, S3Fifo};
use super::pool::{Pool, count};
use super::residence::Residence;
use crate::Uffd;
use crate::mapped_vec::{self, MappedVec};
use crate::pager::memory::served::ServedRegion;
use crate::pager::serve::shared::Shared;

/// Pages of a budget for each that may rest in the staging area: `benches/eviction` says what others cost.
const STAGED_SHARE: usize = 8;

/// Pages of a budget for each that stays free: below the first number pages leave, until there is the second.
const HIGH_SHARE: usize = 64;
const LOW_SHARE: usize = 32;

/// The staging area is short of its target by one page in this number before it is filled up.
const STAGE_SLACK: usize = 4;

/// Pages that the evicting thread has in hand at a time, of each kind.
pub(super) const BATCH: usize = 256;

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
            pins: mapped_vec::none(),
            pinned: 0,
            waiting: 0,
            is_busy: false,
            passes: 0,
            is_stuck: false,
            is_stopping: false,
        }
    }

    pub(super) fn resize(&mut self, limit: usize) {
        self.policy.resize(limit);
    }

    pub(super) fn staged_len(&self) -> usize {
        self.staged.len()
    }

    /// Takes a member in. Returns whether there was memory for it.
    pub(super) fn join(&mut self, member: Arc<Member>) -> bool {
        let slot = match self.members.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if !mapped_vec::try_reserve(&mut self.members) => return false,
            None => {
                self.members.push(None);
                self.members.len() - 1
            }
        };
        member.residence().set_member(Some(slot as u32));
        self.members[slot] = Some(member);
        true
    }

    /// Lets go of a member, of its pins, and of its pages, whose number is returned.
    pub(super) fn leave(&mut self, slot: u32) -> (Option<Arc<Member>>, usize) {
        let member = self.members[slot as usize].take();
        self.pins.retain(|pin| pin.member != slot);
        self.pinned = self.pins.iter().map(|pin| pin.pages.len()).sum();
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

    #[cfg(test)]
    pub(super) fn member(&self, slot: u32) -> Option<Arc<Member>> {
        self.members[slot as usize].clone()
    }

    /// Whether what is resident can become less.
    pub(super) fn may_shrink(&self) -> bool {
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
        Need { stage: stage.min(BATCH), drop: drop.min(BATCH) }
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
