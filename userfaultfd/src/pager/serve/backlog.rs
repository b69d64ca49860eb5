//! What a worker has taken on and not begun. Where a source keeps it, the control thread has the others do that.
//!
//! With one call of the kernel a worker takes several events of the poll, and then several faults. The kernel tells no
//! other worker of them; and a source may be fast for long before it hangs.

use std::collections::VecDeque;
use std::time::Instant;

use super::poll::Token;
use crate::mapped_vec;
use crate::mapped_vec::MappedVec;
use crate::pager::fill::retry::Deferred;
use crate::pager::fill::work::Fault;

/// The events that a worker takes with one call.
pub(crate) const EVENTS_PER_WAIT: usize = 16;

/// Behind a lock, which the worker and the control thread hold for a moment. Nothing is allocated or freed meanwhile.
#[derive(Debug)]
pub(crate) struct Backlog {
    /// What can be read, and whether that has failed.
    events: VecDeque<(Token, bool)>,
    /// Faults that were read from a descriptor.
    descriptor: Option<Token>,
    faults: VecDeque<Fault>,
    /// What waits for a change of the layout, as long as the worker tries it again and again.
    pub(crate) changing: MappedVec<Deferred>,
}

/// One thing of a backlog.
#[derive(Debug)]
pub(crate) enum Item {
    Event(Token),
    Fault(Token, Fault),
    Deferred(Deferred),
}

impl Backlog {
    pub(crate) fn new() -> Self {
        let (events, faults) = (VecDeque::new(), VecDeque::new());
        Self { events, descriptor: None, faults, changing: mapped_vec::none() }
    }

    /// How many events, faults, and pieces of work that wait for a change it has.
    pub(crate) fn counts(&self) -> [usize; 3] {
        [self.events.len(), self.faults.len(), self.changing.len()]
    }

    /// Makes room for what a worker may take on. Returns `false` if there is none.
    pub(crate) fn prepare(&mut self, faults: usize, changing: usize) -> bool {
        debug_assert!(self.events.is_empty() && self.faults.is_empty() && self.changing.is_empty());
        self.events.reserve(EVENTS_PER_WAIT);
        self.faults.reserve(faults);
        self.changing.capacity() >= changing
            || mapped_vec::try_with_room(changing).map(|room| self.changing = room).is_some()
    }

    pub(crate) fn put_events(&mut self, events: impl Iterator<Item = (Token, bool)>) {
        self.events.extend(events);
    }

    pub(crate) fn next_event(&mut self) -> Option<(Token, bool)> {
        self.events.pop_front()
    }

    pub(crate) fn put_faults(&mut self, descriptor: Token, faults: impl Iterator<Item = Fault>) {
        debug_assert!(self.faults.is_empty(), "those that were read before");
        self.descriptor = Some(descriptor);
        self.faults.extend(faults);
    }

    pub(crate) fn next_fault(&mut self) -> Option<Fault> {
        self.faults.pop_front()
    }

    pub(crate) fn next_changing(&mut self) -> Option<Deferred> {
        (!self.changing.is_empty()).then(|| self.changing.remove(0))
    }

    /// When the fault was read, or the work deferred, that has waited longest.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        let faults = self.faults.iter().map(|fault| fault.since);
        faults.chain(self.changing.iter().filter_map(Deferred::waited_for_since)).min()
    }

    /// Takes anything, for others: faults first.
    pub(crate) fn take_any(&mut self) -> Option<Item> {
        if let (Some(descriptor), Some(fault)) = (self.descriptor, self.faults.pop_front()) {
            return Some(Item::Fault(descriptor, fault));
        }
        if let Some((token, _)) = self.events.pop_front() {
            return Some(Item::Event(token));
        }
        self.next_changing().map(Item::Deferred)
    }
}
