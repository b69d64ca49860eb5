//! The file format: what lies where. Described in the module's docs.

use std::io;

use crate::snapshot::sink::{Geometry, Region};

pub(crate) const MAGIC: [u8; 8] = *b"UFFDSNAP";
pub(crate) const END_MAGIC: [u8; 8] = *b"UFFDSEND";
/// Of files of version 2, so that a reader that begins at the end knows what it reads.
pub(crate) const END_MAGIC_2: [u8; 8] = *b"UFFDSEN2";
/// Pages, each with a checksum.
pub(crate) const VERSION_PAGES: u32 = 1;
/// Chunks, each compressed and with a checksum.
pub(crate) const VERSION_CHUNKS: u32 = 2;

/// Sizes of the parts of a file, in bytes, fixed by the format. The header and the footer have the same.
pub(crate) const HEADER_BYTES: usize = 64;
pub(crate) const REGION_BYTES: usize = 24;
pub(crate) const EXTENT_BYTES: usize = 24;
pub(crate) const CHECKSUM_BYTES: usize = 4;
pub(crate) const CHUNK_BYTES: usize = 20;
/// What stands before the regions in the index of version 2: a hash of all behind it, the header once more, three numbers.
pub(crate) const HASH_BYTES: usize = 32;
pub(crate) const HEAD_BYTES: usize = HASH_BYTES + HEADER_BYTES + 24;

/// The logarithm of the largest block to base 2: the page size of no machine is larger.
const MAX_BLOCK_LOGARITHM: u32 = 20;

/// Logarithms of the content of a chunk to base 2: 64 KiB to 2 MiB.
pub(crate) const CHUNK_LOGARITHMS: std::ops::RangeInclusive<u32> = 16..=21;

/// Where an extent of zeros or of lost pages has its data: nowhere. Real data never begin in the header.
const ZERO: u64 = 0;
const GONE: u64 = 1;

/// The id of a snapshot: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub(crate) [u8; 16]);

impl std::fmt::Display for SnapshotId {
    /// In hexadecimal.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

/// Why a snapshot file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file can't be read.
    #[error("the snapshot file can't be read: {0}")]
    Io(io::Error),

    /// The file is of another kind.
    #[error("the file is no snapshot")]
    NotASnapshot,

    /// The file is of a version that this crate doesn't know.
    #[error("the snapshot file is of version {0}, which isn't known here; 1 and 2 are")]
    UnknownVersion(u32),

    /// The end of the file is missing: it was never finished, or not copied as a whole.
    #[error("the snapshot file is cut short, or was never finished")]
    CutShort,

    /// Some part of the file isn't as it was written.
    #[error("the snapshot file is damaged: {0}")]
    Damaged(&'static str),

    /// The chunks are compressed in a way for which this build of the crate lacks the cargo feature.
    #[error("the snapshot file is compressed with {0}, which takes this crate's feature `{0}`")]
    NotBuiltIn(&'static str),

    /// The snapshot is incremental, and needs the one that it follows: [`SnapshotReader::on`](super::super::SnapshotReader::on).
    #[error("the snapshot holds what has changed since {parent}, which is needed, too")]
    NeedsParent {
        /// The one that is needed.
        parent: SnapshotId,
    },

    /// The files aren't snapshots that follow each other.
    #[error("the snapshots are no chain: {0}")]
    NotAChain(&'static str),

    /// One of several files is refused.
    #[error("{}: {error}", path.display())]
    File {
        /// Its path.
        path: std::path::PathBuf,
        /// Why it is refused.
        error: Box<FormatError>,
    },

    /// The other snapshot isn't the one that this one follows, or is of memory of another size.
    #[error("{}, and can't be put on {found}", Follows(*expected))]
    WrongParent {
        /// The one that is needed. `None` if it is complete by itself.
        expected: Option<SnapshotId>,
        /// The one that was given.
        found: SnapshotId,
    },
}

/// What a snapshot follows, for a text.
struct Follows(Option<SnapshotId>);

impl std::fmt::Display for Follows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(id) => write!(f, "the snapshot follows {id}"),
            None => f.write_str("the snapshot holds all of its memory, follows no other one"),
        }
    }
}

