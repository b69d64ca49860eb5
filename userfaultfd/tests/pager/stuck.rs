//! Pages that can't be filled though the source has them: something is there already, or there is no memory.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use userfaultfd::pager::{BytesSource, FaultAround, FillOrder, Pager, Region};
use userfaultfd::{FeatureFlags, LazyMemory, RegisterMode, Uffd, UffdBuilder};

use crate::reader::{Reader, Seen, read, tell_signals};
use crate::scene::{Pages, Problems, byte, check, content, memory, region, see, serve};
use crate::support::handler::fill;
use crate::support::mapping::{self, Mapping};
use crate::support::memory::{self as kinds, Kind, Memory};
use crate::support::proc::{wait_for_pending, wait_until};
use crate::support::{child, has, page, require, test_name, uffd};

#[test]
fn pages_filled_elsewhere_stay_and_waiters_wake() {
    require!();
    for kind in Kind::ALL {
        for around in [1, 6] {
            let Some(memory) = memory(test_name!(), kind, 6) else { continue };
            // Before it is served, and while it is.
            memory.write(1, 91);
            let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
            let uffd = uffd(FeatureFlags::empty());
            let other = uffd.try_clone().unwrap();
            let region = region(&memory, source).fault_around(FaultAround::Block(around * memory.page()));
            serve(&pager, uffd, region);
            fill(&other, &memory, 2, 92);
            check(&memory, 3, 3);
            assert_eq!((memory.read(1), memory.read(2)), (91, 92));
            // Woken, not filled.
            pager.finish(|_| {}).unwrap();
            assert_eq!((memory.read(1), memory.read(2)), (91, 92), "{memory:?}");
            for page in [0, 3, 4, 5] {
                check(&memory, page, page);
            }
        }
    }
}

#[test]
fn drop_leaves_pages_filled_elsewhere() {
    require!();
    for kind in Kind::ALL {
        let Some(memory) = memory(test_name!(), kind, 3) else { continue };
        memory.write(1, 91);
        let (pager, _, _) = crate::scene::served(&memory);
        check(&memory, 0, 0);
        drop(pager);
        assert_eq!(memory.read(1), 91, "{memory:?}");
        check(&memory, 0, 0);
    }
}

#[test]
fn page_protected_before_fill_keeps_its_content() {
    require!(FeatureFlags::WP_UNPOPULATED);
    tell_signals();
    let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
    for memory in kinds::each_of(test_name!(), &Kind::SMALL, modes, 4) {
        for ending in [false, true] {
            let memory = Memory::new(memory.kind(), 4);
            let pager = Pager::new().unwrap();
            let uffd = uffd(FeatureFlags::WP_UNPOPULATED | FeatureFlags::EVENT_REMOVE);
            let tracker = uffd.try_clone().unwrap();
            serve(&pager, uffd, region(&memory, Pages::new(page())).write_protected());
            check(&memory, 0, 0);
            // Markers, where nothing is.
            tracker.write_protect(memory.start(), memory.len()).unwrap();
            check(&memory, 1, 1);
            memory.write(2, 22);
            assert_eq!(memory.read(2), 22);
            if ending {
                pager.finish(|_| {}).unwrap();
                check(&memory, 3, 3);
            } else {
                drop(pager);
                let poisoned = crate::scene::can_poison();
                let expected = if poisoned { Seen::POISON } else { content(3) };
                assert_eq!(see(&memory, 3), expected, "{memory:?}");
            }
            check(&memory, 1, 1);
        }
    }
}

#[test]
fn empty_huge_page_pool_is_reported_and_retried() {
    require!(FeatureFlags::MISSING_HUGETLBFS, root);
    child::run_well(test_name!(), || {
        let Some(memory) = Memory::unpromised_hugetlb(test_name!(), 2) else { return };
        let problems = Problems::default();
        let pager = Pager::builder().on_problem(problems.callback()).build().unwrap();
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, Pages::new(memory.page())));
        check(&memory, 0, 0);
        let pool = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
        if !has(test_name!(), "a pool of huge pages that can be emptied", memory.huge_pages().exhaust()) {
            return;
        }
        let reader = Reader::of(memory.at(1).addr());
        wait_until(|| problems.count("Stuck") == 1);
        assert!(!reader.has_seen());
        // It is told once, with the address, and is tried on.
        let told = problems.all();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("nr_hugepages") || told[0].contains("there is no memory"), "{told:?}");
        std::fs::write("/proc/sys/vm/nr_hugepages", pool.trim()).unwrap();
        assert_eq!(reader.wait(), content(1));
        check(&memory, 1, 1);
    });
}

