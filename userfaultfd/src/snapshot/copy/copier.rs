//! The thread that saves pages: those about to be written first, the others in order.
//!
//! A page is read, then the kernel is asked whether it is still protected, then whether the layout was still the one
//! that is known when it was read. Only then it is delivered. A page that is protected need not be the page that it
//! seems: mremap(2) may have put another one there, or another program may have mapped and protected its own. Whoever
//! changes the layout waits until the event is read, and as long as that is so the kernel says that the layout changes.
//! So what was read is [kept](Kept) until it doesn't, or until a look at everything shows that nothing is where it
//! shouldn't be.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::bits::Bits;
use super::layout::{Layout, Mapped, Part};
use super::look::ChunkView;
use super::queue::{Buffer, End, Item, Payload, Queue, Size};
use super::shared::{Counts, Shared};
use super::slices::Slices;
use crate::error::errno_of;
use crate::owner::InheritedFd;
use crate::proc_maps::Process;
use crate::snapshot::options::Removal;
use crate::sync::AtomicU64;
use crate::sync_point::{Moment, Point, reach};
use crate::watch::{Watch, Words, pointer};
use crate::{Errno, Error, Event, FaultKind, Result, Uffd, page_size, sys};

/// How long pages that can't be read, or aren't protected any more, are looked at again: the event that says why may be
/// on its way.
const DOUBT_TIME: Duration = Duration::from_millis(200);

/// Milliseconds between two looks.
const DOUBT_MS: i32 = 10;

/// How often an operation is tried while the memory layout changes, before something else is done about it.
pub(crate) const MAX_LAYOUT_TRIES: u32 = 50;

/// The snapshot that is at work.
#[derive(Debug)]
pub(crate) struct Active {
    queue: Arc<Queue>,
    counts: Arc<Counts>,
    /// What is still to be read.
    pub(crate) pending: Bits,
    /// What was read, and isn't delivered yet.
    kept: Vec<Kept>,
    /// All that the snapshot is to hold.
    wanted: Bits,
    /// Pages whose removal was read before the snapshot's moment. They may have been dropped since, or may be at any time.
    removed: Bits,
    /// Those of them that are still to be saved, and were seen mapped and not protected: dropped, unless an event that
    /// isn't read yet tells that something else lies there.
    pub(crate) dropped: Bits,
    /// Where the walk is.
    pub(crate) cursor: usize,
    /// A change of the layout waits to be read, and with it the thread that makes it.
    pub(crate) change_waits: bool,
    /// Until when pages in doubt are looked at again.
    doubt_until: Option<Instant>,
    /// All has been saved; the sink is still at it.
    pub(crate) draining: bool,
}

/// What was read of some pages that were protected.
#[derive(Debug)]
struct Kept {
    part: Part,
    buffer: Buffer,
    /// It was read because it was about to be written.
    on_write: bool,
}

impl Active {
    pub(crate) fn new(queue: Arc<Queue>, counts: Arc<Counts>, wanted: Bits, removed: Bits) -> Self {
        Self {
            queue,
            counts,
            dropped: Bits::new(wanted.len(), false),
            pending: wanted.clone(),
            kept: Vec::new(),
            wanted,
            removed,
            cursor: 0,
            change_waits: false,
            doubt_until: None,
            draining: false,
        }
    }

    /// Whether something is still to be saved.
    pub(crate) fn is_pending(&self) -> bool {
        !self.kept.is_empty() || self.pending.next(self.cursor).or_else(|| self.pending.next(0)).is_some()
    }

    /// Whether a page was read, and isn't delivered yet.
    fn keeps(&self, page: &Part) -> bool {
        let within =
            |kept: &Kept| (kept.part.offset..kept.part.offset + kept.part.len).contains(&page.offset);
        self.kept.iter().any(within)
    }

    /// Forgets what was read from some addresses.
    pub(crate) fn discard(&mut self, range: &Range<usize>) {
        for index in (0..self.kept.len()).rev() {
            let part = &self.kept[index].part;
            if part.address < range.end && part.address + part.len > range.start {
                let kept = self.kept.swap_remove(index);
                self.pending.set(bits_of(&kept.part), true);
                self.queue.give_back(kept.buffer);
                self.cursor = 0;
            }
        }
    }
}

