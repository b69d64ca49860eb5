//! What a cache shows, keeps, gives back and refuses.

mod bad;
mod crash;
mod shared;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::source::BytesSource;
use crate::source::model::{Counted, Random, byte, check, check_all, copied};
use crate::support::{child, require};
use crate::{LazyMemory, page_size};

/// A directory of its own, removed when dropped.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("userfaultfd-cache-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn cache(&self, limit: u64) -> ChunkCache {
        ChunkCache::open(&self.0, limit).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Bytes of a chunk in these tests: not less than a page of any machine.
pub(super) const CHUNK: usize = 64 << 10;

pub(super) fn content(image: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| byte(image, at)).collect()
}

/// Must not be asked for anything.
pub(super) fn unread(len: usize) -> impl PageSource {
    struct Unread(usize);
    impl PageSource for Unread {
        fn read(&self, offset: u64, _: &mut [u8]) -> io::Result<PageData> {
            Err(io::Error::other(format!("{offset} was read from the source")))
        }

        fn len(&self) -> Option<u64> {
            Some(self.0 as u64)
        }
    }
    Unread(len)
}

pub(super) fn open(cache: &ChunkCache, name: &str, source: impl PageSource + 'static) -> CachedImage {
    cache.image(name).chunk_size(CHUNK).open(source).unwrap()
}

/// A range within `0..len` of at most three chunks that isn't empty, often of whole pages.
pub(super) fn some_range(random: &mut Random, len: usize) -> std::ops::Range<usize> {
    let (start, longest) = (random.below(len), [1, 4096, 3 * CHUNK][random.below(3)]);
    let start = if random.below(3) == 0 { start } else { start / 4096 * 4096 };
    start..start + 1 + random.below(longest.min(len - start))
}

#[track_caller]
fn read_all(image: &CachedImage, expected: &[u8]) {
    check(image, expected, 0..expected.len());
}

#[test]
fn image_is_right_at_every_border_and_second_start() {
    require!();
    let scratch = Scratch::new("borders");
    let cache = scratch.cache(1 << 30);
    for (number, len) in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 123].into_iter().enumerate() {
        let (bytes, name) = (content(number, len), format!("image {number}"));
        let (source, reads) = Counted::new(bytes.clone());
        let image = open(&cache, &name, source);
        let mut random = Random::new(number as u64);
        check_all(&image, &bytes, &mut random, 4096);
        let fetched = reads.load(Ordering::Relaxed);
        assert!(fetched <= len.div_ceil(CHUNK), "{fetched} reads of {len} bytes");
        assert_eq!(image.cached(), len as u64);
        drop(image);
        // Another cache is as another process.
        let image = open(&scratch.cache(1 << 30), &name, unread(len));
        check_all(&image, &bytes, &mut random, 4096);
        let CacheStatistics { fetches, damaged, not_stored, .. } = image.statistics();
        assert_eq!((fetches, damaged, not_stored), (0, 0, 0));
        if len > 0 {
            assert!(image.bytes(0, len).is_some() && image.bytes(0, len + 1).is_none());
        }
        assert!(image.bytes(len as u64, 1).is_none() && image.bytes(u64::MAX, 2).is_none());
        assert_eq!(image.zeros(len as u64), u64::MAX);
    }
}

