//! Work that is put off: more of it than there is room for at first, and the same twice.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use super::harness::{Reader, Seen, read};
use crate::FeatureFlags;
use crate::pager::{FaultAround, PageData, Pager, Region, RetryPolicy};
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, page, require, test_name, uffd};

/// Pages whose source is down, each with a thread that waits.
const DOWN: usize = 300;

/// Pages whose source works.
const UP: usize = 100;

/// A source that is down for the first pages, and counts the reads of each page.
#[derive(Clone)]
struct Failing(Arc<(AtomicBool, Box<[AtomicU32]>)>);

impl Failing {
    fn new() -> Self {
        let reads = (0..DOWN + UP).map(|_| AtomicU32::new(0)).collect();
        Self(Arc::new((AtomicBool::new(true), reads)))
    }

    fn recover(&self) {
        self.0.0.store(false, Ordering::SeqCst);
    }

    fn reads(&self, pages: Range<usize>) -> Vec<u32> {
        self.0.1[pages].iter().map(|reads| reads.load(Ordering::SeqCst)).collect()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        let number = offset as usize / page();
        self.0.1[number].fetch_add(1, Ordering::SeqCst);
        if number < DOWN && self.0.0.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        bytes.fill(number as u8 | 1);
        Ok(PageData::Data)
    }
}

fn content(number: usize) -> Seen {
    Seen::Byte(number as u8 | 1)
}

/// A pager with one thread, and its memory. A source that fails is retried after a delay.
fn scene(kind: Kind, source: &Failing, delay: Duration) -> (Pager, Memory) {
    let memory = Memory::new(kind, DOWN + UP);
    let retry = RetryPolicy { attempts: u32::MAX, delay };
    let pager = Pager::builder().max_threads(1).retry(retry).build().unwrap();
    let source = source.clone();
    let read = move |offset: u64, bytes: &mut [u8]| source.read(offset, bytes);
    let region =
        Region::new(memory.start().expose_provenance(), memory.len(), read).fault_around(FaultAround::Page);
    let region = if kind.is_shared() { region.shared() } else { region };
    // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
    unsafe { pager.add_own(uffd(FeatureFlags::empty()), [region]) }.unwrap();
    (pager, memory)
}

#[test]
fn source_that_is_down_isnt_retried_by_each_waiter() {
    require!();
    child::run_well(test_name!(), || {
        let source = Failing::new();
        let (pager, memory) = scene(Kind::Anonymous, &source, Duration::from_secs(60));
        let _waiting: Vec<_> = (0..DOWN).map(|number| Reader::of(memory.at(number).addr())).collect();
        wait_until(|| source.reads(0..DOWN).iter().all(|reads| *reads > 0));
        // The thread of the pager comes by again and again.
        for number in DOWN..DOWN + UP {
            assert_eq!(read(memory.at(number).addr()), content(number));
        }
        assert_eq!(source.reads(0..DOWN), [1; DOWN]);
        assert_eq!(pager.statistics().missing_faults, (DOWN + UP) as u64);
        // The waiters end with the process.
        std::mem::forget(pager);
    });
}

#[test]
fn all_waiters_are_served_when_the_source_recovers() {
    require!();
    child::run_well(test_name!(), || {
        let source = Failing::new();
        let (pager, memory) = scene(Kind::Anonymous, &source, Duration::from_millis(1));
        let waiting: Vec<_> = (0..DOWN).map(|number| Reader::of(memory.at(number).addr())).collect();
        wait_until(|| source.reads(0..DOWN).iter().all(|reads| *reads > 0));
        source.recover();
        for (number, reader) in waiting.iter().enumerate() {
            assert_eq!(reader.wait(), content(number), "page {number}");
        }
        assert_eq!(pager.shared.retries.len(), 0);
    });
}

#[test]
fn faults_on_one_page_are_put_off_as_one() {
    require!();
    child::run_well(test_name!(), || {
        let source = Failing::new();
        let (pager, memory) = scene(Kind::SharedAnonymous, &source, Duration::from_secs(60));
        let waiting: Vec<_> = (0..DOWN).map(|_| Reader::of(memory.at(1).addr())).collect();
        wait_until(|| pager.statistics().missing_faults == DOWN as u64);
        assert_eq!(read(memory.at(DOWN).addr()), content(DOWN));
        // The load, and those that wait for it.
        assert!(pager.shared.retries.len() <= 2, "{:?}", pager.shared.retries);
        assert_eq!(pager.statistics().duplicates, DOWN as u64 - 1);
        assert!(waiting.iter().all(|reader| !reader.has_seen()));
        std::mem::forget(pager);
    });
}
