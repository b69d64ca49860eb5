//! The moment of a snapshot: all is protected, and no write was let through meanwhile.
//!
//! The kernel takes some 80 ns to protect a page, which makes 80 ms of 4 GiB. So as not to hold up writers for so long,
//! memory is protected ahead, while writers go on at once, and for the moment itself there is only left
//! what was written since: as live migration copies memory while its machine runs on, and stops it for the rest.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::active::Active;
use super::bits::Bits;
use super::copier::Copier;
use super::layout::{Mapped, Part};
use super::shared::Begin;
use super::slices::Slices;
use crate::sync_point::{Moment, Point, reach};
use crate::{Errno, Error, Result, page_size};

/// Number of pages up to which they are protected at the moment itself, and not ahead.
const MAX_UNPREPARED_PAGES: usize = 256;

/// How often what was written is protected again ahead, if that is less and less.
const PROTECT_ROUNDS: usize = 5;

/// Time after which a snapshot that can't begin fails.
const BEGIN_PATIENCE: Duration = Duration::from_secs(20);

impl Copier {
    /// Begins a snapshot. At its moment no fault is resolved before all of it is protected: what was written after
    /// another write isn't in the snapshot if that one isn't.
    pub(super) fn begin(&mut self, Begin { queue, counts, changed }: Begin) -> Result<()> {
        self.dirty.join(&changed);
        if !self.look.can_tell() {
            self.unprotected.join(&self.dirty);
        }
        reach(Point::Watch(Moment::Look), self.first_address());
        self.look_ahead()?;
        self.protect_ahead()?;
        let (moment, mut all_markers) = (Instant::now(), false);
        loop {
            self.protect_rest(moment)?;
            let mapped = self.mappings()?;
            // Protection ends without an event, too. The moment is the beginning of a look that finds all protected,
            // since nothing is protected during it: of a page that lost its protection before, and was written, the
            // content would be of a later moment.
            let lost = self.look_at_all()?;
            let markers = lost.pages == lost.markers;
            // A page that was moved away after the first look at the mappings and before this one leaves a hole, in which
            // nothing is that isn't protected.
            let is_found = lost.pages == 0 || markers && all_markers;
            if is_found && self.mappings()?.bytes() == mapped.bytes() && self.is_where_it_was(&mapped)? {
                self.mapped = mapped;
                self.suspects = false;
                break;
            }
            // What looks like one may be a page that was swapped out. That is protected now.
            all_markers = markers && lost.pages > 0;
            check_time(moment)?;
        }
        let wanted = self.dirty.clone();
        let removed = std::mem::replace(&mut self.removed, Bits::new(wanted.len(), false));
        self.dirty.set(0..wanted.len(), false);
        // What is dropped only now has changed for the next one. Private anonymous memory shows it; other memory seems
        // as protected as before.
        self.late.add(&removed, &self.silent);
        self.late.join_to(&mut self.dirty);
        // And what can't be protected may change at any time.
        self.dirty.join(&self.unprotected);
        counts.total.store((wanted.count() * page_size()) as u64, Ordering::Relaxed);
        let pause = u64::try_from(moment.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counts.pause_ns.store(pause, Ordering::Relaxed);
        self.active = Some(Active::new(queue, counts, wanted, removed));
        Ok(())
    }

    /// Finds what has lost its protection without an event, and lets writers go on meanwhile.
    fn look_ahead(&mut self) -> Result<()> {
        let mut slices = Slices::new();
        for part in self.layout.parts().to_vec() {
            let mut rest = part;
            while rest.len > 0 {
                let slice = slices.cut(rest.clone());
                // At first nothing is protected.
                if !self.unprotected.all(slice.bits()) {
                    slices.time(|| self.look_at(&slice))?;
                    self.let_go_on()?;
                }
                rest.address += slice.len;
                rest.offset += slice.len;
                rest.len -= slice.len;
            }
        }
        Ok(())
    }

    /// Protects what isn't, and lets writers go on meanwhile, until what they write is little, or doesn't get less.
    fn protect_ahead(&mut self) -> Result<()> {
        let (mut left, mut slices) = (usize::MAX, Slices::new());
        for _ in 0..PROTECT_ROUNDS {
            let now = self.unprotected.count();
            if now <= MAX_UNPREPARED_PAGES || now > left / 2 {
                break;
            }
            left = now;
            let mut from = 0;
            while let Some(part) = self.next_unprotected(&mut from) {
                let part = slices.cut(part);
                match slices.time(|| self.protect(&part)) {
                    // What can't be now is left for the moment itself.
                    Err(error) if !error.is_retryable() => return Err(error),
                    _ => from = part.bits().end,
                }
                self.let_go_on()?;
            }
        }
        Ok(())
    }

    /// Lets the threads go on that wait for a fault, while no snapshot is at work.
    pub(super) fn let_go_on(&mut self) -> Result<()> {
        if self.beside.is_some() {
            self.hold_unread_faults()?;
        } else {
            self.hold_faults()?;
        }
        self.retry_held()
    }

    /// The next pages from `from` on that aren't protected and lie side by side. Leaves out what is unmapped.
    fn next_unprotected(&self, from: &mut usize) -> Option<Part> {
        loop {
            let run = self.unprotected.next_run(*from, usize::MAX)?;
            let bytes = run.start * page_size()..run.end * page_size();
            let part = self.layout.locate(&bytes);
            if part.is_some() {
                return part;
            }
            *from = run.start + self.layout.lost(&bytes) / page_size();
        }
    }

    /// Protects all that isn't. A change that is read meanwhile may add pages anywhere, so the search starts over then: what
    /// stays in `unprotected` isn't looked at before the snapshot's moment, as it may be most of all.
    fn protect_rest(&mut self, moment: Instant) -> Result<()> {
        let mut from = 0;
        while let Some(part) = self.next_unprotected(&mut from) {
            match self.protect(&part) {
                Ok(()) => from = part.bits().end,
                // The thread that changes the layout waits until its event is read.
                Err(error) if error.is_retryable() => {
                    check_time(moment)?;
                    self.hold_faults()?;
                    from = 0;
                    thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether all is mapped where the layout says, by this descriptor's mappings. If not, what isn't read yet is read.
    /// For memory that was all seen protected after it was `mapped` so.
    ///
    /// The second descriptor protects whatever lies at an address. A page that was moved away by a change that isn't read
    /// leaves a hole, or memory that isn't protected, or memory that is registered with another descriptor.
    fn is_where_it_was(&mut self, mapped: &Mapped) -> Result<bool> {
        if self.beside.is_none() {
            return Ok(true);
        }
        let strays = self.strays(mapped)?;
        if strays.is_empty() {
            return Ok(true);
        }
        if self.is_changing() {
            self.hold_faults()?;
        } else {
            // No event tells: before Linux 6.18 any userfaultfd of the process can end a registration.
            for range in strays {
                let gone = self.layout.remove(&range);
                self.gone(&gone);
            }
        }
        Ok(false)
    }

    fn protect(&mut self, part: &Part) -> Result<()> {
        let range = part.address..part.address + part.len;
        reach(Point::Watch(Moment::Protect), part.address);
        let armed = match &self.beside {
            // What another tracker has registered there by now isn't touched.
            Some(_) if self.watch.is_held_by_another(&range) && self.is_of_another(&range) => {
                Err(Error::NotTracked { start: range.start, end: range.end })
            }
            Some(beside) => self.watch.arm_through(beside, &range),
            None => self.watch.arm(&range),
        };
        match armed {
            Ok(()) => {
                self.unprotected.set(part.bits(), false);
                Ok(())
            }
            // Some of it isn't mapped, or isn't ours: all the rest is protected.
            Err(Error::NotTracked { .. }) if part.len > part.page => {
                let half = (part.len / part.page).div_ceil(2) * part.page;
                let behind = Part {
                    address: part.address + half,
                    offset: part.offset + half,
                    len: part.len - half,
                    page: part.page,
                };
                let first = self.protect(&Part { len: half, ..part.clone() });
                match first {
                    Err(error) if !error.is_retryable() => Err(error),
                    first => first.and(self.protect(&behind)),
                }
            }
            // Its event will tell.
            Err(Error::NotTracked { .. }) if self.is_changing() => Err(Error::SystemError(Errno::EAGAIN)),
            // No event tells: before Linux 6.18 any userfaultfd of the process can end a registration.
            Err(Error::NotTracked { .. }) => {
                self.unprotected.set(part.bits(), false);
                let gone = self.layout.remove(&(part.address..part.address + part.len));
                self.gone(&gone);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Fails once a snapshot has tried to begin for too long.
fn check_time(moment: Instant) -> Result<()> {
    if moment.elapsed() > BEGIN_PATIENCE { Err(Error::AlwaysChanging) } else { Ok(()) }
}