#[test]
fn source_is_opened_when_something_is_missing() {
    require!();
    let scratch = Scratch::new("lazily");
    let cache = scratch.cache(1 << 30);
    let opened = Arc::new(AtomicUsize::new(0));
    let open = || {
        let opened = Arc::clone(&opened);
        let make = move || {
            opened.fetch_add(1, Ordering::Relaxed);
            Ok(BytesSource::new(content(1, 2 * CHUNK)))
        };
        cache.image("image").chunk_size(CHUNK).open_with(make).unwrap()
    };
    let image = open();
    assert_eq!(image.len(), Some(2 * CHUNK as u64));
    check(&image, &content(1, 2 * CHUNK), 0..10);
    drop(image);
    opened.store(0, Ordering::Relaxed);
    let image = open();
    check(&image, &content(1, 2 * CHUNK), 0..CHUNK);
    assert_eq!(opened.load(Ordering::Relaxed), 0);
    check(&image, &content(1, 2 * CHUNK), 0..2 * CHUNK);
    assert_eq!(opened.load(Ordering::Relaxed), 1);
    // An object that is another by now, or gone, is an error of the read.
    let gone = cache.image("other").chunk_size(CHUNK).open(BytesSource::new(vec![1; CHUNK]));
    drop(gone.unwrap());
    let changed = cache.image("other").open_with(|| Ok(BytesSource::new(vec![1; CHUNK + 1]))).unwrap();
    let error = changed.read(0, &mut [0; 8]).unwrap_err();
    let inner = error.get_ref().and_then(|error| error.downcast_ref::<CacheError>());
    assert!(matches!(inner, Some(CacheError::OtherLength { .. })), "{error}");
    let failing =
        cache.image("other").open_with(|| Err::<BytesSource<Vec<u8>>, _>(io::Error::other("no network")));
    assert_eq!(failing.unwrap().read(0, &mut [0; 8]).unwrap_err().to_string(), "no network");
}

#[test]
fn long_read_is_one_fetch_and_memory_comes_from_the_mapping() {
    require!();
    let scratch = Scratch::new("mapping");
    let cache = scratch.cache(1 << 30);
    let bytes = content(3, 16 * CHUNK);
    let (source, reads) = Counted::new(bytes.clone());
    let image = open(&cache, "image", source);
    check(&image, &bytes, 3 * CHUNK + 5..7 * CHUNK + 6);
    assert_eq!(reads.load(Ordering::Relaxed), 1);
    let image = Arc::new(image);
    let memory = LazyMemory::builder(Arc::clone(&image)).build().unwrap();
    assert!(*memory == bytes[..]);
    let statistics = image.statistics();
    // Of each chunk that was missing one page was read, by which it came, and nothing of those that were there but a page
    // for the lease. Faults of neighbours may have come before.
    let pages = (16 * CHUNK / page_size()) as u64;
    assert!(statistics.reads < pages / 2 + 8 || pages < 64, "{statistics:?} for {pages} pages");
    assert!(cache.used() == 16 * CHUNK as u64, "{cache:?}");
}

#[test]
fn zeros_are_kept_as_holes_that_count_nothing() {
    require!();
    let scratch = Scratch::new("zeros");
    let cache = scratch.cache(1 << 30);
    let mut bytes = content(1, 6 * CHUNK);
    bytes[CHUNK..3 * CHUNK].fill(0);
    bytes[5 * CHUNK..].fill(0);
    let image = open(&cache, "image", BytesSource::new(bytes.clone()));
    check_all(&image, &bytes, &mut Random::new(1), 4096);
    assert_eq!(cache.used(), 3 * CHUNK as u64);
    drop(image);
    let image = open(&cache, "image", unread(bytes.len()));
    assert_eq!(image.zeros(CHUNK as u64 + 7), 2 * CHUNK as u64 - 7);
    assert_eq!((image.zeros(0), image.zeros(5 * CHUNK as u64)), (0, u64::MAX));
    assert_eq!(image.read(CHUNK as u64, &mut vec![7; 2 * CHUNK]).unwrap(), PageData::Zero);
    check_all(&image, &bytes, &mut Random::new(2), 4096);
}

