//! What the events of changes do to the layout and the states of pages. All of it happens while no thread fills: see
//! `descriptor`.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::mailbox::{Fork, Inherited, Note};
use super::shared::Shared;
use crate::pager::evict::shared::Places;
use crate::pager::fill::retry;
use crate::pager::memory::address_map::{AddressMap, Segment};
use crate::pager::memory::descriptor::{Attachment, Descriptor, LOOK_SHARD, Origin, unwrap_last_arc, wake};
use crate::pager::memory::page_state::{self, Pages, Room};
use crate::pager::memory::state_file::Mark;
use crate::pager::stats::Counters;
use crate::pager::trace::event;
use crate::sync_point::{Point, reach};
use crate::{FeatureFlags, Uffd, mapped_vec, sys};

/// A change that was read.
#[derive(Debug)]
pub(crate) enum Change {
    Fork { uffd: Uffd },
    Remap { from: Range<usize>, to: usize },
    Remove(Range<usize>),
    Unmap(Range<usize>),
}

impl Change {
    /// Why a file of states doesn't tell the layout any more once it is applied.
    fn mark(&self) -> Option<Mark> {
        match self {
            Self::Fork { .. } => Some(Mark::Forked),
            Self::Remap { .. } => Some(Mark::Moved),
            Self::Unmap(_) => Some(Mark::Unmapped),
            Self::Remove(_) => None,
        }
    }
}

/// Applies a change. Threads that wait in memory that is gone are woken, to find that out.
pub(crate) fn apply(
    shared: &Shared,
    counters: &Counters,
    descriptor: &Descriptor,
    serving: &mut Attachment,
    change: Change,
) {
    event!(DEBUG, "change", change = tracing::field::debug(&change));
    if let Some(mark) = change.mark() {
        descriptor.mark(mark);
    }
    match change {
        Change::Fork { uffd } => {
            counters.forks.add(1);
            // Like its parent's descriptor, it may be inheritable by programs that this process executes.
            let set = sys::close_on_exec(uffd.as_fd());
            debug_assert!(set.is_ok(), "{set:?}");
            // From now on nothing leaves of memory that the child shares, which isn't served yet.
            each_limited(&serving.layout, Places::begin_fork);
            let copy = copy_patiently(&serving.layout);
            shared.mailbox.post(Note::Fork(Fork { parent: descriptor.id, uffd, copy }));
        }
        Change::Remap { from, to } => {
            counters.remaps.add(1);
            let tells_unmaps = serving.uffd.features().contains(FeatureFlags::EVENT_UNMAP);
            shared
                .mailbox
                .defer_free(|gone| serving.layout_mut().shift(from.clone(), to, tells_unmaps, gone));
            wake(&serving.uffd, from);
        }
        Change::Remove(range) => {
            counters.removes.add(1);
            serving.layout.remove_pages(&range);
        }
        Change::Unmap(range) => {
            counters.unmaps.add(1);
            shared.mailbox.defer_free(|gone| serving.layout_mut().unmap(range.clone(), gone));
            wake(&serving.uffd, range);
        }
    }
}

/// How long a call waits for changes of the layout to be read. A program that makes one after the other, or a source that
/// all workers wait for, may keep it from the end.
const SETTLE_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 30 } else { 1 });

/// Waits until every change that was made before this call is read and applied. Returns whether that is known.
///
/// The kernel counts a change before it lets go of the memory, queues its event afterwards, and discounts it once that was
/// read. So when it counts none, nothing that was made before is unread.
pub(crate) fn settle(shared: &Shared, descriptor: &Descriptor) -> bool {
    if !descriptor.tells_changes {
        return true;
    }
    let start = Instant::now();
    loop {
        let is_changing = |serving: &Option<Attachment>| {
            serving.as_ref().is_some_and(|serving| serving.uffd.is_layout_changing())
        };
        if !is_changing(&descriptor.lock_shard(LOOK_SHARD)) {
            // Dropped when the shards are free again: what ends is kept by others.
            let (mut settled, mut gone) = (false, mapped_vec::none());
            descriptor.with_all_shards(&mut |serving| {
                settled = !is_changing(serving);
                if let Some(serving) = serving.as_mut().filter(|_| settled) {
                    serving.layout_mut().settle(&mut gone);
                }
            });
            if !gone.is_empty() {
                shared.mailbox.post(Note::Ended);
            }
            if settled {
                return true;
            }
        }
        if start.elapsed() >= SETTLE_PATIENCE {
            return false;
        }
        thread::sleep(retry::CHANGE_INTERVAL);
    }
}

