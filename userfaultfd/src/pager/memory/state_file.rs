//! The file in which the states of a process's pages lie, so that they outlive the pager's process.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 4 | [`VERSION`] |
//! | 12 | 1 | [`Mark`]: why nothing may go on with it; 0 if nothing keeps it from that |
//! | 16 | 8 | the page size of the system |
//! | 24 | 8 | the length of the description |
//! | 32 | 8 | the number of states |
//! | one page | one page | the journal: events that were read, and aren't applied yet |
//! | two pages | | the description, whose form is the owner's |
//! | the next page | | the states: the very bytes that the pager works with |
//!
//! Numbers are the machine's. The file lies in memory (tmpfs), and all of it is allocated: what a thread has stored is in the
//! file, without a flush, at whatever instruction its process is killed.
//!
//! **No event is lost.** A worker reads events into the journal, applies them with all shards locked, and clears them there
//! before it unlocks the shards. The kernel ends the copy of a read(2) that it has begun, also in a thread that is killed. So an
//! event is queued in the kernel, or in the journal, or applied. What is in the journal may be applied already; applying a
//! removal twice is as good as once, since nothing is filled between.
//!
//! **What isn't in the file** can't be gone on with: segments that were moved, for example. The pager marks the file before
//! it does such a thing.

#![expect(unsafe_code, reason = "a journal in a mapping")]
#![cfg_attr(not(feature = "handoff"), allow(dead_code, reason = "only what is handed over has such a file"))]

use std::fmt;
use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};

use super::address_map::AddressMap;
use crate::event::{self, Kept, Message};
use crate::lock_order::{RankedMutex, lock, rank};
use crate::sys::FileLock;
use crate::{Errno, sys};

const MAGIC: [u8; 8] = *b"UFFDSTAT";

/// The version of the form, which changes with the states of pages, too.
const VERSION: u32 = 1;

/// The end of a file's name.
const EXTENSION: &str = "uffd";

/// Offsets of the version, the mark and the three lengths.
const VERSION_AT: usize = 8;
const MARK_AT: usize = 12;
const LENGTHS_AT: usize = 16;

/// Bytes of the header.
const HEADER_BYTES: usize = 40;

/// Bytes of the longest description that is read. A region takes some 100.
const MAX_DESCRIPTION_BYTES: usize = 64 << 20;

/// Why memory can't be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// Its process has forked.
    Forked = 1,
    /// A part was moved.
    Moved = 2,
    /// A part was unmapped.
    Unmapped = 3,
    /// A region was added, or given back.
    Regions = 4,
    /// A tracker has protected it.
    Tracked = 5,
    /// Its pages are put into a file: a page whose load was cut off may be mapped, and written to.
    File = 6,
    /// A mark of another version.
    Unknown = 255,
}

impl Mark {
    const ALL: [Self; 6] =
        [Self::Forked, Self::Moved, Self::Unmapped, Self::Regions, Self::Tracked, Self::File];

    fn of(number: u8) -> Option<Self> {
        let known = || Self::ALL.into_iter().find(|mark| *mark as u8 == number);
        (number != 0).then(|| known().unwrap_or(Self::Unknown))
    }
}