#[test]
fn what_a_program_rejects_is_not_seen_and_not_kept() {
    require!();
    let scratch = Scratch::new("verify");
    let cache = scratch.cache(1 << 30);
    let bytes = content(1, 3 * CHUNK + 100);
    let (expected, calls) = (bytes.clone(), Arc::new(AtomicUsize::new(0)));
    let source = {
        let (bytes, calls) = (bytes.clone(), Arc::clone(&calls));
        move |offset: u64, page: &mut [u8]| {
            BytesSource::new(&bytes).read(offset, page)?;
            // Wrong once.
            page[17] ^= u8::from(calls.fetch_add(1, Ordering::Relaxed) == 0);
            Ok(PageData::Data)
        }
    };
    struct Long<S>(S, u64);
    impl<S: PageSource> PageSource for Long<S> {
        fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
            self.0.read(offset, page)
        }
        fn len(&self) -> Option<u64> {
            Some(self.1)
        }
    }
    let verify = move |offset: u64, chunk: &[u8]| {
        let is_right = chunk == &expected[offset as usize..][..chunk.len()];
        if is_right { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, "wrong digest")) }
    };
    let source = Long(source, bytes.len() as u64);
    let image = cache.image("image").chunk_size(CHUNK).verify(verify).open(source).unwrap();
    let mut page = [0xee; 4096];
    assert_eq!(image.read(0, &mut page).unwrap_err().to_string(), "wrong digest");
    assert_eq!((page, image.cached(), cache.used()), ([0xee; 4096], 0, 0));
    check_all(&image, &bytes, &mut Random::new(1), 4096);
}

#[test]
fn least_valuable_chunks_go_first_and_pinned_ones_stay() {
    require!();
    let scratch = Scratch::new("limit");
    // 32 chunks: an epoch is two.
    let cache = scratch.cache(32 * CHUNK as u64);
    let pinned = open(&cache, "pinned", BytesSource::new(content(1, 4 * CHUNK)));
    read_all(&pinned, &content(1, 4 * CHUNK));
    pinned.set_pinned(true);
    let bytes = content(2, 200 * CHUNK);
    let image = open(&cache, "image", BytesSource::new(bytes.clone()));
    for chunk in 0..200 {
        check(&image, &bytes, chunk * CHUNK..chunk * CHUNK + 1);
        // One that is used all the time.
        check(&image, &bytes, 7..8);
        assert!(cache.used() <= cache.limit(), "{cache:?}");
    }
    assert_eq!(image.statistics().not_stored, 0);
    let fetches = image.statistics().fetches;
    assert_eq!(fetches, 200, "the chunk that is used all the time was fetched again");
    // What came last is there.
    for chunk in 180..200 {
        check(&image, &bytes, chunk * CHUNK..chunk * CHUNK + 1);
    }
    assert_eq!(image.statistics().fetches, fetches);
    assert_eq!((pinned.cached(), pinned.is_pinned()), (4 * CHUNK as u64, true));
    drop((pinned, image));
    // Blocks are given back, and pins outlast the process.
    let pinned = open(&scratch.cache(32 * CHUNK as u64), "pinned", unread(4 * CHUNK));
    assert!(pinned.is_pinned());
    read_all(&pinned, &content(1, 4 * CHUNK));
    let chunks = fs::File::open(scratch.0.join("image.chunks")).unwrap();
    let allocated = crate::sys::file_stamp(std::os::fd::AsFd::as_fd(&chunks)).unwrap().allocated;
    assert!(allocated <= 33 * CHUNK as u64, "{allocated} bytes of blocks");
}

#[test]
fn image_that_nobody_uses_goes_as_a_whole() {
    require!();
    let scratch = Scratch::new("whole");
    let cache = scratch.cache(8 * CHUNK as u64);
    let old = open(&cache, "old", BytesSource::new(content(1, 4 * CHUNK)));
    read_all(&old, &content(1, 4 * CHUNK));
    drop(old);
    let new = open(&cache, "new", BytesSource::new(content(2, 64 * CHUNK)));
    read_all(&new, &content(2, 64 * CHUNK));
    assert!(!scratch.0.join("old.table").exists() && !scratch.0.join("old.chunks").exists());
    assert!(scratch.0.join("new.table").exists());
    let old = open(&cache, "old", BytesSource::new(content(1, 4 * CHUNK)));
    read_all(&old, &content(1, 4 * CHUNK));
}

