//! Forks, the ends of processes, and which thread frees what is left: nothing that the program's code does is in the way, and
//! that code runs on the thread for it.

#![expect(unsafe_code, reason = "the memory is the test's, and a process forks")]

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use super::harness::{Reader, Seen, Stop, start, wait_for_progress};
use crate::lock_order::lock;
use crate::pager::{Added, Error, FaultAround, PageData, PageSource, Pager, Problem, Region};
use crate::support::child::{self, Forked};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{require, test_name, uffd};
use crate::sync_point::Point;
use crate::{FeatureFlags, Uffd};

/// As good as never.
const NEVER: Duration = Duration::from_secs(3600);

fn sevens(_: u64, bytes: &mut [u8]) -> std::io::Result<PageData> {
    bytes.fill(7);
    Ok(PageData::Data)
}

fn region(memory: &Memory, source: impl PageSource + 'static) -> Region {
    Region::new(memory.start().expose_provenance(), memory.len(), source).fault_around(FaultAround::Page)
}

/// A process that sends the descriptor of its copy of `memory`, and does something once it is told to.
fn target(
    memory: &Memory,
    features: FeatureFlags,
    act: impl FnOnce(&mut UnixStream),
) -> (Forked, UnixStream, Uffd) {
    let (here, mut there) = UnixStream::pair().unwrap();
    let process = child::fork(|| {
        let own = uffd(features);
        own.register(memory.start(), memory.len()).unwrap();
        child::send_fd(&there, own.as_fd());
        assert_eq!(there.read(&mut [0]).unwrap(), 1);
        act(&mut there);
    });
    let descriptor = Uffd::from(child::receive_fd(&here));
    (process, here, descriptor)
}

/// Another thread may be looking at what is served just when the process forks.
#[test]
fn a_child_closes_its_copies_whatever_was_locked() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        let (process, _socket, descriptor) = target(&memory, FeatureFlags::empty(), |_| {});
        let end = process.pidfd();
        let numbers = [descriptor.as_raw_fd(), end.as_raw_fd()];
        // SAFETY: touches no memory.
        let is_open = |number: &i32| unsafe { libc::fcntl(*number, libc::F_GETFD) } != -1;
        let mut pager = Some(Pager::new().unwrap());
        let shared = Arc::clone(&pager.as_ref().unwrap().shared);
        let added = pager.as_ref().unwrap().add(descriptor, [region(&memory, sevens)]).unwrap();
        pager.as_ref().unwrap().watch(added.descriptor, end).unwrap();
        let served = shared.table.find(added.descriptor.0).unwrap();
        let child = shared.table.with_slots_locked(|| {
            let _ends = lock(&served.ends);
            child::fork(|| {
                assert!(numbers.iter().all(is_open));
                drop(pager.take());
                assert!(!numbers.iter().any(is_open));
            })
        });
        child.succeed();
        assert!(numbers.iter().all(is_open));
    });
}

#[test]
fn joining_waits_for_the_child_of_a_fork() {
    require!(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        let (process, mut socket, descriptor) = target(&memory, FeatureFlags::EVENT_FORK, |there| {
            // As a daemon does at its start.
            // SAFETY: the child allocates nothing.
            if unsafe { libc::fork() } == 0 {
                let byte = memory.read(2);
                there.write_all(&[byte]).unwrap();
                let _until_told = there.read(&mut [0]);
            }
        });
        let stop = Stop::at(Point::BeforeAdopt, 0..usize::MAX);
        let pager = Arc::new(Pager::builder().build().unwrap());
        let added = pager.add(descriptor, [region(&memory, sevens)]).unwrap();
        socket.write_all(&[0]).unwrap();
        stop.reached();
        process.succeed();
        // The control thread would notice its end.
        pager.finish_region(added.regions[0], |_| {}).unwrap_err();
        assert_eq!(pager.descriptors(), []);
        let joining = Arc::clone(&pager);
        let (joined, id) = start(move || joining.join());
        wait_for_progress(&joined, id);
        assert!(!joined.is_finished(), "a child is still to be served");
        stop.go();
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [7]);
        assert!(!joined.is_finished());
        socket.write_all(&[0]).unwrap();
        joined.join().unwrap();
        assert_eq!(pager.descriptors(), []);
    });
}

