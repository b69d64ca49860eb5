//! A served descriptor, and the order of fills and changes of the layout.
//!
//! A fill must not overlap a change: content that was loaded for a page must not land after the page was removed, or in
//! memory that was mapped there since. The kernel keeps fills out from before a change until the change is *read*; from
//! then on the pager must. So a fill looks the address up and fills it under one lock, and a thread reads and applies a
//! change while no fill holds that lock.
//!
//! Each worker has a shard of its own with the same layout in it, and locks that shard alone to fill, so that fills don't
//! contend for a common lock. A change locks all shards. Where the descriptor reports no changes, reading it changes
//! nothing, and locks the worker's own shard alone.
//!
//! Callers and background threads share [`OUTSIDE_SHARDS`] shards. There may be any number of them, so their numbers
//! exceed the number of shards.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::address_map::{AddressMap, Segment};
use super::state_file::{Mark, StateFile};
use crate::lock_order::{LockGuard, RankedMutex, lock, rank, try_lock};
use crate::owner::NotedFd;
use crate::pager::on_end::{Guest, OnEnd};
use crate::proc_maps::Process;
use crate::{FeatureFlags, Uffd};

/// An address in the descriptor's address space as a pointer, for its operations.
pub(crate) fn addr_to_ptr(address: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address)
}

/// A descriptor and the map of its address space, at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Attachment {
    pub(crate) uffd: Arc<Uffd>,
    pub(crate) layout: Arc<AddressMap>,
}

/// Shards of a descriptor that callers and background threads share, each with a filler of its own. A shard is locked
/// while the kernel fills, never while a source is read. Each further shard makes each change of a layout slower.
pub(crate) const OUTSIDE_SHARDS: usize = 5;

/// Number of the shard through which threads without a filler look at layouts: the last one. No fill ever holds it, so a
/// look doesn't wait for the kernel, which may read a source's own memory for as long as a disk takes.
pub(crate) const LOOK_SHARD: usize = usize::MAX;

/// `None` once the descriptor isn't served any more.
#[derive(Debug)]
#[repr(align(128))] // no line of the cache, nor the one that is fetched with it, is another thread's
struct Shard(RankedMutex<Option<Attachment>, { rank::LAYOUT }>);

impl Attachment {
    /// The layout, for a change: while all shards are locked it has no other owner, so that nothing is allocated.
    pub(crate) fn layout_mut(&mut self) -> &mut AddressMap {
        Arc::get_mut(&mut self.layout).expect("what has all shards is the one owner of the layout")
    }
}

/// The origin of a descriptor.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// The process, if its end is chosen from the first fault on.
    pub(crate) guest: Option<Arc<Guest>>,
    pub(crate) is_child: bool,
    pub(crate) is_own: bool,
    pub(crate) is_lazy: bool,
    pub(crate) was_blocking: bool,
}

/// What a closed descriptor leaves behind.
#[derive(Debug)]
pub(crate) struct Left {
    _layout: Option<Attachment>,
    _ends: Vec<(NotedFd, OwnedFd)>,
    _guest: Option<Arc<Guest>>,
}

