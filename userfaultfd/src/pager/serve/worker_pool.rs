//! Workers that are added while the source keeps all others waiting, and that end when it doesn't any more.
//!
//! The control thread starts them. A worker must not: a thread that starts takes locks of the allocator's, which a thread
//! that forks holds until a worker has read its event. The control thread may wait for those locks, since it holds nothing
//! that a worker needs. Those that serve from the start never end before the pager does, so that events are read
//! whatever becomes of the others.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::delivery::Delivery;
use super::shared::Shared;
use super::thread::{join, spawn};
use super::worker::Worker;
use crate::pager::memory::descriptor::lock;

/// Workers at most, unless told otherwise.
pub(in crate::pager) const MOST: usize = 16;

/// How soon it is looked again whether one more is needed; twice as long each time that none is.
const SOON: Duration = Duration::from_millis(1);
const LATE: Duration = Duration::from_millis(16);

/// The workers that were added, as the pager and its control thread have them.
#[derive(Debug)]
pub(crate) struct Added {
    delivery: Delivery,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Added {
    pub(crate) fn new(delivery: Delivery) -> Self {
        Self { delivery, threads: Mutex::default() }
    }

    /// Adds a worker if all others wait for the source, and there is something to read. Returns when to look again, if
    /// any waits. For the control thread.
    pub(crate) fn look(&self, shared: &Arc<Shared>, last: Option<Duration>) -> Option<Duration> {
        if !shared.is_watched() {
            return None;
        }
        if shared.all_are_reading() && shared.has_events() && self.add(shared) {
            return Some(SOON);
        }
        Some(last.map_or(SOON, |last| (2 * last).min(LATE)))
    }

    fn add(&self, shared: &Arc<Shared>) -> bool {
        let mut threads = lock(&self.threads);
        let (ended, running) = threads.drain(..).partition(JoinHandle::is_finished);
        *threads = running;
        Vec::into_iter(ended).for_each(join);
        if shared.is_stopping() {
            return false;
        }
        let Some(place) = shared.take_place() else { return false };
        let filler = shared.lease().take();
        let number = filler.thread;
        let worker = Worker::added(Arc::clone(shared), filler, place, self.delivery);
        // Without memory, or room for a thread, the others go on alone.
        match worker.ok().and_then(|worker| spawn("uffd-pager", move || worker.run()).ok()) {
            Some(thread) => threads.push(thread),
            None => {
                shared.end_worker(place, number);
                return false;
            }
        }
        true
    }

    /// Waits until all have ended, which they do once the pager stops.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        threads.into_iter().for_each(join);
    }
}