#[test]
fn a_callback_that_takes_its_time_delays_no_child() {
    require!(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        let (called, is_called) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        let (called, may_go) = (Mutex::new(called), Mutex::new(may_go));
        let on_problem = move |_: &Problem| {
            called.lock().unwrap().send(()).unwrap();
            let _gone = may_go.lock().unwrap().recv();
        };
        let pager = Pager::builder().on_problem(on_problem).build().unwrap();
        let source = |offset: u64, bytes: &mut [u8]| match offset {
            0 => Err(std::io::ErrorKind::NotFound.into()),
            _ => sevens(offset, bytes),
        };
        let uffd = uffd(FeatureFlags::EVENT_FORK);
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
        let added = unsafe { pager.add_own(uffd, [region(&memory, source)]) }.unwrap();
        let bad = pager.background(added.regions[0], crate::pager::FillOrder::Ascending).unwrap();
        bad.wait();
        super::harness::tell_signals();
        let reader = Reader::of(memory.at(0).addr());
        is_called.recv().unwrap();
        child::fork(|| assert_eq!(memory.read(3), 7)).succeed();
        drop(go);
        if crate::support::features().contains(FeatureFlags::POISON) {
            assert_eq!(reader.wait(), Seen::POISON);
        }
    });
}

/// A process that is stopped in the middle of a change, here by a limit: nothing can be filled or poisoned. One call has one
/// patience, whatever it finds to do: regions, pages, rounds.
fn lasting_problem(test: &'static str, act: impl FnOnce(Pager, &Added)) {
    const REGIONS: usize = 8;
    child::run_well(test, || {
        let memory = Memory::anonymous(8 * REGIONS);
        let problems = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&problems);
        let tell = move |problem: &Problem| told.lock().unwrap().push(problem.to_string());
        let patience = Duration::from_millis(500);
        let pager = Pager::builder().patience(patience).on_problem(tell).build().unwrap();
        let (process, mut socket, descriptor) = target(&memory, FeatureFlags::EVENT_FORK, |_| {
            // It waits in the kernel for ever.
            child::fork(|| {});
        });
        let (start, len) = (memory.start().expose_provenance(), memory.len() / REGIONS);
        let regions = (0..REGIONS)
            .map(|number| Region::new(start + number * len, len, sevens).offset((number * len) as u64));
        let added = pager.add(descriptor, regions).unwrap();
        let full = child::use_up_descriptors();
        socket.write_all(&[0]).unwrap();
        wait_until(|| !problems.lock().unwrap().is_empty());
        let start = Instant::now();
        act(pager, &added);
        // Each region alone would have taken twice as long, and each page even longer.
        assert!(start.elapsed() < 4 * patience, "{:?}", start.elapsed());
        drop(full);
        let told = problems.lock().unwrap();
        assert_eq!(told.iter().filter(|problem| problem.contains("EMFILE")).count(), 1, "{told:?}");
        process.kill();
    });
}

#[test]
fn lasting_problem_is_reported_once_by_a_drop() {
    require!(FeatureFlags::EVENT_FORK);
    lasting_problem(test_name!(), |pager, _| drop(pager));
}

#[test]
fn finish_has_one_patience_for_all_regions() {
    require!(FeatureFlags::EVENT_FORK);
    lasting_problem(test_name!(), |pager, _| {
        let finished = pager.finish(|_| {});
        assert!(matches!(finished, Err(Error::Unfilled { .. })), "{finished:?}");
        std::mem::forget(pager);
    });
}

#[test]
fn finish_region_has_one_patience_for_all_pages() {
    require!(FeatureFlags::EVENT_FORK);
    lasting_problem(test_name!(), |pager, added| {
        let finished = pager.finish_region(added.regions[0], |_| {});
        assert!(matches!(finished, Err(Error::Unfilled { pages: 8, .. })), "{finished:?}");
        std::mem::forget(pager);
    });
}

