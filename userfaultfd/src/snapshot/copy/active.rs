//! The snapshot that is at work: what is still to be read, and what was read and isn't delivered yet.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bits::Bits;
use super::layout::Part;
use super::queue::{Buffer, Queue};
use super::shared::Counts;

/// How long pages that can't be read, or aren't protected any more, are looked at again: the event that says why may be
/// on its way.
const DOUBT_TIME: Duration = Duration::from_millis(200);

/// The snapshot that is at work.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) queue: Arc<Queue>,
    pub(super) counts: Arc<Counts>,
    /// What is still to be read.
    pub(super) pending: Bits,
    /// What was read, and isn't delivered yet.
    pub(super) kept: Vec<Kept>,
    /// All that the snapshot must hold.
    pub(super) wanted: Bits,
    /// Pages whose removal was read before the snapshot's moment. They may have been dropped since, or may be at any time.
    pub(super) removed: Bits,
    /// Those of them that are still to be saved, and were seen mapped and not protected: dropped, unless an event that
    /// isn't read yet tells that something else lies there.
    pub(super) dropped: Bits,
    /// Where the walk is.
    pub(super) cursor: usize,
    /// A change of the layout waits to be read, and with it the thread that makes it.
    pub(super) change_waits: bool,
    /// Until when pages in doubt are looked at again.
    pub(super) doubt_until: Option<Instant>,
    /// All has been saved; the sink is still at it.
    pub(super) draining: bool,
}

/// What was read of some pages that were protected.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) part: Part,
    pub(super) buffer: Buffer,
    /// It was read because it was about to be written.
    pub(super) on_write: bool,
}

impl Active {
    pub(super) fn new(queue: Arc<Queue>, counts: Arc<Counts>, wanted: Bits, removed: Bits) -> Self {
        Self {
            queue,
            counts,
            dropped: Bits::new(wanted.len(), false),
            pending: wanted.clone(),
            kept: Vec::new(),
            wanted,
            removed,
            cursor: 0,
            change_waits: false,
            doubt_until: None,
            draining: false,
        }
    }

    /// Whether something is still to be saved.
    pub(super) fn is_pending(&self) -> bool {
        !self.kept.is_empty() || self.pending.next(self.cursor).or_else(|| self.pending.next(0)).is_some()
    }

    /// Whether pages that can't be read, or aren't protected, may still turn out to be there. Begins to measure the time.
    pub(super) fn may_wait_in_doubt(&mut self) -> bool {
        let now = Instant::now();
        now < *self.doubt_until.get_or_insert(now + DOUBT_TIME)
    }

    /// Whether a page was read, and isn't delivered yet.
    pub(super) fn keeps(&self, page: &Part) -> bool {
        let within =
            |kept: &Kept| (kept.part.offset..kept.part.offset + kept.part.len).contains(&page.offset);
        self.kept.iter().any(within)
    }

    /// Forgets what was read from some addresses. Returns what that was.
    pub(super) fn discard(&mut self, range: &Range<usize>) -> Vec<Part> {
        let mut discarded = Vec::new();
        for index in (0..self.kept.len()).rev() {
            let part = &self.kept[index].part;
            if part.address < range.end && part.address + part.len > range.start {
                let kept = self.kept.swap_remove(index);
                self.pending.set(kept.part.bits(), true);
                self.queue.give_back(kept.buffer);
                self.cursor = 0;
                discarded.push(kept.part);
            }
        }
        discarded
    }
}
