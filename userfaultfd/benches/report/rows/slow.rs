//! A source like a network: it takes its time, whatever is asked for, and many requests at once.
//!
//! Two things make it faster: more bytes in a read, and more reads at a time. Each is compared with its like, so that
//! the readers aren't credited with what larger reads do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use userfaultfd::LazyMemory;
use userfaultfd::pager::PageData;

use crate::contenders::cpus::{self, ALLOWED, Place};
use crate::contenders::handler::{Handler, Loop};
use crate::contenders::{Walk, content, timed};
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::picture::block;
use crate::table::{Line, Section, Target, Unit};

const LATENCY: Duration = Duration::from_millis(6);

/// As long as this is waited for the serial loop.
const SERIAL: usize = 32;

/// What a reader of the pager reads at a time.
const READ: usize = 1 << 20;

/// How often a source was read, and how many bytes that gave.
#[derive(Debug, Default)]
struct Reads {
    count: AtomicUsize,
    bytes: AtomicUsize,
}

impl Reads {
    /// Content that takes its time.
    fn read(&self, page: &mut [u8]) -> std::io::Result<PageData> {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(page.len(), Ordering::Relaxed);
        thread::sleep(LATENCY);
        page.fill(42);
        Ok(PageData::Data)
    }

    /// Bytes of a read, on average.
    fn size(&self) -> usize {
        self.bytes.load(Ordering::Relaxed) / self.count.load(Ordering::Relaxed).max(1)
    }
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let len = options.bytes(256 << 20);
    let reads: [Arc<Reads>; 3] = Default::default();
    let lazy = |which: usize, readers: usize, most: usize, block: Option<usize>| -> Round {
        let reads = Arc::clone(&reads[which]);
        Box::new(move || {
            cpus::stay_on(&ALLOWED);
            let reads = Arc::clone(&reads);
            let builder = LazyMemory::builder(move |_, page: &mut [u8]| reads.read(page)).len(len);
            let builder = if readers > 0 { builder.read_ahead(readers, most) } else { builder };
            let builder = if let Some(block) = block { builder.block(block) } else { builder };
            let memory = builder.build().expect("lazy memory");
            let time = timed(|| {
                for page in memory.chunks(userfaultfd::page_size()) {
                    assert_eq!(page[0], 42);
                }
            });
            len as f64 / time.as_secs_f64()
        })
    };
    let serial = || -> Round {
        Box::new(|| {
            cpus::stay_on(&ALLOWED);
            let content: Arc<[u8]> = content(SERIAL).into();
            let len = content.len();
            let handler = Handler::new(Place::Anywhere, Loop::Slow(LATENCY), content).expect("a thread");
            handler.expect(SERIAL);
            let order: Arc<[u32]> = (0..SERIAL as u32).collect();
            len as f64 / Walk::over(&order).read(handler.start(), SERIAL).as_secs_f64()
        })
    };
    let (readers, most) = (16, 16 << 20);
    let setup = || {
        let [ahead, default, blocks] =
            [lazy(0, readers, most, None), lazy(1, 0, 0, None), lazy(2, 0, 0, Some(READ))];
        vec![Some(ahead), Some(serial()), Some(default), Some(blocks)]
    };
    let samples = Samples::take(options.time, 1, setup);
    let ahead = format!("pager, {readers} readers, {} ahead", block(most));
    let blocks = format!("pager, no readers, blocks of {}", block(READ));
    let serial = format!("serial loop, {SERIAL} reads of a page");
    for (name, ours, against, theirs, target) in [
        // What the readers do.
        (&*ahead, 0, &*blocks, 3, Target::Figure(500e6)),
        // What larger reads do.
        (&*blocks, 3, &*serial, 1, Target::Shown),
        ("pager, default", 2, &*serial, 1, Target::Shown),
        // Both together.
        (&*ahead, 0, &*serial, 1, Target::Shown),
    ] {
        section.lines.push(Line {
            work: format!("{} {name}", block(len)),
            against: against.to_owned(),
            unit: Unit::Bytes,
            ours: samples.of(ours),
            theirs: samples.of(theirs),
            ratio: samples.ratio(ours, theirs),
            target,
        });
    }
    let sizes = reads.each_ref().map(|reads| format!("{} KiB", reads.size() >> 10));
    section.notes.push(format!(
        "A read has, on average: with readers {}, by default {}, in blocks {}; in the serial loop a page.",
        sizes[0], sizes[1], sizes[2]
    ));
    section
}
