//! Reading ahead: where a source is slow and access sequential, several threads read what comes next at the same time.

use std::ops::Range;
use std::sync::Arc;

use super::descriptor::Descriptor;
use super::fill::{Done, Filler};
use super::layout::Segment;
use super::region::Served;
use super::shared::Shared;

/// What one thread reads at a time.
const CHUNK: usize = 1 << 20;

/// Something to read ahead.
#[derive(Debug)]
pub(crate) struct Ahead {
    descriptor: Arc<Descriptor>,
    region: Arc<Served>,
    addresses: Range<usize>,
}

/// The part of `around` that is read at once for a fault on a page: as much as one thread reads at a time.
pub(crate) fn first(region: &Served, page: usize, around: &Range<usize>) -> Range<usize> {
    let chunk = (CHUNK >> region.page_shift).max(1);
    let (start, end) = if page == around.start {
        (page, page + chunk)
    } else {
        // Backwards.
        (page.saturating_sub(chunk - 1), page + 1)
    };
    start.max(around.start)..end.min(around.end)
}

/// Has the rest of `around` read by others.
pub(crate) fn ask(
    shared: &Shared,
    descriptor: &Arc<Descriptor>,
    segment: &Segment,
    now: &Range<usize>,
    around: &Range<usize>,
) {
    let chunk = (CHUNK >> segment.region.page_shift).max(1);
    let address = |page: usize| segment.start + ((page - segment.first) << segment.region.page_shift);
    let ask = |pages: Range<usize>| {
        shared.ask(Ahead {
            descriptor: Arc::clone(descriptor),
            region: Arc::clone(&segment.region),
            addresses: address(pages.start)..address(pages.end),
        });
    };
    // The nearest first.
    for start in (now.end..around.end).step_by(chunk) {
        ask(start..(start + chunk).min(around.end));
    }
    let mut end = now.start;
    while end > around.start {
        let start = end.saturating_sub(chunk).max(around.start);
        ask(start..end);
        end = start;
    }
}

/// Reads ahead until the pager stops.
pub(crate) fn read(shared: &Shared, thread: usize) {
    let mut filler = Filler::new(thread);
    while let Some(Ahead { descriptor, region, addresses }) = shared.next_ahead() {
        let mut at = addresses.start;
        while at < addresses.end && !shared.is_stopping() {
            let run = {
                let serving = descriptor.enter(thread);
                let Some(serving) = &*serving else { break };
                let Some(segment) = serving.layout.find(at) else { break };
                if !Arc::ptr_eq(&segment.region, &region) {
                    break;
                }
                let pages = segment.page_at(at)..segment.page_at(addresses.end.min(segment.end) - 1) + 1;
                let (run, next) = filler.claim_ahead(segment, pages, usize::MAX);
                at = segment.address_of(next).unwrap_or(segment.end);
                run
            };
            let Some(run) = run else { continue };
            match filler.load(shared, &descriptor, run, 0) {
                Done::Yes => {}
                // Who needs it asks for it.
                Done::Later(work, _) => filler.give_up(&descriptor, work),
                Done::Gone => shared.gone(&descriptor),
            }
        }
    }
}
