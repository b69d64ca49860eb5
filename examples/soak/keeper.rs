//! Serves the memory of one target after the other, with two pagers at most.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use userfaultfd::pager::{
    Added, DescriptorId, Detached, Error, MissingRange, PageSource, Pager, Problem, Region, RegionId,
    RetryPolicy, Statistics, ZeroSource,
};
use userfaultfd::{Errno, Uffd};

use crate::content::{Content, Counted, WORD};
use crate::link::{Piece, Request, Spec, answer, next};
use crate::random::Random;

/// What was found to be wrong.
#[derive(Debug, Default)]
pub(crate) struct Findings(Mutex<Vec<String>>);

impl Findings {
    /// Says it at once, too: a poisoned page may end the process.
    pub(crate) fn add(&self, finding: String) {
        eprintln!("found: {finding}");
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(finding);
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// Problems that pagers told of and that were to be expected.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    pub(crate) sources: AtomicU64,
    pub(crate) poisoned: AtomicU64,
    pub(crate) gone: AtomicU64,
    /// Fills that were put off again and again since the layout went on changing.
    pub(crate) put_off: AtomicU64,
    /// Written pages that a store didn't take, or mustn't get yet.
    pub(crate) unwritten: AtomicU64,
}

/// What the keepers have in common.
#[derive(Debug, Default)]
pub(crate) struct Common {
    pub(crate) findings: Findings,
    pub(crate) expected: Expected,
    /// Of pagers that have ended.
    pub(crate) statistics: Mutex<Statistics>,
}

/// The pagers of one keeper, for threads that look at them meanwhile.
pub(crate) type Pagers = Mutex<[Option<Arc<Pager>>; 2]>;

struct Served {
    spec: Spec,
    file: Option<File>,
    /// Which pager, and what it calls it.
    pager: usize,
    descriptor: DescriptorId,
    regions: Vec<RegionId>,
}

pub(crate) struct Keeper<'a> {
    pub(crate) process: usize,
    pub(crate) common: &'a Arc<Common>,
    pub(crate) pagers: &'a Pagers,
    pub(crate) random: Random,
    arenas: Vec<Option<Served>>,
    /// Which pager gets what is new.
    current: usize,
}

impl<'a> Keeper<'a> {
    pub(crate) fn new(process: usize, common: &'a Arc<Common>, pagers: &'a Pagers, random: Random) -> Self {
        Self { process, common, pagers, random, arenas: Vec::new(), current: 0 }
    }