#[test]
fn remove_region_has_one_patience_for_all_pages() {
    require!(FeatureFlags::EVENT_FORK | FeatureFlags::POISON);
    lasting_problem(test_name!(), |pager, added| {
        let removed = pager.remove_region(added.regions[0]);
        assert!(matches!(removed, Err(Error::Unfilled { pages: 8, .. })), "{removed:?}");
        std::mem::forget(pager);
    });
}

#[test]
fn end_of_a_watched_process_is_noticed_at_once() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        for socket_tells in [false, true] {
            let problems = Arc::new(Mutex::new(Vec::new()));
            let told = Arc::clone(&problems);
            let tell = move |problem: &Problem| told.lock().unwrap().push(problem.to_string());
            let pager = Pager::builder().look(NEVER).on_problem(tell).build().unwrap();
            let (process, mut socket, descriptor) = target(&memory, FeatureFlags::empty(), |there| {
                assert_eq!(memory.read(1), 7);
                there.write_all(&[1]).unwrap();
                assert_eq!(there.read(&mut [0]).unwrap(), 1);
            });
            let added = pager.add(descriptor, [region(&memory, sevens)]).unwrap();
            let (here, there) = UnixStream::pair().unwrap();
            if socket_tells {
                // What comes through it isn't the end, and neither is its end.
                pager.watch(added.descriptor, here).unwrap();
                (&there).write_all(b"word").unwrap();
            }
            socket.write_all(&[0]).unwrap();
            socket.read_exact(&mut [0]).unwrap();
            assert_eq!(pager.descriptors(), [added.descriptor]);
            drop(there);
            if !socket_tells {
                pager.watch(added.descriptor, process.pidfd()).unwrap();
            }
            socket.write_all(&[0]).unwrap();
            process.succeed();
            pager.join();
            wait_until(|| problems.lock().unwrap().len() == 1);
            assert!(problems.lock().unwrap()[0].ends_with("is gone"));
            let statistics = pager.statistics();
            assert_eq!((statistics.present_pages, statistics.missing_pages), (1, 3), "{statistics}");
            assert!(pager.watch(added.descriptor, UnixStream::pair().unwrap().0).is_err());
        }
    });
}

/// A source that tells on which thread it ends.
struct Source(mpsc::Sender<String>, #[expect(dead_code, reason = "it is held")] Option<Arc<Pager>>);

impl PageSource for Source {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<PageData> {
        sevens(offset, bytes)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.0.send(std::fs::read_to_string("/proc/thread-self/comm").unwrap()).unwrap();
    }
}

#[test]
fn source_that_a_worker_has_last_ends_elsewhere() {
    require!();
    child::run_well(test_name!(), || {
        for holds_pager in [false, true] {
            let (ended, ends) = mpsc::channel();
            let pager = Arc::new(Pager::new().unwrap());
            let source = Source(ended, holds_pager.then(|| Arc::clone(&pager)));
            let memory = Memory::anonymous(1);
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            let added = unsafe { pager.add_own(uffd(FeatureFlags::empty()), [region(&memory, source)]) };
            let stop = Stop::at(Point::BeforeFill, 0..usize::MAX);
            let reader = Reader::of(memory.at(0).addr());
            stop.reached();
            drop(pager.remove(added.unwrap().descriptor).unwrap());
            assert_eq!(reader.wait(), Seen::ZERO);
            let is_last = Arc::strong_count(&pager) == 1;
            assert_eq!(is_last, !holds_pager);
            let pager = (!holds_pager).then_some(pager);
            assert!(ends.try_recv().is_err(), "the worker has it");
            stop.go();
            assert_eq!(ends.recv().unwrap(), "uffd-reports\n");
            // Where it was the last that had the pager, all threads end.
            let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
            if holds_pager {
                wait_until(|| threads() == 3);
            }
            drop(pager);
        }
    });
}