/// Why a file isn't opened.
#[derive(Debug)]
pub(crate) enum OpenError {
    Io(io::Error),
    /// A process has it.
    InUse,
    /// It is none, or one of another version.
    Form(&'static str),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A file of states, which is locked while this is there.
pub(crate) struct StateFile {
    /// All of the file.
    map: Arc<MmapRaw>,
    /// Has the lock. It belongs to the open file description, so it ends after the last thread of a killed process.
    file: File,
    states_at: usize,
    states: usize,
    journal: RankedMutex<Journal, { rank::QUEUE }>,
    /// The directory, and the id of the process.
    place: (PathBuf, u32),
    path: OnceLock<PathBuf>,
    removed: AtomicBool,
    /// Becomes readable when the process ends whose memory it is. Then the file is of no use.
    process: OwnedFd,
}

/// The first byte of the journal, which is a page of the file's mapping.
struct Journal(NonNull<Message>);

// SAFETY: it is an address in a mapping that its owner, the `StateFile`, keeps; no thread has a part in that.
unsafe impl Send for Journal {}

impl Journal {
    fn messages(&mut self) -> &mut [Message] {
        let count = crate::page_size() / size_of::<Message>();
        // SAFETY: the page is mapped as long as the `StateFile` is there, which owns `self` and is borrowed with it. Nothing else
        // leads to these bytes, of which each is good as it is.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), count) }
    }
}

impl StateFile {
    /// Makes one without a name, for a number of pages that are all missing.
    ///
    /// # Errors
    ///
    /// `InvalidInput`: the directory isn't in memory. `EOPNOTSUPP`: its file system has no files without a name.
    pub(crate) fn create(
        (dir, pid): (&Path, u32),
        description: &[u8],
        states: usize,
        process: OwnedFd,
    ) -> io::Result<Self> {
        let mut options = File::options();
        let options = options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        let file = options.open(dir)?;
        if !sys::is_in_memory(file.as_fd())? {
            let reason = format!("{} isn't on a file system in memory, such as tmpfs", dir.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let len = states_at(description.len()) + states;
        file.set_len(len as u64)?;
        // Memory that the file system can't give later would be a SIGBUS.
        sys::allocate(file.as_fd(), 0, len)?;
        let mut header = [0; HEADER_BYTES];
        header[..MAGIC.len()].copy_from_slice(&MAGIC);
        header[VERSION_AT..MARK_AT].copy_from_slice(&VERSION.to_ne_bytes());
        let lengths = [crate::page_size(), description.len(), states];
        for (place, length) in header[LENGTHS_AT..].chunks_exact_mut(size_of::<u64>()).zip(lengths) {
            place.copy_from_slice(&(length as u64).to_ne_bytes());
        }
        file.write_all_at(&header, 0)?;
        file.write_all_at(description, description_at() as u64)?;
        // Nothing else can have it open.
        sys::lock_byte(file.as_fd(), 0, FileLock::Exclusive)?;
        // Its name is removed later, wherever the process works then.
        let dir = std::path::absolute(dir)?;
        Self::map(file, description.len(), states, (dir, pid), process)
    }

    fn map(
        file: File,
        description_len: usize,
        states: usize,
        place: (PathBuf, u32),
        process: OwnedFd,
    ) -> io::Result<Self> {
        // As long as it was seen to be with the lock.
        let map = MmapOptions::new().len(states_at(description_len) + states).map_raw(&file)?;
        let states_at = states_at(description_len);
        let start = NonNull::new(map.as_mut_ptr().wrapping_add(crate::page_size()));
        let start = start.expect("a mapping doesn't end at null");
        // The kernel copies events there while the process may be killed, and then brings no page in. One that can't be locked
        // is there all the same, unless the system swaps it out in the moment before.
        let _as_far_as_possible = sys::lock_on_fault(start, crate::page_size());
        let mut journal = Journal(start.cast());
        // Writes to the page, so that it is there.
        journal.messages().iter_mut().for_each(|message| *message = *black_box(&*message));
        Ok(Self {
            map: Arc::new(map),
            file,
            states_at,
            states,
            journal: RankedMutex::new(journal),
            place,
            path: OnceLock::new(),
            removed: AtomicBool::new(false),
            process,
        })
    }

    /// The number of states.
    pub(crate) fn len(&self) -> usize {
        self.states
    }

    /// All of its mapping.
    pub(crate) fn room(&self) -> Arc<MmapRaw> {
        Arc::clone(&self.map)
    }

    /// Where the states begin in it.
    pub(crate) fn first(&self) -> usize {
        self.states_at
    }

    /// Gives it a name in its directory, where [`names`] finds it. Returns whether it had none.
    pub(crate) fn publish(&self) -> io::Result<bool> {
        let (dir, pid) = &self.place;
        let mut numbers = 0_u32..;
        while let Some(number) = numbers.next().filter(|_| self.path.get().is_none()) {
            let path = dir.join(format!("{pid}-{number}.{EXTENSION}"));
            match sys::link(self.file.as_fd(), &path) {
                // Another descriptor's of that process, or of one that had its id.
                Err(Errno::EEXIST) => {}
                linked => {
                    linked?;
                    let _once = self.path.set(path);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Removes its name: nothing goes on with it.
    pub(crate) fn remove(&self) {
        // Relaxed: it decides which of two calls removes it.
        let is_first = !self.removed.swap(true, Ordering::Relaxed);
        if let Some(path) = self.path.get().filter(|_| is_first) {
            // A name that can't be removed is found to be of no use: the mark is in the file.
            self.mark(Mark::Regions);
            let _removed = fs::remove_file(path);
        }
    }

    fn mark_cell(&self) -> &AtomicU8 {
        let cell = self.map.as_mut_ptr().wrapping_add(MARK_AT);
        // SAFETY: the header is mapped as long as `map` is borrowed, and nothing but such atomics leads to this byte. Any byte is
        // good for an atomic one.
        unsafe { AtomicU8::from_ptr(cell) }
    }

    /// Notes that nothing can go on with it. The first reason stays.
    pub(crate) fn mark(&self, mark: Mark) {
        // In order with what the caller does next, as seen by the process that finds the file.
        let _first = self.mark_cell().compare_exchange(0, mark as u8, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Why nothing can go on with it.
    pub(crate) fn marked(&self) -> Option<Mark> {
        let mut journal = lock(&self.journal);
        let of_unapplied = |message: &Message| match event::kept(message) {
            Kept::Nothing | Kept::Removed(_) => None,
            Kept::Forked => Some(Mark::Forked),
            Kept::Moved => Some(Mark::Moved),
            Kept::Unmapped => Some(Mark::Unmapped),
            Kept::Unknown => Some(Mark::Unknown),
        };
        let mark = Mark::of(self.mark_cell().load(Ordering::SeqCst));
        mark.or_else(|| journal.messages().iter().find_map(of_unapplied))
    }

    /// Has events read into the journal, and copies them to where they are applied from. Returns what `read` returns: how many
    /// there are. With all shards of the descriptor locked.
    pub(crate) fn read(
        &self,
        events: &mut [Message],
        read: impl FnOnce(&mut [Message]) -> crate::Result<usize>,
    ) -> crate::Result<usize> {
        let mut journal = lock(&self.journal);
        let messages = journal.messages();
        let room = messages.len().min(events.len());
        let count = read(&mut messages[..room])?;
        events[..count].copy_from_slice(&messages[..count]);
        Ok(count)
    }

    /// Notes that events that were read are applied.
    pub(crate) fn clear(&self, count: usize) {
        // What applying them has stored isn't stored later than this, as seen by the process that finds the file: the kernel
        // ends a process between two instructions of each thread.
        fence(Ordering::SeqCst);
        lock(&self.journal).messages()[..count].fill(event::EMPTY);
    }

    /// Applies what another process has read and perhaps not applied.
    pub(crate) fn settle(&self, layout: &AddressMap) {
        let mut journal = lock(&self.journal);
        for message in journal.messages().iter() {
            if let Kept::Removed(range) = event::kept(message) {
                layout.remove_pages(&range);
            }
        }
        fence(Ordering::SeqCst);
        journal.messages().fill(event::EMPTY);
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        if sys::is_readable(self.process.as_fd()) {
            self.remove();
        }
    }
}

impl fmt::Debug for StateFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateFile")
            .field("path", &self.path.get())
            .field("states", &self.states)
            .finish_non_exhaustive()
    }
}

fn description_at() -> usize {
    2 * crate::page_size()
}

fn states_at(description: usize) -> usize {
    (description_at() + description).next_multiple_of(crate::page_size())
}

/// A file of states that a process has left, perhaps, or has open.
#[derive(Debug)]
pub(crate) struct FoundFile {
    path: PathBuf,
    file: File,
    /// What its maker says of the memory.
    pub(crate) description: Vec<u8>,
    states: usize,
}

impl FoundFile {
    /// Reads what stands before the states.
    pub(crate) fn read(path: &Path) -> Result<Self, OpenError> {
        let mut options = File::options();
        let options = options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(path)?;
        let metadata = file.metadata()?;
        // In a directory that others may write to, they could choose what this process reads.
        if !metadata.is_file() || metadata.uid() != fs::metadata("/proc/self")?.uid() {
            return Err(OpenError::Form("it isn't a file of this user"));
        }
        let mut header = [0; HEADER_BYTES];
        if metadata.len() < HEADER_BYTES as u64 {
            return Err(OpenError::Form("it is too short"));
        }
        file.read_exact_at(&mut header, 0)?;
        if header[..MAGIC.len()] != MAGIC || header[VERSION_AT..MARK_AT] != VERSION.to_ne_bytes() {
            return Err(OpenError::Form("it is of another version of this library, or something else"));
        }
        let length = |at: usize| {
            let bytes = header[LENGTHS_AT + at * size_of::<u64>()..].first_chunk().expect("there are three");
            usize::try_from(u64::from_ne_bytes(*bytes)).ok()
        };
        let lengths = (length(0), length(1).filter(|len| *len <= MAX_DESCRIPTION_BYTES), length(2));
        let (Some(page_size), Some(len), Some(states)) = lengths else {
            return Err(OpenError::Form("its lengths are beyond any file"));
        };
        let expected = states_at(len).checked_add(states).map(|len| len as u64);
        if page_size != crate::page_size() || expected != Some(metadata.len()) {
            return Err(OpenError::Form("it hasn't the length that it says"));
        }
        let mut description = vec![0; len];
        file.read_exact_at(&mut description, description_at() as u64)?;
        Ok(Self { path: path.to_owned(), file, description, states })
    }

    /// Locks it.
    fn lock(&self) -> Result<(), OpenError> {
        if !sys::lock_byte(self.file.as_fd(), 0, FileLock::Exclusive).map_err(io::Error::from)? {
            return Err(OpenError::InUse);
        }
        // The process that had it may have removed it.
        if self.file.metadata()?.nlink() == 0 {
            Err(io::Error::from(io::ErrorKind::NotFound).into())
        } else {
            Ok(())
        }
    }

    /// Goes on with it. `process` is a pidfd of the process that the description is of.
    pub(crate) fn open(self, process: OwnedFd) -> Result<StateFile, OpenError> {
        self.lock()?;
        let Self { path, file, description, states } = self;
        // It may have become shorter since it was read. From now on this process alone has it.
        let len = states_at(description.len()) + states;
        if file.metadata()?.len() != len as u64 {
            return Err(OpenError::Form("it hasn't the length that it says"));
        }
        // As its maker did: a copy of it may lie elsewhere, or have holes.
        if !sys::is_in_memory(file.as_fd()).map_err(io::Error::from)? {
            return Err(OpenError::Form("it isn't on a file system in memory, such as tmpfs"));
        }
        sys::allocate(file.as_fd(), 0, len).map_err(io::Error::from)?;
        let state = StateFile::map(file, description.len(), states, (PathBuf::new(), 0), process)?;
        let _once = state.path.set(path);
        Ok(state)
    }

    /// Removes it, unless a process has it open.
    pub(crate) fn remove(self) -> Result<(), OpenError> {
        self.lock()?;
        Ok(fs::remove_file(&self.path)?)
    }
}

/// The files in a directory, with the ids of their processes.
pub(crate) fn names(dir: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let stem = path.file_stem().filter(|_| path.extension().is_some_and(|of| of == EXTENSION));
        let pid = stem.and_then(|stem| stem.to_str()?.split_once('-')?.0.parse().ok());
        found.extend(pid.map(|pid| (pid, path)));
    }
    found.sort();
    Ok(found)
}
