//! `uffd serve`: the page-fault handler of a host.

mod answer;
mod guests;
mod image;
mod metrics;
mod stop;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use userfaultfd::handoff::{Error, Listener, Server, ServerEvent, adopt, left_behind};
use userfaultfd::pager::{self, OnEnd, Pager, Problem};

use self::guests::Guests;
use self::metrics::{Board, Ending, Metrics};
pub(crate) use self::stop::signals;
use crate::exit::{Failure, say};

/// Serve the memory of virtual machines that are restored from an image
///
/// Monitors hand their memory over on a Unix socket: Firecracker (`backend_path` of `PUT /snapshot/load`) and its relatives,
/// nydus, and Cloud Hypervisor. A page is read when a machine touches it. The standard error has a line when a machine connects, and
/// one when it ends. With `--state` a handler that is started after another one was killed goes on with its machines.
///
/// SIGTERM and SIGINT end it: it takes no more machines, fills all memory that is missing, so that the machines go on without a
/// handler, and exits. A second signal ends it at once; then machines end as `--on-end` says.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Path of the Unix socket on which monitors connect. A socket that a killed handler has left there is replaced
    #[arg(long, value_name = "PATH", required_unless_present = "inherited")]
    socket: Option<PathBuf>,

    /// Take the socket that systemd has made (LISTEN_FDS)
    #[arg(long, conflicts_with = "socket")]
    inherited: bool,

    #[command(flatten)]
    image: image::ImageOptions,

    /// Write the working set to this file: the pages that machines access, in the order of the first access. The sets of
    /// several machines are merged
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    record: Option<PathBuf>,

    /// Fill the pages of this working set when a machine connects: a file that `--record` wrote
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,

    /// Threads that resolve faults from the start; more are added while all wait for the image
    #[arg(long, value_name = "NUMBER", default_value = "1")]
    threads: NonZeroUsize,

    /// Maximum number of threads that resolve faults
    #[arg(long, value_name = "NUMBER", default_value = "16")]
    max_threads: NonZeroUsize,

    /// Keep the states of pages in this directory, which must be on a tmpfs, and go on with the machines that a killed handler has
    /// left there. They must have had the same image
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Serve metrics for Prometheus at http://ADDR/metrics: faults, latencies, missing bytes and ends, for each machine and region.
    /// ADDR must be a loopback address; with port 0 the kernel chooses the port, which is printed to the standard error
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,

    /// How a machine ends when its memory can't be supplied
    #[arg(long, value_enum, default_value = "kill")]
    on_end: End,
}

/// An [`OnEnd`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum End {
    /// Its process is killed
    Kill,
    /// The page is poisoned: an access is SIGBUS
    Poison,
    /// Accesses wait, for another handler
    Leave,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let image = image::open(&options.image)?;
    let (signals, stop) = stop::signals()?;
    let lost = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&lost);
    let board = Arc::new(Board::default());
    let mut pager = Pager::builder()
        .threads(options.threads.get())
        .max_threads(options.max_threads.get().max(options.threads.get()))
        .on_problem(move |problem| report(problem, &counted));
    if let Some(dir) = &options.state {
        pager = pager.state(dir);
    }
    let pager =
        pager.build().map_err(|error| unmet("the threads that resolve faults can't start", &error))?;
    let pager = Arc::new(pager);
    let metrics = options.metrics.map(|address| Metrics::start(address, &pager, &board)).transpose()?;
    let listener = listen(options)?.on_end(match options.on_end {
        End::Kill => OnEnd::Kill,
        End::Poison => OnEnd::Poison,
        End::Leave => OnEnd::Leave,
    });
    let mut guests = Guests::new(
        (image, options.image.name()?),
        options.record.clone(),
        options.replay.as_deref(),
        Arc::clone(&lost),
        Arc::clone(&board),
    )?;
    let mut server = Server::new(listener).map_err(Failure::of("the socket"))?.stop_on(stop);
    if let Some(dir) = &options.state {
        for pid in left_behind(dir).map_err(Failure::of(dir.display()))? {
            match adopt(dir, pid) {
                Ok(handoff) => {
                    if let Some(served) = guests.adopt(&pager, handoff) {
                        server.add(served);
                    }
                }
                Err(error) => say!("not adopted: {error}"),
            }
        }
    }
    say!("serving");
    loop {
        match server.wait().map_err(Failure::of("the socket"))? {
            ServerEvent::Handoff(handoff) => {
                if let Some(served) = guests.serve(&pager, handoff) {
                    server.add(served);
                }
            }
            ServerEvent::Message { process, received } => {
                if let Some(served) = server.get_mut(process) {
                    guests.receive(served, received.message);
                }
            }
            ServerEvent::Ended(served) => guests.end(&served),
            ServerEvent::Refused(error) => {
                board.count(Ending::Refused, 1);
                say!("refused: {error}");
            }
            ServerEvent::Stopped => break,
            event => say!("not understood: {event:?}"),
        }
    }
    stop::finish((pager, metrics), server.into_processes(), guests, signals);
    match lost.load(Ordering::Relaxed) {
        0 => Ok(()),
        machines => Err(Failure::Lost(machines)),
    }
}

/// Says what the pager reports. The end of a process has a line of its own.
fn report(problem: &Problem, lost: &AtomicUsize) {
    match problem {
        Problem::TargetGone { .. } => return,
        Problem::Killed { .. } => {
            lost.fetch_add(1, Ordering::Relaxed);
        }
        _ => {}
    }
    say!("{problem}");
}

/// What userfaultfd needs, and hasn't here.
fn unmet(what: &str, error: &pager::Error) -> Failure {
    Failure::Unmet(format!("{what}: {error}; `uffd doctor` says more"))
}

/// The socket, in place of one that nothing listens on any more.
fn listen(options: &Options) -> Result<Listener, Failure> {
    let Some(path) = &options.socket else {
        return Listener::inherited(None).map_err(|error| {
            Failure::Unmet(format!("{error}; a systemd socket unit with ListenStream= starts this service"))
        });
    };
    match Listener::bind(path) {
        Err(Error::Listen(error)) if error.kind() == io::ErrorKind::AddrInUse && is_left(path) => {
            fs::remove_file(path).map_err(Failure::of(path.display()))?;
            Listener::bind(path)
        }
        result => result,
    }
    .map_err(|error| match error {
        Error::Listen(error) if error.kind() == io::ErrorKind::AddrInUse => Failure::Failed(format!(
            "{error}: another handler listens there, or it is no socket; choose another path"
        )),
        error => Failure::Failed(error.to_string()),
    })
}

/// Whether a path is a socket that nothing listens on: a handler was killed.
fn is_left(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    is_socket
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
