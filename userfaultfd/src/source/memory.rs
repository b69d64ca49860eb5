//! Bytes in memory, and zeros.

use std::fmt;
use std::io;

use super::{PageData, PageSource, SourceBytes};

/// Bytes in memory as a source: a `Vec<u8>`, an `Arc<[u8]>`, a `&'static [u8]`, a mapping, or anything else that is a
/// slice of bytes.
///
/// The kernel copies whole pages straight from there. Pages that are aligned as in a mapping are copied faster: a page
/// of a `Vec` or an `Arc` takes half a microsecond longer ([tuning](crate::pager::tuning)).
///
/// ```
/// use userfaultfd::pager::{BytesSource, PageSource};
///
/// let source = BytesSource::new(*b"some content");
/// assert_eq!(source.len(), Some(12));
/// let mut page = [0xff; 16];
/// source.read(5, &mut page)?;
/// assert_eq!(&page, b"content\0\0\0\0\0\0\0\0\0");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// The bytes must not lie in memory that a pager fills.
#[derive(Clone, Copy)]
pub struct BytesSource<B>(B);

impl<B: AsRef<[u8]> + Send + Sync> BytesSource<B> {
    /// Wraps bytes.
    pub fn new(bytes: B) -> Self {
        Self(bytes)
    }

    /// Returns the bytes.
    pub fn into_inner(self) -> B {
        self.0
    }

    /// The bytes from `offset` on.
    fn from(&self, offset: u64) -> &[u8] {
        let bytes = self.0.as_ref();
        usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default()
    }
}

impl<B: AsRef<[u8]> + Send + Sync> PageSource for BytesSource<B> {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let bytes = self.from(offset);
        if bytes.is_empty() {
            return Ok(PageData::Zero);
        }
        let (content, beyond) = page.split_at_mut(page.len().min(bytes.len()));
        content.copy_from_slice(&bytes[..content.len()]);
        beyond.fill(0);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.0.as_ref().len() as u64)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        self.from(offset).get(..len).map(SourceBytes::from)
    }
}

impl<B: AsRef<[u8]>> fmt::Debug for BytesSource<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BytesSource({} bytes)", self.0.as_ref().len())
    }
}

/// A source of zeros, without end.
///
/// ```
/// use userfaultfd::pager::{PageData, PageSource, ZeroSource};
///
/// assert_eq!(ZeroSource.read(1 << 40, &mut [1; 4096])?, PageData::Zero);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ZeroSource;

impl PageSource for ZeroSource {
    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<PageData> {
        Ok(PageData::Zero)
    }

    fn zeros(&self, _: u64) -> u64 {
        u64::MAX
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn every_border_of_bytes() {
        crate::support::require!();
        let bytes: Vec<u8> = (1..=100).collect();
        let source = BytesSource::new(bytes.clone());
        assert_eq!((source.len(), source.is_empty()), (Some(100), false));
        for offset in 0..=101 {
            for len in [1, 2, 99, 100, 101, 200] {
                let rest = &bytes[offset.min(100)..];
                let inside = rest.len().min(len);
                let mut page = vec![0xee; len];
                let fill = source.read(offset as u64, &mut page).unwrap();
                if inside == 0 {
                    assert_eq!((fill, page), (PageData::Zero, vec![0xee; len]), "{offset} {len}");
                } else {
                    let expected = [&rest[..inside], &vec![0; len - inside]].concat();
                    assert_eq!((fill, page), (PageData::Data, expected), "{offset} {len}");
                }

                let here = source.bytes(offset as u64, len);
                let address = rest.as_ptr().addr() - bytes.as_ptr().addr() + source.0.as_ptr().addr();
                let expected = (rest.len() >= len).then_some((address, len));
                assert_eq!(here.map(|here| (here.as_ptr().addr(), here.len())), expected, "{offset} {len}");
            }
            let expected = if offset < 100 { 0 } else { u64::MAX };
            assert_eq!(source.zeros(offset as u64), expected, "{offset}");
        }
        for offset in [u64::MAX, u64::MAX - 1, 1 << 32] {
            assert_eq!(source.read(offset, &mut [1; 8]).unwrap(), PageData::Zero);
            assert!(source.bytes(offset, 1).is_none());
        }
        assert_eq!(source.into_inner(), bytes);
    }

    #[test]
    fn bytes_of_many_types() {
        crate::support::require!();
        fn starts_with_x(source: impl PageSource + fmt::Debug) {
            let mut byte = [0];
            assert_eq!(source.read(0, &mut byte).unwrap(), PageData::Data);
            assert_eq!((byte, source.len()), ([b'x'], Some(3)));
            assert_eq!(format!("{source:?}"), "BytesSource(3 bytes)");
        }
        starts_with_x(BytesSource::new(b"xyz"));
        starts_with_x(BytesSource::new("xyz"));
        starts_with_x(BytesSource::new(&b"xyz"[..]));
        starts_with_x(BytesSource::new(vec![b'x'; 3]));
        starts_with_x(BytesSource::new(Box::<[u8]>::from(*b"xyz")));
        starts_with_x(BytesSource::new(Arc::<[u8]>::from(*b"xyz")));
    }

    #[test]
    fn no_bytes_are_zeros() {
        crate::support::require!();
        let source = BytesSource::new([]);
        assert!(source.is_empty());
        assert_eq!(source.read(0, &mut [1; 8]).unwrap(), PageData::Zero);
        assert_eq!(source.zeros(0), u64::MAX);
    }

    #[test]
    fn zeros_have_no_end() {
        crate::support::require!();
        assert_eq!((ZeroSource.len(), ZeroSource.is_empty()), (None, false));
        for offset in [0, 1, u64::MAX] {
            assert_eq!(ZeroSource.read(offset, &mut [1; 8]).unwrap(), PageData::Zero);
            assert_eq!(ZeroSource.zeros(offset), u64::MAX);
            assert!(ZeroSource.bytes(offset, 8).is_none());
        }
    }
}
