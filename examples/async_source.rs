//! Memory from futures: a thousand loads in flight, each of which takes 20 ms, on two threads of a tokio runtime.
//!
//! ```sh
//! cargo run --release --example async_source --features tokio
//! ```
//!
//! Any kernel; no rights from Linux 5.11 on.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{AsyncSource, FaultAround, Loaded, PageBuffer, TokioSource};
use userfaultfd_examples::Result;

/// Pages, each of which a thread of its own reads.
const PAGES: usize = 1000;

/// How long the store takes for an answer.
const LATENCY: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    userfaultfd_examples::run(read)
}

/// What each byte of a page of the store is.
fn byte(offset: u64) -> u8 {
    (offset / userfaultfd::page_size() as u64 % 251) as u8
}

fn read() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build()?;
    let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let counting = Arc::clone(&counts);
    let source = TokioSource::new(runtime.handle().clone(), move |offset, mut page: PageBuffer| {
        let counts = Arc::clone(&counting);
        async move {
            let [in_flight, most] = &*counts;
            most.fetch_max(in_flight.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(LATENCY).await;
            in_flight.fetch_sub(1, Ordering::SeqCst);
            page.fill(byte(offset));
            Ok(Loaded::Data(page))
        }
    })?;
    let page = userfaultfd::page_size();
    let memory = LazyMemory::builder(AsyncSource::new(source)).len(PAGES * page);
    let memory = memory.fault_around(FaultAround::Page).build()?;
    let (start, memory) = (Instant::now(), &memory);
    let wrong = thread::scope(|scope| {
        // Threads of the program read: those of the runtime load.
        let read = move |at: usize| memory[at * page] != byte((at * page) as u64);
        let spawn = |at| thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, move || read(at));
        let readers = (0..PAGES).map(spawn).collect::<std::io::Result<Vec<_>>>()?;
        let wrong = readers.into_iter().map(|reader| reader.join().unwrap_or(true));
        std::io::Result::Ok(wrong.filter(|wrong| *wrong).count())
    })?;
    println!("{PAGES} pages in {:.1?}, one after the other {:.1?}", start.elapsed(), LATENCY * PAGES as u32);
    println!("{} loads in flight at most", counts[1].load(Ordering::SeqCst));
    if wrong == 0 { Ok(()) } else { Err(format!("{wrong} pages aren't what the store has").into()) }
}
