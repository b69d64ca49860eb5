//! Pages of shared memory on their way out: of this process or another.
//!
//! Such memory is a file, which this process has open. A page is protected wherever it is mapped, read from the file into
//! the staging area, and dropped from the file by a hole that is punched there. A thread that touches it from then on
//! faults as on any missing page, in whatever process.
//!
//! What counts is that no write comes between the copy and the hole. So the page's mappings are those of the descriptors
//! that are served, looked up with their layouts locked: the kernel refuses protection while a change is unread. A fork's
//! child has its parent's protection, and is looked up itself once it is served. Until then nothing leaves.

#![expect(unsafe_code, reason = "bytes of pages that nobody else has")]

use std::ops::Range;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::frames::{Member, Victim};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Attachment, LOOK_SHARD, addr_to_ptr, wake};
use crate::pager::memory::page_cache::Cache;
use crate::sync_point::{Departure, Point, reach};
use crate::{ContinueMode, Errno};

/// Times that protection is refused since a change is unread, before the pages stay. A worker reads it meanwhile.
const MAX_TRIES: u32 = 64;

/// No descriptor's slot.
const NO_SLOT: usize = usize::MAX;

/// Where the pages of a region are mapped.
#[derive(Debug)]
pub(crate) struct Places {
    /// The slot of the descriptor with which the region was added.
    home: AtomicUsize,
    /// Whether others may have it, since a process forked.
    has_forked: AtomicBool,
    /// Children of forks that aren't served yet.
    unserved: AtomicUsize,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            home: AtomicUsize::new(NO_SLOT),
            has_forked: AtomicBool::new(false),
            unserved: AtomicUsize::new(0),
        }
    }

    /// The region is served. All relaxed, here and below: what is looked up with a layout locked was changed with it locked;
    /// before the slot is known nothing leaves.
    pub(crate) fn serve_at(&self, slot: u32) {
        self.home.store(slot as usize, Ordering::Relaxed);
    }

    pub(crate) fn is_served(&self) -> bool {
        self.home.load(Ordering::Relaxed) != NO_SLOT
    }

    /// A process forked. Called with all shards of its descriptor locked.
    pub(crate) fn begin_fork(&self) {
        self.unserved.fetch_add(1, Ordering::Relaxed);
        self.has_forked.store(true, Ordering::Relaxed);
    }

    /// Its child is served.
    pub(crate) fn end_fork(&self) {
        self.unserved.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Calls `with` for each segment of a member's region that is served, with its layout locked.
fn each_segment(
    member: &Member,
    places: &Places,
    mut with: impl FnMut(&Attachment, &Segment) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let home = places.home.load(Ordering::Relaxed);
    let slots = match (places.has_forked.load(Ordering::Relaxed), home) {
        (_, NO_SLOT) => 0..0,
        (false, home) => home..home + 1,
        (true, _) => 0..member.pager.table.slot_count(),
    };
    for slot in slots {
        let Some(descriptor) = member.pager.table.in_slot(slot) else { continue };
        let serving = descriptor.lock_shard(LOOK_SHARD);
        let Some(serving) = &*serving else { continue };
        let of_it = serving.layout.segments().iter();
        for segment in of_it.filter(|segment| Arc::ptr_eq(&segment.region, &member.region)) {
            with(serving, segment)?;
        }
    }
    Ok(())
}

/// Protects pages wherever they are mapped.
fn protect(member: &Member, places: &Places, pages: &Range<usize>) -> Result<(), Errno> {
    let mut is_mapped = false;
    each_segment(member, places, |serving, segment| {
        if places.unserved.load(Ordering::Relaxed) > 0 {
            return Err(Errno::EBUSY);
        }
        let (addresses, within) = (segment.addresses_of(pages), segment.pages());
        if addresses.is_empty() {
            return Ok(());
        }
        match serving.uffd.write_protect(addr_to_ptr(addresses.start), addresses.len()) {
            Ok(()) => is_mapped |= within.start <= pages.start && pages.end <= within.end,
            // The process is gone.
            Err(error) if error.errno() == Some(Errno::ESRCH) => {}
            Err(error) => return Err(error.errno().unwrap_or(Errno::EINVAL)),
        }
        Ok(())
    })?;
    // What isn't mapped stays in the file, which may be mapped again without this pager.
    if is_mapped { Ok(()) } else { Err(Errno::ENOENT) }
}

/// The same, while changes are being read.
fn protect_patiently(member: &Member, places: &Places, pages: &Range<usize>) -> bool {
    for _ in 0..MAX_TRIES {
        match protect(member, places, pages) {
            Err(Errno::EAGAIN | Errno::EBUSY) => std::thread::yield_now(),
            done => return done.is_ok(),
        }
    }
    false
}

/// Wakes the threads that wait for a page, in whatever process.
pub(super) fn wake_all(member: &Member, places: &Places, page: usize) {
    let _woken = each_segment(member, places, |serving, segment| {
        let addresses = segment.addresses_of(&(page..page + 1));
        if !addresses.is_empty() {
            wake(&serving.uffd, addresses);
        }
        Ok(())
    });
}

/// Maps a page wherever it belongs and isn't mapped, and returns whether any of the answers is of a kind: `None` where it has
/// been mapped. Only what the file has is.
fn any_answer(member: &Member, places: &Places, page: usize, is_it: impl Fn(Option<Errno>) -> bool) -> bool {
    let mut any = false;
    let _looked = each_segment(member, places, |serving, segment| {
        let Some(address) = segment.address_of(page).filter(|_| segment.pages().contains(&page)) else {
            return Ok(());
        };
        let mode = ContinueMode::WRITE_PROTECT | ContinueMode::DONT_WAKE;
        let mapped = serving.uffd.continue_with(addr_to_ptr(address), crate::page_size(), mode);
        any |= is_it(mapped.err().map(|error| error.errno().unwrap_or(Errno::EINVAL)));
        Ok(())
    });
    any
}

/// Whether the file has a page, which is mapped otherwise. A hole that was punched without the pager is none.
fn is_in_file(member: &Member, places: &Places, page: usize) -> bool {
    any_answer(member, places, page, |errno| matches!(errno, None | Some(Errno::EEXIST)))
}

/// Whether a page is mapped, as far as is known. One that is about to be removed is, until that comes to pass: its event is
/// read before. Neither a page that has gone is, nor one whose mapping alone has.
fn is_mapped(member: &Member, places: &Places, page: usize) -> bool {
    any_answer(member, places, page, |errno| !matches!(errno, None | Some(Errno::EFAULT)))
}

/// Whether the removal of a claimed page has come to pass of which an event has told. Then the page is what it has left.
fn is_removal_over(member: &Member, places: &Places, cache: &Cache, page: usize) -> bool {
    if is_mapped(member, places, page) {
        return false;
    }
    // MADV_REMOVE takes the mappings away first, then the page, with the file locked from before the one until after the
    // other. So what it still has to take is gone after another call that locks the file.
    let shift = member.region.page_shift;
    let is_over = cache.allocate(page << shift, 1 << shift).is_ok();
    if is_over {
        // Zeros are no hole now, and not what the source has.
        member.residence().set_written(page);
    }
    is_over
}

/// Brings claimed neighbouring pages to the staging area.
pub(super) fn take_out(run: &mut [Victim], places: &Places) {
    let (Some(first), len) = (run.first(), run.len()) else { return };
    let pages = first.page..first.page + len;
    if leave(&first.member, places, &pages) {
        run.iter_mut().for_each(|victim| victim.is_done = true);
    } else if len > 1 {
        // They may be mapped in several pieces, or one is in the way.
        run.chunks_mut(1).for_each(|one| take_out(one, places));
    }
}

fn leave(member: &Member, places: &Places, pages: &Range<usize>) -> bool {
    let (residence, shift) = (member.residence(), member.region.page_shift);
    let Some(cache) = &member.region.cache else { return false };
    let is_doubted = |page: &usize| member.region.pages.is_doubted(*page);
    if !pages.clone().filter(is_doubted).all(|page| is_removal_over(member, places, cache, page)) {
        return false;
    }
    // A write waits from now on for the claim.
    if !protect_patiently(member, places, pages) {
        return false;
    }
    reach(Point::Evict(Departure::BeforeCopyOut), member.start + (pages.start << shift));
    let (at, len) = (pages.start << shift, pages.len() << shift);
    // SAFETY: the pages are the residence's, and the thread that has the claims has them alone.
    let staged = unsafe { slice::from_raw_parts_mut(residence.staged(pages.start), len) };
    let is_copied = cache.read(at, staged).is_ok();
    if is_copied {
        for (page, bytes) in pages.clone().zip(staged.chunks_exact(1 << shift)) {
            // A hole reads as zeros, which its source may not have.
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            if is_zero && !residence.is_written(page) && !is_in_file(member, places, page) {
                residence.set_written(page);
            }
        }
    }
    let has_left = is_copied && cache.punch(at, len).is_ok();
    if !has_left {
        residence.empty(pages);
    }
    has_left
}
