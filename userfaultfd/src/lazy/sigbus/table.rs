//! The table of memories by address, in which the signal handler searches without a lock.
//!
//! A fault takes three steps: the handler announces it in a shard, searches the table for its memory, and uses that
//! memory, which it enters before it leaves the table. The memory stays until the handler has left it again.
//!
//! Removing a memory clears its entry in place, which allocates nothing, and waits until no fault searches the table.
//! The memory's owner then waits for the faults that have entered it, so no thread waits for a fault of another memory.
//! Adding a memory replaces the table; the old one is unmapped when no fault searches it any more.
//!
//! All of it lies in a mapping that is zero in a forked child. The faults of the parent's threads aren't running
//! there, the parent's memory isn't mapped, and the lock is free, whichever thread held it.

#![expect(unsafe_code, reason = "what a signal handler finds is behind raw pointers")]

use std::ops::{Deref, Range};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::memory::{Lazy, User};
use super::shard::{SHARDS, shard_number};
use super::visitors::Visitors;
use crate::Errno;
use crate::pager::Result;
use crate::sys::{self, Pause};

/// What the faults of this process share.
#[repr(C)]
struct Shared {
    /// Held while the table is changed: see [`lock`].
    lock: AtomicU32,
    /// Null: nothing.
    table: AtomicPtr<Table>,
    shards: [Shard; SHARDS],
}

#[repr(C, align(128))] // no line of the cache, nor the one that is fetched with it, is another shard's
struct Shard {
    /// Faults that search the table.
    searching: Visitors,
}

/// The length of the mapping, the number of entries, and the entries, ordered by address.
#[repr(C)]
struct Table {
    len: usize,
    count: usize,
    entries: [Entry; 0],
}

#[repr(C)]
struct Entry {
    start: usize,
    end: usize,
    /// Null: it was removed.
    lazy: AtomicPtr<Lazy>,
}

/// The mapping, once it exists.
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());

fn shared() -> Option<&'static Shared> {
    // Acquire: pairs with the release of `shared_or_new`.
    // SAFETY: the mapping is never given back. Zeros are good, and all that changes in it are atomics.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
}

fn shared_or_new() -> Result<&'static Shared, Errno> {
    if let Some(shared) = shared() {
        return Ok(shared);
    }
    let len = size_of::<Shared>();
    let new = sys::map_wiped_on_fork(len)?;
    let published =
        SHARED.compare_exchange(ptr::null_mut(), new.as_ptr().cast(), Ordering::AcqRel, Ordering::Acquire);
    if published.is_err() {
        // SAFETY: another thread was faster, so that no thread has seen this mapping.
        unsafe { sys::unmap(new, len) };
    }
    shared().ok_or(Errno::ENOMEM)
}

/// Calls `with` with the memory at an address, which stays meanwhile. Returns `None` if there is none.
/// Async-signal-safe.
pub(super) fn with_memory_at<T>(address: usize, with: impl FnOnce(&Lazy, usize) -> T) -> Option<T> {
    let shared = shared()?;
    let number = shard_number();
    let shard = &shared.shards[number];
    let user = shared.enter(shard, address, number)?;
    let _fault = user.begin_fault();
    Some(with(&user, number))
}

impl Shared {
    /// Enters the memory at an address.
    fn enter(&self, shard: &Shard, address: usize, number: usize) -> Option<User<'_>> {
        // Before the table is looked at: see `Visitors`.
        shard.searching.enter();
        let entries = entries(self.table.load(Ordering::SeqCst));
        let entry = entries.get(entries.partition_point(|entry| entry.end <= address));
        let lazy =
            entry.filter(|entry| entry.start <= address).map(|entry| entry.lazy.load(Ordering::SeqCst));
        // SAFETY: a memory with an entry lives until `remove` has returned, which waits for this search, and then until
        // every thread that has entered it has left it.
        let lazy = lazy.and_then(|lazy| unsafe { lazy.as_ref() });
        let user = lazy.map(|lazy| lazy.entered(number));
        shard.searching.leave();
        user
    }

    /// Waits until every fault that may have seen the old table or entry has ended its search.
    fn wait_for_searches(&self) {
        for shard in &self.shards {
            let mut pause = Pause::new();
            while shard.searching.are_inside() {
                pause.rest();
            }
        }
    }
}

