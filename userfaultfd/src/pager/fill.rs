//! What a fault leads to: its page is claimed, loaded, and put in place.
//!
//! Each of the three stands alone: claiming and putting in place happen with the layout locked (see `descriptor`), and
//! loading, which may take any time, without. What changed meanwhile is found out before anything is put in place.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::any::Any;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions};

use super::descriptor::{Descriptor, Serving, at, wake};
use super::layout::Segment;
use super::pages::{Claim, End, MAX_TRIES};
use super::point::{Point, reach};
use super::run::Run;
use super::shared::{Note, Shared};
use super::{DescriptorId, Fill, Problem, RegionId};
use crate::{ContinueMode, CopyMode, Errno, FaultKind};

/// A fault that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: usize,
    pub(crate) kind: FaultKind,
    /// When it was read.
    pub(crate) since: Instant,
}

/// What belongs into a run.
#[derive(Debug)]
pub(crate) enum Content {
    /// Zero pages.
    Zero,
    /// Poison: what belongs there can't be had.
    Poison,
    /// In the filler's buffer.
    Buffer,
    /// In a buffer that was put aside.
    Aside(MmapMut),
    /// In the source's own memory, as long as the region lives.
    Outside(*const c_void),
    /// In the page cache of the region's file.
    Cached,
}

// SAFETY: the pointer leads to bytes of the source, which is `Sync`; only the kernel follows it.
unsafe impl Send for Content {}

/// What is left to be done, later.
#[derive(Debug)]
pub(crate) enum Work {
    /// The fault is to be looked up again.
    Fault(Fault),
    /// Likewise, and no region was there.
    Stray(Fault),
    /// The descriptor is to be read again.
    Read,
    /// The run's content is to be loaded. The source failed so many times.
    Load(Run, u32),
    /// The content is there, and is to be put in place.
    Install(Run, Content),
}

/// Why filling a run ended.
enum Left {
    /// All is settled.
    Nothing,
    /// The rest can't be filled yet.
    Waiting(Errno),
    /// The rest can't be filled.
    Refused(Errno),
    /// The process has gone.
    Gone,
}

/// How far a piece of work got.
#[derive(Debug)]
#[must_use]
pub(crate) enum Done {
    /// To its end.
    Yes,
    /// The rest is to be done later, not before the time has passed.
    Later(Work, Wait),
    /// The process has gone.
    Gone,
}

/// What has to happen first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Events are to be read, then it is worth trying again; more and more rarely.
    Events,
    /// Somebody else has to do something; more and more rarely.
    Others,
    /// So much time.
    For(Duration),
    /// It was reported, and is tried on rarely.
    Rarely,
}

/// Fills pages, for one thread.
#[derive(Debug)]
pub(crate) struct Filler {
    /// The number of the thread: its shards, its counters.
    thread: usize,
    buffer: Option<MmapMut>,
    /// Buffers whose content was put aside and used since.
    spare: Vec<MmapMut>,
    /// How many contents are put aside.
    aside: usize,
    /// As long as the longest run of zeros. Nothing is ever written, so that it takes no memory.
    zeros: Option<MmapMut>,
    /// Where faults come again and again though something is there.
    suspect: (usize, u8),
    /// Where faults come again and again though no region is there.
    stray: (usize, u32),
    /// How long a read of a source has taken lately.
    pace: Duration,
}

/// So many contents can be put aside by a thread. What exceeds that is loaded again.
const ASIDE: usize = 8;

/// So many faults in a row on one page that is there are suspicious.
const SUSPICIOUS: u8 = 16;

/// So often a fault comes back to where no region is before it is told.
const STRAY: u32 = 8;

/// A source that fails isn't left alone longer.
const LONGEST: Duration = Duration::from_secs(60);

impl Filler {
    pub(crate) fn new(thread: usize) -> Self {
        let spare = Vec::with_capacity(ASIDE);
        Self {
            thread,
            buffer: None,
            spare,
            aside: 0,
            zeros: None,
            suspect: (0, 0),
            stray: (0, 0),
            pace: Duration::ZERO,
        }
    }

