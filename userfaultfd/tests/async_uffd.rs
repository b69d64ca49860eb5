//! Events that are awaited: each test on tokio and on async-io.

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::{fs, thread};

use userfaultfd::{
    AsyncUffd, Errno, Error, Event, EventBuffer, FaultKind, FeatureFlags, NotRegistered, Uffd,
};

use crate::support::child;
use crate::support::gate::Gate;
use crate::support::handler::{Fault, fill, while_changing};
use crate::support::memory::Memory;
use crate::support::proc::{fdinfo, wait_for_pending, wait_until};
use crate::support::raw::wait_for_event;
use crate::support::{require, test_name, uffd};

/// What waits for events. Other threads than the one that is blocked on a future learn of them.
#[derive(Debug)]
enum Runtime {
    Tokio(tokio::runtime::Runtime),
    AsyncIo,
}

impl Runtime {
    fn each() -> impl Iterator<Item = Self> {
        let tokio =
            || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build().unwrap();
        [true, false].into_iter().map(
            move |is_tokio| {
                if is_tokio { Self::Tokio(tokio()) } else { Self::AsyncIo }
            },
        )
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        match self {
            Self::Tokio(runtime) => runtime.block_on(future),
            Self::AsyncIo => async_io::block_on(future),
        }
    }

    fn try_register(&self, uffd: Uffd) -> Result<AsyncUffd, NotRegistered> {
        self.block_on(async {
            match self {
                Self::Tokio(_) => AsyncUffd::with_tokio(uffd),
                Self::AsyncIo => AsyncUffd::with_async_io(uffd),
            }
        })
    }

    fn register(&self, uffd: Uffd) -> AsyncUffd {
        self.try_register(uffd).unwrap()
    }

    /// Missing memory, and its userfaultfd.
    fn watched(&self, pages: usize) -> (AsyncUffd, Memory) {
        let memory = Memory::anonymous(pages);
        let uffd = uffd(FeatureFlags::empty());
        uffd.register(memory.start(), memory.len()).unwrap();
        (self.register(uffd), memory)
    }
}

/// Polls once.
async fn once<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

/// The pages of faults.
fn pages(memory: &Memory, events: &mut EventBuffer) -> Vec<usize> {
    let page = |event: userfaultfd::Result<Event>| {
        let fault = Fault::of(event.unwrap());
        assert_eq!(fault.kind, FaultKind::Missing);
        (fault.addr - memory.start().addr()) / memory.page()
    };
    events.drain().map(page).collect()
}

#[test]
fn faults_that_wait_come_in_one_batch() {
    require!();
    const THREADS: usize = 8;
    for runtime in Runtime::each() {
        let (uffd, memory) = runtime.watched(THREADS);
        thread::scope(|scope| {
            let memory = &memory;
            let readers: Vec<_> = (0..THREADS).map(|page| scope.spawn(move || memory.read(page))).collect();
            wait_for_pending(&uffd, THREADS);
            let mut events = EventBuffer::new(2 * THREADS);
            assert_eq!(runtime.block_on(uffd.read_batch(&mut events)).unwrap(), THREADS);
            for page in pages(memory, &mut events) {
                fill(&uffd, memory, page, page as u8 + 1);
            }
            let read: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
            assert!(read.into_iter().eq(1..=THREADS as u8));
        });
    }
}

/// The kernel tells of each message once: who takes a read for all there was waits for ever.
#[test]
fn what_found_no_room_is_read_by_the_next_call() {
    require!();
    const THREADS: usize = 5;
    for runtime in Runtime::each() {
        let (uffd, memory) = runtime.watched(THREADS);
        thread::scope(|scope| {
            let memory = &memory;
            (0..THREADS).for_each(|page| drop(scope.spawn(move || memory.read(page))));
            wait_for_pending(&uffd, THREADS);
            let mut events = EventBuffer::new(2);
            runtime.block_on(async {
                for expected in [2, 2, 1] {
                    uffd.ready().await.unwrap();
                    assert_eq!(uffd.read_batch(&mut events).await.unwrap(), expected);
                    pages(memory, &mut events).into_iter().for_each(|page| fill(&uffd, memory, page, 1));
                }
            });
        });
    }
}

