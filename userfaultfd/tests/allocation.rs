//! A handler that is running neither allocates nor frees. Else it could wait for a lock of the allocator's, held by a
//! thread that waits for the handler: one that faulted inside the allocator, or one that forks under `EVENT_FORK`.

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::c_void;
use std::fs::{self, File};
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use userfaultfd::pager::{
    AsyncSource, Budget, BytesSource, FaultAround, FileSource, FileStore, LayeredSource, OverlaySource,
    PageData, PageSource, Pager, Region, ThreadedSource, ZeroSource,
};
use userfaultfd::{
    CopyMode, Errno, Error, Event, EventBuffer, FaultKind, FeatureFlags, LazyMemory, PagedMemory, Uffd,
    UffdBuilder,
};

use crate::support::child::{self, Forked};
use crate::support::fault::{during, during_all, each_mode, provoke};
use crate::support::fill;
use crate::support::handler::while_changing;
use crate::support::mapping::memfd;
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::raw::wait_for_event;
use crate::support::{may_watch_forks, page, require, test_name, uffd};

/// The system's allocator, which counts how often each thread calls it.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

/// Whether the threads of pagers are counted, and how often they called.
static WATCHED: AtomicBool = AtomicBool::new(false);
static PAGERS: AtomicUsize = AtomicUsize::new(0);

/// Whether this thread answers a pager's faults, reads its source, or takes pages away.
fn is_pagers() -> bool {
    let mut name = [0_u8; 16];
    // SAFETY: a name takes this number of bytes, with the NUL behind it.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    [&b"uffd-pager\0"[..], b"uffd-source\0", b"uffd-evict\0"].iter().any(|own| name.starts_with(own))
}

fn count() {
    if WATCHED.load(Ordering::SeqCst) && is_pagers() {
        PAGERS.fetch_add(1, Ordering::SeqCst);
    }
    // No storage of this kind is left when a thread is about to end; no test measures then.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: passes everything on, and keeps to what it counts with, which doesn't allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the same.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Does the work, and tells how often this thread called the allocator meanwhile.
fn allocations<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = CALLS.get();
    let done = work();
    (done, CALLS.get() - before)
}

/// Does the work, which must not call the allocator.
#[track_caller]
fn quietly<T>(work: impl FnOnce() -> T) -> T {
    let (done, calls) = allocations(work);
    assert_eq!(calls, 0, "calls of the allocator");
    done
}

/// Does the work, during which no thread of a pager may call the allocator.
#[track_caller]
fn with_quiet_pagers(work: impl FnOnce()) {
    PAGERS.store(0, Ordering::SeqCst);
    WATCHED.store(true, Ordering::SeqCst);
    work();
    WATCHED.store(false, Ordering::SeqCst);
    assert_eq!(PAGERS.load(Ordering::SeqCst), 0, "calls of the allocator");
}

/// Reads the next event. Waits for it on descriptors of both kinds.
fn next(uffd: &Uffd) -> Event {
    loop {
        match uffd.read_event().unwrap() {
            Some(event) => return event,
            None => wait_for_event(uffd),
        }
    }
}

/// Reads the next event, which must be a fault, and tells where it is.
fn next_fault(uffd: &Uffd) -> *mut c_void {
    match next(uffd) {
        Event::Pagefault { addr, .. } => addr,
        event => panic!("{event:?}"),
    }
}

/// Checks that an operation failed with `errno`, and asks all questions of the error.
fn assert_failed<T>(result: Result<T, Error>, errno: Errno) {
    let Err(error) = result else { panic!("no error") };
    assert_eq!(error.errno(), Some(errno));
    assert_eq!(error.is_retryable(), errno == Errno::EAGAIN);
    assert_eq!(error.progress().unwrap_or(0), 0);
}

#[test]
fn allocation_counter_counts() {
    require!();
    let ((), calls) = allocations(|| drop(black_box(Box::new(1))));
    assert_eq!(calls, 2);
    let (mut bytes, calls) = allocations(|| black_box(vec![0_u8; 100]));
    assert_eq!(calls, 1);
    let ((), calls) = allocations(|| bytes.reserve(1000));
    assert_eq!(calls, 1);
}