#[test]
fn finish_with_empty_huge_page_pool_shows_no_zeros() {
    require!(FeatureFlags::MISSING_HUGETLBFS, root);
    child::run_well(test_name!(), || {
        tell_signals();
        let Some(memory) = Memory::unpromised_hugetlb(test_name!(), 2) else { return };
        let pager = Pager::new().unwrap();
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, Pages::new(memory.page())));
        check(&memory, 0, 0);
        let pool = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
        if !has(test_name!(), "a pool of huge pages that can be emptied", memory.huge_pages().exhaust()) {
            return;
        }
        let refused = pager.finish(|_| {}).unwrap_err();
        assert!(matches!(refused, userfaultfd::pager::Error::Unfilled { pages: 1, .. }), "{refused:?}");
        // It is served on, and finished once there is memory.
        std::fs::write("/proc/sys/vm/nr_hugepages", pool.trim()).unwrap();
        pager.finish(|_| {}).unwrap();
        check(&memory, 1, 1);
    });
}

#[test]
fn full_file_system_is_reported_and_retried() {
    require!(FeatureFlags::MINOR_SHMEM, root);
    child::run_well(test_name!(), || {
        let Some(file) = mapping::file_with_room_for(test_name!(), 1) else { return };
        file.set_len(2 * page() as u64).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Mapping::new(2, protection, libc::MAP_SHARED, Some(file.as_fd())).unwrap();
        let problems = Problems::default();
        let pager = Pager::builder().on_problem(problems.callback()).build().unwrap();
        let region = Region::new(memory.start.expose_provenance(), memory.len, Pages::new(page()));
        let region = region.fault_around(FaultAround::Page).minor(file.try_clone().unwrap(), 0);
        serve(&pager, uffd(FeatureFlags::empty()), region);
        let at = |page: usize| memory.start.addr() + page * crate::support::page();
        let empty = |page: usize| {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let (offset, len) = (page * crate::support::page(), crate::support::page());
            // SAFETY: no reference leads to the memory.
            let emptied = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as _, len as _) };
            assert_eq!(emptied, 0);
        };
        assert_eq!(read(at(0)), content(0));
        // Content, of which the other page has taken the room; then the zeros of the other page in turn.
        let reader = Reader::of(at(1));
        wait_until(|| problems.count("Stuck") == 1);
        assert!(
            !reader.has_seen() && problems.all()[0].contains("file system of the memory's file is full"),
            "{:?}",
            problems.all()
        );
        empty(0);
        assert_eq!(reader.wait(), content(1));
        let reader = Reader::of(at(0));
        wait_until(|| problems.count("Stuck") == 2);
        assert!(!reader.has_seen() && problems.all()[1].contains("ENOSPC"), "{:?}", problems.all());
        empty(1);
        assert_eq!(reader.wait(), Seen::ZERO);
    });
}

#[test]
fn finish_gives_up_on_full_file_system() {
    require!(root);
    const PAGES: usize = 8;
    child::run_well(test_name!(), || {
        let Some(file) = mapping::file_with_room_for(test_name!(), 1) else { return };
        file.set_len((PAGES * page()) as u64).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Mapping::new(PAGES, protection, libc::MAP_SHARED, Some(file.as_fd())).unwrap();
        let (problems, source) = (Problems::default(), Pages::new(page()));
        let pager = Pager::builder().on_problem(problems.callback()).build().unwrap();
        let region = Region::new(memory.start.expose_provenance(), memory.len, source.clone()).shared();
        serve(&pager, uffd(FeatureFlags::empty()), region.fault_around(FaultAround::Page));
        let at = |page: usize| memory.start.addr() + page * crate::support::page();
        assert_eq!(read(at(0)), content(0));
        // A worker waits for room for this one.
        let reader = Reader::of(at(1));
        wait_until(|| problems.count("Stuck") == 1);
        let before = source.reads().values().sum::<usize>();
        let refused = pager.finish(|_| {}).unwrap_err();
        let left = PAGES - 1;
        assert!(matches!(refused, userfaultfd::pager::Error::Unfilled { pages, .. } if pages == left));
        // With others, and by itself.
        let reads = source.reads().values().sum::<usize>() - before;
        assert!(reads <= 3 * PAGES, "{reads} reads");
        // It is served on, and finished once there is room.
        assert!(!reader.has_seen());
        mapping::mount_room_for(PAGES, libc::MS_REMOUNT);
        assert_eq!(reader.wait(), content(1));
        pager.finish(|_| {}).unwrap();
        assert!((0..PAGES).all(|page| read(at(page)) == content(page)));
    });
}

