//! Ranges of missing pages, as they are handed over.

use crate::pager::RegionId;

/// Pages that nobody has filled, one after the other.
///
/// They can cross to another process, which goes on serving the memory: with the cargo feature `serde` they can be
/// serialised, and without it be made of their parts.
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
    /// The region, or what became of it by a move or a fork.
    pub region: RegionId,
    /// Where the first is.
    pub address: usize,
    /// How many bytes they have.
    pub len: usize,
    /// Where their content is in the source, in bytes. `None`: they were removed, and are to be zero.
    pub offset: Option<u64>,
}

impl MissingRange {
    /// Pages at an address, with their content at an offset of the source; without one they are zero. The address, the
    /// length and the offset are in bytes. For [`Region::missing`](crate::pager::Region::missing) the region's id doesn't matter.
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
