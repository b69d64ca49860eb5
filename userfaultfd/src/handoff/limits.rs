//! How much a peer may send.

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

/// The most descriptors that a peer may have sent and that no message has taken: a userfaultfd and a backing file for each
/// region. The kernel sends 253 at most with one message.
pub(super) const MAX_DESCRIPTORS: usize = 256;
