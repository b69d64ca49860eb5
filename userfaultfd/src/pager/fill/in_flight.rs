//! Loads of asynchronous sources: started by a worker or a read-ahead thread, answered by any thread of the program.
//!
//! A load has a slot, which owns its run and then the answer. The thread that answers puts the slot's number among the
//! deferred work, due at once, so that a worker installs the content, or has the read retried, as after a read of its own.
//! With an answer that comes while `start` still runs, the thread that started the load goes on.
//!
//! Slots, the list of free ones, and buffers lie in mappings: nothing here allocates but errors.

use std::fmt;
use std::io;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::buffers::ensure_capacity;
use super::retry::{Deferred, Put, RetryQueue};
use super::work::{RetryAfter, Work};
use crate::Errno;
use crate::lock_order::{RankedMutex, lock, rank, try_lock};
use crate::mapped_vec::{MappedVec, try_with_room};
use crate::owner::Owner;
use crate::pager::memory::descriptor::{Descriptor, LOOK_SHARD};
use crate::pager::memory::page_run::PageRun;
use crate::source::call::catch_panic;
use crate::source::{Completion, LoadId, Loaded, PageBuffer, Receiver};
use crate::sync_point::{Point, reach};

/// Loads at the same time. Further faults wait for one to end.
const MAX_LOADS: usize = 4096;

/// Bytes that are loaded at the same time ahead of need, and in all by loads of more than one page.
const MAX_EARLY_BYTES: usize = 64 << 20;
const MAX_BYTES: usize = 256 << 20;

/// Buffers that are kept for later loads, and bytes of them.
const MAX_IDLE_BUFFERS: usize = 1024;
const MAX_IDLE_BYTES: usize = 32 << 20;

/// The loads of a pager.
pub(crate) struct InFlight {
    owner: Owner,
    retries: Arc<RetryQueue>,
    loads: RankedMutex<Loads, { rank::LAYOUT }>,
    idle: RankedMutex<Idle, { rank::QUEUE }>,
}

struct Loads {
    slots: MappedVec<Slot>,
    /// Slots that have no load.
    free: MappedVec<u32>,
    /// Bytes of all loads, and of those ahead of need.
    bytes: usize,
    early_bytes: usize,
}

#[derive(Debug)]
struct Slot {
    /// How many loads it has had: a late answer to one that was cancelled finds another number.
    generation: u32,
    load: Option<Load>,
}

#[derive(Debug)]
struct Load {
    descriptor: Arc<Descriptor>,
    run: PageRun,
    since: Instant,
    /// How long it took, once it is answered.
    took: Duration,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The source's `start` runs.
    Starting,
    /// It runs, and the answer is here.
    Answered(io::Result<Loaded>),
    UnderWay,
    /// The answer is here, and a worker will take it.
    Queued(io::Result<Loaded>),
}

/// The answer to a load.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) result: io::Result<Loaded>,
    /// How long it took.
    pub(crate) took: Duration,
}

struct Idle {
    buffers: MappedVec<MmapMut>,
    bytes: usize,
}

/// What became of a load that should start.
#[derive(Debug)]
pub(super) enum Started {
    /// The answer will come.
    UnderWay,
    /// The answer came while it was started.
    Answered(PageRun, Answer),
    /// There are too many.
    Full(PageRun),
    NoMemory(PageRun),
}

impl Load {
    fn is_early(&self) -> bool {
        self.run.demand.is_none()
    }
}

impl Loads {
    fn fits(&self, len: usize, is_early: bool, is_one_page: bool) -> bool {
        !self.free.is_empty()
            && (is_one_page && !is_early || self.bytes + len <= MAX_BYTES)
            && (!is_early || self.early_bytes + len <= MAX_EARLY_BYTES)
    }

    fn add(&mut self, load: Load) -> Option<LoadId> {
        let at = self.free.pop()?;
        let len = load.run.len();
        self.bytes += len;
        self.early_bytes += if load.is_early() { len } else { 0 };
        let slot = &mut self.slots[at as usize];
        slot.load = Some(load);
        Some(u64::from(slot.generation) << 32 | u64::from(at))
    }

    fn get(&mut self, id: LoadId) -> Option<&mut Load> {
        let slot = self.slots.get_mut(id as u32 as usize)?;
        slot.load.as_mut().filter(|_| u64::from(slot.generation) == id >> 32)
    }

