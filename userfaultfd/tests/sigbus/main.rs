//! Memory whose faults are answered in the thread that makes them.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod chain;
mod locks;
mod memory;
mod processes;
mod threads;

use std::sync::Arc;

use support::page;
use userfaultfd::pager::BytesSource;
use userfaultfd::{LazyMemory, SigbusBuilder};

/// Bytes by which each place of the source is known. None is zero.
fn content(len: usize) -> Arc<[u8]> {
    (0..len).map(byte).collect()
}

/// The byte at an offset.
fn byte(offset: usize) -> u8 {
    (offset.wrapping_mul(0x9e37_79b1) >> 11) as u8 | 1
}

/// Memory with a number of pages of content, one page a fault.
fn lazy(pages: usize) -> LazyMemory {
    builder(pages).build().unwrap()
}

fn builder(pages: usize) -> SigbusBuilder {
    LazyMemory::sigbus(BytesSource::new(content(pages * page()))).block(1)
}

/// Steps of a generator of numbers that is good enough to spread accesses.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    (*state >> 33) as usize
}