#[test]
fn handler_of_missing_pages_is_quiet() {
    require!();
    for non_blocking in [false, true] {
        let memory = Memory::anonymous(8);
        let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(non_blocking).create().unwrap();
        uffd.register(memory.start(), memory.len()).unwrap();
        let (content, len) = (vec![42_u8; page()], page());
        let content = content.as_ptr().cast();
        let touch = || (0..memory.pages()).map(|page| memory.read(page)).collect::<Vec<_>>();
        let seen = during(&uffd, &memory, touch, |_| {
            quietly(|| {
                for page in 0..memory.pages() {
                    let addr = next_fault(&uffd);
                    assert_eq!(addr, memory.at(page));
                    let filled = match page % 4 {
                        // SAFETY: the content lives on, and the memory is accessed only by raw pointers.
                        0 => unsafe { uffd.copy(content, addr, len, true) },
                        // SAFETY: as above.
                        1 => unsafe { uffd.copy_with(content, addr, len, CopyMode::DONT_WAKE) },
                        // SAFETY: as above.
                        2 => unsafe { uffd.zeropage(addr, len, true) },
                        // SAFETY: as above.
                        _ => unsafe { uffd.zeropage(addr, len, false) },
                    };
                    assert_eq!(filled.unwrap(), len);
                    // SAFETY: as above.
                    assert_failed(unsafe { uffd.copy(content, addr, len, true) }, Errno::EEXIST);
                    // SAFETY: as above.
                    assert_failed(unsafe { uffd.zeropage(addr, len, true) }, Errno::EEXIST);
                    uffd.wake(addr, len).unwrap();
                }
            });
        });
        assert_eq!(seen, [42, 42, 0, 0, 42, 42, 0, 0]);
    }
}

/// The refused thread looks for the reason itself: perhaps it is the handler, while a fork waits for it.
#[test]
fn refusal_is_looked_into_quietly() {
    require!();
    let (memory, other) = (Memory::anonymous(2), uffd(FeatureFlags::empty()));
    other.register(memory.at(1), page()).unwrap();
    let made = uffd(FeatureFlags::empty());
    let adopted = Uffd::from(OwnedFd::from(made.try_clone().unwrap()));
    let minor = userfaultfd::RegisterMode::MINOR;
    for uffd in [&made, &adopted] {
        let errors = quietly(|| {
            [
                (uffd.register(memory.start(), 1).unwrap_err(), Errno::EINVAL),
                (uffd.register_with_mode(memory.start(), page(), minor).unwrap_err(), Errno::EINVAL),
                (uffd.register(memory.start(), memory.len()).unwrap_err(), Errno::EBUSY),
            ]
        });
        for (error, errno) in errors {
            assert_eq!(error.errno(), Some(errno), "{error}");
        }
        // SAFETY: the memory is accessed only by raw pointers.
        let error = unsafe { uffd.zeropage(memory.start(), page(), true) }.unwrap_err();
        quietly(|| uffd.explain(&error, userfaultfd::IoctlFlags::ZEROPAGE, memory.start(), page()));
    }
}

#[test]
fn handler_of_batches_is_quiet() {
    require!();
    const THREADS: usize = 4;
    let (memory, uffd) = (Memory::anonymous(32), uffd(FeatureFlags::empty()));
    uffd.register(memory.start(), memory.len()).unwrap();
    let mut buffer = EventBuffer::new(THREADS);
    let (memory, share) = (&memory, memory.pages() / THREADS);
    let touch =
        |thread: usize| move || (thread * share..(thread + 1) * share).for_each(|page| memory.write(page, 1));
    during_all(&uffd, memory, (0..THREADS).map(touch), |_| {
        quietly(|| {
            let mut served = 0;
            while served < memory.pages() {
                wait_for_event(&uffd);
                for event in uffd.read_events(&mut buffer).unwrap() {
                    let Event::Pagefault { addr, .. } = event.unwrap() else { panic!("no fault") };
                    // SAFETY: the memory is accessed only by raw pointers.
                    unsafe { uffd.zeropage(addr, page(), true) }.unwrap();
                    served += 1;
                }
            }
            assert_eq!(uffd.read_events(&mut buffer).unwrap().count(), 0);
        });
    });
}