#[test]
fn fault_that_another_reader_takes_ends_no_wait() {
    require!();
    for runtime in Runtime::each() {
        let (uffd, memory) = runtime.watched(2);
        let other = uffd.try_clone().unwrap();
        let second = Gate::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(memory.read(0), 1);
                second.pass();
                assert_eq!(memory.read(1), 2);
            });
            runtime.block_on(async {
                // The runtime knows of the fault, and doesn't learn that it is taken.
                uffd.ready().await.unwrap();
                let fault = Fault::next(&other);
                let mut events = EventBuffer::new(4);
                let mut reading = Box::pin(uffd.read_batch(&mut events));
                assert!(once(reading.as_mut()).await.is_pending());
                assert!(once(pin!(uffd.ready())).await.is_pending());
                assert_eq!(fault, Fault::read(FaultKind::Missing, &memory, 0));
                fill(&uffd, &memory, 0, 1);
                assert!(once(reading.as_mut()).await.is_pending());
                second.open();
                assert_eq!(reading.await.unwrap(), 1);
                assert_eq!(pages(&memory, &mut events), [1]);
                fill(&uffd, &memory, 1, 2);
            });
        });
    }
}

#[test]
fn every_fault_goes_to_one_of_two_tasks() {
    require!();
    const THREADS: usize = 32;
    const ROUNDS: usize = 8;
    let faults = THREADS * ROUNDS;
    for runtime in Runtime::each() {
        // Two more end the tasks, one after the other.
        let (uffd, memory) = runtime.watched(faults + 2);
        let seen: Vec<_> = (0..faults + 2).map(|_| AtomicUsize::new(0)).collect();
        thread::scope(|scope| {
            let serve = || {
                let mut events = EventBuffer::new(3);
                runtime.block_on(async {
                    loop {
                        assert!(uffd.read_batch(&mut events).await.unwrap() > 0);
                        let pages = pages(&memory, &mut events);
                        for page in &pages {
                            seen[*page].fetch_add(1, Ordering::SeqCst);
                            fill(&uffd, &memory, *page, (*page % 251) as u8);
                        }
                        if pages.iter().any(|page| *page >= faults) {
                            return;
                        }
                    }
                });
            };
            let tasks = [scope.spawn(serve), scope.spawn(serve)];
            let read = |page: usize| assert_eq!(memory.read(page), (page % 251) as u8);
            thread::scope(|scope| {
                (0..THREADS).for_each(|first| {
                    scope.spawn(move || (first..faults).step_by(THREADS).for_each(read));
                });
            });
            (faults..faults + 2).for_each(read);
            tasks.into_iter().for_each(|task| task.join().unwrap());
        });
        assert!(seen.iter().all(|seen| seen.load(Ordering::SeqCst) == 1), "{seen:?}");
    }
}

