//! What a source must show, as plain bytes, and random questions.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{BytesSource, PageData, PageSource, SourceBytes};
use crate::support::mapping::memfd_of_bytes;
pub(super) use crate::support::random::Random;
use crate::sys;

/// A range within `0..len` that isn't empty, often short, often at a multiple of `unit`.
pub(super) fn random_range(random: &mut Random, len: usize, unit: usize) -> Range<usize> {
    let start = random.below(len);
    let longest = if random.one_in(2) { len } else { 2 * unit };
    let end = start + 1 + random.below(longest.min(len - start));
    if random.one_in(3) {
        return start..end;
    }
    let start = start / unit * unit;
    start..end.next_multiple_of(unit).min(len)
}

/// Bytes, whose reads are counted.
pub(super) struct Counted {
    bytes: Vec<u8>,
    reads: Arc<AtomicUsize>,
}

#[cfg_attr(
    not(any(feature = "pager", feature = "zstd")),
    expect(dead_code, reason = "their tests count reads")
)]
impl Counted {
    pub(super) fn new(bytes: Vec<u8>) -> (Self, Arc<AtomicUsize>) {
        let reads = Arc::default();
        (Self { bytes, reads: Arc::clone(&reads) }, reads)
    }
}

impl PageSource for Counted {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        BytesSource::new(&self.bytes).read(offset, page)
    }

    fn len(&self) -> Option<u64> {
        Some(self.bytes.len() as u64)
    }
}

/// Bytes that tell where they are, and whose.
pub(super) fn byte(layer: usize, at: usize) -> u8 {
    ((at / 7 + layer * 31) % 251 + 1) as u8
}

/// What the kernel copies from there.
pub(super) fn copied(bytes: SourceBytes<'_>) -> io::Result<Vec<u8>> {
    let copy = File::from(memfd_of_bytes(0, 0));
    let written = sys::write(copy.as_fd(), bytes.as_ptr(), bytes.len())?;
    let mut content = vec![0; written];
    copy.read_exact_at(&mut content, 0)?;
    Ok(content)
}

/// Reads a range, which may reach beyond the end, in every way that there is.
#[track_caller]
pub(super) fn check(source: &impl PageSource, expected: &[u8], range: Range<usize>) {
    let show = format!("{range:?} of {}", expected.len());
    let at = |at: usize| expected.get(at).copied().unwrap_or(0);
    let offset = range.start as u64;
    let mut page = vec![0xee; range.len()];
    let content = range.clone().map(at);
    match source.read(offset, &mut page).unwrap() {
        PageData::Data => assert!(content.clone().eq(page.iter().copied()), "{show}"),
        PageData::Zero => assert!(content.clone().all(|byte| byte == 0), "{show}"),
    }
    if let Some(bytes) = source.bytes(offset, range.len()) {
        assert!(range.end <= expected.len(), "{show}");
        assert!(content.eq(copied(bytes).unwrap()), "{show}");
    }
    let zeros = source.zeros(offset);
    if range.start >= expected.len() {
        assert_eq!(zeros, u64::MAX, "{show}");
    } else {
        let end = usize::try_from(zeros)
            .map_or(expected.len(), |zeros| range.start.saturating_add(zeros).min(expected.len()));
        assert!((range.start..end).all(|offset| at(offset) == 0), "{zeros} zeros: {show}");
    }
}

/// Reads at random, all of it at once, and in small pieces.
#[track_caller]
pub(super) fn check_all(source: &impl PageSource, expected: &[u8], random: &mut Random, unit: usize) {
    assert_eq!(source.len(), Some(expected.len() as u64));
    check(source, expected, 0..expected.len() + 100);
    for start in (0..expected.len()).step_by(unit) {
        check(source, expected, start..start + unit);
    }
    for _ in 0..20 {
        let range = random_range(random, expected.len() + unit, unit);
        check(source, expected, range);
    }
}
