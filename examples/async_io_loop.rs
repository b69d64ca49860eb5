//! A fault loop on async-io, which needs no runtime: each page is a task of a small executor.
//!
//! ```sh
//! cargo run --example async_io_loop --features async-io
//! ```
//!
//! Any kernel; no rights from Linux 5.11 on.

use std::collections::HashMap;
use std::ffi::c_void;
use std::process::ExitCode;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use async_executor::LocalExecutor;
use async_io::Timer;
use memmap2::MmapMut;
use userfaultfd::{AsyncUffd, Errno, Error, Event, EventBuffer, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

/// Pages, and threads that touch them: two each.
const PAGES: usize = 32;
const THREADS: usize = 2 * PAGES;

/// What the content of a page takes to arrive.
const LATENCY: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let mut memory = MmapMut::map_anon(PAGES * page_size())?;
        let (start, len) = (memory.as_mut_ptr(), memory.len());
        let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create()?;
        uffd.register(start.cast(), len)?;
        let begin = Instant::now();

        let (first, memory) = (start.addr(), &memory[..]);
        let read = thread::scope(|scope| -> Result<Vec<u8>> {
            let readers: Vec<_> = (0..THREADS)
                .map(|number| scope.spawn(move || memory[number % PAGES * page_size()]))
                .collect();
            let executor = LocalExecutor::new();
            // If this fails the descriptor is closed, and the readers go on with zeros: the check below sees that.
            async_io::block_on(executor.run(serve(&executor, uffd, first)))?;
            Ok(readers.into_iter().map(|reader| reader.join().expect("reading doesn't panic")).collect())
        })?;
        if let Some(number) = (0..THREADS).find(|number| read[*number] != content(*number % PAGES)) {
            return Err(format!("thread {number} has read {}", read[number]).into());
        }
        println!("{THREADS} threads have read {PAGES} pages");
        eprintln!("in {:.1?}, where each page took {LATENCY:?} to arrive", begin.elapsed());
        Ok(())
    })
}

fn content(number: usize) -> u8 {
    number as u8 + 1
}

/// Resolves faults until every page is there.
async fn serve(executor: &LocalExecutor<'_>, uffd: Uffd, first: usize) -> Result<()> {
    let uffd = Rc::new(AsyncUffd::with_async_io(uffd)?);
    let mut events = EventBuffer::new(64);
    let mut loads = HashMap::new();
    while loads.len() < PAGES {
        uffd.read_batch(&mut events).await?;
        for event in events.changes_first().drain() {
            let Event::Pagefault { addr, .. } = event? else { continue };
            let page = addr.map_addr(|addr| addr & !(page_size() - 1)).expose_provenance();
            // The fill of a load that is on its way wakes this thread, too.
            loads.entry(page).or_insert_with(|| {
                let uffd = Rc::clone(&uffd);
                executor.spawn(async move {
                    let content = load((page - first) / page_size()).await;
                    fill(&uffd, page, &content).await
                })
            });
        }
    }
    for load in loads.into_values() {
        load.await?;
    }
    Ok(())
}

/// Stands for a request over a network.
async fn load(number: usize) -> Vec<u8> {
    Timer::after(LATENCY).await;
    vec![content(number); page_size()]
}

/// Puts a page in place. All threads that wait for it go on.
async fn fill(uffd: &Uffd, page: usize, content: &[u8]) -> userfaultfd::Result<()> {
    let dst = std::ptr::with_exposed_provenance_mut::<c_void>(page);
    loop {
        // SAFETY: `content` is a page that can be read, and the bytes that belong at `page`, where no thread has seen others.
        match unsafe { uffd.copy(content.as_ptr().cast(), dst, content.len(), true) } {
            Ok(_) => return Ok(()),
            // Unmapped: no thread waits there any more.
            Err(Error::CopyFailed(Errno::ENOENT)) => return Ok(()),
            // The layout changes: other tasks go on, one of which reads the event.
            Err(error) if error.is_retryable() => drop(Timer::after(Duration::ZERO).await),
            Err(error) => return Err(error),
        }
    }
}
