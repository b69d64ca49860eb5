//! Source as users of the crate's releases 0.8 and 0.9 write it builds, and does what they rely on.
//!
//! [`interface`] names every item of those releases with its type. The other modules are programs of the kinds that use
//! the crate, each in the idiom of its kind: none of them uses what came later, or what the other tests share. What the
//! idioms can't be kept of is told in the guide `from_0_9`.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod balloon;
mod cache;
mod descriptors;
mod errors;
mod forks;
mod interface;
mod mapping;
mod minor;
mod monitor;
mod poll;
mod pool;
mod postcopy;
mod swap;
mod tracker;
