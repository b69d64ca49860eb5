//! Memory with a limit: a tenth of it may be resident, while threads read, write, pin and evict all of it.

mod shelf;
mod words;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::pager::{Budget, FillOrder, FlushStep, Problem, RetryPolicy, WriteBack};
use userfaultfd::{Errno, FeatureFlags, LazyMemory, PagedMemory, Pinned, Support, page_size};

use self::shelf::{Failures, Shelf};
use self::words::Words;
use crate::board::{Act, Slot};
use crate::content::{Content, WORD};
use crate::keeper::Common;
use crate::random::Random;

/// What each thread does to each memory.
const STEPS: usize = 600;

/// For each page that may be resident there are this many.
const TIMES: usize = 10;

/// A memory with a limit, of a source or of a store. Whether all that was read was right.
pub(crate) fn work(slot: &Slot, common: &Arc<Common>, random: &mut Random) -> Result<(), String> {
    let support = Support::probe().map_err(|error| error.to_string())?;
    if !support.features().contains(FeatureFlags::PAGEFAULT_FLAG_WP) {
        slot.count(Act::Refused);
        return Ok(());
    }
    let act = if random.one_in(2) { Act::Limited } else { Act::Paged };
    slot.begin(act, 0);
    let used = if act == Act::Limited { lazy(common, random) } else { paged(common, random) };
    used.map_err(|problem| format!("{act:?}: {problem}"))?;
    slot.end(act);
    Ok(())
}

/// How many pages there are, and what they hold.
fn content(random: &mut Random) -> Content {
    let (page, pages) = (page_size() / WORD, TIMES * (16 + random.below(32)));
    let words = pages * page - random.below(page);
    Content { key: random.next(), page, words, has_bad: false }
}

fn budget_of(content: &Content) -> Budget {
    Budget::new(content.words.div_ceil(content.page) / TIMES * page_size())
}

/// Takes in what a pager tells of. `is_unwritten`: whether the store may fail, or mayn't be written.
fn note(common: &Arc<Common>, is_unwritten: bool) -> impl Fn(&Problem) + Send + Sync + 'static {
    let common = Arc::clone(common);
    move |problem| match problem {
        Problem::Stuck { errno: Errno::EAGAIN, .. } => {
            common.expected.put_off.fetch_add(1, Ordering::Relaxed);
        }
        Problem::WriteBack { .. } | Problem::BudgetFull { .. } if is_unwritten => {
            common.expected.unwritten.fetch_add(1, Ordering::Relaxed);
        }
        other => common.findings.add(format!("memory with a limit: a pager says: {other:?}")),
    }
}

const RETRY: RetryPolicy = RetryPolicy { attempts: 8, delay: Duration::from_micros(200) };

/// Memory of a source: what was written goes to a spill file. Perhaps another one shares its limit.
fn lazy(common: &Arc<Common>, random: &mut Random) -> Result<(), String> {
    let content = content(random);
    let budget = budget_of(&content);
    // The first kind of sources fails now and then, and what isn't needed yet is tried once.
    let (kind, others_kind) = (random.below(4), random.below(4));
    let build = |content: &Content, kind: usize, random: &mut Random| {
        let pages = content.words.div_ceil(content.page);
        let source = content.source(kind, pages).map_err(|error| error.to_string())?;
        let builder = LazyMemory::builder(source).len(content.words * WORD).budget(&budget).retry(RETRY);
        let builder = builder.threads(1 + random.below(4)).on_problem(note(common, false));
        builder.build().map_err(|error| format!("LazyMemory: {error:?}"))
    };
    let memory = build(&content, kind, random)?;
    let other = if random.one_in(2) { None } else { Some(self::content(random)) };
    let other =
        other.map(|content| Ok::<_, String>((build(&content, others_kind, random)?, content))).transpose()?;
    let words = Words::new(memory.as_raw_slice(), content);
    let mut used = vec![Used { memory: Memory::Lazy(&memory), words: &words, may_fail: kind == 0 }];
    let others_words = other.as_ref().map(|(memory, content)| Words::new(memory.as_raw_slice(), *content));
    if let (Some((memory, _)), Some(words)) = (&other, &others_words) {
        used.push(Used { memory: Memory::Lazy(memory), words, may_fail: others_kind == 0 });
    }
    let is_resized = random.one_in(3);
    use_memories(&used, &budget, is_resized, true, random, |_| Ok(()))?;
    used.iter().try_for_each(|used| used.words.check_all())?;
    drop(used);
    drop((words, others_words));
    drop((memory, other));
    match budget.resident() {
        0 => Ok(()),
        resident => Err(format!("{resident} bytes of memory that has ended are resident")),
    }
}

