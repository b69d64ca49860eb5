//! An open image: what it reads, and when its bytes may be used.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicIsize, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use memmap2::MmapRaw;

use self::claim::{BUSY, Claim, MAPPED};
use super::directory::Directory;
use super::shown::{self, Shown};
use super::table::{Paths, State, Table};
use super::{CacheError, CacheStatistics};
use crate::owner::{Owner, PerProcess};
use crate::source::{PageData, PageSource, SourceBytes};
use crate::sync::AtomicU64;
use crate::sys;

mod claim;
mod fetch;

/// Makes the source of an image, when something must be read from it.
pub(super) type Make = Box<dyn Fn() -> io::Result<Box<dyn PageSource>> + Send + Sync>;

/// Says whether the bytes of a chunk, at an offset of the image, are right.
pub(super) type Verify = Box<dyn Fn(u64, &[u8]) -> io::Result<()> + Send + Sync>;

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
            // Acquire: pairs with the release by which a lease says that it is mapped.
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
