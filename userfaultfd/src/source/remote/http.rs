//! An object of an HTTP server, read by ranges.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ureq::http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use ureq::{Agent, Body};

use super::engine::{Engine, FOREVER, Fetch};
use super::{RemoteError, RemoteOptions, RemoteStatistics, lock};
use crate::source::{PageData, PageSource};

/// An object of an HTTP or HTTPS server as a source: any server that answers range requests, an object store's signed
/// address included.
///
/// ```no_run
/// use std::time::Duration;
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{HttpSource, RemoteOptions};
///
/// let options = RemoteOptions::new().give_up_after(Duration::from_secs(30));
/// let source = HttpSource::builder("https://images.example/vm.img")
///     .header("authorization", "Bearer …")
///     .options(options)
///     .open()?;
/// let memory = LazyMemory::builder(source).build()?;
/// println!("{}", memory[123_456_789]); // read now
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # One object
///
/// Opening asks for the first byte, and so for the length, the ETag and the date of the object. All later requests are for
/// that object (`If-Match`), and each answer is compared with it: if it has changed, a read is
/// [`RemoteError::Changed`], and pages of two objects are never mixed. An object without a strong ETag is held to its date
/// and its length, which can't tell two changes within a second.
///
/// # Requests
///
/// Connections are kept and used again. At most [`connections`](RemoteOptions::connections) requests are under way; of reads
/// that wait, those for faults go first, and those side by side become one request. A request that fails in a way
/// that may pass (a reset, a timeout, a short answer, 408, 429, 5xx) is sent again soon, and not before `Retry-After`. A fault
/// whose answer takes longer than usual has a second request sent. All this is set by [`RemoteOptions`]; every way to fail is a
/// variant of [`RemoteError`]. Redirects are followed. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` are obeyed.
///
/// # Memory and threads
///
/// A read allocates, and threads of the source send the requests: not a source for memory whose descriptor reports forks, nor
/// for memory that the allocator itself lives in.
pub struct HttpSource {
    engine: Engine,
    len: u64,
    etag: Option<String>,
}

/// Builder for an [`HttpSource`].
#[derive(Clone, Debug)]
#[must_use = "the source is made by `open`"]
pub struct HttpSourceBuilder {
    url: String,
    headers: Vec<(String, String)>,
    options: RemoteOptions,
}

impl HttpSourceBuilder {
    /// Adds a header to each request, such as credentials.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets timeouts, retries, and the number and size of requests.
    pub fn options(mut self, options: RemoteOptions) -> Self {
        self.options = options;
        self
    }

    /// Asks the server for the object's length and version. Tries as often and as long as a read.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](ErrorKind::InvalidInput): a header that can't be. Else a [`RemoteError`].
    pub fn open(self) -> io::Result<HttpSource> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let parsed = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value));
            let (Ok(name), Ok(mut value)) = parsed else {
                return Err(io::Error::new(
                    ErrorKind::InvalidInput,
                    format!("a header that can't be: {name}"),
                ));
            };
            // It may be a secret.
            value.set_sensitive(true);
            headers.append(name, value);
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .accept_encoding("identity")
            .max_idle_connections(self.options.connections)
            .max_idle_connections_per_host(self.options.connections)
            .build()
            .new_agent();
        let probe = Probe { http: Http { agent, url: self.url, headers }, found: Mutex::default() };
        let probe = Arc::new(probe);
        // With the same patience as a read, by an engine of its own.
        let first = Engine::new(Arc::clone(&probe), self.options.clone());
        first.read(0, &mut [0], false)?;
        let found = lock(&probe.found).take();
        let (len, version) = found.ok_or_else(|| io::Error::other("the server was never asked"))?;
        let etag = version.etag.clone();
        let http = Http {
            agent: probe.http.agent.clone(),
            url: probe.http.url.clone(),
            headers: probe.http.headers.clone(),
        };
        let engine = Engine::new(Pinned { http, len, version }, self.options);
        Ok(HttpSource { engine, len, etag })
    }
}

impl HttpSource {
    /// Opens the object of a URL with the default options.
    ///
    /// # Errors
    ///
    /// Those of [`HttpSourceBuilder::open`].
    pub fn open(url: impl Into<String>) -> io::Result<Self> {
        Self::builder(url).open()
    }

