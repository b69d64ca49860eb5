//! The sink of a snapshot, and what it gets.

use std::io;
use std::ops::Range;

/// The memory that a snapshot holds, passed to the sink first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Geometry {
    /// The ranges of memory in the order in which they lie in the snapshot, one behind the other: the first begins at
    /// offset 0.
    pub regions: Vec<Region>,
    /// Whether only changes since the snapshot before will be delivered.
    pub incremental: bool,
}

impl Geometry {
    /// Returns the geometry of a snapshot of everything, for a [`Sink`] that the program calls itself.
    #[must_use]
    pub fn new(regions: impl IntoIterator<Item = Region>) -> Self {
        Self { regions: regions.into_iter().collect(), incremental: false }
    }

    /// Returns the length of the snapshot, in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.regions.iter().map(Region::len).sum()
    }

    /// Returns whether the snapshot has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A range of memory in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Region {
    /// The addresses that it had when the snapshot began.
    pub addresses: Range<u64>,
    /// The page size in bytes: of a huge page on hugetlb memory.
    pub page: u64,
}

impl Region {
    /// Returns a region: its addresses, and the size of its pages in bytes.
    #[must_use]
    pub fn new(addresses: Range<u64>, page: u64) -> Self {
        Self { addresses, page }
    }

    /// Returns the length of the region, in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    /// Returns whether the region has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The content of some pages when the snapshot began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// This number of bytes of zeros.
    Zero(u64),
    /// This number of bytes was lost: the pages were unmapped, or dropped without an event, before they could be saved.
    Gone(u64),
}

impl Content<'_> {
    /// Returns the number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Content::Data(bytes) => bytes.len() as u64,
            Content::Zero(len) | Content::Gone(len) => *len,
        }
    }

    /// Returns whether there are no bytes, which is never delivered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The receiver of a snapshot's pages: a [`SnapshotWriter`](super::SnapshotWriter), or a closure of the shape of
/// [`write`](Self::write).
///
/// A thread of its own calls it. It may block: when the buffers are full, writers of the memory wait. **It must not write
/// to memory that the snapshot saves**: with full buffers it would wait for itself.
pub trait Sink: Send {
    /// Begins; called once, before all others.
    ///
    /// # Errors
    ///
    /// Any error ends the snapshot before memory is protected; [`begin`](super::Options::begin) returns it.
    fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
        let _ = geometry;
        Ok(())
    }

    /// Takes whole pages from byte `offset` of the snapshot on. Each page comes exactly once, in any order.
    ///
    /// # Errors
    ///
    /// Any error, or a panic, aborts the snapshot.
    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()>;

    /// Completes the snapshot; called once, after all pages were delivered.
    ///
    /// # Errors
    ///
    /// Any error is the error of the snapshot.
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: FnMut(u64, Content<'_>) -> io::Result<()> + Send> Sink for F {
    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        self(offset, content)
    }
}
