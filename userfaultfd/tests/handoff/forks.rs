//! What a fork's child does with a listener, and with what was handed over.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use userfaultfd::handoff::{Dialect, Error, Listener, MemoryRegion, Message};
use userfaultfd::pager::{OnEnd, Pager};
use userfaultfd::{FeatureFlags, Uffd};

use crate::monitor::{Image, Monitor, PAGES, Style, listener, path, shown};
use crate::peers::send;
use crate::support::child::{self, Forked};
use crate::support::memory::Memory;
use crate::support::{page, require, test_name, uffd};

#[test]
fn handoff_that_a_child_drops_stays_its_parents() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        for on_end in [OnEnd::Kill, OnEnd::Poison] {
            let mut monitor = Monitor::start(Style::new(Dialect::Firecracker), path.clone());
            let mut handoff = listener.accept().unwrap();
            handoff.set_on_end(on_end);
            let mut handoff = Some(handoff);
            child::fork(|| drop(handoff.take())).succeed();
            let pager = Pager::new().unwrap();
            let served = pager.serve(handoff.unwrap(), |_| Image(PAGES)).unwrap();
            assert_eq!(monitor.read(3), shown(3), "{on_end:?}");
            monitor.exit();
            served.wait();
        }
    });
}

#[test]
fn refusal_in_a_child_leaves_the_process_alone() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let mut monitor = Monitor::start(Style::new(Dialect::Firecracker), path);
        let mut handoff = Some(listener.accept().unwrap());
        child::fork(|| {
            let pager = Pager::new().unwrap();
            // The source is too short.
            drop(pager.serve(handoff.take().unwrap(), |_| Image(1)).unwrap_err());
        })
        .succeed();
        let pager = Pager::new().unwrap();
        let served = pager.serve(handoff.unwrap(), |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(3), shown(3));
        monitor.exit();
        served.wait();
    });
}

/// A peer that sends a userfaultfd with the first byte of its message, and ends when it is told.
pub(crate) fn half(listener: &mut Listener, path: &std::path::Path) -> (Forked, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    let process = child::fork(|| {
        let stream = UnixStream::connect(path).unwrap();
        let memory = Memory::anonymous(1);
        let uffd: Uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        let regions = [MemoryRegion::new(page(), page(), 0)];
        let bytes = Dialect::Firecracker.encode(&Message::handoff(regions)).unwrap();
        send(&stream, &bytes[..1], &[uffd.as_fd()]);
        (&there).write_all(&[1]).unwrap();
        let _told = (&there).read(&mut [0]);
    });
    // It has sent that, and the listener takes it.
    (&here).read_exact(&mut [0]).unwrap();
    while listener.pending() == 0 {
        assert!(listener.accept_timeout(Duration::ZERO).unwrap().is_none());
    }
    assert!(listener.accept_timeout(Duration::ZERO).unwrap().is_none());
    (process, here)
}

#[test]
fn listener_that_a_child_drops_stays_its_parents() {
    require!();
    child::run_well(test_name!(), || {
        let path = path();
        let listener = Listener::bind(&path).unwrap().deadline(Duration::from_secs(50));
        let mut listener = Some(listener);
        let (process, told) = half(listener.as_mut().unwrap(), &path);
        child::fork(|| {
            let error = listener.as_mut().unwrap().accept().unwrap_err();
            assert!(matches!(&error, Error::Listen(_)) && error.to_string().contains("fork"), "{error}");
            drop(listener.take());
        })
        .succeed();
        // Neither killed nor disconnected, and others still find the socket.
        (&told).write_all(&[0]).unwrap();
        process.succeed();
        let mut listener = listener.unwrap();
        assert!(listener.accept().unwrap_err().is_of_peer());
        let mut monitor = Monitor::start(Style::new(Dialect::Firecracker), path);
        let pager = Pager::new().unwrap();
        let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(3), shown(3));
        monitor.exit();
        served.wait();
    });
}
