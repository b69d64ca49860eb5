//! Descriptors of something else, taken for userfaultfds: anything may be read from them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use userfaultfd::{Errno, Error, EventBuffer, OpenWith, Uffd, UffdBuilder};

use crate::support::memory::Memory;
use crate::support::mounts::{self, Device};
use crate::support::{child, errno, foreign, fuse, has, proc, raw, require, test_name};

/// A pipe that is taken for a userfaultfd, and what is read from it.
fn pipe(bytes: &[u8]) -> (Uffd, File) {
    let (reader, mut writer) = raw::pipe();
    writer.write_all(bytes).unwrap();
    (Uffd::from(OwnedFd::from(reader)), writer)
}

/// A message as no kernel wrote it.
fn message(event: u8, argument: u32) -> [u8; 32] {
    let mut message = [0; 32];
    message[0] = event;
    message[8..12].copy_from_slice(&argument.to_ne_bytes());
    message
}

/// The error of reading one event, and that of reading several.
fn errors(bytes: &[u8]) -> [Error; 2] {
    let one = pipe(bytes).0.read_event().unwrap_err();
    let mut buffer = EventBuffer::new(4);
    let several = pipe(bytes).0.read_batch(&mut buffer).unwrap_err();
    assert!(buffer.is_empty());
    [one, several]
}

#[test]
fn message_that_is_too_short_is_an_error() {
    require!();
    for error in errors(b"7 bytes") {
        assert!(matches!(error, Error::IncompleteMsg { read: 7, expected: 32 }), "{error:?}");
    }
    let (uffd, _writer) = pipe(&[0x12; 32 + 5]);
    let error = uffd.read_batch(&mut EventBuffer::new(4)).unwrap_err();
    assert!(matches!(error, Error::IncompleteMsg { read: 5, expected: 32 }), "{error:?}");
}

#[test]
fn unknown_event_is_an_error_and_the_next_is_read() {
    require!();
    let messages = [message(0x77, 0), message(0x12, 0)].concat();
    let (uffd, _writer) = pipe(&messages);
    assert!(matches!(uffd.read_event(), Err(Error::UnrecognizedEvent(0x77))));
    assert!(uffd.read_event().unwrap().is_some());

    let (uffd, _writer) = pipe(&messages);
    let mut buffer = EventBuffer::new(4);
    let mut events = uffd.read_events(&mut buffer).unwrap();
    assert!(matches!(events.next(), Some(Err(Error::UnrecognizedEvent(0x77)))));
    assert!(matches!(events.next(), Some(Ok(_))));
    assert!(events.next().is_none());
}

#[test]
fn forged_fork_leaves_named_descriptor_alone() {
    require!();
    let (mut innocent, mut writer) = raw::pipe();
    let forged = message(0x13, writer.as_raw_fd() as u32);
    for bytes in [forged.to_vec(), [message(0x12, 0), forged].concat()] {
        let (uffd, _writer) = pipe(&bytes);
        let error = uffd.read_batch(&mut EventBuffer::new(4)).unwrap_err();
        assert!(matches!(error, Error::NotUserfaultfd), "{error:?}");
        let (uffd, _writer) = pipe(&bytes);
        assert!(matches!(
            uffd.read_events(&mut EventBuffer::new(4)).map(Iterator::count),
            Err(Error::NotUserfaultfd)
        ));
    }
    let (uffd, _writer) = pipe(&forged);
    assert!(matches!(uffd.read_event(), Err(Error::NotUserfaultfd)));

    // It is open, and still the end of that pipe.
    writer.write_all(b"!").unwrap();
    drop(writer);
    let mut read = String::new();
    innocent.read_to_string(&mut read).unwrap();
    assert_eq!(read, "!");
}

#[test]
fn end_of_a_file_is_an_error() {
    require!();
    let (uffd, writer) = pipe(b"");
    drop(writer);
    assert!(matches!(uffd.read_event(), Err(Error::ReadEof)));
    assert!(matches!(uffd.read_batch(&mut EventBuffer::new(1)), Err(Error::ReadEof)));
    assert_eq!(
        std::io::Error::from(uffd.read_event().unwrap_err()).kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn descriptor_that_cannot_be_read_is_an_error() {
    require!();
    let directory = Uffd::from(OwnedFd::from(File::open("/proc").unwrap()));
    assert_eq!(errno(directory.read_event()), Errno::EISDIR);
    let (_reader, writer) = raw::pipe();
    assert_eq!(errno(Uffd::from(OwnedFd::from(writer)).read_event()), Errno::EBADF);
}

#[test]
fn operations_on_anything_else_fail() {
    require!();
    let memory = Memory::anonymous(1);
    let (start, len) = (memory.start(), memory.len());
    let content = vec![1u8; len];
    for (name, descriptor) in foreign::descriptors() {
        let uffd = Uffd::from(descriptor);
        // SAFETY: the content lives on, and the memory is only accessed by raw pointers.
        let copied = unsafe { uffd.copy(content.as_ptr().cast(), start, len, true) };
        let results = [
            uffd.register(start, len).map(drop),
            uffd.unregister(start, len),
            uffd.wake(start, len),
            copied.map(drop),
        ];
        for result in results {
            let errno = errno(result);
            assert!(matches!(errno, Errno::ENOTTY | Errno::EINVAL), "{name}: {errno}");
        }
        assert!(uffd.features().is_empty() && uffd.ioctls().is_empty(), "{name}");
    }
}

/// A file of FUSE answers every ioctl with what it likes: here a number that is another owner's descriptor.
#[test]
fn file_that_answers_like_device_gives_no_descriptor() {
    require!(root);
    child::run_well(test_name!(), || {
        if !has(test_name!(), "mounts of its own", mounts::own()) {
            return;
        }
        mounts::replace(Device::File);
        let (mut innocent, mut writer) = raw::pipe();
        let answer = fuse::Answer { result: writer.as_raw_fd(), fill: 0 };
        // The device of FUSE is hidden with the others.
        mounts::node_at(c"/dev/fuse", 10, 229);
        if !fuse::mount_over(test_name!(), c"/dev/userfaultfd", answer) {
            return;
        }
        let file = File::open("/dev/userfaultfd").unwrap();
        for result in
            [UffdBuilder::new().from_device(&file), UffdBuilder::new().open_with(OpenWith::Device).create()]
        {
            let Err(Error::OpenFailed(failure)) = result else { panic!("{result:?}") };
            assert_eq!(failure.errno(), Some(Errno::ENOTTY));
        }
        // Nor is it in the way of the system call.
        let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
        assert!(proc::is_userfaultfd(uffd.as_raw_fd()));
        writer.write_all(b"!").unwrap();
        innocent.read_exact(&mut [0]).unwrap();
    });
}

/// So it can clear the structure of a handshake, and refuse it, as a userfaultfd does.
#[test]
fn file_that_answers_like_a_userfaultfd_is_none() {
    require!(root);
    child::run_well(test_name!(), || {
        if !has(test_name!(), "mounts of its own", mounts::own()) {
            return;
        }
        mounts::replace(Device::File);
        mounts::node_at(c"/dev/fuse", 10, 229);
        let answer = fuse::Answer { result: -libc::EINVAL, fill: 0 };
        if !fuse::mount_over(test_name!(), c"/dev/userfaultfd", answer) {
            return;
        }
        let file = OwnedFd::from(File::open("/dev/userfaultfd").unwrap());
        let result = UffdBuilder::new().handshake(file);
        assert!(matches!(result, Err(Error::NotUserfaultfd)), "{result:?}");
    });
}
