//! The virtual machines that are served: a line for each when it comes and when it ends, and their working sets.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use userfaultfd::handoff::{Handoff, Message, ProcessRecorder, ProcessReplay, ServedProcess};
use userfaultfd::pager::{self, DescriptorId, PageSource, Pager, WorkingSet};

use super::metrics::{Board, Ending};
use crate::exit::{Count, Failure, say};

pub(super) struct Guests {
    image: Arc<dyn PageSource>,
    /// What tells the image from others.
    name: String,
    /// The file of the pages that are accessed, and those of the machines that have ended.
    record: Option<(PathBuf, Option<WorkingSet>)>,
    replay: Option<WorkingSet>,
    guests: HashMap<DescriptorId, Guest>,
    /// Number of machines so far.
    count: usize,
    /// Number of machines that ended since their memory couldn't be had.
    lost: Arc<AtomicUsize>,
    /// What `--metrics` tells.
    board: Arc<Board>,
}

/// A machine.
struct Guest {
    number: usize,
    since: Instant,
    recorder: Option<ProcessRecorder>,
    replay: Option<ProcessReplay>,
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Guests {
    pub(super) fn new(
        (image, name): (Arc<dyn PageSource>, String),
        record: Option<PathBuf>,
        replay: Option<&Path>,
        lost: Arc<AtomicUsize>,
        board: Arc<Board>,
    ) -> Result<Self, Failure> {
        let load = |path: &Path| WorkingSet::load(path).map_err(Failure::of(path.display()));
        let (replay, record) = (replay.map(load).transpose()?, record.map(|path| (path, None)));
        Ok(Self { image, name, record, replay, guests: HashMap::new(), count: 0, lost, board })
    }

    /// Goes on with a machine that another handler has left, if it was served from the same image. Otherwise it waits for
    /// a handler that has that.
    pub(super) fn adopt(&mut self, pager: &Pager, handoff: Handoff) -> Option<ServedProcess> {
        let other = handoff.regions.iter().find(|region| region.source.as_ref() != Some(&self.name));
        if let Some(other) = other {
            let image = other.source.as_deref().unwrap_or("another image");
            say!("not adopted: {} has its memory from {image}", handoff.process.credentials);
            return None;
        }
        self.serve(pager, handoff)
    }

    /// Serves a machine. One that can't be served is lost.
    pub(super) fn serve(&mut self, pager: &Pager, mut handoff: Handoff) -> Option<ServedProcess> {
        handoff.regions.iter_mut().for_each(|region| region.source = Some(self.name.clone()));
        self.count += 1;
        let number = self.count;
        let source = |_: &_| Arc::clone(&self.image);
        let result = match self.record {
            None => pager.serve(handoff, source).map(|served| (served, None)),
            Some(_) => {
                pager.serve_recorded(handoff, source).map(|(served, recorder)| (served, Some(recorder)))
            }
        };
        let (served, recorder) = match result {
            Ok(served) => served,
            Err(unserved) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                self.board.count(Ending::Unserved, 1);
                say!("vm {number}: {unserved}");
                return None;
            }
        };
        let replay = self.replay.as_ref().and_then(|set| match served.replay(set) {
            Ok(replay) => Some(replay),
            // It has ended at once, which is the next event.
            Err(pager::Error::NotServed) => None,
            Err(error) => {
                say!("vm {number}: the working set isn't filled: {error}");
                None
            }
        });
        let (regions, bytes) =
            served.regions().fold((0, 0), |(regions, bytes), (region, _)| (regions + 1, bytes + region.len));
        let regions = Count(regions, "region");
        let (process, dialect) = (served.process().credentials, served.dialect());
        say!("vm {number}: {process}, {dialect}, {:.1} MiB in {regions}", mib(bytes as u64));
        self.show(number, &served);
        let guest = Guest { number, since: Instant::now(), recorder, replay };
        self.guests.insert(served.descriptor(), guest);
        Some(served)
    }

    /// Does what a machine's monitor says.
    pub(super) fn receive(&mut self, served: &mut ServedProcess, message: Message) {
        let number = self.number(served);
        let Message::AddRegions(regions) = message else {
            say!("vm {number}: not understood: {message:?}");
            return;
        };
        for region in regions {
            let bytes = region.len as u64;
            match served.add_region(region, Arc::clone(&self.image)) {
                Ok(_) => say!("vm {number}: {:.1} MiB more", mib(bytes)),
                Err(error) => say!("vm {number}: memory isn't added: {error}"),
            }
        }
        self.show(number, served);
    }

    /// Has the metrics tell of a machine, with the regions that it has now.
    fn show(&self, number: usize, served: &ServedProcess) {
        let pid = served.process().credentials.pid.map_or("unknown".to_owned(), |pid| pid.to_string());
        self.board.put(number, served.process_statistics(), pid);
    }

    fn number(&self, served: &ServedProcess) -> usize {
        self.guests.get(&served.descriptor()).map_or(0, |guest| guest.number)
    }

    /// A machine isn't served any more.
    pub(super) fn end(&mut self, served: &ServedProcess) {
        self.board.count(if served.was_killed() { Ending::Killed } else { Ending::Ended }, 1);
        self.close(served, "ended");
    }

    /// A machine's memory is complete.
    pub(super) fn finished(&mut self, served: &ServedProcess) {
        self.board.count(Ending::Complete, 1);
        self.close(served, "complete, and goes on by itself,");
    }

    /// A machine's memory can't be completed.
    pub(super) fn unfinished(&mut self, served: &ServedProcess, reason: &dyn std::fmt::Display) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        say!("vm {}: its memory can't be completed: {reason}", self.number(served));
    }

    /// Machines end that aren't complete.
    pub(super) fn give_up(&self, machines: usize) {
        self.lost.fetch_add(machines, Ordering::Relaxed);
        self.board.count(Ending::Incomplete, machines);
    }

    /// Says how it was.
    fn close(&mut self, served: &ServedProcess, how: &str) {
        self.end_record(served);
        let Some(Guest { number, since, replay, .. }) = self.guests.remove(&served.descriptor()) else {
            return;
        };
        self.board.remove(number);
        let statistics = served.statistics();
        let (faults, bytes) = (statistics.faults(), mib(statistics.bytes));
        let errors = match (statistics.source_errors, statistics.poisoned) {
            (0, 0) => String::new(),
            (errors, poisoned) => format!(", {errors} failed reads, {poisoned} poisoned pages"),
        };
        let set = replay.map_or(String::new(), |replay| {
            let report = replay.report();
            format!(
                ", working set of {} pages with {} faults outside",
                report.set_pages, report.faults_outside
            )
        });
        let seconds = since.elapsed().as_secs_f64();
        say!("vm {number}: {how} after {seconds:.1} s: {faults} faults, {bytes:.1} MiB filled{errors}{set}");
    }

    /// Ends the record of a machine, and saves those of all so far.
    pub(super) fn end_record(&mut self, served: &ServedProcess) {
        let Some(guest) = self.guests.get_mut(&served.descriptor()) else { return };
        let (Some(recorder), Some((path, set))) = (guest.recorder.take(), &mut self.record) else { return };
        let saved = recorder.finish().map_err(|error| error.to_string()).and_then(|new| {
            let all = match set.take() {
                Some(before) => before.union(&new).map_err(|error| {
                    // The first machine decides.
                    *set = Some(before);
                    error.to_string()
                })?,
                None => new,
            };
            set.insert(all).save(&*path).map_err(|error| error.to_string())
        });
        if let Err(error) = saved {
            say!("vm {}: its record isn't in {}: {error}", guest.number, path.display());
        }
    }
}