    fn take(&mut self, id: LoadId) -> Option<Load> {
        self.get(id)?;
        self.take_at(id as u32 as usize)
    }

    fn take_at(&mut self, at: usize) -> Option<Load> {
        let slot = &mut self.slots[at];
        let load = slot.load.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        // It has had room for all from the start.
        self.free.push(at as u32);
        let len = load.run.len();
        self.bytes -= len;
        self.early_bytes -= if load.is_early() { len } else { 0 };
        Some(load)
    }
}

/// A load whose `start` runs. If this thread panics by a fault of the pager, its pages are released, as those of a run that
/// the thread has.
struct Starting<'a> {
    loads: &'a RankedMutex<Loads, { rank::LAYOUT }>,
    id: LoadId,
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let load = lock(self.loads).take(self.id);
        drop(load);
    }
}

impl InFlight {
    pub(crate) fn new(owner: Owner, retries: Arc<RetryQueue>) -> Result<Arc<Self>, Errno> {
        let loads = Loads {
            slots: try_with_room(MAX_LOADS).ok_or(Errno::ENOMEM)?,
            free: try_with_room(MAX_LOADS).ok_or(Errno::ENOMEM)?,
            bytes: 0,
            early_bytes: 0,
        };
        let buffers = try_with_room(MAX_IDLE_BUFFERS).ok_or(Errno::ENOMEM)?;
        let idle = RankedMutex::new(Idle { buffers, bytes: 0 });
        Ok(Arc::new(Self { owner, retries, loads: RankedMutex::new(loads), idle }))
    }

    /// Has a source start the load of a run. Not with a lock held.
    pub(super) fn start(
        self: &Arc<Self>,
        descriptor: &Arc<Descriptor>,
        run: PageRun,
        call: impl FnOnce(PageBuffer, Completion),
    ) -> Started {
        let (len, address) = (run.len(), run.address());
        let Some(bytes) = self.buffer(len) else { return Started::NoMemory(run) };
        let is_one_page = run.pages().len() == 1;
        let id = {
            let mut loads = lock(&self.loads);
            // The slots come into use one after the other, so that those that never are take no memory.
            let next = loads.slots.len();
            if loads.free.is_empty() && next < MAX_LOADS {
                loads.slots.push(Slot { generation: 0, load: None });
                loads.free.push(next as u32);
            }
            let fits = loads.fits(len, run.demand.is_none(), is_one_page);
            let descriptor = Arc::clone(descriptor);
            let (since, took) = (Instant::now(), Duration::ZERO);
            let load = Load { descriptor, run, since, took, state: State::Starting };
            if fits { loads.add(load).ok_or(None) } else { Err(Some(load)) }
        };
        let id = match id {
            Ok(id) => id,
            Err(load) => {
                self.put_back(bytes);
                let Some(Load { run, .. }) = load else { unreachable!("a slot was free") };
                return Started::Full(run);
            }
        };
        let to = || Arc::clone(self) as Arc<dyn Receiver>;
        let buffer = PageBuffer::new(bytes, len, id, to());
        let starting = Starting { loads: &self.loads, id };
        let called = catch_panic(|| {
            call(buffer, Completion::new(id, to()));
            Ok(())
        });
        reach(Point::AfterStart, address);
        mem::forget(starting);
        let mut loads = lock(&self.loads);
        let Some(load) = loads.get(id) else { unreachable!("a load that is being started stays") };
        let state = mem::replace(&mut load.state, State::UnderWay);
        let result = match (called, state) {
            (Ok(()), State::Answered(result)) => result,
            (Ok(()), _) => return Started::UnderWay,
            (Err(_), State::Answered(Ok(content))) => Ok(content),
            // What it left may still answer, which counts no more.
            (Err(panic), _) => Err(panic),
        };
        let load = loads.take(id);
        drop(loads);
        let Some(load) = load else { unreachable!("it was there") };
        let took = load.since.elapsed();
        Started::Answered(load.run, Answer { result, took })
    }

