//! The first step of a fault: its page is claimed, to be loaded, unless it is present, poisoned, protected, or gone.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::ops::Range;
use std::sync::Arc;

use super::ahead_queue;
use super::buffers::ensure_capacity;
use super::context::FillContext;
use super::filler::{Next, PageFiller};
use super::growth::adopt_growth;
use super::retry;
use super::work::{Fault, Outcome, RetryAfter, Work, answer, page_of};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Attachment, Descriptor, addr_to_ptr, wake};
use crate::pager::memory::page_run::{PageRun, Purpose};
use crate::pager::memory::page_state::{Claim, PresentClaim, Settlement};
use crate::pager::memory::served::ServedRegion;
use crate::pager::{DescriptorId, Problem, RegionId};
use crate::sync_point::{Departure, Point, reach};
use crate::{ContinueMode, CopyMode, Errno, FaultKind, ZeropageMode};

/// Faults in a row on one present page that are suspicious: threads that share a page cause a few.
const SUSPICIOUS_FAULTS: u8 = 16;

/// Wake-ups for a page without a region, each followed by another fault, before it is reported.
const STRAYS_BEFORE_REPORT: u32 = 8;

/// The part of some pages around one that has at most `most` of them.
fn within_run(pages: Range<usize>, page: usize, most: usize) -> Range<usize> {
    if pages.len() <= most {
        return pages;
    }
    let first = page - page % most;
    pages.start.max(first)..pages.end.min(first + most)
}

