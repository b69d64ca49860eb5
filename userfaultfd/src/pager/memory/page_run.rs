//! Pages that are claimed together, from the claim until each is settled.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::address_map::Segment;
use super::descriptor::{Attachment, wake};
use super::page_state::Settlement;
use super::served::ServedRegion;

/// Pages of a region, one after the other, that one thread has claimed. The first `done` of them are settled; dropping
/// it gives the others up.
#[derive(Debug)]
pub(crate) struct PageRun {
    pub(crate) region: Arc<ServedRegion>,
    first: usize,
    count: usize,
    done: usize,
    /// Where `first` was when it was claimed.
    address: usize,
    /// The page that a fault was on, and when that was read. `None` for pages that nobody asked for.
    pub(crate) demand: Option<(usize, Instant)>,
    /// Zeros belong there, whatever the source has.
    pub(crate) removed: bool,
    /// How often the kernel has said that something is there already.
    pub(crate) tries: u8,
    /// How often its source has failed.
    pub(crate) attempts: u32,
    /// Nobody needs it, so that it is left missing where its source fails.
    pub(crate) is_early: bool,
}

/// The runs of a thread whose sources it is in that are known: a source may fill other memory in turn.
const DEPTH: usize = 4;

thread_local! {
    /// The runs whose sources this thread is in: the address of the region, and the pages. There is none at 0.
    static IN_SOURCE: [Cell<(usize, usize, usize)>; DEPTH] =
        const { [const { Cell::new((0, 0, 0)) }; DEPTH] };
}

/// A run whose source this thread is in, until this is dropped.
pub(crate) struct InSource(Option<usize>);

impl Drop for InSource {
    fn drop(&mut self) {
        if let Some(at) = self.0 {
            IN_SOURCE.with(|runs| runs[at].set((0, 0, 0)));
        }
    }
}

/// Returns whether this thread has claimed a page, and is in its source: nobody can wait here for its content.
pub(crate) fn is_in_source(region: &Arc<ServedRegion>, page: usize) -> bool {
    let address = Arc::as_ptr(region).addr();
    let is_it = |(region, first, end)| region == address && (first..end).contains(&page);
    IN_SOURCE.with(|runs| runs.iter().any(|run| is_it(run.get())))
}

impl PageRun {
    /// Notes that this thread is in the source of the run.
    pub(crate) fn enter_source(&self) -> InSource {
        let pages = self.pages();
        let run = (Arc::as_ptr(&self.region).addr(), pages.start, pages.end);
        InSource(IN_SOURCE.with(|runs| {
            let free = runs.iter().position(|run| run.get().0 == 0)?;
            runs[free].set(run);
            Some(free)
        }))
    }

    /// Pages of a segment that were claimed.
    pub(crate) fn new(segment: &Segment, pages: Range<usize>, removed: bool) -> Self {
        let address = segment.address_of(pages.start).expect("the pages are in the segment");
        let region = Arc::clone(&segment.region);
        let (first, count) = (pages.start, pages.len());
        Self {
            region,
            first,
            count,
            done: 0,
            address,
            demand: None,
            removed,
            tries: 0,
            attempts: 0,
            is_early: false,
        }
    }

    /// Takes pages that no fault has asked for: the first missing ones in a range that follow each other and are read
    /// together, at most `most`. Returns where to go on looking, too.
    pub(crate) fn claim(segment: &Segment, pages: Range<usize>, most: usize) -> (Option<Self>, usize) {
        let region = &segment.region;
        for page in pages.clone() {
            let Some(removed) = region.pages.claim_missing(page) else { continue };
            let end = pages.end.min(page.saturating_add(most)).min(region.together(page).end);
            let claimed = region.pages.claim_around(page, page..end, removed);
            let next = claimed.end;
            return (Some(Self::new(segment, claimed, removed)), next);
        }
        (None, pages.end)
    }

    /// The same, ahead of need.
    pub(crate) fn early(mut self) -> Self {
        self.is_early = true;
        self
    }

