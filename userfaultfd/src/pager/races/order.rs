//! Events that are read later than the change that they report, when something else lies in the place already. The only
//! worker is kept from reading by a source that doesn't return.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::ops::Range;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use super::harness::{Reader, Seen, read};
use crate::pager::{DescriptorId, FaultAround, PageData, Pager, Region, RegionId, Result};
use crate::support::memory::Memory;
use crate::support::proc::{is_in, thread_id, wait_until};
use crate::support::{child, page, require, test_name, uffd};
use crate::{FeatureFlags, sys};

const EVENTS: FeatureFlags = FeatureFlags::EVENT_REMAP.union(FeatureFlags::EVENT_UNMAP);

const PAGES: usize = 4;

/// Places far from where the kernel maps by itself, with room between them.
const PLACES: usize = 3;

struct Scene {
    pager: Pager,
    descriptor: DescriptorId,
    places: [usize; PLACES],
    /// Lets the source return that the worker is in.
    go: mpsc::Sender<()>,
    reader: Reader,
}

fn map(at: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let start: *mut libc::c_void = std::ptr::without_provenance_mut(at);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: it replaces nothing.
    let mapped = unsafe { libc::mmap(start, PAGES * page(), protection, flags, -1, 0) };
    assert_eq!(mapped, start);
}

fn unmap(at: usize) {
    // SAFETY: the place is the test's, and nobody borrows what is there.
    let unmapped = unsafe { libc::munmap(std::ptr::without_provenance_mut(at), PAGES * page()) };
    assert_eq!(unmapped, 0);
}

fn move_to(from: usize, to: usize) {
    let (from, to): (*mut libc::c_void, *mut libc::c_void) =
        (std::ptr::without_provenance_mut(from), std::ptr::without_provenance_mut(to));
    let (len, flags) = (PAGES * page(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    // SAFETY: both places are the test's, and nobody borrows what is there.
    let moved = unsafe { libc::mremap(from, len, len, flags, to) };
    assert_eq!(moved, to);
}

/// Does something on another thread, and waits until that sleeps in a system call, or is over.
fn begin<T: Send + 'static>(
    syscall: libc::c_long,
    act: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        tell.send(thread_id()).unwrap();
        act()
    });
    let id = told.recv().unwrap();
    wait_until(|| thread.is_finished() || is_in(id, syscall) == Some(true));
    thread
}

fn region(at: usize, byte: u8) -> Region {
    let source = move |_: u64, bytes: &mut [u8]| {
        bytes.fill(byte);
        Ok(PageData::Data)
    };
    Region::new(at, PAGES * page(), source).fault_around(FaultAround::Page)
}

impl Scene {
    /// Regions in the first places, whose content is 1, 2 and so on; and a worker that reads nothing.
    fn new(regions: usize) -> Self {
        let len = 2 * PAGES * page();
        let start = sys::map_somewhere(PLACES * len).unwrap().addr().get();
        let places = [0, 1, 2].map(|place| start + place * len);
        // SAFETY: the range was just mapped, and is nobody else's.
        unsafe {
            sys::unmap(
                std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(start)).unwrap(),
                PLACES * len,
            );
        };
        let pager = Pager::builder().max_threads(1).build().unwrap();
        let (memory, (go, goes)) = (Memory::anonymous(1), mpsc::channel());
        let (tell, told) = mpsc::channel();
        let goes = std::sync::Mutex::new(goes);
        let hangs = move |_: u64, bytes: &mut [u8]| {
            tell.send(()).unwrap();
            goes.lock().unwrap().recv().unwrap();
            bytes.fill(9);
            Ok(PageData::Data)
        };
        let at = memory.at(0).addr();
        let mut all = vec![Region::new(at, page(), hangs)];
        for (place, byte) in places[..regions].iter().zip(1..) {
            map(*place);
            all.push(region(*place, byte));
        }
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
        let added = unsafe { pager.add_own(uffd(EVENTS), all) }.unwrap();
        let reader = Reader::of(at);
        told.recv().unwrap();
        std::mem::forget(memory);
        Self { pager, descriptor: added.descriptor, places, go, reader }
    }

    /// Has the worker read, and waits until it has got to what waited.
    fn read_on(self) -> Pager {
        self.go.send(()).unwrap();
        assert_eq!(self.reader.wait(), Seen::Byte(9));
        self.pager
    }
}

fn seen(at: usize) -> Vec<Seen> {
    let pages: Range<usize> = 0..PAGES;
    pages.map(|number| read(at + number * page())).collect()
}

#[test]
fn region_added_where_memory_has_just_left_is_served() {
    require!(EVENTS);
    child::run_well(test_name!(), || {
        for is_moved in [false, true] {
            let scene = Scene::new(1);
            let [x, y, _] = scene.places;
            let leaves = if is_moved {
                begin(libc::SYS_mremap, move || move_to(x, y))
            } else {
                begin(libc::SYS_munmap, move || unmap(x))
            };
            map(x);
            let descriptor = scene.descriptor;
            let (added, is_added) = mpsc::channel::<Result<RegionId>>();
            thread::scope(|scope| {
                let pager = &scene.pager;
                let (tell, told) = mpsc::channel();
                let adder = scope.spawn(move || {
                    tell.send(thread_id()).unwrap();
                    // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
                    added.send(unsafe { pager.add_own_region(descriptor, region(x, 7)) }).unwrap();
                });
                let id = told.recv().unwrap();
                wait_until(|| adder.is_finished() || is_in(id, libc::SYS_clock_nanosleep) == Some(true));
                scene.go.send(()).unwrap();
            });
            is_added.recv().unwrap().unwrap();
            leaves.join().unwrap();
            assert_eq!(seen(x), [Seen::Byte(7); PAGES]);
            if is_moved {
                assert_eq!(seen(y), [Seen::Byte(1); PAGES]);
            }
            assert_eq!(scene.reader.wait(), Seen::Byte(9));
            scene.pager.finish(|_| {}).unwrap();
        }
    });
}

#[test]
fn memory_moved_to_a_place_just_left_is_served() {
    require!(EVENTS);
    child::run_well(test_name!(), || {
        let scene = Scene::new(2);
        let [x, z, y] = scene.places;
        let first = begin(libc::SYS_mremap, move || move_to(x, y));
        let second = begin(libc::SYS_mremap, move || move_to(z, x));
        let pager = scene.read_on();
        first.join().unwrap();
        second.join().unwrap();
        assert_eq!(seen(y), [Seen::Byte(1); PAGES]);
        assert_eq!(seen(x), [Seen::Byte(2); PAGES]);
        pager.finish(|_| {}).unwrap();
    });
}
