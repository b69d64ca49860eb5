//! The pager: what it promises, with memory and descriptors of every kind, in this process and in others.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod answers;
mod bad;
mod budget;
mod crash;
mod ends;
mod events;
mod fills;
mod forked;
mod guards;
mod lazy;
mod leaks;
mod limited;
mod on_end;
mod others;
mod paged;
mod reader;
mod removal;
mod reports;
mod scene;
mod shared;
mod sources;
mod stuck;
#[cfg(all(feature = "tracking", feature = "snapshot"))]
mod tracked;
mod vast;
mod workers;
