//! Shared memory that a budget limits, from outside: protected, copied, and dropped from its file.

use std::os::unix::fs::MetadataExt;
use std::thread;

use userfaultfd::FeatureFlags;
use userfaultfd::pager::{Added, Budget, Error, OnRemoval, Pager, Region};

use crate::reader::{Reader, Seen, tell_signals};
use crate::scene::{Pages, access, byte, check, eventually, fill, random_place, region, serve};
use crate::support::memory::{Kind, Memory};
use crate::support::random::Random;
use crate::support::{child, page, require, test_name, uffd};

/// What shared memory with a budget takes: pages of a file that are mapped protected.
const NEEDS: FeatureFlags = FeatureFlags::WP_UNPOPULATED.union(FeatureFlags::MINOR_SHMEM);

/// Everything that the descriptor can tell of but forks.
const CHANGES: FeatureFlags =
    FeatureFlags::EVENT_REMOVE.union(FeatureFlags::EVENT_REMAP).union(FeatureFlags::EVENT_UNMAP);

const PAGES: usize = 64;
/// The least that there can be.
const BUDGET: usize = 16;

/// A memfd of which a part is resident.
struct Limited {
    // Dropped first: it poisons what is missing, where another test's memory may lie once this one is unmapped.
    pager: Pager,
    memory: Memory,
    budget: Budget,
    source: Pages,
    added: Added,
}

fn limited_region(memory: &Memory, source: Pages, budget: &Budget) -> Region {
    region(memory, source).minor(memory.file().try_clone().unwrap().into(), 0).budget(budget)
}

impl Limited {
    fn new(features: FeatureFlags) -> Self {
        let (memory, budget) = (Memory::new(Kind::Memfd, PAGES), Budget::new(BUDGET * page()));
        let (pager, source) = (Pager::builder().threads(2).build().unwrap(), Pages::new(page()));
        let added = serve(&pager, uffd(features), limited_region(&memory, source.clone(), &budget));
        Self { pager, memory, budget, source, added }
    }

    /// Checks that no more than the budget is in the file.
    #[track_caller]
    fn is_within(&self) {
        let file: std::fs::File = self.memory.file().try_clone().unwrap().into();
        let bytes = file.metadata().unwrap().blocks() as usize * 512;
        assert!(bytes <= BUDGET * page(), "{} pages are in the file", bytes / page());
        assert!(self.budget.resident() <= BUDGET * page(), "{}", self.budget);
    }
}

#[test]
fn pages_leave_the_file_and_come_back() {
    require!(NEEDS);
    let limited = Limited::new(FeatureFlags::empty());
    for _ in 0..3 {
        for number in 0..PAGES {
            check(&limited.memory, number, number);
            limited.is_within();
        }
    }
    let statistics = limited.budget.statistics();
    assert!(statistics.evictions >= (2 * PAGES) as u64 && statistics.refaults > 0, "{statistics:?}");
    assert_eq!(statistics.spilled, 0, "nothing was written");
    assert!(limited.source.reads().values().all(|reads| *reads > 1), "what wasn't written is read again");
    // Written by the first byte alone, which is what the fault of a write has to keep.
    for round in 0..3 {
        for number in (0..PAGES).step_by(2) {
            let before = if round == 0 { byte(number) } else { 100 + round - 1 };
            assert_eq!(limited.memory.read(number), before, "page {number}");
            limited.memory.write(number, 100 + round);
            limited.is_within();
        }
        for number in 0..PAGES {
            let mut expected = vec![0; page()];
            fill(number, &mut expected);
            expected[0] = if number % 2 == 0 { 100 + round } else { byte(number) };
            assert!(limited.memory.content(number) == expected, "page {number} in round {round}");
        }
    }
    let statistics = limited.budget.statistics();
    assert!(statistics.spilled > 0 && statistics.unwritten == 0, "{statistics:?}");
}

#[test]
fn random_program_finds_its_writes_and_removals() {
    require!(NEEDS | FeatureFlags::EVENT_REMOVE);
    for seed in 0..4 {
        let limited = Limited::new(CHANGES);
        let memory = &limited.memory;
        let mut expected = vec![0; PAGES * page()];
        expected.chunks_mut(page()).enumerate().for_each(|(number, bytes)| fill(number, bytes));
        // SAFETY: the mapping lives longer, and nothing else leads to it until the slice is dropped.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.start().cast::<u8>(), memory.len()) };
        let mut random = Random::new(seed);
        for step in 0..2000 {
            let (at, len) = random_place(&mut random, bytes.len());
            match random.below(100) {
                what @ 0..90 => access(what, bytes, &mut expected, at..at + len, step),
                _ => {
                    let number = at / page();
                    memory.advise(number, 1, libc::MADV_REMOVE).unwrap();
                    expected[number * page()..(number + 1) * page()].fill(0);
                }
            }
            if step % 50 == 0 {
                limited.is_within();
            }
        }
        assert!(bytes == &expected[..], "seed {seed}");
        assert!(limited.budget.statistics().spilled > 0);
    }
}

