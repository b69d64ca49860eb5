//! Reading snapshot files: as a whole, or page by page.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

use super::format::{FormatError, Place, SnapshotId};
use super::layer::{Layer, Stretch};
use super::writer::SnapshotWriter;
use crate::snapshot::sink::{Content, Geometry, Region, Sink};
use crate::source::{PageData, PageSource};

/// Files of a chain that are kept open; as many others are open while they are read: far below the usual limit of 1024
/// descriptors.
const MAX_OPEN_FILES: usize = 64;

/// Bytes that are merged at a time: large enough for sequential writes.
const MERGE_BYTES: u64 = 1 << 20;

/// A snapshot in a file, or in a chain of files that stand on one another: a [`PageSource`], from which a pager restores
/// memory on first access.
///
/// Opening a file reads and checks all but the pages themselves. Each page is checked when it is read, so a damaged one
/// is an error of that page, and never wrong bytes.
///
/// A page of a chain is found by one search, however many files there are. At most some 128 of them are open at a time:
/// those of a longer chain are opened again by their path when they are needed, so they must stay where they are.
pub struct SnapshotReader {
    /// The newest first.
    layers: Vec<Layer>,
    /// What lies where, by its first block.
    index: Vec<Stretch>,
    len: u64,
    /// Files that were opened again, the last one used first.
    opened: Mutex<VecDeque<(u32, Arc<File>)>>,
}

impl SnapshotReader {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// [`FormatError`]: it can't be read, is no snapshot, of an unknown version, cut short, or damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        let path = std::path::absolute(path)?;
        Self::of(Layer::open(File::open(&path)?, Some(path))?)
    }

    /// Reads an open file.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn new(file: File) -> Result<Self, FormatError> {
        Self::of(Layer::open(file, None)?)
    }

    fn of((layer, index, len): (Layer, Vec<Stretch>, u64)) -> Result<Self, FormatError> {
        Ok(Self { layers: vec![layer], index, len, opened: Mutex::default() })
    }

    /// Puts this incremental snapshot on top of the one that it follows, which must stand on its own parent already.
    ///
    /// # Errors
    ///
    /// [`FormatError::WrongParent`]: `parent` isn't the snapshot that this one follows, or holds memory of another size.
    pub fn on(mut self, parent: SnapshotReader) -> Result<Self, FormatError> {
        let (found, expected, block) = (parent.id(), self.base().header.parent, self.block());
        if expected != Some(found) || self.len != parent.len || block != parent.block() {
            return Err(FormatError::WrongParent { expected, found });
        }
        let above = self.layers.len() as u32;
        let below =
            parent.index.into_iter().map(|stretch| Stretch { layer: stretch.layer + above, ..stretch });
        self.index = overlay(self.index, below, block)?;
        self.layers.extend(parent.layers);
        for layer in self.layers.iter_mut().skip(MAX_OPEN_FILES) {
            layer.file.take_if(|_| layer.path.is_some());
        }
        Ok(self)
    }

    fn block(&self) -> u64 {
        self.top().header.block
    }

    fn top(&self) -> &Layer {
        self.layers.first().expect("there is one")
    }

    fn base(&self) -> &Layer {
        self.layers.last().expect("there is one")
    }

    /// Returns the id of the snapshot.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.top().header.id
    }

    /// Returns the id of the snapshot that it follows, if it is incremental.
    #[must_use]
    pub fn parent(&self) -> Option<SnapshotId> {
        self.top().header.parent
    }

    /// Returns the ranges of memory, in the order in which they lie in the snapshot.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.top().regions
    }

    /// Returns the bytes of data in this file alone, without zeros.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.top().checksums * self.block()
    }

    /// Returns the bytes of lost pages in this file; reading them is an error.
    #[must_use]
    pub fn gone_len(&self) -> u64 {
        self.top().gone
    }

    /// Returns an iterator over the parts that this snapshot and the ones below it hold, with zeros and lost pages: ranges of
    /// offsets in the snapshot, ordered. Other parts are as in the snapshot that the lowest one follows.
    pub fn extents(&self) -> impl Iterator<Item = std::ops::Range<u64>> {
        let block = self.block();
        self.index.iter().map(move |stretch| stretch.first * block..stretch.end() * block)
    }

    /// Reads all content, also that of the snapshots below which this one shows, and checks it for damage.
    ///
    /// # Errors
    ///
    /// [`FormatError::Damaged`], [`FormatError::NeedsParent`], [`FormatError::Io`]. Pages that are gone are none.
    pub fn verify(&self) -> Result<(), FormatError> {
        if let Some(parent) = self.base().header.parent {
            return Err(FormatError::NeedsParent { parent });
        }
        let mut bytes = vec![0; self.block() as usize];
        for stretch in &self.index {
            for block in 0..stretch.blocks {
                let Place::Data(offset) = stretch.place else { break };
                self.read_data(stretch, offset, block, &mut bytes)?;
            }
        }
        Ok(())
    }

    /// Merges this snapshot and the ones below it into one file, which replaces the one at `path` when it is complete.
    ///
    /// The file has the id of this snapshot, so that its successors stand on it. It holds everything, or the changes since the
    /// snapshot that the lowest one follows. The merged files can be removed afterwards.
    ///
    /// # Errors
    ///
    /// Those of writing the file. Of the kind [`InvalidData`](io::ErrorKind::InvalidData): a page is damaged.
    pub fn merge(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let parent = self.base().header.parent;
        let mut writer = SnapshotWriter::create(path)?.named(self.id(), parent, self.block() as usize);
        writer.begin(&Geometry { regions: self.regions().to_vec(), incremental: parent.is_some() })?;
        let block = self.block();
        let mut bytes = Vec::new();
        for stretch in &self.index {
            let (offset, len) = (stretch.first * block, stretch.blocks * block);
            let Place::Data(data) = stretch.place else {
                let zero = stretch.place == Place::Zero;
                writer.write(offset, if zero { Content::Zero(len) } else { Content::Gone(len) })?;
                continue;
            };
            let piece = MERGE_BYTES / block;
            for first in (0..stretch.blocks).step_by(piece as usize) {
                bytes.resize((piece.min(stretch.blocks - first) * block) as usize, 0);
                self.read_data(stretch, data, first, &mut bytes).map_err(into_io)?;
                writer.write(offset + first * block, Content::Data(&bytes))?;
            }
        }
        writer.finish()
    }

    /// Reads blocks from `block` of a stretch on, whose data begin at `offset`, and checks them.
    fn read_data(
        &self,
        stretch: &Stretch,
        offset: u64,
        block: u64,
        bytes: &mut [u8],
    ) -> Result<(), FormatError> {
        let layer = &self.layers[stretch.layer as usize];
        let at = offset + block * self.block();
        let opened;
        let file = match &layer.file {
            Some(file) => file,
            None => {
                opened = self.open_again(stretch.layer)?;
                &*opened
            }
        };
        file.read_exact_at(bytes, at)?;
        if layer.are_whole(file, stretch.checksum + block, bytes)? {
            Ok(())
        } else {
            Err(FormatError::Damaged("a page doesn't have its checksum"))
        }
    }

    fn open_again(&self, layer: u32) -> io::Result<Arc<File>> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = opened.iter().position(|(of, _)| *of == layer) {
            let found = opened.remove(at).expect("it is there");
            opened.push_front(found);
        } else {
            let file = Arc::new(self.layers[layer as usize].open_again()?);
            opened.truncate(MAX_OPEN_FILES - 1);
            opened.push_front((layer, file));
        }
        Ok(Arc::clone(&opened[0].1))
    }

    /// Fills `bytes`, a whole number of blocks, with those from `first` on.
    fn read_whole(&self, first: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        let block = self.block() as usize;
        let (mut at, end) = (first, first + (bytes.len() / block) as u64);
        let mut all_zero = true;
        let mut next = self.index.partition_point(|stretch| stretch.end() <= at);
        while at < end {
            let (stretch, until) = match self.index.get(next) {
                Some(stretch) if stretch.first <= at => (Some(stretch), stretch.end()),
                Some(stretch) => (None, stretch.first),
                None => (None, end),
            };
            let until = until.min(end);
            let part = &mut bytes[(at - first) as usize * block..(until - first) as usize * block];
            let zero = match stretch {
                // Beyond the end there are zeros.
                None if at >= self.len / block as u64 => true,
                None => return Err(self.without_parent()),
                Some(Stretch { place: Place::Zero, .. }) => true,
                Some(Stretch { place: Place::Gone, .. }) => {
                    let text = "the page was gone before the snapshot could save it";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                Some(stretch @ Stretch { place: Place::Data(offset), .. }) => {
                    self.read_data(stretch, *offset, at - stretch.first, part).map_err(into_io)?;
                    false
                }
            };
            if zero {
                part.fill(0);
            }
            all_zero &= zero;
            at = until;
            next += usize::from(stretch.is_some());
        }
        Ok(if all_zero { PageData::Zero } else { PageData::Data })
    }

    fn without_parent(&self) -> io::Error {
        match self.base().header.parent {
            Some(parent) => into_io(FormatError::NeedsParent { parent }),
            None => into_io(FormatError::Damaged("its index makes no sense")),
        }
    }
}

