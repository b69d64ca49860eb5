//! What other threads do to memory at named points in the life of a snapshot.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{Content, Error, Options};
use crate::support::memory::{self, Kind, Memory};
use crate::support::proc::{sleeps_in_fault, thread_id, wait_until, wait_until_in};
use crate::support::{child, require, signal, test_name, uffd};
use crate::sync_point::tests::at;
use crate::sync_point::{Moment, Point};
use crate::{DirtyTracker, FeatureFlags, MoveMode, RegisterMode, UffdBuilder};

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

/// Takes a snapshot, and has something done by another thread when memory is about to be protected. Waits until that
/// thread waits in a system call.
fn taken_while(
    memory: &Arc<Memory>,
    syscall: libc::c_long,
    act: impl FnOnce(&Memory) + Send + 'static,
    then: impl FnOnce(&Memory) + Send + 'static,
) -> Vec<Option<u8>> {
    let held = Held::default();
    let (actor, actions) = (Arc::new(Mutex::new(None)), Mutex::new(Some((act, then))));
    let (acting, of_action) = (Arc::clone(&actor), Arc::clone(memory));
    let armed = at(Point::Watch(Moment::Protect), addresses(memory), move |_| {
        let Some((act, then)) = actions.lock().unwrap().take() else { return };
        let (tell, told) = mpsc::channel();
        let memory = Arc::clone(&of_action);
        *acting.lock().unwrap() = Some(thread::spawn(move || {
            tell.send(thread_id()).unwrap();
            act(&memory);
        }));
        wait_until_in(told.recv().unwrap(), syscall);
        then(&of_action);
    });
    let options = Options::new().range(addresses(memory));
    options.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
    drop(armed);
    actor.lock().unwrap().take().expect("memory was protected").join().unwrap();
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

/// All is as it was but the page.
fn compare(held: &[Option<u8>], mut before: Vec<Option<u8>>, page: Option<u8>) {
    before[PAGE] = page;
    assert_eq!(held, before);
}

#[test]
fn pages_mapped_anew_before_they_are_protected_are_gone() {
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

/// A thread drops a page while all is protected. It waits, with the page in place, which is saved.
#[test]
fn pages_dropped_before_they_are_protected_are_saved() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    for memory in each(test_name!()) {
        let before = number(&memory);
        let drops = |memory: &Memory| memory.advise(PAGE, 1, libc::MADV_DONTNEED).unwrap();
        let held = taken_while(&memory, libc::SYS_madvise, drops, |_| {});
        assert_eq!(held, before);
    }
}

#[test]
fn pages_that_move_before_they_are_protected_are_followed() {
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

/// The page has lost its protection, and no event told. It is moved over another one, where memory is protected before
/// that is read: the snapshot holds it all the same.
#[test]
fn unprotected_page_that_moves_as_a_member_begins_is_saved() {
    require!(WRITE_PROTECT | FeatureFlags::MOVE);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        const OTHER: usize = 20;
        let memory = Arc::new(Memory::anonymous(PAGES));
        number(&memory);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
        let (target, uffd) = (Memory::anonymous(1), uffd(FeatureFlags::MOVE));
        uffd.register(target.start(), target.len()).unwrap();
        // SAFETY: no reference leads to the page.
        let moved =
            unsafe { uffd.move_pages(memory.at(PAGE), target.start(), target.len(), MoveMode::empty()) };
        assert_eq!(moved.unwrap(), target.len());
        let (actor, of_action) = (Arc::new(Mutex::new(None)), Arc::clone(&memory));
        let acting = Arc::clone(&actor);
        let armed = at(Point::Watch(Moment::Look), addresses(&memory), move |_| {
            let (tell, told) = mpsc::channel();
            let memory = Arc::clone(&of_action);
            *acting.lock().unwrap() = Some(thread::spawn(move || {
                tell.send(thread_id()).unwrap();
                memory.try_move(PAGE, 1, memory.at(OTHER), 0).unwrap();
            }));
            wait_until_in(told.recv().unwrap(), libc::SYS_mremap);
        });
        let held = Held::default();
        series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
        drop(armed);
        actor.lock().unwrap().take().expect("a member began").join().unwrap();
        let held = held.lock().unwrap();
        assert_eq!((held.get(PAGE), held.get(OTHER)), (Some(&Some(0)), Some(&None)));
    });
}

/// Another thread of the test that makes changes of the layout, and waits for each.
#[derive(Clone, Default)]
struct Actor(Arc<Mutex<Option<Acting>>>);

