//! The ends of service: missing pages are filled, poisoned, or handed over.

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::vma_events;
use crate::pager::fill::filler::PageFiller;
use crate::pager::fill::load::fill_batch_len;
use crate::pager::fill::retry::{self, History};
use crate::pager::fill::work::{FillContent, Outcome, RetryAfter, Work};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Attachment, Descriptor, addr_to_ptr, unwrap_last_arc, wake};
use crate::pager::memory::page_run::{PageRun, is_in_source};
use crate::pager::memory::page_state::{Pages, Settlement};
use crate::pager::memory::unfillable::Unfillable;
use crate::pager::{DescriptorId, Detached, Progress, Result};
use crate::{ContinueMode, Errno, Uffd};

/// Bytes read and filled at once, where no thread waits for a particular page: progress is reported after each.
const BULK_BYTES: usize = 1 << 20;

/// Rounds without progress for pages that no other thread is filling and that the kernel reports as present.
const MAX_FUTILE_ROUNDS: usize = 8;

/// Duration for which a call waits for the kernel without progress while events are read. A process that is stopped in the
/// middle of a change is a reason to give up.
pub(crate) const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// How long one call waits in all without progress, for any number of descriptors and pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    most: Duration,
    since: Option<Instant>,
}

impl Patience {
    pub(crate) fn new(most: Duration) -> Self {
        Self { most, since: None }
    }

    /// Notes progress.
    fn renew(&mut self) {
        self.since = None;
    }

    /// Returns whether it is exhausted, for a kernel whose events are read or not. The first call starts the clock.
    fn is_over(&mut self, events_are_read: bool) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        since.elapsed() >= if events_are_read { self.most } else { self.most.min(retry::SHORT_PATIENCE) }
    }
}

/// What missing pages get at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Their content.
    Fill,
    /// Their content, if the source delivers it at the first attempt.
    FillOnce,
    /// Poison.
    Poison,
}

