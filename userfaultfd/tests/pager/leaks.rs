//! Nothing is left behind: no descriptor, thread or mapping.

use std::collections::BTreeMap;
use std::fs;

use userfaultfd::pager::{PageData, Pager};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::scene::{Pages, can_poison, check, region, serve};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{child, maps, page, require, test_name, uffd};

/// What this process has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    /// Bytes that are mapped, but for those of the allocator and of stacks, which are kept for later.
    mapped: usize,
}

impl Holdings {
    fn now() -> Self {
        let names = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
            let name = fs::read_link(entry.unwrap().path()).ok()?;
            Some(name.to_string_lossy().into_owned())
        });
        let mut descriptors = BTreeMap::new();
        names.for_each(|name| *descriptors.entry(name).or_default() += 1);
        let threads = fs::read_dir("/proc/self/task").unwrap().count();
        Self { descriptors, threads, mapped: maps::status_bytes("VmSize") }
    }
}

#[test]
fn no_resource_is_left_after_any_end() {
    require!(FeatureFlags::EVENT_REMAP);
    child::run_well(test_name!(), || {
        let features = FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMOVE;
        let round = |end: usize| {
            let memory = Memory::anonymous(64);
            let elsewhere = Memory::anonymous(2);
            let pager = Pager::builder().threads(2).read_ahead_threads(1).build().unwrap();
            let added = serve(&pager, uffd(features), region(&memory, Pages::new(page())));
            check(&memory, 5, 5);
            memory.move_over(6, 2, &elsewhere, 0);
            check(&elsewhere, 1, 7);
            memory.advise(8, 2, libc::MADV_DONTNEED).unwrap();
            assert_eq!(memory.read(8), 0);
            match end % 5 {
                0 => drop(pager),
                1 => pager.finish(|_| {}).unwrap(),
                2 => drop(pager.detach()),
                3 => drop(pager.remove(added.descriptor).unwrap()),
                _ => assert_eq!(pager.remove_region(added.regions[0]).is_ok(), can_poison()),
            }
            let source = |_: u64, bytes: &mut [u8]| {
                bytes.fill(1);
                Ok(PageData::Data)
            };
            let lazy = LazyMemory::new(1 << 20, source).unwrap();
            assert_eq!(lazy[12345], 1);
        };
        // What is kept for later is there after some rounds.
        (0..10).for_each(round);
        let before = Holdings::now();
        (0..50).for_each(round);
        // A thread is joined before it has ended altogether. The first count may have one too many for that.
        wait_until(|| Holdings::now().threads <= before.threads);
        let after = Holdings::now();
        assert_eq!(after.descriptors, before.descriptors);
        // Fifty regions, buffers or stacks would be more.
        assert!(after.mapped <= before.mapped + (4 << 20), "{before:?} {after:?}");
    });
}

#[test]
fn no_descriptor_is_left_of_children() {
    require!(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(8);
        let pager = Pager::builder().threads(2).build().unwrap();
        serve(&pager, uffd(FeatureFlags::EVENT_FORK), region(&memory, Pages::new(page())));
        let round = |_| {
            child::fork(|| assert_eq!(memory.read(3), crate::scene::byte(3))).succeed();
        };
        let before = Holdings::now();
        (0..8).for_each(round);
        wait_until(|| Holdings::now().descriptors == before.descriptors);
        assert_eq!(pager.descriptors().len(), 1);
        assert_eq!(pager.statistics().forks, 8);
    });
}
