//! [`Message`]: what the messages of all dialects say.

use super::MemoryRegion;
use crate::RegisterMode;

/// A message of a monitor, or of CRIU, without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// Memory is handed over, with its userfaultfd.
    #[non_exhaustive]
    Handoff {
        /// The ranges of the memory.
        regions: Vec<MemoryRegion>,
        /// The modes for which the memory is registered: [`MISSING`](RegisterMode::MISSING) unless the message says more.
        mode: RegisterMode,
        /// The process that has the memory, if the message says it.
        pid: Option<u32>,
        /// Number of files that follow the userfaultfd: `None` if the dialect doesn't say it.
        files: Option<usize>,
    },
    /// Memory is added to what was handed over.
    AddRegions(Vec<MemoryRegion>),
    /// Memory isn't the guest's any more.
    RemoveRegions(Vec<MemoryRegion>),
    /// A page is requested by its guest address: the dialect has no userfaultfd.
    PageFault {
        /// The address that the guest sees.
        guest_address: u64,
        /// The length in bytes.
        len: u64,
    },
    /// The properties of the image are requested.
    Stat,
    /// A process has ended before it was restored; it has no userfaultfd.
    Zombie {
        /// The process.
        pid: u32,
    },
    /// All processes are restored.
    Complete,
}

impl Message {
    /// Returns a message that hands memory over, registered for missing faults.
    #[must_use]
    pub fn handoff(regions: impl Into<Vec<MemoryRegion>>) -> Self {
        let regions = regions.into();
        Self::Handoff { regions, mode: RegisterMode::MISSING, pid: None, files: None }
    }

    /// Whether a userfaultfd comes with it.
    pub(super) fn has_userfaultfd(&self) -> bool {
        matches!(self, Self::Handoff { .. })
    }
}
