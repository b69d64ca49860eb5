//! Races made to happen: the pager is stopped at a named point, the other side acts, and the pager goes on.

use std::sync::mpsc;
use std::thread;

use memmap2::MmapMut;

use super::point::{Point, tests::at};
use super::{Added, Around, Fill, Pager, Region};
use crate::{FeatureFlags, Uffd, UffdBuilder, page_size};

/// Content by which each page is known.
fn content(page: usize) -> u8 {
    (page % 250) as u8 + 1
}

fn source() -> impl super::PageSource {
    |offset: u64, buffer: &mut [u8]| {
        for (at, page) in buffer.chunks_mut(page_size()).enumerate() {
            page.fill(content(offset as usize / page_size() + at));
        }
        Ok(Fill::Data)
    }
}

fn uffd(features: FeatureFlags) -> Uffd {
    UffdBuilder::new().close_on_exec(true).require_features(features).create().unwrap()
}

#[expect(unsafe_code, reason = "the memory is the test's")]
fn serve(pager: &Pager, uffd: Uffd, memory: &MmapMut) -> Added {
    let region =
        Region::new(memory.as_ptr().expose_provenance(), memory.len(), source()).around(Around::Page);
    // SAFETY: bytes are good whatever they are, and the test keeps the mapping longer than the pager.
    unsafe { pager.add_own(uffd, [region]) }.unwrap()
}

#[test]
fn a_second_fault_joins_the_load_of_the_first() {
    let memory = MmapMut::map_anon(4 * page_size()).unwrap();
    let (start, page) = (memory.as_ptr().addr(), page_size());
    let pager = Pager::builder().threads(2).build().unwrap();
    serve(&pager, uffd(FeatureFlags::empty()), &memory);
    let (reached, is_reached) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = std::sync::Mutex::new(may_go);
    let armed = at(Point::BeforeFill, start..start + 4 * page, move |_| {
        reached.send(()).unwrap();
        may_go.lock().unwrap().recv().unwrap();
    });
    thread::scope(|scope| {
        let first = scope.spawn(|| memory[page]);
        is_reached.recv().unwrap();
        let second = scope.spawn(|| memory[page + 1]);
        while pager.statistics().duplicates == 0 {
            thread::yield_now();
        }
        drop(armed);
        go.send(()).unwrap();
        assert_eq!([first.join().unwrap(), second.join().unwrap()], [content(1); 2]);
    });
    // What a thread counts it counts after it has waked the others.
    let shared = std::sync::Arc::clone(&pager.shared);
    drop(pager);
    let statistics = shared.statistics();
    assert_eq!((statistics.source_reads, statistics.fills, statistics.duplicates), (1, 1, 1));
}

#[test]
fn a_page_removed_before_it_is_filled_is_zero() {
    let memory = MmapMut::map_anon(4 * page_size()).unwrap();
    let (start, page) = (memory.as_ptr().addr(), page_size());
    let pager = Pager::builder().threads(2).build().unwrap();
    serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), &memory);
    let (reached, is_reached) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = std::sync::Mutex::new(may_go);
    let armed = at(Point::BeforeFill, start + page..start + 2 * page, move |_| {
        reached.send(()).unwrap();
        may_go.lock().unwrap().recv().unwrap();
    });
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory[page]);
        is_reached.recv().unwrap();
        #[expect(unsafe_code, reason = "memory that the test has mapped")]
        // SAFETY: the pages are those of this test's mapping, and zeros are good for bytes.
        unsafe { memory.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, page, page) }.unwrap();
        drop(armed);
        go.send(()).unwrap();
        assert_eq!(reader.join().unwrap(), 0);
    });
    assert_eq!(memory[2 * page], content(2));
    drop(pager);
}
