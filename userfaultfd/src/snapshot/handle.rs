//! The handles of snapshots and series.

use std::fmt;
use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use super::copy::bits::Bits;
use super::copy::queue::Queue;
use super::copy::shared::{Counts, Shared, duration};
use super::error::{Error, Result};
use super::file::format::SnapshotId;
use super::file::writer::SnapshotWriter;
use super::maker::Maker;
use super::options::Options;
use super::sink::Sink;

/// A series of snapshots of the same memory: the first holds all of it, each other one the changes since the one before
/// began.
///
/// Between snapshots memory stays protected, and a thread resolves the fault of the first write to each page, as in the
/// `Sync` mode of a [`DirtyTracker`](crate::DirtyTracker). A failed snapshot doesn't count: the next one holds its
/// changes, too; until one is completed, that is all memory.
///
/// The kernel doesn't report what it or a device writes to [pinned memory](crate::dirty#pinned-memory), such as registered
/// buffers of io_uring, memory for RDMA or a device, the target of an `O_DIRECT` read in flight: declare it with
/// [`set_always_dirty`](Self::set_always_dirty).
///
/// Dropping it ends the protection, and aborts a running snapshot.
#[must_use = "dropping it ends the protection"]
pub struct Series {
    pub(super) maker: Maker,
    /// The ranges that every snapshot holds.
    pub(super) always: Bits,
    /// What the next one holds, since it was in `always`.
    pub(super) revoked: Bits,
    /// The last file of [`begin_in`](Self::begin_in).
    pub(super) last: Option<Last>,
}

/// A file that the next one may follow.
#[derive(Debug)]
pub(super) struct Last {
    id: SnapshotId,
    folder: PathBuf,
    /// Number of snapshots completed when it began.
    before: u64,
    /// Number of files on which it stands.
    below: usize,
}

impl Series {
    /// Begins the next snapshot. See [`Snapshot::begin`].
    ///
    /// # Errors
    ///
    /// [`Error::Running`]: the snapshot before is still running; [`wait`](Snapshot::wait) for it. Otherwise as
    /// [`Snapshot::begin`].
    pub fn begin<S: Sink + 'static>(&mut self, sink: S) -> Result<Snapshot<S>> {
        let mut changed = self.always.clone();
        changed.join(&self.revoked);
        let snapshot = self.maker.begin(sink, changed)?;
        self.revoked = self.maker.no_bits();
        Ok(snapshot)
    }

    /// Begins the next snapshot as a file in a directory.
    ///
    /// The file's name is a number greater than those in the directory. The file follows the last one of this series, if that
    /// was completed, is in this directory, and no other snapshot of this series was completed since. Otherwise, and after
    /// `increments` files that follow a base, it is a new base, which holds everything.
    ///
    /// [`Chain::open`](super::Chain::open) finds the files. Use one directory for each series. The file gets its name when
    /// it is complete, and replaces no other one.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin). [`Error::Sink`]: the file can't be created.
    pub fn begin_in(
        &mut self,
        directory: impl AsRef<Path>,
        increments: usize,
    ) -> Result<Snapshot<SnapshotWriter<BufWriter<File>>>> {
        let Self { maker, always, revoked, last, .. } = self;
        let mut next = None;
        let snapshot = maker.begin_with(|completed| {
            let folder = std::path::absolute(directory).map_err(Error::Sink)?;
            let follows = last.as_ref().filter(|last| {
                last.before + 1 == completed && last.below < increments && last.folder == folder
            });
            let mut changed = always.clone();
            changed.join(revoked);
            if follows.is_none() {
                changed.set(0..changed.len(), true);
            }
            let mut writer = SnapshotWriter::create_next(&folder).map_err(Error::Sink)?;
            if let Some(last) = follows {
                writer = writer.follows(last.id);
            }
            let below = follows.map_or(0, |last| last.below + 1);
            next = Some(Last { id: writer.id(), folder, before: completed, below });
            Ok((writer, follows.is_some(), changed))
        })?;
        self.last = next;
        self.revoked = self.maker.no_bits();
        Ok(snapshot)
    }

    /// Makes a range count as changed in every snapshot, whatever the kernel reports: for
    /// [pinned memory](crate::dirty#pinned-memory), which is written without a fault. With `false`, the next snapshot is the
    /// last one that holds it for this reason.
    ///
    /// The addresses are those at the creation of the series, also for memory that has moved since. The bounds must be
    /// multiples of the page size, of the huge page size on hugetlb memory.
    ///
    /// A write to pinned memory during a snapshot may be in that snapshot or not; it is in the next one.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] with [`NotTracked`](crate::Error::NotTracked): a part isn't in the series; with [`InsidePage`](crate::Error::InsidePage): a bound
    /// lies inside a page. Nothing was changed.
    pub fn set_always_dirty(&mut self, range: Range<usize>, always: bool) -> Result<()> {
        for bits in self.maker.bits_in(&range)? {
            if !always {
                for bit in bits.clone().filter(|bit| self.always.get(*bit)) {
                    self.revoked.set(bit..bit + 1, true);
                }
            }
            self.always.set(bits, always);
        }
        Ok(())
    }
}

