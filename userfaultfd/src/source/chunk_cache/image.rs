//! An open image: which thread fetches a chunk, which ones wait for it, and when its bytes may be used.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicIsize, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;

use super::directory::Directory;
use super::shown::{self, Shown};
use super::table::{Paths, State, Table};
use super::{CacheError, CacheStatistics};
use crate::owner::{Owner, PerProcess};
use crate::source::{PageData, PageSource, SourceBytes};
use crate::sync::AtomicU64;
use crate::sys::{self, FileLock};

/// Makes the source of an image, when something must be read from it.
pub(super) type Make = Box<dyn Fn() -> io::Result<Box<dyn PageSource>> + Send + Sync>;

/// Says whether the bytes of a chunk, at an offset of the image, are right.
pub(super) type Verify = Box<dyn Fn(u64, &[u8]) -> io::Result<()> + Send + Sync>;

/// The word of a chunk in this process: a thread settles it; its lock is shared, which keeps it from being given back; it
/// can be read in the mapping; and the number of threads that read the file.
const BUSY: u32 = 1 << 31;
const LEASED: u32 = 1 << 30;
const MAPPED: u32 = 1 << 29;
const READERS: u32 = MAPPED - 1;

/// Bytes that are fetched by one read of the source at most, but for a single chunk.
const MAX_FETCH_BYTES: usize = 4 << 20;

/// Bytes of a file that are read at once for a checksum.
const CHECK_BYTES: usize = 16 << 10;

/// How long a thread waits for a chunk before it looks whether the process that fetches it has died.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

type Source = OnceLock<Box<dyn PageSource>>;

pub(super) struct Options {
    pub(super) make: Make,
    pub(super) verify: Option<Verify>,
    pub(super) wait_limit: Duration,
}

pub(super) struct Image {
    owner: Owner,
    name: String,
    paths: Paths,
    directory: Arc<Directory>,
    table: Table,
    file: File,
    /// `None`: the address space has no room, so that all is read from the file.
    map: Option<MmapRaw>,
    shown: Mutex<Shown>,
    chunks: Box<[AtomicU32]>,
    source: Source,
    pub(super) making: Mutex<()>,
    /// The source that a fork's child makes, where its parent had none: it may have inherited `making` locked. Never dropped.
    childs_source: PerProcess<Source>,
    options: Options,
    buffers: Mutex<Vec<Vec<u8>>>,
    seen_pressure: AtomicU32,
    counters: Counters,
    problem: Mutex<Option<io::Error>>,
    /// The number of borders up to which chunks are shown. Another one in tests.
    pub(super) max_borders: AtomicIsize,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    fetches: AtomicU64,
    fetched: AtomicU64,
    waits: AtomicU64,
    damaged: AtomicU64,
    not_stored: AtomicU64,
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// What must be done about a chunk.
enum Claim<'a> {
    /// It is in the file, and stays there until this is dropped.
    Held(Held<'a>),
    Zero,
    /// This thread fetches it.
    Fetch(Fetch<'a>),
    /// Another process takes too long, or uses the chunk, which is damaged. The cache has no part in this read.
    Bypass,
}

struct Held<'a>(&'a AtomicU32);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Release: the file was read before the chunk can be given back.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Chunks that are locked for this thread to fetch. Those that are still so when this is dropped are left as they are.
struct Fetch<'a> {
    image: &'a Image,
    chunks: Range<usize>,
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        // A source may have forked: the locks are the parent's then.
        if self.image.owner.is_current() {
            self.chunks.clone().for_each(|chunk| self.image.unlock(chunk));
        }
    }
}

