//! Going on with the memory of processes whose handler has died.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Description, Handoff, MemoryRegion, region};
use crate::pager::memory::state_file::{self, FoundFile, Mark, OpenError, StateFile};
use crate::sys::process;
use crate::{Errno, Uffd, sys};

/// How long the last threads of a killed handler may take to end. One that reads a source from a disk may be the last.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// How often it is looked whether they have.
const END_INTERVAL: Duration = Duration::from_millis(1);

/// The states of the pages of a hand-over that was adopted.
#[derive(Debug)]
pub(super) struct Adopted {
    state: Arc<StateFile>,
    /// Address, length and page size of the regions, in the order of their states.
    regions: Vec<[usize; 3]>,
}

impl Adopted {
    fn places(regions: &[MemoryRegion]) -> impl Iterator<Item = [usize; 3]> {
        regions.iter().map(|region| [region.address, region.len, region.page_size])
    }

    /// Returns the file of states, if these regions are those that it is of.
    pub(super) fn check(&self, regions: &[MemoryRegion]) -> io::Result<Arc<StateFile>> {
        if Self::places(regions).eq(self.regions.iter().copied()) {
            Ok(Arc::clone(&self.state))
        } else {
            let reason = "the regions were changed since they were adopted: their pages have other states";
            Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
        }
    }
}

/// What stands in a file of states beside the states.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// The boot of the system: process ids are none of another one's.
    boot: String,
    /// The process that handed the memory over, and when it was started, in ticks since the boot.
    pid: u32,
    started: u64,
    /// The number by which the userfaultfd is told from others, where the kernel gives each its own.
    inode: Option<u64>,
    description: Description,
}

/// Why the memory of a process can't be adopted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// No handler has left the states of the process's pages in the directory.
    #[error("no handler has left the memory of process {pid} in {}", .dir.display())]
    NotLeft {
        /// The process.
        pid: u32,
        /// The directory.
        dir: PathBuf,
    },

    /// The process has ended. Another one may have its id.
    #[error("process {pid} has ended")]
    Ended {
        /// The process.
        pid: u32,
    },

    /// A handler serves the process: the one that made the file of states, or a process that it has forked.
    #[error("process {pid} is served by another handler that has {} open", .path.display())]
    Served {
        /// The process.
        pid: u32,
        /// The file of states.
        path: PathBuf,
    },

    /// The memory has changed in a way that the states don't tell.
    #[error("process {pid} can't be gone on with: {reason}")]
    Changed {
        /// The process.
        pid: u32,
        /// What has happened to it.
        reason: &'static str,
    },

    /// The file of states is damaged, or of another version of this library.
    #[error("{}: {reason}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// The process has the userfaultfd open no more.
    #[error("process {pid} has no userfaultfd open that is its memory's")]
    NoUserfaultfd {
        /// The process.
        pid: u32,
    },

    /// The process has several userfaultfds open, and the kernel doesn't tell which is the memory's: Linux before 5.13.
    #[error("process {pid} has {count} userfaultfds open; give the one that is its memory's")]
    SeveralUserfaultfds {
        /// The process.
        pid: u32,
        /// How many.
        count: usize,
    },

    /// This process may not take descriptors of the other one, which takes the right to trace it: the same user, or
    /// CAP_SYS_PTRACE. The security module Yama may ask for the latter.
    #[error(
        "the userfaultfd of process {pid} can't be taken: {error}; this needs the right to trace it (CAP_SYS_PTRACE)"
    )]
    Rights {
        /// The process.
        pid: u32,
        /// What the kernel says.
        error: io::Error,
    },

    /// The system failed.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        error: io::Error,
    },
}

/// A userfaultfd that was given to [`adopt_with`], with the reason why its memory isn't adopted.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Unadopted {
    /// The userfaultfd. If no other process has it open, closing it shows zeros in missing pages.
    pub userfaultfd: Uffd,
    /// Why not.
    pub error: AdoptError,
}