    /// Whether sources keep this thread waiting, so that faults are better left to the others.
    pub(crate) fn is_slow(&self) -> bool {
        self.pace > Duration::from_micros(50)
    }

    /// Does what a fault asks for.
    pub(crate) fn fault(&mut self, shared: &Shared, descriptor: &Descriptor, fault: Fault) -> Done {
        let run = {
            let serving = descriptor.enter(self.thread);
            // Given back meanwhile: who did that wakes everybody.
            let Some(serving) = &*serving else { return Done::Yes };
            let Some(segment) = serving.layout.find(fault.address) else {
                return self.stray(shared, descriptor, fault);
            };
            if matches!(fault.kind, FaultKind::WriteProtected | FaultKind::ReadWriteProtected) {
                return self.unprotect(shared, serving, segment, fault);
            }
            match self.claim(shared, serving, segment, fault) {
                Ok(run) => run,
                Err(done) => return done,
            }
        };
        reach(Point::AfterRead, fault.address);
        if run.tries > 0 {
            // Something was in the way, and nobody knows what: not at full speed.
            let wait = Wait::For(Duration::from_millis(1 << run.tries.min(6)));
            return Done::Later(Work::Load(run, 0), wait);
        }
        self.load(shared, descriptor, run, 0)
    }

    /// Takes the page of a fault, and what is absent in the block around it.
    fn claim(
        &mut self,
        shared: &Shared,
        serving: &Serving,
        segment: &Segment,
        fault: Fault,
    ) -> Result<Run, Done> {
        let counters = shared.counters(self.thread);
        let states = &segment.region.pages;
        let page = segment.page_at(fault.address);
        let mut pages = page..page + 1;
        let claim = states.claim(page);
        let (removed, tries) = match claim {
            Claim::Mine { removed, tries } => (removed, tries),
            Claim::Joined => {
                counters.duplicates.add(1);
                // Who fills it wakes the waiters of this descriptor, unless it fills through that of a relative.
                let again = Done::Later(Work::Fault(fault), Wait::Others);
                return Err(if segment.region.shared { again } else { Done::Yes });
            }
            Claim::Present => return Err(self.present(shared, serving, segment, fault)),
            Claim::Poisoned => return Err(self.poisoned(shared, serving, segment, fault)),
        };
        if tries == 0 {
            let (block, within) = (segment.region.block_of(page), segment.pages());
            let within = block.start.max(within.start)..block.end.min(within.end);
            while pages.start > within.start && states.claim_quietly(pages.start - 1, removed) {
                pages.start -= 1;
            }
            while pages.end < within.end && states.claim_quietly(pages.end, removed) {
                pages.end += 1;
            }
        }
        let mut run = Run::new(segment, pages, removed);
        (run.demand, run.tries) = (Some((page, fault.since)), tries);
        Ok(run)
    }

    /// Takes pages that nobody has asked for: the first absent ones in a range that follow each other, and at most so
    /// many. Returns where to go on looking, too.
    pub(crate) fn claim_ahead(
        &mut self,
        segment: &Segment,
        pages: Range<usize>,
        most: usize,
    ) -> (Option<Run>, usize) {
        let states = &segment.region.pages;
        for page in pages.clone() {
            let Some(removed) = states.claim_absent(page) else { continue };
            let more = page + 1..pages.end.min(page.saturating_add(most));
            let end = page + 1 + more.take_while(|next| states.claim_quietly(*next, removed)).count();
            return (Some(Run::new(segment, page..end, removed)), end);
        }
        (None, pages.end)
    }

