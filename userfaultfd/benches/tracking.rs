//! What it costs to know what was written, and to begin a snapshot: a table of ratios.
//!
//! `cargo bench -p userfaultfd --bench tracking [-- GIB]`. Ways are compared in one run and take turns, so that whatever
//! else the machine does meets all; which is first is drawn by lot. Times are medians of the rounds, behind them the
//! fastest round, which what else the machine does can't slow down, and the slowest; a ratio is told of the first two. The memory is 4 GiB unless told otherwise; it takes twice
//! that. Protecting costs the kernel something for each page, so a snapshot of memory in transparent huge pages begins
//! many times faster than one of memory in small pages: both are told.

#[path = "random/mod.rs"]
#[expect(dead_code, reason = "others need the rest")]
mod random;

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut, MmapRaw};
use userfaultfd::dirty::{Mode, Options};
use userfaultfd::snapshot::{Content, Sink};
use userfaultfd::{DirtyTracker, FeatureFlags, Snapshot, Support, page_size};

use crate::random::Random;

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    // Cargo says what it runs this for. A test only looks whether everything works.
    let measured = args.iter().any(|arg| arg == "--bench");
    let gib: usize = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(4);
    let (bytes, rounds) = if measured { (gib << 30, 15) } else { (16 << 20, 1) };
    let features = Support::probe().expect("a userfaultfd for faults from user mode").features();
    if !features.contains(FeatureFlags::PAGEFAULT_FLAG_WP) {
        return println!("this machine has no write protection");
    }

    println!("the first write to a page after it was protected");
    writes(features, rounds * 10);
    if features.contains(FeatureFlags::WP_ASYNC) {
        println!("\nwhich pages of {} MiB were written", bytes >> 20);
        takes(&Memory::new(bytes, Advice::NoHugePage), rounds);
    }
    for (pages, advice) in [("small pages", Advice::NoHugePage), ("transparent huge pages", Advice::HugePage)]
    {
        println!("\na snapshot of {} MiB in {pages}", bytes >> 20);
        begins(&Memory::new(bytes, advice), rounds.min(9));
    }
}

/// Memory whose pages are there.
struct Memory(MmapRaw);

impl Memory {
    fn new(bytes: usize, advice: Advice) -> Self {
        let mut memory = MmapMut::map_anon(bytes).expect("memory");
        // A kernel without huge pages has nothing to be told.
        let _advised = memory.advise(advice);
        memory.chunks_mut(page_size()).for_each(|page| page[0] = 1);
        Self(MmapRaw::from(memory))
    }

    fn pages(&self) -> usize {
        self.0.len() / page_size()
    }

    fn range(&self) -> Range<usize> {
        let start = self.0.as_ptr().addr();
        start..start + self.0.len()
    }

    fn write(&self, page: usize) {
        let at = self.0.as_mut_ptr().wrapping_add(page * page_size());
        // SAFETY: inside the mapping, which is accessed by raw pointers alone.
        unsafe { at.write_volatile(2) };
    }
}

/// What some rounds took, in seconds: the median, the fastest and the slowest.
fn summary(mut times: Vec<Duration>) -> [f64; 3] {
    times.sort_unstable();
    [times[times.len() / 2], times[0], times[times.len() - 1]].map(|time| time.as_secs_f64())
}

/// How many times longer one took than the other.
fn ratio(one: [f64; 3], other: [f64; 3]) -> String {
    format!("{:>8.1} × {:>6.1} ×", one[0] / other[0], one[1] / other[1])
}

fn time(work: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

/// A way to be told of writes.
struct Way<'a> {
    name: &'static str,
    protect: Box<dyn FnMut() + 'a>,
    times: Vec<Duration>,
}

/// What the first write to a page costs.
fn writes(features: FeatureFlags, rounds: usize) {
    const PAGES: usize = 256;
    // In no order, as most programs write. It would spare mprotect the splitting of mappings.
    let order = || (0..PAGES).map(|page| page * 97 % PAGES);
    let memories: Vec<Memory> =
        (0..5).map(|_| Memory::new(PAGES * page_size(), Advice::NoHugePage)).collect();
    let [plain, of_async, of_sync, of_signal, of_soft_dirty] = &memories[..] else { unreachable!() };
    let mut ways = vec![(plain, Way { name: "not protected", protect: Box::new(|| {}), times: Vec::new() })];
    if features.contains(FeatureFlags::WP_ASYNC) {
        ways.push((of_async, tracked("DirtyTracker, async", of_async, Mode::Async)));
    }
    ways.push((of_sync, tracked("DirtyTracker, sync", of_sync, Mode::Sync)));
    catch_signals();
    let protect = Box::new(|| protect(of_signal));
    ways.push((of_signal, Way { name: "mprotect, SIGSEGV", protect, times: Vec::new() }));
    if has_soft_dirty(of_soft_dirty) {
        let protect = Box::new(clear_soft_dirty);
        ways.push((of_soft_dirty, Way { name: "soft-dirty", protect, times: Vec::new() }));
    } else {
        println!("{:<24}this kernel has none", "soft-dirty");
    }
    let mut random = Random::of_this_run();
    for _ in 0..rounds {
        // Those that there are, in an order that is drawn by lot.
        for at in random.shuffled(5) {
            let Some((memory, way)) = ways.get_mut(at) else { continue };
            (way.protect)();
            way.times.push(time(|| order().for_each(|page| memory.write(page))));
        }
    }
    let costs: Vec<_> = ways.into_iter().map(|(_, way)| (way.name, summary(way.times))).collect();
    let asynchronous = costs.iter().find(|(name, _)| name.ends_with("async")).map(|(_, cost)| *cost);
    for (name, cost) in costs {
        let [median, fastest, slowest] = cost.map(|seconds| seconds * 1e9 / PAGES as f64);
        let ratio = asynchronous.map_or(String::new(), |least| ratio(cost, least) + " async");
        println!("{name:<24}{median:>9.0} ns{fastest:>9.0} ns{slowest:>9.0} ns{ratio}");
    }
}