/// Takes over the memory of a process whose handler has died, also by SIGKILL.
///
/// The handler's pager had `dir` as its [`state`](crate::pager::PagerBuilder::state). The userfaultfd is taken from the process
/// `pid`, which must have kept it open, as Firecracker does. Give the result to
/// [`Pager::serve`](crate::pager::Pager::serve): pages that were filled are there, what was removed reads as zeros, the threads that
/// wait fault again, and the rest is loaded from the sources, which must have the same content as before. The regions have
/// the [names](super::MemoryRegion::source) of their sources, if they were given any. There is no connection any more:
/// the end of the process is noticed by its pidfd.
///
/// A process is refused that has forked, or moved or unmapped a part of its memory while the handler served it, with the
/// reason: [`Changed`](AdoptError::Changed). The same holds for memory whose pages are put into a file
/// ([`Region::minor`](crate::pager::Region::minor)), that was tracked, or of which a region was added or given back.
///
/// A child that the process has forked reads zeros where its pages were missing when the handler died.
///
/// Linux 5.6.
///
/// # Errors
///
/// An [`AdoptError`]. Each leaves the process as it is: it waits for its memory.
///
/// # Examples
///
/// ```no_run
/// use userfaultfd::handoff::{adopt, left_behind};
/// use userfaultfd::pager::{FileSource, Pager};
///
/// let dir = "/run/handler";
/// let pager = Pager::builder().state(dir).build()?;
/// for pid in left_behind(dir)? {
///     let served = pager.serve(adopt(dir, pid)?, |region| {
///         FileSource::open(region.source.as_deref().unwrap_or("memory.snapshot")).expect("the image is there")
///     })?;
///     println!("{} goes on", served.process().credentials);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "pidfd_getfd")]
pub fn adopt(dir: impl AsRef<Path>, pid: u32) -> Result<Handoff, AdoptError> {
    let take = |kept: &Kept, pidfd: BorrowedFd<'_>| take_userfaultfd(pidfd, pid, kept.inode);
    let (opened, userfaultfd) = open(dir.as_ref(), pid, take)?;
    Ok(handoff(opened, userfaultfd))
}

/// Takes over the memory of a process like [`adopt`], with its userfaultfd given: from a descriptor store, such as
/// systemd's, or by a handler that still had it when this one was started.
///
/// # Errors
///
/// An [`AdoptError`], with the userfaultfd.
pub fn adopt_with(dir: impl AsRef<Path>, pid: u32, userfaultfd: Uffd) -> Result<Handoff, Box<Unadopted>> {
    let opened = inode_of(userfaultfd.as_fd())
        .map_err(system("the userfaultfd can't be looked at"))
        .and_then(|inode| open(dir.as_ref(), pid, |kept, _| check_inode(kept, pid, inode)));
    match opened {
        Ok((opened, ())) => Ok(handoff(opened, userfaultfd)),
        Err(error) => Err(Box::new(Unadopted { userfaultfd, error })),
    }
}

/// Returns the processes whose memory handlers have left in a directory, ordered by id: see [`adopt`]. A process that has handed
/// over several userfaultfds is there once for each.
///
/// Those that a handler serves aren't among them, for which up to two seconds are waited: a handler that was just killed may still
/// be ending. Files of processes that have ended are removed.
///
/// # Errors
///
/// Those of reading the directory.
pub fn left_behind(dir: impl AsRef<Path>) -> io::Result<Vec<u32>> {
    let (mut left, until) = (Vec::new(), Instant::now() + END_PATIENCE);
    for (pid, path) in state_file::names(dir.as_ref())? {
        match open_ended(until, || open_one(&path, pid)) {
            Err(AdoptError::Served { .. }) => {}
            Err(AdoptError::Ended { .. }) => remove_unused(&path),
            // Closed again, which unlocks it. The reason why it can't be gone on with is told when it is adopted.
            Ok(_) | Err(_) => left.push(pid),
        }
    }
    Ok(left)
}

/// Removes the file of a process that has ended, unless the pager that serves it is about to.
fn remove_unused(path: &Path) {
    if let Ok(found) = FoundFile::read(path) {
        // If it can't be removed, the next call tries again.
        let _removed = found.remove();
    }
}

/// The states of a process that is about to be served, if the pager keeps them in a file.
pub(super) fn keep(dir: &Path, handoff: &Handoff) -> io::Result<StateFile> {
    let no_id =
        || io::Error::new(io::ErrorKind::Unsupported, "the process has no id in this process's namespace");
    let pid = handoff.process.credentials.pid.ok_or_else(no_id)?;
    let pidfd = match &handoff.process.pidfd {
        Some(pidfd) => pidfd.try_clone()?,
        None => open_pidfd(pid)?,
    };
    let description = Description { missing: None, ..handoff.description() };
    let inode = inode_of(handoff.userfaultfd.as_fd())?;
    let kept = Kept { boot: boot()?, pid, started: started(pid)?, inode, description };
    if sys::is_readable(pidfd.as_fd()) {
        // What has its id by now may be another process.
        return Err(io::Error::from(Errno::ESRCH));
    }
    let states = states(&kept.description).ok_or(io::ErrorKind::InvalidInput)?;
    let state = StateFile::create((dir, pid), &serde_json::to_vec(&kept)?, states, pidfd)?;
    if !handoff.memfds.is_empty() {
        state.mark(Mark::File);
    }
    Ok(state)
}

