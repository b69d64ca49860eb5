//! A sink that writes a snapshot file.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::chunk_writer::{ChunkOptions, ChunkWriter};
use super::format::{Extent, Footer, HEADER_BYTES, Header, Place, SnapshotId, encode_index};
use super::name::next_path;
use crate::pending_file::FinalName;
use crate::snapshot::sink::{Content, Geometry, Region, Sink};
use crate::{PendingFile, page_size, sys};

/// A [`Sink`] that writes a snapshot as a file for [`SnapshotReader`](crate::snapshot::SnapshotReader).
///
/// It writes from the beginning to the end without a seek, so a pipe or a socket works, too. Pages of zeros take no
/// room. The [module](crate::snapshot) describes the format, and when which of its two versions is better: this writes the
/// first, or with [`chunks`](Self::chunks) the second.
pub struct SnapshotWriter<W: Write> {
    out: W,
    /// Of a file that takes its name in the end.
    pending: Option<Pending<W>>,
    id: SnapshotId,
    parent: Option<SnapshotId>,
    geometry: Option<Geometry>,
    block: usize,
    zeros: Box<[u8]>,
    /// Bytes written so far.
    written: u64,
    extents: Vec<Extent>,
    /// With each its block.
    checksums: Vec<(u64, u32)>,
    /// Of version 2.
    chunks: Option<ChunkWriter>,
    /// Whether something wasn't written as a whole: what follows makes no file of it.
    has_failed: bool,
}

/// A file, and the name that it will take.
struct Pending<W> {
    file: fn(&W) -> &File,
    name: FinalName,
}

impl SnapshotWriter<BufWriter<File>> {
    /// Returns a writer of a file, which replaces the one at `path` when the snapshot is complete: a [`PendingFile`].
    ///
    /// Memory that is being restored from the old file goes on reading the old file. A failed snapshot leaves the old file
    /// unchanged.
    ///
    /// # Errors
    ///
    /// Those of [`PendingFile::create`].
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::of_file(PendingFile::create(path)?)
    }

    /// Returns a writer of the next file of a series in a directory, which replaces none.
    pub(crate) fn create_next(directory: &Path) -> io::Result<Self> {
        Self::of_file(PendingFile::create_new(directory, next_path)?)
    }

    fn of_file(PendingFile { file, name }: PendingFile) -> io::Result<Self> {
        let mut writer = Self::new(BufWriter::with_capacity(1 << 20, file))?;
        writer.pending = Some(Pending { file: BufWriter::get_ref, name });
        Ok(writer)
    }
}

impl<W: Write> SnapshotWriter<W> {
    /// Returns a writer to any stream. It writes small pieces, too: wrap a file into a [`BufWriter`].
    ///
    /// # Errors
    ///
    /// None, on a kernel that has random numbers.
    pub fn new(out: W) -> io::Result<Self> {
        let id = SnapshotId(sys::random_bytes()?);
        let block = page_size();
        Ok(Self {
            out,
            pending: None,
            id,
            parent: None,
            geometry: None,
            block,
            zeros: vec![0; block].into(),
            written: 0,
            extents: Vec::new(),
            checksums: Vec::new(),
            chunks: None,
            has_failed: false,
        })
    }

    /// Writes version 2 of the format: chunks, each compressed, if the options say so, and with a checksum. Must be called
    /// before anything is written.
    #[must_use]
    pub fn chunks(self, options: &ChunkOptions) -> Self {
        let chunks = Some(ChunkWriter::new(options, self.block));
        Self { chunks, ..self }
    }

    /// What was written so far is what a working set needs, as it lies in the index.
    #[cfg(feature = "pager")]
    pub(crate) fn end_working_set(&mut self, set: Vec<u8>) {
        if let Some(chunks) = &mut self.chunks {
            (chunks.hot, chunks.set) = (chunks.content(), set);
        }
    }

    /// Whether it writes chunks, which alone can have a working set.
    #[cfg(feature = "pager")]
    pub(crate) fn has_chunks(&self) -> bool {
        self.chunks.is_some()
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let chunk = self.chunks.as_ref().map(|chunks| chunks.size as u64);
        Header { block: self.block as u64, id: self.id, parent: self.parent, chunk }.encode()
    }

    /// Sets the snapshot that an incremental one follows: the one before in the same [`Series`](crate::snapshot::Series).
    #[must_use]
    pub fn follows(mut self, parent: SnapshotId) -> Self {
        self.parent = Some(parent);
        self
    }

    /// Sets the id, the snapshot that it follows, and the block size, for a merged file.
    pub(crate) fn named(self, id: SnapshotId, parent: Option<SnapshotId>, block: usize) -> Self {
        let mut chunks = self.chunks;
        if let Some(chunks) = &mut chunks {
            chunks.size = chunks.size.max(block);
        }
        Self { id, parent, block, zeros: vec![0; block].into(), chunks, ..self }
    }

