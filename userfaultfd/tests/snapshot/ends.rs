//! How a snapshot ends: complete, aborted, by an error of its sink.

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use userfaultfd::FeatureFlags;
use userfaultfd::snapshot::{Content, Error, Geometry, Options, Sink, Snapshot};

use crate::image::{Image, addresses, content, number};
use crate::support::memory::Memory;
use crate::support::{page, proc, require};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

fn large() -> Memory {
    let memory = Memory::anonymous(8 * (256 << 10) / page());
    number(&memory, 1);
    memory
}

/// Every page can be written, and another userfaultfd may have the memory.
#[track_caller]
fn assert_free(memory: &Memory) {
    let written = number(memory, 5);
    assert_eq!(content(memory), written);
    let image = Image::new();
    Snapshot::begin(addresses(memory), image.clone()).unwrap().wait().unwrap();
    assert_eq!(image.content(memory), written);
}

#[test]
fn aborted_snapshot_frees_its_memory() {
    require!(WRITE_PROTECT);
    let memory = large();
    let image = Image::closed();
    let snapshot = Options::new().range(addresses(&memory)).buffer(0).begin(image.clone()).unwrap();
    image.wait_for_piece();
    // Some wait already, since no buffer is free.
    thread::scope(|scope| {
        let (memory, pages) = (&memory, memory.pages());
        let writers: Vec<_> =
            (1..8).map(|page| scope.spawn(move || memory.write(pages - page, 99))).collect();
        snapshot.abort();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    image.open();
    let error = snapshot.wait().map(drop).unwrap_err();
    assert!(matches!(error, Error::Aborted), "{error:?}");
    assert!(!image.with(|delivered| delivered.finished));
    assert_free(&memory);
}

#[test]
fn dropping_a_snapshot_aborts_it() {
    require!(WRITE_PROTECT);
    let memory = large();
    let image = Image::closed();
    let snapshot = Options::new().range(addresses(&memory)).buffer(0).begin(image.clone()).unwrap();
    image.wait_for_piece();
    thread::scope(|scope| {
        let (tell, dropping) = std::sync::mpsc::channel();
        scope.spawn(move || {
            tell.send(proc::thread_id()).unwrap();
            drop(snapshot);
        });
        memory.write(memory.pages() - 1, 99);
        // It waits for the sink, which is closed: it has been aborted by now.
        proc::wait_until_in(dropping.recv().unwrap(), libc::SYS_futex);
        image.open();
    });
    assert!(!image.with(|delivered| delivered.finished));
    assert_free(&memory);
}

#[test]
fn error_of_sink_is_error_of_snapshot() {
    require!(WRITE_PROTECT);
    let memory = large();
    for piece in 1..4 {
        let image = Image::new();
        image.with(|delivered| delivered.fails_at = Some(piece));
        let error = Snapshot::begin(addresses(&memory), image.clone()).unwrap().wait().map(drop).unwrap_err();
        let Error::Sink(error) = error else { panic!("{error:?}") };
        assert_eq!(error.to_string(), "it is full");
        assert_eq!(image.with(|delivered| (delivered.order.len(), delivered.finished)), (piece, false));
        assert_free(&memory);
    }
}

#[test]
fn sink_that_cannot_begin_costs_nothing() {
    require!(WRITE_PROTECT);
    let memory = large();
    let image = Image::new();
    image.with(|delivered| delivered.fails_at = Some(0));
    let error = Snapshot::begin(addresses(&memory), image).map(drop).unwrap_err();
    assert!(matches!(error, Error::Sink(_)), "{error:?}");
    assert_free(&memory);
}

#[test]
fn sink_that_panics_is_an_error() {
    require!(WRITE_PROTECT);
    let memory = large();
    let sink = |_: u64, _: Content<'_>| -> io::Result<()> { panic!("as it is told to") };
    let error = Snapshot::begin(addresses(&memory), sink).unwrap().wait().map(drop).unwrap_err();
    assert!(matches!(error, Error::SinkPanicked), "{error:?}");
    assert_free(&memory);
}

/// A sink that drops its snapshot, and tells whether that panicked.
struct Dropping {
    snapshot: Arc<Mutex<Option<Snapshot<Dropping>>>>,
    panicked: mpsc::Sender<bool>,
}

impl Sink for Dropping {
    fn write(&mut self, _: u64, _: Content<'_>) -> io::Result<()> {
        let own = &self.snapshot;
        proc::wait_until(|| own.lock().unwrap().is_some());
        let snapshot = own.lock().unwrap().take();
        let dropped = panic::catch_unwind(AssertUnwindSafe(|| drop(snapshot)));
        self.panicked.send(dropped.is_err()).unwrap();
        Ok(())
    }
}

#[test]
fn sink_may_drop_its_snapshot() {
    require!(WRITE_PROTECT);
    let memory = large();
    let (tell, panicked) = mpsc::channel();
    let slot = Arc::new(Mutex::new(None));
    let sink = Dropping { snapshot: Arc::clone(&slot), panicked: tell };
    let snapshot = Snapshot::begin(addresses(&memory), sink).unwrap();
    *slot.lock().unwrap() = Some(snapshot);
    assert!(!panicked.recv().unwrap());
    // It ends once the sink has returned.
    assert!(panicked.recv().is_err());
    assert_free(&memory);
}

#[test]
fn writers_do_not_wait_for_the_sink_once_all_is_saved() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(4);
    let before = number(&memory, 1);
    let image = Image::closed();
    let snapshot = Snapshot::begin(addresses(&memory), image.clone()).unwrap();
    while snapshot.progress().saved < memory.len() as u64 {
        thread::yield_now();
    }
    memory.write(0, 99);
    image.open();
    let progress = snapshot.wait().unwrap().progress;
    assert_eq!(progress.saved, memory.len() as u64);
    assert_eq!(image.content(&memory), before);
}

#[test]
fn snapshot_waiting_for_sink_can_be_aborted() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(4);
    number(&memory, 1);
    let image = Image::closed();
    let snapshot = Snapshot::begin(addresses(&memory), image.clone()).unwrap();
    while snapshot.progress().saved < memory.len() as u64 {
        thread::yield_now();
    }
    snapshot.abort();
    image.open();
    let error = snapshot.wait().map(drop).unwrap_err();
    assert!(matches!(error, Error::Aborted), "{error:?}");
    assert!(!image.with(|delivered| delivered.finished));
}

