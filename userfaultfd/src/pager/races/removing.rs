//! Pages of shared memory with a limit whose removal an event has told of, and that are still there: MADV_REMOVE waits for
//! the file, which another thread has locked. The budget wants them out of memory meanwhile.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::evict::once;
use super::harness::{Stop, start};
use super::limited::{Limited, NEEDS, PAGES};
use crate::pager::evict::clean;
use crate::pager::evict::residence::Residence;
use crate::pager::fill::work::{Fault, Outcome, Work};
use crate::pager::memory::descriptor::{Descriptor, LOOK_SHARD};
use crate::pager::serve::shared::Shared;
use crate::support::memory::Memory;
use crate::support::proc::{self, wait_until, wait_until_in};
use crate::support::{child, has, page, require, test_name};
use crate::sync_point::{Departure, Point};
use crate::{FaultKind, FeatureFlags, Uffd, UffdBuilder};

/// The page that is removed.
const PAGE: usize = 3;

const TOLD: FeatureFlags = NEEDS.union(FeatureFlags::EVENT_REMOVE);

/// A file that is locked by a write(2), which waits for its source.
struct FileLock {
    uffd: Uffd,
    writer: JoinHandle<()>,
    source: Arc<Memory>,
}

impl FileLock {
    /// Locks the file of memory, by a write behind its end. `None`, visibly, without the right to handle faults of the kernel.
    fn hold(test: &str, memory: &Memory) -> Option<Self> {
        let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(false).create();
        if !has(test, "a userfaultfd for faults of the kernel", uffd.is_ok()) {
            return None;
        }
        let (uffd, source) = (uffd.unwrap(), Arc::new(Memory::anonymous(1)));
        uffd.register(source.start(), source.len()).unwrap();
        let (file, from) = (memory.file().try_clone().unwrap(), Arc::clone(&source));
        let (writer, id) = start(move || {
            #[expect(unsafe_code, reason = "writes from memory that is missing")]
            // SAFETY: the kernel reads a byte of memory that is mapped as long as `from` lives.
            let written =
                unsafe { libc::pwrite(file.as_raw_fd(), from.start(), 1, (PAGES * page()) as libc::off_t) };
            assert_eq!(written, 1);
        });
        wait_until_in(id, libc::SYS_pwrite64);
        Some(Self { uffd, writer, source })
    }

    fn release(self) {
        #[expect(unsafe_code, reason = "fills memory of the test")]
        // SAFETY: no reference leads to the page.
        unsafe { self.uffd.zeropage(self.source.start(), self.source.len(), true) }.unwrap();
        self.writer.join().unwrap();
    }
}

fn descriptor(shared: &Shared) -> Arc<Descriptor> {
    shared.table.in_slot(0).expect("it is served")
}

/// A thread that removes the page: its event was read, and it waits for the file.
fn begin_to_remove(shared: &Shared, memory: &Arc<Memory>) -> JoinHandle<()> {
    let (memory, before) = (Arc::clone(memory), shared.statistics().removes);
    let (remover, id) = start(move || memory.advise(PAGE, 1, libc::MADV_REMOVE).unwrap());
    let descriptor = descriptor(shared);
    wait_until(|| {
        let serving = descriptor.lock_shard(LOOK_SHARD);
        let is_changing = serving.as_ref().is_some_and(|serving| serving.uffd.is_layout_changing());
        shared.statistics().removes > before && !is_changing
    });
    wait_until_in(id, libc::SYS_madvise);
    remover
}

fn residence(limited: &Limited) -> Arc<Residence> {
    let region = limited.pager.shared.regions.limited().pop().expect("the region");
    Arc::clone(region.residence.as_ref().expect("its residence"))
}

/// A byte of the page, as its file has it.
fn byte_in_file(limited: &Limited) -> u8 {
    let (file, mut byte) = (File::from(limited.memory.file().try_clone().unwrap()), [0]);
    file.read_exact_at(&mut byte, (PAGE * page() + 9) as u64).unwrap();
    byte[0]
}

/// Has the page evicted, until that has ended or waits for the file.
fn begin_to_evict(limited: &Limited) -> JoinHandle<()> {
    let residence = residence(limited);
    let (_armed, has_page) = once(Departure::BeforeLeave, limited.cell(PAGE), proc::thread_id);
    let evicting = thread::spawn(move || clean::evict(&residence, PAGE..PAGE + 1));
    let evictor = std::cell::Cell::new(None);
    wait_until(|| {
        evictor.set(has_page.try_recv().ok().or(evictor.get()));
        let waits = |id: libc::pid_t| proc::is_in(id, libc::SYS_fallocate) == Some(true);
        evicting.is_finished() || evictor.get().is_some_and(waits)
    });
    evicting
}

