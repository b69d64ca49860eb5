//! Memory whose removed pages show the source's content again: caches that drop pages themselves.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;

use userfaultfd::pager::{Added, FaultAround, FillOrder, OnRemoval, PageData, Pager, Region, RetryPolicy};
use userfaultfd::{FeatureFlags, MoveMode, RegisterMode};

use crate::reader::Seen;
use crate::scene::{Pages, can_poison, check, eventually, memory, region, serve};
use crate::support::memory::{self as kinds, Kind, Memory};
use crate::support::random::Random;
use crate::support::{child, page, require, test_name, uffd};

/// How memory is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    kind: Kind,
    is_minor: bool,
}

const WAYS: [Way; 7] = [
    Way { kind: Kind::Anonymous, is_minor: false },
    Way { kind: Kind::PrivateHugetlb, is_minor: false },
    Way { kind: Kind::Memfd, is_minor: false },
    Way { kind: Kind::SharedAnonymous, is_minor: false },
    Way { kind: Kind::Hugetlb, is_minor: false },
    Way { kind: Kind::Memfd, is_minor: true },
    Way { kind: Kind::Hugetlb, is_minor: true },
];

/// Served memory of which removed pages are loaded again.
struct Cache {
    way: Way,
    // Dropped first: it has the file open, whose huge pages are another test's once the memory is dropped.
    pager: Pager,
    memory: Memory,
    source: Pages,
    added: Added,
}

fn reloads(way: Way, memory: &Memory, source: Pages) -> Region {
    let region = region(memory, source).on_removal(OnRemoval::Reload);
    if way.is_minor { region.minor(memory.file().try_clone().unwrap().into(), 0) } else { region }
}

impl Cache {
    fn new(test: &str, way: Way, pages: usize, features: FeatureFlags) -> Option<Self> {
        let mut modes = RegisterMode::MISSING;
        modes.set(RegisterMode::MINOR, way.is_minor);
        let memory = kinds::each_of(test, &[way.kind], modes, pages).next()?;
        let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
        let added = serve(&pager, uffd(features), reloads(way, &memory, source.clone()));
        Some(Self { way, pager, memory, source, added })
    }

    /// Caches of each kind.
    fn each(test: &str, pages: usize, features: FeatureFlags) -> impl Iterator<Item = Self> {
        WAYS.into_iter().filter_map(move |way| Self::new(test, way, pages, features))
    }

    fn is_shared(&self) -> bool {
        self.way.kind.is_shared()
    }

    /// Removes pages themselves. Of private hugetlb memory since Linux 5.18.
    fn remove(&self, first: usize, pages: usize) -> bool {
        let advice = if self.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        let removed = self.memory.advise(first, pages, advice);
        assert!(removed.is_ok() || self.way.kind.is_hugetlb(), "{:?}: {removed:?}", self.way);
        removed.is_ok()
    }

    fn reads_of(&self, page: usize) -> usize {
        self.source.reads().get(&page).copied().unwrap_or(0)
    }
}

#[test]
fn removed_page_shows_the_source_again_told_or_not() {
    require!(FeatureFlags::EVENT_REMOVE);
    for features in [FeatureFlags::EVENT_REMOVE, FeatureFlags::empty()] {
        for cache in Cache::each(test_name!(), 3, features) {
            let memory = &cache.memory;
            for round in 1..=3 {
                check(memory, 1, 1);
                assert_eq!(cache.reads_of(1), round, "{:?}", cache.way);
                memory.write(1, 99);
                assert_eq!(memory.read(1), 99);
                if !cache.remove(1, 1) {
                    break;
                }
                if !features.is_empty() {
                    let missing = cache.pager.missing(cache.added.regions[0]).unwrap();
                    let offsets: Vec<_> = missing.iter().map(|part| (part.len, part.offset)).collect();
                    assert_eq!(offsets, [(memory.len(), Some(0))], "{:?}", cache.way);
                }
            }
            check(memory, 0, 0);
            check(memory, 1, 1);
            assert_eq!((cache.reads_of(0), cache.reads_of(2)), (1, 0));
        }
    }
}

