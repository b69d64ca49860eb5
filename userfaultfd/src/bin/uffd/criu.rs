//! `uffd criu-lazy-pages`: in place of `criu lazy-pages`.

use std::fs;
use std::io::{ErrorKind, Read};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use userfaultfd::handoff::{CriuImages, Dialect, Error, Handoff, Listener};
use userfaultfd::pager::{HttpSource, PageSource, Pager, Problem};

use crate::exit::{Count, Failure, say};
use crate::serve;

/// The name that `criu restore --lazy-pages` connects to.
const SOCKET: &str = "lazy-pages.socket";

/// How often it is looked for a signal while nothing connects.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Serve the memory of processes that CRIU restores, in place of `criu lazy-pages`
///
/// Start it, then `criu restore --lazy-pages` with the same folder of images. The processes run as soon as CRIU has restored
/// them; a page is read when it is touched, and all that is missing is filled meanwhile. The program ends once the memory is complete.
///
/// Don't kill it before: missing pages would read as zeros. So SIGTERM and SIGINT end it only while no process has been restored.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The folder of the images, in which the socket is made
    #[arg(short = 'D', long = "images-dir", value_name = "IMAGES")]
    folder: PathBuf,

    /// Read the images from a web server that supports range requests: from this URL followed by the name of each image. CRIU itself
    /// needs them in the folder, except `pages-*.img`
    #[arg(long, value_name = "URL")]
    images: Option<String>,

    /// Threads that resolve faults from the start; more are added while all wait for the images
    #[arg(long, value_name = "NUMBER", default_value = "1")]
    threads: NonZeroUsize,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let images = match &options.images {
        None => CriuImages::in_folder(&options.folder),
        Some(url) => {
            let url = url.trim_end_matches('/').to_owned();
            CriuImages::with(move |name| {
                let source = HttpSource::open(format!("{url}/{name}")).map_err(std::io::Error::other)?;
                Ok(Arc::new(source) as Arc<dyn PageSource>)
            })
        }
    };
    let (signals, _) = serve::signals()?;
    let pager = Pager::builder()
        .threads(options.threads.get())
        .max_threads(options.threads.get().max(16))
        .on_problem(report)
        .build()
        .map_err(|error| Failure::Unmet(format!("{error}; `uffd doctor` says more")))?;
    let path = options.folder.join(SOCKET);
    let mut listener = listen(&path)?.dialects([Dialect::Criu]);
    say!("waiting for criu restore --lazy-pages -D {}", options.folder.display());
    let Some(handoff) = accept(&mut listener, signals, &path)? else { return Ok(()) };
    let failed = |error: &dyn std::fmt::Display| Failure::Failed(error.to_string());
    let begun = |pid| say!("process {pid}: served");
    let served = pager.serve_criu(handoff, &images, begun).map_err(|error| failed(&error))?;
    let processes = Count(served.processes.len(), "process");
    // The socket has done its part: CRIU looks for none any more.
    drop(listener);
    say!("{processes} restored");
    match pager.finish(|_| {}) {
        Ok(()) => {
            let statistics = pager.statistics();
            let mib = statistics.bytes as f64 / f64::from(1 << 20);
            say!("complete: {} faults, {mib:.1} MiB filled", statistics.faults());
            Ok(())
        }
        Err(error) => Err(failed(&error)),
    }
}

/// Says what the pager reports. Processes may end meanwhile.
fn report(problem: &Problem) {
    if !matches!(problem, Problem::TargetGone { .. }) {
        say!("{problem}");
    }
}

/// The socket, in place of one that was left.
fn listen(path: &Path) -> Result<Listener, Failure> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let is_left =
        || UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if is_socket && is_left() {
        fs::remove_file(path).map_err(Failure::of(path.display()))?;
    }
    Listener::bind(path).map_err(|error| Failure::Failed(error.to_string()))
}

/// Waits for CRIU, or a signal.
fn accept(listener: &mut Listener, mut signals: UnixStream, path: &Path) -> Result<Option<Handoff>, Failure> {
    signals.set_nonblocking(true).map_err(Failure::of("signals"))?;
    loop {
        match listener.accept_timeout(LOOK_INTERVAL) {
            Ok(Some(handoff)) => return Ok(Some(handoff)),
            Ok(None) => {}
            Err(error @ Error::Peer { .. }) => say!("refused: {error}"),
            Err(error) => return Err(Failure::of(path.display())(error)),
        }
        match signals.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return Ok(None),
        }
    }
}
