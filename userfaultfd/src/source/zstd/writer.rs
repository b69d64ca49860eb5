//! Writing files that can be read from the middle.

use std::fmt;
use std::io::{self, Write};

use zstd_safe::{CCtx, CParameter};

use super::content_checksum;
use super::table::{Frame, MAX_FRAMES, Table};
use crate::source::invalid;

/// Bytes of a frame, unless the program says otherwise: a fault decompresses one.
const FRAME_BYTES: usize = 256 << 10;

/// A frame's length is a number of 32 bits, and compressed data may be a little longer.
const MAX_FRAME_BYTES: usize = 1 << 30;

/// Level of compression, as that of the program `zstd`.
const LEVEL: i32 = 3;

/// Compresses what is written to it into a zstd seekable file, which the program `zstd` decompresses like any other, and
/// [`SeekableZstd`](super::SeekableZstd) reads from the middle.
///
/// ```
/// use std::io::Write;
/// use userfaultfd::pager::{BytesSource, PageSource, SeekableZstd, SeekableZstdWriter};
///
/// let mut writer = SeekableZstdWriter::new(Vec::new());
/// writer.write_all(&[7; 1 << 20])?;
/// let file = writer.finish()?;
/// assert!(file.len() < 1000);
///
/// let image = SeekableZstd::open(BytesSource::new(file))?;
/// let mut page = [0; 4096];
/// image.read(500_000, &mut page)?;
/// assert_eq!((image.len(), page), (Some(1 << 20), [7; 4096]));
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// [`finish`](Self::finish) must be called: without the table that it writes, the file can't be read from the middle. Write
/// to a [`PendingFile`](crate::PendingFile), and commit that after `finish`, to never leave half a file.
#[must_use = "without `finish` the file has no table"]
pub struct SeekableZstdWriter<W> {
    output: W,
    frame_size: usize,
    level: i32,
    has_checksums: bool,
    /// What isn't compressed yet: less than a frame.
    pending: Vec<u8>,
    table: Table,
    compressor: Option<CCtx<'static>>,
}

impl<W: Write> SeekableZstdWriter<W> {
    /// Returns a writer to `output`.
    pub fn new(output: W) -> Self {
        Self {
            output,
            frame_size: FRAME_BYTES,
            level: LEVEL,
            has_checksums: true,
            pending: Vec::new(),
            table: Table::default(),
            compressor: None,
        }
    }

    /// Sets the length of a frame's content in bytes, from 1 to 1 GiB. The default is 256 KiB. A shorter frame makes a fault
    /// cheaper and the file longer.
    pub fn frame_size(mut self, bytes: usize) -> Self {
        self.frame_size = bytes.clamp(1, MAX_FRAME_BYTES);
        self
    }

    /// Sets the level of compression, as of the program `zstd`. The default is 3.
    pub fn level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// Sets whether the seek table has a checksum of each frame. The default is `true`.
    pub fn checksums(mut self, checksums: bool) -> Self {
        self.has_checksums = checksums;
        self
    }

    /// Writes what is left, and the seek table. Returns the output.
    ///
    /// # Errors
    ///
    /// Those of the output, and those of zstd.
    pub fn finish(mut self) -> io::Result<W> {
        if !self.pending.is_empty() {
            self.write_frame()?;
        }
        self.output.write_all(&self.table.encode())?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn compressor(&mut self) -> io::Result<&mut CCtx<'static>> {
        if self.compressor.is_none() {
            let mut compressor = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
            // The table has one, if any.
            for parameter in [CParameter::CompressionLevel(self.level), CParameter::ChecksumFlag(false)] {
                compressor.set_parameter(parameter).map_err(failed)?;
            }
            self.compressor = Some(compressor);
        }
        Ok(self.compressor.as_mut().expect("it was just made"))
    }

    fn write_frame(&mut self) -> io::Result<()> {
        if self.table.0.len() == MAX_FRAMES {
            return Err(invalid(format!("more than {MAX_FRAMES} frames of {} bytes", self.frame_size)));
        }
        let content = std::mem::take(&mut self.pending);
        let mut compressed = Vec::new();
        let most = zstd_safe::compress_bound(content.len());
        compressed.try_reserve_exact(most).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.compressor()?.compress2(&mut compressed, &content).map_err(failed)?;
        self.output.write_all(&compressed)?;
        let (compressed_start, start) = self.table.starts(self.table.0.len());
        self.table.0.push(Frame {
            compressed_end: compressed_start + compressed.len() as u64,
            end: start + content.len() as u64,
            checksum: self.has_checksums.then(|| content_checksum(&content)),
        });
        self.pending = content;
        self.pending.clear();
        Ok(())
    }
}

fn failed(code: zstd_safe::ErrorCode) -> io::Error {
    io::Error::other(format!("zstd: {}", zstd_safe::get_error_name(code)))
}

impl<W: Write> Write for SeekableZstdWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.frame_size - self.pending.len());
        self.pending.try_reserve(taken).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == self.frame_size {
            self.write_frame()?;
        }
        Ok(taken)
    }

    /// Flushes the output. What makes no whole frame yet is written by [`finish`](Self::finish).
    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

impl<W> fmt::Debug for SeekableZstdWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeekableZstdWriter")
            .field("frame_size", &self.frame_size)
            .field("level", &self.level)
            .field("checksums", &self.has_checksums)
            .field("frames", &self.table.0.len())
            .finish_non_exhaustive()
    }
}
