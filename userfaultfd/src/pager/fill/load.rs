//! The content of a run: read from the source, kept while its fill is deferred, retried.

#![expect(unsafe_code, reason = "bytes of pages that rest in a staging area")]

use std::sync::Arc;
use std::time::Instant;
use std::{io, slice};

use memmap2::MmapMut;

use super::buffers::{Aside, ensure_capacity, ensure_capacity_for_disk};
use super::context::FillContext;
use super::filler::{Next, PageFiller};
use super::in_flight::{Answer, Started};
use super::work::{FillContent, Outcome, RetryAfter, Work};
use crate::pager::evict::residence::{Content, Residence};
use crate::pager::memory::descriptor::Descriptor;
use crate::pager::memory::page_cache::Cache;
use crate::pager::memory::page_run::{PageRun, Purpose};
use crate::pager::memory::page_state::MAX_TRIES;
use crate::pager::memory::served::ServedRegion;
use crate::pager::memory::shared_image::SharedImage;
use crate::pager::trace::span;
use crate::pager::{DescriptorId, OnEnd, PageData, Problem, RegionId};
use crate::source::call::catch_panic;
use crate::source::{Loaded, Receiver};
use crate::{Errno, sys};

/// Why the content of a run can't be loaded.
#[derive(Debug)]
pub(crate) enum NoContent {
    /// The source failed.
    Source(io::Error),
    /// There is no memory for a buffer.
    NoMemory,
    /// The source is asynchronous: the load must be started.
    NotYet,
}

impl From<io::Error> for NoContent {
    fn from(error: io::Error) -> Self {
        Self::Source(error)
    }
}

impl PageFiller {
    /// Maps the buffer for one base page, so that this filler always has one.
    pub(crate) fn prepare(&mut self) -> io::Result<()> {
        ensure_capacity(&mut self.buffer, crate::page_size()).map(drop)
    }

    /// Reads the content of a run from its source, and installs it.
    pub(super) fn load(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        run: PageRun,
        attempts: u32,
    ) -> Next {
        let mut run = run.rest();
        run.attempts = attempts;
        if attempts > 0 && !self.is_wanted(descriptor, &run) {
            return self.drop_run(context, descriptor, run);
        }
        run.reserve();
        match self.content(context, &run) {
            Ok(content) => {
                if let (FillContent::Outside(bytes), true) = (&content, descriptor.tells_changes) {
                    // Faulted in here, not while a change waits for the shard: the kernel may have to read the source's memory.
                    self.set_reading(context, &run.region);
                    sys::populate(*bytes, run.len());
                }
                Next::Install(run, content)
            }
            Err(NoContent::Source(error)) => self.source_failed(context, descriptor, run, attempts, error),
            Err(NoContent::NoMemory) => self.no_memory(descriptor, run, attempts),
            Err(NoContent::NotYet) => self.start_load(context, descriptor, run, attempts),
        }
    }

    /// Starts a load of an asynchronous source.
    fn start_load(
        &mut self,
        context: &FillContext,
        descriptor: &Arc<Descriptor>,
        run: PageRun,
        attempts: u32,
    ) -> Next {
        let region = Arc::clone(&run.region);
        if region.is_ending() {
            // No answer is waited for any more.
            return Next::Install(run, FillContent::Poison);
        }
        let (offset, is_early) = (region.offset_of(run.pages().start), run.demand.is_none());
        let _in_source = run.enter_source();
        span!("start", offset = offset, len = run.len());
        self.set_reading(context, &region);
        let start = Instant::now();
        let started = context.in_flight.start(descriptor, run, |buffer, done| {
            match region.source.as_async() {
                Some(source) if is_early => source.start_early(offset, buffer, done),
                Some(source) => source.start(offset, buffer, done),
                // It was asynchronous before. Both are dropped, which is an error.
                None => {}
            }
        });
        if let Some(place) = self.place {
            context.activities.set_at_work(place, true);
        }
        // What keeps this thread waiting is `start` alone.
        self.pace = (self.pace * 7 + start.elapsed()) / 8;
        match started {
            Started::UnderWay => Next::Done(Outcome::Settled),
            Started::Answered(run, answer) => self.answered(context, descriptor, run, answer),
            Started::NoMemory(run) => self.no_memory(descriptor, run, attempts),
            // Fewer pages may do.
            Started::Full(run) if run.purpose != Purpose::Ahead && run.pages().len() > 1 => {
                match self.alone(descriptor, run) {
                    Some(run) => Next::Load(run, attempts),
                    None => Next::Done(Outcome::Settled),
                }
            }
            Started::Full(run) => {
                Next::Done(Outcome::Deferred(Work::Load(run, attempts), RetryAfter::OtherLoad))
            }
        }
    }