    /// Returns a builder for the object of a URL.
    pub fn builder(url: impl Into<String>) -> HttpSourceBuilder {
        HttpSourceBuilder { url: url.into(), headers: Vec::new(), options: RemoteOptions::default() }
    }

    /// Returns the ETag that all pages are of, as the server wrote it, or `None` if the object has none.
    #[must_use]
    pub fn etag(&self) -> Option<&str> {
        self.etag.as_deref()
    }

    /// Returns the statistics of its requests since it was opened.
    #[must_use]
    pub fn statistics(&self) -> RemoteStatistics {
        self.engine.statistics()
    }
}

impl PageSource for HttpSource {
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

impl fmt::Debug for HttpSource {
    /// Without the URL and the headers, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, len, etag } = self;
        f.debug_struct("HttpSource").field("len", len).field("etag", etag).field("engine", engine).finish()
    }
}

/// What tells one version of an object from another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Version {
    etag: Option<String>,
    modified: Option<String>,
}

struct Http {
    agent: Agent,
    url: String,
    headers: HeaderMap,
}

/// Asks for the first byte, and notes what object it is of.
struct Probe {
    http: Http,
    found: Mutex<Option<(u64, Version)>>,
}

/// Asks for bytes of the object that was opened.
struct Pinned {
    http: Http,
    len: u64,
    version: Version,
}

impl Http {
    /// Sends a request for bytes `first..=last`.
    fn get(
        &self,
        first: u64,
        last: u64,
        pin: Option<&str>,
        timeout: Duration,
    ) -> Result<Response<Body>, RemoteError> {
        let mut request = self.agent.get(&self.url);
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.clone());
        }
        request = request.header(header::RANGE, format!("bytes={first}-{last}"));
        if let Some(etag) = pin {
            request = request.header(header::IF_MATCH, etag);
        }
        let request = request.config().timeout_global(Some(timeout)).build();
        request.call().map_err(|error| of_ureq(error, timeout))
    }
}

/// What an error of the client means.
fn of_ureq(error: ureq::Error, timeout: Duration) -> RemoteError {
    match error {
        ureq::Error::Timeout(_) => RemoteError::TimedOut(timeout),
        ureq::Error::Io(error) => of_io(&error, timeout),
        ureq::Error::ConnectionFailed | ureq::Error::HostNotFound | ureq::Error::Protocol(_) => {
            RemoteError::Connection(error.to_string())
        }
        error => RemoteError::Unusable(error.to_string()),
    }
}

fn of_io(error: &io::Error, timeout: Duration) -> RemoteError {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => RemoteError::TimedOut(timeout),
        // An error of TLS, which the next attempt will have, too.
        ErrorKind::InvalidData => RemoteError::Unusable(error.to_string()),
        _ => RemoteError::Connection(error.to_string()),
    }
}

/// The longest time that a server may tell to come again.
const MAX_RETRY_AFTER: u64 = FOREVER.as_secs();

fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_owned())
}

/// What a status that isn't 206 means.
fn of_status(response: &Response<Body>) -> RemoteError {
    match response.status().as_u16() {
        200 => RemoteError::NoRanges,
        status @ (401 | 403) => RemoteError::Forbidden { status },
        status @ (404 | 410) => RemoteError::NotFound { status },
        status @ (408 | 429 | 500..=599) => {
            // A date instead of seconds is left to the delays of retries.
            let seconds = text(response.headers(), header::RETRY_AFTER).and_then(|text| text.parse().ok());
            let retry_after = seconds.map(|seconds: u64| Duration::from_secs(seconds.min(MAX_RETRY_AFTER)));
            RemoteError::Busy { status, retry_after }
        }
        status => RemoteError::Unusable(format!("status {status}")),
    }
}