#[test]
fn handler_that_takes_changes_first_is_quiet() {
    require!(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP);
    let memory = Memory::anonymous(4);
    let target = Memory::anonymous(1);
    let uffd = uffd(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP);
    uffd.register(memory.start(), memory.len()).unwrap();
    let mut buffer = EventBuffer::new(8);
    let change = || {
        assert_eq!(memory.read(0), 0);
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        assert_eq!(memory.read(0), 0);
        memory.move_over(0, 1, &target, 0);
        memory.unmap(2, 1);
    };
    let [mut faults, mut removed, mut moved, mut unmapped] = [0; 4];
    while_changing(&uffd, change, |_| {
        quietly(|| {
            // Moving unmaps too.
            while unmapped < 2 {
                wait_for_event(&uffd);
                uffd.read_batch(&mut buffer).unwrap();
                buffer.changes_first();
                while let Some(event) = buffer.pop() {
                    match event.unwrap() {
                        Event::Pagefault { addr, .. } => {
                            // The fault may be read before the thread that removed has gone on.
                            // SAFETY: the memory is accessed only by raw pointers.
                            while let Err(error) = unsafe { uffd.zeropage(addr, page(), true) } {
                                assert!(error.is_retryable());
                                std::thread::yield_now();
                            }
                            faults += 1;
                        }
                        Event::Remove { .. } => removed += 1,
                        Event::Remap { .. } => moved += 1,
                        Event::Unmap { .. } => unmapped += 1,
                        event => panic!("{event:?}"),
                    }
                }
            }
        });
    });
    assert_eq!([faults, removed, moved, unmapped], [2, 1, 1, 2]);
}

#[test]
fn operations_during_layout_changes_are_quiet() {
    require!(FeatureFlags::EVENT_REMOVE);
    let (memory, uffd) = (Memory::anonymous(2), uffd(FeatureFlags::EVENT_REMOVE));
    uffd.register(memory.start(), memory.len()).unwrap();
    let (content, len) = (vec![42_u8; page()], page());
    let (content, start) = (content.as_ptr().cast(), memory.start());
    while_changing(
        &uffd,
        || memory.advise(1, 1, libc::MADV_DONTNEED).unwrap(),
        |_| {
            quietly(|| {
                wait_for_event(&uffd);
                // SAFETY: the content lives on, and the memory is accessed only by raw pointers.
                assert_failed(unsafe { uffd.copy(content, start, len, true) }, Errno::EAGAIN);
                // SAFETY: as above.
                let copied = unsafe { uffd.copy_with(content, start, len, CopyMode::empty()) };
                assert!(matches!(copied, Err(Error::PartiallyCopied(0))));
                // SAFETY: as above.
                assert_failed(unsafe { uffd.zeropage(start, len, true) }, Errno::EAGAIN);
                assert!(matches!(next(&uffd), Event::Remove { .. }));
            });
        },
    );
}

#[test]
fn handler_of_forks_is_quiet() {
    require!(FeatureFlags::EVENT_FORK, root);
    // In a process of its own, whose other threads wait: the fork takes the allocator's locks.
    child::run_well(test_name!(), || {
        let (memory, uffd) = (Memory::anonymous(1), uffd(FeatureFlags::EVENT_FORK));
        uffd.register(memory.start(), memory.len()).unwrap();
        // Another handler may have been handed the descriptor, and then makes sure that it is one.
        let adopted = Uffd::from(OwnedFd::from(uffd.try_clone().unwrap()));
        let mut buffer = EventBuffer::new(1);
        for way in 0..4 {
            let child = while_changing(
                &uffd,
                || child::fork(|| {}),
                |_| {
                    quietly(|| {
                        wait_for_event(&uffd);
                        match way {
                            0 => assert!(matches!(next(&uffd), Event::Fork { .. })),
                            1 => assert!(matches!(next(&adopted), Event::Fork { .. })),
                            2 => assert_eq!(uffd.read_events(&mut buffer).unwrap().count(), 1),
                            // Dropped with the batch.
                            _ => drop(uffd.read_events(&mut buffer).unwrap()),
                        }
                    });
                },
            );
            Forked::succeed(child);
        }
    });
}

#[test]
fn every_fill_is_quiet_also_on_present_page() {
    require!();
    for filler in fill::each(test_name!(), 2) {
        quietly(|| {
            assert!(filler.run(0, 1, true).is_ok());
            assert!(filler.run(0, 1, true).is_err());
            assert!(filler.run(1, 1, false).is_ok());
            assert!(filler.run_at(std::ptr::null_mut(), 0, true).is_err());
            filler.uffd.wake(filler.memory.at(1), filler.memory.page()).unwrap();
        });
    }
}

