//! Which thread fetches a chunk, which ones read it, and how a chunk is given up.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::fetch::Fetch;
use super::{Image, add, lock};
use crate::source::chunk_cache::shown::{self, Shown};
use crate::source::chunk_cache::table::State;
use crate::sys::{self, FileLock};

/// The word of a chunk in this process: a thread settles it; its lock is shared, which keeps it from being given back; it
/// can be read in the mapping; and the number of threads that read the file.
pub(super) const BUSY: u32 = 1 << 31;
const LEASED: u32 = 1 << 30;
pub(super) const MAPPED: u32 = 1 << 29;
const READERS: u32 = MAPPED - 1;

/// Bytes of a file that are read at once for a checksum.
const CHECK_BYTES: usize = 16 << 10;

/// How long a thread waits for a chunk before it looks whether the process that fetches it has died.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What must be done about a chunk.
pub(super) enum Claim<'a> {
    /// It is in the file, and stays there until this is dropped.
    Held(Held<'a>),
    Zero,
    /// This thread fetches it.
    Fetch(Fetch<'a>),
    /// Another process takes too long, or uses the chunk, which is damaged. The cache has no part in this read.
    Bypass,
}

pub(super) struct Held<'a>(&'a AtomicU32);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Release: the file was read before the chunk can be given back.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

enum Settled {
    Fetch,
    Leased,
    Zero,
    TooLong,
}

