//! A file, copied from where it is mapped.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use super::{FileSource, PageData, PageSource, SourceBytes, invalid};

/// A file, or a part of it, that is mapped into memory: the kernel copies pages from the mapping into place, without a
/// buffer in between.
///
/// ```
/// use userfaultfd::pager::{MappedFileSource, PageSource};
///
/// let program = MappedFileSource::open(std::env::current_exe()?)?;
/// assert_eq!(program.bytes(0, 4096).map(|bytes| bytes.len()), Some(4096));
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// It takes as much address space as the file is long. The kernel reads pages that aren't in the page cache when it
/// copies them, with the read-ahead of mappings. Holes, and a last page that the file doesn't fill, are
/// [read](Self::read) as from a [`FileSource`], whose rules about lengths, holes and changes hold here, too.
///
/// A file that has become shorter is an error here, too: fstat(2) checks the length before each copy, and the kernel
/// reports pages that are gone when it copies (`EFAULT`). One case can't be noticed: if a file is cut off inside a page
/// between the check and the copy, that page ends with zeros.
#[derive(Debug)]
pub struct MappedFileSource {
    file: FileSource,
    map: MmapRaw,
}

impl MappedFileSource {
    /// Opens and maps a file.
    ///
    /// # Errors
    ///
    /// Those of open(2), and those of [`new`](Self::new).
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// Maps all of an open file.
    ///
    /// # Errors
    ///
    /// Those of [`FileSource::new`] and mmap(2). Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the file
    /// is longer than the address space.
    pub fn new(file: File) -> io::Result<Self> {
        Self::map(FileSource::new(file)?)
    }

    /// Maps `len` bytes of an open file from `offset` on, both of any size.
    ///
    /// # Errors
    ///
    /// Those of [`FileSource::range`] and [`new`](Self::new).
    pub fn range(file: File, offset: u64, len: u64) -> io::Result<Self> {
        Self::map(FileSource::range(file, offset, len)?)
    }

    /// Looks for holes now, or forgets them: see [`FileSource::sparse`].
    #[must_use]
    pub fn sparse(self, sparse: bool) -> Self {
        Self { file: self.file.sparse(sparse), ..self }
    }

    fn map(source: FileSource) -> io::Result<Self> {
        let (file, start, len) = source.window();
        let too_long = |_| invalid(format!("{len} bytes to map are more than the address space has"));
        let map = MmapOptions::new()
            .offset(start)
            .len(isize::try_from(len).map_err(too_long)?.unsigned_abs())
            .map_raw_read_only(file)?;
        Ok(Self { file: source, map })
    }
}

