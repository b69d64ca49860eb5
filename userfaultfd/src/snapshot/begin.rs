//! The moment of a snapshot: all is protected, and no write was let through meanwhile.
//!
//! The kernel takes some 80 ns to protect a page, which makes 80 ms of 4 GiB. So as not to hold up writers for so long,
//! memory is protected ahead, while whoever writes to it goes on at once, and for the moment itself there is only left
//! what was written since: as live migration copies memory while its machine runs on, and stops it for the rest.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::bits::Bits;
use super::copier::{Active, Copier, PATIENCE, bits_of};
use super::layout::Part;
use super::shared::Begin;
use super::slices::Slices;
use crate::dirty::watch::pointer;
use crate::{Errno, Error, RegisterMode, Result, page_size};

/// So few pages aren't protected ahead, but at the moment itself.
const FEW: usize = 256;

/// How often what was written is protected again ahead, if that is less and less.
const ROUNDS: usize = 5;

/// How long it is tried to protect what isn't while the layout changes, and writers wait. Then all begins anew, and for a
/// moment nothing tells of changes.
const MOST: Duration = Duration::from_millis(200);

/// How long in all.
const GIVE_UP: Duration = Duration::from_secs(20);

impl Copier {
    /// Begins a snapshot. At its moment no fault is resolved before all of it is protected: what was written after
    /// another write isn't in the snapshot if that one isn't.
    pub(super) fn begin(&mut self, Begin { queue, counts, changed }: Begin) -> Result<()> {
        self.dirty.join(&changed);
        self.doubted = 0;
        if !self.look.can_tell() {
            self.unprotected.join(&self.dirty);
        }
        self.look_ahead()?;
        self.protect_ahead()?;
        let (moment, mut since, mut all_markers) = (Instant::now(), Instant::now(), false);
        loop {
            if !self.protect_rest(since)? {
                if moment.elapsed() > GIVE_UP {
                    return Err(Error::SystemError(Errno::EAGAIN));
                }
                self.start_over()?;
                since = Instant::now();
                continue;
            }
            // Protection ends without an event, too. The moment is the beginning of a look that finds all protected,
            // since nothing is protected during it: of a page that lost its protection before, and was written, the
            // content would be of a later moment.
            let lost = self.look_at_all()?;
            let markers = lost.pages == lost.markers;
            if lost.pages == 0 || markers && all_markers {
                break;
            }
            // What looks like one may be a page that was swapped out. That is protected now.
            all_markers = markers;
        }
        self.mapped = self.mappings()?;
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
    pub(super) fn let_go_on(&mut self) -> Result<()> {
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

    /// Protects all that isn't. Tells whether that could be done: the layout may change all the time.
    fn protect_rest(&mut self, since: Instant) -> Result<bool> {
        let mut from = 0;
        while let Some(part) = self.next_unprotected(&mut from) {
            match self.protect(&part) {
                Ok(()) => from = bits_of(&part).end,
                // Who changes the layout waits until its event is read.
                Err(error) if error.is_retryable() => {
                    if since.elapsed() > MOST {
                        return Ok(false);
                    }
                    self.hold_faults()?;
                    thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn protect(&mut self, part: &Part) -> Result<()> {
        match self.watch.arm(&(part.address..part.address + part.len)) {
            Ok(()) => {
                self.unprotected.set(bits_of(part), false);
                Ok(())
            }
            // Unmapped, which its event will tell.
            Err(Error::NotTracked { .. }) if self.is_changing() => Err(Error::SystemError(Errno::EAGAIN)),
            // Some of it isn't ours any more, and no event tells: it was changed while nothing was registered.
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

    /// Ends all protection, and begins without: every page may have changed then. For a program that changes its layout
    /// all the time, so that protection can neither be put nor lifted. Registering isn't refused meanwhile, and what
    /// isn't registered can be changed without an event.
    fn start_over(&mut self) -> Result<()> {
        self.free()?;
        // All who waited for a fault have been woken.
        self.held.clear();
        self.changing = 0;
        if let Some(part) = self.layout.parts().first().cloned() {
            // Says that the layout changes before it says that nothing is registered.
            for _ in 0..PATIENCE {
                let protected = self.watch.uffd.write_protect_unexplained(pointer(part.address), part.len);
                if !protected.is_err_and(|error| error.is_retryable()) {
                    break;
                }
                self.hold_faults()?;
                thread::yield_now();
            }
        }
        self.held.clear();
        for part in self.layout.parts() {
            match self.watch.uffd.register_unexplained(
                pointer(part.address),
                part.len,
                RegisterMode::WRITE_PROTECT,
            ) {
                // Unmapped, while nothing told.
                Err(Error::SystemError(Errno::EINVAL)) => {}
                result => drop(result?),
            }
        }
        self.changed(0..self.dirty.len());
        // What was unmapped meanwhile, of which no event tells.
        for part in self.layout.parts().to_vec() {
            let all = part.address..part.address + part.len;
            let mappings = self.watch.process.mappings(&all)?;
            let starts = mappings.iter().map(|mapping| mapping.range.start).chain([all.end]);
            let ends = [all.start].into_iter().chain(mappings.iter().map(|mapping| mapping.range.end));
            for hole in ends.zip(starts).map(|(end, start)| end..start).filter(|hole| !hole.is_empty()) {
                let gone = self.layout.remove(&hole);
                self.gone(&gone);
            }
        }
        Ok(())
    }
}
