//! `LazyMemory`: memory of this process that fills itself.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use userfaultfd::pager::{
    BytesSource, Error, FaultAround, FileSource, PageData, Pager, Progress, RegionId, RetryPolicy,
    Statistics, ZeroSource,
};
use userfaultfd::{FeatureFlags, LazyBuilder, LazyMemory};

use crate::reader::{Seen, read, tell_signals};
use crate::scene::{Pages, Problems, byte, can_poison, eventually};
use crate::support::child;
use crate::support::mapping::memfd;
use crate::support::memory::Kind;
use crate::support::proc::wait_until;
use crate::support::{hugetlb, maps, page, require, test_name};

/// What a type can be used for, checked when this is compiled.
const _: () = {
    const fn is_shareable<T: Send + Sync + 'static>() {}
    is_shareable::<LazyMemory>();
    is_shareable::<Pager>();
    is_shareable::<Statistics>();
    is_shareable::<Error>();
    const fn is_sendable<T: Send + 'static>() {}
    is_sendable::<LazyBuilder>();
};

fn resident() -> usize {
    maps::status_bytes("VmRSS")
}

#[test]
#[cfg(target_pointer_width = "64")]
fn source_larger_than_memory_takes_accessed_pages() {
    require!();
    child::run_well(test_name!(), || {
        const LEN: u64 = 100 << 30;
        let file = File::from(memfd(0, 0));
        file.set_len(LEN).unwrap();
        let places: Vec<_> = (0..200).map(|step| step * (LEN / 200) / 4096 * 4096 + 5).collect();
        places.iter().for_each(|at| file.write_all_at(&[(at % 251) as u8 + 1], *at).unwrap());
        let before = resident();
        let memory = LazyMemory::builder(FileSource::new(file).unwrap())
            .fault_around(FaultAround::Page)
            .build()
            .unwrap();
        assert_eq!(memory.len() as u64, LEN);
        for at in &places {
            assert_eq!(memory[*at as usize], (at % 251) as u8 + 1);
            assert_eq!(memory[*at as usize + (1 << 20)], 0, "a hole");
        }
        assert_eq!(memory[LEN as usize - 1], 0);
        // A page of content and one of states for each place; holes take no memory.
        let taken = resident() - before;
        assert!(taken < places.len() * 4 * page() + (4 << 20), "{taken} bytes");
        eventually(|| (memory.statistics().fills, memory.statistics().zero_fills), (200, 201));
    });
}

#[test]
fn writes_are_private() {
    require!();
    let file = File::from(memfd(0, 0));
    file.write_all_at(&vec![7; 3 * page()], 0).unwrap();
    let open = || FileSource::new(file.try_clone().unwrap()).unwrap();
    let mut one = LazyMemory::builder(open()).build().unwrap();
    let other = LazyMemory::builder(open()).build().unwrap();
    one[page()] = 8;
    one[2 * page()..].fill(9);
    assert_eq!((one[0], one[page()], one[page() + 1], one[3 * page() - 1]), (7, 8, 7, 9));
    assert_eq!((other[page()], other[3 * page() - 1]), (7, 7));
    let mut content = vec![0; 3 * page()];
    file.read_exact_at(&mut content, 0).unwrap();
    assert!(content.iter().all(|byte| *byte == 7));
}

#[test]
fn lengths_and_offsets_are_in_bytes() {
    require!();
    let bytes: Vec<u8> = (0..3 * page() + 7).map(|at| (at % 251) as u8).collect();
    let source = BytesSource::new(bytes.clone());
    for (offset, len) in [(0, None), (1, None), (page() + 3, Some(10)), (5, Some(2 * page()))] {
        let builder = LazyMemory::builder(source.clone()).offset(offset as u64);
        let memory = len.into_iter().fold(builder, LazyBuilder::len).build().unwrap();
        let end = len.map_or(bytes.len(), |len| offset + len);
        assert!(memory[..] == bytes[offset..end], "{offset} {len:?}");
    }
}

