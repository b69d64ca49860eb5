//! The file that says which chunks of an image are there: its format, its mapping, and the locks on its bytes.

#![expect(unsafe_code, reason = "atomics that processes share")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::directory::Access;
use super::error::CacheError;
use crate::PendingFile;
use crate::sys::{self, FileLock};

/// What a table begins with.
const MAGIC: [u8; 8] = *b"uffdtabl";
pub(super) const VERSION: u32 = 1;

/// Bytes before the first entry.
const HEADER_BYTES: usize = 4096;

/// Where in the header lie the flags, which change, and the checksum of all that is before them.
const FLAGS_OFFSET: usize = HEADER_BYTES - 8;
const CHECKSUM_OFFSET: usize = HEADER_BYTES - 4;
const PINNED: u32 = 1;

/// Bytes of the header before the identity.
const FIXED_BYTES: usize = 32;
pub(super) const MAX_IDENTITY_BYTES: usize = FLAGS_OFFSET - FIXED_BYTES;

/// Bytes of a chunk's entry, and where its fields lie in them.
const ENTRY_BYTES: usize = 16;
const STATE: usize = 0;
const CHECKSUM: usize = 4;
const USED: usize = 8;

/// The byte of the file that all processes have locked that have the image open. Above those of chunks.
const IN_USE_BYTE: u32 = i32::MAX as u32;
/// Chunks of an image at most: their locks are bytes of the file below that one.
pub(super) const MAX_CHUNKS: u64 = 1 << 26;

/// The kernel maps and drops no less than a page.
pub(super) const MIN_CHUNK_BYTES: usize = 4096;
/// A fetch has a buffer of that length, and a reader waits for all of it.
pub(super) const MAX_CHUNK_BYTES: usize = 64 << 20;

/// What a chunk is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing of it is in the file.
    Empty,
    /// It is zeros, and a hole in the file.
    Zero,
    /// It is in the file. The entry has its checksum.
    Data,
    /// Something of it may be in the file: it is being written or given back, or the process that did so died.
    Unsettled,
}

/// What doesn't change in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) chunk_size: usize,
    pub(super) len: u64,
    pub(super) identity: String,
    /// By chance. The words of the states are of it, so that bytes of another origin hardly are one.
    nonce: u32,
}

impl Header {
    pub(super) fn new(chunk_size: usize, len: u64, identity: String) -> io::Result<Self> {
        Ok(Self { chunk_size, len, identity, nonce: u32::from_ne_bytes(sys::random_bytes()?) })
    }

    pub(super) fn chunks(&self) -> u64 {
        self.len.div_ceil(self.chunk_size as u64)
    }

    fn file_len(&self) -> u64 {
        HEADER_BYTES as u64 + self.chunks() * ENTRY_BYTES as u64
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let identity = self.identity.as_bytes();
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[12..16].copy_from_slice(&(self.chunk_size as u32).to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.nonce.to_ne_bytes());
        bytes[28..32].copy_from_slice(&(identity.len() as u32).to_ne_bytes());
        bytes[FIXED_BYTES..FIXED_BYTES + identity.len()].copy_from_slice(identity);
        let checksum = crc32fast::hash(&bytes[..FLAGS_OFFSET]);
        bytes[CHECKSUM_OFFSET..].copy_from_slice(&checksum.to_ne_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES], path: &Path) -> Result<Self, CacheError> {
        let damaged = |what| CacheError::Damaged { path: path.to_owned(), what };
        let u32_at = |at: usize| u32::from_ne_bytes(*bytes[at..].first_chunk().expect("within the header"));
        if bytes[..8] != MAGIC {
            return Err(CacheError::Foreign { path: path.to_owned() });
        }
        let found = u32_at(8);
        if found != VERSION {
            return Err(CacheError::OtherVersion { path: path.to_owned(), found, known: VERSION });
        }
        if u32_at(CHECKSUM_OFFSET) != crc32fast::hash(&bytes[..FLAGS_OFFSET]) {
            return Err(damaged("the checksum of its header is wrong"));
        }
        let chunk_size = u32_at(12) as usize;
        let is_usual = chunk_size.is_power_of_two()
            && (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_size)
            && chunk_size % crate::page_size() == 0;
        if !is_usual {
            return Err(damaged("its chunks have an impossible length"));
        }
        let identity = bytes[FIXED_BYTES..FLAGS_OFFSET].get(..u32_at(28) as usize);
        let identity = identity.and_then(|bytes| std::str::from_utf8(bytes).ok());
        let Some(identity) = identity else { return Err(damaged("its identity isn't text")) };
        let len = u64::from_ne_bytes(*bytes[16..].first_chunk().expect("within the header"));
        let header = Self { chunk_size, len, identity: identity.to_owned(), nonce: u32_at(24) };
        if header.chunks() > MAX_CHUNKS {
            return Err(damaged("its image has more chunks than are possible"));
        }
        Ok(header)
    }
}

