//! The last step of a fill: installing content.
//!
//! A fault's page is claimed (`fault`), its content loaded (`load`), and installed here. Claiming and installing happen
//! with the layout locked (see `descriptor`), and loading, which may take any time, without. Before content is
//! installed, changes since the claim are noticed.

#![expect(unsafe_code, reason = "filling memory that the owner of a region handed over")]

use std::io;
use std::slice;

use super::buffers::ensure_capacity;
use super::context::FillContext;
use super::filler::{Next, PageFiller};
use super::poison::poison;
use super::work::{FillContent, Outcome, RetryAfter, Work, answer};
use crate::error::errno_of;
use crate::pager::memory::descriptor::{Attachment, Descriptor, addr_to_ptr, wake};
use crate::pager::memory::page_run::{PageRun, Purpose};
use crate::pager::memory::page_state::{MAX_TRIES, Settlement};
use crate::pager::stats::{Tallied, Tally};
use crate::pager::target::target_is_gone;
use crate::pager::trace::event;
use crate::pager::{Problem, RegionId};
use crate::sync_point::{Point, reach};
use crate::{ContinueMode, CopyMode, Errno, ZeropageMode};

/// Bytes installed under one lock where no thread waits for any of them: meanwhile no thread can change the layout, nor
/// read a descriptor that reports changes.
const SLICE_BYTES: usize = 256 << 10;

/// Why the fill of a run stopped.
enum Stop {
    /// All pages are settled.
    Settled,
    /// A slice is done: changes, and faults that must be read together with them, come before the rest.
    SliceDone,
    /// The rest can't be filled yet.
    KernelBusy(Errno),
    /// The rest can't be filled.
    Refused(Errno),
    /// The file doesn't have the next page, which was removed: it must be loaded.
    NotInFile,
    /// The run has moved, or other content belongs there now.
    Outdated,
    /// The process is gone.
    TargetGone,
}

impl PageFiller {
    /// Whether a run still belongs where it was claimed.
    pub(super) fn is_wanted(&self, descriptor: &Descriptor, run: &PageRun) -> bool {
        let serving = descriptor.lock_shard(self.thread);
        serving.as_ref().is_some_and(|serving| run.is_there(serving) && !run.is_outdated())
    }

    /// Releases a run that was handed over, moved, unmapped or removed since: threads that still wait fault again, and find
    /// the present state.
    pub(super) fn drop_run(&self, context: &FillContext, descriptor: &Descriptor, run: PageRun) -> Next {
        context.counters(self.thread).dropped.add(1);
        run.give_up(descriptor.lock_shard(self.thread).as_ref());
        Next::Done(Outcome::Settled)
    }

