//! One thread that waits for arrivals, messages and ends.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use userfaultfd::handoff::{Dialect, Error, Handoff, Message, PeerError, Server, ServerEvent};
use userfaultfd::pager::Pager;

use crate::monitor::{HALF, Image, Monitor, PAGES, Style, descriptors, listener, shown};
use crate::support::{child, require, test_name};

/// The memory that the next event must hand over.
fn handoff(server: &mut Server) -> Handoff {
    match server.wait().unwrap() {
        ServerEvent::Handoff(handoff) => handoff,
        event => panic!("{event:?}"),
    }
}

/// The process whose end the next event must be.
fn ended(server: &mut Server) -> Option<u32> {
    match server.wait().unwrap() {
        ServerEvent::Ended(served) => {
            assert!(!served.is_served());
            served.process().credentials.pid
        }
        event => panic!("{event:?}"),
    }
}

#[test]
fn ends_of_processes_are_events() {
    require!();
    child::run_well(test_name!(), || {
        let (listener, path) = listener();
        let before = descriptors();
        let fork = || Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let mut monitors = [fork(), fork(), fork(), fork()];
        let pager = Pager::new().unwrap();
        let mut server = Server::new(listener).unwrap();
        for monitor in &mut monitors {
            monitor.go();
            let served = pager.serve(handoff(&mut server), |_| Image(PAGES)).unwrap();
            if server.processes().len() == 3 {
                // It has ended before the server knows it.
                monitor.process.kill();
                served.wait();
            }
            let id = server.add(served);
            let pid = Some(monitor.process.pid() as u32);
            assert_eq!(server.get_mut(id).unwrap().process().credentials.pid, pid);
        }
        let [mut finished, mut exits, killed, gone] = monitors;
        let pid = |monitor: &Monitor| Some(monitor.process.pid() as u32);
        assert_eq!(ended(&mut server), pid(&gone));
        assert!(server.wait_timeout(Duration::ZERO).unwrap().is_none());
        assert_eq!([exits.read(0), finished.read(0)], [shown(0); 2]);
        let exited = pid(&exits);
        exits.exit();
        assert_eq!(ended(&mut server), exited);
        killed.process.kill();
        assert_eq!(ended(&mut server), pid(&killed));
        let served = server.processes().next().unwrap();
        served.finish(|_| {}).unwrap();
        assert_eq!(ended(&mut server), pid(&finished));
        assert_eq!((server.processes().len(), finished.read(PAGES - 1)), (0, shown(PAGES - 1)));
        finished.exit();
        drop((server, pager, killed, gone));
        // The listener's is among those before.
        assert_eq!(descriptors(), before - 1);
    });
}

#[test]
fn messages_of_a_process_are_events() {
    require!();
    child::run_well(test_name!(), || {
        let (listener, path) = listener();
        let fork = |dialect| Monitor::fork(Style::new(dialect), path.clone());
        let (mut one, mut other) = (fork(Dialect::CloudHypervisor), fork(Dialect::Firecracker));
        let pager = Pager::new().unwrap();
        let mut server = Server::new(listener).unwrap();
        for monitor in [&mut one, &mut other] {
            monitor.go();
            let handoff = handoff(&mut server);
            server.add(pager.serve(handoff, |_| Image(PAGES)).unwrap());
        }
        one.add_region();
        let ServerEvent::Message { process, received } = server.wait().unwrap() else { panic!() };
        let Message::AddRegions(mut added) = received.message else { panic!("{received:?}") };
        server.get_mut(process).unwrap().add_region(added.remove(0), Image(PAGES)).unwrap();
        assert_eq!(one.answer(), 1, "the confirmation");
        assert_eq!([one.read(HALF), one.read(0)], [shown(HALF), shown(0)]);
        // What is no message is told, once, and changes nothing for the process.
        other.babble();
        let event = server.wait().unwrap();
        let ServerEvent::Refused(Error::Peer { peer, error: PeerError::Message { .. } }) = event else {
            panic!("{event:?}")
        };
        assert_eq!(peer.pid, Some(other.process.pid() as u32));
        other.babble();
        assert!(server.wait_timeout(Duration::ZERO).unwrap().is_none());
        assert_eq!(other.read(1), shown(1));
        let pid = Some(other.process.pid() as u32);
        other.exit();
        assert_eq!(ended(&mut server), pid);
        one.exit();
    });
}

#[test]
fn endless_sender_delays_no_other_process() {
    require!();
    child::run_well(test_name!(), || {
        let (listener, path) = listener();
        let fork = |dialect| Monitor::fork(Style::new(dialect), path.clone());
        let (mut floods, mut other) = (fork(Dialect::Nydus), fork(Dialect::Firecracker));
        let (pager, mut server) = (Pager::new().unwrap(), Server::new(listener).unwrap());
        floods.go();
        let handed_over = handoff(&mut server);
        server.add(pager.serve(handed_over, |_| Image(PAGES)).unwrap());
        floods.flood();
        let is_message = |event: &ServerEvent| matches!(event, ServerEvent::Message { .. });
        assert!(is_message(&server.wait().unwrap()));
        other.go();
        let arrived = loop {
            match server.wait().unwrap() {
                ServerEvent::Handoff(handoff) => break handoff,
                event => assert!(is_message(&event), "{event:?}"),
            }
        };
        server.add(pager.serve(arrived, |_| Image(PAGES)).unwrap());
        assert_eq!(other.read(1), shown(1));
        other.exit();
        floods.process.kill();
        let is_end = |event: &ServerEvent| matches!(event, ServerEvent::Ended(_));
        let mut ends = 0;
        while ends < 2 {
            ends += usize::from(is_end(&server.wait().unwrap()));
        }
    });
}

#[test]
fn server_stops_while_peers_keep_connecting() {
    require!();
    let (listener, path) = listener();
    let (stop, mut asks) = UnixStream::pair().unwrap();
    let mut server = Server::new(listener).unwrap().stop_on(stop);
    let refused = || drop(UnixStream::connect(&path).unwrap());
    refused();
    assert!(matches!(server.wait().unwrap(), ServerEvent::Refused(_)));
    asks.write_all(&[0]).unwrap();
    for _ in 0..3 {
        refused();
        refused();
        assert!(matches!(server.wait().unwrap(), ServerEvent::Stopped));
    }
    assert_eq!(server.into_processes().len(), 0);
    assert!(!path.exists());
}
