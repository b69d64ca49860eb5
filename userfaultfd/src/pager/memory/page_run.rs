//! Pages that are claimed together, from the claim until each is settled.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::address_map::Segment;
use super::descriptor::{Attachment, wake};
use super::page_state::Settlement;
use super::served::ServedRegion;
use crate::sync_point::{Point, reach};

/// What a run is filled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A thread, or a caller, needs it.
    Access,
    /// A thread is about to write to the page that it needs.
    Write,
    /// No thread needs it yet, so that it is left missing where its source fails.
    Ahead,
}

/// A run of pages of a region that one thread has claimed. The first `done` of them are settled; dropping the run
/// releases the others.
#[derive(Debug)]
pub(crate) struct PageRun {
    pub(crate) region: Arc<ServedRegion>,
    first: usize,
    count: usize,
    done: usize,
    /// The address of `first` when it was claimed.
    address: usize,
    /// The page that faulted, and when the fault was read. `None` for pages that no fault asked for.
    pub(crate) demand: Option<(usize, Instant)>,
    /// They were removed: zeros belong there, or what the file has, whatever the source has. See
    /// [`is_reload`](Self::is_reload).
    pub(crate) removed: bool,
    /// Number of times that the kernel has reported the page as present.
    pub(crate) tries: u8,
    /// Number of failed reads of its source.
    pub(crate) attempts: u32,
    /// What it is filled for.
    pub(crate) purpose: Purpose,
    /// [`RESERVED`] and the others.
    marks: u8,
}

/// Marks of a run: a budget has room for it; the kernel couldn't copy from the source's memory; its page counted as present;
/// the memory's file doesn't have it.
const RESERVED: u8 = 1;
const UNREADABLE: u8 = 2;
const AGAIN: u8 = 4;
const NOT_IN_FILE: u8 = 8;

/// Nested reads that are noted for each thread: a source may itself fault on memory of another pager, hardly deeper.
const MAX_SOURCE_DEPTH: usize = 4;

thread_local! {
    /// The runs whose sources this thread is reading: the address of the region, and the pages. Address 0: no entry.
    static IN_SOURCE: [Cell<(usize, usize, usize)>; MAX_SOURCE_DEPTH] =
        const { [const { Cell::new((0, 0, 0)) }; MAX_SOURCE_DEPTH] };
}

/// A run whose source this thread is reading, until this is dropped.
pub(crate) struct InSource(Option<usize>);

impl Drop for InSource {
    fn drop(&mut self) {
        if let Some(at) = self.0 {
            IN_SOURCE.with(|runs| runs[at].set((0, 0, 0)));
        }
    }
}

/// Returns whether this thread has claimed a page and is reading its source: then it can't wait for the content.
pub(crate) fn is_in_source(region: &Arc<ServedRegion>, page: usize) -> bool {
    let address = Arc::as_ptr(region).addr();
    let is_it = |(region, first, end)| region == address && (first..end).contains(&page);
    IN_SOURCE.with(|runs| runs.iter().any(|run| is_it(run.get())))
}

impl PageRun {
    /// Notes that this thread is reading the source of the run.
    pub(crate) fn enter_source(&self) -> InSource {
        let pages = self.pages();
        let run = (Arc::as_ptr(&self.region).addr(), pages.start, pages.end);
        InSource(IN_SOURCE.with(|runs| {
            let free = runs.iter().position(|run| run.get().0 == 0)?;
            runs[free].set(run);
            Some(free)
        }))
    }

