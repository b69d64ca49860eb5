//! HttpSource, against a server that answers right, late, wrong, or not at all; and against nginx.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod nginx;
mod web;

use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{FaultAround, HttpSource, PageData, PageSource, RemoteError, RemoteOptions};

use crate::support::gate::Gate;
use crate::support::proc::{thread_id, wait_until_in};
use crate::support::{page, require};
use crate::web::{Answer, Web};

/// Bytes that tell where they are.
pub(crate) fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 3 % 251 + 1) as u8).collect()
}

fn open(web: &Web, options: RemoteOptions) -> HttpSource {
    HttpSource::builder(web.url()).options(options).open().unwrap()
}

fn remote(error: &io::Error) -> RemoteError {
    error.get_ref().and_then(|error| error.downcast_ref::<RemoteError>()).expect("a RemoteError").clone()
}

#[track_caller]
pub(crate) fn check(source: &impl PageSource, expected: &[u8], offset: usize, len: usize) {
    let mut bytes = vec![0xee; len];
    let found = source.read(offset as u64, &mut bytes).unwrap();
    let rest = &expected[offset.min(expected.len())..];
    if found == PageData::Zero {
        assert!(rest.is_empty(), "{len} at {offset}");
        return;
    }
    let inside = rest.len().min(len);
    assert!(
        bytes[..inside] == rest[..inside] && bytes[inside..].iter().all(|byte| *byte == 0),
        "{len} at {offset}"
    );
}

#[test]
fn reads_of_many_threads_reuse_connections() {
    require!();
    let bytes = content(300_001);
    let web = Web::new(bytes.clone());
    let source = HttpSource::builder(web.url()).header("X-Key", "secret").open().unwrap();
    assert_eq!((source.len(), source.etag()), (Some(300_001), Some("\"one\"")));
    assert!(!format!("{source:?}").contains("secret"));
    thread::scope(|scope| {
        for thread in 0..4 {
            let (source, bytes) = (&source, &bytes);
            scope.spawn(move || {
                for step in 0..50 {
                    check(source, bytes, (thread * 77_777 + step * 6007) % 300_100, 1 + step * 100);
                }
            });
        }
    });
    check(&source, &bytes, 0, 400_000);
    let statistics = source.statistics();
    // Second requests may be on their way, whose answers nobody waits for.
    web.wait_for(1 + statistics.requests as usize);
    let requests = web.requests();
    assert_eq!(statistics.requests as usize, requests.len() - 1, "{statistics:?}");
    assert!(requests.iter().all(|request| request.header("x-key") == Some("secret")));
    assert!(requests[1..].iter().all(|request| request.header("if-match") == Some("\"one\"")));
    // One for each of the threads, with a second one of each for what took long, and that of the opening.
    assert!(web.connections.load(Ordering::SeqCst) <= 9, "{:?}", web.connections);
}

#[test]
fn every_wrong_answer_is_a_final_error_by_name() {
    require!();
    let web = Web::new(content(10_000));
    let source = open(&web, RemoteOptions::new());
    let wrong = |found: &str| RemoteError::WrongRange { asked: "100-199".into(), found: found.into() };
    for (answer, expected, kind) in [
        (Answer::Whole, RemoteError::NoRanges, ErrorKind::Unsupported),
        (Answer::Said("bytes 101-200/10000"), wrong("bytes 101-200/10000"), ErrorKind::InvalidData),
        (Answer::Said("bytes 100-198/10000"), wrong("bytes 100-198/10000"), ErrorKind::InvalidData),
        (Answer::Said(""), wrong("no Content-Range"), ErrorKind::InvalidData),
        (
            Answer::Said("bytes 100-199/9999"),
            RemoteError::Changed { was: "10000 bytes".into(), found: "9999 bytes".into() },
            ErrorKind::InvalidData,
        ),
        (
            Answer::Said("bytes 100-199/*"),
            RemoteError::Unusable("the length of the object isn't told: 100-199/*".into()),
            ErrorKind::InvalidData,
        ),
        (Answer::Long, RemoteError::LongBody { expected: 100 }, ErrorKind::InvalidData),
        (Answer::Status(401, None), RemoteError::Forbidden { status: 401 }, ErrorKind::PermissionDenied),
        (Answer::Status(403, None), RemoteError::Forbidden { status: 403 }, ErrorKind::PermissionDenied),
        (Answer::Status(404, None), RemoteError::NotFound { status: 404 }, ErrorKind::NotFound),
        (Answer::Status(410, None), RemoteError::NotFound { status: 410 }, ErrorKind::NotFound),
        (Answer::Status(418, None), RemoteError::Unusable("status 418".into()), ErrorKind::InvalidData),
        (
            Answer::Status(416, None),
            RemoteError::Changed { was: "10000 bytes".into(), found: "shorter".into() },
            ErrorKind::InvalidData,
        ),
    ] {
        let before = web.requests().len();
        web.answer(move |_, _| answer.clone());
        let error = source.read(100, &mut [0; 100]).unwrap_err();
        assert_eq!((remote(&error), error.kind()), (expected, kind));
        assert_eq!(web.requests().len(), before + 1, "{error}");
        assert!(!remote(&error).is_retryable());
    }
    // It isn't broken by that.
    web.answer(|_, _| Answer::Right);
    check(&source, &content(10_000), 100, 100);
}

