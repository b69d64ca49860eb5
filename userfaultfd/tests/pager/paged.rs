//! A store as memory: what was flushed is in it, and nothing is lost by a store that fails.

use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use userfaultfd::pager::{
    Budget, Error, FaultAround, FileStore, FlushStep, FnStore, PageData, PageSource, PageStore, Problem,
    RetryPolicy, WriteBack,
};
use userfaultfd::{FeatureFlags, PagedBuilder, PagedMemory};

use crate::scene;
use crate::support::random::Random;
use crate::support::{child, page, proc, require, test_name};

/// What a store does when it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mood {
    #[default]
    Good,
    Fails,
    Panics,
    /// Until the mood is another.
    Stalls,
}

/// A store in memory, as moody as a test needs.
#[derive(Debug, Default)]
struct Shelf {
    bytes: Mutex<Vec<u8>>,
    /// What a crash would leave.
    durable: Mutex<Vec<u8>>,
    mood: Mutex<Mood>,
    changed: Condvar,
    fails_to_sync: AtomicBool,
    writes: Mutex<Vec<Range<usize>>>,
    stalled: AtomicUsize,
}

impl Shelf {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { durable: Mutex::new(bytes.clone()), bytes: Mutex::new(bytes), ..Self::default() })
    }

    fn of_pages(pages: usize) -> Arc<Self> {
        Self::new(content(pages * page()))
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        self.changed.notify_all();
    }

    fn all(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn durable(&self) -> Vec<u8> {
        self.durable.lock().unwrap().clone()
    }

    fn written(&self) -> Vec<Range<usize>> {
        std::mem::take(&mut *self.writes.lock().unwrap())
    }
}

impl PageSource for Shelf {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let bytes = self.bytes.lock().unwrap();
        let rest = &bytes[offset as usize..];
        let len = rest.len().min(page.len());
        page[..len].copy_from_slice(&rest[..len]);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.bytes.lock().unwrap().len() as u64)
    }
}

impl PageStore for Shelf {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut mood = self.mood.lock().unwrap();
        if *mood == Mood::Stalls {
            self.stalled.fetch_add(1, Ordering::SeqCst);
            mood = self.changed.wait_while(mood, |mood| *mood == Mood::Stalls).unwrap();
            self.stalled.fetch_sub(1, Ordering::SeqCst);
        }
        match *mood {
            Mood::Fails => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Mood::Panics => {
                drop(mood);
                panic!("out of shelves");
            }
            Mood::Good | Mood::Stalls => {}
        }
        let range = offset as usize..offset as usize + bytes.len();
        self.bytes.lock().unwrap()[range.clone()].copy_from_slice(bytes);
        self.writes.lock().unwrap().push(range);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.fails_to_sync.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        *self.durable.lock().unwrap() = self.all();
        Ok(())
    }
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 4096 * 31 + at % 251) as u8).collect()
}

const ONCE: RetryPolicy = RetryPolicy { attempts: 1, delay: std::time::Duration::ZERO };

fn builder(shelf: &Arc<Shelf>, budget: &Budget) -> PagedBuilder {
    PagedMemory::builder(Arc::clone(shelf)).budget(budget).retry(ONCE)
}

/// Problems as they are reported.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn hear(&self) -> impl Fn(&Problem) + Send + Sync + 'static {
        let told = self.clone();
        move |problem| told.0.lock().unwrap().push(problem.to_string())
    }

    fn has(&self, text: &str) -> bool {
        self.0.lock().unwrap().iter().any(|told| told.contains(text))
    }
}

