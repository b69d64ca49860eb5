//! Reading pages, and keeping them until it is known that they were the right ones.

use std::sync::atomic::Ordering;
use std::thread;

use super::active::Kept;
use super::bits::Bits;
use super::copier::{Copier, MAX_LAYOUT_TRIES};
use super::layout::Part;
use super::queue::{Item, Payload, Size};
use crate::proc_maps::Process;
use crate::sync_point::{Moment, Point, reach};
use crate::watch::pointer;
use crate::{Errno, Result, page_size, sys};

/// Whether pages were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saved {
    /// They are kept, or known without.
    Yes,
    /// There is no buffer.
    Full,
    /// They can't be read, or aren't protected.
    Doubt,
}

impl Copier {
    /// Reads a part, whole pages that are all still to be read.
    pub(super) fn read(&mut self, part: &Part, size: Size, on_write: bool) -> Result<Saved> {
        let Some(active) = &mut self.active else { return Ok(Saved::Doubt) };
        let Some(mut buffer) = active.queue.buffer(size) else { return Ok(Saved::Full) };
        let range = part.address..part.address + part.len;
        reach(Point::Watch(Moment::Read), part.address);
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
        let bits = part.bits();
        if same {
            active.pending.set(bits, false);
            active.doubt_until = None;
            active.kept.push(Kept { part: part.clone(), buffer, on_write });
            reach(Point::Watch(Moment::Kept), part.address);
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

    /// Reads what of a part can be. Returns how far it got.
    pub(super) fn read_pages(&mut self, part: &Part) -> Result<usize> {
        let next = match self.read(part, Size::Chunk, false)? {
            Saved::Full => part.offset,
            // One page may spoil all.
            Saved::Doubt if part.len > part.page => {
                for page in part.pages() {
                    if self.read(&page, Size::Chunk, false)? == Saved::Full {
                        return Ok(page.bits().start);
                    }
                    self.deliver(false)?;
                }
                part.offset + part.len
            }
            Saved::Yes | Saved::Doubt => part.offset + part.len,
        };
        Ok(next / page_size())
    }

    /// Reads pages whose removal was read before they were saved, since faults hid it. The thread that removes them has
    /// to run first.
    pub(super) fn read_removed(&mut self, part: &Part) -> Result<()> {
        let bits = part.bits();
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

    /// Delivers pages whose removal was read before the snapshot began, and which were dropped since: by that removal,
    /// or after they had been written again by something that no event tells of. Before such things were in kernels, it
    /// was by the removal, and zeros are what they held then, as good as what was there before.
    pub(super) fn settle_dropped(&mut self) {
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

    /// Delivers what was read, unless the layout changes: then an event may tell that it was something else. Returns
    /// whether nothing is left. With `look` the whole layout is looked at instead.
    pub(super) fn deliver(&mut self, look: bool) -> Result<bool> {
        if self.active.as_ref().is_none_or(|active| active.kept.is_empty()) {
            return Ok(true);
        }
        if !self.is_changing() {
            self.suspects = false;
        } else if !(look && self.is_still_ours()?) {
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
    pub(super) fn deliver_or_read_change(&mut self) -> Result<bool> {
        if self.deliver(true)? {
            return Ok(true);
        }
        self.discard(&(0..usize::MAX));
        self.read_change()?;
        Ok(false)
    }

    /// Delivers what was read, before more can be. While the layout changes, its events are read meanwhile, unless one
    /// waits.
    pub(super) fn deliver_in_time(&mut self) -> Result<bool> {
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

    /// Lets pages that have been saved be written freely, unless what is written must be known.
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
        self.unprotected.set(part.bits(), true);
        Ok(())
    }
}