#[test]
fn handler_of_every_kind_of_fault_is_quiet() {
    require!();
    for (mode, memory, uffd) in each_mode(test_name!(), 1) {
        let kind = provoke(&uffd, &memory, mode);
        let content = vec![42_u8; memory.len()];
        let (start, len, content) = (memory.start(), memory.len(), content.as_ptr().cast());
        during(
            &uffd,
            &memory,
            || memory.write(0, 1),
            |faults| {
                faults.wait_for_sleepers(1);
                quietly(|| {
                    assert_eq!(next_fault(&uffd), start);
                    match kind {
                        FaultKind::Missing => {
                            // SAFETY: the content lives on, and the memory is accessed only by raw pointers.
                            assert_eq!(unsafe { uffd.copy(content, start, len, true) }.unwrap(), len);
                        }
                        FaultKind::Minor => {
                            assert_eq!(uffd.r#continue(start, len, true).unwrap(), len as u64);
                            assert_failed(uffd.r#continue(start, len, true), Errno::EEXIST);
                        }
                        // The writer sleeps until the last call: awake, it could meet the protection in between,
                        // and raise a fault that nobody here reads.
                        FaultKind::WriteProtected => {
                            uffd.remove_write_protection(start, len, false).unwrap();
                            uffd.write_protect(start, len).unwrap();
                            uffd.remove_write_protection(start, len, true).unwrap();
                        }
                        FaultKind::ReadWriteProtected => {
                            uffd.remove_read_write_protection(start, len, false).unwrap();
                            uffd.read_write_protect(start, len).unwrap();
                            uffd.remove_read_write_protection(start, len, true).unwrap();
                        }
                        kind => panic!("{kind:?}"),
                    }
                });
            },
        );
    }
}

/// Has a pager fill memory from a source, some of it before it is watched: buffers are made when they are first needed.
fn serve_quietly(source: impl PageSource + 'static, around: FaultAround, features: FeatureFlags) {
    const PAGES: usize = 512;
    let (memory, target) = (Memory::anonymous(PAGES), Memory::anonymous(1));
    // A thread that starts may allocate: others read events meanwhile.
    let pager = Pager::builder().threads(2).max_threads(2).build().unwrap();
    let region = Region::new(memory.start().expose_provenance(), memory.len(), source).fault_around(around);
    // SAFETY: the memory is accessed only by raw pointers.
    unsafe { pager.add_own(uffd(features), [region]) }.unwrap();
    let touch = |page: usize| assert_eq!(black_box(memory.read(page)), memory.read(page));
    (0..PAGES / 4).for_each(touch);
    with_quiet_pagers(|| {
        // Forwards, backwards, and where nobody was.
        (PAGES / 4..PAGES / 2).for_each(touch);
        (PAGES / 2..3 * PAGES / 4).rev().for_each(touch);
        (3 * PAGES / 4..PAGES).step_by(7).for_each(touch);
        if features.contains(FeatureFlags::EVENT_REMOVE) {
            memory.advise(0, PAGES / 4, libc::MADV_DONTNEED).unwrap();
            (0..PAGES / 4).for_each(|page| assert_eq!(memory.read(page), 0));
        }
        if features.contains(CHANGES) {
            for (page, flags) in [(0, 0), (3, libc::MREMAP_DONTUNMAP), (9, 0)] {
                memory.move_over(page, 1, &target, flags);
                assert_eq!(target.read(0), 0);
            }
            touch(3);
            for page in (10..100).step_by(3) {
                memory.unmap(page, 1);
                touch(page + 1);
            }
            // The allocator is locked when a fork begins, which waits until all of that is read and done.
            child::fork(|| assert_eq!(memory.read(101), 0)).succeed();
        }
    });
    assert!(pager.statistics().faults() > 0);
}

/// What a descriptor tells of the layout.
const CHANGES: FeatureFlags =
    FeatureFlags::EVENT_REMAP.union(FeatureFlags::EVENT_UNMAP).union(FeatureFlags::EVENT_FORK);

/// A file below, every third page of another over it, and some bytes over all.
fn layers() -> impl PageSource + 'static {
    let file = |byte: u8| {
        let file = File::from(memfd(0, 512));
        file.write_all_at(&vec![byte; 512 * page()], 0).unwrap();
        FileSource::new(file).unwrap()
    };
    let mut layers = LayeredSource::new(file(1)).unwrap();
    let every_third = (0..512).step_by(3).map(|page| (page * self::page()) as u64);
    layers.push_extents(file(2), every_third.map(|start| start..start + page() as u64)).unwrap();
    let mut source = OverlaySource::new(layers);
    for start in (0..512).step_by(5).map(|page| (page * self::page()) as u64) {
        source.patch(start + 9, [3; 16]).unwrap();
    }
    source
}

fn is_a_thread_of_a_source_left() -> bool {
    // A thread that ends meanwhile has no name any more.
    let names = fs::read_dir("/proc/self/task").unwrap();
    let mut names = names.filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).ok());
    names.any(|name| name.trim_end() == "uffd-source")
}

