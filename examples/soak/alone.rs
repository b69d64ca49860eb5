//! Processes of their own, for what concerns a process as a whole: limits that are reached, memory that is locked, memories
//! by the thousand.

use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::{env, io};

use userfaultfd::pager::{self, Budget, BytesSource, Pager};
use userfaultfd::{LazyMemory, page_size};
use userfaultfd_examples::Result;

use crate::board::Act;
use crate::limits;
use crate::random::Random;

/// The first argument of such a process, before the act and the seed.
pub(crate) const ALONE: &str = "--alone";

/// Pages of each memory.
pub(crate) const PAGES: usize = 8;

/// Memories at once.
const MEMORIES: usize = 1000;

/// Runs a process that does an act, and returns what it found.
pub(crate) fn run(act: Act, seed: u64) -> std::result::Result<(), String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let ended = Command::new(program).args([ALONE, &format!("{act:?}"), &seed.to_string()]).output();
    let ended = ended.map_err(|error| format!("a process of its own: {error}"))?;
    let said = String::from_utf8_lossy(&ended.stderr);
    if ended.status.success() {
        Ok(())
    } else {
        Err(format!("with seed {seed}, ended with {}: {said}", ended.status))
    }
}

/// What the process does.
pub(crate) fn be(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let act = arguments.next();
    let seed: u64 = arguments.next().ok_or("what seed?")?.parse()?;
    let random = &mut Random::new(&[seed]);
    match act.as_deref() {
        Some("Limits") => limits::reach(seed),
        Some("Locked") => locked(random),
        Some("Thousand") => thousand(random),
        other => Err(format!("{other:?} is done by no process of its own").into()),
    }
}

/// All memory is locked, that of later mappings too: the kernel fills such a mapping as it is made. What is filled lazily
/// must have its content all the same.
fn locked(random: &mut Random) -> Result<()> {
    let pager = Arc::new(Pager::builder().threads(1 + random.below(3)).build()?);
    // Threads that the library adds later have small stacks, which are locked as well.
    // SAFETY: changes what the kernel does with memory, not what that holds.
    let returned = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
    if let Err(error) = check_call(returned) {
        // Another user's limit of locked memory may be small.
        return match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOMEM | libc::EAGAIN) => Ok(()),
            _ => Err(error.into()),
        };
    }
    for _ in 0..20 {
        let mut memory = match random.below(4) {
            0 => lazy(&pager)?,
            1 => sigbus()?,
            2 => LazyMemory::builder(BytesSource::new(bytes())).build()?,
            _ => {
                // Locked pages can't leave.
                let budget = Budget::new(4 * page_size());
                match LazyMemory::builder(BytesSource::new(bytes())).budget(&budget).build() {
                    Ok(_) => return Err("locked memory was made with a limit".into()),
                    Err(_) => continue,
                }
            }
        };
        if random.one_in(2) {
            let page = random.below(PAGES);
            memory[page * page_size() + 1] = 77;
            check(&memory)?;
            if memory[page * page_size() + 1] != 77 {
                return Err(format!("what was written to page {page} is lost").into());
            }
        }
        check(&memory)?;
        if random.one_in(3) {
            memory.fill(|_| {})?;
            check(&memory)?;
        }
    }
    Ok(())
}

/// A thousand memories of one pager, of two at most, and of none, are made, read by several threads, and dropped in any
/// order.
fn thousand(random: &mut Random) -> Result<()> {
    raise_limit_of_descriptors(MEMORIES as u64 + 200)?;
    let pagers = [Pager::builder().build()?, Pager::builder().threads(2).build()?].map(Arc::new);
    let mut memories = Vec::with_capacity(MEMORIES);
    for index in 0..MEMORIES {
        // Each of sigbus takes a slot, of which there are fewer.
        let memory = if index % 8 == 0 { sigbus() } else { lazy(&pagers[random.below(2)]) };
        memories.push(memory.map_err(|error| format!("memory {index}: {error}"))?);
    }
    let seeds = [random.next(), random.next(), random.next()];
    let all = &memories;
    std::thread::scope(|scope| {
        let read = |seed: u64| {
            let mut random = Random::new(&[seed]);
            (0..MEMORIES / 2).try_for_each(|_| check(&all[random.below(MEMORIES)]))
        };
        let readers: Vec<_> = seeds.into_iter().map(|seed| scope.spawn(move || read(seed))).collect();
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err("a reader panicked".to_owned())))
    })?;
    while !memories.is_empty() {
        drop(memories.swap_remove(random.below(memories.len())));
        if random.one_in(50) && !memories.is_empty() {
            check(&memories[random.below(memories.len())])?;
        }
    }
    check(&lazy(&pagers[0])?)?;
    Ok(())
}

fn raise_limit_of_descriptors(limit: u64) -> Result<()> {
    let before = limit_of_descriptors()?;
    if before.rlim_cur < limit as libc::rlim_t {
        let more = libc::rlimit { rlim_cur: (limit as libc::rlim_t).min(before.rlim_max), ..before };
        // SAFETY: the kernel reads the structure, borrowed for the call.
        check_call(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const more) })?;
    }
    Ok(())
}

pub(crate) fn limit_of_descriptors() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the structure, borrowed for the call.
    check_call(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    Ok(limit)
}

pub(crate) fn check_call(returned: libc::c_int) -> io::Result<()> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What all sources have. Made once: it is asked for where nothing more can be allocated.
pub(crate) fn bytes() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| (0..PAGES * page_size()).map(|at| (at / page_size()) as u8 + 1).collect())
}

pub(crate) fn lazy(pager: &Arc<Pager>) -> pager::Result<LazyMemory> {
    LazyMemory::builder(BytesSource::new(bytes())).pager(pager).build()
}

pub(crate) fn sigbus() -> pager::Result<LazyMemory> {
    LazyMemory::sigbus(BytesSource::new(bytes())).build()
}

/// Looks at the first byte of each page.
pub(crate) fn check(memory: &LazyMemory) -> std::result::Result<(), String> {
    let wrong = (0..PAGES).find(|page| memory[page * page_size()] != *page as u8 + 1);
    wrong.map_or(Ok(()), |page| Err(format!("page {page} is {}", memory[page * page_size()])))
}
