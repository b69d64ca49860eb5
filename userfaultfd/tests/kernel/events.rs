//! Changes of memory that are told: pages removed, mappings moved and unmapped.

use std::sync::atomic::{AtomicBool, Ordering};

use userfaultfd::{Errno, Error, FaultKind, FeatureFlags, RegisterMode, Uffd};

use crate::support::fault::{assert_silent, during, during_all};
use crate::support::handler::{Change, Fault, fill, while_changing, zero};
use crate::support::memory::{self, Kind, Memory};
use crate::support::proc::{wait_for_pending, wait_until_in};
use crate::support::raw::wait_for_event;
use crate::support::{self, child, errno, require, test_name, uffd};

/// Memory, all of it filled with a byte, and a userfaultfd that it is registered with.
// The descriptor goes first, since unmapping what it watches would wait for a reader.
#[derive(Debug)]
struct Watched {
    uffd: Uffd,
    memory: Memory,
}

const BYTE: u8 = 7;

impl Watched {
    fn new(features: FeatureFlags, memory: Memory) -> Self {
        let watched = Self { uffd: uffd(features), memory };
        watched.uffd.register(watched.memory.start(), watched.memory.len()).unwrap();
        watched.fill();
        watched
    }

    fn fill(&self) {
        (0..self.memory.pages()).for_each(|page| fill(&self.uffd, &self.memory, page, BYTE));
    }

    /// Makes a change of which all these events must be told, in this order, and nothing else.
    #[track_caller]
    fn assert_told(&self, change: impl FnOnce() + Send, expected: &[Change]) {
        let mut told = Vec::new();
        while_changing(&self.uffd, change, |_| {
            told.extend(expected.iter().map(|_| Change::next(&self.uffd)));
        });
        assert_eq!(told, expected);
        assert_silent(&self.uffd);
    }

    /// Checks that a page is missing, and that this is delivered.
    #[track_caller]
    fn assert_missing(&self, memory: &Memory, page: usize) {
        let read = during(
            &self.uffd,
            memory,
            || memory.read(page),
            |faults| {
                assert_eq!(faults.next(), Fault::read(FaultKind::Missing, memory, page));
                fill(&self.uffd, memory, page, BYTE + 1);
            },
        );
        assert_eq!(read, BYTE + 1);
    }
}

/// What drops pages of memory of a kind, and whether they are missing then.
fn removals(kind: Kind) -> Vec<(libc::c_int, bool)> {
    // Since Linux 5.18.
    const MADV_DONTNEED_LOCKED: libc::c_int = 24;
    // The page cache keeps what only a mapping drops.
    let mut removals = vec![(libc::MADV_DONTNEED, !kind.is_shared())];
    if kind == Kind::Anonymous {
        // Freed pages go when memory gets tight.
        removals.extend([(MADV_DONTNEED_LOCKED, true), (libc::MADV_FREE, false)]);
    }
    if kind.is_shared() {
        removals.push((libc::MADV_REMOVE, true));
    }
    removals
}

#[test]
fn removal_is_reported_before_pages_go() {
    require!(FeatureFlags::EVENT_REMOVE);
    for kind in Kind::ALL {
        for (advice, missing) in removals(kind) {
            if !support::has_features(test_name!(), kind.needs(RegisterMode::MISSING).unwrap()) {
                continue;
            }
            let Some(memory) = Memory::try_new(test_name!(), kind, 4) else { continue };
            // Hugetlb memory can be dropped so since Linux 5.18.
            let known = memory.advise(0, 4, advice).is_ok();
            if !support::has(test_name!(), &format!("madvise {advice} on {kind:?}"), known) {
                continue;
            }
            let watched = Watched::new(FeatureFlags::EVENT_REMOVE, memory);
            let (uffd, memory) = (&watched.uffd, &watched.memory);
            let removed = while_changing(
                uffd,
                || memory.advise(1, 2, advice),
                |_| {
                    wait_for_event(uffd);
                    assert_eq!(memory.read(1), BYTE, "{memory:?}: gone before the event was read");
                    assert_eq!(Change::next(uffd), Change::Remove(memory.range(1, 2)), "{memory:?}");
                },
            );
            assert_eq!(removed, Ok(()));
            assert_silent(uffd);
            // It is still registered.
            if missing {
                watched.assert_missing(memory, 1);
            }
            assert_eq!(memory.read(0), BYTE);
        }
    }
}

#[test]
fn changes_by_other_mappings_are_no_events() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::MISSING_SHMEM);
    let ways: [fn(&Memory); 3] = [
        |memory| memory.punch(1, 1),
        |memory| {
            memory.truncate(1);
            memory.truncate(2);
        },
        |memory| memory.alias().advise(1, 1, libc::MADV_REMOVE).unwrap(),
    ];
    for drop_page in ways {
        let features = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP;
        let watched = Watched::new(features, Memory::new(Kind::Memfd, 2));
        drop_page(&watched.memory);
        assert_silent(&watched.uffd);
        watched.assert_missing(&watched.memory, 1);
    }
}

