//! How much a peer may send.

use crate::sys;

/// The longest message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) bytes: usize,
}

impl Default for Limit {
    /// Some ten thousand regions: monitors have a few.
    fn default() -> Self {
        Self { bytes: 1 << 20 }
    }
}

/// Peers that may be connected without having handed anything over. One that sends nothing has to give way then.
pub(super) const MAX_PENDING: usize = 256;

/// The part of this process's descriptors that peers may hold together by what they have sent, before a message takes it.
const DESCRIPTORS_PART: usize = 4;

/// The number of descriptors that peers may hold together, before a message takes them.
pub(super) fn max_descriptors() -> usize {
    // Two are a userfaultfd and the memory's file.
    (sys::max_descriptors() / DESCRIPTORS_PART).max(2)
}
