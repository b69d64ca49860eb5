//! Content from futures on a tokio runtime.

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::Barrier;
use userfaultfd::LazyMemory;
use userfaultfd::pager::{AsyncSource, FaultAround, Loaded, PageBuffer, RetryPolicy, TokioSource};

use crate::support::{page, require};

fn runtime(threads: usize) -> Runtime {
    Builder::new_multi_thread().worker_threads(threads).build().unwrap()
}

/// The first byte of a page.
fn byte(offset: u64) -> u8 {
    (offset / page() as u64 % 251 + 1) as u8
}

#[test]
fn many_futures_are_in_flight_on_one_thread() {
    require!();
    const LOADS: usize = 100;
    let runtime = runtime(1);
    // No load ends before all have begun.
    let all = Arc::new(Barrier::new(LOADS));
    let source = TokioSource::new(runtime.handle().clone(), move |offset, mut page: PageBuffer| {
        let all = Arc::clone(&all);
        async move {
            all.wait().await;
            page.fill(byte(offset));
            Ok(Loaded::Data(page))
        }
    });
    let source = AsyncSource::new(source.unwrap().with_len((LOADS * page()) as u64));
    let memory = LazyMemory::builder(source).fault_around(FaultAround::Page).build().unwrap();
    let memory = &memory;
    thread::scope(|scope| {
        let read = |at: usize| scope.spawn(move || memory[at * page()]);
        let readers: Vec<_> = (0..LOADS).map(read).collect();
        for (at, reader) in readers.into_iter().enumerate() {
            assert_eq!(reader.join().unwrap(), byte((at * page()) as u64));
        }
    });
    assert_eq!(memory.statistics().source_reads, LOADS as u64);
}

#[test]
fn panicking_and_failing_futures_are_retried() {
    require!();
    let runtime = runtime(2);
    let calls = AtomicUsize::new(0);
    let source = TokioSource::new(runtime.handle().clone(), move |offset, mut page: PageBuffer| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        async move {
            assert!(call != 0, "on purpose");
            page.fill(byte(offset));
            if call == 1 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Loaded::Data(page)) }
        }
    });
    let retry = RetryPolicy { attempts: 3, delay: Duration::from_millis(1) };
    let source = AsyncSource::new(source.unwrap());
    let memory = LazyMemory::builder(source).len(4 * page()).retry(retry).build().unwrap();
    assert_eq!(memory[2 * page()], byte(2 * page() as u64));
    assert_eq!(memory.statistics().source_errors, 2);
}

#[test]
fn runtime_that_ends_fails_its_loads() {
    require!();
    let runtime = runtime(1);
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    let source = TokioSource::new(runtime.handle().clone(), move |_, page: PageBuffer| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            std::future::pending::<()>().await;
            Ok(Loaded::Data(page))
        }
    });
    let retry = RetryPolicy { attempts: 1, delay: Duration::ZERO };
    let source = AsyncSource::new(source.unwrap());
    let memory = LazyMemory::builder(source).len(page()).retry(retry).build().unwrap();
    thread::scope(|scope| {
        let reading = scope.spawn(|| memory.read_at(0, &mut [0]));
        support::proc::wait_until(|| started.load(Ordering::SeqCst) > 0);
        runtime.shutdown_background();
        assert!(reading.join().unwrap().is_err());
    });
}

#[test]
fn current_thread_runtime_is_refused() {
    require!();
    let runtime = Builder::new_current_thread().build().unwrap();
    let source = TokioSource::new(runtime.handle().clone(), |_, page| async move { Ok(Loaded::Data(page)) });
    assert_eq!(source.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn waiting_in_task_is_refused_and_in_spawn_blocking_works() {
    require!();
    let runtime = runtime(2);
    let memory = || {
        let source = TokioSource::new(runtime.handle().clone(), |offset, mut page: PageBuffer| async move {
            let pages = page.chunks_mut(support::page()).zip(offset / support::page() as u64..);
            pages.for_each(|(page, at)| page.fill(byte(at * support::page() as u64)));
            Ok(Loaded::Data(page))
        });
        let retry = RetryPolicy { attempts: 1, delay: Duration::ZERO };
        let memory = LazyMemory::builder(AsyncSource::new(source.unwrap())).len(2 * page()).retry(retry);
        Arc::new(memory.on_problem(|_| {}).build().unwrap())
    };
    let (refused, filled) = (memory(), memory());
    let (in_task, blocking) = (Arc::clone(&refused), Arc::clone(&filled));
    let in_task = runtime.block_on(async move { tokio::spawn(async move { in_task.fill(|_| {}) }).await });
    in_task.unwrap().unwrap_err();
    assert!(refused.statistics().source_errors > 0);
    runtime
        .block_on(async move { tokio::task::spawn_blocking(move || blocking.fill(|_| {})).await })
        .unwrap()
        .unwrap();
    assert_eq!(filled[page()], byte(page() as u64));
}
