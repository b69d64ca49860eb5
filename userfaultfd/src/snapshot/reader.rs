//! Reading a snapshot file: at once, or page by page as they are needed.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::format::{Extent, Footer, FormatError, HEADER, Header, Place, SnapshotId, decode_index};
use super::sink::Region;
use crate::pager::{Fill, PageSource};

/// A snapshot file that is read: a [`PageSource`], from which a pager restores memory as it is touched.
///
/// Opening it reads and checks all but the pages themselves. Each page is checked when it is read, so a damaged one is
/// an error of that page, and never wrong bytes.
pub struct SnapshotReader {
    file: File,
    header: Header,
    regions: Vec<Region>,
    extents: Vec<Extent>,
    /// Of all blocks of data, in order.
    checksums: Vec<u32>,
    /// How many checksums come before those of an extent.
    before: Vec<u64>,
    len: u64,
    parent: Option<Box<SnapshotReader>>,
}

impl SnapshotReader {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// [`FormatError`]: it can't be read, is no snapshot, of an unknown version, cut short, or damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        Self::new(File::open(path)?)
    }

    /// Reads an open file.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn new(file: File) -> Result<Self, FormatError> {
        let size = file.metadata()?.len();
        let mut bytes = [0; HEADER];
        if size < HEADER as u64 {
            let mut start = vec![0; size as usize];
            file.read_exact_at(&mut start, 0)?;
            let begun = !start.is_empty() && super::format::MAGIC.starts_with(&start[..start.len().min(8)]);
            return Err(if begun { FormatError::CutShort } else { FormatError::NotASnapshot });
        }
        file.read_exact_at(&mut bytes, 0)?;
        let header = Header::decode(&bytes)?;
        if size < header.block + HEADER as u64 {
            return Err(FormatError::CutShort);
        }
        file.read_exact_at(&mut bytes, size - HEADER as u64)?;
        let footer = Footer::decode(&bytes)?;
        if footer.id != header.id {
            return Err(FormatError::Damaged("its ends are of two snapshots"));
        }
        let len = footer.index_len();
        if len.and_then(|len| len.checked_add(footer.index)?.checked_add(HEADER as u64)) != Some(size) {
            return Err(FormatError::Damaged("its length"));
        }
        // As long as the file at most.
        let mut index = vec![0; len.unwrap_or(0) as usize];
        file.read_exact_at(&mut index, footer.index)?;
        if crc32fast::hash(&index) != footer.index_crc {
            return Err(FormatError::Damaged("its index"));
        }
        let (regions, extents, checksums) = decode_index(&index, &footer);
        let mut reader =
            Self { file, header, regions, extents, checksums, before: Vec::new(), len: 0, parent: None };
        reader.check(footer.index)?;
        Ok(reader)
    }

    /// Makes sure that the index is one: only a writer that is wrong makes another.
    fn check(&mut self, index: u64) -> Result<(), FormatError> {
        let damaged = FormatError::Damaged("its index makes no sense");
        let block = self.header.block;
        let mut len = 0u64;
        for region in &self.regions {
            let size = region.addresses.end.checked_sub(region.addresses.start);
            match size.filter(|size| size % block == 0).and_then(|size| len.checked_add(size)) {
                Some(sum) => len = sum,
                None => return Err(damaged),
            }
        }
        self.len = len;
        let (mut next, mut checksums) = (0, 0);
        for extent in &self.extents {
            self.before.push(checksums);
            let end = extent.first.checked_add(extent.blocks).filter(|end| *end <= len / block);
            let gap = extent.first > next && self.header.parent.is_none();
            let Some(end) = end.filter(|_| extent.first >= next && extent.blocks > 0 && !gap) else {
                return Err(damaged);
            };
            if let Place::Data(offset) = extent.place {
                let inside = extent.blocks.checked_mul(block).and_then(|size| offset.checked_add(size));
                if offset < block || offset % block != 0 || inside.is_none_or(|end| end > index) {
                    return Err(damaged);
                }
                checksums += extent.blocks;
            }
            next = end;
        }
        let whole = next == len / block || self.header.parent.is_some();
        if !whole || checksums != self.checksums.len() as u64 { Err(damaged) } else { Ok(()) }
    }

    /// Puts an incremental snapshot on top of the one that it follows, with what that one follows already in place.
    ///
    /// # Errors
    ///
    /// [`FormatError::WrongParent`]: it is another one, or of memory of another size.
    pub fn on(mut self, parent: SnapshotReader) -> Result<Self, FormatError> {
        let found = parent.id();
        if self.header.parent != Some(found) || self.len != parent.len {
            return Err(FormatError::WrongParent { expected: self.header.parent, found });
        }
        self.parent = Some(Box::new(parent));
        Ok(self)
    }

    /// The name of the snapshot.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.header.id
    }

    /// The snapshot that it follows, if it holds only what has changed since.
    #[must_use]
    pub fn parent(&self) -> Option<SnapshotId> {
        self.header.parent
    }

    /// The ranges of memory, in the order in which they lie in the snapshot.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of data in this file: without zeros, and what is in the snapshot that it follows.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.checksums.len() as u64 * self.header.block
    }

    /// Bytes of pages in this file that could not be told; reading them is an error.
    #[must_use]
    pub fn gone_len(&self) -> u64 {
        let gone = self.extents.iter().filter(|extent| extent.place == Place::Gone);
        gone.map(|extent| extent.blocks * self.header.block).sum()
    }

    /// Reads all of it, and those that it follows, to find what is damaged.
    ///
    /// # Errors
    ///
    /// [`FormatError::Damaged`], [`FormatError::NeedsParent`], [`FormatError::Io`]. Pages that are gone are none.
    pub fn verify(&self) -> Result<(), FormatError> {
        match (&self.parent, self.header.parent) {
            (None, Some(parent)) => return Err(FormatError::NeedsParent { parent }),
            (Some(parent), _) => parent.verify()?,
            (None, None) => {}
        }
        let mut bytes = vec![0; self.header.block as usize];
        for (extent, before) in self.extents.iter().zip(&self.before) {
            for block in 0..extent.blocks {
                if let Place::Data(offset) = extent.place {
                    self.read_blocks(offset, before + block, block, &mut bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Reads blocks from `block` of an extent on, whose data begin at `offset`, and checks them against the checksums
    /// from `checksum` on.
    fn read_blocks(
        &self,
        offset: u64,
        checksum: u64,
        block: u64,
        bytes: &mut [u8],
    ) -> Result<(), FormatError> {
        self.file.read_exact_at(bytes, offset + block * self.header.block)?;
        let blocks = bytes.chunks_exact(self.header.block as usize);
        let same = blocks
            .zip(&self.checksums[checksum as usize..])
            .all(|(bytes, sum)| crc32fast::hash(bytes) == *sum);
        if same { Ok(()) } else { Err(FormatError::Damaged("a page doesn't have its checksum")) }
    }

    /// Fills `bytes`, a whole number of blocks, with those from `first` on.
    fn read_whole(&self, first: u64, bytes: &mut [u8]) -> io::Result<Fill> {
        let block = self.header.block as usize;
        let (mut at, end) = (first, first + (bytes.len() / block) as u64);
        let mut all_zero = true;
        while at < end {
            let next = self.extents.partition_point(|extent| extent.first + extent.blocks <= at);
            let (place, until) = match self.extents.get(next) {
                Some(extent) if extent.first <= at => (Some(extent.place), extent.first + extent.blocks),
                Some(extent) => (None, extent.first),
                None => (None, end),
            };
            let until = until.min(end);
            let part = &mut bytes[(at - first) as usize * block..(until - first) as usize * block];
            let zero = match (place, &self.parent) {
                // Beyond the end there are zeros.
                (None, _) if at >= self.len / block as u64 => true,
                (None, Some(parent)) => parent.read(at * block as u64, part)? == Fill::Zero,
                (None, None) => return Err(self.without_parent()),
                (Some(Place::Zero), _) => true,
                (Some(Place::Gone), _) => {
                    let text = "the page was gone before the snapshot could save it";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                (Some(Place::Data(offset)), _) => {
                    let into = at - self.extents[next].first;
                    self.read_blocks(offset, self.before[next] + into, into, part).map_err(into_io)?;
                    false
                }
            };
            if zero {
                part.fill(0);
            }
            all_zero &= zero;
            at = until;
        }
        Ok(if all_zero { Fill::Zero } else { Fill::Data })
    }

    fn without_parent(&self) -> io::Error {
        match self.header.parent {
            Some(parent) => into_io(FormatError::NeedsParent { parent }),
            None => into_io(FormatError::Damaged("its index makes no sense")),
        }
    }
}

fn into_io(error: FormatError) -> io::Error {
    match error {
        FormatError::Io(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

impl PageSource for SnapshotReader {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<Fill> {
        let block = self.header.block;
        let len = page.len() as u64;
        if offset % block == 0 && len % block == 0 {
            return self.read_whole(offset / block, page);
        }
        // Pages smaller than where the snapshot was taken.
        let first = offset / block;
        let last = (offset + len).div_ceil(block);
        let mut bytes = vec![0; ((last - first) * block) as usize];
        let fill = self.read_whole(first, &mut bytes)?;
        let into = (offset - first * block) as usize;
        page.copy_from_slice(&bytes[into..into + page.len()]);
        Ok(fill)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }
}

impl fmt::Debug for SnapshotReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotReader")
            .field("id", &self.id())
            .field("parent", &self.parent())
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}
