//! Writing chunks.

use std::io;

use super::chunks::chunk_hash;
use super::codec::{Compression, Encoder};
use super::format::{
    CHUNK_BYTES, CHUNK_LOGARITHMS, Extent, HASH_BYTES, HEAD_BYTES, HEADER_BYTES, Head, encode_chunk,
    encode_index,
};
use crate::snapshot::sink::Geometry;

/// Options of a snapshot file in chunks, for [`SnapshotWriter::chunks`](crate::snapshot::SnapshotWriter::chunks).
///
/// ```
/// use userfaultfd::snapshot::{ChunkOptions, SnapshotWriter};
///
/// let options = ChunkOptions::new().size(256 << 10); // with a cargo feature: .compression(Compression::Lz4)
/// let writer = SnapshotWriter::new(Vec::new())?.chunks(&options);
/// # drop(writer);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkOptions {
    pub(crate) size: usize,
    pub(crate) compression: Compression,
}

impl Default for ChunkOptions {
    fn default() -> Self {
        Self { size: 128 << 10, compression: Compression::None }
    }
}

impl ChunkOptions {
    /// Returns the defaults: chunks of 128 KiB, not compressed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the length of a chunk's content in bytes: a power of two from 64 KiB to 2 MiB; other values are rounded up or cut.
    /// The default is 128 KiB.
    ///
    /// A fault reads and decompresses a whole chunk, so a small chunk resolves it sooner; large chunks need fewer requests and
    /// compress better.
    #[must_use]
    pub fn size(mut self, bytes: usize) -> Self {
        let [least, most] = [CHUNK_LOGARITHMS.start(), CHUNK_LOGARITHMS.end()].map(|shift| 1 << *shift);
        self.size = bytes.clamp(least, most).next_power_of_two();
        self
    }

    /// Sets how chunks are compressed. The default is [`Compression::None`].
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }
}

/// Makes chunks of pages.
pub(crate) struct ChunkWriter {
    pub(crate) size: usize,
    compression: Compression,
    encoder: Encoder,
    /// Pages that make no whole chunk yet.
    pending: Vec<u8>,
    table: Vec<[u8; CHUNK_BYTES]>,
    /// Bytes of all pages so far.
    content: u64,
    /// Those of the working set, and the set itself as it lies in the index.
    pub(crate) hot: u64,
    pub(crate) set: Vec<u8>,
}

impl ChunkWriter {
    pub(crate) fn new(options: &ChunkOptions, block: usize) -> Self {
        Self {
            size: options.size.max(block),
            compression: options.compression,
            encoder: Encoder::default(),
            pending: Vec::new(),
            table: Vec::new(),
            content: 0,
            hot: 0,
            set: Vec::new(),
        }
    }

    /// Bytes of all pages so far.
    pub(crate) fn content(&self) -> u64 {
        self.content
    }

    /// Adds a page. When that makes a chunk, its bytes are for `put`.
    pub(crate) fn add(&mut self, page: &[u8], put: impl FnOnce(&[u8]) -> io::Result<()>) -> io::Result<()> {
        self.pending.extend_from_slice(page);
        self.content += page.len() as u64;
        if self.pending.len() < self.size { Ok(()) } else { self.end_chunk(put) }
    }

    /// Ends a chunk.
    pub(crate) fn end_chunk(&mut self, put: impl FnOnce(&[u8]) -> io::Result<()>) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (codec, stored) = self.encoder.encode(self.compression, &self.pending)?;
        self.table.push(encode_chunk(stored.len() as u32, codec as u8, &chunk_hash(&self.pending)));
        put(stored)?;
        self.pending.clear();
        Ok(())
    }

    /// How many chunks there are.
    pub(crate) fn count(&self) -> u64 {
        self.table.len() as u64
    }

    /// The index of all.
    pub(crate) fn index(
        &self,
        header: &[u8; HEADER_BYTES],
        geometry: &Geometry,
        extents: &[Extent],
    ) -> Vec<u8> {
        let head = Head { content: self.content, hot: self.hot, set: self.set.len() as u64 };
        let mut index = vec![0; HASH_BYTES];
        index.extend(header);
        index.extend(head.encode());
        debug_assert_eq!(index.len(), HEAD_BYTES);
        encode_index(&mut index, geometry, extents);
        index.extend(self.table.as_flattened());
        index.extend(&self.set);
        let hash = blake3::hash(&index[HASH_BYTES..]);
        index[..HASH_BYTES].copy_from_slice(hash.as_bytes());
        index
    }
}
