//! Pages of shared memory on their way out, at each point of it: read, written, removed, unmapped, and forked meanwhile.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use super::evict::{Cell, accesses, once};
use crate::pager::{Budget, FaultAround, PageData, Pager, Region};
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, page, require, test_name};
use crate::sync_point::Departure;
use crate::{FeatureFlags, Uffd};

pub(super) const PAGES: usize = 64;
/// The least that there can be.
const BUDGET: usize = 16;

pub(super) const NEEDS: FeatureFlags = FeatureFlags::WP_UNPOPULATED.union(FeatureFlags::MINOR_SHMEM);

const POINTS: [Departure; 4] =
    [Departure::BeforeLeave, Departure::BeforeCopyOut, Departure::BeforeWriteBack, Departure::AfterLeave];

/// A memfd of which a part is resident, and each page has its number in each byte.
pub(super) struct Limited {
    // Dropped first: it poisons what is missing, where another test's memory may lie once this one is unmapped.
    pub(super) pager: Pager,
    pub(super) memory: Arc<Memory>,
    budget: Budget,
}

fn region(memory: &Memory, budget: &Budget) -> Region {
    let source = |offset: u64, bytes: &mut [u8]| {
        for (at, bytes) in bytes.chunks_mut(page()).enumerate() {
            bytes.fill((offset as usize / page() + at) as u8);
        }
        Ok(PageData::Data)
    };
    Region::new(memory.start().expose_provenance(), memory.len(), source)
        .fault_around(FaultAround::Page)
        .minor(memory.file().try_clone().unwrap().into(), 0)
        .budget(budget)
}

fn cell_of(memory: &Memory, number: usize) -> Cell {
    Cell::at(std::ptr::slice_from_raw_parts_mut(memory.start().cast(), memory.len()), number)
}

impl Limited {
    pub(super) fn new(features: FeatureFlags) -> Self {
        let (memory, budget) = (Memory::new(Kind::Memfd, PAGES), Budget::new(BUDGET * page()));
        let pager = Pager::builder().threads(2).max_threads(2).build().unwrap();
        #[expect(unsafe_code, reason = "the memory is the test's")]
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
        unsafe { pager.add_own(crate::support::uffd(features), [region(&memory, &budget)]) }.unwrap();
        Self { pager, memory: Arc::new(memory), budget }
    }

    pub(super) fn cell(&self, number: usize) -> Cell {
        cell_of(&self.memory, number)
    }

    /// Makes page 3 resident by a read, or by a write. Returns a byte of it, and what that is.
    pub(super) fn resident_page(&self, is_written: bool) -> (Cell, u8) {
        let cell = self.cell(3);
        if is_written {
            cell.write(0x83);
            return (cell, 0x83);
        }
        assert_eq!(cell.read(), 3);
        (cell, 3)
    }

    /// Touches other pages until something has happened.
    fn push_out<T>(&self, happened: &mpsc::Receiver<T>) -> T {
        for number in (8..PAGES).cycle() {
            if let Ok(outcome) = happened.try_recv() {
                return outcome;
            }
            assert_eq!(self.cell(number).read(), number as u8);
        }
        unreachable!("it goes on")
    }

    /// Reads enough other pages for a page that was read before to leave.
    pub(super) fn read_others(&self) {
        for number in (8..PAGES).chain(8..PAGES) {
            assert_eq!(self.cell(number).read(), number as u8);
        }
    }
}

/// Each point that a page passes, written or not.
fn each_point(test: impl Fn(Departure, bool)) {
    for point in POINTS {
        for is_written in [false, true] {
            if is_written || point != Departure::BeforeWriteBack {
                test(point, is_written);
            }
        }
    }
}

#[test]
fn shared_page_accessed_while_it_leaves_is_right() {
    require!(NEEDS);
    each_point(|point, is_written| {
        for (reads, writes) in [(true, false), (true, true), (false, true)] {
            let limited = Limited::new(FeatureFlags::empty());
            let (cell, before) = limited.resident_page(is_written);
            let (_armed, happened) = once(point, cell, move || {
                accesses(cell, move |cell| {
                    let found = if reads { cell.read() } else { before };
                    if writes {
                        cell.write(0x99);
                    }
                    found
                })
            });
            let access = limited.push_out(&happened);
            let context = format!("{point:?}, written before: {is_written}, written: {writes}");
            assert_eq!(access.join().unwrap(), before, "{context}");
            let after = if writes { 0x99 } else { before };
            assert_eq!((cell.read(), cell.next().read()), (after, 3), "{context}");
            // It leaves once more, and comes back.
            limited.read_others();
            assert_eq!((cell.read(), cell.next().read()), (after, 3), "{context}");
            assert!((4..PAGES).all(|number| limited.cell(number).read() == number as u8), "{context}");
        }
    });
}

