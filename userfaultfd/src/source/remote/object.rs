//! An object of any store that the crate `object_store` speaks to.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectMeta, ObjectStore};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::timeout;

use super::engine::{Engine, Fetch};
use super::{RemoteError, RemoteOptions, RemoteStatistics, lock};
use crate::source::{PageData, PageSource};

/// An object of an object store as a source: S3, Google, Azure, HTTP, local files, or whatever else is an
/// [`ObjectStore`].
///
/// The feature `object-store` brings local files; a program chooses other stores by features of the crate `object_store`
/// (`aws`, `gcp`, `azure`, `http`). Stores take their credentials as everywhere in that ecosystem: see its `from_env`.
///
/// ```
/// use std::sync::Arc;
///
/// use object_store::local::LocalFileSystem;
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::ObjectSource;
///
/// let directory = std::env::current_exe()?;
/// let name = directory.file_name().and_then(|name| name.to_str()).ok_or("a name")?.to_owned();
/// let store = LocalFileSystem::new_with_prefix(directory.parent().ok_or("a directory")?)?;
/// let memory = LazyMemory::builder(ObjectSource::open(Arc::new(store), name)?).build()?;
/// assert_eq!(memory[1..4], *b"ELF");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Retries
///
/// By default a store of that crate itself retries ten times for up to three minutes, which is too long for a page fault.
/// This source retries according to its own [`RemoteOptions`], so turn the store's retries off:
///
/// ```text
/// let retry = object_store::RetryConfig { max_retries: 0, ..Default::default() };
/// let store = AmazonS3Builder::from_env().with_bucket_name("snapshots").with_retry(retry).build()?;
/// ```
///
/// A request that takes longer than [`request_timeout`](RemoteOptions::request_timeout) is given up in any case, with the
/// store's retries in it.
///
/// # One object
///
/// Opening asks for the first byte, and so for the length, the ETag and the version of the object. All later requests are for
/// that ETag and version, and each answer is compared: a changed object is [`RemoteError::Changed`], and pages of two
/// objects are never mixed.
///
/// # Requests
///
/// At most [`connections`](RemoteOptions::connections) requests are under way; of reads that wait, those for faults go first,
/// and those side by side become one request. What fails in a way that may pass is sent again soon, and a fault whose answer
/// takes longer than usual has a second request sent. Every way to fail is a variant of [`RemoteError`]. Of an error of a
/// store that isn't about the object only the text is known: unless that names a status it counts as one of the
/// [connection](RemoteError::Connection).
///
/// # Memory and threads
///
/// Requests run on a tokio runtime, by default one of its own with one thread, and are waited for in threads of this source. A
/// read allocates: not a source for memory whose descriptor reports forks, nor for memory that the allocator itself lives in.
/// With a runtime of the program's, that runtime's threads must not touch the memory: see
/// [`TokioSource`](crate::source::TokioSource).
pub struct ObjectSource {
    engine: Engine,
    len: u64,
    etag: Option<String>,
    version: Option<String>,
}

/// Builder for an [`ObjectSource`].
#[derive(Clone, Debug)]
#[must_use = "the source is made by `open`"]
pub struct ObjectSourceBuilder {
    store: Arc<dyn ObjectStore>,
    path: Path,
    version: Option<String>,
    runtime: Option<Handle>,
    options: RemoteOptions,
}

impl ObjectSourceBuilder {
    /// Sets timeouts, retries, and the number and size of requests.
    pub fn options(mut self, options: RemoteOptions) -> Self {
        self.options = options;
        self
    }

    /// Opens this version of the object, where the store keeps several. By default it is the newest.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    /// Makes requests on a runtime of the program's, which has time and I/O enabled and several threads.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// Asks the store for the object's length and version. Tries as often and as long as a read.
    ///
    /// # Errors
    ///
    /// A [`RemoteError`]; or the error of starting a thread.
    pub fn open(self) -> io::Result<ObjectSource> {
        let runtime = match self.runtime {
            Some(handle) => Threads::Programs(handle),
            None => Threads::own()?,
        };
        let object = Arc::new(Object { store: self.store, path: self.path, runtime });
        let probe =
            Arc::new(Probe { object: Arc::clone(&object), version: self.version, found: Mutex::default() });
        // With the same patience as a read, by an engine of its own.
        Engine::new(Arc::clone(&probe), self.options.clone()).read(0, &mut [0], false)?;
        let found = lock(&probe.found).take();
        let found = found.ok_or_else(|| io::Error::other("the store was never asked"))?;
        let (len, etag, version) = (found.size, found.e_tag.clone(), found.version.clone());
        Ok(ObjectSource { engine: Engine::new(Pinned { object, found }, self.options), len, etag, version })
    }
}

