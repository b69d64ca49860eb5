//! A file, read with pread(2).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memmap2::MmapOptions;

use super::data_ranges::DataRanges;
use super::{PageData, PageSource, invalid};
use crate::Errno;
use crate::sys::{self, FileStamp};

/// A file or a part of it as a source: a regular file or a block device.
///
/// ```
/// use std::fs::File;
/// use userfaultfd::pager::{FileSource, PageData, PageSource};
///
/// let program = FileSource::open(std::env::current_exe()?)?;
/// let mut page = [0xff; 4096];
/// assert_eq!(program.read(0, &mut page)?, PageData::Data);
/// assert_eq!(&page[..4], b"\x7fELF");
///
/// // A window of three bytes. What lies beyond it is zero.
/// let part = FileSource::range(File::open(std::env::current_exe()?)?, 1, 3)?;
/// part.read(0, &mut page)?;
/// assert_eq!(&page[..4], b"ELF\0");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// - **Length**: the length at creation. Later growth is ignored. Where the file has become shorter, a read fails with
///   an error of the kind [`UnexpectedEof`](io::ErrorKind::UnexpectedEof); it never returns zeros.
/// - **Holes** are [`PageData::Zero`] and aren't read. [`new`](Self::new) looks for up to 65,536 of them if the file
///   has fewer blocks than bytes; [`sparse`](Self::sparse) forces or prevents that. It opens the file once more, by
///   `/proc/self/fd`; where that fails, all is read. Once the file has changed, its holes are read, too.
/// - **Changes** of the content show in pages that are read afterwards.
/// - **`O_DIRECT`**: a file opened with it is read in whole blocks, also where its end isn't the end of a block;
///   [`direct`](Self::direct) opens it so.
/// - **Zeros** that were read are [`PageData::Zero`], if all that was read is zero: looking takes some nanoseconds where
///   there is data, and less than copying a page where there is none, which then takes no memory.
/// - **Small reads of what isn't in the page cache** have the kernel read [more](Self::read_size) around them.
///
/// # System calls on the file itself
///
/// A system call on the file may fault on memory of this source: `read` of the file into the memory, `write` of the
/// memory to the file. The kernel holds locks of the file during the call, and a fault whose read needs one of these
/// locks never ends. A read of the source doesn't take the lock of the file's offset nor, on ext4, tmpfs and Btrfs, the
/// lock that a write holds: there such calls work. They hang where a read waits for a write of the same file: on XFS,
/// with `O_DIRECT`, and on network file systems. There, [`populate`](crate::LazyMemory::populate) the memory first, or
/// write through a buffer.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    /// The offset in the file of the source's offset 0. `start + len` is a valid file offset.
    start: u64,
    len: u64,
    holes: Option<Holes>,
    /// Whether it is a block device, whose length fstat(2) doesn't return.
    is_device: bool,
    /// Whether only whole blocks can be read.
    is_direct: bool,
    /// Bytes that are read around what isn't cached.
    read_size: u64,
    /// Where the last read ended, cut to a word: a guess.
    next: AtomicUsize,
    /// Whether the file system tells what is cached.
    tells_cached: AtomicBool,
    /// What it was made of, where `file` was opened anew: closing it would release the process's locks of the file.
    _given: Option<File>,
}

/// How a file will be read: advice for the kernel, by posix_fadvise(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileAdvice {
    /// As the kernel assumes: `POSIX_FADV_NORMAL`.
    Normal,
    /// From its beginning to its end: `POSIX_FADV_SEQUENTIAL`. The kernel reads ahead twice as far.
    Sequential,
    /// Here and there: `POSIX_FADV_RANDOM`. The kernel reads nothing ahead.
    Random,
    /// Soon, all of it: `POSIX_FADV_WILLNEED`. The kernel begins to read it into the page cache now, without a wait.
    WillNeed,
    /// Not again: `POSIX_FADV_DONTNEED`. The kernel drops what is in the page cache now, and was written.
    DontNeed,
}

/// The holes of a file, valid until it changes.
#[derive(Debug)]
struct Holes {
    /// The description that was used to look for holes. Closing it would release the process's locks of the file
    /// (fcntl(2)).
    _own: File,
    stamp: FileStamp,
    /// In order.
    holes: Vec<Range<u64>>,
}

impl Holes {
    /// Holes that are looked for at most: that takes a tenth of a second, and the list a MiB.
    const MAX_HOLES: usize = 1 << 16;

    /// Bytes of blocks beyond those of the data that file systems need themselves: a file with more was preallocated.
    const OVERHEAD_BYTES: u64 = 1 << 16;

    /// Longest tick of the clock by which file systems set times.
    const MAX_CLOCK_TICK: Duration = Duration::from_millis(100);