/// The next snapshot of a series holds everything as long as none was completed, and nobody waits for what panicked.
#[test]
fn series_goes_on_after_sinks_that_fail_and_panic() {
    require!(WRITE_PROTECT);
    struct Panics {
        at: usize,
        calls: usize,
    }
    /// What it panics with panics, too.
    struct Again;
    impl Drop for Again {
        fn drop(&mut self) {
            assert!(thread::panicking(), "again");
        }
    }
    impl Panics {
        fn call(&mut self) -> io::Result<()> {
            self.calls += 1;
            if self.calls > self.at {
                std::panic::panic_any(Again);
            }
            Ok(())
        }
    }
    impl Sink for Panics {
        fn begin(&mut self, _: &Geometry) -> io::Result<()> {
            self.call()
        }
        fn write(&mut self, _: u64, _: Content<'_>) -> io::Result<()> {
            self.call()
        }
        fn finish(&mut self) -> io::Result<()> {
            self.call()
        }
    }
    let memory = large();
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    for at in 0..4 {
        let result = series.begin(Panics { at, calls: 0 }).and_then(|snapshot| snapshot.wait().map(drop));
        assert!(matches!(result, Err(Error::SinkPanicked)), "{at} {result:?}");
        // Nobody waits.
        number(&memory, at);
    }
    let failing = Image::new();
    failing.with(|delivered| delivered.fails_at = Some(1));
    series.begin(failing).unwrap().wait().map(drop).unwrap_err();
    let written = number(&memory, 7);
    let image = Image::new();
    series.begin(image.clone()).unwrap().wait().unwrap();
    assert!(!image.with(|delivered| delivered.geometry.as_ref().unwrap().incremental));
    assert_eq!(image.content(&memory), written);
    let next = Image::new();
    series.begin(next.clone()).unwrap().wait().unwrap();
    assert!(next.with(|delivered| delivered.geometry.as_ref().unwrap().incremental));
    assert!(next.pages().is_empty());
}