impl ObjectSource {
    /// Opens the object at a path of a store with the default options.
    ///
    /// # Errors
    ///
    /// Those of [`ObjectSourceBuilder::open`].
    pub fn open(store: Arc<dyn ObjectStore>, path: impl Into<Path>) -> io::Result<Self> {
        Self::builder(store, path).open()
    }

    /// Returns a builder for the object at a path of a store.
    pub fn builder(store: Arc<dyn ObjectStore>, path: impl Into<Path>) -> ObjectSourceBuilder {
        let options = RemoteOptions::default();
        ObjectSourceBuilder { store, path: path.into(), version: None, runtime: None, options }
    }

    /// Returns the ETag that all pages are of.
    #[must_use]
    pub fn etag(&self) -> Option<&str> {
        self.etag.as_deref()
    }

    /// Returns the version that all pages are of, where the store keeps several.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Returns the statistics of its requests since it was opened.
    #[must_use]
    pub fn statistics(&self) -> RemoteStatistics {
        self.engine.statistics()
    }
}

impl PageSource for ObjectSource {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.engine.read_page(self.len, offset, page, false)
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.engine.read_page(self.len, offset, page, true)
    }

    fn len(&self) -> Option<u64> {
        Some(self.len)
    }
}

impl fmt::Debug for ObjectSource {
    /// Without the store, whose address may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, len, etag, version } = self;
        f.debug_struct("ObjectSource")
            .field("len", len)
            .field("etag", etag)
            .field("version", version)
            .field("engine", engine)
            .finish()
    }
}

/// What runs requests.
pub(super) enum Threads {
    /// Taken when it is dropped.
    Own(Option<Runtime>),
    Programs(Handle),
}

impl Threads {
    /// A runtime with one thread.
    pub(super) fn own() -> io::Result<Self> {
        let mut runtime = Builder::new_multi_thread();
        runtime.worker_threads(1).thread_name("uffd-object").enable_all();
        Ok(Self::Own(Some(runtime.build()?)))
    }

