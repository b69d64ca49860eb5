//! Memory of other processes: its descriptor inherited, or sent over a socket.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use userfaultfd::pager::{self, Error, FaultAround, Pager, Region};
use userfaultfd::{Errno, FeatureFlags, Pid, Reason, RegisterMode, Uffd, UffdBuilder};

use crate::scene::{self, Pages, Problems, byte, region};
use crate::support::child::{self, Forked};
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{has_features, page, require, test_name, uffd};

/// A process that reads the pages it is told, and writes what it found.
pub(crate) struct Target {
    pub(crate) process: Forked,
    pub(crate) socket: UnixStream,
}

impl Target {
    /// Starts one with a copy of `memory`, and returns the descriptor that it made there.
    pub(crate) fn start(memory: &Memory, features: FeatureFlags, non_blocking: bool) -> (Self, Uffd) {
        let (socket, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let mut builder = UffdBuilder::new();
            builder.close_on_exec(true).non_blocking(non_blocking).require_features(features);
            let own = builder.create().unwrap();
            // The pager that serves it may register it only later.
            own.register(memory.start(), memory.len()).unwrap();
            child::send_fd(&there, own.as_fd());
            drop(own);
            let mut number = [0];
            while (&there).read(&mut number).unwrap() == 1 {
                let page: usize = number[0].into();
                match page & 0x80 {
                    0 => number[0] = memory.read(page),
                    _ => memory.advise(page & 0x7f, 1, libc::MADV_DONTNEED).unwrap(),
                }
                (&there).write_all(&number).unwrap();
            }
        });
        let descriptor = Uffd::from(child::receive_fd(&socket));
        (Self { process, socket }, descriptor)
    }

    pub(crate) fn ask(&mut self, number: u8) {
        self.socket.write_all(&[number]).unwrap();
    }

    pub(crate) fn answer(&mut self) -> u8 {
        let mut byte = [0];
        self.socket.read_exact(&mut byte).unwrap();
        byte[0]
    }

    pub(crate) fn read(&mut self, page: u8) -> u8 {
        self.ask(page);
        self.answer()
    }

    fn remove(&mut self, page: u8) {
        self.read(page | 0x80);
    }
}

#[test]
fn processes_with_all_kinds_of_descriptors_are_served() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        for kind in [Kind::Anonymous, Kind::Memfd, Kind::PrivateHugetlb] {
            for (features, non_blocking) in [
                (FeatureFlags::empty(), false),
                (FeatureFlags::empty(), true),
                (FeatureFlags::EVENT_REMOVE, false),
                (FeatureFlags::EVENT_REMOVE, true),
            ] {
                let Some(memory) = scene::memory(test_name!(), kind, 4) else { continue };
                let (mut target, descriptor) = Target::start(&memory, features, non_blocking);
                let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
                let added = pager.add(descriptor, [region(&memory, source.clone())]).unwrap();
                assert_eq!([target.read(2), target.read(0), target.read(2)], [byte(2), byte(0), byte(2)]);
                source.were_read_once(2);
                if !kind.is_hugetlb() {
                    target.remove(2);
                    let zero = if kind.is_shared() { byte(2) } else { 0 };
                    assert_eq!(target.read(2), zero);
                }
                let detached = pager.remove(added.descriptor).unwrap();
                assert_eq!(detached.uffd.is_nonblocking().unwrap(), non_blocking);
                // The next owner goes on.
                let next = Pager::new().unwrap();
                next.add(detached.uffd, [region(&memory, source.clone())]).unwrap();
                assert_eq!(target.read(3), byte(3));
                next.finish(|_| {}).unwrap();
                assert_eq!(target.read(1), byte(1));
                target.process.kill();
            }
        }
    });
}

/// The text of a refused region: which part, and why.
#[track_caller]
fn refused_part(error: Error, errno: Errno) -> (Range<usize>, Reason) {
    let text = error.to_string();
    let Error::Register { error: userfaultfd::Error::Refused { refusal, errno: found, .. }, .. } = error
    else {
        panic!("no reason: {error:?}")
    };
    assert_eq!(found, errno);
    assert!(text.contains(&refusal.to_string()), "{text}");
    (refusal.range(), refusal.reason())
}

