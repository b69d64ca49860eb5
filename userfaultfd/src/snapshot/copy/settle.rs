//! Pages whose content is known without a read, or lost.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::copier::Copier;
use super::layout::Part;
use super::queue::{Item, Payload};
use super::shared::Counts;
use crate::page_size;
use crate::sync::AtomicU64;

impl Copier {
    pub(super) fn count(&self, counter: impl Fn(&Counts) -> &AtomicU64, bytes: usize) {
        if let Some(active) = &self.active {
            counter(&active.counts).fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// These pages may be written from now on.
    pub(super) fn changed(&mut self, bits: Range<usize>) {
        self.dirty.set(bits.clone(), true);
        self.unprotected.set(bits, true);
    }

    /// Pages that are gone: what they held can't be told any more, if it wasn't saved.
    pub(super) fn gone(&mut self, parts: &[Part]) {
        for part in parts {
            // For the next snapshot, unless this one says so.
            self.dirty.set(part.bits(), true);
            self.unprotected.set(part.bits(), false);
            for run in self.lose(part) {
                self.dirty.set(run, false);
            }
        }
    }

    /// Delivers what of a part is still to be read as gone. Returns what that is.
    pub(super) fn lose(&mut self, part: &Part) -> Vec<Range<usize>> {
        let lost = self.settle(part, || Payload::Gone);
        self.count(|counts| &counts.gone, lost.iter().map(Range::len).sum::<usize>() * page_size());
        lost
    }

    /// Delivers what of a part is still to be read, without reading it. Returns what that is.
    pub(super) fn settle(&mut self, part: &Part, payload: impl Fn() -> Payload) -> Vec<Range<usize>> {
        let bits = part.bits();
        let Some(active) = &mut self.active else { return Vec::new() };
        let mut settled = Vec::new();
        let mut from = bits.start;
        while from < bits.end {
            let Some(run) = active.pending.next_run(from, bits.end - from) else { break };
            if run.start >= bits.end {
                break;
            }
            let run = run.start..run.end.min(bits.end);
            let len = run.len() * page_size();
            active.queue.push(Item { offset: (run.start * page_size()) as u64, len, payload: payload() });
            active.counts.saved.fetch_add(len as u64, Ordering::Relaxed);
            active.doubt_until = None;
            from = run.end;
            active.pending.set(run.clone(), false);
            settled.push(run);
        }
        settled
    }
}
