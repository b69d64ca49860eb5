//! Descriptors that a worker has met: to find one in the table takes a lock that all workers share.

use std::sync::Arc;

use super::poll::Token;
use crate::pager::memory::descriptor::Descriptor;
use crate::pager::memory::table::Table;

/// Descriptors that a worker knows at a time. With more of them two of the same place in the cache replace each other.
const CACHE_SLOTS: usize = 64;

#[derive(Debug)]
pub(super) struct DescriptorCache {
    /// By slot in the table. With room from the start: a worker allocates nothing.
    known: Box<[Option<Arc<Descriptor>>]>,
    /// The version of the table that they were found in.
    version: u32,
}

impl DescriptorCache {
    /// `None`: there is no memory.
    pub(super) fn try_new() -> Option<Self> {
        let mut known = Vec::new();
        known.try_reserve_exact(CACHE_SLOTS).ok()?;
        known.resize(CACHE_SLOTS, None);
        Some(Self { known: known.into_boxed_slice(), version: 0 })
    }

    /// The descriptor that an event is about, if it is still served.
    pub(super) fn find(&mut self, table: &Table, token: Token) -> Option<Arc<Descriptor>> {
        let version = table.version();
        if version != self.version {
            // Not to keep what is served no more.
            self.known.fill(None);
            self.version = version;
        }
        let slot = token.slot();
        let known = &mut self.known[slot % CACHE_SLOTS];
        if !known.as_ref().is_some_and(|descriptor| token.means(descriptor)) {
            *known = table.in_slot(slot);
        }
        known.clone().filter(|descriptor| token.means(descriptor))
    }
}