fn tracked<'a>(name: &'static str, memory: &Memory, mode: Mode) -> Way<'a> {
    let mut tracker = DirtyTracker::with(Options::new().mode(mode)).expect("the kernel has the mode");
    tracker.track(memory.range()).expect("memory that can be tracked");
    let protect = Box::new(move || assert!(tracker.take().all(|range| range.is_ok())));
    Way { name, protect, times: Vec::new() }
}

/// How it is done by hand: pages are read-only, and a handler of SIGSEGV notes the write and makes the page writable.
fn protect(memory: &Memory) {
    // SAFETY: the range is a mapping, and who writes to it meanwhile is held up by the handler.
    let result = unsafe { libc::mprotect(memory.0.as_mut_ptr().cast(), memory.0.len(), libc::PROT_READ) };
    assert_eq!(result, 0);
}

static NOTED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes the structure to a handler that asked for it, for as long as that runs.
    let info = unsafe { &*info };
    // SAFETY: this signal comes with an address.
    let address = unsafe { info.si_addr() };
    // SAFETY: touches no memory. It may be called in a handler on every system that has mprotect.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    NOTED.fetch_add(1, Ordering::Relaxed);
    let page = address.map_addr(|address| address & !(size - 1));
    // SAFETY: the page is of the memory that `protect` protected; nothing else of this program is read-only.
    let result = unsafe { libc::mprotect(page, size, libc::PROT_READ | libc::PROT_WRITE) };
    if result != 0 {
        std::process::abort();
    }
}

