//! How pages are saved: the thread that copies them while the program runs, and what it keeps for that.

mod active;
mod begin;
pub(crate) mod bits;
pub(crate) mod copier;
mod events;
mod fault;
mod keep;
mod late;
pub(crate) mod layout;
pub(crate) mod look;
pub(crate) mod queue;
mod settle;
pub(crate) mod shared;
mod slices;
mod trust;
mod walk;
