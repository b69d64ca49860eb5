//! Reading snapshot files: as a whole, or page by page.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

use super::format::{FormatError, Place, SnapshotId, VERSION_CHUNKS, VERSION_PAGES};
use super::input::Input;
use super::layer::{Body, Layer, Stretch};
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
/// It reads both versions of the [format](crate::snapshot). Of version 2 a page is read with its chunk, and the chunks that
/// were read last are kept, up to 16 MiB: a page costs the read of its chunk once for all pages of the chunk that are needed soon.
/// Threads that need a chunk which is being read wait for it. Such a read allocates, and takes locks that no faulting thread
/// holds: version 1 is for memory whose descriptor reports forks.
///
/// [`from_source`](Self::from_source) reads a file where it lies: behind HTTP, in an object store, through a
/// [`ChunkCache`](crate::source::ChunkCache). Of version 2 one request for the end of the file brings the index, if that has at
/// most 512 KiB, as that of an image of some GiB.
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
    opened: Mutex<VecDeque<(u32, Input)>>,
}

impl SnapshotReader {
    /// Opens a snapshot file.
    ///
    /// # Errors
    ///
    /// [`FormatError`]: it can't be read, is no snapshot, of an unknown version, cut short, or damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        let path = std::path::absolute(path)?;
        Self::of(Layer::open(Input::File(Arc::new(File::open(&path)?)), Some(path))?)
    }

    /// Reads an open snapshot file.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn new(file: File) -> Result<Self, FormatError> {
        Self::of(Layer::open(Input::File(Arc::new(file)), None)?)
    }

    /// Reads the snapshot file that any source has: an object of a web server or of a store. The source stays open, also below others
    /// in a long chain.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open). [`FormatError::Io`] of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the source has
    /// no [length](PageSource::len).
    pub fn from_source(source: impl PageSource + 'static) -> Result<Self, FormatError> {
        Self::of(Layer::open(Input::Source(Arc::new(source)), None)?)
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
            layer.input.take_if(|_| layer.path.is_some());
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

    /// The snapshot that lacks below these.
    pub(crate) fn needed_parent(&self) -> Option<SnapshotId> {
        self.base().header.parent
    }

    /// Returns the ranges of memory, in the order in which they lie in the snapshot.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.top().regions
    }

    /// Returns the bytes of data in this file alone, without zeros.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        match &self.top().body {
            Body::Pages { checksums, .. } => checksums * self.block(),
            Body::Chunks(chunks) => chunks.len,
        }
    }

    /// Returns the bytes that these data take in the file: less than [`data_len`](Self::data_len), if they are compressed.
    #[must_use]
    pub fn stored_len(&self) -> u64 {
        match &self.top().body {
            Body::Pages { .. } => self.data_len(),
            Body::Chunks(chunks) => chunks.stored_len(),
        }
    }

    /// Returns the version of the file's format: 1 or 2.
    #[must_use]
    pub fn version(&self) -> u32 {
        match &self.top().body {
            Body::Pages { .. } => VERSION_PAGES,
            Body::Chunks(_) => VERSION_CHUNKS,
        }
    }

    /// Returns the bytes of content of a chunk, of version 2.
    #[must_use]
    pub fn chunk_size(&self) -> Option<u64> {
        self.top().header.chunk
    }

    /// Returns the working set that the file has, whose pages lie in it first: see [`preload`](Self::preload).
    ///
    /// # Errors
    ///
    /// Those of [`WorkingSet::load`](crate::pager::WorkingSet::load): it isn't one, or is damaged.
    #[cfg(feature = "pager")]
    pub fn working_set(&self) -> io::Result<Option<crate::pager::WorkingSet>> {
        let set = &self.top().set;
        if set.is_empty() { Ok(None) } else { crate::pager::WorkingSet::from_bytes(set).map(Some) }
    }

    /// Reads the pages of the file's working set in one long read, and keeps them, as they are stored, until each was
    /// needed once. Returns how many bytes it has read: 0 without a working set. More than 64 MiB take several reads.
    ///
    /// A restore begins with this, and then [replays](crate::pager::Pager::replay) the set:
    ///
    /// ```
    /// use userfaultfd::pager::BytesSource;
    /// use userfaultfd::pager::WorkingSet;
    /// use userfaultfd::snapshot::{ChunkOptions, ImageCopy, SnapshotReader, SnapshotWriter};
    /// use userfaultfd::{LazyMemory, page_size};
    ///
    /// // An image with the set that an earlier run has recorded.
    /// let memory: Vec<u8> = (0..64 * page_size()).map(|at| at as u8 | 1).collect();
    /// let set = WorkingSet::from_pages(page_size(), 64, [60, 61, 3])?;
    /// let path = std::env::temp_dir().join(format!("{}.preload", std::process::id()));
    /// let writer = SnapshotWriter::create(&path)?.chunks(&ChunkOptions::new());
    /// ImageCopy::new(&BytesSource::new(memory)).working_set(set).write(writer)?;
    ///
    /// let image = SnapshotReader::open(&path)?;
    /// image.preload()?;
    /// let set = image.working_set()?.expect("it was written");
    /// let restored = LazyMemory::new(64 * page_size(), image)?;
    /// restored.replay(&set)?.wait();
    /// assert_eq!(restored[60 * page_size()], 1);
    /// # drop(restored);
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of reading the file. What was read is checked when it is needed.
    pub fn preload(&self) -> io::Result<u64> {
        let layer = self.top();
        let Body::Chunks(chunks) = &layer.body else { return Ok(0) };
        chunks.preload(&self.input(0)?)
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
        for (number, layer) in (0..).zip(&self.layers) {
            if let Body::Chunks(chunks) = &layer.body {
                chunks.verify(&self.input(number)?)?;
            }
        }
        let mut bytes = vec![0; self.block() as usize];
        let is_checked = |stretch: &&Stretch| {
            let layer = &self.layers[stretch.layer as usize];
            matches!(layer.body, Body::Chunks(_))
        };
        for stretch in self.index.iter().filter(|stretch| !is_checked(stretch)) {
            for block in 0..stretch.blocks {
                let Place::Data(offset) = stretch.place else { break };
                self.read_data(stretch, offset, block, &mut bytes, true)?;
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
        self.merge_with(SnapshotWriter::create(path)?).map(drop)
    }

    /// Merges this snapshot and the ones below it as [`merge`](Self::merge) does, with a writer: to any stream, or in
    /// [chunks](SnapshotWriter::chunks). Returns the writer.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge).
    pub fn merge_with<W: Write + Send>(&self, writer: SnapshotWriter<W>) -> io::Result<SnapshotWriter<W>> {
        let parent = self.base().header.parent;
        let mut writer = writer.named(self.id(), parent, self.block() as usize);
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
                self.read_data(stretch, data, first, &mut bytes, true).map_err(into_io)?;
                writer.write(offset + first * block, Content::Data(&bytes))?;
            }
        }
        writer.finish()?;
        Ok(writer)
    }

    /// Reads blocks from `block` of a stretch on, whose data begin at `offset`, and checks them.
    fn read_data(
        &self,
        stretch: &Stretch,
        offset: u64,
        block: u64,
        bytes: &mut [u8],
        early: bool,
    ) -> Result<(), FormatError> {
        let input = self.input(stretch.layer)?;
        let layer = &self.layers[stretch.layer as usize];
        layer.read(&input, offset + block * self.block(), stretch.checksum + block, bytes, early)
    }

    /// The file of a layer, opened again if need be.
    fn input(&self, layer: u32) -> io::Result<Input> {
        if let Some(input) = &self.layers[layer as usize].input {
            return Ok(input.clone());
        }
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = opened.iter().position(|(of, _)| *of == layer) {
            let found = opened.remove(at).expect("it is there");
            opened.push_front(found);
        } else {
            let input = self.layers[layer as usize].open_again()?;
            opened.truncate(MAX_OPEN_FILES - 1);
            opened.push_front((layer, input));
        }
        Ok(opened[0].1.clone())
    }

    /// Fills `bytes`, a whole number of blocks, with those from `first` on.
    fn read_whole(&self, first: u64, bytes: &mut [u8], early: bool) -> io::Result<PageData> {
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
                    self.read_data(stretch, *offset, at - stretch.first, part, early).map_err(into_io)?;
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

impl SnapshotReader {
    fn read_as(&self, offset: u64, page: &mut [u8], early: bool) -> io::Result<PageData> {
        let block = self.block();
        let len = page.len() as u64;
        if offset % block == 0 && len % block == 0 {
            return self.read_whole(offset / block, page, early);
        }
        // Pages smaller than where the snapshot was taken.
        let first = offset / block;
        let last = (offset + len).div_ceil(block);
        // Mapped: a thread that waits for this read may hold the allocator's locks.
        let mut bytes = MmapMut::map_anon(((last - first) * block) as usize)?;
        let fill = self.read_whole(first, &mut bytes, early)?;
        let into = (offset - first * block) as usize;
        page.copy_from_slice(&bytes[into..into + page.len()]);
        Ok(fill)
    }
}

impl PageSource for SnapshotReader {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_as(offset, page, false)
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_as(offset, page, true)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }

    fn zeros(&self, offset: u64) -> u64 {
        if offset >= self.len {
            return u64::MAX;
        }
        let block = offset / self.block();
        let found = self.index.get(self.index.partition_point(|stretch| stretch.end() <= block));
        match found.filter(|stretch| stretch.place == Place::Zero && stretch.first <= block) {
            Some(stretch) if stretch.end() * self.block() >= self.len => u64::MAX,
            Some(stretch) => stretch.end() * self.block() - offset,
            None => 0,
        }
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