#[test]
fn hole_in_the_file_shows_the_source_again() {
    require!(FeatureFlags::MISSING_SHMEM);
    for way in WAYS.into_iter().filter(|way| matches!(way.kind, Kind::Memfd | Kind::Hugetlb)) {
        let Some(cache) = Cache::new(test_name!(), way, 3, FeatureFlags::empty()) else { continue };
        for _ in 0..2 {
            check(&cache.memory, 1, 1);
            cache.memory.punch(1, 1);
        }
        check(&cache.memory, 1, 1);
        assert_eq!(cache.reads_of(1), 3, "{way:?}");
    }
}

#[test]
fn page_that_the_file_has_stays_what_it_is() {
    require!(FeatureFlags::EVENT_REMOVE);
    let shared = WAYS.into_iter().filter(|way| matches!(way.kind, Kind::Memfd | Kind::Hugetlb));
    for way in shared {
        for features in [FeatureFlags::EVENT_REMOVE, FeatureFlags::empty()] {
            let Some(cache) = Cache::new(test_name!(), way, 5, features) else { continue };
            let memory = &cache.memory;
            (0..3).for_each(|page| memory.write(page, 90 + page as u8));
            // Of hugetlb memory since Linux 5.18.
            if memory.advise(0, 1, libc::MADV_DONTNEED).is_ok() {
                assert_eq!((memory.read(0), cache.reads_of(0)), (90, 1), "{way:?}");
            }
            // Removed, and written by another mapping before it is accessed here.
            assert!(cache.remove(1, 2));
            memory.alias().write(1, 77);
            assert_eq!((memory.read(1), cache.reads_of(1)), (77, 1), "{way:?}");
            check(memory, 2, 2);
        }
    }
}

#[test]
fn removed_pages_are_filled_by_all_that_fills_missing_ones() {
    require!(FeatureFlags::EVENT_REMOVE);
    for cache in Cache::each(test_name!(), 4, FeatureFlags::EVENT_REMOVE) {
        let (memory, pager, region) = (&cache.memory, &cache.pager, cache.added.regions[0]);
        (0..4).for_each(|page| memory.write(page, 90 + page as u8));
        if !cache.remove(1, 2) {
            continue;
        }
        if cache.is_shared() && memory.advise(0, 1, libc::MADV_DONTNEED).is_err() {
            continue;
        }
        let report = pager.background(region, FillOrder::Ascending).unwrap().wait();
        assert_eq!(report.failed, [], "{:?}", cache.way);
        assert_eq!(pager.missing(region).unwrap(), [], "{:?}", cache.way);
        let faults = pager.statistics().faults();
        check(memory, 1, 1);
        check(memory, 2, 2);
        assert_eq!(pager.statistics().faults(), faults, "{:?}", cache.way);
        // And at the end.
        assert!(cache.remove(1, 1));
        pager.finish(|_| {}).unwrap();
        check(memory, 1, 1);
        let reads = (cache.reads_of(1), cache.reads_of(2), cache.reads_of(3));
        // Only another load can say of what was loaded again that it wasn't removed again, and in a file of what is beside it.
        assert!([(3, 2, 1), (3, 3, 1)].contains(&reads), "{:?}: {reads:?}", cache.way);
        // What the file has is what was written.
        if cache.is_shared() {
            assert_eq!((memory.read(0), cache.reads_of(0)), (90, 1), "{:?}", cache.way);
        }
        assert_eq!(memory.read(3), 93);
    }
}

#[test]
fn working_set_is_loaded_again_after_a_removal() {
    require!(FeatureFlags::EVENT_REMOVE);
    for cache in Cache::each(test_name!(), 4, FeatureFlags::EVENT_REMOVE) {
        let (memory, pager, region) = (&cache.memory, &cache.pager, cache.added.regions[0]);
        let recorder = pager.record(region).unwrap();
        (1..3).for_each(|page| check(memory, page, page));
        let set = recorder.finish();
        if !cache.remove(1, 2) {
            continue;
        }
        let _report = pager.replay(region, &set).unwrap().wait();
        let faults = pager.statistics().faults();
        (1..3).for_each(|page| check(memory, page, page));
        assert_eq!(pager.statistics().faults(), faults, "{:?}", cache.way);
        assert_eq!((cache.reads_of(0), cache.reads_of(1), cache.reads_of(2)), (0, 2, 2), "{:?}", cache.way);
    }
}