    /// Takes a load that was answered, and whose number was in the queue. `None`: it was cancelled.
    pub(super) fn take_queued(&self, id: LoadId) -> Option<(PageRun, Answer)> {
        let mut loads = lock(&self.loads);
        loads.get(id).filter(|load| matches!(load.state, State::Queued(_)))?;
        let Load { run, took, state: State::Queued(result), .. } = loads.take(id)? else { return None };
        Some((run, Answer { result, took }))
    }

    /// When the load began that a thread has waited for longest.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        let loads = lock(&self.loads);
        let waited_for = loads.slots.iter().filter_map(|slot| slot.load.as_ref());
        waited_for.filter(|load| load.run.demand.is_some()).map(|load| load.since).min()
    }

    /// Gives up loads that are under way or wait for a worker: their pages are missing again, and the threads that wait for them fault again. A
    /// late answer changes nothing.
    pub(crate) fn cancel(&self, which: impl Fn(&Descriptor, &PageRun) -> bool) {
        let mut from = 0;
        loop {
            let load = {
                let mut loads = lock(&self.loads);
                let is_it = |slot: &Slot| {
                    slot.load.as_ref().is_some_and(|load| {
                        matches!(load.state, State::UnderWay | State::Queued(_))
                            && which(&load.descriptor, &load.run)
                    })
                };
                let Some(at) = loads.slots[from..].iter().position(is_it) else { return };
                from += at;
                loads.take_at(from)
            };
            if let Some(Load { descriptor, run, state, .. }) = load {
                drop(state);
                run.give_up(descriptor.lock_shard(LOOK_SHARD).as_ref());
            }
        }
    }

    fn give_up(&self, id: LoadId) {
        let load = lock(&self.loads).take(id);
        if let Some(Load { descriptor, run, .. }) = load {
            run.give_up(descriptor.lock_shard(LOOK_SHARD).as_ref());
        }
    }

    /// A buffer of at least `len` bytes.
    fn buffer(&self, len: usize) -> Option<MmapMut> {
        let kept = {
            let mut idle = lock(&self.idle);
            let fits = |buffer: &MmapMut| (len..=2 * len).contains(&buffer.len());
            let at = idle.buffers.iter().rposition(fits);
            at.map(|at| {
                let buffer = idle.buffers.swap_remove(at);
                idle.bytes -= buffer.len();
                buffer
            })
        };
        let mut buffer = kept;
        ensure_capacity(&mut buffer, len).ok()?;
        buffer
    }
}

impl Receiver for InFlight {
    fn receive(&self, id: LoadId, answer: io::Result<Loaded>) {
        if !self.owner.is_current() {
            // A fork's child: the lock may be taken for ever, and no thread of the pager is there.
            return mem::forget(answer);
        }
        let mut loads = lock(&self.loads);
        match loads.get(id) {
            // It was cancelled. The answer is dropped without the lock.
            None => {
                drop(loads);
                drop(answer);
            }
            Some(load @ Load { state: State::Starting, .. }) => load.state = State::Answered(answer),
            Some(load) => {
                load.took = load.since.elapsed();
                load.state = State::Queued(answer);
                let work = Work::Answered { load: id, is_early: load.is_early() };
                let now = RetryAfter::Delay(Duration::ZERO);
                let put = self.retries.put(Deferred::new(&load.descriptor, work, now, None));
                drop(loads);
                if matches!(put, Put::NoRoom(_)) {
                    // There is no memory for an entry: the threads that wait fault again.
                    self.give_up(id);
                }
            }
        }
    }

    fn put_back(&self, bytes: MmapMut) {
        if !self.owner.is_current() {
            return mem::forget(bytes);
        }
        let mut idle = lock(&self.idle);
        if idle.buffers.len() == MAX_IDLE_BUFFERS || idle.bytes + bytes.len() > MAX_IDLE_BYTES {
            // Unmapped without the lock.
            drop(idle);
            return drop(bytes);
        }
        idle.bytes += bytes.len();
        idle.buffers.push(bytes);
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The text may be asked for because of a deadlock.
        let Some(loads) = try_lock(&self.loads) else { return f.write_str("InFlight { locked }") };
        let (count, bytes) = (loads.slots.len() - loads.free.len(), loads.bytes);
        drop(loads);
        f.debug_struct("InFlight").field("loads", &count).field("bytes", &bytes).finish_non_exhaustive()
    }
}