/// Fills or poisons all missing pages of a descriptor, or of one of its regions. Returns the number of pages for which
/// that failed.
///
/// Removed pages that show zeros need nothing: once they are unregistered they are zero, as they should be.
///
/// The pager's threads go on meanwhile.
pub(crate) fn drain(
    shared: &Shared,
    descriptor: &Arc<Descriptor>,
    region: Option<u64>,
    drain: Drain,
    patience: &mut Patience,
    progress: &mut dyn FnMut(u64),
) -> Result<usize> {
    let mut filler = shared.lease();
    let poison = drain == Drain::Poison;
    // Without it, private mappings of files are filled as any other memory.
    let reads_itself = drain == Drain::FillOnce && descriptor.is_own;
    let memory = reads_itself.then(|| File::open("/proc/self/mem").ok()).flatten();
    let is_left = |segment: &Segment, page: &usize| segment.region.is_wanted(*page);
    let doubted = descriptor.segments(shared.outside_id(), region);
    doubted.iter().for_each(|segment| segment.region.doubt(segment.pages()));
    // Where a run of many pages fails, the next round goes page by page.
    let mut bulk = true;
    let mut rounds = 0;
    // Content that the kernel refuses isn't read again, unless other pages make progress.
    let (mut tries_on, mut left_before) = (true, None);
    loop {
        let segments = descriptor.segments(shared.outside_id(), region);
        let (mut left, mut in_work, mut unable, mut own, mut busy) = (0_usize, 0, 0, 0, 0);
        if tries_on {
            filler.unmapped = 0;
        }
        // Changes may have moved pages since the look, so look again until none is missing.
        for segment in &segments {
            let pages = segment.pages();
            // The workers defer nothing any longer, which might be for hours.
            segment.region.set_ending(drain != Drain::Fill);
            // Nor for answers of sources.
            if drain != Drain::Fill {
                shared.fill.in_flight.cancel(|_, run| Arc::ptr_eq(&run.region, &segment.region));
            }
            if drain == Drain::FillOnce {
                filler.map_from_file(&shared.fill, descriptor, segment, memory.as_ref());
            }
            let most = if bulk { (BULK_BYTES >> segment.region.page_shift).max(1) } else { 1 };
            let mut next = if tries_on { pages.start } else { pages.end };
            while next < pages.end {
                let most = if bulk && !poison { fill_batch_len(&segment.region, next, most) } else { most };
                let (run, after) = PageRun::claim(segment, next..pages.end, most);
                let Some(run) = run else { break };
                next = after;
                let run_pages = run.pages();
                let work = match drain {
                    _ if run.removed && !run.is_reload() => {
                        run.give_up(descriptor.lock_shard(shared.outside_id()).as_ref());
                        continue;
                    }
                    Drain::Fill | Drain::FillOnce => Work::Load(run, 0),
                    Drain::Poison => Work::Install(run, FillContent::Poison),
                };
                match complete(shared, &mut filler, descriptor, work, drain, patience) {
                    Completed::Yes => {
                        let done = run_pages.filter(|page| !is_left(segment, page)).count();
                        if done > 0 {
                            patience.renew();
                        }
                        progress((done as u64) << segment.region.page_shift);
                    }
                    // What one page lacks the next one lacks, too: it is tried once.
                    Completed::Unresolvable => unable += 1,
                    Completed::Gone => return Ok(0),
                }
                // A kernel that can't poison one can poison none.
                if poison && unable > 0 {
                    break;
                }
            }
            busy += filler.poison_here(descriptor, segment);
            if poison {
                filler.poison_own(&shared.fill, descriptor, segment);
            }
            for page in pages.filter(|page| is_left(segment, page)) {
                left += 1;
                let region = &segment.region;
                if is_in_source(region, page) {
                    // The page's source waits for this call.
                    own += 1;
                } else if region.pages.is_in_work(page) {
                    in_work += 1;
                }
            }
        }
        if descriptor.lock_shard(shared.outside_id()).is_none() {
            return Ok(0);
        }
        left += busy;
        // Where nothing is mapped any more there is nothing to fill.
        left = left.saturating_sub(filler.unmapped);
        if !tries_on {
            unable = left.saturating_sub(in_work + own + busy);
        }
        rounds = if in_work + busy > 0 { 0 } else { rounds + 1 };
        let gets_on = left_before.replace(left).is_some_and(|before| left < before);
        if gets_on {
            patience.renew();
        }
        tries_on = unable == 0 || bulk || gets_on;
        // Wait for loads of the workers, but not for those that they can't install either; and for the kernel, which refuses
        // to poison while the layout changes.
        let is_hopeless = in_work + busy > 0 && {
            let (stuck, for_changes) = shared.retries.stuck_pages(&segments);
            in_work <= stuck && patience.is_over(for_changes && !shared.is_stopping())
        };
        if left == 0
            || left == unable + own
            || poison && unable > 0
            || rounds == MAX_FUTILE_ROUNDS
            || is_hopeless
        {
            segments.iter().filter(|_| left > 0).for_each(|segment| segment.region.set_ending(false));
            return Ok(left);
        }
        // The rest is loading in workers, was removed since, or failed together with others.
        std::thread::sleep(retry::BUSY_INTERVAL);
        bulk = false;
    }
}

/// Poisons pages whose content is lost, before they are handed over.
pub(crate) fn poison_pages(
    shared: &Shared,
    descriptor: &Arc<Descriptor>,
    segment: &Segment,
    pages: Range<usize>,
) {
    let (mut filler, mut patience) = (shared.lease(), Patience::new(retry::SHORT_PATIENCE));
    let mut next = pages.start;
    while let (Some(run), after) = PageRun::claim(segment, next..pages.end, usize::MAX) {
        next = after;
        let work = Work::Install(run, FillContent::Poison);
        let _as_far_as_possible =
            complete(shared, &mut filler, descriptor, work, Drain::Poison, &mut patience);
    }
}