#[test]
fn shared_page_that_is_removed_while_it_leaves_is_zero() {
    require!(NEEDS | FeatureFlags::EVENT_REMOVE);
    each_point(|point, is_written| {
        let limited = Limited::new(FeatureFlags::EVENT_REMOVE);
        let (cell, _) = limited.resident_page(is_written);
        let address = limited.memory.at(3).expose_provenance();
        let (_armed, happened) = once(point, cell, move || {
            // By a worker's reading of the event.
            let start = std::ptr::with_exposed_provenance_mut(address);
            #[expect(unsafe_code, reason = "removes a page")]
            // SAFETY: a page of the test's memory, which nothing borrows.
            let removed = unsafe { libc::madvise(start, page(), libc::MADV_REMOVE) };
            assert_eq!(removed, 0);
        });
        limited.push_out(&happened);
        let context = format!("{point:?}, written before: {is_written}");
        assert_eq!((cell.read(), cell.next().read()), (0, 0), "{context}");
        cell.write(0x99);
        limited.read_others();
        assert_eq!((cell.read(), cell.next().read()), (0x99, 0), "{context}");
    });
}

#[test]
fn shared_page_unmapped_while_it_leaves_spares_others() {
    require!(NEEDS | FeatureFlags::EVENT_UNMAP);
    each_point(|point, is_written| {
        let limited = Limited::new(FeatureFlags::EVENT_UNMAP);
        let (cell, _) = limited.resident_page(is_written);
        let address = limited.memory.at(3).expose_provenance();
        let (_armed, happened) = once(point, cell, move || {
            // Not unmapped but mapped over: another thread might map something there.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let start = std::ptr::with_exposed_provenance_mut(address);
            #[expect(unsafe_code, reason = "takes a page away")]
            // SAFETY: a page of the test's memory, which nothing borrows.
            let mapped =
                unsafe { libc::mmap(start, page(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
            assert_eq!(mapped, start);
        });
        limited.push_out(&happened);
        limited.read_others();
        assert_eq!(cell.read(), 0, "{point:?} {is_written}: it is another mapping's");
        let resident = limited.budget.resident();
        assert!(resident <= BUDGET * page(), "{point:?} {is_written}: {resident}");
    });
}

#[test]
fn shared_page_keeps_a_childs_write_while_it_leaves() {
    require!(NEEDS | FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        each_point(|point, is_written| {
            let limited = Limited::new(FeatureFlags::EVENT_FORK);
            let (cell, before) = limited.resident_page(is_written);
            let shared = Arc::clone(&limited.pager.shared);
            let (_armed, happened) = once(point, cell, move || {
                let forks = shared.statistics().forks;
                let forking = thread::spawn(move || {
                    child::fork(move || {
                        assert_eq!(cell.read(), before);
                        cell.write(0x99);
                        assert_eq!((cell.read(), cell.next().read()), (0x99, 3));
                    })
                    .succeed();
                });
                wait_until(|| shared.statistics().forks > forks);
                forking
            });
            limited.push_out(&happened).join().unwrap();
            let context = format!("{point:?}, written before: {is_written}");
            assert_eq!((cell.read(), cell.next().read()), (0x99, 3), "{context}");
            limited.read_others();
            assert_eq!((cell.read(), cell.next().read()), (0x99, 3), "{context}");
        });
    });
}

#[test]
fn process_that_ends_while_a_page_leaves_is_uncounted() {
    require!(NEEDS);
    child::run_well(test_name!(), || {
        each_point(|point, is_written| {
            let (memory, budget) = (Memory::new(Kind::Memfd, PAGES), Budget::new(BUDGET * page()));
            let (mut here, there) = UnixStream::pair().unwrap();
            let target = child::fork(|| {
                child::send_fd(&there, crate::support::uffd(FeatureFlags::empty()).as_fd());
                assert_eq!((&there).read(&mut [0]).unwrap(), 1);
                let cell = cell_of(&memory, 3);
                if is_written {
                    cell.write(0x83);
                } else {
                    assert_eq!(cell.read(), 3);
                }
                // Until it is killed.
                loop {
                    (8..PAGES).for_each(|number| assert_eq!(cell_of(&memory, number).read(), number as u8));
                }
            });
            let descriptor = Uffd::from(child::receive_fd(&here));
            let pager = Pager::builder().threads(2).max_threads(2).on_problem(|_| {}).build().unwrap();
            let added = pager.add(descriptor, [region(&memory, &budget)]).unwrap();
            pager.watch(added.descriptor, target.pidfd()).unwrap();
            let target = Mutex::new(Some(target));
            let (_armed, happened) = once(point, cell_of(&memory, 3), move || {
                let target = target.lock().unwrap().take().expect("it runs");
                target.kill();
                target.wait();
            });
            here.write_all(&[1]).unwrap();
            happened.recv().unwrap();
            pager.join();
            wait_until(|| budget.resident() == 0);
        });
    });
}