/// Memory of a store, which may fail, and whose content is checked after each flush, and at the end.
fn paged(common: &Arc<Common>, random: &mut Random) -> Result<(), String> {
    let content = content(random);
    let budget = budget_of(&content);
    let failures = [Failures::None, Failures::Writes, Failures::Syncs][random.below(3)];
    let on_flush = random.one_in(3);
    let shelf = Arc::new(Shelf::new(&content, failures, on_flush, random.next()));
    let builder = PagedMemory::builder(Arc::clone(&shelf)).budget(&budget);
    let builder = builder.write_back(if on_flush { WriteBack::OnFlush } else { WriteBack::Any });
    let builder = builder.retry(if random.one_in(2) { RETRY } else { RetryPolicy { attempts: 1, ..RETRY } });
    let builder = builder.threads(1 + random.below(4));
    let is_unwritten = on_flush || failures != Failures::None;
    let memory = builder.on_problem(note(common, is_unwritten)).build();
    let mut memory = memory.map_err(|error| format!("PagedMemory: {error:?}"))?;
    let words = Words::new(memory.as_raw_slice(), content);
    let used = [Used { memory: Memory::Paged(&memory), words: &words, may_fail: false }];
    let is_limited = !is_unwritten;
    use_memories(&used, &budget, random.one_in(3), is_limited, random, |is_done| {
        let mut random = Random::new(&[content.key]);
        while !is_done() {
            flush(&memory, &words, &shelf, &mut random)?;
            thread::yield_now();
        }
        Ok(())
    })?;
    words.check_all()?;
    // No thread writes any more, so the store must have just what the memory has.
    let start = Instant::now();
    loop {
        shelf.is_flushed.store(true, Ordering::SeqCst);
        memory = match memory.close() {
            Ok(()) => break,
            Err(failed) => {
                // What a failed sync has lost must be written anew.
                let lost = failed.error.lost().iter().flat_map(|lost| pages_of(lost.clone()));
                lost.for_each(|page| words.write(page));
                check_step(failed.error.step(), failures)?;
                if start.elapsed() > Duration::from_secs(20) {
                    return Err(format!("it isn't closed for {}", failed.error));
                }
                failed.memory
            }
        };
    }
    shelf.check(|durable| match durable.is_known.iter().position(|is_known| !is_known) {
        Some(page) => Err(format!("page {page} of the store isn't written anew after a write that failed")),
        None => words.check_image(&durable.bytes, &words.done()),
    })?;
    let [strays, unknown] = [&shelf.strays, &shelf.unknown].map(|count| count.load(Ordering::Relaxed));
    match (strays, unknown) {
        (0, 0) => Ok(()),
        _ => Err(format!("{strays} writes between flushes, {unknown} reads of what a failed write has left")),
    }
}

fn pages_of(bytes: std::ops::Range<usize>) -> std::ops::Range<usize> {
    bytes.start / page_size()..bytes.end.div_ceil(page_size())
}

/// Flushes all or a range, and checks what the store has of it then.
fn flush(memory: &PagedMemory, words: &Words, shelf: &Shelf, random: &mut Random) -> Result<(), String> {
    let range = match random.below(3) {
        0 => 0..memory.len(),
        _ => random.below(memory.len())..memory.len().min(random.below(2 * memory.len())),
    };
    let range = range.start..range.end.max(range.start);
    let before = words.done();
    shelf.is_flushed.store(true, Ordering::SeqCst);
    let flushed = memory.flush_range(range.clone());
    shelf.is_flushed.store(false, Ordering::SeqCst);
    match flushed {
        Ok(()) => {
            let pages = pages_of(range.clone());
            shelf.check(|durable| {
                // Of a page whose last write failed, after the flush had written it, nothing is known.
                let is_within =
                    |page: usize| !range.is_empty() && pages.contains(&page) && durable.is_known[page];
                let least = before.iter().enumerate().map(|(page, least)| is_within(page).then_some(*least));
                words.check_flushed(&durable.bytes, least)
            })
        }
        Err(error) => check_step(error.step(), shelf.failures),
    }
}

/// Whether a flush may fail there.
fn check_step(step: FlushStep, failures: Failures) -> Result<(), String> {
    match (step, failures) {
        (FlushStep::Write, Failures::Writes) | (FlushStep::Sync, Failures::Syncs) => Ok(()),
        (step, failures) => Err(format!("a flush failed at {step:?} though what fails is {failures:?}")),
    }
}

/// Memory of either kind.
#[derive(Clone, Copy)]
enum Memory<'a> {
    Lazy(&'a LazyMemory),
    Paged(&'a PagedMemory),
}

impl<'a> Memory<'a> {
    fn pin(self, range: std::ops::Range<usize>) -> io::Result<Pinned<'a>> {
        match self {
            Self::Lazy(memory) => memory.pin(range),
            Self::Paged(memory) => memory.pin(range),
        }
    }

    /// Fills a range in the background, and waits for it or not.
    fn prefetch(self, range: std::ops::Range<usize>, waits: bool, may_fail: bool) -> Result<(), String> {
        let begun = match self {
            Self::Lazy(memory) => memory.background(FillOrder::Ranges([range].into_iter().collect())),
            Self::Paged(memory) => memory.prefetch(range),
        };
        let begun = begun.map_err(|error| format!("prefetching: {error}"))?;
        match waits.then(|| begun.wait().failed).filter(|failed| !may_fail && !failed.is_empty()) {
            Some(failed) => Err(format!("prefetching failed for {failed:?}")),
            None => Ok(()),
        }
    }

    fn evict(self, range: std::ops::Range<usize>, random: &mut Random) {
        match self {
            Self::Lazy(_) => {}
            // What it writes may fail, as in a flush, which looks at that.
            Self::Paged(memory) if random.one_in(2) => drop(memory.evict(range)),
            Self::Paged(memory) => assert!(memory.resident(range.clone()) <= range.len() + 2 * page_size()),
        }
    }
}