/// Whether a page may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writable {
    Now,
    /// It isn't saved yet.
    Later,
    /// Whoever writes it has been woken, and finds out.
    Again,
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Pages that aren't protected, though they should be.
    pub(crate) pages: usize,
    /// Those of them that can't be protected: guard pages, poisoned pages.
    pub(crate) markers: usize,
}

/// Whether pages were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    /// They are kept, or known without.
    Yes,
    /// There is no buffer.
    Full,
    /// They can't be read, or aren't protected.
    Doubt,
}

pub(crate) struct Copier {
    pub(crate) watch: Arc<Watch>,
    /// A second descriptor of the same process. Nothing is registered with it, so no change of the layout is its, and the
    /// kernel refuses nothing: it doesn't ask with which descriptor the memory is registered that is protected. `None` for
    /// memory of another process, and where the kernel doesn't tell what is protected.
    pub(crate) beside: Option<Uffd>,
    shared: Arc<Shared>,
    pub(crate) layout: Layout,
    pub(crate) removal: Removal,
    /// Pages stay protected after they are saved: what changes is for the next snapshot.
    series: bool,
    pub(crate) look: ChunkView,
    chunk: usize,
    /// What has changed since the last snapshot began; at first everything.
    pub(crate) dirty: Bits,
    /// What isn't protected, as far as is known.
    pub(crate) unprotected: Bits,
    /// A snapshot is beginning: memory is protected by its addresses, whatever lies there by now.
    pub(crate) begins: bool,
    /// Pages whose removal was read since the last snapshot began. They may go at any time.
    pub(crate) removed: Bits,
    /// The mappings in which all lay when a snapshot began, or when the layout was last looked at.
    pub(crate) mapped: Mapped,
    /// Pages that may go and seem protected all the same.
    pub(crate) silent: Bits,
    pub(crate) active: Option<Active>,
    /// Faults that can't be resolved yet.
    pub(crate) held: VecDeque<Event>,
    /// How often the first of them was refused, since the layout changes. Zero: it waits for a buffer.
    pub(crate) changing: u32,
    /// How often a page that is about to be written was in doubt.
    pub(crate) doubted: u32,
    /// How often what was read couldn't be delivered, since the layout changes.
    stalled: u32,
    pub(crate) fdinfo: File,
    words: Words,
    done: bool,
}

impl Drop for Copier {
    fn drop(&mut self) {
        // They are closed now.
        self.shared.inherited.get().into_iter().flatten().for_each(InheritedFd::forget);
    }
}

impl Copier {
    pub(crate) fn new(
        watch: Arc<Watch>,
        beside: Option<Uffd>,
        shared: Arc<Shared>,
        layout: Layout,
        (removal, series, look): (Removal, bool, ChunkView),
        silent: Bits,
        chunk: usize,
    ) -> io::Result<Self> {
        let pages = silent.len();
        let fdinfo = File::open(format!("/proc/self/fdinfo/{}", watch.uffd.as_raw_fd()))?;
        let owned = [watch.uffd.as_fd(), watch.pagemap.as_fd(), fdinfo.as_fd()];
        let owned = owned.into_iter().chain(beside.as_ref().map(AsFd::as_fd));
        shared.inherited.get_or_init(|| owned.map(InheritedFd::new).collect());
        Ok(Self {
            fdinfo,
            watch,
            beside,
            shared,
            layout,
            removal,
            series,
            look,
            chunk,
            dirty: Bits::new(pages, true),
            unprotected: Bits::new(pages, true),
            begins: false,
            removed: Bits::new(pages, false),
            mapped: Mapped::default(),
            silent,
            active: None,
            held: VecDeque::with_capacity(64),
            changing: 0,
            doubted: 0,
            stalled: 0,
            words: Words::default(),
            done: false,
        })
    }

