//! The walk through all pages, in their order.

use std::os::fd::AsFd;

use super::copier::{Copier, LOOK_INTERVAL_MS};
use super::layout::Part;
use super::queue::{End, Size};
use crate::{Result, page_size, sys};

impl Copier {
    /// Reads the next pages. Returns whether there was something to do.
    pub(super) fn walk(&mut self) -> Result<bool> {
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

    /// All has been read that the snapshot must hold. Tells that there was something to do.
    fn all_saved(&mut self) -> Result<bool> {
        let Some(active) = &mut self.active else { return Ok(false) };
        if active.change_waits {
            self.read_change()?;
            return Ok(true);
        }
        active.draining = true;
        if !self.series {
            // No thread must wait for the sink.
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
            // Nothing else can be saved before what must be read. That tells of everything that was made when pages
            // were seen as dropped.
            self.read_changes()?;
            self.settle_dropped();
        }
        let Some(active) = self.active.as_mut().filter(|active| active.is_pending()) else { return Ok(true) };
        if active.may_wait_in_doubt() {
            let fds = [self.watch.uffd.as_fd(), self.shared.woken.as_fd()];
            sys::wait_readable(fds, LOOK_INTERVAL_MS)?;
            return Ok(true);
        }
        let all = Part { address: 0, offset: 0, len: self.dirty.len() * page_size(), page: page_size() };
        self.lose(&all);
        Ok(true)
    }
}