#[test]
fn failures_that_pass_are_retried_soon() {
    require!();
    let bytes = content(10_000);
    let web = Web::new(bytes.clone());
    let source = open(&web, RemoteOptions::new().hedge(false));
    let mut requests = 0;
    for answer in [
        Answer::Reset,
        Answer::Cut(0),
        Answer::Cut(57),
        Answer::Short,
        Answer::Status(500, None),
        Answer::Status(503, Some(0)),
        Answer::Status(429, None),
        Answer::Status(408, None),
    ] {
        // Twice in a row.
        web.answer(move |number, _| if number < 2 { answer.clone() } else { Answer::Right });
        check(&source, &bytes, 100, 100);
        requests += 3;
        let statistics = source.statistics();
        assert_eq!((statistics.requests, statistics.retries), (requests, requests / 3 * 2));
    }
    // The opening is as patient.
    let web = Web::new(bytes.clone());
    web.answer(|number, _| if number < 2 { Answer::Status(503, None) } else { Answer::Right });
    check(&open(&web, RemoteOptions::new()), &bytes, 0, 10_000);
}

#[test]
fn a_read_gives_up_and_tells_the_last_reason() {
    require!();
    let web = Web::new(content(1000));
    let source = open(&web, RemoteOptions::new().give_up_after(Duration::from_millis(300)));
    web.answer(|_, _| Answer::Status(503, None));
    let begun = Instant::now();
    let error = source.read(0, &mut [0; 100]).unwrap_err();
    let RemoteError::GaveUp { attempts, last, .. } = remote(&error) else { panic!("{error}") };
    assert_eq!(*last, RemoteError::Busy { status: 503, retry_after: None });
    // After 10, 20, 40, 80 ms; 160 more would be too late.
    assert!((2..=5).contains(&attempts), "{attempts}");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(begun.elapsed() >= Duration::from_millis(100) && remote(&error).is_retryable());

    // A server that says nothing.
    let gate = Gate::default();
    let held = gate.clone();
    web.answer(move |_, _| Answer::Late(held.clone()));
    let error = source.read(0, &mut [0; 100]).unwrap_err();
    assert!(matches!(remote(&error), RemoteError::GaveUp { .. }), "{error}");
    gate.open();
    let timeout = Duration::from_millis(50);
    let source = open(&web, RemoteOptions::new().request_timeout(timeout).give_up_after(4 * timeout));
    let gate = Gate::default();
    let held = gate.clone();
    web.answer(move |_, _| Answer::Late(held.clone()));
    let error = source.read(0, &mut [0; 100]).unwrap_err();
    let RemoteError::GaveUp { last, .. } = remote(&error) else { panic!("{error}") };
    assert_eq!(*last, RemoteError::TimedOut(timeout));
    gate.open();
}

