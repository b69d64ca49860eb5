//! [`ChunkCache`]: content of slow sources, kept in a directory for all processes of the host.
//!
//! # The files
//!
//! `userfaultfd-cache` is the directory's: what is used of the limit, the epoch, a number by which processes ask each other to
//! give chunks up. An image has two files: `NAME.chunks`, sparse, in which each chunk lies at its offset; and `NAME.table`,
//! with a header of 4096 bytes (magic number, version, length of a chunk, length of the image, a random number, identity,
//! checksum of all this; whether the image is pinned) and 16 bytes for each chunk: its state, its checksum, when it was
//! used. All are native-endian: they belong to one machine. A state is one of four words that depend on the random number and
//! on the chunk, so that other bytes are taken for "unsettled", which counts, but shows nothing.
//!
//! # Why nothing is wrong after a crash
//!
//! A chunk is *empty*, then *unsettled* while its bytes are written, then *data*, or it is *zero*. Its checksum is written
//! before its state says that it is there, and each process compares the two before it uses a chunk for the first time. So
//! it doesn't matter in which order a machine that lost its power had written its pages, nor what a foreign program did to
//! the file: what doesn't match is fetched again. (CRC-32 finds accidents, no attackers: a user that may write to the
//! directory decides what memory holds. [`CachedImageBuilder::verify`] compares what comes from the source with what the
//! program knows of it.) A process that dies leaves chunks unsettled, which the next one fetches again or gives back.
//!
//! # Locks
//!
//! Open file description locks (`F_OFD_SETLK`, Linux 3.15), a byte of the table for each chunk: exclusive for the one
//! process that fetches it or gives it back, shared for all that use it. The kernel releases them when a process dies, in
//! whatever way, which no lock in shared memory does by itself; robust futexes would, by the C library's threads alone. flock(2)
//! has one lock for a file, and POSIX's locks end when any descriptor of the file is closed. Nothing waits in the kernel for
//! such a lock: a thread that finds one in the way waits by a futex on the state's word for its change, and looks again every 10
//! milliseconds whether the other process is still there. After the [wait limit](CachedImageBuilder::wait_limit) it
//! reads from the source by itself, so that a process which is stopped keeps no other from its content.
//!
//! Threads of one process share its locks. Between them a word for each chunk decides (`image/claim.rs`): busy, or leased with a
//! number of readers.
//!
//! The directory's lock (a byte of its file) guards what is used of the limit, and the making and removal of images. It is
//! held for some microseconds for each chunk that comes in, and for a look at all tables when chunks must go; never while a
//! source is read. A process takes it last: while it has it, it takes locks of chunks only where they are free.
//!
//! # Why a chunk that is given back is never read as zeros
//!
//! The file gets a hole there, and a hole reads as zeros. Chunks that a process uses have its shared lock, without which
//! nothing is used and against which nobody makes the hole. The process itself ends its lease first: the part of
//! the mapping becomes unreadable (`PROT_NONE`), so that the kernel, if it copies from there later by an address
//! that [`PageSource::bytes`](super::PageSource::bytes) returned, answers `EFAULT`, whereupon the pager reads the page; only
//! then the lock goes. Reads of the file count as readers, and keep the lease.

mod directory;
mod error;
mod image;
mod shown;
mod table;
#[cfg(all(test, feature = "pager"))]
mod tests;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use self::directory::{Access, Directory};
pub use self::error::CacheError;
use self::image::{Image, Make, Options, Verify};
use self::table::{Header, Paths, Table};
use super::{PageData, PageSource, SourceBytes, invalid};
use crate::sys::FileLock;

/// Bytes of a chunk, unless the program says otherwise.
const CHUNK_BYTES: usize = 256 << 10;

/// How long a read waits for another process to fetch its chunk.
const WAIT_LIMIT: Duration = Duration::from_secs(30);

