//! Firecracker: one message, a bare array of JSON without a length or a newline, with the userfaultfd. It expects no
//! answer, and keeps its socket open until it ends.

use super::{Begins, Framing, Wire, decode_array, encode_array};

pub(super) const WIRE: Wire = Wire {
    framing: Framing::Json,
    begins: |bytes| Begins::with(b'[', bytes),
    decode: decode_array,
    encode: encode_array,
    max_files: 0,
    ready: b"",
    sends_memory: false,
};
