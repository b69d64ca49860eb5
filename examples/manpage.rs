//! The program of userfaultfd(2): a thread that fills each page of a mapping when main first reads from it.
//!
//! ```sh
//! cargo run --example manpage -- 3
//! ```
//!
//! Any kernel; no rights from Linux 5.11 on.

use std::convert::Infallible;
use std::os::fd::AsRawFd;
use std::process::{ExitCode, exit};
use std::{env, io, thread};

use memmap2::MmapMut;
use userfaultfd::{Event, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

fn main() -> ExitCode {
    let argument = env::args().nth(1).and_then(|argument| argument.parse::<usize>().ok());
    let Some(pages) = argument.filter(|pages| *pages > 0) else {
        eprintln!("usage: cargo run --example manpage -- NUMBER-OF-PAGES");
        return ExitCode::FAILURE;
    };
    userfaultfd_examples::run(|| read_pages(pages))
}

fn read_pages(pages: usize) -> Result<()> {
    // Non-blocking, as poll(2) wants it.
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create()?;

    // Memory that has no pages yet. Each comes when it is first touched: from the kernel, and once the memory is
    // registered from the handler.
    let mut memory = MmapMut::map_anon(pages.checked_mul(page_size()).ok_or("too many pages")?)?;
    println!("Address returned by mmap() = {:p}", memory.as_ptr());
    uffd.register(memory.as_mut_ptr().cast(), memory.len())?;

    thread::spawn(move || {
        let Err(error) = handle_faults(&uffd);
        // As long as `uffd` is open main sleeps in its fault. Once it is closed main would read zeros.
        eprintln!("fault_handler_thread(): {error}");
        exit(1);
    });

    // Not on a page boundary, to show what the handler is told.
    for at in (0xf..memory.len()).step_by(1024) {
        // Read before println! locks the standard output. The handler needs that, too, and would never get it.
        let byte = memory[at];
        println!("Read address {:p} in main(): {}", memory.as_ptr().wrapping_add(at), char::from(byte));
    }
    Ok(())
}

/// Fills one page after the other: with `A`, with `B`, and so on up to `T`, then with `A` again.
fn handle_faults(uffd: &Uffd) -> Result<Infallible> {
    let mut page = vec![0; page_size()];
    let mut letters = (b'A'..=b'T').cycle();
    loop {
        let (nready, revents) = poll(uffd)?;
        println!("\nfault_handler_thread():");
        println!(
            "    poll() returns: nready = {nready}; POLLIN = {}; POLLERR = {}",
            i32::from(revents & libc::POLLIN != 0),
            i32::from(revents & libc::POLLERR != 0),
        );

        let (kind, rw, addr) = match uffd.read_event()? {
            Some(Event::Pagefault { kind, rw, addr, .. }) => (kind, rw, addr),
            Some(event) => return Err(format!("unexpected event: {event:?}").into()),
            None => continue, // a signal called main off; it comes again
        };
        println!("    UFFD_EVENT_PAGEFAULT event: {kind:?}, {rw:?}; address = {addr:p}");

        page.fill(letters.next().unwrap_or_default());
        // The page's address on new kernels; on some before 5.18 that of the access.
        let dst = addr.map_addr(|addr| addr & !(page_size() - 1));
        // Main isn't woken yet, lest its lines get between these.
        // SAFETY: `page` is readable for its whole length, and main has seen nothing at the destination yet.
        let copied = unsafe { uffd.copy(page.as_ptr().cast(), dst, page.len(), false)? };
        println!("        (uffdio_copy.copy returned {copied})");
        uffd.wake(dst, page.len())?;
    }
}

/// Waits for something to read. Returns what poll(2) returns, and what it says about the descriptor.
fn poll(uffd: &Uffd) -> io::Result<(i32, i16)> {
    let mut fds = [libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
    // SAFETY: the array of one element is borrowed for the call, and the kernel writes only its `revents`.
    match unsafe { libc::poll(fds.as_mut_ptr(), 1, -1) } {
        -1 => Err(io::Error::last_os_error()),
        nready => Ok((nready, fds[0].revents)),
    }
}