struct Acting {
    thread: libc::pid_t,
    handle: thread::JoinHandle<()>,
}

impl Actor {
    /// Begins, and returns when it waits in a system call.
    fn begin(&self, syscall: libc::c_long, act: impl FnOnce() + Send + 'static) {
        let (tell, told) = mpsc::channel();
        let handle = thread::spawn(move || {
            tell.send(thread_id()).unwrap();
            act();
        });
        let acting = Acting { thread: told.recv().unwrap(), handle };
        wait_until_in(acting.thread, syscall);
        *self.0.lock().unwrap() = Some(acting);
    }

    fn has_begun(&self) -> bool {
        self.0.lock().unwrap().is_some()
    }

    fn wait_until_in(&self, syscall: libc::c_long) {
        wait_until_in(self.0.lock().unwrap().as_ref().expect("it has begun").thread, syscall);
    }

    fn end(&self) {
        self.0.lock().unwrap().take().expect("it has begun").handle.join().unwrap();
    }
}

/// A page moves while a member begins, before it is protected where it was. Another one is mapped anew, and can't be
/// protected before both changes are read. The page that has moved is behind what is protected by then.
#[test]
fn page_that_moves_behind_what_is_protected_is_saved() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        for memory in each(test_name!()) {
            number(&memory);
            let away = Memory::anonymous(1);
            let to = away.start().expose_provenance();
            let mut series = Options::new().range(addresses(&memory)).series().unwrap();
            series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
            [0, PAGE].into_iter().for_each(|page| memory.write(page, 70 + page as u8));
            let (moves, unmaps) = (Actor::default(), Actor::default());
            let (of_action, actors) = (Arc::clone(&memory), (moves.clone(), unmaps.clone()));
            let armed = at(Point::Watch(Moment::Protect), addresses(&memory), move |address| {
                let memory = Arc::clone(&of_action);
                if address == memory.at(0).addr() && !actors.0.has_begun() {
                    actors.0.begin(libc::SYS_mremap, move || {
                        memory.try_move(0, 1, std::ptr::with_exposed_provenance_mut(to), 0).unwrap();
                    });
                } else if address == memory.at(PAGE).addr() && !actors.1.has_begun() {
                    actors.1.begin(libc::SYS_munmap, move || memory.unmap(PAGE, 1));
                    map_anew(&of_action);
                }
            });
            let held = Held::default();
            series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
            drop(armed);
            [moves, unmaps].iter().for_each(Actor::end);
            let held = held.lock().unwrap();
            assert_eq!((held[0], held[PAGE], away.read(0)), (Some(70), None, 70));
        }
    });
}

/// A page that was dropped moves over one that isn't saved, and other memory is mapped where it was, all before the move is
/// read. The kernel tells of each page that it is as it should be, and of the memory that it isn't this one.
#[test]
fn page_moved_over_an_unsaved_one_isnt_taken_for_it() {
    require!(WRITE_PROTECT | FeatureFlags::WP_HUGETLBFS_SHMEM);
    child::run_well(test_name!(), || {
        const OVER: usize = 39;
        const UNMAPPED: usize = 50;
        let memory = Arc::new(Memory::new(Kind::Memfd, PAGES));
        number(&memory);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
        number(&memory);
        let (moves, unmaps) = (Actor::default(), Actor::default());
        let (first, of_action) = (moves.clone(), Arc::clone(&memory));
        let dropping = at(Point::Watch(Moment::Protect), addresses(&memory), move |_| {
            if !first.has_begun() {
                let memory = Arc::clone(&of_action);
                first.begin(libc::SYS_madvise, move || {
                    memory.advise(PAGE, 1, libc::MADV_REMOVE).unwrap();
                    memory.try_move(PAGE, 1, memory.at(OVER), 0).unwrap();
                });
            }
        });
        let (first, second, of_action) = (moves.clone(), unmaps.clone(), Arc::clone(&memory));
        let looks = Mutex::new(0);
        let trusting = at(Point::Watch(Moment::Trust), addresses(&memory), move |_| {
            let mut looks = looks.lock().unwrap();
            *looks += 1;
            match *looks {
                // Leaves a hole, so that the removal is read, which is the first that there is.
                1 => {
                    let memory = Arc::clone(&of_action);
                    second.begin(libc::SYS_munmap, move || memory.unmap(UNMAPPED, 1));
                }
                2 => {
                    first.wait_until_in(libc::SYS_mremap);
                    map_anew(&of_action);
                }
                _ => {}
            }
        });
        let held = Held::default();
        series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
        drop((dropping, trusting));
        [moves, unmaps].iter().for_each(Actor::end);
        let held = held.lock().unwrap();
        assert_eq!((held[OVER], held[UNMAPPED], memory.read(PAGE)), (None, None, 99));
        assert_eq!(held[0], Some(1));
    });
}