#[test]
fn advice_that_keeps_content_is_no_event() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP);
    let features = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP;
    let watched = Watched::new(features, Memory::anonymous(2));
    let memory = &watched.memory;
    memory.protect(1, 1, libc::PROT_READ);
    memory.protect(1, 1, libc::PROT_READ | libc::PROT_WRITE);
    for advice in [libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_WILLNEED, libc::MADV_DONTFORK] {
        memory.advise(1, 1, advice).unwrap();
    }
    assert_silent(&watched.uffd);
    assert_eq!(memory.read(1), BYTE);
}

#[test]
fn no_event_arrives_for_features_not_requested() {
    require!();
    let watched = Watched::new(FeatureFlags::empty(), Memory::anonymous(3));
    watched.memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
    watched.memory.unmap(2, 1);
    assert_silent(&watched.uffd);
    watched.assert_missing(&watched.memory, 0);
}

#[test]
fn unmapping_is_reported_after_pages_went() {
    require!(FeatureFlags::EVENT_UNMAP);
    // What another thread maps might come to lie there.
    child::run_well(test_name!(), || {
        for memory in memory::each(test_name!(), RegisterMode::MISSING, 4) {
            let watched = Watched::new(FeatureFlags::EVENT_UNMAP, memory);
            let (uffd, memory) = (&watched.uffd, &watched.memory);
            while_changing(
                uffd,
                || memory.unmap(1, 2),
                |_| {
                    wait_for_event(uffd);
                    assert_eq!(memory.read_by_kernel(1), Err(Errno::EFAULT), "{memory:?}: still there");
                    assert_eq!(Change::next(uffd), Change::Unmap(memory.range(1, 2)));
                },
            );
            assert_silent(uffd);
            let content = vec![1u8; memory.page()];
            // SAFETY: the content lives on, and nothing is mapped at the destination.
            let copied = unsafe { uffd.copy(content.as_ptr().cast(), memory.at(1), memory.page(), true) };
            assert_eq!(errno(copied), Errno::ENOENT);
        }
    });
}

#[test]
fn mapping_over_a_range_unmaps_it() {
    require!(FeatureFlags::EVENT_UNMAP);
    let watched = Watched::new(FeatureFlags::EVENT_UNMAP, Memory::anonymous(3));
    let memory = &watched.memory;
    let map_over = || {
        let (protection, flags) =
            (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: replaces a page of a mapping whose content nobody borrows.
        let mapped = unsafe { libc::mmap(memory.at(1), memory.page(), protection, flags, -1, 0) };
        assert_eq!(mapped, memory.at(1));
    };
    watched.assert_told(map_over, &[Change::Unmap(memory.range(1, 1))]);
    // What is there now isn't registered.
    assert_eq!((memory.read(1), memory.read(2)), (0, BYTE));
}

#[test]
fn shrinking_unmaps_the_tail() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP);
    let features = FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
    let watched = Watched::new(features, Memory::anonymous(3));
    let memory = &watched.memory;
    watched.assert_told(|| memory.resize(3, 1), &[Change::Unmap(memory.range(1, 2))]);
}

#[test]
fn growth_in_place_is_unreported_and_registered() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP);
    // Alone, so that nothing else is mapped behind it.
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        memory.unmap(2, 2);
        let watched = Watched { uffd: uffd(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP), memory };
        let memory = &watched.memory;
        watched.uffd.register(memory.start(), 2 * memory.page()).unwrap();
        memory.resize(2, 4);
        assert_silent(&watched.uffd);
        watched.assert_missing(memory, 3);
    });
}

#[test]
fn move_reports_remap_and_its_unmaps() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP);
    for overwrites in [false, true] {
        let target = Memory::anonymous(2);
        let features = FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
        let watched = Watched::new(features, Memory::anonymous(4));
        let (uffd, memory) = (&watched.uffd, &watched.memory);
        memory.advise(2, 1, libc::MADV_DONTNEED).unwrap();
        if overwrites {
            uffd.register(target.start(), target.len()).unwrap();
        }
        let remap = Change::Remap { from: memory.at(1).addr(), to: target.start().addr(), len: target.len() };
        let mut expected = vec![remap, Change::Unmap(memory.range(1, 2))];
        if overwrites {
            expected.insert(0, Change::Unmap(target.range(0, 2)));
        }
        watched.assert_told(|| memory.move_over(1, 2, &target, 0), &expected);
        // The pages are there now, and the missing one is delivered there.
        assert_eq!(target.read(0), BYTE);
        watched.assert_missing(&target, 1);
    }
}