impl From<io::Error> for FormatError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl FormatError {
    /// Returns whether the file was never finished, or is cut short: what is left of a program that ended while it
    /// wrote. Also true of an empty file, and of one whose content didn't come to the disk.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        match self {
            FormatError::CutShort => true,
            FormatError::File { error, .. } => error.is_unfinished(),
            _ => false,
        }
    }
}

/// What lies in some blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Bytes, from this offset of the file on.
    Data(u64),
    Zero,
    Gone,
}

/// Blocks side by side with the same kind of content; of data also side by side in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) first: u64,
    pub(crate) blocks: u64,
    pub(crate) place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Bytes of a block: a power of two.
    pub(crate) block: u64,
    pub(crate) id: SnapshotId,
    pub(crate) parent: Option<SnapshotId>,
    /// Bytes of content of a chunk, in version 2: a power of two.
    pub(crate) chunk: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Whether it is of version 2.
    pub(crate) has_chunks: bool,
    pub(crate) id: SnapshotId,
    /// Where the index begins: regions, extents, checksums.
    pub(crate) index: u64,
    pub(crate) regions: u64,
    pub(crate) extents: u64,
    /// Of version 2: chunks.
    pub(crate) checksums: u64,
    /// Of version 2: 0, since the index has a hash.
    pub(crate) index_crc: u32,
}

impl Footer {
    /// Bytes of the index of version 1, if that is a number.
    pub(crate) fn index_len(&self) -> Option<u64> {
        let of = |count: u64, size: usize| count.checked_mul(size as u64);
        of(self.regions, REGION_BYTES)?
            .checked_add(of(self.extents, EXTENT_BYTES)?)?
            .checked_add(of(self.checksums, CHECKSUM_BYTES)?)
    }
}

/// Writes numbers one behind the other, and a checksum of all before.
struct Writer([u8; HEADER_BYTES], usize);

impl Writer {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0[self.1..self.1 + bytes.len()].copy_from_slice(bytes);
        self.1 += bytes.len();
        self
    }

    fn seal(&mut self) -> [u8; HEADER_BYTES] {
        let crc = crc32fast::hash(&self.0[..HEADER_BYTES - 4]);
        self.1 = HEADER_BYTES - 4;
        self.put(&crc.to_le_bytes());
        self.0
    }
}

/// Whether the last four bytes are the checksum of the others.
fn is_sealed(bytes: &[u8; HEADER_BYTES]) -> bool {
    crc32fast::hash(&bytes[..HEADER_BYTES - 4]).to_le_bytes() == bytes[HEADER_BYTES - 4..]
}

/// The number at an offset.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("the caller knows the length"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("the caller knows the length"))
}

fn id_at(bytes: &[u8], at: usize) -> SnapshotId {
    SnapshotId(*bytes[at..].first_chunk().expect("the caller knows the length"))
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut writer = Writer([0; HEADER_BYTES], 0);
        let version = if self.chunk.is_some() { VERSION_CHUNKS } else { VERSION_PAGES };
        writer.put(&MAGIC).put(&version.to_le_bytes()).put(&self.block.trailing_zeros().to_le_bytes());
        writer.put(&self.id.0).put(&self.parent.map_or([0; 16], |parent| parent.0));
        writer.put(&self.chunk.map_or(0, u64::trailing_zeros).to_le_bytes());
        writer.seal()
    }

    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..8] != MAGIC {
            return Err(FormatError::NotASnapshot);
        }
        // Of another version everything behind may mean something else.
        if !is_sealed(bytes) {
            return Err(FormatError::Damaged("its header"));
        }
        let (shift, chunk) = (u32_at(bytes, 12), u32_at(bytes, 48));
        let chunk = match u32_at(bytes, 8) {
            VERSION_PAGES => None,
            VERSION_CHUNKS if CHUNK_LOGARITHMS.contains(&chunk) && shift <= chunk => Some(1 << chunk),
            VERSION_CHUNKS => return Err(FormatError::Damaged("its header")),
            version => return Err(FormatError::UnknownVersion(version)),
        };
        if !(9..=MAX_BLOCK_LOGARITHM).contains(&shift) {
            return Err(FormatError::Damaged("its header"));
        }
        let parent = id_at(bytes, 32);
        let parent = (parent.0 != [0; 16]).then_some(parent);
        Ok(Self { block: 1 << shift, id: id_at(bytes, 16), parent, chunk })
    }
}

