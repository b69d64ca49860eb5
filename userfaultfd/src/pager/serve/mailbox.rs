//! What workers have the control thread do. They don't do it themselves: it takes the allocator's locks, which a thread
//! that waits for a page may hold.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar};
use std::time::Duration;

use super::poll::Token;
use crate::lock_order::{RankedMutex, lock, rank};
use crate::mapped_vec::{self, MappedVec};
use crate::pager::bell::Bell;
use crate::pager::memory::address_map::{AddressMap, SEGMENT_ROOM, Segments};
use crate::pager::memory::descriptor::Descriptor;
use crate::pager::memory::page_state::Room;
use crate::{Errno, Uffd, sys};

/// Something for the control thread to do.
#[derive(Debug)]
pub(crate) enum Note {
    /// Serve a fork's child.
    Fork(Fork),
    /// Free what isn't served any more.
    Ended,
}

/// A process forked, and this is its child's.
#[derive(Debug)]
pub(crate) struct Fork {
    pub(crate) parent: u64,
    pub(crate) uffd: Uffd,
    pub(crate) copy: io::Result<Inherited>,
}

/// What a fork's child has of its parent.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// As it was when the process forked, which is the child's.
    pub(crate) layout: AddressMap,
    /// The states of its segments' pages then, one after the other; nothing of those that are shared.
    pub(crate) states: Room,
}

/// There won't be any more notes.
#[derive(Debug)]
pub(crate) struct Stopped;

/// Forks that there is room for from the start. More of them move to a longer mapping.
const FORK_ROOM: usize = 16;

#[derive(Debug)]
pub(crate) struct Mailbox {
    notes: RankedMutex<Notes, { rank::QUEUE }>,
    /// The control thread has taken a note.
    taken: Condvar,
    /// What the control thread waits for: the bell, and what tells of the ends of processes.
    epoll: OwnedFd,
    bell: Arc<Bell>,
}

/// Adding a note takes nothing of the allocator's: see `mapped_vec`.
#[derive(Debug)]
struct Notes {
    forks: MappedVec<Fork>,
    /// Room for what a change takes out of a layout.
    gone: Segments,
    ended: bool,
    /// Whether a fork was taken, and its child isn't served yet.
    adopting: bool,
    stopped: bool,
}

impl Notes {
    /// Whether a process has forked whose child isn't served yet.
    fn has_forks(&self) -> bool {
        self.adopting || !self.forks.is_empty()
    }
}

impl Mailbox {
    pub(crate) fn new(bell: Arc<Bell>) -> Result<Self, Errno> {
        let epoll = sys::epoll()?;
        let stop = Token::STOP.number();
        sys::epoll_control(epoll.as_fd(), libc::EPOLL_CTL_ADD, bell.as_fd(), libc::EPOLLIN, stop)?;
        let notes = Notes {
            forks: mapped_vec::try_with_room(FORK_ROOM).ok_or(Errno::ENOMEM)?,
            gone: mapped_vec::try_with_room(SEGMENT_ROOM).ok_or(Errno::ENOMEM)?,
            ended: false,
            adopting: false,
            stopped: false,
        };
        Ok(Self { notes: RankedMutex::new(notes), taken: Condvar::new(), epoll, bell })
    }

    /// Its own descriptors, for a fork's child.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.epoll.as_fd(), self.bell.as_fd()]
    }

    /// Has the control thread do something.
    pub(crate) fn post(&self, note: Note) {
        match note {
            Note::Fork(fork) => {
                let mut notes = lock(&self.notes);
                mapped_vec::reserve(&mut notes.forks, 1);
                notes.forks.push(fork);
            }
            Note::Ended => lock(&self.notes).ended = true,
        }
        self.bell.ring();
    }

    /// Has the control thread look at what is served.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// Drops what a change takes out of a layout. That frees nothing: see [`Regions`](super::regions::Regions).
    pub(crate) fn defer_free(&self, change: impl FnOnce(&mut Segments)) {
        let mut notes = lock(&self.notes);
        change(&mut notes.gone);
        let some = !notes.gone.is_empty();
        notes.gone.clear();
        drop(notes);
        if some {
            self.post(Note::Ended);
        }
    }

    /// The next note for the control thread, which has done what the one before asked for, and whether that was to serve a
    /// fork's child. `Err` once the pager has stopped and nothing is left.
    pub(crate) fn next(&self) -> (Result<Option<Note>, Stopped>, bool) {
        let mut notes = lock(&self.notes);
        let adopted = std::mem::take(&mut notes.adopting);
        let fork = (!notes.forks.is_empty()).then(|| Note::Fork(notes.forks.remove(0)));
        notes.adopting = fork.is_some();
        let note = fork.or_else(|| std::mem::take(&mut notes.ended).then_some(Note::Ended));
        let stopped = notes.stopped;
        drop(notes);
        self.taken.notify_all();
        (if note.is_none() && stopped { Err(Stopped) } else { Ok(note) }, adopted)
    }

    /// Waits until there are notes, or something tells of the end of a process. Returns how many tokens there are.
    pub(crate) fn wait(&self, events: &mut [libc::epoll_event], timeout: Option<Duration>) -> usize {
        // Rounded up: too early is once more for nothing.
        let millis = |time: Duration| time.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX);
        let timeout = timeout.map_or(-1, millis);
        let ready = sys::epoll_wait(self.epoll.as_fd(), events, timeout)
            .unwrap_or_else(|errno| unreachable!("waiting for notes: {errno}"));
        if events[..ready].iter().any(|event| Token::of_event(event).is_none()) {
            self.bell.hush();
        }
        ready
    }

    /// Has the control thread look after a process once `events` of `end` come.
    pub(crate) fn watch(
        &self,
        descriptor: &Descriptor,
        end: BorrowedFd<'_>,
        events: libc::c_int,
    ) -> Result<(), Errno> {
        let (epoll, token) = (self.epoll.as_fd(), Token::of(descriptor).number());
        sys::epoll_control(epoll, libc::EPOLL_CTL_ADD, end, events | libc::EPOLLONESHOT, token)
    }

    /// Ends [`watch`](Self::watch), before the descriptor is closed.
    pub(crate) fn unwatch(&self, end: BorrowedFd<'_>) {
        // It isn't there if watching it has failed.
        let _deleted = sys::epoll_control(self.epoll.as_fd(), libc::EPOLL_CTL_DEL, end, 0, 0);
    }

    /// Whether a process has forked whose child isn't served yet.
    pub(crate) fn has_forks(&self) -> bool {
        lock(&self.notes).has_forks()
    }

    /// Waits until the children of all forks that were read are served.
    pub(crate) fn wait_for_forks(&self) {
        drop(lock(&self.notes).wait_while(&self.taken, |notes| notes.has_forks()));
    }

    /// Has the control thread end when nothing is left.
    pub(crate) fn stop(&self) {
        lock(&self.notes).stopped = true;
        self.bell.ring();
    }
}
