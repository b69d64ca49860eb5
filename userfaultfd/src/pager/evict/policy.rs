//! Which page leaves next.
//!
//! A policy orders frames, which are numbers of resident pages. What it keeps of each is a [`Link`], in memory of its
//! caller, so that it allocates nothing. `benches/eviction` compiles this file, too, and compares the policy with others
//! on traces: of those that need no second list of what has left, it has the fewest misses where memory is too small for
//! a loop, and hardly more than the best elsewhere.

/// No frame.
pub(crate) const NONE: u32 = u32::MAX;

/// The stamp of a page that has never left, or whose leaving says nothing.
pub(crate) const NO_STAMP: u32 = 0;

/// The place of a frame in the lists of a policy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) newer: u32,
    pub(crate) older: u32,
    /// Accesses of the page that were noticed since it was looked at, up to a few.
    pub(crate) freq: u8,
    is_main: bool,
}

impl Link {
    /// A frame that is in no list.
    pub(crate) const fn new() -> Self {
        Self { newer: NONE, older: NONE, freq: 0, is_main: false }
    }
}

/// Decides which page leaves next.
///
/// The machine notices no accesses of resident pages. So a victim rests in a staging area: one that is accessed there is
/// [restored](Self::restore), and that is all the policy learns.
pub(crate) trait Policy {
    /// Makes a policy for a number of frames.
    fn new(capacity: usize) -> Self;

    /// Changes the number of frames.
    fn resize(&mut self, capacity: usize);

    /// A page became resident. `left` is the stamp that [`evict`](Self::evict) gave when it last left.
    fn insert(&mut self, links: &mut [Link], frame: u32, left: u32);

    /// A page that was just evicted was accessed before it had left, and is back in a frame.
    fn restore(&mut self, links: &mut [Link], frame: u32);

    /// Takes out the frame that leaves next, with a stamp for its page. `None` if there is no frame.
    fn evict(&mut self, links: &mut [Link]) -> Option<(u32, u32)>;

    /// Takes out a frame whose page has gone otherwise.
    fn remove(&mut self, links: &mut [Link], frame: u32);
}

/// Frames by the order in which they were put in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List {
    pub(crate) newest: u32,
    pub(crate) oldest: u32,
    len: usize,
}

impl List {
    pub(crate) const fn new() -> Self {
        Self { newest: NONE, oldest: NONE, len: 0 }
    }

    /// Puts a frame in as the newest.
    pub(crate) fn push(&mut self, links: &mut [Link], frame: u32) {
        self.insert(links, frame, NONE, self.newest);
    }

    /// Puts a frame in between two neighbours, each of which may be [`NONE`].
    pub(crate) fn insert(&mut self, links: &mut [Link], frame: u32, newer: u32, older: u32) {
        (links[frame as usize].newer, links[frame as usize].older) = (newer, older);
        match newer {
            NONE => self.newest = frame,
            newer => links[newer as usize].older = frame,
        }
        match older {
            NONE => self.oldest = frame,
            older => links[older as usize].newer = frame,
        }
        self.len += 1;
    }