enum Completed {
    Yes,
    /// Notes that a page can be neither filled nor poisoned.
    Unresolvable,
    Gone,
}

/// Does a piece of work to its end.
fn complete(
    shared: &Shared,
    filler: &mut PageFiller,
    descriptor: &Arc<Descriptor>,
    work: Work,
    drain: Drain,
    patience: &mut Patience,
) -> Completed {
    let mut next = Some(work);
    let mut history = None;
    while let Some(work) = next.take() {
        match filler.resume(&shared.fill, descriptor, work) {
            Outcome::Settled => return Completed::Yes,
            Outcome::TargetGone => {
                shared.retire(descriptor);
                return Completed::Gone;
            }
            Outcome::Deferred(work, RetryAfter::LongDelay) => {
                filler.give_up(descriptor, work);
                return Completed::Unresolvable;
            }
            Outcome::Deferred(work, wait) => {
                let is_over = match wait {
                    RetryAfter::Delay(_) => drain == Drain::FillOnce,
                    wait => patience
                        .is_over(wait == RetryAfter::KernelBusy(Errno::EAGAIN) && !shared.is_stopping()),
                };
                if is_over {
                    filler.give_up(descriptor, work);
                    return Completed::Unresolvable;
                }
                let history = history.get_or_insert_with(History::new);
                // Not parked: an unpark of the caller's thread is meant for the caller.
                std::thread::sleep(history.delay(wait, Instant::now()));
                next = Some(work);
            }
        }
    }
    Completed::Yes
}

/// Bytes that must be filled.
pub(crate) fn missing_bytes(segments: &[Segment]) -> u64 {
    let bytes = |segment: &Segment| {
        let missing = segment.pages().filter(|page| segment.region.is_wanted(*page)).count();
        (missing as u64) << segment.region.page_shift
    };
    segments.iter().map(bytes).sum()
}

/// Fills missing pages and reports the progress. Returns the regions that are filled.
pub(crate) fn fill(
    shared: &Shared,
    descriptors: &[(Arc<Descriptor>, Option<u64>)],
    patience: &mut Patience,
    mut progress: impl FnMut(Progress),
) -> Result<HashSet<u64>> {
    descriptors.iter().for_each(|(descriptor, _)| vma_events::settle_moves(shared, descriptor));
    let regions =
        descriptors.iter().flat_map(|(descriptor, region)| regions_of(shared, descriptor, *region)).collect();
    let missing = |(descriptor, region): &(Arc<Descriptor>, Option<u64>)| {
        missing_bytes(&descriptor.segments(shared.outside_id(), *region))
    };
    let total = descriptors.iter().map(missing).sum();
    let mut done = 0;
    progress(Progress { done, total });
    let (mut unfilled, mut failed) = (0, Unfillable::default());
    for (descriptor, region) in descriptors {
        unfilled += drain(shared, descriptor, *region, Drain::Fill, patience, &mut |bytes| {
            // Pages that were removed meanwhile count, too.
            done = (done + bytes).min(total);
            progress(Progress { done, total });
        })?;
        let segments = descriptor.segments(shared.outside_id(), *region);
        failed.add(&segments, Pages::is_failed);
    }
    if unfilled > 0 {
        return Err(failed.unfilled(unfilled));
    }
    progress(Progress { done: total, total });
    Ok(regions)
}

/// The regions of a descriptor, or the one of them.
fn regions_of(shared: &Shared, descriptor: &Descriptor, region: Option<u64>) -> Vec<u64> {
    let thread = shared.outside_id();
    let (segments, holes) = (descriptor.segments(thread, region), descriptor.holes(thread, region));
    segments.iter().chain(&holes).map(|part| part.region.id).collect()
}

