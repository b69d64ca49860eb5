//! One snapshot file, opened and checked.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chunks::{Chunks, TableReader};
use super::format::{
    CHECKSUM_BYTES, CHUNK_BYTES, EXTENT_BYTES, Footer, FormatError, HASH_BYTES, HEAD_BYTES, HEADER_BYTES,
    Head, Header, MAGIC, Place, REGION_BYTES, decode_extent, decode_region,
};
use super::input::{Input, Window};
use crate::snapshot::sink::Region;

/// Bytes of the index that are read at a time: whole regions, extents, checksums.
const INDEX_PIECE_BYTES: usize = 24 << 10;

/// The longest working set that an index may have: of some million runs.
const MAX_SET_BYTES: u64 = 64 << 20;

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

/// What the data of a file are.
#[derive(Debug)]
pub(crate) enum Body {
    /// Version 1: pages as they are. Their checksums are read as they are needed: a small file with holes may claim any
    /// number.
    Pages { checksums_at: u64, checksums: u64 },
    /// Version 2.
    Chunks(Chunks),
}

/// A snapshot file.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Where it can be opened again.
    pub(crate) path: Option<PathBuf>,
    /// `None` where many files would be open otherwise.
    pub(crate) input: Option<Input>,
    pub(crate) header: Header,
    pub(crate) regions: Vec<Region>,
    pub(crate) body: Body,
    pub(crate) gone: u64,
    /// The working set as it lies in the index of version 2, if there is one.
    #[cfg_attr(not(feature = "pager"), expect(dead_code, reason = "a pager replays it"))]
    pub(crate) set: Vec<u8>,
}

/// What an index says of the place of its parts.
struct Parts {
    header: Header,
    /// Where the regions begin.
    at: u64,
    /// Where data may be, by the numbers of extents.
    data_end: u64,
    head: Option<Head>,
}

const NO_SENSE: FormatError = FormatError::Damaged("its index makes no sense");

impl Layer {
    /// Opens and checks a file. Returns what lies in it, too, as of layer 0, and how many bytes the snapshot has.
    pub(crate) fn open(
        input: Input,
        path: Option<PathBuf>,
    ) -> Result<(Self, Vec<Stretch>, u64), FormatError> {
        let mut window = Window::new(&input)?;
        let (footer, parts) = read_parts(&input, &mut window)?;
        let Parts { header, mut at, data_end, head } = parts;
        let regions: Vec<Region> = read_all(&mut window, &mut at, footer.regions, REGION_BYTES, |bytes| {
            Ok(Some(decode_region(bytes)))
        })?;
        let block = header.block;
        let mut len = 0u64;
        for region in &regions {
            let size = region.addresses.end.checked_sub(region.addresses.start);
            let size = size.filter(|size| *size > 0 && size % block == 0);
            len = size.and_then(|size| len.checked_add(size)).ok_or(NO_SENSE)?;
        }
        let (mut next, mut checksums, mut gone) = (0, 0u64, 0u64);
        let mut sound = true;
        let stretches = read_all(&mut window, &mut at, footer.extents, EXTENT_BYTES, |bytes| {
            let extent = decode_extent(bytes);
            let end = extent.first.checked_add(extent.blocks).filter(|end| *end <= len / block);
            let gap = extent.first > next && header.parent.is_none();
            sound &= end.is_some() && extent.first >= next && extent.blocks > 0 && !gap;
            let checksum = checksums;
            match extent.place {
                Place::Data(offset) => {
                    let inside = extent.blocks.checked_mul(block).and_then(|size| offset.checked_add(size));
                    sound &= offset >= block && offset % block == 0;
                    sound &= inside.is_some_and(|end| end <= data_end);
                    checksums = checksums.saturating_add(extent.blocks);
                }
                Place::Gone => gone = gone.saturating_add(extent.blocks),
                Place::Zero => {}
            }
            next = end.unwrap_or(next);
            let (first, blocks, place) = (extent.first, extent.blocks, extent.place);
            Ok(sound.then_some(Stretch { first, blocks, place, checksum, layer: 0 }))
        })?;
        let whole = next == len / block || header.parent.is_some();
        // All content is shown, and once: a few bytes of an index must not stand for any number of pages.
        let is_shown = match &head {
            None => checksums == footer.checksums,
            Some(head) => checksums.checked_mul(block) == Some(head.content),
        };
        if !whole || !is_shown {
            return Err(NO_SENSE);
        }
        let (body, set) = match head {
            None => (Body::Pages { checksums_at: at, checksums }, Vec::new()),
            Some(head) => read_chunks(&mut window, at, &header, &footer, head)?,
        };
        drop(window);
        let (input, gone) = (Some(input), gone * block);
        Ok((Self { path, input, header, regions, body, gone, set }, stretches, len))
    }