pub(crate) struct Descriptor {
    /// The number of the descriptor among all that were ever added, and its place in the table: see `table`.
    pub(crate) id: u64,
    pub(crate) slot: u32,
    /// Whether it reports changes of the layout, so that reading it may be one.
    pub(crate) tells_changes: bool,
    /// Whether it belongs to a child of a fork.
    pub(crate) is_child: bool,
    /// Whether it belongs to this process. Any other process may end.
    pub(crate) is_own: bool,
    /// Whether it belongs to a [`LazyMemory`](crate::LazyMemory), which alone may end its service.
    pub(crate) is_lazy: bool,
    /// Whether it was blocking when it was added, and must be blocking again when it is handed over.
    pub(crate) was_blocking: bool,
    shards: Box<[Shard]>,
    /// The descriptor's number, for a forked child, which may find the shards locked.
    inherited: NotedFd,
    /// The file in which the states of its pages lie, with a journal of its events.
    pub(crate) state: Option<Arc<StateFile>>,
    /// Whether the last read failed, which was reported.
    pub(crate) read_failed: AtomicBool,
    /// The process that has the memory, once a pidfd has told: for the reasons of errors.
    pub(crate) process: OnceLock<Process>,
    /// The descriptors by which the end of the process is noticed. A number is forgotten before it is closed.
    pub(crate) ends: RankedMutex<Vec<(NotedFd, OwnedFd)>, { rank::QUEUE }>,
    /// The process, if its end was chosen. Used under the lock, so that a worker never frees it.
    guest: RankedMutex<Option<Arc<Guest>>, { rank::QUEUE }>,
    closed: AtomicBool,
    /// Number of regions that are being registered, and aren't in the layout yet.
    registering: AtomicUsize,
    /// The layout of a descriptor that was closed by a thread that must not free it.
    left: RankedMutex<Option<Attachment>, { rank::QUEUE }>,
}

impl Descriptor {
    /// Makes a descriptor with a shard for each of the pager's threads, [`OUTSIDE_SHARDS`] more for fills, and one for
    /// looks; notes its number for a forked child.
    pub(crate) fn new(
        (id, slot): (u64, u32),
        serving: Attachment,
        (shards, inherited): (usize, NotedFd),
        Origin { guest, is_child, is_own, is_lazy, was_blocking }: Origin,
    ) -> Self {
        const CHANGES: FeatureFlags = FeatureFlags::EVENT_FORK
            .union(FeatureFlags::EVENT_REMAP)
            .union(FeatureFlags::EVENT_REMOVE)
            .union(FeatureFlags::EVENT_UNMAP);
        // Without /proc the features of an adopted descriptor are unknown; then it may report any change.
        let features = serving.uffd.features();
        let tells_changes = features.intersects(CHANGES) || serving.uffd.ioctls().is_empty();
        let shards = (0..shards).map(|_| Shard(RankedMutex::new(Some(serving.clone())))).collect();
        let (ends, closed, left) = (RankedMutex::default(), AtomicBool::new(false), RankedMutex::default());
        Self {
            id,
            slot,
            tells_changes,
            is_child,
            is_own,
            is_lazy,
            was_blocking,
            shards,
            inherited,
            state: guest.as_ref().and_then(|guest| guest.state().cloned()),
            read_failed: AtomicBool::new(false),
            process: OnceLock::new(),
            ends,
            guest: RankedMutex::new(guest),
            closed,
            registering: AtomicUsize::new(0),
            left,
        }
    }

