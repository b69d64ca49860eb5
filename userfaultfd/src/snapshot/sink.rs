//! Where a snapshot goes.

use std::io;
use std::ops::Range;

/// What a snapshot is of: told to the sink before anything else.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Geometry {
    /// The ranges of memory in the order in which they lie in the snapshot, one behind the other: the first begins at
    /// offset 0.
    pub regions: Vec<Region>,
    /// Only what has changed since the snapshot before will be delivered.
    pub incremental: bool,
}

impl Geometry {
    /// The length of the snapshot, in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.regions.iter().map(Region::len).sum()
    }

    /// Whether it is of nothing.
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
    /// Bytes of a page: of a huge page on hugetlb memory.
    pub page: u64,
}

impl Region {
    /// Bytes of the region.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What some pages held when the snapshot began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// So many zeros.
    Zero(u64),
    /// So many bytes that can't be told: they were unmapped, or dropped behind the snapshot's back, before they could
    /// be saved.
    Gone(u64),
}

impl Content<'_> {
    /// How many bytes these are.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Content::Data(bytes) => bytes.len() as u64,
            Content::Zero(len) | Content::Gone(len) => *len,
        }
    }

    /// Whether it is nothing, which is never delivered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Takes what a snapshot delivers, on a thread of its own: a [`SnapshotWriter`](super::SnapshotWriter), or a function
/// of the shape of [`write`](Self::write).
///
/// It may take its time: writers of the memory wait when the buffers between are full. **It must not write to memory
/// that the snapshot is of**: when the buffers are full it would wait for itself.
pub trait Sink: Send {
    /// Called once, first.
    ///
    /// # Errors
    ///
    /// Any error ends the snapshot before memory is protected; [`begin`](super::Options::begin) returns it.
    fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
        let _ = geometry;
        Ok(())
    }

    /// Takes what lies at byte `offset` of the snapshot, whole pages. Each page comes exactly once, in any order.
    ///
    /// # Errors
    ///
    /// Any error, or a panic, aborts the snapshot.
    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()>;

    /// Called once, last, if all has been delivered: it is complete.
    ///
    /// # Errors
    ///
    /// Any error is that of the snapshot.
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: FnMut(u64, Content<'_>) -> io::Result<()> + Send> Sink for F {
    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        self(offset, content)
    }
}
