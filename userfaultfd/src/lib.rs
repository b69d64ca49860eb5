//! Linux page faults handled in user space.
#![deny(unsafe_code)]

mod builder;
mod error;
mod event;
mod features;
mod fill;
mod open;
pub mod pagemap;
mod protect;
mod sys;
mod uffd;

pub use nix::errno::Errno;
pub use nix::unistd::Pid;

pub use crate::builder::UffdBuilder;
pub use crate::error::{Error, Result};
pub use crate::event::{Drain, Event, EventBuffer, FaultKind, ReadWrite};
pub use crate::features::{FeatureFlags, IoctlFlags, Known, RegisterMode, Support};
pub use crate::fill::{ContinueMode, CopyMode, MoveMode};
pub use crate::open::{OpenFailure, OpenRefusal, OpenWith};
pub use crate::uffd::Uffd;

/// The page size of the system, in bytes: what addresses and lengths are multiples of, except on huge pages.
///
/// It isn't 4096 everywhere: 16 KiB and 64 KiB are common on arm64, 64 KiB on powerpc64.
#[must_use]
pub fn page_size() -> usize {
    sys::page_size()
}