impl Footer {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut writer = Writer([0; HEADER_BYTES], 0);
        let magic = if self.has_chunks { END_MAGIC_2 } else { END_MAGIC };
        writer.put(&magic).put(&self.id.0[..8]);
        for number in [self.index, self.regions, self.extents, self.checksums] {
            writer.put(&number.to_le_bytes());
        }
        writer.put(&self.id.0[8..]).put(&self.index_crc.to_le_bytes());
        writer.seal()
    }

    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let has_chunks = bytes[..8] == END_MAGIC_2;
        if !has_chunks && bytes[..8] != END_MAGIC {
            return Err(FormatError::CutShort);
        }
        if !is_sealed(bytes) {
            return Err(FormatError::Damaged("its footer"));
        }
        let mut id = [0; 16];
        id[..8].copy_from_slice(&bytes[8..16]);
        id[8..].copy_from_slice(&bytes[48..56]);
        Ok(Self {
            has_chunks,
            id: SnapshotId(id),
            index: u64_at(bytes, 16),
            regions: u64_at(bytes, 24),
            extents: u64_at(bytes, 32),
            checksums: u64_at(bytes, 40),
            index_crc: u32_at(bytes, 56),
        })
    }
}

/// Regions and extents, as they lie in the index.
pub(crate) fn encode_index(index: &mut Vec<u8>, geometry: &Geometry, extents: &[Extent]) {
    for region in &geometry.regions {
        for number in [region.addresses.start, region.addresses.end, region.page] {
            index.extend(number.to_le_bytes());
        }
    }
    for extent in extents {
        let place = match extent.place {
            Place::Data(offset) => offset,
            Place::Zero => ZERO,
            Place::Gone => GONE,
        };
        for number in [extent.first, extent.blocks, place] {
            index.extend(number.to_le_bytes());
        }
    }
}

/// A chunk as it lies in the index of version 2: how it is compressed and the bytes that it takes, and its hash.
pub(crate) fn encode_chunk(stored: u32, codec: u8, hash: &[u8; 16]) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&(stored | u32::from(codec) << 24).to_le_bytes());
    bytes[4..].copy_from_slice(hash);
    bytes
}

/// The same.
pub(crate) fn decode_chunk(bytes: &[u8]) -> (u32, u8, [u8; 16]) {
    let first = u32_at(bytes, 0);
    (first & 0xff_ffff, (first >> 24) as u8, *bytes[4..].first_chunk().expect("the caller knows the length"))
}

/// The numbers in front of the regions in the index of version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Bytes of content of all chunks.
    pub(crate) content: u64,
    /// How many of them, from the first on, are the working set's.
    pub(crate) hot: u64,
    /// Bytes that the working set itself takes in the index.
    pub(crate) set: u64,
}

impl Head {
    pub(crate) fn encode(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (place, number) in bytes.chunks_exact_mut(8).zip([self.content, self.hot, self.set]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        Self { content: u64_at(bytes, 0), hot: u64_at(bytes, 8), set: u64_at(bytes, 16) }
    }
}

/// A region as it lies in the index.
pub(crate) fn decode_region(bytes: &[u8]) -> Region {
    Region { addresses: u64_at(bytes, 0)..u64_at(bytes, 8), page: u64_at(bytes, 16) }
}

/// An extent, likewise.
pub(crate) fn decode_extent(bytes: &[u8]) -> Extent {
    let place = match u64_at(bytes, 16) {
        ZERO => Place::Zero,
        GONE => Place::Gone,
        offset => Place::Data(offset),
    };
    Extent { first: u64_at(bytes, 0), blocks: u64_at(bytes, 8), place }
}