impl PageSource for MappedFileSource {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.file.read(offset, page)
    }

    fn len(&self) -> Option<u64> {
        self.file.len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.file.zeros(offset)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        let end = offset.checked_add(len as u64)?;
        // The last page of the mapping has zeros beyond the present end of the file.
        if Some(end) > self.file.len() || !self.file.has_data(offset, len as u64) {
            return None;
        }
        // Within the mapping, whose length is a usize.
        let start = NonNull::new(self.map.as_mut_ptr().wrapping_add(offset as usize))?;
        Some(SourceBytes { start, len, source: PhantomData })
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::source::model::copied;
    use crate::support::mapping::memfd_of_bytes;

    fn file(len: usize) -> File {
        let file = File::from(memfd_of_bytes(0, 0));
        let bytes: Vec<u8> = (0..len).map(|at| (at % 251 + 1) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file
    }

    #[test]
    fn every_border_of_a_mapped_file() {
        crate::support::require!();
        for (start, len) in [(0, 20_000), (1, 19_999), (4096, 10_000), (5000, 1), (70_000, 30_000)] {
            let content: Vec<u8> = (start..start + len).map(|at| (at % 251 + 1) as u8).collect();
            let source = MappedFileSource::range(file(100_000), start as u64, len as u64).unwrap();
            assert_eq!(source.len(), Some(len as u64));
            for offset in [0, 1, 4095, 4096, 8192, len - 1, len, len + 1] {
                for size in [1, 4096, 8192] {
                    let here = source.bytes(offset as u64, size);
                    assert_eq!(here.is_some(), offset + size <= len, "{size} at {offset} of {start}, {len}");
                    let Some(here) = here else { continue };
                    assert_eq!(copied(here).unwrap(), content[offset..offset + size]);
                }
                let rest = &content[offset.min(len)..];
                let mut page = [0xee; 4096];
                let inside = rest.len().min(page.len());
                let fill = source.read(offset as u64, &mut page).unwrap();
                assert_eq!(fill == PageData::Zero, inside == 0);
                if fill == PageData::Data {
                    assert_eq!(page[..inside], rest[..inside]);
                    assert!(page[inside..].iter().all(|byte| *byte == 0));
                }
            }
            assert!(source.bytes(u64::MAX, 1).is_none());
            assert!(source.bytes(u64::MAX - 1, 4096).is_none());
            assert_eq!((source.zeros(0), source.zeros(len as u64)), (0, u64::MAX));
        }
    }

    #[test]
    fn an_empty_file_can_be_mapped() {
        crate::support::require!();
        let source = MappedFileSource::new(file(0)).unwrap();
        assert!(source.is_empty() && source.bytes(0, 1).is_none());
        assert_eq!(source.read(0, &mut [1; 4096]).unwrap(), PageData::Zero);
    }

    #[test]
    fn holes_are_zeros_and_not_copied() {
        crate::support::require!();
        const BLOCK: usize = 1 << 18;
        let file = file(2 * BLOCK);
        file.set_len(4 * BLOCK as u64).unwrap();
        let source = MappedFileSource::new(file).unwrap();
        assert!(source.bytes(BLOCK as u64, BLOCK).is_some());
        assert!(source.bytes(2 * BLOCK as u64, BLOCK).is_none());
        assert_eq!(source.read(2 * BLOCK as u64, &mut vec![1; BLOCK]).unwrap(), PageData::Zero);
        assert_eq!(source.zeros(3 * BLOCK as u64), u64::MAX);
        let source = source.sparse(false);
        assert_eq!(copied(source.bytes(2 * BLOCK as u64, BLOCK).unwrap()).unwrap(), [0; BLOCK]);
    }

    #[test]
    fn a_file_that_became_shorter_is_read_for_an_error() {
        crate::support::require!();
        let file = file(100_000);
        let source = MappedFileSource::new(file.try_clone().unwrap()).unwrap();
        let early = source.bytes(80_000, 4096).unwrap();
        file.set_len(10_000).unwrap();
        // The page that the file now ends in has zeros in the mapping.
        for offset in [8192, 9999, 10_000, 80_000] {
            assert!(source.bytes(offset, 4096).is_none(), "{offset}");
            let error = source.read(offset, &mut [0; 4096]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset}");
        }
        assert!(source.bytes(4096, 4096).is_some());
        // What was handed out before is an error of the copy.
        assert_eq!(copied(early).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_at_once() {
        crate::support::require!();
        let error = MappedFileSource::range(file(10), 5, 6).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(MappedFileSource::open("/").unwrap_err().raw_os_error(), Some(libc::EISDIR));
        let huge = File::from(memfd_of_bytes(0, 0));
        let len = if cfg!(target_pointer_width = "64") { i64::MAX as u64 & !0xffff } else { 1 << 43 };
        huge.set_len(len).unwrap();
        match MappedFileSource::new(huge) {
            // On s390x a process can have all addresses that there are.
            Ok(source) => assert_eq!((source.len(), size_of::<usize>()), (Some(len), 8)),
            Err(error) if cfg!(target_pointer_width = "64") => {
                assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{error}");
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}"),
        }
    }
}