    /// The next step when an asynchronous source has answered.
    pub(super) fn answered(
        &mut self,
        context: &FillContext,
        descriptor: &Descriptor,
        run: PageRun,
        answer: Answer,
    ) -> Next {
        let counters = context.counters(self.thread);
        counters.source_latency.record(answer.took);
        counters.source_reads.add(1);
        match answer.result {
            Ok(Loaded::Zero) => {
                let zeros = Self::zeros(&run);
                Next::Install(run, zeros)
            }
            Ok(Loaded::Data(mut buffer)) => {
                let offset = run.region.offset_of(run.pages().start);
                let within = run.region.within_source(offset, buffer.len());
                buffer[within..].fill(0);
                Next::Install(run, FillContent::Loaded(buffer.into_mapping()))
            }
            Err(error) => {
                let attempts = run.attempts;
                self.source_failed(context, descriptor, run, attempts, error)
            }
        }
    }

    /// The next step when there was no memory for a run's content: it is retried later, as when the kernel has none.
    fn no_memory(&mut self, descriptor: &Descriptor, run: PageRun, attempts: u32) -> Next {
        let later = |run| {
            Next::Done(Outcome::Deferred(Work::Load(run, attempts), RetryAfter::KernelBusy(Errno::ENOMEM)))
        };
        if run.purpose == Purpose::Ahead {
            return later(run);
        }
        if run.pages().len() > 1 {
            // There may be enough memory for one page.
            return match self.alone(descriptor, run) {
                Some(run) => Next::Load(run, attempts),
                None => Next::Done(Outcome::Settled),
            };
        }
        if run.region.is_ending() {
            return Next::Install(run, FillContent::Poison);
        }
        later(run)
    }

    /// Returns the content of a run, and reads it from the source if necessary.
    pub(crate) fn content(&mut self, context: &FillContext, run: &PageRun) -> Result<FillContent, NoContent> {
        let (region, len) = (&*run.region, run.len());
        let offset = region.offset_of(run.pages().start);
        if let Some((image, first)) = region.cache.as_ref().and_then(Cache::image) {
            return self.content_of_image(context, run, image, first);
        }
        let is_from_file = match run.is_reload() {
            true => region.shared && !run.is_not_in_file(),
            false => run.removed && region.cache.is_some(),
        };
        if is_from_file {
            return Ok(FillContent::File);
        }
        let _in_source = run.enter_source();
        if run.removed && !run.is_reload() {
            return Ok(Self::zeros(run));
        }
        if let Some(residence) = region
            .residence
            .as_ref()
            .filter(|residence| run.pages().any(|page| residence.content(page) != Content::Source))
        {
            return self.content_that_left(context, run, residence);
        }
        // The source's `zeros` may be slow: the waiting thread would wait for it, too.
        if run.demand.is_none() && known_zeros(region, offset) >= len as u64 {
            return Ok(Self::zeros(run));
        }
        if region.cache.is_none() && !run.is_unreadable() {
            let bytes =
                catch_panic(|| Ok(region.source.bytes(offset, len).filter(|bytes| bytes.len() == len)))?;
            if let Some(bytes) = bytes {
                self.pace = self.pace * 7 / 8;
                return Ok(FillContent::Outside(bytes.as_ptr()));
            }
        }
        // Other threads, of callers and in the background, wait for their content themselves.
        let may_start = region.poison || !region.is_ending();
        if region.is_async && self.place.is_some() && may_start {
            return Err(NoContent::NotYet);
        }
        span!("load", offset = offset, len = len);
        let (place, is_slow) = (self.place, self.is_slow());
        let buffer = ensure_capacity_for_disk(&mut self.buffer, len).map_err(|_| NoContent::NoMemory)?;
        let counters = context.counters(self.thread);
        let start = Instant::now();
        if let Some(place) = place {
            context.activities.set_reading(place, region.id, is_slow, start);
        }
        let fill = catch_panic(|| match run.demand {
            Some(_) => region.source.read(offset, &mut buffer[..len]),
            None => region.source.read_early(offset, &mut buffer[..len]),
        });
        let took = start.elapsed();
        if let Some(place) = place {
            context.activities.set_at_work(place, true);
        }
        self.pace = (self.pace * 7 + took) / 8;
        counters.source_latency.record(took);
        counters.source_reads.add(1);
        region.count(|tally| tally.source_reads.add(1));
        let fill = fill?;
        if let Some(residence) = &region.residence {
            residence.count_read(region.within_source(offset, len));
        }
        if fill == PageData::Zero {
            return Ok(Self::zeros(run));
        }
        buffer[region.within_source(offset, len)..len].fill(0);
        Ok(FillContent::Buffer)
    }

