//! The policies that the library's is compared with.

use crate::policy::{Link, List, NO_STAMP, NONE, Policy, S3Fifo};

/// The page that is at the end of a queue leaves. An access to a page brings it to the front again, or doesn't.
#[derive(Debug)]
pub(crate) struct Queue<const ACCESS_COUNTS: bool>(List);

/// The oldest leaves.
pub(crate) type Fifo = Queue<false>;

/// The page that wasn't accessed for longest leaves.
pub(crate) type Lru = Queue<true>;

impl<const ACCESS_COUNTS: bool> Policy for Queue<ACCESS_COUNTS> {
    fn new(_capacity: usize) -> Self {
        Self(List::new())
    }

    fn resize(&mut self, _capacity: usize) {}

    fn insert(&mut self, links: &mut [Link], frame: u32, _left: u32) {
        self.0.push(links, frame);
    }

    fn restore(&mut self, links: &mut [Link], frame: u32) {
        self.0.push(links, frame);
    }

    fn evict(&mut self, links: &mut [Link]) -> Option<(u32, u32)> {
        self.0.pop(links).map(|frame| (frame, NO_STAMP))
    }

    fn remove(&mut self, links: &mut [Link], frame: u32) {
        self.0.unlink(links, frame);
    }
}

/// The oldest leaves that wasn't accessed since it was looked at.
#[derive(Debug)]
pub(crate) struct Clock(List);

impl Policy for Clock {
    fn new(_capacity: usize) -> Self {
        Self(List::new())
    }

    fn resize(&mut self, _capacity: usize) {}

    fn insert(&mut self, links: &mut [Link], frame: u32, _left: u32) {
        links[frame as usize].freq = 0;
        self.0.push(links, frame);
    }

    fn restore(&mut self, links: &mut [Link], frame: u32) {
        self.insert(links, frame, NO_STAMP);
    }

    fn evict(&mut self, links: &mut [Link]) -> Option<(u32, u32)> {
        loop {
            let frame = self.0.pop(links)?;
            if std::mem::take(&mut links[frame as usize].freq) == 0 {
                return Some((frame, NO_STAMP));
            }
            self.0.push(links, frame);
        }
    }

    fn remove(&mut self, links: &mut [Link], frame: u32) {
        self.0.unlink(links, frame);
    }
}

/// A hand goes from the oldest to the newest, and takes what wasn't accessed; what was accessed keeps its place.
#[derive(Debug)]
pub(crate) struct Sieve {
    list: List,
    /// What is looked at next; [`NONE`]: the oldest.
    hand: u32,
}

impl Policy for Sieve {
    fn new(_capacity: usize) -> Self {
        Self { list: List::new(), hand: NONE }
    }

    fn resize(&mut self, _capacity: usize) {}

    fn insert(&mut self, links: &mut [Link], frame: u32, _left: u32) {
        links[frame as usize].freq = 0;
        self.list.push(links, frame);
    }

    /// Where it was: behind the hand.
    fn restore(&mut self, links: &mut [Link], frame: u32) {
        links[frame as usize].freq = 0;
        match self.hand {
            NONE => self.list.push(links, frame),
            hand => self.list.insert(links, frame, hand, links[hand as usize].older),
        }
    }

    fn evict(&mut self, links: &mut [Link]) -> Option<(u32, u32)> {
        loop {
            let frame = if self.hand == NONE { self.list.oldest } else { self.hand };
            if frame == NONE {
                return None;
            }
            self.hand = links[frame as usize].newer;
            if std::mem::take(&mut links[frame as usize].freq) == 0 {
                self.list.unlink(links, frame);
                return Some((frame, NO_STAMP));
            }
        }
    }

    fn remove(&mut self, links: &mut [Link], frame: u32) {
        if self.hand == frame {
            self.hand = links[frame as usize].newer;
        }
        self.list.unlink(links, frame);
    }
}

/// A policy that is told of accesses, as where the machine notices them.
pub(crate) trait Noticing: Policy {
    /// A resident page was accessed.
    fn touch(&mut self, links: &mut [Link], frame: u32);
}

/// Accesses of a page that [`S3Fifo`] counts at most.
const MAX_FREQ: u8 = 3;

impl Noticing for S3Fifo {
    fn touch(&mut self, links: &mut [Link], frame: u32) {
        let freq = &mut links[frame as usize].freq;
        *freq = (*freq + 1).min(MAX_FREQ);
    }
}

impl<const ACCESS_COUNTS: bool> Noticing for Queue<ACCESS_COUNTS> {
    fn touch(&mut self, links: &mut [Link], frame: u32) {
        if ACCESS_COUNTS {
            self.0.unlink(links, frame);
            self.0.push(links, frame);
        }
    }
}

impl Noticing for Clock {
    fn touch(&mut self, links: &mut [Link], frame: u32) {
        links[frame as usize].freq = 1;
    }
}

impl Noticing for Sieve {
    fn touch(&mut self, links: &mut [Link], frame: u32) {
        links[frame as usize].freq = 1;
    }
}

/// Checks that each does what it says: of twenty pages in order, two are accessed.
pub(crate) fn check() {
    fn order<P: Noticing>() -> Vec<u32> {
        let (mut policy, mut links) = (P::new(20), vec![Link::new(); 20]);
        (0..20).for_each(|frame| policy.insert(&mut links, frame, NO_STAMP));
        [2, 2, 5, 5].into_iter().for_each(|frame| policy.touch(&mut links, frame));
        policy.remove(&mut links, 7);
        std::iter::from_fn(|| policy.evict(&mut links).map(|(frame, _)| frame)).collect()
    }
    let others = || (0..20).filter(|frame| *frame != 7);
    let last: Vec<_> = others().filter(|frame| !matches!(frame, 2 | 5)).chain([2, 5]).collect();
    assert_eq!(order::<Fifo>(), others().collect::<Vec<_>>());
    for order in [order::<Clock>(), order::<Sieve>(), order::<Lru>()] {
        assert_eq!(order, last);
    }
    let (mut sieve, mut links) = (Sieve::new(6), vec![Link::new(); 6]);
    (0..6).for_each(|frame| sieve.insert(&mut links, frame, NO_STAMP));
    assert_eq!(sieve.evict(&mut links), Some((0, NO_STAMP)));
    sieve.restore(&mut links, 0);
    let order: Vec<_> = std::iter::from_fn(|| sieve.evict(&mut links).map(|(frame, _)| frame)).collect();
    assert_eq!(order, [1, 2, 3, 4, 5, 0], "what is restored keeps its place");
}
