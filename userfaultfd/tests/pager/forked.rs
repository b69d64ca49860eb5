//! What a fork's child inherits is the parent's: it can neither use it nor harm it.

use std::fs;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Barrier};
use std::thread;

use userfaultfd::pager::{BytesSource, Error, FaultAround, FillOrder, Pager, Refused, Region};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::scene::{Pages, byte, check, region, serve, served};
use crate::support::child;
use crate::support::mapping::Mapping;
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{page, require, test_name, uffd};

const PAGES: usize = 16;

/// How many userfaultfds, epoll instances and eventfds this process has open.
fn open() -> usize {
    let is_anonymous = |fd: &i32| {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        link.is_ok_and(|link| link.to_string_lossy().starts_with("anon_inode:"))
    };
    (0..64).filter(is_anonymous).count()
}

/// Memory at an address where this process has none.
fn map_at(address: *mut u8) -> Mapping {
    let len = PAGES * page();
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: without MAP_FIXED nothing is replaced.
    let start = unsafe { libc::mmap(address.cast(), len, protection, flags, -1, 0) };
    assert_eq!(start, address.cast());
    Mapping { start, len }
}

fn lazy(pager: Option<&Arc<Pager>>) -> LazyMemory {
    let builder = LazyMemory::builder(Pages::new(page())).len(PAGES * page()).fault_around(FaultAround::Page);
    match pager {
        Some(pager) => builder.pager(pager),
        None => builder,
    }
    .build()
    .unwrap()
}

fn sigbus() -> LazyMemory {
    let bytes: Vec<u8> = (0..PAGES).flat_map(|number| vec![byte(number); page()]).collect();
    LazyMemory::sigbus(BytesSource::new(bytes)).fault_around(FaultAround::Page).build().unwrap()
}

#[test]
fn lazy_memory_in_child_is_refused_and_stays_parents() {
    require!();
    child::run_well(test_name!(), || {
        panic::set_hook(Box::new(|_| {}));
        let shared = Arc::new(Pager::new().unwrap());
        for memory in [lazy(None), lazy(Some(&shared)), sigbus()] {
            assert_eq!(memory[0], byte(0));
            let address = memory.as_ptr().cast_mut();
            let (mut memory, mut pager) = (Some(memory), Some(Arc::clone(&shared)));
            child::fork(|| {
                // Something of the child's own, where the memory is in the parent.
                let own = map_at(address);
                let word = own.start.cast::<u8>().wrapping_add(5 * page());
                // SAFETY: it is mapped, and nobody else's.
                unsafe { word.write_volatile(77) };
                let inherited = memory.take().unwrap();
                assert!(panic::catch_unwind(AssertUnwindSafe(|| inherited[5 * page()])).is_err());
                assert!(matches!(inherited.fill(|_| {}), Err(Error::OtherProcess)));
                assert!(matches!(inherited.missing(), Err(Error::OtherProcess)));
                assert!(matches!(inherited.background(FillOrder::Ascending), Err(Error::OtherProcess)));
                assert!(matches!(inherited.record(), Err(Error::OtherProcess)));
                // It makes memory of its own, before and after.
                let new = [lazy(None), sigbus()];
                drop(inherited);
                assert!(new.iter().all(|memory| memory[3 * page()] == byte(3)));
                assert_eq!(sigbus()[2 * page()], byte(2));
                // SAFETY: as above, unless it was taken away, which would be SIGSEGV.
                assert_eq!(unsafe { word.read_volatile() }, 77);
                drop(new);
                drop(pager.take());
            })
            .succeed();
            let memory = memory.unwrap();
            for page in 1..PAGES {
                assert_eq!(memory[page * crate::support::page()], byte(page));
            }
            assert_eq!(memory.statistics().poisoned, 0);
        }
    });
}

#[test]
fn child_drop_closes_its_own_descriptors() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(PAGES);
        let (pager, _, _) = served(&memory);
        let mut things = Some((pager, lazy(None), sigbus()));
        let before = open();
        assert_eq!(before, 13, "three userfaultfds, and two pagers' five others");
        child::fork(|| {
            drop(things.take());
            assert_eq!(open(), 0);
        })
        .succeed();
        assert_eq!(open(), before);
        let (pager, lazy, sigbus) = things.as_ref().unwrap();
        check(&memory, 7, 7);
        assert_eq!((lazy[8 * page()], sigbus[9 * page()]), (byte(8), byte(9)));
        assert_eq!(pager.statistics().poisoned, 0);
        drop(things);
        assert_eq!(open(), 0);
    });
}

/// Memory that threads of the parent had is used again by threads of the child.
#[test]
fn child_drops_finished_background_safely() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(None);
        let background = memory.background(FillOrder::Ascending).unwrap();
        let is_of_background = |task: io::Result<fs::DirEntry>| {
            let name = fs::read_to_string(task.unwrap().path().join("comm"));
            name.is_ok_and(|name| name == "uffd-background\n")
        };
        wait_until(|| {
            background.is_finished() && !fs::read_dir("/proc/self/task").unwrap().any(is_of_background)
        });
        let mut background = Some(background);
        child::fork(|| {
            let gate = Arc::new(Barrier::new(9));
            let wait = |gate: &Arc<Barrier>| {
                let gate = Arc::clone(gate);
                move || {
                    gate.wait();
                }
            };
            let threads: Vec<_> = (0..8).map(|_| thread::spawn(wait(&gate))).collect();
            drop(background.take());
            gate.wait();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        })
        .succeed();
    });
}

