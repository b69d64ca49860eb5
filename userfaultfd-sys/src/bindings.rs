//! The generated text, which `build/main.rs` puts into `OUT_DIR`.

#![expect(
    missing_debug_implementations,
    reason = "a union doesn't know which of its fields is the valid one"
)]
#![expect(missing_docs, reason = "the kernel's documentation is linked from the crate's")]
#![expect(non_upper_case_globals, reason = "the kernel's names")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    clippy::undocumented_unsafe_blocks,
    reason = "bindgen's Default of a union: all bytes zero, which each of its fields allows"
)]

use crate::types::*;

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