/// What lies in the one above, and where nothing does, in the one below.
fn overlay(
    above: Vec<Stretch>,
    below: impl Iterator<Item = Stretch>,
    block: u64,
) -> io::Result<Vec<Stretch>> {
    let mut all: Vec<Stretch> = Vec::new();
    let mut above = above.into_iter().peekable();
    for stretch in below {
        // For what is left of it before the next one and behind all, and for that one.
        try_reserve(&mut all, 2)?;
        let mut from = stretch.first.max(all.last().map_or(0, Stretch::end));
        while let Some(next) = above.next_if(|next| next.first < stretch.end()) {
            try_reserve(&mut all, 3)?;
            all.extend(stretch.cut(from, next.first, block));
            from = from.max(next.end());
            let covers = next.end() >= stretch.end();
            all.push(next);
            if covers {
                break;
            }
        }
        all.extend(stretch.cut(from, stretch.end(), block));
    }
    try_reserve(&mut all, above.len())?;
    all.extend(above);
    Ok(all)
}

fn try_reserve(stretches: &mut Vec<Stretch>, more: usize) -> io::Result<()> {
    stretches.try_reserve(more).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

fn into_io(error: FormatError) -> io::Error {
    match error {
        FormatError::Io(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

impl PageSource for SnapshotReader {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let block = self.block();
        let len = page.len() as u64;
        if offset % block == 0 && len % block == 0 {
            return self.read_whole(offset / block, page);
        }
        // Pages smaller than where the snapshot was taken.
        let first = offset / block;
        let last = (offset + len).div_ceil(block);
        // Mapped: a thread that waits for this read may hold the allocator's locks.
        let mut bytes = MmapMut::map_anon(((last - first) * block) as usize)?;
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
            .field("regions", &self.regions())
            .finish_non_exhaustive()
    }
}
