//! How written pages reach their store while they stay in memory.
//!
//! ```text
//!              claimed, protected           claim ended                       frames locked
//!   written ────────────────────▶ copied ───────────────▶ hook, store's write ─────────────▶ stored
//!      ▲                             │                                             │
//!      └── a fault of a write ◀──────┘                     written again ◀─────────┘ it failed
//! ```
//!
//! No claim is held while the program's code runs, so that no thread waits for it that touches the page. From the copy to
//! the end of its write the page is dirty, though nothing was written to it since: it can't be dropped, as the store may
//! not have it. The thread that has the [turn](super::store::Turn) of a store is the only one that copies and writes.

#![expect(unsafe_code, reason = "bytes of pages that nobody else has")]

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use std::{slice, thread};

use super::flush_error::{FlushError, FlushStep};
use super::frames::{Member, Step};
use super::page_set::{PageSet, ranges_of};
use super::pins::Pinning;
use super::residence::{Place, Residence};
use super::store::{StoreBacking, Turn, WRITE_PAGES};
use crate::Errno;
use crate::pager::memory::descriptor::addr_to_ptr;
use crate::pager::memory::page_state::Settlement;
use crate::sync_point::{Departure, Point, reach};

/// The delay until a page is tried again that another thread has claimed: some system calls, or a read of the store.
const BUSY_DELAY: Duration = Duration::from_micros(50);

/// Pages of a part that is written while the next one is brought to the staging area: 8 MiB of 4 KiB.
const EVICT_PAGES: usize = 2048;

/// What became of pages that were to be written.
#[derive(Default)]
pub(super) struct Written {
    /// Those that couldn't be, in order.
    pub(super) failed: Vec<Range<usize>>,
    /// Where the first of them failed, and why.
    pub(super) error: Option<(FlushStep, io::Error)>,
    /// Those that another thread had claimed, which weren't tried.
    busy: Vec<usize>,
}

impl Written {
    /// The result of a flush, with its store's turn.
    fn into_result(self, member: &Member, turn: &Turn, syncs: bool) -> Result<(), FlushError> {
        let Self { failed, mut error, .. } = self;
        let bytes = |pages: &Range<usize>| {
            let shift = member.region.page_shift;
            pages.start << shift..pages.end << shift
        };
        let lost: Vec<_> = turn.lost.ranges().map(|pages| bytes(&pages)).collect();
        if error.is_none() && syncs && !lost.is_empty() {
            let text = "a sync failed before, after these pages had left memory";
            error = Some((FlushStep::Sync, io::Error::other(text)));
        }
        let Some((step, error)) = error else { return Ok(()) };
        let mut all = PageSet::default();
        failed.into_iter().for_each(|pages| all.insert(pages));
        let dirty = all.ranges().map(|pages| bytes(&pages)).collect();
        Err(FlushError { step, error, dirty, lost })
    }
}

/// Whether a page was claimed to be copied.
#[derive(Clone, Copy)]
enum ToCopy {
    Present,
    Staged,
    /// There is nothing to write.
    Clean,
    /// Another thread has claimed it.
    Busy,
}

fn claim(member: &Member, page: usize) -> ToCopy {
    let (residence, states) = (member.residence(), &member.region.pages);
    if !residence.place(page).is_written() {
        return ToCopy::Clean;
    }
    let found = if states.try_claim_present(page) {
        ToCopy::Present
    } else if states.claim_missing(page).is_some() {
        ToCopy::Staged
    } else {
        return ToCopy::Busy;
    };
    let place = residence.place(page);
    if place.is_written() && place.is_staged() == matches!(found, ToCopy::Staged) {
        return found;
    }
    end(member, page, &found);
    ToCopy::Clean
}

/// Ends a claim, and wakes the faults that joined it.
fn end(member: &Member, page: usize, found: &ToCopy) {
    let settled = match found {
        ToCopy::Present => Settlement::Present,
        _ => Settlement::Released,
    };
    if member.region.pages.end(page, settled) {
        member.wake(page);
    }
}

