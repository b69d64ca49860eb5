//! The search for pages that were accessed, and their reset.

use std::collections::VecDeque;
use std::fmt;
use std::iter::FusedIterator;
use std::ops::Range;

use crate::pagemap::{Categories, Region, Scan};
use crate::proc_maps::Mapping;
use crate::sync_point::{Moment, Point, reach};
use crate::watch::ranges::Tracked;
use crate::watch::{CHUNK_PAGES, Watch, Words, runs};
use crate::{Errno, Error, Result, page_size};

/// Ranges that one scan reports at most: 12 KiB of them.
const SCAN_ROOM: usize = 512;

/// Iterator over the ranges that were written, or accessed: addresses in bytes, ordered, whole pages, adjacent ranges
/// merged.
///
/// Each call of `next` searches some thousand pages further at most. An error ends the iterator, after what was found
/// before it. Returned by the methods of [`DirtyTracker`](crate::DirtyTracker) and
/// [`AccessTracker`](crate::AccessTracker).
#[must_use = "iterators are lazy: nothing is looked at or reset before it is asked for"]
pub struct Ranges<'a> {
    watch: &'a Watch,
    walk: RangeWalk,
    found: Vec<Range<usize>>,
    /// Number of ranges of `found` that were returned.
    taken: usize,
    /// The last one found, to which the next may belong.
    last: Option<Range<usize>>,
    error: Option<Error>,
}

impl<'a> Ranges<'a> {
    /// Searches `parts`, and with `reset` resets what it finds.
    pub(crate) fn new(watch: &'a Watch, parts: Vec<Tracked>, eye: Detector, reset: bool) -> Self {
        let mut walk = RangeWalk { parts: parts.into(), eye, reset };
        let error = watch.check().err();
        if error.is_some() {
            walk.parts.clear();
        }
        Self { watch, walk, found: Vec::new(), taken: 0, last: None, error }
    }
}

impl Iterator for Ranges<'_> {
    type Item = Result<Range<usize>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            while let Some(range) = self.found.get(self.taken).cloned() {
                self.taken += 1;
                match &mut self.last {
                    Some(last) if last.end == range.start => last.end = range.end,
                    last => {
                        if let Some(complete) = last.replace(range) {
                            return Some(Ok(complete));
                        }
                    }
                }
            }
            if self.error.is_some() || self.walk.is_done() {
                let last = self.last.take().map(Ok);
                return last.or_else(|| self.error.take().map(Err));
            }
            self.found.clear();
            self.taken = 0;
            // The iterator may be in a forked child.
            let owned = self.watch.check_owner();
            if let Err(error) = owned.and_then(|()| self.walk.step(self.watch, &mut self.found)) {
                self.walk.end();
                self.error = Some(error);
            } else if self.walk.is_done() {
                // The thread that resolves faults may have failed meanwhile.
                self.error = self.watch.check().err();
            }
        }
    }
}

impl FusedIterator for Ranges<'_> {}

impl Drop for Ranges<'_> {
    /// Marks pages that were reset and not returned as written, so that the next look reports them.
    fn drop(&mut self) {
        if self.walk.reset {
            let _work = self.watch.begin_work();
            self.last.iter().chain(&self.found[self.taken..]).for_each(|range| self.watch.give_back(range));
        }
    }
}

impl fmt::Debug for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ranges").field("remaining", &self.walk.parts).finish_non_exhaustive()
    }
}

/// How accessed pages are found.
#[derive(Debug)]
pub(crate) enum Detector {
    /// By a scan for a category.
    Scan { category: Categories, regions: Box<[Region]>, current: Option<(Scan, Tracked)> },
    /// By the words of the pagemap, and what faults have noted.
    Words { words: Words, mappings: VecDeque<(Mapping, Tracked)> },
}

impl Detector {
    pub(crate) fn scan(category: Categories) -> Self {
        Detector::Scan { category, regions: vec![Region::default(); SCAN_ROOM].into(), current: None }
    }

    pub(crate) fn words() -> Self {
        Detector::Words { words: Words::default(), mappings: VecDeque::new() }
    }
}

/// What must still be searched, and how.
#[derive(Debug)]
struct RangeWalk {
    parts: VecDeque<Tracked>,
    eye: Detector,
    reset: bool,
}

impl RangeWalk {
    fn is_done(&self) -> bool {
        self.parts.is_empty() && self.is_between_parts()
    }

    fn is_between_parts(&self) -> bool {
        match &self.eye {
            Detector::Scan { current, .. } => current.is_none(),
            Detector::Words { mappings, .. } => mappings.is_empty(),
        }
    }

    fn end(&mut self) {
        self.parts.clear();
        match &mut self.eye {
            Detector::Scan { current, .. } => *current = None,
            Detector::Words { mappings, .. } => mappings.clear(),
        }
    }

    /// What the next step looks at, or more.
    fn next_part(&self) -> Option<Range<usize>> {
        let current = match &self.eye {
            Detector::Scan { current, .. } => current.as_ref().map(|(scan, _)| scan.remaining()),
            Detector::Words { mappings, .. } => mappings.front().map(|(mapping, _)| mapping.range.clone()),
        };
        current.or_else(|| self.parts.front().map(|part| part.range.clone()))
    }

