//! How it ends: finished, handed over, dropped; and what is counted until then.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use userfaultfd::pager::{
    BytesSource, Error, FaultAround, FillOrder, MissingRange, PageData, PageSource, Pager, Progress, Region,
    Statistics,
};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::reader::{Reader, Seen, tell_signals};
use crate::scene::{Pages, byte, can_poison, check, content, eventually, memory, region, see, serve, served};
use crate::support::gate::Gate;
use crate::support::memory::{Kind, Memory};
use crate::support::proc::{is_in, thread_id, wait_until};
use crate::support::{child, page, require, test_name, uffd};

#[test]
fn finish_fills_missing_pages_and_reports_progress() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 5) else { continue };
        let (pager, _, source) = served(&memory);
        check(&memory, 3, 3);
        eventually(|| pager.statistics().present_pages, 1);
        let mut told = Vec::new();
        pager.finish(|progress| told.push(progress)).unwrap();
        let total = 4 * memory.page() as u64;
        assert_eq!((told[0].done, told[0].total), (0, total));
        let last: Progress = told[told.len() - 1];
        assert_eq!((last.done, last.total), (total, total));
        assert!(told.is_sorted_by_key(|progress| progress.done));
        assert_eq!(pager.descriptors(), []);
        // The memory needs no pager.
        drop(pager);
        (0..5).for_each(|page| check(&memory, page, page));
        source.were_read_once(5);
    }
}

#[test]
fn finish_continues_after_failing_source() {
    require!();
    tell_signals();
    let memory = Memory::anonymous(6);
    let pager = Pager::builder();
    let retry = userfaultfd::pager::RetryPolicy { attempts: 1, delay: std::time::Duration::ZERO };
    let pager = pager.retry(retry).build().unwrap();
    let source = |offset: u64, bytes: &mut [u8]| {
        let (first, end) = (offset as usize / page(), (offset as usize + bytes.len()) / page());
        if (first..end).contains(&2) {
            return Err(std::io::ErrorKind::NotFound.into());
        }
        Pages::new(page()).read(offset, bytes)
    };
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source));
    let mut told = Vec::new();
    let finished = pager.finish(|progress| told.push(progress));
    if can_poison() {
        let error = finished.unwrap_err();
        let text = format!(
            "1 pages couldn't be filled and are poisoned: bytes {:#x}..{:#x} of a region",
            2 * page(),
            3 * page()
        );
        assert_eq!(error.to_string(), text);
        assert!(pager.descriptors().is_empty());
        assert_eq!(see(&memory, 2), Seen::POISON);
        assert_eq!(told.last().unwrap().done, told[0].total);
    } else {
        assert!(matches!(finished, Err(Error::Unfilled { pages: 1, .. })), "{finished:?}");
        assert_eq!(pager.descriptors().len(), 1, "it is served on");
        assert_eq!(told.last().unwrap().done, told[0].total - page() as u64);
    }
    for page in [0, 1, 3, 4, 5] {
        check(&memory, page, page);
    }
}

#[test]
fn callback_of_a_fill_may_use_the_pager() {
    require!();
    let [one, other, third] = [3, 2, 2].map(Memory::anonymous);
    let pager = Pager::new().unwrap();
    let add = |memory| serve(&pager, uffd(FeatureFlags::empty()), region(memory, Pages::new(page())));
    let [added, second, removed] = [&one, &other, &third].map(add);
    let (mut finished, mut gone) = (Vec::new(), Vec::new());
    let result = pager.finish_region(added.regions[0], |_| {
        finished.push(pager.finish_region(second.regions[0], |_| {}));
        gone.push(pager.remove_region(removed.regions[0]));
    });
    result.unwrap();
    let is_not_served = |result: &Result<(), Error>| matches!(result, Err(Error::NotServed));
    assert!(finished[0].is_ok() && finished[1..].iter().all(is_not_served), "{finished:?}");
    if can_poison() {
        assert!(gone[0].is_ok() && gone[1..].iter().all(is_not_served), "{gone:?}");
    } else {
        assert!(
            gone.iter().all(|result| matches!(result, Err(Error::Unfilled { pages: 2, .. }))),
            "{gone:?}"
        );
    }
    check(&one, 2, 2);
    check(&other, 1, 1);
}