#[test]
fn fills_waiting_for_change_keep_their_content() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let (memory, source) = (Memory::anonymous(8), Pages::new(page()));
        let (here, there) = UnixStream::pair().unwrap();
        // The thread that changes is stopped while it does: the event is read, and it doesn't run on.
        let target = child::fork(|| {
            child::send_fd(&there, uffd(FeatureFlags::EVENT_REMOVE).as_fd());
            std::thread::scope(|scope| {
                let mut go = &there;
                assert_eq!(std::io::Read::read(&mut go, &mut [0]).unwrap(), 1);
                let remover = scope.spawn(|| {
                    for round in 0..500 {
                        memory.advise(6 + round % 2, 1, libc::MADV_DONTNEED).unwrap();
                    }
                });
                for page in 0..6 {
                    assert_eq!(memory.read(page), byte(page));
                }
                remover.join().unwrap();
            });
        });
        let pager = Pager::builder().threads(2).build().unwrap();
        pager.add(Uffd::from(child::receive_fd(&here)), [region(&memory, source.clone())]).unwrap();
        let mut go = &here;
        go.write_all(&[1]).unwrap();
        target.succeed();
        // What was put off wasn't read again.
        let reads = source.reads();
        assert!(reads.values().all(|times| *times == 1), "{reads:?}, {}", pager.statistics());
    });
}

#[test]
fn truncated_file_ends_waiting_faults() {
    require!(FeatureFlags::MISSING_SHMEM);
    child::run_well(test_name!(), || {
        tell_signals();
        let memory = Memory::new(Kind::Memfd, 3);
        let pager = Pager::new().unwrap();
        let file = std::sync::Mutex::new(memory.file().try_clone().unwrap());
        // The file is cut off when the page is loaded.
        let source = move |offset: u64, bytes: &mut [u8]| {
            if offset == 2 * page() as u64 {
                let file = std::fs::File::from(file.lock().unwrap().try_clone().unwrap());
                file.set_len(page() as u64).unwrap();
            }
            userfaultfd::pager::PageSource::read(&Pages::new(page()), offset, bytes)
        };
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source));
        check(&memory, 0, 0);
        assert_eq!(see(&memory, 2), Seen::POISON, "as of any file that is shorter than its mapping");
        check(&memory, 0, 0);
    });
}

#[test]
fn faults_are_resolved_while_memory_is_freed() {
    require!(FeatureFlags::EVENT_REMOVE);
    // On one CPU the thread that changes the layout never runs while the pager does.
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if !has(test_name!(), "two CPUs", cpus > 1) {
        return;
    }
    child::run_well(test_name!(), || {
        const PAGES: usize = 512;
        let (memory, source) = (Memory::anonymous(2 * PAGES), Pages::new(page()));
        let pager = Pager::builder().threads(2).build().unwrap();
        serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, source.clone()));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let balloon = scope.spawn(|| {
                for number in (0..PAGES).cycle().take_while(|_| !stop.load(Ordering::SeqCst)) {
                    memory.advise(PAGES + number, 1, libc::MADV_DONTNEED).unwrap();
                }
            });
            wait_until(|| pager.statistics().removes > 0);
            let readers: Vec<_> = (0..2)
                .map(|first| {
                    let memory = &memory;
                    scope.spawn(move || {
                        for page in (first..PAGES).step_by(2) {
                            assert_eq!(memory.read(page), byte(page));
                        }
                    })
                })
                .collect();
            // Only then does it stop.
            readers.into_iter().for_each(|reader| reader.join().unwrap());
            stop.store(true, Ordering::SeqCst);
            balloon.join().unwrap();
        });
        let (reads, statistics) = (source.reads(), pager.statistics());
        assert!(reads.values().all(|times| *times == 1), "{reads:?}, {statistics}");
        // Two a fault, and 80 where dozens of threads want the CPUs. Where no retry follows a change, thousands.
        assert!(statistics.removes < 400 * PAGES as u64, "{statistics}");
    });
}

/// The CPUs that a thread of this process may run on.
fn affinity(thread: libc::pid_t) -> libc::cpu_set_t {
    // SAFETY: no CPU is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is borrowed for the call, and its size is right.
    assert_eq!(unsafe { libc::sched_getaffinity(thread, size_of_val(&set), &raw mut set) }, 0);
    set
}

