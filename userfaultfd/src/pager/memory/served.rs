//! A region while it is served: its constant properties, and the states of its pages.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::fault_around::{FaultAround, Streams, Window};
use super::fault_log::Log;
use super::page_cache::Cache;
use super::page_state::Pages;
use crate::holder::Held;
use crate::lease::Lease;
use crate::pager::PageSource;
use crate::pager::evict::residence::Residence;
use crate::pager::stats::Tally;

/// Pages that lay elsewhere when they were first served, so that their place doesn't give the offset of their content.
#[derive(Clone, Debug)]
pub(crate) struct Moved {
    pub(super) pages: Range<usize>,
    /// The offset of the first page's content in the source, in bytes.
    pub(super) offset: u64,
}

/// A served region: its constant properties, and the states of its pages.
pub(crate) struct ServedRegion {
    pub(crate) id: u64,
    pub(crate) source: Arc<dyn PageSource>,
    pub(super) source_len: Option<u64>,
    /// Whether loads of the source are started, and answered later.
    pub(crate) is_async: bool,
    pub(crate) offset: u64,
    /// Ordered. Mostly empty.
    pub(super) moved: Box<[Moved]>,
    pub(crate) page_shift: u32,
    pub(crate) around: FaultAround,
    pub(super) streams: Streams,
    pub(crate) write_protected: bool,
    /// Where its pages are, if a budget limits how many are in memory.
    pub(crate) residence: Option<Arc<Residence>>,
    /// Taken while a tracker is active.
    pub(crate) lease: Arc<Lease>,
    /// For memory of this process: the entry by which errors of other users of the memory name this one.
    pub(crate) held: OnceLock<Held>,
    pub(crate) cache: Option<Cache>,
    pub(crate) shared: bool,
    /// Whether removed pages show what the source has.
    pub(crate) reloads: bool,
    /// Whether zero pages can be mapped.
    pub(crate) zeropage: bool,
    /// Whether pages can be poisoned: since Linux 6.6.
    pub(crate) poison: bool,
    pub(crate) pages: Pages,
    /// The region's end, if memory of the same mapping follows that was registered before: that memory is no growth.
    pub(crate) followed: Option<usize>,
    /// Counters of this region, if it was handed over.
    pub(crate) tally: Option<Arc<Tally>>,
    /// Whether it belongs to a child of a fork.
    pub(crate) is_childs: bool,
    /// Whether its missing pages must be poisoned, or filled at once.
    pub(super) ending: AtomicBool,
    /// The log of pages that faulted, once a recorder has asked for it.
    pub(super) log: OnceLock<Log>,
}

impl ServedRegion {
    /// Whether pages are filled protected, so that a fill doesn't count as a write. Then missing pages may have a marker of
    /// protection, which stops zero pages and poison.
    pub(crate) fn fills_protected(&self) -> bool {
        self.write_protected || self.lease.is_taken()
    }

    /// How many pages may be filled at once.
    pub(crate) fn max_run(&self) -> usize {
        self.residence.as_ref().map_or(usize::MAX, |residence| residence.max_run())
    }

    /// How many pages may be filled ahead of one fault, in several runs.
    pub(crate) fn max_ahead(&self) -> usize {
        self.residence.as_ref().map_or(usize::MAX, |residence| residence.max_ahead())
    }

