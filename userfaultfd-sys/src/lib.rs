//! Raw bindings to Linux userfaultfd.
#![no_std]

mod bindings;
mod types;

pub use bindings::*;
pub use types::*;
