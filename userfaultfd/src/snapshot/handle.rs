//! Snapshots as their users see them.

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

/// Snapshots of the same memory, one after the other: the first holds all of it, each other one what has changed since
/// the one before began.
///
/// Between them memory stays protected, and the first write to a page is a fault that a thread handles, as in the
/// `Sync` mode of a [`DirtyTracker`](crate::DirtyTracker). A snapshot that failed doesn't count: the next one holds
/// what it should have held, which is everything as long as none was completed.
///
/// The kernel doesn't report what it or a device writes to [pinned memory](crate::dirty#pinned-memory), such as registered
/// buffers of io_uring, memory for RDMA or a device, the target of an `O_DIRECT` read in flight: declare it with
/// [`set_always_dirty`](Self::set_always_dirty).
///
/// Dropping it ends the protection; a snapshot that is at work is aborted.
pub struct Series {
    pub(super) maker: Maker,
    /// What every snapshot holds.
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
    /// How many had been completed when it was begun.
    before: u64,
    /// How many files it stands on.
    below: usize,
}

impl Series {
    /// Begins the next snapshot. See [`Snapshot::begin`].
    ///
    /// # Errors
    ///
    /// [`Error::Running`] while the one before is at work: [`wait`](Snapshot::wait) for it. Otherwise as
    /// [`Snapshot::begin`].
    pub fn begin<S: Sink + 'static>(&mut self, sink: S) -> Result<Snapshot<S>> {
        let mut changed = self.always.clone();
        changed.join(&self.revoked);
        let snapshot = self.maker.begin(sink, changed)?;
        self.revoked = self.maker.no_bits();
        Ok(snapshot)
    }

    /// Begins the next snapshot as a file in a directory. Names it by a number greater than those that are there, and
    /// has it follow the file before, if that was completed, is of this directory and no other snapshot of this series
    /// was completed since. Otherwise, and after `increments` files that follow a base, it is a base itself, which holds
    /// everything.
    ///
    /// [`Chain::open`](super::Chain::open) finds the files: of one series, so that each wants a directory of its own. The file
    /// gets its name when it is complete, and replaces none.
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

    /// Has a range count as changed in every snapshot, whatever the kernel reports: for
    /// [pinned memory](crate::dirty#pinned-memory), which is written without a fault. With `false`, the next snapshot is the
    /// last that holds it for that.
    ///
    /// The addresses are those of when the series was made; memory that has moved since is meant. The bounds are
    /// multiples of the page size, of the huge page size on hugetlb memory.
    ///
    /// What is written to pinned memory while a snapshot is taken may be in it or not: the next one holds it.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`]: [`NotTracked`](crate::Error::NotTracked), a part isn't of the series; `EINVAL`, a bound lies
    /// inside a page. Nothing is changed then.
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

/// How far a snapshot is, and how it went. In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What the snapshot holds in the end.
    pub total: u64,
    /// What has been read from memory, or is known without. The sink may be behind by the size of the buffers.
    pub saved: u64,
    /// What of it was read because it was about to be written.
    pub on_write: u64,
    /// What of it can't be told any more: delivered as [`Content::Gone`](super::Content::Gone).
    pub gone: u64,
    /// How long writers may have waited when it began: the time in which what was left to protect was protected, and
    /// nobody was let through.
    pub pause: Duration,
}

/// A snapshot that is complete.
// A tuple of a closure and something else would be warned of where it isn't used.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finished<S> {
    /// The sink, which has taken all.
    pub sink: S,
    /// How it went.
    pub progress: Progress,
}

/// A snapshot that is being taken.
///
/// Dropping it aborts it.
pub struct Snapshot<S> {
    pub(super) queue: Arc<Queue>,
    pub(super) counts: Arc<Counts>,
    pub(super) shared: Arc<Shared>,
    pub(super) sink: Option<JoinHandle<(S, Result<()>)>>,
    /// Of a snapshot that isn't of a series.
    pub(super) maker: Option<Maker>,
}

impl<S: Sink + 'static> Snapshot<S> {
    /// Protects a range of this process's memory against writes and returns. From then on, what every page held at
    /// this moment is delivered to the sink, while the program goes on.
    ///
    /// This takes the kernel some 80 ns for each page, small or huge. Other threads write on while most is protected:
    /// they wait only for [the rest](Progress::pause), what they wrote meanwhile.
    ///
    /// The bounds are multiples of the page size, of the huge page size on hugetlb memory. See the
    /// [module](super) for what can be relied on.
    ///
    /// # Errors
    ///
    /// - [`Error::Kernel`]: the kernel has no write protection for such memory (`EINVAL`: private anonymous memory
    ///   takes Linux 5.7, shared and hugetlb memory 5.19, files can't be protected), no descriptor, another
    ///   userfaultfd has it (`EBUSY`; the text names the holder if it is of this process), no `/proc`, a layout that
    ///   changes for 20 seconds without a pause (`EAGAIN`; of another process, or before Linux 5.13).
    /// - [`Error::Sink`]: the sink can't begin.
    /// - [`Error::Thread`]: no threads.
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
    /// How far it is.
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

    /// Whether it has ended, well or not: [`wait`](Self::wait) doesn't wait then.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        !self.shared.owner.is_current() || self.sink.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Has it aborted, unless the sink has taken all already. Protection ends, or in a [`Series`] goes on for the next
    /// snapshot.
    pub fn abort(&self) {
        if self.shared.owner.is_current() {
            self.queue.fail(None);
        }
    }

    /// Waits until all is delivered, and gives the sink back.
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
