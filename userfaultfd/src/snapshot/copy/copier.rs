//! The thread that saves pages: those about to be written first, the others in order.
//!
//! A page is read, then the kernel is asked whether it is still protected, then whether the layout was still the one
//! that is known when it was read. Only then it is delivered. A page that is protected need not be the page that it
//! seems: mremap(2) may have put another one there, or another program may have mapped and protected its own. A thread that
//! changes the layout waits until the event is read, and as long as that is so the kernel says that the layout changes.
//! So what was read is [kept](super::active) until it doesn't, or until a look at everything shows that nothing is where it
//! shouldn't be.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread;

use super::active::Active;
use super::bits::Bits;
use super::late::LateRemovals;
use super::layout::{Layout, Mapped, Part};
use super::look::ChunkView;
use super::queue::{End, Size};
use super::shared::Shared;
use super::slices::Slices;
use crate::error::errno_of;
use crate::owner::InheritedFd;
use crate::snapshot::options::Removal;
use crate::watch::{Watch, Words, pointer};
use crate::{Errno, Error, Event, Result, Uffd, sys};

/// Milliseconds between two looks.
pub(super) const LOOK_INTERVAL_MS: i32 = 10;

/// How often an operation is tried while the memory layout changes, before something else is done about it.
pub(super) const MAX_LAYOUT_TRIES: u32 = 50;

pub(crate) struct Copier {
    pub(super) watch: Arc<Watch>,
    /// A second descriptor of the same process. Nothing is registered with it, so no change of the layout is its, and the
    /// kernel refuses nothing: it doesn't ask with which descriptor the memory is registered that is protected. `None` for
    /// memory of another process, and where the kernel doesn't tell what is protected.
    pub(super) beside: Option<Uffd>,
    pub(super) shared: Arc<Shared>,
    pub(super) layout: Layout,
    pub(super) removal: Removal,
    /// Pages stay protected after they are saved: what changes is for the next snapshot.
    pub(super) series: bool,
    pub(super) look: ChunkView,
    pub(super) chunk: usize,
    /// What has changed since the last snapshot began; at first everything.
    pub(super) dirty: Bits,
    /// What isn't protected, as far as is known.
    pub(super) unprotected: Bits,
    /// A snapshot is beginning: memory is protected by its addresses, whatever lies there by now.
    pub(super) begins: bool,
    /// Pages whose removal was read since the last snapshot began. They may go at any time.
    pub(super) removed: Bits,
    /// Those of them, and of some time before, of which nothing will show when they go.
    pub(super) late: LateRemovals,
    /// The mappings in which all lay when a snapshot began, or when the layout was last looked at.
    pub(super) mapped: Mapped,
    /// A page wasn't protected, in other mappings than those, while a change of the layout waited to be read.
    pub(super) suspects: bool,
    /// Pages that may go and seem protected all the same.
    pub(super) silent: Bits,
    pub(super) active: Option<Active>,
    /// Faults that can't be resolved yet.
    pub(super) held: VecDeque<Event>,
    /// How often the first of them was refused, since the layout changes. Zero: it waits for a buffer.
    pub(super) changing: u32,
    /// How often what was read couldn't be delivered, since the layout changes.
    pub(super) stalled: u32,
    pub(super) fdinfo: File,
    pub(super) words: Words,
    pub(super) done: bool,
}

impl Drop for Copier {
    fn drop(&mut self) {
        // They are closed now.
        self.shared.inherited.get().into_iter().flatten().for_each(InheritedFd::forget);
        // After a panic nothing is left waiting: no writer, and no caller that asks for a snapshot.
        if self.shared.lock().ended.is_none() {
            if let Some(active) = self.active.take() {
                active.queue.fail(None);
            }
            let freed = self.free();
            self.shared.end_with(Some(freed.err().and_then(|error| error.errno()).unwrap_or(Errno::ESRCH)));
        }
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
            late: LateRemovals::new(pages),
            mapped: Mapped::default(),
            suspects: false,
            silent,
            active: None,
            held: VecDeque::with_capacity(64),
            changing: 0,
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
        self.shared.end_with(result.and(freed).err().and_then(|error| error.errno()));
    }

    /// Lifts all protection, and forgets the memory. While the kernel unregisters, nobody may fault in a page.
    pub(super) fn finish(&mut self) -> Result<()> {
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
                let timeout = if self.shared.lock().sink_begins { LOOK_INTERVAL_MS } else { -1 };
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
            return Ok(sys::wait_readable([woken], LOOK_INTERVAL_MS).map(drop)?);
        }
        if self.held.is_empty() {
            return Ok(sys::wait_readable([uffd, woken], -1).map(drop)?);
        }
        // Faults wait for a buffer, or until the layout has changed, which takes the running of another thread.
        if self.changing == 0
            && self.active.as_ref().is_some_and(|active| !active.queue.has_buffer(Size::Page))
        {
            return Ok(sys::wait_readable([woken], LOOK_INTERVAL_MS).map(drop)?);
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
}
