//! The seek table: where each frame lies, and what it holds.

use std::io;

use super::error::ZstdError;
use crate::source::{PageData, PageSource};

/// What the skippable frame of the table begins with, and what the file ends with. Little-endian, as all numbers.
const SKIPPABLE_MAGIC: u32 = 0x184d_2a5e;
const FOOTER_MAGIC: u32 = 0x8f92_eab1;
const SKIPPABLE_BYTES: u64 = 8;
const FOOTER_BYTES: u64 = 9;

/// In the descriptor: entries have checksums; and bits that must be zero.
const CHECKSUMS: u8 = 0x80;
const RESERVED: u8 = 0x7c;

/// Frames that the format allows.
pub(super) const MAX_FRAMES: usize = 0x800_0000;

/// Bytes of a table that are read at once.
const PIECE_BYTES: u64 = 48 << 10;

/// One frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// Where it ends in the file, and in the content.
    pub(super) compressed_end: u64,
    pub(super) end: u64,
    /// The low half of the XXH64 of its content.
    pub(super) checksum: Option<u32>,
}

/// All frames, in order.
#[derive(Debug, Default)]
pub(super) struct Table(pub(super) Vec<Frame>);

fn damaged(what: &'static str) -> io::Error {
    ZstdError::DamagedTable(what).into()
}

fn read(source: &impl PageSource, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    if source.read(offset, bytes)? == PageData::Zero {
        bytes.fill(0);
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("the caller knows the length"))
}

impl Table {
    /// Reads the table of a file of `len` bytes. Takes memory for no more frames than the file has bytes for.
    pub(super) fn read(source: &impl PageSource, len: u64, max_frame: u64) -> io::Result<Self> {
        let mut footer = [0; FOOTER_BYTES as usize];
        let Some(footer_at) = len.checked_sub(FOOTER_BYTES) else {
            return Err(ZstdError::NotSeekable.into());
        };
        read(source, footer_at, &mut footer)?;
        if u32_at(&footer, 5) != FOOTER_MAGIC {
            return Err(ZstdError::NotSeekable.into());
        }
        let (frames, descriptor) = (u32_at(&footer, 0) as usize, footer[4]);
        if descriptor & RESERVED != 0 {
            return Err(ZstdError::UnknownTable(descriptor).into());
        }
        if frames > MAX_FRAMES {
            return Err(damaged("it has more frames than the format allows"));
        }
        let has_checksums = descriptor & CHECKSUMS != 0;
        let entry = if has_checksums { 12 } else { 8 };
        let entries = frames as u64 * entry;
        let Some(start) = footer_at.checked_sub(entries + SKIPPABLE_BYTES) else {
            return Err(damaged("it is longer than the file"));
        };
        let mut header = [0; SKIPPABLE_BYTES as usize];
        read(source, start, &mut header)?;
        if u32_at(&header, 0) != SKIPPABLE_MAGIC || u64::from(u32_at(&header, 4)) != entries + FOOTER_BYTES {
            return Err(damaged("it doesn't begin where it must"));
        }
        let (mut table, mut piece) = (Self::default(), Vec::new());
        let (mut compressed_end, mut end, mut at) = (0, 0, start + SKIPPABLE_BYTES);
        while at < footer_at {
            piece.resize(PIECE_BYTES.min(footer_at - at) as usize, 0);
            read(source, at, &mut piece)?;
            for bytes in piece.chunks_exact(entry as usize) {
                let frame = table.0.len();
                let (compressed, content) = (u64::from(u32_at(bytes, 0)), u64::from(u32_at(bytes, 4)));
                if compressed < SKIPPABLE_BYTES {
                    return Err(damaged("a frame is shorter than its own header"));
                }
                if let Some(len) = [content, compressed / 2].into_iter().find(|len| *len > max_frame) {
                    return Err(ZstdError::LongFrame { frame, len, limit: max_frame }.into());
                }
                compressed_end += compressed;
                end += content;
                if compressed_end > start {
                    return Err(damaged("its frames are longer than the file"));
                }
                table.0.try_reserve(1).map_err(|_| io::ErrorKind::OutOfMemory)?;
                let checksum = has_checksums.then(|| u32_at(bytes, 8));
                table.0.push(Frame { compressed_end, end, checksum });
            }
            at += piece.len() as u64;
        }
        Ok(table)
    }

    /// The length of the content.
    pub(super) fn len(&self) -> u64 {
        self.0.last().map_or(0, |frame| frame.end)
    }

    /// The number of the frame in which a byte of the content is.
    pub(super) fn at(&self, offset: u64) -> usize {
        self.0.partition_point(|frame| frame.end <= offset)
    }

    /// Where a frame begins, in the file and in the content.
    pub(super) fn starts(&self, frame: usize) -> (u64, u64) {
        let before = frame.checked_sub(1).map(|before| &self.0[before]);
        before.map_or((0, 0), |before| (before.compressed_end, before.end))
    }

    /// The table as it lies in a file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let has_checksums = self.0.first().is_some_and(|frame| frame.checksum.is_some());
        let entry = if has_checksums { 12 } else { 8 };
        let mut bytes = Vec::with_capacity(self.0.len() * entry + 17);
        let len = self.0.len() * entry + FOOTER_BYTES as usize;
        // Within 32 bits: MAX_FRAMES.
        bytes.extend([SKIPPABLE_MAGIC, len as u32].map(u32::to_le_bytes).as_flattened());
        let (mut compressed_start, mut start) = (0, 0);
        for frame in &self.0 {
            let sizes = [frame.compressed_end - compressed_start, frame.end - start];
            bytes.extend(sizes.map(|size| (size as u32).to_le_bytes()).as_flattened());
            bytes.extend(frame.checksum.iter().flat_map(|checksum| checksum.to_le_bytes()));
            (compressed_start, start) = (frame.compressed_end, frame.end);
        }
        bytes.extend((self.0.len() as u32).to_le_bytes());
        bytes.push(if has_checksums { CHECKSUMS } else { 0 });
        bytes.extend(FOOTER_MAGIC.to_le_bytes());
        bytes
    }
}
