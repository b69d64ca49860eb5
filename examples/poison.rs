//! A page whose content can't be had is poisoned: a thread that touches it gets SIGBUS, not zeros and not an endless wait.
//!
//! The memory is that of a child process, since SIGBUS is the end of it. Linux 6.6; no rights.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::{env, io, thread};

use memmap2::MmapMut;
use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

fn main() -> ExitCode {
    let in_child = env::args().nth(1).is_some_and(|argument| argument == "child");
    userfaultfd_examples::run(if in_child { read_pages } else { watch_child })
}

/// Starts this program again as the child, and tells how it ends.
fn watch_child() -> Result<()> {
    UffdBuilder::new().require_features(FeatureFlags::POISON).create()?; // for the error, if there is one
    let status = Command::new(env::current_exe()?).arg("child").status()?;
    match status.signal() {
        Some(libc::SIGBUS) => println!("page 1: SIGBUS ended the child"),
        _ => return Err(format!("the child wasn't ended by SIGBUS: {status}").into()),
    }
    Ok(())
}

/// Reads from two pages, of which one can't be had.
fn read_pages() -> Result<()> {
    let mut memory = MmapMut::map_anon(2 * page_size())?;
    let uffd = UffdBuilder::new().require_features(FeatureFlags::POISON).create()?;
    let start = memory.as_mut_ptr();
    uffd.register(start.cast(), memory.len())?;
    let start = start.addr();
    thread::spawn(move || {
        for _ in 0..2 {
            fill_or_poison(&uffd, start).expect("a fault is resolved");
        }
    });

    // A core dump would be of no use to anybody.
    // SAFETY: this operation takes a number and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
    for index in 0..2 {
        let byte = memory[index * page_size()];
        println!("page {index}: the child reads {}", char::from(byte));
    }
    Ok(())
}

fn fill_or_poison(uffd: &Uffd, start: usize) -> userfaultfd::Result<()> {
    let Some(Event::Pagefault { addr, .. }) = uffd.read_event()? else {
        unreachable!("only faults are asked for")
    };
    match read_from_source((addr.addr() - start) / page_size()) {
        Ok(content) => {
            // SAFETY: `content` is a page long, and the thread that waits takes any bytes.
            unsafe { uffd.copy(content.as_ptr().cast(), addr, page_size(), true)? };
        }
        Err(error) => {
            eprintln!("{error}");
            // SAFETY: this process may die of SIGBUS; that is the point.
            unsafe { uffd.poison(addr, page_size(), true)? };
        }
    }
    Ok(())
}

/// A disk, a network, another machine: something that fails.
fn read_from_source(index: usize) -> io::Result<Vec<u8>> {
    match index {
        0 => Ok(vec![b'A'; page_size()]),
        _ => Err(io::Error::other(format!("the source fails at page {index}"))),
    }
}
