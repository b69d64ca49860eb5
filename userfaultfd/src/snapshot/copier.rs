//! The thread that saves pages: those about to be written first, the others in order.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use super::bits::Bits;
use super::layout::{Layout, Part};
use super::options::Removal;
use super::queue::{End, Item, Payload, Queue, Size};
use super::shared::{Counts, Shared};
use super::slices::Slices;
use crate::atomic::AtomicU64;
use crate::dirty::watch::{Watch, Words, pointer};
use crate::error::errno_of;
use crate::maps::Process;
use crate::owner::InheritedFd;
use crate::{Errno, Error, Event, FaultKind, RegisterMode, Result, page_size, sys};

/// How often pages that can't be read, or aren't protected any more, are looked at again: the event that says why may
/// be on its way.
const DOUBTS: u32 = 20;

/// Milliseconds between two looks.
const DOUBT_MS: i32 = 10;

/// How often an operation is tried while the memory layout changes, before something else is done about it.
pub(super) const TRIES: u32 = 50;

/// How often it is tried when nobody can start another change.
pub(super) const PATIENCE: u32 = 100_000;

/// The snapshot that is at work.
#[derive(Debug)]
pub(super) struct Active {
    queue: Arc<Queue>,
    counts: Arc<Counts>,
    /// What is still to be saved.
    pub(super) pending: Bits,
    /// All that the snapshot is to hold.
    wanted: Bits,
    /// Where the walk is.
    pub(super) cursor: usize,
    /// A change of the layout waits to be told, and with it who makes it.
    pub(super) change_waits: bool,
    doubts: u32,
    /// All has been saved; the sink is still at it.
    pub(super) draining: bool,
}

impl Active {
    pub(super) fn new(queue: Arc<Queue>, counts: Arc<Counts>, wanted: Bits) -> Self {
        let pending = wanted.clone();
        Self { queue, counts, pending, wanted, cursor: 0, change_waits: false, doubts: 0, draining: false }
    }

    /// Whether something is still to be saved.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.next(self.cursor).or_else(|| self.pending.next(0)).is_some()
    }
}

/// Whether pages were saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    Yes,
    /// There is no buffer.
    Full,
    /// They can't be read, or aren't protected.
    Doubt,
}

pub(super) struct Copier {
    pub(super) watch: Arc<Watch>,
    shared: Arc<Shared>,
    pub(super) layout: Layout,
    pub(super) removal: Removal,
    /// Pages stay protected after they are saved: what changes is for the next snapshot.
    series: bool,
    /// The page table tells what is protected.
    verifies: bool,
    chunk: usize,
    /// What has changed since the last snapshot began; at first everything.
    pub(super) dirty: Bits,
    /// While a snapshot begins: what of it isn't protected yet, or no more.
    pub(super) unprotected: Bits,
    /// What was dropped since the last snapshot ended: it may go at any time, and hold zeros then.
    pub(super) removed: Bits,
    pub(super) active: Option<Active>,
    /// Faults that can't be resolved yet.
    pub(super) held: VecDeque<Event>,
    /// How often the first of them was refused, since the layout changes. Zero: it waits for a buffer.
    pub(super) changing: u32,
    /// How often a page that is about to be written was in doubt.
    pub(super) doubted: u32,
    pub(super) fdinfo: File,
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
    pub(super) fn new(
        watch: Arc<Watch>,
        shared: Arc<Shared>,
        layout: Layout,
        (removal, series, verifies): (Removal, bool, bool),
        chunk: usize,
    ) -> io::Result<Self> {
        let end = layout.parts().iter().map(|part| part.offset + part.len).max().unwrap_or(0);
        let pages = end / page_size();
        let fdinfo = File::open(format!("/proc/self/fdinfo/{}", watch.uffd.as_raw_fd()))?;
        let owned = [watch.uffd.as_fd(), watch.pagemap.as_fd(), fdinfo.as_fd()];
        shared.inherited.get_or_init(|| owned.map(InheritedFd::new));
        Ok(Self {
            fdinfo,
            watch,
            shared,
            layout,
            removal,
            series,
            verifies,
            chunk,
            dirty: Bits::new(pages, true),
            unprotected: Bits::new(pages, true),
            removed: Bits::new(pages, false),
            active: None,
            held: VecDeque::with_capacity(64),
            changing: 0,
            doubted: 0,
            words: Words::default(),
            done: false,
        })
    }

