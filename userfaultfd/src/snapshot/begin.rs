//! The moment of a snapshot: all is protected, and no write was let through meanwhile.
//!
//! The kernel takes some 80 ns to protect a page, which makes 80 ms of 4 GiB. So as not to hold up writers for so long,
//! memory is protected ahead, while whoever writes to it goes on at once, and for the moment itself there is only left
//! what was written since: as live migration copies memory while its machine runs on, and stops it for the rest.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use super::copier::{Active, Copier, PATIENCE, TRIES, bits_of};
use super::layout::Part;
use super::shared::Begin;
use super::slices::Slices;
use crate::dirty::watch::pointer;
use crate::{Errno, Error, RegisterMode, Result, page_size};

/// So few pages aren't protected ahead, but at the moment itself.
const FEW: usize = 256;

/// How often what was written is protected again ahead, if that is less and less.
const ROUNDS: usize = 5;

impl Copier {
    /// Begins a snapshot. At its moment no fault is resolved before all of it is protected: what was written after
    /// another write isn't in the snapshot if that one isn't.
    pub(super) fn begin(&mut self, Begin { queue, counts, changed }: Begin) -> Result<()> {
        self.dirty.join(&changed);
        self.doubted = 0;
        self.unprotected = self.dirty.clone();
        self.protect_ahead()?;
        let (moment, mut tries) = (Instant::now(), 0);
        while !self.protect_rest(&mut tries)? {
            self.start_over()?;
        }
        let wanted = self.dirty.clone();
        self.dirty.set(0..self.dirty.len(), false);
        counts.total.store((wanted.count() * page_size()) as u64, Ordering::Relaxed);
        let pause = u64::try_from(moment.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counts.pause_ns.store(pause, Ordering::Relaxed);
        self.active = Some(Active::new(queue, counts, wanted));
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
        self.read_while_beginning()?;
        self.retry_held()
    }

    /// The next pages from `from` on that aren't protected and lie side by side. Leaves out what is unmapped.
    fn next_unprotected(&self, from: &mut usize) -> Option<Part> {
        loop {
            let run = self.unprotected.next_run(*from, usize::MAX)?;
            let part = self.layout.locate(&(run.start * page_size()..run.end * page_size()));
            if part.is_some() {
                return part;
            }
            *from = run.start + 1;
        }
    }

    /// Protects all that isn't. Tells whether that could be done: the layout may change all the time.
    fn protect_rest(&mut self, tries: &mut u32) -> Result<bool> {
        let mut from = 0;
        while let Some(part) = self.next_unprotected(&mut from) {
            match self.protect(&part) {
                Ok(()) => from = bits_of(&part).end,
                // Who changes the layout waits until its event is read.
                Err(error) if error.is_retryable() => {
                    *tries += 1;
                    if *tries % TRIES == 0 {
                        return if *tries < TRIES * TRIES { Ok(false) } else { Err(error) };
                    }
                    self.read_while_beginning()?;
                    thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn protect(&mut self, part: &Part) -> Result<()> {
        match self.watch.arm(&(part.address..part.address + part.len)) {
            // Or unmapped meanwhile, which its event will tell.
            Ok(()) | Err(Error::NotTracked { .. }) => {
                self.unprotected.set(bits_of(part), false);
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
                self.read_while_beginning()?;
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
        Ok(())
    }
}
