//! A store in memory that fails as it is told.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_core::Stream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

type BoxStream<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// What an answer is like, other than right.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// An error whose text is all that is known.
    Says(&'static str),
    Forbidden,
    Unauthenticated,
    /// It never comes.
    Never,
    /// It comes late.
    After(Duration),
    /// Its last byte is missing.
    Short,
    /// It has one byte more.
    Long,
    /// It says that it is of a range a byte later.
    Elsewhere,
}

/// The store.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: InMemory,
    faults: Mutex<VecDeque<Fault>>,
    /// The ranges that were asked for, and whether for one ETag.
    asked: Mutex<Vec<(Range<u64>, bool)>>,
    uploads: Arc<Mutex<Uploads>>,
}

/// What became of uploads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uploads {
    /// The lengths of the parts that came.
    pub(crate) parts: Vec<usize>,
    pub(crate) completed: usize,
    pub(crate) aborted: usize,
    /// The part that fails, counted from 0.
    pub(crate) fails: Option<usize>,
}

/// An upload of it.
#[derive(Debug)]
struct Parts {
    upload: Box<dyn MultipartUpload>,
    uploads: Arc<Mutex<Uploads>>,
}

#[async_trait::async_trait]
impl MultipartUpload for Parts {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let mut uploads = self.uploads.lock().unwrap();
        let number = uploads.parts.len();
        uploads.parts.push(data.content_length());
        if uploads.fails == Some(number) {
            let refused = Error::PermissionDenied { path: "part".into(), source: "it fails".into() };
            return Box::pin(std::future::ready(Err(refused)));
        }
        self.upload.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.uploads.lock().unwrap().completed += 1;
        self.upload.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.uploads.lock().unwrap().aborted += 1;
        self.upload.abort().await
    }
}

impl Faulty {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: InMemory::new(),
            faults: Mutex::default(),
            asked: Mutex::default(),
            uploads: Arc::default(),
        })
    }

    /// How the next requests are answered, each by one.
    pub(crate) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults);
    }

    /// Has a part of the next upload fail.
    pub(crate) fn fail_part(&self, number: usize) {
        *self.uploads.lock().unwrap() = Uploads { fails: Some(number), ..Uploads::default() };
    }

    pub(crate) fn uploads(&self) -> Uploads {
        self.uploads.lock().unwrap().clone()
    }

    pub(crate) fn asked(&self) -> Vec<(Range<u64>, bool)> {
        self.asked.lock().unwrap().clone()
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a store that fails")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let upload = self.inner.put_multipart_opts(location, opts).await?;
        Ok(Box::new(Parts { upload, uploads: Arc::clone(&self.uploads) }))
    }

    async fn get_opts(&self, location: &Path, mut options: GetOptions) -> Result<GetResult> {
        let range = match options.range.clone() {
            Some(GetRange::Bounded(range)) => range,
            _ => 0..0,
        };
        self.asked.lock().unwrap().push((range.clone(), options.if_match.is_some()));
        let fault = self.faults.lock().unwrap().pop_front();
        match &fault {
            Some(Fault::Says(text)) => {
                return Err(Error::Generic { store: "faulty", source: (*text).into() });
            }
            Some(Fault::Forbidden) => {
                return Err(Error::PermissionDenied { path: location.to_string(), source: "no".into() });
            }
            Some(Fault::Unauthenticated) => {
                return Err(Error::Unauthenticated { path: location.to_string(), source: "who".into() });
            }
            Some(Fault::Never) => std::future::pending().await,
            Some(Fault::After(delay)) => tokio::time::sleep(*delay).await,
            Some(Fault::Short) => options.range = Some(GetRange::Bounded(range.start..range.end - 1)),
            Some(Fault::Long) => options.range = Some(GetRange::Bounded(range.start..range.end + 1)),
            Some(Fault::Elsewhere) | None => {}
        }
        let mut found = self.inner.get_opts(location, options).await?;
        match fault {
            Some(Fault::Short | Fault::Long) => found.range = range,
            Some(Fault::Elsewhere) => found.range = range.start + 1..range.end + 1,
            _ => {}
        }
        Ok(found)
    }

    fn delete_stream(&self, locations: BoxStream<Result<Path>>) -> BoxStream<Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