#[test]
fn chunk_that_goes_after_its_bytes_were_given_is_reread() {
    require!();
    let scratch = Scratch::new("withdrawn");
    let cache = scratch.cache(1 << 30);
    let bytes = content(1, 4 * CHUNK);
    let image = Arc::new(open(&cache, "image", BytesSource::new(bytes.clone())));
    read_all(&image, &bytes);
    let early = image.bytes(0, 4096).unwrap();
    assert_eq!(copied(early).unwrap(), bytes[..4096]);
    assert!(cache.0.make_room(4 * CHUNK as u64));
    assert_eq!((cache.used(), image.cached()), (0, 0));
    assert_eq!(copied(early).unwrap_err().raw_os_error(), Some(libc::EFAULT));

    // The same between the source's answer and the kernel's copy, in a pager that tries a source once.
    struct Withdrawn(Arc<CachedImage>, ChunkCache);
    impl PageSource for Withdrawn {
        fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
            self.0.read(offset, page)
        }
        fn len(&self) -> Option<u64> {
            self.0.len()
        }
        fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
            let bytes = self.0.bytes(offset, len);
            assert!(bytes.is_none() || self.1.0.make_room(4 * CHUNK as u64));
            bytes
        }
    }
    let withdrawn = Withdrawn(Arc::clone(&image), cache.clone());
    let once = crate::pager::RetryPolicy { attempts: 1, ..Default::default() };
    let memory = LazyMemory::builder(withdrawn).retry(once).build().unwrap();
    assert!(*memory == bytes[..]);
    assert!(image.statistics().fetches > 4, "{:?}", image.statistics());
}

#[test]
fn names_of_all_kinds_are_files_of_the_directory() {
    require!();
    let scratch = Scratch::new("names");
    let cache = scratch.cache(1 << 30);
    let names =
        ["a", "A", "../up", "/etc/passwd", ".hidden", "..", "ä b%20", "http://host:1/x?y=z", "a.table"];
    for (number, name) in names.into_iter().enumerate() {
        read_all(&open(&cache, name, BytesSource::new(content(number, 100))), &content(number, 100));
    }
    for (number, name) in names.into_iter().enumerate() {
        read_all(&open(&cache, name, unread(100)), &content(number, 100));
    }
    let files = fs::read_dir(&scratch.0).unwrap().count();
    assert_eq!(files, 1 + 2 * names.len());
    for name in [String::new(), "x".repeat(201), "/".repeat(67)] {
        let error = cache.image(name.clone()).open(unread(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
    }
    assert!(cache.remove("/etc/passwd").unwrap() && !cache.remove("/etc/passwd").unwrap());
}

#[test]
fn isolated_chunks_leave_mappings_to_the_process() {
    require!();
    child::run_well(crate::support::test_name!(), || {
        const CHUNKS: usize = 400;
        let scratch = Scratch::new("mappings");
        let (size, bytes) = (page_size(), content(1, CHUNKS * page_size()));
        let image = scratch.cache(1 << 30).image("image").chunk_size(size);
        let image = image.open(BytesSource::new(bytes.clone())).unwrap();
        image.0.max_borders.store(100, Ordering::Relaxed);
        let mappings = || {
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let count = maps.lines().filter(|line| line.ends_with("image.chunks")).count();
            assert!(count <= 101, "{count} mappings");
            count
        };
        for chunk in (0..CHUNKS).step_by(2) {
            check(&image, &bytes, chunk * size..chunk * size + 1);
        }
        // The first one begins with the image.
        assert_eq!(mappings(), 100);
        // In one piece it is one mapping, and giving back a chunk of it makes two more.
        drop(image);
        let image = scratch.cache(1 << 30).image("image").chunk_size(size);
        let image = image.open(BytesSource::new(bytes.clone())).unwrap();
        image.0.max_borders.store(100, Ordering::Relaxed);
        read_all(&image, &bytes);
        assert!(mappings() <= 3);
        for chunk in (1..CHUNKS).step_by(2) {
            assert!(image.0.give_back(chunk), "{chunk}");
            mappings();
        }
        read_all(&image, &bytes);
        assert_eq!(image.cached(), bytes.len() as u64);
    });
}
