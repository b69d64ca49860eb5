//! How the chunks of a file are compressed.

use std::io;

use super::format::FormatError;

/// How a [`SnapshotWriter`](crate::snapshot::SnapshotWriter) compresses chunks.
///
/// A chunk that doesn't become smaller is written as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// No compression.
    #[default]
    None,
    /// LZ4 (cargo feature `lz4`): fast in both directions.
    #[cfg(feature = "lz4")]
    Lz4,
    /// zstd (cargo feature `zstd`) with this level, as of the program `zstd`: smaller and slower.
    #[cfg(feature = "zstd")]
    Zstd(i32),
}

/// How one chunk is stored. The numbers are those of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Raw = 0,
    Lz4 = 1,
    Zstd = 2,
}

impl Codec {
    /// The codec of a number, if this build can decode it.
    pub(crate) fn of(number: u8) -> Result<Self, FormatError> {
        match number {
            0 => Ok(Self::Raw),
            1 if cfg!(feature = "lz4") => Ok(Self::Lz4),
            1 => Err(FormatError::NotBuiltIn("lz4")),
            2 if cfg!(feature = "zstd") => Ok(Self::Zstd),
            2 => Err(FormatError::NotBuiltIn("zstd")),
            _ => Err(FormatError::Damaged("a chunk is compressed in an unknown way")),
        }
    }
}

/// Compresses chunks.
#[derive(Default)]
pub(crate) struct Encoder {
    buffer: Vec<u8>,
    #[cfg(feature = "zstd")]
    zstd: Option<zstd_safe::CCtx<'static>>,
}

impl Encoder {
    /// Compresses a chunk. Returns the bytes to store: those of the chunk, if it doesn't become smaller.
    pub(crate) fn encode<'a>(
        &'a mut self,
        compression: Compression,
        content: &'a [u8],
    ) -> io::Result<(Codec, &'a [u8])> {
        let codec = match compression {
            Compression::None => Codec::Raw,
            #[cfg(feature = "lz4")]
            Compression::Lz4 => {
                self.make_room(lz4_flex::block::get_maximum_output_size(content.len()))?;
                let room = self.buffer.capacity();
                self.buffer.resize(room, 0);
                let len = lz4_flex::block::compress_into(content, &mut self.buffer);
                self.buffer.truncate(len.map_err(io::Error::other)?);
                Codec::Lz4
            }
            #[cfg(feature = "zstd")]
            Compression::Zstd(level) => {
                self.make_room(zstd_safe::compress_bound(content.len()))?;
                if self.zstd.is_none() {
                    self.zstd = Some(zstd_safe::CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?);
                }
                let context = self.zstd.as_mut().expect("it was just made");
                let done = context.compress(&mut self.buffer, content, level);
                done.map_err(|code| io::Error::other(format!("zstd: {}", zstd_safe::get_error_name(code))))?;
                Codec::Zstd
            }
        };
        if codec == Codec::Raw || self.buffer.len() >= content.len() {
            return Ok((Codec::Raw, content));
        }
        Ok((codec, &self.buffer))
    }

    #[cfg(any(feature = "lz4", feature = "zstd"))]
    fn make_room(&mut self, bytes: usize) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.try_reserve(bytes).map_err(|_| io::ErrorKind::OutOfMemory.into())
    }
}

/// Decompresses chunks.
#[derive(Default)]
pub(crate) struct Decoder {
    /// What was read, compressed.
    pub(crate) stored: Vec<u8>,
    #[cfg(feature = "zstd")]
    zstd: Option<zstd_safe::DCtx<'static>>,
}

impl Decoder {
    /// Decompresses a chunk into a buffer of its length. `false`: it isn't what it should be.
    pub(crate) fn decode(&mut self, codec: Codec, stored: &[u8], content: &mut [u8]) -> io::Result<bool> {
        match codec {
            Codec::Raw if stored.len() == content.len() => {
                content.copy_from_slice(stored);
                Ok(true)
            }
            #[cfg(feature = "lz4")]
            Codec::Lz4 => {
                let len = lz4_flex::block::decompress_into(stored, content);
                Ok(len.is_ok_and(|len| len == content.len()))
            }
            #[cfg(feature = "zstd")]
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Some(zstd_safe::DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?);
                }
                let context = self.zstd.as_mut().expect("it was just made");
                Ok(context.decompress(content, stored).is_ok_and(|len| len == content.len()))
            }
            _ => Ok(false),
        }
    }
}