#[test]
fn flush_writes_what_was_written_merged_and_nothing_else() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget) = (Shelf::new(content(20 * page() + 5)), Budget::new(64 * page()));
    let mut memory = builder(&shelf, &budget).build().unwrap();
    assert_eq!(memory.len(), 20 * page() + 5);
    assert!(memory[..] == shelf.all()[..]);
    for at in [3, 4, 5, 9, 20] {
        memory[at * page() + 2] = 0xee;
    }
    assert_eq!(memory.statistics().dirty, 5 * page());
    assert!(shelf.written().is_empty());
    memory.flush().unwrap();
    let end = memory.len();
    assert_eq!(shelf.written(), [3 * page()..6 * page(), 9 * page()..10 * page(), 20 * page()..end]);
    assert!(memory[..] == shelf.durable()[..]);
    memory.flush().unwrap();
    assert!(shelf.written().is_empty(), "it wasn't written since");
    // A page that was flushed is written again once it is written again.
    memory[4 * page()] = 0xdd;
    memory[7 * page()] = 0xdd;
    memory.flush_range(0..5 * page()).unwrap();
    assert_eq!(shelf.written(), std::slice::from_ref(&(4 * page()..5 * page())));
    assert_eq!(memory.statistics().dirty, page());
    memory.flush_range(7 * page()..usize::MAX).unwrap();
    assert!(memory[..] == shelf.durable()[..]);
    let statistics = memory.statistics();
    assert_eq!((statistics.dirty, statistics.write_backs), (0, 7));
    assert_eq!(statistics.bytes_written, (6 * page() + 5) as u64);
    assert_eq!(statistics.bytes_read, (20 * page() + 5) as u64);
    assert_eq!(statistics.resident, 21 * page());
    memory.close().unwrap();
    assert_eq!(budget.resident(), 0);
}

#[test]
fn memory_larger_than_its_budget_is_written_back() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let pages = 1000;
    let (shelf, budget) = (Shelf::of_pages(pages), Budget::new(64 * page()));
    let mut memory = builder(&shelf, &budget).build().unwrap();
    let mut expected = shelf.all();
    for round in 1..=2_u8 {
        for at in (0..pages).filter(|at| at % 3 != 0) {
            memory[at * page() + 7] = at as u8 ^ round;
            expected[at * page() + 7] = at as u8 ^ round;
        }
        assert!(memory[..] == expected[..]);
    }
    let statistics = memory.statistics();
    assert!(statistics.write_backs >= 1200 && statistics.refaults > 0, "{statistics:?}");
    assert!(statistics.dirty <= 96 * page() && statistics.resident <= 96 * page(), "{statistics:?}");
    memory.close().unwrap();
    assert!(shelf.durable() == expected);
}

#[test]
fn flush_has_the_write_of_the_thread_that_flushes() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    // The page is filled by the fault of the write, and its thread may be faster than the one that fills.
    let (shelf, budget) = (Shelf::of_pages(600), Budget::new(64 * page()));
    let mut memory = builder(&shelf, &budget).fault_around(FaultAround::Page).build().unwrap();
    for at in 0..600 {
        memory[at * page()] = 0xcc;
        memory.flush_range(at * page()..at * page() + 1).unwrap();
        assert_eq!(shelf.durable.lock().unwrap()[at * page()], 0xcc, "page {at}");
    }
}

#[test]
fn nothing_reaches_the_store_but_by_flush() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget, told) = (Shelf::of_pages(300), Budget::new(32 * page()), Told::default());
    let memory = builder(&shelf, &budget).write_back(WriteBack::OnFlush).on_problem(told.hear());
    let mut memory = memory.build().unwrap();
    let mut expected = shelf.all();
    for at in 0..20 {
        memory[at * page()] = 9;
        expected[at * page()] = 9;
    }
    assert!(memory[..] == expected[..], "all is read, in the room that is left");
    memory.evict(0..usize::MAX).unwrap();
    assert_eq!((memory.resident(0..20 * page()), memory.resident(0..usize::MAX)), (20 * page(), 20 * page()));
    assert!(shelf.written().is_empty() && !told.has("full"));
    for at in 20..200 {
        memory[at * page()] = 9;
        expected[at * page()] = 9;
    }
    proc::wait_until(|| told.has("the budget is full"));
    assert!(shelf.written().is_empty());
    assert!(budget.resident() >= 200 * page());
    memory.flush().unwrap();
    assert!(shelf.durable() == expected);
    proc::wait_until(|| budget.resident() <= 32 * page());
    memory[5] = 8;
    drop(memory);
    proc::wait_until(|| told.has("0x1000 bytes that were written and not flushed") || page() != 4096);
    assert!(shelf.all() == expected);
}

