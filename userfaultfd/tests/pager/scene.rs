//! What the tests share: content by which each page is known, and memory that a pager fills with it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use userfaultfd::pager::{Added, FaultAround, PageData, PageSource, Pager, Problem, Region};
use userfaultfd::{FeatureFlags, Uffd};

use crate::reader::{Seen, read};
use crate::support::memory::{Kind, Memory};
use crate::support::random::Random;
use crate::support::{features, has_features, page};

/// The first byte of a page of the source.
pub(crate) fn byte(page: usize) -> u8 {
    (page % 251 + 1) as u8
}

/// All of a page of the source: that byte in front, then bytes that tell where they are.
pub(crate) fn fill(number: usize, bytes: &mut [u8]) {
    for (at, word) in bytes.chunks_mut(8).enumerate() {
        let value = (number as u64) << 32 | at as u64;
        word.copy_from_slice(&value.to_ne_bytes()[..word.len()]);
    }
    bytes[0] = byte(number);
}

/// A source of pages of a size, which notes what is read. It doesn't allocate then: a thread that forks may hold the
/// allocator's locks.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    size: usize,
    reads: Arc<Mutex<Vec<usize>>>,
}

/// Reads that are noted at most.
const NOTED: usize = 1 << 16;

impl Pages {
    pub(crate) fn new(size: usize) -> Self {
        Self { size, reads: Arc::new(Mutex::new(Vec::with_capacity(NOTED))) }
    }

    /// How often each page was read that was.
    pub(crate) fn reads(&self) -> BTreeMap<usize, usize> {
        let mut reads = BTreeMap::new();
        self.reads.lock().unwrap().iter().for_each(|page| *reads.entry(*page).or_default() += 1);
        reads
    }

    /// Checks that no page was read more than once, and how many were.
    #[track_caller]
    pub(crate) fn were_read_once(&self, pages: usize) {
        let reads = self.reads();
        assert!(reads.len() == pages && reads.values().all(|times| *times == 1), "{pages} of {reads:?}");
    }
}

impl PageSource for Pages {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        assert!(offset % self.size as u64 == 0 && buffer.len() % self.size == 0, "whole pages");
        for (at, bytes) in buffer.chunks_mut(self.size).enumerate() {
            let number = offset as usize / self.size + at;
            fill(number, bytes);
            let mut reads = self.reads.lock().unwrap();
            assert!(reads.len() < NOTED, "more reads than a test has");
            reads.push(number);
        }
        Ok(PageData::Data)
    }
}

/// Problems that a pager told of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Problems(Arc<Mutex<Vec<String>>>);

impl Problems {
    /// What to call with them.
    pub(crate) fn callback(&self) -> impl Fn(&Problem) + Send + Sync + use<> {
        let problems = self.clone();
        move |problem| problems.0.lock().unwrap().push(format!("{problem:?}: {problem}"))
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// How many have such a name.
    pub(crate) fn count(&self, name: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|problem| problem.starts_with(name)).count()
    }
}

/// Memory as a region, filled page by page.
pub(crate) fn region(memory: &Memory, source: impl PageSource + 'static) -> Region {
    let region = Region::new(memory.start().expose_provenance(), memory.len(), source);
    let region = region.page_size(memory.page()).fault_around(FaultAround::Page);
    if memory.kind().is_shared() { region.shared() } else { region }
}

/// Serves memory of this process.
#[track_caller]
pub(crate) fn serve(pager: &Pager, uffd: Uffd, region: Region) -> Added {
    // SAFETY: bytes are good whatever they are, and only raw pointers lead to the memory of tests.
    unsafe { pager.add_own(uffd, [region]) }.unwrap()
}

/// A pager that serves memory with [`Pages`].
pub(crate) fn served(memory: &Memory) -> (Pager, Added, Pages) {
    let (pager, source) = (Pager::new().unwrap(), Pages::new(memory.page()));
    let uffd = crate::support::uffd(FeatureFlags::empty());
    let added = serve(&pager, uffd, region(memory, source.clone()));
    (pager, added, source)
}

/// Memory of a kind, if there is such a thing.
pub(crate) fn memory(test: &str, kind: Kind, pages: usize) -> Option<Memory> {
    let [missing, ..] = kind.features();
    let part = format!("{test} ({kind:?})");
    has_features(&part, missing).then(|| Memory::try_new(test, kind, pages))?
}

/// Checks that all bytes of a page are those of a page of the source.
#[track_caller]
pub(crate) fn check(memory: &Memory, page: usize, number: usize) {
    let mut expected = vec![0; memory.page()];
    fill(number, &mut expected);
    assert!(memory.content(page) == expected, "page {page} of {memory:?} isn't page {number} of the source");
}

/// What is seen in a page.
pub(crate) fn see(memory: &Memory, page: usize) -> Seen {
    read(memory.at(page).addr())
}

pub(crate) fn content(number: usize) -> Seen {
    Seen::Byte(byte(number))
}

/// Whether this kernel can poison. Where it can't, a thread that accesses what can't be filled waits.
pub(crate) fn can_poison() -> bool {
    features().contains(FeatureFlags::POISON)
}

/// Checks what is so in the end: a thread that reads a page goes on before the pager has noted that it is there.
#[track_caller]
pub(crate) fn eventually<T: PartialEq + Debug>(now: impl Fn() -> T, expected: T) {
    let start = Instant::now();
    while now() != expected && start.elapsed() < Duration::from_secs(20) {
        std::thread::yield_now();
    }
    assert_eq!(now(), expected);
}

/// Where a random program accesses memory next, an eighth of it more often than the rest: the first byte, and how many.
pub(crate) fn random_place(random: &mut Random, end: usize) -> (usize, usize) {
    let at = match random.below(4) {
        0 => random.below(end),
        _ => random.below(end / 8),
    };
    (at, (1 + random.below(3 * page())).min(end - at))
}

/// What such a program does in 80 of 100 cases: it reads a byte, writes it, reads or writes all in a range.
pub(crate) fn access(what: usize, memory: &mut [u8], expected: &mut [u8], range: Range<usize>, step: usize) {
    let at = range.start;
    match what {
        0..40 => assert_eq!(memory[at], expected[at], "step {step}"),
        40..65 => (memory[at], expected[at]) = (step as u8, step as u8),
        65..75 => assert!(memory[range.clone()] == expected[range], "step {step}"),
        _ => {
            memory[range.clone()].fill(step as u8);
            expected[range].fill(step as u8);
        }
    }
}