    /// Goes on with what was put off.
    pub(crate) fn resume(&mut self, shared: &Shared, descriptor: &Descriptor, work: Work) -> Done {
        match work {
            Work::Fault(fault) => self.fault(shared, descriptor, fault),
            Work::Stray(fault) => self.stray_again(shared, descriptor, fault),
            Work::Read => Done::Yes,
            Work::Load(run, attempts) => self.load(shared, descriptor, run, attempts),
            Work::Install(run, content) => self.install(shared, descriptor, run, content),
        }
    }

    /// Gives up what was put off. Whoever waits for it comes back.
    pub(crate) fn give_up(&mut self, descriptor: &Descriptor, work: Work) {
        let serving = descriptor.enter(self.thread);
        match work {
            Work::Read => {}
            Work::Fault(fault) | Work::Stray(fault) => {
                if let Some(serving) = &*serving {
                    wake(&serving.uffd, page_of(fault.address));
                }
            }
            Work::Load(run, _) => run.give_up(serving.as_ref()),
            Work::Install(run, content) => {
                run.give_up(serving.as_ref());
                self.put_back(content);
            }
        }
    }

    /// Gets the content of a run from its source, and puts it in place.
    pub(crate) fn load(&mut self, shared: &Shared, descriptor: &Descriptor, run: Run, attempts: u32) -> Done {
        let run = run.rest();
        match self.content(shared, &run) {
            Ok(content) => self.install(shared, descriptor, run, content),
            Err(error) => self.source_failed(shared, descriptor, run, attempts, error),
        }
    }

    /// The content of a run, read from its source if need be.
    fn content(&mut self, shared: &Shared, run: &Run) -> io::Result<Content> {
        let (region, len) = (&*run.region, run.len());
        let (offset, at) = (region.offset_of(run.pages().start), run.pages().start << region.page_shift);
        if run.removed {
            return self.zeros(run);
        }
        if region.cache.is_none() {
            let bytes = caught(|| Ok(region.source.bytes(offset, len).filter(|bytes| bytes.len() == len)))?;
            if let Some(bytes) = bytes {
                return Ok(Content::Outside(bytes.as_ptr()));
            }
        }
        let buffer = grown(&mut self.buffer, len)?;
        let counters = shared.counters(self.thread);
        let start = Instant::now();
        let fill = caught(|| region.source.read(offset, &mut buffer[..len]));
        let took = start.elapsed();
        self.pace = (self.pace * 7 + took) / 8;
        counters.source_latency.record(took);
        counters.source_reads.add(1);
        if fill? == Fill::Zero {
            return self.zeros(run);
        }
        buffer[region.within_source(offset, len)..len].fill(0);
        match &region.cache {
            None => Ok(Content::Buffer),
            Some(cache) => cache.write(at, &buffer[..len]).map(|()| Content::Cached),
        }
    }

    /// A run of zeros.
    fn zeros(&mut self, run: &Run) -> io::Result<Content> {
        let (region, len) = (&*run.region, run.len());
        if let Some(cache) = &region.cache {
            let at = run.pages().start << region.page_shift;
            return cache.write(at, &grown(&mut self.zeros, len)?[..len]).map(|()| Content::Cached);
        }
        // A marker of write protection is in the way of a zero page, and not in that of a copy.
        if region.zeropage && run.tries == 0 {
            return Ok(Content::Zero);
        }
        Ok(Content::Outside(grown(&mut self.zeros, len)?.as_ptr().cast()))
    }

