//! A fault loop in a tokio program: each fault is a task that awaits its content.
//!
//! ```sh
//! cargo run --example tokio_loop --features tokio
//! ```
//!
//! Any kernel; no rights from Linux 5.11 on.

use std::ffi::c_void;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use tokio::task::JoinSet;
use tokio::time::sleep;
use userfaultfd::{AsyncUffd, Errno, Error, Event, EventBuffer, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::Result;

/// Pages, each of which a thread of its own touches.
const PAGES: usize = 32;

/// What the content of a page takes to arrive.
const LATENCY: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let mut memory = MmapMut::map_anon(PAGES * page_size())?;
        let (start, len) = (memory.as_mut_ptr(), memory.len());
        let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create()?;
        uffd.register(start.cast(), len)?;
        let begin = Instant::now();

        // The threads that touch the memory aren't the runtime's: a thread of the runtime that waits for a page
        // can't run the task that brings it.
        let first = start.addr();
        let memory = &memory[..];
        let read = thread::scope(|scope| -> Result<Vec<u8>> {
            let readers: Vec<_> =
                (0..PAGES).map(|number| scope.spawn(move || memory[number * page_size()])).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            // If this fails the descriptor is closed, and the readers go on with zeros: the check below sees that.
            runtime.block_on(serve(uffd, first))?;
            Ok(readers.into_iter().map(|reader| reader.join().expect("reading doesn't panic")).collect())
        })?;
        if let Some(number) = (0..PAGES).find(|number| read[*number] != content(*number)) {
            return Err(format!("page {number} holds {}", read[number]).into());
        }
        println!("{PAGES} threads have read {PAGES} pages");
        eprintln!("in {:.1?}, where each took {LATENCY:?} to arrive", begin.elapsed());
        Ok(())
    })
}

fn content(number: usize) -> u8 {
    number as u8 + 1
}

/// Resolves faults until every page is there.
async fn serve(uffd: Uffd, first: usize) -> Result<()> {
    let uffd = Arc::new(AsyncUffd::with_tokio(uffd)?);
    let filled = Arc::new(AtomicUsize::new(0));
    let mut events = EventBuffer::new(64);
    let mut tasks = JoinSet::new();
    while filled.load(Ordering::Relaxed) < PAGES {
        tokio::select! {
            read = uffd.read_batch(&mut events) => {
                read?;
                for event in events.changes_first().drain() {
                    let Event::Pagefault { addr, .. } = event? else { continue };
                    let page = addr.map_addr(|addr| addr & !(page_size() - 1)).expose_provenance();
                    let (uffd, filled) = (Arc::clone(&uffd), Arc::clone(&filled));
                    tasks.spawn(async move {
                        let content = load((page - first) / page_size()).await;
                        fill(&uffd, page, &content).await?;
                        filled.fetch_add(1, Ordering::Relaxed);
                        Ok::<_, Error>(())
                    });
                }
            }
            Some(ended) = tasks.join_next() => ended??,
        }
    }
    Ok(())
}

/// Stands for a request over a network.
async fn load(number: usize) -> Vec<u8> {
    sleep(LATENCY).await;
    vec![content(number); page_size()]
}

/// Puts a page in place. The waiting thread goes on in any case but an error.
async fn fill(uffd: &Uffd, page: usize, content: &[u8]) -> userfaultfd::Result<()> {
    let dst = || std::ptr::with_exposed_provenance_mut::<c_void>(page);
    loop {
        // SAFETY: `content` is a page that can be read, and the bytes that belong at `page`, where no thread has seen others.
        match unsafe { uffd.copy(content.as_ptr().cast(), dst(), content.len(), true) } {
            Ok(_) => return Ok(()),
            // Filled for another thread: this one may still sleep.
            Err(Error::CopyFailed(Errno::EEXIST)) => return uffd.wake(dst(), content.len()),
            // Unmapped: no thread waits there any more.
            Err(Error::CopyFailed(Errno::ENOENT)) => return Ok(()),
            // The layout changes: other tasks go on, one of which reads the event.
            Err(error) if error.is_retryable() => tokio::task::yield_now().await,
            Err(error) => return Err(error),
        }
    }
}