    /// Looks for the holes of a range of a file, which takes locks of the file, so no fault may do it. Returns `None` if
    /// there are none, or if the file system doesn't report them.
    fn find(file: &File, range: Range<u64>) -> Option<Self> {
        // The offset of `file` and its lock belong to the program.
        let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        // Read before the search, so that a change during it is noticed.
        let stamp = sys::file_stamp(own.as_fd()).ok()?;
        let whole = 0..stamp.len;
        let (holes, data_len) = Self::scan(&own, range.clone(), stamp.len)?;
        if holes.is_empty() {
            return None;
        }
        // A write to preallocated blocks changes the times alone.
        if Self::changed_just_now(&stamp) {
            let data_len = if range == whole { data_len } else { Self::scan(&own, whole, stamp.len)?.1 };
            if stamp.allocated > data_len + Self::OVERHEAD_BYTES {
                return None;
            }
        }
        Some(Self { _own: own, stamp, holes })
    }

    /// Returns the holes of a range of a file of the given length, and the number of bytes that are data.
    fn scan(own: &File, range: Range<u64>, len: u64) -> Option<(Vec<Range<u64>>, u64)> {
        let (mut holes, mut at, mut data_len, end) = (Vec::new(), range.start, 0, range.end.min(len));
        for data in DataRanges::new(own, at..end) {
            // An error of a file system that doesn't tell.
            let data = data.ok()?;
            if data.start > at {
                holes.push(at..data.start);
            }
            at = data.end;
            data_len += data.end - data.start;
            if holes.len() == Self::MAX_HOLES {
                return Some((holes, data_len));
            }
        }
        if at < end {
            holes.push(at..end);
        }
        Some((holes, data_len))
    }

    /// Whether another change might leave the times unchanged.
    fn changed_just_now(stamp: &FileStamp) -> bool {
        let (seconds, nanos) = stamp.changed;
        let since = u64::try_from(seconds).unwrap_or(0);
        let changed = UNIX_EPOCH + Duration::new(since, u32::try_from(nanos).unwrap_or(0));
        SystemTime::now().duration_since(changed).map_or(true, |since| since < Self::MAX_CLOCK_TICK)
    }

    /// The number of bytes of a hole that follow.
    fn at(&self, offset: u64) -> u64 {
        let hole = self.holes.partition_point(|hole| hole.end <= offset);
        self.holes.get(hole).filter(|hole| hole.start <= offset).map_or(0, |hole| hole.end - offset)
    }
}

/// Bytes of the blocks in which a file with O_DIRECT is read: what devices and file systems ask for at most.
const BLOCK_BYTES: usize = 4096;

/// Bytes that are read around a page that isn't cached: what the kernel reads around a fault in a mapping by default.
const READ_BYTES: u64 = 128 << 10;

impl FileSource {
    /// Opens a file for reading.
    ///
    /// # Errors
    ///
    /// Those of open(2), and those of [`new`](Self::new).
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// Wraps an open file.
    ///
    /// # Errors
    ///
    /// `EBADF`: the file isn't open for reading. `EISDIR`, `ESPIPE`: it is a directory, a pipe or a socket. Of the kind
    /// [`InvalidInput`](io::ErrorKind::InvalidInput): another file without a length, such as most of `/proc`.
    pub fn new(file: File) -> io::Result<Self> {
        Self::within(file, 0, None)
    }

    /// Wraps `len` bytes of an open file from byte `offset` on. Neither has to be aligned.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), and one of the kind [`InvalidInput`](io::ErrorKind::InvalidInput) if the file
    /// ends before `offset + len`.
    pub fn range(file: File, offset: u64, len: u64) -> io::Result<Self> {
        Self::within(file, offset, Some(len))
    }

    /// Looks for holes now (`true`), or forgets those that were found (`false`).
    ///
    /// The search takes up to a tenth of a second; it pays off if the file has holes.
    #[must_use]
    pub fn sparse(mut self, sparse: bool) -> Self {
        self.holes = None;
        if sparse && !self.is_device {
            self.holes = Holes::find(&self.file, self.start..self.start + self.len);
        }
        self
    }

    /// Reads past the page cache (`true`), with `O_DIRECT`: for an image that is in memory once, where the pager put it,
    /// and not twice. Each read then waits for the disk. `false` reads through it. Opens the file once more, by
    /// `/proc/self/fd`, if it isn't open so.
    ///
    /// # Errors
    ///
    /// Those of open(2): `EINVAL` where the file system has no such reads.
    pub fn direct(mut self, direct: bool) -> io::Result<Self> {
        if direct != self.is_direct {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let flags = if direct { libc::O_DIRECT } else { 0 };
            let file = File::options().read(true).custom_flags(flags).open(path)?;
            let given = std::mem::replace(&mut self.file, file);
            self._given.get_or_insert(given);
            self.is_direct = direct;
        }
        Ok(self)
    }