/// A directory in which content of slow sources is kept, with a limit, for all processes of the host.
///
/// What a process has read from a source once, a second process, or a second start, has from the page cache or the disk:
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{BytesSource, ChunkCache};
///
/// # let directory = std::env::temp_dir().join(format!("userfaultfd-doc-cache-{}", std::process::id()));
/// # std::fs::create_dir(&directory)?;
/// let cache = ChunkCache::open(&directory, 10 << 30)?;
/// let slow = BytesSource::new(vec![7; 1 << 20]);
/// let image = cache.image("vm.memory").identity("build 17").open(slow)?;
/// let memory = LazyMemory::builder(image).build()?;
/// assert_eq!(memory[1000], 7);
/// # drop(memory);
/// # std::fs::remove_dir_all(&directory)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// - **Images**: a name, a length, an [identity](CachedImageBuilder::identity), and chunks of 256 KiB, which come in as a whole
///   and one at a time for all processes: threads and processes that need a chunk which is on its way wait for it, and go
///   on as soon as it is there. A read of several chunks, as of a prefetch, fetches them by one read of the source.
/// - **No copy**: the kernel copies pages straight from the mapping of the file ([`PageSource::bytes`]). Chunks of zeros take
///   nothing. A region made by [`Region::minor`](crate::pager::Region::minor) copies pages to its own file, as from any source.
/// - **The limit** counts chunks that are there, of all images. When it is reached the least valuable ones go: those
///   whose last use is the longest ago, chunks that were used once before those that were used again and again. Chunks of [pinned](CachedImage::set_pinned)
///   images stay, and so do those that another process has in use; where none can go, or the disk is full, reads
///   deliver what they have fetched and keep nothing ([`CachedImage::statistics`]). All processes should give the same limit.
/// - **Crashes** of a process at any moment, or of the machine, leave nothing wrong: each process compares a chunk with its
///   checksum before it uses it for the first time, and fetches it again if they differ.
/// - **Forks**: in a child that doesn't execute another program, images read from their sources, and opening or removing one
///   is an error. A child that opens the directory itself uses the cache like any other process.
/// - **Files**: on a local file system that can punch holes (ext4, XFS, Btrfs, tmpfs), since a network file system's
///   locks and mappings aren't of one host. A program that may write to the directory decides what memory holds: a directory to which
///   every user may write is refused. The cache's files get the permissions of the directory to read and to write, but for
///   those of all users; also files of former versions do, when they are opened. Other files in it are left alone.
///
/// Reads of what is there allocate nothing. A fetch allocates, and so does giving chunks back.
#[derive(Clone)]
pub struct ChunkCache(Arc<Directory>);

impl ChunkCache {
    /// Opens the cache in a directory, which must be there, with a limit in bytes.
    ///
    /// # Errors
    ///
    /// A [`CacheError`]: the directory isn't there, may not be written, or may be written by every user; a file in it has the name
    /// of one of the cache's and isn't one, or is of another version; the file system can't punch holes.
    pub fn open(directory: impl AsRef<Path>, limit: u64) -> io::Result<Self> {
        Ok(Self(Arc::new(Directory::open(directory.as_ref(), limit)?)))
    }

    /// Returns a builder that opens the image of a name: letters, digits, `-`, `_`, `.`, and others, which the names of its files
    /// have in an escaped form, up to 200 bytes.
    pub fn image(&self, name: impl Into<String>) -> CachedImageBuilder {
        CachedImageBuilder {
            directory: Arc::clone(&self.0),
            name: name.into(),
            identity: String::new(),
            chunk_size: CHUNK_BYTES,
            verify: None,
            wait_limit: WAIT_LIMIT,
        }
    }

    /// Removes an image, also one that is pinned or damaged. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// [`CacheError::InUse`], [`CacheError::Foreign`], or an error of unlink(2).
    pub fn remove(&self, name: &str) -> io::Result<bool> {
        let paths = paths(&self.0, name)?;
        let _locked = self.0.lock()?;
        match Table::open(&paths.table) {
            Ok(None) => return Ok(false),
            Ok(Some(table)) if !table.lock_use(FileLock::Exclusive) => {
                return Err(CacheError::InUse { name: name.to_owned() }.into());
            }
            Ok(Some(_)) | Err(CacheError::Damaged { .. } | CacheError::OtherVersion { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        directory::remove(&paths)?;
        Ok(true)
    }

    /// Returns the number of bytes of the limit that are used.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.0.used()
    }

    /// Returns the limit, in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.limit()
    }
}

impl fmt::Debug for ChunkCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, used, limit) = (self.0.path(), self.used(), self.limit());
        f.debug_struct("ChunkCache").field("path", &path).field("used", &used).field("limit", &limit).finish()
    }
}

fn paths(directory: &Directory, name: &str) -> io::Result<Paths> {
    Paths::of(directory.path(), name)
        .ok_or_else(|| invalid(format!("{name:?} can't be the name of an image: it is empty or too long")))
}

/// Builder for a [`CachedImage`].
#[must_use = "the image is opened by `open`"]
pub struct CachedImageBuilder {
    directory: Arc<Directory>,
    name: String,
    identity: String,
    chunk_size: usize,
    verify: Option<Verify>,
    wait_limit: Duration,
}