impl Image {
    pub(super) fn new(
        directory: Arc<Directory>,
        name: String,
        paths: Paths,
        table: Table,
        file: File,
        options: Options,
    ) -> io::Result<Arc<Self>> {
        let owner = Owner::current()?;
        let len = table.header().len;
        let map = usize::try_from(len).ok().filter(|len| *len > 0).and_then(|len| {
            let map = memmap2::MmapOptions::new().len(len).map_raw_read_only(&file).ok()?;
            // A chunk can be read once it is there, checked, and kept from being given back.
            sys::set_readable(&map, 0..len, false).ok()?;
            Some(map)
        });
        let table_chunks = table.chunks();
        let chunks = (0..table_chunks).map(|_| AtomicU32::new(0)).collect();
        let image = Arc::new(Self {
            owner,
            name,
            paths,
            seen_pressure: AtomicU32::new(directory.pressure()),
            directory,
            table,
            file,
            map,
            shown: Mutex::new(Shown::new(table_chunks)),
            chunks,
            source: Source::new(),
            making: Mutex::new(()),
            childs_source: PerProcess::new(),
            options,
            buffers: Mutex::default(),
            counters: Counters::default(),
            problem: Mutex::default(),
            max_borders: AtomicIsize::new(shown::max_borders()),
        });
        image.directory.add(&image);
        Ok(image)
    }

    pub(super) fn len(&self) -> u64 {
        self.table.header().len
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn is_at(&self, table: &Path) -> bool {
        self.paths.table == table
    }

    pub(super) fn set_pinned(&self, pinned: bool) {
        self.table.set_pinned(pinned);
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.table.is_pinned()
    }

    /// The number of bytes of a range that are in the cache.
    pub(super) fn cached(&self) -> u64 {
        let is_there = |chunk: &usize| matches!(self.table.state(*chunk), State::Data | State::Zero);
        let sizes = (0..self.chunks.len()).filter(is_there).map(|chunk| self.bytes_of(chunk));
        sizes.map(|bytes| bytes.end - bytes.start).sum()
    }

    pub(super) fn statistics(&self) -> CacheStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { reads, fetches, fetched, waits, damaged, not_stored } = &self.counters;
        CacheStatistics {
            reads: get(reads),
            fetches: get(fetches),
            fetched: get(fetched),
            waits: get(waits),
            damaged: get(damaged),
            not_stored: get(not_stored),
        }
    }

    pub(super) fn take_problem(&self) -> Option<io::Error> {
        // A fork's child may have inherited it locked.
        if self.owner.is_current() { lock(&self.problem).take() } else { None }
    }

    fn chunk_size(&self) -> usize {
        self.table.header().chunk_size
    }

    /// Where a chunk lies in the image.
    fn bytes_of(&self, chunk: usize) -> Range<u64> {
        let size = self.chunk_size() as u64;
        let start = chunk as u64 * size;
        start..(start + size).min(self.len())
    }

    fn source(&self) -> io::Result<&dyn PageSource> {
        if let Some(source) = self.source.get() {
            return Ok(&**source);
        }
        if !self.owner.is_current() {
            // Its threads may make several, of which the first counts.
            let source = self.childs_source.get()?;
            return match source.get() {
                Some(source) => Ok(&**source),
                None => self.make().map(|made| &**source.get_or_init(|| made)),
            };
        }
        let _making = lock(&self.making);
        match self.source.get() {
            Some(source) => Ok(&**source),
            None => self.make().map(|made| &**self.source.get_or_init(|| made)),
        }
    }

    fn make(&self) -> io::Result<Box<dyn PageSource>> {
        let source = (self.options.make)()?;
        match source.len() {
            Some(found) if found != self.len() => {
                Err(CacheError::OtherLength { name: self.name.clone(), cached: self.len(), found }.into())
            }
            _ => Ok(source),
        }
    }