#[test]
fn threads_find_what_they_wrote() {
    require!(NEEDS);
    let limited = Limited::new(FeatureFlags::empty());
    thread::scope(|scope| {
        for part in 0..3 {
            let memory = &limited.memory;
            scope.spawn(move || {
                let (mut random, mut expected) = (Random::new(part as u64), [None; PAGES]);
                for step in 0..1500 {
                    let number = random.below(PAGES / 3) * 3 + part;
                    let before = expected[number].unwrap_or(byte(number));
                    assert_eq!(memory.read(number), before, "page {number} in step {step}");
                    if random.one_in(2) {
                        let new = step as u8;
                        memory.write(number, new);
                        expected[number] = Some(new);
                    }
                }
            });
        }
    });
    limited.is_within();
    assert!(limited.budget.statistics().refaults > 0);
}

#[test]
fn memory_that_cant_leave_is_refused() {
    require!(NEEDS);
    let budget = Budget::new(BUDGET * page());
    let refused = |memory: &Memory, region: Region| {
        let pager = Pager::new().unwrap();
        let uffd = uffd(FeatureFlags::empty());
        // SAFETY: it is refused.
        let refused = unsafe { pager.add_own(uffd, [region]) }.unwrap_err();
        assert!(memory.len() > 0 && budget.resident() == 0);
        refused.error
    };
    let source = || Pages::new(page());
    let memory = Memory::new(Kind::Memfd, 4);
    let error = refused(&memory, region(&memory, source()).budget(&budget));
    assert!(error.to_string().contains("without a file doesn't go with a budget"), "{error}");
    let reloads = limited_region(&memory, source(), &budget).on_removal(OnRemoval::Reload);
    let error = refused(&memory, reloads);
    assert!(error.to_string().contains("Reload doesn't go with a budget"), "{error}");
    let error = refused(&memory, limited_region(&memory, source(), &budget).spill("/nowhere/at/all"));
    assert!(matches!(error, Error::Spill { .. }), "{error}");
    let small = Budget::new(3 * page());
    let error = refused(&memory, limited_region(&memory, source(), &small));
    assert!(matches!(error, Error::BudgetTooSmall { .. }), "{error}");
    if let Some(huge) = crate::scene::memory(test_name!(), Kind::Hugetlb, 1) {
        let error = refused(&huge, limited_region(&huge, Pages::new(huge.page()), &budget));
        assert!(error.to_string().contains("huge pages doesn't go with a budget"), "{error}");
    }
    // What all of it would be resident for.
    let limited = Limited::new(FeatureFlags::empty());
    assert!(matches!(limited.pager.finish(|_| {}), Err(Error::NotWithBudget { .. })));
    let finished = limited.pager.finish_region(limited.added.regions[0], |_| {});
    assert!(matches!(finished, Err(Error::NotWithBudget { .. })), "{finished:?}");
    check(&limited.memory, 5, 5);
}

#[test]
fn what_has_left_is_there_for_the_next_pager() {
    require!(NEEDS);
    for removes in [false, true] {
        let Limited { memory, budget, source, pager, added } = Limited::new(FeatureFlags::empty());
        (0..PAGES / 2).for_each(|number| memory.write(number, 200 + number as u8 % 50));
        (PAGES / 2..PAGES - 2).for_each(|number| check(&memory, number, number));
        let mut detached =
            if removes { vec![pager.remove(added.descriptor).unwrap()] } else { pager.detach() };
        assert_eq!(budget.resident(), 0);
        let detached = detached.pop().unwrap();
        let missing = detached.missing();
        let written = memory.range(0, PAGES / 2);
        assert!(
            missing.iter().all(|part| part.address >= written.end && part.offset.is_some()),
            "{missing:?}"
        );
        let (next, reads) = (Pager::new().unwrap(), source.reads());
        let file = memory.file().try_clone().unwrap().into();
        // Protected as it was.
        let region = region(&memory, source.clone()).minor(file, 0).write_protected().missing(missing);
        serve(&next, detached.uffd, region);
        for number in 0..PAGES {
            let expected = if number < PAGES / 2 { 200 + number as u8 % 50 } else { byte(number) };
            assert_eq!(memory.read(number), expected, "page {number}");
        }
        // What was written isn't read again.
        let written = |reads: &std::collections::BTreeMap<usize, usize>| -> usize {
            reads.range(..PAGES / 2).map(|(_, n)| n).sum()
        };
        assert_eq!(written(&source.reads()), written(&reads));
        next.finish(|_| {}).unwrap();
    }
}