impl fmt::Debug for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Series").field("regions", &self.maker.regions).finish_non_exhaustive()
    }
}

/// The progress of a snapshot, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that the snapshot holds in the end.
    pub total: u64,
    /// Bytes read from memory so far, or known without a read. The sink may be behind by the size of the buffers.
    pub saved: u64,
    /// Bytes of `saved` that were read because a thread was about to write them.
    pub on_write: u64,
    /// Bytes of `saved` that were lost: delivered as [`Content::Gone`](super::Content::Gone).
    pub gone: u64,
    /// The longest time that writers may have waited at the beginning, while the last pages were protected and no write went
    /// on.
    pub pause: Duration,
}

/// A complete snapshot: the result of [`Snapshot::wait`].
// A tuple of a closure and something else would be warned of where it isn't used.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finished<S> {
    /// The sink, which has got all pages.
    pub sink: S,
    /// The final progress.
    pub progress: Progress,
}

/// A running snapshot: see the [module](super). Dropping it aborts it.
#[must_use = "dropping it aborts the snapshot"]
pub struct Snapshot<S> {
    pub(super) queue: Arc<Queue>,
    pub(super) counts: Arc<Counts>,
    pub(super) shared: Arc<Shared>,
    pub(super) sink: Option<JoinHandle<(S, Result<()>)>>,
    /// The maker of a snapshot outside of a series.
    pub(super) maker: Option<Maker>,
}

impl<S: Sink + 'static> Snapshot<S> {
    /// Begins a snapshot of a range of this process's memory: protects it against writes and returns. From then on the content
    /// of each page at this moment is delivered to the sink, while the program goes on.
    ///
    /// Protection takes some 80 ns for each page, small or huge. Other threads go on writing during most of it, and wait only
    /// while the pages that they wrote meanwhile are protected ([`Progress::pause`]).
    ///
    /// The bounds must be multiples of the page size, of the huge page size on hugetlb memory. The [module](super) says what
    /// the snapshot promises.
    ///
    /// # Errors
    ///
    /// - [`Error::Kernel`]: the kernel has no write protection for such memory (`EINVAL`: private anonymous memory
    ///   takes Linux 5.7, shared and hugetlb memory 5.19, files can't be protected), no descriptor, another
    ///   userfaultfd has it (`EBUSY`; the text names the holder if it is of this process), no `/proc`, a layout that
    ///   changes for 20 seconds without a pause (`EAGAIN`; of another process, or before Linux 5.13).
    /// - [`Error::Sink`]: the sink failed to begin.
    /// - [`Error::Thread`]: failed to create a thread.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use userfaultfd::snapshot::{Content, Error};
    /// use userfaultfd::{Snapshot, page_size};
    ///
    /// let mut memory = memmap2::MmapMut::map_anon(16 * page_size())?;
    /// memory.fill(b'a');
    /// let range = memory.as_ptr().addr()..memory.as_ptr().addr() + memory.len();
    ///
    /// let copy = Arc::new(Mutex::new(vec![0; memory.len()]));
    /// let sink = {
    ///     let copy = Arc::clone(&copy);
    ///     move |offset: u64, content: Content<'_>| {
    ///         if let Content::Data(bytes) = content {
    ///             copy.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    ///         }
    ///         Ok(())
    ///     }
    /// };
    /// let snapshot = match Snapshot::begin(range, sink) {
    ///     Ok(snapshot) => snapshot,
    ///     Err(Error::Kernel(error)) => return Ok(println!("{error}")), // no write protection here
    ///     Err(error) => return Err(error.into()),
    /// };
    /// memory.fill(b'b'); // goes on at once
    /// let progress = snapshot.wait()?.progress;
    /// assert_eq!(progress.saved, memory.len() as u64);
    /// assert!(copy.lock().unwrap().iter().all(|byte| *byte == b'a'));
    /// assert!(memory.iter().all(|byte| *byte == b'b'));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn begin(range: Range<usize>, sink: S) -> Result<Self> {
        Options::new().range(range).begin(sink)
    }
}

