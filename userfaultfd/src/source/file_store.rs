//! A file that is written back to.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::store::within;
use super::{FileSource, PageData, PageSource, PageStore, invalid};
use crate::{Errno, sys};

/// Bytes of the blocks in which a file with O_DIRECT is written: what devices and file systems ask for at most.
const BLOCK_BYTES: usize = 4096;

/// A file or a part of it as a store: a regular file or a block device.
///
/// It is read as [`FileSource`] reads, holes too, and written with pwrite(2) and fdatasync(2).
///
/// ```
/// use userfaultfd::pager::{FileStore, PageSource, PageStore};
///
/// let path = std::env::temp_dir().join(format!("store-{}", std::process::id()));
/// std::fs::write(&path, [1; 10_000])?;
/// let store = FileStore::open(&path)?;
/// store.write(4096, &[2; 4096])?;
/// store.sync()?;
/// assert_eq!(std::fs::read(&path)?[4095..4097], [1, 2]);
/// // What would change the length is refused.
/// assert!(store.write(8192, &[3; 4096]).is_err());
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// - **Length**: the length at creation, which writes don't change. Where the file has another length since, each write and
///   sync fails with an error that has both: of the kind [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if it became
///   shorter, [`InvalidData`](io::ErrorKind::InvalidData) if it has grown. A part of a file ([`range`](Self::range)) allows
///   growth. A change of the length between that look and the write isn't noticed.
/// - **Other processes** that write the same file: a page that one of them writes is seen here once it is read anew, and
///   the page that is written last remains, whole. Nothing tells either of the other; lock the file (flock(2)).
/// - **`O_DIRECT`**: [`direct`](Self::direct). Where the end of the file isn't the end of a block, the last one is written
///   through the page cache.
#[derive(Debug)]
pub struct FileStore {
    source: FileSource,
    /// What is written: with O_DIRECT, if that was asked for.
    file: File,
    /// The same file without O_DIRECT, where `file` has it.
    buffered: Option<File>,
    /// The offset in the file of the store's offset 0.
    start: u64,
    len: u64,
    /// The length that the file must have; `None` for a part of a file, and a device.
    whole: Option<u64>,
    is_device: bool,
}

impl FileStore {
    /// Opens a file for reading and writing.
    ///
    /// # Errors
    ///
    /// Those of open(2): `EACCES`, `EROFS` for a file that is read-only; and those of [`new`](Self::new).
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(File::options().read(true).write(true).open(path)?)
    }

    /// Wraps an open file.
    ///
    /// # Errors
    ///
    /// Those of [`FileSource::new`], and of the kind [`PermissionDenied`](io::ErrorKind::PermissionDenied): the file
    /// isn't open for writing; [`InvalidInput`](io::ErrorKind::InvalidInput): it is open with `O_APPEND`.
    pub fn new(file: File) -> io::Result<Self> {
        Self::within(file, None)
    }

    /// Wraps `len` bytes of an open file from byte `offset` on.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), and of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the file ends before
    /// `offset + len`.
    pub fn range(file: File, offset: u64, len: u64) -> io::Result<Self> {
        Self::within(file, Some((offset, len)))
    }

    fn within(file: File, part: Option<(u64, u64)>) -> io::Result<Self> {
        if !sys::is_writable(file.as_fd())? {
            let text = "the file isn't open for writing";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        if sys::is_appending(file.as_fd())? {
            return Err(invalid("the file is open for appending: writes would go to its end".into()));
        }
        let is_device = file.metadata()?.file_type().is_block_device();
        let read = file.try_clone()?;
        let source = match part {
            None => FileSource::new(read)?,
            Some((offset, len)) => FileSource::range(read, offset, len)?,
        };
        // Holes become data.
        let source = source.sparse(false);
        let (_, start, len) = source.window();
        let whole = (part.is_none() && !is_device).then_some(len);
        Ok(Self { source, file, buffered: None, start, len, whole, is_device })
    }

    /// Reads and writes past the page cache (`true`), with `O_DIRECT`: for content that is in memory once, where the pager
    /// put it, and not twice. Opens the file once more, by `/proc/self/fd`. A write is durable only after a
    /// [`sync`](PageStore::sync) all the same.
    ///
    /// # Errors
    ///
    /// Those of open(2): `EINVAL` where the file system has no such access. Of the kind
    /// [`InvalidInput`](io::ErrorKind::InvalidInput): the store doesn't begin at a multiple of 4096 bytes of the file.
    pub fn direct(mut self, direct: bool) -> io::Result<Self> {
        if direct && self.start % BLOCK_BYTES as u64 != 0 {
            return Err(invalid(format!("direct access to a store from byte {} of its file on", self.start)));
        }
        self.source = self.source.direct(direct)?;
        match (direct, self.buffered.take()) {
            (true, None) => {
                let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
                self.buffered = Some(std::mem::replace(&mut self.file, file));
            }
            (false, Some(buffered)) => self.file = buffered,
            (_, buffered) => self.buffered = buffered,
        }
        Ok(self)
    }

    /// Looks whether the file has the length that it had.
    fn check_len(&self) -> io::Result<()> {
        if self.is_device {
            return Ok(());
        }
        let now = sys::file_stamp(self.file.as_fd())?.len;
        let expected = self.whole.unwrap_or(self.start + self.len);
        let (kind, how) = if now < expected {
            (io::ErrorKind::UnexpectedEof, "become shorter")
        } else if self.whole.is_some_and(|whole| now > whole) {
            (io::ErrorKind::InvalidData, "grown")
        } else {
            return Ok(());
        };
        Err(io::Error::new(kind, format!("the file has {how}: {now} bytes, and had {expected}")))
    }
}

