//! Memory that is filled as a whole from a source like a network: in the background, and by `populate`, which faults.

use std::io;
use std::thread;
use std::time::Duration;

use userfaultfd::LazyMemory;
use userfaultfd::pager::{FillOrder, PageData};

use crate::contenders::cpus::{self, ALLOWED};
use crate::contenders::timed;
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::picture::block;
use crate::table::{Line, Section, Target, Unit};

const LATENCY: Duration = Duration::from_millis(5);

/// Read-ahead threads, and how far they read ahead, where they aren't the default's.
const READERS: usize = 16;
const READ_AHEAD: usize = 16 << 20;

fn read(_: u64, page: &mut [u8]) -> io::Result<PageData> {
    thread::sleep(LATENCY);
    page.fill(42);
    Ok(PageData::Data)
}

fn memory(len: usize, tuned: bool) -> LazyMemory {
    let builder = LazyMemory::builder(read).len(len);
    let builder = if tuned { builder.read_ahead(READERS, READ_AHEAD) } else { builder };
    builder.build().expect("lazy memory")
}

fn rate(len: usize, memory: &LazyMemory, fill: impl FnOnce(&LazyMemory)) -> f64 {
    let time = timed(|| fill(memory));
    assert_eq!(memory.statistics().missing_pages, 0);
    len as f64 / time.as_secs_f64()
}

fn in_background(len: usize, tuned: bool) -> Round {
    Box::new(move || {
        cpus::stay_on(&ALLOWED);
        rate(len, &memory(len, tuned), |memory| {
            let progress = memory.background(FillOrder::Ascending).expect("a background fill").wait();
            assert!(progress.failed.is_empty(), "{progress:?}");
        })
    })
}

fn by_populate(len: usize, tuned: bool) -> Round {
    Box::new(move || {
        cpus::stay_on(&ALLOWED);
        rate(len, &memory(len, tuned), |memory| {
            memory.populate(0..len);
            // The pages that are read ahead last are counted after the call.
            while memory.statistics().missing_pages > 0 {
                thread::yield_now();
            }
        })
    })
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let len = options.bytes(256 << 20);
    let tuned = format!("{READERS} readers, {} ahead", block(READ_AHEAD));
    for (name, tuned) in [("default", false), (&tuned, true)] {
        let setup = || vec![Some(in_background(len, tuned)), Some(by_populate(len, tuned))];
        let samples = Samples::take(options.time / 2, 1, setup);
        section.lines.push(Line {
            work: format!("{} in the background, {name}", block(len)),
            against: "populate, the same settings".to_owned(),
            unit: Unit::Bytes,
            ours: samples.of(0),
            theirs: samples.of(1),
            ratio: samples.ratio(0, 1),
            target: Target::AtLeast(0.8),
        });
    }
    section
}
