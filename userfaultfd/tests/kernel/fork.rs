//! Forks that are told, and the userfaultfds of the children.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use userfaultfd::{
    Errno, Error, Event, EventBuffer, FaultKind, FeatureFlags, RegisterMode, Uffd, UffdBuilder,
};

use crate::support::child::{self, Forked};
use crate::support::fault::{assert_silent, during};
use crate::support::handler::{Fault, fill, while_changing};
use crate::support::memory::Memory;
use crate::support::proc::{self, wait_for_pending};
use crate::support::raw::{self, wait_for_event};
use crate::support::{require, test_name, uffd};

/// Memory of two missing pages, registered with a userfaultfd that tells of forks.
fn watched() -> (Uffd, Memory) {
    let memory = Memory::anonymous(2);
    let uffd = uffd(FeatureFlags::EVENT_FORK);
    uffd.register(memory.start(), memory.len()).unwrap();
    (uffd, memory)
}

/// Forks, and reads the event of it.
fn fork(uffd: &Uffd, body: impl FnOnce() + Send) -> (Forked, Uffd) {
    let mut of_child = None;
    let child = while_changing(uffd, || child::fork(body), |_| of_child = Some(next(uffd)));
    (child, of_child.unwrap())
}

/// Waits for an event, which must be a fork.
fn next(uffd: &Uffd) -> Uffd {
    loop {
        match uffd.read_event().unwrap() {
            Some(Event::Fork { uffd }) => return uffd,
            Some(event) => panic!("{event:?}"),
            None => std::thread::yield_now(),
        }
    }
}

#[test]
fn child_has_a_userfaultfd_of_its_own() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, memory) = watched();
        fill(&uffd, &memory, 0, 1);
        let (child, of_child) = fork(&uffd, || assert_eq!((memory.read(0), memory.read(1)), (1, 2)));
        wait_for_event(&of_child);
        assert_eq!(Fault::next(&of_child), Fault::read(FaultKind::Missing, &memory, 1));
        fill(&of_child, &memory, 1, 2);
        child.succeed();

        // The page of this process is still missing.
        let read = during(
            &uffd,
            &memory,
            || memory.read(1),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Missing, &memory, 1));
                fill(&uffd, &memory, 1, 3);
            },
        );
        assert_eq!(read, 3);
        assert_silent(&uffd);
    });
}

#[test]
fn child_s_descriptor_inherits_features_and_flags() {
    require!(FeatureFlags::EVENT_FORK | FeatureFlags::THREAD_ID, root);
    child::run_well(test_name!(), || {
        let features = FeatureFlags::EVENT_FORK | FeatureFlags::THREAD_ID;
        for (close_on_exec, non_blocking) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut builder = UffdBuilder::new();
            builder.require_features(features).close_on_exec(close_on_exec).non_blocking(non_blocking);
            let created = builder.create().unwrap();
            // Of an adopted descriptor the kernel is asked.
            let adopted = Uffd::from(OwnedFd::from(builder.create().unwrap()));
            for uffd in [created, adopted] {
                let memory = Memory::anonymous(1);
                uffd.register(memory.start(), memory.len()).unwrap();
                let (child, of_child) = fork(&uffd, || ());
                child.succeed();
                assert_eq!((of_child.features(), of_child.ioctls()), (features, uffd.ioctls()));
                assert_eq!(proc::fdinfo(&of_child).features, features);
                assert_eq!(raw::flags(&of_child), (close_on_exec, non_blocking));
            }
        }
    });
}

#[test]
fn grandchild_is_reported_by_childs_descriptor() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, memory) = watched();
        let body = || child::fork(|| assert_eq!(memory.read(0), 5)).succeed();
        let (child, of_child) = fork(&uffd, body);
        let of_grandchild = next(&of_child);
        wait_for_event(&of_grandchild);
        assert_eq!(Fault::next(&of_grandchild).addr, memory.start().addr());
        fill(&of_grandchild, &memory, 0, 5);
        child.succeed();
        assert_silent(&uffd);
    });
}

#[test]
fn fork_stays_queued_without_free_descriptor() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, _memory) = watched();
        let mut buffer = EventBuffer::new(4);
        let mut of_child = None;
        let child = while_changing(
            &uffd,
            || child::fork(|| ()),
            |_| {
                wait_for_event(&uffd);
                let full = child::use_up_descriptors();
                for _ in 0..2 {
                    let errors = [uffd.read_event().map(drop), uffd.read_batch(&mut buffer).map(drop)];
                    for result in errors {
                        let error = result.unwrap_err();
                        assert!(matches!(error, Error::SystemError(Errno::EMFILE)), "{error:?}");
                    }
                }
                drop(full);
                of_child = Some(next(&uffd));
            },
        );
        child.succeed();
        assert!(proc::is_userfaultfd(of_child.unwrap().as_raw_fd()));
    });
}

