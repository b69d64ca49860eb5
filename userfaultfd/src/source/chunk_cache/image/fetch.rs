//! Chunks that are read from the source and kept.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::claim::BUSY;
use super::{Image, add, lock};
use crate::source::PageData;
use crate::source::chunk_cache::table::State;
use crate::sys::{self, FileLock};

/// Bytes that are fetched by one read of the source at most, but for a single chunk.
const MAX_FETCH_BYTES: usize = 4 << 20;

/// Chunks that are locked for this thread to fetch. Those that are still so when this is dropped are left as they are.
pub(super) struct Fetch<'a> {
    pub(super) image: &'a Image,
    pub(super) chunks: Range<usize>,
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        // A source may have forked: the locks are the parent's then.
        if self.image.owner.is_current() {
            self.chunks.clone().for_each(|chunk| self.image.unlock(chunk));
        }
    }
}

impl Fetch<'_> {
    /// Adds the chunks that follow, up to the `last`, as far as none of them is there or on its way.
    pub(super) fn extend(&mut self, last: usize) {
        let Self { image, chunks } = self;
        while chunks.end <= last && (chunks.len() + 1) * image.chunk_size() <= MAX_FETCH_BYTES {
            let (chunk, word) = (chunks.end, &image.chunks[chunks.end]);
            let is_missing = || matches!(image.table.state(chunk), State::Empty | State::Unsettled);
            if !is_missing() || word.compare_exchange(0, BUSY, Ordering::Acquire, Ordering::Relaxed).is_err()
            {
                return;
            }
            if !image.table.lock(chunk, FileLock::Exclusive) || !is_missing() {
                return image.unlock(chunk);
            }
            chunks.end += 1;
        }
    }

    /// Fetches the chunks, hands them to `deliver` if they aren't all zeros, and keeps them.
    pub(super) fn run(mut self, early: bool, deliver: impl FnOnce(&[u8])) -> io::Result<PageData> {
        let image = self.image;
        let size = image.chunk_size();
        let len = self.chunks.len() * size;
        let mut buffer = lock(&image.buffers).pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.try_reserve_exact(len - buffer.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
            buffer.resize(len, 0);
        }
        let start = image.bytes_of(self.chunks.start).start;
        let found = image.read_source(start, &mut buffer[..len], early)?;
        add(&image.counters.fetches, 1);
        add(&image.counters.fetched, len as u64);
        if found == PageData::Zero {
            buffer[..len].fill(0);
        }
        // The source decides what is beyond its end, and an image has zeros there.
        let inside = (image.len() - start).min(len as u64) as usize;
        buffer[inside..len].fill(0);
        let parts = || self.chunks.clone().zip(buffer[..len].chunks_exact(size));
        if let Some(verify) = &image.options.verify {
            for (chunk, bytes) in parts() {
                let range = image.bytes_of(chunk);
                verify(range.start, &bytes[..(range.end - range.start) as usize])?;
            }
        }
        if found == PageData::Data {
            deliver(&buffer[..len]);
        }
        for (chunk, bytes) in self.chunks.clone().zip(buffer[..len].chunks_exact(size)) {
            let is_kept = image.store(chunk, bytes, found == PageData::Zero);
            // It is settled by that, in each case.
            self.chunks.start = chunk + 1;
            if !is_kept {
                // The next one would wait as long, for the same. They are unlocked when this is dropped.
                break;
            }
        }
        lock(&image.buffers).push(buffer);
        Ok(found)
    }
}

impl Image {
    /// Keeps a chunk that was fetched, if there is room, and settles it. `false`: there is no room, or no lock in time.
    fn store(&self, chunk: usize, bytes: &[u8], is_zero: bool) -> bool {
        let (table, size) = (&self.table, self.chunk_size() as u64);
        let punch = || sys::punch_hole(self.file.as_fd(), chunk as u64 * size, size).is_ok();
        let is_counted = matches!(table.state(chunk), State::Data | State::Unsettled);
        if is_zero || bytes.iter().all(|byte| *byte == 0) {
            let is_kept = if is_counted {
                punch() && self.directory.release(table, chunk, State::Zero)
            } else {
                table.set_state(chunk, State::Zero);
                true
            };
            self.unlock(chunk);
            return is_kept;
        }
        if !is_counted && !self.directory.reserve(table, chunk) {
            add(&self.counters.not_stored, 1);
            self.unlock(chunk);
            return false;
        }
        table.set_state(chunk, State::Unsettled);
        let range = self.bytes_of(chunk);
        let bytes = &bytes[..(range.end - range.start) as usize];
        let mut written = self.file.write_all_at(bytes, range.start);
        if is_full(&written) && self.directory.make_room(size) {
            written = self.file.write_all_at(bytes, range.start);
        }
        if let Err(error) = written {
            self.note_problem(error);
            if punch() {
                self.directory.release(table, chunk, State::Empty);
            }
            self.unlock(chunk);
            return false;
        }
        table.set_checksum(chunk, crc32fast::hash(bytes));
        table.begin_use(chunk, self.directory.epoch());
        table.set_state(chunk, State::Data);
        // The lock is shared before other processes are woken, which want to share it.
        if table.lock(chunk, FileLock::Shared) {
            self.lease(chunk, 0);
            sys::futex_wake_shared(table.state_word(chunk));
        } else {
            self.unlock(chunk);
        }
        true
    }
}

fn is_full(written: &io::Result<()>) -> bool {
    let codes = [libc::ENOSPC, libc::EDQUOT].map(Some);
    written.as_ref().is_err_and(|error| codes.contains(&error.raw_os_error()))
}