    /// Searches the next chunk. What it finds and has reset goes to `found`, also if it fails afterwards.
    fn step(&mut self, watch: &Watch, found: &mut Vec<Range<usize>>) -> Result<()> {
        let _work = watch.begin_work();
        if let Some(part) = self.next_part() {
            watch.check_part(&part)?;
            reach(Point::Watch(Moment::TrackerStep), part.start);
        }
        if self.is_between_parts() && self.parts.front().is_some_and(|part| part.always) {
            if let Some(part) = self.parts.pop_front() {
                found.extend(watch.process.mappings(&part.range)?.into_iter().map(|mapping| mapping.range));
                return Ok(());
            }
        }
        match &mut self.eye {
            Detector::Scan { category, regions, current } => {
                let (scan, part) = match current {
                    Some(current) => current,
                    None => {
                        let Some(part) = self.parts.pop_front() else { return Ok(()) };
                        let scan = scan_of(*category, &part, self.reset);
                        current.insert((scan, part))
                    }
                };
                match scan.next_regions(&watch.pagemap, regions) {
                    Ok(Some(regions)) if self.reset && !part.armed => {
                        // The next look reports what is written there from now on.
                        let armed = watch.arm_blocks(&part.range, regions, found)?;
                        part.range.start = armed.max(scan.remaining().start);
                        *current = (part.range.start < part.range.end)
                            .then(|| (scan_of(*category, part, self.reset), part.clone()));
                    }
                    Ok(Some(regions)) => found.extend(regions.iter().map(Region::range)),
                    Ok(None) => *current = None,
                    Err(error) => {
                        // Pages that were reset before it failed have not been reported.
                        if self.reset && part.armed {
                            watch.give_back(&scan.remaining());
                        }
                        return Err(match error {
                            Error::SystemError(Errno::EPERM) => {
                                Error::NotTracked { start: part.range.start, end: part.range.end }
                            }
                            error => error,
                        });
                    }
                }
                Ok(())
            }
            Detector::Words { words, mappings } => {
                if mappings.is_empty() {
                    let Some(part) = self.parts.pop_front() else { return Ok(()) };
                    let of_part = watch.process.mappings(&part.range)?;
                    mappings.extend(of_part.into_iter().map(|mapping| (mapping, part.clone())));
                }
                let Some((mapping, tracked)) = mappings.front_mut() else { return Ok(()) };
                let (start, page) = (mapping.range.start, tracked.page);
                let pages = (CHUNK_PAGES * page_size() / page).max(1);
                let chunk = start..mapping.range.end.min(start.saturating_add(pages * page));
                words.read(&watch.pagemap, &chunk)?;
                let words = &*words;
                let look = ChunkView { watch, mapping, tracked, words };
                for run in look.accessed(&chunk) {
                    if self.reset {
                        look.reset(&run, &chunk).inspect_err(|_| watch.give_back(&run))?;
                    }
                    found.push(run);
                }
                mapping.range.start = chunk.end;
                if mapping.range.is_empty() {
                    mappings.pop_front();
                }
                Ok(())
            }
        }
    }
}

/// Scans a part for pages of a category.
fn scan_of(category: Categories, part: &Tracked, reset: bool) -> Scan {
    let mut scan = Scan::new(part.range.clone());
    // Nothing but this category, picked and reported: the kernel has a fast path for that.
    scan.all_of(category);
    if category == Categories::WRITTEN {
        scan.write_protect(reset && part.armed).require_async(true);
    }
    if !part.armed {
        scan.any_of(Categories::PRESENT | Categories::SWAPPED).none_of(Categories::PFNZERO);
    }
    scan
}

/// Reads the words of some pages of a mapping.
struct ChunkView<'a> {
    watch: &'a Watch,
    mapping: &'a Mapping,
    tracked: &'a Tracked,
    words: &'a Words,
}

impl ChunkView<'_> {
    fn accessed(&self, chunk: &Range<usize>) -> Vec<Range<usize>> {
        let page = self.tracked.page;
        runs(chunk, page, |index| {
            let word = self.words.get(index * (page / page_size()));
            match &self.tracked.noted {
                Some(notes) => notes.get(chunk.start + index * page) || word.is_empty(),
                // A scan doesn't report holes of hugetlb memory, either. Where a pager fills, an empty page is missing.
                None => !word.is_protected() && (self.tells_empty() || !word.is_empty()),
            }
        })
    }

    fn tells_empty(&self) -> bool {
        self.tracked.page == page_size() && self.watch.lease.is_none()
    }

    /// Resets pages that were found. A write before their protection belongs to what was found; a write after it is a
    /// fault.
    fn reset(&self, run: &Range<usize>, chunk: &Range<usize>) -> Result<()> {
        let _lock = self.tracked.noted.as_ref().map(|notes| {
            let lock = notes.lock();
            run.clone().step_by(self.tracked.page).for_each(|address| notes.unset(address));
            lock
        });
        self.watch.protect(run)?;
        if !self.watch.fills_empty() || !self.mapping.anonymous {
            return Ok(());
        }
        let first = (run.start - chunk.start) / page_size();
        let empty = runs(run, page_size(), |index| self.words.get(first + index).is_empty());
        self.watch.protect_empty(run, &empty)
    }
}