#[test]
fn retry_after_is_obeyed() {
    require!();
    let bytes = content(1000);
    let web = Web::new(bytes.clone());
    let source = open(&web, RemoteOptions::new());
    web.answer(|number, _| if number == 0 { Answer::Status(503, Some(1)) } else { Answer::Right });
    check(&source, &bytes, 0, 100);
    let requests = web.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests[2].came - requests[1].came >= Duration::from_secs(1));
    // What is later than the end of all patience isn't waited for.
    web.answer(|_, _| Answer::Status(429, Some(3600)));
    let begun = Instant::now();
    let error = source.read(0, &mut [0; 100]).unwrap_err();
    let RemoteError::GaveUp { attempts: 1, last, .. } = remote(&error) else { panic!("{error}") };
    assert_eq!(*last, RemoteError::Busy { status: 429, retry_after: Some(Duration::from_secs(3600)) });
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_object_that_changed_is_an_error_and_never_mixed_pages() {
    require!();
    let changed = |was: &str, found: &str| RemoteError::Changed { was: was.into(), found: found.into() };
    for (etag, modified, new_etag, new_modified, expected) in [
        (Some("\"one\""), None, Some("\"two\""), None, changed("\"one\"", "\"two\"")),
        // Can't be asked for, and is compared.
        (Some("W/\"one\""), None, Some("W/\"two\""), None, changed("W/\"one\"", "W/\"two\"")),
        (Some("\"one\""), None, None, None, changed("\"one\"", "another")),
        (None, Some("Mon"), None, Some("Tue"), changed("Mon", "Tue")),
    ] {
        let web = Web::new(content(1000));
        let set = |etag: Option<&str>, modified: Option<&str>| {
            let mut object = web.object.lock().unwrap();
            (object.etag, object.modified) = (etag.map(str::to_owned), modified.map(str::to_owned));
        };
        set(etag, modified);
        let source = open(&web, RemoteOptions::new());
        check(&source, &content(1000), 0, 100);
        set(new_etag, new_modified);
        web.object.lock().unwrap().bytes.fill(0);
        let error = source.read(0, &mut [0; 100]).unwrap_err();
        assert_eq!((remote(&error), error.kind()), (expected, ErrorKind::InvalidData));
        // It came back.
        set(etag, modified);
        source.read(0, &mut [0; 100]).unwrap();
    }
}

#[test]
fn first_of_two_answers_counts_after_a_slow_one() {
    require!();
    let bytes = content(100_000);
    let web = Web::new(bytes.clone());
    let source = open(&web, RemoteOptions::new());
    (0..20).for_each(|at| check(&source, &bytes, at * 100, 100));
    let (gate, before) = (Gate::default(), source.statistics());
    // A second request of these, for which nobody waits, isn't the one that is held up.
    web.wait_for(1 + before.requests as usize);
    let held = gate.clone();
    web.answer(move |number, _| if number == 0 { Answer::Late(held.clone()) } else { Answer::Right });
    // Returns, though the first answer never comes.
    check(&source, &bytes, 5000, 100);
    let after = source.statistics();
    assert_eq!((after.hedges - before.hedges, after.retries - before.retries), (1, 0));
    assert_eq!(after.requests - before.requests, 2);
    gate.open();
    // Nobody waits for what is read ahead.
    let gate = Gate::default();
    let held = gate.clone();
    web.answer(move |_, _| Answer::Late(held.clone()));
    let options = RemoteOptions::new().give_up_after(Duration::from_millis(300));
    web.answer(|_, _| Answer::Right);
    let source = open(&web, options);
    (0..20).for_each(|at| check(&source, &bytes, at * 100, 100));
    let before = source.statistics();
    let held = gate.clone();
    web.answer(move |_, _| Answer::Late(held.clone()));
    source.read_early(5000, &mut [0; 100]).unwrap_err();
    assert_eq!(source.statistics().hedges, before.hedges);
    gate.open();
}

/// Starts reads that wait for the only connection, which is busy until the gate is opened. Each waits before the next.
fn queue(source: &Arc<HttpSource>, reads: &[(usize, bool)]) -> Vec<thread::JoinHandle<()>> {
    let start = |(offset, is_early): &(usize, bool)| {
        let (source, offset, is_early) = (Arc::clone(source), *offset, *is_early);
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            tell.send(thread_id()).unwrap();
            let mut bytes = [0; 100];
            let read = if is_early { HttpSource::read_early } else { HttpSource::read };
            read(&source, offset as u64, &mut bytes).unwrap();
            assert!(bytes == content(1_000_000)[offset..offset + 100], "{offset}");
        });
        wait_until_in(told.recv().unwrap(), libc::SYS_futex);
        thread
    };
    reads.iter().map(start).collect()
}

