//! The page cache of a file, into which the content of a minor region is written.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use super::shared_image::SharedImage;
use crate::{Errno, sys};

/// The page cache of the memory's file: content is written to it, and mapped by CONTINUE.
pub(crate) enum Cache {
    /// That of an image, which has content before it is mapped: an offset of it.
    Image {
        image: Arc<SharedImage>,
        offset: u64,
    },
    File {
        file: File,
        offset: u64,
    },
    Mapping {
        mapping: MmapRaw,
        file: File,
        offset: u64,
    },
}

impl Cache {
    /// Makes the page cache of `len` bytes of a file, which is written to by a mapping if write(2) can't. An error of
    /// process_vm_writev(2): a filter of system calls keeps this process from it.
    pub(crate) fn new(file: File, offset: u64, len: usize, page_size: usize) -> io::Result<Self> {
        // hugetlbfs has no write(2), and write(2) to a file opened for appending writes behind its end.
        if page_size == crate::page_size() && !sys::is_appending(file.as_fd())? {
            return Ok(Self::File { file, offset });
        }
        let mapping = MmapOptions::new().len(len).offset(offset).map_raw(&file)?;
        sys::write_mapping(&mapping, 0, &[])?;
        Ok(Self::Mapping { mapping, file, offset })
    }

    /// The image, and the number of its page with which the region begins.
    pub(crate) fn image(&self) -> Option<(&SharedImage, usize)> {
        match self {
            Self::Image { image, offset } => Some((image, *offset as usize / crate::page_size())),
            _ => None,
        }
    }

    /// The file, and the offset of the region's first byte in it.
    fn place(&self) -> (&File, u64) {
        match self {
            Self::File { file, offset } | Self::Mapping { file, offset, .. } => (file, *offset),
            Self::Image { image, offset } => (image.file(), *offset),
        }
    }

    /// Makes the page cache hold a range of the region's bytes: present pages stay, missing ones become zero. Behind the
    /// end of the file, where an access raises SIGBUS, the file gets no longer.
    pub(crate) fn allocate(&self, at: usize, len: usize) -> Result<(), Errno> {
        let (file, offset) = self.place();
        sys::allocate(file.as_fd(), offset + at as u64, len)
    }

    /// Reads bytes of the region, as the file has them. `UnexpectedEof`: it ends before.
    pub(crate) fn read(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        let (file, offset) = self.place();
        file.read_exact_at(bytes, offset + at as u64)
    }

    /// Drops whole pages from the file: a hole is there then.
    pub(crate) fn punch(&self, at: usize, len: usize) -> Result<(), Errno> {
        let (file, offset) = self.place();
        sys::punch_hole(file.as_fd(), offset + at as u64, len as u64)
    }

    /// Writes content to a byte of the region. `EIO`: the file ends before it. The file may be of a process that means harm.
    pub(crate) fn write(&self, at: usize, content: &[u8]) -> io::Result<()> {
        match self {
            Self::File { file, offset } => file.write_all_at(content, offset + at as u64),
            // Zeros where zeros are: all else was written by the image.
            Self::Image { image, offset } => Ok(image.write(offset + at as u64, content)?),
            Self::Mapping { mapping, .. } => {
                // Where no huge page is left, writing fails as behind the end of the file.
                self.allocate(at, content.len())?;
                sys::write_mapping(mapping, at, content).map_err(|errno| match errno {
                    Errno::EFAULT => Errno::EIO.into(),
                    errno => errno.into(),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::memory::{Kind, Memory};
    use crate::support::{require, test_name};

    #[test]
    fn write_behind_the_end_of_the_file_is_an_error() {
        require!();
        for kind in [Kind::Memfd, Kind::Hugetlb] {
            let Some(memory) = Memory::try_new(test_name!(), kind, 3) else { continue };
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(memory.file()));
            let (page, whole) = (memory.page(), File::from(memory.file().try_clone().unwrap()));
            // One that is cut off later, and one that was from the start.
            for cut_before in [false, true] {
                let file = File::options().read(true).append(true).open(&path).unwrap();
                let cut = || whole.set_len(page as u64).unwrap();
                whole.set_len(3 * page as u64).unwrap();
                if cut_before {
                    cut();
                }
                let cache = Cache::new(file, 0, 3 * page, page).unwrap();
                assert!(matches!(cache, Cache::Mapping { .. }));
                cut();
                cache.write(0, &vec![5; page]).unwrap();
                // Also of what only begins before the end.
                for (at, len) in [(2 * page, page), (page, page), (0, 2 * page)] {
                    // A huge page that is allocated behind the end is there.
                    match cache.write(at, &vec![6; len]) {
                        Ok(()) => assert!(kind.is_hugetlb(), "{at}"),
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}"),
                    }
                }
                cache.write(0, &vec![7; page]).unwrap();
                assert_eq!(memory.read(0), 7);
            }
        }
    }

    #[test]
    fn allocate_keeps_what_the_page_cache_has() {
        require!();
        for kind in [Kind::Memfd, Kind::Hugetlb] {
            let Some(memory) = Memory::try_new(test_name!(), kind, 3) else { continue };
            let page = memory.page();
            memory.write(1, 7);
            let file = File::from(memory.file().try_clone().unwrap());
            let blocks = |file: &File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
            let before = blocks(&file);
            let cache = Cache::File { file: file.try_clone().unwrap(), offset: page as u64 };
            cache.allocate(0, page).unwrap();
            assert_eq!((memory.read(1), blocks(&file)), (7, before), "{kind:?}");
            cache.allocate(page, page).unwrap();
            assert!(blocks(&file) > before, "{kind:?}");
            assert_eq!((memory.read(1), memory.read(2)), (7, 0), "{kind:?}");
            let len = file.metadata().unwrap().len();
            cache.allocate(2 * page, page).unwrap();
            assert_eq!(file.metadata().unwrap().len(), len, "{kind:?}");
        }
    }
}
