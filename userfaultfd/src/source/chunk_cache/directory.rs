//! The directory: its lock, what is used of its limit, and which chunks go when it is full.

#![expect(unsafe_code, reason = "atomics that processes share")]

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};

use super::error::CacheError;
use super::image::Image;
use super::table::{Paths, State, Table};
use crate::Errno;
use crate::owner::Owner;
use crate::sys::{self, FileLock};

/// The file of the directory's own.
const NAME: &str = "userfaultfd-cache";

/// What it begins with.
const MAGIC: [u8; 8] = *b"uffdcach";
const VERSION: u32 = 1;
const FILE_BYTES: usize = 4096;

/// The words in it, by their offsets: what all images use of the limit, the epoch, what came in since it began, and how
/// many times no chunk could be given back.
const USED: usize = 64;
const EPOCH: usize = 68;
const FETCHED: usize = 72;
const PRESSURE: usize = 76;

/// Bytes that the words count. 32 bits are enough for 16 TiB.
const UNIT_BYTES: u64 = 4096;

/// An epoch ends when a sixteenth of the limit has come in.
const EPOCHS: u64 = 16;

/// When chunks are given back, room is made for a 32nd of the limit, so that not each chunk that comes in looks for one
/// that goes.
const SLACK: u64 = 32;

/// How long an operation waits for the directory's lock, under which nothing waits for a source.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// How long a read that has fetched its bytes waits for the lock, to keep them.
const STORE_PATIENCE: Duration = Duration::from_secs(1);

/// Bytes of blocks that a file system may need for a file beside those of its chunks: a part, and a number.
const OVERHEAD_PART: u64 = 64;
const OVERHEAD_BYTES: u64 = 1 << 20;

/// An open directory.
pub(super) struct Directory {
    /// A fork's child has the locks of its parent's files, which keep it from nothing.
    owner: Owner,
    path: PathBuf,
    access: Access,
    file: File,
    map: MmapRaw,
    limit: u64,
    /// Threads of this process take turns: the lock on the file is theirs together.
    turn: Mutex<()>,
    /// Images that are open by this.
    images: Mutex<Vec<Weak<Image>>>,
}

/// Which users may read and write the files: those who may in the directory, and never all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    mode: u32,
    group: u32,
}

impl Access {
    const OWNER: u32 = 0o600;
    const OWNER_AND_GROUP: u32 = 0o660;
    const OTHERS: u32 = 0o007;

    fn of(directory: &fs::Metadata) -> Self {
        Self { mode: directory.mode() & Self::OWNER_AND_GROUP | Self::OWNER, group: directory.gid() }
    }

    /// The permissions with which a file comes into being.
    pub(super) fn at_first() -> u32 {
        Self::OWNER
    }

    /// Gives a file these permissions.
    pub(super) fn give(self, file: &File) -> io::Result<()> {
        let found = file.metadata()?;
        let mode = if found.gid() == self.group { self.mode } else { Self::OWNER };
        if found.mode() & 0o777 == mode {
            return Ok(());
        }
        match file.set_permissions(fs::Permissions::from_mode(mode)) {
            // It is another user's, of the same group.
            Err(error) if error.kind() == ErrorKind::PermissionDenied && found.mode() & Self::OTHERS == 0 => {
                Ok(())
            }
            given => given,
        }
    }
}

