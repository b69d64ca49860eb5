//! `ObjectSource`, against local files and a store that fails in every way.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod store;
mod upload;

use std::fs;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use userfaultfd::LazyMemory;
use userfaultfd::pager::{ObjectSource, PageData, PageSource, RemoteError, RemoteOptions};

use crate::store::{Fault, Faulty};
use crate::support::{page, require, test_name};

/// Bytes by which each place is known.
fn content(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|at| ((at / 7 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn put(store: &Arc<Faulty>, bytes: Vec<u8>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(store.put(&Path::from("object"), bytes.into())).unwrap();
}

fn open(store: &Arc<Faulty>, options: RemoteOptions) -> io::Result<ObjectSource> {
    let store: Arc<dyn ObjectStore> = Arc::<Faulty>::clone(store);
    ObjectSource::builder(store, "object").options(options).open()
}

fn read(source: &ObjectSource, offset: u64, len: usize) -> Result<Vec<u8>, RemoteError> {
    let mut bytes = vec![0xee; len];
    match source.read(offset, &mut bytes) {
        Ok(PageData::Zero) => Ok(vec![0; len]),
        Ok(PageData::Data) => Ok(bytes),
        Err(error) => Err(error.get_ref().unwrap().downcast_ref::<RemoteError>().unwrap().clone()),
    }
}

/// Patience for tests, which don't ask twice for what is slow.
fn soon() -> RemoteOptions {
    let options = RemoteOptions::new().retry_delay(Duration::from_millis(1)).hedge(false);
    options.give_up_after(Duration::from_secs(20))
}

#[test]
fn changed_local_file_is_an_error() {
    require!();
    let directory =
        std::env::temp_dir().join(format!("{}-{}", test_name!().replace("::", "-"), std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let bytes = content(3 * page() + 77, 0);
    fs::write(directory.join("image"), &bytes).unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(&directory).unwrap());
    let source = Arc::new(ObjectSource::open(Arc::clone(&store), "image").unwrap());
    assert_eq!(source.len(), Some(bytes.len() as u64));
    assert!(source.etag().is_some());
    let memory = LazyMemory::builder(Arc::clone(&source)).build().unwrap();
    assert_eq!(memory[..bytes.len()], bytes[..]);
    assert!(memory[bytes.len()..].iter().all(|byte| *byte == 0));
    // Another file of the same length in its place.
    fs::write(directory.join("new"), content(bytes.len(), 1)).unwrap();
    fs::rename(directory.join("new"), directory.join("image")).unwrap();
    assert!(matches!(read(&source, 0, 8), Err(RemoteError::Changed { .. })));
    fs::remove_file(directory.join("image")).unwrap();
    assert_eq!(read(&source, 0, 8), Err(RemoteError::NotFound { status: 404 }));
    assert_eq!(ObjectSource::open(store, "image").unwrap_err().kind(), ErrorKind::NotFound);
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn reads_are_pinned_and_changed_object_is_an_error() {
    require!();
    let store = Faulty::new();
    put(&store, content(10_000, 0));
    let source = open(&store, soon()).unwrap();
    assert_eq!(read(&source, 1000, 50), Ok(content(10_000, 0)[1000..1050].to_vec()));
    assert_eq!(read(&source, 9_990, 20).unwrap()[10..], [0; 10]);
    assert_eq!(read(&source, 20_000, 20), Ok(vec![0; 20]));
    let asked = store.asked();
    assert_eq!(asked, [(0..1, false), (1000..1050, true), (9_990..10_000, true)]);
    put(&store, content(10_000, 1));
    let changed = read(&source, 0, 10).unwrap_err();
    assert!(matches!(changed, RemoteError::Changed { .. }) && !changed.is_retryable(), "{changed}");
    assert_eq!(store.asked().len(), 4, "it isn't asked again");
}

#[test]
fn empty_object_and_missing_one_are_told_apart() {
    require!();
    let store = Faulty::new();
    assert_eq!(open(&store, soon()).unwrap_err().kind(), ErrorKind::NotFound);
    put(&store, Vec::new());
    let source = open(&store, soon()).unwrap();
    assert!(source.is_empty());
    assert_eq!(read(&source, 0, 10), Ok(vec![0; 10]));
}

#[test]
fn final_errors_have_names_and_are_not_asked_again() {
    require!();
    let store = Faulty::new();
    put(&store, content(10_000, 0));
    let source = open(&store, soon()).unwrap();
    let wrong = RemoteError::WrongRange { asked: "100-199".into(), found: "101-200".into() };
    for (fault, expected) in [
        (Fault::Forbidden, RemoteError::Forbidden { status: 403 }),
        (Fault::Unauthenticated, RemoteError::Forbidden { status: 401 }),
        (Fault::Says("status code: 404 Not Found"), RemoteError::NotFound { status: 404 }),
        (Fault::Says("Received non-partial response when range requested"), RemoteError::NoRanges),
        (Fault::Elsewhere, wrong),
        (Fault::Long, RemoteError::LongBody { expected: 100 }),
    ] {
        let before = store.asked().len();
        store.fail([fault]);
        assert_eq!(read(&source, 100, 100), Err(expected));
        assert_eq!(store.asked().len(), before + 1);
    }
}

#[test]
fn passing_errors_are_retried_until_content_comes() {
    require!();
    let store = Faulty::new();
    put(&store, content(10_000, 0));
    let source = open(&store, soon().request_timeout(Duration::from_millis(200))).unwrap();
    store.fail([
        Fault::Says("Server returned non-2xx status code: 503 Slow Down"),
        Fault::Says("connection reset by peer"),
        Fault::Short,
        Fault::Never,
    ]);
    assert_eq!(read(&source, 100, 100), Ok(content(10_000, 0)[100..200].to_vec()));
    assert_eq!(source.statistics().retries, 4);
    assert!(store.asked()[1..].iter().all(|(range, is_pinned)| *range == (100..200) && *is_pinned));
}

#[test]
fn read_gives_up_in_time_and_tells_the_last_error() {
    require!();
    let store = Faulty::new();
    put(&store, content(10_000, 0));
    let options = soon().request_timeout(Duration::from_secs(60)).give_up_after(Duration::from_millis(100));
    let source = open(&store, options).unwrap();
    store.fail([Fault::Says("status code: 500 Oops"), Fault::Never]);
    let start = Instant::now();
    let error = read(&source, 0, 10).unwrap_err();
    let RemoteError::GaveUp { after, .. } = &error else { panic!("{error}") };
    assert!(*after >= Duration::from_millis(100) && start.elapsed() < Duration::from_secs(30), "{error}");
    // The request that never ends has a thread of the source and is left behind: others go on.
    assert_eq!(read(&source, 0, 10), Ok(content(10_000, 0)[..10].to_vec()));
}

#[test]
fn near_reads_that_wait_become_one_request() {
    require!();
    let store = Faulty::new();
    put(&store, content(1_000_000, 0));
    let source = open(&store, soon().connections(1)).unwrap();
    // One connection, which is kept busy while the others come.
    store.fail([Fault::After(Duration::from_millis(300))]);
    thread::scope(|scope| {
        let source = &source;
        let read = move |at: u64| read(source, at * 5000, 1000);
        let first = scope.spawn(move || read(100));
        support::proc::wait_until(|| store.asked().len() == 2);
        let others: Vec<_> = (0..20).map(|at| scope.spawn(move || read(at))).collect();
        assert!(first.join().unwrap().is_ok());
        for (at, other) in others.into_iter().enumerate() {
            assert_eq!(
                other.join().unwrap(),
                Ok(content(1_000_000, 0)[at * 5000..at * 5000 + 1000].to_vec())
            );
        }
    });
    let statistics = source.statistics();
    assert!(statistics.merged > 0 && statistics.requests < 21, "{statistics:?}");
}

#[test]
fn source_on_the_programs_runtime_may_end_inside_a_task() {
    require!();
    let store = Faulty::new();
    put(&store, content(10_000, 0));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let of_store: Arc<dyn ObjectStore> = Arc::<Faulty>::clone(&store);
    let source = ObjectSource::builder(of_store, "object").runtime(runtime.handle().clone()).open().unwrap();
    assert_eq!(read(&source, 5, 10), Ok(content(10_000, 0)[5..15].to_vec()));
    let own = open(&store, soon()).unwrap();
    runtime.block_on(async move { drop((source, own)) });
}
