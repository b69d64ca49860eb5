//! Which memory lies at which address, for a signal handler to find without a lock.
//!
//! The table is never changed: a new one takes its place. The old one, and the memory that it leads to, is given up
//! only when no handler reads it any more. Each handler that runs has a slot for itself, in which it says which table
//! it reads.

#![expect(unsafe_code, reason = "what a signal handler finds is behind raw pointers")]

use std::mem::{self, offset_of};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::memory::Lazy;
use crate::pager::Result;
use crate::pager::descriptor::lock;
use crate::sys;

/// So many handlers run at once, each with counters of its own. One more waits until another is done.
pub(super) const SLOTS: usize = 64;

/// How many entries there are, and then those. In a child of a fork all of it is zero: the parent's memory isn't
/// mapped there, and what the child has at those addresses is its own.
#[repr(C)]
struct Table {
    count: usize,
    entries: [Entry; 0],
}

#[derive(Clone, Copy)]
struct Entry {
    start: usize,
    end: usize,
    lazy: *const Lazy,
}

/// What handlers read. Null: nothing.
static TABLE: AtomicPtr<Table> = AtomicPtr::new(ptr::null_mut());

/// The mapping of [`TABLE`]. Held while it is replaced.
static MAPPED: Mutex<Option<MmapRaw>> = Mutex::new(None);

#[repr(align(128))] // no line of the cache, nor the one that is fetched with it, is another handler's
struct Slot(AtomicPtr<Table>);

/// The slots of the handlers that run. Null: free.
static RUNNING: [Slot; SLOTS] = [const { Slot(AtomicPtr::new(ptr::null_mut())) }; SLOTS];

/// In a slot that is taken, and reads no table yet.
const NO_TABLE: *mut Table = ptr::without_provenance_mut(1);

/// A slot, and the table that stays as long as it is held.
pub(super) struct Hold {
    slot: usize,
    table: *const Table,
}

impl Hold {
    /// Takes a slot. Async-signal-safe.
    pub(super) fn take() -> Self {
        let slot = take_slot();
        let reads = &RUNNING[slot].0;
        let mut table = TABLE.load(Ordering::SeqCst);
        loop {
            reads.store(if table.is_null() { NO_TABLE } else { table }, Ordering::SeqCst);
            // Who replaced it before it was said to be read may not have seen that.
            let now = TABLE.load(Ordering::SeqCst);
            if now == table {
                return Self { slot, table };
            }
            table = now;
        }
    }

    /// The number of the slot, which nobody else has meanwhile.
    pub(super) fn slot(&self) -> usize {
        self.slot
    }

    /// The memory at an address. Async-signal-safe.
    pub(super) fn find(&self, address: usize) -> Option<&Lazy> {
        let entries = entries(self.table);
        let entry = entries.get(entries.partition_point(|entry| entry.end <= address))?;
        // SAFETY: what a table leads to lives until nobody reads the table any more.
        (entry.start <= address).then(|| unsafe { &*entry.lazy })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        RUNNING[self.slot].0.store(ptr::null_mut(), Ordering::Release);
    }
}

/// Takes a slot: mostly the one that the thread took the last time, as its stack tells.
fn take_slot() -> usize {
    let here = 0_u8;
    let stack = (&raw const here).addr() >> 12;
    let first = stack.wrapping_mul(0x9e37_79b1) >> 8;
    loop {
        for slot in (first..first + SLOTS).map(|slot| slot % SLOTS) {
            let free = (ptr::null_mut(), NO_TABLE);
            let cell = &RUNNING[slot].0;
            if cell.compare_exchange(free.0, free.1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return slot;
            }
        }
        std::thread::yield_now();
    }
}

/// Whether any handler runs. Slots of a parent's threads, which stay taken in the child of a fork, tell of tables that
/// are none any more.
pub(super) fn is_any_running() -> bool {
    let table = TABLE.load(Ordering::Relaxed);
    !table.is_null() && RUNNING.iter().any(|slot| slot.0.load(Ordering::Relaxed) == table)
}

/// The entries of a table, by address.
fn entries<'a>(table: *const Table) -> &'a [Entry] {
    if table.is_null() {
        return &[];
    }
    // SAFETY: a table that is published, and held, is mapped.
    let count = unsafe { (*table).count };
    // SAFETY: of a field of the mapping the address is taken.
    let first = unsafe { (&raw const (*table).entries).cast::<Entry>() };
    // SAFETY: so many entries were written behind the count, before the table was published; or the count is 0.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// Has handlers find some memory, from now on.
///
/// # Safety
///
/// The caller must make sure that `lazy` stays where it is until it was [removed](remove).
pub(super) unsafe fn add(lazy: *const Lazy, start: usize, end: usize) -> Result<()> {
    replace(|entries| {
        let at = entries.partition_point(|entry| entry.end <= start);
        entries.insert(at, Entry { start, end, lazy });
    })
}

/// Has handlers find it no more, and waits until none has it.
pub(super) fn remove(lazy: *const Lazy) -> Result<()> {
    replace(|entries| entries.retain(|entry| !ptr::eq(entry.lazy, lazy)))
}

fn replace(change: impl FnOnce(&mut Vec<Entry>)) -> Result<()> {
    let mut mapped = lock(&MAPPED);
    let old = TABLE.load(Ordering::SeqCst);
    let mut new = entries(old).to_vec();
    let inherited = !old.is_null() && new.is_empty();
    change(&mut new);
    let map = publish(&new)?;
    let old_map = mem::replace(&mut *mapped, map);
    if inherited {
        // Slots of the parent's threads may say for ever that they read it: its address is used no more.
        mem::forget(old_map);
    } else if !old.is_null() {
        for slot in &RUNNING {
            while slot.0.load(Ordering::SeqCst) == old {
                std::thread::yield_now();
            }
        }
    }
    Ok(())
}

/// Makes a table of entries what handlers read.
fn publish(entries: &[Entry]) -> Result<Option<MmapRaw>> {
    if entries.is_empty() {
        TABLE.store(ptr::null_mut(), Ordering::SeqCst);
        return Ok(None);
    }
    let len = offset_of!(Table, entries) + size_of_val(entries);
    let map = MmapRaw::from(MmapOptions::new().len(len).map_anon()?);
    sys::wipe_on_fork(&map)?;
    let table = map.as_mut_ptr().cast::<Table>();
    // SAFETY: the mapping is large enough, aligned to a page, and nobody else's yet.
    unsafe { (*table).count = entries.len() };
    // SAFETY: of a field of the mapping the address is taken.
    let first = unsafe { (&raw mut (*table).entries).cast::<Entry>() };
    // SAFETY: the mapping has room for so many.
    unsafe { first.copy_from_nonoverlapping(entries.as_ptr(), entries.len()) };
    TABLE.store(table, Ordering::SeqCst);
    Ok(Some(map))
}
