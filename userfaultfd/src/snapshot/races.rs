//! What other threads do to memory at named points in the life of a snapshot.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::{Content, Options};
use crate::support::memory::{self, Kind, Memory};
use crate::support::proc::{thread_id, wait_until_in};
use crate::support::{child, require, test_name};
use crate::sync_point::tests::at;
use crate::sync_point::{Moment, Point};
use crate::{DirtyTracker, FeatureFlags, RegisterMode};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

const PAGES: usize = 64;

/// The page that something happens to.
const PAGE: usize = 5;

/// What a snapshot held: the first byte of each page, `None` where it is gone.
type Held = Arc<Mutex<Vec<Option<u8>>>>;

fn addresses(memory: &Memory) -> Range<usize> {
    memory.range(0, memory.pages())
}

fn number(memory: &Memory) -> Vec<Option<u8>> {
    (0..memory.pages()).for_each(|page| memory.write(page, page as u8 + 1));
    (0..memory.pages()).map(|page| Some(page as u8 + 1)).collect()
}

fn sink(held: &Held, page: usize) -> impl FnMut(u64, Content<'_>) -> std::io::Result<()> + Send + use<> {
    let held = Arc::clone(held);
    move |offset, content| {
        let mut held = held.lock().unwrap();
        for at in (0..content.len() as usize).step_by(page) {
            let index = (offset as usize + at) / page;
            let len = held.len().max(index + 1);
            held.resize(len, None);
            held[index] = match content {
                Content::Data(bytes) => Some(bytes[at]),
                Content::Zero(_) => Some(0),
                _ => None,
            };
        }
        Ok(())
    }
}

/// A thread that drops the last page of some memory all the time. Before a snapshot protects anything it waits until that
/// thread waits in a drop: so the kernel refuses.
fn while_layout_changes(memory: &Arc<Memory>, body: impl FnOnce()) {
    static DROPPER: AtomicI32 = AtomicI32::new(0);
    let ends = Arc::new(AtomicBool::new(false));
    let dropper = {
        let (memory, ends) = (Arc::clone(memory), Arc::clone(&ends));
        thread::spawn(move || {
            DROPPER.store(thread_id(), Ordering::SeqCst);
            while !ends.load(Ordering::SeqCst) {
                memory.advise(PAGES - 1, 1, libc::MADV_DONTNEED).unwrap();
            }
        })
    };
    while DROPPER.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    let refused = at(Point::Snapshot(Moment::BeforeProtect), 0..usize::MAX, |_| {
        wait_until_in(DROPPER.load(Ordering::SeqCst), libc::SYS_madvise);
    });
    body();
    drop(refused);
    ends.store(true, Ordering::SeqCst);
    dropper.join().unwrap();
    DROPPER.store(0, Ordering::SeqCst);
}

/// Takes a snapshot while the layout changes, and has something done by another thread when memory is about to be
/// protected all the same. Waits until that thread waits in a system call.
fn taken_while(
    memory: &Arc<Memory>,
    syscall: libc::c_long,
    act: impl Fn(&Memory) + Send + Sync + 'static,
    then: impl Fn(&Memory) + Send + Sync + 'static,
) -> Vec<Option<u8>> {
    let held = Held::default();
    let acting = Arc::new(Mutex::new(None));
    while_layout_changes(memory, || {
        let (of_actor, of_action) = (Arc::clone(memory), Arc::clone(memory));
        let (act, actor) = (Arc::new(act), Arc::clone(&acting));
        let armed = at(Point::Snapshot(Moment::BeforeBeside), addresses(memory), move |_| {
            let mut actor = actor.lock().unwrap();
            if actor.is_some() {
                return;
            }
            let (tell, told) = std::sync::mpsc::channel();
            let (memory, act) = (Arc::clone(&of_actor), Arc::clone(&act));
            *actor = Some(thread::spawn(move || {
                tell.send(thread_id()).unwrap();
                act(&memory);
            }));
            wait_until_in(told.recv().unwrap(), syscall);
            then(&of_action);
        });
        let options = Options::new().range(addresses(memory));
        let (_sink, _) = options.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
        drop(armed);
    });
    acting.lock().unwrap().take().expect("memory was protected beside").join().unwrap();
    std::mem::take(&mut held.lock().unwrap())
}

fn each(test: &str) -> impl Iterator<Item = Arc<Memory>> {
    memory::each_of(test, &Kind::SMALL, RegisterMode::WRITE_PROTECT, PAGES)
        .inspect(|memory| println!("{memory:?}"))
        .map(Arc::new)
}

/// Maps other memory where nothing is mapped any more.
fn map_anew(memory: &Memory) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let (start, protection) = (memory.at(PAGE), libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: it replaces nothing.
    let mapped = unsafe { libc::mmap(start, memory.page(), protection, flags, -1, 0) };
    assert_eq!(mapped, start);
    memory.write(PAGE, 99);
}

/// All is as it was but the page, and the one that is dropped all the time.
fn compare(held: &[Option<u8>], mut before: Vec<Option<u8>>, page: Option<u8>) {
    before[PAGE] = page;
    assert_eq!(held.len(), PAGES);
    assert_eq!(held[..PAGES - 1], before[..PAGES - 1]);
    assert!([Some(0), Some(PAGES as u8)].contains(&held[PAGES - 1]), "{:?}", held[PAGES - 1]);
}

#[test]
fn pages_mapped_anew_while_protection_is_refused_are_gone() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        for memory in each(test_name!()) {
            let before = number(&memory);
            let unmap = |memory: &Memory| memory.unmap(PAGE, 1);
            let held = taken_while(&memory, libc::SYS_munmap, unmap, map_anew);
            compare(&held, before, None);
            assert_eq!(memory.read(PAGE), 99);
        }
    });
}

/// And a tracker has the new page: it is told of a write that it has told already, by no means of one less.
#[test]
fn pages_that_a_tracker_has_meanwhile_are_gone_and_tracked() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        for memory in each(test_name!()) {
            let before = number(&memory);
            let tracker = Arc::new(Mutex::new(DirtyTracker::new().unwrap()));
            let tracks = Arc::clone(&tracker);
            let unmap = |memory: &Memory| memory.unmap(PAGE, 1);
            let held = taken_while(&memory, libc::SYS_munmap, unmap, move |memory| {
                map_anew(memory);
                tracks.lock().unwrap().track(memory.range(PAGE, 1)).unwrap();
                memory.write(PAGE, 98);
            });
            compare(&held, before, None);
            let written: Vec<_> = tracker.lock().unwrap().take().map(Result::unwrap).collect();
            assert_eq!(written, [memory.range(PAGE, 1)]);
        }
    });
}

#[test]
fn pages_that_move_while_protection_is_refused_are_followed() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        for memory in each(test_name!()) {
            let before = number(&memory);
            let away = Memory::anonymous(1);
            let to = away.start().expose_provenance();
            let shift = move |memory: &Memory| {
                memory.try_move(PAGE, 1, std::ptr::with_exposed_provenance_mut(to), 0).unwrap();
            };
            let held = taken_while(&memory, libc::SYS_mremap, shift, |_| {});
            compare(&held, before, Some(PAGE as u8 + 1));
            assert_eq!(away.read(0), PAGE as u8 + 1);
        }
    });
}