/// The number of pages of all regions.
fn states(description: &Description) -> Option<usize> {
    region::check(&description.regions).ok()?;
    let mut pages = description.regions.iter().map(|region| region.len / region.page_size);
    pages.try_fold(0, usize::checked_add)
}

/// What is handed over by a predecessor that has died.
fn handoff((state, kept, pidfd): Opened, userfaultfd: Uffd) -> Handoff {
    let on_end = kept.description.on_end;
    let memfds = Vec::new();
    let handoff = Handoff::from_description(kept.description, userfaultfd, memfds, Some(pidfd));
    let mut parts = handoff.into_parts();
    let regions = Adopted::places(&parts.regions).collect();
    parts.state = Some(Adopted { state: Arc::new(state), regions });
    Handoff::new(parts, on_end)
}

/// A file of states with what stands in it, and a pidfd of its process.
type Opened = (StateFile, Kept, OwnedFd);

/// Opens the file of states of a process: of several the first that nothing has open, and of which the userfaultfd can be had
/// by `take`.
fn open<T>(
    dir: &Path,
    pid: u32,
    take: impl Fn(&Kept, BorrowedFd<'_>) -> Result<T, AdoptError>,
) -> Result<(Opened, T), AdoptError> {
    open_ended(Instant::now() + END_PATIENCE, || {
        let mut refused = None;
        let names = state_file::names(dir).map_err(system("the directory can't be read"))?;
        for (_, path) in names.into_iter().filter(|(of, _)| *of == pid) {
            let opened = open_one(&path, pid).and_then(|opened| {
                let taken = take(&opened.1, opened.2.as_fd())?;
                Ok((opened, taken))
            });
            match (opened, &refused) {
                (Ok(opened), _) => return Ok(opened),
                // What is served may be free in a moment.
                (Err(_), Some(AdoptError::Served { .. })) => {}
                (Err(error), _) => refused = Some(error),
            }
        }
        Err(refused.unwrap_or_else(|| AdoptError::NotLeft { pid, dir: dir.to_owned() }))
    })
}

/// Opens what a handler may still serve: the threads of a killed process end one after the other.
fn open_ended<T>(until: Instant, mut open: impl FnMut() -> Result<T, AdoptError>) -> Result<T, AdoptError> {
    loop {
        match open() {
            Err(AdoptError::Served { .. }) if Instant::now() < until => thread::sleep(END_INTERVAL),
            opened => return opened,
        }
    }
}

/// Fails if the inode of a userfaultfd isn't that of the file's. Before Linux 5.13 nothing tells userfaultfds apart.
fn check_inode(kept: &Kept, pid: u32, inode: Option<u64>) -> Result<(), AdoptError> {
    let is_another = inode.zip(kept.inode).is_some_and(|(given, kept)| given != kept);
    if is_another { Err(AdoptError::NoUserfaultfd { pid }) } else { Ok(()) }
}

fn open_one(path: &Path, pid: u32) -> Result<Opened, AdoptError> {
    let of_file = |reason: String| AdoptError::File { path: path.to_owned(), reason };
    let refused = |error| match error {
        OpenError::InUse => AdoptError::Served { pid, path: path.to_owned() },
        OpenError::Form(reason) => of_file(reason.into()),
        OpenError::Io(error) => of_file(error.to_string()),
    };
    let found = FoundFile::read(path).map_err(refused)?;
    let kept: Kept =
        serde_json::from_slice(&found.description).map_err(|error| of_file(error.to_string()))?;
    let pidfd = find(&kept, pid)?;
    let process = pidfd.try_clone().map_err(system("a pidfd can't be duplicated"))?;
    let state = found.open(process).map_err(refused)?;
    if states(&kept.description) != Some(state.len()) {
        return Err(of_file("its regions have another number of pages".into()));
    }
    match state.marked() {
        Some(mark) => Err(AdoptError::Changed { pid, reason: reason(mark) }),
        None => Ok((state, kept, pidfd)),
    }
}

/// Opens a pidfd of the process that was meant, if it still runs.
fn find(kept: &Kept, pid: u32) -> Result<OwnedFd, AdoptError> {
    let ended = AdoptError::Ended { pid };
    if kept.boot != boot().map_err(system("the boot can't be told"))? {
        return Err(ended);
    }
    let pidfd = match open_pidfd(pid) {
        Ok(pidfd) => pidfd,
        Err(Errno::ESRCH) => return Err(ended),
        Err(errno) => return Err(system("a pidfd can't be opened")(errno.into())),
    };
    // Afterwards: as long as the process isn't waited for, its id is its own.
    let started = match started(pid) {
        // It has ended, whatever else can't be read.
        _ if sys::is_readable(pidfd.as_fd()) => return Err(ended),
        Ok(started) => started,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ended),
        Err(error) => return Err(system("the start of the process can't be told")(error)),
    };
    if (kept.pid, kept.started) == (pid, started) { Ok(pidfd) } else { Err(ended) }
}

