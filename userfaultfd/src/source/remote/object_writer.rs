//! Writing an object of a store as its bytes come.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use object_store::path::Path;
use object_store::{Error, MultipartUpload, ObjectStore, PutMultipartOptions};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::object::{Threads, of_store};

/// Bytes of a part: stores want at least 5 MiB, and some the same for all.
const PART_BYTES: usize = 8 << 20;

/// Parts that are on their way at a time.
const MAX_PARTS: usize = 4;

/// How long giving up an upload may take.
const ABORT_TIME: Duration = Duration::from_secs(5);

/// A new object of an object store, written from its beginning to its end: what a
/// `SnapshotWriter` (feature `snapshot`) writes to, for one.
///
/// It is sent in parts of 8 MiB, of which up to four are on their way at a time, so an object of any length takes 40 MiB of memory.
/// [`commit`](Self::commit) makes it visible, as a whole; an object that is there under the same name is replaced then, and read as it
/// was until then. Dropped without it the upload is given up, and the store deletes the parts. After the death of the process they
/// stay, invisible, until a rule of the store deletes them.
///
/// Requests run on a runtime of its own with one thread, unless [`create_on`](Self::create_on) is given one. Retries are those of the store.
/// Methods wait, so no task of a runtime may call them.
///
/// ```
/// use std::io::Write;
/// use std::sync::Arc;
///
/// use object_store::local::LocalFileSystem;
/// use userfaultfd::pager::{ObjectSource, PageSource};
/// use userfaultfd::source::ObjectWriter;
///
/// # let folder = std::env::temp_dir().join(format!("{}.objects", std::process::id()));
/// # std::fs::create_dir(&folder)?;
/// let store = Arc::new(LocalFileSystem::new_with_prefix(&folder)?);
/// let mut object = ObjectWriter::create(store.clone(), "image")?;
/// object.write_all(b"all of it")?;
/// object.commit()?;
/// assert_eq!(ObjectSource::open(store, "image")?.len(), Some(9));
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "without `commit` there is no object"]
pub struct ObjectWriter {
    path: Path,
    /// `None` when it has ended.
    upload: Option<Upload>,
    pending: Vec<u8>,
    sent: u64,
}

struct Upload {
    upload: Box<dyn MultipartUpload>,
    parts: JoinSet<Result<(), Error>>,
    runtime: Threads,
}

impl ObjectWriter {
    /// Begins a new object at a path of a store.
    ///
    /// # Errors
    ///
    /// A [`RemoteError`](super::RemoteError); or the error of starting a thread.
    pub fn create(store: Arc<dyn ObjectStore>, path: impl Into<Path>) -> io::Result<Self> {
        Self::begin(store, path.into(), Threads::own()?)
    }

    /// Begins a new object at a path of a store, with requests on a runtime of the program's. The runtime must have time and
    /// I/O enabled, and several threads.
    ///
    /// # Errors
    ///
    /// A [`RemoteError`](super::RemoteError).
    pub fn create_on(
        runtime: Handle,
        store: Arc<dyn ObjectStore>,
        path: impl Into<Path>,
    ) -> io::Result<Self> {
        Self::begin(store, path.into(), Threads::Programs(runtime))
    }

    fn begin(store: Arc<dyn ObjectStore>, path: Path, runtime: Threads) -> io::Result<Self> {
        let begun = store.put_multipart_opts(&path, PutMultipartOptions::default());
        let upload = runtime.handle().block_on(begun).map_err(|error| failed(&error))?;
        let upload = Some(Upload { upload, parts: JoinSet::new(), runtime });
        Ok(Self { path, upload, pending: Vec::new(), sent: 0 })
    }

    /// Sends what is left, and makes the object visible.
    ///
    /// # Errors
    ///
    /// A [`RemoteError`](super::RemoteError): the object isn't there, or is the one that was there before.
    pub fn commit(mut self) -> io::Result<()> {
        if !self.pending.is_empty() || self.sent == 0 {
            self.send()?;
        }
        let upload = self.upload.as_mut().ok_or_else(ended)?;
        while upload.wait()? {}
        let handle = upload.runtime.handle();
        handle.block_on(upload.upload.complete()).map_err(|error| failed(&error))?;
        // It is no longer to be given up.
        self.upload = None;
        Ok(())
    }

    /// Sends what is pending as one part.
    fn send(&mut self) -> io::Result<()> {
        let upload = self.upload.as_mut().ok_or_else(ended)?;
        while upload.parts.len() >= MAX_PARTS {
            upload.wait()?;
        }
        let bytes = std::mem::take(&mut self.pending);
        self.sent += bytes.len() as u64;
        let part = upload.upload.put_part(bytes.into());
        upload.parts.spawn_on(part, &upload.runtime.handle());
        Ok(())
    }
}

impl Upload {
    /// Waits for a part. Returns whether there was one.
    fn wait(&mut self) -> io::Result<bool> {
        match self.runtime.handle().block_on(self.parts.join_next()) {
            None => Ok(false),
            Some(Ok(Ok(()))) => Ok(true),
            Some(Ok(Err(error))) => Err(failed(&error)),
            Some(Err(error)) => Err(io::Error::other(error)),
        }
    }
}

fn failed(error: &Error) -> io::Error {
    of_store(error).into()
}

fn ended() -> io::Error {
    io::Error::other("the upload has failed before")
}

impl Write for ObjectWriter {
    /// After an error of a part all later calls fail, too: the object can't become whole any more.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.upload.is_none() {
            return Err(ended());
        }
        let taken = bytes.len().min(PART_BYTES - self.pending.len());
        self.pending.try_reserve(taken).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == PART_BYTES {
            let sent = self.send();
            if sent.is_err() {
                self.give_up();
            }
            sent?;
        }
        Ok(taken)
    }

    /// Does nothing: parts have their length, and [`commit`](ObjectWriter::commit) sends the rest.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ObjectWriter {
    fn give_up(&mut self) {
        let Some(Upload { mut upload, mut parts, runtime }) = self.upload.take() else { return };
        // On a thread of its own: this one may be a runtime's, which mustn't wait by itself.
        let given_up = thread::Builder::new().name("uffd-object".into()).spawn(move || {
            parts.abort_all();
            runtime.handle().block_on(async {
                while parts.join_next().await.is_some() {}
                // What can't be deleted now, a rule of the store deletes.
                let _outcome = timeout(ABORT_TIME, upload.abort()).await;
            });
        });
        if let Ok(thread) = given_up {
            let _ended = thread.join();
        }
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl fmt::Debug for ObjectWriter {
    /// Without the store, whose address may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, sent, pending, .. } = self;
        f.debug_struct("ObjectWriter")
            .field("path", path)
            .field("sent", sent)
            .field("pending", &pending.len())
            .finish_non_exhaustive()
    }
}