/// What was filled before stays, and the rest is as it is after any removal.
#[test]
fn callback_may_remove_the_region_that_is_being_finished() {
    require!(FeatureFlags::POISON);
    tell_signals();
    // More than is filled between two calls.
    let filled = (1 << 20) / page();
    let pages = 2 * filled;
    for filled in [0, filled] {
        let memory = Memory::anonymous(pages);
        let (pager, added, _) = served(&memory);
        let mut removed = None;
        let finished = pager.finish_region(added.regions[0], |progress| {
            if removed.is_none() && progress.done == (filled * page()) as u64 {
                removed = Some(pager.remove_region(added.regions[0]));
            }
        });
        assert!(matches!(removed, Some(Ok(()))), "{removed:?}");
        assert!(matches!(finished, Err(Error::NotServed)), "{finished:?}");
        (0..filled).for_each(|page| check(&memory, page, page));
        assert_eq!([see(&memory, filled), see(&memory, pages - 1)], [Seen::POISON; 2]);
    }
}

#[test]
fn callback_of_finish_may_remove_a_region() {
    require!(FeatureFlags::POISON);
    tell_signals();
    let [memory, other] = [3, 3].map(Memory::anonymous);
    let (pager, added, _) = served(&memory);
    let other_region = region(&other, Pages::new(page()));
    // SAFETY: only raw pointers lead to the memory of tests.
    unsafe { pager.add_own_region(added.descriptor, other_region) }.unwrap();
    let mut removed = None;
    let finished = pager.finish(|_| {
        removed.get_or_insert_with(|| pager.remove_region(added.regions[0]));
    });
    assert!(matches!(removed, Some(Ok(()))), "{removed:?}");
    finished.unwrap();
    assert_eq!(pager.descriptors(), []);
    assert_eq!(see(&memory, 1), Seen::POISON);
    (0..3).for_each(|page| check(&other, page, page));
}

/// Here between the last page and the end.
#[test]
fn finish_fills_memory_added_meanwhile() {
    require!();
    let (memory, later) = (Memory::anonymous(3), Memory::anonymous(3));
    let (pager, added, _) = served(&memory);
    let mut second = None;
    pager
        .finish(|progress| {
            if progress.done == progress.total && second.is_none() {
                let region = region(&later, Pages::new(page()));
                // SAFETY: only raw pointers lead to the memory of tests.
                second = Some(unsafe { pager.add_own_region(added.descriptor, region) }.unwrap());
            }
        })
        .unwrap();
    assert_eq!(pager.descriptors(), []);
    (0..3).for_each(|page| check(&memory, page, page));
    (0..3).for_each(|page| check(&later, page, page));
}

#[test]
fn region_added_during_finish_is_filled_or_refused() {
    require!();
    for _ in 0..50 {
        let (memory, later) = (Memory::anonymous(3), Memory::anonymous(3));
        let (pager, added, _) = served(&memory);
        let second = std::thread::scope(|scope| {
            let finishing = scope.spawn(|| pager.finish(|_| {}));
            let region = region(&later, Pages::new(page()));
            // SAFETY: only raw pointers lead to the memory of tests.
            let second = unsafe { pager.add_own_region(added.descriptor, region) };
            finishing.join().unwrap().unwrap();
            second
        });
        match second {
            Ok(_) => (0..3).for_each(|page| check(&later, page, page)),
            Err(error) => assert!(matches!(error, Error::NotServed), "{error:?}"),
        }
    }
}

#[test]
fn finish_ends_while_memory_is_freed_without_pause() {
    require!(FeatureFlags::EVENT_REMOVE);
    let memory = Memory::anonymous(64);
    let pager = Pager::new().unwrap();
    let uffd = uffd(FeatureFlags::EVENT_REMOVE);
    let added = serve(&pager, uffd, region(&memory, Pages::new(page())));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (started, has_started) = mpsc::channel();
        let (memory, over) = (&memory, &over);
        scope.spawn(move || {
            for page in (32..64).cycle() {
                memory.advise(page, 1, libc::MADV_DONTNEED).unwrap();
                if page == 63 {
                    let _heard = started.send(());
                }
                if over.load(Ordering::SeqCst) {
                    return;
                }
            }
        });
        has_started.recv().unwrap();
        let finished = pager.finish_region(added.regions[0], |_| {});
        over.store(true, Ordering::SeqCst);
        finished.unwrap();
    });
    (0..32).for_each(|page| check(&memory, page, page));
    assert!((32..64).all(|page| memory.read(page) == 0));
}

