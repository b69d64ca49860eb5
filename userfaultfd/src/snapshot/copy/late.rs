//! Removals that were read and may be made later: the thread that removes pages goes on when the event was read, and nothing
//! tells when it has dropped them.

use std::mem;
use std::time::{Duration, Instant};

use super::bits::Bits;

/// Time for which a removal that was read may be made later. Usually the thread runs at once; it may wait for a CPU, or for
/// the lock of the file.
const LATE_TIME: Duration = Duration::from_secs(2);

/// Pages whose removal was read within the last [`LATE_TIME`], or up to twice that. They count as changed in every member
/// that begins meanwhile.
#[derive(Debug)]
pub(super) struct LateRemovals {
    /// Those since the turn.
    new: Bits,
    /// Those of the time before it.
    old: Bits,
    turned: Instant,
}

impl LateRemovals {
    pub(super) fn new(pages: usize) -> Self {
        let bits = || Bits::new(pages, false);
        Self { new: bits(), old: bits(), turned: Instant::now() }
    }

    /// Adds pages that are in both.
    pub(super) fn add(&mut self, removed: &Bits, silent: &Bits) {
        if self.turned.elapsed() > LATE_TIME {
            self.old = mem::replace(&mut self.new, Bits::new(removed.len(), false));
            self.turned = Instant::now();
        }
        self.new.join_common(removed, silent);
    }

    pub(super) fn join_to(&self, bits: &mut Bits) {
        bits.join(&self.new);
        bits.join(&self.old);
    }
}