/// Writes those of some pages to the store that are dirty, in order. Waits for no other thread: one that has claimed a page
/// may wait for room, which a thread makes that waits for this turn.
pub(super) fn write(
    member: &Member,
    store: &StoreBacking,
    turn: &mut Turn,
    pages: &[usize],
    written: &mut Written,
) {
    for run in ranges_of(pages) {
        let mut next = run.start;
        while next < run.end {
            let part = next..run.end.min(next + WRITE_PAGES);
            next = write_some(member, store, turn, part, written);
        }
    }
}

/// Writes the first neighbours among some pages that must be written. Returns where to go on.
fn write_some(
    member: &Member,
    store: &StoreBacking,
    turn: &mut Turn,
    part: Range<usize>,
    written: &mut Written,
) -> usize {
    let (mut claimed, mut next) = (Vec::with_capacity(part.len()), part.start);
    for page in part.clone() {
        match claim(member, page) {
            found @ (ToCopy::Present | ToCopy::Staged) => claimed.push((page, found)),
            ToCopy::Busy => written.busy.push(page),
            ToCopy::Clean => {}
        }
        let is_claimed = claimed.last().is_some_and(|(last, _)| *last == page);
        next = page + 1;
        if !claimed.is_empty() && !is_claimed {
            break;
        }
    }
    let (Some((first, _)), Some((last, _))) = (claimed.first(), claimed.last()) else { return next };
    let pages = *first..last + 1;
    let address = member.start + pages.start * crate::page_size();
    let mut pinning = Pinning::begin(member.residence(), &pages);
    reach(Point::Evict(Departure::BeforeClean), address);
    let copied = copy(member, store, turn, &claimed, &pinning);
    pinning.end(member.residence());
    if copied.is_ok() {
        for page in pages.clone() {
            // A device may write to a pinned page at any time, and no fault tells of it: it stays dirty.
            let change = if pinning.has(page) { Place::writing_on } else { Place::writing };
            member.residence().change(page, change);
        }
    }
    claimed.iter().for_each(|(page, found)| end(member, *page, found));
    if let Err(error) = copied {
        written.error.get_or_insert((FlushStep::Memory, error));
        written.failed.push(pages);
        return next;
    }
    if let Some(number) = member.residence().member() {
        member.residence().pool().lock().write_next(number, pages.clone());
    }
    reach(Point::Evict(Departure::BeforeStore), address);
    // One failure is enough to know that waiting doesn't help.
    let retries = written.error.is_none();
    let stored = write_copied(member, store, turn, &pages, retries);
    reach(Point::Evict(Departure::AfterStore), address);
    note(member, &pages, stored.is_ok());
    match stored {
        Ok(bytes) => {
            turn.lost.remove(&pages);
            turn.unsynced.insert(pages.clone());
            let residence = member.residence();
            residence.count(|counters| &counters.write_backs, pages.len());
            residence.count(|counters| &counters.bytes_written, bytes);
        }
        Err(failure) => {
            written.error.get_or_insert(failure);
            member.residence().count(|counters| &counters.unwritten, pages.len());
            written.failed.push(pages);
        }
    }
    next
}

/// Copies claimed neighbouring pages, which nothing writes from then on without a fault that waits for the claim, but for
/// those that are pinned: a system call that writes to such a page must not meet its protection.
fn copy(
    member: &Member,
    store: &StoreBacking,
    turn: &mut Turn,
    claimed: &[(usize, ToCopy)],
    pinning: &Pinning,
) -> io::Result<()> {
    let (page_size, mut at) = (crate::page_size(), 0);
    while let Some((first, found)) = claimed.get(at) {
        let kind = |(page, found): &(usize, ToCopy)| (matches!(found, ToCopy::Staged), pinning.has(*page));
        let (is_staged, is_pinned) = kind(&(*first, *found));
        let alike = |next: &&(usize, ToCopy)| kind(next) == (is_staged, is_pinned);
        let count = claimed[at..].iter().take_while(alike).count();
        let bytes = &mut turn.buffer[at * page_size..(at + count) * page_size];
        if is_staged {
            let staged = member.residence().staged(*first);
            // SAFETY: the pages rest there, one after the other, as long as they are claimed.
            bytes.copy_from_slice(unsafe { slice::from_raw_parts(staged, bytes.len()) });
        } else {
            let address = member.start + first * page_size;
            if !is_pinned {
                let protected = member.uffd().write_protect(addr_to_ptr(address), bytes.len());
                protected.map_err(|error| io::Error::from(error.errno().unwrap_or(Errno::EINVAL)))?;
            }
            store.memory.read_exact_at(bytes, address as u64)?;
        }
        at += count;
    }
    Ok(())
}