/// What unparks the thread is the program's, and stays for it.
#[test]
fn call_keeps_unpark_of_its_thread() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(2);
        let (pager, added, _) = served(&memory);
        // A part that the pager isn't told of, so that it waits and tries again.
        let failing = AtomicU32::new(0);
        let source = move |offset: u64, bytes: &mut [u8]| {
            if failing.fetch_add(1, Ordering::SeqCst) < 3 {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            Pages::new(page()).read(offset, bytes)
        };
        let later = Memory::anonymous(1);
        // SAFETY: only raw pointers lead to the memory of tests.
        unsafe { pager.add_own_region(added.descriptor, region(&later, source)) }.unwrap();
        std::thread::current().unpark();
        pager.finish(|_| {}).unwrap();
        // Else this would wait until the test is at its end.
        std::thread::park();
        check(&later, 0, 0);
    });
}

/// Does something in a thread that was unparked before, which it must still be afterwards.
fn keeps_unpark(act: impl FnOnce()) {
    std::thread::current().unpark();
    act();
    // Else this would wait until the test is at its end.
    std::thread::park();
}

#[test]
fn fills_and_drops_of_memory_keep_unpark_of_their_thread() {
    require!();
    child::run_well(test_name!(), || {
        const PAGES: usize = 64;
        let bytes: Vec<u8> = (0..PAGES).flat_map(|number| vec![byte(number); page()]).collect();
        let sigbus = || LazyMemory::sigbus(BytesSource::new(bytes.clone())).build().unwrap();
        let failing = AtomicU32::new(0);
        let source = move |offset: u64, bytes: &mut [u8]| {
            if failing.fetch_add(1, Ordering::SeqCst) < 3 {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            Pages::new(page()).read(offset, bytes)
        };
        let memory = LazyMemory::builder(source).len(PAGES * page()).build().unwrap();
        keeps_unpark(|| memory.fill(|_| {}).unwrap());
        keeps_unpark(|| drop(memory));
        let memory = sigbus();
        keeps_unpark(|| memory.fill(|_| {}).unwrap());
        keeps_unpark(|| drop(memory));
        let memory = sigbus();
        keeps_unpark(|| memory.try_populate(0..PAGES * page()).unwrap());
        let background = memory.background(FillOrder::Ascending).unwrap();
        keeps_unpark(|| drop(background));
        let background = memory.background(FillOrder::Ascending).unwrap();
        keeps_unpark(|| drop(background.wait()));
        let memory = Memory::anonymous(PAGES);
        let (pager, ..) = served(&memory);
        keeps_unpark(|| drop(pager));
        // While a source is being read, which each of them waits for.
        for drops in [0, 1, 2] {
            let gate = Gate::default();
            let waiting = gate.clone();
            let source = move |offset: u64, bytes: &mut [u8]| {
                waiting.pass();
                Pages::new(page()).read(offset, bytes)
            };
            let pager = Arc::new(Pager::new().unwrap());
            let builder = LazyMemory::builder(source).len(PAGES * page()).pager(&pager);
            let memory = builder.build().unwrap();
            let background = memory.background(FillOrder::Ascending).unwrap();
            gate.wait_for_arrival();
            let caller = thread_id();
            let opening = std::thread::spawn(move || {
                wait_until(|| is_in(caller, libc::SYS_futex) == Some(true));
                gate.open();
            });
            match drops {
                0 => keeps_unpark(|| drop(background)),
                1 => keeps_unpark(|| drop(memory)),
                _ => keeps_unpark(|| drop(background.wait())),
            }
            opening.join().unwrap();
        }
    });
}

#[test]
fn finish_skips_memory_unmapped_without_event() {
    require!();
    // Alone: the pager fills what it takes for its own, which another test may have mapped there since.
    child::run_well(test_name!(), || {
        for kind in Kind::SMALL {
            let Some(memory) = memory(test_name!(), kind, 5) else { continue };
            let (pager, added, _) = served(&memory);
            memory.unmap(2, 1);
            pager.finish_region(added.regions[0], |_| {}).unwrap();
            for page in [0, 1, 3, 4] {
                check(&memory, page, page);
            }
            drop(pager);
            let Some(memory) = crate::scene::memory(test_name!(), kind, 5) else { continue };
            let (pager, _, _) = served(&memory);
            memory.unmap(1, 2);
            drop(pager);
        }
    });
}

#[test]
fn dropping_a_pager_poisons_missing_pages() {
    require!(FeatureFlags::EVENT_REMOVE);
    tell_signals();
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 4) else { continue };
        let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
        serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, source));
        check(&memory, 1, 1);
        let removed = memory.advise(2, 1, libc::MADV_DONTNEED).is_ok();
        drop(pager);
        let missing = |page| if can_poison() { Seen::POISON } else { content(page) };
        check(&memory, 1, 1);
        assert_eq!([see(&memory, 0), see(&memory, 3)], [missing(0), missing(3)], "{memory:?}");
        // What was removed is zero, with a pager and without.
        assert_eq!(see(&memory, 2), if removed { Seen::ZERO } else { missing(2) }, "{memory:?}");
    }
}