    /// Installs the content of a run, if it still belongs there.
    pub(super) fn install(
        &mut self,
        context: &FillContext,
        descriptor: &Descriptor,
        mut run: PageRun,
        content: FillContent,
    ) -> Next {
        reach(Point::BeforeFill, run.address());
        let left = loop {
            let serving = descriptor.lock_shard(self.thread);
            let left = match &*serving {
                // Content is written to the file before the kernel maps it. The file belongs to the parent, too; if this
                // child has ended, another pager may serve the parent and have written the page.
                Some(serving)
                    if descriptor.is_child
                        && run.region.cache.is_some()
                        && target_is_gone(&serving.uffd, Some(run.address())) =>
                {
                    Stop::TargetGone
                }
                Some(serving) if run.is_there(serving) && !run.is_outdated() => {
                    self.fill_all(context, serving, &mut run, &content)
                }
                _ => Stop::Outdated,
            };
            if !matches!(left, Stop::SliceDone) {
                break left;
            }
        };
        match left {
            Stop::SliceDone => unreachable!("it was gone on with"),
            Stop::Outdated => {
                self.put_back(Some(context), content);
                self.drop_run(context, descriptor, run)
            }
            Stop::Settled => {
                if let Some((_, since)) = run.demand {
                    context.counters(self.thread).fault_latency.record_since(since);
                }
                self.put_back(Some(context), content);
                Next::Done(Outcome::Settled)
            }
            Stop::TargetGone => {
                run.give_up(None);
                self.put_back(Some(context), content);
                Next::Done(Outcome::TargetGone)
            }
            // At the end of service no thread waits for memory that may never come: since Linux 7.2 ENOMEM also means
            // that the file was cut off.
            Stop::KernelBusy(Errno::ENOMEM | Errno::ENOSPC)
                if run.region.is_ending() && !matches!(content, FillContent::Poison) =>
            {
                self.put_back(Some(context), content);
                Next::Install(run, FillContent::Poison)
            }
            Stop::NotInFile => {
                let attempts = run.attempts;
                run.mark_not_in_file();
                Next::Load(run, attempts)
            }
            Stop::KernelBusy(errno) => {
                Next::Done(self.put_aside(run, content, RetryAfter::KernelBusy(errno)))
            }
            Stop::Refused(errno) => {
                let unreadable = errno == Errno::EFAULT && matches!(content, FillContent::Outside(_));
                let poison = matches!(content, FillContent::Poison);
                self.put_back(Some(context), content);
                if unreadable {
                    let attempts = run.attempts;
                    // A cache took its bytes back, for want of room, or its file was cut off: the source is read before
                    // anything has failed.
                    if run.mark_unreadable() {
                        return Next::Load(run, attempts);
                    }
                    return self.source_failed(context, descriptor, run, attempts, io::Error::from(errno));
                }
                let Some(mut run) = self.alone(descriptor, run) else { return Next::Done(Outcome::Settled) };
                // For pages that no thread waits for, the caller reports their number.
                let reported =
                    std::mem::replace(&mut run.tries, MAX_TRIES) == MAX_TRIES || run.demand.is_none();
                let (region, address) = (RegionId(run.region.id), run.address());
                if poison {
                    if !reported {
                        context.report(Problem::Unresolved { region, address });
                    }
                    run.mark_stuck();
                    // Perhaps the memory was unmapped without an event. The waiting thread finds out.
                    if let Some(serving) = &*descriptor.lock_shard(self.thread) {
                        wake(&serving.uffd, run.addresses());
                    }
                    let work = Work::Load(run, context.retry.attempts);
                    return Next::Done(Outcome::Deferred(work, RetryAfter::LongDelay));
                }
                if !reported {
                    context.report(Problem::Stuck { region, address, errno });
                }
                Self::unfillable(context, descriptor, run)
            }
        }
    }