/// A page moves over one that isn't saved, while an earlier change waits to be read, and other memory is mapped where it was.
/// The first change that is read doesn't tell of that.
#[test]
fn page_moved_behind_a_change_keeps_its_place() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        const OVER: usize = 39;
        const DROPPED: usize = 50;
        for memory in each(test_name!()) {
            let mut series = Options::new().range(addresses(&memory)).series().unwrap();
            number(&memory);
            series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
            number(&memory);
            let (drops, moves) = (Actor::default(), Actor::default());
            let (first, of_action) = (drops.clone(), Arc::clone(&memory));
            let dropping = at(Point::Watch(Moment::Protect), addresses(&memory), move |_| {
                if !first.has_begun() {
                    let memory = Arc::clone(&of_action);
                    let drop = move || memory.advise(DROPPED, 1, libc::MADV_DONTNEED).unwrap();
                    first.begin(libc::SYS_madvise, drop);
                }
            });
            let (second, of_action) = (moves.clone(), Arc::clone(&memory));
            let trusting = at(Point::Watch(Moment::Trust), addresses(&memory), move |_| {
                if !second.has_begun() {
                    let memory = Arc::clone(&of_action);
                    let shift = move || memory.try_move(PAGE, 1, memory.at(OVER), 0).unwrap();
                    second.begin(libc::SYS_mremap, shift);
                    map_anew(&of_action);
                }
            });
            let held = Held::default();
            series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
            drop((dropping, trusting));
            [drops, moves].iter().for_each(Actor::end);
            let held = held.lock().unwrap();
            assert_eq!((held[OVER], held[PAGE], held[0]), (None, Some(PAGE as u8 + 1), Some(1)));
            assert_eq!(memory.read(PAGE), 99);
        }
    });
}

/// A page was read, and then dropped, before it was known that it was the right one. When that turns out to be uncertain, what
/// was read is worth nothing, and what is there now is something else, though it seems as protected as before.
#[test]
fn page_dropped_after_it_was_read_is_not_read_again() {
    require!(WRITE_PROTECT | FeatureFlags::WP_HUGETLBFS_SHMEM);
    child::run_well(test_name!(), || {
        const DROPPED: usize = 5;
        const FIRST: usize = 20;
        const SECOND: usize = 30;
        const THIRD: usize = 40;
        let memory = Arc::new(Memory::new(Kind::Memfd, PAGES));
        number(&memory);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
        number(&memory);
        let actors: [Actor; 4] = Default::default();
        let drop_page = |memory: &Arc<Memory>, page| {
            let memory = Arc::clone(memory);
            move || memory.advise(page, 1, libc::MADV_REMOVE).unwrap()
        };
        let unmap_page = |memory: &Arc<Memory>, page| {
            let memory = Arc::clone(memory);
            move || memory.unmap(page, 1)
        };
        let (of, of_action) = (actors.clone(), Arc::clone(&memory));
        let keeping = at(Point::Watch(Moment::Kept), addresses(&memory), move |_| {
            if !of[0].has_begun() {
                of[0].begin(libc::SYS_madvise, drop_page(&of_action, DROPPED));
                of[1].begin(libc::SYS_munmap, unmap_page(&of_action, FIRST));
            }
        });
        let (of, of_action, looks) = (actors.clone(), Arc::clone(&memory), Mutex::new(0));
        let trusting = at(Point::Watch(Moment::Trust), addresses(&memory), move |_| {
            let mut looks = looks.lock().unwrap();
            *looks += 1;
            match *looks {
                // The removal was read, and the unmapping will be.
                2 => of[2].begin(libc::SYS_madvise, drop_page(&of_action, SECOND)),
                // What was kept must be delivered before that removal is read.
                4 => of[3].begin(libc::SYS_munmap, unmap_page(&of_action, THIRD)),
                _ => {}
            }
        });
        let held = Held::default();
        series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
        drop((keeping, trusting));
        actors.iter().for_each(Actor::end);
        let held = held.lock().unwrap();
        assert_eq!((held[DROPPED], held[FIRST], held[0]), (None, None, Some(1)));
    });
}

