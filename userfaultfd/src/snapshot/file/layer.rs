//! One snapshot file, opened and checked.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::{
    CHECKSUM_BYTES, EXTENT_BYTES, Footer, FormatError, HEADER_BYTES, Header, MAGIC, Place, REGION_BYTES,
    decode_extent, decode_region,
};
use crate::snapshot::sink::Region;

/// Bytes of the index that are read at a time: whole regions, extents, checksums.
const INDEX_PIECE_BYTES: usize = 24 << 10;

/// Blocks side by side with the same kind of content, and where their checksums are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) first: u64,
    pub(crate) blocks: u64,
    pub(crate) place: Place,
    /// Of data: the first of the checksums of its file.
    pub(crate) checksum: u64,
    /// The file that it is in.
    pub(crate) layer: u32,
}

impl Stretch {
    pub(crate) fn end(&self) -> u64 {
        self.first + self.blocks
    }

    /// The same without what lies outside of some blocks.
    pub(crate) fn cut(&self, first: u64, end: u64, block: u64) -> Option<Stretch> {
        let (start, end) = (self.first.max(first), self.end().min(end));
        (start < end).then(|| {
            let into = start - self.first;
            let place = match self.place {
                Place::Data(offset) => Place::Data(offset + into * block),
                place => place,
            };
            let checksum = self.checksum + into;
            Stretch { first: start, blocks: end - start, place, checksum, layer: self.layer }
        })
    }
}

/// A snapshot file.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Where it can be opened again.
    pub(crate) path: Option<PathBuf>,
    /// `None` where many files would be open otherwise.
    pub(crate) file: Option<File>,
    pub(crate) header: Header,
    pub(crate) regions: Vec<Region>,
    /// Where the checksums of all blocks of data are, in order, and how many. They are read as they are needed: a small
    /// file with holes may claim any number.
    checksums_at: u64,
    pub(crate) checksums: u64,
    pub(crate) gone: u64,
}

impl Layer {
    /// Opens and checks a file. Returns what lies in it, too, as of layer 0, and how many bytes the snapshot has.
    pub(crate) fn open(file: File, path: Option<PathBuf>) -> Result<(Self, Vec<Stretch>, u64), FormatError> {
        let size = file.metadata()?.len();
        let header = read_header(&file, size)?;
        if size < header.block + HEADER_BYTES as u64 {
            return Err(FormatError::CutShort);
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, size - HEADER_BYTES as u64)?;
        let footer = Footer::decode(&bytes)?;
        if footer.id != header.id {
            return Err(FormatError::Damaged("its ends are of two snapshots"));
        }
        let len = footer.index_len();
        if len.and_then(|len| len.checked_add(footer.index)?.checked_add(HEADER_BYTES as u64)) != Some(size) {
            return Err(FormatError::Damaged("its length"));
        }
        check_index(&file, &footer)?;
        let mut at = footer.index;
        let regions: Vec<Region> =
            read_all(&file, &mut at, footer.regions, REGION_BYTES, |bytes| Some(decode_region(bytes)))?;
        let damaged = || FormatError::Damaged("its index makes no sense");
        let block = header.block;
        let mut len = 0u64;
        for region in &regions {
            let size = region.addresses.end.checked_sub(region.addresses.start);
            let size = size.filter(|size| *size > 0 && size % block == 0);
            len = size.and_then(|size| len.checked_add(size)).ok_or_else(damaged)?;
        }
        let (mut next, mut checksums, mut gone) = (0, 0u64, 0u64);
        let mut sound = true;
        let stretches = read_all(&file, &mut at, footer.extents, EXTENT_BYTES, |bytes| {
            let extent = decode_extent(bytes);
            let end = extent.first.checked_add(extent.blocks).filter(|end| *end <= len / block);
            let gap = extent.first > next && header.parent.is_none();
            sound &= end.is_some() && extent.first >= next && extent.blocks > 0 && !gap;
            let checksum = checksums;
            match extent.place {
                Place::Data(offset) => {
                    let inside = extent.blocks.checked_mul(block).and_then(|size| offset.checked_add(size));
                    sound &= offset >= block && offset % block == 0;
                    sound &= inside.is_some_and(|end| end <= footer.index);
                    checksums = checksums.saturating_add(extent.blocks);
                }
                Place::Gone => gone = gone.saturating_add(extent.blocks),
                Place::Zero => {}
            }
            next = end.unwrap_or(next);
            sound.then_some(Stretch {
                first: extent.first,
                blocks: extent.blocks,
                place: extent.place,
                checksum,
                layer: 0,
            })
        });
        let stretches = stretches?;
        let whole = next == len / block || header.parent.is_some();
        if !whole || checksums != footer.checksums {
            return Err(damaged());
        }
        let (file, gone, checksums_at) = (Some(file), gone * block, at);
        Ok((Self { path, file, header, regions, checksums_at, checksums, gone }, stretches, len))
    }

