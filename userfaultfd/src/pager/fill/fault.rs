//! What becomes of a fault: its page is claimed and loaded, unless it is there, poisoned, protected, or gone.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::sync::Arc;

use super::ahead_queue;
use super::buffers::ensure_capacity;
use super::context::FillContext;
use super::filler::{Next, PageFiller};
use super::growth::adopt_growth;
use super::install::answer;
use super::retry;
use super::work::{Fault, Outcome, RetryAfter, Work, page_of};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Attachment, Descriptor, addr_to_ptr, wake};
use crate::pager::memory::page_run::PageRun;
use crate::pager::memory::page_state::Claim;
use crate::pager::{DescriptorId, Problem, RegionId};
use crate::sync_point::{Point, reach};
use crate::{ContinueMode, CopyMode, Errno, FaultKind, ZeropageMode};

/// So many faults in a row on one page that is there are suspicious.
const SUSPICIOUS_FAULTS: u8 = 16;

/// Wakes of a page where no region is, each followed by another fault, before it is reported.
const STRAYS_BEFORE_REPORT: u32 = 8;

impl PageFiller {
    /// Looks a fault up, and claims its page if that has to be loaded.
    pub(super) fn look_up(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        fault: Fault,
    ) -> Next {
        let run = 'found: {
            let serving = descriptor.lock_shard(self.thread);
            // Given back meanwhile: who did that wakes everybody.
            let Some(serving) = &*serving else { return Next::Done(Outcome::Settled) };
            let protected = matches!(fault.kind, FaultKind::WriteProtected | FaultKind::ReadWriteProtected);
            let segment = match (serving.layout.find(fault.address), serving.layout.find_hole(fault.address))
            {
                (Some(segment), _) | (None, Some(segment)) if protected => {
                    return Next::Done(self.unprotect(context, serving, segment, fault));
                }
                (Some(segment), _) => segment,
                (None, Some(hole)) => return Next::Done(self.present(context, serving, hole, fault)),
                (None, None) => break 'found None,
            };
            match self.claim(context, descriptor, serving, segment, fault) {
                Ok(run) => Some(run),
                Err(done) => return Next::Done(done),
            }
        };
        let Some(run) = run else { return self.stray(context, descriptor, fault, 0) };
        reach(Point::AfterRead, fault.address);
        if run.tries > 0 {
            // Something was in the way, and nobody knows what: not at full speed.
            let wait = retry::contested(run.tries);
            return Next::Done(Outcome::Deferred(Work::Load(run, 0), wait));
        }
        Next::Load(run, 0)
    }

    /// Takes the page of a fault, and what is missing in the block around it.
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
                // Who fills it wakes the waiters of this descriptor, unless it fills through that of a relative.
                let again =
                    Outcome::Deferred(Work::Fault(Fault { joined: true, ..fault }), RetryAfter::OtherLoad);
                return Err(if segment.region.shared { again } else { Outcome::Settled });
            }
            Claim::Present => return Err(self.present(context, serving, segment, fault)),
            Claim::Poisoned => return Err(self.poisoned(context, serving, segment, fault)),
        };
        if tries == 0 {
            let (around, window) = segment.region.fault_around(page);
            let within = segment.pages();
            let around = around.start.max(within.start)..around.end.min(within.end);
            let parallel = context.threads.read_ahead > 0 && self.is_slow() && !removed;
            let now = if parallel {
                ahead_queue::first_chunk(&segment.region, page, &around)
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
        Ok(run)
    }

    /// A fault where no region is. Either a region has grown; or its memory has gone since, and the faulting thread must
    /// find that out; or there is no region yet, and the thread that is woken faults again.
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

    /// A fault on a page that is there, as far as the pager knows, or in a hole.
    ///
    /// Mostly it is one of several on the same page, and everybody is awake. But the page may have been taken away
    /// without a word: by madvise(2) where the descriptor doesn't tell of it, by a hole punched into the file. Then
    /// what belongs there is zero, as everywhere after a removal, or what the page cache has. To a tracker that is a
    /// change: the page isn't protected.
    fn present(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        segment: &Segment,
        fault: Fault,
    ) -> Outcome {
        let (counters, region) = (context.counters(self.thread), &*segment.region);
        let (len, page) = (region.page_size(), segment.page_at(fault.address));
        let address = segment.address_of(page).expect("the address is in the segment");
        if self.suspect.0 != address {
            self.suspect = (address, 0);
        }
        self.suspect.1 = self.suspect.1.saturating_add(1);
        let zeros = match ensure_capacity(&mut self.zeros, len) {
            Ok(zeros) => &zeros[..len],
            Err(_) => return Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(Errno::ENOMEM)),
        };
        let (uffd, dst) = (&serving.uffd, addr_to_ptr(address));
        let (filled, counter) = if let Some(cache) = &region.cache {
            let mut mode = ContinueMode::empty();
            mode.set(ContinueMode::WRITE_PROTECT, region.write_protected);
            let mut filled = answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
            // Whoever else sees that the page has gone does the same: nobody's zeros come after what is written there.
            if filled.1 == Some(Errno::EFAULT) {
                filled = match cache.allocate(page << region.page_shift, len) {
                    Ok(()) => answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len),
                    Err(errno) => (0, Some(errno)),
                };
            }
            (filled, &counters.continues)
        } else if region.zeropage && self.suspect.1 < SUSPICIOUS_FAULTS {
            // SAFETY: the page has been taken away, so that zeros are what belongs there, or is there, and stays.
            (
                answer(unsafe { uffd.zeropage_with(dst, len, ZeropageMode::empty()) }, len),
                &counters.zero_fills,
            )
        } else {
            // A marker of write protection is in the way of a zero page, and not in that of a copy.
            let mut mode = CopyMode::empty();
            mode.set(CopyMode::WRITE_PROTECT, region.write_protected);
            // SAFETY: as above; the source is this filler's.
            let result = unsafe { uffd.copy_with(zeros.as_ptr().cast(), dst, len, mode) };
            (answer(result, len), &counters.zero_fills)
        };
        match filled.1 {
            None => counter.add(1),
            Some(errno @ (Errno::EAGAIN | Errno::ENOMEM | Errno::ENOSPC)) => {
                return Outcome::Deferred(Work::Fault(fault), RetryAfter::KernelBusy(errno));
            }
            Some(Errno::ESRCH) => return Outcome::TargetGone,
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
        Outcome::Settled
    }

    /// A fault on a page that is poisoned, as far as the pager knows: it came before the poison, or somebody took
    /// that away.
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

    /// A fault on a page that is protected: it is let go on.
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
