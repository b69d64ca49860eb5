//! The program of the manual page: poll, read an event, copy a page.

use std::os::unix::io::AsRawFd;
use std::thread;

use libc::c_void;
use userfaultfd::{Event, FaultKind, ReadWrite, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::require;

/// Fills `count` pages, with an A in the first, a B in the second.
fn handle(uffd: Uffd, count: usize) -> Vec<(FaultKind, ReadWrite, usize)> {
    let page = Mapping::anonymous(1);
    let mut seen = Vec::new();
    while seen.len() < count {
        let mut pollfd = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the structure lives until the call returns.
        let ready = unsafe { libc::poll(&raw mut pollfd, 1, -1) };
        assert!(ready == 1 && pollfd.revents & libc::POLLERR == 0, "poll");

        let event = match uffd.read_event().expect("read uffd_msg") {
            Some(event) => event,
            None => continue,
        };
        if let Event::Pagefault { kind, rw, addr, .. } = event {
            page.set(0, b'A' + seen.len() as u8 % 20);
            let dst = (addr as usize & !(page_size() - 1)) as *mut c_void;
            // SAFETY: the page lives on, and the content is what the other thread wants.
            let copied = unsafe { uffd.copy(page.ptr, dst, page_size(), true).expect("uffd copy") };
            assert_eq!(copied, page_size());
            seen.push((kind, rw, addr as usize));
        } else {
            panic!("unexpected event {event:?}");
        }
    }
    assert!(uffd.read_event().unwrap().is_none(), "nothing is left");
    seen
}

#[test]
fn faults_are_polled_for_and_copied_to() {
    require!();
    let memory = Mapping::anonymous(3);
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(true)
        .create()
        .expect("uffd creation");
    uffd.register(memory.ptr, memory.len).expect("uffd.register()");
    let handler = thread::spawn(move || handle(uffd, 3));
    assert_eq!((memory.get(0), memory.get(1)), (b'A', b'B'));
    memory.set(2, b'Z');
    assert_eq!(memory.get(2), b'Z');
    let address = |page: usize| memory.page(page) as usize;
    assert_eq!(
        handler.join().unwrap(),
        [
            (FaultKind::Missing, ReadWrite::Read, address(0)),
            (FaultKind::Missing, ReadWrite::Read, address(1)),
            (FaultKind::Missing, ReadWrite::Write, address(2)),
        ]
    );
}