/// Calls `meanwhile` between the event of a removal and the removal, where the page is resident, and has it evicted then.
fn evict_while_it_is_removed(test: &str, drops_mapping: bool, meanwhile: impl Fn(&Limited)) {
    for is_written in [false, true] {
        let limited = Limited::new(FeatureFlags::EVENT_REMOVE);
        let (cell, _) = limited.resident_page(is_written);
        if drops_mapping {
            limited.memory.advise(PAGE, 1, libc::MADV_DONTNEED).unwrap();
        }
        let Some(lock) = FileLock::hold(test, &limited.memory) else { return };
        let remover = begin_to_remove(&limited.pager.shared, &limited.memory);
        meanwhile(&limited);
        let evicting = begin_to_evict(&limited);
        lock.release();
        evicting.join().unwrap();
        remover.join().unwrap();
        assert_eq!((cell.read(), cell.next().read()), (0, 0), "written before: {is_written}");
        cell.write(0x99);
        limited.read_others();
        assert_eq!((cell.read(), cell.next().read()), (0x99, 0), "written before: {is_written}");
    }
}

#[test]
fn page_that_is_about_to_be_removed_does_not_leave() {
    require!(TOLD);
    evict_while_it_is_removed(test_name!(), false, |_| {});
}

/// As where MADV_REMOVE has taken the mapping away, and not the page yet.
#[test]
fn unmapped_page_leaves_as_zeros_while_it_is_removed() {
    require!(TOLD);
    evict_while_it_is_removed(test_name!(), true, |_| {});
}

#[test]
fn late_fault_lets_no_page_leave_before_its_removal() {
    require!(TOLD);
    evict_while_it_is_removed(test_name!(), false, |limited| {
        // Of a thread that was woken when the page was filled.
        let fault = Fault {
            address: limited.memory.at(PAGE).addr(),
            kind: FaultKind::Missing,
            is_write: false,
            thread: 0,
            since: Instant::now(),
            joined: false,
        };
        let shared = &limited.pager.shared;
        let outcome = shared.lease().resume(&shared.fill, &descriptor(shared), Work::Fault(fault));
        assert!(matches!(outcome, Outcome::Settled), "{outcome:?}");
    });
}

#[test]
fn page_mapped_again_stays_until_it_is_removed() {
    require!(TOLD);
    evict_while_it_is_removed(test_name!(), true, |limited| {
        // Woken when the page is mapped, before the worker waits for the removal.
        assert!([PAGE as u8, 0x83].contains(&limited.cell(PAGE).read()));
    });
}

/// The evicting thread has the page when the event of its removal is read, and can't take it.
#[test]
fn page_that_could_not_leave_stays_until_it_is_removed() {
    require!(TOLD | FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let limited = Limited::new(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_FORK);
        let (cell, _) = limited.resident_page(false);
        let (mut here, there) = UnixStream::pair().unwrap();
        let stop = Stop::at(Point::BeforeAdopt, 0..usize::MAX);
        let (child, _) = start(move || {
            child::fork(move || assert_eq!((&there).read(&mut [0]).unwrap(), 1)).succeed();
        });
        stop.reached();
        let Some(lock) = FileLock::hold(test_name!(), &limited.memory) else { return };
        let (shared, memory) = (Arc::clone(&limited.pager.shared), Arc::clone(&limited.memory));
        let (armed, removes) = once(Departure::BeforeLeave, cell, move || begin_to_remove(&shared, &memory));
        clean::evict(&residence(&limited), PAGE..PAGE + 1);
        drop(armed);
        stop.go();
        limited.pager.shared.mailbox.wait_for_forks();
        let evicting = begin_to_evict(&limited);
        lock.release();
        evicting.join().unwrap();
        removes.recv().unwrap().join().unwrap();
        here.write_all(&[1]).unwrap();
        child.join().unwrap();
        assert_eq!((cell.read(), cell.next().read()), (0, 0));
    });
}

#[test]
fn page_removed_without_an_event_leaves_as_zeros() {
    require!(NEEDS);
    let limited = Limited::new(FeatureFlags::empty());
    let (cell, _) = limited.resident_page(false);
    limited.memory.punch(PAGE, 1);
    clean::evict(&residence(&limited), PAGE..PAGE + 1);
    assert_eq!((cell.read(), cell.next().read()), (0, 0));
}

#[test]
fn page_that_is_unmapped_stays_in_the_file() {
    require!(NEEDS | FeatureFlags::EVENT_UNMAP);
    let limited = Limited::new(FeatureFlags::EVENT_UNMAP);
    let (_, written) = limited.resident_page(true);
    limited.memory.unmap(PAGE, 1);
    clean::evict(&residence(&limited), PAGE..PAGE + 1);
    assert_eq!(byte_in_file(&limited), written);
}

/// A child may write without a fault what its parent has written before the fork, and isn't protected there yet.
#[test]
fn page_stays_while_a_forks_child_is_not_served() {
    require!(NEEDS | FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        for is_written in [true, false] {
            let limited = Limited::new(FeatureFlags::EVENT_FORK);
            let (cell, before) = limited.resident_page(is_written);
            let stop = Stop::at(Point::BeforeAdopt, 0..usize::MAX);
            let (child, _) = start(move || child::fork(move || cell.write(0x99)).succeed());
            stop.reached();
            clean::evict(&residence(&limited), PAGE..PAGE + 1);
            let byte = byte_in_file(&limited);
            stop.go();
            child.join().unwrap();
            assert!([before, 0x99].contains(&byte), "{byte:#x}");
            assert_eq!((cell.read(), cell.next().read()), (0x99, 3));
            limited.read_others();
            assert_eq!((cell.read(), cell.next().read()), (0x99, 3));
        }
    });
}
