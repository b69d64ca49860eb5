//! Several sources that a signal handler may ask, one behind the other.

use std::io;
use std::ops::Range;

use super::SignalSafe;
use crate::pager::{ConcatSource, PageData, PageSource, SourceBytes};

/// A [`ConcatSource`] whose sources are all [`SignalSafe`].
///
/// A page that parts of several sources share is read when the memory is built.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{BytesSource, SignalSafeConcat};
///
/// let mut source = SignalSafeConcat::new();
/// source.push(BytesSource::new("header"))?.push_zeros(1 << 20)?.push(BytesSource::new(vec![7; 1 << 20]))?;
/// let memory = LazyMemory::sigbus(source).build()?;
/// assert_eq!((&memory[..6], memory[1000], memory[2 << 20]), (&b"header"[..], 0, 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct SignalSafeConcat {
    sources: ConcatSource,
    borders: Vec<u64>,
}

impl SignalSafeConcat {
    /// Returns an empty source.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a whole source.
    ///
    /// # Errors
    ///
    /// As [`ConcatSource::push`].
    pub fn push(&mut self, source: impl SignalSafe + 'static) -> io::Result<&mut Self> {
        let (borders, len) = (source.borders(), source.len());
        self.append(borders, 0..len.unwrap_or(0), |sources| sources.push(source).map(drop))
    }

    /// Appends a part of a source, given by offsets in it, in bytes.
    ///
    /// # Errors
    ///
    /// As [`ConcatSource::push_part`].
    pub fn push_part(
        &mut self,
        source: impl SignalSafe + 'static,
        range: Range<u64>,
    ) -> io::Result<&mut Self> {
        let borders = source.borders();
        self.append(borders, range.clone(), |sources| sources.push_part(source, range).map(drop))
    }

    /// Appends `len` bytes of zeros.
    ///
    /// # Errors
    ///
    /// As [`ConcatSource::push_zeros`].
    pub fn push_zeros(&mut self, len: u64) -> io::Result<&mut Self> {
        self.append(Vec::new(), 0..len, |sources| sources.push_zeros(len).map(drop))
    }

    fn append(
        &mut self,
        borders: Vec<u64>,
        part: Range<u64>,
        push: impl FnOnce(&mut ConcatSource) -> io::Result<()>,
    ) -> io::Result<&mut Self> {
        let start = self.len().unwrap_or(0);
        push(&mut self.sources)?;
        let inside = borders.into_iter().filter(|border| part.contains(border));
        self.borders.extend(inside.map(|border| start + (border - part.start)));
        self.borders.extend(self.len());
        Ok(self)
    }
}

impl PageSource for SignalSafeConcat {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.sources.read(offset, page)
    }

    fn len(&self) -> Option<u64> {
        self.sources.len()
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.sources.zeros(offset)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        self.sources.bytes(offset, len)
    }
}

// SAFETY: looks for the part in a list, and asks it; the pages that have the end of a part inside, or a border of its
// source, are among the borders.
#[expect(unsafe_code, reason = "the contract is kept, as told")]
unsafe impl SignalSafe for SignalSafeConcat {
    fn borders(&self) -> Vec<u64> {
        self.borders.clone()
    }
}