/// Likewise, from all kinds of sources.
fn serve_all_quietly(features: FeatureFlags) {
    let content = |offset: u64, bytes: &mut [u8]| {
        bytes.fill((offset >> 12) as u8);
        Ok(PageData::Data)
    };
    for around in
        [FaultAround::Page, FaultAround::Block(8 * page()), FaultAround::Adaptive { most: 64 * page() }]
    {
        serve_quietly(content, around, features);
        serve_quietly(BytesSource::new(vec![1; 512 * page()]), around, features);
        serve_quietly(ZeroSource, around, features);
        serve_quietly(layers(), around, features);
        // One: a second may begin, and so allocate, only when it is watched.
        let threads = ThreadedSource::new(content, 1).unwrap();
        serve_quietly(AsyncSource::new(threads), around, features);
        // Nothing waits for the end of its thread, which frees what it has.
        wait_until(|| !is_a_thread_of_a_source_left());
    }
}

#[test]
fn pager_at_work_is_quiet() {
    require!(FeatureFlags::EVENT_REMOVE);
    serve_all_quietly(FeatureFlags::empty());
    serve_all_quietly(FeatureFlags::EVENT_REMOVE);
}

#[test]
fn pager_of_changing_process_is_quiet() {
    require!(FeatureFlags::EVENT_REMOVE | CHANGES);
    if may_watch_forks() {
        child::run_well(test_name!(), || serve_all_quietly(FeatureFlags::EVENT_REMOVE | CHANGES));
    }
}

/// Pages of memory with a budget, and of the budget.
const LIMITED: (usize, usize) = (512, 48);

/// Accesses such memory, which was accessed before: some is written, and all of it leaves and comes back.
fn use_limited(memory: &mut [u8], budget: &Budget) {
    let mut touch = |page: usize, is_written: bool| {
        let byte = &mut memory[page * self::page() + 3];
        if is_written {
            *byte = page as u8;
        }
        black_box(*byte);
    };
    // Buffers are made when they are first needed.
    (0..LIMITED.0).for_each(|page| touch(page, page % 3 == 0));
    (0..LIMITED.0).for_each(|page| touch(page, false));
    let before = budget.statistics();
    with_quiet_pagers(|| {
        (0..LIMITED.0).for_each(|page| touch(page, page % 2 == 0));
        (0..LIMITED.0).rev().for_each(|page| touch(page, page % 5 == 0));
        (0..LIMITED.0).flat_map(|page| [page, page * 7 % LIMITED.0]).for_each(|page| touch(page, false));
    });
    let after = budget.statistics();
    assert!(after.evictions - before.evictions > LIMITED.0 as u64, "{after:?}");
    assert!(after.refaults > before.refaults, "{after:?}");
    assert!(after.spilled + after.write_backs > before.spilled + before.write_backs, "{after:?}");
    (0..LIMITED.0).step_by(2).for_each(|page| assert_eq!(memory[page * self::page() + 3], page as u8));
}

#[test]
fn faults_and_evictions_of_memory_with_a_budget_are_quiet() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        let (pages, most) = LIMITED;
        let content = |offset: u64, bytes: &mut [u8]| {
            bytes.fill((offset >> 12) as u8);
            Ok(PageData::Data)
        };
        for around in [FaultAround::Page, FaultAround::Adaptive { most: 64 * page() }] {
            let budget = Budget::new(most * page());
            let memory =
                LazyMemory::builder(content).len(pages * page()).budget(&budget).fault_around(around);
            use_limited(&mut memory.threads(2).max_threads(2).build().unwrap(), &budget);

            let (file, budget) = (File::from(memfd(0, pages)), Budget::new(most * page()));
            let memory =
                PagedMemory::builder(FileStore::new(file).unwrap()).budget(&budget).fault_around(around);
            use_limited(&mut memory.threads(2).max_threads(2).build().unwrap(), &budget);
        }
    });
}
