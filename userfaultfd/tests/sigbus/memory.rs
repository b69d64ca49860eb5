//! What is in the memory, how it is filled, and what is refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use userfaultfd::LazyMemory;
use userfaultfd::pager::{
    BytesSource, Error, FillOrder, MappedFileSource, PageData, PageSource, SignalSafe, SignalSafeConcat,
    ZeroSource,
};

use super::support::{hugetlb, mapping, page, require, test_name};
use super::{builder, byte, content, lazy, next};

/// A file without a name that holds `bytes`.
fn file(bytes: &[u8]) -> File {
    let file = File::from(mapping::memfd(0, 0));
    file.write_all_at(bytes, 0).unwrap();
    file
}

#[test]
fn memory_has_what_its_source_has() {
    require!();
    let page = page();
    for len in [1, page - 1, page, page + 1, 7 * page + 13, 32 * page] {
        let bytes = content(len);
        for block in [1, 3 * page, 8 * page] {
            let memories = [
                LazyMemory::sigbus(BytesSource::new(bytes.clone())),
                LazyMemory::sigbus(MappedFileSource::new(file(&bytes)).unwrap()),
            ];
            for memory in memories {
                let memory = memory.block(block).build().unwrap();
                assert_eq!(memory[len / 2], byte(len / 2));
                assert!(memory[..] == bytes[..], "{len} bytes by {block}");
            }
        }
        for offset in [0, 1, page, len - 1] {
            if offset >= len {
                continue;
            }
            let memory = LazyMemory::sigbus(BytesSource::new(bytes.clone()));
            let memory = memory.offset(offset as u64).build().unwrap();
            assert!(memory[..] == bytes[offset..], "{len} bytes from {offset}");
        }
    }
}

#[test]
fn last_page_is_zero_beyond_the_source() {
    require!();
    let memory = LazyMemory::sigbus(BytesSource::new([7; 5])).build().unwrap();
    assert_eq!(memory[..], [7; 5]);
    // SAFETY: pages are mapped whole, and are as long as `memory` is.
    let page = unsafe { std::slice::from_raw_parts(memory.as_ptr(), page()) };
    assert!(page[5..].iter().all(|byte| *byte == 0));
    assert_eq!(memory.statistics().missing_faults, 0, "it was read at once");
}

#[test]
fn zeros_are_zeros_and_can_be_written() {
    require!();
    let mut memory = LazyMemory::sigbus(ZeroSource).len(1 << 20).block(64 << 10).build().unwrap();
    memory[70_000] = 3;
    assert_eq!(memory.iter().filter(|byte| **byte != 0).count(), 1);
    let statistics = memory.statistics();
    assert_eq!((statistics.fills, statistics.zero_fills), (0, (1 << 20) / page() as u64));
    assert_eq!(statistics.missing_faults, 16);
}

#[test]
fn sources_one_behind_the_other() {
    require!();
    let page = page();
    let parts = [content(3 * page + 100), content(5 * page), content(17), content(2 * page + 1)];
    let mut source = SignalSafeConcat::new();
    let mut expected = Vec::new();
    for part in &parts {
        source.push(BytesSource::new(part.clone())).unwrap().push_zeros(4 * page as u64).unwrap();
        expected.extend_from_slice(part);
        expected.resize(expected.len() + 4 * page, 0);
    }
    let mut inner = SignalSafeConcat::new();
    inner.push(BytesSource::new(content(100))).unwrap().push(BytesSource::new(content(9 * page))).unwrap();
    let whole = [&content(100)[..], &content(9 * page)].concat();
    let part = 50..(6 * page + 50) as u64;
    source.push_part(inner, part.clone()).unwrap();
    expected.extend_from_slice(&whole[50..6 * page + 50]);
    assert_eq!(source.len(), Some(expected.len() as u64));
    let source = std::sync::Arc::new(source);
    for block in [1, 4 * page, 1 << 20] {
        let memory = LazyMemory::sigbus(source.clone()).block(block).build().unwrap();
        assert!(memory[..] == expected[..], "by {block}");
        let again = LazyMemory::sigbus(source.clone()).block(block).build().unwrap();
        for at in (0..expected.len()).rev().step_by(97) {
            assert_eq!(again[at], expected[at], "{at} by {block}");
        }
    }
}

#[test]
fn fault_fills_the_block_around_it_and_nothing_twice() {
    require!();
    let page = page();
    let memory = builder(20).block(8 * page).build().unwrap();
    for (touched, fills) in [(17, 4), (16, 4), (3, 12), (0, 12), (8, 20), (15, 20)] {
        assert_eq!(memory[touched * page], byte(touched * page));
        assert_eq!(memory.statistics().fills, fills, "after {touched}");
    }
    let statistics = memory.statistics();
    assert_eq!((statistics.missing_faults, statistics.prefetched), (3, 17));
    assert_eq!((statistics.present_pages, statistics.missing_pages), (20, 0));
    assert_eq!(statistics.bytes, 20 * page as u64);
    assert_eq!(statistics.duplicates, 0);
    assert!((1..=3).contains(&statistics.fault_latency.count()), "{statistics}");
    assert!(statistics.fault_latency.total() > Duration::ZERO);
}

