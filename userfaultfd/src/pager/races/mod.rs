//! Races made to happen: the pager is stopped at a named point of a fault, the other side acts, and the pager goes on.
//!
//! Each act has a file, and is tried at each point on memory of each kind, in a process of its own: there a thread that
//! reads what is gone can tell of the signal, and nothing is left behind.

mod added;
mod control;
mod deferred;
mod detach;
mod evict;
mod exit;
mod finish;
mod fork;
mod found;
mod hanging;
mod harness;
mod limited;
mod order;
mod panic;
mod poison;
pub(crate) mod real_time;
mod remap;
mod remove;
mod removing;
mod second;
mod store;
mod unmap;