    /// Fills a run as far as the kernel allows, and settles the filled pages.
    fn fill_all(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        run: &mut PageRun,
        content: &FillContent,
    ) -> Stop {
        let start = run.address();
        let mut joined = false;
        // Pages to fill with one call. A call stays inside one mapping; across a border it goes page by page.
        let mut most = usize::MAX;
        let left = loop {
            let pages = run.pages().len().min(most);
            if pages == 0 {
                break Stop::Settled;
            }
            let pages = match (SLICE_BYTES >> run.region.page_shift).max(1) {
                slice if run.demand.is_none() && pages > slice => {
                    if run.address() != start {
                        break Stop::SliceDone;
                    }
                    slice
                }
                _ => pages,
            };
            let pages = if run.region.residence.is_some() { alone_if_written(run, pages) } else { pages };
            let (filled, errno, end) = self.fill(serving, run, content, pages << run.region.page_shift);
            let filled = filled >> run.region.page_shift;
            if filled > 0 {
                reach(Point::AfterFill, run.address());
            }
            self.count(context, run, content, filled, end);
            event!(TRACE, "filled", address = run.address(), len = filled << run.region.page_shift);
            joined |= run.settle(filled, end);
            self.placed += if end == Settlement::Present { filled } else { 0 };
            let Some(errno) = errno.filter(|_| filled == 0) else {
                // After a partial fill the kernel hides the reason; the call for the rest returns it.
                continue;
            };
            // The kernel's errno for the first page that isn't filled. The same on all releases unless one is named.
            match errno {
                // The range leaves its mapping, and nothing of it was filled: a call stays inside one.
                Errno::ENOENT if pages > 1 => most = 1,
                // Nothing is mapped at the page, or nothing that is registered: unmapped, without the pager being told.
                Errno::ENOENT => {
                    context.counters(self.thread).dropped.add(1);
                    self.unmapped += 1;
                    run.skip(serving, Settlement::Released);
                }
                // It is there, or the file has it: what another mapping or write(2) has made of a removed page.
                // Private huge pages are left to what comes next, as none may be left for this one.
                Errno::EEXIST
                    if run.may_be_there() && (run.region.shared || run.region.zeropage_possible()) =>
                {
                    context.counters(self.thread).woken.add(1);
                    match map_from_file(serving, run) {
                        None => {
                            run.skip(serving, Settlement::Present);
                            self.placed += 1;
                        }
                        Some(Errno::ESRCH) => break Stop::TargetGone,
                        // Removed once more, or, of huge pages, no page is left for it.
                        Some(errno) => break Stop::KernelBusy(errno),
                    }
                }
                // A page is present, or a marker: of poison, of write protection, which stops ZEROPAGE, or, since Linux
                // 7.2, of a guard page, which was overwritten before. On hugetlb memory the pool may be empty, too:
                // ENOMEM up to 6.12, EEXIST in 6.18.
                Errno::EEXIST => {
                    context.counters(self.thread).woken.add(1);
                    if run.demand.is_none() {
                        let end = self.occupied(context, serving, run, content);
                        run.skip(serving, end);
                        self.placed += usize::from(end == Settlement::Present);
                        continue;
                    }
                    if run.demanded() == Some(run.pages().start) && run.tries + 1 == MAX_TRIES {
                        context.report(Problem::Stuck {
                            region: RegionId(run.region.id),
                            address: run.address(),
                            errno,
                        });
                    }
                    run.skip(serving, Settlement::Contested);
                }
                // The process has ended, or executed another program.
                Errno::ESRCH => break Stop::TargetGone,
                // EAGAIN: the layout is changing; it ends once the event was read and the thread that makes the change
                // has run on. ENOMEM: no memory for the page or its table, also of a cgroup, or a tmpfs is full; since
                // Linux 7.2 the page may lie beyond the end of its file, too. ENOSPC: the file of a minor region.
                Errno::EAGAIN | Errno::ENOMEM | Errno::ENOSPC => break Stop::KernelBusy(errno),
                // EFAULT: the file has no such page. EINVAL: the kernel can't map from it.
                Errno::EFAULT | Errno::EINVAL if run.is_reload() && matches!(content, FillContent::File) => {
                    break Stop::NotInFile;
                }
                // CONTINUE finds no page in the cache: a hole was punched between the write and the call.
                Errno::EFAULT if is_written_to_file(run) && !matches!(content, FillContent::Poison) => {
                    break Stop::KernelBusy(errno);
                }
                // EFAULT: the source's own memory can't be read, or, before Linux 7.2, the page lies beyond the end of its
                // file. EINVAL: the memory isn't what the region says. EIO and others: the file of a minor region.
                _ => break Stop::Refused(errno),
            }
        };
        if joined {
            // Most waiters are awake. One that came after the fill, when the page was removed again, isn't.
            reach(Point::BeforeWake, start);
            wake(&serving.uffd, start..run.address());
        }
        left
    }