    /// Does what a target asks for, until it has ended. Then drops the pagers.
    pub(crate) fn serve(&mut self, socket: &UnixStream, is_killed: impl Fn() -> bool) {
        loop {
            let result = match next(socket) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    let text = format!("{request:?}");
                    let done = self.act(request).map_err(|problem| format!("{problem}\n  {text:.400}"));
                    done.and_then(|()| answer(socket).map_err(|error| format!("answering: {error}")))
                }
                Err(error) => Err(format!("what the target asks for: {error}")),
            };
            if let Err(problem) = result {
                if !is_killed() {
                    self.common.findings.add(format!("process {}: {problem}", self.process));
                }
                break;
            }
        }
        for pager in 0..2 {
            if let Some(pager) = self.take(pager) {
                self.collect(&pager);
                drop(pager);
            }
        }
        self.arenas.clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [Option<Arc<Pager>>; 2]> {
        self.pagers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of the pagers.
    fn pager(&mut self, index: usize) -> Result<Arc<Pager>, String> {
        if let Some(pager) = &self.lock()[index] {
            return Ok(Arc::clone(pager));
        }
        let common = Arc::clone(self.common);
        let process = self.process;
        let pager = Pager::builder()
            .threads(1 + self.random.below(8))
            .retry(RetryPolicy { attempts: 8, delay: Duration::from_micros(200) })
            .on_problem(move |problem| note(&common, process, problem))
            .build();
        let pager = Arc::new(pager.map_err(|error| format!("starting a pager: {error:?}"))?);
        self.lock()[index] = Some(Arc::clone(&pager));
        Ok(pager)
    }

    /// A pager for its end, which nobody else looks at any more.
    fn take(&self, index: usize) -> Option<Pager> {
        let mut pager = self.lock()[index].take()?;
        loop {
            match Arc::try_unwrap(pager) {
                Ok(pager) => return Some(pager),
                Err(shared) => pager = shared,
            }
            std::thread::yield_now();
        }
    }

    fn collect(&self, pager: &Pager) {
        let mut statistics = pager.statistics();
        // Of what ends now there is nothing.
        (statistics.missing_pages, statistics.present_pages) = (0, 0);
        self.common.statistics.lock().unwrap_or_else(PoisonError::into_inner).merge(&statistics);
    }

    fn act(&mut self, request: Request) -> Result<(), String> {
        match request {
            Request::Add { arena, spec, pieces, uffd, file } => {
                let regions = pieces
                    .iter()
                    .map(|piece| region(&spec, piece, None, file.as_ref(), self.source(&spec)?))
                    .collect::<Result<Vec<_>, _>>()?;
                self.add(arena, self.current, spec, file, uffd, regions)
            }
            Request::AddRegion { arena, piece } => {
                let served = self.arenas[arena].as_ref().ok_or("no such arena")?;
                let (spec, descriptor, index) = (served.spec, served.descriptor, served.pager);
                let region = region(&spec, &piece, None, served.file.as_ref(), self.source(&spec)?)?;
                let id = self.pager(index)?.add_region(descriptor, region);
                let id = id.map_err(|error| format!("add_region: {error:?}"))?;
                self.arenas[arena].as_mut().ok_or("no such arena")?.regions.push(id);
                Ok(())
            }
            Request::Retire { arena } => {
                let served = self.arenas[arena].take().ok_or("no such arena")?;
                let detached = self.pager(served.pager)?.remove(served.descriptor);
                detached.map(drop).map_err(|error| format!("remove: {error:?}"))
            }
            Request::HandOver { arena, pieces } => {
                let served = self.arenas[arena].take().ok_or("no such arena")?;
                let detached = self.pager(served.pager)?.remove(served.descriptor);
                let detached = detached.map_err(|error| format!("remove: {error:?}"))?;
                self.go_on(arena, 1 - served.pager, served, &pieces, detached)
            }
            Request::Detach { arenas } => {
                let index = self.random.below(2);
                let Some(pager) = self.take(index) else { return Ok(()) };
                self.collect(&pager);
                for detached in pager.detach() {
                    let is_it = |served: &Option<Served>| {
                        served
                            .as_ref()
                            .is_some_and(|s| s.pager == index && s.descriptor == detached.descriptor)
                    };
                    // Those of forks' children, which have ended, are nobody's.
                    let Some(arena) = self.arenas.iter().position(is_it) else { continue };
                    let served = self.arenas[arena].take().ok_or("no such arena")?;
                    self.go_on(arena, index, served, &arenas[arena], detached)?;
                }
                let is_lost = |served: &Served| served.pager == index && self.lock()[index].is_none();
                match self.arenas.iter().flatten().any(is_lost) {
                    true => Err("detach has lost a descriptor".to_owned()),
                    false => Ok(()),
                }
            }
            Request::FinishRegion { arena } | Request::RemoveRegion { arena } => {
                let served = self.arenas[arena].as_ref().ok_or("no such arena")?;
                let (regions, index) = (served.regions.clone(), served.pager);
                let pager = self.pager(index)?;
                for region in regions {
                    let done = match request {
                        Request::FinishRegion { .. } => pager.finish_region(region, |_| {}),
                        _ => pager.remove_region(region),
                    };
                    match done {
                        // It was unmapped; or it stays, where the kernel can't poison.
                        Ok(()) | Err(Error::NotServed | Error::Unfilled { .. } | Error::Poisoned { .. }) => {}
                        Err(error) => return Err(format!("ending a region: {error:?}")),
                    }
                }
                Ok(())
            }
            Request::Finish => {
                for index in 0..2 {
                    let Some(pager) = self.lock()[index].clone() else { continue };
                    let mut last = None;
                    let finished = pager.finish(|progress| last = Some(progress));
                    if let Err(error) = finished {
                        // All is filled but what its source has failed to deliver.
                        if !matches!(error, Error::Poisoned { .. }) {
                            return Err(format!("finish: {error:?}"));
                        }
                    }
                    if last.is_some_and(|progress| progress.done != progress.total) {
                        return Err(format!("finish ended at {last:?}"));
                    }
                }
                self.arenas.clear();
                Ok(())
            }
            Request::Drop => {
                for index in 0..2 {
                    if let Some(pager) = self.take(index) {
                        self.collect(&pager);
                        drop(pager);
                    }
                }
                self.arenas.clear();
                Ok(())
            }
        }
    }

    /// The source of an arena.
    fn source(&self, spec: &Spec) -> Result<Arc<dyn PageSource>, String> {
        let Spec { key, page_size, pages, words, has_bad, .. } = *spec;
        let content = Content { key, page: page_size / WORD, words, has_bad };
        content.source(spec.source, pages).map_err(|error| format!("making a source: {error}"))
    }

    fn add(
        &mut self,
        arena: usize,
        index: usize,
        spec: Spec,
        file: Option<File>,
        uffd: Uffd,
        regions: Vec<Region>,
    ) -> Result<(), String> {
        let added = self.pager(index)?.add(uffd, regions);
        let Added { descriptor, regions } = added.map_err(|refused| format!("add: {refused:?}"))?;
        if self.arenas.len() <= arena {
            self.arenas.resize_with(arena + 1, || None);
        }
        self.arenas[arena] = Some(Served { spec, file, pager: index, descriptor, regions });
        Ok(())
    }

    /// Serves what another pager has served.
    fn go_on(
        &mut self,
        arena: usize,
        index: usize,
        served: Served,
        pieces: &[Piece],
        detached: Detached,
    ) -> Result<(), String> {
        let Served { spec, file, .. } = served;
        let regions = pieces
            .iter()
            .map(|piece| region(&spec, piece, Some(&detached.missing()), file.as_ref(), self.source(&spec)?))
            .collect::<Result<Vec<_>, String>>()?;
        self.add(arena, index, spec, file, detached.uffd, regions)
    }
}