#[test]
fn refused_region_of_another_process_has_a_reason() {
    require!();
    child::run_well(test_name!(), || {
        // The process has another userfaultfd on the last page, and nothing behind the third.
        let memory = Memory::anonymous(6);
        let (here, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let (own, other) = (uffd(FeatureFlags::empty()), uffd(FeatureFlags::empty()));
            other.register(memory.at(5), page()).unwrap();
            memory.unmap(3, 1);
            child::send_fd(&there, own.as_fd());
            let _until_killed = (&there).read(&mut [0]);
        });
        let start = memory.start().expose_provenance();
        let part = |pages: Range<usize>| {
            let source = Pages::new(page());
            let len = pages.len() * page();
            Region::new(start + pages.start * page(), len, source).fault_around(FaultAround::Page)
        };
        let held = (memory.range(5, 1), Reason::OtherDescriptor { has: RegisterMode::MISSING });
        let descriptor = Uffd::from(child::receive_fd(&here));
        let pager = Pager::new().unwrap();
        let pager::Refused { uffd: mut descriptor, error } = pager.add(descriptor, [part(4..6)]).unwrap_err();
        // It isn't known whose memory it is.
        let is_bare = |error: &Error| {
            matches!(error, Error::Register { error: userfaultfd::Error::SystemError(Errno::EBUSY), .. })
        };
        assert!(is_bare(&error), "{error:?}");

        descriptor.set_process(Pid::from_raw(process.pid()));
        let pager::Refused { uffd: descriptor, error } = pager.add(descriptor, [part(4..6)]).unwrap_err();
        assert_eq!(refused_part(error, Errno::EBUSY), held);
        drop(pager.add(descriptor.try_clone().unwrap(), [part(0..2)]).unwrap());

        // A pidfd says so, too.
        let pager = Pager::new().unwrap();
        let unnamed = Uffd::from(OwnedFd::from(descriptor));
        let added = pager.add(unnamed, [part(0..2)]).unwrap();
        let unwatched = pager.add_region(added.descriptor, part(4..6)).unwrap_err();
        assert!(is_bare(&unwatched), "{unwatched:?}");
        pager.watch(added.descriptor, process.pidfd()).unwrap();
        assert_eq!(
            refused_part(pager.add_region(added.descriptor, part(4..6)).unwrap_err(), Errno::EBUSY),
            held
        );
        let unmapped = pager.add_region(added.descriptor, part(3..4)).unwrap_err();
        assert_eq!(refused_part(unmapped, Errno::EINVAL), (memory.range(3, 1), Reason::NotMapped));
        process.kill();
    });
}

#[test]
fn descriptor_may_be_inherited() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(3);
        let own = uffd(FeatureFlags::empty());
        let (mut here, mut there) = UnixStream::pair().unwrap();
        // The child serves its parent.
        let server = child::fork(|| {
            drop(std::mem::replace(&mut here, there.try_clone().unwrap()));
            let pager = Pager::new().unwrap();
            let copy = own.try_clone().unwrap();
            pager.add(copy, [region(&memory, Pages::new(page()))]).unwrap();
            there.write_all(&[1]).unwrap();
            // Until the parent has what it wants.
            assert_eq!(there.read(&mut [0]).unwrap(), 1);
            pager.finish(|_| {}).unwrap();
        });
        here.read_exact(&mut [0]).unwrap();
        assert_eq!([memory.read(1), memory.read(0)], [byte(1), byte(0)]);
        here.write_all(&[1]).unwrap();
        server.succeed();
        assert_eq!(memory.read(2), byte(2));
    });
}