impl PageFiller {
    /// Looks up a fault, and claims its page if it must be loaded.
    pub(super) fn look_up(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        fault: Fault,
    ) -> Next {
        let run = 'found: {
            let serving = descriptor.lock_shard(self.thread);
            // Handed over meanwhile: the thread that did so wakes all waiters.
            let Some(serving) = &*serving else { return Next::Done(Outcome::Settled) };
            let protected = matches!(fault.kind, FaultKind::WriteProtected | FaultKind::ReadWriteProtected);
            let segment = match (serving.layout.find(fault.address), serving.layout.find_hole(fault.address))
            {
                (Some(segment), _) if protected && segment.region.residence.is_some() => {
                    return Next::Done(self.first_write(context, serving, segment, fault));
                }
                (Some(segment), _) | (None, Some(segment)) if protected => {
                    return Next::Done(self.unprotect(context, serving, segment, fault));
                }
                (Some(segment), _) => segment,
                (None, Some(hole)) => return Next::Done(self.present(context, serving, hole, fault)),
                (None, None) => break 'found None,
            };
            segment.region.count(|tally| match fault.kind {
                FaultKind::Minor => tally.minor_faults.add(1),
                _ => tally.missing_faults.add(1),
            });
            match self.claim(context, descriptor, serving, segment, fault) {
                Ok(run) => Some(run),
                Err(done) => return Next::Done(done),
            }
        };
        let Some(run) = run else { return self.stray(context, descriptor, fault, 0) };
        reach(Point::AfterRead, fault.address);
        if run.tries > 0 {
            // The kernel reported the page as present, for an unknown reason: don't retry at full speed.
            let wait = retry::contested(run.tries);
            return Next::Done(Outcome::Deferred(Work::Load(run, 0), wait));
        }
        Next::Load(run, 0)
    }

    /// Claims the page of a fault, and the missing pages of the block around it.
    fn claim(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Result<PageRun, Outcome> {
        let counters = context.counters(self.thread);
        let states = &segment.region.pages;
        let page = segment.page_at(fault.address);
        let mut pages = page..page + 1;
        let claim = states.claim(page);
        if !matches!(claim, Claim::Acquired { .. }) {
            segment.region.note(page);
        }
        let (removed, tries) = match claim {
            Claim::Acquired { removed, tries } => (removed, tries),
            Claim::Joined => {
                if !fault.joined {
                    counters.duplicates.add(1);
                }
                // The thread that fills it wakes the waiters of this descriptor, unless it fills through that of a
                // relative.
                let again =
                    Outcome::Deferred(Work::Fault(Fault { joined: true, ..fault }), RetryAfter::OtherLoad);
                return Err(if segment.region.shared { again } else { Outcome::Settled });
            }
            Claim::Present if segment.region.reloads => {
                return self.claim_removed(context, serving, segment, fault);
            }
            Claim::Present if segment.region.residence.is_some() => {
                return Err(self.present_with_budget(context, serving, segment, fault));
            }
            Claim::Present => return Err(self.present(context, serving, segment, fault)),
            Claim::Poisoned => return Err(self.poisoned(context, serving, segment, fault)),
        };
        if tries == 0 {
            let (around, window) = segment.region.fault_around(page);
            let within = segment.pages();
            let around = around.start.max(within.start)..around.end.min(within.end);
            let is_slow = self.is_slow() || segment.region.is_async;
            let parallel = context.threads.read_ahead > 0 && is_slow && !removed;
            let most = if parallel { segment.region.max_ahead() } else { segment.region.max_run() };
            let around = within_run(around, page, most);
            let now = if parallel {
                let chunk = ahead_queue::first_chunk(&segment.region, page, &around);
                within_run(chunk, page, segment.region.max_run())
            } else {
                around.clone()
            };
            pages = states.claim_around(page, now.clone(), removed);
            let whole = pages == now;
            if whole && now != around {
                context.ahead.request(descriptor, segment, &now, &around);
            }
            if let Some(window) = window {
                segment.region.advance_stream(window, if whole { &around } else { &pages });
            }
        }
        let mut run = PageRun::new(segment, pages, removed);
        (run.demand, run.tries) = (Some((page, fault.since)), tries);
        if fault.is_write {
            run.purpose = Purpose::Write;
        }
        Ok(run)
    }

    /// Claims a page once more that counts as present, where a page that was removed without an event must be loaded again.
    ///
    /// Mostly the page is there, and the thread awake. For shared memory the file tells. For other memory nothing does: the
    /// thread is woken, and when it comes again and again the page is loaded. If that is there all the same, it stays.
    fn claim_removed(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Result<PageRun, Outcome> {
        let (counters, region) = (context.counters(self.thread), &*segment.region);
        let (len, page) = (region.page_size(), segment.page_at(fault.address));
        let address = segment.address_of(page).expect("the address is in the segment");
        let mut is_gone = None;
        if region.shared {
            let mut mode = ContinueMode::empty();
            mode.set(ContinueMode::WRITE_PROTECT, region.write_protected);
            let mapped = serving.uffd.continue_with(addr_to_ptr(address), len, mode);
            match answer(mapped.map(|mapped| mapped as usize), len).1 {
                None => {
                    counters.continues.add(1);
                    return Err(Outcome::Settled);
                }
                Some(errno @ (Errno::EAGAIN | Errno::ENOMEM)) => {
                    return Err(Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(errno)));
                }
                Some(Errno::ESRCH) => return Err(Outcome::TargetGone),
                Some(Errno::EFAULT) => is_gone = Some(true),
                // A kernel without CONTINUE.
                Some(Errno::EINVAL) => {}
                Some(_) => is_gone = Some(false),
            }
        }
        if !is_gone.unwrap_or_else(|| region.pages.doubt(page)) {
            if !fault.joined {
                counters.duplicates.add(1);
            }
            reach(Point::BeforeWake, address);
            wake(&serving.uffd, address..address + len);
            return Err(Outcome::Settled);
        }
        if self.suspect(address) == u8::MAX {
            let errno = Errno::EEXIST;
            context.report(Problem::Stuck { region: RegionId(region.id), address, errno });
            self.suspect.1 = 0;
        }
        if !region.pages.claim_again(page) {
            // Another thread has just done so, or has read of its removal.
            return Err(Outcome::Deferred(Work::Fault(fault), RetryAfter::OtherLoad));
        }
        let mut run = PageRun::new(segment, page..page + 1, true).again();
        run.demand = Some((page, fault.since));
        if is_gone.is_some() {
            run.mark_not_in_file();
        }
        Ok(run)
    }

    /// Counts the faults in a row on one page that is present.
    fn suspect(&mut self, address: usize) -> u8 {
        if self.suspect.0 != address {
            self.suspect = (address, 0);
        }
        self.suspect.1 = self.suspect.1.saturating_add(1);
        self.suspect.1
    }

    /// Resolves a fault without a region. Either a region has grown; or its memory is gone since, and the faulting thread
    /// must find that out; or the region isn't added yet, and the woken thread faults again.
    fn stray(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        fault: Fault,
        tries: u32,
    ) -> Next {
        if adopt_growth(descriptor, fault.address) {
            return self.look_up(context, descriptor, fault);
        }
        if tries == STRAYS_BEFORE_REPORT {
            let descriptor = DescriptorId(descriptor.id);
            context.report(Problem::NoRegion { descriptor, address: fault.address });
        }
        Next::Done(Outcome::Deferred(Work::Stray { fault, tries, again: tries == 0 }, retry::stray(tries)))
    }

    pub(super) fn stray_again(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        fault: Fault,
        tries: u32,
        again: bool,
    ) -> Next {
        let is_served = {
            let serving = descriptor.lock_shard(self.thread);
            let Some(serving) = &*serving else { return Next::Done(Outcome::Settled) };
            let layout = &serving.layout;
            let is_served = layout.find(fault.address).or_else(|| layout.find_hole(fault.address)).is_some();
            if !is_served && !again {
                context.counters(self.thread).dropped.add(1);
                return Next::Done(Outcome::Settled);
            }
            if !is_served {
                wake(&serving.uffd, page_of(fault.address));
            }
            is_served
        };
        if !is_served {
            return self.stray(context, descriptor, fault, tries + 1);
        }
        self.look_up(context, descriptor, fault)
    }

    /// Resolves a fault on a page that is present, as far as the pager knows, or in a hole.
    ///
    /// Mostly it is one of several faults on the page, and its thread is awake already. But the page may have been removed
    /// without an event: by madvise(2) where the descriptor doesn't report it, or by a hole punched into the file. Then
    /// zeros belong there, as after every removal, or what the page cache has. A tracker must see that as a change, so the
    /// page isn't protected.
    fn present(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Outcome {
        self.fill_again(context, serving, segment, fault).0
    }

    /// The same. Returns whether it put zeros there, too.
    fn fill_again(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> (Outcome, bool) {
        let (counters, region) = (context.counters(self.thread), &*segment.region);
        let (len, page) = (region.page_size(), segment.page_at(fault.address));
        let address = segment.address_of(page).expect("the address is in the segment");
        let _count = self.suspect(address);
        let zeros = match ensure_capacity(&mut self.zeros, len) {
            Ok(zeros) => &zeros[..len],
            Err(_) => {
                let later = Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(Errno::ENOMEM));
                return (later, false);
            }
        };
        let (uffd, dst) = (&serving.uffd, addr_to_ptr(address));
        let (filled, counter) = if let Some(cache) = &region.cache {
            let mut mode = ContinueMode::empty();
            mode.set(ContinueMode::WRITE_PROTECT, region.write_protected);
            let mut filled = answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
            // Other threads that find the hole do the same. It keeps present pages, so no zeros follow a write.
            if filled.1 == Some(Errno::EFAULT) {
                filled = match cache.allocate(page << region.page_shift, len) {
                    Ok(()) => answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len),
                    Err(errno) => (0, Some(errno)),
                };
            }
            (filled, &counters.continues)
        } else if region.zeropage && self.suspect.1 < SUSPICIOUS_FAULTS {
            // SAFETY: either the page was removed, so that zeros belong there, or it is present, and the kernel keeps it.
            (
                answer(unsafe { uffd.zeropage_with(dst, len, ZeropageMode::empty()) }, len),
                &counters.zero_fills,
            )
        } else {
            // A marker of write protection stops a zero page, but not a copy.
            let mut mode = CopyMode::empty();
            mode.set(CopyMode::WRITE_PROTECT, region.write_protected);
            // SAFETY: as above; the source is this filler's.
            let result = unsafe { uffd.copy_with(zeros.as_ptr().cast(), dst, len, mode) };
            (answer(result, len), &counters.zero_fills)
        };
        match filled.1 {
            None => {
                counter.add(1);
                // The page was empty, as it may be any number of times.
                self.suspect.1 = 0;
                return (Outcome::Settled, true);
            }
            Some(errno @ (Errno::EAGAIN | Errno::ENOMEM | Errno::ENOSPC)) => {
                return (Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(errno)), false);
            }
            Some(Errno::ESRCH) => return (Outcome::TargetGone, false),
            Some(errno) => {
                if !fault.joined {
                    counters.duplicates.add(1);
                }
                if self.suspect.1 == u8::MAX {
                    let region = RegionId(region.id);
                    context.report(Problem::Stuck { region, address, errno });
                    self.suspect.1 = 0;
                }
                reach(Point::BeforeWake, address);
                wake(uffd, address..address + len);
            }
        }
        (Outcome::Settled, false)
    }

    /// The same, where a budget limits how many pages are there: the page may be on its way out, or have left since the
    /// fault came. One that was taken away otherwise becomes zeros, which its source hasn't.
    fn present_with_budget(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Outcome {
        keep_present(serving, segment, fault, |region, page, address| {
            let is_doubted = region.pages.is_doubted(page);
            let (outcome, is_filled) = self.fill_again(context, serving, segment, fault);
            let Some(residence) = region.residence.as_ref().filter(|_| is_filled) else {
                // A page that is mapped still may be about to be removed.
                return (outcome, Settlement::Reloaded);
            };
            residence.set_written(page);
            let is_removed = !is_doubted || wait_for_removal(serving, region, page, address);
            (outcome, if is_removed { Settlement::Present } else { Settlement::Reloaded })
        })
    }

    /// The first write to a page since it was filled, where a budget has to know of it.
    fn first_write(
        &self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Outcome {
        keep_present(serving, segment, fault, |region, page, address| {
            reach(Point::Evict(Departure::FirstWrite), address);
            // Before the protection is lifted, after which nothing tells of a write.
            if let Some(residence) = &region.residence {
                residence.set_written(page);
            }
            // A page that is mapped still may be about to be removed.
            (self.unprotect(context, serving, segment, fault), Settlement::Reloaded)
        })
    }

    /// Resolves a fault on a page that is poisoned, as far as the pager knows: it came before the poison, or the poison was
    /// removed.
    fn poisoned(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Outcome {
        let len = segment.region.page_size();
        let address =
            segment.address_of(segment.page_at(fault.address)).expect("the address is in the segment");
        if !fault.joined {
            context.counters(self.thread).duplicates.add(1);
        }
        let fault = Fault { joined: true, ..fault };
        // SAFETY: it was poisoned before.
        match answer(unsafe { serving.uffd.poison(addr_to_ptr(address), len, true) }, len).1 {
            Some(errno @ (Errno::EAGAIN | Errno::ENOMEM)) => {
                return Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(errno));
            }
            Some(Errno::ESRCH) => return Outcome::TargetGone,
            Some(_) => wake(&serving.uffd, address..address + len),
            None => {}
        }
        Outcome::Settled
    }

    /// Resolves a fault on a protected page: lifts the protection.
    fn unprotect(
        &self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Outcome {
        let counters = context.counters(self.thread);
        let len = segment.region.page_size();
        let address =
            segment.address_of(segment.page_at(fault.address)).expect("the address is in the segment");
        let (uffd, start) = (&serving.uffd, addr_to_ptr(address));
        let lifted = match fault.kind {
            FaultKind::ReadWriteProtected => uffd.remove_read_write_protection(start, len, true),
            _ => uffd.remove_write_protection(start, len, true),
        };
        match lifted.map_err(|error| error.errno()) {
            Ok(()) => counters.unprotected.add(1),
            Err(Some(errno @ (Errno::EAGAIN | Errno::ENOMEM))) => {
                return Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(errno));
            }
            Err(Some(Errno::ESRCH)) => return Outcome::TargetGone,
            Err(_) => {
                counters.dropped.add(1);
                wake(uffd, address..address + len);
            }
        }
        counters.fault_latency.record_since(fault.since);
        Outcome::Settled
    }
}

/// Waits until a page is gone of which MADV_REMOVE has taken the mappings away: it has the file locked until then. Maps what
/// the file has after that. Returns whether the file could be locked.
fn wait_for_removal(serving: &Attachment, region: &ServedRegion, page: usize, address: usize) -> bool {
    let Some(cache) = &region.cache else { return true };
    let is_over = cache.allocate(page << region.page_shift, region.page_size()).is_ok();
    let mode = ContinueMode::WRITE_PROTECT | ContinueMode::DONT_WAKE;
    // If it isn't mapped by this, the thread that was woken faults again.
    let _mapped = serving.uffd.continue_with(addr_to_ptr(address), region.page_size(), mode);
    is_over
}

/// Resolves a fault on a page that is there and may leave: claims the page, so that it stays, and wakes the threads that
/// have joined. `resolve` gets its region, its number and its address, and returns how the claim ends, too.
fn keep_present(
    serving: &Attachment,
    segment: &Segment,
    fault: Fault,
    resolve: impl FnOnce(&ServedRegion, usize, usize) -> (Outcome, Settlement),
) -> Outcome {
    let (region, page) = (&*segment.region, segment.page_at(fault.address));
    let address = segment.address_of(page).expect("the address is in the segment");
    let addresses = address..address + region.page_size();
    match region.pages.claim_present(page) {
        PresentClaim::Acquired => {}
        // The thread that has claimed it wakes those that wait for it, but not those of another process that it fills.
        PresentClaim::Joined if region.shared => {
            return Outcome::Deferred(Work::Fault(Fault { joined: true, ..fault }), RetryAfter::OtherLoad);
        }
        PresentClaim::Joined => return Outcome::Settled,
        // It has left since. The thread that is woken finds it missing.
        PresentClaim::Gone => {
            wake(&serving.uffd, addresses);
            return Outcome::Settled;
        }
    }
    let (outcome, end) = resolve(region, page, address);
    if region.pages.end(page, end) {
        wake(&serving.uffd, addresses);
    }
    outcome
}