    pub(super) fn handle(&self) -> Handle {
        match self {
            Self::Own(runtime) => runtime.as_ref().expect("it is taken by the drop alone").handle().clone(),
            Self::Programs(handle) => handle.clone(),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Self::Own(runtime) = self {
            // Not waited for: a task of another runtime may drop it.
            runtime.take().into_iter().for_each(Runtime::shutdown_background);
        }
    }
}

struct Object {
    store: Arc<dyn ObjectStore>,
    path: Path,
    runtime: Threads,
}

/// Asks for the first byte, and notes what object it is of.
struct Probe {
    object: Arc<Object>,
    version: Option<String>,
    found: Mutex<Option<ObjectMeta>>,
}

/// Asks for bytes of the object that was opened.
struct Pinned {
    object: Arc<Object>,
    found: ObjectMeta,
}

impl Object {
    /// Makes one request, by the time. Returns what object the bytes are of, which of them they are, and the bytes.
    fn get(&self, options: GetOptions, limit: Duration) -> Result<Answer, RemoteError> {
        let request = async {
            let found = self.store.get_opts(&self.path, options).await?;
            let (meta, range) = (found.meta.clone(), found.range.clone());
            let bytes = found.bytes().await?;
            Ok::<_, Error>((meta, range, bytes.to_vec()))
        };
        let run = async { timeout(limit, request).await };
        let answer = self.runtime.handle().block_on(run);
        let answer = answer.map_err(|_| RemoteError::TimedOut(limit))?;
        let (meta, range, bytes) = answer.map_err(|error| of_store(&error))?;
        Ok(Answer { meta, range, bytes })
    }
}

/// What a store has answered.
struct Answer {
    meta: ObjectMeta,
    range: Range<u64>,
    bytes: Vec<u8>,
}

impl Answer {
    /// Copies the bytes that were asked for, if it is those.
    fn copy_to(&self, offset: u64, bytes: &mut [u8]) -> Result<(), RemoteError> {
        let expected = bytes.len() as u64;
        let asked = offset..offset + expected;
        if self.range != asked {
            let show = |range: &Range<u64>| format!("{}-{}", range.start, range.end.saturating_sub(1));
            return Err(RemoteError::WrongRange { asked: show(&asked), found: show(&self.range) });
        }
        let found = self.bytes.len() as u64;
        if found > expected {
            return Err(RemoteError::LongBody { expected });
        }
        if found < expected {
            return Err(RemoteError::ShortBody { expected, found });
        }
        bytes.copy_from_slice(&self.bytes);
        Ok(())
    }
}

/// What an error of a store means.
pub(super) fn of_store(error: &Error) -> RemoteError {
    match error {
        Error::Precondition { .. } => RemoteError::Changed { was: String::new(), found: "another".into() },
        Error::NotFound { .. } => RemoteError::NotFound { status: 404 },
        Error::PermissionDenied { .. } => RemoteError::Forbidden { status: 403 },
        Error::Unauthenticated { .. } => RemoteError::Forbidden { status: 401 },
        Error::Generic { .. } => of_text(&texts(error)),
        error => RemoteError::Unusable(error.to_string()),
    }
}

/// The texts of an error and of all its causes.
fn texts(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// What a text means, which is all that is known of errors of requests.
fn of_text(text: &str) -> RemoteError {
    let status = text.split_once("status code: ").and_then(|(_, rest)| rest.get(..3)?.parse::<u16>().ok());
    match status {
        Some(status @ (401 | 403)) => RemoteError::Forbidden { status },
        Some(status @ (404 | 410)) => RemoteError::NotFound { status },
        Some(status @ (408 | 429 | 500..=599)) => RemoteError::Busy { status, retry_after: None },
        Some(_) => RemoteError::Unusable(text.to_owned()),
        None if text.contains("non-partial response") => RemoteError::NoRanges,
        None if text.contains("Requested ") && text.contains(", got ") => {
            RemoteError::Unusable(text.to_owned())
        }
        None => RemoteError::Connection(text.to_owned()),
    }
}

impl Fetch for Arc<Probe> {
    fn fetch(&self, _: u64, bytes: &mut [u8], limit: Duration) -> Result<(), RemoteError> {
        let version = self.version.clone();
        let range = Some(GetRange::Bounded(0..1));
        let first =
            self.object.get(GetOptions { range, version: version.clone(), ..GetOptions::default() }, limit);
        // An empty object has no first byte: what it is tells a request for no bytes.
        let meta = match first {
            Ok(answer) => {
                answer.copy_to(0, bytes)?;
                answer.meta
            }
            Err(error) => {
                let head = GetOptions { head: true, version, ..GetOptions::default() };
                let meta = self.object.get(head, limit).map_err(|_| error.clone())?.meta;
                if meta.size > 0 {
                    return Err(error);
                }
                meta
            }
        };
        *lock(&self.found) = Some(meta);
        Ok(())
    }
}

impl Fetch for Pinned {
    fn fetch(&self, offset: u64, bytes: &mut [u8], limit: Duration) -> Result<(), RemoteError> {
        let Self { object, found } = self;
        let was = || found.e_tag.clone().unwrap_or_else(|| "unnamed".into());
        let options = GetOptions {
            range: Some(GetRange::Bounded(offset..offset + bytes.len() as u64)),
            // A weak one never matches.
            if_match: found.e_tag.clone().filter(|etag| !etag.starts_with("W/")),
            version: found.version.clone(),
            ..GetOptions::default()
        };
        let answer = object.get(options, limit).map_err(|error| match error {
            RemoteError::Changed { found, .. } => RemoteError::Changed { was: was(), found },
            error => error,
        })?;
        let now = &answer.meta;
        let is_dated = found.e_tag.is_none() && now.last_modified != found.last_modified;
        if now.e_tag != found.e_tag || is_dated {
            let found = now.e_tag.clone().unwrap_or_else(|| "unnamed".into());
            return Err(RemoteError::Changed { was: was(), found });
        }
        if now.size != found.size {
            let show = |len: u64| format!("{len} bytes");
            return Err(RemoteError::Changed { was: show(found.size), found: show(now.size) });
        }
        answer.copy_to(offset, bytes)
    }
}
