//! A file, read with pread(2).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memmap2::MmapOptions;

use super::data_ranges::DataRanges;
use super::{PageData, PageSource, invalid};
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
/// - **`O_DIRECT`**: a file opened with it is read in whole blocks, also where its end isn't the end of a block.
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
                let source = Self { file, start, len, holes: None, is_device, is_direct };
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
            self.read_up_to(&mut page[..inside], inside, from)?;
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
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::UnixStream;
    use std::{fs, iter};

    use super::*;
    use crate::support::require;

    /// More than one block of every file system, whatever the page size.
    const BLOCK: usize = 1 << 18;

    /// A byte that depends on its offset.
    fn byte(offset: usize) -> u8 {
        (offset % 251 + 1) as u8
    }

    fn file(len: usize) -> File {
        let file = File::from(sys::memfd());
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
                assert!(page.iter().all(|byte| *byte == 0xee), "the buffer of zeros isn't touched");
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
        let file = File::from(sys::memfd());
        file.set_len(4 * BLOCK as u64).unwrap();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(source.zeros(0), u64::MAX);
        file.set_len(BLOCK as u64 + 10).unwrap();
        // After a change the hole is read.
        assert_eq!(source.zeros(10), 0);
        assert_eq!(check(&source, |_| 0, 0, BLOCK), PageData::Data);
        let error = source.read(BLOCK as u64, &mut [0; 11]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    /// Data in blocks 1 and 2 of five, and 5 bytes in a sixth.
    fn sparse_file() -> File {
        let file = File::from(sys::memfd());
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
            assert_eq!(check(&source, sparse_byte, block * BLOCK, BLOCK), PageData::Data, "{block}");
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
        let file = File::from(sys::memfd());
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
    fn reads_at_once_from_many_threads_do_not_disturb_each_other() {
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
    fn holes_that_were_allocated_in_advance_are_data_once_written() {
        require!();
        let file = File::from(sys::memfd());
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
}
