//! A source made of several sources, one behind the other.

use std::fmt;
use std::io;
use std::ops::Range;

use super::pieces::{Origin, Pieces};
use super::{PageSource, invalid};

/// A source made of several sources, one behind the other: the files of an image, a header before its content, data
/// with gaps.
///
/// ```
/// use userfaultfd::pager::{BytesSource, ConcatSource, PageSource};
///
/// let mut source = ConcatSource::new();
/// source.push(BytesSource::new("first"))?;
/// source.push_zeros(3)?;
/// source.push_part(BytesSource::new("not this, second, nor this"), 10..16)?;
/// assert_eq!(source.len(), Some(14));
///
/// let mut page = [0xff; 16];
/// source.read(0, &mut page)?;
/// assert_eq!(&page, b"first\0\0\0second\0\0");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Where a border isn't aligned to a page, the sources on both sides are read for parts of the page: then their
/// [`read`](PageSource::read) gets offsets and lengths that aren't multiples of the page size.
#[derive(Default)]
pub struct ConcatSource(Pieces);

impl ConcatSource {
    /// Returns an empty source.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a whole source.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the source has no [length](PageSource::len), or all
    /// together are longer than 2⁶⁴ - 1 bytes.
    pub fn push(&mut self, source: impl PageSource + 'static) -> io::Result<&mut Self> {
        let Some(len) = source.len() else {
            return Err(invalid("a source without a length: push_part gives it one".into()));
        };
        self.append(source, 0, len)
    }

    /// Appends a part of a source, given by offsets in it, in bytes. A source without a length has any part.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the source is shorter, the range ends before it
    /// begins, or all together are longer than 2⁶⁴ - 1 bytes.
    pub fn push_part(
        &mut self,
        source: impl PageSource + 'static,
        range: Range<u64>,
    ) -> io::Result<&mut Self> {
        let Range { start, end } = range;
        let Some(len) = end.checked_sub(start) else {
            return Err(invalid(format!("a range that ends before it begins: {start}..{end}")));
        };
        if let Some(source_len) = source.len().filter(|source_len| *source_len < end) {
            return Err(invalid(format!("bytes {start}..{end} of a source of {source_len} bytes")));
        }
        self.append(source, start, len)
    }

    /// Appends `len` bytes of zeros.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): all together are longer than 2⁶⁴ - 1 bytes.
    pub fn push_zeros(&mut self, len: u64) -> io::Result<&mut Self> {
        self.0.push(Origin::ZEROS, 0, len)?;
        Ok(self)
    }

    fn append(&mut self, source: impl PageSource + 'static, from: u64, len: u64) -> io::Result<&mut Self> {
        self.0.push_source(source, from, len)?;
        Ok(self)
    }
}

impl PageSource for ConcatSource {
    super::read_through!(self => self.0);
}

impl fmt::Debug for ConcatSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConcatSource {:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::source::{BytesSource, PageData, ZeroSource};

    /// `len` bytes that depend on their offset, from `first` on.
    fn bytes(first: u8, len: u8) -> BytesSource<Vec<u8>> {
        BytesSource::new((first..first + len).collect())
    }

    /// Parts of every kind, and their content as one.
    fn parts() -> (ConcatSource, Vec<u8>) {
        let mut source = ConcatSource::new();
        source.push(bytes(1, 10)).unwrap().push_zeros(7).unwrap();
        source.push_part(bytes(20, 100), 50..53).unwrap().push_zeros(0).unwrap();
        source.push(bytes(1, 0)).unwrap().push_part(ZeroSource, 1 << 40..(1 << 40) + 5).unwrap();
        source.push(bytes(200, 16)).unwrap();
        let content =
            [(1..11).collect(), vec![0; 7], vec![70, 71, 72], vec![0; 5], (200..216).collect::<Vec<u8>>()]
                .concat();
        (source, content)
    }

    #[test]
    fn every_border_of_the_parts() {
        crate::support::require!();
        let (source, content) = parts();
        assert_eq!(source.len(), Some(content.len() as u64));
        let shown = "ConcatSource [0..10: source 0 from 0, 10..17: zeros, 17..20: source 1 from 50, \
                     20..25: source 2 from 1099511627776, 25..41: source 3 from 0]";
        assert_eq!(format!("{source:?}"), shown);
        let padded = [&content[..], &[0; 100]].concat();
        for offset in 0..content.len() + 2 {
            for len in 0..60 {
                let expected = &padded[offset..offset + len];
                let mut page = vec![0xee; len];
                match source.read(offset as u64, &mut page).unwrap() {
                    PageData::Data => assert_eq!(page, expected, "{len} at {offset}"),
                    PageData::Zero => assert_eq!(vec![0; len], expected, "{len} at {offset}"),
                }
            }
            let zeros = padded[offset..].iter().take_while(|byte| **byte == 0).count() as u64;
            let expected = if offset < content.len() { zeros } else { u64::MAX };
            assert_eq!(source.zeros(offset as u64), expected, "{offset}");
        }
    }