fn catch_signals() {
    // SAFETY: all zeros is a structure that asks for nothing.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_signal as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the structure is borrowed for the call; the handler makes system calls that a handler may.
    let result = unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

fn clear_soft_dirty() {
    let mut file = File::options().write(true).open("/proc/self/clear_refs").expect("/proc/self/clear_refs");
    file.write_all(b"4").expect("a process may clear its own");
}

/// Whether the kernel notes writes by the soft-dirty bit.
fn has_soft_dirty(memory: &Memory) -> bool {
    let bit = || word_of(&File::open("/proc/self/pagemap").expect("/proc"), memory, 0) >> 55 & 1 == 1;
    clear_soft_dirty();
    let before = bit();
    memory.write(0);
    !before && bit()
}

fn word_of(pagemap: &File, memory: &Memory, page: usize) -> u64 {
    let mut word = [0; 8];
    let at = (memory.range().start / page_size() + page) * 8;
    pagemap.read_exact_at(&mut word, at as u64).expect("a word for each page");
    u64::from_ne_bytes(word)
}

/// What it takes to find the pages that were written, and to begin anew.
fn takes(memory: &Memory, rounds: usize) {
    let pagemap = File::open("/proc/self/pagemap").expect("/proc");
    let mut tracker = DirtyTracker::with(Options::new().mode(Mode::Async)).expect("the kernel has the mode");
    let armed = time(|| tracker.track(memory.range()).expect("memory that can be tracked"));
    println!("{:<24}{:>9.2} ms", "to track it", armed.as_secs_f64() * 1e3);
    println!("{:<24}{:>12}{:>12}", "written, in random places", "take", "words");
    let mut words = vec![0; 8 << 16];
    for (written, name) in [(1, "0.1 %"), (10, "1 %"), (100, "10 %")] {
        let (mut takes, mut reads) = (Vec::new(), Vec::new());
        let (mut lots, mut random) = (Random::of_this_run(), Random::new(1));
        for _ in 0..rounds {
            // Both look at pages that were just written: who came second would find the kernel's tables in the caches.
            let before = random.clone();
            let mut found = [0; 2];
            for way in lots.shuffled(2) {
                random.clone_from(&before);
                for _ in 0..memory.pages() * written / 1000 {
                    memory.write(random.below(memory.pages()));
                }
                let mut take = || tracker.take().map(|range| range.expect("a range").len()).sum();
                if way == 0 {
                    takes.push(time(|| found[0] = take()));
                } else {
                    // Only what was written is looked for here, and nothing is reset.
                    reads.push(time(|| found[1] = count_by_words(&pagemap, memory, &mut words)));
                    let reset: usize = take();
                    assert_eq!(reset, found[1] * page_size());
                }
            }
            assert_eq!(found[1] * page_size(), found[0]);
        }
        let (take, read) = (summary(takes), summary(reads));
        let [[take_ms, ..], [read_ms, ..]] = [take, read].map(|all| all.map(|seconds| seconds * 1e3));
        println!("{name:<24}{take_ms:>9.2} ms{read_ms:>9.2} ms{} take", ratio(read, take));
    }
}

/// Pages whose word says that they aren't protected.
fn count_by_words(pagemap: &File, memory: &Memory, words: &mut [u8]) -> usize {
    let mut at = memory.range().start / page_size() * 8;
    let end = at + memory.pages() * 8;
    let mut written = 0;
    while at < end {
        let some = words.len().min(end - at);
        pagemap.read_exact_at(&mut words[..some], at as u64).expect("a word for each page");
        let words = words[..some].chunks_exact(8);
        written +=
            words.filter(|word| u64::from_ne_bytes(*word.first_chunk().unwrap()) >> 57 & 1 == 0).count();
        at += some;
    }
    written
}

/// How long a snapshot holds everybody up, and a copy.
fn begins(memory: &Memory, rounds: usize) {
    let mut copy = MmapMut::map_anon(memory.0.len()).expect("memory");
    copy.chunks_mut(page_size()).for_each(|page| page[0] = 1);
    beside_copies(memory, &mut copy, rounds, ["Snapshot::begin", "of that, writers wait"], |memory| {
        begin(memory, drop)
    });
    // Behind those without a writer: the kernel splits the huge pages that one writes to.
    let names =
        ["begin, with a writer", "of that, writers wait", "its longest write then", "and until aborted"];
    beside_copies(memory, &mut copy, rounds, names, |memory| beside_a_writer(memory, drop));
    let names =
        ["begin, with a writer", "of that, writers wait", "its longest write then", "and until all is saved"];
    beside_copies(memory, &mut copy, rounds, names, |memory| {
        beside_a_writer(memory, |snapshot| {
            let _sink = snapshot.wait().expect("a snapshot that ends");
        })
    });
}

/// Rounds of a copy, and of something that takes several times.
fn beside_copies<const N: usize>(
    memory: &Memory,
    copy: &mut [u8],
    rounds: usize,
    names: [&str; N],
    work: impl Fn(&Memory) -> [Duration; N],
) {
    let mut copies = Vec::new();
    let mut rows = names.map(|name| (name, Vec::new()));
    for _ in 0..rounds {
        copies.push(time(|| {
            // SAFETY: both are mappings of this length, and nobody writes to them meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(memory.0.as_ptr(), copy.as_mut_ptr(), copy.len()) };
        }));
        rows.iter_mut().zip(work(memory)).for_each(|((_, times), took)| times.push(took));
    }
    let copied = summary(copies);
    let show = |name: &str, took: [f64; 3], rest: &str| {
        let [median, fastest, slowest] = took.map(|seconds| seconds * 1e3);
        println!("{name:<24}{median:>9.2} ms{fastest:>9.2} ms{slowest:>9.2} ms{rest}");
    };
    show("copying it", copied, "");
    for (name, times) in rows {
        let took = summary(times);
        show(name, took, &(ratio(copied, took) + " shorter than copying"));
    }
}

/// How long it takes to begin a snapshot, which is given away then, and how long it says that writers wait.
fn begin(memory: &Memory, then: impl FnOnce(Snapshot<Discard>)) -> [Duration; 2] {
    let mut snapshot = None;
    let took = time(|| snapshot = Some(Snapshot::begin(memory.range(), Discard).expect("a snapshot")));
    let snapshot = snapshot.expect("it has begun");
    let pause = snapshot.progress().pause;
    then(snapshot);
    [took, pause]
}

struct Discard;

impl Sink for Discard {
    fn write(&mut self, _: u64, _: Content<'_>) -> std::io::Result<()> {
        Ok(())
    }
}

/// The same, while a thread writes to pages in no order, and how long the longest of its writes took until the snapshot
/// had begun, and from then until `end` had ended it.
fn beside_a_writer(memory: &Memory, end: impl FnOnce(Snapshot<Discard>)) -> [Duration; 4] {
    let (at_work, part) = (Barrier::new(2), AtomicUsize::new(0));
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut random, mut longest) = (Random::new(7), [Duration::ZERO; 3]);
            at_work.wait();
            while part.load(Ordering::Relaxed) < 2 {
                let took = time(|| memory.write(random.below(memory.pages())));
                // What ends in the next part is that one's, which is what made it long.
                let longest = &mut longest[part.load(Ordering::Relaxed)];
                *longest = took.max(*longest);
            }
            longest
        });
        at_work.wait();
        let [begin, pause] = begin(memory, |snapshot| {
            part.store(1, Ordering::Relaxed);
            end(snapshot);
        });
        part.store(2, Ordering::Relaxed);
        let [beginning, ending, _] = writer.join().expect("a thread that only writes");
        [begin, pause, beginning, ending]
    })
}
