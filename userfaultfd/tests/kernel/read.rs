//! read(2) and poll(2): waiting for events, and taking many at once.

use std::collections::BTreeSet;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc;
use std::thread;

use userfaultfd::{Error, Event, EventBuffer, FeatureFlags, Result, Uffd, UffdBuilder};

use crate::support::fault::{during, during_all};
use crate::support::handler::{Fault, fill, while_changing, zero};
use crate::support::memory::Memory;
use crate::support::proc::{self, wait_for_pending, wait_until, wait_until_in};
use crate::support::raw::{poll, wait_for_event};
use crate::support::{require, uffd};

/// Has every page of new memory read by a thread of its own, and runs `test` when all these faults are there to be
/// read. Afterwards the pages are filled with zeros. A failure of `test` while a thread was disturbed proves nothing:
/// then it runs again.
fn with_pending_faults(new: fn() -> Uffd, pages: usize, test: impl Fn(&Uffd, &Memory)) {
    const ATTEMPTS: u32 = 8;
    let passes = |attempt| {
        let uffd = &new();
        let memory = &missing(uffd, pages);
        let accesses = (0..pages).map(|page| move || memory.read(page));
        let mut passed = true;
        during_all(uffd, memory, accesses, |faults| {
            wait_for_pending(uffd, pages);
            let mut result = Ok(());
            let undisturbed = faults.undisturbed(|| {
                result = panic::catch_unwind(AssertUnwindSafe(|| test(uffd, memory)));
            });
            if let Err(failure) = result {
                if undisturbed || attempt == ATTEMPTS {
                    panic::resume_unwind(failure);
                }
                passed = false;
            }
            zero(uffd, memory, 0, pages);
        });
        passed
    };
    assert!((1..=ATTEMPTS).any(passes));
}

/// One that doesn't wait for events.
fn silent() -> Uffd {
    uffd(FeatureFlags::empty())
}

/// A blocking userfaultfd.
fn blocking() -> Uffd {
    UffdBuilder::new().close_on_exec(true).create().unwrap()
}

/// Memory with pages that are missing, registered.
fn missing(uffd: &Uffd, pages: usize) -> Memory {
    let memory = Memory::anonymous(pages);
    uffd.register(memory.start(), memory.len()).unwrap();
    memory
}

/// The addresses of events that must all be faults.
fn addresses(events: impl IntoIterator<Item = Result<Event>>) -> Vec<usize> {
    events.into_iter().map(|event| Fault::of(event.unwrap()).addr).collect()
}

/// The addresses of all pages.
fn pages(memory: &Memory) -> BTreeSet<usize> {
    (0..memory.pages()).map(|page| memory.at(page).addr()).collect()
}

/// The ways to read, each telling how many events it got.
const WAYS: [fn(&Uffd) -> usize; 3] = [
    |uffd| uffd.read_event().unwrap().into_iter().count(),
    |uffd| uffd.read_events(&mut EventBuffer::new(4)).unwrap().map(Result::unwrap).count(),
    |uffd| uffd.read_batch(&mut EventBuffer::new(4)).unwrap(),
];

#[test]
fn reading_a_blocking_descriptor_waits_for_an_event() {
    require!();
    for read in WAYS {
        let uffd = blocking();
        let memory = missing(&uffd, 1);
        let (sender, threads) = mpsc::channel();
        thread::scope(|scope| {
            let (uffd, memory) = (&uffd, &memory);
            let handler = scope.spawn(move || {
                sender.send(proc::thread_id()).unwrap();
                read(uffd)
            });
            wait_until_in(threads.recv().unwrap(), libc::SYS_read);
            let reader = scope.spawn(|| memory.read(0));
            assert_eq!(handler.join().unwrap(), 1);
            zero(uffd, memory, 0, 1);
            reader.join().unwrap();
        });
    }
}

