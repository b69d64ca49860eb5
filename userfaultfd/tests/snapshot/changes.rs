//! Memory that is dropped, unmapped or moved while a snapshot of it is taken.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use userfaultfd::snapshot::{Options, Removal};
use userfaultfd::{FeatureFlags, RegisterMode};

use crate::image::{Image, Stop, addresses, number, stay_on_this_cpu};
use crate::support::memory::{self, Memory};
use crate::support::{child, page, proc, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// Memory of every small kind, of enough pages that the walk doesn't reach the end while the sink takes nothing.
fn each(test: &str) -> impl Iterator<Item = Memory> {
    let pages = 8 * (256 << 10) / page();
    memory::each_of(test, &memory::Kind::SMALL, RegisterMode::WRITE_PROTECT, pages)
        .inspect(|memory| println!("{memory:?}"))
}

/// Begins a snapshot whose sink takes nothing, does `change` to the last pages in a thread of its own, and lets the sink
/// go on when that waits in the system call, or has returned.
pub(crate) fn during(
    memory: &Memory,
    removal: Removal,
    syscall: Option<libc::c_long>,
    change: impl FnOnce() + Send,
) -> Image {
    let image = Image::closed();
    let options = Options::new().range(addresses(memory)).buffer(0).removal(removal);
    let snapshot = options.begin(image.clone()).unwrap();
    image.wait_for_piece();
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let changing = scope.spawn(move || {
            tell.send(proc::thread_id()).unwrap();
            change();
        });
        let thread = told.recv().unwrap();
        match syscall {
            Some(syscall) => proc::wait_until_in(thread, syscall),
            None => changing.join().unwrap(),
        }
        image.open();
    });
    snapshot.wait().unwrap();
    image
}

#[test]
fn pages_that_are_dropped_are_saved_before() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!()) {
        let (before, pages) = (number(&memory, 1), memory.pages());
        let image = during(&memory, Removal::Save, Some(libc::SYS_madvise), || {
            memory.advise(pages - 5, 3, libc::MADV_DONTNEED).unwrap();
            memory.write(pages - 4, 99);
        });
        assert_eq!(image.content(&memory), before, "{memory:?}");
        assert!(image.with(|delivered| delivered.gone.is_empty()));
        assert_eq!(memory.read(pages - 4), 99);
    }
}

#[test]
fn writers_go_on_after_a_drop_that_waited() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!()) {
        let (before, pages) = (number(&memory, 1), memory.pages());
        thread::scope(|scope| {
            let memory = &memory;
            let image = during(memory, Removal::Save, Some(libc::SYS_madvise), || {
                let (tell, told) = mpsc::channel();
                // This one waits from before the drop on, or in it.
                scope.spawn(move || {
                    tell.send(()).unwrap();
                    memory.write(pages - 9, 99);
                });
                told.recv().unwrap();
                memory.advise(pages - 5, 3, libc::MADV_DONTNEED).unwrap();
            });
            assert_eq!(image.content(memory), before, "{memory:?}");
        });
        assert_eq!(memory.read(pages - 9), 99);
    }
}

#[test]
fn dropped_pages_are_zeros_on_request() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!()) {
        let (mut before, pages) = (number(&memory, 1), memory.pages());
        let image = during(&memory, Removal::Zero, None, || {
            memory.advise(pages - 5, 3, libc::MADV_DONTNEED).unwrap();
            memory.write(pages - 4, 99);
        });
        before[pages - 5..pages - 2].fill(0);
        assert_eq!(image.content(&memory), before, "{memory:?}");
        assert!(image.with(|delivered| delivered.gone.is_empty()));
    }
}

/// One thread writes while another one drops all the time: the kernel lets no protection be lifted before the drop was
/// read. The walk stands still, and there are buffers for what is written. On one CPU there is a drop to be read whenever
/// the snapshot's thread runs.
#[test]
fn writers_beside_droppers_do_not_wait_for_the_sink() {
    require!(WRITE_PROTECT);
    write_beside_droppers(test_name!());
    let on_one_cpu = || {
        stay_on_this_cpu();
        write_beside_droppers(test_name!());
    };
    thread::scope(|scope| scope.spawn(on_one_cpu).join().unwrap());
}

