//! Operations that are done in two ways: with the library, and [by hand](bare). Both ways work on the same descriptor
//! and the same memory, and tell the same of what they got.
//!
//! A round is a batch of one way, long enough to be timed. What it takes to set up the next round isn't timed.

mod bare;
mod calls;
mod decoding;
mod faults;
#[path = "../memfd/mod.rs"]
mod memfd;
#[path = "../../tests/support/random.rs"]
#[expect(dead_code, reason = "others need the rest")]
mod random;
mod reads;

use std::hint::black_box;
use std::time::{Duration, Instant};

use userfaultfd::{Event, FaultKind, ReadWrite, Uffd, UffdBuilder};

/// How a round does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// With `userfaultfd`.
    Library,
    /// With `userfaultfd-sys` and `libc`.
    ByHand,
}

/// An operation that can be done in two ways.
pub(crate) trait Pair {
    /// Operations in a round.
    fn count(&self) -> u32;

    /// Does a round and tells how long its timed part took.
    fn round(&mut self, way: Way) -> Duration;
}

/// A name, and what makes the pair.
pub(crate) type Case = (&'static str, fn() -> Box<dyn Pair>);

/// Operations whose two ways should cost the same.
pub(crate) const OPERATIONS: &[Case] = &[
    ("copy, 1 page", || Box::new(calls::Copy::new(1))),
    ("copy, 16 pages", || Box::new(calls::Copy::new(16))),
    ("copy, EEXIST", || Box::new(calls::CopyAgain::new())),
    ("wake", || Box::new(calls::Wake::new())),
    ("read_event, none there", || Box::new(reads::Nothing::new())),
    ("read_event", || Box::new(reads::Waiting::new(reads::Call::One))),
    ("read_events of 32", || Box::new(reads::Waiting::new(reads::Call::Batch))),
    ("fault: read_event, copy", || Box::new(faults::Faults::new(faults::Call::One))),
    ("fault: read_events, copy", || Box::new(faults::Faults::new(faults::Call::Batch))),
];

/// Decoding: what a way does with a batch of messages, and nothing but the read(2) by hand.
pub(crate) const DECODING: &[Case] = &[
    ("faults, read_events", || Box::new(decoding::Decoding::new(decoding::faults(), decoding::events))),
    ("faults, changes first", || {
        Box::new(decoding::Decoding::new(decoding::faults(), decoding::changes_first))
    }),
    ("faults, by hand", || Box::new(decoding::Decoding::new(decoding::faults(), decoding::by_hand))),
    ("all kinds, read_events", || Box::new(decoding::Decoding::new(decoding::all_kinds(), decoding::events))),
    ("all kinds, by hand", || Box::new(decoding::Decoding::new(decoding::all_kinds(), decoding::by_hand))),
];

/// How many messages the buffers of both ways have room for. Enough that the allocator maps each on its own: else
/// they would lie differently in cache lines, and the kernel copies faster into one than into the other.
const ROOM: usize = 8192;

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn uffd(non_blocking: bool) -> Uffd {
    UffdBuilder::new().close_on_exec(true).non_blocking(non_blocking).create().expect("a userfaultfd")
}

/// Uses what the library tells of an event: the same as [`bare::decode`].
fn use_event(event: Event) {
    black_box(match event {
        Event::Pagefault { kind, rw, addr, .. } => {
            (addr as u64, rw == ReadWrite::Write, kind == FaultKind::Missing)
        }
        Event::Remap { to, .. } => (to as u64, false, false),
        Event::Remove { start, .. } | Event::Unmap { start, .. } => (start as u64, false, false),
        other => panic!("{other:?}"),
    });
}

/// Uses what a message tells.
fn use_message(message: &userfaultfd_sys::uffd_msg) {
    black_box(bare::decode(message).expect("a known event"));
}