#[test]
fn hook_comes_before_each_write_and_may_refuse_it() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget) = (Shelf::of_pages(300), Budget::new(32 * page()));
    let (log, refuses) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
    let (hook_log, hook_refuses, hook_shelf) = (Arc::clone(&log), Arc::clone(&refuses), Arc::clone(&shelf));
    let hook = move |bytes: Range<u64>| {
        let written = hook_shelf.writes.lock().unwrap().len();
        hook_log.lock().unwrap().push((written, bytes.start as usize..bytes.end as usize));
        if hook_refuses.load(Ordering::SeqCst) { Err(io::Error::other("the log is full")) } else { Ok(()) }
    };
    let mut memory = builder(&shelf, &budget).before_write(hook).build().unwrap();
    (0..300).for_each(|at| memory[at * page()] = 1);
    memory.flush().unwrap();
    let hooks = std::mem::take(&mut *log.lock().unwrap());
    let writes = shelf.written();
    assert_eq!(hooks, writes.into_iter().enumerate().collect::<Vec<_>>());
    refuses.store(true, Ordering::SeqCst);
    memory[7 * page()] = 2;
    let refused = memory.flush().unwrap_err();
    assert_eq!(refused.step(), FlushStep::BeforeWrite);
    assert_eq!(refused.dirty(), std::slice::from_ref(&(7 * page()..8 * page())));
    assert!(refused.to_string().contains("the log is full"), "{refused}");
    assert!(shelf.written().is_empty());
    refuses.store(false, Ordering::SeqCst);
    memory.close().unwrap();
    assert_eq!(shelf.durable()[7 * page()], 2);
}

#[test]
fn failed_write_names_what_is_dirty_and_loses_nothing() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for mood in [Mood::Fails, Mood::Panics] {
        let (shelf, budget, told) = (Shelf::of_pages(300), Budget::new(32 * page()), Told::default());
        let mut memory = builder(&shelf, &budget).on_problem(told.hear()).build().unwrap();
        memory[3 * page()] = 7;
        memory[8 * page()] = 7;
        shelf.set(mood);
        let failed = memory.flush().unwrap_err();
        assert_eq!(failed.step(), FlushStep::Write);
        assert_eq!(failed.dirty(), [3 * page()..4 * page(), 8 * page()..9 * page()]);
        assert_eq!(failed.lost(), []);
        let text = if mood == Mood::Fails { "No space left" } else { "out of shelves" };
        assert!(failed.to_string().contains(text), "{failed}");
        // More than there is room for, none of which can leave.
        let mut expected = shelf.all();
        (expected[3 * page()], expected[8 * page()]) = (7, 7);
        for at in 0..300 {
            memory[at * page() + 1] = 6;
            expected[at * page() + 1] = 6;
        }
        assert!(memory[..] == expected[..]);
        proc::wait_until(|| told.has("couldn't be written back"));
        let still = memory.close().unwrap_err();
        assert_eq!(still.error.dirty(), std::slice::from_ref(&(0..300 * page())));
        let memory = still.memory;
        assert!(memory.statistics().unwritten > 0 && memory[..] == expected[..]);
        shelf.set(Mood::Good);
        memory.close().unwrap();
        assert!(shelf.durable() == expected, "{mood:?}");
    }
}

#[test]
fn what_a_drop_cannot_write_is_reported() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget, told) = (Shelf::of_pages(30), Budget::new(32 * page()), Told::default());
    let mut memory = builder(&shelf, &budget).on_problem(told.hear()).build().unwrap();
    memory[3 * page()] = 7;
    shelf.set(Mood::Fails);
    drop(memory);
    assert!(told.has("couldn't be written back"), "its pager has ended, and has reported all");
    shelf.set(Mood::Good);
    let mut memory = builder(&shelf, &budget).build().unwrap();
    memory[3 * page()] = 7;
    drop(memory);
    assert_eq!(shelf.durable()[3 * page()], 7);
}

/// What must leave is copied in the staging area: all of it is there while the first write goes on.
#[test]
fn next_pages_are_staged_while_some_are_written() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    // Two parts.
    const PAGES: usize = 4096;
    let (shelf, budget) = (Shelf::of_pages(PAGES), Budget::new(2 * PAGES * page()));
    let mut memory = builder(&shelf, &budget).build().unwrap();
    (0..PAGES).for_each(|at| memory[at * page()] ^= 0xff);
    let expected = memory.to_vec();
    shelf.set(Mood::Stalls);
    thread::scope(|scope| {
        let evicting = scope.spawn(|| memory.evict(0..usize::MAX));
        proc::wait_until(|| shelf.stalled.load(Ordering::SeqCst) > 0 && budget.statistics().staged == PAGES);
        assert!(shelf.written().is_empty());
        shelf.set(Mood::Good);
        evicting.join().unwrap().unwrap();
    });
    assert_eq!((memory.resident(0..usize::MAX), memory.statistics().dirty), (0, 0));
    assert!(shelf.all() == expected);
    let mut writes = shelf.written();
    writes.sort_unstable_by_key(|range| range.start);
    assert!(writes.windows(2).all(|pair| pair[0].end == pair[1].start), "each page once: {writes:?}");
    assert!(memory[..] == expected[..]);
}

