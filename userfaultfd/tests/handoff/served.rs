//! Memory that is handed over as it should be.

use std::time::Duration;

use userfaultfd::handoff::{Description, Dialect, Handoff, MemoryRegion, Message, ServeError};
use userfaultfd::pager::{FillOrder, OnEnd, PageData, Pager};
use userfaultfd::{FeatureFlags, Uffd};

use crate::monitor::{HALF, Image, Monitor, PAGES, Style, byte, descriptors, listener, regions, shown};
use crate::support::memory::Kind;
use crate::support::proc::wait_until;
use crate::support::{child, mapping, page, require, test_name};

/// All that hand a userfaultfd over.
fn styles() -> Vec<Style> {
    let of = |dialect| Style::new(dialect);
    vec![
        of(Dialect::Firecracker),
        Style { dialect: Dialect::E2b, kind: Kind::Memfd },
        of(Dialect::Nydus),
        of(Dialect::CloudHypervisor),
        Style { dialect: Dialect::CloudHypervisorBackend, kind: Kind::Memfd },
        of(Dialect::CodeSandbox),
        of(Dialect::Criu),
    ]
}

#[test]
fn memory_is_served_in_each_dialect() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::MISSING_SHMEM);
    child::run_well(test_name!(), || {
        let mut before = None;
        for style in styles() {
            let (mut listener, path) = listener();
            if !style.dialect.is_recognised() {
                listener = listener
                    .dialects([style.dialect])
                    .memory(|_| Ok((mapping::memfd(libc::MFD_CLOEXEC, PAGES), (PAGES * page()) as u64)));
            }
            let mut monitor = Monitor::start(style, path);
            let mut handoff = listener.accept().unwrap();
            drop(listener);
            assert_eq!(handoff.dialect, style.dialect);
            let pid = monitor.process.pid() as u32;
            assert_eq!(handoff.process.credentials.pid, Some(pid));
            assert_eq!(handoff.process.has_ended(), Some(false));
            let files = match style.dialect {
                Dialect::E2b | Dialect::CodeSandbox => 1,
                Dialect::CloudHypervisorBackend => 2,
                _ => 0,
            };
            assert_eq!(handoff.memfds.len(), files);
            if style.dialect == Dialect::Criu {
                assert_eq!((handoff.pid, handoff.regions.len()), (Some(pid), 0));
                handoff.regions = regions(monitor.start);
            }
            assert!(format!("{handoff:?}").contains("userfaultfd"));
            let pager = Pager::new().unwrap();
            let mut served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
            if style.dialect == Dialect::CloudHypervisor {
                monitor.add_region();
                let received = served.receive(Duration::from_secs(20)).unwrap().unwrap();
                let Message::AddRegions(mut added) = received.message else { panic!("{received:?}") };
                served.add_region(added.remove(0), Image(PAGES)).unwrap();
                assert_eq!(monitor.answer(), 1, "the confirmation");
            }
            for page in [0, PAGES - 1, HALF, HALF - 1] {
                assert_eq!(monitor.read(page), shown(page), "page {page} of {style:?}");
            }
            // A thread goes on before its page is counted.
            wait_until(|| served.statistics().fills >= 4);
            let statistics = served.statistics();
            assert!(statistics.faults() >= 2, "{statistics}");
            assert_eq!(statistics.missing_pages + statistics.present_pages, PAGES as u64);
            if style.kind == Kind::Anonymous && style.dialect != Dialect::CodeSandbox {
                monitor.remove(0);
                assert_eq!(monitor.read(0), 0, "{style:?}");
            }
            assert_eq!(served.regions().count(), 2);
            assert!(served.is_served());
            monitor.exit();
            served.wait();
            assert!(!served.is_served() && served.missing().is_err());
            assert_eq!(served.process().has_ended(), Some(true));
            pager.join();
            drop((served, pager));
            let now = descriptors();
            assert_eq!(*before.get_or_insert(now), now, "descriptors after {style:?}");
        }
    });
}

