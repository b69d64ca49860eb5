//! [`WorkingSet`]: the pages that a program needs, in order; and the file that keeps them.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::PendingFile;

/// The pages of a region that a program has touched, in the order in which it first did.
///
/// A [`Recorder`](super::Recorder) makes one, and [`Pager::replay`](super::Pager::replay) fills the pages in that order
/// at the next start.
///
/// # The file
///
/// | bytes | what |
/// | --- | --- |
/// | 8 | `uffd-set` |
/// | 1 | the version of the format: 1 |
/// | 1 | the logarithm of the page size to base 2 |
/// | variable | how many pages the region has |
/// | variable | how many pages the set has |
/// | variable | runs of pages that follow each other, in order: where each begins, and how many more there are |
/// | 4 | the CRC-32 of all before, little-endian |
///
/// Numbers of variable length have seven bits in each byte, the lowest first; the eighth bit tells that another byte
/// follows. Where a run begins is told from where the run before it ended, doubled, or doubled and less by one with
/// the sign changed if it is before that. A run takes at least two bytes: more where it is longer than 128 pages, or begins
/// 64 pages or more from where the one before it ended. Eight bytes are enough for a run of any length up to 2²⁸ pages that
/// begins less than 2²⁷ pages from there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    page_size: usize,
    region_pages: usize,
    pages: Vec<usize>,
}

const MAGIC: [u8; 8] = *b"uffd-set";
const VERSION: u8 = 1;

impl WorkingSet {
    /// The pages must be the region's, each at most once.
    pub(crate) fn new(page_size: usize, region_pages: usize, pages: Vec<usize>) -> Self {
        Self { page_size, region_pages, pages }
    }

    /// The numbers of the pages, counted from the start of the region, in the order of the first touch.
    #[must_use]
    pub fn pages(&self) -> &[usize] {
        &self.pages
    }

    /// The page size of the region, in bytes.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// How many pages the region has.
    #[must_use]
    pub fn region_pages(&self) -> usize {
        self.region_pages
    }

    /// Writes it to a file, which replaces the one at `path` when it is complete: a [`PendingFile`].
    ///
    /// # Errors
    ///
    /// Those of open(2), write(2) and fsync(2). The old file is as it was then.
    pub fn save(&self, path: impl AsRef<Path>) -> io::Result<()> {
        PendingFile::replace(path, &self.encode())
    }

