//! A file, read with pread(2).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Fill, PageSource, invalid};
use crate::{Errno, sys};

/// A file as a source, or a part of it: a regular file or a block device.
///
/// ```
/// use std::fs::File;
/// use userfaultfd::pager::{FileSource, Fill, PageSource};
///
/// let program = FileSource::open(std::env::current_exe()?)?;
/// let mut page = [0xff; 4096];
/// assert_eq!(program.read(0, &mut page)?, Fill::Data);
/// assert_eq!(&page[..4], b"\x7fELF");
///
/// // A window of three bytes. What lies beyond it is zero.
/// let part = FileSource::range(File::open(std::env::current_exe()?)?, 1, 3)?;
/// part.read(0, &mut page)?;
/// assert_eq!(&page[..4], b"ELF\0");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// - **Length**: that at creation. A file that grows is served up to there. Where it has become shorter, a read is
///   an error of the kind [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) that names the offset, and never zeros.
/// - **Holes** are [`Fill::Zero`] and aren't read. They are looked for, by one lseek(2) for each read, if the file
///   had fewer blocks than bytes at creation; [`sparse`](Self::sparse) decides otherwise. That moves the file's
///   offset, which duplicates of the descriptor share; reading depends on no offset.
/// - **Changes** of the content show in pages that are read afterwards.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    /// What part of the file: offset 0 of the source is here. `start + len` is an offset that a file can have.
    start: u64,
    len: u64,
    /// Whether to look for holes.
    sparse: bool,
}

impl FileSource {
    /// Opens a file for reading.
    ///
    /// # Errors
    ///
    /// Those of open(2), and those of [`new`](Self::new).
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// All of an open file.
    ///
    /// # Errors
    ///
    /// `EBADF`: the file isn't open for reading. `EISDIR`, `ESPIPE`: a directory, a pipe or a socket. Of the kind
    /// [`InvalidInput`](io::ErrorKind::InvalidInput): another file without a length.
    pub fn new(file: File) -> io::Result<Self> {
        Self::within(file, 0, None)
    }

    /// `len` bytes of an open file from `offset` on, both of any size.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), and one of the kind [`InvalidInput`](io::ErrorKind::InvalidInput) if the file
    /// hasn't all these bytes.
    pub fn range(file: File, offset: u64, len: u64) -> io::Result<Self> {
        Self::within(file, offset, Some(len))
    }

    /// Whether to look for holes: worth it if there are some.
    #[must_use]
    pub fn sparse(self, sparse: bool) -> Self {
        Self { sparse, ..self }
    }

    fn within(file: File, start: u64, len: Option<u64>) -> io::Result<Self> {
        // Reads nothing, but is refused where a read is.
        file.read_at(&mut [], 0)?;
        let metadata = file.metadata()?;
        let (file_len, sparse) = if metadata.is_file() {
            (metadata.len(), metadata.blocks().saturating_mul(512) < metadata.len())
        } else if metadata.file_type().is_block_device() {
            ((&file).seek(SeekFrom::End(0))?, false)
        } else {
            return Err(invalid("neither a regular file nor a block device".into()));
        };
        let rest = file_len.checked_sub(start);
        match (len.or(rest), rest) {
            (Some(len), Some(rest)) if len <= rest => Ok(Self { file, start, len, sparse }),
            _ => {
                let wanted = len.unwrap_or_default();
                Err(invalid(format!("{wanted} bytes at offset {start} of a file of {file_len} bytes")))
            }
        }
    }

    /// The file, and what part of it this is.
    pub(super) fn window(&self) -> (&File, u64, u64) {
        (&self.file, self.start, self.len)
    }

    /// Whether the file has become so short that the byte before `end` is gone. By lseek(2), which takes a third of
    /// fstat(2)'s time, and moves the offset.
    pub(super) fn lacks(&self, end: u64) -> bool {
        !(&self.file).seek(SeekFrom::End(0)).is_ok_and(|now| now >= self.start + end)
    }

    /// What to say of a read that found the end of the file.
    #[cold]
    fn became_shorter(&self, from: u64, len: usize) -> io::Error {
        let now = self.file.metadata().map_or_else(|error| error.to_string(), |now| now.len().to_string());
        let text = format!("reading {len} bytes at offset {from} of a file that became shorter: {now} bytes");
        io::Error::new(io::ErrorKind::UnexpectedEof, text)
    }
}