#[test]
fn next_pager_loads_removed_pages_and_keeps_the_file() {
    require!(FeatureFlags::EVENT_REMOVE);
    for way in WAYS {
        let Some(cache) = Cache::new(test_name!(), way, 5, FeatureFlags::EVENT_REMOVE) else { continue };
        (0..4).for_each(|page| cache.memory.write(page, 90 + page as u8));
        // The mapping of page 0, and the pages 1 and 2 themselves.
        let drops_mapping = cache.is_shared() && cache.memory.advise(0, 1, libc::MADV_DONTNEED).is_ok();
        if !cache.remove(1, 2) {
            continue;
        }
        let Cache { memory, pager, source, .. } = cache;
        let detached = pager.detach().pop().unwrap();
        let listed: Vec<_> = detached.missing().iter().map(|part| (part.len, part.offset)).collect();
        let bytes = memory.page();
        assert_eq!(listed, [(2 * bytes, Some(bytes as u64)), (bytes, Some(4 * bytes as u64))], "{way:?}");
        let next = Pager::new().unwrap();
        let region = reloads(way, &memory, source.clone()).missing(detached.missing());
        serve(&next, detached.uffd, region);
        check(&memory, 1, 1);
        next.finish(|_| {}).unwrap();
        check(&memory, 2, 2);
        check(&memory, 4, 4);
        assert_eq!((memory.read(0), memory.read(3)), (90, 93), "{way:?}, dropped: {drops_mapping}");
        assert_eq!(source.reads().values().copied().collect::<Vec<_>>(), [1, 2, 2, 1, 1], "{way:?}");
    }
}

#[test]
fn removed_pages_are_listed_missing_for_a_reloading_pager() {
    require!(FeatureFlags::EVENT_REMOVE);
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let Some(memory) = memory(test_name!(), kind, 3) else { continue };
        let (first, source) = (Pager::new().unwrap(), Pages::new(page()));
        serve(&first, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, source.clone()));
        // Never loaded.
        memory.advise(1, 1, libc::MADV_DONTNEED).unwrap();
        let detached = first.detach().pop().unwrap();
        let missing = detached.missing();
        assert!(missing.iter().any(|part| part.offset.is_none()), "{missing:?}");
        let next = Pager::new().unwrap();
        let region = region(&memory, source).missing(missing).on_removal(OnRemoval::Reload);
        serve(&next, detached.uffd, region);
        check(&memory, 1, 1);
        check(&memory, 2, 2);
    }
}

#[test]
fn pages_that_were_removed_are_poisoned_at_the_end() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        crate::reader::tell_signals();
        for cache in Cache::each(test_name!(), 4, FeatureFlags::EVENT_REMOVE) {
            let memory = &cache.memory;
            (0..3).for_each(|page| memory.write(page, 90 + page as u8));
            let drops_mapping = cache.is_shared() && memory.advise(0, 1, libc::MADV_DONTNEED).is_ok();
            let removes = cache.remove(1, 1);
            let Cache { way, memory, pager, .. } = cache;
            drop(pager);
            assert_eq!((memory.read(0), memory.read(2)), (90, 92), "{way:?}, dropped: {drops_mapping}");
            let removed = crate::reader::Reader::of(memory.at(1).addr()).wait();
            assert_eq!(removed, if removes { Seen::POISON } else { Seen::Byte(91) }, "{way:?}");
        }
    });
}

#[test]
fn removed_page_that_the_source_cant_deliver_is_poisoned() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        assert!(can_poison());
        crate::reader::tell_signals();
        for told in [true, false] {
            for way in [WAYS[0], WAYS[2], WAYS[5]] {
                let reads = Mutex::new(0);
                let source = move |_: u64, bytes: &mut [u8]| {
                    let mut reads = reads.lock().unwrap();
                    *reads += 1;
                    bytes.fill(7);
                    if *reads > 1 { Err(std::io::Error::other("once")) } else { Ok(PageData::Data) }
                };
                let memory = Memory::new(way.kind, 1);
                let retry = RetryPolicy { attempts: 1, ..RetryPolicy::default() };
                let pager = Pager::builder().retry(retry).build().unwrap();
                let region = region(&memory, source).on_removal(OnRemoval::Reload);
                let file = way.is_minor.then(|| memory.file().try_clone().unwrap().into());
                let region = match file {
                    Some(file) => region.minor(file, 0),
                    None => region,
                };
                let features = if told { FeatureFlags::EVENT_REMOVE } else { FeatureFlags::empty() };
                serve(&pager, uffd(features), region);
                assert_eq!(memory.read(0), 7);
                let advice = if way.kind.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                memory.advise(0, 1, advice).unwrap();
                let seen = crate::reader::Reader::of(memory.at(0).addr()).wait();
                assert_eq!(seen, Seen::POISON, "{way:?}, told: {told}");
                eventually(|| pager.statistics().poisoned, 1);
            }
        }
    });
}