/// The lock of a directory, which is held until this is dropped.
pub(super) struct Locked<'a> {
    directory: &'a Directory,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // It is the parent's in a fork's child, too.
        if self.directory.owner.is_current() {
            self.directory.lock_file(FileLock::Unlocked);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Directory {
    pub(super) fn open(path: &Path, limit: u64) -> Result<Self, CacheError> {
        let name = path.join(NAME);
        let at = |what, path: &Path| {
            let path = path.to_owned();
            move |error| CacheError::Io { what, path, error }
        };
        let metadata = fs::metadata(path).map_err(at("can't open the directory", path))?;
        if !metadata.is_dir() {
            let error = io::Error::from(ErrorKind::NotADirectory);
            return Err(at("can't open the directory", path)(error));
        }
        if metadata.mode() & 0o002 != 0 {
            return Err(CacheError::WritableByAll { path: path.to_owned() });
        }
        let access = Access::of(&metadata);
        let owner = Owner::current().map_err(|errno| at("can't open the directory", path)(errno.into()))?;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW);
        let file = options.mode(Access::at_first()).open(&name).map_err(at("can't open", &name))?;
        let failed = at("can't use", &name);
        let map = || {
            file.set_len(FILE_BYTES as u64)?;
            let mut found = [0; 12];
            file.read_exact_at(&mut found, 0)?;
            // Where nothing is yet, all processes write the same, and leave the words alone.
            if found == [0; 12] {
                file.write_all_at(&header(), 0)?;
            }
            sys::allocate(file.as_fd(), 0, FILE_BYTES)?;
            MmapOptions::new().len(FILE_BYTES).map_raw(&file)
        };
        let metadata = file.metadata().map_err(at("can't open", &name))?;
        if !metadata.is_file() || ![0, FILE_BYTES as u64].contains(&metadata.len()) {
            return Err(CacheError::Foreign { path: name });
        }
        let map = map().map_err(failed)?;
        access.give(&file).map_err(at("can't set the permissions of", &name))?;
        let mut found = [0; 12];
        file.read_exact_at(&mut found, 0).map_err(at("can't read", &name))?;
        if found[..8] != MAGIC {
            return Err(CacheError::Foreign { path: name });
        }
        let found = u32::from_ne_bytes(*found[8..].first_chunk().expect("four bytes"));
        if found != VERSION {
            return Err(CacheError::OtherVersion { path: name, found, known: VERSION });
        }
        // A file that nobody else knows, to see whether chunks can be given back.
        let mut trial = File::options();
        trial.read(true).write(true).mode(Access::at_first()).custom_flags(libc::O_TMPFILE);
        let trial = trial.open(path);
        if let Ok(trial) = trial {
            trial.set_len(UNIT_BYTES).map_err(at("can't write in", path))?;
            match sys::punch_hole(trial.as_fd(), 0, UNIT_BYTES) {
                Err(Errno::EOPNOTSUPP) => return Err(CacheError::NoHoles { path: path.to_owned() }),
                done => done.map_err(|errno| at("can't punch holes in", path)(errno.into()))?,
            }
        }
        let images = Mutex::default();
        let turn = Mutex::new(());
        let directory = Self { owner, path: path.to_owned(), access, file, map, limit, turn, images };
        {
            let locked = directory.lock()?;
            directory.recount(&locked, &directory.images()?);
        }
        Ok(directory)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at % 4 == 0 && at < FILE_BYTES);
        let word = self.map.as_mut_ptr().wrapping_add(at).cast();
        // SAFETY: a whole aligned word of the mapping, which is writable and lives as long as `self`. All processes that
        // have it mapped access it by atomics alone.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// Bytes of the limit that are used.
    pub(super) fn used(&self) -> u64 {
        u64::from(self.word(USED).load(Ordering::Relaxed)) * UNIT_BYTES
    }

    fn set_used(&self, _: &Locked<'_>, bytes: u64) {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        self.word(USED).store(units, Ordering::Relaxed);
    }

    /// The time by which uses are told apart.
    pub(super) fn epoch(&self) -> u32 {
        self.word(EPOCH).load(Ordering::Relaxed)
    }

    /// A number that changes when a process has found no chunk to give back.
    pub(super) fn pressure(&self) -> u32 {
        self.word(PRESSURE).load(Ordering::Relaxed)
    }

    pub(super) fn lock(&self) -> Result<Locked<'_>, CacheError> {
        if !self.owner.is_current() {
            let reason = "another process has opened it, before a fork";
            let (what, path) = ("can't use the directory", self.path.clone());
            return Err(CacheError::Io { what, path, error: io::Error::new(ErrorKind::Unsupported, reason) });
        }
        self.lock_within(LOCK_PATIENCE).ok_or_else(|| CacheError::Locked { path: self.path.clone() })
    }

    fn lock_file(&self, lock: FileLock) -> bool {
        sys::lock_byte(self.file.as_fd(), 0, lock).unwrap_or(false)
    }

    /// `None`: other threads or processes have it for longer, or this is a fork's child.
    fn lock_within(&self, patience: Duration) -> Option<Locked<'_>> {
        if !self.owner.is_current() {
            return None;
        }
        let (begun, mut pause) = (Instant::now(), sys::Pause::new());
        let mut turn = None;
        loop {
            turn = turn.or_else(|| match self.turn.try_lock() {
                Ok(turn) => Some(turn),
                Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            });
            if turn.is_some() && self.lock_file(FileLock::Exclusive) {
                return turn.map(|turn| Locked { directory: self, _turn: turn });
            }
            if begun.elapsed() > patience {
                return None;
            }
            pause.rest();
        }
    }

    pub(super) fn add(&self, image: &Arc<Image>) {
        let mut images = lock(&self.images);
        images.retain(|image| image.strong_count() > 0);
        images.push(Arc::downgrade(image));
    }

    /// The files of all images.
    fn images(&self) -> Result<Vec<Paths>, CacheError> {
        let failed =
            |error| CacheError::Io { what: "can't read the directory", path: self.path.clone(), error };
        let entries = fs::read_dir(&self.path).map_err(failed)?;
        let images =
            entries.filter_map(|entry| entry.map(|entry| Paths::of_table(&entry.path())).transpose());
        images.collect::<io::Result<_>>().map_err(failed)
    }

    /// Counts what is used, which a process that died may have left wrong. Unless the system lacks what that takes: then
    /// the number stays.
    fn recount(&self, locked: &Locked<'_>, images: &[Paths]) {
        let used = images.iter().map(|paths| Ok(open_table(paths)?.as_ref().map_or(0, counted)));
        if let Ok(used) = used.sum::<Result<u64, CacheError>>() {
            self.set_used(locked, used);
        }
    }

    /// Takes room for a chunk, which is empty and whose lock the caller has, and gives others back if necessary: it is
    /// unsettled, and counted, from here on. `false`: there is no room.
    pub(super) fn reserve(&self, table: &Table, chunk: usize) -> bool {
        let bytes = table.header().chunk_size as u64;
        if bytes > self.limit {
            return false;
        }
        let Some(locked) = self.lock_within(STORE_PATIENCE) else { return false };
        if self.used() + bytes > self.limit && !self.evict(&locked, bytes) {
            return false;
        }
        // Both under the lock, or another process would count without it.
        table.set_state(chunk, State::Unsettled);
        self.set_used(&locked, self.used() + bytes);
        let fetched = u64::from(self.word(FETCHED).load(Ordering::Relaxed)) + bytes.div_ceil(UNIT_BYTES);
        let is_over = fetched * UNIT_BYTES >= self.limit / EPOCHS;
        self.word(FETCHED).store(if is_over { 0 } else { fetched as u32 }, Ordering::Relaxed);
        if is_over {
            self.word(EPOCH).fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Ends the room of a chunk that is counted, of which nothing is in its file any more, and whose lock the caller has.
    /// `false`: the lock couldn't be had in time.
    pub(super) fn release(&self, table: &Table, chunk: usize, state: State) -> bool {
        // Without the lock it stays unsettled, and counted, until another process finds it.
        let Some(locked) = self.lock_within(STORE_PATIENCE) else { return false };
        table.set_state(chunk, state);
        self.set_used(&locked, self.used().saturating_sub(table.header().chunk_size as u64));
        true
    }

    /// Gives back chunks of at least this number of bytes, because the disk is full. `false`: there are none.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        self.lock_within(STORE_PATIENCE).is_some_and(|locked| {
            let Ok(images) = self.images() else { return false };
            self.recount(&locked, &images);
            let target = self.used().saturating_sub(bytes);
            self.evict_to(&locked, &images, target);
            self.used() <= target
        })
    }

    fn evict(&self, locked: &Locked<'_>, need: u64) -> bool {
        let Ok(images) = self.images() else { return false };
        self.recount(locked, &images);
        let most = self.limit - need;
        if self.used() > most {
            self.evict_to(locked, &images, most - most.min(self.limit / SLACK));
        }
        let is_enough = self.used() <= most;
        if !is_enough {
            // Others give back what they have mapped and don't use.
            self.word(PRESSURE).fetch_add(1, Ordering::Relaxed);
        }
        is_enough
    }

    /// Gives chunks back, the least valuable first, until at most `target` bytes are used, or none is left that can be. It has
    /// the files of one image open at a time.
    fn evict_to(&self, locked: &Locked<'_>, images: &[Paths], target: u64) {
        let epoch = self.epoch();
        let open: Vec<Arc<Image>> = lock(&self.images).iter().filter_map(Weak::upgrade).collect();
        let mut candidates = Vec::new();
        for (index, paths) in images.iter().enumerate() {
            let Ok(Some(table)) = open_table(paths) else { continue };
            for chunk in 0..table.chunks() {
                match table.state(chunk) {
                    State::Unsettled => candidates.push((i64::MIN, index, chunk)),
                    State::Data if !table.is_pinned() => {
                        candidates.push((table.usage(chunk).value(epoch), index, chunk));
                    }
                    State::Data | State::Empty | State::Zero => {}
                }
            }
        }
        candidates.sort_unstable();
        let mut opened: Option<(usize, Option<(Table, File)>)> = None;
        for (_, index, chunk) in candidates {
            if self.used() <= target {
                break;
            }
            let paths = &images[index];
            if opened.as_ref().is_none_or(|(opened, _)| *opened != index) {
                // Those of the image before are closed first.
                drop(opened.take());
                opened = Some((index, open_files(paths)));
            }
            let Some((_, Some((table, file)))) = &opened else { continue };
            let mut own = open.iter().filter(|image| image.is_at(&paths.table));
            if own.all(|image| image.give_back(chunk))
                && punch(table, file, chunk, |state| matches!(state, State::Data | State::Unsettled))
            {
                self.set_used(locked, self.used().saturating_sub(table.header().chunk_size as u64));
            }
        }
        drop(opened);
        for paths in images {
            let Ok(Some(table)) = open_table(paths) else { continue };
            if !table.is_pinned() && counted(&table) == 0 && table.lock_use(FileLock::Exclusive) {
                // What can't be removed is left over, and no error of the read that needed room.
                drop(remove(paths));
            }
        }
    }

    /// Gives back blocks that belong to no chunk: the machine stopped after they were written, and before the table was.
    pub(super) fn tidy(&self, _: &Locked<'_>, table: &Table, file: &File) {
        let known = counted(table);
        let Ok(stamp) = sys::file_stamp(file.as_fd()) else { return };
        if stamp.allocated <= known + known / OVERHEAD_PART + OVERHEAD_BYTES {
            return;
        }
        for chunk in 0..table.chunks() {
            punch(table, file, chunk, |state| matches!(state, State::Empty | State::Unsettled));
        }
    }
}

