//! [`Handoff`]: memory that was handed over.

use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::orphan::Orphan;
use super::succession::Adopted;
use super::{Connection, Credentials, Dialect, MemoryRegion, Process};
use crate::owner::Owner;
use crate::pager::{MissingRange, OnEnd};
use crate::{RegisterMode, Uffd};

/// Memory that a monitor has handed over: what is in [`Parts`].
///
/// Give it to [`Pager::serve`](crate::pager::Pager::serve), or take it apart by [`into_parts`](Self::into_parts). If it is
/// dropped, nothing will ever fill the memory: then the process ends as [`on_end`](Self::on_end) says, by default
/// with [`OnEnd::Kill`]. One that was [adopted](super::adopt) waits for the next that adopts it. In a fork's child, dropping it closes the child's copies of the descriptors, and does nothing else.
#[derive(Debug)]
#[must_use = "dropping it ends the process that handed it over"]
pub struct Handoff {
    parts: Option<Parts>,
    on_end: OnEnd,
    /// `None`: the system had no memory to note it, and a fork's child is taken for the owner.
    owner: Option<Owner>,
}

/// What was handed over.
#[derive(Debug)]
#[non_exhaustive]
pub struct Parts {
    /// The form of the message.
    pub dialect: Dialect,
    /// The userfaultfd. Its handshake is done, and the memory is registered with it.
    pub userfaultfd: Uffd,
    /// The ranges of the memory, checked: they are made of whole pages, and none overlaps another one.
    pub regions: Vec<MemoryRegion>,
    /// The modes for which the memory is registered, as the message says.
    pub mode: RegisterMode,
    /// The files that are the memory: one, or one for each region.
    pub memfds: Vec<OwnedFd>,
    /// The process that handed it over.
    pub process: Process,
    /// The process that has the memory, if the message says it: in the namespace of the monitor.
    pub pid: Option<u32>,
    /// The connection. Its end is the end of the virtual machine. `None` if there is none any more.
    pub stream: Option<Connection>,
    /// The missing pages, if a pager has served the memory before. `None`: all are missing.
    pub missing: Option<Vec<MissingRange>>,
    /// The states of the pages, if a pager that has died has served the memory before.
    pub(super) state: Option<Adopted>,
}

/// What is known of a [`Handoff`], without its descriptors, to be written down or sent to another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Description {
    /// The form of the message.
    pub dialect: Dialect,
    /// The ranges of the memory.
    pub regions: Vec<MemoryRegion>,
    /// The modes for which the memory is registered: the bits of [`RegisterMode`].
    pub mode: u64,
    /// The process that handed it over.
    pub credentials: Credentials,
    /// The process that has the memory, if the message says it.
    pub pid: Option<u32>,
    /// The missing pages, if a pager has served the memory before.
    pub missing: Option<Vec<MissingRange>>,
    /// How the process ends.
    pub on_end: OnEnd,
}

impl Handoff {
    /// Makes one that belongs to this process.
    pub(super) fn new(parts: Parts, on_end: OnEnd) -> Self {
        Self::of(Owner::current().ok(), parts, on_end)
    }

    /// Makes one that belongs to a process, whose end of it ends the one that handed it over.
    pub(super) fn of(owner: Option<Owner>, parts: Parts, on_end: OnEnd) -> Self {
        Self { parts: Some(parts), on_end, owner }
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// Sets how the process ends when its memory can't be served. The default is [`OnEnd::Kill`].
    pub fn set_on_end(&mut self, on_end: OnEnd) {
        self.on_end = on_end;
    }

    /// Returns how the process ends when its memory can't be served.
    #[must_use]
    pub fn on_end(&self) -> OnEnd {
        self.on_end
    }

    /// Returns the parts of the hand-over. From then on dropping the parts doesn't end the process; closing the userfaultfd shows zeros in pages
    /// that are missing, unless the process has a duplicate itself.
    #[must_use = "closing the userfaultfd shows zeros in missing pages"]
    #[expect(clippy::missing_panics_doc, reason = "it has its parts until this")]
    pub fn into_parts(mut self) -> Parts {
        self.parts.take().expect("it has them until it is taken apart")
    }

    /// Returns a description of what was handed over, without the descriptors.
    ///
    /// Of what was [adopted](super::adopt) the states of the pages are known only to the pager that serves it: serve it, and
    /// describe what [`detach`](super::ServedProcess::detach) returns. The description of an adopted hand-over, and its parts,
    /// don't say what is missing.
    #[must_use]
    pub fn description(&self) -> Description {
        Description {
            dialect: self.dialect,
            regions: self.regions.clone(),
            mode: self.mode.bits(),
            credentials: self.process.credentials,
            pid: self.pid,
            missing: self.missing.clone(),
            on_end: self.on_end,
        }
    }

    /// Returns a hand-over of which the description comes from another process, and the descriptors, too.
    pub fn from_description(
        description: Description,
        userfaultfd: Uffd,
        memfds: Vec<OwnedFd>,
        pidfd: Option<OwnedFd>,
    ) -> Self {
        let Description { dialect, regions, mode, credentials, pid, missing, on_end } = description;
        let mode = RegisterMode::from_bits_retain(mode);
        let process = Process { credentials, pidfd };
        let parts = Parts {
            dialect,
            userfaultfd,
            regions,
            mode,
            memfds,
            process,
            pid,
            stream: None,
            missing,
            state: None,
        };
        Self::new(parts, on_end)
    }

    /// Confirms to the monitor that its memory is served, if the dialect has a confirmation.
    ///
    /// [`Pager::serve`](crate::pager::Pager::serve) does it.
    ///
    /// # Errors
    ///
    /// Those of sendmsg(2). `TimedOut`: the monitor reads nothing for two seconds.
    pub fn confirm(&self) -> std::io::Result<()> {
        self.stream.as_ref().map_or(Ok(()), |stream| stream.confirm(self.dialect))
    }
}

impl Deref for Handoff {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        self.parts.as_ref().expect("it has them until it is taken apart")
    }
}

impl DerefMut for Handoff {
    fn deref_mut(&mut self) -> &mut Parts {
        self.parts.as_mut().expect("it has them until it is taken apart")
    }
}

impl Drop for Handoff {
    fn drop(&mut self) {
        // A child's copies are closed with the parts.
        if !self.owner.is_none_or(|owner| owner.is_current()) {
            return;
        }
        if let Some(Parts { userfaultfd, regions, process, state, .. }) = self.parts.take() {
            let on_end = if state.is_some() { OnEnd::Leave } else { self.on_end };
            if let Some(orphan) = Orphan::end(on_end, userfaultfd, &regions, process) {
                orphan.wait();
            }
        }
    }
}
