//! Files that zstd compressed in frames, with a table of them at the end: the seekable format of zstd's `contrib`. Ordinary
//! frames come first, then a skippable frame with the table ([`table`]). Threads share
//! decompressed frames ([`Frames`]).

mod error;
mod table;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use zstd_safe::DCtx;

pub use self::error::ZstdError;
use self::table::Table;
pub use self::writer::SeekableZstdWriter;
use super::{PageData, PageSource, file::is_zero, frames::Frames, invalid};

/// Bytes of decompressed frames that are kept, unless the program says otherwise.
const CACHE_BYTES: usize = 16 << 20;

/// Bytes of the longest frame that is read, unless the program says otherwise.
const MAX_FRAME_BYTES: u64 = 64 << 20;

/// The content of a zstd seekable file, over any source of the file: a [`FileSource`](super::FileSource), an object
/// behind HTTP, a [`ChunkCache`](super::ChunkCache).
///
/// [`SeekableZstdWriter`] writes such files, and so do `pzstd`-like tools that append a seek table; a file that the program
/// `zstd` wrote has none, and is refused ([`ZstdError::NotSeekable`]).
///
/// - A page costs the read of its frame and its decompression, once for all pages of the frame that are needed soon:
///   16 MiB of decompressed frames are kept ([`SeekableZstdBuilder::cache_size`]), and threads that need a frame which is being
///   decompressed wait for it. Other frames go on meanwhile. A read of a whole frame decompresses it right into its place.
/// - Checksums of the seek table and of frames are compared where the file has them.
/// - A file that contradicts itself is a [`ZstdError`]; no length that it claims is believed beyond
///   [64 MiB for a frame](SeekableZstdBuilder::max_frame_size) and the bytes that it has for the table.
///
/// A read allocates and takes locks that no faulting thread holds, since it runs in the pager's workers.
pub struct SeekableZstd<S> {
    source: S,
    table: Table,
    frames: Frames,
    decoders: Mutex<Vec<Decoder>>,
}

/// What decompresses, and the buffer for what it reads.
struct Decoder {
    context: DCtx<'static>,
    compressed: Vec<u8>,
}

/// Builder for a [`SeekableZstd`].
#[derive(Clone, Debug)]
#[must_use = "the file is opened by `open`"]
pub struct SeekableZstdBuilder<S> {
    source: S,
    cache_size: usize,
    max_frame: u64,
}

impl<S: PageSource> SeekableZstdBuilder<S> {
    /// Sets how many bytes of decompressed frames are kept. The default is 16 MiB. A longer frame isn't kept, so that each
    /// fault in it decompresses it again.
    pub fn cache_size(mut self, bytes: usize) -> Self {
        self.cache_size = bytes;
        self
    }

    /// Sets the length of the longest frame that is accepted, in bytes of content. The default is 64 MiB.
    pub fn max_frame_size(mut self, bytes: u64) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Opens the file, which reads its seek table.
    ///
    /// # Errors
    ///
    /// Those of the source. A [`ZstdError`]: there is no table at the end of the file, it is damaged, or a frame is too
    /// long. Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the source has no end.
    pub fn open(self) -> io::Result<SeekableZstd<S>> {
        let Self { source, cache_size, max_frame } = self;
        let len = source
            .len()
            .ok_or_else(|| invalid("the source has no length, which a compressed file needs".into()))?;
        let table = Table::read(&source, len, max_frame)?;
        Ok(SeekableZstd { source, table, frames: Frames::new(cache_size), decoders: Mutex::default() })
    }
}

impl<S: PageSource> SeekableZstd<S> {
    /// Opens the compressed file that a source has, with the default options.
    ///
    /// # Errors
    ///
    /// Those of [`SeekableZstdBuilder::open`].
    pub fn open(source: S) -> io::Result<Self> {
        Self::builder(source).open()
    }

    /// Returns a builder for the content of a file.
    pub fn builder(source: S) -> SeekableZstdBuilder<S> {
        SeekableZstdBuilder { source, cache_size: CACHE_BYTES, max_frame: MAX_FRAME_BYTES }
    }

    /// Returns the source of the file.
    pub fn into_inner(self) -> S {
        self.source
    }

    fn read_as(&self, offset: u64, page: &mut [u8], early: bool) -> io::Result<PageData> {
        let rest = self.table.len().saturating_sub(offset);
        let inside = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len()));
        let (mut done, mut frame) = (0, self.table.at(offset));
        while done < inside {
            let (_, start) = self.table.starts(frame);
            let len = (self.table.0[frame].end - start) as usize;
            let from = (offset + done as u64 - start) as usize;
            let count = (len - from).min(inside - done);
            let part = &mut page[done..done + count];
            match self.frames.find(frame) {
                Some(content) => part.copy_from_slice(&content[from..from + count]),
                None if count == len => self.decompress(frame, part, early)?,
                None => {
                    let content = self.frames.get(frame, || {
                        let mut content = Vec::new();
                        content.try_reserve_exact(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
                        content.resize(len, 0);
                        self.decompress(frame, &mut content, early)?;
                        Ok(content)
                    })?;
                    part.copy_from_slice(&content[from..from + count]);
                }
            }
            (done, frame) = (done + count, frame + 1);
        }
        if is_zero(&page[..inside]) {
            return Ok(PageData::Zero);
        }
        page[inside..].fill(0);
        Ok(PageData::Data)
    }

    /// Decompresses a frame into a buffer of its length.
    fn decompress(&self, frame: usize, content: &mut [u8], early: bool) -> io::Result<()> {
        let mut decoder = match self.decoders.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            Some(decoder) => decoder,
            None => Decoder {
                context: DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?,
                compressed: Vec::new(),
            },
        };
        let done = self.decompress_by(&mut decoder, frame, content, early);
        self.decoders.lock().unwrap_or_else(PoisonError::into_inner).push(decoder);
        done
    }

    fn decompress_by(
        &self,
        decoder: &mut Decoder,
        frame: usize,
        content: &mut [u8],
        early: bool,
    ) -> io::Result<()> {
        let ((start, _), end) = (self.table.starts(frame), &self.table.0[frame]);
        let compressed = &mut decoder.compressed;
        compressed.clear();
        let len = (end.compressed_end - start) as usize;
        compressed.try_reserve(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        compressed.resize(len, 0);
        let found = if early {
            self.source.read_early(start, compressed)
        } else {
            self.source.read(start, compressed)
        };
        if found? == PageData::Zero {
            compressed.fill(0);
        }
        let damaged = |reason: String| ZstdError::DamagedFrame { frame, reason };
        let written = decoder.context.decompress(content, compressed);
        let written = written.map_err(|code| damaged(zstd_safe::get_error_name(code).into()))?;
        if written != content.len() {
            return Err(damaged(format!("it has {written} bytes, and {} in the table", content.len())).into());
        }
        match end.checksum {
            Some(checksum) if checksum != content_checksum(content) => {
                Err(ZstdError::WrongChecksum { frame }.into())
            }
            _ => Ok(()),
        }
    }
}

/// What the table says of a frame's content.
fn content_checksum(content: &[u8]) -> u32 {
    twox_hash::XxHash64::oneshot(0, content) as u32
}

impl<S: PageSource> PageSource for SeekableZstd<S> {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_as(offset, page, false)
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_as(offset, page, true)
    }

    fn len(&self) -> Option<u64> {
        Some(self.table.len())
    }
}

impl<S: fmt::Debug> fmt::Debug for SeekableZstd<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeekableZstd")
            .field("source", &self.source)
            .field("len", &self.table.len())
            .field("frames", &self.table.0.len())
            .finish_non_exhaustive()
    }
}