    /// Makes a run of claimed pages of a segment.
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
            purpose: Purpose::Access,
            marks: 0,
        }
    }

    /// Claims pages that no fault has asked for: the first missing ones in a range that are adjacent and are read together,
    /// at most `most`. Also returns where to continue the search.
    pub(crate) fn claim(segment: &Segment, pages: Range<usize>, most: usize) -> (Option<Self>, usize) {
        let region = &segment.region;
        let most = most.min(region.max_run());
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
        self.purpose = Purpose::Ahead;
        self
    }

    /// Whether the source must be read, since the kernel couldn't copy from its memory.
    pub(crate) fn is_unreadable(&self) -> bool {
        self.marks & UNREADABLE != 0
    }

    /// Notes that the kernel couldn't copy from the source's memory. Returns whether that is new.
    pub(crate) fn mark_unreadable(&mut self) -> bool {
        let is_new = !self.is_unreadable();
        self.marks |= UNREADABLE;
        is_new
    }

    /// The same, of a page that counted as present, and was removed.
    pub(crate) fn again(mut self) -> Self {
        self.marks |= AGAIN;
        self
    }

    /// Whether the memory may have its pages, perhaps with other content. What is there stays.
    pub(crate) fn may_be_there(&self) -> bool {
        self.marks & AGAIN != 0 || self.is_reload()
    }

    /// Whether its pages were removed, and show what is there, or else what the source has.
    pub(crate) fn is_reload(&self) -> bool {
        self.removed && self.region.reloads
    }

    /// Whether the file has been found not to have them.
    pub(crate) fn is_not_in_file(&self) -> bool {
        self.marks & NOT_IN_FILE != 0
    }

    /// Notes that it doesn't.
    pub(crate) fn mark_not_in_file(&mut self) {
        self.marks |= NOT_IN_FILE;
    }

    /// The pages that aren't settled.
    pub(crate) fn pages(&self) -> Range<usize> {
        self.first + self.done..self.first + self.count
    }

    /// Their length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.pages().len() << self.region.page_shift
    }

    /// The number of settled bytes.
    pub(crate) fn done(&self) -> usize {
        self.done << self.region.page_shift
    }

    /// The address of the first page that isn't settled.
    pub(crate) fn address(&self) -> usize {
        self.address + self.done()
    }

    /// The addresses of the pages that aren't settled.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.address()..self.address() + self.len()
    }

    /// The page that faulted, if it isn't settled.
    pub(crate) fn demanded(&self) -> Option<usize> {
        self.demand.map(|(page, _)| page).filter(|page| self.pages().contains(page))
    }

    /// Waits for room for it, where a budget limits its region. Not with a lock held.
    pub(crate) fn reserve(&mut self) {
        if let Some(residence) = self.region.residence.as_ref().filter(|_| self.marks & RESERVED == 0) {
            residence.reserve(self.pages(), self.demand.is_some());
            self.marks |= RESERVED;
        }
    }

    /// Whether a page is the one that a fault is about to write.
    pub(crate) fn is_written(&self, page: usize) -> bool {
        self.purpose == Purpose::Write && self.demand.is_some_and(|(demanded, _)| demanded == page)
    }

    /// Settles the next `pages` pages. Returns whether a fault joined one of them.
    #[must_use]
    pub(crate) fn settle(&mut self, pages: usize, end: Settlement) -> bool {
        self.settle_as(pages, end, self.removed)
    }

    /// The same. `is_changed`: what is there isn't what its source has.
    #[must_use]
    pub(crate) fn settle_as(&mut self, pages: usize, end: Settlement, is_changed: bool) -> bool {
        let settled = self.pages().start..self.pages().start + pages;
        self.done += pages;
        let reloads = self.region.reloads && end == Settlement::Present;
        let end = if reloads { Settlement::Reloaded } else { end };
        if let Some(residence) = &self.region.residence {
            if end == Settlement::Present {
                let is_written = |page| is_changed || self.is_written(page);
                residence.enter(settled.clone(), self.marks & RESERVED != 0, is_written);
            } else if self.marks & RESERVED != 0 {
                residence.give_back(settled.clone());
            }
        }
        settled.fold(false, |joined, page| self.region.pages.end(page, end) | joined)
    }

    /// Settles the next page, which can't be filled, and wakes its waiters.
    pub(crate) fn skip(&mut self, serving: &Attachment, end: Settlement) {
        let address = self.address();
        let _joined = self.settle(1, end);
        reach(Point::BeforeWake, address);
        wake(&serving.uffd, address..address + self.region.page_size());
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

    /// Whether a page was removed since the claim, so that the source's content no longer belongs there.
    pub(crate) fn is_outdated(&self) -> bool {
        let is_changed = !self.removed && !self.region.reloads;
        is_changed && self.pages().any(|page| self.region.pages.is_removed(page))
    }

    /// Forgets the settled pages.
    pub(crate) fn rest(mut self) -> Self {
        self.address = self.address();
        (self.first, self.count, self.done) = (self.pages().start, self.pages().len(), 0);
        self
    }

    /// Marks that the run can be neither filled nor poisoned for now, while it is retried.
    pub(crate) fn mark_stuck(&self) {
        self.pages().for_each(|page| self.region.pages.mark_stuck(page));
    }

    /// Releases all pages that aren't settled, and wakes the threads that wait for them.
    pub(crate) fn give_up(self, serving: Option<&Attachment>) {
        let (region, pages, addresses) = (Arc::clone(&self.region), self.pages(), self.addresses());
        drop(self);
        let Some(serving) = serving.filter(|_| !pages.is_empty()) else { return };
        wake(&serving.uffd, addresses.clone());
        // At an address to which it was moved since, other threads may have joined this load.
        for segment in serving.layout.segments().iter().filter(|s| Arc::ptr_eq(&s.region, &region)) {
            let now = segment.addresses_of(&pages);
            if !now.is_empty() && now != addresses {
                wake(&serving.uffd, now);
            }
        }
    }

    /// Releases all pages but one.
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
            purpose: self.purpose,
            marks: self.marks,
        };
        let (one, others) = (part(page..page + 1), [part(pages.start..page), part(page + 1..pages.end)]);
        self.count = self.done; // the parts have them now
        others.into_iter().for_each(|other| other.give_up(serving));
        one
    }
}

impl Drop for PageRun {
    fn drop(&mut self) {
        if let Some(residence) = self.region.residence.as_ref().filter(|_| self.marks & RESERVED != 0) {
            residence.give_back(self.pages());
        }
        for page in self.pages() {
            let _joined = self.region.pages.end(page, Settlement::Released);
        }
    }
}
