//! [`MemoryRegion`]: a part of a guest's memory, as its monitor describes it.

use serde::{Deserialize, Serialize};

use super::PeerError;

/// The largest page size that any Linux has: 16 GiB, of powerpc64.
const MAX_PAGE_SIZE: usize = if usize::BITS > 34 { 1 << 34 } else { 1 << 30 };

/// A range of a guest's memory, in the address space of the process that handed it over.
///
/// ```
/// use userfaultfd::handoff::MemoryRegion;
///
/// let region = MemoryRegion::new(0x7f00_0000_0000, 1 << 30, 0).page_size(2 << 20).guest_address(0);
/// assert_eq!(region.len, 1 << 30);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MemoryRegion {
    /// The address of the first byte.
    pub address: usize,
    /// The length in bytes.
    pub len: usize,
    /// The offset of the content in the memory file, in bytes. It counts through all regions.
    pub offset: u64,
    /// The page size in bytes.
    pub page_size: usize,
    /// The address that the guest sees, if the monitor says it.
    pub guest_address: Option<u64>,
    /// The offset of the memory in its backing file, in bytes, if the monitor says it.
    pub file_offset: Option<u64>,
    /// A name of the region's source, such as a path, for the process that goes on when this one has died: see
    /// [`adopt`](super::adopt). Set it before the memory is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl MemoryRegion {
    /// Returns a region of pages of the system's size.
    #[must_use]
    pub fn new(address: usize, len: usize, offset: u64) -> Self {
        let page_size = crate::page_size();
        Self { address, len, offset, page_size, guest_address: None, file_offset: None, source: None }
    }

    /// Sets the page size, in bytes.
    #[must_use]
    pub fn page_size(mut self, bytes: usize) -> Self {
        self.page_size = bytes;
        self
    }

    /// Sets the address that the guest sees.
    #[must_use]
    pub fn guest_address(mut self, address: u64) -> Self {
        self.guest_address = Some(address);
        self
    }

    /// Sets the offset of the memory in its backing file, in bytes.
    #[must_use]
    pub fn file_offset(mut self, offset: u64) -> Self {
        self.file_offset = Some(offset);
        self
    }

    /// Sets a name of the source.
    #[must_use]
    pub fn source(mut self, name: impl Into<String>) -> Self {
        self.source = Some(name.into());
        self
    }

    /// The numbers of a message, if they fit into this process's.
    pub(super) fn of_wire(address: u64, len: u64, offset: u64, page_size: u64) -> Result<Self, String> {
        let fit = |name, number: u64| {
            usize::try_from(number).map_err(|_| format!("{name} {number:#x} is beyond any address"))
        };
        let region = Self::new(fit("the address", address)?, fit("the size", len)?, offset);
        Ok(region.page_size(fit("the page size", page_size)?))
    }

    fn end(&self) -> Option<usize> {
        self.address.checked_add(self.len)
    }

    fn check(&self) -> Result<(), &'static str> {
        let Self { address, len, offset, page_size, .. } = *self;
        if !page_size.is_power_of_two() || !(crate::page_size()..=MAX_PAGE_SIZE).contains(&page_size) {
            return Err("its page size isn't one");
        }
        if len == 0 {
            return Err("it is empty");
        }
        if address % page_size != 0 || len % page_size != 0 {
            return Err("it isn't made of whole pages");
        }
        if self.end().is_none_or(|end| isize::try_from(end).is_err()) {
            return Err("it ends beyond any address");
        }
        let file_end = |offset: u64| offset.checked_add(len as u64).and_then(|end| i64::try_from(end).ok());
        if file_end(offset).is_none() || self.file_offset.is_some_and(|offset| file_end(offset).is_none()) {
            return Err("its content ends beyond any file");
        }
        Ok(())
    }
}

/// Checks all regions of a message.
pub(super) fn check(regions: &[MemoryRegion]) -> Result<(), PeerError> {
    if regions.is_empty() {
        return Err(PeerError::NoRegions);
    }
    for region in regions {
        region.check().map_err(|reason| PeerError::Region { region: region.clone(), reason })?;
    }
    let mut sorted: Vec<_> = regions.iter().collect();
    sorted.sort_unstable_by_key(|region| region.address);
    for pair in sorted.windows(2) {
        if pair[0].end().is_none_or(|end| end > pair[1].address) {
            let reason = "it overlaps another one";
            return Err(PeerError::Region { region: pair[1].clone(), reason });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::require;

    #[test]
    fn absurd_regions_are_refused_with_their_reason() {
        require!();
        let page = crate::page_size();
        let good = || MemoryRegion::new(16 * page, 4 * page, 0);
        check(&[good(), MemoryRegion::new(20 * page, page, 4 * page as u64)]).unwrap();
        assert!(matches!(check(&[]), Err(PeerError::NoRegions)));
        let highest = usize::MAX - page + 1;
        for (bad, expected) in [
            (good().page_size(0), "page size"),
            (good().page_size(page + 1), "page size"),
            (good().page_size(page / 2), "page size"),
            (good().page_size(1 << (usize::BITS - 1)), "page size"),
            (MemoryRegion::new(16 * page, 0, 0), "empty"),
            (MemoryRegion::new(16 * page + 1, page, 0), "whole pages"),
            (MemoryRegion::new(16 * page, page + 1, 0), "whole pages"),
            (good().page_size(32 * page), "whole pages"),
            (MemoryRegion::new(highest, page, 0), "beyond any address"),
            (MemoryRegion::new(highest, 2 * page, 0), "beyond any address"),
            (MemoryRegion::new(page, highest, 0), "beyond any address"),
            (MemoryRegion::new(16 * page, page, u64::MAX), "beyond any file"),
            (good().file_offset(i64::MAX as u64), "beyond any file"),
        ] {
            let Err(PeerError::Region { region, reason }) = check(std::slice::from_ref(&bad)) else {
                panic!("{bad:?}")
            };
            assert!(region == bad && reason.contains(expected), "{bad:?}: {reason}");
        }
        for other in [15, 16, 17, 19] {
            let overlapping = [good(), MemoryRegion::new(other * page, 2 * page, 0)];
            let error = check(&overlapping).unwrap_err().to_string();
            assert!(error.contains("overlaps"), "{error}");
        }
    }
}
