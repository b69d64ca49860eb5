//! Reading a descriptor's events: changes of the layout are applied at once, and faults are left to be resolved.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::shared::Shared;
use super::vma_events::{self, Change};
use crate::pager::fill::work::Fault;
use crate::pager::memory::descriptor::{Attachment, Descriptor};
use crate::pager::{DescriptorId, Problem, stats};
use crate::sync_point::{Point, reach};
use crate::{Event, EventBuffer, FaultKind, ReadWrite, Result};

/// The events that one system call has read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Read {
    Nothing,
    Faults,
    /// Changes of the layout, perhaps with faults.
    Changes,
}

/// The buffers of a worker.
#[derive(Debug)]
pub(super) struct EventReader {
    many: EventBuffer,
    one: EventBuffer,
}

impl EventReader {
    /// Makes buffers for up to `batch` events. `None`: there is no memory.
    pub(super) fn try_new(batch: usize) -> Option<Self> {
        Some(Self { many: EventBuffer::try_new(batch)?, one: EventBuffer::try_new(1)? })
    }

    /// Reads a descriptor's events with one system call. `is_slow`: sources keep this worker waiting, so it leaves faults to
    /// other workers. `blocking`: the descriptor was found to block.
    pub(super) fn read(
        &mut self,
        shared: &Shared,
        descriptor: &Descriptor,
        (thread, is_slow, blocking): (usize, bool, bool),
        faults: &mut VecDeque<Fault>,
    ) -> Result<Read> {
        let alone = shared.fill.threads.workers == 1 && shared.fill.threads.added == 0;
        let buffer = if !alone && is_slow { &mut self.one } else { &mut self.many };
        let mut result = Ok(Read::Nothing);
        let mut read = |serving: &mut Attachment| -> Result<Read> {
            if blocking {
                // Another owner of the description has made it so, and poll(2) reports that as an error without end.
                serving.uffd.set_nonblocking(true)?;
            }
            // Another owner may do so at any time, and waiting here would keep the pager's other threads waiting.
            let count = match descriptor.journal() {
                None => serving.uffd.read_batch_now(buffer)?,
                Some(state) => {
                    let count =
                        serving.uffd.read_batch_via(buffer, |events, read| state.read(events, read))?;
                    reach(Point::AfterKept, count);
                    count
                }
            };
            // Relaxed: it decides whether a failure is reported once more, and no other data depends on it.
            if descriptor.read_failed.load(Ordering::Relaxed) {
                descriptor.read_failed.store(false, Ordering::Relaxed);
            }
            let full = count == buffer.capacity();
            if full && !alone {
                shared.poll.rearm(descriptor, serving.uffd.as_fd());
            }
            let since = stats::now();
            // Changes are applied at once, and faults are resolved after all of them.
            let mut changes = false;
            for event in buffer.drain() {
                changes |= !matches!(event, Ok(Event::Pagefault { .. }));
                take(shared, thread, descriptor, serving, event, faults, since);
            }
            if let Some(state) = descriptor.journal() {
                reach(Point::BeforeClear, count);
                state.clear(count);
            }
            // A thread that a fill has woken may have faulted again at once: often the next fault is queued by now, and needs
            // no poll.
            Ok(match count {
                0 => Read::Nothing,
                _ if changes => Read::Changes,
                _ => Read::Faults,
            })
        };
        if descriptor.tells_changes {
            descriptor.with_all_shards(&mut |serving| {
                if let Some(serving) = serving {
                    result = read(serving);
                }
            });
        } else if let Some(serving) = &mut *descriptor.lock_shard(thread) {
            result = read(serving);
        }
        result
    }
}

/// Handles an event: applies a change, or adds a fault to those that must be resolved.
fn take(
    shared: &Shared,
    thread: usize,
    descriptor: &Descriptor,
    serving: &mut Attachment,
    event: Result<Event>,
    faults: &mut VecDeque<Fault>,
    since: Instant,
) {
    let counters = shared.fill.counters(thread);
    let change = match event {
        Ok(Event::Pagefault { kind, rw, addr, thread_id }) => {
            let counter = match kind {
                FaultKind::Missing => &counters.missing_faults,
                FaultKind::Minor => &counters.minor_faults,
                FaultKind::WriteProtected => &counters.write_protect_faults,
                FaultKind::ReadWriteProtected => &counters.read_write_protect_faults,
                FaultKind::Unknown(_) => &counters.unknown_faults,
            };
            counter.add(1);
            return faults.push_back(Fault {
                address: addr.addr(),
                kind,
                is_write: rw == ReadWrite::Write,
                thread: thread_id.as_raw(),
                since,
                joined: false,
            });
        }
        Ok(Event::Fork { uffd }) => Change::Fork { uffd },
        Ok(Event::Remap { from, to, len }) => {
            Change::Remap { from: from.addr()..from.addr() + len, to: to.addr() }
        }
        Ok(Event::Remove { start, end }) => Change::Remove(start.addr()..end.addr()),
        Ok(Event::Unmap { start, end }) => Change::Unmap(start.addr()..end.addr()),
        Err(error) => {
            let descriptor = DescriptorId(descriptor.id);
            return shared.fill.report(Problem::Read { descriptor, error });
        }
    };
    vma_events::apply(shared, counters, descriptor, serving, change);
}