    /// Whether missing pages are being poisoned, or filled at once: no thread waits for a source any more.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    pub(crate) fn set_ending(&self, ending: bool) {
        self.ending.store(ending, Ordering::Relaxed);
    }

    /// Counts for this region, if it has counters of its own.
    pub(crate) fn count(&self, count: impl FnOnce(&Tally)) {
        if let Some(tally) = &self.tally {
            count(tally);
        }
    }

    /// Whether the kernel can map zero pages: in all memory but hugetlb memory.
    pub(crate) fn zeropage_possible(&self) -> bool {
        self.page_size() == crate::page_size()
    }

    /// Notes that pages were removed, by what event so ever.
    ///
    /// On shared memory MADV_DONTNEED drops the mapping, not the page, and its event is the same as that of MADV_REMOVE. A
    /// present page stays, or counts as one that the file may have.
    pub(crate) fn remove(&self, pages: Range<usize>) {
        if self.residence.is_some() && self.shared {
            self.pages.remove_limited(pages);
        } else if self.reloads && self.shared {
            self.pages.remove_from_file(pages);
        } else {
            self.pages.remove(pages, self.shared);
        }
    }

    /// Notes what it doesn't know for certain to be there, before all that is missing is filled or listed.
    ///
    /// An event is read before the kernel removes what it tells of. What is loaded again in between is removed, too.
    pub(crate) fn doubt(&self, pages: Range<usize>) {
        if self.reloads {
            self.pages.remove_doubted(pages);
        }
    }

    /// Whether a missing page has content, which must be loaded: it isn't one that shows zeros.
    pub(crate) fn is_wanted(&self, page: usize) -> bool {
        self.pages.is_missing(page) && (self.reloads || !self.pages.is_removed(page))
    }

    /// Whether the content of some pages isn't where their place in the region says.
    pub(crate) fn has_moved(&self) -> bool {
        !self.moved.is_empty()
    }

    pub(crate) fn page_size(&self) -> usize {
        1 << self.page_shift
    }

    /// The offset of a page's content in the source, in bytes.
    pub(crate) fn offset_of(&self, page: usize) -> u64 {
        let at = self.moved.partition_point(|part| part.pages.end <= page);
        match self.moved.get(at).filter(|part| part.pages.start <= page) {
            Some(part) => part.offset + (((page - part.pages.start) as u64) << self.page_shift),
            None => self.offset + ((page as u64) << self.page_shift),
        }
    }

    /// The pages around one whose content is contiguous in the source, too: those that can be read together.
    pub(crate) fn together(&self, page: usize) -> Range<usize> {
        let at = self.moved.partition_point(|part| part.pages.end <= page);
        match self.moved.get(at) {
            Some(part) if part.pages.start <= page => part.pages.clone(),
            next => {
                let start = at.checked_sub(1).map_or(0, |before| self.moved[before].pages.end);
                start..next.map_or(self.pages.count(), |next| next.pages.start)
            }
        }
    }

    /// The number of `len` bytes at `offset` that the source has.
    pub(crate) fn within_source(&self, offset: u64, len: usize) -> usize {
        let rest = self.source_len.map_or(u64::MAX, |end| end.saturating_sub(offset));
        usize::try_from(rest).unwrap_or(usize::MAX).min(len)
    }

    /// Notes a fault on a page that it doesn't fill itself, if faults are recorded.
    pub(crate) fn note(&self, page: usize) {
        if let Some(log) = self.log.get() {
            let _exact = log.note(page);
        }
    }

    /// The pages of the region to fill for a fault on one, and the sequence of accesses that the fault continues.
    pub(crate) fn fault_around(&self, page: usize) -> (Range<usize>, Option<Window>) {
        if self.log.get().is_some_and(|log| log.note(page)) {
            return (page..page + 1, None);
        }
        let (pages, window) = match self.around {
            FaultAround::Page => (page..page + 1, None),
            FaultAround::Block(block) => {
                let block = block >> self.page_shift;
                let first = page - page % block;
                (first..first + block, None)
            }
            FaultAround::Adaptive { most } => {
                let window = self.streams.window(page, most >> self.page_shift);
                (window.pages(page), Some(window))
            }
        };
        let together = self.together(page);
        (pages.start.max(together.start)..pages.end.min(together.end), window)
    }

    /// The log of pages that faulted.
    pub(crate) fn log(&self) -> io::Result<&Log> {
        if self.log.get().is_none() {
            // If another thread is faster, its log is used.
            let _first = self.log.set(Log::new(self.pages.count())?);
        }
        self.log.get().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// The pages of the log.
    pub(crate) fn noted(&self) -> Vec<usize> {
        self.log.get().map_or_else(Vec::new, Log::pages)
    }

    pub(crate) fn stop_noting(&self) {
        if let Some(log) = self.log.get() {
            log.stop();
        }
    }

    /// Notes the pages of a sequence that were claimed.
    pub(crate) fn advance_stream(&self, window: Window, pages: &Range<usize>) {
        self.streams.filled(window, pages);
    }

    /// The moved pages among some, for a region that begins with the first of them.
    fn moved_from(&self, first: usize, count: usize) -> Box<[Moved]> {
        let parts = self.moved.iter().filter_map(|part| {
            let (start, end) = (part.pages.start.max(first), part.pages.end.min(first + count));
            let pages = start.checked_sub(first)?..end.checked_sub(first)?;
            (start < end).then(|| Moved { pages, offset: self.offset_of(start) })
        });
        parts.collect()
    }

    /// A part of the region, from a page on, with states of its own: for the child of a fork.
    pub(crate) fn part(&self, id: u64, first: usize, pages: Pages) -> Self {
        Self {
            id,
            source: Arc::clone(&self.source),
            source_len: self.source_len,
            is_async: self.is_async,
            offset: self.offset + ((first as u64) << self.page_shift),
            moved: self.moved_from(first, pages.count()),
            page_shift: self.page_shift,
            around: self.around,
            streams: Streams::new(),
            write_protected: self.write_protected,
            residence: None,
            lease: Arc::default(),
            held: OnceLock::new(),
            cache: None,
            shared: self.shared,
            reloads: self.reloads,
            zeropage: self.zeropage,
            poison: self.poison,
            pages,
            followed: self.followed,
            tally: self.tally.clone(),
            is_childs: true,
            ending: AtomicBool::new(false),
            log: OnceLock::new(),
        }
    }
}

impl fmt::Debug for ServedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedRegion")
            .field("id", &self.id)
            .field("page_size", &self.page_size())
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
