//! The page cache of a file, into which the content of a minor region is written.

#![expect(unsafe_code, reason = "writing to the mapping of a hugetlb file")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use memmap2::MmapRaw;

use crate::Errno;

/// The page cache of the memory's file: content is written to it, and mapped by CONTINUE.
pub(crate) enum Cache {
    File { file: File, offset: u64 },
    Mapping { mapping: MmapRaw, file: File, offset: u64 },
}

impl Cache {
    /// Makes the page cache hold a range of the region's bytes: present pages stay, missing ones become zero. Behind the
    /// end of the file, where an access raises SIGBUS, the file gets no longer.
    pub(crate) fn allocate(&self, at: usize, len: usize) -> Result<(), Errno> {
        let (Self::File { file, offset } | Self::Mapping { file, offset, .. }) = self;
        crate::sys::allocate(file.as_fd(), offset + at as u64, len)
    }

    /// Writes content to a byte of the region.
    pub(crate) fn write(&self, at: usize, content: &[u8]) -> io::Result<()> {
        match self {
            Self::File { file, offset } => file.write_all_at(content, offset + at as u64),
            Self::Mapping { mapping, .. } => {
                assert!(at + content.len() <= mapping.len(), "within the region");
                // Where no huge page is left, touching the mapping would be SIGBUS.
                self.allocate(at, content.len())?;
                // SAFETY: `at` is within the mapping, as has been asserted.
                let to = unsafe { mapping.as_mut_ptr().add(at) };
                // SAFETY: `content.len()` bytes from there on are mapped and writable, and the content lies elsewhere.
                // No reference points to them: the pages are mapped elsewhere only after this.
                unsafe { to.copy_from_nonoverlapping(content.as_ptr(), content.len()) };
                Ok(())
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
