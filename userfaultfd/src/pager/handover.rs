//! What crosses to another process when memory is handed over.

use std::sync::Arc;

use super::memory::address_map::{self, AddressMap};
use super::{DescriptorId, MissingRange};
use crate::Uffd;

/// A descriptor that a pager has handed over.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// What it was.
    pub descriptor: DescriptorId,
    /// The descriptor. Its ranges are registered still, and threads wait for pages: closing it shows them zeros.
    pub uffd: Uffd,
    pub(super) layout: Arc<AddressMap>,
}

impl Detached {
    /// What is missing, by address. Looks at the state of every page.
    #[must_use]
    pub fn missing(&self) -> Vec<MissingRange> {
        address_map::missing(self.layout.segments(), self.layout.holes())
    }
}