    /// Locks a shard and returns the layout, which doesn't change while the guard lives. Hold it briefly: never during a
    /// read of a source.
    pub(crate) fn lock_shard(&self, thread: usize) -> LockGuard<'_, Option<Attachment>> {
        let (looks, fills) = self.shards.split_last().expect("there is a shard for looks");
        let shard = if thread == LOOK_SHARD {
            looks
        } else {
            fills.get(thread).unwrap_or_else(|| {
                let last = fills.len() - 1;
                &fills[last - (thread - last) % OUTSIDE_SHARDS]
            })
        };
        lock(&shard.0)
    }

    /// Changes the layout, or ends the service by taking it, while no thread fills. All shards get what `change` leaves,
    /// also if it panics: losing the descriptor would close it.
    pub(crate) fn with_all_shards(&self, change: &mut dyn FnMut(&mut Option<Attachment>)) {
        struct Held<'a> {
            shard: LockGuard<'a, Option<Attachment>>,
            now: &'a mut Option<Attachment>,
            is_first: bool,
        }

        impl Drop for Held<'_> {
            fn drop(&mut self) {
                if self.is_first {
                    // Moved back: the next thread that holds all shards holds all owners.
                    *self.shard = self.now.take();
                } else {
                    self.shard.clone_from(self.now);
                }
            }
        }

        // Each level holds one lock; a list of guards would need an allocation.
        fn all(
            shards: &[Shard],
            is_first: bool,
            now: &mut Option<Attachment>,
            change: &mut dyn FnMut(&mut Option<Attachment>),
        ) {
            let Some((shard, rest)) = shards.split_first() else { return change(now) };
            let mut shard = lock(&shard.0);
            // Moved out of the shards, so that it has one owner, which can change the layout or end the service.
            *now = shard.take();
            let held = Held { shard, now, is_first };
            all(rest, false, held.now, change);
        }
        all(&self.shards, true, &mut None, change);
    }

    /// Ends the serving if it may end, which is asked while no fill is at work, and returns the descriptor. `None` if it
    /// mayn't, or has ended already.
    pub(crate) fn close_if(&self, may: impl Fn(&Attachment) -> bool) -> Option<Attachment> {
        let mut closed = None;
        self.with_all_shards(&mut |serving| {
            if serving.as_ref().is_some_and(&may) {
                // From now on the caller decides when its number is closed.
                self.inherited.forget();
                closed = serving.take();
            }
        });
        if closed.is_some() {
            self.closed.store(true, Ordering::Release);
        }
        closed
    }

    /// Chooses how the process ends.
    pub(crate) fn set_guest(&self, guest: Arc<Guest>) {
        let before = lock(&self.guest).replace(guest);
        drop(before);
    }

    /// How the process ends when content can't be had.
    pub(crate) fn on_end(&self) -> OnEnd {
        lock(&self.guest).as_ref().map_or(OnEnd::Poison, |guest| guest.on_end())
    }

    /// Kills the process. Returns whether this is the first time.
    pub(crate) fn kill(&self) -> bool {
        lock(&self.guest).as_ref().is_some_and(|guest| guest.kill())
    }

    /// Waits for the end of the process, which was killed. Returns whether it has ended. Not for workers.
    pub(crate) fn wait_for_end(&self) -> bool {
        let guest = lock(&self.guest).clone();
        guest.is_some_and(|guest| guest.wait())
    }

    /// It was closed: tells the thread that waits for the process.
    pub(crate) fn note_end(&self) {
        // Otherwise it was taken out, which tells, too.
        if let Some(guest) = &*lock(&self.guest) {
            guest.note_end();
        }
    }

    /// The journal of its events, if it has one. Faults need none: they are reported again once their threads are woken.
    pub(crate) fn journal(&self) -> Option<&StateFile> {
        self.state.as_deref().filter(|_| self.tells_changes)
    }

    /// Notes that its file of states, if it has one, is about not to tell what is served.
    pub(crate) fn mark(&self, mark: Mark) {
        if let Some(state) = &self.state {
            state.mark(mark);
        }
    }

    /// Removes its file of states, if it has one: another owner has the memory from now on, or nothing is missing.
    pub(crate) fn remove_state(&self) {
        if let Some(state) = &self.state {
            state.remove();
        }
    }

    /// Whether it isn't served any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Keeps a layout, to be freed together with this.
    pub(crate) fn defer_drop(&self, serving: Attachment) {
        *lock(&self.left) = Some(serving);
    }

    /// Takes what a closed descriptor has left, to free it: the kept layout, and what its process's end was noticed by. Some
    /// thread may refer to the descriptor itself for as long as it sleeps.
    pub(crate) fn take_deferred_drop(&self) -> Option<Left> {
        let layout = lock(&self.left).take();
        let ends = std::mem::take(&mut *lock(&self.ends));
        let guest = lock(&self.guest).take();
        if let Some(guest) = &guest {
            guest.note_end();
        }
        let is_something = layout.is_some() || !ends.is_empty() || guest.is_some();
        is_something.then_some(Left { _layout: layout, _ends: ends, _guest: guest })
    }

    /// The present segments, of one region or all.
    pub(crate) fn segments(&self, thread: usize, region: Option<u64>) -> Vec<Segment> {
        self.collect(thread, region, AddressMap::segments)
    }

    /// The present holes, of one region or all.
    pub(crate) fn holes(&self, thread: usize, region: Option<u64>) -> Vec<Segment> {
        self.collect(thread, region, AddressMap::holes)
    }

    /// Copies the items of a kind. Nothing is allocated while the layout is locked: see `mapped_vec`.
    fn collect(
        &self,
        thread: usize,
        region: Option<u64>,
        of: impl Fn(&AddressMap) -> &[Segment],
    ) -> Vec<Segment> {
        let mut all = Vec::new();
        loop {
            let room = {
                let serving = self.lock_shard(thread);
                let Some(serving) = &*serving else { return all };
                let found = of(&serving.layout).iter();
                let found = found.filter(|segment| region.is_none_or(|id| segment.region.id == id));
                let count = found.clone().count();
                if count <= all.capacity() {
                    all.extend(found.cloned());
                    return all;
                }
                count
            };
            all.reserve(room);
        }
    }

    /// Begins to register a region, until the guard is dropped.
    pub(crate) fn begin_registering(&self, thread: usize) -> Registering<'_> {
        // Not in the middle of a change that needs that there is none, which holds all shards.
        let _shard = self.lock_shard(thread);
        self.registering.fetch_add(1, Ordering::Relaxed);
        Registering(&self.registering)
    }

    /// Whether a region is being registered. With all shards locked none begins to be.
    pub(crate) fn is_registering(&self) -> bool {
        self.registering.load(Ordering::Relaxed) > 0
    }

    /// Replaces the layout by a changed one. Returns whether the descriptor was still served.
    pub(crate) fn change_layout(&self, change: impl FnOnce(&mut AddressMap)) -> bool {
        let mut change = Some(change);
        let mut served = false;
        self.with_all_shards(&mut |serving| {
            let Some(serving) = serving else { return };
            served = true;
            if let Some(change) = change.take() {
                change(serving.layout_mut());
            }
        });
        served
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("Descriptor");
        text.field("id", &self.id)
            .field("slot", &self.slot)
            .field("is_child", &self.is_child)
            .field("is_own", &self.is_own)
            .field("is_lazy", &self.is_lazy)
            .field("is_closed", &self.is_closed())
            .field("read_failed", &self.read_failed);
        let looks = self.shards.last().expect("there is a shard for looks");
        // The text may be asked for because of a deadlock.
        let number =
            try_lock(&looks.0).map(|serving| serving.as_ref().map(|serving| serving.uffd.as_raw_fd()));
        match number {
            None => text.field("layout", &"locked"),
            Some(None) => &mut text,
            Some(Some(fd)) => text
                .field("fd", &fd)
                .field("segments", &self.segments(LOOK_SHARD, None))
                .field("holes", &self.holes(LOOK_SHARD, None)),
        };
        text.finish_non_exhaustive()
    }
}

/// A region is being registered.
#[derive(Debug)]
pub(crate) struct Registering<'a>(&'a AtomicUsize);

impl Drop for Registering<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Wakes the threads that wait in a range. They retry their access, and fault again if it isn't resolved.
pub(crate) fn wake(uffd: &Uffd, range: Range<usize>) {
    // It fails for ranges that are malformed, which none of these is.
    let woken = uffd.wake(addr_to_ptr(range.start), range.len());
    debug_assert!(woken.is_ok(), "waking {range:#x?}: {woken:?}");
}

/// Takes the value out of its last `Arc`. A thread that has just changed the shards, or added the descriptor, may own
/// it for a moment longer.
pub(crate) fn unwrap_last_arc(mut uffd: Arc<Uffd>) -> Uffd {
    loop {
        match Arc::try_unwrap(uffd) {
            Ok(uffd) => return uffd,
            Err(shared) => uffd = shared,
        }
        std::thread::yield_now();
    }
}