#[test]
fn program_that_was_executed_is_served() {
    require!();
    // The stage of the program that is executed: it makes memory, and sends where that is.
    if let Some(path) = child::stage() {
        let memory = Memory::anonymous(3);
        let own = uffd(FeatureFlags::empty());
        let mut socket = UnixStream::connect(path).unwrap();
        child::send_fd(&socket, own.as_fd());
        drop(own);
        socket.write_all(&(memory.start().addr() as u64).to_ne_bytes()).unwrap();
        assert_eq!(socket.read(&mut [0]).unwrap(), 1, "it is served");
        assert_eq!([memory.read(2), memory.read(0), memory.read(1)], [byte(2), byte(0), byte(1)]);
        return;
    }
    child::run_well(test_name!(), || {
        let path = std::env::temp_dir().join(format!("userfaultfd-pager-{}", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let target = child::fork(|| child::execute(test_name!(), path.to_str().unwrap()));
        let (mut socket, _) = listener.accept().unwrap();
        std::fs::remove_file(path).unwrap();
        let descriptor = Uffd::from(child::receive_fd(&socket));
        let mut start = [0; 8];
        socket.read_exact(&mut start).unwrap();
        let pager = Pager::new().unwrap();
        let source = Pages::new(page());
        let region = userfaultfd::pager::Region::new(u64::from_ne_bytes(start) as usize, 3 * page(), source);
        pager.add(descriptor, [region]).unwrap();
        socket.write_all(&[1]).unwrap();
        target.succeed();
    });
}

#[test]
fn descriptors_and_regions_come_and_go_under_load() {
    require!();
    child::run_well(test_name!(), || {
        const TARGETS: usize = 4;
        let pager = Pager::builder().threads(2).build().unwrap();
        let memories: Vec<_> = (0..TARGETS).map(|_| Memory::anonymous(8)).collect();
        // All are forked before there are threads.
        let targets: Vec<_> =
            memories.iter().map(|memory| Target::start(memory, FeatureFlags::empty(), true)).collect();
        std::thread::scope(|scope| {
            for ((mut target, descriptor), memory) in targets.into_iter().zip(&memories) {
                let pager = &pager;
                scope.spawn(move || {
                    let source = Pages::new(page());
                    let part = |first: usize, pages: usize| {
                        let start = memory.at(first).addr();
                        userfaultfd::pager::Region::new(start, pages * page(), source.clone())
                            .offset((first * page()) as u64)
                            .fault_around(userfaultfd::pager::FaultAround::Page)
                    };
                    let mut descriptor = Some(descriptor);
                    for round in 0..5_u8 {
                        let added = pager.add(descriptor.take().unwrap(), [part(0, 2), part(4, 2)]).unwrap();
                        assert_eq!(target.read(round % 2), byte((round % 2).into()));
                        assert_eq!(target.read(4), byte(4));
                        // What belongs to no region waits until there is one.
                        target.ask(if round == 0 { 6 } else { 2 });
                        let third = pager.add_region(added.descriptor, part(2, 2)).unwrap();
                        let fourth = pager.add_region(added.descriptor, part(6, 2)).unwrap();
                        assert_eq!(target.answer(), byte(if round == 0 { 6 } else { 2 }));
                        assert!(pager.missing(third).is_ok());
                        pager.finish_region(fourth, |_| {}).unwrap();
                        assert!(matches!(pager.missing(fourth), Err(Error::NotServed)));
                        assert_eq!(target.read(7), byte(7));
                        descriptor = Some(pager.remove(added.descriptor).unwrap().uffd);
                    }
                    target.process.kill();
                });
            }
        });
        assert_eq!(pager.descriptors(), []);
        let statistics = pager.statistics();
        assert_eq!((statistics.poisoned, statistics.source_errors), (0, 0), "{statistics}");
    });
}

#[test]
fn target_that_is_killed_is_dropped_with_next_fill() {
    require!();
    child::run_well(test_name!(), || {
        let (memory, problems) = (Memory::anonymous(3), Problems::default());
        let (one, descriptor) = Target::start(&memory, FeatureFlags::empty(), true);
        let (mut other, served_on) = Target::start(&memory, FeatureFlags::empty(), true);
        let pager = Pager::builder().on_problem(problems.callback()).build().unwrap();
        let gone = pager.add(descriptor, [region(&memory, Pages::new(page()))]).unwrap();
        let stays = pager.add(served_on, [region(&memory, Pages::new(page()))]).unwrap();
        assert_eq!(other.read(1), byte(1));
        one.process.kill();
        one.process.wait();
        // Nothing tells of it until a page is filled.
        pager.finish_region(gone.regions[0], |_| {}).unwrap_err();
        wait_until(|| problems.count("TargetGone") == 1);
        assert_eq!(pager.descriptors(), [stays.descriptor]);
        assert!(matches!(pager.remove(gone.descriptor), Err(Error::NotServed)));
        assert_eq!(other.read(2), byte(2));
        other.process.kill();
        other.process.wait();
        drop(pager);
    });
}

/// What a second may become while other programs keep all CPUs.
const A_LOADED_SECOND: Duration = Duration::from_secs(10);

#[test]
fn process_that_ends_quietly_is_noticed() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        for (touched, forks) in [(0, false), (2, false), (2, true), (4, false)] {
            let features = if forks { FeatureFlags::EVENT_FORK } else { FeatureFlags::empty() };
            if !has_features(test_name!(), features) {
                continue;
            }
            let (mut target, descriptor) = Target::start(&memory, features, true);
            let problems = Problems::default();
            let pager = Pager::builder().on_problem(problems.callback()).build().unwrap();
            pager.add(descriptor, [region(&memory, Pages::new(page()))]).unwrap();
            (0..touched).for_each(|page| assert_eq!(target.read(page), byte(page.into())));
            // Nothing of it is in flight.
            target.process.kill();
            target.process.wait();
            let start = Instant::now();
            pager.join();
            let time = start.elapsed();
            assert!(time < A_LOADED_SECOND, "{time:?}");
            assert_eq!(problems.count("TargetGone"), 1, "a program that ends now has seen it");
            assert_eq!(pager.descriptors(), []);
            let figures = || {
                let statistics = pager.statistics();
                (statistics.present_pages, statistics.missing_pages)
            };
            scene::eventually(figures, (touched.into(), u64::from(4 - touched)));
            wait_until(|| (0..64).all(|fd| !crate::support::proc::is_userfaultfd(fd)));
        }
    });
}