fn open_pidfd(pid: u32) -> Result<OwnedFd, Errno> {
    i32::try_from(pid).map_err(|_| Errno::ESRCH).and_then(process::open_pidfd)
}

fn reason(mark: Mark) -> &'static str {
    match mark {
        Mark::Forked => "it has forked",
        Mark::Moved => "a part of its memory was moved",
        Mark::Unmapped => "a part of its memory was unmapped",
        Mark::Regions => "regions of its memory were added or given back",
        Mark::Tracked => "its memory was protected for a tracker",
        Mark::File => {
            "its memory is a file's, and pages that were about to be mapped may have been written to"
        }
        Mark::Unknown => "something has happened to it that this version doesn't know",
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> AdoptError {
    move |error| AdoptError::System { what, error }
}

/// The boot of the system.
fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// When a process was started, in ticks since the boot.
fn started(pid: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    // The name of the program is in parentheses, and may have any bytes. The 20th field behind it is meant.
    let behind = stat.rsplit(|byte| *byte == b')').next().unwrap_or_default();
    let field = behind.split(|byte| *byte == b' ').filter(|field| !field.is_empty()).nth(19);
    let number = field.and_then(|field| std::str::from_utf8(field).ok()?.parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The number of a descriptor's inode: `None` if all such descriptors share one.
fn inode_of(userfaultfd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let inode = |fd: BorrowedFd<'_>| io::Result::Ok(File::from(fd.try_clone_to_owned()?).metadata()?.ino());
    // An epoll instance has the inode of all that have none of their own.
    let (own, common) = (inode(userfaultfd)?, inode(sys::epoll()?.as_fd())?);
    Ok((own != common).then_some(own))
}

/// Takes a userfaultfd of another process: the one with an inode of its own, or the only one.
fn take_userfaultfd(pidfd: BorrowedFd<'_>, pid: u32, inode: Option<u64>) -> Result<Uffd, AdoptError> {
    let refused = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => AdoptError::Rights { pid, error },
        io::ErrorKind::NotFound => AdoptError::Ended { pid },
        _ => system("the descriptors of the process can't be read")(error),
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(refused)? {
        let path = entry.map_err(refused)?.path();
        // One that is closed meanwhile isn't it.
        let is_one = fs::read_link(&path).is_ok_and(|name| name.as_os_str() == "anon_inode:[userfaultfd]");
        let is_it = || inode.is_none_or(|inode| fs::metadata(&path).is_ok_and(|file| file.ino() == inode));
        let number = path.file_name().and_then(|name| name.to_str()?.parse::<RawFd>().ok());
        found.extend(number.filter(|_| is_one && is_it()));
    }
    let number = match (&found[..], inode) {
        ([], _) => return Err(AdoptError::NoUserfaultfd { pid }),
        ([_, _, ..], None) => return Err(AdoptError::SeveralUserfaultfds { pid, count: found.len() }),
        // Duplicates of one.
        ([first, ..], _) => *first,
    };
    let taken = process::take_descriptor(pidfd, number).map_err(|errno| match errno {
        Errno::EPERM => AdoptError::Rights { pid, error: errno.into() },
        Errno::ESRCH => AdoptError::Ended { pid },
        errno => system("the userfaultfd can't be taken")(errno.into()),
    })?;
    // The process may have closed it, and opened something else by that number.
    if sys::is_userfaultfd(taken.as_fd())
        && inode.is_none_or(|inode| inode_of(taken.as_fd()).ok().flatten() == Some(inode))
    {
        Ok(Uffd::from(taken))
    } else {
        Err(AdoptError::NoUserfaultfd { pid })
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "memory that processes share, and a process that kills itself")]
mod tests;
