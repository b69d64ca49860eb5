//! Pages of shared memory with a limit whose removal an event has told of, and that are still there: MADV_REMOVE waits for
//! the file, which another thread has locked. The budget wants them out of memory meanwhile.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::evict::once;
use super::harness::start;
use super::limited::{Limited, NEEDS, PAGES};
use crate::pager::evict::clean;
use crate::pager::fill::work::{Fault, Outcome, Work};
use crate::pager::memory::descriptor::{Descriptor, LOOK_SHARD};
use crate::support::memory::Memory;
use crate::support::proc::{self, wait_until, wait_until_in};
use crate::support::{has, page, require, test_name};
use crate::sync_point::Departure;
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

fn descriptor(limited: &Limited) -> Arc<Descriptor> {
    limited.pager.shared.table.in_slot(0).expect("it is served")
}

/// A thread that removes the page: its event was read, and it waits for the file.
fn begin_to_remove(limited: &Limited) -> JoinHandle<()> {
    let (memory, before) = (Arc::clone(&limited.memory), limited.pager.statistics().removes);
    let (remover, id) = start(move || memory.advise(PAGE, 1, libc::MADV_REMOVE).unwrap());
    let descriptor = descriptor(limited);
    wait_until(|| {
        let serving = descriptor.lock_shard(LOOK_SHARD);
        let is_changing = serving.as_ref().is_some_and(|serving| serving.uffd.is_layout_changing());
        limited.pager.statistics().removes > before && !is_changing
    });
    wait_until_in(id, libc::SYS_madvise);
    remover
}

/// Has the page evicted, until that has ended or waits for the file.
fn begin_to_evict(limited: &Limited) -> JoinHandle<()> {
    let region = limited.pager.shared.regions.limited().pop().expect("the region");
    let residence = Arc::clone(region.residence.as_ref().expect("its residence"));
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
        let remover = begin_to_remove(&limited);
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
        let outcome = shared.lease().resume(&shared.fill, &descriptor(limited), Work::Fault(fault));
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