/// A memory, and what belongs there.
#[derive(Clone, Copy)]
struct Used<'a> {
    memory: Memory<'a>,
    words: &'a Words,
    /// Whether its source fails now and then.
    may_fail: bool,
}

/// Threads use memories that share a limit, while `beside` runs in a thread of its own. `is_limited`: whether the limit
/// must hold all the time.
fn use_memories(
    used: &[Used<'_>],
    budget: &Budget,
    is_resized: bool,
    is_limited: bool,
    random: &mut Random,
    beside: impl Fn(&dyn Fn() -> bool) -> Result<(), String> + Send + Sync,
) -> Result<(), String> {
    let (threads, seed, full) = (1 + random.below(4), random.next(), budget.bytes());
    let (left, failed) = (AtomicUsize::new(threads), AtomicBool::new(false));
    // Beside what is pinned, a share of the limit for each thread that fills, whatever is reserved and given back at once.
    let most = full + full / 8 * 24;
    let one = |thread: usize| {
        let mut random = Random::new(&[seed, thread as u64]);
        for _ in 0..STEPS {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            step(used, thread, threads, &mut random)?;
            if is_resized && random.one_in(50) {
                let bytes = (16 * page_size()).max(full / 2) + random.below(full / 2);
                budget.resize(bytes).map_err(|error| format!("resizing: {error}"))?;
            }
            let resident = budget.resident();
            if is_limited && !is_resized && resident > most {
                return Err(format!("{resident} bytes are resident, with a limit of {full}"));
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let beside = scope.spawn(|| {
            let done = beside(&|| left.load(Ordering::SeqCst) == 0);
            failed.fetch_or(done.is_err(), Ordering::Relaxed);
            done
        });
        let started: Vec<_> = (0..threads)
            .map(|thread| {
                let (one, left, failed) = (&one, &left, &failed);
                scope.spawn(move || {
                    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one(thread)));
                    let done = done.unwrap_or_else(|_| Err("a thread panicked".to_owned()));
                    failed.fetch_or(done.is_err(), Ordering::Relaxed);
                    left.fetch_sub(1, Ordering::SeqCst);
                    done
                })
            })
            .collect();
        let panicked = |_| Err("a thread panicked".to_owned());
        let mut all: Vec<_> =
            started.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect();
        all.push(beside.join().unwrap_or_else(panicked));
        all.into_iter().collect::<Result<(), String>>()
    })?;
    budget.resize(full).map_err(|error| format!("resizing: {error}"))?;
    if is_limited { settle(budget) } else { Ok(()) }
}

/// Waits until no more is resident than the limit says: nothing is pinned or in flight any more.
fn settle(budget: &Budget) -> Result<(), String> {
    let start = Instant::now();
    while budget.resident() > budget.bytes() {
        if start.elapsed() > Duration::from_secs(10) {
            return Err(format!("nothing is in flight, and {budget}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// One thing that a thread does.
fn step(used: &[Used<'_>], thread: usize, threads: usize, random: &mut Random) -> Result<(), String> {
    let Used { memory, words, may_fail } = used[random.below(used.len())];
    let (pages, bytes) = (words.pages(), words.bytes());
    // Half of the accesses are to a few pages, which are worth keeping.
    let few = if random.one_in(2) { pages } else { pages / (2 * TIMES) };
    let page = random.below(few);
    let near = |count: usize, random: &mut Random| {
        let start = page * page_size() + random.below(page_size());
        start.min(bytes)..(start + random.below(count * page_size())).min(bytes)
    };
    match random.below(100) {
        0..55 => words.check_one(page, random),
        55..85 => {
            // Each page has one thread that writes it.
            let own = page - page % threads + thread;
            if own < pages {
                words.write(own);
                words.check_one(own, random)?;
            }
            Ok(())
        }
        85..90 => (page..pages.min(page + 24)).try_for_each(|page| words.check_one(page, random)),
        90..95 => {
            let range = near(1 + pages / TIMES / 16, random);
            match memory.pin(range.clone()) {
                Ok(pinned) => {
                    pages_of(range).try_for_each(|page| words.check_one(page.min(pages - 1), random))?;
                    drop(pinned);
                    Ok(())
                }
                // More than half of the limit.
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => Ok(()),
                Err(error) => Err(format!("pinning: {error}")),
            }
        }
        95..98 => {
            memory.evict(near(8, random), random);
            words.check_one(page, random)
        }
        _ => {
            let (range, waits) = (near(4, random), random.one_in(2));
            memory.prefetch(range, waits, may_fail)?;
            words.check_one(page, random)
        }
    }
}