/// The removal was read, and the thread that makes it is held up for some members. What it drops then is in the next one,
/// though it seems as protected as before.
#[test]
fn page_dropped_long_after_its_event_has_changed() {
    require!(WRITE_PROTECT | FeatureFlags::WP_HUGETLBFS_SHMEM);
    child::run_well(test_name!(), || {
        let memory = Arc::new(Memory::new(Kind::Memfd, PAGES));
        number(&memory);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        let mut take = || {
            let held = Held::default();
            series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
            std::mem::take(&mut *held.lock().unwrap())
        };
        assert_eq!(take()[PAGE], Some(PAGE as u8 + 1));

        // Holes are punched under the lock of the file, which a write(2) holds while it waits for its source.
        let builder =
            UffdBuilder::new().user_mode_only(false).close_on_exec(true).non_blocking(true).create();
        let Ok(uffd) = builder else {
            return println!("SKIP {}: needs the right to handle faults of the kernel", test_name!());
        };
        let missing = Memory::anonymous(1);
        uffd.register(missing.start(), missing.len()).unwrap();
        let drops = Actor::default();
        let (file, source) = (memory.file().try_clone().unwrap(), missing.start().expose_provenance());
        let offset = (PAGES - 1) * memory.page();
        let (tell, told) = mpsc::channel();
        let writer = thread::spawn(move || {
            tell.send(thread_id()).unwrap();
            // SAFETY: the source is mapped until this thread was joined.
            let written = unsafe {
                let source = std::ptr::with_exposed_provenance::<std::ffi::c_void>(source);
                libc::pwrite(file.as_raw_fd(), source, 1, offset as libc::off_t)
            };
            assert_eq!(written, 1);
        });
        wait_until_in(told.recv().unwrap(), libc::SYS_pwrite64);
        let of_action = Arc::clone(&memory);
        drops.begin(libc::SYS_madvise, move || of_action.advise(PAGE, 1, libc::MADV_REMOVE).unwrap());
        (0..4).for_each(|_| drop(take()));

        // SAFETY: no reference leads to the page.
        unsafe { uffd.zeropage(missing.start(), missing.len(), true) }.unwrap();
        writer.join().unwrap();
        drops.end();
        assert_eq!((memory.read(PAGE), take().get(PAGE).copied()), (0, Some(Some(0))));
    });
}

/// A signal takes the only unread fault away, once it was counted, while a removal waits behind it. Nothing is read then: the
/// page is saved before it is dropped.
#[test]
fn vanishing_fault_lets_no_removal_through() {
    require!(WRITE_PROTECT | FeatureFlags::WP_HUGETLBFS_SHMEM);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    /// Whether the handler of the signal has begun, and whether it may end.
    static HANDLES: AtomicBool = AtomicBool::new(false);
    static MAY_END: AtomicBool = AtomicBool::new(false);
    extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut std::ffi::c_void) {
        HANDLES.store(true, Ordering::SeqCst);
        while !MAY_END.load(Ordering::SeqCst) {
            // SAFETY: touches no memory, and a handler may call it.
            unsafe { libc::sched_yield() };
        }
    }
    child::run_well(test_name!(), || {
        /// It is written, and isn't in the snapshot: it hasn't changed before.
        const WRITTEN: usize = 20;
        signal::handle(libc::SIGUSR1, handler);
        for (kind, advice) in [(Kind::Anonymous, libc::MADV_DONTNEED), (Kind::Memfd, libc::MADV_REMOVE)] {
            HANDLES.store(false, Ordering::SeqCst);
            MAY_END.store(false, Ordering::SeqCst);
            let memory = Arc::new(Memory::new(kind, PAGES));
            number(&memory);
            let mut series = Options::new().range(addresses(&memory)).series().unwrap();
            series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
            (0..PAGES).filter(|page| *page != WRITTEN).for_each(|page| memory.write(page, 100 + page as u8));
            let (drops, writes) = (Actor::default(), Arc::new(Mutex::new(None)));
            let (dropping, writing, of_action) = (drops.clone(), Arc::clone(&writes), Arc::clone(&memory));
            let protecting = at(Point::Watch(Moment::Protect), addresses(&memory), move |_| {
                if dropping.has_begun() {
                    return;
                }
                let memory = Arc::clone(&of_action);
                dropping.begin(libc::SYS_madvise, move || memory.advise(PAGE, 1, advice).unwrap());
                let (tell, told) = mpsc::channel();
                let memory = Arc::clone(&of_action);
                let handle = thread::spawn(move || {
                    tell.send(thread_id()).unwrap();
                    memory.write(WRITTEN, 99);
                });
                let writer = told.recv().unwrap();
                wait_until(|| sleeps_in_fault(writer));
                *writing.lock().unwrap() = Some((writer, handle));
            });
            let writing = Arc::clone(&writes);
            let counting = at(Point::Watch(Moment::Counted), addresses(&memory), move |_| {
                let writer = writing.lock().unwrap().as_ref().map(|(writer, _)| *writer);
                if let Some(writer) = writer.filter(|_| !HANDLES.load(Ordering::SeqCst)) {
                    signal::send(writer, libc::SIGUSR1);
                    wait_until(|| HANDLES.load(Ordering::SeqCst));
                }
            });
            let held = Held::default();
            series.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
            drop((protecting, counting));
            assert!(HANDLES.load(Ordering::SeqCst), "a fault was unread, and counted");
            MAY_END.store(true, Ordering::SeqCst);
            drops.end();
            let (_, writer) = writes.lock().unwrap().take().unwrap();
            writer.join().unwrap();
            assert_eq!((memory.read(PAGE), memory.read(WRITTEN)), (0, 99), "{memory:?}");
            assert_eq!(held.lock().unwrap()[PAGE], Some(100 + PAGE as u8), "{memory:?}");
        }
    });
}