#[test]
fn move_that_keeps_the_old_mapping_registers_both() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP);
    let target = Memory::anonymous(2);
    let features = FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
    let watched = Watched::new(features, Memory::anonymous(2));
    let memory = &watched.memory;
    memory.advise(1, 1, libc::MADV_DONTNEED).unwrap();
    let remap = Change::Remap { from: memory.start().addr(), to: target.start().addr(), len: target.len() };
    watched.assert_told(|| memory.move_over(0, 2, &target, libc::MREMAP_DONTUNMAP), &[remap]);
    assert_eq!(target.read(0), BYTE);
    watched.assert_missing(&target, 1);
    watched.assert_missing(memory, 0);
}

#[test]
fn unreported_move_ends_registration() {
    require!();
    let target = Memory::anonymous(2);
    let watched = Watched::new(FeatureFlags::empty(), Memory::anonymous(2));
    watched.memory.advise(1, 1, libc::MADV_DONTNEED).unwrap();
    watched.memory.move_over(0, 2, &target, 0);
    assert_eq!((target.read(0), target.read(1)), (BYTE, 0));
    assert_silent(&watched.uffd);
}

#[test]
fn changes_are_reported_in_order() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP);
    let features = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP;
    let watched = Watched::new(features, Memory::anonymous(3));
    let (uffd, memory) = (&watched.uffd, &watched.memory);
    let remove = || memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
    while_changing(uffd, remove, |first| {
        wait_until_in(first, libc::SYS_madvise);
        let unmap = || memory.unmap(1, 1);
        while_changing(uffd, unmap, |second| {
            wait_until_in(second, libc::SYS_munmap);
            assert_eq!(Change::next(uffd), Change::Remove(memory.range(0, 1)));
            assert_eq!(Change::next(uffd), Change::Unmap(memory.range(1, 1)));
        });
    });
    assert_silent(uffd);
}

#[test]
fn change_waits_until_it_is_read() {
    require!(FeatureFlags::EVENT_REMOVE);
    let watched = Watched::new(FeatureFlags::EVENT_REMOVE, Memory::anonymous(2));
    let (uffd, memory) = (&watched.uffd, &watched.memory);
    let page = memory.page();
    let done = AtomicBool::new(false);
    let remove = || {
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        done.store(true, Ordering::SeqCst);
    };
    while_changing(uffd, remove, |thread| {
        wait_for_event(uffd);
        wait_until_in(thread, libc::SYS_madvise);
        // What the kernel refuses meanwhile, and what it doesn't.
        let error = uffd.write_protect(memory.at(1), page).unwrap_err();
        assert!(error.is_retryable() && matches!(error, Error::SystemError(Errno::EAGAIN)), "{error:?}");
        uffd.unregister(memory.at(1), page).unwrap();
        uffd.register(memory.at(1), page).unwrap();
        uffd.wake(memory.at(1), page).unwrap();
        assert!(!done.load(Ordering::SeqCst));
        assert_eq!(Change::next(uffd), Change::Remove(memory.range(0, 1)));
    });
    assert!(done.load(Ordering::SeqCst));
    // No more trouble once the thread is through.
    zero(uffd, memory, 0, 1);
}

#[test]
fn closing_lets_everybody_go_on() {
    require!(FeatureFlags::EVENT_REMOVE);
    let Watched { uffd, memory } = Watched::new(FeatureFlags::EVENT_REMOVE, Memory::anonymous(2));
    while_changing(
        &uffd,
        || memory.advise(0, 1, libc::MADV_DONTNEED).unwrap(),
        |_| {
            Change::next(&uffd);
        },
    );
    let read = std::thread::scope(|scope| {
        let remover = scope.spawn(|| memory.advise(1, 1, libc::MADV_DONTNEED));
        wait_for_event(&uffd);
        let reader = scope.spawn(|| memory.read(0));
        wait_for_pending(&uffd, 1);
        drop(uffd);
        assert_eq!(remover.join().unwrap(), Ok(()));
        reader.join().unwrap()
    });
    // What was missing is zero without a word.
    assert_eq!((read, memory.read(1)), (0, 0));
}

#[test]
fn fault_and_its_removal_are_both_reported() {
    require!(FeatureFlags::EVENT_REMOVE);
    let watched = Watched::new(FeatureFlags::EVENT_REMOVE, Memory::anonymous(2));
    let (uffd, memory) = (&watched.uffd, &watched.memory);
    watched.assert_told(
        || memory.advise(0, 2, libc::MADV_DONTNEED).unwrap(),
        &[Change::Remove(memory.range(0, 2))],
    );
    during_all(uffd, memory, [|| memory.read(0)], |faults| {
        assert_eq!(faults.next(), Fault::read(FaultKind::Missing, memory, 0));
        // The page that a thread waits for is removed once more.
        let remove = || memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        watched.assert_told(remove, &[Change::Remove(memory.range(0, 1))]);
        zero(uffd, memory, 0, 1);
    });
}