/// Calls hook and store, again as the pager's policy says.
fn write_copied(
    member: &Member,
    store: &StoreBacking,
    turn: &Turn,
    pages: &Range<usize>,
    retries: bool,
) -> Result<usize, (FlushStep, io::Error)> {
    let mut attempts = 0;
    loop {
        let hook = store.before_write(pages).map_err(|error| (FlushStep::BeforeWrite, error));
        let write = || store.write(pages, &turn.buffer).map_err(|error| (FlushStep::Write, error));
        let done = hook.and_then(|()| write());
        attempts += 1;
        match member.pager.retry.delay_after(attempts).filter(|_| retries && done.is_err()) {
            Some(delay) => thread::sleep(delay),
            None => return done,
        }
    }
}

/// Notes what became of the pages that were copied.
fn note(member: &Member, pages: &Range<usize>, is_stored: bool) {
    let (residence, pool) = (member.residence(), member.residence().pool());
    let mut frames = pool.lock();
    for page in pages.clone() {
        // What is written again is so before it isn't being written any more: it is dirty in between.
        residence.change(page, |place| if is_stored { place.stored() } else { place.written().stored() });
    }
    if let Some(number) = residence.member() {
        frames.written(number, is_stored);
    }
    if is_stored {
        frames.set_stuck(false);
    }
    pool.work.notify_one();
}

/// Pages that are written, in order.
pub(super) fn dirty_pages(residence: &Residence, pages: &Range<usize>) -> Vec<usize> {
    let (pool, is_dirty) = (residence.pool(), |page| residence.place(page).is_written());
    let Some(member) = residence.member() else { return Vec::new() };
    let mut dirty = Vec::new();
    let frames = pool.lock().frame_count();
    if pages.len() <= frames {
        dirty.extend(pages.clone().filter(|page| is_dirty(*page)));
        return dirty;
    }
    // Fewer than there are pages. One that is dirty stays in its frame; what becomes so meanwhile may be left out.
    let (mut next, mut some) = (Some(0), Vec::with_capacity(WRITE_PAGES));
    while let Some(frame) = next {
        next = pool.lock().pages_of(member, frame, &mut some, |page| pages.contains(&page) && is_dirty(page));
        dirty.append(&mut some);
    }
    dirty.sort_unstable();
    dirty
}

/// Writes the dirty ones of some pages to the store, and waits for threads that have claimed some. Returns the turn.
fn write_dirty<'a>(
    member: &Member,
    store: &'a StoreBacking,
    pages: &Range<usize>,
    written: &mut Written,
) -> MutexGuard<'a, Turn> {
    let residence = member.residence();
    // Before dirty pages are looked up: what another thread is writing may become dirty again.
    let mut turn = store.turn();
    let number = residence.member();
    if let Some(number) = number {
        residence.pool().lock().begin_write(number);
    }
    let mut rest = dirty_pages(residence, pages);
    loop {
        write(member, store, &mut turn, &rest, written);
        if written.busy.is_empty() {
            break;
        }
        rest = std::mem::take(&mut written.busy);
        drop(turn);
        thread::sleep(BUSY_DELAY);
        turn = store.turn();
    }
    if let Some(number) = number {
        residence.pool().lock().end_write(number);
    }
    turn
}

/// Writes pages to the store, and has it make them durable if `syncs`.
pub(crate) fn flush(residence: &Residence, pages: &Range<usize>, syncs: bool) -> Result<(), FlushError> {
    let Some(store) = residence.store() else { return Ok(()) };
    let Some(member) = residence.as_member() else { return Ok(()) };
    let mut written = Written::default();
    let mut turn = write_dirty(&member, store, pages, &mut written);
    if syncs {
        if let Err(failure) = sync(&member, store, &mut turn, &mut written.failed) {
            written.error.get_or_insert((FlushStep::Sync, failure));
        }
    }
    written.into_result(&member, &turn, syncs)
}