    /// Has the pages of a run be in an image, from which they are mapped then. What was removed from a private mapping shows
    /// its file again.
    fn content_of_image(
        &mut self,
        context: &FillContext,
        run: &PageRun,
        image: &SharedImage,
        first: usize,
    ) -> Result<FillContent, NoContent> {
        let region = &*run.region;
        let _in_source = run.enter_source();
        self.set_reading(context, region);
        let buffer = ensure_capacity(&mut self.buffer, run.len()).map_err(|_| NoContent::NoMemory)?;
        let pages = first + run.pages().start..first + run.pages().end;
        let start = Instant::now();
        let loaded = catch_panic(|| image.load(pages, run.demand.is_none(), buffer));
        let took = start.elapsed();
        if let Some(place) = self.place {
            context.activities.set_at_work(place, true);
        }
        self.pace = (self.pace * 7 + took) / 8;
        let loaded = loaded?;
        if loaded.reads > 0 {
            let counters = context.counters(self.thread);
            counters.source_latency.record(took);
            counters.source_reads.add(loaded.reads);
            region.count(|tally| tally.source_reads.add(loaded.reads as usize));
        }
        // A page of zeros that no file has takes no memory. If one is there already, a zero page can't be mapped.
        let maps_zeros = loaded.is_zero && region.zeropage && run.tries == 0;
        Ok(if maps_zeros { FillContent::Zero } else { FillContent::File })
    }

    /// The content of a run of which some pages were in memory before.
    fn content_that_left(
        &mut self,
        context: &FillContext,
        run: &PageRun,
        residence: &Residence,
    ) -> Result<FillContent, NoContent> {
        let (region, pages, len) = (&*run.region, run.pages(), run.len());
        if len == region.page_size() && residence.content(pages.start) == Content::Staged {
            return Ok(FillContent::Outside(residence.staged(pages.start).cast_const().cast()));
        }
        self.set_reading(context, region);
        let buffer = ensure_capacity_for_disk(&mut self.buffer, len).map_err(|_| NoContent::NoMemory)?;
        let mut at = pages.start;
        let read = loop {
            if at == pages.end {
                break Ok(());
            }
            let content = residence.content(at);
            let end = (at..pages.end).find(|page| residence.content(*page) != content).unwrap_or(pages.end);
            let bytes = (at - pages.start) << region.page_shift..(end - pages.start) << region.page_shift;
            let bytes = &mut buffer[bytes];
            let read = match content {
                Content::Staged => {
                    // SAFETY: the pages rest there, one after the other, as long as the run has their claims.
                    let rest = unsafe { slice::from_raw_parts(residence.staged(at), bytes.len()) };
                    bytes.copy_from_slice(rest);
                    Ok(())
                }
                Content::Spill => residence.read_spilled(at, bytes),
                Content::Source => catch_panic(|| {
                    let offset = region.offset_of(at);
                    if region.source.read(offset, bytes)? == PageData::Zero {
                        bytes.fill(0);
                    }
                    let within = region.within_source(offset, bytes.len());
                    residence.count_read(within);
                    bytes[within..].fill(0);
                    Ok(())
                }),
            };
            if read.is_err() {
                break read;
            }
            at = end;
        };
        if let Some(place) = self.place {
            context.activities.set_at_work(place, true);
        }
        read?;
        context.counters(self.thread).source_reads.add(1);
        Ok(FillContent::Buffer)
    }

    /// A run of zeros.
    fn zeros(run: &PageRun) -> FillContent {
        let region = &*run.region;
        // A marker of write protection stops a zero page, but not a copy.
        if region.zeropage && run.tries == 0 && region.cache.is_none() {
            FillContent::Zero
        } else {
            FillContent::Zeros
        }
    }

    /// The next step when the source didn't deliver.
    pub(super) fn source_failed(
        &mut self,
        context: &FillContext,
        descriptor: &Descriptor,
        run: PageRun,
        attempts: u32,
        error: io::Error,
    ) -> Next {
        context.counters(self.thread).source_errors.add(1);
        run.region.count(|tally| tally.source_errors.add(1));
        if run.purpose == Purpose::Ahead {
            self.failure = Some(error);
            return Next::Done(Outcome::Deferred(Work::Load(run, attempts), RetryAfter::OtherLoad));
        }
        // Retry the faulting page alone: its neighbours may be what the source can't deliver.
        let Some(run) = self.alone(descriptor, run.rest()) else { return Next::Done(Outcome::Settled) };
        let attempts = attempts.saturating_add(1);
        if let Some(delay) = context.retry.delay_after(attempts).filter(|_| !run.region.is_ending()) {
            return Next::Done(Outcome::Deferred(Work::Load(run, attempts), RetryAfter::Delay(delay)));
        }
        if run.tries < MAX_TRIES {
            context.report(Problem::Source {
                region: RegionId(run.region.id),
                address: run.address(),
                offset: run.region.offset_of(run.pages().start),
                error,
                attempts,
            });
            if run.demand.is_some() && run.region.poison {
                context.reports.wait();
            }
        }
        Self::unfillable(context, descriptor, run)
    }