    /// Those that aren't settled.
    pub(crate) fn pages(&self) -> Range<usize> {
        self.first + self.done..self.first + self.count
    }

    /// Likewise, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.pages().len() << self.region.page_shift
    }

    /// How many bytes are settled.
    pub(crate) fn done(&self) -> usize {
        self.done << self.region.page_shift
    }

    /// The address of the first that isn't settled.
    pub(crate) fn address(&self) -> usize {
        self.address + self.done()
    }

    /// The addresses of those that aren't settled.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.address()..self.address() + self.len()
    }

    /// The page that a fault was on, if it isn't settled.
    pub(crate) fn demanded(&self) -> Option<usize> {
        self.demand.map(|(page, _)| page).filter(|page| self.pages().contains(page))
    }

    /// Settles so many more. Whether a fault joined one of them.
    #[must_use]
    pub(crate) fn settle(&mut self, pages: usize, end: Settlement) -> bool {
        let settled = self.pages().start..self.pages().start + pages;
        self.done += pages;
        settled.fold(false, |joined, page| self.region.pages.end(page, end) | joined)
    }

    /// Whether all of it is still where it was when it was claimed.
    pub(crate) fn is_there(&self, serving: &Attachment) -> bool {
        let pages = self.pages();
        serving.layout.find(self.address()).is_some_and(|segment| {
            Arc::ptr_eq(&segment.region, &self.region)
                && segment.page_at(self.address()) == pages.start
                && pages.end <= segment.pages().end
        })
    }

    /// Whether a page was removed since, so that it isn't the source's content that belongs there.
    pub(crate) fn is_outdated(&self) -> bool {
        !self.removed && self.pages().any(|page| self.region.pages.is_removed(page))
    }

    /// Forgets those that are settled.
    pub(crate) fn rest(mut self) -> Self {
        self.address = self.address();
        (self.first, self.count, self.done) = (self.pages().start, self.pages().len(), 0);
        self
    }

    /// It can be neither filled nor poisoned, but is tried on.
    pub(crate) fn mark_stuck(&self) {
        self.pages().for_each(|page| self.region.pages.mark_stuck(page));
    }

    /// Gives up all that isn't settled, and wakes everybody who waits for it.
    pub(crate) fn give_up(self, serving: Option<&Attachment>) {
        let (region, pages, addresses) = (Arc::clone(&self.region), self.pages(), self.addresses());
        drop(self);
        let Some(serving) = serving.filter(|_| !pages.is_empty()) else { return };
        wake(&serving.uffd, addresses.clone());
        // Where it was moved since, others may have come, who rely on this load.
        for segment in serving.layout.segments().iter().filter(|s| Arc::ptr_eq(&s.region, &region)) {
            let now = segment.addresses_of(&pages);
            if !now.is_empty() && now != addresses {
                wake(&serving.uffd, now);
            }
        }
    }

    /// Gives up all but one page.
    pub(crate) fn narrow(mut self, page: usize, serving: Option<&Attachment>) -> Self {
        let pages = self.pages();
        debug_assert!(pages.contains(&page), "page {page} of {pages:?}");
        let part = |pages: Range<usize>| Self {
            region: Arc::clone(&self.region),
            first: pages.start,
            count: pages.len(),
            done: 0,
            address: self.address + ((pages.start - self.first) << self.region.page_shift),
            demand: self.demand,
            removed: self.removed,
            tries: self.tries,
            attempts: self.attempts,
            is_early: self.is_early,
        };
        let (one, others) = (part(page..page + 1), [part(pages.start..page), part(page + 1..pages.end)]);
        self.count = self.done; // the parts have them now
        others.into_iter().for_each(|other| other.give_up(serving));
        one
    }
}

impl Drop for PageRun {
    fn drop(&mut self) {
        for page in self.pages() {
            let _joined = self.region.pages.end(page, Settlement::Released);
        }
    }
}
