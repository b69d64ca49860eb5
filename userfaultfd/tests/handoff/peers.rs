//! Peers that do it wrong: an error for each, all others are served on, and nothing is left behind.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use userfaultfd::handoff::{Dialect, Error, Listener, MemoryRegion, Message, PeerError};
use userfaultfd::pager::Pager;
use userfaultfd::{FeatureFlags, Uffd};

use crate::monitor::{Image, Monitor, PAGES, Style, descriptors, listener, path, regions, shown};
use crate::support::child::{self, Forked};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{page, require, test_name, uffd};

/// sendmsg(2), so that what is wrong can be sent.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut data = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0_u64; 64];
    // SAFETY: all zeros is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes a length.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of_val(fds) as libc::c_uint) } as _;
        // SAFETY: the message was just set up.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: the control buffer has room for a header, and nothing else refers to it.
        let header = unsafe { &mut *header };
        header.cmsg_level = libc::SOL_SOCKET;
        header.cmsg_type = libc::SCM_RIGHTS;
        // SAFETY: computes a length.
        header.cmsg_len = unsafe { libc::CMSG_LEN(size_of_val(fds) as libc::c_uint) } as _;
        // SAFETY: the address behind the header, inside the control buffer.
        #[expect(clippy::cast_ptr_alignment, reason = "numbers are written unaligned")]
        let first = unsafe { libc::CMSG_DATA(header) }.cast::<i32>();
        for (at, fd) in fds.iter().enumerate() {
            let place = first.wrapping_add(at);
            // SAFETY: the control buffer has room for more than a hundred numbers.
            unsafe { place.write_unaligned(fd.as_raw_fd()) };
        }
    }
    // SAFETY: everything that the message points to lives until the call returns.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
}

fn json(regions: impl Into<Vec<MemoryRegion>>) -> Vec<u8> {
    Dialect::Firecracker.encode(&Message::handoff(regions)).unwrap()
}

/// A userfaultfd that is registered for a memory.
pub(crate) fn registered(memory: &Memory) -> Uffd {
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    uffd
}

/// A process that connects, does something, and waits until the handler closes the connection.
fn peer(path: &Path, act: impl FnOnce(&UnixStream)) -> Forked {
    child::fork(|| {
        let mut stream = UnixStream::connect(path).unwrap();
        act(&stream);
        // The handler may close it with bytes unread.
        let _end = stream.read(&mut [0]);
    })
}

/// Whether the error is the expected one.
type Expected = fn(&PeerError) -> bool;

/// Something that a peer does wrong.
struct Wrong {
    name: &'static str,
    act: Box<dyn Fn(&UnixStream)>,
    expected: Expected,
    /// It has handed a userfaultfd over, and so is killed.
    is_killed: bool,
}

