//! Several threads and processes at one image. Another [`ChunkCache`] of the same directory is as another process: it has
//! locks of its own.

use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::support::child;
use crate::support::proc::wait_until;

/// Says that it is being read, and waits until it may go on.
struct Gated {
    bytes: Vec<u8>,
    begun: mpsc::Sender<u64>,
    go: Arc<Barrier>,
}

impl PageSource for Gated {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.begun.send(offset).unwrap();
        self.go.wait();
        BytesSource::new(&self.bytes).read(offset, page)
    }

    fn len(&self) -> Option<u64> {
        Some(self.bytes.len() as u64)
    }
}

fn gated(bytes: Vec<u8>) -> (Gated, mpsc::Receiver<u64>, Arc<Barrier>) {
    let ((begun, has_begun), go) = (mpsc::channel(), Arc::new(Barrier::new(2)));
    (Gated { bytes, begun, go: Arc::clone(&go) }, has_begun, go)
}

#[test]
fn many_waiters_are_served_by_one_fetch() {
    require!();
    let scratch = Scratch::new("waiters");
    let bytes = content(1, 4 * CHUNK);
    let (source, begun, go) = gated(bytes.clone());
    let image = open(&scratch.cache(1 << 30), "image", source);
    let others: Vec<_> =
        (0..3).map(|_| open(&scratch.cache(1 << 30), "image", unread(bytes.len()))).collect();
    thread::scope(|scope| {
        let read = |image| {
            let bytes = &bytes;
            scope.spawn(move || check(image, bytes, CHUNK + 7..CHUNK + 100));
        };
        read(&image);
        assert_eq!(begun.recv().unwrap(), CHUNK as u64);
        (0..8).for_each(|_| read(&image));
        for other in &others {
            read(other);
            read(other);
        }
        wait_until(|| image.statistics().waits == 8);
        // The second thread of a process waits for the first.
        wait_until(|| others.iter().all(|other| other.statistics().waits == 2));
        // Another chunk is no reason to wait.
        go.wait();
    });
    assert_eq!(image.statistics().fetches, 1);
    assert!(others.iter().all(|other| other.statistics().fetches == 0));
    assert!(begun.try_recv().is_err());
}

#[test]
fn waiter_whose_other_takes_too_long_reads_for_itself() {
    require!();
    let scratch = Scratch::new("too-long");
    let bytes = content(1, 2 * CHUNK);
    let (source, begun, go) = gated(bytes.clone());
    let image = open(&scratch.cache(1 << 30), "image", source);
    let cache = scratch.cache(1 << 30);
    let impatient = cache.image("image").wait_limit(Duration::from_millis(30));
    let impatient = impatient.open(BytesSource::new(bytes.clone())).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| check(&image, &bytes, 0..10));
        begun.recv().unwrap();
        check(&impatient, &bytes, 0..10);
        let CacheStatistics { waits, not_stored, fetches, .. } = impatient.statistics();
        assert_eq!((waits, not_stored, fetches), (1, 1, 0));
        // Meanwhile the other chunk comes in.
        check(&impatient, &bytes, CHUNK..CHUNK + 10);
        assert_eq!(impatient.statistics().fetches, 1);
        go.wait();
    });
    check(&impatient, &bytes, 0..10);
    assert_eq!(impatient.statistics().fetches, 1);
}

#[test]
fn error_of_a_fetch_is_of_its_reader_and_the_next_one_tries() {
    require!();
    let scratch = Scratch::new("errors");
    let fails = Arc::new(AtomicUsize::new(2));
    struct Failing(Arc<AtomicUsize>);
    impl PageSource for Failing {
        fn read(&self, _: u64, page: &mut [u8]) -> io::Result<PageData> {
            match self.0.load(Ordering::Relaxed) {
                0 => {
                    page.fill(5);
                    Ok(PageData::Data)
                }
                left => {
                    self.0.store(left - 1, Ordering::Relaxed);
                    assert!(left != 1, "broken");
                    Err(io::Error::other("no answer"))
                }
            }
        }
        fn len(&self) -> Option<u64> {
            Some(CHUNK as u64)
        }
    }
    let image = open(&scratch.cache(1 << 30), "image", Failing(fails));
    let mut page = [0; 100];
    assert_eq!(image.read(0, &mut page).unwrap_err().to_string(), "no answer");
    let panicked = crate::source::call::catch_panic(|| image.read(0, &mut page));
    assert_eq!(panicked.unwrap_err().to_string(), "the source panicked: broken");
    assert_eq!(image.read(0, &mut page).unwrap(), PageData::Data);
    assert_eq!(page, [5; 100]);
}

#[test]
fn chunks_stay_while_another_process_uses_them() {
    require!();
    let scratch = Scratch::new("in-use");
    let limit = 16 * CHUNK as u64;
    let (first, second) = (scratch.cache(limit), scratch.cache(limit));
    let (old, new) = (content(1, 20 * CHUNK), content(2, 4 * CHUNK));
    let user = open(&first, "old", BytesSource::new(old.clone()));
    check(&user, &old, 0..16 * CHUNK);
    assert_eq!((user.cached(), first.used()), (limit, limit));
    let handed_out = user.bytes(0, CHUNK).unwrap();
    let other = open(&second, "new", BytesSource::new(new.clone()));
    check(&other, &new, 0..10);
    assert_eq!((other.statistics().not_stored, other.cached()), (1, 0));
    assert_eq!(copied(handed_out).unwrap(), old[..CHUNK]);
    // The first process is told, and gives up what it hasn't used since the epoch before, at its next miss.
    check(&user, &old, 16 * CHUNK..16 * CHUNK + 10);
    check(&other, &new, 0..10);
    assert_eq!((other.statistics().not_stored, other.cached()), (1, CHUNK as u64));
    assert!(first.used() <= limit);
    check(&user, &old, 0..old.len());
    // Dropped, it holds nothing any more.
    drop(user);
    check(&other, &new, 0..new.len());
    assert_eq!(other.statistics().not_stored, 1);
}

