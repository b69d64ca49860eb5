//! Problems and their callback, sources that end, and what is said where there is no callback.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use userfaultfd::pager::{Error, PageData, PageSource, Pager, RetryPolicy};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::scene::{Pages, Problems, check, memory, region, serve, served};
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, page, require, test_name, uffd};

const AT_ONCE: RetryPolicy = RetryPolicy { attempts: 1, delay: std::time::Duration::ZERO };

/// A source that panics when it is dropped.
struct Panics(Arc<Mutex<u32>>);

impl PageSource for Panics {
    fn read(&self, _: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        bytes.fill(7);
        Ok(PageData::Data)
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        *self.0.lock().unwrap() += 1;
        panic!("dropped");
    }
}

#[test]
fn panic_of_source_drop_is_reported() {
    require!();
    let (problems, dropped) = (Problems::default(), Arc::default());
    let pager = Pager::builder().on_problem(problems.callback()).build().unwrap();
    for round in 1..=3 {
        let memory = Memory::anonymous(2);
        let uffd = uffd(FeatureFlags::empty());
        let added = serve(&pager, uffd, region(&memory, Panics(Arc::clone(&dropped))));
        assert_eq!(memory.read(1), 7);
        pager.finish_region(added.regions[0], |_| {}).unwrap();
        wait_until(|| problems.count("Panicked") == round);
        assert_eq!(*dropped.lock().unwrap(), round as u32);
    }
    let memory = Memory::anonymous(2);
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, Pages::new(page())));
    check(&memory, 1, 1);
    drop(pager); // before its memory
}

#[test]
fn callback_may_finish_and_drop_the_pager() {
    require!(FeatureFlags::POISON);
    let memory = Memory::anonymous(4);
    let pager = Arc::new(OnceLock::<Mutex<Option<Arc<Pager>>>>::new());
    let (own, finished) = (Arc::clone(&pager), Arc::new(OnceLock::new()));
    let told = Arc::clone(&finished);
    let on_problem = move |_: &_| {
        let Some(pager) = own.get().and_then(|pager| pager.lock().unwrap().take()) else { return };
        let result = pager.finish(|_| {});
        drop(pager);
        told.set(matches!(result, Err(Error::Poisoned { pages: 1, .. }))).unwrap();
    };
    let source = |offset: u64, bytes: &mut [u8]| match offset {
        0 => Err(io::ErrorKind::NotFound.into()),
        _ => Pages::new(page()).read(offset, bytes),
    };
    crate::reader::tell_signals();
    let new = Arc::new(Pager::builder().retry(AT_ONCE).on_problem(on_problem).build().unwrap());
    serve(&new, uffd(FeatureFlags::empty()), region(&memory, source));
    assert!(pager.set(Mutex::new(Some(new))).is_ok());
    assert_eq!(crate::scene::see(&memory, 0), crate::reader::Seen::POISON);
    wait_until(|| finished.get().is_some());
    assert_eq!(finished.get(), Some(&true));
    (1..4).for_each(|page| check(&memory, page, page));
}

#[test]
fn each_kind_of_problem_is_printed_once_by_default() {
    require!(FeatureFlags::POISON);
    let output = child::run(test_name!(), || {
        let source = |_: u64, _: &mut [u8]| Err(io::Error::other("the server is away"));
        let memory = LazyMemory::builder(source).len(8 * page()).retry(AT_ONCE).build().unwrap();
        crate::reader::tell_signals();
        for number in 0..7 {
            let seen = crate::reader::read(memory.as_ptr().addr() + number * page());
            assert_eq!(seen, crate::reader::Seen::POISON);
        }
        // The last one ends the process.
        // SAFETY: the default action runs no code of the process.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        // A thread that prints has the lock of standard error.
        let _lock = io::stderr().lock();
        std::hint::black_box(memory[7 * page()]);
    });
    let Some(output) = output else { return };
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    let lines = |of: &str| text.lines().filter(|line| line.contains(of)).count();
    assert_eq!((lines("userfaultfd: the source failed"), lines("the server is away")), (1, 1), "{text}");
    assert_eq!(lines("is poisoned"), 1, "{text}");
}

/// The access that follows ends the process.
#[test]
fn problem_is_printed_before_its_page_is_poisoned() {
    require!(FeatureFlags::POISON);
    let output = child::run(test_name!(), || {
        let source = |_: u64, _: &mut [u8]| Err(io::Error::other("the server is away"));
        let memory = LazyMemory::builder(source).len(page()).retry(AT_ONCE).build().unwrap();
        let _lock = io::stderr().lock();
        std::hint::black_box(memory[0]);
    });
    let Some(output) = output else { return };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("the server is away"), "{text}");
}

#[test]
fn ended_regions_count_with_their_final_figures() {
    require!();
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let Some(memory) = memory(test_name!(), kind, 5) else { continue };
        let figures = |pager: &Pager| {
            let statistics = pager.statistics();
            (statistics.present_pages, statistics.missing_pages)
        };
        let (pager, added, source) = served(&memory);
        check(&memory, 3, 3);
        crate::scene::eventually(|| figures(&pager), (1, 4));
        // Removed and added again.
        let detached = pager.remove(added.descriptor).unwrap();
        assert_eq!(figures(&pager), (1, 4));
        let missing = detached.missing();
        serve(&pager, detached.uffd, region(&memory, source).missing(missing));
        assert_eq!(figures(&pager), (2, 8));
        pager.finish(|_| {}).unwrap();
        assert_eq!(figures(&pager), (6, 4));
    }
    let lazy = LazyMemory::new(4 * page(), Pages::new(page())).unwrap();
    lazy.fill(|_| {}).unwrap();
    let statistics = lazy.statistics();
    assert_eq!((statistics.present_pages, statistics.missing_pages), (4, 0), "{statistics}");
}
