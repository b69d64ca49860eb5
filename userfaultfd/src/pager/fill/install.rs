//! Putting content in place.
//!
//! A fault's page is claimed (`fault`), its content loaded (`load`), and put in place here. Each stands alone: claiming
//! and putting in place happen with the layout locked (see `descriptor`), and loading, which may take any time,
//! without. What changed meanwhile is found out before anything is put in place.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::ffi::c_void;
use std::io;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use memmap2::MmapMut;

use super::fault::{Fault, page_of};
use super::load::{Aside, NoContent, SPARE, grown};
use crate::error::errno_of;
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Descriptor, Serving, at, wake};
use crate::pager::memory::page_run::Run;
use crate::pager::memory::page_state::{End, MAX_TRIES};
use crate::pager::memory::region::Served;
use crate::pager::serve::shared::{Note, Shared};
use crate::pager::sync_point::{Point, reach};
use crate::pager::target::target_is_gone;
use crate::pager::trace::event;
use crate::pager::{Problem, RegionId};
use crate::{ContinueMode, CopyMode, Errno, ZeropageMode, sys};

/// What belongs into a run.
#[derive(Debug)]
pub(crate) enum Content {
    /// Zero pages.
    Zero,
    /// Zeros that are copied, where zero pages can't be had.
    Zeros,
    /// What the memory's file holds, and zeros where it holds nothing: the page was removed, and another mapping or
    /// write(2) may have written the file since.
    File,
    /// Poison: what belongs there can't be had.
    Poison,
    /// In the filler's buffer.
    Buffer,
    /// In a buffer that was put aside.
    Aside(Aside),
    /// In the source's own memory, as long as the region lives.
    Outside(*const c_void),
}

// SAFETY: the pointer leads to bytes of the source, which is `Sync`; only the kernel follows it.
unsafe impl Send for Content {}

/// What is left to be done, later.
#[derive(Debug)]
pub(crate) enum Work {
    /// The fault is to be looked up again.
    Fault(Fault),
    /// Likewise, and no region was there. Its waiters were woken so many times to find that out; `again`: one of them
    /// has faulted again since.
    Stray { fault: Fault, tries: u32, again: bool },
    /// The descriptor is to be read again.
    Read,
    /// The run's content is to be loaded. The source failed so many times.
    Load(Run, u32),
    /// The content is there, and is to be put in place.
    Install(Run, Content),
}

impl Work {
    /// Whether it is for a region that is [ending](crate::pager::memory::region::Served::is_ending): it isn't put off any longer then.
    pub(crate) fn is_ending(&self) -> bool {
        match self {
            Self::Load(run, _) | Self::Install(run, _) => run.region.is_ending(),
            Self::Fault(_) | Self::Stray { .. } | Self::Read => false,
        }
    }
}

/// Bytes that are put in place at once where no thread waits for any of them: meanwhile nobody can change the layout, nor
/// read a descriptor that tells of changes.
const SLICE: usize = 256 << 10;

/// Why filling a run ended.
enum Left {
    /// All is settled.
    Nothing,
    /// Enough for one time: changes, and faults that must be read together with them, come before the rest.
    More,
    /// The rest can't be filled yet.
    Waiting(Errno),
    /// The rest can't be filled.
    Refused(Errno),
    /// It isn't where it was, or something else belongs there.
    Unwanted,
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
    /// The kernel can't do it now. `EAGAIN`: when events were read it is worth trying again. More and more rarely.
    Kernel(Errno),
    /// Somebody else has to do something; more and more rarely.
    Others,
    /// So much time.
    For(Duration),
    /// It was reported, and is tried on rarely.
    Rarely,
}

/// A read of a source that takes longer keeps a thread waiting: about as long as a thread of another CPU takes to wake.
pub(in crate::pager) const SLOW: Duration = Duration::from_micros(50);

/// Fills pages, for one thread.
#[derive(Debug)]
pub(crate) struct Filler {
    /// The number of the thread: its shards, its counters.
    pub(in crate::pager) thread: usize,
    pub(in crate::pager) buffer: Option<MmapMut>,
    /// Buffers whose content was put aside and used since.
    pub(in crate::pager) spare: Vec<MmapMut>,
    /// As long as the longest run of zeros. Nothing is ever written, so that it takes no memory.
    pub(in crate::pager) zeros: Option<MmapMut>,
    /// Where faults come again and again though something is there.
    pub(in crate::pager) suspect: (usize, u8),
    /// Where it is noted what the thread is doing, of a worker.
    pub(in crate::pager) place: Option<usize>,
    /// How long a read of a source has taken lately.
    pub(in crate::pager) pace: Duration,
    /// How many pages were found where nothing is mapped.
    pub(in crate::pager) unmapped: usize,
}

