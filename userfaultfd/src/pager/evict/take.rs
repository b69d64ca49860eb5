//! The thread that takes pages out of memory.
//!
//! ```text
//!                 victim of the policy                    oldest of the staging area
//!   in memory ───────────────────────────▶ staging area ───────────────────────────▶ spill file, or source
//!      ▲                                        │                                            │
//!      └──────── a fault, without a read ◀──────┴───────────── a fault, with a read ◀────────┘
//! ```
//!
//! Both steps claim the page's state, so that a fault that comes meanwhile joins and is woken at the end of the step.
//! The thread waits for nothing but the kernel and the spill file's disk: not for a worker, a source, the allocator or
//! the program. So workers may wait for it.

#![expect(unsafe_code, reason = "moves pages of memory that lazy memory handed over")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::slice;
use std::sync::Arc;
use std::time::Instant;

use super::cgroup::LOOK_INTERVAL;
use super::frames::{BATCH_PAGES, Frames, Member, Need, Victim};
use super::pool::Pool;
use super::residence::Way;
use super::{shared, write_back};
use crate::mapped_vec::{self, MappedVec};
use crate::pager::memory::descriptor::addr_to_ptr;
use crate::pager::memory::page_state::Settlement;
use crate::sync_point::{Departure, Point, reach};
use crate::{Errno, MoveMode, sys};

/// Moves of a page that the kernel puts off, before it is left where it is.
const MAX_MOVES: u32 = 16;

/// Evicts for a budget, until that ends.
pub(super) fn run(pool: &Pool) {
    let (mut staged, mut dropped) = (mapped_vec::none(), mapped_vec::none());
    mapped_vec::reserve::<Victim>(&mut staged, BATCH_PAGES);
    mapped_vec::reserve::<Victim>(&mut dropped, BATCH_PAGES);
    let mut looked = Instant::now();
    let mut frames = pool.lock();
    while !frames.is_stopping {
        if frames.pauses > 0 {
            frames = frames.wait(&pool.work);
            continue;
        }
        if pool.follows_limit() && looked.elapsed() >= LOOK_INTERVAL {
            drop(frames);
            pool.follow_limit();
            looked = Instant::now();
            frames = pool.lock();
            continue;
        }
        let (need, is_asked) = (frames.need(pool), frames.has_requests());
        let is_answered = frames.choose_requested(&mut staged, &mut dropped);
        frames.choose_to_drop(need.drop, &mut dropped);
        frames.choose_to_stage(need.stage, &mut staged);
        if staged.is_empty() && dropped.is_empty() {
            if is_answered {
                pool.room.notify_all();
            }
            if is_asked {
                // A large request has others wait for one part of it, not for all.
                drop(frames);
                frames = pool.lock();
                continue;
            }
            let is_short = need != Need::default();
            let waits_for_store = is_short && frames.waits_for_store();
            frames.set_stuck(is_short && !waits_for_store);
            let is_stuck = frames.is_stuck_for_long();
            if is_stuck || !is_short {
                // There is room, or none to be had.
                pool.room.notify_all();
            }
            if let Some((member, problem)) = is_stuck.then(|| frames.next_trouble(pool)).flatten() {
                // The member doesn't end before this thread has let go of it.
                frames.is_busy = true;
                drop(frames);
                member.pager.report(problem);
                drop(member);
                frames = pool.lock();
                frames.end_pass(pool);
                continue;
            }
            frames = pool.wait_for_work(frames, waits_for_store);
            continue;
        }
        frames.forget_trouble();
        frames.is_busy = true;
        drop(frames);
        let mut is_through = false;
        if !dropped.is_empty() {
            write_back::drop_staged(&mut dropped);
            write_back::count_spilled(&dropped);
            is_through |= finish(
                pool,
                &mut dropped,
                |frames, victims| frames.dropped(pool, victims),
                Settlement::Released,
            );
        }
        if !staged.is_empty() {
            stage(&mut staged);
            is_through |= finish(pool, &mut staged, Frames::staged, Settlement::Left);
        }
        frames = pool.lock();
        frames.set_stuck(!is_through);
        frames.end_pass(pool);
        if frames.is_stuck() {
            frames = pool.wait_for_work(frames, false);
        }
    }
}

/// Notes what was done, then ends the claims and wakes the faults that joined them. Returns whether anything was done.
fn finish(
    pool: &Pool,
    victims: &mut MappedVec<Victim>,
    note: impl FnOnce(&mut Frames, &[Victim]),
    end: Settlement,
) -> bool {
    let mut frames = pool.lock();
    note(&mut frames, victims);
    drop(frames);
    let mut is_through = false;
    for Victim { member, page, is_done, .. } in victims.iter() {
        is_through |= is_done;
        // What didn't get through is what it was.
        let end = match (end, is_done) {
            (Settlement::Left, false) => Settlement::Reloaded,
            (end, _) => end,
        };
        let address = member.start + page * crate::page_size();
        reach(Point::Evict(Departure::AfterLeave), address);
        if member.region.pages.end(*page, end) {
            member.wake(*page);
        }
    }
    victims.clear();
    is_through
}