/// Has the store make durable what was written. If it doesn't, all of that which is in memory still is dirty again.
pub(super) fn sync(
    member: &Arc<Member>,
    store: &StoreBacking,
    turn: &mut Turn,
    dirty: &mut Vec<Range<usize>>,
) -> io::Result<()> {
    if turn.unsynced.is_empty() {
        return Ok(());
    }
    reach(Point::Evict(Departure::BeforeSync), member.start);
    let synced = store.sync();
    let unsynced = std::mem::take(&mut turn.unsynced);
    if synced.is_ok() {
        return synced;
    }
    let (residence, pool) = (member.residence(), member.residence().pool());
    let mut here = Vec::new();
    if let Some(number) = residence.member() {
        let frames = loop {
            // From then on the evicting thread has no page in hand: it would drop one that was marked after it was chosen.
            let frames = pool.pause();
            let count = frames.frame_count();
            if count < here.capacity() {
                break frames;
            }
            // Room for all of them is made with nothing locked.
            pool.resume(frames);
            here.reserve(count + 1);
        };
        let rest = frames.pages_of(number, 0, &mut here, |page| unsynced.contains(page));
        debug_assert_eq!(rest, None);
        for page in &here {
            residence.change(*page, Place::written);
        }
        pool.resume(frames);
    }
    here.sort_unstable();
    unsynced.ranges().for_each(|pages| turn.lost.insert(pages));
    for pages in ranges_of(&here) {
        turn.lost.remove(&pages);
        dirty.push(pages);
    }
    synced
}

/// Has pages leave memory. Those that their store doesn't have stay, and so do others where there is no memory to ask for
/// that.
pub(crate) fn evict(residence: &Residence, pages: Range<usize>) {
    let staged = request(residence, pages.clone(), Step::Stage);
    let dropped = staged.and_then(|_| request(residence, pages, Step::Drop));
    wait_for(residence, dropped.or(staged));
}

/// The same, of pages that are written to their store before. They are copied in the staging area, where nothing else has
/// them; while some are written, the next ones are brought there.
pub(crate) fn write_and_evict(residence: &Residence, pages: Range<usize>) -> Result<(), FlushError> {
    let Some(store) = residence.store() else { return Ok(()) };
    let Some(member) = residence.as_member() else { return Ok(()) };
    let parts = pages.clone().step_by(EVICT_PAGES);
    let mut parts = parts.map(|start| start..pages.end.min(start + EVICT_PAGES)).peekable();
    let stage = |part: Option<&Range<usize>>| request(residence, part?.clone(), Step::Stage);
    let (mut written, mut staged) = (Written::default(), stage(parts.peek()));
    while let Some(part) = parts.next() {
        wait_for(residence, staged);
        staged = stage(parts.peek());
        drop(write_dirty(&member, store, &part, &mut written));
        // Waited for below, as requests are served in order.
        let _dropped = request(residence, part, Step::Drop);
    }
    // Another thread may have been copying some when they were to be staged. It has none that is clean.
    evict(residence, pages);
    written.into_result(&member, &store.turn(), false)
}

/// Asks the evicting thread for a step. `None`: there is nothing to do, or no memory.
fn request(residence: &Residence, pages: Range<usize>, step: Step) -> Option<u64> {
    let mut frames = residence.pool().lock();
    let member = residence.member().filter(|_| !pages.is_empty())?;
    let number = frames.request(member, pages, step)?;
    residence.pool().work.notify_one();
    Some(number)
}

/// Waits until a request was served, and all before it.
fn wait_for(residence: &Residence, number: Option<u64>) {
    let (Some(number), pool) = (number, residence.pool()) else { return };
    let frames = pool.lock().wait_while(&pool.room, |frames| frames.is_requested(number));
    // What it has in hand of the request.
    drop(pool.wait_for_pass(frames));
}