/// The same where segments are known to have gone elsewhere.
pub(crate) fn settle_moves(shared: &Shared, descriptor: &Descriptor) {
    let is_unsettled =
        descriptor.lock_shard(LOOK_SHARD).as_ref().is_some_and(|serving| serving.layout.is_unsettled());
    if is_unsettled {
        settle(shared, descriptor);
    }
}

/// Duration for which a fork's event waits for memory. Then the child isn't served, which is reported: the parent must be
/// served on.
const FORK_PATIENCE: Duration = Duration::from_secs(10);

/// The part of a parent that the child of a fork has.
fn copy_patiently(layout: &AddressMap) -> io::Result<Inherited> {
    let start = Instant::now();
    loop {
        let copy = layout.try_clone().ok_or_else(|| io::ErrorKind::OutOfMemory.into());
        let copy = copy.and_then(|layout| Ok(Inherited { states: copy_states(&layout)?, layout }));
        if copy.is_ok() || start.elapsed() >= FORK_PATIENCE {
            return copy;
        }
        thread::sleep(retry::NO_MEMORY_DELAY);
    }
}

/// The states of pages that the child of a fork doesn't share with its parent. Allocates nothing but one mapping: the
/// forking thread holds the allocator's locks.
fn copy_states(layout: &AddressMap) -> io::Result<Room> {
    let segments = || layout.segments().iter().filter(|segment| !segment.region.shared);
    let states = page_state::map(segments().map(|segment| segment.pages().len()).sum::<usize>().max(1))?;
    let mut first = 0;
    for segment in segments() {
        segment.region.pages.copy_to(segment.pages(), &states, first);
        first += segment.pages().len();
    }
    Ok(states)
}

/// Calls `with` for the segments of shared memory that a budget limits.
fn each_limited(layout: &AddressMap, with: impl Fn(&Places)) {
    let residences = layout.segments().iter().filter_map(|segment| segment.region.residence.as_ref());
    residences.filter_map(|residence| residence.places()).for_each(with);
}

/// Begins to serve the child of a fork.
pub(crate) fn adopt(shared: &Shared, fork: Fork) -> Result<(), (Uffd, io::Error)> {
    let Fork { uffd, copy, .. } = fork;
    let Inherited { layout, states } = match copy {
        Ok(copy) => copy,
        Err(error) => return Err((uffd, error)),
    };
    reach(Point::BeforeAdopt, layout.segments().first().map_or(0, |segment| segment.start));
    let (states, mut first) = (Arc::new(states), 0);
    let Some(mut child) = AddressMap::try_with_room(layout.segments().len()) else {
        return Err((uffd, io::ErrorKind::OutOfMemory.into()));
    };
    let (segments, holes) = layout.into_parts();
    for mut segment in segments {
        if !segment.region.shared {
            let count = segment.pages().len();
            let pages = Pages::of_copy(Arc::clone(&states), first, count);
            first += count;
            let region = segment.region.part(shared.regions.new_id(), segment.first, pages);
            let region = Arc::new(region);
            shared.regions.keep(&region);
            segment = Segment { region, first: 0, ..segment };
        }
        child.insert(segment);
    }
    let mut none = mapped_vec::none();
    holes.into_iter().for_each(|hole| child.insert_hole(hole, &mut none));
    child.settle(&mut none);
    // A child's descriptor is as its parent's was made, whatever that was switched to since.
    if let Err(error) = uffd.set_nonblocking(true) {
        return Err((uffd, error.into()));
    }
    let uffd = Arc::new(uffd);
    let serving = Attachment { uffd: Arc::clone(&uffd), layout: Arc::new(child) };
    let origin = Origin { guest: None, is_child: true, is_own: false, is_lazy: false, was_blocking: false };
    let limited = Arc::clone(&serving.layout);
    match shared.add(serving, origin) {
        // Its pages are found from now on.
        Ok(_) => {
            each_limited(&limited, Places::end_fork);
            Ok(())
        }
        // A worker may own it for a moment.
        Err(error) => Err((unwrap_last_arc(uffd), io::Error::other(error))),
    }
}
