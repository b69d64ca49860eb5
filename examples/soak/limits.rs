//! A process that has reached its limit of descriptors: what it asks for then is refused, and what it has goes on.
//!
//! Not that of mappings: where none can be had, the allocator fails, and Rust ends the process.

use std::process::Command;
use std::sync::Arc;
use std::{env, io, thread};

use userfaultfd::pager::{self, BytesSource, Pager};
use userfaultfd::{LazyMemory, page_size};
use userfaultfd_examples::Result;

/// The first argument of a process that reaches its limits.
pub(crate) const LIMITS: &str = "--limits";

/// So many pages each memory has.
const PAGES: usize = 8;

/// Runs such a process, and tells what it found.
pub(crate) fn run(seed: u64) -> std::result::Result<(), String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let ended = Command::new(program).args([LIMITS, &seed.to_string()]).output();
    let ended = ended.map_err(|error| format!("a process of its own: {error}"))?;
    let said = String::from_utf8_lossy(&ended.stderr);
    if ended.status.success() { Ok(()) } else { Err(format!("ended with {}: {said}", ended.status)) }
}

/// What the process does: the seed says how many descriptors are left.
pub(crate) fn reach(seed: u64) -> Result<()> {
    let pager = Arc::new(Pager::builder().build()?);
    // What is there before must stay right.
    let early = [lazy(&pager)?, sigbus()?];
    let reached = descriptors(40 + seed % 100)?;
    let mut more = Vec::new();
    let refused = loop {
        match if more.len() % 2 == 0 { lazy(&pager) } else { sigbus() } {
            Ok(memory) => more.push(memory),
            Err(error) => break error,
        }
        if more.len() > 100_000 {
            return Err("no limit is reached".into());
        }
    };
    let own = LazyMemory::builder(BytesSource::new(bytes())).build();
    let text = refused.to_string();
    if !["os error 24", "EMFILE"].iter().any(|errno| text.contains(errno)) {
        return Err(format!("refused, and not for the limit: {text}").into());
    }
    early.iter().chain(&more).try_for_each(check)?;
    drop((more, own));
    early.iter().try_for_each(check)?;
    drop(reached);
    check(&lazy(&pager)?)?;
    thread::scope(|scope| scope.spawn(|| check(&early[1])).join()).map_err(|_| "a thread panicked")??;
    Ok(())
}

fn bytes() -> Vec<u8> {
    (0..PAGES * page_size()).map(|at| (at / page_size()) as u8 + 1).collect()
}

fn lazy(pager: &Arc<Pager>) -> pager::Result<LazyMemory> {
    LazyMemory::builder(BytesSource::new(bytes())).pager(pager).build()
}

fn sigbus() -> pager::Result<LazyMemory> {
    LazyMemory::sigbus(BytesSource::new(bytes())).build()
}

fn check(memory: &LazyMemory) -> std::result::Result<(), String> {
    let wrong = (0..PAGES).find(|page| memory[page * page_size()] != *page as u8 + 1);
    wrong.map_or(Ok(()), |page| Err(format!("page {page} is {}", memory[page * page_size()])))
}

/// The limit is reached, until this is dropped.
struct Reached {
    before: libc::rlimit,
}

/// Lowers the limit of descriptors.
fn descriptors(limit: u64) -> io::Result<Reached> {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the structure, borrowed for the call.
    check_call(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut before) })?;
    let fewer = libc::rlimit { rlim_cur: limit as libc::rlim_t, ..before };
    // SAFETY: the kernel reads the structure, borrowed for the call.
    check_call(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &fewer) })?;
    Ok(Reached { before })
}

fn check_call(returned: libc::c_int) -> io::Result<()> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Drop for Reached {
    fn drop(&mut self) {
        // SAFETY: the kernel reads the structure, borrowed for the call.
        let raised = check_call(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &self.before) });
        debug_assert!(raised.is_ok(), "{raised:?}");
    }
}