    /// Puts the content of a run in place, if it still belongs there.
    fn install(&mut self, shared: &Shared, descriptor: &Descriptor, mut run: Run, content: Content) -> Done {
        reach(Point::BeforeFill, run.address());
        let left = {
            let serving = descriptor.enter(self.thread);
            match &*serving {
                Some(serving) if run.is_there(serving) && !run.is_outdated() => {
                    self.fill_all(shared, serving, &mut run, &content)
                }
                serving => {
                    // Given back, moved, unmapped or removed since: whoever still waits comes back, and finds what
                    // is so now.
                    shared.counters(self.thread).dropped.add(1);
                    run.give_up(serving.as_ref());
                    self.put_back(content);
                    return Done::Yes;
                }
            }
        };
        match left {
            Left::Nothing => {
                if let Some((_, since)) = run.demand {
                    shared.counters(self.thread).fault_latency.record(since.elapsed());
                }
                self.put_back(content);
                Done::Yes
            }
            Left::Gone => {
                run.give_up(None);
                self.put_back(content);
                Done::Gone
            }
            Left::Waiting(errno) => {
                let wait = if errno == Errno::EAGAIN { Wait::Events } else { Wait::Others };
                self.put_aside(run, content, wait)
            }
            Left::Refused(errno) => {
                let unreadable =
                    errno == Errno::EFAULT && matches!(content, Content::Outside(_)) && !run.removed;
                let poison = matches!(content, Content::Poison);
                self.put_back(content);
                if unreadable {
                    return self.source_failed(shared, descriptor, run, 0, io::Error::from(errno));
                }
                let Some(mut run) = self.alone(descriptor, run) else { return Done::Yes };
                let reported = std::mem::replace(&mut run.tries, MAX_TRIES) == MAX_TRIES;
                let (region, address) = (RegionId(run.region.id), run.address());
                if poison {
                    if !reported {
                        shared.note(Note::Problem(Problem::Unanswered { region, address }));
                    }
                    return Done::Later(Work::Load(run, shared.retry.attempts), Wait::Rarely);
                }
                if !reported {
                    shared.note(Note::Problem(Problem::Stuck { region, address, errno }));
                }
                self.install(shared, descriptor, run, Content::Poison)
            }
        }
    }

    /// What to do when the source didn't deliver.
    fn source_failed(
        &mut self,
        shared: &Shared,
        descriptor: &Descriptor,
        run: Run,
        attempts: u32,
        error: io::Error,
    ) -> Done {
        shared.counters(self.thread).source_errors.add(1);
        // The page that is asked for alone: its neighbours may be what can't be had.
        let Some(run) = self.alone(descriptor, run.rest()) else { return Done::Yes };
        let (attempts, retry) = (attempts.saturating_add(1), shared.retry);
        if attempts < retry.attempts {
            let factor = 1u32.checked_shl(attempts - 1).unwrap_or(u32::MAX);
            let delay = retry.delay.saturating_mul(factor).min(LONGEST);
            return Done::Later(Work::Load(run, attempts), Wait::For(delay));
        }
        if run.tries < MAX_TRIES {
            shared.note(Note::Problem(Problem::Source {
                region: RegionId(run.region.id),
                address: run.address(),
                offset: run.region.offset_of(run.pages().start),
                error,
                attempts,
            }));
        }
        self.install(shared, descriptor, run, Content::Poison)
    }

    /// The page that was asked for, without its neighbours, which are given up. `None` if nobody asked.
    fn alone(&self, descriptor: &Descriptor, run: Run) -> Option<Run> {
        if run.pages().len() == 1 {
            return Some(run);
        }
        let serving = descriptor.enter(self.thread);
        match run.demanded() {
            Some(page) => Some(run.narrow(page, serving.as_ref())),
            None => {
                run.give_up(serving.as_ref());
                None
            }
        }
    }

