//! One page, one fault, one copy: the README's program. Any kernel; no rights from Linux 5.11 on.

use std::{error::Error, thread};

use userfaultfd::{Event, UffdBuilder, page_size};

fn main() -> Result<(), Box<dyn Error>> {
    // Map one page and register it, so that its first access is reported to us.
    let mut memory = memmap2::MmapMut::map_anon(page_size())?;
    let uffd = UffdBuilder::new().create()?;
    uffd.register(memory.as_mut_ptr().cast(), memory.len())?;

    let handler = thread::spawn(move || {
        let Some(Event::Pagefault { addr, rw, .. }) = uffd.read_event()? else { unreachable!() };
        println!("{rw:?} fault at {addr:p}");
        let content = vec![42u8; page_size()];
        // SAFETY: `content` is a readable page, and any bytes are valid in `memory`.
        unsafe { uffd.copy(content.as_ptr().cast(), addr, page_size(), true) }
    });

    let byte = memory[0]; // sleeps here until the copy is done
    let copied = handler.join().unwrap()?;
    println!("copied {copied} bytes, the first is {byte}");
    assert_eq!(byte, 42);
    Ok(())
}
