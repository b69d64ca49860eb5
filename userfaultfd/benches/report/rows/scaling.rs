//! Many threads that fault at the same time.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use userfaultfd::LazyMemory;
use userfaultfd::pager::{BytesSource, FaultAround, Pager};

use crate::contenders::cpus::{self, ALLOWED};
use crate::contenders::{Walk, content, shuffled};
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::table::{Line, Section, Target, Unit};

/// How many threads fault, on how many descriptors.
const CASES: &[(usize, usize)] = &[(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (8, 8)];

/// Pages that each thread touches, of those of its descriptor.
const PART: usize = 1024;

/// All pages of a descriptor.
const PAGES: usize = 8 * PART;

/// Faults in a second.
fn round((threads, descriptors): (usize, usize), content: &Arc<[u8]>, all: &Walk) -> f64 {
    cpus::stay_on(&ALLOWED);
    let pager = Pager::builder().threads(ALLOWED.len()).build().expect("a pager");
    let pager = Arc::new(pager);
    let memories: Vec<LazyMemory> = (0..descriptors)
        .map(|_| {
            LazyMemory::builder(BytesSource::new(Arc::clone(content)))
                .pager(&pager)
                .fault_around(FaultAround::Page)
                .build()
                .expect("lazy memory")
        })
        .collect();
    // Each thread tells when it began and ended: one that looks from outside may get its CPU when they are half through.
    let barrier = Barrier::new(threads);
    let times: Vec<[Instant; 2]> = thread::scope(|scope| {
        let start = |thread: usize| {
            let (memory, mut walk) =
                (&memories[thread % descriptors], all.part(thread * PART..(thread + 1) * PART));
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                let begin = Instant::now();
                walk.read(memory.as_ptr(), PART);
                [begin, Instant::now()]
            })
        };
        let threads: Vec<_> = (0..threads).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread that reads")).collect()
    });
    let begin = times.iter().map(|[begin, _]| *begin).min().expect("a thread");
    let end = times.iter().map(|[_, end]| *end).max().expect("a thread");
    (threads * PART) as f64 / end.duration_since(begin).as_secs_f64()
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let content: Arc<[u8]> = content(PAGES).into();
    let order: Arc<[u32]> = shuffled(PAGES).into();
    let setup = || {
        let rounds = CASES.iter().map(|case| -> Round {
            let (content, all) = (Arc::clone(&content), Walk::over(&order));
            Box::new(move || round(*case, &content, &all))
        });
        rounds.map(Some).collect()
    };
    let samples = Samples::take(options.time, 8, setup);
    for (index, (threads, descriptors)) in CASES.iter().enumerate().skip(1) {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        section.lines.push(Line {
            work: format!("{threads} threads, {descriptors} descriptor{}", plural(*descriptors)),
            against: "1 thread, 1 descriptor".to_owned(),
            unit: Unit::Rate,
            ours: samples.of(index),
            theirs: samples.of(0),
            ratio: samples.ratio(index, 0),
            target: Target::AtLeast(1.0),
        });
    }
    section
}
