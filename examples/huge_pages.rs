//! Missing faults on hugetlb memory: told, and filled, by the huge page.
//!
//! Linux 4.11; no rights from Linux 5.11 on. Needs two huge pages that are free. An administrator reserves them:
//! `echo 2 > /proc/sys/vm/nr_hugepages` (and `echo 0 > …` to have the memory back).

use std::process::ExitCode;
use std::thread;

use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder};
use userfaultfd_examples::{Needs, Result, huge_page_size, map_huge};

const PAGES: usize = 2;

fn main() -> ExitCode {
    userfaultfd_examples::run(touch_huge_pages)
}

fn touch_huge_pages() -> Result<()> {
    let size = huge_page_size().ok_or_else(|| Needs("a kernel with hugetlb memory".into()))?;
    let mut memory = map_huge(PAGES, size, true).map_err(|error| {
        Needs(format!("{PAGES} free huge pages ({error}): as root, echo {PAGES} > /proc/sys/vm/nr_hugepages"))
    })?;
    println!("{PAGES} huge pages of {} KiB at {:p}", size / 1024, memory.as_ptr());

    let uffd = UffdBuilder::new().require_features(FeatureFlags::MISSING_HUGETLBFS).create()?;
    uffd.register(memory.as_mut_ptr().cast(), memory.len())?;
    let handler = thread::spawn(move || fill(&uffd, size));

    // The last byte of each: the event tells where the huge page begins.
    for (index, page) in memory.chunks(size).enumerate() {
        let byte = page[size - 1];
        println!("main reads {} at the end of page {index}", char::from(byte));
    }
    handler.join().expect("the handler doesn't panic")
}

/// Fills each page: addresses and lengths are those of huge pages now.
fn fill(uffd: &Uffd, size: usize) -> Result<()> {
    for letter in (b'A'..).take(PAGES) {
        let Some(Event::Pagefault { addr, .. }) = uffd.read_event()? else {
            return Err("an event that nobody asked for".into());
        };
        let content = vec![letter; size];
        // SAFETY: `content` is a huge page long, and main, which waits for the page, takes any bytes.
        let copied = unsafe { uffd.copy(content.as_ptr().cast(), addr, size, false)? };
        println!("fault at {addr:p}: copied {copied} bytes");
        uffd.wake(addr, size)?; // not with the copy, lest main prints first
    }
    Ok(())
}