fn wrongs() -> Vec<Wrong> {
    let wrong = |name, act: Box<dyn Fn(&UnixStream)>, expected: Expected, is_killed| Wrong {
        name,
        act,
        expected,
        is_killed,
    };
    // All that take a userfaultfd, with the regions of a message.
    let with_uffd = |name, regions: fn(usize) -> Vec<MemoryRegion>, expected: Expected| {
        let act = move |stream: &UnixStream| {
            let memory = Memory::anonymous(PAGES);
            let uffd = registered(&memory);
            send(stream, &json(regions(memory.start().expose_provenance())), &[uffd.as_fd()]);
            std::mem::forget(memory);
        };
        wrong(name, Box::new(act), expected, true)
    };
    let is_region: Expected = |error| matches!(error, PeerError::Region { .. });
    vec![
        wrong(
            "no descriptor",
            Box::new(|stream| send(stream, &json(regions(page())), &[])),
            |error| matches!(error, PeerError::NoUserfaultfd),
            false,
        ),
        wrong(
            "no userfaultfd",
            Box::new(|stream| {
                let file = File::open("/dev/null").unwrap();
                send(stream, &json(regions(page())), &[file.as_fd()]);
            }),
            |error| matches!(error, PeerError::NotUserfaultfd),
            false,
        ),
        wrong(
            "ten descriptors",
            Box::new(|stream| {
                let uffd = uffd(FeatureFlags::empty());
                send(stream, &json(regions(page())), &[uffd.as_fd(); 10]);
            }),
            |error| matches!(error, PeerError::TooManyDescriptors { found: 10, most: 1 }),
            true,
        ),
        wrong(
            "a file that is no memory",
            Box::new(|stream| {
                let (uffd, file) = (uffd(FeatureFlags::empty()), File::open("/dev/null").unwrap());
                send(stream, &[0x0a, 0, 0, 0, 0, 0, 0, 0], &[uffd.as_fd(), file.as_fd()]);
                let rest = external_backend();
                send(stream, &rest[8..], &[]);
            }),
            |error| matches!(error, PeerError::NotMemory),
            true,
        ),
        wrong(
            "another protocol",
            Box::new(|stream| send(stream, b"GET / HTTP/1.1\r\n\r\n", &[])),
            |error| matches!(error, PeerError::Unrecognised { shown } if shown.starts_with("GET /")),
            false,
        ),
        wrong(
            "an unknown message",
            Box::new(|stream| send(stream, b"[{\"hello\":\"world\"}]", &[])),
            |error| matches!(error, PeerError::Message { shown, .. } if shown.contains("hello")),
            false,
        ),
        wrong(
            "a message that comes later",
            Box::new(|stream| send(stream, br#"{"type":2}"#, &[])),
            |error| matches!(error, PeerError::Unexpected { message: Message::Stat }),
            false,
        ),
        wrong(
            "ten MiB of JSON",
            Box::new(|mut stream| {
                let many = format!("[{}", "{\"size\":1},".repeat(10 << 20 >> 3));
                // The handler closes before all is sent.
                let _ended = stream.write_all(many.as_bytes());
            }),
            |error| matches!(error, PeerError::TooLong { limit: 1_048_576 }),
            false,
        ),
        wrong(
            "the end at once",
            Box::new(|stream| stream.shutdown(std::net::Shutdown::Write).unwrap()),
            |error| matches!(error, PeerError::Closed { received: 0 }),
            false,
        ),
        wrong(
            "an endless message",
            // With a userfaultfd at its first byte.
            Box::new(|stream| {
                let uffd = uffd(FeatureFlags::empty());
                send(stream, b"[", &[uffd.as_fd()]);
            }),
            |error| matches!(error, PeerError::Deadline { received: 1, .. }),
            true,
        ),
        with_uffd("no regions", |_| vec![], |error| matches!(error, PeerError::NoRegions)),
        with_uffd(
            "overlapping regions",
            |start| vec![regions(start).remove(0), MemoryRegion::new(start + page(), page(), 0)],
            is_region,
        ),
        with_uffd(
            "an absurd region",
            |_| vec![MemoryRegion::new(usize::MAX - page() + 1, page(), 0)],
            is_region,
        ),
        with_uffd("an empty region", |start| vec![MemoryRegion::new(start, 0, 0)], is_region),
        with_uffd(
            "a bad page size",
            |start| vec![MemoryRegion::new(start, page(), 0).page_size(12345)],
            is_region,
        ),
        with_uffd("an absurd offset", |start| vec![MemoryRegion::new(start, page(), u64::MAX)], is_region),
    ]
}

/// A message with a backing file for its region.
fn external_backend() -> Vec<u8> {
    let mut bytes =
        Dialect::CloudHypervisorBackend.encode(&Message::handoff([MemoryRegion::new(page(), page(), 0)]));
    let bytes = bytes.as_mut().unwrap();
    bytes[18] = 8;
    bytes.clone()
}

/// The next error of a peer.
pub(crate) fn next_error(listener: &mut Listener) -> PeerError {
    match listener.accept() {
        Err(Error::Peer { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_bad_peer_is_an_error_and_nothing_is_left() {
    require!();
    child::run_well(test_name!(), || {
        let path = path();
        let mut listener = Listener::bind(&path).unwrap().deadline(Duration::from_secs(2));
        let pager = Pager::new().unwrap();
        let mut good = Monitor::start(Style::new(Dialect::Firecracker), path.clone());
        let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
        let before = descriptors();
        for (number, wrong) in wrongs().iter().enumerate() {
            let peer = peer(&path, |stream| (wrong.act)(stream));
            let error = next_error(&mut listener);
            assert!((wrong.expected)(&error), "{}: {error:?}", wrong.name);
            assert!(!error.to_string().is_empty());
            let status = if wrong.is_killed { libc::SIGKILL } else { 0 };
            assert_eq!(peer.wait(), status, "{}", wrong.name);
            // Its userfaultfd is closed once it has ended.
            assert!(listener.accept_timeout(Duration::ZERO).unwrap().is_none());
            assert_eq!((descriptors(), listener.pending()), (before, 0), "after {}", wrong.name);
            let page = number % PAGES;
            assert_eq!(good.read(page), shown(page));
        }
        good.exit();
        served.wait();
    });
}

#[test]
fn silent_peers_keep_no_monitor_waiting() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let before = descriptors();
        let mut monitor = Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let silent: Vec<_> = (0..8).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(listener.accept_timeout(Duration::ZERO).unwrap().is_none());
        monitor.go();
        let handoff = listener.accept().unwrap();
        assert_eq!(listener.pending(), silent.len());
        let pager = Pager::new().unwrap();
        let served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        assert_eq!(monitor.read(0), shown(0));
        drop(silent);
        for _ in 0..8 {
            assert!(matches!(next_error(&mut listener), PeerError::Closed { received: 0 }));
        }
        monitor.exit();
        served.wait();
        drop((served, pager));
        assert_eq!(descriptors(), before);
    });
}

#[test]
fn thousand_connections_leave_room_for_a_monitor() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let before = descriptors();
        let mut monitor = Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let flood = child::fork(|| {
            for _ in 0..1000 {
                // One that the handler has let go is closed here, too.
                std::mem::forget(UnixStream::connect(&path).unwrap());
            }
            wait_to_be_killed();
        });
        let (mut crowded, mut served) = (0, None);
        monitor.go();
        let pager = Pager::new().unwrap();
        while served.is_none() || crowded < 700 {
            match listener.accept() {
                Ok(handoff) => served = Some(pager.serve(handoff, |_| Image(PAGES)).unwrap()),
                Err(Error::Peer { error: PeerError::Crowded { connections }, .. }) => {
                    assert!(connections >= 256, "{connections}");
                    crowded += 1;
                }
                Err(error) => panic!("{error}"),
            }
            assert!(listener.pending() <= 257, "{}", listener.pending());
        }
        assert_eq!(monitor.read(2), shown(2));
        monitor.exit();
        flood.kill();
        flood.wait();
        served.unwrap().wait();
        drop((pager, listener));
        wait_until(|| descriptors() == before - 1);
    });
}

