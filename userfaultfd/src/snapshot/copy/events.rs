//! What is read from the descriptor: faults, and changes of the layout, which wait until they are read.

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::copier::{Copier, MAX_LAYOUT_TRIES};
use super::layout::Part;
use super::queue::Payload;
use crate::error::errno_of;
use crate::snapshot::options::Removal;
use crate::sync_point::{Moment, Point, reach};
use crate::{Errno, Error, Event, Result, page_size, sys};

impl Copier {
    /// Reads all that there is. Follows changes, and holds faults back.
    pub(super) fn hold_faults(&mut self) -> Result<()> {
        while let Some(event) = self.watch.uffd.read_event()? {
            match event {
                Event::Pagefault { .. } => self.held.push_back(event),
                change => self.change(change)?,
            }
        }
        Ok(())
    }

    /// Reads the faults that there are, and no change behind them.
    pub(super) fn hold_unread_faults(&mut self) -> Result<()> {
        for _ in 0..self.unread_faults()? {
            match self.watch.uffd.read_event()? {
                Some(event @ Event::Pagefault { .. }) => self.held.push_back(event),
                // The fault had vanished.
                Some(change) => return self.change(change),
                None => break,
            }
        }
        Ok(())
    }

    /// Whether something must be saved before a change of the layout is read, and so made.
    fn saves_first(&self) -> bool {
        let Some(active) = &self.active else { return false };
        self.removal == Removal::Save && !active.draining && active.is_pending()
    }

    /// Faults that nobody has read yet.
    fn unread_faults(&self) -> Result<usize> {
        let mut text = [0; 512];
        let read = self.fdinfo.read_at(&mut text, 0).map_err(|error| Error::SystemError(errno_of(&error)))?;
        let text = String::from_utf8_lossy(&text[..read]);
        let pending = text.lines().find_map(|line| line.strip_prefix("pending:"));
        let count = pending.and_then(|count| count.trim().parse().ok());
        reach(Point::Watch(Moment::Counted), self.first_address());
        count.ok_or(Error::SystemError(Errno::EPROTO))
    }

    /// Reads what there is, except a change for which something must be saved first.
    ///
    /// The kernel delivers faults before changes, and drops what a change drops when that was read. So with no fault
    /// unread, something to read is a change. And while the layout changes, nothing is read: the only fault may vanish
    /// before it is, and what is read instead is the change.
    pub(super) fn read_events(&mut self) -> Result<()> {
        while self.held.is_empty() && !self.active.as_ref().is_some_and(|active| active.change_waits) {
            let [readable] = sys::wait_readable([self.watch.uffd.as_fd()], 0)?;
            if !readable {
                return Ok(());
            }
            if self.may_hide_removal() {
                return if self.unread_faults()? == 0 { self.save_before_change() } else { Ok(()) };
            }
            let Some(event) = self.watch.uffd.read_event()? else { return Ok(()) };
            self.apply(event)?;
        }
        Ok(())
    }

    /// Whether what must be read may be a removal before which something must be saved.
    pub(super) fn may_hide_removal(&self) -> bool {
        self.saves_first() && self.is_changing()
    }

    /// Where faults can't be resolved since the layout changes, its change must be read.
    pub(super) fn find_change(&mut self) -> Result<()> {
        if self.changing == 0 || self.active.as_ref().is_some_and(|active| active.change_waits) {
            return Ok(());
        }
        let [readable] = sys::wait_readable([self.watch.uffd.as_fd()], 0)?;
        // Otherwise it was read, and the thread that makes it hasn't run since. Faults that are unread may hide another one: as long
        // as the one that is held is of a page that isn't known, since it has moved, only that change tells which.
        if readable && (self.unread_faults()? == 0 || self.changing > 2 * MAX_LAYOUT_TRIES) {
            if self.saves_first() {
                self.save_before_change()?;
            } else {
                self.read_change()?;
            }
        }
        Ok(())
    }