#[test]
fn child_drops_recorder_and_replay_that_stay_parents() {
    require!();
    child::run_well(test_name!(), || {
        let shared = Arc::new(Pager::new().unwrap());
        let number =
            |memory: &LazyMemory, page: usize| assert_eq!(memory[page * crate::support::page()], byte(page));
        let makes: [&dyn Fn() -> LazyMemory; 3] = [&sigbus, &|| lazy(None), &|| lazy(Some(&shared))];
        for make in makes {
            let memory = make();
            let mut recorder = Some(memory.record().unwrap());
            number(&memory, 3);
            child::fork(|| drop(recorder.take())).succeed();
            child::fork(|| assert!(recorder.take().unwrap().finish().pages().all(|page| page == 3)))
                .succeed();
            // The parent's records on.
            number(&memory, 5);
            let set = recorder.unwrap().finish();
            assert!(set.pages().eq([3, 5]), "{set:?}");

            let memory = make();
            let mut replay = Some(memory.replay(&set).unwrap());
            child::fork(|| drop(replay.take())).succeed();
            child::fork(|| {
                let mut inherited = replay.take().unwrap();
                let _none = inherited.wait();
                let _figures = inherited.report();
            })
            .succeed();
            let replay = replay.as_mut().unwrap();
            assert_eq!(replay.wait().failed, []);
            number(&memory, 9);
            assert_eq!(replay.report().faults_outside, 1, "faults are still counted");
            (0..PAGES).for_each(|page| number(&memory, page));
            assert_eq!(memory.statistics().poisoned, 0);
        }
    });
}

#[test]
fn pager_in_a_child_is_refused_and_stays_the_parents() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(PAGES);
        let (pager, added, _) = served(&memory);
        check(&memory, 0, 0);
        let mut pager = Some(pager);
        child::fork(|| {
            let inherited = pager.take().unwrap();
            let not_served = |result: Result<(), Error>| assert!(matches!(result, Err(Error::OtherProcess)));
            let (descriptor, first) = (added.descriptor, added.regions[0]);
            not_served(inherited.finish(|_| {}));
            not_served(inherited.finish_region(first, |_| {}));
            not_served(inherited.remove_region(first));
            not_served(inherited.remove(descriptor).map(drop));
            not_served(inherited.missing(first).map(drop));
            not_served(inherited.background(first, FillOrder::Ascending).map(drop));
            not_served(inherited.record(first).map(drop));
            let own = Memory::anonymous(2);
            let new = || Region::new(own.start().expose_provenance(), own.len(), Pages::new(page()));
            not_served(inherited.add_region(descriptor, new()).map(drop));
            let Refused { uffd, error } = inherited.add(uffd(FeatureFlags::empty()), [new()]).unwrap_err();
            not_served(Err(error));
            assert_eq!(inherited.descriptors(), []);
            inherited.join();
            // The child's own.
            let other = Pager::new().unwrap();
            serve(&other, uffd, new());
            check(&own, 1, 1);
            assert!(inherited.detach().is_empty());
            drop(other);
        })
        .succeed();
        let pager = pager.as_ref().unwrap();
        (0..PAGES).for_each(|page| check(&memory, page, page));
        assert_eq!((pager.statistics().poisoned, pager.descriptors().len()), (0, 1));
    });
}

/// Locks that another thread holds when the process forks are held for ever in the child.
#[test]
fn child_of_busy_pager_ends_without_waiting() {
    require!();
    child::run_well(test_name!(), || {
        for round in 0..20 {
            let memory = Memory::anonymous(64);
            let pager = Pager::builder().threads(2).build().unwrap();
            let source = Pages::new(page());
            let added = serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source));
            let background = pager.background(added.regions[0], FillOrder::Ascending).unwrap();
            let mut things = Some((background, pager));
            std::thread::scope(|scope| {
                let reader =
                    scope.spawn(|| (0..64).for_each(|page| assert_eq!(memory.read(page), byte(page))));
                child::fork(|| {
                    let (background, pager) = things.take().unwrap();
                    background.pause();
                    if round % 2 == 0 {
                        assert!(background.is_finished());
                        background.wait();
                    } else {
                        drop(background);
                    }
                    drop(pager);
                })
                .succeed();
                reader.join().unwrap();
            });
            let (background, pager) = things.unwrap();
            assert_eq!(background.wait().done, memory.len() as u64);
            assert_eq!(pager.statistics().poisoned, 0);
        }
    });
}

#[test]
fn grandchild_makes_its_own_pager() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(None);
        let number =
            |memory: &LazyMemory, page: usize| assert_eq!(memory[page * crate::support::page()], byte(page));
        child::fork(|| {
            let own = lazy(None);
            number(&own, 3);
            child::fork(|| {
                let its = lazy(None);
                number(&its, 4);
                drop(its);
                assert!(panic::catch_unwind(AssertUnwindSafe(|| own[0])).is_err());
                assert!(panic::catch_unwind(AssertUnwindSafe(|| memory[0])).is_err());
            })
            .succeed();
            number(&own, 5);
        })
        .succeed();
        number(&memory, 6);
    });
}
