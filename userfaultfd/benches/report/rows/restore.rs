//! A second start of a program that needs a tenth of its memory, here and there: with what the first start recorded,
//! and without.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{BytesSource, PageData, PageSource, WorkingSet};

use crate::contenders::cpus::{self, ALLOWED};
use crate::contenders::{Walk, content, shuffled, warm};
use crate::measure::{Round, Samples, Summary};
use crate::options::Options;
use crate::picture::block;
use crate::table::{Line, Section, Target, Unit};

/// A disk that takes its time for each read.
struct Disk(Arc<[u8]>);

const LATENCY: Duration = Duration::from_micros(100);

impl PageSource for Disk {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        thread::sleep(LATENCY);
        page.copy_from_slice(&self.0[offset as usize..][..page.len()]);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let page = userfaultfd::page_size();
    let len = options.bytes(512 << 20);
    let content: Arc<[u8]> = content(len / page).into();
    let order: Arc<[u32]> = shuffled(len / page)[..len / page / 10].into();
    let memory = || LazyMemory::builder(BytesSource::new(Arc::clone(&content))).build().expect("lazy memory");
    let disk = || LazyMemory::builder(Disk(Arc::clone(&content))).build().expect("lazy memory");

    let set = {
        let memory = memory();
        let recorder = memory.record().expect("a recorder");
        Walk::over(&order).read(memory.as_ptr(), order.len());
        recorder.finish()
    };
    let bytes = [Rc::default(), Rc::default()];
    let from_disk = [Rc::default(), Rc::default()];
    for (name, make, faults, targets) in [
        (
            "bytes in memory",
            &memory as &dyn Fn() -> LazyMemory,
            bytes,
            [Target::AtMost(0.05), Target::AtMost(0.2)],
        ),
        ("a disk, 100 µs a read", &disk, from_disk, [Target::Shown, Target::Shown]),
    ] {
        let setup = || {
            warm(2 * order.len() * page);
            let replayed = start(make(), &order, Some(set.clone()), &faults[0]);
            let on_demand = start(make(), &order, None, &faults[1]);
            vec![Some(replayed), Some(on_demand)]
        };
        let samples = Samples::take(options.time / 2, 1, setup);
        let [replayed, on_demand] = faults.map(|faults: Faults| Summary::of(faults.take()));
        let fewer = replayed.zip(on_demand).and_then(|(a, b)| Summary::of(vec![a.median / b.median]));
        section.lines.push(Line {
            work: format!("{} replayed, 10 % needed, {name}", block(len)),
            against: "on demand".to_owned(),
            unit: Unit::Time,
            ours: samples.of(0),
            theirs: samples.of(1),
            ratio: samples.ratio(0, 1),
            target: targets[1],
        });
        section.lines.push(Line {
            work: format!("the same, faults of {} pages", order.len()),
            against: "on demand".to_owned(),
            unit: Unit::Count,
            ours: replayed,
            theirs: on_demand,
            ratio: fewer,
            target: targets[0],
        });
    }
    section.notes.push(
        "The time is from the start of the replay, or of the first touch, until all that is needed was touched."
            .to_owned(),
    );
    section
}

/// How many there were, of each round.
type Faults = Rc<RefCell<Vec<f64>>>;

/// A start: what is needed is touched, after it was replayed if it was recorded.
fn start(memory: LazyMemory, order: &Arc<[u32]>, set: Option<WorkingSet>, faults: &Faults) -> Round {
    let (order, faults) = (Arc::clone(order), Rc::clone(faults));
    Box::new(move || {
        cpus::stay_on(&ALLOWED);
        let begin = Instant::now();
        let replay = set.as_ref().map(|set| {
            let mut replay = memory.replay(set).expect("a replay");
            replay.wait();
            replay
        });
        Walk::over(&order).read(memory.as_ptr(), order.len());
        let time = begin.elapsed();
        drop(replay);
        faults.borrow_mut().push(memory.statistics().faults() as f64);
        time.as_secs_f64()
    })
}