    /// Decides about a page that no thread waits for and that the kernel reports as present.
    fn occupied(
        &mut self,
        context: &FillContext,
        serving: &Attachment,
        run: &PageRun,
        content: &FillContent,
    ) -> Settlement {
        let (uffd, dst, len) = (&serving.uffd, addr_to_ptr(run.address()), run.region.page_size());
        // Retry with a copy, which a marker of write protection doesn't stop.
        let again = match content {
            FillContent::Zero => FillContent::Zeros,
            // For huge pages EEXIST also means an empty pool: a page that can be poisoned is empty.
            FillContent::Buffer
            | FillContent::Outside(_)
            | FillContent::Aside(_)
            | FillContent::Loaded(_)
            | FillContent::Zeros
                if !run.region.zeropage_possible() =>
            {
                if run.region.shared {
                    // CONTINUE maps what the page cache has. Kernels without it return another errno.
                    let mapped = uffd.continue_with(dst, len, ContinueMode::empty());
                    let is_there = |errno| matches!(errno, Some(Errno::EEXIST | Errno::EINVAL));
                    let is_there = mapped.map_or_else(|error| is_there(error.errno()), |_| true);
                    return if is_there { Settlement::Present } else { Settlement::Contested };
                }
                if !run.region.poison {
                    // Such kernels return ENOMEM for an empty pool.
                    return Settlement::Present;
                }
                if run.purpose == Purpose::Ahead {
                    // Poison would stay when the pool has pages again. A fault, or the end of service, finds out.
                    return Settlement::Released;
                }
                FillContent::Poison
            }
            _ => return Settlement::Present,
        };
        let (_, errno, end) = self.fill(serving, run, &again, len);
        match errno {
            Some(Errno::EEXIST) => Settlement::Present,
            Some(_) => Settlement::Contested,
            None => {
                self.count(context, run, &again, 1, end);
                end
            }
        }
    }

    /// One step. Returns the filled bytes, the error on which it stopped, and the new state of the filled pages.
    fn fill(
        &mut self,
        serving: &Attachment,
        run: &PageRun,
        content: &FillContent,
        len: usize,
    ) -> (usize, Option<Errno>, Settlement) {
        if matches!(content, FillContent::Poison) {
            return poison(serving, &run.region, run.address(), len, run.may_be_there());
        }
        let (filled, errno) = self.fill_content(serving, run, content, len);
        (filled, errno, Settlement::Present)
    }