/// A page can't be read for a moment, though it is protected. A thread that writes it finds that out as fast as threads take
/// turns: that is often in no time.
#[test]
fn page_in_doubt_is_looked_at_for_its_time() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    /// Far more than any number of tries that would be used up in no time.
    const TRIES: usize = 100;
    /// By then it can be read, however few tries there were: far less than pages are in doubt.
    const IN_TIME: Duration = Duration::from_millis(60);
    child::run_well(test_name!(), || {
        for comes_back in [true, false] {
            let memory = Arc::new(Memory::anonymous(PAGES));
            let before = number(&memory);
            memory.protect(PAGE, 1, libc::PROT_WRITE);
            let writes = Arc::new(Mutex::new(None));
            let (writing, of_action) = (Arc::clone(&writes), Arc::clone(&memory));
            let (tries, page) = (Mutex::new((0, None)), memory.at(PAGE).addr());
            let reading = at(Point::Watch(Moment::Read), addresses(&memory), move |address| {
                let mut writing = writing.lock().unwrap();
                if writing.is_none() {
                    let (tell, told) = mpsc::channel();
                    let memory = Arc::clone(&of_action);
                    let handle = thread::spawn(move || {
                        tell.send(thread_id()).unwrap();
                        memory.write(PAGE, 99);
                    });
                    let writer = told.recv().unwrap();
                    wait_until(|| sleeps_in_fault(writer));
                    *writing = Some(handle);
                }
                let (tries, since) = &mut *tries.lock().unwrap();
                if address == page && comes_back {
                    *tries += 1;
                    if *tries == TRIES || since.get_or_insert_with(Instant::now).elapsed() > IN_TIME {
                        of_action.protect(PAGE, 1, libc::PROT_READ | libc::PROT_WRITE);
                    }
                }
            });
            let start = Instant::now();
            let held = Held::default();
            let options = Options::new().range(addresses(&memory));
            options.begin(sink(&held, memory.page())).unwrap().wait().unwrap();
            let took = start.elapsed();
            drop(reading);
            writes.lock().unwrap().take().expect("pages were read").join().unwrap();
            memory.protect(PAGE, 1, libc::PROT_READ | libc::PROT_WRITE);
            assert_eq!(memory.read(PAGE), 99);
            compare(&held.lock().unwrap(), before, comes_back.then_some(PAGE as u8 + 1));
            assert!(comes_back || took > 2 * IN_TIME, "{took:?}");
        }
    });
}

#[test]
fn panic_as_a_member_begins_ends_the_series() {
    require!(WRITE_PROTECT);
    if !memory::tells_protection(test_name!()) {
        return;
    }
    let memory = Memory::anonymous(PAGES);
    number(&memory);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    series.begin(sink(&Held::default(), memory.page())).unwrap().wait().unwrap();
    memory.write(PAGE, 90);
    let panics = at(Point::Watch(Moment::Protect), addresses(&memory), |_| panic!("as the test wants it"));
    let begun = series.begin(sink(&Held::default(), memory.page()));
    drop(panics);
    assert!(matches!(begun, Err(Error::Kernel(crate::Error::TrackingFailed(_)))), "{begun:?}");
    (0..PAGES).for_each(|page| memory.write(page, 91));
    let next = series.begin(sink(&Held::default(), memory.page()));
    assert!(next.is_err(), "{next:?}");
}
