//! Snapshots one after the other.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use userfaultfd::snapshot::{Content, Error, Geometry, Options, Progress, Removal, Series, Sink, Snapshot};

use super::clock::{Clock, dawdle};
use super::log::{Held, Taken};
use super::tally::Tally;
use super::worker::World;
use crate::support::memory;
use crate::support::random::Random;

/// What is counted of snapshots that are checked: members of a series, and others.
pub(super) const CHECKED: [&str; 2] =
    ["snapshots: members of a series, checked", "snapshots: others, checked"];

/// Takes all, slowly now and then, or fails half-way.
struct Collect {
    held: Arc<Mutex<Held>>,
    page: usize,
    random: Random,
    /// How many things may happen before it has taken some pages.
    slow: usize,
    clock: Arc<Clock>,
    fails: bool,
}

impl Sink for Collect {
    fn begin(&mut self, _: &Geometry) -> io::Result<()> {
        dawdle(&mut self.random, 3);
        Ok(())
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        self.clock.wait(&mut self.random, self.slow);
        dawdle(&mut self.random, 1);
        if self.fails && self.random.one_in(3) {
            return Err(io::Error::other("as it is told to"));
        }
        let len = content.len() as usize;
        for at in (0..len).step_by(self.page) {
            let word = match content {
                Content::Data(bytes) => Some(u64::from_ne_bytes(*bytes[at..].first_chunk().unwrap())),
                Content::Zero(_) => Some(0),
                Content::Gone(_) => None,
                other => panic!("{other:?}"),
            };
            let page = (offset as usize + at) / self.page;
            assert_eq!(self.held.lock().unwrap().insert(page, word), None, "page {page} came twice");
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.fails { Err(io::Error::other("as it is told to")) } else { Ok(()) }
    }
}

/// Snapshots one after the other.
pub(super) struct Takes {
    pub(super) random: Random,
    removal: Removal,
    series: Option<Series>,
    chain: Held,
    previous: u64,
    pub(super) taken: Vec<Taken>,
    pub(super) tally: Tally,
}

impl Takes {
    pub(super) fn new(random: Random, removal: Removal, series: Option<Series>) -> Self {
        let (chain, taken, tally) = (Held::new(), Vec::new(), Tally::default());
        Self { random, removal, series, chain, previous: 0, taken, tally }
    }

    pub(super) fn options(world: &World, removal: Removal, buffer: usize) -> Options {
        Options::new().range(world.addresses()).buffer(buffer).removal(removal)
    }

    /// Takes one, unless it fails as it must.
    pub(super) fn take(&mut self, world: &World, buffer: usize) -> Result<(), String> {
        let (random, tally) = (&mut self.random, &mut self.tally);
        let held = Arc::new(Mutex::new(Held::new()));
        let sink = Collect {
            held: Arc::clone(&held),
            page: world.memory.page(),
            random: Random::new(random.next()),
            slow: [1, 4, 60][random.below(3)],
            clock: Arc::clone(&world.clock),
            fails: random.one_in(10),
        };
        let (fails, aborts) = (sink.fails, random.one_in(20));
        dawdle(random, 20);
        let before = world.now();
        let begun = match &mut self.series {
            Some(series) => series.begin(sink),
            None => Self::options(world, self.removal, buffer).begin(sink),
        };
        let begun: Snapshot<_> = match begun {
            Ok(begun) => begun,
            // No second descriptor protects while the layout changes all the time.
            Err(Error::Kernel(error)) if error.is_retryable() && !memory::kernel_tells_protection() => {
                tally.add("snapshots: none, since the layout changes all the time", 1);
                return Ok(());
            }
            Err(error) => return Err(format!("begin: {error:?}")),
        };
        let after = world.now();
        if aborts {
            begun.abort();
        }
        let result = begun.wait();
        let ended = world.now();
        let previous = std::mem::replace(&mut self.previous, ended);
        let Progress { total, saved, gone, on_write, .. } = match result {
            Ok(finished) => finished.progress,
            Err(Error::Sink(_)) if fails => {
                tally.add("snapshots: failed by their sink", 1);
                return Ok(());
            }
            Err(Error::Aborted) if aborts => {
                tally.add("snapshots: aborted", 1);
                return Ok(());
            }
            Err(error) => return Err(format!("wait: {error:?}")),
        };
        let mut held = std::mem::take(&mut *held.lock().unwrap());
        let bytes = |pages: usize| (pages * world.memory.page()) as u64;
        let told = (bytes(held.len()), bytes(held.values().filter(|word| word.is_none()).count()));
        if (total, gone) != told || saved != total {
            return Err(format!("{saved} of {total}, of them {gone} gone, but delivered were {told:?}"));
        }
        let mut earlier = BTreeSet::new();
        if self.series.is_some() {
            earlier.extend(self.chain.keys().filter(|page| !held.contains_key(page)));
            self.chain.extend(held);
            held = self.chain.clone();
        }
        if held.len() != world.pages {
            return Err(format!("it holds {} pages of {}", held.len(), world.pages));
        }
        let follows = self.series.is_some();
        tally.add(if follows { CHECKED[0] } else { CHECKED[1] }, 1);
        let pages = |bytes: u64| bytes as usize / world.memory.page();
        tally.add("pages: in snapshots", pages(total));
        tally.add("pages: saved before they were written", pages(on_write));
        tally.add("pages: gone", pages(gone));
        self.taken.push(Taken { began: (before, after), ended, previous, follows, held, earlier });
        Ok(())
    }
}