    /// Advises the kernel how this part of the file will be read. The advice holds for all that share the open file
    /// description.
    ///
    /// # Errors
    ///
    /// Those of posix_fadvise(2).
    pub fn advise(self, advice: FileAdvice) -> io::Result<Self> {
        let advice = match advice {
            FileAdvice::Normal => libc::POSIX_FADV_NORMAL,
            FileAdvice::Sequential => libc::POSIX_FADV_SEQUENTIAL,
            FileAdvice::Random => libc::POSIX_FADV_RANDOM,
            FileAdvice::WillNeed => libc::POSIX_FADV_WILLNEED,
            FileAdvice::DontNeed => libc::POSIX_FADV_DONTNEED,
        };
        // 0 would be up to the end of the file.
        if self.len > 0 {
            sys::advise(self.file.as_fd(), self.start, self.len, advice)?;
        }
        Ok(self)
    }

    /// Sets how much of the file is read into the page cache for a small read that misses it, in bytes: the aligned block
    /// of this size that has the read. Sequential reads are left to the kernel's own read-ahead. The default is 128 KiB,
    /// which is what the kernel reads around a fault in a mapping.
    ///
    /// With 0 the kernel alone decides, and mostly reads one page for a read in random order. It has no effect with
    /// `O_DIRECT`, nor where the file system doesn't report what is cached (tmpfs, where everything is).
    #[must_use]
    pub fn read_size(mut self, bytes: usize) -> Self {
        self.read_size = bytes as u64;
        self
    }

    fn within(file: File, start: u64, len: Option<u64>) -> io::Result<Self> {
        // Reads nothing, and fails where a read would.
        file.read_at(&mut [], 0)?;
        let kind = file.metadata()?.file_type();
        let (stamp, is_device) = (sys::file_stamp(file.as_fd())?, kind.is_block_device());
        let file_len = if kind.is_file() {
            // It has content all the same.
            if stamp.len == 0 && file.read_at(&mut [0], 0).is_ok_and(|read| read > 0) {
                return Err(invalid("a file that doesn't tell its length".into()));
            }
            stamp.len
        } else if is_device {
            // With a description of its own, if possible, whose offset no other thread uses.
            let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
            own.as_ref().unwrap_or(&file).seek(SeekFrom::End(0))?
        } else {
            return Err(invalid("neither a regular file nor a block device".into()));
        };
        let is_direct = sys::is_direct(file.as_fd())?;
        let rest = file_len.checked_sub(start);
        match (len.or(rest), rest) {
            (Some(len), Some(rest)) if len <= rest => {
                let source = Self {
                    file,
                    start,
                    len,
                    holes: None,
                    is_device,
                    is_direct,
                    read_size: READ_BYTES,
                    next: AtomicUsize::new(usize::MAX),
                    tells_cached: AtomicBool::new(true),
                    _given: None,
                };
                Ok(source.sparse(stamp.allocated < stamp.len))
            }
            _ => {
                let wanted = len.unwrap_or_default();
                Err(invalid(format!("{wanted} bytes at offset {start} of a file of {file_len} bytes")))
            }
        }
    }

    /// The file, and the part of it that this is.
    pub(super) fn window(&self) -> (&File, u64, u64) {
        (&self.file, self.start, self.len)
    }

    /// Whether the bytes are known to be present: not in a hole, nor beyond the end of a file that has become shorter.
    pub(super) fn has_data(&self, offset: u64, len: u64) -> bool {
        if self.is_device {
            return true;
        }
        let Ok(now) = sys::file_stamp(self.file.as_fd()) else { return false };
        now.len >= self.start + offset + len && self.hole_at(offset, || Some(now)) < len
    }

    /// The number of bytes of a hole that follow an offset, if the file hasn't changed.
    fn hole_at(&self, offset: u64, now: impl FnOnce() -> Option<FileStamp>) -> u64 {
        let Some(holes) = &self.holes else { return 0 };
        match holes.at(self.start + offset) {
            // Data needs no fstat(2).
            0 => 0,
            hole if now() == Some(holes.stamp) => hole,
            _ => 0,
        }
    }