/// Brings pages to the staging area.
fn stage(victims: &mut [Victim]) {
    write_back::sort(victims);
    let mut rest = victims;
    while let Some(len) = write_back::run_len(rest) {
        let (run, others) = rest.split_at_mut(len);
        reach(Point::Evict(Departure::BeforeLeave), run[0].member.start + run[0].page * crate::page_size());
        let member = Arc::clone(&run[0].member);
        match &member.residence().way {
            Way::Moved => move_out(run),
            Way::Copied(memory) => run
                .iter_mut()
                .for_each(|victim| victim.is_done = copy_out(&victim.member, memory, victim.page).is_ok()),
            Way::FromFile(places) => shared::take_out(run, places),
        }
        rest = others;
    }
}

/// Moves neighbouring pages, as far as the kernel does it. What it doesn't move stays: a page that is pinned for I/O, for
/// example.
fn move_out(run: &mut [Victim]) {
    let (mut at, mut most, mut tries) = (0, run.len(), 0);
    while at < run.len() {
        let Victim { member, page, .. } = &run[at];
        let src = member.start + page * crate::page_size();
        let dst = member.residence().staged(*page);
        let len = (run.len() - at).min(most) * crate::page_size();
        // SAFETY: the pages are the lazy memory's, whose content nobody loses: a thread that touches one waits for its
        // claim, and gets it back. The destination is this residence's, empty, and touched by nobody else.
        let moved =
            unsafe { member.uffd().move_pages(addr_to_ptr(src), dst.cast(), len, MoveMode::DONT_WAKE) };
        let (done, errno) = match moved {
            Ok(done) => (done, None),
            Err(error) => (error.progress().unwrap_or(0), error.errno()),
        };
        let done = done / crate::page_size();
        run[at..at + done].iter_mut().for_each(|victim| victim.is_done = true);
        at += done;
        if done > 0 || errno.is_none() {
            (most, tries) = (run.len(), 0);
        } else if most > 1 {
            // One of them is in the way.
            most = 1;
        } else if errno == Some(Errno::EAGAIN) && tries < MAX_MOVES {
            tries += 1;
            std::hint::spin_loop();
        } else {
            if errno == Some(Errno::EEXIST) {
                move_back(&run[at]);
            }
            (at, most, tries) = (at + 1, run.len(), 0);
        }
    }
}

/// Moves a page back to memory if it is in the staging area after all. Linux 6.18 may answer `EEXIST` and 0 bytes after it
/// has moved a page out of a transparent huge page. If it hasn't, it answers `EEXIST` here, too, as memory has the page.
fn move_back(victim: &Victim) {
    let Victim { member, page, .. } = victim;
    let (residence, address) = (member.residence(), member.start + page * crate::page_size());
    // What is moved loses its protection, after which nothing tells of a write.
    residence.set_written(*page);
    loop {
        let (src, dst) = (residence.staged(*page).cast(), addr_to_ptr(address));
        // SAFETY: the page is the staging area's, where it is this thread's; memory gets back what it had.
        let moved = unsafe { member.uffd().move_pages(src, dst, crate::page_size(), MoveMode::DONT_WAKE) };
        match moved.map_err(|error| error.errno()) {
            // Of a small page that nothing else refers to: not for long.
            Err(Some(Errno::EAGAIN)) => std::thread::yield_now(),
            // It is back, or was never away.
            Ok(_) | Err(_) => return,
        }
    }
}

/// The same before Linux 6.8: protects the page, copies and drops it.
fn copy_out(member: &Member, memory: &File, page: usize) -> Result<(), Errno> {
    let (residence, len) = (member.residence(), crate::page_size());
    let address = member.start + page * len;
    // A write waits from now on for the claim.
    member
        .uffd()
        .write_protect(addr_to_ptr(address), len)
        .map_err(|error| error.errno().unwrap_or(Errno::EINVAL))?;
    reach(Point::Evict(Departure::BeforeCopyOut), address);
    // SAFETY: the page is the residence's, and the thread that has the claim has it alone.
    let staged = unsafe { slice::from_raw_parts_mut(residence.staged(page), len) };
    // Read this way the kernel doesn't wait for a page that is missing all the same.
    let copied = memory.read_exact_at(staged, address as u64);
    let dropped = copied.map_err(|error| crate::error::errno_of(&error)).and_then(|()| {
        // SAFETY: the page is the lazy memory's, and its content in the staging area. A thread that touches it from now on
        // waits for the claim.
        unsafe { sys::discard(addr_to_ptr(address).cast(), len) }
    });
    if dropped.is_err() {
        residence.empty(&(page..page + 1));
    }
    dropped
}

/// Moves a page to the staging area behind the back of the evicting thread, which then gets the answer of a kernel that
/// has moved it and says that it hasn't. Its thread is at [`Departure::BeforeLeave`] with the page.
#[cfg(test)]
pub(crate) fn move_unasked(residence: &super::residence::Residence, page: usize) {
    let member = residence.as_member().expect("it is attached");
    let (src, dst) = (addr_to_ptr(member.start + page * crate::page_size()), residence.staged(page).cast());
    // SAFETY: as `move_out`, which is about to do the same.
    let moved = unsafe { member.uffd().move_pages(src, dst, crate::page_size(), MoveMode::DONT_WAKE) };
    assert_eq!(moved.map_err(|error| error.errno()), Ok(crate::page_size()));
}
