//! How pages are saved: the thread that copies them while the program runs, and what it keeps for that.

mod begin;
pub(crate) mod bits;
pub(crate) mod copier;
mod events;
pub(crate) mod layout;
pub(crate) mod look;
pub(crate) mod queue;
pub(crate) mod shared;
mod slices;
