//! Faults: a page that is about to be written is saved first.

use super::active::Active;
use super::copier::{Copier, MAX_LAYOUT_TRIES};
use super::keep::Saved;
use super::layout::Part;
use super::queue::Size;
use crate::watch::pointer;
use crate::{Errno, Event, FaultKind, Result, page_size};

/// Whether a page may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writable {
    Now,
    /// It isn't saved yet.
    Later,
    /// The thread that writes it has been woken, and finds out.
    Again,
}

impl Copier {
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
            match self.save_first(page)? {
                Writable::Now => self.changed(page.bits()),
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
        if active.pending.get(page.bits().start) {
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
                // Or it can't be read for a moment, or not at all.
                Saved::Doubt if self.active.as_mut().is_some_and(Active::may_wait_in_doubt) => {
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
}
