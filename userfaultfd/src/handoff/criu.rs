//! Processes that CRIU restores lazily: their images, and serving them in place of `criu lazy-pages`.

mod image;
mod memory;

use std::fmt;
use std::io;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::image::{Mm, Pagemap};
pub use self::memory::CriuMemory;
use super::{Handoff, Message, Parts, PeerError, Process};
use crate::pager::{self, DescriptorId, MissingRange, Pager, Refused, Region, RegionId};
use crate::source::{FileSource, PageData, PageSource};
use crate::{Uffd, sys};

/// The longest image that is read as a whole: those with pages aren't.
const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// The most checkpoints that are layers of one: CRIU has no limit, and a folder may be its own parent.
const MAX_PARENTS: usize = 1000;

/// The most that a stack may have grown by, in bytes. Its mapping grows when it is touched, without an event.
const MAX_STACK_GROWTH: u64 = 64 << 20;

/// Why processes that CRIU restores can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CriuError {
    /// An image can't be read, or isn't one.
    #[error("{name}: {error}")]
    Image {
        /// The name of the image.
        name: String,
        /// The reason.
        error: io::Error,
    },

    /// CRIU sent something else.
    #[error(transparent)]
    Peer(PeerError),

    /// CRIU closed the connection before all processes were restored: it has said why.
    #[error("CRIU has given up the restore: its own log says why")]
    Incomplete,

    /// The pager refused the memory of a process.
    #[error("process {pid} can't be served: {error}")]
    Pager {
        /// The process, as CRIU calls it.
        pid: u32,
        /// The reason.
        error: pager::Error,
    },
}

/// The images of a checkpoint that CRIU has made.
///
/// They come from any [`PageSource`]: [`in_folder`](Self::in_folder) takes files, and [`with`](Self::with) what a function opens, such as
/// objects of a web server.
pub struct CriuImages {
    open: Box<OpenImage>,
}

type OpenImage = dyn Fn(&str) -> io::Result<Arc<dyn PageSource>> + Send + Sync;

impl fmt::Debug for CriuImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CriuImages").finish_non_exhaustive()
    }
}

impl CriuImages {
    /// Returns the images in a folder.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        let folder = folder.into();
        Self::with(move |name| Ok(Arc::new(FileSource::open(folder.join(name))?)))
    }

    /// Returns the images that a function opens by their names: `pagemap-7.img`, and `parent/pagemap-7.img` for those of the checkpoint
    /// before.
    pub fn with(open: impl Fn(&str) -> io::Result<Arc<dyn PageSource>> + Send + Sync + 'static) -> Self {
        Self { open: Box::new(open) }
    }

    fn open(&self, name: &str) -> Result<Arc<dyn PageSource>, CriuError> {
        (self.open)(name).map_err(|error| CriuError::Image { name: name.to_owned(), error })
    }

    /// Reads an image as a whole, and decodes it.
    fn read<T>(&self, name: &str, decode: impl FnOnce(&[u8]) -> io::Result<T>) -> Result<T, CriuError> {
        let source = self.open(name)?;
        let read = || {
            let len = source.len().filter(|len| *len <= MAX_IMAGE_BYTES);
            let len = len.ok_or_else(|| io::Error::other("it has no length, or is too long"))?;
            let mut bytes = vec![0; len as usize];
            if len > 0 && source.read(0, &mut bytes)? == PageData::Zero {
                bytes.fill(0);
            }
            decode(&bytes)
        };
        read().map_err(|error| CriuError::Image { name: name.to_owned(), error })
    }

    /// Returns the memory of a process, by the id that CRIU has for it.
    ///
    /// # Errors
    ///
    /// [`Image`](CriuError::Image).
    pub fn memory(&self, pid: u32) -> Result<CriuMemory, CriuError> {
        let mut layers = Vec::new();
        let mut folder = String::new();
        loop {
            let name = format!("{folder}pagemap-{pid}.img");
            let pagemap = self.read(&name, Pagemap::decode)?;
            let pages = self.open(&format!("{folder}pages-{}.img", pagemap.pages_id))?;
            let has_parent = pagemap.entries.iter().any(|entry| entry.in_parent);
            layers.push((pagemap, pages));
            if !has_parent {
                break;
            }
            if layers.len() > MAX_PARENTS {
                let error = io::Error::other("it has parents without end");
                return Err(CriuError::Image { name, error });
            }
            folder += "parent/";
        }
        let name = format!("pagemap-{pid}.img");
        CriuMemory::new(layers).map_err(|error| CriuError::Image { name, error })
    }

    /// The regions of a process that CRIU leaves to the userfaultfd.
    fn regions(&self, pid: u32) -> Result<Vec<Region>, CriuError> {
        let mm = self.read(&format!("mm-{pid}.img"), Mm::decode)?;
        let memory = Arc::new(self.memory(pid)?);
        let mut regions = Vec::new();
        let mut before = 0;
        for area in mm.areas {
            let (mut start, end) = (area.start, area.end);
            if area.is_stack() {
                start = start.saturating_sub(MAX_STACK_GROWTH).max(before);
            }
            before = end;
            if !area.can_be_lazy() {
                continue;
            }
            let missing =
                memory.parts().filter(|part| part.start < end && area.start < part.end).map(|part| {
                    let (from, to) = (part.start.max(area.start), part.end.min(end));
                    MissingRange::new(RegionId::new(0), from as usize, (to - from) as usize, Some(from))
                });
            // The place of a byte in the source is its address. What no image has is zeros when it is touched, and isn't filled.
            let region = Region::new(start as usize, (end - start) as usize, Arc::clone(&memory));
            regions.push(region.offset(start).missing(missing).registered_by_owner());
        }
        Ok(regions)
    }
}