#[test]
fn after_a_failed_sync_what_is_in_memory_is_dirty_again() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget) = (Shelf::of_pages(300), Budget::new(32 * page()));
    let mut memory = builder(&shelf, &budget).build().unwrap();
    memory[3 * page()] = 7;
    memory[8 * page()] = 7;
    // One of them leaves, and was written before.
    memory.evict(8 * page()..9 * page()).unwrap();
    assert_eq!(memory.resident(8 * page()..9 * page()), 0);
    assert_eq!(shelf.all()[8 * page()], 7);
    shelf.fails_to_sync.store(true, Ordering::SeqCst);
    let failed = memory.flush().unwrap_err();
    assert_eq!(failed.step(), FlushStep::Sync);
    assert_eq!(failed.dirty(), std::slice::from_ref(&(3 * page()..4 * page())));
    assert_eq!(failed.lost(), std::slice::from_ref(&(8 * page()..9 * page())));
    shelf.fails_to_sync.store(false, Ordering::SeqCst);
    shelf.written();
    let lost = memory.flush().unwrap_err();
    assert_eq!(shelf.written(), std::slice::from_ref(&(3 * page()..4 * page())), "it is written again");
    assert_eq!(
        (lost.dirty(), lost.lost()),
        (&[][..], std::slice::from_ref(&(8 * page()..9 * page()))),
        "{lost}"
    );
    // Until it is written anew.
    memory[8 * page()] = 8;
    memory.flush().unwrap();
    assert_eq!((shelf.durable()[3 * page()], shelf.durable()[8 * page()]), (7, 8));
}

/// The evicting thread has pages in hand nearly all the time, so that it would have some, too, when the flush marks as dirty
/// what isn't synced.
#[test]
fn pages_on_their_way_out_while_a_sync_fails_are_not_lost() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (pages, rounds) = (160, 400);
    let (shelf, budget) = (Shelf::of_pages(pages), Budget::new(16 * page()));
    let memory = builder(&shelf, &budget).fault_around(FaultAround::Page).threads(2).build().unwrap();
    shelf.fails_to_sync.store(true, Ordering::SeqCst);
    let (expected, is_done) = (shelf.all(), AtomicBool::new(false));
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|reader| {
                let (memory, expected, is_done) = (&memory, &expected, &is_done);
                scope.spawn(move || {
                    let (mut random, mut byte) = (Random::new(7 + reader), [0]);
                    while !is_done.load(Ordering::SeqCst) {
                        let at = random.below(pages) * page() + 64;
                        // An error, and no SIGBUS, if it can't be had.
                        memory.read_at(at, &mut byte)?;
                        assert_eq!(byte[0], expected[at], "byte {at:#x}");
                    }
                    Ok::<_, io::Error>(())
                })
            })
            .collect();
        let start = memory.as_raw_slice().cast::<u8>().expose_provenance();
        let mut random = Random::new(5);
        for round in 0..rounds {
            if readers.iter().any(thread::ScopedJoinHandle::is_finished) {
                break;
            }
            for at in (0..8).map(|_| random.below(pages) * page()) {
                #[expect(unsafe_code, reason = "bytes that no other thread reads")]
                // SAFETY: a byte of the memory, which outlives this; nothing but atomics accesses it here.
                let cell = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU8>(start + at) };
                cell.store(round as u8, Ordering::Relaxed);
            }
            assert_eq!(memory.flush().unwrap_err().step(), FlushStep::Sync);
        }
        is_done.store(true, Ordering::SeqCst);
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
    });
}