impl PageSource for FileStore {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.source.read(offset, page)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.source.zeros(offset)
    }
}

impl PageStore for FileStore {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        within(self.len, offset, bytes)?;
        self.check_len()?;
        let at = self.start + offset;
        let Some(buffered) = &self.buffered else { return self.file.write_all_at(bytes, at) };
        let is_whole = |number: usize| number % BLOCK_BYTES == 0;
        let (blocks, rest) = match is_whole(bytes.as_ptr().addr()) && at % BLOCK_BYTES as u64 == 0 {
            true => bytes.split_at(bytes.len() - bytes.len() % BLOCK_BYTES),
            false => (&[][..], bytes),
        };
        self.file.write_all_at(blocks, at)?;
        if rest.is_empty() { Ok(()) } else { buffered.write_all_at(rest, at + blocks.len() as u64) }
    }

    fn sync(&self) -> io::Result<()> {
        self.check_len()?;
        loop {
            match self.file.sync_data() {
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;
    use std::path::PathBuf;

    use super::*;
    use crate::support::mapping::memfd_of_bytes;
    use crate::support::require;

    fn filled(len: usize) -> File {
        let file = File::from(memfd_of_bytes(0, 0));
        file.write_all_at(&vec![1; len], 0).unwrap();
        file
    }

    struct Named(PathBuf);

    impl Drop for Named {
        fn drop(&mut self) {
            fs::remove_file(&self.0).unwrap();
        }
    }

    /// A file where a build has its files, which is a disk more often than the temporary folder is.
    fn named(name: &str, len: usize) -> Named {
        let dir = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let path = dir.join(format!("{name}-{}", std::process::id()));
        fs::write(&path, vec![1; len]).unwrap();
        Named(path)
    }

    #[test]
    fn what_is_written_is_read_and_in_the_file() {
        require!();
        let file = filled(10_000);
        let store = FileStore::range(file.try_clone().unwrap(), 1000, 9000).unwrap();
        store.write(5000, &[2; 4000]).unwrap();
        store.sync().unwrap();
        let mut page = [0xee; 4096];
        assert_eq!(store.read(4999, &mut page).unwrap(), PageData::Data);
        assert_eq!((page[0], page[1], page[4000], page[4001]), (1, 2, 2, 0));
        let mut bytes = [0; 10_000];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..6000].iter().all(|byte| *byte == 1) && bytes[6000..].iter().all(|byte| *byte == 2));
        for offset in [5001, 9000, u64::MAX] {
            assert_eq!(store.write(offset, &[2; 4000]).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn hole_that_was_written_is_read() {
        require!();
        let file = File::from(memfd_of_bytes(0, 0));
        file.set_len(1 << 20).unwrap();
        let store = FileStore::new(file).unwrap();
        let mut page = [0xee; 4096];
        assert_eq!(store.read(1 << 19, &mut page).unwrap(), PageData::Zero);
        store.write(1 << 19, &[7; 4096]).unwrap();
        assert_eq!(store.read(1 << 19, &mut page).unwrap(), PageData::Data);
        assert_eq!(page, [7; 4096]);
    }

    #[test]
    fn file_of_another_length_is_refused_by_both() {
        require!();
        let file = filled(8192);
        let (whole, part) = (
            FileStore::new(file.try_clone().unwrap()).unwrap(),
            FileStore::range(file.try_clone().unwrap(), 0, 8192).unwrap(),
        );
        let page = [3; 4096];
        file.set_len(8193).unwrap();
        for error in [whole.write(0, &page).unwrap_err(), whole.sync().unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::InvalidData);
            assert_eq!(error.to_string(), "the file has grown: 8193 bytes, and had 8192");
        }
        part.write(0, &page).unwrap();
        file.set_len(8191).unwrap();
        for store in [&whole, &part] {
            for error in [store.write(0, &page).unwrap_err(), store.sync().unwrap_err()] {
                assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
                assert_eq!(error.to_string(), "the file has become shorter: 8191 bytes, and had 8192");
            }
        }
        file.set_len(8192).unwrap();
        whole.write(4096, &page).unwrap();
        whole.sync().unwrap();
    }

    #[test]
    fn file_that_cannot_be_written_is_refused_by_name() {
        require!();
        let name = named("file-store-refused", 4096);
        let read_only = FileStore::new(File::open(&name.0).unwrap()).unwrap_err();
        assert_eq!(read_only.kind(), ErrorKind::PermissionDenied, "{read_only}");
        let appending = File::options().read(true).append(true).open(&name.0).unwrap();
        assert_eq!(FileStore::new(appending).unwrap_err().kind(), ErrorKind::InvalidInput);
        let write_only = File::options().write(true).open(&name.0).unwrap();
        assert_eq!(FileStore::new(write_only).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let beyond = File::options().read(true).write(true).open(&name.0).unwrap();
        assert_eq!(FileStore::range(beyond, 1, 4096).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(FileStore::open("/no/such/file").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn direct_store_writes_blocks_and_what_is_less() {
        require!();
        let name = named("file-store-direct", 3 * 4096 + 100);
        let store = match FileStore::open(&name.0).unwrap().direct(true) {
            Ok(store) => store,
            Err(error) => {
                let expected = error.raw_os_error() == Some(libc::EINVAL);
                assert!(expected && !crate::support::has(crate::support::test_name!(), "O_DIRECT", false));
                return;
            }
        };
        let mut buffer = memmap2::MmapMut::map_anon(3 * 4096).unwrap();
        buffer.fill(2);
        store.write(4096, &buffer[..2 * 4096 + 100]).unwrap();
        // From where no block begins.
        store.write(0, &buffer[1..101]).unwrap();
        store.sync().unwrap();
        let expected: Vec<u8> =
            (0..3 * 4096 + 100).map(|at| if (100..4096).contains(&at) { 1 } else { 2 }).collect();
        assert!(fs::read(&name.0).unwrap() == expected);
        assert_eq!(store.read(3 * 4096, &mut buffer[..4096]).unwrap(), PageData::Data);
        assert_eq!((buffer[99], buffer[100]), (2, 0));
        let store = store.direct(false).unwrap();
        store.write(0, &[5; 10]).unwrap();
        assert_eq!(fs::read(&name.0).unwrap()[9..11], [5, 2]);
        let part = File::options().read(true).write(true).open(&name.0).unwrap();
        let unaligned = FileStore::range(part, 512, 4096).unwrap().direct(true).unwrap_err();
        assert_eq!(unaligned.kind(), ErrorKind::InvalidInput, "{unaligned}");
    }
}
