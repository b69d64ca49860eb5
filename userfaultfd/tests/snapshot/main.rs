//! Snapshots of memory that goes on being written: what they hold, and the files that hold them.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod changes;
mod chunks;
mod convert;
mod ends;
mod file;
mod forked;
mod image;
mod live;
mod model;
mod moments;
#[cfg(feature = "pager")]
mod restore;
#[path = "../dirty/ring.rs"]
mod ring;
mod series;