#[test]
fn pinned_page_stays_writable_over_flushes() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    for write_back in [WriteBack::Any, WriteBack::OnFlush] {
        let (shelf, budget) = (Shelf::of_pages(100), Budget::new(64 * page()));
        let mut memory =
            builder(&shelf, &budget).write_back(write_back).handle_kernel_faults(false).build().unwrap();
        memory[3 * page()..5 * page()].fill(7);
        let raw = memory.as_raw_slice().cast::<u8>().wrapping_add(4 * page());
        let pinned = memory.pin(4 * page()..5 * page()).unwrap();
        memory.flush().unwrap();
        assert_eq!((shelf.durable()[3 * page()], shelf.durable()[4 * page()]), (7, 7));
        assert_eq!(memory.statistics().dirty, page(), "a device may write to it");
        #[expect(unsafe_code, reason = "as a device writes to it")]
        // SAFETY: within the memory; nothing of the page is looked at meanwhile.
        let read = unsafe { libc::read(zeros().as_raw_fd(), raw.cast(), 100) };
        assert_eq!(read, 100, "{}", io::Error::last_os_error());
        memory.flush().unwrap();
        assert_eq!((shelf.durable()[4 * page()], shelf.durable()[4 * page() + 100]), (0, 7));
        drop(pinned);
        memory.flush().unwrap();
        assert_eq!(memory.statistics().dirty, 0);
        memory.close().unwrap();
    }
}

/// What the library pins while it copies is given to no device.
#[test]
fn page_that_others_copy_from_is_clean_after_a_flush() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget) = (Shelf::of_pages(100), Budget::new(128 * page()));
    let memory = builder(&shelf, &budget).threads(2).build().unwrap();
    let raw = memory.as_raw_slice().cast::<u8>().expose_provenance();
    #[expect(unsafe_code, reason = "a byte that several threads access")]
    // SAFETY: within the memory, which outlives the threads; the others copy from other pages.
    let byte = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU8>(raw + 3 * page()) };
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (memory, is_over) = (&memory, &is_over);
        for thread in 0..3 {
            scope.spawn(move || {
                let mut bytes = vec![0; 8];
                while !is_over.load(Ordering::Relaxed) {
                    memory.read_at((4 + thread) * page(), &mut bytes).unwrap();
                }
            });
        }
        let flushed = |round| {
            byte.store(round, Ordering::Relaxed);
            let flushed = memory.flush().map_err(|error| error.to_string());
            (flushed, shelf.durable()[3 * page()], memory.statistics().dirty)
        };
        let wrong = (1..=200)
            .map(|round| (round, flushed(round)))
            .find(|(round, found)| *found != (Ok(()), *round, 0));
        // The threads end first.
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(wrong, None);
    });
}

fn zeros() -> fs::File {
    fs::File::open("/dev/zero").unwrap()
}

#[test]
fn stalled_store_is_reported_and_blocks_no_fault() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget, told) = (Shelf::of_pages(300), Budget::new(32 * page()), Told::default());
    let mut memory = builder(&shelf, &budget).on_problem(told.hear()).build().unwrap();
    let mut expected = shelf.all();
    shelf.set(Mood::Stalls);
    for at in 0..300 {
        memory[at * page()] = 7;
        expected[at * page()] = 7;
    }
    assert!(memory[..] == expected[..]);
    // The evicting thread may go on later than the threads that it lets go on.
    proc::wait_until(|| shelf.stalled.load(Ordering::SeqCst) > 0 && told.has("couldn't be written back"));
    shelf.set(Mood::Good);
    proc::wait_until(|| budget.resident() <= 32 * page());
    assert!(memory[..] == expected[..]);
    memory.close().unwrap();
    assert!(shelf.durable() == expected);
}