#[test]
fn forked_child_loads_again_what_it_removes() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        for cache in Cache::each(test_name!(), 3, FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_FORK) {
            let memory = &cache.memory;
            memory.write(0, 90);
            memory.write(1, 91);
            let removes = cache.remove(1, 1);
            child::fork(|| {
                assert_eq!(memory.read(0), 90);
                if removes {
                    assert_eq!(memory.read(1), crate::scene::byte(1));
                    memory.write(1, 5);
                    assert!(cache.remove(1, 1));
                    assert_eq!(memory.read(1), crate::scene::byte(1));
                }
                assert_eq!(memory.read(2), crate::scene::byte(2));
            })
            .succeed();
            assert_eq!(memory.read(0), 90);
            if removes {
                check(memory, 1, 1);
            }
        }
    });
}

/// The kernel removes a page after its event was read: what is loaded in between goes, too.
#[test]
fn forked_child_has_what_a_late_removal_took() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_FORK | FeatureFlags::MOVE);
    child::run_well(test_name!(), || {
        let features = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_FORK;
        let Some(cache) = Cache::new(test_name!(), WAYS[0], 3, features) else { return };
        let memory = &cache.memory;
        check(memory, 1, 1);
        assert!(cache.remove(1, 1));
        check(memory, 1, 1);
        // Taken away without another event.
        let (mover, elsewhere) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
        mover.register(elsewhere.start(), elsewhere.len()).unwrap();
        // SAFETY: both pages are the test's, and nothing refers to them.
        let moved = unsafe { mover.move_pages(memory.at(1), elsewhere.start(), page(), MoveMode::empty()) };
        assert_eq!(moved.unwrap(), page());
        let (mut here, there) = UnixStream::pair().unwrap();
        let child = child::fork(|| {
            assert_eq!((&there).read(&mut [0]).unwrap(), 1);
            assert_eq!(memory.read(1), crate::scene::byte(1));
        });
        cache.pager.finish(|_| {}).unwrap();
        here.write_all(&[1]).unwrap();
        child.succeed();
        check(memory, 1, 1);
    });
}

/// Threads that read everything, and drop what they have read, as a cache does that keeps the newest pages alone.
#[test]
fn cache_that_drops_old_pages_has_the_files_content() {
    require!(FeatureFlags::EVENT_REMOVE);
    const PAGES: usize = 32;
    const KEPT: usize = 6;
    let told = FeatureFlags::EVENT_REMOVE;
    for (way, features, around) in [
        (WAYS[0], told, FaultAround::Page),
        (WAYS[0], told, FaultAround::Block(4 * page())),
        (WAYS[0], FeatureFlags::empty(), FaultAround::Page),
        (WAYS[2], told, FaultAround::Block(4 * page())),
        (WAYS[5], told, FaultAround::Block(4 * page())),
        (WAYS[5], FeatureFlags::empty(), FaultAround::Page),
    ] {
        let (memory, source) = (Memory::new(way.kind, PAGES), Pages::new(page()));
        let pager = Pager::builder().threads(2).build().unwrap();
        let region = reloads(way, &memory, source.clone()).fault_around(around);
        serve(&pager, uffd(features), region);
        let kept = Mutex::new(VecDeque::new());
        thread::scope(|scope| {
            for thread in 0..3 {
                let (memory, kept) = (&memory, &kept);
                scope.spawn(move || {
                    let mut random = Random::new(thread + 1);
                    for _ in 0..400 {
                        let number = random.below(PAGES);
                        check(memory, number, number);
                        let mut kept = kept.lock().unwrap();
                        kept.push_back(number);
                        let oldest = if kept.len() > KEPT { kept.pop_front() } else { None };
                        drop(kept);
                        let Some(oldest) = oldest else { continue };
                        let advice =
                            if way.kind.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                        memory.advise(oldest, 1, advice).unwrap();
                    }
                });
            }
        });
        assert!(source.reads().values().sum::<usize>() > 2 * PAGES, "{way:?}: pages are read again");
        pager.finish(|_| {}).unwrap();
        if !features.is_empty() {
            (0..PAGES).for_each(|number| check(&memory, number, number));
        }
    }
}