#[test]
fn present_pages_without_a_fault_are_not_poisoned() {
    require!(FeatureFlags::MISSING_SHMEM);
    tell_signals();
    for kind in [Kind::SharedAnonymous, Kind::Memfd, Kind::PrivateMemfd, Kind::Hugetlb] {
        let Some(memory) = memory(test_name!(), kind, 6) else { continue };
        let alias = memory.alias();
        let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source));
        // Two that follow each other, and one that is mapped before.
        for page in [1, 2, 4] {
            alias.write(page, 90 + page as u8);
        }
        assert_eq!(memory.read(4), 94);
        drop(pager);
        let missing = |page| if can_poison() { Seen::POISON } else { content(page) };
        for page in [0, 3, 5] {
            assert_eq!(see(&memory, page), missing(page), "{memory:?}");
        }
        for page in [1, 2, 4] {
            assert_eq!(memory.read(page), 90 + page as u8, "{memory:?}");
        }
    }
}

#[test]
fn removed_region_leaves_other_regions() {
    require!();
    tell_signals();
    let (one, other) = (Memory::anonymous(2), Memory::anonymous(2));
    let pager = Pager::new().unwrap();
    let uffd = uffd(FeatureFlags::empty());
    let added = serve(&pager, uffd, region(&one, Pages::new(page())));
    // SAFETY: only raw pointers lead to the memory of tests.
    let second =
        unsafe { pager.add_own_region(added.descriptor, region(&other, Pages::new(page()))) }.unwrap();
    check(&one, 0, 0);
    match pager.remove_region(added.regions[0]) {
        Ok(()) => {
            assert!(can_poison());
            assert_eq!(see(&one, 1), Seen::POISON);
            assert!(matches!(pager.remove_region(added.regions[0]), Err(Error::NotServed)));
        }
        Err(error) => {
            // Two, if it isn't noted yet that the first is there.
            assert!(!can_poison() && matches!(error, Error::Unfilled { pages: 1..=2, .. }), "{error:?}");
            // It is served on.
            assert_eq!(see(&one, 1), content(1));
        }
    }
    assert_eq!((see(&one, 0), see(&other, 1)), (content(0), content(1)));
    pager.finish_region(second, |_| {}).unwrap();
    check(&other, 0, 0);
}

#[test]
fn next_pager_continues_after_detach() {
    require!(FeatureFlags::EVENT_REMOVE);
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 6) else { continue };
        let source = Pages::new(memory.page());
        let mut uffd = Some(uffd(FeatureFlags::EVENT_REMOVE));
        for step in 0..3 {
            let pager = Pager::new().unwrap();
            let added = serve(&pager, uffd.take().unwrap(), region(&memory, source.clone()));
            check(&memory, 2 * step, 2 * step);
            let detached = pager.detach();
            assert_eq!(detached.len(), 1);
            for detached in detached {
                assert_eq!(detached.descriptor, added.descriptor);
                let missing: Vec<MissingRange> = detached.missing();
                assert!(missing.iter().all(|part| part.region == added.regions[0]));
                let bytes: usize = missing.iter().map(|part| part.len).sum();
                assert_eq!(bytes, 5 * memory.page(), "each knows what it has filled: {missing:?}");
                uffd = Some(detached.uffd);
            }
        }
        // Waits until a thread is there again.
        let reader = Reader::of(memory.at(5).addr());
        let pager = Pager::new().unwrap();
        serve(&pager, uffd.unwrap(), region(&memory, source.clone()));
        assert_eq!(reader.wait(), content(5));
        pager.finish(|_| {}).unwrap();
        (0..6).for_each(|page| check(&memory, page, page));
    }
}

#[test]
fn fault_read_by_former_owner_is_resolved() {
    require!();
    let memory = Memory::anonymous(1);
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    let reader = Reader::of(memory.at(0).addr());
    wait_until(|| matches!(uffd.read_event().unwrap(), Some(userfaultfd::Event::Pagefault { .. })));
    // Only the thread that has read it knows of it.
    let pager = Pager::new().unwrap();
    serve(&pager, uffd, region(&memory, Pages::new(page())));
    assert_eq!(reader.wait(), content(0));
}