#[test]
fn build_rejects_invalid_lengths() {
    require!();
    let source = || BytesSource::new(vec![1; page()]);
    let error = |builder: LazyBuilder| builder.build().unwrap_err();
    assert!(matches!(error(LazyMemory::builder(ZeroSource)), Error::NoLength));
    assert!(matches!(error(LazyMemory::builder(source()).len(0)), Error::EmptyRegion { .. }));
    assert!(matches!(error(LazyMemory::builder(source()).len(page() + 1)), Error::BeyondSource { .. }));
    assert!(matches!(error(LazyMemory::builder(source()).offset(1).len(page())), Error::BeyondSource { .. }));
    assert!(matches!(error(LazyMemory::builder(source()).huge_pages(3)), Error::PageSize { .. }));
    assert!(matches!(error(LazyMemory::builder(source()).huge_pages(1)), Error::PageSize { .. }));
    // The kernel has no such pages.
    assert!(matches!(error(LazyMemory::builder(source()).huge_pages(2 * page())), Error::PageSize { .. }));
    for len in [usize::MAX, usize::MAX / 2, isize::MAX as usize - page()] {
        let vast = LazyMemory::builder(ZeroSource).len(len);
        assert!(matches!(error(vast), Error::System(error) if error.raw_os_error() == Some(libc::ENOMEM)));
    }
}

#[test]
fn block_larger_than_the_memory_is_all_of_it() {
    require!();
    for block in [usize::MAX, usize::MAX - page() + 1, 1 << 40] {
        let memory =
            LazyMemory::builder(Pages::new(page())).len(5 * page() - 7).block(block).build().unwrap();
        assert_eq!(memory[3 * page()], byte(3));
        eventually(|| memory.statistics().fills, 5);
    }
}

#[test]
fn populating_begins_with_page_that_range_begins_in() {
    require!();
    let memory = LazyMemory::builder(Pages::new(page()))
        .len(8 * page())
        .fault_around(FaultAround::Page)
        .build()
        .unwrap();
    memory.populate(3 * page() - 1..4 * page());
    eventually(|| memory.statistics().present_pages, 2);
    memory.populate(6 * page() - 1..6 * page() + 1);
    eventually(|| memory.statistics().present_pages, 4);
}

#[test]
fn read_at_fails_where_source_fails() {
    require!();
    let away = Arc::new(std::sync::atomic::AtomicUsize::new(usize::MAX));
    let times = Arc::clone(&away);
    let source = move |offset: u64, bytes: &mut [u8]| {
        use std::sync::atomic::Ordering::SeqCst;
        let lacks = offset + bytes.len() as u64 > 4 * page() as u64;
        if lacks && times.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(ErrorKind::NotFound.into());
        }
        bytes.fill(7);
        Ok(PageData::Data)
    };
    let retry = RetryPolicy { attempts: 3, delay: std::time::Duration::from_millis(1) };
    let builder =
        LazyMemory::builder(source).len(8 * page() - 3).fault_around(FaultAround::Page).retry(retry);
    let mut memory = builder.build().unwrap();
    let mut bytes = vec![0; 2 * page()];
    assert_eq!(memory.read_at(page() + 5, &mut bytes).unwrap(), 2 * page());
    assert!(bytes.iter().all(|byte| *byte == 7));
    assert_eq!(memory.write_at(3 * page(), b"abc").unwrap(), 3);
    assert_eq!(memory[3 * page() - 1..3 * page() + 4], *b"\x07abc\x07");
    let name = format!("the page at byte {:#x} of the memory, ", 4 * page());
    for error in [
        memory.read_at(3 * page() + 1, &mut bytes).unwrap_err(),
        memory.write_at(4 * page() + 1, b"x").unwrap_err(),
        memory.try_populate(0..usize::MAX).unwrap_err(),
    ] {
        assert!(error.to_string().starts_with(&name), "{error}");
        assert!(error.to_string().ends_with("can't be had from the source: entity not found"), "{error}");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    assert_eq!(memory.statistics().poisoned, 0, "it may be tried again");
    // Each attempt reads its missing pages together, and one by one where there are several.
    let reads = usize::MAX - away.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(reads, 3 * ((1 + 2) + 1 + (1 + 4)));
    // It recovers with the second try.
    away.store(1, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(memory.read_at(4 * page(), &mut bytes[..page()]).unwrap(), page());
    away.store(0, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(memory.read_at(8 * page() - 5, &mut bytes).unwrap(), 2);
    assert_eq!(memory.read_at(9 * page(), &mut bytes).unwrap(), 0);
    memory.try_populate(0..usize::MAX).unwrap();
    assert_eq!(memory.statistics().missing_pages, 0);
    memory.fill(|_| {}).unwrap();
    memory.try_populate(0..usize::MAX).unwrap();
}

#[test]
fn memories_share_a_pager_and_go_one_by_one() {
    require!();
    let pager = Arc::new(Pager::builder().threads(2).build().unwrap());
    let new = || {
        LazyMemory::builder(Pages::new(page()))
            .len(32 * page())
            .pager(&pager)
            .fault_around(FaultAround::Page)
            .build()
    };
    let (one, other) = (new().unwrap(), new().unwrap());
    assert_eq!((one[page()], other[2 * page()]), (byte(1), byte(2)));
    // A page is counted a moment after its thread goes on.
    eventually(|| (pager.statistics().present_pages, pager.statistics().missing_pages), (2, 62));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..32 {
                assert_eq!(other[number * page()], byte(number));
            }
        });
        drop(one);
        for number in 0..10 {
            let third = new().unwrap();
            assert_eq!(third[number * page()], byte(number));
        }
    });
    drop(other);
    pager.join(); // nothing is served any more
    // The pager may go before the memory does.
    let last = new().unwrap();
    drop(pager);
    assert_eq!(last[5 * page()], byte(5));
}