/// The lock of the table. It is free in the child of a fork.
struct Locked(&'static Shared);

const FREE: u32 = 0;
const HELD: u32 = 1;
const WAITED_FOR: u32 = 2;

impl Locked {
    fn new(shared: &'static Shared) -> Self {
        let lock = &shared.lock;
        // Acquire and release: the next holder sees what the last one has changed.
        if lock.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while lock.swap(WAITED_FOR, Ordering::Acquire) != FREE {
                sys::futex_wait(lock, WAITED_FOR);
            }
        }
        Self(shared)
    }
}

impl Deref for Locked {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.0.lock.swap(FREE, Ordering::Release) == WAITED_FOR {
            sys::futex_wake(&self.0.lock);
        }
    }
}

/// Calls `with` while no other thread of the process is in such a call or changes the table.
pub(super) fn locked<T>(with: impl FnOnce() -> T) -> Result<T, Errno> {
    let _locked = Locked::new(shared_or_new()?);
    Ok(with())
}

/// The entries of a table.
fn entries<'a>(table: *const Table) -> &'a [Entry] {
    if table.is_null() {
        return &[];
    }
    // SAFETY: a table that is published stays mapped while a fault looks in it, or the lock is held.
    let count = unsafe { (*table).count };
    // SAFETY: this takes the address of a field of the mapping, and reads nothing.
    let first = unsafe { (&raw const (*table).entries).cast::<Entry>() };
    // SAFETY: `count` entries were written behind the count before the table was published.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// Publishes a memory to the handler.
///
/// # Safety
///
/// The caller must make sure that `lazy` stays where it is until it was [removed](remove) and every thread that has
/// entered it has left it.
pub(super) unsafe fn add(lazy: *const Lazy, addresses: Range<usize>) -> Result<()> {
    let Range { start, end } = addresses;
    let shared = Locked::new(shared_or_new()?);
    let old = shared.table.load(Ordering::SeqCst);
    let there = || entries(old).iter().filter(|entry| !entry.lazy.load(Ordering::SeqCst).is_null());
    let count = there().count() + 1;
    let len = size_of::<Table>() + count * size_of::<Entry>();
    let table = sys::map(len)?.cast::<Table>().as_ptr();
    let new = Entry { start, end, lazy: AtomicPtr::new(lazy.cast_mut()) };
    let before = there().take_while(|entry| entry.end <= start).count();
    let copy = |entry: &Entry| Entry {
        start: entry.start,
        end: entry.end,
        lazy: AtomicPtr::new(entry.lazy.load(Ordering::SeqCst)),
    };
    let all = there().take(before).map(copy).chain([new]).chain(there().skip(before).map(copy));
    // SAFETY: this takes the address of a field of the mapping, and reads nothing.
    let first = unsafe { (&raw mut (*table).entries).cast::<Entry>() };
    for (number, entry) in all.enumerate() {
        // SAFETY: the mapping has room for `count` entries, and no other thread knows it yet.
        unsafe { first.wrapping_add(number).write(entry) };
    }
    // SAFETY: the mapping is large enough, aligned to a page, and no other thread knows it yet.
    unsafe { (*table).len = len };
    // SAFETY: as above.
    unsafe { (*table).count = count };
    shared.table.store(table, Ordering::SeqCst);
    if let Some(old) = NonNull::new(old) {
        shared.wait_for_searches();
        // SAFETY: it was published, so that its length was written.
        let len = unsafe { old.as_ref() }.len;
        // SAFETY: no thread searches it any more, nor will: the new table has taken its place.
        unsafe { sys::unmap(old.cast(), len) };
    }
    Ok(())
}

/// Hides a memory from later faults. Faults that have found it already may still use it.
pub(super) fn remove(lazy: *const Lazy) {
    let Some(shared) = shared().map(Locked::new) else { return };
    let mut entries = entries(shared.table.load(Ordering::SeqCst)).iter();
    if let Some(entry) = entries.find(|entry| ptr::eq(entry.lazy.load(Ordering::SeqCst), lazy)) {
        entry.lazy.store(ptr::null_mut(), Ordering::SeqCst);
        shared.wait_for_searches();
    }
}