    /// Reads data from an offset on, whose checksums are those from `checksum` on, and checks them.
    pub(super) fn read(
        &self,
        input: &Input,
        offset: u64,
        checksum: u64,
        bytes: &mut [u8],
        early: bool,
    ) -> Result<(), FormatError> {
        match &self.body {
            // As if the stream began where the data of version 1 do.
            Body::Chunks(chunks) => {
                chunks.read(input, offset - self.header.block, bytes, early).map_err(from_io)
            }
            Body::Pages { checksums_at, .. } => {
                input.read_exact_at(bytes, offset, early)?;
                let checksum_at = checksums_at + checksum * CHECKSUM_BYTES as u64;
                if self.are_whole(input, checksum_at, bytes, early)? {
                    Ok(())
                } else {
                    Err(FormatError::Damaged("a page doesn't have its checksum"))
                }
            }
        }
    }

    /// Whether blocks of data of the file have their checksums, of which the first is here.
    fn are_whole(&self, input: &Input, mut at: u64, bytes: &[u8], early: bool) -> io::Result<bool> {
        let block = self.header.block as usize;
        let mut checksums = [0; CHECKSUM_BYTES << 8];
        for bytes in bytes.chunks(block << 8) {
            let checksums = &mut checksums[..bytes.len() / block * CHECKSUM_BYTES];
            input.read_exact_at(checksums, at, early)?;
            at += checksums.len() as u64;
            let mut blocks = bytes.chunks_exact(block).zip(checksums.chunks_exact(CHECKSUM_BYTES));
            if !blocks.all(|(bytes, checksum)| crc32fast::hash(bytes).to_le_bytes() == *checksum) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Opens the file once more.
    pub(crate) fn open_again(&self) -> io::Result<Input> {
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        let input = Input::File(Arc::new(File::open(path)?));
        let header = read_header(&input);
        if header.is_ok_and(|header| header == self.header) {
            return Ok(input);
        }
        let text = format!("{}: another file is there than the one that was opened", path.display());
        Err(io::Error::new(ErrorKind::InvalidData, text))
    }
}

/// An error of a chunk by what it is.
fn from_io(error: io::Error) -> FormatError {
    match error.downcast::<FormatError>() {
        Ok(error) => error,
        Err(error) => FormatError::Io(error),
    }
}

/// Reads the header of a file. An unfinished file counts as cut short, also if nothing was written yet, or its beginning
/// didn't reach the disk.
pub(crate) fn read_header(input: &Input) -> Result<Header, FormatError> {
    let mut bytes = [0; HEADER_BYTES];
    let len = HEADER_BYTES.min(usize::try_from(input.len()?).unwrap_or(HEADER_BYTES));
    input.read_exact_at(&mut bytes[..len], 0, false)?;
    let begun = bytes[..len].iter().all(|byte| *byte == 0) || MAGIC.starts_with(&bytes[..len.min(8)]);
    if begun && (len < HEADER_BYTES || bytes[0] == 0) {
        return Err(FormatError::CutShort);
    }
    if len < HEADER_BYTES {
        return Err(FormatError::NotASnapshot);
    }
    Header::decode(&bytes)
}

/// Reads the ends of a file, and compares the index with its checksum before any of it is believed.
fn read_parts(input: &Input, window: &mut Window<'_>) -> Result<(Footer, Parts), FormatError> {
    let size = window.len;
    let mut bytes = [0; HEADER_BYTES];
    // What isn't a file has its end first: of version 2 all is there.
    let is_file = matches!(input, Input::File(_));
    let end = match size.checked_sub(HEADER_BYTES as u64) {
        Some(end) if !is_file => {
            window.read_exact_at(&mut bytes, end)?;
            Footer::decode(&bytes).ok().filter(|footer| footer.has_chunks)
        }
        _ => None,
    };
    let (footer, header) = match end {
        Some(footer) => (footer, None),
        None => {
            let header = read_header(input)?;
            let data = if header.chunk.is_some() { HEADER_BYTES as u64 } else { header.block };
            if size < data + HEADER_BYTES as u64 {
                return Err(FormatError::CutShort);
            }
            window.read_exact_at(&mut bytes, size - HEADER_BYTES as u64)?;
            (Footer::decode(&bytes)?, Some(header))
        }
    };
    let rest = size.checked_sub(HEADER_BYTES as u64).and_then(|end| end.checked_sub(footer.index));
    let rest = rest.ok_or(FormatError::Damaged("its length"))?;
    let parts = if footer.has_chunks {
        read_head(window, &footer, rest)?
    } else {
        let header = header.ok_or(FormatError::Damaged("its header"))?;
        if footer.index_len() != Some(rest) {
            return Err(FormatError::Damaged("its length"));
        }
        let mut hasher = crc32fast::Hasher::new();
        for_each_piece(window, footer.index, rest, |bytes| hasher.update(bytes))?;
        if hasher.finalize() != footer.index_crc {
            return Err(FormatError::Damaged("its index"));
        }
        Parts { header, at: footer.index, data_end: footer.index, head: None }
    };
    if footer.id != parts.header.id || header.is_some_and(|header| header != parts.header) {
        return Err(FormatError::Damaged("its ends are of two snapshots"));
    }
    Ok((footer, parts))
}

/// Reads what stands before the regions in an index of version 2, of which this is the length.
fn read_head(window: &mut Window<'_>, footer: &Footer, rest: u64) -> Result<Parts, FormatError> {
    if footer.index < HEADER_BYTES as u64 || rest < HEAD_BYTES as u64 {
        return Err(FormatError::Damaged("its length"));
    }
    let mut bytes = [0; HEAD_BYTES];
    window.read_exact_at(&mut bytes, footer.index)?;
    let mut hasher = blake3::Hasher::new();
    let hashed = HASH_BYTES as u64;
    for_each_piece(window, footer.index + hashed, rest - hashed, |bytes| {
        hasher.update(bytes);
    })?;
    if hasher.finalize().as_bytes() != &bytes[..HASH_BYTES] {
        return Err(FormatError::Damaged("its index"));
    }
    let (header, numbers) = bytes[HASH_BYTES..].split_first_chunk().expect("it is as long");
    let (header, head) = (Header::decode(header)?, Head::decode(numbers));
    let Some(chunk) = header.chunk else { return Err(NO_SENSE) };
    let of = |count: u64, size: usize| count.checked_mul(size as u64);
    let len = of(footer.regions, REGION_BYTES)
        .and_then(|len| len.checked_add(of(footer.extents, EXTENT_BYTES)?))
        .and_then(|len| len.checked_add(of(footer.checksums, CHUNK_BYTES)?))
        .and_then(|len| len.checked_add(head.set)?.checked_add(HEAD_BYTES as u64));
    if len != Some(rest) {
        return Err(FormatError::Damaged("its length"));
    }
    let data_end = head.content.checked_add(header.block);
    let is_sound = head.content % header.block == 0
        && head.hot <= head.content
        && head.set <= MAX_SET_BYTES
        && head.content.div_ceil(chunk) == footer.checksums;
    let (true, Some(data_end)) = (is_sound, data_end) else { return Err(NO_SENSE) };
    Ok(Parts { header, at: footer.index + HEAD_BYTES as u64, data_end, head: Some(head) })
}

/// Reads the table of chunks and the working set, which stand last in an index of version 2.
fn read_chunks(
    window: &mut Window<'_>,
    mut at: u64,
    header: &Header,
    footer: &Footer,
    head: Head,
) -> Result<(Body, Vec<u8>), FormatError> {
    let size = header.chunk.ok_or(NO_SENSE)?;
    let (start, len) = (HEADER_BYTES as u64, head.content);
    let mut reader = TableReader { size, len, index: footer.index, at: start, number: 0 };
    let table = read_all(window, &mut at, footer.checksums, CHUNK_BYTES, |bytes| reader.next(bytes))?;
    // Nothing lies between them, or behind them.
    if reader.at != footer.index {
        return Err(NO_SENSE);
    }
    let (mut set, len) = (Vec::new(), head.set as usize);
    set.try_reserve_exact(len).map_err(|_| io::Error::from(ErrorKind::OutOfMemory))?;
    set.resize(len, 0);
    window.read_exact_at(&mut set, at)?;
    Ok((Body::Chunks(Chunks::new(table, size, head.content, head.hot)), set))
}

fn for_each_piece(
    window: &mut Window<'_>,
    mut at: u64,
    len: u64,
    mut call: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut bytes = [0; INDEX_PIECE_BYTES];
    let end = at + len;
    while at < end {
        let len = INDEX_PIECE_BYTES.min(usize::try_from(end - at).unwrap_or(INDEX_PIECE_BYTES));
        window.read_exact_at(&mut bytes[..len], at)?;
        call(&bytes[..len]);
        at += len as u64;
    }
    Ok(())
}

/// Reads `count` items of `size` bytes, up to an invalid one. Memory is allocated piece by piece, for items that exist.
fn read_all<T>(
    window: &mut Window<'_>,
    at: &mut u64,
    count: u64,
    size: usize,
    mut decode: impl FnMut(&[u8]) -> Result<Option<T>, FormatError>,
) -> Result<Vec<T>, FormatError> {
    let mut bytes = [0; INDEX_PIECE_BYTES];
    let (mut all, mut left) = (Vec::new(), count);
    while left > 0 {
        let some = usize::try_from(left).unwrap_or(usize::MAX).min(INDEX_PIECE_BYTES / size);
        window.read_exact_at(&mut bytes[..some * size], *at)?;
        all.try_reserve(some).map_err(|_| io::Error::from(ErrorKind::OutOfMemory))?;
        for bytes in bytes[..some * size].chunks_exact(size) {
            all.push(decode(bytes)?.ok_or(NO_SENSE)?);
        }
        *at += (some * size) as u64;
        left -= some as u64;
    }
    Ok(all)
}
