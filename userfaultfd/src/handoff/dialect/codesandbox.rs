//! CodeSandbox's Firecracker: the handler first sends eight bytes, the length of the memory, and the memory, a memfd. Then
//! comes the array, whose regions have three fields, and the userfaultfd. The handler confirms with two bytes.

use super::{Begins, Framing, Mapping, Message, Wire, decode_array};

pub(super) const WIRE: Wire = Wire {
    ready: b"ok",
    sends_memory: true,
    ..Wire::new(Framing::Json, Begins::never, decode_array, encode)
};

fn encode(message: &Message) -> Option<Vec<u8>> {
    let Message::Handoff { regions, .. } = message else { return None };
    let mapping = |region| Mapping { page_size: None, page_size_kib: None, ..Mapping::of(region) };
    serde_json::to_vec(&regions.iter().map(mapping).collect::<Vec<_>>()).ok()
}