    /// Reads whole blocks into an aligned buffer, of a file that is open with O_DIRECT.
    fn read_blocks(&self, page: &mut [u8], inside: usize, from: u64) -> io::Result<()> {
        let aligned = [page.as_ptr().addr(), page.len(), (from % BLOCK_BYTES as u64) as usize];
        if aligned.iter().all(|number| number % BLOCK_BYTES == 0) {
            let whole = inside.next_multiple_of(BLOCK_BYTES).min(page.len());
            return self.read_up_to(&mut page[..whole], inside, from);
        }
        let before = (from % BLOCK_BYTES as u64) as usize;
        let whole = (before + inside).next_multiple_of(BLOCK_BYTES);
        let mut blocks = MmapOptions::new().len(whole).map_anon()?;
        self.read_up_to(&mut blocks, before + inside, from - before as u64)?;
        page[..inside].copy_from_slice(&blocks[before..before + inside]);
        Ok(())
    }

    /// Reads through the page cache. What isn't there is read with what is around it.
    fn read_around(&self, page: &mut [u8], from: u64) -> io::Result<()> {
        let len = page.len();
        // Relaxed: each is by itself, and a guess. The kernel reads ahead of reads in order, and does it better: a scan of
        // a cold file takes twice as long where each block is asked for when it is needed.
        let goes_on = self.next.swap((from + len as u64) as usize, Ordering::Relaxed) == from as usize;
        if self.read_size <= len as u64 || goes_on || !self.tells_cached.load(Ordering::Relaxed) {
            return self.read_up_to(page, len, from);
        }
        let cached = match sys::read_cached(self.file.as_fd(), page, from) {
            // Also at the end of a file that became shorter, which the read below finds.
            Ok(cached) => cached,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(_) => {
                self.tells_cached.store(false, Ordering::Relaxed);
                return self.read_up_to(page, len, from);
            }
        };
        if cached < len {
            let first = (from + cached as u64) / self.read_size * self.read_size;
            let end = (from + len as u64).next_multiple_of(self.read_size);
            // Only makes the read below faster, so that its errors are the ones to report.
            let _ = sys::advise(self.file.as_fd(), first, end - first, libc::POSIX_FADV_WILLNEED);
            self.read_up_to(&mut page[cached..], len - cached, from + cached as u64)?;
        }
        Ok(())
    }