/// An open table.
#[derive(Debug)]
pub(super) struct Table {
    file: File,
    map: MmapRaw,
    header: Header,
}

impl Table {
    /// Makes the table of a new image.
    pub(super) fn create(path: &Path, header: &Header, access: Access) -> Result<(), CacheError> {
        let create = || {
            let mut file = PendingFile::create(path)?;
            access.give(file.file())?;
            file.write_all(&header.encode())?;
            file.file().set_len(header.file_len())?;
            // A mapping of a hole would raise SIGBUS on a full disk.
            sys::allocate(file.file().as_fd(), 0, usize::try_from(header.file_len()).unwrap_or(usize::MAX))?;
            file.commit()
        };
        create().map_err(|error| CacheError::Io { what: "can't create", path: path.to_owned(), error })
    }

    /// Opens a table. `None`: there is none.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, CacheError> {
        let failed = |error| CacheError::Io { what: "can't open", path: path.to_owned(), error };
        let file = match File::options().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.len() < HEADER_BYTES as u64 {
            return Err(CacheError::Foreign { path: path.to_owned() });
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let header = Header::decode(&bytes, path)?;
        if metadata.len() != header.file_len() {
            return Err(CacheError::Damaged { path: path.to_owned(), what: "its length is wrong" });
        }
        // Within a usize: MAX_CHUNKS.
        let map = MmapOptions::new().len(header.file_len() as usize).map_raw(&file).map_err(failed)?;
        Ok(Some(Self { file, map, header }))
    }

    /// The file of the table.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// The number of chunks, which are as many as the entries.
    pub(super) fn chunks(&self) -> usize {
        self.header.chunks() as usize
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at % 4 == 0 && at + 4 <= self.map.len(), "{at} of {}", self.map.len());
        let word = self.map.as_mut_ptr().wrapping_add(at).cast();
        // SAFETY: a whole aligned word of the mapping, which is writable and lives as long as `self`. All processes that
        // have it mapped access it by atomics alone.
        unsafe { AtomicU32::from_ptr(word) }
    }

    fn entry(&self, chunk: usize, part: usize) -> &AtomicU32 {
        self.word(HEADER_BYTES + chunk * ENTRY_BYTES + part)
    }

    /// The word that says in which state a chunk is, for waits.
    pub(super) fn state_word(&self, chunk: usize) -> &AtomicU32 {
        self.entry(chunk, STATE)
    }

    /// The word of a state: of the table and of the chunk, so that what wasn't written by a user of the cache is none.
    fn tag(&self, chunk: usize, kind: u32) -> u32 {
        let mixed = (self.header.nonce ^ (chunk as u32).wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
        // Never the word of an empty chunk, and another one for each kind.
        mixed & !3 | 4 | kind
    }

    /// The state of a chunk. Acquire: a thread that sees that it is there sees its checksum, and its bytes, which the kernel has.
    pub(super) fn state(&self, chunk: usize) -> State {
        let word = self.state_word(chunk).load(Ordering::Acquire);
        match [State::Zero, State::Data].into_iter().find(|state| self.word_of(chunk, *state) == word) {
            Some(state) => state,
            None if word == 0 => State::Empty,
            None => State::Unsettled,
        }
    }

    fn word_of(&self, chunk: usize, state: State) -> u32 {
        match state {
            State::Empty => 0,
            State::Zero => self.tag(chunk, 1),
            State::Data => self.tag(chunk, 2),
            State::Unsettled => self.tag(chunk, 3),
        }
    }

    /// Sets the state of a chunk, on whose byte the caller has an exclusive lock.
    pub(super) fn set_state(&self, chunk: usize, state: State) {
        self.state_word(chunk).store(self.word_of(chunk, state), Ordering::Release);
    }

    /// The checksum of a chunk that is there.
    pub(super) fn checksum(&self, chunk: usize) -> u32 {
        self.entry(chunk, CHECKSUM).load(Ordering::Relaxed)
    }

    /// Notes the checksum of a chunk, before its state says that it is there.
    pub(super) fn set_checksum(&self, chunk: usize, checksum: u32) {
        self.entry(chunk, CHECKSUM).store(checksum, Ordering::Relaxed);
    }

    /// Notes that a chunk is used. Uses of one epoch count once.
    pub(super) fn touch(&self, chunk: usize, epoch: u32) {
        let used = self.entry(chunk, USED);
        let before = Usage(used.load(Ordering::Relaxed));
        if before.epoch() != Usage::new(epoch, 0).epoch() {
            // Of two threads one wins: both say the same but for the count.
            used.store(Usage::new(epoch, before.count() + 1).0, Ordering::Relaxed);
        }
    }

    /// Notes that a chunk came in.
    pub(super) fn begin_use(&self, chunk: usize, epoch: u32) {
        self.entry(chunk, USED).store(Usage::new(epoch, 0).0, Ordering::Relaxed);
    }

    /// When and how often a chunk was used.
    pub(super) fn usage(&self, chunk: usize) -> Usage {
        Usage(self.entry(chunk, USED).load(Ordering::Relaxed))
    }

    /// Changes this open table's lock on a chunk. `false`: another one has a lock in the way. An error, as without memory
    /// for locks, is no lock, either.
    pub(super) fn lock(&self, chunk: usize, lock: FileLock) -> bool {
        sys::lock_byte(self.file.as_fd(), chunk as u32, lock).unwrap_or(false)
    }

    /// Changes the lock that says that the image is open.
    pub(super) fn lock_use(&self, lock: FileLock) -> bool {
        sys::lock_byte(self.file.as_fd(), IN_USE_BYTE, lock).unwrap_or(false)
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.word(FLAGS_OFFSET).load(Ordering::Relaxed) & PINNED != 0
    }

    pub(super) fn set_pinned(&self, pinned: bool) {
        self.word(FLAGS_OFFSET).store(if pinned { PINNED } else { 0 }, Ordering::Relaxed);
    }
}

