//! Traces replayed through policies.

use std::collections::{BinaryHeap, VecDeque};

use crate::candidates::Noticing;
use crate::policy::{Link, NO_STAMP, NONE, Policy};
use crate::traces::Trace;

/// What a replay came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) accesses: u64,
    pub(crate) misses: u64,
    /// Accesses to pages in the staging area.
    pub(crate) staged: u64,
    /// The same for the hot set.
    pub(crate) hot_accesses: u64,
    pub(crate) hot_misses: u64,
}

impl Outcome {
    pub(crate) fn miss_ratio(&self) -> f64 {
        self.misses as f64 / self.accesses as f64
    }

    pub(crate) fn hot_miss_ratio(&self) -> f64 {
        self.hot_misses as f64 / self.hot_accesses.max(1) as f64
    }

    pub(crate) fn staged_ratio(&self) -> f64 {
        self.staged as f64 / self.accesses as f64
    }
}

/// What memory does at an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Hit,
    Staged,
    Miss,
}

/// Replays a trace. The first quarter warms memory up, and isn't counted.
fn replay(trace: &Trace, mut access: impl FnMut(usize, u32) -> Access) -> Outcome {
    let (mut outcome, warm) = (Outcome::default(), trace.accesses.len() / 4);
    for (at, page) in trace.accesses.iter().copied().enumerate() {
        let access = access(at, page);
        if at < warm {
            continue;
        }
        let is_miss = u64::from(access == Access::Miss);
        outcome.accesses += 1;
        outcome.misses += is_miss;
        outcome.staged += u64::from(access == Access::Staged);
        if page < trace.hot {
            outcome.hot_accesses += 1;
            outcome.hot_misses += is_miss;
        }
    }
    outcome
}

/// Memory that pages are put into, and taken out of.
struct Frames<P> {
    policy: P,
    links: Vec<Link>,
    page_of: Vec<u32>,
    frame_of: Vec<u32>,
    left: Vec<u32>,
    free: Vec<u32>,
}

impl<P: Policy> Frames<P> {
    fn new(pages: usize, frames: usize) -> Self {
        Self {
            policy: P::new(frames),
            links: vec![Link::new(); frames],
            page_of: vec![NONE; frames],
            frame_of: vec![NONE; pages],
            left: vec![NO_STAMP; pages],
            free: (0..frames as u32).collect(),
        }
    }

    fn frame(&self, page: u32) -> Option<u32> {
        Some(self.frame_of[page as usize]).filter(|frame| *frame != NONE)
    }

    fn take(&mut self, page: u32) -> u32 {
        let frame = self.free.pop().expect("a frame was made free");
        (self.page_of[frame as usize], self.frame_of[page as usize]) = (page, frame);
        frame
    }

    /// The page that leaves, if there is no room.
    fn evict(&mut self) -> Option<u32> {
        if !self.free.is_empty() {
            return None;
        }
        let (frame, stamp) = self.policy.evict(&mut self.links).expect("memory is full");
        let page = self.page_of[frame as usize];
        (self.frame_of[page as usize], self.left[page as usize]) = (NONE, stamp);
        self.free.push(frame);
        Some(page)
    }

    fn insert(&mut self, page: u32) {
        let frame = self.take(page);
        self.policy.insert(&mut self.links, frame, self.left[page as usize]);
    }
}

/// A policy that is told of every access.
pub(crate) fn with_accesses<P: Noticing>(trace: &Trace, pages: usize, frames: usize) -> Outcome {
    let mut memory = Frames::<P>::new(pages, frames);
    replay(trace, |_, page| {
        if let Some(frame) = memory.frame(page) {
            memory.policy.touch(&mut memory.links, frame);
            return Access::Hit;
        }
        memory.evict();
        memory.insert(page);
        Access::Miss
    })
}

/// A policy that is told of accesses to a staging area of one frame in `share`.
pub(crate) fn with_staging<P: Policy>(trace: &Trace, pages: usize, frames: usize, share: usize) -> Outcome {
    let room = frames / share;
    let mut memory = Frames::<P>::new(pages, frames - room);
    // When a page was put into the staging area, and what is in there, or was taken out since.
    let (mut entered, mut staged, mut count, mut clock) = (vec![0_u64; pages], VecDeque::new(), 0, 0);
    replay(trace, |_, page| {
        if memory.frame(page).is_some() {
            return Access::Hit;
        }
        let is_staged = std::mem::take(&mut entered[page as usize]) != 0;
        count -= usize::from(is_staged);
        if let Some(victim) = memory.evict() {
            clock += 1;
            entered[victim as usize] = clock;
            staged.push_back((victim, clock));
            count += 1;
        }
        while count > room {
            let (victim, when) = staged.pop_front().expect("as many as are counted");
            if entered[victim as usize] == when {
                entered[victim as usize] = 0;
                count -= 1;
            }
        }
        if is_staged {
            let frame = memory.take(page);
            memory.policy.restore(&mut memory.links, frame);
            return Access::Staged;
        }
        memory.insert(page);
        Access::Miss
    })
}

/// The page that is accessed again last leaves, or isn't taken in: what no policy can be better than.
pub(crate) fn optimal(trace: &Trace, pages: usize, frames: usize) -> Outcome {
    let mut next = vec![u32::MAX; trace.accesses.len()];
    let mut last = vec![u32::MAX; pages];
    for (at, page) in trace.accesses.iter().enumerate().rev() {
        next[at] = std::mem::replace(&mut last[*page as usize], at as u32);
    }
    // When each resident page is accessed next; 0: it isn't resident.
    let (mut due, mut count, mut heap) = (vec![0; pages], 0, BinaryHeap::new());
    replay(trace, |at, page| {
        let access = if due[page as usize] == 0 { Access::Miss } else { Access::Hit };
        count += usize::from(access == Access::Miss);
        due[page as usize] = next[at];
        heap.push((next[at], page));
        while count > frames {
            let (when, victim) = heap.pop().expect("each resident page is in it");
            if due[victim as usize] == when {
                due[victim as usize] = 0;
                count -= 1;
            }
        }
        access
    })
}