    /// Reads at least `least` bytes, and at most what the buffer has room for.
    fn read_up_to(&self, room: &mut [u8], least: usize, from: u64) -> io::Result<()> {
        let mut done = 0;
        while done < least {
            match self.file.read_at(&mut room[done..], from + done as u64) {
                // The file became shorter. Nothing is allocated for the error: a thread that forks may hold the
                // allocator's locks until the fault is resolved.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether all bytes are zero. Ends in the first piece that has another.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // A fold has no branch inside of it, so that it takes the machine's widest registers.
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

impl PageSource for FileSource {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let rest = self.len.saturating_sub(offset);
        let inside = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len()));
        if self.zeros(offset) >= inside as u64 {
            return Ok(PageData::Zero);
        }
        let from = self.start + offset;
        if self.is_direct {
            self.read_blocks(page, inside, from)?;
        } else {
            self.read_around(&mut page[..inside], from)?;
        }
        if is_zero(&page[..inside]) {
            return Ok(PageData::Zero);
        }
        page[inside..].fill(0);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }

    fn zeros(&self, offset: u64) -> u64 {
        if offset >= self.len {
            return u64::MAX;
        }
        let hole = self.hole_at(offset, || sys::file_stamp(self.file.as_fd()).ok());
        if offset + hole >= self.len { u64::MAX } else { hole }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::{fs, iter};

    use super::*;
    use crate::support::mapping::memfd_of_bytes;
    use crate::support::proc::wait_until;
    use crate::support::require;

    /// More than one block of every file system, whatever the page size.
    const BLOCK: usize = 1 << 18;

    /// A byte that depends on its offset.
    fn byte(offset: usize) -> u8 {
        (offset % 251 + 1) as u8
    }

    fn file(len: usize) -> File {
        let file = File::from(memfd_of_bytes(0, 0));
        file.write_all_at(&(0..len).map(byte).collect::<Vec<_>>(), 0).unwrap();
        file
    }

    fn socket() -> File {
        let (one, _) = UnixStream::pair().unwrap();
        File::from(OwnedFd::from(one))
    }

    /// Reads and checks: bytes of `content` from `offset` on, then zeros.
    #[track_caller]
    fn check(source: &FileSource, content: impl Fn(usize) -> u8, offset: usize, len: usize) -> PageData {
        let mut page = vec![0xee; len];
        let fill = source.read(offset as u64, &mut page).unwrap();
        let source_len = source.len().unwrap() as usize;
        let expected = (offset..offset + len).map(|at| if at < source_len { content(at) } else { 0 });
        match fill {
            PageData::Data => assert!(page.iter().copied().eq(expected), "{len} bytes at {offset}"),
            PageData::Zero => {
                assert!(expected.eq(iter::repeat_n(0, len)), "{len} bytes at {offset}");
            }
        }
        fill
    }

    #[test]
    fn every_border_of_a_file() {
        crate::support::require!();
        for len in [1, 4095, 4096, 4097, 10_000] {
            let source = FileSource::new(file(len)).unwrap();
            assert_eq!(source.len(), Some(len as u64));
            for offset in [0, 1, 4095, 4096, 4097, len - 1] {
                for size in [1, 4096, 8192, 16_384] {
                    let expected = if offset < len { PageData::Data } else { PageData::Zero };
                    assert_eq!(check(&source, byte, offset, size), expected, "{size} at {offset} of {len}");
                }
            }
            for offset in [len as u64, len as u64 + 1, i64::MAX as u64, u64::MAX - 4096, u64::MAX] {
                let mut page = [0xee; 4096];
                assert_eq!(source.read(offset, &mut page).unwrap(), PageData::Zero, "{offset} of {len}");
                assert_eq!((page, source.zeros(offset)), ([0xee; 4096], u64::MAX), "{offset} of {len}");
            }
            assert_eq!(source.zeros(0), 0);
        }
    }

    #[test]
    fn an_empty_file_is_all_zeros() {
        crate::support::require!();
        let source = FileSource::new(file(0)).unwrap();
        assert!(source.is_empty());
        assert_eq!(check(&source, byte, 0, 4096), PageData::Zero);
        assert_eq!(source.zeros(0), u64::MAX);
    }

    #[test]
    fn a_window_shows_its_part_alone() {
        crate::support::require!();
        let shift = |start: usize| move |at| byte(start + at);
        for (start, len) in [(0, 5000), (1, 4999), (4096, 904), (4097, 1), (3, 4096), (5000, 0)] {
            let source = FileSource::range(file(5000), start as u64, len as u64).unwrap();
            assert_eq!(source.len(), Some(len as u64));
            for offset in [0, 1, 4096] {
                let fill = check(&source, shift(start), offset, 8192);
                assert_eq!(fill == PageData::Data, offset < len, "{start} {len} {offset}");
            }
        }
    }

    #[test]
    fn a_window_that_the_file_does_not_have_is_refused() {
        crate::support::require!();
        for (start, len) in [(0, 5001), (1, 5000), (5000, 1), (5001, 0), (1, u64::MAX), (u64::MAX, 0)] {
            let error = FileSource::range(file(5000), start, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{start} {len}");
            let text = format!("{len} bytes at offset {start} of a file of 5000 bytes");
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_read_anywhere_is_refused_at_once() {
        crate::support::require!();
        let write_only = File::options().write(true).open("/dev/null").unwrap();
        for (what, file, expected) in [
            ("a socket", socket(), "ESPIPE"),
            ("a directory", File::open("/").unwrap(), "EISDIR"),
            ("write-only", write_only, "EBADF"),
            ("a device without a length", File::open("/dev/zero").unwrap(), "InvalidInput"),
        ] {
            let error = FileSource::new(file).unwrap_err();
            let name = match error.raw_os_error() {
                Some(_) => format!("{:?}", crate::error::errno_of(&error)),
                None => format!("{:?}", error.kind()),
            };
            assert_eq!(name, expected, "{what}: {error}");
        }
        assert_eq!(FileSource::open("/nowhere").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error_and_never_zeros() {
        crate::support::require!();
        for sparse in [false, true] {
            let file = file(3 * BLOCK);
            let source = FileSource::new(file.try_clone().unwrap()).unwrap().sparse(sparse);
            file.set_len(BLOCK as u64 + 10).unwrap();
            assert_eq!(check(&source, byte, 0, BLOCK), PageData::Data);
            for offset in [BLOCK, BLOCK + 9, BLOCK + 10, 2 * BLOCK, 3 * BLOCK - 1] {
                let error = source.read(offset as u64, &mut vec![0; BLOCK]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset}");
                assert!(error.get_ref().is_none(), "nothing is allocated");
                assert_eq!(source.zeros(offset as u64), 0, "{offset}");
            }
            // What is beyond is zero as before.
            assert_eq!(check(&source, byte, 3 * BLOCK, 4096), PageData::Zero);
        }
    }

    #[test]
    fn a_hole_that_became_shorter_is_zero_up_to_the_end_alone() {
        crate::support::require!();
        let file = File::from(memfd_of_bytes(0, 0));
        file.set_len(4 * BLOCK as u64).unwrap();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(source.zeros(0), u64::MAX);
        file.set_len(BLOCK as u64 + 10).unwrap();
        // After a change the hole is read.
        assert_eq!(source.zeros(10), 0);
        assert_eq!(check(&source, |_| 0, 0, BLOCK), PageData::Zero);
        let error = source.read(BLOCK as u64, &mut [0; 11]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    /// Data in blocks 1 and 2 of five, and 5 bytes in a sixth.
    fn sparse_file() -> File {
        let file = File::from(memfd_of_bytes(0, 0));
        file.write_all_at(&(BLOCK..3 * BLOCK).map(byte).collect::<Vec<_>>(), BLOCK as u64).unwrap();
        file.write_all_at(&[9; 5], 5 * BLOCK as u64).unwrap();
        file
    }

    fn sparse_byte(at: usize) -> u8 {
        match at / BLOCK {
            1 | 2 => byte(at),
            5 => 9,
            _ => 0,
        }
    }

    #[test]
    fn holes_are_zero_without_being_read() {
        crate::support::require!();
        let source = FileSource::new(sparse_file()).unwrap();
        for (block, expected) in [
            (0, PageData::Zero),
            (1, PageData::Data),
            (2, PageData::Data),
            (3, PageData::Zero),
            (4, PageData::Zero),
            (5, PageData::Data),
            (6, PageData::Zero),
        ] {
            assert_eq!(check(&source, sparse_byte, block * BLOCK, BLOCK), expected, "{block}");
        }
        // A hole that covers a part of what is read.
        for offset in [BLOCK / 2, 2 * BLOCK + BLOCK / 2, 4 * BLOCK + 1] {
            assert_eq!(check(&source, sparse_byte, offset, BLOCK), PageData::Data, "{offset}");
        }
        assert_eq!(source.zeros(0), BLOCK as u64);
        assert_eq!(source.zeros(7), BLOCK as u64 - 7);
        assert_eq!(source.zeros(BLOCK as u64), 0);
        assert_eq!(source.zeros(3 * BLOCK as u64), 2 * BLOCK as u64);
        assert_eq!(source.zeros(5 * BLOCK as u64), 0);
        assert_eq!(source.zeros(5 * BLOCK as u64 + 5), u64::MAX);
    }

    #[test]
    fn holes_are_read_where_they_are_not_looked_for() {
        crate::support::require!();
        let source = FileSource::new(sparse_file()).unwrap().sparse(false);
        for block in 0..6 {
            check(&source, sparse_byte, block * BLOCK, BLOCK);
            assert_eq!(source.hole_at((block * BLOCK) as u64, || panic!("it isn't asked for")), 0, "{block}");
        }
        assert_eq!(source.zeros(0), 0);
    }

    #[test]
    fn a_hole_up_to_the_end_of_a_window_is_all_that_follows() {
        crate::support::require!();
        // Block 1 is data, 3 and 4 are holes; the window ends inside of block 4.
        let len = 4 * BLOCK - BLOCK / 2;
        let source = FileSource::range(sparse_file(), BLOCK as u64, len as u64).unwrap();
        assert_eq!(source.zeros(2 * BLOCK as u64), u64::MAX);
        assert_eq!(check(&source, |at| sparse_byte(BLOCK + at), 3 * BLOCK, BLOCK), PageData::Zero);
        assert_eq!(check(&source, |at| sparse_byte(BLOCK + at), BLOCK, BLOCK), PageData::Data);
    }

    #[test]
    fn a_hole_that_is_written_later_is_data() {
        crate::support::require!();
        let file = sparse_file();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(check(&source, sparse_byte, 0, BLOCK), PageData::Zero);
        file.write_all_at(&[byte(10)], 10).unwrap();
        let written = |at| if at == 10 { byte(10) } else { sparse_byte(at) };
        assert_eq!(check(&source, written, 0, BLOCK), PageData::Data);
    }

    #[test]
    fn a_file_system_that_knows_no_holes_has_none() {
        crate::support::require!();
        // Files without a single block, and yet with content: one supports SEEK_DATA, one refuses it.
        for path in ["/sys/kernel/notes", "/proc/config.gz"] {
            let Ok(content) = fs::read(path) else { continue };
            let source = FileSource::open(path).unwrap();
            assert_eq!(source.len(), Some(content.len() as u64), "{path}");
            let mut buffer = vec![0xee; content.len() + 100];
            assert_eq!(source.read(0, &mut buffer).unwrap(), PageData::Data, "{path}");
            assert!(buffer[..content.len()] == content && buffer[content.len()..] == [0; 100], "{path}");
            assert_eq!(source.zeros(0), 0, "{path}");
        }
        // Neither a hole nor anything else can be looked for in a file that refuses lseek(2).
        assert!(Holes::find(&socket(), 0..100).is_none());
    }

    #[test]
    fn a_huge_file_is_read_at_its_end() {
        crate::support::require!();
        let file = File::from(memfd_of_bytes(0, 0));
        let len = (1 << 43) + 5000;
        file.set_len(len).unwrap();
        file.write_all_at(b"end", len - 3).unwrap();
        let source = FileSource::new(file).unwrap();
        let mut page = [0xee; 4096];
        assert_eq!(source.read(len - 10, &mut page).unwrap(), PageData::Data);
        assert_eq!(page[..12], *b"\0\0\0\0\0\0\0end\0\0");
        assert!(source.zeros(0) > 1 << 42 && source.zeros(0) < len);
        assert_eq!(source.read(1 << 42, &mut page).unwrap(), PageData::Zero);
    }

    #[test]
    fn concurrent_reads_do_not_disturb_each_other() {
        crate::support::require!();
        let source = FileSource::new(sparse_file()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let source = &source;
                scope.spawn(move || {
                    for step in 0..500 {
                        let offset = (thread * 7 + step * 13) % 60 * (BLOCK / 10);
                        check(source, sparse_byte, offset, 4096);
                    }
                });
            }
        });
    }

    #[test]
    fn files_that_tell_no_length_are_refused() {
        require!();
        for path in ["/proc/self/status", "/proc/cpuinfo"] {
            let error = FileSource::open(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}");
            assert_eq!(error.to_string(), "a file that doesn't tell its length");
        }
    }

    #[test]
    fn offset_of_the_file_is_left_alone() {
        require!();
        let mut file = sparse_file();
        file.seek(SeekFrom::Start(17)).unwrap();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        assert!(source.holes.is_some());
        check(&source, sparse_byte, BLOCK, BLOCK);
        assert_eq!((source.zeros(0), source.zeros(3 * BLOCK as u64)), (BLOCK as u64, 2 * BLOCK as u64));
        assert_eq!(file.stream_position().unwrap(), 17);
    }

    #[test]
    fn allocated_holes_are_data_once_written() {
        require!();
        let file = File::from(memfd_of_bytes(0, 0));
        file.set_len(4 * BLOCK as u64).unwrap();
        sys::allocate(file.as_fd(), BLOCK as u64, BLOCK).unwrap();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        file.write_all_at(&[7], BLOCK as u64).unwrap();
        assert_eq!(check(&source, |at| if at == BLOCK { 7 } else { 0 }, BLOCK, BLOCK), PageData::Data);
    }

    #[test]
    fn file_open_with_o_direct_is_read_to_its_odd_end() {
        require!();
        // Where such files are: not on every tmpfs.
        let path = std::env::current_exe().unwrap().with_extension(format!("{}.direct", std::process::id()));
        let len = 3 * 4096 + 123;
        fs::write(&path, (0..len).map(byte).collect::<Vec<_>>()).unwrap();
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
        fs::remove_file(&path).unwrap();
        let Ok(file) = direct else {
            crate::support::has(crate::support::test_name!(), "O_DIRECT", false);
            return;
        };
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        let mut pages = MmapOptions::new().len(4 * 4096).map_anon().unwrap();
        for (offset, size) in [(0, 4096), (3 * 4096, 4096), (0, 4 * 4096), (2 * 4096, 2 * 4096)] {
            pages.fill(0xee);
            assert_eq!(source.read(offset as u64, &mut pages[..size]).unwrap(), PageData::Data);
            let expected = (offset..offset + size).map(|at| if at < len { byte(at) } else { 0 });
            assert!(pages[..size].iter().copied().eq(expected), "{size} at {offset}");
        }
        // To memory that isn't aligned, and by an odd window.
        for offset in [0, 1, 4095, len - 1] {
            check(&source, byte, offset, 5000);
        }
        let part = FileSource::range(file, 1000, 8000).unwrap();
        check(&part, |at| byte(1000 + at), 0, 4096);
        check(&part, |at| byte(1000 + at), 4096, 4096);
    }

    #[test]
    fn zeros_that_were_read_are_zero_and_a_single_byte_is_data() {
        require!();
        let file = File::from(memfd_of_bytes(0, 0));
        file.write_all_at(&vec![0; 3 * 4096], 0).unwrap();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        for (offset, len) in [(0, 4096), (4096, 8192), (1, 4095), (8192, 4 * 4096), (0, 1), (3, 0)] {
            assert_eq!(check(&source, |_| 0, offset, len), PageData::Zero, "{len} at {offset}");
        }
        assert_eq!(source.zeros(0), 0);
        for at in [4096, 4351, 4352, 5000, 8191] {
            file.write_all_at(&[1], at).unwrap();
            let content = |offset| u8::from(offset as u64 == at);
            assert_eq!(check(&source, content, 4096, 4096), PageData::Data, "{at}");
            assert_eq!(check(&source, content, 0, 4096), PageData::Zero, "{at}");
            file.write_all_at(&[0], at).unwrap();
        }
    }

    /// A file of the machine's disk, that nothing else knows, and nothing of which is in the page cache. `None` where the
    /// kernel doesn't drop it.
    fn cold_file(len: usize) -> Option<File> {
        let path = std::env::temp_dir().join(format!("userfaultfd-cold-{}-{len}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        fs::remove_file(path).unwrap();
        file.write_all_at(&(0..len).map(byte).collect::<Vec<_>>(), 0).unwrap();
        file.sync_all().unwrap();
        sys::advise(file.as_fd(), 0, 0, libc::POSIX_FADV_DONTNEED).unwrap();
        let cached = Cached::new(&file);
        (0..len).step_by(4096).all(|at| !cached.has(at)).then_some(file)
    }

    /// Which pages of a file are in the page cache, without a look that reads them: preadv2(2) with RWF_NOWAIT has the
    /// kernel begin to read what isn't there.
    struct Cached(memmap2::MmapRaw);

    impl Cached {
        fn new(file: &File) -> Self {
            Self(MmapOptions::new().map_raw_read_only(file).unwrap())
        }

        fn has(&self, offset: usize) -> bool {
            let page = offset / crate::page_size() * crate::page_size();
            sys::is_resident(self.0.as_mut_ptr().wrapping_add(page).cast())
        }
    }

    #[test]
    fn a_small_read_of_a_cold_file_reads_what_is_around_it() {
        require!();
        const LEN: usize = 1 << 20;
        let Some(file) = cold_file(LEN) else {
            crate::support::has(
                crate::support::test_name!(),
                "a file system that drops and tells what is cached",
                false,
            );
            return;
        };
        let source = FileSource::new(file.try_clone().unwrap()).unwrap().advise(FileAdvice::Random).unwrap();
        let cached = Cached::new(&file);
        let is_cached = |at: usize| cached.has(at);
        // Left to the kernel, which was told to read nothing else.
        let source = source.read_size(0);
        check(&source, byte, 304 << 10, 4096);
        assert!(is_cached(304 << 10) && !is_cached(320 << 10) && !is_cached(288 << 10));
        let source = source.read_size(128 << 10);
        // The kernel reads on while the source returns. It may drop a page again, or have no memory for it: then the read is
        // made once more.
        let read_until_cached = |at: usize, len: usize, around: std::ops::Range<usize>| {
            let looks = std::cell::Cell::new(0);
            wait_until(|| {
                looks.set(looks.get() + 1);
                if looks.get() % 10_000 == 1 {
                    sys::advise(file.as_fd(), 0, 0, libc::POSIX_FADV_DONTNEED).unwrap();
                    check(&source, byte, at, len);
                }
                around.clone().step_by(4096).all(is_cached)
            });
        };
        read_until_cached(600 << 10, 4096, 512 << 10..640 << 10);
        assert!(!is_cached(448 << 10) && !is_cached(640 << 10));
        // Across the border of two blocks.
        read_until_cached((768 << 10) - 4096, 8192, 640 << 10..896 << 10);
        check(&source, byte, 0, LEN);
    }

    #[test]
    fn a_file_is_read_past_the_page_cache_if_asked() {
        require!();
        let Some(file) = cold_file(300_001) else {
            crate::support::has(
                crate::support::test_name!(),
                "a file system that drops and tells what is cached",
                false,
            );
            return;
        };
        let source = FileSource::new(file.try_clone().unwrap()).unwrap().direct(true);
        let Ok(source) = source else {
            crate::support::has(crate::support::test_name!(), "O_DIRECT", false);
            return;
        };
        for (offset, len) in [(0, 4096), (8192, 65_536), (298_000, 4096), (1, 5000), (300_000, 4096)] {
            check(&source, byte, offset, len);
        }
        let cached = Cached::new(&file);
        assert!((0..300_001).step_by(4096).all(|at| !cached.has(at)));
        // And back.
        let source = source.direct(false).unwrap();
        check(&source, byte, 0, 4096);
        assert!(cached.has(0));
    }

    #[test]
    fn advice_of_every_kind_is_taken() {
        require!();
        use FileAdvice::{DontNeed, Normal, Random, Sequential, WillNeed};
        for advice in [Normal, Sequential, Random, WillNeed, DontNeed] {
            let source = FileSource::range(file(20_000), 1, 10_000).unwrap().advise(advice).unwrap();
            check(&source, |at| byte(1 + at), 0, 12_000);
            FileSource::range(file(10), 5, 0).unwrap().advise(advice).unwrap();
        }
    }
}
