//! The process whose memory it is ends: its descriptor is dropped, and the pager serves others.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use super::harness::{Flavour, PAGE, PAGES, Source, Stop, races};
use crate::pager::{Pager, Problem};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{child, uffd};
use crate::sync_point::Point;
use crate::{FeatureFlags, Uffd};

static EXIT: Exit = Exit;

struct Exit;

impl Exit {
    fn race(&self, test: &'static str, flavour: Flavour, point: Point) {
        child::run_well(test, || {
            let Some(memory) = flavour.memory(test, PAGES) else { return };
            let (mut here, there) = UnixStream::pair().unwrap();
            let target = child::fork(|| be_the_target(&memory, &there));
            let descriptor = Uffd::from(child::receive_fd(&here));
            let problems = Arc::new(Mutex::new(Vec::new()));
            let told = Arc::clone(&problems);
            let tell = move |problem: &Problem| {
                if let Problem::TargetGone { descriptor } = problem {
                    told.lock().unwrap().push(*descriptor);
                }
            };
            let pager = Pager::builder().threads(2).on_problem(tell).build().unwrap();
            let load = (point == Point::BeforeWake).then(|| Stop::at(Point::BeforeFill, 0..usize::MAX));
            let stop = Stop::at(point, 0..usize::MAX);
            let source = Source::of(&memory);
            let added = pager.add(descriptor, [flavour.region(&memory, source)]).unwrap();
            here.write_all(&[1]).unwrap();
            if let Some(load) = load {
                load.reached();
                here.write_all(&[1]).unwrap();
                wait_until(|| pager.statistics().duplicates > 0);
                load.go();
            }
            stop.reached();
            target.kill();
            target.wait();
            stop.go();
            if matches!(point, Point::AfterRead | Point::BeforeFill) {
                // It finds out with the fill.
                pager.join();
                wait_until(|| !problems.lock().unwrap().is_empty());
                assert_eq!(*problems.lock().unwrap(), [added.descriptor]);
                assert!(pager.remove(added.descriptor).is_err());
            } else {
                // There is nothing more to fill that it would find out with, until something is.
                pager.finish(|_| {}).unwrap();
            }
            assert_eq!(pager.descriptors(), []);
        });
    }
}

/// Reads the page, with one more thread for each byte that comes.
fn be_the_target(memory: &Memory, there: &UnixStream) {
    child::send_fd(there, uffd(FeatureFlags::empty()).as_fd());
    let mut there = there;
    thread::scope(|scope| {
        while there.read(&mut [0]).unwrap() == 1 {
            scope.spawn(|| memory.read(PAGE));
        }
    });
}

races! {
    target: EXIT;
    anonymous: Anonymous,
    block: Block,
    minor: Minor,
    hugetlb: Hugetlb,
    async_load: Async,
}
