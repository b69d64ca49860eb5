//! Any bytes, read from a pipe that is taken for a userfaultfd: what comes out is what the bytes say, and descriptors
//! that forged messages name stay untouched.
//!
//! The first byte of an input is the way in which events are read, the rest is what the pipe holds.

#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use userfaultfd::{Error, Event, EventBuffer, FaultKind, ReadWrite, Uffd};

const MESSAGE: usize = 32;

/// Less than what a pipe takes at once.
const MOST: usize = 4096;

/// Descriptors that forged messages can name.
const INNOCENT: usize = 60;

struct World {
    uffd: Uffd,
    /// The other end.
    writer: File,
    innocent: Vec<OwnedFd>,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two numbers into the array, which is alive for the call.
    let result = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) };
    assert_eq!(result, 0, "pipe2");
    // SAFETY: the kernel opened both for us just now, and nothing else owns them.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let (_, end) = pipe();
        let innocent = (0..INNOCENT).map(|_| end.try_clone().expect("a duplicate")).collect();
        let (reader, writer) = pipe();
        World { uffd: Uffd::from(reader), writer: writer.into(), innocent }
    })
}

impl World {
    fn assert_innocent_are_open(&self) {
        let poll = |fd: &OwnedFd| libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
        let mut polled: Vec<_> = self.innocent.iter().map(poll).collect();
        polled.extend([libc::pollfd { fd: self.uffd.as_raw_fd(), events: 0, revents: 0 }]);
        // SAFETY: the kernel writes into the vector, which has as many entries as it is told.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 0) };
        for entry in polled {
            assert_eq!(entry.revents & libc::POLLNVAL, 0, "descriptor {} was closed", entry.fd);
        }
    }
}

type Message<'a> = &'a [u8];

fn word(message: Message<'_>, index: usize) -> u64 {
    u64::from_ne_bytes(message[8 + 8 * index..][..8].try_into().expect("eight bytes"))
}

/// What a message says, by the kernel's header.
fn assert_is(event: userfaultfd::Result<Event>, message: Message<'_>) {
    match event {
        Ok(Event::Pagefault { kind, rw, addr, thread_id }) => {
            let flags = word(message, 0);
            assert_eq!((message[0], addr as u64), (0x12, word(message, 1)));
            assert_eq!(
                thread_id.as_raw() as u32,
                u32::from_ne_bytes(message[24..28].try_into().expect("four bytes"))
            );
            assert_eq!(rw == ReadWrite::Write, flags & 1 != 0);
            let expected = match flags >> 1 {
                0 => FaultKind::Missing,
                reasons if reasons & 1 != 0 => FaultKind::WriteProtected,
                reasons if reasons & 2 != 0 => FaultKind::Minor,
                reasons if reasons & 4 != 0 => FaultKind::ReadWriteProtected,
                _ => FaultKind::Unknown(flags),
            };
            assert_eq!(kind, expected);
        }
        Ok(Event::Remap { from, to, len }) => {
            let expected = (0x14, word(message, 0), word(message, 1), word(message, 2));
            assert_eq!((message[0], from as u64, to as u64, len as u64), expected);
        }
        Ok(Event::Remove { start, end }) => {
            assert_eq!((message[0], start as u64, end as u64), (0x15, word(message, 0), word(message, 1)));
        }
        Ok(Event::Unmap { start, end }) => {
            assert_eq!((message[0], start as u64, end as u64), (0x16, word(message, 0), word(message, 1)));
        }
        Err(Error::UnrecognizedEvent(event)) => {
            assert_eq!(event, message[0]);
            assert!(!(0x12..=0x16).contains(&event));
        }
        other => panic!("{other:?} for {message:x?}"),
    }
}

/// What reading a number of bytes gives: messages, or an error that is asserted.
fn assert_read<T>(result: userfaultfd::Result<T>, read: &[u8]) -> Option<T> {
    let rest = read.len() % MESSAGE;
    let forged = read.chunks_exact(MESSAGE).any(|message| message[0] == 0x13);
    match result {
        Err(Error::IncompleteMsg { read, expected: MESSAGE }) => assert_eq!((read, rest > 0), (rest, true)),
        Err(Error::NotUserfaultfd) => assert!(rest == 0 && forged),
        result => {
            assert!(rest == 0 && !forged, "{:?} was accepted", read);
            return Some(result.expect("whole messages without a fork"));
        }
    }
    None
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, bytes)) = data.split_first() else { return };
    let mut bytes = &bytes[..bytes.len().min(MOST)];
    let world = world();
    let mut writer = &world.writer;
    writer.write_all(bytes).expect("the pipe has room");

    let room = 1 + usize::from(how & 7);
    let mut buffer = EventBuffer::new(room);
    let mut pending: VecDeque<Message<'_>> = VecDeque::new();
    // The bytes that one read takes.
    let take = |bytes: &mut &'_ [u8], messages: usize| {
        let (taken, left) = bytes.split_at(bytes.len().min(messages * MESSAGE));
        *bytes = left;
        taken.len()
    };
    while !bytes.is_empty() {
        let all = bytes;
        if how & 0x18 == 0x18 {
            let read = &all[..take(&mut bytes, 1)];
            if let Some(event) = one(world.uffd.read_event(), read) {
                assert_is(event, read);
            }
            continue;
        }
        let read = &all[..take(&mut bytes, room - pending.len())];
        let count = assert_read(world.uffd.read_batch(&mut buffer), read);
        if let Some(count) = count {
            assert_eq!(count, read.len() / MESSAGE);
            pending.extend(read.chunks_exact(MESSAGE));
        }
        assert!(buffer.as_bytes().chunks_exact(MESSAGE).eq(pending.iter().copied()));
        assert_eq!(buffer.len(), pending.len());
        if how & 0x10 != 0 {
            pending.make_contiguous().sort_by_key(|message| message[0] == 0x12);
            buffer.changes_first();
        }
        if how & 0x08 != 0 {
            // Some stay in the buffer, and more are read behind them.
            for _ in 0..pending.len().div_ceil(2) {
                let event = buffer.pop().expect("as many as were read");
                assert_is(event, pending.pop_front().expect("as many as were read"));
            }
        } else {
            let mut events = buffer.drain();
            assert_eq!(events.len(), pending.len());
            for message in pending.drain(..).take(1 + usize::from(how >> 5)) {
                assert_is(events.next().expect("as many as were read"), message);
            }
            // What was not taken is dropped with the iterator.
        }
    }
    assert_eq!(buffer.len(), pending.len());
    for event in buffer.drain() {
        assert_is(event, pending.pop_front().expect("as many as were read"));
    }
    assert!(matches!(world.uffd.read_event(), Ok(None)));
    if data.contains(&0x13) {
        world.assert_innocent_are_open();
    }
});

/// The event of one message, or an error that is asserted. An unknown kind is a fine answer here.
fn one(result: userfaultfd::Result<Option<Event>>, read: &[u8]) -> Option<userfaultfd::Result<Event>> {
    match result {
        Err(error @ Error::UnrecognizedEvent(_)) => Some(Err(error)),
        result => assert_read(result, read).map(|event| Ok(event.expect("a message is there"))),
    }
}
