//! The ids of descriptors and regions.

/// The id of a descriptor that a pager serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DescriptorId(pub(super) u64);

/// The id of a region that a pager serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RegionId(pub(super) u64);

impl RegionId {
    /// Returns the id with a number that [`number`](Self::number) has returned in another process.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Returns the id as a number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}
