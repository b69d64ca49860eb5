//! What was written, and what was accessed: the trackers, in every mode and on every kind of memory.

#![expect(clippy::single_range_in_vec_init, reason = "what is told is a list of ranges")]

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod access;
mod changes;
mod concurrent;
mod elsewhere;
mod forked;
#[cfg(all(feature = "pager", feature = "snapshot"))]
mod held;
#[cfg(target_arch = "x86_64")] // where it can be done
mod injected;
mod pinned;
mod process;
mod ranges;
mod reset;
mod ring;
mod space;
mod taken_over;
mod written;
