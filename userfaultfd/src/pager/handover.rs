//! What a pager returns when memory is handed over, perhaps to another process.

use std::sync::Arc;

use super::memory::address_map::{self, AddressMap};
use super::{DescriptorId, MissingRange};
use crate::Uffd;

/// A descriptor that a pager has handed over.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// The id that it had in the pager.
    pub descriptor: DescriptorId,
    /// The descriptor. Its ranges are still registered, and threads wait for pages: closing it shows them zeros.
    pub uffd: Uffd,
    pub(super) layout: Arc<AddressMap>,
}

impl Detached {
    /// Returns the missing ranges, ordered by address. Takes time in proportion to the number of pages.
    #[must_use]
    pub fn missing(&self) -> Vec<MissingRange> {
        address_map::missing(self.layout.segments(), self.layout.holes())
    }
}