/// A plain array beside memory of ten times its budget, and one of what was flushed.
fn model(seed: u64, steps: usize, write_back: WriteBack) {
    let (pages, most) = (400, 40);
    let shelf = Shelf::new(content(pages * page() - 100));
    let budget = Budget::new(most * page());
    let memory = builder(&shelf, &budget).write_back(write_back).threads(2);
    let mut memory = memory.on_problem(|problem| println!("{problem}")).build().unwrap();
    let mut expected = shelf.all();
    let mut flushed = shelf.all();
    let mut random = Random::new(seed);
    for step in 0..steps {
        let (at, len) = scene::random_place(&mut random, expected.len());
        let what = random.below(100);
        match what {
            0..80 => scene::access(what, &mut memory, &mut expected, at..at + len, step),
            80..84 => {
                let bytes = vec![step as u8 ^ 0x55; len];
                assert_eq!(memory.write_at(at, &bytes).unwrap(), len);
                expected[at..at + len].copy_from_slice(&bytes);
            }
            84..88 => {
                memory.flush_range(at..at + len).unwrap();
                let end = (at + len).next_multiple_of(page()).min(expected.len());
                let range = at - at % page()..end;
                flushed[range.clone()].copy_from_slice(&expected[range.clone()]);
                assert!(shelf.durable()[range.clone()] == expected[range], "step {step}");
            }
            88 => {
                memory.flush().unwrap();
                flushed.clone_from(&expected);
                assert!(shelf.durable() == expected, "step {step}");
                assert_eq!(memory.statistics().dirty, 0);
            }
            89..92 => {
                memory.evict(at..at + len).unwrap();
                if write_back == WriteBack::Any {
                    assert_eq!(memory.resident(at..at + len), 0, "step {step}");
                }
            }
            92..96 => {
                let pinned = memory.pin(at..at + len).unwrap();
                let other = random.below(expected.len());
                assert_eq!(memory[other], expected[other]);
                assert!(pinned[..] == expected[at..at + len], "step {step}");
            }
            96 => budget.resize((20 + random.below(most)) * page()).unwrap(),
            97 => {
                let prefetched = memory.prefetch(at..at + len).unwrap();
                assert!(prefetched.wait().failed.is_empty());
            }
            _ => {
                let mut bytes = vec![0; len];
                assert_eq!(memory.read_at(at, &mut bytes).unwrap(), len);
                assert!(bytes == expected[at..at + len], "step {step}");
            }
        }
        if write_back == WriteBack::OnFlush && step % 100 == 0 {
            assert!(shelf.all() == flushed, "step {step}");
        }
    }
    assert!(memory[..] == expected[..]);
    assert!(memory.statistics().evictions > 0);
    memory.close().unwrap();
    assert!(shelf.durable() == expected);
}

#[test]
fn random_accesses_find_what_an_array_has_and_the_store_too() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let steps = std::env::var("USERFAULTFD_MODEL_STEPS").ok().and_then(|steps| steps.parse().ok());
    let seed = Instant::now().elapsed().as_nanos() as u64 | u64::from(std::process::id()) << 20 | 1;
    println!("seed {seed}");
    model(seed, steps.unwrap_or(5000), WriteBack::Any);
    model(seed ^ 0x9999, steps.unwrap_or(5000), WriteBack::OnFlush);
}

#[test]
fn threads_write_while_another_flushes_and_nothing_is_lost() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    const THREADS: usize = 3;
    let (pages, steps) = (200, 4000);
    let (shelf, budget) = (Shelf::of_pages(pages), Budget::new(32 * page()));
    let memory = builder(&shelf, &budget).threads(2).build().unwrap();
    let start = memory.as_raw_slice().cast::<u8>().expose_provenance();
    let cell = |at: usize| {
        let cell = std::ptr::with_exposed_provenance::<AtomicU8>(start + at);
        #[expect(unsafe_code, reason = "bytes that several threads write")]
        // SAFETY: a byte of the memory, which outlives the threads, and which nothing but atomics accesses here.
        unsafe {
            &*cell
        }
    };
    let is_done = AtomicBool::new(false);
    let expected = thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|number| {
                let memory = &memory;
                scope.spawn(move || {
                    let (mut random, mut mine) = (Random::new(99 + number as u64), vec![None; pages]);
                    for step in 0..steps {
                        let at = random.below(if step % 3 == 0 { pages } else { pages / 8 });
                        let place = at * page() + number * 64;
                        cell(place).store(step as u8, Ordering::Relaxed);
                        mine[at] = Some(step as u8);
                        assert_eq!(cell(place).load(Ordering::Relaxed), step as u8);
                        if step % 500 == 0 {
                            memory.flush_range(place..place + 1).unwrap();
                        }
                    }
                    mine
                })
            })
            .collect();
        scope.spawn(|| {
            while !is_done.load(Ordering::SeqCst) {
                memory.flush().unwrap();
            }
        });
        scope.spawn(|| {
            while !is_done.load(Ordering::SeqCst) {
                memory.evict(0..50 * page()).unwrap();
            }
        });
        let mut expected = shelf.all();
        for (number, writer) in writers.into_iter().enumerate() {
            let mine = writer.join().unwrap();
            for (at, byte) in mine.into_iter().enumerate().filter_map(|(at, byte)| Some((at, byte?))) {
                expected[at * page() + number * 64] = byte;
            }
        }
        is_done.store(true, Ordering::SeqCst);
        expected
    });
    memory.flush().unwrap();
    // What others wrote before is there, too: bytes that no thread has written are the store's.
    assert!(memory[..] == shelf.durable()[..]);
    let durable = shelf.durable();
    for (at, byte) in expected.iter().enumerate().filter(|(at, _)| at % page() / 64 < THREADS && at % 64 == 0)
    {
        assert_eq!(durable[at], *byte, "byte {at:#x}");
    }
}

