//! Minor faults: a file in memory is mapped twice. One mapping fills it. Faults on the other are delivered, and
//! each page gets a last change before it is mapped there. Nothing is copied.
//!
//! Linux 5.14, on 64-bit architectures that have it: x86-64, arm64 and others. No rights from Linux 5.11 on.

use std::process::ExitCode;
use std::thread;

use memmap2::MmapRaw;
use userfaultfd::{Event, FaultKind, FeatureFlags, RegisterMode, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::{Result, memfd};

/// What the file's pages hold, one letter each.
const CONTENT: &[u8] = b"abc";

fn main() -> ExitCode {
    userfaultfd_examples::run(two_mappings)
}

fn two_mappings() -> Result<()> {
    let file = memfd(CONTENT.len() * page_size())?;
    // Bytes seen through one mapping change by writes through the other: no references, raw pointers only.
    let memory = MmapRaw::map_raw(&file)?;
    let alias = MmapRaw::map_raw(&file)?;

    // Writing through `alias` puts the pages into the page cache. `memory` doesn't show them yet: touching one
    // there is a minor fault. (A page that the cache lacks is a missing fault, which isn't asked for here.)
    for (index, letter) in CONTENT.iter().enumerate() {
        // SAFETY: the page lies inside the mapping, and no other thread knows of it yet.
        unsafe { alias.as_mut_ptr().wrapping_add(index * page_size()).write_volatile(*letter) };
    }
    let uffd = UffdBuilder::new().require_features(FeatureFlags::MINOR_SHMEM).create()?;
    uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), RegisterMode::MINOR)?;

    let start = memory.as_mut_ptr().addr();
    let handler = thread::spawn(move || change_and_map(&uffd, start, &alias));
    for index in 0..CONTENT.len() {
        // SAFETY: the page lies inside the mapping. The handler changes it only while this read waits.
        let letter = unsafe { memory.as_ptr().wrapping_add(index * page_size()).read_volatile() };
        println!("main reads {} from page {index}", char::from(letter));
    }
    handler.join().expect("the handler doesn't panic")
}

/// Makes the letter of each page a capital, where the page is before anybody sees it here.
fn change_and_map(uffd: &Uffd, start: usize, alias: &MmapRaw) -> Result<()> {
    for _ in CONTENT {
        let Some(Event::Pagefault { kind: FaultKind::Minor, addr, .. }) = uffd.read_event()? else {
            return Err("an event that nobody asked for".into());
        };
        let page = alias.as_mut_ptr().wrapping_add(addr.addr() - start);
        // SAFETY: the page lies inside the mapping, and the only other thread waits for it.
        let letter = unsafe { page.read_volatile() };
        // SAFETY: as for reading.
        unsafe { page.write_volatile(letter.to_ascii_uppercase()) };

        // Mapped and not woken, lest main prints first.
        let mapped = uffd.r#continue(addr, page_size(), false)?;
        println!("minor fault at page {}: mapped {mapped} bytes", (addr.addr() - start) / page_size());
        uffd.wake(addr, page_size())?;
    }
    Ok(())
}