impl Filler {
    pub(crate) fn new(thread: usize) -> Self {
        let spare = Vec::with_capacity(SPARE);
        Self {
            thread,
            buffer: None,
            spare,
            zeros: None,
            suspect: (0, 0),
            place: None,
            pace: Duration::ZERO,
            unmapped: 0,
        }
    }

    /// Begins to fill for a worker, and to note there when it waits for a source. Sources are taken for slow until one has
    /// delivered: what is read together with the first fault would wait for it.
    pub(in crate::pager) fn begin_to_serve(&mut self, place: usize) {
        self.place = Some(place);
        self.pace = SLOW + Duration::from_micros(1);
    }

    /// Whether sources keep this thread waiting, so that faults are better left to the others.
    pub(crate) fn is_slow(&self) -> bool {
        self.pace > SLOW
    }

    /// Poisons in one place what is poisoned in others: of shared memory each mapping has its own poison. How many
    /// pages couldn't be.
    pub(crate) fn poison_here(&self, descriptor: &Descriptor, segment: &Segment) -> usize {
        let region = &segment.region;
        if !region.shared || region.pages.present_and_poisoned().1 == 0 {
            return 0;
        }
        let serving = descriptor.enter(self.thread);
        let Some(serving) = &*serving else { return 0 };
        let is_left = |page: &usize| {
            let Some(address) = segment.address_of(*page) else { return false };
            let now = serving.layout.find(address);
            if !now.is_some_and(|now| Arc::ptr_eq(&now.region, region) && now.page_at(address) == *page) {
                return true;
            }
            let (_, errno, _) = poison(serving, region, address, region.page_size());
            matches!(errno, Some(Errno::EAGAIN | Errno::ENOMEM))
        };
        segment.pages().filter(|page| region.pages.is_poisoned(*page)).filter(is_left).count()
    }

