//! Write-protect faults: a snapshot of memory that goes on being written. A page is saved before its first write.
//!
//! Linux 5.7, on architectures that have it: x86-64, arm64, some riscv64. No rights from Linux 5.11 on.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::{ptr, thread};

use memmap2::{MmapMut, MmapRaw};
use userfaultfd::{Event, FaultKind, FeatureFlags, RegisterMode, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

/// What the pages hold, one letter each, when the snapshot is taken.
const CONTENT: &[u8] = b"ABCD";

/// Which of them are written afterwards.
const WRITTEN: [usize; 2] = [1, 3];

fn main() -> ExitCode {
    userfaultfd_examples::run(snapshot)
}

fn snapshot() -> Result<()> {
    let mut memory = MmapMut::map_anon(CONTENT.len() * page_size())?;
    for (page, letter) in memory.chunks_mut(page_size()).zip(CONTENT) {
        page.fill(*letter);
    }
    // From here on two threads look at the memory, so it is reached by raw pointers only.
    let memory = MmapRaw::from(memory);
    let page_at = |index: usize| memory.as_mut_ptr().wrapping_add(index * page_size());
    let letter_at = |index: usize| {
        // SAFETY: the page lies inside the mapping, and nobody writes while this thread reads.
        char::from(unsafe { page_at(index).read_volatile() })
    };

    let uffd = UffdBuilder::new().require_features(FeatureFlags::PAGEFAULT_FLAG_WP).create()?;
    uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), RegisterMode::WRITE_PROTECT)?;
    // The moment of the snapshot. Nothing is copied yet.
    uffd.write_protect(memory.as_mut_ptr().cast(), memory.len())?;

    let start = memory.as_mut_ptr().addr();
    let handler = thread::spawn(move || save_before_writes(&uffd, start));
    for index in WRITTEN {
        // SAFETY: the page lies inside the mapping, and the handler reads it only while this write waits.
        unsafe { page_at(index).write_volatile(b'x') };
    }
    let saved = handler.join().expect("the handler doesn't panic")?;

    let now: String = (0..CONTENT.len()).map(letter_at).collect();
    println!("memory now: {now}");
    // A page that wasn't saved wasn't written.
    let then = |index| saved.get(&index).map_or_else(|| letter_at(index), |page| page[0].into());
    println!("snapshot:   {}", (0..CONTENT.len()).map(then).collect::<String>());
    Ok(())
}

/// Saves each page that is about to be written, then lets the write go on. Returns the pages by their index.
fn save_before_writes(uffd: &Uffd, start: usize) -> Result<BTreeMap<usize, Vec<u8>>> {
    let mut saved = BTreeMap::new();
    while saved.len() < WRITTEN.len() {
        let Some(Event::Pagefault { kind: FaultKind::WriteProtected, addr, .. }) = uffd.read_event()? else {
            return Err("an event that nobody asked for".into());
        };
        let mut copy = vec![0; page_size()];
        // SAFETY: the mapping outlives this thread. Reading it raises no fault, and a thread that writes to it waits.
        unsafe { ptr::copy_nonoverlapping(addr.cast(), copy.as_mut_ptr(), copy.len()) };
        let index = (addr.addr() - start) / page_size();
        println!("write to page {index}: saved {} bytes of {}", copy.len(), char::from(copy[0]));
        saved.insert(index, copy);
        uffd.remove_write_protection(addr, page_size(), true)?;
    }
    Ok(saved)
}