impl<S> Snapshot<S> {
    /// Returns the progress.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let Counts { total, saved, on_write, gone, pause_ns } = &*self.counts;
        Progress {
            total: total.load(Ordering::Relaxed),
            saved: saved.load(Ordering::Relaxed),
            on_write: on_write.load(Ordering::Relaxed),
            gone: gone.load(Ordering::Relaxed),
            pause: duration(pause_ns),
        }
    }

    /// Returns whether the snapshot has ended, with success or not, so that [`wait`](Self::wait) returns at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        !self.shared.owner.is_current() || self.sink.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Aborts the snapshot, unless the sink has all of it already. Protection ends; in a [`Series`] it goes on for the next
    /// snapshot.
    pub fn abort(&self) {
        if self.shared.owner.is_current() {
            self.queue.fail(None);
        }
    }

    /// Waits until the sink has all pages, and returns the sink.
    ///
    /// What it returns can be ignored, also where the sink is a closure:
    ///
    /// ```
    /// #![deny(unused_must_use)]
    /// use userfaultfd::Snapshot;
    /// use userfaultfd::snapshot::{Content, Error};
    ///
    /// fn save(range: std::ops::Range<usize>) -> Result<(), Error> {
    ///     Snapshot::begin(range, |_offset: u64, _content: Content<'_>| Ok(()))?.wait()?;
    ///     Ok(())
    /// }
    /// # let memory = memmap2::MmapMut::map_anon(userfaultfd::page_size())?;
    /// # let start = memory.as_ptr().addr();
    /// # match save(start..start + memory.len()) {
    /// #     Ok(()) | Err(Error::Kernel(_)) => {} // no write protection here
    /// #     Err(error) => return Err(error.into()),
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Sink`], [`Error::SinkPanicked`], [`Error::Aborted`], [`Error::Kernel`]: the snapshot isn't complete.
    pub fn wait(mut self) -> Result<Finished<S>> {
        let (sink, result) = self.join()?;
        result?;
        Ok(Finished { sink, progress: self.progress() })
    }

    fn join(&mut self) -> Result<(S, Result<()>)> {
        if !self.shared.owner.is_current() {
            return Err(Error::Kernel(crate::Error::OtherProcess));
        }
        let thread = self.sink.take().ok_or(Error::Aborted)?;
        if thread.thread().id() == std::thread::current().id() {
            // The sink itself calls this, and would wait for itself. It ends once it returns.
            return Err(Error::Aborted);
        }
        let (sink, mut result) = thread.join().map_err(|_| Error::SinkPanicked)?;
        if let (Err(Error::Aborted), Some(errno)) = (&result, self.queue.failure()) {
            result = Err(Error::Kernel(crate::Error::SystemError(errno)));
        }
        // The next one of a series may begin from now on.
        self.shared.wait_until_idle();
        Ok((sink, result))
    }
}

impl<S> Drop for Snapshot<S> {
    fn drop(&mut self) {
        if !self.shared.owner.is_current() {
            // The thread isn't there, and the sink is its.
            std::mem::forget(self.sink.take());
        } else if self.sink.is_some() {
            self.abort();
            // How it ended doesn't matter any more.
            drop(self.join());
        }
        drop(self.maker.take());
    }
}

impl<S> fmt::Debug for Snapshot<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("progress", &self.progress()).finish_non_exhaustive()
    }
}