    /// Works until it is told to end, or, if it isn't for a series, a snapshot has been taken.
    pub(crate) fn run(mut self) {
        let result = self.work();
        if let Some(active) = self.active.take() {
            active.queue.fail(result.as_ref().err().and_then(Error::errno));
        }
        let freed = self.finish();
        let mut state = self.shared.lock();
        state.busy = false;
        state.ended = Some(result.and(freed).err().and_then(|error| error.errno()));
        drop(state);
        self.shared.answered.notify_all();
    }

    /// Lifts all protection, and forgets the memory. While the kernel unregisters, nobody may fault in a page.
    fn finish(&mut self) -> Result<()> {
        // What can't be done so, as where there are too many mappings already, is done at once.
        let _in_slices = self.free_in_slices();
        let freed = self.free();
        self.layout = Layout::default();
        freed
    }

    fn free_in_slices(&mut self) -> Result<()> {
        let mut slices = Slices::new();
        while let Some(part) = self.layout.parts().first().cloned() {
            let Part { address, len, .. } = slices.cut(part);
            match slices.time(|| self.watch.uffd.unregister_unexplained(pointer(address), len)) {
                // Unmapped by now.
                Ok(()) | Err(Error::SystemError(Errno::EINVAL)) => {}
                Err(error) => return Err(error),
            }
            self.layout.remove(&(address..address + len));
            self.let_go_on()?;
        }
        Ok(())
    }

    /// Lifts all protection at once.
    pub(crate) fn free(&self) -> Result<()> {
        let mut result = Ok(());
        for part in self.layout.parts() {
            match self.watch.uffd.unregister_unexplained(pointer(part.address), part.len) {
                // Unmapped by now.
                Err(Error::SystemError(Errno::EINVAL)) => {}
                other => result = result.and(other),
            }
        }
        result
    }

    fn work(&mut self) -> Result<()> {
        while !self.done {
            self.drain_wakes()?;
            if self.shared.lock().end {
                return Ok(());
            }
            let begin = self.shared.lock().begin.take();
            if let Some(begin) = begin {
                self.begins = true;
                let begun = self.begin(begin);
                self.begins = false;
                let failed = begun.is_err();
                self.shared.lock().answer = Some(begun);
                self.shared.answered.notify_all();
                if failed && !self.series {
                    return Ok(());
                }
            }
            if self.active.is_none() && !self.series {
                // No removal is read before the only snapshot begins, see there; unless its sink takes a while to begin, and
                // may be what waits.
                let timeout = if self.shared.lock().sink_begins { DOUBT_MS } else { -1 };
                if sys::wait_readable([self.shared.woken.as_fd()], timeout)? == [true] {
                    continue;
                }
            }
            self.look_at_queue();
            self.read_events()?;
            self.retry_held()?;
            self.find_change()?;
            if !self.walk()? && !self.done {
                self.wait()?;
            }
        }
        Ok(())
    }