#[test]
fn sixty_four_processes_share_one_pager() {
    require!();
    child::run_well(test_name!(), || {
        const PROCESSES: usize = 64;
        let (mut listener, path) = listener();
        let before = descriptors();
        let mut monitors: Vec<_> =
            (0..PROCESSES).map(|_| Monitor::fork(Style::new(Dialect::Firecracker), path.clone())).collect();
        let pager = Pager::builder().threads(2).build().unwrap();
        monitors.iter_mut().for_each(Monitor::go);
        let served: Vec<_> = (0..PROCESSES)
            .map(|_| pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap())
            .collect();
        assert_eq!((pager.descriptors().len(), listener.pending()), (PROCESSES, 0));
        for page in 0..PAGES {
            monitors.iter_mut().for_each(|monitor| monitor.ask(page as u8));
            monitors.iter_mut().for_each(|monitor| assert_eq!(monitor.answer(), shown(page)));
        }
        for served in &served {
            wait_until(|| served.statistics().fills == PAGES as u64);
            let statistics = served.statistics();
            assert_eq!((statistics.fills, statistics.missing_pages), (PAGES as u64, 0), "{statistics}");
            assert_eq!(statistics.bytes, (PAGES * page()) as u64);
        }
        assert_eq!(pager.statistics().fills, (PROCESSES * PAGES) as u64);
        let (exit, kill) = monitors.split_at_mut(PROCESSES / 2);
        kill.iter().for_each(|monitor| monitor.process.kill());
        served
            .iter()
            .filter(|served| kill.iter().any(|monitor| is_of(served, monitor)))
            .for_each(userfaultfd::handoff::ServedProcess::wait);
        assert_eq!(exit.iter_mut().map(|monitor| monitor.read(0)).max(), Some(shown(0)));
        monitors.truncate(PROCESSES / 2);
        monitors.into_iter().for_each(Monitor::exit);
        pager.join();
        drop((served, pager));
        assert_eq!(descriptors(), before);
    });
}

fn is_of(served: &userfaultfd::handoff::ServedProcess, monitor: &Monitor) -> bool {
    served.process().credentials.pid == Some(monitor.process.pid() as u32)
}

#[test]
fn detached_memory_goes_on_in_another_pager() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let mut monitor = Monitor::start(Style::new(Dialect::Firecracker), path);
        let mut handoff = listener.accept().unwrap();
        handoff.set_on_end(OnEnd::Leave);
        let pager = Pager::new().unwrap();
        // Another source than the next pager's.
        let served = pager.serve(handoff, |_| {
            |_: u64, bytes: &mut [u8]| {
                bytes.fill(200);
                Ok(PageData::Data)
            }
        });
        let served = served.unwrap();
        assert_eq!(monitor.read(1), 200);
        monitor.remove(1);
        let missing: usize = served.missing().unwrap().iter().map(|missing| missing.len).sum();
        let handoff = served.detach().unwrap();
        assert_eq!(handoff.on_end(), OnEnd::Leave);
        drop(pager);
        // Written down, and read by a process that has the descriptors.
        let text = serde_json::to_string(&handoff.description()).unwrap();
        let parts = handoff.into_parts();
        let description: Description = serde_json::from_str(&text).unwrap();
        let listed: usize = description.missing.iter().flatten().map(|missing| missing.len).sum();
        assert_eq!(listed, missing);
        let mut handoff =
            Handoff::from_description(description, parts.userfaultfd, parts.memfds, parts.process.pidfd);
        handoff.stream = parts.stream;
        let pager = Pager::new().unwrap();
        let served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        assert_eq!([monitor.read(1), monitor.read(5)], [0, shown(5)], "removed, and missing");
        served.finish(|_| {}).unwrap();
        assert_eq!(pager.descriptors(), []);
        drop(pager);
        assert_eq!(monitor.read(7), shown(7));
        monitor.exit();
    });
}