    /// Takes a frame out.
    pub(crate) fn unlink(&mut self, links: &mut [Link], frame: u32) {
        let Link { newer, older, .. } = links[frame as usize];
        match newer {
            NONE => self.newest = older,
            newer => links[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => links[older as usize].newer = newer,
        }
        self.len -= 1;
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes the oldest out.
    pub(crate) fn pop(&mut self, links: &mut [Link]) -> Option<u32> {
        let oldest = Some(self.oldest).filter(|frame| *frame != NONE)?;
        self.unlink(links, oldest);
        Some(oldest)
    }
}

/// New pages prove themselves in a small queue; those that were accessed there, or come back soon after they have left it,
/// are kept in a main one.
///
/// Which pages have left lately isn't kept in a queue: a page's stamp counts what has left the small one before it.
#[derive(Debug)]
pub(crate) struct S3Fifo {
    small: List,
    main: List,
    capacity: usize,
    /// Counts pages that leave the small queue, without [`NO_STAMP`].
    left: u32,
}

/// Frames of which one belongs to the small queue.
const SMALL_SHARE: usize = 10;

/// Accesses in the small queue that take a page to the main one.
const PROVEN: u8 = 2;

impl S3Fifo {
    fn is_recent(&self, left: u32) -> bool {
        let main = self.capacity - self.capacity / SMALL_SHARE;
        left != NO_STAMP && (self.left.wrapping_sub(left) as usize) < main
    }

    fn push(&mut self, links: &mut [Link], frame: u32, is_main: bool) {
        let link = &mut links[frame as usize];
        (link.freq, link.is_main) = (0, is_main);
        let list = if is_main { &mut self.main } else { &mut self.small };
        list.push(links, frame);
    }
}

impl Policy for S3Fifo {
    fn new(capacity: usize) -> Self {
        Self { small: List::new(), main: List::new(), capacity, left: NO_STAMP }
    }

    fn resize(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    fn insert(&mut self, links: &mut [Link], frame: u32, left: u32) {
        let is_main = self.is_recent(left);
        self.push(links, frame, is_main);
    }

    /// The next time that its turn comes it goes on to the front, without another rest in the staging area: fewer accesses
    /// are interrupted, and traces have fewer misses.
    fn restore(&mut self, links: &mut [Link], frame: u32) {
        self.push(links, frame, true);
        links[frame as usize].freq = 1;
    }

    fn evict(&mut self, links: &mut [Link]) -> Option<(u32, u32)> {
        loop {
            if self.small.len > self.capacity / SMALL_SHARE || self.main.len == 0 {
                let frame = self.small.pop(links)?;
                if links[frame as usize].freq >= PROVEN {
                    self.push(links, frame, true);
                    continue;
                }
                self.left = self.left.wrapping_add(1).max(NO_STAMP + 1);
                return Some((frame, self.left));
            }
            let frame = self.main.pop(links)?;
            let freq = links[frame as usize].freq;
            if freq == 0 {
                return Some((frame, NO_STAMP));
            }
            self.push(links, frame, true);
            links[frame as usize].freq = freq - 1;
        }
    }

    fn remove(&mut self, links: &mut [Link], frame: u32) {
        let list = if links[frame as usize].is_main { &mut self.main } else { &mut self.small };
        list.unlink(links, frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evicted(policy: &mut S3Fifo, links: &mut [Link]) -> Vec<u32> {
        std::iter::from_fn(|| policy.evict(links).map(|(frame, _)| frame)).collect()
    }

    fn filled(frames: u32) -> (S3Fifo, Vec<Link>) {
        let (mut policy, mut links) = (S3Fifo::new(frames as usize), vec![Link::new(); frames as usize]);
        (0..frames).for_each(|frame| policy.insert(&mut links, frame, NO_STAMP));
        (policy, links)
    }

    #[test]
    fn oldest_leaves_first_where_nothing_is_accessed() {
        crate::support::require!();
        let (mut policy, mut links) = filled(20);
        [0, 7, 19].into_iter().for_each(|frame| policy.remove(&mut links, frame));
        let expected: Vec<_> = (1..19).filter(|frame| *frame != 7).collect();
        assert_eq!(evicted(&mut policy, &mut links), expected);
        policy.insert(&mut links, 3, NO_STAMP);
        assert_eq!(evicted(&mut policy, &mut links), [3]);
        assert_eq!(policy.evict(&mut links), None);
    }

    #[test]
    fn accessed_pages_outlast_others() {
        crate::support::require!();
        let (mut policy, mut links) = filled(20);
        // As the benchmark counts accesses, where a machine would notice them.
        [2, 5].into_iter().for_each(|frame| links[frame].freq = 2);
        let order = evicted(&mut policy, &mut links);
        // Two of the small queue outlast them, as that isn't longer than its share.
        assert_eq!((order.len(), &order[16..18]), (20, &[2, 5][..]), "{order:?}");
    }

    #[test]
    fn page_that_is_restored_outlasts_those_that_were_not() {
        crate::support::require!();
        let (mut policy, mut links) = filled(20);
        assert_eq!(policy.evict(&mut links).unwrap().0, 0);
        policy.restore(&mut links, 0);
        let order = evicted(&mut policy, &mut links);
        assert_eq!((order.len(), order[17]), (20, 0), "{order:?}");
        // It is in the main queue, from where it can be taken, too.
        policy.restore(&mut links, 0);
        policy.insert(&mut links, 1, NO_STAMP);
        policy.remove(&mut links, 0);
        assert_eq!(evicted(&mut policy, &mut links), [1]);
    }

    #[test]
    fn page_that_comes_back_soon_is_kept_in_the_main_queue() {
        crate::support::require!();
        let (mut policy, mut links) = filled(20);
        let (frame, stamp) = policy.evict(&mut links).unwrap();
        assert_eq!(frame, 0);
        policy.insert(&mut links, 0, stamp);
        let order = evicted(&mut policy, &mut links);
        assert_eq!((order.len(), order[17]), (20, 0), "{order:?}");
        // Once more have left than the main queue has room for, it is a page like any other.
        (0..20).for_each(|frame| policy.insert(&mut links, frame, NO_STAMP));
        evicted(&mut policy, &mut links);
        assert!(!policy.is_recent(stamp) && policy.is_recent(policy.left));
    }
}
