//! The control thread: it serves the children of forks, notices the end of processes, and takes apart what isn't served
//! any more. It runs none of the program's code: that is the other thread's, see `reports`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::beside;
use super::mailbox::{Note, Stopped};
use super::poll::Token;
use super::shared::Shared;
use super::vma_events;
use super::worker_pool::{Added, Watch};
use crate::pager::memory::descriptor::Descriptor;
use crate::pager::target::target_is_gone;
use crate::pager::{DescriptorId, Problem};

/// How often it looks whether the processes whose memory is served are still there. The kernel reports no end.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(500);
const _: () =
    assert!(POLL_INTERVAL.as_millis() < 1000, "the docs promise that an end is noticed within a second");

/// How soon it looks again for what is expected to happen at any moment; twice as long each time.
const FIRST_RECHECK: Duration = Duration::from_millis(1);

/// Runs until the pager stops.
pub(crate) fn run(shared: &Arc<Shared>, added: &Added, look: Duration) {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    // Regions that aren't served any more, and that some thread still refers to.
    let mut is_unfreed = false;
    // Descriptors of processes that are said to end.
    let mut ending: Vec<u64> = Vec::new();
    let (mut soon, mut look_at) = (FIRST_RECHECK, Instant::now() + look);
    let (mut watch, mut bound) = (Watch::default(), beside::Watch::new(shared));
    loop {
        loop {
            match shared.next_note() {
                Ok(Some(Note::Fork(fork))) => {
                    let parent = fork.parent;
                    if let Err((uffd, error)) = vma_events::adopt(shared, fork) {
                        // Closing it would show zeros where the child's pages are missing.
                        std::mem::forget(uffd);
                        shared.fill.report(Problem::Fork { descriptor: DescriptorId(parent), error });
                    }
                }
                Ok(Some(Note::Ended)) => (is_unfreed, soon) = (true, FIRST_RECHECK),
                Ok(None) => break,
                Err(Stopped) => {
                    shared.table.reap();
                    shared.sweep();
                    return;
                }
            }
        }
        shared.table.reap();
        is_unfreed = is_unfreed && shared.sweep();
        ending
            .retain(|id| shared.table.find(*id).is_some_and(|descriptor| !drop_if_gone(shared, &descriptor)));
        let now = Instant::now();
        let mut watched = shared.table.all();
        watched.retain(|descriptor| !descriptor.is_own);
        if look_at <= now {
            watched.retain(|descriptor| !drop_if_gone(shared, descriptor));
            look_at = now + look;
        }
        let is_soon = is_unfreed || !ending.is_empty();
        let timeout = match (is_soon, watched.is_empty()) {
            (false, true) => None,
            (false, false) => Some(look_at - now),
            (true, _) => Some(soon.min(POLL_INTERVAL)),
        };
        let more_workers = added.look(shared, &mut watch);
        let timeout = timeout.into_iter().chain(more_workers).chain(bound.look(shared)).min();
        // Nothing is kept that others wait for.
        drop(watched);
        let ready = shared.mailbox.wait(&mut events, timeout);
        soon = if ready == 0 && is_soon { soon * 2 } else { FIRST_RECHECK };
        soon = soon.min(POLL_INTERVAL);
        for event in &events[..ready] {
            let Some(token) = Token::of_event(event) else { continue };
            let named = shared.table.in_slot(token.slot()).filter(|descriptor| token.means(descriptor));
            ending.extend(named.map(|descriptor| descriptor.id));
        }
    }
}

/// Ends serving a descriptor whose process has ended. Returns whether it has.
fn drop_if_gone(shared: &Shared, descriptor: &Arc<Descriptor>) -> bool {
    let gone = is_gone(descriptor, shared);
    if gone {
        shared.retire(descriptor);
    }
    gone
}

/// Whether the process of a descriptor has ended, or executed another program.
pub(crate) fn is_gone(descriptor: &Descriptor, shared: &Shared) -> bool {
    let address = descriptor.segments(shared.outside_id(), None).first().map(|segment| segment.start);
    let serving = descriptor.lock_shard(shared.outside_id());
    serving.as_ref().is_some_and(|serving| target_is_gone(&serving.uffd, address))
}