#[test]
fn forked_child_reads_from_the_source() {
    require!();
    child::run_well(crate::support::test_name!(), || {
        let scratch = Scratch::new("forked");
        let bytes = content(1, 4 * CHUNK);
        let image = open(&scratch.cache(1 << 30), "image", BytesSource::new(bytes.clone()));
        check(&image, &bytes, 0..2 * CHUNK);
        child::fork(|| {
            assert!(image.bytes(0, 10).is_none());
            check(&image, &bytes, 0..bytes.len());
        })
        .succeed();
        assert_eq!(image.cached(), 2 * CHUNK as u64);
        assert!(image.bytes(0, 10).is_some());
        check(&image, &bytes, 0..bytes.len());
    });
}

#[test]
fn random_readers_of_a_small_cache_see_their_images() {
    require!();
    let scratch = Scratch::new("small");
    let limit = 24 * CHUNK as u64;
    let images: Vec<Vec<u8>> = (0..3).map(|image| content(image, 20 * CHUNK + 1000 * image)).collect();
    thread::scope(|scope| {
        for process in 0..3 {
            let cache = scratch.cache(limit);
            let opened: Vec<Arc<CachedImage>> = images
                .iter()
                .enumerate()
                .map(|(number, bytes)| {
                    Arc::new(open(&cache, &number.to_string(), BytesSource::new(bytes.clone())))
                })
                .collect();
            for thread in 0..3 {
                let (images, opened, cache) = (&images, opened.clone(), cache.clone());
                scope.spawn(move || {
                    let mut random = Random::new(1 + process * 10 + thread);
                    for _ in 0..300 {
                        let number = random.below(3);
                        let range = some_range(&mut random, images[number].len());
                        let (bytes, image) = (&images[number], &opened[number]);
                        let mut page = vec![0xee; range.len()];
                        image.read(range.start as u64, &mut page).unwrap();
                        assert!(page == bytes[range.clone()], "{range:?} of {number}");
                        let here = image.bytes(range.start as u64, range.len());
                        // It may have gone again.
                        if let Some(here) = here.and_then(|here| copied(here).ok()) {
                            let is_right = here == bytes[range.start..][..here.len()];
                            assert!(is_right, "{range:?} of {number} in the mapping");
                        }
                        assert!(cache.used() <= limit, "{cache:?}");
                    }
                });
            }
            // One of them through memory, by faults.
            let (bytes, image) = (&images[0], Arc::clone(&opened[0]));
            scope.spawn(move || {
                for _ in 0..3 {
                    let memory = LazyMemory::builder(Arc::clone(&image)).build().unwrap();
                    assert!(*memory == bytes[..]);
                }
            });
        }
    });
}

#[test]
fn forked_child_has_no_part_in_its_parents_directory() {
    require!();
    child::run_well(crate::support::test_name!(), || {
        let scratch = Scratch::new("forked-directory");
        let (cache, bytes) = (scratch.cache(1 << 30), content(1, 4 * CHUNK));
        let make = || Ok(BytesSource::new(content(1, 4 * CHUNK)));
        let image = cache.image("image").chunk_size(CHUNK).open_with(make).unwrap();
        // As if other threads had them when the process forked.
        let making = image.0.making.lock().unwrap();
        let locked = cache.0.lock().unwrap();
        child::fork(|| {
            check(&image, &bytes, 0..bytes.len());
            check(&image, &bytes, 0..bytes.len());
            let new = cache.image("new").chunk_size(CHUNK).open(unread(CHUNK));
            assert_eq!(new.unwrap_err().kind(), io::ErrorKind::Unsupported);
            assert_eq!(cache.remove("image").unwrap_err().kind(), io::ErrorKind::Unsupported);
            assert!(!cache.0.make_room(0));
            assert!(image.take_problem().is_none());
        })
        .succeed();
        drop((making, locked));
        assert_eq!(cache.used(), 0);
        child::fork(|| {
            // What the child opens is its own.
            let image = open(&scratch.cache(1 << 30), "image", BytesSource::new(bytes.clone()));
            check(&image, &bytes, 0..CHUNK);
            assert_eq!(image.cached(), CHUNK as u64);
        })
        .succeed();
        check(&image, &bytes, 0..bytes.len());
        assert_eq!((image.statistics().fetches, cache.used()), (1, 4 * CHUNK as u64));
    });
}

#[test]
fn read_waits_for_the_directory_once() {
    require!();
    let scratch = Scratch::new("locked");
    let (cache, bytes) = (scratch.cache(1 << 30), content(1, 32 * CHUNK));
    let image = open(&cache, "image", BytesSource::new(bytes.clone()));
    // Another thread has the lock, and another process.
    for (round, holder) in [cache.clone(), scratch.cache(1 << 30)].into_iter().enumerate() {
        let locked = holder.0.lock().unwrap();
        let start = Instant::now();
        let first = 16 * round * CHUNK;
        thread::scope(|scope| {
            scope.spawn(|| check(&image, &bytes, first..first + 16 * CHUNK));
        });
        assert!(start.elapsed() < Duration::from_secs(10), "{:?} for 16 chunks", start.elapsed());
        drop(locked);
        let CacheStatistics { fetches, not_stored, .. } = image.statistics();
        assert_eq!((fetches, not_stored, image.cached()), (round as u64 + 1, round as u64 + 1, 0));
    }
    check(&image, &bytes, 0..bytes.len());
    assert_eq!(image.cached(), bytes.len() as u64);
}
