//! How much is filled for one fault: a page, a block, or more while access is sequential.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Sequential accesses to a region that are told apart: more than threads usually scan one region.
const MAX_STREAMS: usize = 8;

/// Bytes filled for one fault at most by default: more reads no faster from memory, and holds other faults up.
const DEFAULT_MAX_AROUND_BYTES: usize = 2 << 20;

/// How much is filled for one fault, beside its page. Present pages aren't read again, and nothing beyond the region is
/// filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultAround {
    /// Nothing beside the page.
    Page,
    /// The block that has the page. The value is its size in bytes, a multiple of the page size; blocks are aligned to the
    /// start of the region. Before Linux 7.2 it overwrites [guard pages](crate::pager#what-the-kernel-doesnt-report).
    Block(usize),
    /// The pages that follow in the direction of access: nothing for a random fault, and twice as much each time a fault
    /// comes where the last fill ended, forwards or backwards, up to `most` bytes. Up to eight such sequences in a region are
    /// told apart.
    ///
    /// Random access costs no more than with `Page`, and sequential access little more than with the largest `Block`.
    /// Before Linux 7.2 a fill of more than a page overwrites [guard pages](crate::pager#what-the-kernel-doesnt-report).
    Adaptive {
        /// The most that is filled for one fault, in bytes.
        most: usize,
    },
}

impl Default for FaultAround {
    /// Returns [`Adaptive`](Self::Adaptive) with at most 2 MiB.
    fn default() -> Self {
        Self::Adaptive { most: DEFAULT_MAX_AROUND_BYTES }
    }
}

/// The sequences of accesses to a region. Racing threads overwrite each other's entries at worst.
#[derive(Debug)]
pub(crate) struct Streams {
    streams: [Stream; MAX_STREAMS],
    /// The sequence that is replaced next.
    oldest: AtomicUsize,
}

/// The pages at which the next fault of a sequence is expected; the lowest bits hold the logarithm of the last fill's
/// number of pages.
#[derive(Debug)]
struct Stream {
    forwards: AtomicUsize,
    backwards: AtomicUsize,
}

/// Bits of the logarithm: enough for fills of 2³¹ pages.
const LOGARITHM_BITS: u32 = 5;

/// A sequence that no fault continues.
const NO_SEQUENCE: usize = usize::MAX;

fn pack(page: usize, logarithm: u32) -> usize {
    page << LOGARITHM_BITS | logarithm as usize
}

/// The sequence that a fault belongs to, and what to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    stream: usize,
    logarithm: u32,
    backwards: bool,
}

impl Streams {
    pub(crate) fn new() -> Self {
        let none =
            |_| Stream { forwards: AtomicUsize::new(NO_SEQUENCE), backwards: AtomicUsize::new(NO_SEQUENCE) };
        Self { streams: std::array::from_fn(none), oldest: AtomicUsize::new(0) }
    }

    /// What to fill for a fault on a page, at most `most` pages.
    pub(crate) fn window(&self, page: usize, most: usize) -> Window {
        let limit = most.max(1).ilog2();
        for (at, stream) in self.streams.iter().enumerate() {
            for (edge, backwards) in [(&stream.forwards, false), (&stream.backwards, true)] {
                let edge = edge.load(Ordering::Relaxed);
                if edge != NO_SEQUENCE && edge >> LOGARITHM_BITS == page {
                    let logarithm = (edge & ((1 << LOGARITHM_BITS) - 1)) as u32 + 1;
                    return Window { stream: at, logarithm: logarithm.min(limit), backwards };
                }
            }
        }
        let stream = self.oldest.fetch_add(1, Ordering::Relaxed) % MAX_STREAMS;
        Window { stream, logarithm: 0, backwards: false }
    }

    /// Notes the pages of a window that were filled.
    pub(crate) fn filled(&self, window: Window, pages: &Range<usize>) {
        let stream = &self.streams[window.stream];
        let below = pages.start.checked_sub(1).map_or(NO_SEQUENCE, |page| pack(page, window.logarithm));
        let above = pack(pages.end, window.logarithm);
        // A single page may be the first of either direction.
        let (forwards, backwards) = match window {
            Window { logarithm: 0, .. } => (above, below),
            Window { backwards: true, .. } => (NO_SEQUENCE, below),
            _ => (above, NO_SEQUENCE),
        };
        stream.forwards.store(forwards, Ordering::Relaxed);
        stream.backwards.store(backwards, Ordering::Relaxed);
    }
}

impl Window {
    /// The pages to fill for a fault on a page.
    pub(crate) fn pages(self, page: usize) -> Range<usize> {
        let more = (1 << self.logarithm) - 1;
        if self.backwards { page.saturating_sub(more)..page + 1 } else { page..page + 1 + more }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pages that are filled for a fault in a region without present pages.
    fn fault(streams: &Streams, page: usize, most: usize) -> Range<usize> {
        let window = streams.window(page, most);
        let pages = window.pages(page);
        streams.filled(window, &pages);
        pages
    }

    #[test]
    fn forwards_it_doubles_up_to_the_limit() {
        crate::support::require!();
        let streams = Streams::new();
        let mut page = 100;
        let mut sizes = Vec::new();
        for _ in 0..6 {
            let pages = fault(&streams, page, 8);
            assert_eq!(pages.start, page);
            page = pages.end;
            sizes.push(pages.len());
        }
        assert_eq!(sizes, [1, 2, 4, 8, 8, 8]);
    }

    #[test]
    fn backwards_likewise_and_not_below_the_first_page() {
        crate::support::require!();
        let streams = Streams::new();
        assert_eq!(fault(&streams, 6, 8), 6..7);
        assert_eq!(fault(&streams, 5, 8), 4..6);
        assert_eq!(fault(&streams, 3, 8), 0..4);
        assert_eq!(fault(&streams, 100, 8), 100..101);
    }

    #[test]
    fn a_fault_elsewhere_is_a_page() {
        crate::support::require!();
        let streams = Streams::new();
        for page in [5, 900, 17, 40, 3000, 7] {
            assert_eq!(fault(&streams, page, 1 << 20), page..page + 1);
        }
    }

    #[test]
    fn sequences_are_told_apart_as_many_as_are_kept() {
        crate::support::require!();
        let streams = Streams::new();
        let mut pages: Vec<_> = (0..MAX_STREAMS).map(|stream| stream * 10_000).collect();
        for round in 0..4 {
            for page in &mut pages {
                let filled = fault(&streams, *page, 64);
                assert_eq!(filled, *page..*page + (1 << round));
                *page = filled.end;
            }
        }
    }

    #[test]
    fn a_fill_that_ended_early_is_gone_on_with_where_it_ended() {
        crate::support::require!();
        let streams = Streams::new();
        fault(&streams, 0, 64);
        let window = streams.window(1, 64);
        assert_eq!(window.pages(1), 1..3);
        streams.filled(window, &(1..2)); // page 2 is there already
        assert_eq!(fault(&streams, 2, 64), 2..6);
    }

    #[test]
    fn less_than_a_page_is_a_page() {
        crate::support::require!();
        let streams = Streams::new();
        assert_eq!(fault(&streams, 1, 0), 1..2);
        assert_eq!(fault(&streams, 2, 1), 2..3);
    }
}