    /// Goes on with what was put off.
    pub(crate) fn resume(&mut self, shared: &Shared, descriptor: &Arc<Descriptor>, work: Work) -> Done {
        match work {
            Work::Fault(fault) => self.fault(shared, descriptor, fault),
            Work::Stray { fault, tries, again } => self.stray_again(shared, descriptor, fault, tries, again),
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
            Work::Fault(fault) | Work::Stray { fault, .. } => {
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
        let mut run = run.rest();
        run.attempts = attempts;
        if attempts > 0 && !self.is_wanted(descriptor, &run) {
            return self.drop_run(shared, descriptor, run);
        }
        match self.content(shared, &run) {
            Ok(content) => {
                if let (Content::Outside(bytes), true) = (&content, descriptor.tells_changes) {
                    // Here, and not while a change waits for the shard: the source's memory may have to be read first.
                    sys::populate(*bytes, run.len());
                }
                self.install(shared, descriptor, run, content)
            }
            Err(NoContent::Source(error)) => self.source_failed(shared, descriptor, run, attempts, error),
            Err(NoContent::NoMemory) => self.no_memory(shared, descriptor, run, attempts),
        }
    }

    /// What to do when there was no memory for a run's content. It is waited for, as where the kernel has none.
    fn no_memory(&mut self, shared: &Shared, descriptor: &Descriptor, run: Run, attempts: u32) -> Done {
        let wait = Wait::Kernel(Errno::ENOMEM);
        if run.is_early {
            return Done::Later(Work::Load(run, attempts), wait);
        }
        if run.pages().len() > 1 {
            // There may be enough for a page.
            return match self.alone(descriptor, run) {
                Some(run) => self.load(shared, descriptor, run, attempts),
                None => Done::Yes,
            };
        }
        if run.region.is_ending() {
            return self.install(shared, descriptor, run, Content::Poison);
        }
        Done::Later(Work::Load(run, attempts), wait)
    }

    /// Whether a run still belongs where it was claimed.
    fn is_wanted(&self, descriptor: &Descriptor, run: &Run) -> bool {
        let serving = descriptor.enter(self.thread);
        serving.as_ref().is_some_and(|serving| run.is_there(serving) && !run.is_outdated())
    }

    /// Gives a run up that was given back, moved, unmapped or removed since: whoever still waits comes back, and finds
    /// what is so now.
    fn drop_run(&self, shared: &Shared, descriptor: &Descriptor, run: Run) -> Done {
        shared.counters(self.thread).dropped.add(1);
        run.give_up(descriptor.enter(self.thread).as_ref());
        Done::Yes
    }

    /// Puts the content of a run in place, if it still belongs there.
    pub(in crate::pager) fn install(
        &mut self,
        shared: &Shared,
        descriptor: &Descriptor,
        mut run: Run,
        content: Content,
    ) -> Done {
        reach(Point::BeforeFill, run.address());
        let left = loop {
            let serving = descriptor.enter(self.thread);
            let left = match &*serving {
                // Content goes to the file before the kernel is asked to map it. The file is the parent's, too, which
                // may be served by another pager since this child has ended, and may have written the page.
                Some(serving)
                    if descriptor.is_child
                        && run.region.cache.is_some()
                        && target_is_gone(&serving.uffd, Some(run.address())) =>
                {
                    Left::Gone
                }
                Some(serving) if run.is_there(serving) && !run.is_outdated() => {
                    self.fill_all(shared, serving, &mut run, &content)
                }
                _ => Left::Unwanted,
            };
            if !matches!(left, Left::More) {
                break left;
            }
        };
        match left {
            Left::More => unreachable!("it was gone on with"),
            Left::Unwanted => {
                self.put_back(content);
                self.drop_run(shared, descriptor, run)
            }
            Left::Nothing => {
                if let Some((_, since)) = run.demand {
                    shared.counters(self.thread).fault_latency.record_since(since);
                }
                self.put_back(content);
                Done::Yes
            }
            Left::Gone => {
                run.give_up(None);
                self.put_back(content);
                Done::Gone
            }
            // At the end nobody waits for memory that may never come: since Linux 7.2 that is also the answer where a
            // file has been cut off.
            Left::Waiting(Errno::ENOMEM | Errno::ENOSPC)
                if run.region.is_ending() && !matches!(content, Content::Poison) =>
            {
                self.put_back(content);
                self.install(shared, descriptor, run, Content::Poison)
            }
            Left::Waiting(errno) => self.put_aside(run, content, Wait::Kernel(errno)),
            Left::Refused(errno) => {
                let unreadable = errno == Errno::EFAULT && matches!(content, Content::Outside(_));
                let poison = matches!(content, Content::Poison);
                self.put_back(content);
                if unreadable {
                    let attempts = run.attempts;
                    return self.source_failed(shared, descriptor, run, attempts, io::Error::from(errno));
                }
                let Some(mut run) = self.alone(descriptor, run) else { return Done::Yes };
                // Of what nobody waits for, who wanted it filled or poisoned is told the number.
                let reported =
                    std::mem::replace(&mut run.tries, MAX_TRIES) == MAX_TRIES || run.demand.is_none();
                let (region, address) = (RegionId(run.region.id), run.address());
                if poison {
                    if !reported {
                        shared.note(Note::Problem(Problem::Unanswered { region, address }));
                    }
                    run.mark_stuck();
                    // Perhaps the memory has gone without a word. Who waits finds out.
                    if let Some(serving) = &*descriptor.enter(self.thread) {
                        wake(&serving.uffd, run.addresses());
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

    /// Fills a run as far as the kernel lets it, and settles what is filled.
    fn fill_all(&mut self, shared: &Shared, serving: &Serving, run: &mut Run, content: &Content) -> Left {
        let start = run.address();
        let mut joined = false;
        // How many pages to fill with one call. A fill stays inside one mapping: beyond that it goes page by page.
        let mut most = usize::MAX;
        let left = loop {
            let pages = run.pages().len().min(most);
            if pages == 0 {
                break Left::Nothing;
            }
            let pages = match (SLICE >> run.region.page_shift).max(1) {
                slice if run.demand.is_none() && pages > slice => {
                    if run.address() != start {
                        break Left::More;
                    }
                    slice
                }
                _ => pages,
            };
            let (filled, errno, end) = self.fill(serving, run, content, pages << run.region.page_shift);
            let filled = filled >> run.region.page_shift;
            if filled > 0 {
                reach(Point::AfterFill, run.address());
            }
            self.count(shared, run, content, filled, end);
            event!(TRACE, "filled", address = run.address(), len = filled << run.region.page_shift);
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
                    self.unmapped += 1;
                    skip(serving, run, End::Released);
                }
                Errno::EEXIST => {
                    shared.counters(self.thread).woken.add(1);
                    if run.demand.is_none() {
                        let end = self.occupied(shared, serving, run, content);
                        skip(serving, run, end);
                        continue;
                    }
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
                Errno::EAGAIN | Errno::ENOMEM | Errno::ENOSPC => break Left::Waiting(errno),
                // A hole was punched between the write and the call.
                Errno::EFAULT if run.region.cache.is_some() && !matches!(content, Content::Poison) => {
                    break Left::Waiting(errno);
                }
                _ => break Left::Refused(errno),
            }
        };
        if joined {
            // Most are awake. One that came after the fill, as the page was taken away again, isn't.
            reach(Point::BeforeWake, start);
            wake(&serving.uffd, start..run.address());
        }
        left
    }

    /// What to make of a page that nobody waits for, where the kernel says that something is there.
    fn occupied(&mut self, shared: &Shared, serving: &Serving, run: &Run, content: &Content) -> End {
        let (uffd, dst, len) = (&serving.uffd, at(run.address()), run.region.page_size());
        // Once more with what a marker of write protection isn't in the way of.
        let again = match content {
            Content::Zero => Content::Zeros,
            // Of huge pages it is the answer to an empty pool, too: where there is nothing, poison can be put.
            Content::Buffer | Content::Outside(_) | Content::Aside(_) | Content::Zeros
                if !run.region.zeropage_possible() =>
            {
                if run.region.shared {
                    // What the page cache has can be mapped. Before there was this there was another answer.
                    let mapped = uffd.continue_with(dst, len, ContinueMode::empty());
                    let is_there = |errno| matches!(errno, Some(Errno::EEXIST | Errno::EINVAL));
                    let is_there = mapped.map_or_else(|error| is_there(error.errno()), |_| true);
                    return if is_there { End::Present } else { End::Contested };
                }
                if !run.region.poison {
                    // Such kernels say ENOMEM of an empty pool.
                    return End::Present;
                }
                Content::Poison
            }
            _ => return End::Present,
        };
        let (_, errno, end) = self.fill(serving, run, &again, len);
        match errno {
            Some(Errno::EEXIST) => End::Present,
            Some(_) => End::Contested,
            None => {
                self.count(shared, run, &again, 1, end);
                end
            }
        }
    }

    /// One step: how many bytes it filled, why it stopped, and what the filled pages are from then on.
    fn fill(
        &mut self,
        serving: &Serving,
        run: &Run,
        content: &Content,
        len: usize,
    ) -> (usize, Option<Errno>, End) {
        if matches!(content, Content::Poison) {
            return poison(serving, &run.region, run.address(), len);
        }
        let (filled, errno) = self.fill_content(serving, run, content, len);
        (filled, errno, End::Present)
    }

    /// One call of the kernel that puts content in place.
    fn fill_content(
        &mut self,
        serving: &Serving,
        run: &Run,
        content: &Content,
        len: usize,
    ) -> (usize, Option<Errno>) {
        let (uffd, dst) = (&serving.uffd, at(run.address()));
        let mut mode = CopyMode::empty();
        mode.set(CopyMode::WRITE_PROTECT, run.region.fills_protected());
        let source = match content {
            Content::Zero if !run.region.fills_protected() => {
                // SAFETY: whoever handed the region over vouches for what its pages come to hold; this one isn't
                // there yet, as the kernel makes sure.
                let result = unsafe { uffd.zeropage_with(dst, len, ZeropageMode::empty()) };
                return answer(result, len);
            }
            Content::File | Content::Poison => std::ptr::null(),
            Content::Zero | Content::Zeros => match grown(&mut self.zeros, len) {
                Ok(zeros) => zeros.as_ptr().cast(),
                Err(_) => return (0, Some(Errno::ENOMEM)),
            },
            Content::Outside(bytes) => bytes.wrapping_byte_add(run.done()),
            Content::Aside(aside) => aside.bytes()[run.done()..].as_ptr().cast(),
            Content::Buffer => self.buffer.as_ref().expect("it was filled")[run.done()..].as_ptr().cast(),
        };
        if let Some(cache) = &run.region.cache {
            let at = run.pages().start << run.region.page_shift;
            if matches!(content, Content::File) {
                if let Err(errno) = cache.allocate(at, len) {
                    return (0, Some(errno));
                }
            } else {
                // Here, and not before: what was removed since must not come back by it.
                // SAFETY: a buffer of this filler has `len` bytes there; a source's own memory isn't used with a cache.
                let bytes = unsafe { slice::from_raw_parts(source.cast::<u8>(), len) };
                if let Err(error) = cache.write(at, bytes) {
                    return (0, Some(errno_of(&error)));
                }
            }
            reach(Point::BeforeMap, run.address());
            let mut mode = ContinueMode::empty();
            mode.set(ContinueMode::WRITE_PROTECT, run.region.fills_protected());
            return answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
        }
        // SAFETY: the source has `len` bytes there: a buffer of this filler, or memory of the region's source, which
        // only the kernel reads. As for the destination, see above.
        let result = unsafe { uffd.copy_with(source, dst, len, mode) };
        answer(result, len)
    }

    fn count(&self, shared: &Shared, run: &Run, content: &Content, pages: usize, end: End) {
        if pages == 0 {
            return;
        }
        let counters = shared.counters(self.thread);
        let filled = run.pages().start..run.pages().start + pages;
        let asked = run.demanded().is_some_and(|page| filled.contains(&page));
        let counter = match content {
            // The file had them.
            Content::Poison if end == End::Present => &counters.continues,
            Content::Poison => {
                if asked {
                    let (region, address) = (RegionId(run.region.id), run.address());
                    shared.note(Note::Problem(Problem::Poisoned { region, address }));
                }
                return counters.poisoned.add(pages as u64);
            }
            Content::Zero => &counters.zero_fills,
            _ if run.region.cache.is_some() => &counters.continues,
            Content::Zeros => &counters.zero_fills,
            Content::Outside(_) | Content::Aside(_) | Content::Buffer | Content::File => &counters.fills,
        };
        counter.add(pages as u64);
        counters.bytes.add((pages << run.region.page_shift) as u64);
        counters.prefetched.add((pages - usize::from(asked)) as u64);
    }
}

/// Ends one page of a run that can't be filled, and wakes who waits for it.
fn skip(serving: &Serving, run: &mut Run, end: End) {
    let address = run.address();
    let _joined = run.settle(1, end);
    reach(Point::BeforeWake, address);
    wake(&serving.uffd, address..address + run.region.page_size());
}

/// Poisons pages, but for those that are in the memory's file: they are mapped, since another mapping or write(2) has
/// written them. Not where pages are filled through the file: what that holds of a page that was never loaded isn't
/// content.
///
/// Does the first pages that are of one kind. How many bytes, why it stopped, and what the pages are from then on.
pub(in crate::pager) fn poison(
    serving: &Serving,
    region: &Served,
    address: usize,
    len: usize,
) -> (usize, Option<Errno>, End) {
    let (uffd, dst) = (&serving.uffd, at(address));
    let mut most = len;
    if region.cache.is_none() {
        let mut mode = ContinueMode::empty();
        mode.set(ContinueMode::WRITE_PROTECT, region.fills_protected());
        let mapped = uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize);
        match answer(mapped, len) {
            (0, Some(Errno::EFAULT)) => most = region.page_size(),
            (0, Some(errno @ (Errno::EEXIST | Errno::EAGAIN | Errno::ENOMEM | Errno::ESRCH))) => {
                return (0, Some(errno), End::Poisoned);
            }
            // Memory without a file, or a kernel that can't map from one.
            (0, Some(_)) => {}
            (mapped, errno) => return (mapped, errno, End::Present),
        }
    }
    let poison = |len| {
        // SAFETY: whoever handed the region over accepts that pages whose content can't be had are SIGBUS.
        answer(unsafe { uffd.poison(dst, len, true) }, len)
    };
    let (poisoned, errno) = match poison(most) {
        // A marker of protection may be in the way. Who touches the page meanwhile waits for this fill.
        (0, Some(Errno::EEXIST)) if region.fills_protected() => {
            let page = region.page_size();
            match uffd.remove_write_protection(dst, page, false) {
                Ok(()) => poison(page),
                Err(error) => (0, error.errno()),
            }
        }
        poisoned => poisoned,
    };
    (poisoned, errno, End::Poisoned)
}

/// How many bytes an operation did, and why it stopped if it did.
pub(in crate::pager) fn answer(result: crate::Result<usize>, len: usize) -> (usize, Option<Errno>) {
    match result {
        Ok(done) if done == len => (done, None),
        // CONTINUE that stopped half-way.
        Ok(done) => (done, Some(Errno::EAGAIN)),
        Err(error) => (error.progress().unwrap_or(0), error.errno().or(Some(Errno::EINVAL))),
    }
}