#[test]
fn deferred_fault_reaches_next_owner() {
    require!();
    let memory = Memory::anonymous(3);
    let pager = Pager::new().unwrap();
    let uffd = uffd(FeatureFlags::empty());
    uffd.register(memory.start(), memory.len()).unwrap();
    // The last page has no region.
    let part = Region::new(memory.at(0).addr(), 2 * page(), Pages::new(page()));
    serve(&pager, uffd, part);
    let reader = Reader::of(memory.at(2).addr());
    eventually(|| pager.statistics().missing_faults > 0, true);
    let uffd = pager.detach().pop().unwrap().uffd;
    wait_until(|| matches!(uffd.read_event().unwrap(), Some(userfaultfd::Event::Pagefault { .. })));
    crate::support::handler::fill(&uffd, &memory, 2, 9);
    assert_eq!(reader.wait(), Seen::Byte(9));
}

#[test]
fn loading_fault_reaches_next_owner() {
    require!();
    let memory = Memory::anonymous(2);
    let pager = Pager::new().unwrap();
    let (loading, is_loading) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let slow = move |_: u64, _: &mut [u8]| {
        loading.send(()).unwrap();
        let _gone = may_go.lock().unwrap().recv();
        Ok(PageData::Zero)
    };
    let added = serve(&pager, uffd(FeatureFlags::empty()), region(&memory, slow));
    let reader = Reader::of(memory.at(1).addr());
    is_loading.recv().unwrap();
    let uffd = pager.remove(added.descriptor).unwrap().uffd;
    wait_until(|| matches!(uffd.read_event().unwrap(), Some(userfaultfd::Event::Pagefault { .. })));
    crate::support::handler::fill(&uffd, &memory, 1, 9);
    assert_eq!(reader.wait(), Seen::Byte(9));
    drop(go);
    eventually(|| pager.statistics().dropped, 1);
    assert_eq!(see(&memory, 1), Seen::Byte(9));
}

#[test]
fn moved_range_is_listed_with_its_former_place() {
    require!(FeatureFlags::EVENT_REMAP);
    let (memory, target) = (Memory::anonymous(4), Memory::anonymous(2));
    let (pager, source) = (Pager::new().unwrap(), Pages::new(page()));
    let added = serve(&pager, uffd(FeatureFlags::EVENT_REMAP), region(&memory, source));
    memory.move_over(1, 2, &target, libc::MREMAP_DONTUNMAP);
    assert_eq!((see(&target, 0), see(&memory, 1)), (content(1), Seen::ZERO));
    eventually(|| pager.statistics().present_pages, 1);
    let part = |address: *mut std::ffi::c_void, pages: usize, from: Option<usize>| {
        (address.addr(), pages * page(), from.map(|page| (page * crate::support::page()) as u64))
    };
    let mut expected = vec![
        part(memory.at(0), 1, Some(0)),
        part(memory.at(1), 2, None),
        part(memory.at(3), 1, Some(3)),
        part(target.at(1), 1, Some(2)),
    ];
    expected.sort();
    let told = |missing: Vec<MissingRange>| {
        assert!(missing.iter().all(|part| part.region == added.regions[0]));
        missing.iter().map(|part| (part.address, part.len, part.offset)).collect::<Vec<_>>()
    };
    assert_eq!(told(pager.missing(added.regions[0]).unwrap()), expected);
    assert_eq!(told(pager.remove(added.descriptor).unwrap().missing()), expected);
}