/// What a directory's file begins with.
fn header() -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_ne_bytes());
    bytes
}

/// Opens the table of an image. `None`: it isn't one, and is left alone. An error: the system lacks what that takes.
fn open_table(paths: &Paths) -> Result<Option<Table>, CacheError> {
    let lacks = [libc::EMFILE, libc::ENFILE, libc::ENOMEM].map(Some);
    match Table::open(&paths.table) {
        Err(CacheError::Io { what, path, error }) if lacks.contains(&error.raw_os_error()) => {
            Err(CacheError::Io { what, path, error })
        }
        opened => Ok(opened.unwrap_or_default()),
    }
}

/// Opens the files of an image whose chunks are given back.
fn open_files(paths: &Paths) -> Option<(Table, File)> {
    let table = open_table(paths).ok()??;
    Some((table, File::options().write(true).open(&paths.chunks).ok()?))
}

/// Bytes of the limit that the chunks of an image use.
fn counted(table: &Table) -> u64 {
    let is_counted = |chunk: &usize| matches!(table.state(*chunk), State::Data | State::Unsettled);
    (0..table.chunks()).filter(is_counted).count() as u64 * table.header().chunk_size as u64
}

/// Gives a chunk back if it is in a state, and no process uses it. A process that dies on the way leaves it unsettled.
fn punch(table: &Table, file: &File, chunk: usize, is_meant: impl Fn(State) -> bool) -> bool {
    if !is_meant(table.state(chunk)) || !table.lock(chunk, FileLock::Exclusive) {
        return false;
    }
    let done = is_meant(table.state(chunk)) && {
        table.set_state(chunk, State::Unsettled);
        let size = table.header().chunk_size as u64;
        let punched = sys::punch_hole(file.as_fd(), chunk as u64 * size, size).is_ok();
        if punched {
            table.set_state(chunk, State::Empty);
        }
        punched
    };
    table.lock(chunk, FileLock::Unlocked);
    done
}

/// Removes the files of an image, under the directory's lock. The table goes first: chunks without one are no image.
pub(super) fn remove(paths: &Paths) -> io::Result<()> {
    let remove = |path| match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    remove(&paths.table)?;
    remove(&paths.chunks)
}