/// Checks that an answer has bytes `first..=last`. Returns the length of the object.
fn check_range(headers: &HeaderMap, first: u64, last: u64) -> Result<u64, RemoteError> {
    if let Some(encoding) = text(headers, header::CONTENT_ENCODING).filter(|encoding| encoding != "identity")
    {
        return Err(RemoteError::Unusable(format!("the content is encoded: {encoding}")));
    }
    let found = text(headers, header::CONTENT_RANGE).unwrap_or_else(|| "no Content-Range".into());
    let parsed = found.strip_prefix("bytes ").and_then(|range| range.split_once('/'));
    let Some((range, len)) = parsed.filter(|(range, _)| *range == format!("{first}-{last}")) else {
        return Err(RemoteError::WrongRange { asked: format!("{first}-{last}"), found });
    };
    len.parse()
        .map_err(|_| RemoteError::Unusable(format!("the length of the object isn't told: {range}/{len}")))
}

/// Reads a body that has these bytes and no more.
fn read_body(body: &mut Body, bytes: &mut [u8], timeout: Duration) -> Result<(), RemoteError> {
    let expected = bytes.len() as u64;
    let mut reader = body.as_reader();
    let mut found = 0;
    loop {
        let (mut more, room) = ([0], found < bytes.len());
        let read = reader.read(if room { &mut bytes[found..] } else { &mut more });
        match read {
            Ok(0) if room => return Err(RemoteError::ShortBody { expected, found: found as u64 }),
            // The end, by which the connection can be used again.
            Ok(0) => return Ok(()),
            Ok(_) if !room => return Err(RemoteError::LongBody { expected }),
            Ok(read) => found += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(RemoteError::ShortBody { expected, found: found as u64 });
            }
            Err(error) => return Err(of_io(&error, timeout)),
        }
    }
}

impl Version {
    fn of(headers: &HeaderMap) -> Self {
        Self { etag: text(headers, header::ETAG), modified: text(headers, header::LAST_MODIFIED) }
    }

    /// The ETag, if it can be asked for: a weak one never matches.
    fn strong(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }

    /// Compares what an answer says of its object. The date counts where there is no ETag: servers of one object may
    /// have different dates.
    fn check(&self, found: &Self) -> Result<(), RemoteError> {
        let (was, found) = match (&self.etag, &self.modified) {
            (Some(_), _) => (&self.etag, &found.etag),
            (None, _) => (&self.modified, &found.modified),
        };
        if was == found {
            return Ok(());
        }
        let show = |version: &Option<String>| version.clone().unwrap_or_else(|| "unnamed".into());
        Err(RemoteError::Changed { was: show(was), found: show(found) })
    }
}

impl Fetch for Arc<Probe> {
    fn fetch(&self, _: u64, bytes: &mut [u8], timeout: Duration) -> Result<(), RemoteError> {
        let mut response = self.http.get(0, 0, None, timeout)?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        // An empty object has no first byte.
        let is_empty = text(&headers, header::CONTENT_RANGE).is_some_and(|range| range == "bytes */0")
            || status == 200 && text(&headers, header::CONTENT_LENGTH).is_some_and(|len| len == "0");
        let len = match status {
            206 => check_range(&headers, 0, 0)?,
            200 | 416 if is_empty => 0,
            _ => return Err(of_status(&response)),
        };
        if status == 206 {
            read_body(response.body_mut(), bytes, timeout)?;
        }
        *lock(&self.found) = Some((len, Version::of(&headers)));
        Ok(())
    }
}

impl Fetch for Pinned {
    fn fetch(&self, offset: u64, bytes: &mut [u8], timeout: Duration) -> Result<(), RemoteError> {
        let last = offset + bytes.len() as u64 - 1;
        let mut response = self.http.get(offset, last, self.version.strong(), timeout)?;
        let found = Version::of(response.headers());
        let changed = |found: String| RemoteError::Changed { was: format!("{} bytes", self.len), found };
        match response.status().as_u16() {
            206 => {}
            // Whatever else: the server sends no ranges, or of another object.
            200 => {
                self.version.check(&found)?;
                return Err(RemoteError::NoRanges);
            }
            412 => {
                let was = self.version.etag.clone().unwrap_or_default();
                return Err(RemoteError::Changed {
                    was,
                    found: found.etag.unwrap_or_else(|| "another".into()),
                });
            }
            416 => return Err(changed("shorter".into())),
            _ => return Err(of_status(&response)),
        }
        self.version.check(&found)?;
        let len = check_range(response.headers(), offset, last)?;
        if len != self.len {
            return Err(changed(format!("{len} bytes")));
        }
        read_body(response.body_mut(), bytes, timeout)
    }
}
