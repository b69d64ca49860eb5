//! Memory that another process fills: hands its userfaultfd over to `serve`, and goes on at once.
//!
//! ```sh
//! cargo run --example serve -- SNAPSHOT SOCKET &
//! cargo run --example restore -- SNAPSHOT SOCKET
//! ```
//!
//! It compares the memory with SNAPSHOT, which is of no use otherwise: only `serve` needs it. Any kernel; no rights
//! from Linux 5.11 on.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{ExitCode, exit};
use std::{env, thread};

use memmap2::MmapMut;
use userfaultfd::{UffdBuilder, page_size};
use userfaultfd_examples::{Result, send};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let [snapshot, socket] = &arguments[..] else {
        eprintln!("usage: cargo run --example restore -- SNAPSHOT SOCKET");
        return ExitCode::FAILURE;
    };
    userfaultfd_examples::run(|| restore(snapshot, socket))
}

fn restore(snapshot: &OsString, socket: &OsString) -> Result<()> {
    let mut snapshot = File::open(snapshot)?;
    let len = usize::try_from(snapshot.metadata()?.len())?;
    let mut memory = MmapMut::map_anon(len.next_multiple_of(page_size()))?;

    // Registered here, before anybody touches it. Until the other process has the descriptor, faults wait.
    let uffd = UffdBuilder::new().close_on_exec(true).create()?;
    uffd.register(memory.as_mut_ptr().cast(), memory.len())?;
    let mut socket = UnixStream::connect(socket)?;
    send(&socket, [memory.as_ptr().addr() as u64, memory.len() as u64], uffd.as_fd())?;
    if socket.read(&mut [0])? == 0 {
        return Err("the other process doesn't serve this memory: it says why".into());
    }

    // If `serve` dies, its descriptor is closed, and this one keeps faults waiting: without it the rest of the memory
    // would read as zeros. This program has to notice.
    thread::spawn(move || {
        let _end = socket.read(&mut [0]);
        eprintln!("the other process has gone, and with it the rest of the memory");
        exit(1);
    });

    // Backwards, since nobody reads memory from its beginning to its end.
    let mut content = Vec::with_capacity(len);
    snapshot.read_to_end(&mut content)?;
    let mut pages: Vec<_> = memory.chunks(page_size()).zip(content.chunks(page_size())).collect();
    pages.reverse();
    for (page, content) in pages {
        let (inside, beyond) = page.split_at(content.len());
        if inside != content || beyond.iter().any(|byte| *byte != 0) {
            return Err(format!("the page at {page:p} isn't as in the snapshot").into());
        }
    }
    println!("restored {len} bytes, as they are in the snapshot");
    Ok(())
}
