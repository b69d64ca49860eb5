//! A source like a network: it takes its time, and many requests at once.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use userfaultfd::LazyMemory;
use userfaultfd::pager::Fill;

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

fn source(_: u64, page: &mut [u8]) -> std::io::Result<Fill> {
    thread::sleep(LATENCY);
    page.fill(42);
    Ok(Fill::Data)
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let len = options.bytes(256 << 20);
    let lazy = |readers: usize, most: usize| -> Round {
        Box::new(move || {
            cpus::stay_on(&ALLOWED);
            let builder = LazyMemory::builder(source).len(len);
            let builder = if readers > 0 { builder.read_ahead(readers, most) } else { builder };
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
    let setup = || vec![Some(lazy(readers, most)), Some(serial()), Some(lazy(0, 0))];
    let samples = Samples::take(options.time, 1, setup);
    let ahead = format!("pager, {readers} readers, {} ahead", block(most));
    for (at, name, target) in
        [(0, ahead.as_str(), Target::Figure(500e6)), (2, "pager, default", Target::Shown)]
    {
        section.lines.push(Line {
            work: format!("{} {name}", block(len)),
            against: format!("serial loop, {SERIAL} pages"),
            unit: Unit::Bytes,
            ours: samples.of(at),
            theirs: samples.of(1),
            ratio: samples.ratio(at, 1),
            target,
        });
    }
    section
}
