//! How a virtual machine ends: by itself, killed, and by the handler.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use userfaultfd::handoff::{Dialect, Error, Listener, Message, PeerError};
use userfaultfd::pager::{OnEnd, PageData, Pager, RetryPolicy};

use crate::monitor::{Image, Monitor, PAGES, Style, descriptors, listener, path, regions, shown};
use crate::support::child::{self, Forked};
use crate::support::proc::wait_until;
use crate::support::{page, require, test_name};

fn firecracker() -> Style {
    Style::new(Dialect::Firecracker)
}

#[test]
fn end_of_a_monitor_is_noticed_however_it_comes() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let pager = Pager::new().unwrap();
        let before = descriptors();
        for touched in [false, true] {
            for by_kill in [false, true] {
                let mut monitor = Monitor::start(firecracker(), path.clone());
                let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
                if touched {
                    assert_eq!(monitor.read(2), shown(2));
                }
                if by_kill {
                    monitor.process.kill();
                    assert_eq!(monitor.process.wait(), libc::SIGKILL);
                } else {
                    monitor.exit();
                }
                served.wait();
                assert!(served.detach().is_err());
            }
        }
        wait_until(|| descriptors() == before);
    });
}

/// A peer that sends half a message, and ends.
fn send_half(path: &std::path::Path) -> Forked {
    let bytes = Dialect::Firecracker.encode(&Message::handoff(regions(page()))).unwrap();
    child::fork(|| UnixStream::connect(path).unwrap().write_all(&bytes[..bytes.len() / 2]).unwrap())
}

#[test]
fn monitor_that_ends_in_its_message_is_an_error() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let pager = Pager::new().unwrap();
        let before = descriptors();
        for _ in 0..3 {
            let half = send_half(&path);
            let error = listener.accept().unwrap_err();
            let pid = Some(half.pid() as u32);
            let Error::Peer { peer, error: PeerError::Closed { received } } = error else {
                panic!("{error:?}")
            };
            assert!(peer.pid == pid && received > 10, "{peer}: {received}");
            half.succeed();
        }
        let mut monitor = Monitor::start(firecracker(), path);
        let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(3), shown(3));
        monitor.exit();
        served.wait();
        drop(served);
        wait_until(|| descriptors() == before);
    });
}

#[test]
fn guest_is_killed_when_its_content_cannot_be_had() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let fork = || Monitor::fork(firecracker(), path.clone());
        let (mut failing, mut dropped, mut refused, mut kept) = (fork(), fork(), fork(), fork());
        let retry = RetryPolicy { attempts: 1, delay: Duration::ZERO };
        let pager = Pager::builder().retry(retry).on_problem(|_| {}).build().unwrap();
        // By a source that fails. The first fault waits before the memory is served.
        failing.go();
        failing.ask(0);
        let fails = |_: u64, _: &mut [u8]| -> io::Result<PageData> { Err(io::ErrorKind::NotFound.into()) };
        let handoff = listener.accept().unwrap();
        let served = pager.serve(handoff, |_| fails).unwrap();
        assert_eq!(failing.process.wait(), libc::SIGKILL);
        served.wait();
        assert_eq!((served.statistics().poisoned, pager.statistics().poisoned), (0, 0));
        assert!(served.statistics().source_errors > 0);
        // Since nothing serves it.
        refused.go();
        drop(listener.accept().unwrap());
        assert_eq!(refused.process.wait(), libc::SIGKILL);
        // By the end of the pager. A handle that is dropped before changes nothing.
        dropped.go();
        drop(pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap());
        assert_eq!(dropped.read(1), shown(1));
        kept.go();
        let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
        served.set_on_end(OnEnd::Finish);
        drop(pager);
        assert_eq!(dropped.process.wait(), libc::SIGKILL);
        assert!(!served.is_served());
        assert_eq!(kept.read(7), shown(7));
        kept.exit();
    });
}

#[test]
fn panic_of_the_program_ends_its_guests() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let mut monitor = Monitor::start(firecracker(), path);
        let handoff = listener.accept().unwrap();
        let thread = std::thread::spawn(|| {
            let pager = Pager::new().unwrap();
            let _served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
            panic!("as the test wants");
        });
        assert!(thread.join().is_err());
        assert_eq!(monitor.socket.read(&mut [0]).unwrap(), 0);
        assert_eq!(monitor.process.wait(), libc::SIGKILL);
    });
}

#[test]
fn guest_of_a_listener_that_says_so_is_left_alone() {
    require!();
    child::run_well(test_name!(), || {
        let path = path();
        let mut listener = Listener::bind(&path).unwrap().on_end(OnEnd::Leave);
        let mut monitor = Monitor::start(firecracker(), path);
        drop(listener.accept().unwrap());
        monitor.ask(0);
        let mut text = [0; 512];
        let pid = monitor.process.pid();
        while !crate::support::proc::read(format_args!("/proc/{pid}/syscall"), &mut text)
            .is_some_and(|text| text.starts_with("-1 "))
        {
            std::thread::yield_now();
        }
        monitor.process.kill();
        assert_eq!(monitor.process.wait(), libc::SIGKILL);
    });
}