impl CachedImageBuilder {
    /// Sets the identity of the content, such as an ETag or a digest: up to 4056 bytes, by default none. Where the cache has an image of the same
    /// name with another identity, opening fails, so that two contents are never mixed.
    pub fn identity(mut self, identity: impl Into<String>) -> Self {
        self.identity = identity.into();
        self
    }

    /// Sets the length of a chunk in bytes: a power of two from 4 KiB, and no less than a page, up to 64 MiB. The default is
    /// 256 KiB. An image that is in the cache keeps the chunk length that it has.
    pub fn chunk_size(mut self, bytes: usize) -> Self {
        self.chunk_size = bytes;
        self
    }

    /// Sets a function that checks each chunk of the source, with its offset, before any thread sees it. Its error is the
    /// error of the read; the chunk isn't kept.
    pub fn verify(mut self, verify: impl Fn(u64, &[u8]) -> io::Result<()> + Send + Sync + 'static) -> Self {
        self.verify = Some(Box::new(verify));
        self
    }

    /// Sets how long a read waits for another thread or process that fetches its chunk, before it reads from the source
    /// itself. The default is 30 seconds.
    pub fn wait_limit(mut self, limit: Duration) -> Self {
        self.wait_limit = limit;
        self
    }

    /// Opens the image in the cache, or creates it.
    ///
    /// # Errors
    ///
    /// A [`CacheError`]: the image is in the cache with another length or identity, or damaged; the directory can't be written.
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the source has no end, or the chunks have an impossible
    /// length.
    pub fn open(self, source: impl PageSource + 'static) -> io::Result<CachedImage> {
        let len = source
            .len()
            .ok_or_else(|| invalid("the source has no length, which a cached image needs".into()))?;
        let source: Arc<dyn PageSource> = Arc::new(source);
        self.open_as(Some(len), Box::new(move || Ok(Box::new(Arc::clone(&source)))))
    }

    /// Opens the image, or creates it, with a source that `make` opens only when something must be read from it: a start that
    /// finds everything in the cache sends no request.
    ///
    /// `make` is called again where it fails. Its source must have the image's length.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open), and those of `make`, which is called at once if the image isn't in the cache.
    pub fn open_with<S, F>(self, make: F) -> io::Result<CachedImage>
    where
        S: PageSource + 'static,
        F: Fn() -> io::Result<S> + Send + Sync + 'static,
    {
        self.open_as(None, Box::new(move || Ok(Box::new(make()?))))
    }

    fn open_as(self, len: Option<u64>, make: Make) -> io::Result<CachedImage> {
        let paths = paths(&self.directory, &self.name)?;
        let mut len = len;
        let (table, file) = loop {
            let locked = self.directory.lock()?;
            match (Table::open(&paths.table)?, len) {
                (Some(table), _) => {
                    self.check(&table, len)?;
                    let file = open_chunks(&paths, &table)?;
                    let failed = |path: &PathBuf| {
                        let path = path.clone();
                        move |error| CacheError::Io { what: "can't set the permissions of", path, error }
                    };
                    let access = self.directory.access();
                    access.give(table.file()).map_err(failed(&paths.table))?;
                    access.give(&file).map_err(failed(&paths.chunks))?;
                    table.lock_use(FileLock::Shared);
                    self.directory.tidy(&locked, &table, &file);
                    break (table, file);
                }
                (None, Some(len)) => {
                    let table = self.create(&paths, len)?;
                    table.0.lock_use(FileLock::Shared);
                    break table;
                }
                // The lock isn't held while the source is opened.
                (None, None) => {
                    drop(locked);
                    let made = make()?.len();
                    len = Some(made.ok_or_else(|| {
                        invalid("the source has no length, which a cached image needs".into())
                    })?);
                }
            }
        };
        let options = Options { make, verify: self.verify, wait_limit: self.wait_limit };
        Image::new(self.directory, self.name, paths, table, file, options).map(CachedImage)
    }

    /// Checks that the image in the cache is the one that was asked for.
    fn check(&self, table: &Table, len: Option<u64>) -> Result<(), CacheError> {
        let (header, name) = (table.header(), self.name.clone());
        if header.identity != self.identity {
            let (cached, found) = (header.identity.clone(), self.identity.clone());
            return Err(CacheError::OtherIdentity { name, cached, found });
        }
        match len {
            Some(found) if found != header.len => {
                Err(CacheError::OtherLength { name, cached: header.len, found })
            }
            _ => Ok(()),
        }
    }