    fn drain_wakes(&self) -> Result<()> {
        let mut bytes = [0; 64];
        loop {
            match (&self.shared.woken).read(&mut bytes) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::SystemError(errno_of(&error))),
            }
        }
    }

    /// Waits for something to do.
    fn wait(&mut self) -> Result<()> {
        let (uffd, woken) = (self.watch.uffd.as_fd(), self.shared.woken.as_fd());
        let full = |active: &Active| !active.draining && active.change_waits;
        if self.active.as_ref().is_some_and(full) {
            // Nothing is read from it until all is saved, and for that there is no buffer.
            return Ok(sys::wait_readable([woken], -1).map(drop)?);
        }
        if self.may_hide_removal() {
            return Ok(sys::wait_readable([woken], DOUBT_MS).map(drop)?);
        }
        if self.held.is_empty() {
            return Ok(sys::wait_readable([uffd, woken], -1).map(drop)?);
        }
        // Faults wait for a buffer, or until the layout has changed, which takes the running of another thread.
        if self.changing == 0
            && self.active.as_ref().is_some_and(|active| !active.queue.has_buffer(Size::Page))
        {
            return Ok(sys::wait_readable([woken], DOUBT_MS).map(drop)?);
        }
        thread::yield_now();
        Ok(())
    }

    /// Sees whether the snapshot was aborted, or its sink has ended.
    fn look_at_queue(&mut self) {
        let Some(active) = &self.active else { return };
        let failed = active.queue.ended() == Some(End::Aborted);
        let sink = active.queue.sink();
        if !failed && sink.is_none() {
            return;
        }
        let active = self.active.take().expect("it was there");
        let well = !failed && sink == Some(true);
        if !well {
            // The next one has to hold all of it.
            self.dirty.join(&active.wanted);
        }
        self.done = !self.series;
        self.shared.release(well);
    }

    pub(crate) fn retry_held(&mut self) -> Result<()> {
        for _ in 0..self.held.len() {
            let Some(event) = self.held.pop_front() else { break };
            let held = self.held.len();
            self.fault(event)?;
            if self.held.len() > held {
                // That one has to wait further, and so will the others.
                break;
            }
        }
        Ok(())
    }

    /// Saves the page that is about to be written, and lets the write go on; or holds the fault back.
    pub(crate) fn fault(&mut self, event: Event) -> Result<()> {
        let Event::Pagefault { kind: FaultKind::WriteProtected, addr, .. } = event else { return Ok(()) };
        let page = self.layout.page_at(addr.addr());
        if let Some(page) = &page {
            match self.save_first(page)? {
                Writable::Now => self.changed(bits_of(page)),
                Writable::Later => {
                    self.held.push_back(event);
                    return Ok(());
                }
                Writable::Again => return self.watch.uffd.wake(pointer(page.address), page.len),
            }
        }
        let start = addr.addr() / page_size() * page_size();
        let known = page.is_some();
        let (start, len) = page.map_or((start, page_size()), |page| (page.address, page.len));
        match self.watch.uffd.remove_write_protection(pointer(start), len, true) {
            // The layout changes: what lies here may be another page than it seems. Or it changes all the time.
            Err(error) if error.is_retryable() => {
                // Without a snapshot at work another page may be lifted: the next one finds it unprotected.
                let may_lift = known && (self.active.is_none() || self.changing >= MAX_LAYOUT_TRIES);
                if !(may_lift && self.lift_beside(start, len)?) {
                    self.changing += 1;
                    self.held.push_back(event);
                    return Ok(());
                }
            }
            // Unmapped meanwhile.
            Err(error) if error.errno() == Some(Errno::ENOENT) => {
                self.watch.uffd.wake(pointer(start), len)?;
            }
            result => result?,
        }
        self.changing = 0;
        Ok(())
    }

    /// Saves a page that is about to be written, if it must be.
    fn save_first(&mut self, page: &Part) -> Result<Writable> {
        let Some(active) = &mut self.active else { return Ok(Writable::Now) };
        if active.pending.get(bits_of(page).start) {
            match self.read(page, Size::Page, true)? {
                Saved::Yes => {}
                Saved::Full => {
                    self.changing = 0;
                    return Ok(Writable::Later);
                }
                // It is being moved or unmapped, and its event tells.
                Saved::Doubt if self.changing < MAX_LAYOUT_TRIES && self.is_changing() => {
                    self.changing += 1;
                    return Ok(Writable::Later);
                }
                // Or it can't be read at all.
                Saved::Doubt if self.doubted < MAX_LAYOUT_TRIES => {
                    self.doubted += 1;
                    self.changing = 0;
                    return Ok(Writable::Again);
                }
                Saved::Doubt => self.gone(std::slice::from_ref(page)),
            }
        }
        if self.active.as_ref().is_none_or(|active| !active.keeps(page)) {
            return Ok(Writable::Now);
        }
        let delivered = if self.changing < MAX_LAYOUT_TRIES {
            self.deliver(false)?
        } else {
            self.deliver_or_read_change()?
        };
        if !delivered {
            self.changing += 1;
        }
        Ok(if delivered { Writable::Now } else { Writable::Later })
    }

    /// Lifts the protection of a page that has been saved, if it must be, while the layout changes all the time, and wakes
    /// the threads that wait for it: through the second descriptor. Returns whether that could be done.
    fn lift_beside(&mut self, start: usize, len: usize) -> Result<bool> {
        if self.beside.is_none() {
            return Ok(false);
        }
        self.words.read(&self.watch.pagemap, &(start..start + len))?;
        if self.words.get(0).is_protected() {
            // A page that isn't saved may have moved here by a change that isn't read yet. Then mappings differ from what
            // they were.
            if self.active.is_some() && self.mappings()? != self.mapped && !self.is_still_ours()? {
                return Ok(false);
            }
            match self
                .beside
                .as_ref()
                .map(|beside| beside.remove_write_protection(pointer(start), len, false))
            {
                Some(Err(error)) if error.is_retryable() => return Ok(false),
                // Unmapped meanwhile.
                Some(Err(error)) if error.errno() != Some(Errno::ENOENT) => return Err(error),
                _ => {}
            }
        }
        self.watch.uffd.wake(pointer(start), len)?;
        Ok(true)
    }

    fn count(&self, counter: impl Fn(&Counts) -> &AtomicU64, bytes: usize) {
        if let Some(active) = &self.active {
            counter(&active.counts).fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// These pages may be written from now on.
    pub(crate) fn changed(&mut self, bits: Range<usize>) {
        self.dirty.set(bits.clone(), true);
        self.unprotected.set(bits, true);
    }

    /// Pages that are gone: what they held can't be told any more, if it wasn't saved.
    pub(crate) fn gone(&mut self, parts: &[Part]) {
        for part in parts {
            // For the next snapshot, unless this one says so.
            self.dirty.set(bits_of(part), true);
            self.unprotected.set(bits_of(part), false);
            for run in self.lose(part) {
                self.dirty.set(run, false);
            }
        }
    }

    /// Delivers what of a part is still to be read as gone. Returns what that is.
    fn lose(&mut self, part: &Part) -> Vec<Range<usize>> {
        let lost = self.settle(part, || Payload::Gone);
        self.count(|counts| &counts.gone, lost.iter().map(Range::len).sum::<usize>() * page_size());
        lost
    }

    /// Delivers what of a part is still to be read, without reading it. Returns what that is.
    pub(crate) fn settle(&mut self, part: &Part, payload: impl Fn() -> Payload) -> Vec<Range<usize>> {
        let bits = bits_of(part);
        let Some(active) = &mut self.active else { return Vec::new() };
        let mut settled = Vec::new();
        let mut from = bits.start;
        while from < bits.end {
            let Some(run) = active.pending.next_run(from, bits.end - from) else { break };
            if run.start >= bits.end {
                break;
            }
            let run = run.start..run.end.min(bits.end);
            let len = run.len() * page_size();
            active.queue.push(Item { offset: (run.start * page_size()) as u64, len, payload: payload() });
            active.counts.saved.fetch_add(len as u64, Ordering::Relaxed);
            active.doubt_until = None;
            from = run.end;
            active.pending.set(run.clone(), false);
            settled.push(run);
        }
        settled
    }

    /// Reads a part, whole pages that are all still to be read.
    fn read(&mut self, part: &Part, size: Size, on_write: bool) -> Result<Saved> {
        let Some(active) = &mut self.active else { return Ok(Saved::Doubt) };
        let Some(mut buffer) = active.queue.buffer(size) else { return Ok(Saved::Full) };
        let range = part.address..part.address + part.len;
        let words = &mut self.words;
        let verifies = self.look.can_tell();
        if !verifies {
            words.read(&self.watch.pagemap, &range)?;
        }
        // Where the page table doesn't tell what is protected, an empty page is one that was dropped.
        let there = verifies || (0..part.len / page_size()).all(|index| !words.get(index).is_empty());
        let pid = match self.watch.process {
            Process::Own => std::process::id() as libc::pid_t,
            Process::Other(pid) => pid.as_raw(),
        };
        let mapped = match sys::read_memory(pid, &range, &mut buffer.bytes) {
            Ok(bytes) => bytes == part.len,
            Err(Errno::EFAULT) => false,
            Err(errno) => {
                active.queue.give_back(buffer);
                return Err(errno.into());
            }
        };
        let mut same = mapped && there;
        if verifies {
            words.read(&self.watch.pagemap, &range)?;
            // What is protected after it was read was so all the time: nothing but this thread protects.
            let mut pages = (0..part.len / page_size()).step_by(part.page / page_size());
            same &= pages.all(|index| words.get(index).is_protected());
        }
        let bits = bits_of(part);
        if same {
            active.pending.set(bits, false);
            active.doubt_until = None;
            active.kept.push(Kept { part: part.clone(), buffer, on_write });
            return Ok(Saved::Yes);
        }
        active.queue.give_back(buffer);
        if part.len == part.page && active.removed.get(bits.start) && mapped {
            active.dropped.set(bits, true);
            if !self.is_changing() {
                self.settle_dropped();
                return Ok(Saved::Yes);
            }
        }
        Ok(Saved::Doubt)
    }

    /// Delivers pages whose removal was read before the snapshot began, and which were dropped since: by that removal,
    /// or after they had been written again by something that no event tells of. Before such things were in kernels, it
    /// was by the removal, and zeros are what they held then, as good as what was there before.
    fn settle_dropped(&mut self) {
        let Some(active) = &mut self.active else { return };
        let dropped = std::mem::replace(&mut active.dropped, Bits::new(active.wanted.len(), false));
        let mut from = 0;
        while let Some(run) = dropped.next_run(from, usize::MAX) {
            from = run.end;
            let (offset, len) = (run.start * page_size(), run.len() * page_size());
            let part = Part { address: 0, offset, len, page: page_size() };
            if self.look.can_tell() {
                self.lose(&part);
            } else {
                self.settle(&part, || Payload::Zero);
            }
        }
    }

    /// Whether the kernel knows of a change of the layout that isn't read yet, or whose thread hasn't run since.
    pub(crate) fn is_changing(&self) -> bool {
        self.watch.uffd.is_layout_changing()
    }

    /// Delivers what was read, unless the layout changes: then an event may tell that it was something else. Returns
    /// whether nothing is left. With `look` the whole layout is looked at instead.
    fn deliver(&mut self, look: bool) -> Result<bool> {
        if self.active.as_ref().is_none_or(|active| active.kept.is_empty()) {
            return Ok(true);
        }
        if self.is_changing() && !(look && self.is_still_ours()?) {
            return Ok(false);
        }
        self.stalled = 0;
        let Some(active) = &mut self.active else { return Ok(true) };
        let mut lifted = Vec::new();
        for Kept { part, buffer, on_write } in active.kept.drain(..) {
            let len = part.len;
            active.queue.push(Item { offset: part.offset as u64, len, payload: Payload::Data(buffer) });
            active.counts.saved.fetch_add(len as u64, Ordering::Relaxed);
            if on_write {
                active.counts.on_write.fetch_add(len as u64, Ordering::Relaxed);
            } else {
                lifted.push(part);
            }
        }
        lifted.iter().try_for_each(|part| self.lift(part))?;
        Ok(true)
    }

    /// The same where the layout changes all the time. If something isn't where it should be, what was read is
    /// forgotten, and the change is read that tells why.
    fn deliver_or_read_change(&mut self) -> Result<bool> {
        if self.deliver(true)? {
            return Ok(true);
        }
        if let Some(active) = &mut self.active {
            active.discard(&(0..usize::MAX));
        }
        self.read_change()?;
        Ok(false)
    }

    /// Whether no change has been made that isn't read. One that moves pages leaves a hole, or with `MREMAP_DONTUNMAP`
    /// unprotected pages, and other mappings than before. One that unmaps pages leaves a hole, or memory that isn't
    /// registered with this descriptor.
    pub(crate) fn is_still_ours(&mut self) -> Result<bool> {
        reach(Point::Watch(Moment::Trust), self.first_address());
        let mapped = self.mappings()?;
        if mapped.bytes() != self.layout.bytes() {
            return Ok(false);
        }
        // What has lost its protection where nothing was mapped anew was moved away without an event. Where the page table
        // doesn't tell what is protected, it may have.
        // Likewise of hugetlb memory in which there may be holes.
        let may_have_holes = |part: &Part| {
            part.page > page_size()
                && self.unprotected.next(bits_of(part).start).is_some_and(|bit| bit < bits_of(part).end)
        };
        let may_have_holes = self.layout.parts().iter().any(may_have_holes);
        let may_have_lost = may_have_holes || !self.look.can_tell() || self.look_at_all()?.pages > 0;
        if may_have_lost && mapped != self.mapped {
            return Ok(false);
        }
        // The place that a page has left may have been mapped anew.
        if !self.strays(&mapped)?.is_empty() {
            return Ok(false);
        }
        self.mapped = mapped;
        Ok(true)
    }

    pub(crate) fn first_address(&self) -> usize {
        self.layout.parts().first().map_or(0, |part| part.address)
    }

    /// The mappings in which all lies. Looked up once for all parts, which may be many.
    pub(crate) fn mappings(&self) -> Result<Mapped> {
        let mut parts: Vec<_> = self.layout.parts().iter().map(Part::addresses).collect();
        parts.sort_unstable_by_key(|part| part.start);
        let Some((first, last)) = parts.first().zip(parts.last()) else { return Ok(Mapped::default()) };
        let mappings = self.watch.process.mappings(&(first.start..last.end))?;
        Ok(Mapped::of(&parts, mappings.into_iter().map(|mapping| mapping.range)))
    }

    /// Looks at all pages. Those that aren't protected, though they should be, have changed.
    pub(crate) fn look_at_all(&mut self) -> Result<Lost> {
        let mut lost = Lost::default();
        for part in self.layout.parts().to_vec() {
            let Lost { pages, markers } = self.look_at(&part)?;
            lost.pages += pages;
            lost.markers += markers;
        }
        Ok(lost)
    }

    /// The same with a part.
    pub(crate) fn look_at(&mut self, part: &Part) -> Result<Lost> {
        let mut found = Vec::new();
        let bit_of = |address: usize| (part.offset + (address - part.address)) / page_size();
        self.look.unprotected(&self.watch.pagemap, part, |range| {
            // The others are known, and may be most of all.
            if !self.unprotected.all(bit_of(range.start)..bit_of(range.end)) {
                found.push(range);
            }
        })?;
        let mut lost = Lost::default();
        for range in found {
            let first = bit_of(range.start);
            self.words.read(&self.watch.pagemap, &range)?;
            // What was removed about when the snapshot began may go at any time.
            let expected = |bit| self.active.as_ref().is_some_and(|active| active.removed.get(bit));
            let known = |bit| self.unprotected.get(bit) || expected(bit);
            for index in (0..range.len() / page_size()).filter(|index| !known(first + index)) {
                lost.pages += 1;
                lost.markers += usize::from(self.words.get(index).is_marker());
            }
            self.changed(first..first + range.len() / page_size());
        }
        Ok(lost)
    }

    /// Reads the next pages. Returns whether there was something to do.
    fn walk(&mut self) -> Result<bool> {
        let pages = self.chunk / page_size();
        let Some(active) = &mut self.active else { return Ok(false) };
        if active.draining {
            return Ok(false);
        }
        let keeps = !active.kept.is_empty();
        let Some(run) = active.pending.next_run(active.cursor, pages) else {
            return match active.is_pending() {
                true if keeps => self.deliver_in_time(),
                true => self.walk_again(),
                false => self.all_saved(),
            };
        };
        if !active.queue.has_buffer(Size::Chunk) {
            return if keeps { self.deliver_in_time() } else { Ok(false) };
        }
        let bytes = run.start * page_size()..run.end * page_size();
        let Some(part) = self.layout.locate(&bytes) else {
            // Unmapped before it was wanted.
            let len = self.layout.lost(&bytes);
            self.gone(&[Part { address: 0, offset: bytes.start, len, page: page_size() }]);
            return Ok(true);
        };
        let next = self.read_pages(&part)?;
        if let Some(active) = &mut self.active {
            active.cursor = next;
        }
        self.deliver(false)?;
        Ok(true)
    }

    /// Reads what of a part can be. Returns how far it got.
    fn read_pages(&mut self, part: &Part) -> Result<usize> {
        let next = match self.read(part, Size::Chunk, false)? {
            Saved::Full => part.offset,
            // One page may spoil all.
            Saved::Doubt if part.len > part.page => {
                for at in (0..part.len).step_by(part.page) {
                    let page = Part {
                        address: part.address + at,
                        offset: part.offset + at,
                        len: part.page,
                        page: part.page,
                    };
                    if self.read(&page, Size::Chunk, false)? == Saved::Full {
                        return Ok(bits_of(&page).start);
                    }
                    self.deliver(false)?;
                }
                part.offset + part.len
            }
            Saved::Yes | Saved::Doubt => part.offset + part.len,
        };
        Ok(next / page_size())
    }

    /// Reads pages whose removal was read before they were saved, since faults hid it. Whoever removes them has to run
    /// first.
    pub(crate) fn read_removed(&mut self, part: &Part) -> Result<()> {
        let bits = bits_of(part);
        let mut from = bits.start;
        while from < bits.end {
            let Some(active) = &self.active else { break };
            let pages = (self.chunk / page_size()).min(bits.end - from);
            let Some(run) = active.pending.next_run(from, pages).filter(|run| run.end <= bits.end) else {
                break;
            };
            let offset = run.start * page_size();
            let part = Part {
                address: part.address + (offset - part.offset),
                offset,
                len: run.len() * page_size(),
                page: part.page,
            };
            let next = self.read_pages(&part)?;
            if next == run.start {
                break; // there is no buffer
            }
            from = run.end;
        }
        Ok(())
    }

    /// Delivers what was read, before more can be. While the layout changes, its events are read meanwhile, unless one
    /// waits.
    fn deliver_in_time(&mut self) -> Result<bool> {
        if self.deliver(false)? {
            return Ok(true);
        }
        self.stalled += 1;
        if self.stalled < MAX_LAYOUT_TRIES && self.active.as_ref().is_some_and(|active| !active.change_waits)
        {
            thread::yield_now();
            return Ok(true);
        }
        self.stalled = 0;
        self.deliver_or_read_change()?;
        Ok(true)
    }

    /// All has been read that the snapshot is to hold. Tells that there was something to do.
    fn all_saved(&mut self) -> Result<bool> {
        let Some(active) = &mut self.active else { return Ok(false) };
        if active.change_waits {
            self.read_change()?;
            return Ok(true);
        }
        active.draining = true;
        if !self.series {
            // Nobody is to wait for the sink.
            self.finish()?;
            self.done = true;
        }
        if let Some(active) = &self.active {
            active.queue.end(End::Complete);
        }
        if self.done {
            self.active = None;
        }
        Ok(true)
    }

    /// At the end of the walk some pages are left: the event that tells why is there, or comes soon, or never.
    fn walk_again(&mut self) -> Result<bool> {
        let Some(active) = &mut self.active else { return Ok(false) };
        active.cursor = 0;
        if active.change_waits || self.is_changing() {
            // Nothing else can be saved before what is to be read. That tells of everything that was made when pages
            // were seen as dropped.
            self.read_changes()?;
            self.settle_dropped();
        }
        let Some(active) = self.active.as_mut().filter(|active| active.is_pending()) else { return Ok(true) };
        let now = Instant::now();
        if now < *active.doubt_until.get_or_insert(now + DOUBT_TIME) {
            let fds = [self.watch.uffd.as_fd(), self.shared.woken.as_fd()];
            sys::wait_readable(fds, DOUBT_MS)?;
            return Ok(true);
        }
        let all = Part { address: 0, offset: 0, len: self.dirty.len() * page_size(), page: page_size() };
        self.lose(&all);
        Ok(true)
    }

    /// Lets pages that have been saved be written freely, unless what is written is to be known.
    fn lift(&mut self, part: &Part) -> Result<()> {
        if self.series {
            return Ok(());
        }
        match self.watch.uffd.remove_write_protection(pointer(part.address), part.len, true) {
            // The layout changes: the next write to it is a fault that lifts it. Nothing is lifted.
            Err(error) if error.is_retryable() => return Ok(()),
            // It is unmapped, or some of it.
            Err(error) if error.errno() == Some(Errno::ENOENT) => {}
            result => result?,
        }
        self.unprotected.set(bits_of(part), true);
        Ok(())
    }
}

/// The bits of a part: one for each page of the base size.
pub(crate) fn bits_of(part: &Part) -> Range<usize> {
    part.offset / page_size()..(part.offset + part.len) / page_size()
}
