//! Userfaultfds whose process is gone, and processes whose handler is.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;

use userfaultfd::{Errno, FeatureFlags, Uffd, UffdBuilder};

use crate::support::child::{self, Forked};
use crate::support::fault::assert_silent;
use crate::support::handler::Fault;
use crate::support::memory::Memory;
use crate::support::raw::{self, check, poll, wait_for_event};
use crate::support::{dead, errno, has_features, require, test_name, uffd};

/// Forks a child that sends a userfaultfd of its own, with `memory` registered, and then runs `body`.
fn child_with_uffd(memory: &Memory, body: impl FnOnce()) -> (Forked, Uffd) {
    let (here, there) = UnixStream::pair().unwrap();
    let child = child::fork(|| {
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        child::send_fd(&there, uffd.as_fd());
        body();
    });
    (child, Uffd::from(child::receive_fd(&here)))
}

#[test]
fn operations_of_a_process_that_is_gone_say_so() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(1);
        let (start, len) = (memory.start(), memory.len());
        let gone = dead::uffd(&memory);
        assert_eq!(errno(gone.register(start, len)), Errno::ENOMEM);
        assert_eq!(errno(gone.unregister(start, len)), Errno::ENOMEM);
        assert_eq!(errno(gone.write_protect(start, len)), Errno::ESRCH);
        assert_eq!(errno(gone.remove_write_protection(start, len, true)), Errno::ESRCH);
        if has_features(test_name!(), FeatureFlags::RWP) {
            assert_eq!(errno(gone.read_write_protect(start, len)), Errno::ESRCH);
            let none = FeatureFlags::empty();
            assert_eq!(errno(gone.set_async(none, FeatureFlags::RWP_ASYNC)), Errno::ESRCH);
        }
        gone.wake(start, len).unwrap();
        // Neither an event nor the end of the file tells.
        assert_eq!(poll(&gone), 0);
        assert_silent(&gone);
    });
}

#[test]
fn process_that_executes_another_program_is_gone() {
    require!();
    child::run_well(test_name!(), || {
        if let Some(stage) = child::stage() {
            // SAFETY: the parent left it to this process, where nothing else owns it.
            let mut parent = unsafe { UnixStream::from_raw_fd(stage.parse().unwrap()) };
            parent.write_all(b"!").unwrap();
            assert_eq!(parent.read(&mut [0]).unwrap(), 0);
            return;
        }
        let memory = Memory::anonymous(1);
        let (mut here, there) = UnixStream::pair().unwrap();
        let (child, uffd) = child_with_uffd(&memory, || {
            // SAFETY: touches no memory.
            check(unsafe { libc::fcntl(there.as_raw_fd(), libc::F_SETFD, 0) }).unwrap();
            child::execute(test_name!(), &there.as_raw_fd().to_string());
        });
        here.read_exact(&mut [0]).unwrap();
        // It lives, and the memory doesn't.
        let content = vec![1u8; memory.len()];
        // SAFETY: the content lives on, and the destination is in the memory that is gone.
        let copied = unsafe { uffd.copy(content.as_ptr().cast(), memory.start(), memory.len(), true) };
        assert_eq!(errno(copied), Errno::ESRCH);
        drop(here);
        child.succeed();
    });
}

#[test]
fn faults_of_a_killed_process_are_gone() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(1);
        let (child, uffd) = child_with_uffd(&memory, || _ = memory.read(0));
        wait_for_event(&uffd);
        child.kill();
        child.wait();
        assert_eq!(poll(&uffd), 0);
        assert_silent(&uffd);
    });
}

#[test]
fn when_handler_dies_what_is_missing_reads_as_zeros() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(2);
        let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
        uffd.register(memory.start(), memory.len()).unwrap();
        let (mut reader, mut writer) = raw::pipe();
        let handler = child::fork(|| {
            assert_eq!(Fault::next(&uffd).addr, memory.start().addr());
            writer.write_all(b"!").unwrap();
            loop {
                std::thread::park();
            }
        });
        // The handler has the only one now.
        drop(uffd);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| memory.read(0));
            reader.read_exact(&mut [0]).unwrap();
            handler.kill();
            handler.wait();
            assert_eq!(waiting.join().unwrap(), 0);
        });
        assert_eq!(memory.read(1), 0);
    });
}