    /// Has everything saved before the change is read that waits. A removal is made when it was read; any other change
    /// has been made, and is read at once.
    fn save_before_change(&mut self) -> Result<()> {
        if !self.is_still_ours()? {
            return self.read_change();
        }
        if let Some(active) = &mut self.active {
            active.change_waits = true;
            active.cursor = 0;
        }
        Ok(())
    }

    /// Reads all that there is, so that nothing is left unread that was made before; faults are held back.
    pub(super) fn read_changes(&mut self) -> Result<()> {
        if let Some(active) = &mut self.active {
            active.change_waits = false;
        }
        self.hold_faults()
    }

    /// Reads the change that waits; the faults before it are held back.
    pub(super) fn read_change(&mut self) -> Result<()> {
        while let Some(event) = self.watch.uffd.read_event()? {
            if matches!(event, Event::Pagefault { .. }) {
                self.held.push_back(event);
            } else {
                self.change(event)?;
                break;
            }
        }
        if let Some(active) = &mut self.active {
            active.change_waits = false;
            active.cursor = 0;
        }
        Ok(())
    }

    /// Forgets what was read from some addresses. It will be read again, but for pages that were removed since and seem as
    /// protected as before: their content is lost.
    pub(super) fn discard(&mut self, range: &Range<usize>) {
        let Some(active) = &mut self.active else { return };
        for page in active.discard(range).iter().flat_map(Part::pages) {
            let bit = page.bits().start;
            if self.removed.get(bit) && self.silent.get(bit) {
                self.lose(&page);
            }
        }
    }

    fn apply(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Pagefault { .. } => self.fault(event),
            change => self.change(change),
        }
    }

    /// These pages are dropped as soon as the thread runs that drops them. Those that seem as protected then as before stay
    /// so, but for hugetlb memory: no look finds holes in it.
    fn dropped(&mut self, part: &Part) {
        let bits = part.bits();
        self.dirty.set(bits.clone(), true);
        for bit in bits.filter(|bit| part.page > page_size() || !self.silent.get(*bit)) {
            self.unprotected.set(bit..bit + 1, true);
        }
    }

    /// Where the page table doesn't tell what is protected, other mappings than these are all that tells of a change that
    /// isn't read.
    fn follow_mappings(&mut self) -> Result<()> {
        if !self.look.can_tell() {
            self.mapped = self.mappings()?;
        }
        Ok(())
    }

    /// Follows a change of the layout.
    fn change(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Remove { start, end } => {
                if self.removal == Removal::Zero {
                    // What was read is zeros, too: it can't be read again if it must be.
                    self.discard(&(start.addr()..end.addr()));
                }
                for part in self.layout.at(&(start.addr()..end.addr())) {
                    match self.removal {
                        Removal::Zero => drop(self.settle(&part, || Payload::Zero)),
                        // It seems as protected after it was dropped as before.
                        Removal::Save if self.silent.all(part.bits()) => {
                            self.gone(std::slice::from_ref(&part));
                        }
                        Removal::Save => self.read_removed(&part)?,
                    }
                    self.removed.set(part.bits(), true);
                    self.dropped(&part);
                }
            }
            Event::Unmap { start, end } => {
                let range = start.addr()..end.addr();
                self.discard(&range);
                let parts = self.layout.remove(&range);
                self.mapped.remove(&range);
                self.gone(&parts);
                self.follow_mappings()?;
            }
            Event::Remap { from, to, len } => {
                let (from, to) = (from.addr(), to.addr());
                for part in self.layout.at(&(from..from + len)) {
                    if let Some(active) = &mut self.active {
                        active.dropped.set(part.bits(), false);
                    }
                    // Protection that it has at its new place may have been meant for the page that lay there: nothing
                    // tells any more whether it had lost its own.
                    if self.begins {
                        self.changed(part.bits());
                    }
                }
                self.discard(&(from..from + len));
                self.discard(&(to..to + len));
                let parts = self.layout.shift(&(from..from + len), to);
                self.mapped.shift(&(from..from + len), to);
                self.gone(&parts);
                self.follow_mappings()?;
            }
            // A child isn't this process; its descriptor is closed here.
            Event::Fork { .. } | Event::Pagefault { .. } => {}
        }
        Ok(())
    }
}
