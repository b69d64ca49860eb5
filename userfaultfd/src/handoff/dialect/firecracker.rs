//! Firecracker: one message, a bare array of JSON without a length or a newline, with the userfaultfd. It expects no
//! answer, and keeps its socket open until it ends.

use super::{Begins, Dialect, Framing, Wire, decode_array, encode_array};

pub(super) const WIRE: Wire = Wire {
    with_memory_file: Some(Dialect::E2b),
    ..Wire::new(Framing::Json, |bytes| Begins::with(b'[', bytes), decode_array, encode_array)
};