#[test]
fn what_is_there_from_the_start_counts_and_leaves() {
    require!(NEEDS);
    let memory = Memory::new(Kind::Memfd, PAGES);
    let (first, source) = (Pager::new().unwrap(), Pages::new(page()));
    let file = memory.file().try_clone().unwrap().into();
    serve(&first, uffd(FeatureFlags::empty()), region(&memory, source.clone()).minor(file, 0));
    (0..PAGES - 8).for_each(|number| memory.write(number, 100 + number as u8));
    let detached = first.detach().pop().unwrap();
    let (pager, budget) = (Pager::new().unwrap(), Budget::new(BUDGET * page()));
    let region = limited_region(&memory, source.clone(), &budget).missing(detached.missing());
    let added = serve(&pager, detached.uffd, region);
    let limited = Limited { pager, memory, budget, source, added };
    // Without an access.
    eventually(|| limited.budget.resident() <= BUDGET * page(), true);
    for _ in 0..2 {
        for number in 0..PAGES {
            let expected = if number < PAGES - 8 { 100 + number as u8 } else { byte(number) };
            assert_eq!(limited.memory.read(number), expected, "page {number}");
        }
        limited.is_within();
    }
}

#[test]
fn budget_counts_no_memory_that_is_unmapped_or_removed() {
    require!(NEEDS | FeatureFlags::EVENT_UNMAP);
    for unmaps in [true, false] {
        let Limited { memory, budget, pager, added, .. } = Limited::new(CHANGES);
        (0..PAGES).for_each(|number| check(&memory, number, number));
        assert!(budget.resident() > 0);
        if unmaps {
            memory.unmap(0, PAGES);
        } else {
            pager.remove_region(added.regions[0]).unwrap();
        }
        eventually(|| budget.resident(), 0);
    }
}

#[test]
fn part_that_is_unmapped_or_moved_leaves_the_rest_limited() {
    require!(NEEDS | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP);
    let limited = Limited::new(CHANGES);
    let memory = &limited.memory;
    (0..PAGES).for_each(|number| memory.write(number, 100 + number as u8));
    let elsewhere = Memory::new(Kind::Memfd, 8);
    memory.move_over(8, 8, &elsewhere, 0);
    memory.unmap(16, 8);
    for round in 1..4 {
        for number in (0..8).chain(24..PAGES) {
            assert_eq!(memory.read(number), 100 + number as u8, "page {number}");
        }
        for number in 8..16 {
            let expected = if round == 1 { 100 + number as u8 } else { number as u8 + round - 1 };
            assert_eq!(elsewhere.read(number - 8), expected, "page {number} in round {round}");
            elsewhere.write(number - 8, number as u8 + round);
        }
    }
    // Those that were there when they were unmapped stay, and the budget is exceeded by no more.
    assert!(limited.budget.resident() <= BUDGET * page(), "{}", limited.budget);
}

#[test]
fn what_has_left_is_poisoned_when_the_pager_is_dropped() {
    require!(NEEDS | FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        tell_signals();
        let Limited { memory, budget, pager, .. } = Limited::new(FeatureFlags::empty());
        (0..PAGES).for_each(|number| memory.write(number, 100 + number as u8));
        drop(pager);
        let seen: Vec<_> = (0..PAGES).map(|number| Reader::of(memory.at(number).addr()).wait()).collect();
        let is_right =
            |(number, seen): (usize, &Seen)| [Seen::Byte(100 + number as u8), Seen::POISON].contains(seen);
        assert!(seen.iter().enumerate().all(is_right), "{seen:?}");
        let poisoned = seen.iter().filter(|seen| **seen == Seen::POISON).count();
        assert!((PAGES - BUDGET..PAGES).contains(&poisoned), "{poisoned}");
        assert_eq!(budget.resident(), 0);
    });
}

#[test]
fn parent_and_child_of_a_fork_find_what_either_wrote() {
    require!(NEEDS | FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let limited = Limited::new(CHANGES | FeatureFlags::EVENT_FORK);
        let memory = &limited.memory;
        (0..PAGES).for_each(|number| memory.write(number, 1));
        for round in 1..4 {
            let child = child::fork(|| {
                for number in (1..PAGES).step_by(2) {
                    assert_eq!(memory.read(number), round);
                    memory.write(number, round + 1);
                }
                for number in (1..PAGES).step_by(2) {
                    assert_eq!(memory.read(number), round + 1);
                }
            });
            for number in (0..PAGES).step_by(2) {
                assert_eq!(memory.read(number), round);
                memory.write(number, round + 1);
            }
            child.succeed();
            (0..PAGES).for_each(|number| assert_eq!(memory.read(number), round + 1, "page {number}"));
        }
        let statistics = limited.budget.statistics();
        assert!(statistics.evictions > 4 * PAGES as u64, "{statistics:?}");
        // Nothing leaves while a child isn't served yet.
        eventually(|| limited.budget.resident() <= BUDGET * page(), true);
    });
}
