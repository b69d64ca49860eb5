//! Serves other processes' memory from a snapshot, a page when it is first touched. The other process is `restore`.
//!
//! ```sh
//! cargo run --example serve -- SNAPSHOT SOCKET &
//! cargo run --example restore -- SNAPSHOT SOCKET
//! ```
//!
//! SNAPSHOT is any file, SOCKET a path where nothing is yet. Ends after one process, or as many as a third argument
//! says. Any kernel; no rights from Linux 5.11 on.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::{env, fs};

use userfaultfd::Uffd;
use userfaultfd::pager::{FileSource, PageSource, Pager, Region};
use userfaultfd_examples::{Result, receive};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let (snapshot, socket, processes) = match &arguments[..] {
        [snapshot, socket] => (snapshot, socket, Some(1)),
        [snapshot, socket, processes] => (snapshot, socket, processes.to_str().and_then(|n| n.parse().ok())),
        _ => return usage(),
    };
    let Some(processes) = processes else { return usage() };
    userfaultfd_examples::run(|| serve(snapshot, socket, processes))
}

fn usage() -> ExitCode {
    eprintln!("usage: cargo run --example serve -- SNAPSHOT SOCKET [PROCESSES]");
    ExitCode::FAILURE
}

fn serve(snapshot: &OsString, socket: &OsString, processes: usize) -> Result<()> {
    // Read by the regions of all processes.
    let source = Arc::new(FileSource::open(snapshot)?);
    let pager = Pager::builder().threads(2).on_problem(|problem| eprintln!("{problem}")).build()?;
    let listener = UnixListener::bind(socket)?;
    println!("serving {} bytes", source.len().unwrap_or_default());
    for _ in 0..processes {
        let (stream, _) = listener.accept()?;
        // What is wrong with one process is no reason not to serve the next.
        if let Err(error) = serve_process(&pager, &source, stream) {
            eprintln!("a process isn't served: {error}");
        }
    }
    println!("{}", pager.statistics());
    fs::remove_file(socket)?;
    Ok(())
}

fn serve_process(pager: &Pager, source: &Arc<FileSource>, mut stream: UnixStream) -> Result<()> {
    // Where the memory is in the other process, and the userfaultfd that it is registered with.
    let Some(([start, len], fd)) = receive(&stream)? else { return Err("it asks for nothing".into()) };
    let region = Region::new(start.try_into()?, len.try_into()?, Arc::clone(source)).block(64 << 10);
    let added = pager.add(Uffd::from(fd), [region]).map_err(|refused| refused.error)?;
    stream.write_all(b"\n")?;
    // The process never sends more. When it ends, its end of the socket is closed.
    stream.read_exact(&mut [0]).unwrap_err();
    let missing: usize = pager.remove(added.descriptor)?.missing().iter().map(|missing| missing.len).sum();
    println!("a process has ended, and {missing} bytes of its {len} were never needed");
    Ok(())
}