    /// Reads it from a file.
    ///
    /// # Errors
    ///
    /// Those of open(2) and read(2). Of the kind [`InvalidData`](ErrorKind::InvalidData): the file isn't a working set,
    /// is of a version that isn't known here, or damaged.
    pub fn load(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::decode(&fs::read(path)?).map_err(|text| io::Error::new(ErrorKind::InvalidData, text))
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([VERSION, self.page_size.trailing_zeros() as u8]);
        put(&mut bytes, self.region_pages as u64);
        put(&mut bytes, self.pages.len() as u64);
        let mut end = 0;
        for run in self.pages.chunk_by(|page, next| page + 1 == *next) {
            let distance = run[0] as i64 - end;
            put(&mut bytes, (distance << 1 ^ distance >> 63) as u64);
            put(&mut bytes, run.len() as u64 - 1);
            end = (run[0] + run.len()) as i64;
        }
        let checksum = crc32fast::hash(&bytes);
        bytes.extend(checksum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        const DAMAGED: &str = "a working set that is damaged";
        let rest = bytes.strip_prefix(&MAGIC).ok_or("a file that isn't a working set")?;
        let (version, _) = rest.split_first().ok_or(DAMAGED)?;
        if *version != VERSION {
            return Err("a working set of a version that isn't known");
        }
        let (content, checksum) = bytes.split_last_chunk().ok_or(DAMAGED)?;
        if crc32fast::hash(content).to_le_bytes() != *checksum {
            return Err(DAMAGED);
        }
        // From here on it is what somebody has written on purpose. It may be nonsense all the same.
        Self::decode_content(&content[MAGIC.len() + 1..]).ok_or("a working set that makes no sense")
    }

    fn decode_content(bytes: &[u8]) -> Option<Self> {
        let (shift, mut rest) = bytes.split_first()?;
        let page_size = 1_usize.checked_shl(u32::from(*shift))?;
        let region_pages = usize::try_from(take(&mut rest)?).ok()?;
        region_pages.checked_mul(page_size)?;
        let count = usize::try_from(take(&mut rest)?).ok().filter(|count| *count <= region_pages)?;
        // A few bytes may tell of many pages, so the room isn't taken before they are there.
        let (mut pages, mut seen, mut end) = (Vec::new(), Vec::new(), 0_i64);
        while pages.len() < count {
            let distance = take(&mut rest)?;
            let start = end.checked_add((distance >> 1) as i64 ^ -((distance & 1) as i64))?;
            let start = usize::try_from(start).ok()?;
            let more = usize::try_from(take(&mut rest)?).ok()?;
            let run = start..start.checked_add(more)?.checked_add(1)?;
            if run.end > region_pages || run.len() > count - pages.len() {
                return None;
            }
            seen.push((run.start, run.end));
            end = i64::try_from(run.end).ok()?;
            pages.extend(run);
        }
        seen.sort_unstable();
        let apart = seen.windows(2).all(|runs| runs[0].1 <= runs[1].0);
        (rest.is_empty() && apart).then_some(Self { page_size, region_pages, pages })
    }
}

/// Appends a number.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Takes a number from the start.
fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        number |= bits.checked_shl(shift).filter(|shifted| shifted >> shift == bits)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: impl IntoIterator<Item = usize>) -> WorkingSet {
        WorkingSet::new(1 << 12, 1 << 19, pages.into_iter().collect())
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        crate::support::require!();
        let sets = [
            set([]),
            set([0]),
            set([(1 << 19) - 1, 0, 500, 501, 502, 499, 3]),
            set((0..5000).map(|page| page * 7919 % (1 << 19))),
            set(0..1 << 19),
            set((0..1000).rev()),
            WorkingSet::new(1 << 16, usize::MAX >> 16, vec![(usize::MAX >> 16) - 1, 1]),
        ];
        for set in sets {
            assert_eq!(WorkingSet::decode(&set.encode()), Ok(set));
        }
    }

    #[test]
    fn it_is_compact_and_the_same_on_every_machine() {
        crate::support::require!();
        assert_eq!(set(100..1 << 19).encode().len(), 10 + 3 + 3 + 2 + 3 + 4);
        assert!(set((0..1000).map(|page| 37 * page)).encode().len() < 2100);
        let bytes = set([2, 3, 1, 300]).encode();
        let content = [&b"uffd-set"[..], &[1, 12, 0x80, 0x80, 0x20, 4], &[4, 1, 5, 0, 0xd4, 4, 0]].concat();
        assert_eq!(bytes[..bytes.len() - 4], content);
    }

    #[test]
    fn a_run_takes_the_bytes_that_the_docs_tell() {
        crate::support::require!();
        let len = |number| {
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            bytes.len()
        };
        let run = |start: usize, pages: usize| {
            let set = WorkingSet::new(1 << 12, 1 << 28, (start..start + pages).collect());
            set.encode().len() - (8 + 2 + len(1 << 28) + len(pages as u64) + 4)
        };
        assert_eq!([run(0, 1), run(63, 128)], [2, 2]);
        assert_eq!([run(64, 1), run(0, 129)], [3, 3]);
        assert_eq!(run((1 << 27) - 1, 1), 4 + 1);
        assert_eq!(len((1 << 28) - 1), 4);
    }

    #[test]
    fn whatever_byte_is_damaged_or_lacking_it_is_refused() {
        crate::support::require!();
        let bytes = set([5, 6, 7, 1000, 2]).encode();
        for at in 0..bytes.len() {
            WorkingSet::decode(&bytes[..at]).unwrap_err();
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                WorkingSet::decode(&damaged).unwrap_err();
            }
        }
        WorkingSet::decode(&[&bytes[..], &[0]].concat()).unwrap_err();
    }

    #[test]
    fn nonsense_with_a_checksum_is_refused() {
        crate::support::require!();
        let check = |content: &[u8]| {
            let mut bytes = [&b"uffd-set"[..], content].concat();
            bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
            WorkingSet::decode(&bytes)
        };
        assert_eq!(check(&[1, 12, 10, 2, 0, 1]).unwrap().pages(), [0, 1]);
        let version = "a working set of a version that isn't known";
        assert_eq!(check(&[2, 12, 10, 0]), Err(version));
        for (what, content) in [
            ("more pages than the region has", &[1, 12, 10, 11, 0, 10][..]),
            ("a page beyond the region", &[1, 12, 10, 1, 20, 0]),
            ("a page before the first", &[1, 12, 10, 1, 1, 0]),
            ("a page twice", &[1, 12, 10, 2, 0, 0, 1, 0]),
            ("a run that is too long", &[1, 12, 10, 1, 0, 1]),
            ("something behind", &[1, 12, 10, 1, 0, 0, 0]),
            ("too few pages", &[1, 12, 10, 2, 0, 0]),
            ("pages of no size", &[1, 200, 10, 0]),
            ("a number without an end", &[1, 12, 0x80]),
            ("a number of more than 64 bits", &[1, 12, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2, 0]),
            ("a region that is too long", &[1, 40, 255, 255, 255, 255, 255, 255, 255, 255, 127, 0]),
        ] {
            assert_eq!(check(content), Err("a working set that makes no sense"), "{what}");
        }
    }

    #[test]
    fn files_are_written_and_read() {
        crate::support::require!();
        let path = std::env::temp_dir().join(format!("userfaultfd-working-set-{}", std::process::id()));
        let saved = set([9, 10, 3]);
        saved.save(&path).unwrap();
        let loaded = WorkingSet::load(&path);
        fs::write(&path, b"something else").unwrap();
        let other = WorkingSet::load(&path).unwrap_err();
        fs::remove_file(&path).unwrap();
        assert_eq!(loaded.unwrap(), saved);
        assert_eq!(
            (other.kind(), other.to_string().as_str()),
            (ErrorKind::InvalidData, "a file that isn't a working set")
        );
        assert_eq!(WorkingSet::load(&path).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
