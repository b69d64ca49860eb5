//! Workers that are added while sources keep all others waiting, and that end when they don't any more.
//!
//! A source is slow, which its worker says when it begins to read; or it was fast, and hangs. So each worker says that it
//! reads, and the control thread looks now and then whether one is still in the same read: from the first read on until
//! no worker has been seen in a source for a second, so that fast sources cost one ring in a second. What such a worker
//! has taken on and not begun is handed to the others.
//!
//! The control thread starts them. A worker must not: a thread that starts takes locks of the allocator's, which a thread
//! that forks holds until a worker has read its event. The control thread may wait for those locks, since it holds nothing
//! that a worker needs. Those that serve from the start never end before the pager does, so that events are read
//! whatever becomes of the others.
//!
//! Where there is no memory for one more, none is added, and it is tried again later: all that adding allocates may fail.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backlog::Item;
use super::delivery::Delivery;
use super::poll::Token;
use super::shared::Shared;
use super::worker::Worker;
use crate::lock_order::{RankedMutex, lock, rank};
use crate::pager::activity::Doing;
use crate::pager::fill::retry::{Deferred, Put};
use crate::pager::fill::work::{RetryAfter, Work};
use crate::pager::thread::Thread;
use crate::sync_point::{Point, reach};

/// Workers at most, unless told otherwise.
pub(crate) const DEFAULT_MAX_THREADS: usize = 16;

/// How soon the workers are looked at again; twice as long each time that nothing was to be done.
const FIRST_RECHECK: Duration = Duration::from_millis(1);
const LAST_RECHECK: Duration = Duration::from_millis(16);

/// How long they are looked at after one was seen in a source.
const LINGER_TIME: Duration = Duration::from_secs(1);

/// What the control thread has seen of the workers.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// What each did, by its place.
    seen: Vec<Option<Doing>>,
    /// When one was in a source last.
    reading: Option<Instant>,
    /// When to look again, and the time until then from the last look on.
    next: Option<Instant>,
    delay: Duration,
}

/// The workers that were added, as the pager and its control thread have them.
#[derive(Debug)]
pub(crate) struct Added {
    delivery: Delivery,
    /// Each with its place.
    threads: RankedMutex<Vec<(usize, Thread)>, { rank::TURN }>,
}

impl Added {
    pub(crate) fn new(delivery: Delivery) -> Self {
        Self { delivery, threads: RankedMutex::default() }
    }

    /// Hands on what workers have taken on whose source keeps them waiting, and adds one if it keeps all of them and there
    /// is something to read. Returns when to look again, if at all. For the control thread.
    pub(crate) fn look(&self, shared: &Arc<Shared>, watch: &mut Watch) -> Option<Duration> {
        if !shared.fill.activities.is_watched() {
            *watch = Watch::default();
            return None;
        }
        let now = Instant::now();
        // Two looks are that far apart, so that what is still in the same read is slow.
        if let Some(left) = watch.next.map(|next| next.saturating_duration_since(now)) {
            if !left.is_zero() {
                return Some(left);
            }
        }
        let (mut any_reads, mut all_wait, mut handed_on) = (false, true, false);
        for (place, doing) in shared.fill.activities.workers() {
            if watch.seen.len() <= place {
                watch.seen.resize(place + 1, None);
            }
            let before = watch.seen[place].replace(doing);
            any_reads |= doing.is_reading();
            let waits = doing.is_reading_slowly() || doing.is_reading() && before == Some(doing);
            all_wait &= waits || doing.is_missing();
            handed_on |= waits && hand_on(shared, place);
        }
        if any_reads || watch.reading.is_none() {
            watch.reading = Some(now);
        }
        if watch.reading.is_none_or(|reading| now - reading >= LINGER_TIME)
            && shared.fill.activities.end_watching()
        {
            *watch = Watch::default();
            return None;
        }
        let added = all_wait && shared.poll.has_events() && self.add(shared);
        watch.delay = if added || handed_on {
            FIRST_RECHECK
        } else {
            (2 * watch.delay).clamp(FIRST_RECHECK, LAST_RECHECK)
        };
        watch.next = Some(now + watch.delay);
        Some(watch.delay)
    }

    fn add(&self, shared: &Arc<Shared>) -> bool {
        let mut threads = lock(&self.threads);
        while let Some(ended) = threads.iter().position(|(place, _)| shared.fill.activities.is_free(*place)) {
            threads.swap_remove(ended).1.join();
        }
        if shared.is_stopping() || threads.try_reserve(1).is_err() {
            return false;
        }
        let Some(place) = shared.fill.activities.take_place() else { return false };
        let Some(filler) = shared.take_filler() else {
            shared.fill.activities.free_place(place);
            return false;
        };
        let number = filler.thread;
        let worker = Worker::added(Arc::clone(shared), filler, place, self.delivery);
        // Without memory, or room for a thread, the others go on alone.
        let started = worker.ok().and_then(|worker| Thread::spawn(c"uffd-pager", move || worker.run()).ok());
        let is_added = started.is_some();
        match started {
            Some(thread) => threads.push((place, thread)),
            None => shared.end_worker(place, number),
        }
        reach(Point::AfterAdd, is_added.into());
        is_added
    }

    /// Waits until all have ended, which they do once the pager stops.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        threads.into_iter().for_each(|(_, thread)| thread.join());
    }
}

/// Has others do what the worker at a place has taken on and not begun. Returns whether there was something.
fn hand_on(shared: &Shared, place: usize) -> bool {
    let mut any = false;
    while let Some(item) = { lock(shared.backlog(place)).take_any() } {
        any = true;
        let find = |token: Token| shared.table.in_slot(token.slot()).filter(|found| token.means(found));
        match item {
            Item::Event(Token::RETRY) => shared.retries.look(),
            Item::Event(token) => {
                let Some(descriptor) = find(token) else { continue };
                if let Some(serving) = &*descriptor.lock_shard(shared.outside_id()) {
                    shared.poll.rearm(&descriptor, serving.uffd.as_fd());
                }
            }
            Item::Fault(token, fault) => {
                // What waits for one that is closed has been woken.
                let Some(descriptor) = find(token) else { continue };
                let now = RetryAfter::Delay(Duration::ZERO);
                put_off(shared, Deferred::new(&descriptor, Work::Fault(fault), now, None));
            }
            Item::Deferred(deferred) => put_off(shared, deferred),
        }
    }
    any
}

/// Puts work off that isn't the calling thread's. Where there is no room it is given up, so that it comes back.
fn put_off(shared: &Shared, deferred: Deferred) {
    let joined = matches!(&deferred.work, Work::Fault(fault) if !fault.joined);
    match shared.retries.put(deferred) {
        Put::Entered => {}
        Put::Merged => shared.fill.counters(shared.lease().thread).duplicates.add(joined.into()),
        Put::NoRoom(Deferred { descriptor, work, .. }) => shared.lease().give_up(&descriptor, work),
    }
}