fn set_affinity(thread: libc::pid_t, set: &libc::cpu_set_t) {
    // SAFETY: the set is borrowed for the call, and its size is right.
    assert_eq!(unsafe { libc::sched_setaffinity(thread, size_of_val(set), set) }, 0);
}

/// A thread that shares its CPU with the one that makes the changes never runs while that goes on.
#[test]
fn worker_leaves_cpu_of_freeing_thread() {
    require!(FeatureFlags::EVENT_REMOVE);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if !has(test_name!(), "two CPUs", cpus > 1) {
        return;
    }
    child::run_well(test_name!(), || {
        const PAGES: usize = 512;
        // Where each sleeps and wakes on a CPU of its own it is 1 to 4, and on the same some 130 and more.
        const CHANGES_PER_FAULT: usize = 64;
        let memory = Memory::anonymous(2 * PAGES);
        let pager = Pager::builder().max_threads(1).build().unwrap();
        serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, Pages::new(page())));
        let all = affinity(0);
        let mut one: libc::cpu_set_t = all;
        // SAFETY: touches no memory but the set, which has each number.
        (0..libc::CPU_SETSIZE as usize)
            .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &all) })
            .skip(1)
            .for_each(
                // SAFETY: as above.
                |cpu| unsafe { libc::CPU_CLR(cpu, &mut one) },
            );
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task = task.unwrap();
            if std::fs::read_to_string(task.path().join("comm")).unwrap() == "uffd-pager\n" {
                let id = task.file_name().into_string().unwrap().parse().unwrap();
                // There it stays, unless something else moves it.
                set_affinity(id, &one);
                set_affinity(id, &all);
            }
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let balloon = scope.spawn(|| {
                set_affinity(0, &one);
                for number in (0..PAGES).cycle().take_while(|_| !stop.load(Ordering::SeqCst)) {
                    memory.advise(PAGES + number, 1, libc::MADV_DONTNEED).unwrap();
                }
            });
            wait_until(|| pager.statistics().removes > 0);
            for page in 0..PAGES {
                assert_eq!(memory.read(page), byte(page));
            }
            stop.store(true, Ordering::SeqCst);
            balloon.join().unwrap();
        });
        let changes = pager.statistics().removes;
        assert!(changes < (CHANGES_PER_FAULT * PAGES) as _, "{changes} changes beside {PAGES} faults");
    });
}

/// Limits this process to the address space that it has, and one MiB for the allocator, for as long as the work takes.
fn without_address_space<T>(work: impl FnOnce(&dyn Fn()) -> T) -> T {
    let set = |most: libc::rlim_t| {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the structure is borrowed for the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
    };
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').next().unwrap().parse().unwrap();
    set((pages * page() + (1 << 20)) as libc::rlim_t);
    let done = work(&|| set(libc::RLIM_INFINITY));
    set(libc::RLIM_INFINITY);
    done
}

#[test]
fn pages_are_filled_one_by_one_without_memory() {
    require!();
    child::run_well(test_name!(), || {
        tell_signals();
        let pages = (4 << 20) / page();
        let (memory, source) = (Memory::anonymous(pages), Pages::new(page()));
        let pager = Pager::new().unwrap();
        let region = region(&memory, source.clone()).fault_around(FaultAround::Block(pages * page()));
        serve(&pager, uffd(FeatureFlags::empty()), region);
        let seen = without_address_space(|_| (memory.read(5), memory.read(6)));
        assert_eq!(seen, (byte(5), byte(6)));
        source.were_read_once(2);
        check(&memory, 7, 7);
        // All from there on.
        source.were_read_once(pages - 5);
        assert_eq!(pager.statistics().source_errors, 0);
    });
}

#[test]
fn fill_without_buffer_memory_is_retried() {
    require!(FeatureFlags::MISSING_HUGETLBFS);
    child::run_well(test_name!(), || {
        let Some(memory) = memory(test_name!(), Kind::PrivateHugetlb, 2) else { return };
        let source = Pages::new(memory.page());
        let pager = Pager::new().unwrap();
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source.clone()));
        std::thread::scope(|scope| {
            let (go, may_go) = std::sync::mpsc::channel::<()>();
            let (started, has_started) = std::sync::mpsc::channel::<()>();
            let reader = scope.spawn({
                let memory = &memory;
                move || {
                    // A thread that starts maps a stack for signals.
                    started.send(()).unwrap();
                    may_go.recv().unwrap();
                    memory.read(1)
                }
            });
            has_started.recv().unwrap();
            without_address_space(|give_back| {
                go.send(()).unwrap();
                // The source isn't asked: there is nothing to read into.
                wait_until(|| pager.statistics().retries > 5);
                assert!(!reader.is_finished() && source.reads().is_empty());
                give_back();
            });
            assert_eq!(reader.join().unwrap(), byte(1));
        });
        source.were_read_once(1);
        assert_eq!(pager.statistics().source_errors, 0);
    });
}