#[test]
fn threads_read_lazy_memory_concurrently() {
    require!();
    let memory = LazyMemory::builder(Pages::new(page())).len(256 * page()).threads(2).build().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let memory = &memory;
            scope.spawn(move || {
                for step in 0..256 {
                    let number = (step * (2 * thread + 1) + thread) % 256;
                    assert_eq!(memory[number * page()], byte(number));
                }
            });
        }
    });
    eventually(|| (memory.statistics().present_pages, memory.statistics().fills), (256, 256));
    let moved = std::thread::spawn(move || memory[7 * page()]);
    assert_eq!(moved.join().unwrap(), byte(7));
}

#[test]
fn forked_child_lacks_lazy_memory() {
    require!();
    child::run_well(test_name!(), || {
        let memory = LazyMemory::new(2 * page(), Pages::new(page())).unwrap();
        assert_eq!(memory[0], byte(0));
        for at in [0, page()] {
            let start = memory.as_ptr().expose_provenance();
            let status = child::fork(|| {
                let address: *const u8 = std::ptr::with_exposed_provenance(start + at);
                // SAFETY: that it can't be read is what is tested.
                let _byte = unsafe { address.read_volatile() };
            })
            .wait();
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
        }
        assert_eq!(memory[page()], byte(1));
    });
}