fn write_beside_droppers(test: &str) {
    for memory in each(test) {
        let (before, pages) = (number(&memory, 1), memory.pages());
        let image = Image::closed();
        let options = Options::new().range(addresses(&memory)).removal(Removal::Zero).buffer(512 << 10);
        let snapshot = options.begin(image.clone()).unwrap();
        image.wait_for_piece();
        let written = pages - ((128 << 10) / page()).max(4)..pages;
        let dropped = written.start - 4..written.start;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            let (memory, stop, dropped) = (&memory, &stop, dropped.clone());
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    dropped.clone().for_each(|page| memory.advise(page, 1, libc::MADV_DONTNEED).unwrap());
                }
            });
            written.clone().for_each(|page| memory.write(page, 99));
        });
        image.open();
        snapshot.wait().unwrap();
        let content = image.content(&memory);
        for page in 0..pages {
            let zero = dropped.contains(&page) && content[page] == 0;
            assert!(zero || content[page] == before[page], "{memory:?} {page} {}", content[page]);
        }
    }
}

#[test]
fn unmapped_pages_are_gone() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        for memory in each(test_name!()) {
            let (before, pages) = (number(&memory, 1), memory.pages());
            let image = during(&memory, Removal::Save, None, || memory.unmap(pages - 5, 3));
            let gone = image.with(|delivered| delivered.gone.clone());
            let expected: Vec<u64> = (pages - 5..pages - 2).map(|page| page as u64).collect();
            assert_eq!(gone, expected, "{memory:?}");
            let content = image.content(&memory);
            assert!((0..pages).all(|page| content[page] == before[page] || gone.contains(&(page as u64))));
        }
    });
}

#[test]
fn pages_that_move_are_followed() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        for memory in each(test_name!()) {
            let (before, pages) = (number(&memory, 1), memory.pages());
            let target = Memory::anonymous(3);
            let image = during(&memory, Removal::Save, Some(libc::SYS_mremap), || {
                memory.move_over(pages - 5, 3, &target, 0);
                // Saved, from where it is now, before it is written.
                target.write(1, 99);
            });
            assert_eq!(image.content(&memory), before, "{memory:?}");
            assert!(image.with(|delivered| delivered.gone.is_empty()));
            assert_eq!((target.read(0), target.read(1)), (before[pages - 5], 99));
        }
    });
}

/// Several write to where pages were moved before that was read: the first of their faults is on a page that isn't known
/// there yet, and the others hide what tells of it.
#[test]
fn writers_to_moved_pages_do_not_wait_for_the_sink() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        stay_on_this_cpu();
        for memory in each(test_name!()) {
            let (before, pages) = (number(&memory, 1), memory.pages());
            let target = Memory::anonymous(3);
            let image = Image::closed();
            let options = Options::new().range(addresses(&memory)).removal(Removal::Zero).buffer(512 << 10);
            let snapshot = options.begin(image.clone()).unwrap();
            image.wait_for_piece();
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                let _stop = Stop(&stop);
                for page in 0..3 {
                    let (target, stop) = (&target, &stop);
                    scope.spawn(move || {
                        while !stop.load(Ordering::SeqCst) {
                            target.write(page, 99);
                        }
                    });
                }
                memory.move_over(pages - 5, 3, &target, 0);
            });
            image.open();
            snapshot.wait().unwrap();
            assert_eq!(image.content(&memory), before, "{memory:?}");
        }
    });
}

/// Threads write, drop and write again all the time, while one snapshot after the other is taken.
#[test]
fn constant_drops_make_progress() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(64);
    number(&memory, 0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for part in 0..4 {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                let pages = 16 * part..16 * part + 16;
                while !stop.load(Ordering::SeqCst) {
                    pages.clone().for_each(|page| memory.write(page, 1));
                    memory.advise(pages.start, 8, libc::MADV_DONTNEED).unwrap();
                    pages.clone().for_each(|page| memory.write(page, 2));
                }
            });
        }
        for _ in 0..20 {
            let image = Image::new();
            let options = Options::new().range(addresses(&memory));
            options.begin(image.clone()).unwrap().wait().unwrap();
            // What a call drops that was under way when the snapshot began may be gone: the event of that call went to the
            // snapshot before. Nothing else is.
            let gone = image.with(|delivered| delivered.gone.clone());
            assert!(gone.iter().all(|page| page % 16 < 8), "{gone:?}");
            let content = image.content(&memory);
            // What was there: a number of the beginning, what is written, or the zeros of a drop.
            let is_right = |(page, byte): (usize, &u8)| {
                *byte <= 2 || usize::from(*byte) == page || gone.contains(&(page as u64))
            };
            assert!(content.iter().enumerate().all(is_right), "{content:?}");
        }
    });
}
