//! [`WorkingSet`]: the pages that a program needs, in order; and the file that keeps them.

use std::collections::{BTreeMap, TryReserveError};
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;

use crate::PendingFile;
use crate::pager::{Error, Result};

/// The pages of a region that a program has accessed, in the order of the first access.
///
/// A [`WorkingSetRecorder`](crate::pager::WorkingSetRecorder) makes one, and
/// [`Pager::replay`](crate::pager::Pager::replay) fills the pages in that order at the next start.
/// [`from_pages`](Self::from_pages) makes one of the pages that another tool has found; [`union`](Self::union) and
/// [`intersection`](Self::intersection) combine two. [`with_region_pages`](Self::with_region_pages) and
/// [`with_page_size`](Self::with_page_size) adapt a set to a region of another size or with another page size.
///
/// ```
/// use userfaultfd::pager::WorkingSet;
///
/// let one = WorkingSet::from_pages(4096, 1000, [500, 501, 3])?;
/// let other = WorkingSet::from_pages(4096, 1000, [7, 3, 501])?;
/// assert!(one.union(&other)?.pages().eq([500, 501, 3, 7]));
/// assert!(one.intersection(&other)?.pages().eq([501, 3]));
/// let larger = one.with_page_size(16384)?;
/// assert!(larger.pages().eq([125, 0]));
/// assert_eq!((larger.page_size(), larger.region_pages()), (16384, 250));
/// assert!(one.with_region_pages(501).pages().eq([500, 3]));
/// # Ok::<(), userfaultfd::pager::Error>(())
/// ```
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
/// Numbers of variable length have seven bits in each byte, the lowest first; the eighth bit is set if another byte
/// follows (LEB128). The start of a run is stored as its distance *d* from the end of the run before: as 2*d* if *d* isn't
/// negative, else as -2*d* - 1 (zigzag). A run takes at least two bytes: more where it is longer than 128 pages, or begins
/// 64 pages or more from where the one before it ended. Eight bytes are enough for a run of any length up to 2²⁸ pages that
/// begins less than 2²⁷ pages from there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    page_size: usize,
    region_pages: usize,
    /// In the order of the first access. None is empty, none overlaps another one, and none continues the one before it.
    runs: Vec<Range<usize>>,
}

const MAGIC: [u8; 8] = *b"uffd-set";
const VERSION: u8 = 1;

impl WorkingSet {
    /// The pages must be the region's, each at most once.
    pub(crate) fn new(page_size: usize, region_pages: usize, pages: &[usize]) -> Self {
        let runs = pages.chunk_by(|page, next| page + 1 == *next);
        let runs = runs.map(|run| run[0]..run[0] + run.len()).collect();
        Self { page_size, region_pages, runs }
    }

    /// Returns a working set of pages, in the order in which they will be needed, of a region of `region_pages` pages of
    /// `page_size` bytes. Repeated pages are ignored.
    ///
    /// # Errors
    ///
    /// - [`PageSize`](Error::PageSize): the page size isn't a power of two.
    /// - [`BeyondRegion`](Error::BeyondRegion): the region doesn't have such a page, or is longer than the address space.
    pub fn from_pages(
        page_size: usize,
        region_pages: usize,
        pages: impl IntoIterator<Item = usize>,
    ) -> Result<Self> {
        check_page_size(page_size)?;
        if region_pages.checked_mul(page_size).is_none() {
            return Err(Error::BeyondRegion { page: region_pages, region_pages: usize::MAX / page_size });
        }
        let (mut set, mut cover) = (Self { page_size, region_pages, runs: Vec::new() }, PageCover::default());
        // Not each page alone, where they follow each other.
        let mut run = 0..0;
        for page in pages {
            if page >= region_pages {
                return Err(Error::BeyondRegion { page, region_pages });
            }
            if page != run.end {
                cover.add(&run, |new| set.push(new));
                run = page..page;
            }
            run.end += 1;
        }
        cover.add(&run, |new| set.push(new));
        Ok(set)
    }

    /// Returns the numbers of the pages, counted from the start of the region, in the order of the first access.
    pub fn pages(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs.iter().flat_map(Range::clone)
    }

    /// Returns the pages as runs of adjacent pages, in the order of the first access.
    #[must_use]
    pub fn runs(&self) -> &[Range<usize>] {
        &self.runs
    }

