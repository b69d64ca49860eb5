//! Peers that use up what the handler has, and values at the limits of their types.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use userfaultfd::FeatureFlags;
use userfaultfd::handoff::{Dialect, Error, Handoff, Listener, PeerError};
use userfaultfd::pager::{OnEnd, Pager};

use crate::forks::half;
use crate::monitor::{Image, Monitor, PAGES, Style, descriptors, listener, path, shown};
use crate::peers::{next_error, registered, send, wait_to_be_killed};
use crate::support::child;
use crate::support::memory::Memory;
use crate::support::{require, test_name, uffd};

fn firecracker() -> Style {
    Style::new(Dialect::Firecracker)
}

#[test]
fn peers_that_cannot_be_killed_delay_no_other_one() {
    require!(root);
    child::run_well(test_name!(), || {
        let path = path();
        // A byte in the first has one of them begin, and in the second end.
        let pairs = [(); 2].map(|()| UnixStream::pair().unwrap());
        let (mut here, there): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        // Of another user than the handler. Each sends a userfaultfd with what no monitor sends.
        let bad = [(); 2].map(|()| {
            child::fork(|| {
                // It ends with the handler, which can't kill it.
                here.clear();
                (&there[0]).read_exact(&mut [0]).unwrap();
                let mut stream = UnixStream::connect(&path).unwrap();
                let memory = Memory::anonymous(1);
                let uffd = registered(&memory);
                send(&stream, b"GET / HTTP/1.1", &[uffd.as_fd()]);
                let _end = stream.read(&mut [0]);
                (&there[1]).read_exact(&mut [0]).unwrap();
            })
        });
        child::drop_rights();
        // SAFETY: touches no memory. Without it the process's own /proc is root's.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) }, 0);
        let mut listener = Listener::bind(&path).unwrap();
        let before = descriptors();
        here[0].write_all(&[0; 2]).unwrap();
        let start = Instant::now();
        for _ in 0..2 {
            assert!(matches!(next_error(&mut listener), PeerError::Unrecognised { .. }));
        }
        // It would wait for three seconds for the end of each.
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        let mut monitor = Monitor::start(firecracker(), path.clone());
        let pager = Pager::new().unwrap();
        let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(1), shown(1));
        monitor.exit();
        served.wait();
        drop((served, pager));
        // Their userfaultfds are open as long as they live, and no longer.
        assert_eq!(descriptors(), before + 4);
        here[1].write_all(&[0; 2]).unwrap();
        bad.into_iter().for_each(child::Forked::succeed);
        assert!(listener.accept_timeout(Duration::ZERO).unwrap().is_none());
        assert_eq!(descriptors(), before);
    });
}

#[test]
fn refused_process_is_killed_without_a_descriptor_to_spare() {
    require!();
    child::run_well(test_name!(), || {
        let path = path();
        let mut listener = Listener::bind(&path).unwrap().deadline(Duration::from_secs(3));
        let (process, told) = half(&mut listener, &path);
        let full = child::use_up_descriptors();
        assert!(matches!(next_error(&mut listener), PeerError::Deadline { .. }));
        drop(full);
        // Otherwise it ends well.
        let _may_be_closed = (&told).write_all(&[0]);
        assert_eq!(process.wait(), libc::SIGKILL);
    });
}

#[test]
fn peers_that_hold_all_descriptors_make_room() {
    require!();
    const SENT: usize = 45;
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let (here, there) = UnixStream::pair().unwrap();
        let mut monitor = Monitor::fork(firecracker(), path.clone());
        let greedy = [(); 4].map(|()| {
            child::fork(|| {
                let stream = UnixStream::connect(&path).unwrap();
                let (uffd, file) = (uffd(FeatureFlags::empty()), File::open("/dev/null").unwrap());
                let mut fds: [BorrowedFd<'_>; SENT] = [file.as_fd(); SENT];
                fds[0] = uffd.as_fd();
                send(&stream, b"[", &fds);
                (&there).write_all(&[0]).unwrap();
                wait_to_be_killed();
            })
        });
        (&here).read_exact(&mut [0; 4]).unwrap();
        let pager = Pager::new().unwrap();
        // Each has a socket and a pidfd. There is no room for one more connection.
        let most = (descriptors() + greedy.len() * (2 + SENT)) as libc::rlim_t;
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the structure is borrowed for the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        let mut refused = 0;
        let mut is_of_peer = |error: Error| {
            assert!(error.is_of_peer(), "{error}");
            refused += 1;
        };
        for _ in 0..20 {
            listener.accept_timeout(Duration::ZERO).err().map(&mut is_of_peer);
        }
        monitor.go();
        let handoff = loop {
            match listener.accept() {
                Ok(handoff) => break handoff,
                Err(error) => is_of_peer(error),
            }
        };
        let served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(1), shown(1));
        monitor.exit();
        served.wait();
        assert!(refused >= 3, "{refused}");
    });
}

#[test]
fn lack_of_descriptors_is_reported_once_and_passes() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let waiting = UnixStream::connect(path).unwrap();
        send(&waiting, b"nonsense", &[]);
        let full = child::use_up_descriptors();
        let PeerError::Socket(error) = next_error(&mut listener) else { panic!("another error") };
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
        for _ in 0..3 {
            assert!(listener.accept_timeout(Duration::from_millis(150)).unwrap().is_none());
        }
        drop(full);
        assert!(matches!(next_error(&mut listener), PeerError::Unrecognised { .. }));
    });
}

#[test]
fn longest_times_are_no_limit() {
    require!();
    child::run_well(test_name!(), || {
        let path = path();
        let mut listener = Listener::bind(&path).unwrap().deadline(Duration::MAX);
        let mut monitor = Monitor::start(firecracker(), path);
        let handoff = listener.accept_timeout(Duration::MAX).unwrap().unwrap();
        let pager = Pager::new().unwrap();
        let mut served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(1), shown(1));
        monitor.exit();
        assert!(served.receive(Duration::MAX).unwrap().is_none());
        served.wait();
    });
}

#[test]
fn handoff_with_impossible_regions_keeps_its_userfaultfd() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let monitor = Monitor::start(firecracker(), path);
        let handoff = listener.accept().unwrap();
        let mut description = handoff.description();
        let parts = handoff.into_parts();
        description.regions[1].page_size = 0;
        let mut handoff = Handoff::from_description(description, parts.userfaultfd, vec![], None);
        handoff.set_on_end(OnEnd::Poison);
        let before = descriptors();
        drop(handoff);
        assert_eq!(descriptors(), before);
        monitor.exit();
    });
}