    /// Makes the call to the kernel that installs content.
    fn fill_content(
        &mut self,
        serving: &Attachment,
        run: &PageRun,
        content: &FillContent,
        len: usize,
    ) -> (usize, Option<Errno>) {
        let (uffd, dst) = (&serving.uffd, addr_to_ptr(run.address()));
        let mut mode = CopyMode::empty();
        // A page that is about to be written needs no protection that tells of it.
        let is_written = run.region.residence.is_some() && run.is_written(run.pages().start);
        mode.set(CopyMode::WRITE_PROTECT, run.region.fills_protected() && !is_written);
        let source = match content {
            FillContent::Zero if !run.region.fills_protected() => {
                // SAFETY: the caller who added the region vouches for what its pages come to hold; the kernel makes
                // sure that this one is missing.
                let result = unsafe { uffd.zeropage_with(dst, len, ZeropageMode::empty()) };
                return answer(result, len);
            }
            FillContent::File | FillContent::Poison => std::ptr::null(),
            FillContent::Zero | FillContent::Zeros => match ensure_capacity(&mut self.zeros, len) {
                Ok(zeros) => zeros.as_ptr().cast(),
                Err(_) => return (0, Some(Errno::ENOMEM)),
            },
            FillContent::Outside(bytes) => bytes.wrapping_byte_add(run.done()),
            FillContent::Aside(aside) => aside.bytes()[run.done()..].as_ptr().cast(),
            FillContent::Loaded(buffer) => buffer[run.done()..].as_ptr().cast(),
            FillContent::Buffer => self.buffer.as_ref().expect("it was filled")[run.done()..].as_ptr().cast(),
        };
        let is_file = matches!(content, FillContent::File);
        if let Some(cache) = run.region.cache.as_ref().filter(|_| is_written_to_file(run)) {
            let at = run.pages().start << run.region.page_shift;
            if is_file {
                if let Err(errno) = cache.allocate(at, len) {
                    return (0, Some(errno));
                }
            } else {
                // Written here and not earlier: a page that was removed since must not come back by it.
                // SAFETY: a buffer of this filler has `len` bytes there, or the page rests there, whose claim the run has; a
                // source's own memory isn't used with a cache.
                let bytes = unsafe { slice::from_raw_parts(source.cast::<u8>(), len) };
                if let Err(error) = cache.write(at, bytes) {
                    return (0, Some(errno_of(&error)));
                }
            }
        }
        if is_file || is_written_to_file(run) {
            reach(Point::BeforeMap, run.address());
            let mut mode = ContinueMode::empty();
            mode.set(ContinueMode::WRITE_PROTECT, run.region.fills_protected() && !is_written);
            return answer(uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize), len);
        }
        // SAFETY: the source has `len` bytes there: a buffer of this filler, or memory of the region's source, which
        // only the kernel reads. As for the destination, see above.
        let result = unsafe { uffd.copy_with(source, dst, len, mode) };
        answer(result, len)
    }

    pub(super) fn count(
        &self,
        context: &FillContext,
        run: &PageRun,
        content: &FillContent,
        pages: usize,
        end: Settlement,
    ) {
        if pages == 0 {
            return;
        }
        let counters = context.counters(self.thread);
        let filled = run.pages().start..run.pages().start + pages;
        let asked = run.demanded().is_some_and(|page| filled.contains(&page));
        let (counter, tallied): (_, fn(&Tally) -> &Tallied) = match content {
            // The file had these pages.
            FillContent::Poison if end == Settlement::Present => {
                (&counters.continues, |tally| &tally.continues)
            }
            FillContent::Poison => {
                if asked {
                    let (region, address) = (RegionId(run.region.id), run.address());
                    context.report(Problem::Poisoned { region, address });
                }
                run.region.count(|tally| tally.poisoned.add(pages));
                return counters.poisoned.add(pages as u64);
            }
            FillContent::Zero => (&counters.zero_fills, |tally| &tally.zero_fills),
            FillContent::File => (&counters.continues, |tally| &tally.continues),
            _ if is_written_to_file(run) => (&counters.continues, |tally| &tally.continues),
            FillContent::Zeros => (&counters.zero_fills, |tally| &tally.zero_fills),
            FillContent::Outside(_)
            | FillContent::Aside(_)
            | FillContent::Loaded(_)
            | FillContent::Buffer => (&counters.fills, |tally| &tally.fills),
        };
        run.region.count(|tally| {
            tallied(tally).add(pages);
            tally.prefetched.add(pages - usize::from(asked));
        });
        counter.add(pages as u64);
        counters.bytes.add((pages << run.region.page_shift) as u64);
        counters.prefetched.add((pages - usize::from(asked)) as u64);
    }
}

/// Whether content gets to a run's pages by the file, in the place of whatever that has. What may be there is copied to the
/// memory instead, by which the kernel puts it into the file if that doesn't have the page.
fn is_written_to_file(run: &PageRun) -> bool {
    run.region.cache.is_some() && !run.may_be_there()
}

/// Maps the next page of a run from the file, if it isn't mapped. Returns why that isn't possible.
fn map_from_file(serving: &Attachment, run: &PageRun) -> Option<Errno> {
    let region = &run.region;
    if !region.shared {
        return None;
    }
    let mut mode = ContinueMode::empty();
    mode.set(ContinueMode::WRITE_PROTECT, region.fills_protected());
    let mapped = serving.uffd.continue_with(addr_to_ptr(run.address()), region.page_size(), mode);
    // EINVAL: a kernel without it, which maps such a page for an access.
    mapped
        .err()
        .and_then(|error| error.errno())
        .filter(|errno| !matches!(errno, Errno::EEXIST | Errno::EINVAL))
}

/// How many of the next pages to fill at once, so that one that is about to be written is filled by itself.
fn alone_if_written(run: &PageRun, pages: usize) -> usize {
    let next = run.pages().start;
    (next..next + pages).position(|page| run.is_written(page)).map_or(pages, |before| before.max(1))
}
