//! What happens seldom, made to happen often, on memory of this very process: a crowd that waits for a source that is
//! down, threads that are sent signals while they fault, children of forks that drop what they inherit, memories by the
//! hundred, limits that are reached.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::pager::{BytesSource, FillOrder, PageData, PageSource, Pager, RetryPolicy};
use userfaultfd::{LazyMemory, page_size};

use crate::board::{Act, Slot};
use crate::content::{Content, WORD};
use crate::random::Random;
use crate::{alone, remaps};

/// More threads than anything of a pager has fixed room for.
const CROWD: usize = 300;

/// Memories at once: each takes a descriptor, and a process has some 1,000.
const MEMORIES: usize = 150;

/// Tries for some ten seconds, longer than any source is down.
const PATIENT: RetryPolicy = RetryPolicy { attempts: 200, delay: Duration::from_millis(1) };

/// One storm. Whether it is over, and all that was read was right.
pub(crate) fn strike(
    slot: &Slot,
    pager: &Arc<Pager>,
    random: &mut Random,
    kernel: bool,
) -> Result<(), String> {
    const ALL: [Act; 10] = [
        Act::Crowd,
        Act::Outage,
        Act::Remaps,
        Act::Remaps,
        Act::Signals,
        Act::ChildDrops,
        Act::Many,
        Act::Limits,
        Act::Locked,
        Act::Thousand,
    ];
    let act = ALL[random.below(ALL.len())];
    slot.begin(act, 0);
    let struck = match act {
        Act::Crowd => crowd(random),
        Act::Outage => outage(random),
        Act::Remaps => remaps::storm(pager, random, kernel),
        Act::Signals => signals(pager, random),
        Act::ChildDrops => child_drops(pager, random),
        Act::Limits | Act::Locked | Act::Thousand => alone::run(act, random.next()),
        _ => many(pager, random),
    };
    struck.map_err(|problem| format!("{act:?}: {problem}"))?;
    slot.end(act);
    Ok(())
}

fn content(pages: usize, random: &mut Random) -> Content {
    let page = page_size() / WORD;
    Content { key: random.next(), page, words: pages * page, has_bad: false }
}

/// Looks at one word of a page.
fn look(memory: &[u8], content: &Content, page: usize, random: &mut Random) -> Result<(), String> {
    let word = random.below(content.page);
    let bytes = &memory[(page * content.page + word) * WORD..][..WORD];
    let value = u32::from_ne_bytes(bytes.try_into().expect("a word"));
    let right = content.loaded(page, word);
    let told = || format!("{value:#x} instead of {right:#x} in word {word} of page {page}");
    if value == right { Ok(()) } else { Err(told()) }
}

/// A source that is down for a while, over and over.
struct Down {
    content: Content,
    since: Instant,
    until: Duration,
}

impl PageSource for Down {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        if self.since.elapsed() < self.until {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let bytes = self.content.page * WORD;
        let first = (offset / bytes as u64) as usize;
        self.content.fill(first, page);
        Ok(PageData::Data)
    }
}

/// A crowd waits, each for a page of its own, and some of the same ones.
fn crowd(random: &mut Random) -> Result<(), String> {
    let content = content(CROWD, random);
    let until = Duration::from_millis(random.below(1500) as u64);
    let source = Down { content, since: Instant::now(), until };
    let builder = LazyMemory::builder(source).len(content.words * WORD).block(page_size());
    let memory = builder.threads(1 + random.below(4)).retry(PATIENT).on_problem(|_| {}).build();
    let memory = memory.map_err(|error| format!("LazyMemory: {error}"))?;
    let seed = random.next();
    all(CROWD, |index| {
        let mut random = Random::new(&[seed, index as u64]);
        look(&memory, &content, index, &mut random)?;
        look(&memory, &content, index / 3, &mut random)
    })
}

/// A source is down for seconds, while threads wait for it, pages are filled in the background, and another source of the
/// same pager delivers.
fn outage(random: &mut Random) -> Result<(), String> {
    const READERS: usize = 40;
    /// Long enough for one page of the other memory, however slow the machine is.
    const LONG: Duration = Duration::from_secs(4);
    let (content, other) = (content(READERS, random), content(64, random));
    let (since, until) = (Instant::now(), Duration::from_millis(2000 + random.below(4000) as u64));
    let pager = Pager::builder().threads(1 + random.below(4)).retry(PATIENT).on_problem(|_| {}).build();
    let pager = Arc::new(pager.map_err(|error| format!("a pager: {error}"))?);
    let build = |source: Arc<dyn PageSource>, content: &Content| {
        let builder = LazyMemory::builder(source).len(content.words * WORD).block(page_size());
        builder.pager(&pager).build().map_err(|error| format!("LazyMemory: {error}"))
    };
    let memory = build(Arc::new(Down { content, since, until }), &content)?;
    let up = build(other.source(1, 64).map_err(|error| error.to_string())?, &other)?;
    let background =
        memory.background(FillOrder::Ascending).map_err(|error| format!("background: {error}"))?;
    let seed = random.next();
    all(READERS + 2, |index| {
        let mut random = Random::new(&[seed, index as u64]);
        match index {
            READERS => {
                look(&up, &other, 0, &mut random)?;
                if until > LONG && since.elapsed() > until {
                    return Err("a page waited for a source that isn't its own".to_owned());
                }
                (1..64).try_for_each(|page| look(&up, &other, page, &mut random))
            }
            0..READERS => look(&memory, &content, index, &mut random),
            _ => memory.try_populate(0..memory.len()).map_err(|error| format!("filling: {error}")),
        }
    })?;
    drop(background);
    (0..READERS).try_for_each(|page| look(&memory, &content, page, random))
}