/// Content that is missing itself, as a page of a file is that a network has to bring, and what resolves its faults.
fn missing_content(test: &str, pages: usize) -> Option<(&'static [u8], Uffd)> {
    let content = Memory::anonymous(pages);
    let slow = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(false).create();
    if !has(test, "a userfaultfd for faults of the kernel", slow.is_ok()) {
        return None;
    }
    let slow = slow.unwrap();
    slow.register(content.start(), content.len()).unwrap();
    let start: *const u8 = content.start().cast();
    // SAFETY: it is mapped until the process ends, and only the kernel reads it.
    let bytes = unsafe { std::slice::from_raw_parts(start, content.len()) };
    std::mem::forget(content);
    Some((bytes, slow))
}

#[test]
fn change_is_read_while_source_memory_is_paged_in() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let Some((bytes, slow)) = missing_content(test_name!(), 2) else { return };
        let memory = Memory::anonymous(2);
        let pager = Pager::builder().threads(2).build().unwrap();
        let source = userfaultfd::pager::BytesSource::new(bytes);
        serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, source));
        let reader = Reader::of(memory.at(1).addr());
        wait_until(|| matches!(slow.read_event().unwrap(), Some(userfaultfd::Event::Pagefault { .. })));
        // Returns once its event was read.
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        assert!(!reader.has_seen());
        let page_of_content = bytes.as_ptr().wrapping_add(page()).cast_mut().cast();
        let nines = vec![9; page()];
        // SAFETY: the page is missing, and nobody but the kernel reads it.
        unsafe { slow.copy(nines.as_ptr().cast(), page_of_content, page(), true) }.unwrap();
        assert_eq!(reader.wait(), Seen::Byte(9));
    });
}

#[test]
fn child_forked_without_free_mappings_is_served() {
    require!(FeatureFlags::EVENT_FORK);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(8);
        let pager = Pager::new().unwrap();
        serve(&pager, uffd(FeatureFlags::EVENT_FORK), region(&memory, Pages::new(page())));
        std::thread::scope(|scope| {
            let (go, may_go) = std::sync::mpsc::channel::<()>();
            let (started, has_started) = std::sync::mpsc::channel::<()>();
            let forks = scope.spawn({
                let memory = &memory;
                move || {
                    started.send(()).unwrap();
                    may_go.recv().unwrap();
                    child::fork(|| assert_eq!(memory.read(3), byte(3)))
                }
            });
            has_started.recv().unwrap();
            without_address_space(|give_back| {
                go.send(()).unwrap();
                wait_until(|| pager.statistics().forks == 1);
                give_back();
            });
            forks.join().unwrap().succeed();
        });
        check(&memory, 3, 3);
    });
}

#[test]
fn page_in_of_a_source_keeps_no_other_memory_waiting() {
    require!(FeatureFlags::MISSING_SHMEM);
    child::run_well(test_name!(), || {
        let Some((bytes, slow)) = missing_content(test_name!(), 8) else { return };
        let pager = Arc::new(Pager::builder().threads(2).build().unwrap());
        let memory = LazyMemory::builder(BytesSource::new(bytes)).pager(&pager).build().unwrap();
        let other = LazyMemory::builder(Pages::new(page())).len(8 * page()).pager(&pager).build().unwrap();
        let background = memory.background(FillOrder::Ascending).unwrap();
        wait_for_pending(&slow, 1);
        // Each of them looks for its region among all.
        let mut bytes = [0; 2];
        assert_eq!(other.read_at(3 * page(), &mut bytes).unwrap(), 2);
        assert_eq!((bytes[0], other[5 * page()]), (byte(3), byte(5)));
        assert!(other.missing().unwrap().iter().map(|missing| missing.len).sum::<usize>() > 0);
        other.fill(|_| {}).unwrap();
        drop(other);
        // What is missing of the content is zero from now on.
        drop(slow);
        assert_eq!(background.wait().done, memory.len() as u64);
    });
}
