//! Filling what nobody waits for: in the background, and from a record of what was needed before.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod fills;
mod working_sets;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use support::page;
use userfaultfd::pager::{PageData, PageSource};

/// The first byte of a page. Never zero.
fn byte(page: usize) -> u8 {
    (page % 250) as u8 + 1
}

/// Pages that are read in one step.
fn step() -> usize {
    ((64 << 10) / page()).max(1)
}

/// How ranges of pages are read.
fn in_steps(ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let steps = |range: Range<usize>| {
        range.clone().step_by(step()).map(move |first| first..range.end.min(first + step()))
    };
    ranges.into_iter().flat_map(steps).collect()
}

/// A source that notes what it is asked for, and can be made to wait.
#[derive(Clone, Default)]
struct Watched(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The pages of each read, in order.
    reads: Vec<Range<usize>>,
    /// The thread of each.
    threads: Vec<ThreadId>,
    /// Reads that may go on. `None`: all.
    tickets: Option<usize>,
    /// How many reads wait.
    waiting: usize,
    /// These pages fail.
    bad: Range<usize>,
    /// These pages are known to be zero.
    zeros: Range<usize>,
    /// Each read takes a millisecond at least.
    slow: bool,
    /// How many reads have gone on at the same time.
    at_once: usize,
}

impl State {
    /// Asserts that the places of each thread's reads are sorted.
    fn assert_in_order<T: Ord>(&self, places: &[T]) {
        for thread in &self.threads {
            let its = places.iter().zip(&self.threads).filter(|(_, its)| *its == thread);
            assert!(its.is_sorted_by_key(|(place, _)| place), "{thread:?}: {:?}", self.reads);
        }
    }
}

impl Watched {
    fn new() -> Self {
        Self::default()
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.state.lock().unwrap());
        self.0.changed.notify_all();
    }

    fn reads(&self) -> Vec<Range<usize>> {
        self.0.state.lock().unwrap().reads.clone()
    }

    /// Asserts what was read, and that each thread has kept to that order: on a machine on which a read takes long several
    /// go on at once, and one may overtake another.
    fn assert_reads(&self, expected: &[Range<usize>]) {
        let state = self.0.state.lock().unwrap();
        let place = |read: &Range<usize>| expected.iter().position(|expected| expected == read);
        let places: Vec<_> = state.reads.iter().map(place).collect();
        let mut sorted = places.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..expected.len()).map(Some).collect::<Vec<_>>(), "{:?}", state.reads);
        state.assert_in_order(&places);
    }

    /// Asserts that each thread has read by address.
    fn assert_sorted(&self) {
        let state = self.0.state.lock().unwrap();
        state.assert_in_order(&state.reads.iter().map(|read| read.start).collect::<Vec<_>>());
    }

    /// Waits for something to be so.
    fn wait_until(&self, condition: impl Fn(&State) -> bool) {
        let state = self.0.state.lock().unwrap();
        drop(self.0.changed.wait_while(state, |state| !condition(state)).unwrap());
    }
}

impl PageSource for Watched {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        let first = offset as usize / page();
        let pages = first..first + buffer.len() / page();
        let mut state = self.0.state.lock().unwrap();
        state.reads.push(pages.clone());
        state.threads.push(thread::current().id());
        state.waiting += 1;
        state.at_once = state.at_once.max(state.waiting);
        self.0.changed.notify_all();
        if state.slow {
            drop(state);
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(1) {
                thread::yield_now();
            }
            state = self.0.state.lock().unwrap();
        }
        state = self.0.changed.wait_while(state, |state| state.tickets == Some(0)).unwrap();
        state.tickets = state.tickets.map(|tickets| tickets - 1);
        state.waiting -= 1;
        self.0.changed.notify_all();
        if pages.clone().any(|page| state.bad.contains(&page)) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        for (number, page) in pages.zip(buffer.chunks_mut(page())) {
            page.fill(if state.zeros.contains(&number) { 0 } else { byte(number) });
        }
        Ok(PageData::Data)
    }

    fn zeros(&self, offset: u64) -> u64 {
        let (number, state) = (offset as usize / page(), self.0.state.lock().unwrap());
        if state.zeros.contains(&number) { ((state.zeros.end - number) * page()) as u64 } else { 0 }
    }
}