#[test]
fn reading_a_non_blocking_descriptor_finds_nothing() {
    require!();
    for read in WAYS {
        assert_eq!(read(&uffd(FeatureFlags::empty())), 0);
    }
}

#[test]
fn many_faults_are_read_in_one_system_call() {
    require!();
    // A second system call would wait for ever.
    with_pending_faults(blocking, 32, |uffd, memory| {
        let mut buffer = EventBuffer::new(memory.pages() + 1);
        let before = proc::fdinfo(uffd);
        let count = uffd.read_batch(&mut buffer).unwrap();
        let info = proc::fdinfo(uffd);
        let read = addresses(buffer.drain());
        let missing = pages(memory).difference(&read.iter().copied().collect()).count();
        let seen = format!("{before:?} before, {info:?} after; {missing} pages not among {read:x?}");
        assert_eq!(count, memory.pages(), "{seen}");
        assert_eq!((info.pending, info.total), (0, memory.pages()), "{seen}");
        assert_eq!((read.len(), BTreeSet::from_iter(read)), (memory.pages(), pages(memory)), "{seen}");
    });
}

#[test]
fn small_buffer_takes_what_fits_and_then_the_rest() {
    require!();
    with_pending_faults(silent, 8, |uffd, memory| {
        let mut buffer = EventBuffer::new(3);
        let mut read = BTreeSet::new();
        for (expected, left) in [(3, 5), (3, 2), (2, 0), (0, 0)] {
            let batch = addresses(uffd.read_events(&mut buffer).unwrap());
            assert_eq!((batch.len(), proc::fdinfo(uffd).pending), (expected, left));
            read.extend(batch);
        }
        assert_eq!(read, pages(memory));
    });
}

#[test]
fn events_not_taken_out_stay_in_the_buffer() {
    require!();
    with_pending_faults(silent, 5, |uffd, memory| {
        let mut buffer = EventBuffer::new(3);
        assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 3);
        // There is no room, and nothing is read.
        assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 0);
        assert_eq!((buffer.len(), proc::fdinfo(uffd).pending), (3, 2));

        let mut read = addresses(buffer.pop());
        assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 1);
        assert_eq!((buffer.len(), proc::fdinfo(uffd).pending), (3, 1));
        // The iterator takes those that are left out first.
        read.extend(addresses(buffer.drain()));
        assert!(buffer.is_empty());
        read.extend(addresses(uffd.read_events(&mut buffer).unwrap()));
        assert_eq!((read.len(), BTreeSet::from_iter(read)), (5, pages(memory)));
    });
}

#[test]
fn buffer_without_room_is_refused_and_takes_nothing() {
    require!();
    with_pending_faults(silent, 1, |uffd, _| {
        let mut buffer = EventBuffer::new(0);
        assert!(matches!(uffd.read_batch(&mut buffer), Err(Error::EmptyBuffer)));
        assert!(matches!(uffd.read_events(&mut buffer).map(Iterator::count), Err(Error::EmptyBuffer)));
        assert_eq!(proc::fdinfo(uffd).pending, 1);
    });
}

#[test]
fn faults_come_before_changes_unless_changes_first() {
    require!(FeatureFlags::EVENT_REMOVE);
    const FAULT: u8 = 0x12;
    const REMOVE: u8 = 0x15;
    for (changes_first, expected) in [(false, [FAULT, REMOVE]), (true, [REMOVE, FAULT])] {
        let uffd = uffd(FeatureFlags::EVENT_REMOVE);
        let memory = missing(&uffd, 2);
        fill(&uffd, &memory, 0, 1);
        let mut buffer = EventBuffer::new(8);
        let read_both = |_| {
            // The change is there before the fault.
            wait_for_event(&uffd);
            during_all(&uffd, &memory, [|| memory.read(1)], |_| {
                wait_for_pending(&uffd, 1);
                assert_eq!(uffd.read_batch(&mut buffer).unwrap(), 2);
                // Once the event is read the thread that made the change goes on, and then fills are
                // accepted.
                wait_until(|| {
                    // SAFETY: the memory is only accessed by raw pointers.
                    let zeroed = unsafe { uffd.zeropage(memory.at(1), memory.page(), true) };
                    zeroed.is_ok_and(|zeroed| zeroed == memory.page())
                });
            });
        };
        while_changing(&uffd, || memory.advise(0, 1, libc::MADV_DONTNEED), read_both).unwrap();

        if changes_first {
            buffer.changes_first();
        }
        let kinds: Vec<_> = buffer.as_bytes().chunks(32).map(|message| message[0]).collect();
        assert_eq!(kinds, expected);
        let faults: Vec<_> =
            buffer.drain().map(|event| matches!(event.unwrap(), Event::Pagefault { .. })).collect();
        assert_eq!(faults, expected.map(|kind| kind == FAULT));
    }
}