/// What [`Pager::serve_criu`] has served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CriuServed {
    /// The processes that were restored, by the ids that CRIU has for them, with their descriptors in the pager.
    pub processes: Vec<(u32, DescriptorId)>,
}

impl Pager {
    /// Serves the processes that CRIU restores with `--lazy-pages`, until it says that all are restored. `handoff` is the first
    /// one, which a [`Listener`](super::Listener) has accepted that allows [`Dialect::Criu`](super::Dialect::Criu) alone.
    ///
    /// Afterwards the processes run, and their pages are filled as they are touched; [`finish`](Self::finish) fills those that are
    /// missing still, and ends it. Pages that CRIU restores itself are left alone. Removals, moves and forks are followed, as far as CRIU asks
    /// the kernel to report them, which it does for all.
    ///
    /// `begun` is called for each process.
    ///
    /// # Errors
    ///
    /// A [`CriuError`]. Then CRIU is killed, and no process is restored, unless it was done at that moment: threads of a process that
    /// isn't served wait for its memory as long as this process lives. The same after a panic of `images` or `begun`.
    pub fn serve_criu(
        &self,
        handoff: Handoff,
        images: &CriuImages,
        mut begun: impl FnMut(u32),
    ) -> Result<CriuServed, CriuError> {
        let Parts { pid, userfaultfd, process, mut stream, .. } = handoff.into_parts();
        let mut served = CriuServed::default();
        let mut restore = Restore { criu: Some(process), unserved: None };
        let mut serve = |restore: &mut Restore, pid: Option<u32>, uffd: Uffd| {
            let pid = pid.unwrap_or_default();
            restore.unserved = Some(uffd);
            let regions = images.regions(pid)?;
            let Some(uffd) = restore.unserved.take() else { return Ok(()) };
            let added = self.add(uffd, regions).map_err(|Refused { error, uffd }| {
                restore.unserved = Some(uffd);
                CriuError::Pager { pid, error }
            })?;
            served.processes.push((pid, added.descriptor));
            begun(pid);
            Ok(())
        };
        serve(&mut restore, pid, userfaultfd)?;
        let stream = stream.as_mut().ok_or(CriuError::Incomplete)?;
        loop {
            match stream.receive(Duration::MAX).map_err(CriuError::Peer)? {
                None => return Err(CriuError::Incomplete),
                Some(received) => match (received.message, received.userfaultfd) {
                    (Message::Handoff { pid, .. }, Some(uffd)) => serve(&mut restore, pid, uffd)?,
                    // It has no memory.
                    (Message::Zombie { .. }, _) => {}
                    (Message::Complete, _) => break,
                    (message, _) => return Err(CriuError::Peer(PeerError::Unexpected { message })),
                },
            }
        }
        restore.criu = None;
        Ok(served)
    }
}

/// A restore that isn't complete. Dropped, it ends CRIU.
struct Restore {
    /// `None`: it is complete.
    criu: Option<Process>,
    /// Of the process whose regions are being found out.
    unserved: Option<Uffd>,
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some(criu) = self.criu.as_ref().and_then(Process::victim) {
            // It may have ended.
            let _killed = sys::kill(criu);
        }
        if let Some(uffd) = self.unserved.take() {
            // A process that was restored already would read zeros.
            let _kept = uffd.into_raw_fd();
        }
    }
}