/// The region of a piece of an arena. If it was served before: so much of it was missing.
fn region(
    spec: &Spec,
    piece: &Piece,
    missing: Option<&[MissingRange]>,
    file: Option<&File>,
    source: Arc<dyn PageSource>,
) -> Result<Region, String> {
    let Spec { page_size, pages, .. } = *spec;
    let (start, len) = (piece.address, piece.pages * page_size);
    let mut region = if piece.is_left_behind && !spec.memory.is_shared() {
        Region::new(start, len, ZeroSource)
    } else if spec.is_still {
        let delivered = (0..pages).map(|_| Default::default()).collect();
        Region::new(start, len, Counted { source, page_size, delivered, twice })
    } else {
        Region::new(start, len, source)
    };
    let offset = (piece.first * page_size) as u64;
    if let Some(missing) = missing {
        for part in missing.iter().filter(|part| (start..start + len).contains(&part.address)) {
            // What is removed has no offset, nor has what a move has left behind.
            let right = (part.address - start) as u64 + offset;
            if part.offset.is_some_and(|offset| offset != right) {
                return Err(format!("the offset of what is missing should be {right:#x}: {part:?}"));
            }
        }
        region = region.missing(missing.iter().cloned());
    }
    region = region.offset(offset).page_size(page_size).block(spec.block * page_size);
    if spec.write_protected {
        region = region.write_protected();
    }
    if spec.memory.is_shared() {
        region = region.shared();
    }
    if spec.memory.is_minor() {
        let file = file.ok_or("the memory's file is missing")?;
        region = region.minor(file.try_clone().map_err(|error| error.to_string())?, offset);
    }
    Ok(region)
}

/// Pages of memory that never changes which were read twice from their source.
pub(crate) static TWICE: AtomicU64 = AtomicU64::new(0);

fn twice(_page: usize) {
    TWICE.fetch_add(1, Ordering::Relaxed);
}

/// Takes a problem in that a pager tells of.
fn note(common: &Common, process: usize, problem: &Problem) {
    let expected = &common.expected;
    let counter = match problem {
        Problem::Source { .. } => &expected.sources,
        Problem::Poisoned { .. } | Problem::Unresolved { .. } => &expected.poisoned,
        Problem::TargetGone { .. } => &expected.gone,
        Problem::Stuck { errno: Errno::EAGAIN, .. } => &expected.put_off,
        other => {
            return common.findings.add(format!("process {process}: a pager says: {other}\n  {other:?}"));
        }
    };
    counter.fetch_add(1, Ordering::Relaxed);
}
