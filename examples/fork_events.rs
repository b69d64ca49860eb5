//! Fork events: a child's memory is registered like its parent's, and the parent is handed the userfaultfd for
//! it.
//!
//! Linux 4.11. Needs the capability CAP_SYS_PTRACE in the initial user namespace: be root, outside of a user
//! namespace, or `sudo setcap cap_sys_ptrace=ep target/debug/examples/fork_events`.

use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::{io, thread};

use memmap2::MmapMut;
use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

fn main() -> ExitCode {
    userfaultfd_examples::run(parent_and_child)
}

fn parent_and_child() -> Result<()> {
    let mut memory = MmapMut::map_anon(page_size())?;
    let uffd = UffdBuilder::new().close_on_exec(true).require_features(FeatureFlags::EVENT_FORK).create()?;
    uffd.register(memory.as_mut_ptr().cast(), memory.len())?;
    let ready = Arc::new(Barrier::new(2));
    let handler = thread::spawn({
        let ready = Arc::clone(&ready);
        move || handle_fork(&uffd, &ready)
    });

    // fork(3) returns when the handler has read the event, and holds the allocator's locks until then. A handler
    // that allocates on its way to reading waits for them, for ever; and a thread that starts allocates.
    ready.wait();
    // SAFETY: the child has one thread, which reads memory and exits: both are fine while locks may be held.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error().into()),
        // SAFETY: ends the child without running anything of the parent's.
        0 => unsafe { libc::_exit(memory[0].into()) },
        child => child,
    };
    let mut status = 0;
    // SAFETY: `status` is borrowed for the call.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } == -1 {
        return Err(io::Error::last_os_error().into());
    }
    println!("the child read {}", char::from(libc::WEXITSTATUS(status) as u8));
    println!("the parent reads {}", char::from(memory[0]));
    handler.join().expect("the handler doesn't panic")
}

/// Handles the fork, a fault of the child, and a fault of the parent, in this order.
fn handle_fork(uffd: &Uffd, ready: &Barrier) -> Result<()> {
    ready.wait();
    let Some(Event::Fork { uffd: child }) = uffd.read_event()? else {
        return Err("another event than a fork".into());
    };
    println!("fork: its userfaultfd has {}", child.features());
    fill(&child, b'C')?;
    fill(uffd, b'P')
}

/// Fills the page that the next fault asks for: with content of this process, at an address of the one that faults.
fn fill(uffd: &Uffd, letter: u8) -> Result<()> {
    let Some(Event::Pagefault { addr, .. }) = uffd.read_event()? else {
        return Err("another event than a fault".into());
    };
    let content = vec![letter; page_size()];
    // SAFETY: `content` is a page long, and the thread that waits for the page takes any bytes.
    unsafe { uffd.copy(content.as_ptr().cast(), addr, page_size(), true)? };
    Ok(())
}
