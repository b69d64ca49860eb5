//! Memory of a gibibyte, a page here and a page there.

use std::sync::Arc;
use std::time::Duration;

use userfaultfd::LazyMemory;
use userfaultfd::pager::{BytesSource, FaultAround};

use crate::contenders::cpus::{self, ALLOWED, Place};
use crate::contenders::handler::{Handler, Loop};
use crate::contenders::sigbus::Signal;
use crate::contenders::{Walk, content, shuffled, warm};
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::table::{Line, Section, Target, Unit};

/// Faults in a round.
const FAULTS: usize = 2048;

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let page = userfaultfd::page_size();
    let pages = options.bytes(1 << 30) / page;
    let content: Arc<[u8]> = content(pages).into();
    let order: Arc<[u32]> = shuffled(pages).into();
    let bytes = || BytesSource::new(Arc::clone(&content));
    let lazy = |memory: userfaultfd::pager::Result<LazyMemory>| -> Option<Round> {
        let memory = memory.expect("lazy memory");
        Some(round(&order, move |walk| walk.read(memory.as_ptr(), FAULTS)))
    };
    let setup = || {
        warm(5 * pages * page);
        let handler = Handler::new(Place::Anywhere, Loop::Poll, Arc::clone(&content)).expect("a thread");
        let signal = Signal::new(Arc::clone(&content));
        vec![
            lazy(LazyMemory::builder(bytes()).build()),
            Some(round(&order, move |walk| {
                handler.expect(FAULTS);
                walk.read(handler.start(), FAULTS)
            })),
            lazy(LazyMemory::builder(bytes()).fault_around(FaultAround::Page).build()),
            lazy(LazyMemory::sigbus(bytes()).build()),
            Some(round(&order, move |walk| signal.during(|| walk.read(signal.start(), FAULTS)))),
        ]
    };
    let samples = Samples::take(options.time, pages / FAULTS, setup);
    let poll = ("bare poll and read", 1);
    for (work, ours, (against, theirs), target) in [
        ("pager, default", 0, poll, Target::AtMost(1.05)),
        ("pager, nothing around a fault", 2, poll, Target::Shown),
        ("pager, Sigbus", 3, ("bare SIGBUS handler", 4), Target::AtMost(1.05)),
        ("pager, Sigbus", 3, poll, Target::Shown),
    ] {
        section.lines.push(Line {
            work: work.to_owned(),
            against: against.to_owned(),
            unit: Unit::Time,
            ours: samples.of(ours),
            theirs: samples.of(theirs),
            ratio: samples.ratio(ours, theirs),
            target,
        });
    }
    section
}

/// A fault of a walk over all pages, of which each round does a part.
fn round(order: &Arc<[u32]>, read: impl Fn(&mut Walk) -> Duration + 'static) -> Round {
    let mut walk = Walk::over(order);
    Box::new(move || {
        cpus::stay_on(&ALLOWED);
        read(&mut walk).as_secs_f64() / FAULTS as f64
    })
}