impl Image {
    /// Waits until a chunk is there, or this thread may fetch it.
    pub(super) fn claim(&self, chunk: usize) -> Claim<'_> {
        let word = &self.chunks[chunk];
        let mut begun = None;
        loop {
            let seen = word.load(Ordering::Relaxed);
            if seen & (BUSY | LEASED) == LEASED {
                // Acquire: the lease was taken before the file is read.
                if word.compare_exchange(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                    self.table.touch(chunk, self.directory.epoch());
                    return Claim::Held(Held(word));
                }
                continue;
            }
            if self.table.state(chunk) == State::Zero {
                return Claim::Zero;
            }
            let is_free = seen & BUSY == 0;
            if is_free && word.compare_exchange(0, BUSY, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                let settling = Fetch { image: self, chunks: chunk..chunk + 1 };
                if begun.is_none() {
                    self.yield_to_others();
                }
                match self.settle(chunk, &mut begun) {
                    Settled::Fetch => return Claim::Fetch(settling),
                    Settled::Leased => {
                        std::mem::forget(settling);
                        return Claim::Held(Held(word));
                    }
                    Settled::Zero => return Claim::Zero,
                    Settled::TooLong => return Claim::Bypass,
                }
            }
            if !is_free && self.is_too_long(&mut begun) {
                return Claim::Bypass;
            }
            if !is_free {
                sys::futex_wait_shared(word, seen, LOOK_INTERVAL);
            }
        }
    }

    /// Whether a thread has waited for as long as it may.
    fn is_too_long(&self, begun: &mut Option<Instant>) -> bool {
        let begun = begun.get_or_insert_with(|| {
            add(&self.counters.waits, 1);
            Instant::now()
        });
        begun.elapsed() > self.options.wait_limit
    }

    /// Takes the lease of a chunk that is there, or the lock to fetch it. The chunk is busy here.
    fn settle(&self, chunk: usize, begun: &mut Option<Instant>) -> Settled {
        let table = &self.table;
        loop {
            let seen = table.state_word(chunk).load(Ordering::Relaxed);
            let is_there = table.state(chunk) == State::Data;
            let wanted = if is_there { FileLock::Shared } else { FileLock::Exclusive };
            if table.lock(chunk, wanted) {
                match (table.state(chunk), wanted) {
                    (State::Zero, _) => return Settled::Zero,
                    (State::Data, _) => {
                        // Of an exclusive lock a shared one stays.
                        if table.lock(chunk, FileLock::Shared) && self.is_right(chunk) {
                            self.lease(chunk, 1);
                            return Settled::Leased;
                        }
                        add(&self.counters.damaged, 1);
                        if table.lock(chunk, FileLock::Exclusive) {
                            return Settled::Fetch;
                        }
                        // Another process uses it, and has compared it before it was damaged. That may go on for long.
                        table.lock(chunk, FileLock::Unlocked);
                        return Settled::TooLong;
                    }
                    (_, FileLock::Exclusive) => return Settled::Fetch,
                    _ => {}
                }
                table.lock(chunk, FileLock::Unlocked);
            }
            if self.is_too_long(begun) {
                return Settled::TooLong;
            }
            sys::futex_wait_shared(table.state_word(chunk), seen, LOOK_INTERVAL);
        }
    }

    /// Whether the bytes of a chunk, which is locked, are those of its checksum.
    fn is_right(&self, chunk: usize) -> bool {
        let mut range = self.bytes_of(chunk);
        let (mut hasher, mut buffer) = (crc32fast::Hasher::new(), [0; CHECK_BYTES]);
        while !range.is_empty() {
            let len = CHECK_BYTES.min((range.end - range.start) as usize);
            if self.file.read_exact_at(&mut buffer[..len], range.start).is_err() {
                return false;
            }
            hasher.update(&buffer[..len]);
            range.start += len as u64;
        }
        hasher.finalize() == self.table.checksum(chunk)
    }

    /// Lets a chunk, whose lock is shared now, be read here. It is no longer busy.
    pub(super) fn lease(&self, chunk: usize, readers: u32) {
        let mut shown = lock(&self.shown);
        let mapped = if self.show(&mut shown, chunk) { MAPPED } else { 0 };
        // Release: pairs with the acquire of a thread that reads by the lease.
        self.chunks[chunk].store(LEASED | mapped | readers, Ordering::Release);
        drop(shown);
        sys::futex_wake_shared(&self.chunks[chunk]);
    }

    /// Ends the lock of a chunk that is busy here, and that it is.
    pub(super) fn unlock(&self, chunk: usize) {
        self.table.lock(chunk, FileLock::Unlocked);
        self.chunks[chunk].store(0, Ordering::Release);
        sys::futex_wake_shared(&self.chunks[chunk]);
        sys::futex_wake_shared(self.table.state_word(chunk));
    }

    /// Gives up the lease of a chunk, so that it can be given back. `false`: a thread uses it.
    pub(in crate::source::chunk_cache) fn give_back(&self, chunk: usize) -> bool {
        if !self.owner.is_current() {
            return false;
        }
        let word = &self.chunks[chunk];
        let seen = word.load(Ordering::Relaxed);
        if seen == 0 {
            return true;
        }
        // Acquire: the threads that read by the lease are done.
        if seen & BUSY != 0
            || seen & READERS != 0
            || word.compare_exchange(seen, BUSY, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            return false;
        }
        // From here on the kernel can't copy from the mapping what will be a hole: it answers EFAULT, and the page is read.
        if self.hide(&mut lock(&self.shown), chunk) {
            self.unlock(chunk);
            true
        } else {
            // The kernel has no memory for one more mapping.
            word.store(seen, Ordering::Release);
            sys::futex_wake_shared(word);
            false
        }
    }

    /// Lets a chunk be read in the mapping. `false`: that would take too many mappings of the process.
    fn show(&self, shown: &mut Shown, chunk: usize) -> bool {
        let range = self.bytes_of(chunk);
        let Some(map) = &self.map else { return false };
        let more = shown.change(chunk);
        if !shown::take_borders(more, self.max_borders.load(Ordering::Relaxed)) {
            return false;
        }
        let done = sys::set_readable(map, range.start as usize..range.end as usize, true).is_ok();
        if done {
            shown.set(chunk, true, more);
        } else {
            shown::give_borders_back(more);
        }
        done
    }

    /// Keeps a chunk from being read in the mapping. `false`: the kernel can't do so.
    fn hide(&self, shown: &mut Shown, chunk: usize) -> bool {
        let range = self.bytes_of(chunk);
        let Some(map) = self.map.as_ref().filter(|_| shown.is(chunk)) else { return true };
        let more = -shown.change(chunk);
        if !shown::take_borders(more, self.max_borders.load(Ordering::Relaxed)) {
            // In place of one more mapping, one mapping: all chunks are read from the file from now on, until they have come
            // in once more.
            if sys::set_readable(map, 0..map.len(), false).is_err() {
                return false;
            }
            self.chunks.iter().for_each(|word| {
                // Nothing is read because of it that isn't read from the file as well.
                word.fetch_and(!MAPPED, Ordering::Relaxed);
            });
            *shown = Shown::new(self.chunks.len());
            return true;
        }
        let done = sys::set_readable(map, range.start as usize..range.end as usize, false).is_ok();
        if done {
            shown.set(chunk, false, more);
        } else {
            shown::give_borders_back(more);
        }
        done
    }

    /// Gives up leases that weren't used lately, if another process has found nothing to give back.
    fn yield_to_others(&self) {
        let pressure = self.directory.pressure();
        if self.seen_pressure.swap(pressure, Ordering::Relaxed) == pressure {
            return;
        }
        let epoch = self.directory.epoch();
        for chunk in 0..self.chunks.len() {
            if self.chunks[chunk].load(Ordering::Relaxed) & LEASED != 0
                && self.table.usage(chunk).age(epoch) > 0
            {
                self.give_back(chunk);
            }
        }
    }
}
