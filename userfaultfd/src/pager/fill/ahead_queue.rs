//! What a fault leaves to the threads that read ahead: the rest of its fault-around, in requests of one read each.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar};

use crate::lock_order::{RankedMutex, lock, rank};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::Descriptor;
use crate::pager::memory::served::ServedRegion;

/// Bytes that one thread reads at a time: as much as one read of a remote source is worth.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// Requests that wait. What exceeds that is left to the faults that come.
const QUEUE_LEN: usize = 1024;

/// A request.
#[derive(Debug)]
pub(crate) struct Ahead {
    pub(crate) descriptor: Arc<Descriptor>,
    pub(crate) region: Arc<ServedRegion>,
    pub(crate) addresses: Range<usize>,
}

/// The requests of a pager. Putting one in allocates nothing.
#[derive(Debug)]
pub(crate) struct AheadQueue {
    requests: RankedMutex<Requests, { rank::QUEUE }>,
    changed: Condvar,
}

#[derive(Debug)]
struct Requests {
    waiting: VecDeque<Ahead>,
    closed: bool,
}

impl AheadQueue {
    pub(crate) fn new() -> Self {
        let requests = Requests { waiting: VecDeque::with_capacity(QUEUE_LEN), closed: false };
        Self { requests: RankedMutex::new(requests), changed: Condvar::new() }
    }

    /// Requests the rest of a fault-around, of which `now` is read for the fault itself. The nearest comes first.
    pub(super) fn request(
        &self,
        descriptor: &Arc<Descriptor>,
        segment: &Segment,
        now: &Range<usize>,
        around: &Range<usize>,
    ) {
        let chunk = pages_per_chunk(&segment.region);
        let address = |page: usize| segment.start + ((page - segment.first) << segment.region.page_shift);
        let request = |pages: Range<usize>| {
            self.put(Ahead {
                descriptor: Arc::clone(descriptor),
                region: Arc::clone(&segment.region),
                addresses: address(pages.start)..address(pages.end),
            });
        };
        for start in (now.end..around.end).step_by(chunk) {
            request(start..(start + chunk).min(around.end));
        }
        let mut end = now.start;
        while end > around.start {
            let start = end.saturating_sub(chunk).max(around.start);
            request(start..end);
            end = start;
        }
    }

    /// Where there is no room, the newest is left out.
    fn put(&self, ahead: Ahead) {
        let mut requests = lock(&self.requests);
        if requests.waiting.len() < QUEUE_LEN {
            requests.waiting.push_back(ahead);
            drop(requests);
            self.changed.notify_one();
        }
    }

    /// Waits for a request. `None`: the queue is closed.
    pub(crate) fn next(&self) -> Option<Ahead> {
        let nothing = |requests: &mut Requests| requests.waiting.is_empty() && !requests.closed;
        let mut requests = lock(&self.requests).wait_while(&self.changed, nothing);
        if requests.closed { None } else { requests.waiting.pop_front() }
    }

    /// Has the threads that wait here end.
    pub(crate) fn close(&self) {
        {
            let mut requests = lock(&self.requests);
            requests.closed = true;
            requests.waiting.clear();
        }
        self.changed.notify_all();
    }
}

/// The part of a fault-around that is read at once for a fault on a page: one chunk.
pub(super) fn first_chunk(region: &ServedRegion, page: usize, around: &Range<usize>) -> Range<usize> {
    let chunk = pages_per_chunk(region);
    let (start, end) = if page == around.start {
        (page, page + chunk)
    } else {
        // Backwards.
        (page.saturating_sub(chunk - 1), page + 1)
    };
    start.max(around.start)..end.min(around.end)
}

fn pages_per_chunk(region: &ServedRegion) -> usize {
    (CHUNK_BYTES >> region.page_shift).max(1)
}
