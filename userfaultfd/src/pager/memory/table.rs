//! The descriptors that are served, by slot.
//!
//! Workers find descriptors here and close them, while a thread that forks may hold the allocator's locks until its event
//! is read. So nothing is allocated or freed while the slots are locked, and a worker that closes a descriptor leaves it in
//! its slot: another thread takes it out, once nothing else has it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar};

use crate::lock_order::{RankedMutex, lock, rank};
use crate::owner::Owner;
use crate::pager::memory::descriptor::Descriptor;

#[derive(Debug)]
pub(crate) struct Table {
    /// The process that has the threads. In another one the lock may be taken for ever.
    owner: Owner,
    slots: RankedMutex<Slots, { rank::TABLE }>,
    /// Held while a descriptor is added.
    adding: RankedMutex<(), { rank::TURN }>,
    /// A descriptor was added or removed.
    changed: Condvar,
    /// Grows with each change.
    version: AtomicU32,
}

#[derive(Debug, Default)]
struct Slots {
    all: Vec<Option<Arc<Descriptor>>>,
    /// How many were ever added.
    count: u64,
    served: usize,
}

impl Table {
    pub(crate) fn new(owner: Owner) -> Self {
        Self {
            owner,
            slots: RankedMutex::default(),
            adding: RankedMutex::default(),
            changed: Condvar::new(),
            version: AtomicU32::new(0),
        }
    }

    /// Adds a descriptor, which is made with its number and its slot. Not for workers.
    pub(crate) fn add(&self, make: impl FnOnce(u64, u32) -> Descriptor) -> Arc<Descriptor> {
        let _adding = lock(&self.adding);
        self.reap();
        let (id, slot, len) = {
            let slots = lock(&self.slots);
            let len = slots.all.len();
            (slots.count, slots.all.iter().position(Option::is_none).unwrap_or(len), len)
        };
        let descriptor = Arc::new(make(id, slot as u32));
        let more = if slot == len { Vec::with_capacity(2 * len + 8) } else { Vec::new() };
        let before = {
            let mut slots = lock(&self.slots);
            let before = if slot == len && len == slots.all.capacity() {
                let before = std::mem::replace(&mut slots.all, more);
                slots.all.extend(before.iter().cloned());
                before
            } else {
                more
            };
            if slot == len {
                slots.all.push(None);
            }
            slots.all[slot] = Some(Arc::clone(&descriptor));
            slots.count += 1;
            slots.served += 1;
            before
        };
        drop(before);
        self.note_change();
        descriptor
    }

    /// A descriptor was closed.
    pub(crate) fn note_closed(&self) {
        lock(&self.slots).served -= 1;
        self.note_change();
    }

    fn note_change(&self) {
        // Pairs with the load of `version`.
        self.version.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    /// Frees what was served by descriptors that are closed, and takes those out that nothing else has any more. Not for
    /// workers.
    pub(crate) fn reap(&self) {
        let next = || {
            let mut slots = lock(&self.slots);
            slots.all.iter_mut().find_map(|slot| {
                let closed = slot.as_ref().filter(|descriptor| descriptor.is_closed())?;
                let (left, unused) = (closed.take_deferred_drop(), Arc::strong_count(closed) == 1);
                let descriptor = if unused { slot.take() } else { None };
                (left.is_some() || unused).then_some((left, descriptor))
            })
        };
        while let Some(freed) = next() {
            drop(freed);
        }
    }

    /// The descriptor in a slot.
    pub(crate) fn in_slot(&self, slot: usize) -> Option<Arc<Descriptor>> {
        lock(&self.slots).all.get(slot)?.clone()
    }

    /// The number of slots, used or not.
    pub(crate) fn slot_count(&self) -> usize {
        lock(&self.slots).all.len()
    }

    /// The descriptor of a number, if it is served.
    pub(crate) fn find(&self, id: u64) -> Option<Arc<Descriptor>> {
        self.all().into_iter().find(|descriptor| descriptor.id == id)
    }

    /// The descriptors that are served: none in another process.
    pub(crate) fn all(&self) -> Vec<Arc<Descriptor>> {
        let mut descriptors = Vec::new();
        if !self.owner.is_current() {
            return descriptors;
        }
        loop {
            let len = lock(&self.slots).all.len();
            descriptors.reserve(len);
            let slots = lock(&self.slots);
            if slots.all.len() <= descriptors.capacity() {
                let served = slots.all.iter().flatten().filter(|descriptor| !descriptor.is_closed());
                descriptors.extend(served.cloned());
                return descriptors;
            }
        }
    }

    /// The number of the last change. A thread that has seen it finds the table as it was after that change, or later.
    pub(crate) fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Waits until nothing is served any more, and nothing will be without being added: `has_forks` tells whether a fork's
    /// child isn't served yet. It is asked with the slots locked.
    pub(crate) fn wait_until_empty(&self, has_forks: impl Fn() -> bool) {
        if !self.owner.is_current() {
            return;
        }
        // A fork whose child isn't served yet was noted before its parent could end.
        let some = |slots: &mut Slots| slots.served > 0 || has_forks();
        drop(lock(&self.slots).wait_while(&self.changed, some));
    }

    /// Waits until a descriptor isn't served any more.
    #[cfg(feature = "handoff")]
    pub(crate) fn wait_until_closed(&self, id: u64) {
        if !self.owner.is_current() {
            return;
        }
        let is_served = |slots: &mut Slots| {
            slots.all.iter().flatten().any(|descriptor| descriptor.id == id && !descriptor.is_closed())
        };
        drop(lock(&self.slots).wait_while(&self.changed, is_served));
    }

    /// A fork's child is served: the answer of `has_forks` has changed.
    pub(crate) fn note_adopted(&self) {
        // Not between a look at the forks and the sleep that follows.
        drop(lock(&self.slots));
        self.changed.notify_all();
    }

    /// Runs something while no other thread can look at the table.
    #[cfg(test)]
    pub(crate) fn with_slots_locked<T>(&self, run: impl FnOnce() -> T) -> T {
        let _slots = lock(&self.slots);
        run()
    }
}
