//! [`Dialect`], and the one table of all of them: a new dialect is a file here, and a row of the table.

mod cloud_hypervisor;
mod codesandbox;
mod criu;
mod e2b;
mod external_backend;
mod firecracker;
mod nydus;
mod page_fault;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::framing::Framing;
use super::{MemoryRegion, Message};

/// What a dialect is on the wire.
pub(super) struct Wire {
    /// Where a message ends.
    pub(super) framing: Framing,
    /// Whether a stream that begins so is of this dialect.
    pub(super) begins: fn(&[u8]) -> Begins,
    /// Decodes a whole message. The error is the reason.
    pub(super) decode: fn(&[u8]) -> Result<Message, String>,
    /// Encodes a message, with what says where it ends. `None`: the dialect can't say it.
    pub(super) encode: fn(&Message) -> Option<Vec<u8>>,
    /// Number of descriptors beside the userfaultfd that a peer may send.
    pub(super) max_files: usize,
    /// What the handler sends once it serves the memory.
    pub(super) ready: &'static [u8],
    /// Whether the handler sends a memfd and its length first.
    pub(super) sends_memory: bool,
    /// Whether the regions come from elsewhere, and aren't in the messages.
    pub(super) has_no_regions: bool,
    /// Whether the descriptors come with the last byte of the message that hands memory over.
    pub(super) descriptors_last: bool,
    /// The dialect that begins alike, and that it is if the memory's file comes along.
    pub(super) with_memory_file: Option<Dialect>,
}

impl Wire {
    /// One with nothing but messages and a userfaultfd.
    const fn new(
        framing: Framing,
        begins: fn(&[u8]) -> Begins,
        decode: fn(&[u8]) -> Result<Message, String>,
        encode: fn(&Message) -> Option<Vec<u8>>,
    ) -> Self {
        Self {
            framing,
            begins,
            decode,
            encode,
            max_files: 0,
            ready: b"",
            sends_memory: false,
            has_no_regions: false,
            descriptors_last: false,
            with_memory_file: None,
        }
    }
}

/// Whether bytes are the beginning of a dialect's first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    Yes,
    /// More bytes decide.
    Perhaps,
    No,
}

impl Begins {
    /// By a byte that isn't whitespace.
    fn with(byte: u8, bytes: &[u8]) -> Self {
        match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(first) if *first == byte => Self::Yes,
            Some(_) => Self::No,
            None => Self::Perhaps,
        }
    }

    /// Some dialects can't be told by their bytes.
    fn never(_: &[u8]) -> Self {
        Self::No
    }
}

macro_rules! dialects {
    ($($(#[doc = $doc:literal])* $variant:ident, $name:literal, $module:ident;)*) => {
        /// How a monitor, or CRIU, hands memory over: the form of its messages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Dialect {
            $($(#[doc = $doc])* $variant,)*
        }

        impl Dialect {
            /// All dialects.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Returns the name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            pub(super) fn wire(self) -> &'static Wire {
                match self {
                    $(Self::$variant => &$module::WIRE,)*
                }
            }
        }
    };
}

// Of dialects that begin alike the first that is allowed is recognised.
dialects! {
    /// Firecracker: a bare array of JSON, and the userfaultfd.
    Firecracker, "Firecracker", firecracker;
    /// E2B's Firecracker: the same array, and a memfd where the memory is one. With a memfd it is recognised.
    E2b, "E2B", e2b;
    /// Nydus, `block_uffd`: an object of JSON, or the same array as Firecracker's. The object is recognised.
    ///
    /// Its policy "zerocopy" is served by copying, too: the monitor waits for its pages, not for files.
    Nydus, "nydus", nydus;
    /// Cloud Hypervisor, the hand-off to another process (its pull request 8657): an object of JSON behind its length. The
    /// handler confirms with a byte.
    CloudHypervisor, "Cloud Hypervisor hand-off", cloud_hypervisor;
    /// Cloud Hypervisor, the external memory backend (its pull request 8664): a binary header, and a backing file for each
    /// region.
    CloudHypervisorBackend, "Cloud Hypervisor external backend", external_backend;
    /// Cloud Hypervisor, page faults of a VM that is being migrated: requests by guest address. No userfaultfd is handed over.
    CloudHypervisorPageFault, "Cloud Hypervisor page fault", page_fault;
    /// CodeSandbox's Firecracker: the handler first sends the memory, a memfd; then it gets the array. Isn't recognised, since
    /// the handler speaks first.
    CodeSandbox, "CodeSandbox", codesandbox;
    /// CRIU's lazy pages: for each task its process id and its userfaultfd; the regions are in the images. Isn't recognised:
    /// its first bytes can be any.
    Criu, "CRIU", criu;
}

impl Dialect {
    /// Returns whether a stream's first bytes can show that it is of this dialect, alone or before others that are allowed.
    /// Those that can't must be the only one that is allowed.
    #[must_use]
    pub fn is_recognised(self) -> bool {
        !std::ptr::fn_addr_eq(self.wire().begins, Begins::never as fn(&[u8]) -> Begins)
    }

    /// Encodes a message, or returns `None` if the dialect has no such message.
    ///
    /// ```
    /// use userfaultfd::handoff::{Dialect, MemoryRegion, Message};
    ///
    /// let message = Message::handoff([MemoryRegion::new(0x10000, 0x20000, 0).page_size(0x1000)]);
    /// let bytes = Dialect::Firecracker.encode(&message).unwrap();
    /// assert!(bytes.starts_with(br#"[{"base_host_virt_addr":65536,"size":131072,"offset":0,"page_size":4096"#));
    /// ```
    #[must_use]
    pub fn encode(self, message: &Message) -> Option<Vec<u8>> {
        (self.wire().encode)(message)
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A region in the array of JSON that Firecracker and its relatives send. Unknown fields are ignored, and so is
/// `page_size_kib`, which has bytes.
#[derive(Debug, Serialize, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    page_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none", skip_deserializing)]
    page_size_kib: Option<u64>,
}

impl Mapping {
    fn region(&self) -> Result<MemoryRegion, String> {
        let page_size = self.page_size.unwrap_or(crate::page_size() as u64);
        MemoryRegion::of_wire(self.base_host_virt_addr, self.size, self.offset, page_size)
    }

    fn of(region: &MemoryRegion) -> Self {
        let page_size = Some(region.page_size as u64);
        Self {
            base_host_virt_addr: region.address as u64,
            size: region.len as u64,
            offset: region.offset,
            page_size,
            page_size_kib: page_size,
        }
    }
}

/// Decodes an array of regions.
fn decode_array(bytes: &[u8]) -> Result<Message, String> {
    let mappings: Vec<Mapping> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let regions = mappings.iter().map(Mapping::region).collect::<Result<Vec<_>, _>>()?;
    Ok(Message::handoff(regions))
}

/// Encodes an array of regions.
fn encode_array(message: &Message) -> Option<Vec<u8>> {
    let Message::Handoff { regions, .. } = message else { return None };
    serde_json::to_vec(&regions.iter().map(Mapping::of).collect::<Vec<_>>()).ok()
}