#[test]
fn faults_are_read_even_if_fork_behind_them_cannot_be() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, memory) = watched();
        let (started, forking) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            // Starting a thread, too, takes locks that a fork holds.
            let reader = scope.spawn(|| {
                started.store(true, Ordering::SeqCst);
                proc::wait_until(|| forking.load(Ordering::SeqCst));
                memory.read(0)
            });
            proc::wait_until(|| started.load(Ordering::SeqCst));
            let mut buffer = EventBuffer::new(4);
            let read_while_full = |_| {
                wait_for_event(&uffd);
                forking.store(true, Ordering::SeqCst);
                wait_for_pending(&uffd, 1);
                let full = child::use_up_descriptors();
                assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 1);
                assert!(matches!(uffd.read_batch(&mut buffer), Err(Error::SystemError(Errno::EMFILE))));
                drop(full);
                // The failure lost nothing of what was there.
                assert_eq!((uffd.read_batch(&mut buffer).unwrap(), buffer.len()), (1, 2));
            };
            while_changing(&uffd, || child::fork(|| ()), read_while_full).succeed();
            assert!(matches!(buffer.pop(), Some(Ok(Event::Pagefault { .. }))));
            assert!(matches!(buffer.pop(), Some(Ok(Event::Fork { .. }))));
            fill(&uffd, &memory, 0, 7);
            assert_eq!(reader.join().unwrap(), 7);
        });
    });
}

#[test]
fn forks_that_are_not_taken_out_are_closed() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, _memory) = watched();
        let before = proc::open_descriptors();
        let mut buffer = EventBuffer::new(3);
        let mut read_three = || {
            for forks in 1..=3 {
                let read = |_| {
                    wait_for_event(&uffd);
                    assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 1);
                };
                while_changing(&uffd, || child::fork(|| ()), read).succeed();
                assert_eq!((buffer.len(), proc::open_descriptors()), (forks, before + forks));
            }
        };
        read_three();
        // With the iterator that was to take them out.
        let mut events = buffer.drain();
        let Some(Ok(Event::Fork { uffd: first })) = events.next() else { panic!("no fork") };
        drop(events);
        assert_eq!(proc::open_descriptors(), before + 1);
        drop(first);
        assert_eq!(proc::open_descriptors(), before);
    });
}

#[test]
fn unread_forks_are_closed_with_the_buffer() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, _memory) = watched();
        let before = proc::open_descriptors();
        let mut buffer = EventBuffer::new(3);
        let read = |_| {
            wait_for_event(&uffd);
            assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 1);
        };
        while_changing(&uffd, || child::fork(|| ()), read).succeed();
        assert_eq!(proc::open_descriptors(), before + 1);
        drop(buffer);
        assert_eq!(proc::open_descriptors(), before);
    });
}

#[test]
fn child_reads_zeros_without_fork_feature() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(1);
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        child::fork(|| assert_eq!(memory.read(0), 0)).succeed();
        assert_silent(&uffd);
        assert_eq!(during(&uffd, &memory, || memory.read(0), |_| fill(&uffd, &memory, 0, 7)), 7);
    });
}

#[test]
fn protection_stays_in_reported_child() {
    require!(FeatureFlags::EVENT_FORK | FeatureFlags::PAGEFAULT_FLAG_WP, root);
    child::run_well(test_name!(), || {
        for told in [false, true] {
            let memory = Memory::anonymous(1);
            let uffd = uffd(if told { FeatureFlags::EVENT_FORK } else { FeatureFlags::empty() });
            uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::WRITE_PROTECT).unwrap();
            memory.write(0, 1);
            uffd.write_protect(memory.start(), memory.len()).unwrap();
            if told {
                let (child, of_child) = fork(&uffd, || memory.write(0, 2));
                wait_for_event(&of_child);
                assert_eq!(Fault::next(&of_child), Fault::write(FaultKind::WriteProtected, &memory, 0));
                of_child.remove_write_protection(memory.start(), memory.len(), true).unwrap();
                child.succeed();
            } else {
                child::fork(|| memory.write(0, 2)).succeed();
            }
            assert_silent(&uffd);
            // It is this process's, too.
            assert_eq!(memory.read(0), 1);
            let write = Fault::write(FaultKind::WriteProtected, &memory, 0);
            during(
                &uffd,
                &memory,
                || memory.write(0, 3),
                |faults| {
                    assert_eq!(faults.next(), write);
                    uffd.remove_write_protection(memory.start(), memory.len(), true).unwrap();
                },
            );
        }
    });
}

#[test]
fn exec_is_unreported() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        let (uffd, _memory) = watched();
        // It shares the memory until it executes, so nobody has to read events meanwhile.
        let output = Command::new(std::env::current_exe().unwrap()).arg("--list").output().unwrap();
        assert!(output.status.success());
        assert_silent(&uffd);
    });
}