#[test]
fn populating_makes_system_calls_work() {
    require!();
    for kernel in [false, true] {
        let builder = LazyMemory::builder(Pages::new(page())).len(8 * page()).fault_around(FaultAround::Page);
        let memory = match builder.handle_kernel_faults(kernel).build() {
            Ok(memory) => memory,
            Err(Error::Uffd(error)) if kernel => {
                assert!(!crate::support::is_root(), "{error}");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(memory.handles_kernel_faults(), kernel);
        let send = |range: std::ops::Range<usize>| {
            let (mut one, mut other) = UnixStream::pair().unwrap();
            std::thread::scope(|scope| {
                let received = scope.spawn(move || {
                    let mut bytes = Vec::new();
                    other.read_to_end(&mut bytes).unwrap();
                    bytes
                });
                let sent = one.write_all(&memory[range.clone()]);
                drop(one);
                let bytes = received.join().unwrap();
                assert!(sent.is_err() || bytes == memory[range]);
                sent
            })
        };
        let served = kernel || !restricts();
        match send(0..100) {
            Ok(()) => assert!(served),
            Err(error) => assert!(!served && error.raw_os_error() == Some(libc::EFAULT), "{error}"),
        }
        memory.populate(3 * page() + 5..3 * page() + 6);
        let missing = || memory.missing().unwrap().iter().map(|missing| missing.len / page()).sum::<usize>();
        eventually(missing, if served { 6 } else { 7 });
        send(3 * page()..4 * page()).unwrap();
        memory.populate(page()..usize::MAX);
        send(page()..8 * page()).unwrap();
        // Nothing, and what is beyond.
        #[expect(clippy::reversed_empty_ranges, reason = "it is nothing")]
        memory.populate(5..3);
        memory.populate(100 * page()..101 * page());
    }
    // Without a word it serves what it may.
    let memory = LazyMemory::new(page(), ZeroSource).unwrap();
    assert!(memory.handles_kernel_faults() || !crate::support::is_root());
}

/// Whether the kernel knows a restriction to faults from user mode: Linux 5.11.
fn restricts() -> bool {
    crate::support::raw::knows_user_mode_only()
}

#[test]
fn filled_memory_needs_no_pager() {
    require!();
    let memory = LazyMemory::builder(Pages::new(page()))
        .len(5 * page())
        .fault_around(FaultAround::Page)
        .build()
        .unwrap();
    assert_eq!(memory[2 * page()], byte(2));
    eventually(|| memory.statistics().present_pages, 1);
    let mut told: Vec<Progress> = Vec::new();
    memory.fill(|progress| told.push(progress)).unwrap();
    let last = told[told.len() - 1];
    assert_eq!((told[0].done, last.done, last.total), (0, 4 * page() as u64, 4 * page() as u64));
    assert!(matches!(memory.missing(), Err(Error::Filled)));
    assert!(matches!(memory.fill(|_| {}), Err(Error::Filled)));
    assert!((0..5).all(|number| memory[number * page()] == byte(number)));
    assert_eq!(memory.statistics().missing_faults, 1);
}

#[test]
fn undelivered_page_raises_sigbus() {
    require!();
    if !can_poison() {
        return;
    }
    tell_signals();
    let problems = Problems::default();
    let source = |offset: u64, bytes: &mut [u8]| match offset {
        0 => {
            bytes.fill(1);
            Ok(PageData::Data)
        }
        _ => Err(ErrorKind::NotFound.into()),
    };
    let retry = RetryPolicy { attempts: 2, delay: std::time::Duration::ZERO };
    let builder = LazyMemory::builder(source).len(2 * page()).fault_around(FaultAround::Page).retry(retry);
    let memory = builder.on_problem(problems.callback()).build().unwrap();
    assert_eq!(memory[0], 1);
    assert_eq!(read(memory.as_ptr().expose_provenance() + page()), Seen::POISON);
    wait_until(|| problems.count("Poisoned") == 1);
}

#[test]
fn lazy_memory_works_on_huge_pages() {
    require!(FeatureFlags::MISSING_HUGETLBFS);
    let size = Kind::PrivateHugetlb.page();
    let Some(_pages) = hugetlb::reserve(test_name!(), 5) else { return };
    let source = |offset: u64, bytes: &mut [u8]| {
        bytes.fill((offset / bytes.len() as u64) as u8 + 1);
        Ok(PageData::Data)
    };
    let memory = LazyMemory::builder(source)
        .len(2 * size + 10)
        .huge_pages(size)
        .fault_around(FaultAround::Page)
        .build()
        .unwrap();
    assert_eq!(memory.len(), 2 * size + 10);
    assert_eq!((memory[0], memory[size - 1], memory[2 * size + 9]), (1, 1, 3));
    assert_eq!(memory.statistics().missing_faults, 2);
    // More than there is.
    let refused = LazyMemory::builder(ZeroSource).len(1 << 40).huge_pages(size).build();
    assert!(matches!(refused, Err(Error::NoHugePages { .. })), "{refused:?}");
}

/// Whether what is mapped at an address is locked.
fn is_locked(address: usize) -> bool {
    maps::has_flag(address, "lo")
}

#[test]
fn memory_is_lazy_where_process_locks_what_it_maps() {
    require!(root);
    child::run_well(test_name!(), || {
        let pages = 64;
        for flags in [libc::MCL_FUTURE, libc::MCL_FUTURE | libc::MCL_ONFAULT] {
            // SAFETY: nothing of any memory changes.
            assert_eq!(unsafe { libc::mlockall(flags) }, 0);
            let source = || BytesSource::new(vec![7; pages * page()]);
            for memory in [
                LazyMemory::builder(source()).fault_around(FaultAround::Page).build(),
                LazyMemory::sigbus(source()).fault_around(FaultAround::Page).build(),
            ] {
                let memory = memory.unwrap();
                assert!(is_locked(memory.as_ptr().addr()));
                assert_eq!(memory.missing().unwrap()[0].len, memory.len());
                assert!(memory.iter().all(|byte| *byte == 7));
                eventually(|| memory.statistics().fills, pages as u64);
            }
            if let Some(_pages) = hugetlb::reserve(test_name!(), 2) {
                let size = Kind::PrivateHugetlb.page();
                let builder = LazyMemory::builder(|_: u64, bytes: &mut [u8]| {
                    bytes.fill(7);
                    Ok(PageData::Data)
                });
                let memory = builder.len(size).huge_pages(size).build().unwrap();
                assert_eq!((memory[0], memory[size - 1]), (7, 7));
            }
        }
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlockall() }, 0);
        let memory = LazyMemory::new(page(), ZeroSource).unwrap();
        assert!(!is_locked(memory.as_ptr().addr()));
    });
}

