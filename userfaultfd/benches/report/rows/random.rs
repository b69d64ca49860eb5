//! Memory of a gibibyte, a page here and a page there.

use std::sync::Arc;

use userfaultfd::LazyMemory;
use userfaultfd::pager::{Around, BytesSource};

use crate::contenders::cpus::{self, ALLOWED, Place};
use crate::contenders::handler::{Handler, Loop};
use crate::contenders::sigbus::Signal;
use crate::contenders::{Walk, content, shuffled};
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
    let setup = || {
        let pager = LazyMemory::builder(BytesSource::new(Arc::clone(&content))).around(Around::Page).build();
        let pager = pager.expect("lazy memory");
        let bare = Handler::new(Place::Anywhere, Loop::Poll, Arc::clone(&content)).expect("a thread");
        let signal = Signal::new(Arc::clone(&content));
        let [mut first, mut second, mut third] = [(); 3].map(|()| Walk::over(&order));
        let pager: Round = Box::new(move || {
            cpus::stay_on(&ALLOWED);
            first.read(pager.as_ptr(), FAULTS).as_secs_f64() / FAULTS as f64
        });
        let bare: Round = Box::new(move || {
            cpus::stay_on(&ALLOWED);
            bare.expect(FAULTS);
            second.read(bare.start(), FAULTS).as_secs_f64() / FAULTS as f64
        });
        let signal: Round = Box::new(move || {
            cpus::stay_on(&ALLOWED);
            signal.during(|| third.read(signal.start(), FAULTS)).as_secs_f64() / FAULTS as f64
        });
        vec![Some(pager), Some(bare), Some(signal)]
    };
    let samples = Samples::take(options.time, pages / FAULTS, setup);
    section.lines.push(Line {
        work: "pager, default".to_owned(),
        against: "bare poll and read".to_owned(),
        unit: Unit::Time,
        ours: samples.of(0),
        theirs: samples.of(1),
        ratio: samples.ratio(0, 1),
        target: Target::AtMost(1.05),
    });
    section
}