    /// Fills a run as far as the kernel lets it, and settles what is filled.
    fn fill_all(&mut self, shared: &Shared, serving: &Serving, run: &mut Run, content: &Content) -> Left {
        let addresses = run.addresses();
        let end = if matches!(content, Content::Poison) { End::Poisoned } else { End::Present };
        let mut joined = false;
        // How many pages to fill with one call. A fill stays inside one mapping: beyond that it goes page by page.
        let mut most = usize::MAX;
        let left = loop {
            let pages = run.pages().len().min(most);
            if pages == 0 {
                break Left::Nothing;
            }
            let (filled, errno) = self.fill(serving, run, content, pages << run.region.page_shift);
            let filled = filled >> run.region.page_shift;
            self.count(shared, run, content, filled);
            joined |= run.settle(filled, end);
            let Some(errno) = errno.filter(|_| filled == 0) else {
                // After a part the kernel hides why it stopped; the call for the rest tells.
                continue;
            };
            match errno {
                Errno::ENOENT if pages > 1 => most = 1,
                Errno::ENOENT => {
                    // Unmapped, without the pager being told.
                    shared.counters(self.thread).dropped.add(1);
                    skip(serving, run, End::Released);
                }
                Errno::EEXIST => {
                    shared.counters(self.thread).woken.add(1);
                    if run.demanded() == Some(run.pages().start) && run.tries + 1 == MAX_TRIES {
                        shared.note(Note::Problem(Problem::Stuck {
                            region: RegionId(run.region.id),
                            address: run.address(),
                            errno,
                        }));
                    }
                    skip(serving, run, End::Contested);
                }
                Errno::ESRCH => break Left::Gone,
                Errno::EAGAIN | Errno::ENOMEM => break Left::Waiting(errno),
                _ => break Left::Refused(errno),
            }
        };
        reach(Point::AfterFill, addresses.start);
        if joined {
            // Most are awake. One that came after the fill, as the page was taken away again, isn't.
            reach(Point::BeforeWake, addresses.start);
            wake(&serving.uffd, addresses);
        }
        left
    }

    /// One call of the kernel. How many bytes it filled, and why it stopped.
    fn fill(
        &mut self,
        serving: &Serving,
        run: &Run,
        content: &Content,
        len: usize,
    ) -> (usize, Option<Errno>) {
        let (uffd, dst) = (&serving.uffd, at(run.address()));
        let mut mode = CopyMode::empty();
        mode.set(CopyMode::WRITE_PROTECT, run.region.write_protected);
        let source = match content {
            Content::Zero => {
                // SAFETY: whoever handed the region over vouches for what its pages come to hold; this one isn't
                // there yet, as the kernel makes sure.
                let result = unsafe { uffd.zeropage(dst, len, true) };
                return answer(result, len);
            }
            Content::Poison => {
                // SAFETY: whoever handed the region over accepts that pages whose content can't be had are SIGBUS.
                return answer(unsafe { uffd.poison(dst, len, true) }, len);
            }
            Content::Cached => {
                let mut mode = ContinueMode::empty();
                mode.set(ContinueMode::WRITE_PROTECT, run.region.write_protected);
                return answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
            }
            Content::Outside(bytes) => *bytes,
            Content::Aside(buffer) => buffer.as_ptr().cast(),
            Content::Buffer => self.buffer.as_ref().expect("it was filled").as_ptr().cast(),
        };
        let source = source.wrapping_byte_add(run.done());
        // SAFETY: the source has `len` bytes there: a buffer of this filler, or memory of the region's source, which
        // only the kernel reads. As for the destination, see above.
        let result = unsafe { uffd.copy_with(source, dst, len, mode) };
        answer(result, len)
    }

    fn count(&self, shared: &Shared, run: &Run, content: &Content, pages: usize) {
        if pages == 0 {
            return;
        }
        let counters = shared.counters(self.thread);
        let filled = run.pages().start..run.pages().start + pages;
        let asked = run.demanded().is_some_and(|page| filled.contains(&page));
        let counter = match content {
            Content::Poison => {
                if asked {
                    let (region, address) = (RegionId(run.region.id), run.address());
                    shared.note(Note::Problem(Problem::Poisoned { region, address }));
                }
                return counters.poisoned.add(pages as u64);
            }
            Content::Zero => &counters.zero_fills,
            Content::Outside(_) if run.removed => &counters.zero_fills,
            Content::Cached => &counters.continues,
            Content::Outside(_) | Content::Aside(_) | Content::Buffer => &counters.fills,
        };
        counter.add(pages as u64);
        counters.bytes.add((pages << run.region.page_shift) as u64);
        counters.prefetched.add((pages - usize::from(asked)) as u64);
    }