/// Each of a number of threads does something.
fn all(threads: usize, act: impl Fn(usize) -> Result<(), String> + Sync) -> Result<(), String> {
    thread::scope(|scope| {
        let run = |index| {
            let act = &act;
            thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, move || act(index))
        };
        let threads: Vec<_> = (0..threads).map(run).collect();
        threads.into_iter().try_for_each(|thread| {
            let thread = thread.map_err(|error| format!("a thread: {error}"))?;
            thread.join().unwrap_or_else(|_| Err("a thread panicked".to_owned()))
        })
    })
}

/// Threads are sent signals as fast as they take them, while they fault.
fn signals(pager: &Arc<Pager>, random: &mut Random) -> Result<(), String> {
    const READERS: usize = 3;
    handle_signals()?;
    let content = content(200, random);
    let source = content.source(1, 200).map_err(|error| error.to_string())?;
    let memory = LazyMemory::builder(source).pager(pager).build().map_err(|error| error.to_string())?;
    let sigbus = of_sigbus(&content)?;
    let (readers, done) = ([const { AtomicI32::new(0) }; READERS], AtomicBool::new(false));
    let seed = random.next();
    thread::scope(|scope| {
        let (readers, done) = (&readers, &done);
        scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                for reader in readers.iter().map(|reader| reader.load(Ordering::SeqCst)) {
                    // SAFETY: touches no memory; the handler does nothing.
                    unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), reader, libc::SIGUSR1) };
                }
                thread::yield_now();
            }
        });
        let read = all(READERS, |index| {
            // SAFETY: touches no memory.
            let id = unsafe { libc::syscall(libc::SYS_gettid) };
            readers[index].store(id as i32, Ordering::SeqCst);
            let mut random = Random::new(&[seed, index as u64]);
            let read = (0..200).try_for_each(|page| {
                look(&memory, &content, page, &mut random)?;
                look(&sigbus, &content, page, &mut random)
            });
            // No other thread may get the number while it is still sent signals.
            readers[index].store(0, Ordering::SeqCst);
            read
        });
        done.store(true, Ordering::SeqCst);
        read
    })
}

fn handle_signals() -> Result<(), String> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zeros are an action: no flags, nothing blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the action is borrowed for the call, and its handler does nothing.
    match unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error().to_string()),
    }
}

/// Memory whose faults are handled in the threads that make them.
fn of_sigbus(content: &Content) -> Result<LazyMemory, String> {
    let mut bytes = vec![0; content.words * WORD];
    content.fill(0, &mut bytes);
    LazyMemory::sigbus(BytesSource::new(bytes)).build().map_err(|error| format!("sigbus: {error}"))
}

/// The child of a fork drops what it inherited and exits; the parent's memory goes on being filled.
fn child_drops(pager: &Arc<Pager>, random: &mut Random) -> Result<(), String> {
    let content = content(64, random);
    let source = || content.source(1, 64).map_err(|error| error.to_string());
    let shared = LazyMemory::builder(source()?).pager(pager).build().map_err(|error| error.to_string())?;
    let own = LazyMemory::builder(source()?).build().map_err(|error| error.to_string())?;
    let memories = [shared, own, of_sigbus(&content)?];
    let (first, drops) = (random.below(64), random.one_in(2));
    memories.iter().try_for_each(|memory| look(memory, &content, first, random))?;
    // SAFETY: the child drops what it inherited, which libraries for many threads must stand, and exits.
    match unsafe { libc::fork() } {
        -1 => return Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            if drops {
                drop(memories);
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }
        child => {
            let mut status = 0;
            // SAFETY: the kernel writes the status, borrowed for the call.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            if (waited, status) != (child, 0) {
                return Err(format!("a child that drops: {drops}, ended with {status:#x}"));
            }
        }
    }
    (0..64).try_for_each(|page| memories.iter().try_for_each(|memory| look(memory, &content, page, random)))
}

/// Memories by the hundred, some of which are looked at; and dropped from several threads.
fn many(pager: &Arc<Pager>, random: &mut Random) -> Result<(), String> {
    let content = content(3, random);
    let make = |index: usize| {
        if index % 4 == 0 {
            return of_sigbus(&content);
        }
        let source = content.source(1, 3).map_err(|error| error.to_string())?;
        LazyMemory::builder(source).pager(pager).build().map_err(|error| format!("memory {index}: {error}"))
    };
    let seed = random.next();
    for _ in 0..3 {
        let memories = (0..MEMORIES).map(make).collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<_> = memories.chunks(MEMORIES / 3).collect();
        all(parts.len(), |part| {
            let mut random = Random::new(&[seed, part as u64]);
            let looked = parts[part].iter().filter(|_| random.one_in(2)).collect::<Vec<_>>();
            looked.iter().try_for_each(|memory| look(memory, &content, random.below(3), &mut random))
        })?;
        drop(parts);
        thread::scope(|scope| {
            let mut left = memories;
            while !left.is_empty() {
                let part = left.split_off(left.len().saturating_sub(MEMORIES / 3));
                scope.spawn(move || drop(part));
            }
        });
    }
    Ok(())
}
