//! The thread that writes pages to their store so that they can leave.

use std::sync::Arc;

use super::clean::{self, Written};
use super::frames::{Frames, Member};
use super::pool::STUCK_INTERVAL;
use super::residence::Residence;
use super::store::{StoreBacking, WRITE_PAGES};
use crate::pager::thread::Thread;
use crate::pager::{Problem, RegionId, Result};

/// Ranges that are noted as not synced, at most: then the thread syncs them.
const MAX_UNSYNCED_RANGES: usize = 1 << 16;

/// Ends with the value.
pub(crate) struct Writer {
    residence: Arc<Residence>,
    thread: Option<Thread>,
}

impl Writer {
    /// Starts the thread for a residence that is attached.
    pub(crate) fn start(residence: &Arc<Residence>) -> Result<Self> {
        let member = residence.as_member().filter(|member| member.residence().store().is_some());
        let thread = match member {
            Some(member) => Some(Thread::spawn(c"uffd-write", move || run(&member))?),
            None => None,
        };
        Ok(Self { residence: Arc::clone(residence), thread })
    }

    /// Ends the thread, which writes what it has in hand.
    pub(crate) fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if !self.residence.pool().is_here() {
            // A fork's child hasn't got the thread.
            return std::mem::forget(thread);
        }
        if let Some(number) = self.residence.member() {
            self.residence.pool().lock().stop_writer(number);
        }
        thread.join();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(member: &Arc<Member>) {
    let (residence, pool) = (member.residence(), member.residence().pool());
    let Some(store) = residence.store() else { return };
    let mut pages = Vec::with_capacity(2 * WRITE_PAGES);
    let mut has_failed = false;
    loop {
        let mut frames = pool.lock();
        if has_failed {
            // What couldn't be written is found again when it comes to leave.
            let waits = |frames: &mut Frames| {
                residence.member().is_some_and(|number| !frames.is_writer_stopping(number))
            };
            frames = frames.wait_timeout_while(&member.write_work, STUCK_INTERVAL, waits);
        }
        loop {
            let taken = residence.member().and_then(|number| frames.take_queue(number, &mut pages));
            if taken.is_none() {
                return;
            }
            if !pages.is_empty() {
                break;
            }
            frames = frames.wait(&member.write_work);
        }
        drop(frames);
        pages.sort_unstable();
        pages.dedup();
        has_failed = !write(member, store, &pages);
        if let Some(number) = residence.member() {
            pool.lock().end_write(number);
        }
        pages.clear();
    }
}

/// Writes pages, and reports those that couldn't be. Returns whether all were.
fn write(member: &Arc<Member>, store: &StoreBacking, pages: &[usize]) -> bool {
    let mut turn = store.turn();
    let mut written = Written::default();
    // What another thread has claimed is found again, if it leaves all the same.
    clean::write(member, store, &mut turn, pages, &mut written);
    let Written { mut failed, mut error, .. } = written;
    if turn.unsynced.range_count() > MAX_UNSYNCED_RANGES {
        if let Err(failure) = clean::sync(member, store, &mut turn, &mut failed) {
            error.get_or_insert((super::flush_error::FlushStep::Sync, failure));
        }
    }
    drop(turn);
    let Some((_, error)) = error else { return true };
    let (kind, code) = (error.kind(), error.raw_os_error());
    let mut error = Some(error);
    for pages in failed {
        let again = || code.map_or_else(|| kind.into(), std::io::Error::from_raw_os_error);
        member.pager.report(Problem::WriteBack {
            region: RegionId(member.region.id),
            address: member.start + pages.start * crate::page_size(),
            len: pages.len() * crate::page_size(),
            error: error.take().unwrap_or_else(again),
        });
    }
    false
}