    /// Zeros of a source, and data behind them.
    struct ZerosThenData;

    impl PageSource for ZerosThenData {
        fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
            for (at, byte) in (offset..).zip(page) {
                *byte = u8::from(at >= 4);
            }
            Ok(PageData::Data)
        }

        fn zeros(&self, offset: u64) -> u64 {
            4_u64.saturating_sub(offset)
        }
    }

    #[test]
    fn zeros_end_where_a_part_has_data_behind_its_own() {
        crate::support::require!();
        let mut source = ConcatSource::new();
        source.push_zeros(3).unwrap().push_part(ZerosThenData, 0..6).unwrap().push_zeros(5).unwrap();
        assert_eq!([0, 2, 3, 6, 7, 9].map(|offset| source.zeros(offset)), [7, 5, 4, 1, 0, u64::MAX]);
    }

    #[test]
    fn a_page_of_zeros_is_zero_whatever_it_is_made_of() {
        crate::support::require!();
        let (source, _) = parts();
        for (offset, len, expected) in [
            (9, 8, PageData::Data),
            (10, 7, PageData::Zero),
            (10, 8, PageData::Data),
            (19, 2, PageData::Data),
            (20, 5, PageData::Zero),
            (20, 6, PageData::Data),
            (41, 8, PageData::Zero),
            (u64::MAX, 8, PageData::Zero),
        ] {
            assert_eq!(source.read(offset, &mut vec![1; len]).unwrap(), expected, "{offset} {len}");
        }
        let mut source = ConcatSource::new();
        source.push_zeros(5).unwrap().push_part(ZeroSource, 0..5).unwrap();
        assert_eq!(source.read(0, &mut [1; 20]).unwrap(), PageData::Zero);
        assert_eq!(source.zeros(3), u64::MAX);
    }

    #[test]
    fn bytes_are_those_of_a_single_part() {
        crate::support::require!();
        let (source, content) = parts();
        for offset in 0..content.len() + 2 {
            for len in 1..30 {
                let whole = [0..10, 17..20, 25..41]
                    .iter()
                    .any(|part| part.contains(&offset) && offset + len <= part.end);
                assert_eq!(source.bytes(offset as u64, len).is_some(), whole, "{len} at {offset}");
            }
        }
        assert!(source.bytes(u64::MAX, 1).is_none());
        let direct = BytesSource::new(&b"0123456789"[..]);
        let mut source = ConcatSource::new();
        source.push_zeros(100).unwrap().push_part(direct, 2..9).unwrap();
        let (here, expected) = (source.bytes(103, 4).unwrap(), direct.bytes(5, 4).unwrap());
        assert_eq!((here.as_ptr(), here.len()), (expected.as_ptr(), 4));
    }

    #[test]
    fn an_error_of_a_part_is_that_of_the_page() {
        crate::support::require!();
        let fails = |offset: u64, _: &mut [u8]| Err(io::Error::other(format!("no byte {offset}")));
        let mut source = ConcatSource::new();
        source.push(bytes(1, 10)).unwrap().push_part(fails, 100..110).unwrap().push(bytes(1, 10)).unwrap();
        for (offset, len, asked) in [(0, 11, 100), (9, 5, 100), (10, 1, 100), (15, 10, 105), (19, 100, 109)] {
            let error = source.read(offset, &mut vec![0; len]).unwrap_err();
            assert_eq!(error.to_string(), format!("no byte {asked}"), "{offset} {len}");
        }
        source.read(0, &mut [0; 10]).unwrap();
        source.read(20, &mut [0; 10]).unwrap();
    }

    #[test]
    fn parts_that_cannot_be_are_refused_and_leave_it_as_it_was() {
        crate::support::require!();
        let mut source = ConcatSource::new();
        source.push(bytes(1, 10)).unwrap();
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        let backwards = 5..4;
        let errors = [
            source.push(ZeroSource).unwrap_err(),
            source.push_part(bytes(1, 10), 5..11).unwrap_err(),
            source.push_part(bytes(1, 10), 11..11).unwrap_err(),
            source.push_part(ZeroSource, backwards).unwrap_err(),
            source.push_zeros(u64::MAX - 9).unwrap_err(),
            source.push_part(ZeroSource, 0..u64::MAX).unwrap_err(),
        ];
        let texts = errors.map(|error| {
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            error.to_string()
        });
        assert_eq!(
            texts,
            [
                "a source without a length: push_part gives it one",
                "bytes 5..11 of a source of 10 bytes",
                "bytes 11..11 of a source of 10 bytes",
                "a range that ends before it begins: 5..4",
                "18446744073709551606 bytes after 10 others",
                "18446744073709551615 bytes after 10 others",
            ]
        );
        assert_eq!(source.len(), Some(10));
        source.push_zeros(u64::MAX - 10).unwrap();
        assert_eq!((source.len(), source.zeros(10)), (Some(u64::MAX), u64::MAX));
        assert!(ConcatSource::new().is_empty());
    }
}