#[test]
fn working_set_covers_all_regions_from_the_first_fault() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let fork = || Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let (mut one, mut other) = (fork(), fork());
        let pager = Pager::new().unwrap();
        one.go();
        // It waits for its page before it is served.
        one.ask(6);
        let handoff = listener.accept().unwrap();
        wait_until(|| crate::support::proc::fdinfo(&handoff.userfaultfd).pending == 1);
        let (served, recorder) = pager.serve_recorded(handoff, |_| Image(PAGES)).unwrap();
        assert_eq!([one.answer(), one.read(1), one.read(4)], [shown(6), shown(1), shown(4)]);
        assert!(served.record().is_err(), "it is recorded already");
        let set = recorder.finish().unwrap();
        assert_eq!((set.region_pages(), set.len()), (PAGES, 3));
        assert_eq!(set.pages().collect::<Vec<_>>(), [1, 6, 4]);
        other.go();
        let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
        let mut replay = served.replay(&set).unwrap();
        replay.wait();
        let report = replay.report();
        assert_eq!((report.set_pages, report.faults_outside), (3, 0));
        // With the page between 4 and 6, in one region, where that is little.
        let filled = if page() <= 32 << 10 { 4 } else { 3 };
        assert_eq!(served.statistics().present_pages as usize + report.sampled, filled, "{report}");
        assert_eq!([other.read(6), other.read(1), other.read(4)], [shown(6), shown(1), shown(4)]);
        let wrong = set.with_region_pages(PAGES + 1);
        drop(replay);
        assert!(served.replay(&wrong).is_err());
        for fill in served.background(FillOrder::Ascending).unwrap() {
            assert!(fill.wait().failed.is_empty());
        }
        assert_eq!(served.statistics().missing_pages, 0);
        one.exit();
        other.exit();
        pager.join();
    });
}

#[test]
fn shorter_source_is_refused_before_serving() {
    require!();
    child::run_well(test_name!(), || {
        let (mut listener, path) = listener();
        let fork = || Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let (mut killed, mut left) = (fork(), fork());
        let pager = Pager::new().unwrap();
        killed.go();
        let unserved = pager.serve(listener.accept().unwrap(), |_| Image(PAGES - 1)).unwrap_err();
        let error = &unserved.error;
        assert!(
            matches!(error, ServeError::Pager(userfaultfd::pager::Error::BeyondSource { .. })),
            "{error:?}"
        );
        assert!(unserved.to_string().contains(&killed.process.pid().to_string()), "{unserved}");
        drop(unserved);
        assert_eq!(killed.process.wait(), libc::SIGKILL);
        left.go();
        let mut unserved = pager.serve(listener.accept().unwrap(), |_| Image(PAGES - 1)).unwrap_err();
        assert_eq!(pager.descriptors(), []);
        // With the right image it goes on.
        unserved.handoff.set_on_end(OnEnd::Leave);
        let served = pager.serve(*unserved.handoff, |_| Image(PAGES)).unwrap();
        assert_eq!((left.read(0), served.on_end()), (shown(0), OnEnd::Leave));
        left.exit();
        pager.join();
    });
}

#[test]
fn memfd_is_filled_through_the_file_where_that_is_reported() {
    require!(FeatureFlags::MINOR_SHMEM);
    child::run_well(test_name!(), || {
        let memory = crate::support::memory::Memory::new(Kind::Memfd, PAGES);
        let (mut listener, path) = listener();
        let (socket, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let start = memory.start().expose_provenance();
        let process = child::fork(|| {
            let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let uffd: Uffd = crate::support::uffd(FeatureFlags::MINOR_SHMEM);
            uffd.register(memory.start(), memory.len()).unwrap();
            // The offset in the image is that in the file, too.
            let region = MemoryRegion::new(start, memory.len(), 0);
            let offer = userfaultfd::handoff::Offer::new(&uffd, [region]).file(memory.file());
            userfaultfd::handoff::send(Dialect::E2b, &stream, &offer).unwrap();
            assert_eq!((memory.read(0), memory.read(5)), (byte(0), byte(5)));
            std::io::Write::write_all(&mut &there, &[1]).unwrap();
            std::io::Read::read(&mut &there, &mut [0]).unwrap();
        });
        let pager = Pager::new().unwrap();
        let handoff = listener.accept().unwrap();
        let served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        std::io::Read::read_exact(&mut &socket, &mut [0]).unwrap();
        wait_until(|| served.statistics().continues >= 2);
        let statistics = served.statistics();
        assert!(statistics.fills == 0, "{statistics}");
        std::io::Write::write_all(&mut &socket, &[1]).unwrap();
        process.succeed();
        served.wait();
    });
}