#[test]
fn forked_childs_descriptor_is_closed_on_exec() {
    require!(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(2);
        // One that is inherited, as its child's would be.
        let mut builder = UffdBuilder::new();
        let uffd = builder.close_on_exec(false).require_features(FeatureFlags::EVENT_FORK).create().unwrap();
        let pager = Pager::new().unwrap();
        let added = scene::serve(&pager, uffd, region(&memory, Pages::new(page())));
        let (mut here, there) = UnixStream::pair().unwrap();
        let forked = child::fork(|| {
            assert_eq!(memory.read(1), byte(1));
            assert_eq!((&there).read(&mut [0]).unwrap(), 1);
        });
        wait_until(|| pager.descriptors().len() == 2);
        let userfaultfds = (0..64).filter(|fd| crate::support::proc::is_userfaultfd(*fd));
        let is_inherited = |fd: &i32| {
            let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_CLOEXEC == 0
        };
        // The parent's, as it was handed in.
        assert_eq!(userfaultfds.filter(is_inherited).count(), 1);
        here.write_all(&[1]).unwrap();
        forked.succeed();
        drop(pager.remove(added.descriptor));
    });
}

#[test]
fn descriptor_of_ended_process_is_closed_unfilled() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(2);
        let (target, descriptor) = Target::start(&memory, FeatureFlags::empty(), true);
        let fails = |_: u64, _: &mut [u8]| Err(std::io::ErrorKind::NotFound.into());
        let pager = Pager::new().unwrap();
        pager.add(descriptor, [region(&memory, fails)]).unwrap();
        let open = || (0..1024).filter(|fd| crate::support::proc::is_userfaultfd(*fd)).count();
        assert_eq!(open(), 1);
        target.process.kill();
        assert_ne!(target.process.wait(), 0);
        // By the pager itself, if it has noticed the end by now.
        drop(pager);
        assert_eq!(open(), 0);
    });
}