    /// Returns the id of the snapshot, for [`follows`](Self::follows) of the next one.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Returns the number of bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Returns the stream to which it writes.
    #[must_use]
    pub fn into_inner(self) -> W {
        self.out
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn extend(&mut self, first: u64, blocks: u64, place: Place) {
        if let Some(last) = self.extents.last_mut() {
            let adjoins = match (last.place, place) {
                (Place::Data(before), Place::Data(here)) => before + last.blocks * self.block as u64 == here,
                (before, here) => before == here,
            };
            if adjoins && last.first + last.blocks == first {
                last.blocks += blocks;
                return;
            }
        }
        self.extents.push(Extent { first, blocks, place });
    }
}

impl<W: Write + Send> Sink for SnapshotWriter<W> {
    fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
        match (geometry.incremental, self.parent) {
            (true, None) => return Err(invalid("an incremental snapshot must be told which one it follows")),
            (false, Some(_)) => return Err(invalid("a snapshot of everything follows none")),
            _ => {}
        }
        let block = self.block as u64;
        let is_sound = |region: &Region| {
            let len = region.addresses.end.checked_sub(region.addresses.start);
            len.is_some_and(|len| len > 0 && len % block == 0)
        };
        if !geometry.regions.iter().all(is_sound) {
            return Err(invalid("a region of a snapshot has a number of whole pages"));
        }
        if self.geometry.replace(geometry.clone()).is_some() {
            return Err(invalid("a writer writes one snapshot"));
        }
        let header = self.header();
        self.put(&header)?;
        if self.chunks.is_some() {
            return Ok(());
        }
        let rest = self.block - HEADER_BYTES;
        let zeros = std::mem::take(&mut self.zeros);
        let padded = self.put(&zeros[..rest]);
        self.zeros = zeros;
        padded
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        self.check()?;
        let written = self.write_content(offset, content);
        self.has_failed = written.is_err();
        written
    }

    fn finish(&mut self) -> io::Result<()> {
        self.check()?;
        let finished = self.write_index();
        self.has_failed = finished.is_err();
        finished
    }
}

impl<W: Write> SnapshotWriter<W> {
    fn check(&self) -> io::Result<()> {
        match self.has_failed {
            true => Err(io::Error::other("writing the snapshot has failed before")),
            false => Ok(()),
        }
    }

    fn write_content(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        let (block, first) = (self.block as u64, offset / self.block as u64);
        match content {
            Content::Data(bytes) => {
                for (at, bytes) in (first..).zip(bytes.chunks(self.block)) {
                    if *bytes == *self.zeros {
                        self.extend(at, 1, Place::Zero);
                    } else if let Some(mut chunks) = self.chunks.take() {
                        // As if the stream began where data of version 1 do.
                        self.extend(at, 1, Place::Data(chunks.content() + block));
                        let added = chunks.add(bytes, |stored| self.put(stored));
                        self.chunks = Some(chunks);
                        added?;
                    } else {
                        self.extend(at, 1, Place::Data(self.written));
                        self.checksums.push((at, crc32fast::hash(bytes)));
                        self.put(bytes)?;
                    }
                }
            }
            Content::Zero(len) => self.extend(first, len / block, Place::Zero),
            Content::Gone(len) => self.extend(first, len / block, Place::Gone),
        }
        Ok(())
    }

    fn write_index(&mut self) -> io::Result<()> {
        let Some(geometry) = self.geometry.clone() else { return Err(invalid("the snapshot hasn't begun")) };
        self.extents.sort_unstable_by_key(|extent| extent.first);
        let (index, checksums) = if let Some(mut chunks) = self.chunks.take() {
            let ended = chunks.end_chunk(|stored| self.put(stored));
            self.chunks = Some(chunks);
            ended?;
            let header = self.header();
            let chunks = self.chunks.as_ref().expect("it was just put back");
            (chunks.index(&header, &geometry, &self.extents), chunks.count())
        } else {
            self.checksums.sort_unstable();
            let mut index = Vec::new();
            encode_index(&mut index, &geometry, &self.extents);
            index.extend(self.checksums.iter().flat_map(|(_, checksum)| checksum.to_le_bytes()));
            (index, self.checksums.len() as u64)
        };
        let has_chunks = self.chunks.is_some();
        let footer = Footer {
            has_chunks,
            id: self.id,
            index: self.written,
            regions: geometry.regions.len() as u64,
            extents: self.extents.len() as u64,
            checksums,
            index_crc: if has_chunks { 0 } else { crc32fast::hash(&index) },
        };
        self.put(&index)?;
        self.put(&footer.encode())?;
        self.out.flush()?;
        match self.pending.take() {
            Some(Pending { file, name }) => name.put(file(&self.out)),
            None => Ok(()),
        }
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl<W: Write> fmt::Debug for SnapshotWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotWriter")
            .field("id", &self.id)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}