#[test]
fn faults_go_before_reads_ahead_and_neighbours_go_along() {
    require!();
    let web = Web::new(content(1_000_000));
    let options = RemoteOptions::new().connections(1).hedge(false).merge(1000, 10_000);
    let source = Arc::new(open(&web, options));
    let gate = Gate::default();
    let held = gate.clone();
    web.answer(move |number, _| if number == 0 { Answer::Late(held.clone()) } else { Answer::Right });
    let mut threads = queue(&source, &[(0, false)]);
    web.wait_for(2);
    let ahead = [(100_000, true), (200_000, true), (200_500, true), (202_000, true), (300_000, true)];
    threads.extend(queue(&source, &ahead));
    // The second of these is as near to the first as a read ahead is.
    threads.extend(queue(&source, &[(500_000, false), (300_900, false)]));
    gate.open();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let asked: Vec<_> = web.requests()[1..].iter().map(|request| request.bytes.clone()).collect();
    let expected = [
        0..=99,
        500_000..=500_099,
        300_000..=300_999,
        100_000..=100_099,
        200_000..=200_599,
        202_000..=202_099,
    ];
    assert_eq!(asked, expected);
    let statistics = source.statistics();
    assert_eq!((statistics.requests, statistics.merged, statistics.bytes), (6, 2, 2000));
    assert_eq!(web.most_at_work.load(Ordering::SeqCst), 1);
}

#[test]
fn no_more_requests_are_under_way_than_connections() {
    require!();
    let bytes = content(1_000_000);
    let web = Web::new(bytes.clone());
    let source = open(&web, RemoteOptions::new().connections(3).hedge(false).merge(0, 0));
    let gate = Gate::default();
    let held = gate.clone();
    web.answer(move |_, _| Answer::Late(held.clone()));
    thread::scope(|scope| {
        for at in 0..10 {
            let (source, bytes) = (&source, &bytes);
            scope.spawn(move || check(source, bytes, at * 50_000, 4096));
        }
        web.wait_for(1 + 3);
        gate.open();
    });
    assert_eq!((web.most_at_work.load(Ordering::SeqCst), source.statistics().requests), (3, 10));
}

#[test]
fn empty_objects_and_odd_ends_are_read() {
    require!();
    for len in [0, 1, 4095, 4097] {
        let web = Web::new(content(len));
        let source = open(&web, RemoteOptions::new());
        assert_eq!(source.len(), Some(len as u64));
        for offset in [0, 1, 4094, 4095, 4096, 5000] {
            check(&source, &content(len), offset, 4096);
        }
    }
}

#[test]
fn what_cannot_be_opened_is_refused_by_name() {
    require!();
    let soon = RemoteOptions::new().give_up_after(Duration::from_millis(100));
    let web = Web::new(content(100));
    web.answer(|_, _| Answer::Whole);
    assert_eq!(remote(&HttpSource::open(web.url()).unwrap_err()), RemoteError::NoRanges);
    web.answer(|_, _| Answer::Status(404, None));
    assert_eq!(HttpSource::open(web.url()).unwrap_err().kind(), ErrorKind::NotFound);
    let error = HttpSource::builder(web.url()).header("a b", "c").open().unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string()),
        (ErrorKind::InvalidInput, "a header that can't be: a b".into())
    );
    assert!(matches!(remote(&HttpSource::open("no address").unwrap_err()), RemoteError::Unusable(_)));
    // A port that nobody listens at.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = HttpSource::builder(format!("http://{nobody}/")).options(soon).open().unwrap_err();
    let RemoteError::GaveUp { last, .. } = remote(&error) else { panic!("{error}") };
    assert!(matches!(*last, RemoteError::Connection(_)), "{last}");
}

/// Memory that is read by faults, while one answer of four is wrong in a way that passes.
#[test]
fn memory_is_right_from_a_server_that_often_fails() {
    require!();
    let bytes = content(200 * page() + 77);
    let web = Web::new(bytes.clone());
    for around in [FaultAround::Page, FaultAround::Adaptive { most: 16 * page() }] {
        let source = Arc::new(open(&web, RemoteOptions::new().retry_delay(Duration::from_millis(1))));
        web.answer(|number, request| match (number * 7 + request.bytes.start() / 4096) % 16 {
            0 => Answer::Reset,
            1 => Answer::Cut(1000),
            2 => Answer::Status(503, None),
            3 => Answer::Short,
            _ => Answer::Right,
        });
        let memory = LazyMemory::builder(Arc::clone(&source)).fault_around(around).build().unwrap();
        thread::scope(|scope| {
            for thread in 0..3 {
                let (memory, bytes) = (&memory, &bytes);
                scope.spawn(move || {
                    for step in 0..bytes.len() / 1000 {
                        let at = (step * 71 + thread * 31) % (bytes.len() / 1000) * 1000;
                        assert_eq!(memory[at..at + 1000], bytes[at..at + 1000], "{at}");
                    }
                });
            }
        });
        assert!(memory[..bytes.len()] == bytes[..] && memory[bytes.len()..].iter().all(|byte| *byte == 0));
        assert!(source.statistics().retries > 0);
        assert_eq!(memory.statistics().source_errors, 0);
    }
}
