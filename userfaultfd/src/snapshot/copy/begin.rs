//! The moment of a snapshot: all is protected, and no write was let through meanwhile.
//!
//! The kernel takes some 80 ns to protect a page, which makes 80 ms of 4 GiB. So as not to hold up writers for so long,
//! memory is protected ahead, while whoever writes to it goes on at once, and for the moment itself there is only left
//! what was written since: as live migration copies memory while its machine runs on, and stops it for the rest.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::bits::Bits;
use super::copier::{Active, Copier, bits_of};
use super::layout::Part;
use super::shared::Begin;
use super::slices::Slices;
use crate::sync_point::{Moment, Point, reach};
use crate::watch::pointer;
use crate::{Errno, Error, RegisterMode, Result, page_size};

/// So few pages aren't protected ahead, but at the moment itself.
const FEW: usize = 256;

/// How often what was written is protected again ahead, if that is less and less.
const ROUNDS: usize = 5;

/// Time without success, while the layout changes and writers wait, after which memory is protected through the
/// [second descriptor](Copier::beside).
const REFUSED: Duration = Duration::from_millis(20);

/// Time after which a snapshot that can't begin fails.
const GIVE_UP: Duration = Duration::from_secs(20);

impl Copier {
    /// Begins a snapshot. At its moment no fault is resolved before all of it is protected: what was written after
    /// another write isn't in the snapshot if that one isn't.
    pub(crate) fn begin(&mut self, Begin { queue, counts, changed }: Begin) -> Result<()> {
        self.dirty.join(&changed);
        self.doubted = 0;
        if !self.look.can_tell() {
            self.unprotected.join(&self.dirty);
        }
        self.look_ahead()?;
        self.protect_ahead()?;
        let (moment, mut all_markers) = (Instant::now(), false);
        self.protected_beside = false;
        loop {
            self.protect_rest(moment)?;
            let mapped = self.mappings()?;
            // Protection ends without an event, too. The moment is the beginning of a look that finds all protected,
            // since nothing is protected during it: of a page that lost its protection before, and was written, the
            // content would be of a later moment.
            let lost = self.look_at_all()?;
            let markers = lost.pages == lost.markers;
            if lost.pages == 0 || markers && all_markers {
                if !self.protected_beside || self.is_where_it_was(&mapped)? {
                    self.mapped = mapped;
                    break;
                }
                self.hold_faults()?;
            }
            // What looks like one may be a page that was swapped out. That is protected now.
            all_markers = markers;
            check_time(moment)?;
        }
        let wanted = self.dirty.clone();
        let removed = std::mem::replace(&mut self.removed, Bits::new(wanted.len(), false));
        self.dirty.set(0..wanted.len(), false);
        // What is dropped only now has changed for the next one. Private anonymous memory shows it; other memory seems
        // as protected as before.
        self.dirty.join_common(&removed, &self.silent);
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
                if !self.unprotected.all(bits_of(&slice)) {
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
        for _ in 0..ROUNDS {
            let now = self.unprotected.count();
            if now <= FEW || now > left / 2 {
                break;
            }
            left = now;
            let mut from = 0;
            while let Some(part) = self.next_unprotected(&mut from) {
                let part = slices.cut(part);
                match slices.time(|| self.protect(&part)) {
                    // What can't be now is left for the moment itself.
                    Err(error) if !error.is_retryable() => return Err(error),
                    _ => from = bits_of(&part).end,
                }
                self.let_go_on()?;
            }
        }
        Ok(())
    }

    /// Lets everybody go on who waits, while no snapshot is at work.
    pub(crate) fn let_go_on(&mut self) -> Result<()> {
        self.hold_faults()?;
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

    /// Protects all that isn't.
    fn protect_rest(&mut self, moment: Instant) -> Result<()> {
        let mut from = 0;
        while let Some(part) = self.next_unprotected(&mut from) {
            match self.protect(&part) {
                Ok(()) => from = bits_of(&part).end,
                // The thread that changes the layout waits until its event is read.
                Err(error) if error.is_retryable() => {
                    check_time(moment)?;
                    if moment.elapsed() > REFUSED && self.protect_beside(&part)? {
                        from = bits_of(&part).end;
                        continue;
                    }
                    self.hold_faults()?;
                    thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Protects a part through the second descriptor, which the kernel doesn't refuse while the layout changes. Returns
    /// whether that could be done.
    ///
    /// No event is read for it, so the threads that drop pages stop at their next drop. A part that was moved or unmapped
    /// by a change that isn't read yet counts as protected, too: [`is_where_it_was`](Self::is_where_it_was) finds that.
    fn protect_beside(&mut self, part: &Part) -> Result<bool> {
        let Some(beside) = &self.beside else { return Ok(false) };
        let range = part.address..part.address + part.len;
        reach(Point::Snapshot(Moment::BeforeBeside), part.address);
        // What another tracker has there by now isn't touched.
        if self.watch.is_held_by_another(&range) {
            return Ok(false);
        }
        self.protected_beside = true;
        match self.watch.arm_through(beside, &range) {
            Ok(()) => {
                self.unprotected.set(bits_of(part), false);
                Ok(true)
            }
            Err(Error::NotTracked { .. }) => Ok(false),
            Err(error) if error.is_retryable() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether all is mapped, and by this descriptor's mappings: no page has moved or been unmapped by a change that isn't
    /// read. For memory that was all seen protected after it was `mapped` so.
    ///
    /// A moved page leaves a hole, or memory that isn't protected, or memory that another descriptor protects.
    fn is_where_it_was(&self, mapped: &[Range<usize>]) -> Result<bool> {
        let mapped: usize = mapped.iter().map(Range::len).sum();
        let parts = self.layout.parts();
        if mapped != parts.iter().map(|part| part.len).sum::<usize>() {
            return Ok(false);
        }
        for part in parts {
            match self.watch.uffd.register_unexplained(
                pointer(part.address),
                part.len,
                RegisterMode::WRITE_PROTECT,
            ) {
                Err(Error::SystemError(Errno::EBUSY | Errno::EINVAL)) => return Ok(false),
                result => drop(result?),
            }
        }
        Ok(true)
    }

    fn protect(&mut self, part: &Part) -> Result<()> {
        reach(Point::Snapshot(Moment::BeforeProtect), part.address);
        match self.watch.arm(&(part.address..part.address + part.len)) {
            Ok(()) => {
                self.unprotected.set(bits_of(part), false);
                Ok(())
            }
            // Unmapped, which its event will tell.
            Err(Error::NotTracked { .. }) if self.is_changing() => Err(Error::SystemError(Errno::EAGAIN)),
            // Some of it isn't ours any more, and no event tells: before Linux 6.18 any userfaultfd of the process can
            // end a registration.
            Err(Error::NotTracked { .. }) if part.len > part.page => {
                let half = (part.len / part.page).div_ceil(2) * part.page;
                self.protect(&Part { len: half, ..part.clone() })?;
                self.protect(&Part {
                    address: part.address + half,
                    offset: part.offset + half,
                    len: part.len - half,
                    page: part.page,
                })
            }
            Err(Error::NotTracked { .. }) => {
                self.unprotected.set(bits_of(part), false);
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
    if moment.elapsed() > GIVE_UP { Err(Error::SystemError(Errno::EAGAIN)) } else { Ok(()) }
}