    /// Whether blocks of data of the file have their checksums, of which this is the first.
    pub(super) fn are_whole(&self, file: &File, first: u64, bytes: &[u8]) -> io::Result<bool> {
        let (block, mut at) = (self.header.block as usize, self.checksums_at + first * CHECKSUM_BYTES as u64);
        let mut checksums = [0; CHECKSUM_BYTES << 8];
        for bytes in bytes.chunks(block << 8) {
            let checksums = &mut checksums[..bytes.len() / block * CHECKSUM_BYTES];
            file.read_exact_at(checksums, at)?;
            at += checksums.len() as u64;
            let mut blocks = bytes.chunks_exact(block).zip(checksums.chunks_exact(CHECKSUM_BYTES));
            if !blocks.all(|(bytes, checksum)| crc32fast::hash(bytes).to_le_bytes() == *checksum) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Opens the file once more.
    pub(crate) fn open_again(&self) -> io::Result<File> {
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        let file = File::open(path)?;
        let header = read_header(&file, file.metadata()?.len());
        if header.is_ok_and(|header| header == self.header) {
            return Ok(file);
        }
        let text = format!("{}: another file is there than the one that was opened", path.display());
        Err(io::Error::new(ErrorKind::InvalidData, text))
    }
}

/// Reads the header of a file of `size` bytes. An unfinished file counts as cut short, also if nothing was written yet, or
/// its beginning didn't reach the disk.
pub(crate) fn read_header(file: &File, size: u64) -> Result<Header, FormatError> {
    let mut bytes = [0; HEADER_BYTES];
    let len = HEADER_BYTES.min(usize::try_from(size).unwrap_or(HEADER_BYTES));
    file.read_exact_at(&mut bytes[..len], 0)?;
    let begun = bytes[..len].iter().all(|byte| *byte == 0) || MAGIC.starts_with(&bytes[..len.min(8)]);
    if begun && (len < HEADER_BYTES || bytes[0] == 0) {
        return Err(FormatError::CutShort);
    }
    if len < HEADER_BYTES {
        return Err(FormatError::NotASnapshot);
    }
    Header::decode(&bytes)
}

/// Compares the index with its checksum before any of it is believed.
fn check_index(file: &File, footer: &Footer) -> Result<(), FormatError> {
    let mut hasher = crc32fast::Hasher::new();
    let mut bytes = [0; INDEX_PIECE_BYTES];
    let (mut at, end) = (footer.index, footer.index + footer.index_len().unwrap_or(0));
    while at < end {
        let len = INDEX_PIECE_BYTES.min(usize::try_from(end - at).unwrap_or(INDEX_PIECE_BYTES));
        file.read_exact_at(&mut bytes[..len], at)?;
        hasher.update(&bytes[..len]);
        at += len as u64;
    }
    if hasher.finalize() == footer.index_crc { Ok(()) } else { Err(FormatError::Damaged("its index")) }
}

/// Reads `count` items of `size` bytes, up to an invalid one. Memory is allocated piece by piece, for items that exist.
fn read_all<T>(
    file: &File,
    at: &mut u64,
    count: u64,
    size: usize,
    mut decode: impl FnMut(&[u8]) -> Option<T>,
) -> Result<Vec<T>, FormatError> {
    let mut bytes = [0; INDEX_PIECE_BYTES];
    let (mut all, mut left) = (Vec::new(), count);
    while left > 0 {
        let some = usize::try_from(left).unwrap_or(usize::MAX).min(INDEX_PIECE_BYTES / size);
        file.read_exact_at(&mut bytes[..some * size], *at)?;
        all.try_reserve(some).map_err(|_| io::Error::from(ErrorKind::OutOfMemory))?;
        for bytes in bytes[..some * size].chunks_exact(size) {
            all.push(decode(bytes).ok_or(FormatError::Damaged("its index makes no sense"))?);
        }
        *at += (some * size) as u64;
        left -= some as u64;
    }
    Ok(all)
}
