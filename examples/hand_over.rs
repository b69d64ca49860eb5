//! A virtual machine monitor's side: hands memory over to `serve_vms`, as Firecracker does, and checks each byte of it.
//!
//! ```sh
//! cargo run --features handoff --example serve_vms -- SNAPSHOT SOCKET &
//! cargo run --features handoff --example hand_over -- SNAPSHOT SOCKET
//! ```
//!
//! It compares the memory with SNAPSHOT, of at least two pages, which is of no use otherwise. Any kernel; no rights
//! from Linux 5.11 on.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::{env, fs, iter};

use memmap2::MmapMut;
use userfaultfd::handoff::{Dialect, MemoryRegion, Offer, send};
use userfaultfd::{FeatureFlags, UffdBuilder, page_size};
use userfaultfd_examples::Result;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let [snapshot, socket] = &arguments[..] else {
        eprintln!("usage: cargo run --features handoff --example hand_over -- SNAPSHOT SOCKET");
        return ExitCode::FAILURE;
    };
    userfaultfd_examples::run(|| hand_over(snapshot, socket))
}

fn hand_over(snapshot: &OsString, socket: &OsString) -> Result<()> {
    let content = fs::read(snapshot)?;
    let pages = content.len().div_ceil(page_size());
    if pages < 2 {
        return Err("the snapshot has less than two pages".into());
    }

    // As on x86-64, where devices lie between: the memory has two parts, and the file has one after the other.
    let mut low = MmapMut::map_anon(pages / 2 * page_size())?;
    let mut high = MmapMut::map_anon((pages - pages / 2) * page_size())?;
    // What Firecracker asks for: the handler learns which pages the balloon gives back.
    let removals = FeatureFlags::EVENT_REMOVE;
    let uffd =
        UffdBuilder::new().close_on_exec(true).non_blocking(true).request_features(removals).create()?;
    for memory in [&mut low, &mut high] {
        uffd.register(memory.as_mut_ptr().cast(), memory.len())?;
    }
    let region = |memory: &MmapMut, offset| {
        MemoryRegion::new(memory.as_ptr().expose_provenance(), memory.len(), offset)
    };
    let regions = [region(&low, 0), region(&high, low.len() as u64)];
    // Open as long as the machine lives. So is the userfaultfd: without it memory would read as zeros if the handler dies.
    let stream = UnixStream::connect(socket)?;
    send(Dialect::Firecracker, &stream, &Offer::new(&uffd, regions))?;

    // Backwards, since nobody reads memory from its beginning to its end.
    let expected = content.iter().chain(iter::repeat(&0)).take(pages * page_size());
    let mut expected: Vec<u8> = expected.copied().collect();
    for page in low.chunks(page_size()).chain(high.chunks(page_size())).rev() {
        if !expected.ends_with(page) {
            return Err(format!("the page at {:p} isn't as in the snapshot", page.as_ptr()).into());
        }
        expected.truncate(expected.len() - page.len());
    }
    println!("restored {} bytes, as they are in the snapshot", content.len());
    Ok(())
}
