//! What members have to write to their stores before pages may leave.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Frames, Member, Slot};
use crate::pager::evict::pool::Pool;
use crate::pager::evict::store::{StoreBacking, WriteBack};
use crate::pager::{Problem, RegionId};

/// How long a store may do nothing before faults don't wait any more for pages that must be written there.
const STORE_PATIENCE: Duration = Duration::from_secs(1);

impl Slot {
    fn store(&self) -> Option<&StoreBacking> {
        self.member.residence().store()
    }

    /// Has a page written, if its store may be written now.
    fn enqueue(&mut self, page: usize) -> bool {
        let writes = self.store().is_some_and(|store| store.write_back == WriteBack::Any);
        let has_room = writes && !self.is_stopping && self.queue.len() < self.queue.capacity();
        if has_room {
            self.queue.push(page);
        }
        has_room
    }

    fn is_writing(&self) -> bool {
        !self.has_failed && (self.writers > 0 || !self.queue.is_empty())
    }
}

impl Frames {
    /// Whether a page in the staging area must be written to a store before it is dropped, which this sets about. It isn't
    /// written again as long as it is there, with the frames locked.
    pub(super) fn must_be_written(&mut self, member: u32, page: usize) -> bool {
        let Some(slot) = self.members[member as usize].as_mut() else { return false };
        let residence = slot.member.residence();
        let place = residence.place(page);
        if residence.store().is_none() || !place.is_dirty() {
            return false;
        }
        if place.is_written() && slot.writers == 0 && slot.enqueue(page) {
            slot.member.write_work.notify_one();
        }
        true
    }

    /// Has a page written that is about to leave.
    pub(super) fn enqueue(&mut self, member: u32, page: usize) {
        let was_writing = self.is_writing();
        let Some(slot) = self.members[member as usize].as_mut() else { return };
        if slot.enqueue(page) {
            slot.member.write_work.notify_one();
            if !was_writing {
                self.write_progress = Instant::now();
            }
        }
    }

    /// Whether any store is being written.
    fn is_writing(&self) -> bool {
        self.members.iter().flatten().any(Slot::is_writing)
    }

    /// Whether a store is being written that hasn't been silent for too long: it's worth waiting for.
    pub(in crate::pager::evict) fn waits_for_store(&self) -> bool {
        self.is_writing() && self.write_progress.elapsed() < STORE_PATIENCE
    }

    /// The next memory of which pages can't leave, and hasn't been reported, with the problem.
    pub(in crate::pager::evict) fn next_trouble(&mut self, pool: &Pool) -> Option<(Arc<Member>, Problem)> {
        let page_size = crate::page_size();
        let room = pool.limit().saturating_sub(self.pins.page_count() + 2 * pool.max_run());
        for slot in self.members.iter_mut().flatten().filter(|slot| !slot.is_reported) {
            let (member, dirty) = (&slot.member, slot.member.residence().dirty_count());
            let region = RegionId(member.region.id);
            let problem = match slot.store() {
                Some(store) if store.write_back == WriteBack::OnFlush && dirty > room => {
                    Problem::BudgetFull { region, dirty: dirty * page_size }
                }
                Some(_) if slot.is_writing() => Problem::WriteBack {
                    region,
                    address: member.start + slot.in_hand.start * page_size,
                    len: slot.in_hand.len() * page_size,
                    error: io::ErrorKind::TimedOut.into(),
                },
                _ => continue,
            };
            let member = Arc::clone(member);
            slot.is_reported = true;
            return Some((member, problem));
        }
        None
    }

    /// Pages leave again.
    pub(in crate::pager::evict) fn forget_trouble(&mut self) {
        self.members.iter_mut().flatten().for_each(|slot| slot.is_reported = false);
    }

    /// Takes the pages that must be written for a member, which its thread begins to write if there are any. `None`: it must
    /// end.
    pub(in crate::pager::evict) fn take_queue(&mut self, member: u32, pages: &mut Vec<usize>) -> Option<()> {
        let slot = self.members[member as usize].as_mut().filter(|slot| !slot.is_stopping)?;
        // As much as there is room for, so that nothing is allocated.
        let taken = slot.queue.len().min(pages.capacity() - pages.len());
        pages.extend(slot.queue.drain(..taken));
        slot.writers += usize::from(taken > 0);
        Some(())
    }

    /// Has the thread end that writes for a member.
    pub(in crate::pager::evict) fn stop_writer(&mut self, member: u32) {
        if let Some(slot) = self.members[member as usize].as_mut() {
            slot.is_stopping = true;
            slot.queue.clear();
            slot.member.write_work.notify_one();
        }
    }

    /// Whether the thread must end that writes for a member.
    pub(in crate::pager::evict) fn is_writer_stopping(&self, member: u32) -> bool {
        self.members[member as usize].as_ref().is_none_or(|slot| slot.is_stopping)
    }

    /// A thread begins to write pages of a member.
    pub(in crate::pager::evict) fn begin_write(&mut self, member: u32) {
        if !self.is_writing() {
            self.write_progress = Instant::now();
        }
        if let Some(slot) = self.members[member as usize].as_mut() {
            slot.writers += 1;
        }
    }

    /// A thread begins to copy these pages of a member.
    pub(in crate::pager::evict) fn begin_copy(&mut self, member: u32, pages: Range<usize>) {
        if let Some(slot) = self.members[member as usize].as_mut() {
            slot.copied = (pages, false);
        }
    }

    /// It has copied them. Returns whether the program has pinned any meanwhile.
    pub(in crate::pager::evict) fn end_copy(&mut self, member: u32) -> bool {
        let slot = self.members[member as usize].as_mut();
        slot.is_some_and(|slot| std::mem::replace(&mut slot.copied, (0..0, false)).1)
    }

    /// These are the ones that it writes next.
    pub(in crate::pager::evict) fn write_next(&mut self, member: u32, pages: Range<usize>) {
        if let Some(slot) = self.members[member as usize].as_mut() {
            slot.in_hand = pages;
        }
    }

    /// They were written, or couldn't be.
    pub(in crate::pager::evict) fn written(&mut self, member: u32, is_stored: bool) {
        self.write_progress = Instant::now();
        if let Some(slot) = self.members[member as usize].as_mut() {
            slot.has_failed = !is_stored;
        }
    }

    /// The thread has no more to write.
    pub(in crate::pager::evict) fn end_write(&mut self, member: u32) {
        if let Some(slot) = self.members[member as usize].as_mut() {
            slot.writers -= 1;
        }
    }
}
