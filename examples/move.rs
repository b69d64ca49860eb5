//! A missing page is filled by moving another page there: no byte is copied, and the source is left empty.
//!
//! Linux 6.8; private anonymous memory of one process. No rights from Linux 5.11 on.

use std::process::ExitCode;
use std::thread;

use memmap2::MmapMut;
use userfaultfd::{Errno, Event, FeatureFlags, MoveMode, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

fn main() -> ExitCode {
    userfaultfd_examples::run(move_a_page)
}

fn move_a_page() -> Result<()> {
    let mut memory = MmapMut::map_anon(page_size())?;
    let uffd = UffdBuilder::new().require_features(FeatureFlags::MOVE).create()?;
    uffd.register(memory.as_mut_ptr().cast(), memory.len())?;

    // A page that was made ready earlier: received from the network, decompressed.
    let mut ready = MmapMut::map_anon(page_size())?;
    ready.fill(b'M');

    let handler = thread::spawn(move || {
        let how = fill(&uffd, &mut ready)?;
        Ok::<_, userfaultfd::Error>((how, ready))
    });
    let byte = memory[page_size() - 1];
    let (how, ready) = handler.join().expect("the handler doesn't panic")?;
    println!("the page was {how}: main reads {}, the source holds {:?}", char::from(byte), ready[0]);
    Ok(())
}

/// Resolves one fault with the page at `ready`.
fn fill(uffd: &Uffd, ready: &mut MmapMut) -> userfaultfd::Result<&'static str> {
    let Some(Event::Pagefault { addr, .. }) = uffd.read_event()? else {
        unreachable!("only faults are asked for")
    };
    let source = ready.as_mut_ptr().cast();
    // SAFETY: nothing refers into the source, which is whole pages of this process; main, which waits at the
    // destination, takes any bytes.
    match unsafe { uffd.move_pages(source, addr, page_size(), MoveMode::empty()) } {
        // The source may turn out to be pinned, or shared with a child since a fork. Copying works then.
        Err(error) if error.errno() == Some(Errno::EBUSY) => {
            // SAFETY: the source is readable, and main takes any bytes.
            unsafe { uffd.copy(source, addr, page_size(), true)? };
            Ok("copied")
        }
        moved => moved.map(|_| "moved"),
    }
}