    pub(super) fn read(&self, offset: u64, page: &mut [u8], early: bool) -> io::Result<PageData> {
        let rest = self.len().saturating_sub(offset);
        let inside = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len()));
        if inside == 0 {
            return Ok(PageData::Zero);
        }
        if !self.owner.is_current() {
            // The locks of a fork's child are its parent's.
            return self.read_source(offset, page, early);
        }
        add(&self.counters.reads, 1);
        let (mut done, mut data) = (0, PageData::Zero);
        while done < inside {
            let (read, here) = self.read_part(offset + done as u64, &mut page[done..inside], early)?;
            if here == PageData::Data {
                data = here;
            } else {
                page[done..done + read].fill(0);
            }
            done += read;
        }
        page[inside..].fill(0);
        Ok(data)
    }

    fn read_source(&self, offset: u64, bytes: &mut [u8], early: bool) -> io::Result<PageData> {
        let source = self.source()?;
        if early { source.read_early(offset, bytes) } else { source.read(offset, bytes) }
    }

    /// Reads bytes of the chunk in which an offset is, and more where more is fetched. Returns how many.
    fn read_part(&self, offset: u64, bytes: &mut [u8], early: bool) -> io::Result<(usize, PageData)> {
        let size = self.chunk_size() as u64;
        let chunk = (offset / size) as usize;
        let within = (self.bytes_of(chunk).end - offset).min(bytes.len() as u64) as usize;
        match self.claim(chunk) {
            Claim::Zero => Ok((within, PageData::Zero)),
            Claim::Held(_held) => match self.file.read_exact_at(&mut bytes[..within], offset) {
                Ok(()) => Ok((within, PageData::Data)),
                Err(error) => {
                    self.note_problem(error);
                    Ok((within, self.read_source(offset, &mut bytes[..within], early)?))
                }
            },
            Claim::Bypass => {
                add(&self.counters.not_stored, 1);
                Ok((within, self.read_source(offset, &mut bytes[..within], early)?))
            }
            Claim::Fetch(mut fetch) => {
                let last = ((offset + bytes.len() as u64 - 1) / size) as usize;
                fetch.extend(last);
                let (first, end) = (self.bytes_of(chunk).start, self.bytes_of(fetch.chunks.end - 1).end);
                let read = bytes.len().min((end - offset) as usize);
                let found = fetch.run(early, |fetched| {
                    let from = (offset - first) as usize;
                    bytes[..read].copy_from_slice(&fetched[from..from + read]);
                })?;
                Ok((read, found))
            }
        }
    }

    /// Waits until a chunk is there, or this thread may fetch it.
    fn claim(&self, chunk: usize) -> Claim<'_> {
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
    fn lease(&self, chunk: usize, readers: u32) {
        let mut shown = lock(&self.shown);
        let mapped = if self.show(&mut shown, chunk) { MAPPED } else { 0 };
        // Release: pairs with the acquire of a thread that reads by the lease.
        self.chunks[chunk].store(LEASED | mapped | readers, Ordering::Release);
        drop(shown);
        sys::futex_wake_shared(&self.chunks[chunk]);
    }

    /// Ends the lock of a chunk that is busy here, and that it is.
    fn unlock(&self, chunk: usize) {
        self.table.lock(chunk, FileLock::Unlocked);
        self.chunks[chunk].store(0, Ordering::Release);
        sys::futex_wake_shared(&self.chunks[chunk]);
        sys::futex_wake_shared(self.table.state_word(chunk));
    }

    /// Gives up the lease of a chunk, so that it can be given back. `false`: a thread uses it.
    pub(super) fn give_back(&self, chunk: usize) -> bool {
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

    pub(super) fn zeros(&self, offset: u64) -> u64 {
        if offset >= self.len() {
            return u64::MAX;
        }
        let mut end = offset;
        while end < self.len() {
            let chunk = (end / self.chunk_size() as u64) as usize;
            if self.table.state(chunk) != State::Zero {
                return end - offset;
            }
            end = self.bytes_of(chunk).end;
        }
        u64::MAX
    }

    pub(super) fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.len() && len > 0)?;
        let size = self.chunk_size() as u64;
        let chunks = (offset / size) as usize..=((end - 1) / size) as usize;
        if !self.owner.is_current() {
            return None;
        }
        let epoch = self.directory.epoch();
        for chunk in chunks {
            // Acquire: as above.
            if self.chunks[chunk].load(Ordering::Acquire) & (BUSY | MAPPED) != MAPPED {
                return None;
            }
            self.table.touch(chunk, epoch);
        }
        // Within the mapping, whose length is a usize.
        let start = NonNull::new(self.map.as_ref()?.as_mut_ptr().wrapping_add(offset as usize))?;
        Some(SourceBytes { start, len, source: PhantomData })
    }

    fn note_problem(&self, error: io::Error) {
        add(&self.counters.not_stored, 1);
        *lock(&self.problem) = Some(error);
    }
}

enum Settled {
    Fetch,
    Leased,
    Zero,
    TooLong,
}

impl Fetch<'_> {
    /// Adds the chunks that follow, up to the `last`, as far as none of them is there or on its way.
    fn extend(&mut self, last: usize) {
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
    fn run(mut self, early: bool, deliver: impl FnOnce(&[u8])) -> io::Result<PageData> {
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