#[test]
fn shared_pager_serves_memory_until_its_drop() {
    require!();
    let pager = Arc::new(Pager::new().unwrap());
    let memory = LazyMemory::builder(Pages::new(page())).len(8 * page()).pager(&pager).build().unwrap();
    assert_eq!(pager.descriptors(), []);
    for number in 0..4 {
        let removed = pager.remove_region(RegionId::new(number));
        assert!(matches!(removed, Err(Error::NotServed | Error::OfLazyMemory)), "{removed:?}");
    }
    for number in 0..8 {
        assert_eq!(memory[number * page()], byte(number));
    }
    assert_eq!(memory.statistics().poisoned, 0);
}

#[test]
fn several_threads_write_through_the_raw_slice() {
    require!();
    const THREADS: usize = 4;
    const PAGES: usize = 128;
    child::run_well(test_name!(), || {
        let bytes: Vec<u8> = (0..PAGES).flat_map(|number| vec![byte(number); page()]).collect();
        let sigbus = LazyMemory::sigbus(BytesSource::new(bytes.clone())).fault_around(FaultAround::Page);
        let lazy = LazyMemory::builder(BytesSource::new(bytes)).fault_around(FaultAround::Page);
        for memory in [lazy.build().unwrap(), sigbus.build().unwrap()] {
            let raw = memory.as_raw_slice();
            assert_eq!(raw.len(), PAGES * page());
            let start = raw.cast::<u8>().expose_provenance();
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    scope.spawn(move || {
                        // Each page is written by all of them, in another order, and each byte by one.
                        for step in 0..PAGES {
                            let number = (step + thread * PAGES / THREADS) % PAGES;
                            let at = std::ptr::with_exposed_provenance_mut::<u8>(start)
                                .wrapping_add(number * page() + 1 + thread);
                            // SAFETY: within the memory, of which nothing is borrowed, and no other thread writes this byte.
                            unsafe { at.write(200 + thread as u8) };
                        }
                    });
                }
            });
            for (number, content) in memory.chunks(page()).enumerate() {
                let written = (0..THREADS).map(|thread| 200 + thread as u8);
                assert!(content[1..=THREADS].iter().copied().eq(written), "page {number}");
                assert!(
                    content[0] == byte(number)
                        && content[1 + THREADS..].iter().all(|here| *here == byte(number))
                );
            }
        }
    });
}