/// Whether it was woken.
#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn dropped_wait_loses_no_event() {
    require!();
    for runtime in Runtime::each() {
        let (uffd, memory) = runtime.watched(1);
        let flag = Arc::new(Flag::default());
        let waker = Waker::from(Arc::clone(&flag));
        let mut events = EventBuffer::new(4);
        thread::scope(|scope| {
            // Dropped before there is an event, and once it was woken for one.
            let mut dropped_first = Box::pin(uffd.read_batch(&mut events));
            assert!(dropped_first.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            drop(dropped_first);
            let mut dropped = Box::pin(uffd.read_batch(&mut events));
            assert!(dropped.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            let mut other = pin!(uffd.ready());
            assert!(other.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            let reader = scope.spawn(|| memory.read(0));
            wait_until(|| flag.0.load(Ordering::SeqCst));
            drop(dropped);
            assert!(events.is_empty());
            assert_eq!(fdinfo(&uffd).pending, 1);

            runtime.block_on(async {
                other.await.unwrap();
                assert_eq!(uffd.read_batch(&mut events).await.unwrap(), 1);
            });
            assert_eq!(pages(&memory, &mut events), [0]);
            fill(&uffd, &memory, 0, 9);
            assert_eq!(reader.join().unwrap(), 9);
        });
    }
}

#[test]
fn removal_and_the_fault_behind_it_come_in_one_batch() {
    require!(FeatureFlags::EVENT_REMOVE);
    for runtime in Runtime::each() {
        let memory = Memory::anonymous(2);
        let uffd = uffd(FeatureFlags::EVENT_REMOVE);
        uffd.register(memory.start(), memory.len()).unwrap();
        fill(&uffd, &memory, 0, 1);
        let uffd = runtime.register(uffd);
        let mut events = EventBuffer::new(4);
        thread::scope(|scope| {
            let remover = scope.spawn(|| memory.advise(0, 1, libc::MADV_DONTNEED));
            wait_for_event(&uffd);
            let reader = scope.spawn(|| memory.read(1));
            wait_for_pending(&uffd, 1);
            assert_eq!(runtime.block_on(uffd.read_batch(&mut events)).unwrap(), 2);
            let mut events = events.changes_first().drain().map(Result::unwrap);
            let Some(Event::Remove { start, end }) = events.next() else { panic!("no removal") };
            assert_eq!((start, end), (memory.start(), memory.at(1)));
            assert_eq!(Fault::of(events.next().unwrap()), Fault::read(FaultKind::Missing, &memory, 1));
            remover.join().unwrap().unwrap();
            fill(&uffd, &memory, 1, 7);
            assert_eq!(reader.join().unwrap(), 7);
        });
    }
}

#[test]
fn forks_of_another_process_are_awaited() {
    require!(FeatureFlags::EVENT_FORK, root);
    child::run_well(test_name!(), || {
        for runtime in Runtime::each() {
            let memory = Memory::anonymous(1);
            let uffd = uffd(FeatureFlags::EVENT_FORK);
            uffd.register(memory.start(), memory.len()).unwrap();
            let body = || child::fork(|| assert_eq!(memory.read(0), 5)).succeed();
            let mut of_child = None;
            // The fork of this process, by a thread that holds the allocator's locks, isn't awaited.
            let child = while_changing(
                &uffd,
                || child::fork(body),
                |_| {
                    wait_for_event(&uffd);
                    let Some(Event::Fork { uffd }) = uffd.read_event().unwrap() else { panic!("no fork") };
                    of_child = Some(uffd);
                },
            );
            let mut events = EventBuffer::new(4);
            let of_child = runtime.register(of_child.unwrap());
            assert_eq!(runtime.block_on(of_child.read_batch(&mut events)).unwrap(), 1);
            let Some(Ok(Event::Fork { uffd: of_grandchild })) = events.pop() else { panic!("no fork") };
            let of_grandchild = runtime.register(of_grandchild);
            assert_eq!(runtime.block_on(of_grandchild.read_batch(&mut events)).unwrap(), 1);
            assert_eq!(pages(&memory, &mut events), [0]);
            fill(&of_grandchild, &memory, 0, 5);
            child.succeed();
        }
    });
}

#[test]
fn blocking_descriptor_is_refused_and_given_back() {
    require!();
    for runtime in Runtime::each() {
        let memory = Memory::anonymous(1);
        let uffd = uffd(FeatureFlags::empty());
        uffd.set_nonblocking(false).unwrap();
        uffd.register(memory.start(), memory.len()).unwrap();
        let refused = runtime.try_register(uffd).unwrap_err();
        assert!(refused.to_string().ends_with("made without non_blocking(true)"), "{refused}");
        let (uffd, error) = refused.into_parts();
        assert!(matches!(error, Error::Blocking), "{error:?}");

        uffd.set_nonblocking(true).unwrap();
        let uffd = runtime.register(uffd);
        let mut events = EventBuffer::new(1);
        thread::scope(|scope| {
            // By another owner, while it is registered: the kernel tells of an error then, of no event.
            uffd.set_nonblocking(false).unwrap();
            scope.spawn(|| memory.read(0));
            wait_for_pending(&uffd, 1);
            for error in [
                runtime.block_on(uffd.ready()).unwrap_err(),
                runtime.block_on(uffd.read_batch(&mut events)).map(drop).unwrap_err(),
            ] {
                assert!(matches!(error, Error::Blocking), "{error:?}");
            }
            assert_eq!(fdinfo(&uffd).pending, 1);
            uffd.set_nonblocking(true).unwrap();
            assert_eq!(runtime.block_on(uffd.read_batch(&mut events)).unwrap(), 1);
            fill(&uffd, &memory, 0, 1);
        });
    }
}

#[test]
fn buffer_without_room_ends_no_wait_for_ever() {
    require!();
    for runtime in Runtime::each() {
        let (uffd, memory) = runtime.watched(1);
        let result = runtime.block_on(uffd.read_batch(&mut EventBuffer::new(0)));
        assert!(matches!(result, Err(Error::EmptyBuffer)), "{result:?}");
        let mut events = EventBuffer::new(1);
        thread::scope(|scope| {
            scope.spawn(|| memory.read(0));
            assert_eq!(runtime.block_on(uffd.read_batch(&mut events)).unwrap(), 1);
            assert_eq!(runtime.block_on(uffd.read_batch(&mut events)).unwrap(), 0);
            assert_eq!(pages(&memory, &mut events), [0]);
            fill(&uffd, &memory, 0, 1);
        });
    }
}

#[test]
fn what_cannot_be_polled_is_given_back() {
    require!();
    for runtime in Runtime::each() {
        let file = fs::OpenOptions::new().read(true).open("/proc/self/exe").unwrap();
        let uffd = Uffd::from(std::os::fd::OwnedFd::from(file));
        uffd.set_nonblocking(true).unwrap();
        let (uffd, error) = runtime.try_register(uffd).unwrap_err().into_parts();
        assert!(matches!(error, Error::SystemError(Errno::EPERM)), "{error:?}");
        assert!(uffd.is_nonblocking().unwrap());
    }
}

#[test]
fn userfaultfd_is_returned_and_registered_again() {
    require!();
    for runtime in Runtime::each() {
        let (uffd, memory) = runtime.watched(1);
        let uffd = runtime.register(uffd.into_inner());
        thread::scope(|scope| {
            let reader = scope.spawn(|| memory.read(0));
            runtime.block_on(uffd.ready()).unwrap();
            assert_eq!(Fault::next(&uffd), Fault::read(FaultKind::Missing, &memory, 0));
            fill(&uffd.into_inner(), &memory, 0, 3);
            assert_eq!(reader.join().unwrap(), 3);
        });
    }
}

#[test]
fn ended_tokio_runtime_is_an_error() {
    require!();
    let runtime = Runtime::each().next().unwrap();
    let (uffd, _memory) = runtime.watched(1);
    drop(runtime);
    let mut events = EventBuffer::new(1);
    let errors =
        async_io::block_on(async { [uffd.ready().await, uffd.read_batch(&mut events).await.map(drop)] });
    for error in errors.map(Result::unwrap_err) {
        assert!(matches!(error, Error::RuntimeEnded), "{error:?}");
    }
    assert!(uffd.into_inner().read_event().unwrap().is_none());
}

#[test]
fn waits_move_between_threads() {
    require!();
    fn check(_: impl Send) {}
    for runtime in Runtime::each() {
        let (uffd, _memory) = runtime.watched(1);
        let mut events = EventBuffer::new(1);
        check(uffd.ready());
        check(uffd.read_batch(&mut events));
        let text = format!("{uffd:?}");
        assert!(text.contains("runtime: ") && text.contains("features: "), "{text}");
    }
}