    /// Returns the number of pages of the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.iter().map(Range::len).sum()
    }

    /// Returns whether the set has no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Returns the page size of the region, in bytes.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Returns the number of pages of the region.
    #[must_use]
    pub fn region_pages(&self) -> usize {
        self.region_pages
    }

    /// Returns the pages of this set, and then those that only the other one has.
    ///
    /// # Errors
    ///
    /// [`OtherWorkingSet`](Error::OtherWorkingSet): it is of a region of another size, or of other pages.
    pub fn union(&self, other: &Self) -> Result<Self> {
        self.check_alike(other)?;
        let (mut set, mut cover) = (Self { runs: Vec::new(), ..*self }, PageCover::default());
        for run in self.runs.iter().chain(&other.runs) {
            cover.add(run, |new| set.push(new));
        }
        Ok(set)
    }

    /// Returns the pages of this set that the other one has, too, in the order of this one.
    ///
    /// # Errors
    ///
    /// [`OtherWorkingSet`](Error::OtherWorkingSet): it is of a region of another size, or of other pages.
    pub fn intersection(&self, other: &Self) -> Result<Self> {
        self.check_alike(other)?;
        let (mut set, cover) = (Self { runs: Vec::new(), ..*self }, other.cover());
        self.runs.iter().for_each(|run| cover.parts(run, |part| set.push(part)));
        Ok(set)
    }

    /// Returns the set for the same region with pages of `bytes` bytes; the length is rounded up to whole pages. A larger
    /// page is in the set if any part of it was.
    ///
    /// # Errors
    ///
    /// [`PageSize`](Error::PageSize): it isn't a power of two, or pages of it don't fit into the address space.
    pub fn with_page_size(&self, bytes: usize) -> Result<Self> {
        check_page_size(bytes)?;
        let region_pages = (self.region_pages * self.page_size).div_ceil(bytes);
        if region_pages.checked_mul(bytes).is_none() {
            return Err(Error::PageSize { address: 0, page_size: bytes });
        }
        let mut set = Self { page_size: bytes, region_pages, runs: Vec::new() };
        let mut cover = PageCover::default();
        for run in &self.runs {
            let bytes_of = run.start * self.page_size..run.end * self.page_size;
            cover.add(&(bytes_of.start / bytes..bytes_of.end.div_ceil(bytes)), |new| set.push(new));
        }
        Ok(set)
    }

    /// Returns the set for a region of `pages` pages, without the pages beyond it. `pages` is limited to the address space.
    #[must_use]
    pub fn with_region_pages(&self, pages: usize) -> Self {
        let region_pages = pages.min(usize::MAX / self.page_size);
        let mut set = Self { region_pages, runs: Vec::new(), ..*self };
        for run in self.runs.iter().filter(|run| run.start < region_pages) {
            set.push(run.start..run.end.min(region_pages));
        }
        set
    }

    /// Appends the pages that aren't in the set.
    fn push(&mut self, run: Range<usize>) {
        match self.runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.runs.push(run),
        }
    }

    /// The pages of the set, for searches.
    pub(crate) fn cover(&self) -> PageCover {
        let mut cover = PageCover::default();
        self.runs.iter().for_each(|run| cover.add(run, drop));
        cover
    }

    fn check_alike(&self, other: &Self) -> Result<()> {
        let shape = |set: &Self| (set.region_pages, set.page_size);
        if shape(self) == shape(other) {
            return Ok(());
        }
        Err(Error::OtherWorkingSet { set: shape(other), region: shape(self) })
    }

    /// Writes the set to a file, which replaces the one at `path` when it is complete: a [`PendingFile`].
    ///
    /// # Errors
    ///
    /// Those of open(2), write(2) and fsync(2); the old file is unchanged.
    pub fn save(&self, path: impl AsRef<Path>) -> io::Result<()> {
        PendingFile::replace(path, &self.encode())
    }

    /// Reads a set from a file.
    ///
    /// # Errors
    ///
    /// Those of open(2) and read(2). Of the kind [`InvalidData`](ErrorKind::InvalidData): the file isn't a working set, has
    /// an unknown version, or is damaged. Of the kind [`OutOfMemory`](ErrorKind::OutOfMemory): there is no memory for its
    /// runs.
    pub fn load(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_bytes(&fs::read(path)?)
    }

    /// Reads a set from the bytes of a file.
    pub(crate) fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        Self::decode(bytes).map_err(|error| match error {
            Undecoded::Invalid(text) => io::Error::new(ErrorKind::InvalidData, text),
            Undecoded::NoMemory => ErrorKind::OutOfMemory.into(),
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([VERSION, self.page_size.trailing_zeros() as u8]);
        put(&mut bytes, self.region_pages as u64);
        put(&mut bytes, self.len() as u64);
        let mut end = 0;
        for run in &self.runs {
            let distance = run.start as i64 - end;
            put(&mut bytes, (distance << 1 ^ distance >> 63) as u64);
            put(&mut bytes, run.len() as u64 - 1);
            end = run.end as i64;
        }
        let checksum = crc32fast::hash(&bytes);
        bytes.extend(checksum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, Undecoded> {
        const DAMAGED: Undecoded = Undecoded::Invalid("a working set that is damaged");
        let rest = bytes.strip_prefix(&MAGIC);
        let rest = rest.ok_or(Undecoded::Invalid("a file that isn't a working set"))?;
        let (version, _) = rest.split_first().ok_or(DAMAGED)?;
        if *version != VERSION {
            return Err(Undecoded::Invalid("a working set of a version that isn't known"));
        }
        let (content, checksum) = bytes.split_last_chunk().ok_or(DAMAGED)?;
        if crc32fast::hash(content).to_le_bytes() != *checksum {
            return Err(DAMAGED);
        }
        // The content may be nonsense all the same: anybody can compute a checksum.
        Self::decode_content(&content[MAGIC.len() + 1..])?
            .ok_or(Undecoded::Invalid("a working set that makes no sense"))
    }

    /// `None`: it makes no sense. What it takes of memory is bounded by the length of `bytes`, not by the number of pages
    /// that they tell of.
    fn decode_content(bytes: &[u8]) -> Result<Option<Self>, TryReserveError> {
        let mut rest = bytes;
        let Some((mut set, count)) = Self::decode_head(&mut rest) else { return Ok(None) };
        let (mut sorted, mut left, mut end) = (Vec::new(), count, 0);
        while left > 0 {
            let run =
                decode_run(&mut rest, end).filter(|run| run.end <= set.region_pages && run.len() <= left);
            let Some(run) = run else { return Ok(None) };
            (left, end) = (left - run.len(), run.end);
            for runs in [&mut sorted, &mut set.runs] {
                runs.try_reserve(1)?;
            }
            sorted.push(run.clone());
            set.push(run);
        }
        sorted.sort_unstable_by_key(|run| run.start);
        let apart = sorted.windows(2).all(|runs| runs[0].end <= runs[1].start);
        Ok((rest.is_empty() && apart).then_some(set))
    }

    /// What is in front of the runs: an empty set, and how many pages it has.
    fn decode_head(bytes: &mut &[u8]) -> Option<(Self, usize)> {
        let (shift, rest) = bytes.split_first()?;
        *bytes = rest;
        let page_size = 1_usize.checked_shl(u32::from(*shift))?;
        let region_pages = usize::try_from(take(bytes)?).ok()?;
        region_pages.checked_mul(page_size)?;
        let count = usize::try_from(take(bytes)?).ok().filter(|count| *count <= region_pages)?;
        Some((Self { page_size, region_pages, runs: Vec::new() }, count))
    }
}

/// Why a file isn't a working set.
#[derive(Debug, PartialEq, Eq)]
enum Undecoded {
    Invalid(&'static str),
    NoMemory,
}

impl From<TryReserveError> for Undecoded {
    fn from(_: TryReserveError) -> Self {
        Self::NoMemory
    }
}

/// Pages, by number.
#[derive(Debug, Default)]
pub(crate) struct PageCover(BTreeMap<usize, usize>);

impl PageCover {
    /// Adds pages, and tells of those that weren't there, by number.
    pub(super) fn add(&mut self, run: &Range<usize>, mut new: impl FnMut(Range<usize>)) {
        if run.is_empty() {
            return;
        }
        let (mut whole, mut at) = (run.clone(), run.start);
        let before = self.0.range(..run.start).next_back().filter(|(_, end)| **end >= run.start);
        let mut next = before.or_else(|| self.0.range(run.start..=run.end).next());
        while let Some((&start, &end)) = next {
            if at < start {
                new(at..start);
            }
            at = at.max(end);
            whole = whole.start.min(start)..whole.end.max(end);
            self.0.remove(&start);
            next = self.0.range(run.start..=run.end).next();
        }
        if at < run.end {
            new(at..run.end);
        }
        self.0.insert(whole.start, whole.end);
    }

    /// Tells of those of some pages that are there.
    fn parts(&self, run: &Range<usize>, mut part: impl FnMut(Range<usize>)) {
        let before = self.0.range(..run.start).next_back();
        for (&start, &end) in before.into_iter().chain(self.0.range(run.start..run.end)) {
            let (start, end) = (start.max(run.start), end.min(run.end));
            if start < end {
                part(start..end);
            }
        }
    }

    /// Whether a page is there.
    pub(crate) fn has(&self, page: usize) -> bool {
        self.0.range(..=page).next_back().is_some_and(|(_, end)| page < *end)
    }
}

fn check_page_size(page_size: usize) -> Result<()> {
    if page_size.is_power_of_two() { Ok(()) } else { Err(Error::PageSize { address: 0, page_size }) }
}

/// Takes a run from the start, which is told from where the one before it ends.
fn decode_run(bytes: &mut &[u8], end: usize) -> Option<Range<usize>> {
    let distance = take(bytes)?;
    let start = i64::try_from(end).ok()?.checked_add((distance >> 1) as i64 ^ -((distance & 1) as i64))?;
    let start = usize::try_from(start).ok()?;
    let more = usize::try_from(take(bytes)?).ok()?;
    Some(start..start.checked_add(more)?.checked_add(1)?)
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
    use std::slice;

    use super::*;

    fn set(pages: impl IntoIterator<Item = usize>) -> WorkingSet {
        WorkingSet::new(1 << 12, 1 << 19, &pages.into_iter().collect::<Vec<_>>())
    }

    #[test]
    fn working_set_round_trips_through_its_encoding() {
        crate::support::require!();
        let sets = [
            set([]),
            set([0]),
            set([(1 << 19) - 1, 0, 500, 501, 502, 499, 3]),
            set((0..5000).map(|page| page * 7919 % (1 << 19))),
            set(0..1 << 19),
            set((0..1000).rev()),
            WorkingSet::new(1 << 16, usize::MAX >> 16, &[(usize::MAX >> 16) - 1, 1]),
        ];
        for set in sets {
            assert_eq!(WorkingSet::decode(&set.encode()), Ok(set));
        }
    }

    #[test]
    fn numbers_of_more_than_64_bits_are_refused() {
        crate::support::require!();
        // Nine times seven bits, and one more.
        let largest = [[0xff; 9].as_slice(), &[0x01]].concat();
        assert_eq!(take(&mut largest.as_slice()), Some(u64::MAX));
        for last in [0x02, 0x03, 0x7f] {
            let larger = [[0xff; 9].as_slice(), &[last]].concat();
            assert_eq!(take(&mut larger.as_slice()), None, "{last:#x}");
        }
        assert_eq!(take(&mut [0x80; 11].as_slice()), None);
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
            let set = WorkingSet::new(1 << 12, 1 << 28, &(start..start + pages).collect::<Vec<_>>());
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
        assert_eq!(check(&[1, 12, 10, 2, 0, 1]).unwrap().runs(), slice::from_ref(&(0..2)));
        assert_eq!(check(&[1, 12, 10, 10, 0, 9]).unwrap().runs(), slice::from_ref(&(0..10)));
        let version = "a working set of a version that isn't known";
        assert_eq!(check(&[2, 12, 10, 0]), Err(Undecoded::Invalid(version)));
        for (what, content) in [
            ("more pages than the region has", &[1, 12, 10, 11, 0, 10][..]),
            ("a page beyond the region", &[1, 12, 10, 1, 20, 0]),
            ("a run that ends beyond the region", &[1, 12, 10, 2, 18, 1]),
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
            let nonsense = Undecoded::Invalid("a working set that makes no sense");
            assert_eq!(check(content), Err(nonsense), "{what}");
        }
    }

    #[test]
    fn a_few_bytes_that_tell_of_many_pages_take_little_memory() {
        crate::support::require!();
        let pages = 1_usize << 40.min(usize::BITS - 13);
        let mut all = set([]);
        all.region_pages = pages;
        all.push(0..pages);
        let bytes = all.encode();
        assert!(bytes.len() <= 34);
        let decoded = WorkingSet::decode(&bytes).unwrap();
        assert_eq!((decoded.len(), decoded.pages().next()), (pages, Some(0)));
        assert_eq!(
            decoded.union(&set([])).unwrap_err().to_string(),
            all.union(&set([])).unwrap_err().to_string()
        );
        assert_eq!(decoded.intersection(&all).unwrap(), all);
        assert_eq!(decoded.with_page_size(1 << 21).unwrap().len(), pages >> 9);
    }

    #[test]
    fn sets_are_put_together_page_by_page() {
        crate::support::require!();
        // Pages that touch, overlap, contain each other and come again, against plain lists.
        let mut random = 1_u32;
        let mut next = |below: usize| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 8) as usize % below
        };
        for _ in 0..300 {
            let mut pages = || -> Vec<usize> {
                let runs: Vec<_> = (0..next(9)).map(|_| (next(60), next(9))).collect();
                runs.into_iter().flat_map(|(first, len)| first..(first + len).min(64)).collect()
            };
            let once = |pages: &[usize]| {
                let is_first = |(at, page): &(usize, &usize)| !pages[..*at].contains(page);
                pages.iter().enumerate().filter(is_first).map(|(_, page)| *page).collect::<Vec<_>>()
            };
            let (one, other) = (pages(), pages());
            let set = |pages: &[usize]| WorkingSet::from_pages(4096, 64, pages.iter().copied()).unwrap();
            let all = |set: WorkingSet| {
                assert!(set.runs().windows(2).all(|runs| runs[0].end != runs[1].start), "{set:?}");
                assert_eq!(set.len(), set.pages().count());
                set.pages().collect::<Vec<_>>()
            };
            assert_eq!(all(set(&one)), once(&one));
            assert_eq!(set(&one), WorkingSet::new(4096, 64, &once(&one)));
            let both = [&one[..], &other[..]].concat();
            assert_eq!(all(set(&one).union(&set(&other)).unwrap()), once(&both));
            let common: Vec<_> = once(&one).into_iter().filter(|page| other.contains(page)).collect();
            assert_eq!(all(set(&one).intersection(&set(&other)).unwrap()), common);
            let cut: Vec<_> = once(&one).into_iter().filter(|page| *page < 40).collect();
            assert_eq!(all(set(&one).with_region_pages(40)), cut);
            let larger: Vec<_> = one.iter().map(|page| page / 4).collect();
            assert_eq!(all(set(&one).with_page_size(16384).unwrap()), once(&larger));
            let smaller: Vec<_> = one.iter().flat_map(|page| 2 * page..2 * page + 2).collect();
            assert_eq!(all(set(&one).with_page_size(2048).unwrap()), once(&smaller));
            let cover = set(&one).cover();
            assert!((0..70).all(|page| cover.has(page) == one.contains(&page)));
        }
    }

    #[test]
    fn decode_rejects_pages_beyond_the_region() {
        crate::support::require!();
        let refused = |set: Result<WorkingSet>| set.unwrap_err().to_string();
        assert_eq!(
            refused(WorkingSet::from_pages(4096, 10, [3, 10])),
            "page 10 is beyond a region of 10 pages"
        );
        assert!(matches!(WorkingSet::from_pages(4095, 10, []), Err(Error::PageSize { .. })));
        assert!(matches!(WorkingSet::from_pages(4096, usize::MAX, []), Err(Error::BeyondRegion { .. })));
        assert!(matches!(set([1]).with_page_size(0), Err(Error::PageSize { .. })));
        let other = WorkingSet::from_pages(4096, 10, [3]).unwrap();
        assert!(matches!(set([1]).union(&other), Err(Error::OtherWorkingSet { .. })));
        let wide = other.with_region_pages(usize::MAX);
        assert_eq!((wide.region_pages(), wide.len()), (usize::MAX / 4096, 1));
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