#[test]
fn fault_that_is_resolved_before_it_is_read_is_gone() {
    require!();
    for read in WAYS {
        let uffd = uffd(FeatureFlags::empty());
        let memory = missing(&uffd, 1);
        during_all(&uffd, &memory, [|| memory.read(0)], |_| {
            wait_for_event(&uffd);
            zero(&uffd, &memory, 0, 1);
        });
        assert_eq!((poll(&uffd), read(&uffd)), (0, 0));
    }
}

#[test]
fn poll_reports_unread_faults() {
    require!();
    assert_eq!(poll(silent()), 0);
    with_pending_faults(silent, 1, |uffd, memory| {
        assert_eq!(poll(uffd), libc::POLLIN);
        assert_eq!(Fault::next(uffd).addr, memory.start().addr());
        // The thread still waits.
        let info = proc::fdinfo(uffd);
        assert_eq!((poll(uffd), info.pending, info.total), (0, 0, 1));
    });
}

#[test]
fn poll_on_a_blocking_descriptor_is_an_error() {
    require!();
    assert_eq!(poll(blocking()), libc::POLLERR);
    with_pending_faults(blocking, 1, |uffd, _| assert_eq!(poll(uffd), libc::POLLERR));
}

#[test]
fn blocking_is_switched_for_all_duplicates() {
    require!();
    let uffd = blocking();
    let duplicate = uffd.try_clone().unwrap();
    for _ in 0..2 {
        uffd.set_nonblocking(true).unwrap();
        assert_eq!((poll(&duplicate), poll(&uffd)), (0, 0));
        assert!(duplicate.read_event().unwrap().is_none());
        duplicate.set_nonblocking(false).unwrap();
        assert_eq!((poll(&duplicate), poll(&uffd)), (libc::POLLERR, libc::POLLERR));
    }
}

/// What an async worker reads with must not wait, whatever the descriptor is.
#[test]
fn nonwaiting_read_is_refused_on_blocking_descriptor() {
    require!();
    let (memory, uffd) = (Memory::anonymous(1), uffd(FeatureFlags::empty()));
    uffd.register(memory.start(), memory.len()).unwrap();
    let mut buffer = EventBuffer::new(2);
    assert!(uffd.try_read_event().unwrap().is_none());
    assert_eq!(uffd.try_read_batch(&mut buffer).unwrap(), 0);
    uffd.set_nonblocking(false).unwrap();
    let errors = [uffd.try_read_event().map(drop), uffd.try_read_batch(&mut buffer).map(drop)];
    for error in errors {
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Blocking) && !error.is_retryable(), "{error:?}");
        assert!(error.to_string().contains("non_blocking"), "{error}");
    }
    uffd.set_nonblocking(true).unwrap();
    let answer = |_: &crate::support::fault::Faults<'_>| {
        wait_for_event(&uffd);
        let event = uffd.try_read_event().unwrap();
        assert!(matches!(event, Some(Event::Pagefault { .. })), "{event:?}");
        zero(&uffd, &memory, 0, 1);
    };
    during(&uffd, &memory, || memory.read(0), answer);
}