/// Unregisters a descriptor's memory, unless it has other regions than the filled ones. The caller keeps regions from
/// being added meanwhile. Adds the pages that couldn't be filled and are poisoned. Returns whether the memory stays,
/// since a tracker works there, whose protection faults the pager resolves.
pub(crate) fn give_back(
    shared: &Shared,
    descriptor: &Arc<Descriptor>,
    filled: &HashSet<u64>,
    poisoned: &mut Unfillable,
) -> bool {
    if regions_of(shared, descriptor, None).iter().any(|region| !filled.contains(region)) {
        return false;
    }
    let is_lent = |serving: &Attachment| {
        serving.layout.segments().iter().any(|segment| segment.region.lease.is_taken())
    };
    if let Some(serving) = shared.remove_if(descriptor, |serving| !is_lent(serving)) {
        descriptor.remove_state();
        // What is missing where nothing is mapped is no failure.
        poisoned.add(serving.layout.segments(), Pages::is_poisoned);
        unregister(&serving.uffd, serving.layout.everything(), |_| {});
    }
    !descriptor.is_closed()
}

/// Ranges that are unregistered one by one, at most, where the kernel refuses a segment as a whole.
const MAX_PIECES: usize = 1024;

/// Unregisters a range, mapping by mapping where another mapping was made over a part. `kept` gets the parts that the
/// kernel refuses, which may still be registered. Waiters are woken in any case.
pub(crate) fn unregister<'a>(
    uffd: &Uffd,
    parts: impl IntoIterator<Item = &'a Segment>,
    mut kept: impl FnMut(Segment),
) {
    for segment in parts {
        let mut left = MAX_PIECES;
        unregister_piecewise(uffd, segment, &mut left, &mut kept);
    }
}

fn unregister_piecewise(uffd: &Uffd, part: &Segment, left: &mut usize, kept: &mut dyn FnMut(Segment)) {
    let Err(error) = uffd.unregister_unexplained(addr_to_ptr(part.start), part.end - part.start) else {
        return;
    };
    *left = left.saturating_sub(1);
    match (error.errno(), part.halves()) {
        (Some(Errno::EINVAL), Some(halves)) if *left > 0 => {
            halves.iter().for_each(|half| unregister_piecewise(uffd, half, left, kept));
        }
        // Nothing is mapped here, or memory that can't be registered.
        (Some(Errno::EINVAL), None) => {}
        _ => kept(part.clone()),
    }
}

/// Maps those of the removed pages that the file has still, so that they don't count as missing: the next owner would load
/// them anew. Where the kernel doesn't say now, they count as present: the next owner finds out when they are accessed.
fn map_from_shared_file(uffd: &Uffd, segment: &Segment) {
    let region = &segment.region;
    region.doubt(segment.pages());
    if !(region.reloads && region.shared) {
        return;
    }
    for page in segment.pages().filter(|page| region.pages.is_removed(*page)) {
        let Some(address) = segment.address_of(page).filter(|_| region.pages.claim_missing(page).is_some())
        else {
            continue;
        };
        let (dst, mut mode) = (addr_to_ptr(address), ContinueMode::empty());
        mode.set(ContinueMode::WRITE_PROTECT, region.write_protected);
        let mapped = uffd.continue_with(dst, region.page_size(), mode).map_err(|error| error.errno());
        let end = match mapped {
            Err(Some(Errno::EFAULT)) => Settlement::Released,
            Ok(_) | Err(_) => Settlement::Present,
        };
        let _joined = region.pages.end(page, end);
    }
}

/// Makes what is handed over of a served descriptor. Waiting threads are woken, and fault again for the new owner.
pub(crate) fn detached(descriptor: &Descriptor, serving: Attachment) -> Detached {
    serving.layout.segments().iter().for_each(|segment| map_from_shared_file(&serving.uffd, segment));
    for segment in serving.layout.everything() {
        wake(&serving.uffd, segment.start..segment.end);
    }
    if descriptor.was_blocking {
        // It doesn't fail on an open descriptor.
        let _switched = serving.uffd.set_nonblocking(false);
    }
    let uffd = unwrap_last_arc(serving.uffd);
    Detached { descriptor: DescriptorId(descriptor.id), uffd, layout: serving.layout }
}