    /// Puts off what can't be filled now, with its content.
    fn put_aside(&mut self, run: Run, content: Content, wait: Wait) -> Done {
        let content = match content {
            Content::Buffer if self.aside < ASIDE => {
                let full = self.buffer.take().expect("it was filled");
                self.buffer = self.spare.pop();
                self.aside += 1;
                Content::Aside(full)
            }
            Content::Buffer => return Done::Later(Work::Load(run, 0), wait),
            content => content,
        };
        Done::Later(Work::Install(run, content), wait)
    }

    /// Keeps the buffer of content that was put aside.
    fn put_back(&mut self, content: Content) {
        if let Content::Aside(buffer) = content {
            self.aside -= 1;
            self.spare.push(buffer);
        }
    }

    /// A fault where no region is. Either it has gone since, and whoever waits is to find that out; or there is none
    /// yet, and who is waked comes back.
    fn stray(&mut self, shared: &Shared, descriptor: &Descriptor, fault: Fault) -> Done {
        let address = page_of(fault.address).start;
        if self.stray.0 != address {
            self.stray = (address, 0);
        }
        self.stray.1 = self.stray.1.saturating_add(1);
        if self.stray.1 == STRAY {
            let descriptor = DescriptorId(descriptor.id);
            shared.note(Note::Problem(Problem::NoRegion { descriptor, address: fault.address }));
        }
        let delay = Duration::from_millis(1 << self.stray.1.min(10));
        Done::Later(Work::Stray(fault), Wait::For(delay))
    }

    fn stray_again(&mut self, shared: &Shared, descriptor: &Descriptor, fault: Fault) -> Done {
        {
            let serving = descriptor.enter(self.thread);
            let Some(serving) = &*serving else { return Done::Yes };
            if serving.layout.find(fault.address).is_none() {
                shared.counters(self.thread).dropped.add(1);
                wake(&serving.uffd, page_of(fault.address));
                return Done::Yes;
            }
        }
        self.fault(shared, descriptor, fault)
    }

    /// A fault on a page that is there, as far as the pager knows.
    ///
    /// Mostly it is one of several on the same page, and everybody is awake. But the page may have been taken away
    /// without a word: by madvise(2) where the descriptor doesn't tell of it, by a hole punched into the file. Then
    /// what belongs there is zero, as everywhere after a removal, or what the page cache has.
    fn present(&mut self, shared: &Shared, serving: &Serving, segment: &Segment, fault: Fault) -> Done {
        let (counters, region) = (shared.counters(self.thread), &*segment.region);
        let (len, page) = (region.page_size(), segment.page_at(fault.address));
        let address = segment.address_of(page).expect("the address is in the segment");
        if self.suspect.0 != address {
            self.suspect = (address, 0);
        }
        self.suspect.1 = self.suspect.1.saturating_add(1);
        let zeros = match grown(&mut self.zeros, len) {
            Ok(zeros) => &zeros[..len],
            Err(_) => return Done::Later(Work::Fault(fault), Wait::Others),
        };
        let (uffd, dst) = (&serving.uffd, at(address));
        let (filled, counter) = if let Some(cache) = &region.cache {
            let mut mode = ContinueMode::empty();
            mode.set(ContinueMode::WRITE_PROTECT, region.write_protected);
            let mut filled = answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
            if filled.1 == Some(Errno::EFAULT) && cache.write(page << region.page_shift, zeros).is_ok() {
                filled = answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
            }
            (filled, &counters.continues)
        } else if region.zeropage && self.suspect.1 < SUSPICIOUS {
            // SAFETY: the page has been taken away, so that zeros are what belongs there, or is there, and stays.
            (answer(unsafe { uffd.zeropage(dst, len, true) }, len), &counters.zero_fills)
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
            Some(Errno::EAGAIN | Errno::ENOMEM) => return Done::Later(Work::Fault(fault), Wait::Events),
            Some(Errno::ESRCH) => return Done::Gone,
            Some(errno) => {
                counters.duplicates.add(1);
                if self.suspect.1 == u8::MAX {
                    let region = RegionId(region.id);
                    shared.note(Note::Problem(Problem::Stuck { region, address, errno }));
                    self.suspect.1 = 0;
                }
                reach(Point::BeforeWake, address);
                wake(uffd, address..address + len);
            }
        }
        Done::Yes
    }

