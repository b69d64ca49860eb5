//! Ranges of missing pages, as they are handed over.

use crate::pager::RegionId;

/// A range of missing pages.
///
/// It can cross to another process that goes on serving the memory: with the cargo feature `serde` it can be
/// serialised, and without it be built from its parts.
///
/// ```
/// use userfaultfd::pager::{MissingRange, RegionId};
///
/// fn line(missing: &MissingRange) -> String {
///     format!("{} {} {}", missing.address, missing.len, missing.offset.map_or(-1, |offset| offset as i64))
/// }
///
/// fn parse(line: &str) -> Option<MissingRange> {
///     let mut fields = line.split(' ').map(|field| field.parse::<i64>().ok());
///     let (address, len, offset) = (fields.next()??, fields.next()??, fields.next()??);
///     Some(MissingRange::new(RegionId::new(0), address as usize, len as usize, u64::try_from(offset).ok()))
/// }
///
/// let missing = MissingRange::new(RegionId::new(0), 0x7f00_0000_0000, 1 << 20, Some(4096));
/// assert_eq!(parse(&line(&missing)), Some(missing));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct MissingRange {
    /// The region.
    pub region: RegionId,
    /// The address of the first page.
    pub address: usize,
    /// The length in bytes.
    pub len: usize,
    /// The offset of the content in the source, in bytes. `None`: the pages were removed, and must read as zeros.
    pub offset: Option<u64>,
}

impl MissingRange {
    /// Returns a range of missing pages with its content at `offset` of the source; with `None` it must read as zeros.
    ///
    /// `address`, `len` and `offset` are in bytes. [`Region::missing`](crate::pager::Region::missing) ignores the region's
    /// id.
    #[must_use]
    pub const fn new(region: RegionId, address: usize, len: usize, offset: Option<u64>) -> Self {
        Self { region, address, len, offset }
    }

    pub(super) fn is_followed_by(&self, region: RegionId, address: usize, offset: Option<u64>) -> bool {
        self.region == region
            && self.address + self.len == address
            && self.offset.map(|at| at + self.len as u64) == offset
    }
}
