//! What `cargo xtask kernels` and process 1 of its guests tell each other.
//!
//! The host puts a [`Plan`] into the guest's first file system; the guest answers with [`Record`]s over its serial
//! console, which it shares with the kernel.

#[cfg(feature = "program")]
pub mod kernel;
mod plan;
mod record;

pub use plan::{Pass, Plan, User};
pub use record::{Ending, Record, Transcript, encode};
