//! A process of its own that has reached a limit, of descriptors or of mappings: what it asks for then is refused, and what
//! it has goes on.
//!
//! Mappings with glibc alone, whose allocator goes on without them. Where an allocator fails, Rust ends the process.

use std::sync::Arc;
use std::time::Duration;
use std::{fs, io, ptr, thread};

use userfaultfd::pager::{BytesSource, PageData, Pager};
use userfaultfd::{LazyMemory, page_size};
use userfaultfd_examples::Result;

use crate::alone::{PAGES, bytes, check, check_call, lazy, limit_of_descriptors, sigbus};

/// What the process does.
pub(crate) fn reach(seed: u64) -> Result<()> {
    if seed % 2 == 0 || !cfg!(target_env = "gnu") {
        few_descriptors(seed / 2)
    } else {
        few_mappings(seed / 2)
    }
}

/// The seed says how many descriptors are left.
fn few_descriptors(seed: u64) -> Result<()> {
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

/// Readers of slow memory, so that the pager would add workers.
const READERS: usize = 4;

/// The seed says how many mappings are left: none, or so few that something is refused half-way.
fn few_mappings(seed: u64) -> Result<()> {
    let pager = Arc::new(Pager::builder().build()?);
    let slow = |offset: u64, page: &mut [u8]| {
        thread::sleep(Duration::from_millis(2));
        page.fill((offset / page_size() as u64) as u8 + 1);
        Ok(PageData::Data)
    };
    let slow = LazyMemory::builder(slow).len(PAGES * READERS * page_size()).block(page_size()).pager(&pager);
    let (slow, early) = (slow.build()?, [lazy(&pager)?, sigbus()?]);
    let go = std::sync::Barrier::new(READERS + 1);
    let _pin = room_to_allocate();
    let read = |reader: usize| {
        let pages = reader * PAGES..(reader + 1) * PAGES;
        let wrong = |page: &usize| slow[page * page_size()] != *page as u8 + 1;
        go.wait();
        pages.into_iter().find(wrong).map_or(Ok(()), |page| Err(format!("page {page} is wrong")))
    };
    let read = &read;
    thread::scope(|scope| -> Result<()> {
        let readers: Vec<_> = (0..READERS).map(|reader| scope.spawn(move || read(reader))).collect();
        let mut more = Vec::with_capacity(1 << 12);
        let reached = mappings(seed as usize % 24);
        go.wait();
        let refused = reached.is_ok().then(|| {
            loop {
                match lazy(&pager) {
                    Ok(_) if more.len() == more.capacity() => break "no limit is reached".into(),
                    Ok(memory) => more.push(memory),
                    Err(error) => break error.to_string(),
                }
            }
        });
        let read = readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err("a reader panicked".to_owned())));
        let checked = early.iter().chain(&more).try_for_each(check);
        drop(more);
        drop(reached?);
        read.and(checked)?;
        match refused {
            Some(text) if !["os error 12", "ENOMEM"].iter().any(|errno| text.contains(errno)) => {
                Err(format!("refused, and not for the limit: {text}").into())
            }
            _ => Ok(()),
        }
    })?;
    early.iter().try_for_each(check)?;
    check(&lazy(&pager)?)?;
    Ok(())
}

/// Has the allocator have room for this thread: at the limit the heap can't grow either. What is returned keeps it from
/// giving the room back.
fn room_to_allocate() -> Box<u8> {
    let room: Vec<_> = (0..512).map(|_| vec![1_u8; 4096]).collect();
    let pin = Box::new(std::hint::black_box(&room).len() as u8);
    drop(room);
    pin
}

/// The mappings that reach the limit, until this is dropped.
struct Mapped {
    start: usize,
    pages: usize,
}

/// Uses up the mappings that the process may have, but for `left` pairs, and perhaps one.
fn mappings(left: usize) -> io::Result<Mapped> {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count")?;
    let most: usize = most.trim().parse().map_err(io::Error::other)?;
    if most > 1 << 20 {
        return Err(io::Error::other("a limit of mappings that is never reached"));
    }
    let len = 2 * most * page_size();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses an address where nothing is.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mapped = Mapped { start: start.expose_provenance(), pages: 2 * most };
    // Every second page is another mapping, and so is what is between two of them.
    let second = (1..2 * most).step_by(2);
    let split = second.clone().take_while(|page| protect(mapped.start, *page, libc::PROT_READ)).count();
    if split == second.len() {
        return Err(io::Error::other("no limit is reached"));
    }
    // Each that is joined again is two.
    for page in second.take(split).skip(split.saturating_sub(left)) {
        protect(mapped.start, page, libc::PROT_NONE);
    }
    Ok(mapped)
}

fn protect(start: usize, page: usize, protection: libc::c_int) -> bool {
    let at = ptr::with_exposed_provenance_mut(start + page * page_size());
    // SAFETY: a page that nothing refers to.
    unsafe { libc::mprotect(at, page_size(), protection) == 0 }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let at = ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: pages that nothing refers to.
        let unmapped = unsafe { libc::munmap(at, self.pages * page_size()) };
        debug_assert_eq!(unmapped, 0);
    }
}

/// The limit is reached, until this is dropped.
struct Reached {
    before: libc::rlimit,
}

/// Lowers the limit of descriptors.
fn descriptors(limit: u64) -> io::Result<Reached> {
    let before = limit_of_descriptors()?;
    let fewer = libc::rlimit { rlim_cur: limit as libc::rlim_t, ..before };
    // SAFETY: the kernel reads the structure, borrowed for the call.
    check_call(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const fewer) })?;
    Ok(Reached { before })
}

impl Drop for Reached {
    fn drop(&mut self) {
        // SAFETY: the kernel reads the structure, borrowed for the call.
        let raised = check_call(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const self.before) });
        debug_assert!(raised.is_ok(), "{raised:?}");
    }
}
