//! What memory holds that a pager fills: the same whatever kind of source it comes from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use userfaultfd::pager::{
    BytesSource, ConcatSource, FileSource, MappedFileSource, PageData, PageSource, Problem, RetryPolicy,
    ZeroSource,
};
use userfaultfd::{FeatureFlags, LazyMemory, page_size};

use crate::support::mapping::memfd;
use crate::support::require;

/// Blocks to fill by: a page, some, more than there is.
fn blocks() -> [usize; 3] {
    [page_size(), 4 * page_size(), 1 << 24]
}

/// Bytes that tell where they are, none of them zero.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at + at / 256) % 251 + 1) as u8).collect()
}

/// A file that has only so much on its disk as it needs.
fn file(content: &[u8]) -> File {
    let file = File::from(memfd(0, 0));
    file.write_all_at(content, 0).unwrap();
    file
}

/// Memory of a source has this, then zeros, whichever page is touched first.
#[track_caller]
fn check(name: &str, expected: &[u8], source: impl Fn() -> Arc<dyn PageSource>) {
    for block in blocks() {
        let memory = LazyMemory::builder(source()).len(expected.len()).block(block).build().unwrap();
        for page in [1, 0, 2] {
            let at = page * page_size();
            assert_eq!(memory.get(at), expected.get(at), "{name}: byte {at} of {}", expected.len());
        }
        assert!(memory[..] == *expected, "{name}: {} bytes by blocks of {block}", expected.len());
        let statistics = memory.statistics();
        assert_eq!((statistics.source_errors, statistics.poisoned), (0, 0), "{name}");
    }
}

#[test]
fn memory_shows_sources_of_every_kind_and_length() {
    require!();
    let page = page_size();
    for len in [1, page - 1, page, page + 1, 7 * page, 7 * page + 123] {
        let content = content(len);
        check("bytes", &content, || Arc::new(BytesSource::new(content.clone())));
        check("a file", &content, || Arc::new(FileSource::new(file(&content)).unwrap()));
        check("a mapped file", &content, || Arc::new(MappedFileSource::new(file(&content)).unwrap()));
        check("zeros", &vec![0; len], || Arc::new(ZeroSource));
        check("a closure", &content, || {
            let content = content.clone();
            Arc::new(move |offset: u64, page: &mut [u8]| {
                let rest = &content[offset as usize..];
                let inside = rest.len().min(page.len());
                page[..inside].copy_from_slice(&rest[..inside]);
                page[inside..].fill(0);
                Ok(PageData::Data)
            })
        });
    }
}

#[test]
fn memory_holds_windows_of_files() {
    require!();
    let page = page_size();
    let whole = content(10 * page);
    for (start, len) in [(page, 3 * page), (123, 4 * page), (page - 1, page + 2), (9 * page + 1, page - 1)] {
        let expected = &whole[start..start + len];
        let (start, len) = (start as u64, len as u64);
        check("a window", expected, || Arc::new(FileSource::range(file(&whole), start, len).unwrap()));
        check("a mapped window", expected, || {
            Arc::new(MappedFileSource::range(file(&whole), start, len).unwrap())
        });
    }
}

#[test]
fn memory_holds_several_sources_in_a_row() {
    require!();
    let page = page_size();
    let parts = content(10 * page);
    // Borders inside of pages and between them.
    for cut in [1, page - 1, page, page + 1] {
        let (first, second) = (parts[..cut].to_vec(), parts[cut..4 * page].to_vec());
        let gap = 3 * page + 7;
        let expected = [&first[..], &vec![0; gap], &second, &parts[5 * page..6 * page]].concat();
        check("several", &expected, || {
            let mut source = ConcatSource::new();
            source.push(BytesSource::new(first.clone())).unwrap().push_zeros(gap as u64).unwrap();
            source.push(MappedFileSource::new(file(&second)).unwrap()).unwrap();
            let part = 5 * page as u64..6 * page as u64;
            source.push_part(FileSource::new(file(&parts)).unwrap(), part).unwrap();
            Arc::new(source)
        });
    }
}

#[test]
fn holes_are_zero_pages_and_are_not_read() {
    require!();
    // Data in pages 4 to 7 of sixteen.
    let page = page_size();
    let data = content(4 * page);
    let sparse = || {
        let file = file(&[]);
        file.write_all_at(&data, 4 * page as u64).unwrap();
        file.set_len(16 * page as u64).unwrap();
        file
    };
    let expected = [&vec![0; 4 * page][..], &data, &vec![0; 8 * page]].concat();
    for mapped in [false, true] {
        let source: Arc<dyn PageSource> = match mapped {
            false => Arc::new(FileSource::new(sparse()).unwrap()),
            true => Arc::new(MappedFileSource::new(sparse()).unwrap()),
        };
        let memory = LazyMemory::builder(source).block(page).build().unwrap();
        assert!(memory[..] == expected[..], "mapped: {mapped}");
        memory.fill(|_| {}).unwrap(); // all is there; after it all is counted
        let statistics = memory.statistics();
        assert_eq!((statistics.fills, statistics.zero_fills), (4, 12), "mapped: {mapped}\n{statistics}");
    }
}

#[test]
fn mapped_file_is_copied_without_read_but_for_its_end() {
    require!();
    let page = page_size();
    let content = content(8 * page + 1);
    let source = MappedFileSource::new(file(&content)).unwrap();
    let memory = LazyMemory::builder(source).block(page).build().unwrap();
    assert!(memory[..] == content[..]);
    memory.fill(|_| {}).unwrap();
    let statistics = memory.statistics();
    assert_eq!((statistics.fills, statistics.source_reads), (9, 1), "{statistics}");
}

#[test]
fn pages_lost_by_file_are_poisoned_and_reported() {
    require!(FeatureFlags::POISON);
    let page = page_size();
    let content = content(8 * page);
    for mapped in [false, true] {
        let file = file(&content);
        let source: Arc<dyn PageSource> = match mapped {
            false => Arc::new(FileSource::new(file.try_clone().unwrap()).unwrap()),
            true => Arc::new(MappedFileSource::new(file.try_clone().unwrap()).unwrap()),
        };
        let told = Arc::new(Mutex::new(Vec::new()));
        let memory = LazyMemory::builder(source)
            .block(page)
            .retry(RetryPolicy { attempts: 2, ..RetryPolicy::default() })
            .on_problem({
                let told = Arc::clone(&told);
                move |problem| {
                    if let Problem::Source { offset, error, attempts, .. } = problem {
                        told.lock().unwrap().push((*offset, error.kind(), *attempts));
                    }
                }
            })
            .build()
            .unwrap();
        // The end is inside of page 5, whose beginning is lost, too: half a page is none.
        file.set_len(5 * page as u64 + 10).unwrap();
        // Nobody may touch the pages that are poisoned.
        let filled = memory.fill(|_| {});
        assert!(
            matches!(&filled, Err(userfaultfd::pager::Error::Poisoned { pages: 3, .. })),
            "mapped: {mapped}: {filled:?}"
        );
        assert!(memory[..5 * page] == content[..5 * page], "mapped: {mapped}");
        let statistics = memory.statistics();
        assert_eq!((statistics.fills, statistics.poisoned), (5, 3), "mapped: {mapped}\n{statistics}");
        drop(memory); // all is told after this
        let told = std::mem::take(&mut *told.lock().unwrap());
        let expected = [5, 6, 7].map(|at| ((at * page) as u64, io::ErrorKind::UnexpectedEof, 2));
        assert_eq!(told, expected, "mapped: {mapped}");
    }
}