pub(crate) fn wait_to_be_killed() {
    loop {
        // SAFETY: touches no memory.
        unsafe { libc::pause() };
    }
}

#[test]
fn peer_that_the_program_refuses_is_not_read() {
    require!();
    child::run_well(test_name!(), || {
        let path = path();
        // SAFETY: touches no memory.
        let uid = unsafe { libc::getuid() };
        let mut listener = Listener::bind(&path).unwrap().peer(move |peer| peer.uid != uid);
        let peer = peer(&path, |_| {});
        assert!(matches!(next_error(&mut listener), PeerError::NotAdmitted));
        peer.succeed();
    });
}

#[test]
fn two_hand_overs_may_come_at_once_or_in_parts() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let process = child::fork(|| {
            let stream = UnixStream::connect(&path).unwrap();
            let memory = [Memory::anonymous(PAGES), Memory::anonymous(PAGES)];
            let uffds = memory.each_ref().map(registered);
            let messages = memory.each_ref().map(|memory| json(regions(memory.start().expose_provenance())));
            // The first in parts, with its descriptor at the last; then the second.
            let (first, rest) = messages[0].split_at(7);
            send(&stream, first, &[]);
            send(&stream, rest, &[uffds[0].as_fd()]);
            send(&stream, &messages[1], &[uffds[1].as_fd()]);
            assert_eq!([memory[0].read(1), memory[1].read(6)], [shown(1), shown(6)]);
        });
        let pager = Pager::new().unwrap();
        let mut handoff = listener.accept().unwrap();
        let second = handoff.stream.as_mut().unwrap().receive(Duration::from_secs(20)).unwrap().unwrap();
        let Message::Handoff { regions, .. } = second.message else { panic!("{second:?}") };
        let served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        let other = regions.iter().map(|region| {
            userfaultfd::pager::Region::new(region.address, region.len, Image(PAGES)).offset(region.offset)
        });
        pager.add(second.userfaultfd.unwrap(), other).unwrap();
        process.succeed();
        served.wait();
        pager.join();
    });
}

#[test]
fn path_in_use_is_an_error_and_the_file_is_removed() {
    require!();
    let path: PathBuf = path();
    let listener = Listener::bind(&path).unwrap();
    assert!(
        matches!(Listener::bind(&path), Err(Error::Listen(error)) if error.kind() == std::io::ErrorKind::AddrInUse)
    );
    assert!(path.exists());
    drop(listener);
    assert!(!path.exists());
    // Not that of another handler, which has taken the place.
    let listener = Listener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let other = Listener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
    drop(other);
}