    /// The next step of a page whose content can't be had, which was reported: poison, or what the process's end is.
    pub(super) fn unfillable(context: &FillContext, descriptor: &Descriptor, mut run: PageRun) -> Next {
        let on_end = descriptor.on_end();
        if matches!(on_end, OnEnd::Poison | OnEnd::Finish) {
            return Next::Install(run, FillContent::Poison);
        }
        // A page that no thread waits for is no reason to kill.
        if on_end == OnEnd::Kill && run.demand.is_some() && descriptor.kill() {
            let (descriptor, address) = (DescriptorId(descriptor.id), run.address());
            context.report(Problem::Killed { descriptor, address });
        }
        run.tries = MAX_TRIES;
        run.mark_stuck();
        Next::Done(Outcome::Deferred(Work::Load(run, context.retry.attempts), RetryAfter::LongDelay))
    }

    /// Reduces a run to the page that faulted, and releases the others. `None` if no page faulted.
    pub(crate) fn alone(&self, descriptor: &Descriptor, run: PageRun) -> Option<PageRun> {
        if run.pages().len() == 1 {
            return Some(run);
        }
        let serving = descriptor.lock_shard(self.thread);
        match run.demanded() {
            Some(page) => Some(run.narrow(page, serving.as_ref())),
            None => {
                run.give_up(serving.as_ref());
                None
            }
        }
    }

    /// Defers a fill that the kernel refuses now, with its content.
    pub(crate) fn put_aside(&mut self, run: PageRun, content: FillContent, wait: RetryAfter) -> Outcome {
        let (run, content) = match content {
            FillContent::Buffer => match self.take_content(run) {
                (run, Some(aside)) => (run, FillContent::Aside(aside)),
                (run, None) => return Outcome::Deferred(Work::Load(run, 0), wait),
            },
            content => (run, content),
        };
        Outcome::Deferred(Work::Install(run, content), wait)
    }

    /// Takes the run's content out of the buffer: the buffer itself, or a copy where the buffer is much longer.
    fn take_content(&mut self, run: PageRun) -> (PageRun, Option<Aside>) {
        let (done, len) = (run.done(), run.len());
        let Some(buffer) = self.buffer.take() else { return (run, None) };
        if 2 * len <= buffer.len() {
            let fits = |spare: &&mut Option<MmapMut>| {
                spare.as_ref().is_some_and(|spare| (len..=2 * len).contains(&spare.len()))
            };
            let mut short = self.spare.iter_mut().find(fits).and_then(Option::take);
            if let Ok(copy) = ensure_capacity(&mut short, len) {
                copy[..len].copy_from_slice(&buffer[done..done + len]);
                self.buffer = Some(buffer);
                return (run.rest(), short.and_then(|short| Aside::new(short).ok()));
            }
        }
        match Aside::new(buffer) {
            Ok(aside) => {
                self.buffer = self.spare.iter_mut().find_map(Option::take);
                (run, Some(aside))
            }
            Err(buffer) => {
                self.buffer = Some(buffer);
                (run, None)
            }
        }
    }

    /// Keeps the buffer of installed content as a spare one. That of a load goes back to where loads have theirs from.
    pub(crate) fn put_back(&mut self, context: Option<&FillContext>, content: FillContent) {
        let buffer = match content {
            FillContent::Aside(aside) => aside.into_buffer(),
            FillContent::Loaded(buffer) => {
                return match context {
                    Some(context) => context.in_flight.put_back(buffer),
                    None => drop(buffer),
                };
            }
            _ => None,
        };
        let Some(buffer) = buffer else { return };
        let free = std::iter::once(&mut self.buffer).chain(&mut self.spare).find(|place| place.is_none());
        if let Some(place) = free {
            *place = Some(buffer);
        }
    }
}

/// Bytes of zero pages filled by one call: a longer call would keep changes of the layout waiting.
const MAX_ZERO_BYTES: usize = 4 << 20;

/// The number of bytes from an offset on that are known to be zero.
fn known_zeros(region: &ServedRegion, offset: u64) -> u64 {
    // If the source panics here, its content is read, and that panic is reported.
    catch_panic(|| Ok(region.source.zeros(offset))).unwrap_or(0)
}

/// The number of pages to fill at once where no thread waits: many if they are known to be zero, else `most`.
pub(crate) fn fill_batch_len(region: &ServedRegion, page: usize, most: usize) -> usize {
    let zeros =
        known_zeros(region, region.offset_of(page)).min(MAX_ZERO_BYTES as u64) as usize >> region.page_shift;
    if zeros > 0 { zeros } else { most }
}