/// When and how often a chunk was used: 28 bits of the epoch, and 4 of the count of epochs after the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage(u32);

impl Usage {
    const COUNT_BITS: u32 = 4;
    const MAX_COUNT: u32 = 3;

    /// Epochs by which a chunk counts as younger for each epoch in which it was used again.
    const EPOCHS_FOR_USE: u32 = 4;

    fn new(epoch: u32, count: u32) -> Self {
        Self(epoch << Self::COUNT_BITS | count.min(Self::MAX_COUNT))
    }

    fn epoch(self) -> u32 {
        self.0 >> Self::COUNT_BITS
    }

    fn count(self) -> u32 {
        self.0 & ((1 << Self::COUNT_BITS) - 1)
    }

    /// Epochs since the last use.
    pub(super) fn age(self, now: u32) -> u32 {
        (now.wrapping_sub(self.epoch())) << Self::COUNT_BITS >> Self::COUNT_BITS
    }

    /// What a chunk is worth: more is better. A chunk that was used in one epoch alone goes before those that were used
    /// in several, up to a dozen epochs.
    pub(super) fn value(self, now: u32) -> i64 {
        i64::from(self.count().min(Self::MAX_COUNT) * Self::EPOCHS_FOR_USE) - i64::from(self.age(now))
    }
}

/// The names of the two files of an image.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    pub(super) table: PathBuf,
    pub(super) chunks: PathBuf,
}

/// The ends of the names of the files.
const TABLE_SUFFIX: &str = ".table";
const CHUNKS_SUFFIX: &str = ".chunks";

/// Bytes of the name of a file without its end: file systems take 255.
const MAX_STEM_BYTES: usize = 200;

impl Paths {
    /// The files of an image. `None`: the name is empty, or too long. All but letters, digits, and `-_.` is written as
    /// `%` and two digits, and so is a dot at the beginning.
    pub(super) fn of(directory: &Path, name: &str) -> Option<Self> {
        let mut stem = String::new();
        for (at, byte) in name.bytes().enumerate() {
            let is_plain = byte.is_ascii_alphanumeric() || b"-_".contains(&byte) || byte == b'.' && at > 0;
            if is_plain {
                stem.push(byte.into());
            } else {
                stem.push_str(&format!("%{byte:02x}"));
            }
        }
        if stem.is_empty() || stem.len() > MAX_STEM_BYTES {
            return None;
        }
        Some(Self {
            table: directory.join(format!("{stem}{TABLE_SUFFIX}")),
            chunks: directory.join(format!("{stem}{CHUNKS_SUFFIX}")),
        })
    }

    /// The files of the image whose table this is. `None`: it isn't named like one.
    pub(super) fn of_table(table: &Path) -> Option<Self> {
        let name = table.file_name()?.to_str()?;
        let stem =
            name.strip_suffix(TABLE_SUFFIX).filter(|stem| !stem.is_empty() && !stem.starts_with('.'))?;
        let chunks = table.with_file_name(format!("{stem}{CHUNKS_SUFFIX}"));
        Some(Self { table: table.to_owned(), chunks })
    }
}