/// After moves the offsets don't follow the addresses.
#[test]
fn moved_memory_is_handed_over_with_its_offsets() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_REMOVE);
    for around in [FaultAround::Page, FaultAround::Block(8 * page()), FaultAround::Adaptive { most: 1 << 20 }]
    {
        let memory = Memory::anonymous(12);
        let (one, source) = (Pager::new().unwrap(), Pages::new(page()));
        let uffd = uffd(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMOVE);
        let whole = || region(&memory, source.clone()).fault_around(around);
        serve(&one, uffd, whole().fault_around(FaultAround::Page));
        check(&memory, 8, 8);
        // Pages 6 to 9 come to lie in the place of 1 to 4, and leave a hole.
        memory.try_move(6, 4, memory.at(1), libc::MREMAP_DONTUNMAP).unwrap();
        let expected = [0, 6, 7, 8, 9, 5, usize::MAX, usize::MAX, usize::MAX, usize::MAX, 10, 11];
        let holds = |page: usize| match expected[page] {
            usize::MAX => assert_eq!(see(&memory, page), Seen::ZERO),
            number => check(&memory, page, number),
        };
        holds(2);
        let detached = one.detach().pop().unwrap();
        // As it comes to another process.
        let parts = detached.missing().into_iter().map(|part| {
            let region = userfaultfd::pager::RegionId::new(part.region.number());
            MissingRange::new(region, part.address, part.len, part.offset)
        });
        let two = Pager::new().unwrap();
        let added = serve(&two, detached.uffd, whole().missing(parts));
        [3, 5, 4].into_iter().for_each(holds);
        // And once more.
        let detached = two.remove(added.descriptor).unwrap();
        let (three, missing) = (Pager::new().unwrap(), detached.missing());
        let added = serve(&three, detached.uffd, whole().missing(missing));
        holds(1);
        three.background(added.regions[0], FillOrder::Ascending).unwrap().wait();
        three.finish(|_| {}).unwrap();
        (0..12).for_each(holds);
        source.were_read_once(8);
    }
}

#[cfg(feature = "serde")]
#[test]
fn missing_ranges_can_be_serialised() {
    require!();
    let memory = Memory::anonymous(4);
    let (pager, added, _) = served(&memory);
    check(&memory, 1, 1);
    eventually(|| pager.statistics().present_pages, 1);
    let missing = pager.missing(added.regions[0]).unwrap();
    assert_eq!(missing.len(), 2);
    let text = serde_json::to_string(&missing).unwrap();
    assert_eq!(serde_json::from_str::<Vec<MissingRange>>(&text).unwrap(), missing);
}

#[test]
fn joining_waits_until_nothing_is_served() {
    require!();
    let memory = Memory::anonymous(1);
    let (pager, added, _) = served(&memory);
    std::thread::scope(|scope| {
        let joined = scope.spawn(|| pager.join());
        check(&memory, 0, 0);
        assert!(!joined.is_finished());
        pager.remove(added.descriptor).unwrap();
    });
    Pager::new().unwrap().join();
}

#[test]
fn statistics_add_up() {
    require!(FeatureFlags::EVENT_REMOVE);
    let memory = Memory::anonymous(64);
    let (pager, source) = (Pager::builder().threads(2).build().unwrap(), Pages::new(page()));
    serve(
        &pager,
        uffd(FeatureFlags::EVENT_REMOVE),
        region(&memory, source).fault_around(FaultAround::Block(4 * page())),
    );
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for step in 0..64 {
                    assert_ne!(memory.read((step * 5 + thread * 16) % 64), 0);
                }
            });
        }
    });
    memory.advise(0, 8, libc::MADV_DONTNEED).unwrap();
    assert_eq!(memory.read(3), 0);
    // Each fill was for one fault, which is among what was filled. A fault that another fill has answered may be counted
    // as read, and not yet as a duplicate: the thread of the pager that has read it may not have come to it.
    let filled_for = |statistics: Statistics| {
        (statistics.fault_latency.count(), statistics.missing_faults.checked_sub(statistics.duplicates))
    };
    eventually(|| filled_for(pager.statistics()), (17, Some(17)));
    let statistics = pager.statistics();
    assert_eq!(statistics.fills, 64, "{statistics}");
    assert_eq!((statistics.zero_fills, statistics.removes), (4, 1), "{statistics}");
    assert_eq!(statistics.source_reads, 16, "{statistics}");
    assert_eq!(statistics.source_latency.count(), 16, "{statistics}");
    assert_eq!(statistics.bytes, (64 + 4) * page() as u64, "{statistics}");
    assert_eq!((statistics.present_pages, statistics.missing_pages), (60, 4), "{statistics}");
    assert_eq!(statistics.prefetched, 68 - 17, "{statistics}");
    assert_eq!(statistics.missing_faults, 17 + statistics.duplicates, "{statistics}");
    assert_eq!(statistics.faults(), statistics.missing_faults);
    let nothing = [
        statistics.minor_faults,
        statistics.write_protect_faults,
        statistics.source_errors,
        statistics.poisoned,
        statistics.dropped,
        statistics.woken,
        statistics.problems_lost,
    ];
    assert_eq!(nothing, [0; 7], "{statistics}");
}