/// Those of handlers that run at the same place of a stack are counted together: at most 64 such places.
#[test]
fn every_eighth_fault_is_timed() {
    require!();
    const FAULTS: usize = 512;
    let memory = LazyMemory::sigbus(ZeroSource).len(FAULTS * page()).block(1).build().unwrap();
    assert!(memory.iter().step_by(page()).all(|byte| *byte == 0));
    let statistics = memory.statistics();
    assert_eq!(statistics.missing_faults, FAULTS as u64);
    let timed = statistics.fault_latency.count() as usize;
    assert!((FAULTS / 8..=FAULTS / 8 + 64).contains(&timed), "{timed}");
}

#[test]
fn written_pages_keep_their_content() {
    require!();
    let page = page();
    let mut memory = builder(8).block(4 * page).build().unwrap();
    memory[page + 1] = 0;
    memory[5 * page] = 0;
    assert_eq!(memory[0], byte(0));
    let mut expected = content(8 * page).to_vec();
    (expected[page + 1], expected[5 * page]) = (0, 0);
    assert!(memory[..] == expected[..]);
}

#[test]
fn filled_memory_has_no_faults() {
    require!();
    let page = page();
    let memory = builder(1000).block(2 * page).build().unwrap();
    assert_eq!(memory[500 * page], byte(500 * page));
    let missing = memory.missing().unwrap();
    let lens: Vec<_> = missing.iter().map(|missing| (missing.len / page, missing.offset)).collect();
    assert_eq!(lens, [(500, Some(0)), (498, Some(502 * page as u64))]);
    let mut told = Vec::new();
    memory.fill(|progress| told.push(progress)).unwrap();
    assert_eq!((told[0].done, told[0].total), (0, 998 * page as u64));
    assert_eq!(told.last().unwrap().done, 998 * page as u64);
    assert!(told.is_sorted_by_key(|progress| progress.done));
    assert!(memory[..] == content(1000 * page)[..]);
    assert_eq!(memory.statistics().missing_faults, 1);
    assert!(matches!(memory.fill(|_| {}), Err(Error::Filled)));
    assert!(matches!(memory.missing(), Err(Error::Filled)));
}

#[test]
fn dropped_page_is_zero() {
    require!();
    let page = page();
    let memory = lazy(4);
    assert_eq!(memory[page], byte(page));
    let start = std::ptr::with_exposed_provenance_mut(memory[page..].as_ptr().expose_provenance());
    // SAFETY: bytes are good whatever they are, and nobody refers to them now.
    assert_eq!(unsafe { libc::madvise(start, page, libc::MADV_DONTNEED) }, 0);
    let now = |at: usize| {
        // SAFETY: inside the memory; not what the compiler may have read before.
        unsafe { memory[at..].as_ptr().read_volatile() }
    };
    assert_eq!((now(page), now(2 * page)), (0, byte(2 * page)));
}