    /// A fault on a page that is poisoned, as far as the pager knows: it came before the poison, or somebody took
    /// that away.
    fn poisoned(&mut self, shared: &Shared, serving: &Serving, segment: &Segment, fault: Fault) -> Done {
        let len = segment.region.page_size();
        let address =
            segment.address_of(segment.page_at(fault.address)).expect("the address is in the segment");
        shared.counters(self.thread).duplicates.add(1);
        // SAFETY: it was poisoned before.
        match answer(unsafe { serving.uffd.poison(at(address), len, true) }, len).1 {
            Some(Errno::EAGAIN | Errno::ENOMEM) => return Done::Later(Work::Fault(fault), Wait::Events),
            Some(Errno::ESRCH) => return Done::Gone,
            Some(_) => wake(&serving.uffd, address..address + len),
            None => {}
        }
        Done::Yes
    }

    /// A fault on a page that is protected: it is let go on.
    fn unprotect(&self, shared: &Shared, serving: &Serving, segment: &Segment, fault: Fault) -> Done {
        let counters = shared.counters(self.thread);
        let len = segment.region.page_size();
        let address =
            segment.address_of(segment.page_at(fault.address)).expect("the address is in the segment");
        let (uffd, start) = (&serving.uffd, at(address));
        let lifted = match fault.kind {
            FaultKind::ReadWriteProtected => uffd.remove_read_write_protection(start, len, true),
            _ => uffd.remove_write_protection(start, len, true),
        };
        match lifted.map_err(|error| error.errno()) {
            Ok(()) => counters.unprotected.add(1),
            Err(Some(Errno::EAGAIN | Errno::ENOMEM)) => return Done::Later(Work::Fault(fault), Wait::Events),
            Err(Some(Errno::ESRCH)) => return Done::Gone,
            Err(_) => {
                counters.dropped.add(1);
                wake(uffd, address..address + len);
            }
        }
        counters.fault_latency.record(fault.since.elapsed());
        Done::Yes
    }
}

/// Ends one page of a run that can't be filled, and wakes who waits for it.
fn skip(serving: &Serving, run: &mut Run, end: End) {
    let address = run.address();
    let _joined = run.settle(1, end);
    reach(Point::BeforeWake, address);
    wake(&serving.uffd, address..address + run.region.page_size());
}

/// How many bytes an operation did, and why it stopped if it did.
fn answer(result: crate::Result<usize>, len: usize) -> (usize, Option<Errno>) {
    match result {
        Ok(done) if done == len => (done, None),
        // CONTINUE that stopped half-way.
        Ok(done) => (done, Some(Errno::EAGAIN)),
        Err(error) => (error.progress().unwrap_or(0), error.errno().or(Some(Errno::EINVAL))),
    }
}

/// The page of the base size at an address.
fn page_of(address: usize) -> Range<usize> {
    let page = crate::page_size();
    let start = address & !(page - 1);
    start..start + page
}

/// A buffer of at least `len` bytes. It is mapped: nothing that a thread which forks has locked is needed.
fn grown(buffer: &mut Option<MmapMut>, len: usize) -> io::Result<&mut MmapMut> {
    if buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
        *buffer = Some(MmapOptions::new().len(len).no_reserve_swap().map_anon()?);
    }
    buffer.as_mut().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Calls a source. Its panic is an error like any other.
fn caught<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    panic::catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|panic| Err(io::Error::other(format!("the source panicked: {}", message(&*panic)))))
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn Any + Send)) -> &str {
    let message = panic.downcast_ref::<&str>().copied();
    message.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("something")
}