impl PageSource for FileSource {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<Fill> {
        let rest = self.len.saturating_sub(offset);
        let inside = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len()));
        if self.zeros(offset) >= inside as u64 {
            return Ok(Fill::Zero);
        }
        let (content, beyond) = page.split_at_mut(inside);
        let from = self.start + offset;
        self.file.read_exact_at(content, from).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.became_shorter(from, inside),
            _ => error,
        })?;
        beyond.fill(0);
        Ok(Fill::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }

    fn zeros(&self, offset: u64) -> u64 {
        if offset >= self.len {
            return u64::MAX;
        }
        if !self.sparse {
            return 0;
        }
        let (from, end) = (self.start + offset, self.start + self.len);
        let data = match sys::seek_data(self.file.as_fd(), from) {
            Ok(data) => data,
            // A hole up to the end of the file, which may have become shorter.
            Err(Errno::ENXIO) => self.file.metadata().map_or(from, |now| now.len()),
            // A file system that doesn't tell. What else may be wrong a read will tell.
            Err(_) => from,
        };
        if data >= end { u64::MAX } else { data.saturating_sub(from) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::{fs, iter};

    use super::*;

    /// More than one block of every file system, whatever the page size.
    const BLOCK: usize = 1 << 18;

    /// A byte that tells where it is.
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
    fn check(source: &FileSource, content: impl Fn(usize) -> u8, offset: usize, len: usize) -> Fill {
        let mut page = vec![0xee; len];
        let fill = source.read(offset as u64, &mut page).unwrap();
        let source_len = source.len().unwrap() as usize;
        let expected = (offset..offset + len).map(|at| if at < source_len { content(at) } else { 0 });
        match fill {
            Fill::Data => assert!(page.iter().copied().eq(expected), "{len} bytes at {offset}"),
            Fill::Zero => {
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
                    let expected = if offset < len { Fill::Data } else { Fill::Zero };
                    assert_eq!(check(&source, byte, offset, size), expected, "{size} at {offset} of {len}");
                }
            }
            for offset in [len as u64, len as u64 + 1, i64::MAX as u64, u64::MAX - 4096, u64::MAX] {
                let mut page = [0xee; 4096];
                assert_eq!(source.read(offset, &mut page).unwrap(), Fill::Zero, "{offset} of {len}");
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
        assert_eq!(check(&source, byte, 0, 4096), Fill::Zero);
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
                assert_eq!(fill == Fill::Data, offset < len, "{start} {len} {offset}");
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
            assert_eq!(check(&source, byte, 0, BLOCK), Fill::Data);
            for offset in [BLOCK, BLOCK + 9, BLOCK + 10, 2 * BLOCK, 3 * BLOCK - 1] {
                let error = source.read(offset as u64, &mut vec![0; BLOCK]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset}");
                let len = BLOCK.min(3 * BLOCK - offset);
                let text = format!(
                    "reading {len} bytes at offset {offset} of a file that became shorter: {} bytes",
                    BLOCK + 10
                );
                assert_eq!(error.to_string(), text);
                assert_eq!(source.zeros(offset as u64), 0, "{offset}");
            }
            // What is beyond is zero as before.
            assert_eq!(check(&source, byte, 3 * BLOCK, 4096), Fill::Zero);
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
        assert_eq!(source.zeros(10), BLOCK as u64);
        assert_eq!(check(&source, |_| 0, 0, BLOCK), Fill::Zero);
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
            (0, Fill::Zero),
            (1, Fill::Data),
            (2, Fill::Data),
            (3, Fill::Zero),
            (4, Fill::Zero),
            (5, Fill::Data),
            (6, Fill::Zero),
        ] {
            assert_eq!(check(&source, sparse_byte, block * BLOCK, BLOCK), expected, "{block}");
        }
        // A hole that covers a part of what is read.
        for offset in [BLOCK / 2, 2 * BLOCK + BLOCK / 2, 4 * BLOCK + 1] {
            assert_eq!(check(&source, sparse_byte, offset, BLOCK), Fill::Data, "{offset}");
        }
        assert_eq!(source.zeros(0), BLOCK as u64);
        assert_eq!(source.zeros(7), BLOCK as u64 - 7);
        assert_eq!(source.zeros(BLOCK as u64), 0);
        assert_eq!(source.zeros(3 * BLOCK as u64), 2 * BLOCK as u64);
        assert_eq!(source.zeros(5 * BLOCK as u64), 0);
        assert_eq!(source.zeros(5 * BLOCK as u64 + 5), u64::MAX);
    }

    #[test]
    fn holes_are_read_where_nobody_looks_for_them() {
        crate::support::require!();
        let source = FileSource::new(sparse_file()).unwrap().sparse(false);
        for block in 0..6 {
            assert_eq!(check(&source, sparse_byte, block * BLOCK, BLOCK), Fill::Data, "{block}");
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
        assert_eq!(check(&source, |at| sparse_byte(BLOCK + at), 3 * BLOCK, BLOCK), Fill::Zero);
        assert_eq!(check(&source, |at| sparse_byte(BLOCK + at), BLOCK, BLOCK), Fill::Data);
    }

    #[test]
    fn a_hole_that_is_written_later_is_data() {
        crate::support::require!();
        let file = sparse_file();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(check(&source, sparse_byte, 0, BLOCK), Fill::Zero);
        file.write_all_at(&[byte(10)], 10).unwrap();
        let written = |at| if at == 10 { byte(10) } else { sparse_byte(at) };
        assert_eq!(check(&source, written, 0, BLOCK), Fill::Data);
    }

    #[test]
    fn a_file_system_that_knows_no_holes_has_none() {
        crate::support::require!();
        // Files without a single block, and yet with content: one that answers SEEK_DATA, one that refuses it.
        for path in ["/sys/kernel/notes", "/proc/config.gz"] {
            let Ok(content) = fs::read(path) else { continue };
            let source = FileSource::open(path).unwrap();
            assert_eq!(source.len(), Some(content.len() as u64), "{path}");
            assert!(source.sparse, "{path}");
            let mut buffer = vec![0xee; content.len() + 100];
            assert_eq!(source.read(0, &mut buffer).unwrap(), Fill::Data, "{path}");
            assert!(buffer[..content.len()] == content && buffer[content.len()..] == [0; 100], "{path}");
            assert_eq!(source.zeros(0), 0, "{path}");
        }
        // Neither a hole nor anything else can be looked for in a file that refuses lseek(2).
        let refuses = FileSource { file: socket(), start: 0, len: 100, sparse: true };
        assert_eq!(refuses.zeros(0), 0);
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
        assert_eq!(source.read(len - 10, &mut page).unwrap(), Fill::Data);
        assert_eq!(page[..12], *b"\0\0\0\0\0\0\0end\0\0");
        assert!(source.zeros(0) > 1 << 42 && source.zeros(0) < len);
        assert_eq!(source.read(1 << 42, &mut page).unwrap(), Fill::Zero);
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
}