    /// Works until it is told to end, or, if it isn't for a series, a snapshot has been taken.
    pub(super) fn run(mut self) {
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
    pub(super) fn free(&self) -> Result<()> {
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
                let begun = self.begin(begin);
                let failed = begun.is_err();
                self.shared.lock().answer = Some(begun);
                self.shared.answered.notify_all();
                if failed && !self.series {
                    return Ok(());
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
        if failed || sink == Some(false) {
            // The next one has to hold all of it.
            self.dirty.join(&active.wanted);
        }
        self.removed.set(0..self.removed.len(), false);
        self.done = !self.series;
        self.shared.release();
    }

    pub(super) fn retry_held(&mut self) -> Result<()> {
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
    pub(super) fn fault(&mut self, event: Event) -> Result<()> {
        let Event::Pagefault { kind: FaultKind::WriteProtected, addr, .. } = event else { return Ok(()) };
        let page = self.layout.page_at(addr.addr());
        if let Some(page) = &page {
            let bits = bits_of(page);
            if self.active.as_ref().is_some_and(|active| active.pending.get(bits.start)) {
                match self.save(page, Size::Page)? {
                    Saved::Yes => self.count(|counts| &counts.on_write, page.len),
                    Saved::Full => {
                        self.changing = 0;
                        self.held.push_back(event);
                        return Ok(());
                    }
                    // It is being moved or unmapped, and who waits finds out; or it can't be read at all.
                    Saved::Doubt if self.doubted < TRIES => {
                        self.doubted += 1;
                        self.changing = 0;
                        return self.watch.uffd.wake(pointer(page.address), page.len);
                    }
                    Saved::Doubt => self.gone(std::slice::from_ref(page)),
                }
            }
            self.changed(bits);
        }
        let start = addr.addr() / page_size() * page_size();
        let known = page.is_some();
        let (start, len) = page.map_or((start, page_size()), |page| (page.address, page.len));
        match self.watch.uffd.remove_write_protection(pointer(start), len, true) {
            // The layout changes: what lies here may be another page than it seems.
            Err(error) if error.is_retryable() && !(known && self.changing >= TRIES) => {
                self.changing += 1;
                self.held.push_back(event);
                return Ok(());
            }
            // It changes all the time.
            Err(error) if error.is_retryable() => self.register_anew(start, len)?,
            // Unmapped meanwhile.
            Err(error) if error.errno() == Some(Errno::ENOENT) => {
                self.watch.uffd.wake(pointer(start), len)?;
            }
            result => result?,
        }
        self.changing = 0;
        Ok(())
    }

    /// Lifts the protection of a page that has been saved, if it must be, whose next write needn't be known, by ending
    /// its registration, and wakes who waits. Neither that nor registering is refused while the layout changes.
    fn register_anew(&mut self, start: usize, len: usize) -> Result<()> {
        let uffd = &self.watch.uffd;
        if self.verifies {
            self.words.read(&self.watch.pagemap, &(start..start + len))?;
            if !self.words.get(0).is_protected() {
                // Something else may lie there by now, and be registered by somebody else.
                return uffd.wake(pointer(start), len);
            }
        }
        let registered = uffd.unregister_unexplained(pointer(start), len).and_then(|()| {
            uffd.register_unexplained(pointer(start), len, RegisterMode::WRITE_PROTECT).map(drop)
        });
        match registered {
            // Unmapped meanwhile.
            Err(Error::SystemError(Errno::EINVAL)) => uffd.wake(pointer(start), len),
            result => result,
        }
    }

    fn count(&self, counter: impl Fn(&Counts) -> &AtomicU64, bytes: usize) {
        if let Some(active) = &self.active {
            counter(&active.counts).fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// These pages may be written from now on.
    pub(super) fn changed(&mut self, bits: Range<usize>) {
        self.dirty.set(bits.clone(), true);
        self.unprotected.set(bits, true);
    }

    /// Pages that are gone: what they held can't be told any more, if it wasn't saved.
    pub(super) fn gone(&mut self, parts: &[Part]) {
        for part in parts {
            self.dirty.set(bits_of(part), false);
            let bytes = self.settle(part, || Payload::Gone);
            self.count(|counts| &counts.gone, bytes);
        }
    }

    /// Delivers what of a part is still to be saved, without reading it. Returns how many bytes that is.
    pub(super) fn settle(&mut self, part: &Part, payload: impl Fn() -> Payload) -> usize {
        let bits = bits_of(part);
        let Some(active) = &mut self.active else { return 0 };
        let (mut from, mut settled) = (bits.start, 0);
        while let Some(run) =
            active.pending.next_run(from, bits.end - from).filter(|run| run.start < bits.end)
        {
            let run = run.start..run.end.min(bits.end);
            let len = run.len() * page_size();
            let offset = (run.start * page_size()) as u64;
            active.queue.push(Item { offset, len, payload: payload() });
            active.counts.saved.fetch_add(len as u64, Ordering::Relaxed);
            settled += len;
            from = run.end;
            active.pending.set(run, false);
            if from >= bits.end {
                break;
            }
        }
        settled
    }

    /// Saves a part, whole pages that are all still to be saved.
    fn save(&mut self, part: &Part, size: Size) -> Result<Saved> {
        let Some(active) = &mut self.active else { return Ok(Saved::Doubt) };
        let Some(mut buffer) = active.queue.buffer(size) else { return Ok(Saved::Full) };
        let range = part.address..part.address + part.len;
        let words = &mut self.words;
        if !self.verifies {
            words.read(&self.watch.pagemap, &range)?;
        }
        // Where the page table doesn't tell what is protected, an empty page is one that was dropped.
        let there = self.verifies || (0..part.len / page_size()).all(|index| !words.get(index).is_empty());
        let pid = match self.watch.process {
            Process::Own => std::process::id() as libc::pid_t,
            Process::Other(pid) => pid.as_raw(),
        };
        let read = match sys::read_memory(pid, &range, &mut buffer.bytes) {
            Ok(bytes) => bytes == part.len && there,
            Err(Errno::EFAULT) => false,
            Err(errno) => {
                active.queue.give_back(buffer);
                return Err(errno.into());
            }
        };
        let mut still = read;
        if self.verifies {
            words.read(&self.watch.pagemap, &range)?;
            // What is protected after it was read was so all the time: nothing but this thread protects.
            let mut pages = (0..part.len / page_size()).step_by(part.page / page_size());
            still &= pages.all(|index| words.get(index).is_protected());
        }
        if still {
            let item = Item { offset: part.offset as u64, len: part.len, payload: Payload::Data(buffer) };
            active.queue.push(item);
            active.counts.saved.fetch_add(part.len as u64, Ordering::Relaxed);
            active.pending.set(bits_of(part), false);
            return Ok(Saved::Yes);
        }
        active.queue.give_back(buffer);
        if part.len == part.page && self.removed.get(bits_of(part).start) {
            // Dropped about when the snapshot began: zeros are what it held then, as good as what was there before.
            self.settle(part, || Payload::Zero);
            return Ok(Saved::Yes);
        }
        Ok(Saved::Doubt)
    }

    /// Saves the next pages. Tells whether there was something to do.
    fn walk(&mut self) -> Result<bool> {
        let pages = self.chunk / page_size();
        let Some(active) = &mut self.active else { return Ok(false) };
        if active.draining {
            return Ok(false);
        }
        let Some(run) = active.pending.next_run(active.cursor, pages) else {
            return if active.is_pending() { self.walk_again() } else { self.all_saved() };
        };
        if !active.queue.has_buffer(Size::Chunk) {
            return Ok(false);
        }
        let bytes = run.start * page_size()..run.end * page_size();
        let Some(part) = self.layout.locate(&bytes) else {
            // Unmapped before it was wanted.
            let part = Part { address: 0, offset: bytes.start, len: page_size(), page: page_size() };
            self.gone(&[part]);
            return Ok(true);
        };
        let mut next = bits_of(&part).end;
        match self.save(&part, Size::Chunk)? {
            Saved::Yes => self.lift(&part)?,
            Saved::Full => return Ok(false),
            // One page may spoil all.
            Saved::Doubt if part.len > part.page => {
                for at in (0..part.len).step_by(part.page) {
                    let page =
                        Part { address: part.address + at, offset: part.offset + at, len: part.page, ..part };
                    match self.save(&page, Size::Chunk)? {
                        Saved::Yes => self.lift(&page)?,
                        Saved::Doubt => {}
                        Saved::Full => {
                            next = bits_of(&page).start;
                            break;
                        }
                    }
                }
            }
            Saved::Doubt => {}
        }
        if let Some(active) = &mut self.active {
            active.cursor = next;
        }
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
        if active.change_waits {
            self.read_change()?;
            return Ok(true);
        }
        active.doubts += 1;
        if active.doubts <= DOUBTS {
            let fds = [self.watch.uffd.as_fd(), self.shared.woken.as_fd()];
            sys::wait_readable(fds, DOUBT_MS)?;
            return Ok(true);
        }
        let all = Part { address: 0, offset: 0, len: self.dirty.len() * page_size(), page: page_size() };
        let bytes = self.settle(&all, || Payload::Gone);
        self.count(|counts| &counts.gone, bytes);
        Ok(true)
    }

    /// Lets pages that have been saved be written freely, unless what is written is to be known.
    fn lift(&self, part: &Part) -> Result<()> {
        if self.series {
            return Ok(());
        }
        match self.watch.uffd.remove_write_protection(pointer(part.address), part.len, true) {
            // It is unmapped, or the layout changes: the next write to it is a fault that lifts it.
            Err(error) if error.is_retryable() || error.errno() == Some(Errno::ENOENT) => Ok(()),
            result => result,
        }
    }
}

/// The bits of a part: one for each page of the base size.
pub(super) fn bits_of(part: &Part) -> Range<usize> {
    part.offset / page_size()..(part.offset + part.len) / page_size()
}