struct Named(PathBuf);

impl Named {
    fn new(test: &str, len: usize) -> Self {
        let name = format!("{}-{}", test.replace("::", "-"), std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, content(len)).unwrap();
        Self(path)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

#[test]
fn what_cannot_be_paged_is_refused_by_name() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget) = (Shelf::of_pages(30), Budget::new(64 * page()));
    let refused = builder(&shelf, &Budget::new(15 * page())).build().unwrap_err();
    assert!(matches!(refused, Error::BudgetTooSmall { .. }), "{refused}");
    let refused = builder(&shelf, &budget).offset(7).build().unwrap_err();
    assert!(matches!(refused, Error::UnalignedStore { offset: 7, .. }), "{refused}");
    let refused = builder(&shelf, &budget).len(31 * page()).build().unwrap_err();
    assert!(matches!(refused, Error::BeyondSource { .. }), "{refused}");
    let empty = builder(&Shelf::new(Vec::new()), &budget).build().unwrap_err();
    assert!(matches!(empty, Error::EmptyRegion { .. }), "{empty}");
    // A part of a store, from a page on.
    let mut part = builder(&shelf, &budget).offset(10 * page() as u64).len(page() + 1).build().unwrap();
    part[page()] = 0xab;
    part.close().unwrap();
    assert_eq!(shelf.durable()[11 * page()], 0xab);
    assert_eq!(shelf.written(), std::slice::from_ref(&(11 * page()..11 * page() + 1)));
}

#[test]
fn file_that_changes_its_length_is_refused_and_nothing_lost() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let name = Named::new(test_name!(), 30 * page());
    let budget = Budget::new(64 * page());
    let mut memory =
        PagedMemory::builder(FileStore::open(&name.0).unwrap()).budget(&budget).retry(ONCE).build().unwrap();
    memory[29 * page()] = 1;
    let file = fs::File::options().write(true).open(&name.0).unwrap();
    for (len, kind) in [(29 * page(), ErrorKind::UnexpectedEof), (31 * page(), ErrorKind::InvalidData)] {
        file.set_len(len as u64).unwrap();
        let refused = memory.flush().unwrap_err();
        assert_eq!(refused.error().kind(), kind, "{refused}");
        assert_eq!(refused.dirty(), std::slice::from_ref(&(29 * page()..30 * page())));
        assert_eq!(file.metadata().unwrap().len(), len as u64);
    }
    file.set_len(30 * page() as u64).unwrap();
    memory.close().unwrap();
    assert_eq!(fs::read(&name.0).unwrap()[29 * page()], 1);
}

#[test]
fn closures_are_a_store() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let bytes = Arc::new(Mutex::new(vec![3; 8 * page()]));
    let (from, to) = (Arc::clone(&bytes), Arc::clone(&bytes));
    let read = move |offset: u64, page: &mut [u8]| {
        page.copy_from_slice(&from.lock().unwrap()[offset as usize..][..page.len()]);
        Ok(PageData::Data)
    };
    let write = move |offset: u64, page: &[u8]| {
        to.lock().unwrap()[offset as usize..][..page.len()].copy_from_slice(page);
        Ok(())
    };
    let mut memory = PagedMemory::new(FnStore::new(8 * page() as u64, read, write)).unwrap();
    memory[5 * page()..].fill(4);
    memory.flush().unwrap();
    // Not with the lock that the store takes.
    let stored = bytes.lock().unwrap().clone();
    assert!(stored[..] == memory[..]);
}

#[test]
fn childs_copy_of_paged_memory_flushes_nothing() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let (shelf, budget) = (Shelf::of_pages(30), Budget::new(64 * page()));
    let mut memory = builder(&shelf, &budget).build().unwrap();
    memory[0] = 9;
    let memory = &memory;
    child::fork(|| {
        let refused = memory.flush().unwrap_err();
        assert_eq!(refused.step(), FlushStep::OtherProcess);
        assert!(memory.evict(0..10).is_err() && memory.pin(0..10).is_err());
    })
    .succeed();
    memory.flush().unwrap();
    assert_eq!(shelf.durable()[0], 9);
}