    fn create(&self, paths: &Paths, len: u64) -> io::Result<(Table, File)> {
        let size = self.chunk_size;
        let sizes = table::MIN_CHUNK_BYTES.max(crate::page_size())..=table::MAX_CHUNK_BYTES;
        if !size.is_power_of_two() || !sizes.contains(&size) {
            let (least, most) = sizes.into_inner();
            return Err(invalid(format!(
                "chunks of {size} bytes: a power of two from {least} to {most} is possible"
            )));
        }
        if self.identity.len() > table::MAX_IDENTITY_BYTES {
            return Err(invalid(format!("an identity of {} bytes is too long", self.identity.len())));
        }
        let header = Header::new(size, len, self.identity.clone())?;
        if header.chunks() > table::MAX_CHUNKS {
            let text = format!("{len} bytes in chunks of {size} bytes are more than a table has room for");
            return Err(invalid(text));
        }
        // A table without chunks would be damaged, and chunks without a table are nothing.
        let file = open_chunks_as(paths, true)?;
        let failed = |error| CacheError::Io { what: "can't write", path: paths.chunks.clone(), error };
        let access = self.directory.access();
        let made = access.give(&file).and_then(|()| file.set_len(0)).and_then(|()| file.set_len(len));
        made.map_err(failed)?;
        Table::create(&paths.table, &header, access)?;
        let what = "it was removed while it was made";
        let table = Table::open(&paths.table)?
            .ok_or_else(|| CacheError::Damaged { path: paths.table.clone(), what })?;
        Ok((table, file))
    }
}

fn open_chunks_as(paths: &Paths, create: bool) -> Result<File, CacheError> {
    let mut options = File::options();
    options.read(true).write(true).create(create).truncate(false).custom_flags(libc::O_NOFOLLOW);
    options.mode(Access::at_first());
    let path = &paths.chunks;
    let file = options.open(path);
    file.map_err(|error| CacheError::Io { what: "can't open", path: path.clone(), error })
}

/// Opens the chunks of an image, which must be as long as the image.
fn open_chunks(paths: &Paths, table: &Table) -> Result<File, CacheError> {
    let file = open_chunks_as(paths, false)?;
    let is_right = file.metadata().is_ok_and(|file| file.is_file() && file.len() == table.header().len);
    let damaged = CacheError::Damaged { path: paths.chunks.clone(), what: "its length is wrong" };
    if is_right { Ok(file) } else { Err(damaged) }
}

impl fmt::Debug for CachedImageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { directory, name, identity, chunk_size, verify, wait_limit } = self;
        f.debug_struct("CachedImageBuilder")
            .field("directory", &directory.path())
            .field("name", name)
            .field("identity", identity)
            .field("chunk_size", chunk_size)
            .field("verify", &verify.is_some())
            .field("wait_limit", wait_limit)
            .finish()
    }
}

/// An image in a [`ChunkCache`], as a source.
pub struct CachedImage(Arc<Image>);

impl CachedImage {
    /// Keeps the image's chunks in the cache (`true`), also after the end of all processes, until it is called with `false`
    /// or the image is [removed](ChunkCache::remove).
    pub fn set_pinned(&self, pinned: bool) {
        self.0.set_pinned(pinned);
    }

    /// Returns whether the image is pinned.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.0.is_pinned()
    }

    /// Returns the number of bytes that are in the cache, zeros included.
    #[must_use]
    pub fn cached(&self) -> u64 {
        self.0.cached()
    }

    /// Returns the statistics of its reads since it was opened.
    #[must_use]
    pub fn statistics(&self) -> CacheStatistics {
        self.0.statistics()
    }

    /// Returns the last error by which a chunk couldn't be kept, such as a full disk, and forgets it. The read had its
    /// content all the same.
    #[must_use]
    pub fn take_problem(&self) -> Option<io::Error> {
        self.0.take_problem()
    }
}

/// What a [`CachedImage`] has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStatistics {
    /// Reads of the image, which pages from the mapping aren't.
    pub reads: u64,
    /// Reads of the source.
    pub fetches: u64,
    /// Bytes that the source was asked for.
    pub fetched: u64,
    /// Reads that waited for another thread or process.
    pub waits: u64,
    /// Chunks that didn't match their checksum, and were fetched again.
    pub damaged: u64,
    /// Reads of the source of which a chunk wasn't kept: no other chunk could be given back, the disk was full, or
    /// another process took too long.
    pub not_stored: u64,
}

impl PageSource for CachedImage {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.0.read(offset, page, false)
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.0.read(offset, page, true)
    }

    fn len(&self) -> Option<u64> {
        Some(self.0.len())
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.0.zeros(offset)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        self.0.bytes(offset, len)
    }
}

impl fmt::Debug for CachedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedImage")
            .field("name", &self.0.name())
            .field("len", &self.0.len())
            .field("cached", &self.cached())
            .field("statistics", &self.statistics())
            .finish()
    }
}