#[test]
fn system_calls_read_present_pages() {
    require!();
    let page = page();
    let memory = builder(4).block(page).build().unwrap();
    assert!(!memory.handles_kernel_faults());
    let to = File::from(mapping::memfd(0, 0));
    let refused = to.write_at(&memory[page..2 * page], 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
    memory.populate(page..page + 1);
    assert_eq!(to.write_at(&memory[page..2 * page], 0).unwrap(), page);
}

#[test]
fn errno_is_kept() {
    require!();
    let memory = lazy(8);
    // SAFETY: the thread's own.
    let errno = unsafe { libc::__errno_location() };
    for number in 0..8 {
        // SAFETY: as above.
        unsafe { errno.write(1000 + number) };
        let here = memory[number as usize * page()];
        // SAFETY: as above.
        assert_eq!(unsafe { errno.read() }, 1000 + number);
        assert_eq!(here, byte(number as usize * page()));
    }
    assert_eq!(memory.statistics().missing_faults, 8);
}

#[test]
fn build_rejects_lengths_that_the_source_lacks() {
    require!();
    assert!(matches!(LazyMemory::sigbus(ZeroSource).build(), Err(Error::NoLength)));
    let beyond = LazyMemory::sigbus(BytesSource::new([1; 10])).len(page() + 1).build();
    assert!(matches!(beyond, Err(Error::BeyondSource { .. })));
}

#[test]
fn source_failing_at_border_fails_build() {
    require!();
    struct Broken;
    impl PageSource for Broken {
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<PageData> {
            Err(io::Error::other("broken"))
        }
        fn len(&self) -> Option<u64> {
            Some(5 * page() as u64 + 1)
        }
    }
    // SAFETY: it computes. What it doesn't answer for is never touched.
    unsafe impl SignalSafe for Broken {}
    match LazyMemory::sigbus(Broken).build() {
        Err(Error::Source { offset, error }) => {
            assert_eq!((offset, error.to_string().as_str()), (5 * page() as u64, "broken"));
        }
        other => panic!("{other:?}"),
    }
    LazyMemory::sigbus(Broken).len(5 * page()).build().unwrap();
}

#[test]
fn huge_pages() {
    require!();
    let Some(_pages) = hugetlb::reserve(test_name!(), 4) else { return };
    let huge = hugetlb::page();
    let bytes = content(2 * huge + 5);
    let memory = LazyMemory::sigbus(BytesSource::new(bytes.clone())).huge_pages(huge).build().unwrap();
    assert_eq!(memory[huge + 77], byte(huge + 77));
    let statistics = memory.statistics();
    assert_eq!((statistics.missing_faults, statistics.present_pages), (1, 2), "the last one is read at once");
    assert!(memory[..] == bytes[..]);
    drop(memory);
    let zeros =
        LazyMemory::sigbus(ZeroSource).len(2 * huge).block(2 * huge).huge_pages(huge).build().unwrap();
    assert!(zeros.iter().all(|byte| *byte == 0));
    assert_eq!((zeros.statistics().missing_faults, zeros.statistics().zero_fills), (1, 2));
}

#[test]
fn background_leaves_pages_missing_that_source_lacks() {
    require!();
    let page = page();
    let source = file(&content(64 * page));
    let memory = LazyMemory::sigbus(MappedFileSource::new(source.try_clone().unwrap()).unwrap());
    let memory = memory.block(4 * page).build().unwrap();
    source.set_len(32 * page as u64).unwrap();
    let background = memory.background(FillOrder::Ascending).unwrap();
    assert_eq!(background.wait().done, 64 * page as u64, "all of it was gone through");
    let statistics = memory.statistics();
    assert_eq!((statistics.present_pages, statistics.missing_pages), (32, 32), "{statistics}");
    assert_eq!((statistics.poisoned, statistics.prefetched), (0, 32), "{statistics}");
    // The source recovers.
    source.write_all_at(&content(64 * page), 0).unwrap();
    assert!(memory[..] == content(64 * page)[..]);
}

#[test]
fn statistics_add_up_beside_a_background() {
    require!();
    let (page, pages) = (page(), 4096);
    for block in [1, 4] {
        let memory = builder(pages).block(block * page).build().unwrap();
        let background = memory.background(FillOrder::Ascending).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    let mut state = thread;
                    for _ in 0..pages {
                        let at = next(&mut state) % memory.len();
                        assert_eq!(memory[at], byte(at));
                    }
                });
            }
        });
        background.wait();
        let statistics = memory.statistics();
        assert_eq!((statistics.present_pages, statistics.missing_pages), (pages as u64, 0), "{statistics}");
        assert_eq!(statistics.fills, pages as u64, "{statistics}");
        let asked = statistics.fills - statistics.prefetched;
        assert_eq!(statistics.missing_faults, asked + statistics.duplicates, "{statistics}");
    }
}

#[test]
fn read_at_fails_where_source_fails() {
    require!();
    let page = page();
    let source = file(&content(8 * page));
    let memory = LazyMemory::sigbus(MappedFileSource::new(source.try_clone().unwrap()).unwrap());
    let mut memory = memory.block(4 * page).build().unwrap();
    source.set_len(6 * page as u64).unwrap();
    let mut bytes = vec![0; 3 * page];
    assert_eq!(memory.read_at(2 * page + 5, &mut bytes).unwrap(), bytes.len());
    assert!(bytes[..] == content(8 * page)[2 * page + 5..][..3 * page]);
    let name = format!("the page at byte {:#x} of the memory, ", 6 * page);
    for error in [
        memory.read_at(5 * page, &mut bytes).unwrap_err(),
        memory.write_at(6 * page + 1, b"x").unwrap_err(),
        memory.try_populate(0..8 * page).unwrap_err(),
    ] {
        assert!(error.to_string().starts_with(&name), "{error}");
    }
    source.write_all_at(&content(8 * page), 0).unwrap();
    assert_eq!(memory.write_at(8 * page - 2, b"xyz").unwrap(), 2);
    assert_eq!(memory[8 * page - 3..], [byte(8 * page - 3), b'x', b'y']);
    memory.try_populate(0..usize::MAX).unwrap();
    assert_eq!(memory.statistics().missing_pages, 0);
}
