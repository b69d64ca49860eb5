//! The parts of every race: memory that a pager serves, a point where it stops, an act of another thread, and readers
//! that report what they saw.

#![expect(unsafe_code, reason = "the memory is the test's, and so are its signals")]

use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::{iter, mem, ptr};

use crate::pager::serve::shared::Shared;
use crate::pager::{
    Added, AsyncSource, FaultAround, OnRemoval, PageData, PageSource, Pager, Region, Statistics,
    ThreadedSource,
};
use crate::support::mapping::Mapping;
use crate::support::memory::{Kind, Memory};
use crate::support::proc::{self, thread_id, wait_until};
use crate::support::{child, has_features, page};
use crate::sync_point::Point;
use crate::sync_point::tests::{Armed, at};
use crate::{FeatureFlags, RegisterMode};

#[path = "../../../tests/pager/reader.rs"]
mod reader;

pub(super) use reader::{Reader, Seen, read, tell_signals};

/// What is seen where nothing is mapped.
pub(super) const NOTHING_MAPPED: Seen = Seen::Signal(libc::SIGSEGV);

/// Pages that a scene's memory has.
pub(super) const PAGES: usize = 6;

/// The page that is raced for.
pub(super) const PAGE: usize = 2;

/// What kind of memory, and how it is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    /// Private anonymous memory, page by page.
    Anonymous,
    /// Likewise, three pages at once.
    Block,
    /// A memfd, filled through the page cache.
    Minor,
    /// Private huge pages.
    Hugetlb,
    /// Private anonymous memory, page by page, from a source that answers later, in a thread of its own.
    Async,
    /// Private anonymous memory, page by page, where removed pages are loaded again.
    Reload,
    /// A memfd, likewise, filled through the page cache.
    ReloadMinor,
}

impl Flavour {
    fn kind(self) -> Kind {
        match self {
            Self::Anonymous | Self::Block | Self::Async | Self::Reload => Kind::Anonymous,
            Self::Minor | Self::ReloadMinor => Kind::Memfd,
            Self::Hugetlb => Kind::PrivateHugetlb,
        }
    }

    fn modes(self) -> RegisterMode {
        match self {
            Self::Minor | Self::ReloadMinor => RegisterMode::MISSING | RegisterMode::MINOR,
            _ => RegisterMode::MISSING,
        }
    }

    /// Memory of this kind, if there is such a thing.
    pub(super) fn memory(self, test: &str, pages: usize) -> Option<Memory> {
        let features = self.kind().needs(self.modes()).expect("it can be registered");
        has_features(test, features).then(|| Memory::try_new(test, self.kind(), pages))?
    }

    pub(super) fn is_shared(self) -> bool {
        matches!(self, Self::Minor | Self::ReloadMinor)
    }

    pub(super) fn reloads(self) -> bool {
        matches!(self, Self::Reload | Self::ReloadMinor)
    }

    /// Memory as a region.
    pub(super) fn region(self, memory: &Memory, source: impl PageSource + 'static) -> Region {
        let (start, len) = (memory.start().expose_provenance(), memory.len());
        let region = match self {
            Self::Async => {
                Region::new(start, len, AsyncSource::new(ThreadedSource::new(source, 1).expect("a thread")))
            }
            _ => Region::new(start, len, source),
        };
        let on_removal = if self.reloads() { OnRemoval::Reload } else { OnRemoval::Zero };
        let region = region.page_size(memory.page()).on_removal(on_removal);
        match self {
            Self::Anonymous | Self::Hugetlb | Self::Async | Self::Reload => {
                region.fault_around(FaultAround::Page)
            }
            Self::Block => region.block(3 * memory.page()),
            Self::Minor | Self::ReloadMinor => {
                region.fault_around(FaultAround::Page).minor(memory.file().try_clone().unwrap().into(), 0)
            }
        }
    }
}

/// Content by which each page is known.
pub(super) fn content(page: usize) -> Seen {
    Seen::Byte(page as u8 + 1)
}

/// A source of [`content`], which counts how often each page is read.
#[derive(Clone, Debug)]
pub(super) struct Source {
    page: usize,
    pub(super) reads: Arc<[AtomicU32; PAGES]>,
}

impl Source {
    pub(super) fn of(memory: &Memory) -> Self {
        Self { page: memory.page(), reads: Arc::default() }
    }

    pub(super) fn reads(&self, page: usize) -> u32 {
        self.reads[page].load(Ordering::SeqCst)
    }
}

impl PageSource for Source {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<PageData> {
        for (at, bytes) in buffer.chunks_mut(self.page).enumerate() {
            let page = offset as usize / self.page + at;
            bytes.fill(page as u8 + 1);
            self.reads[page].fetch_add(1, Ordering::SeqCst);
        }
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some((PAGES * self.page) as u64)
    }
}

/// An address to which the memory can be moved.
pub(super) fn room(memory: &Memory) -> *mut c_void {
    let len = memory.len() + memory.page();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.map_addr(|start| start.next_multiple_of(memory.page()))
}

/// Unmaps what was moved to a [`room`], so that its huge pages can be given back.
pub(super) fn clear(start: usize, len: usize) {
    // SAFETY: the room is the test's, and nobody borrows what is there.
    let unmapped = unsafe { libc::munmap(ptr::with_exposed_provenance_mut(start), len) };
    assert_eq!(unmapped, 0);
}

/// A place where the pager stops, once. Nothing here allocates once it is made: a fork may hold the allocator's locks
/// until the pager goes on.
#[derive(Debug)]
pub(super) struct Stop {
    state: Arc<(Mutex<Stopped>, Condvar)>,
    _armed: Armed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopped {
    NotYet,
    Now,
    NoMore,
}

impl Stop {
    pub(super) fn at(point: Point, addresses: std::ops::Range<usize>) -> Self {
        let state = Arc::new((Mutex::new(Stopped::NotYet), Condvar::new()));
        let shared = Arc::clone(&state);
        let armed = at(point, addresses, move |_| {
            let (stopped, changed) = &*shared;
            let mut stopped = stopped.lock().unwrap();
            if *stopped == Stopped::NotYet {
                *stopped = Stopped::Now;
                changed.notify_all();
                drop(changed.wait_while(stopped, |stopped| *stopped == Stopped::Now).unwrap());
            }
        });
        Self { state, _armed: armed }
    }

    /// Waits until the pager is there.
    pub(super) fn reached(&self) {
        let (stopped, changed) = &*self.state;
        drop(changed.wait_while(stopped.lock().unwrap(), |stopped| *stopped == Stopped::NotYet).unwrap());
    }

    /// Lets it go on.
    pub(super) fn go(&self) {
        let (stopped, changed) = &*self.state;
        *stopped.lock().unwrap() = Stopped::NoMore;
        changed.notify_all();
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.go();
    }
}

/// Memory that a pager serves, with what can be told about it.
pub(super) struct Scene {
    pub(super) test: &'static str,
    pub(super) flavour: Flavour,
    // Dropped before the memory: it poisons what is missing, and the addresses may be another test's afterwards.
    pub(super) pager: Mutex<Option<Pager>>,
    pub(super) memory: Memory,
    /// Where the memory was moved to, by a test that moves it.
    pub(super) moved: AtomicUsize,
    pub(super) source: Source,
    pub(super) added: Added,
    shared: Arc<Shared>,
}

impl Scene {
    fn new(test: &'static str, flavour: Flavour, features: FeatureFlags) -> Option<Self> {
        if !has_features(test, features) {
            return None;
        }
        // The kernel maps at the highest address that has room. What the test unmaps must stay unmapped, so that there
        // is more room above it.
        flavour.memory(test, PAGES)?;
        let len = PAGES * flavour.kind().page() / page();
        let none =
            |pages| Mapping::new(pages, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE, None);
        let above = none((1 << 30) / page()).unwrap();
        let is_above = |filler: &Mapping| filler.start > above.start;
        let fillers: Vec<_> = iter::repeat_with(|| none(len).unwrap()).take_while(is_above).collect();
        let memory = flavour.memory(test, PAGES)?;
        drop(above);
        fillers.into_iter().for_each(mem::forget);
        let source = Source::of(&memory);
        let pager = Pager::builder().threads(2).max_threads(2).build().unwrap();
        let uffd = crate::support::uffd(features);
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
        let added = unsafe { pager.add_own(uffd, [flavour.region(&memory, source.clone())]) }.unwrap();
        let (shared, pager) = (Arc::clone(&pager.shared), Mutex::new(Some(pager)));
        let moved = AtomicUsize::new(0);
        Some(Self { test, flavour, memory, moved, source, added, pager, shared })
    }

    pub(super) fn at(&self, page: usize) -> usize {
        self.memory.at(page).addr()
    }

    /// Calls `with` with the pager. No thread may end it meanwhile.
    pub(super) fn pager<T>(&self, with: impl FnOnce(&Pager) -> T) -> T {
        with(self.pager.lock().unwrap().as_ref().expect("a pager"))
    }

    /// Takes the pager, to end it.
    pub(super) fn end(&self) -> Pager {
        self.pager.lock().unwrap().take().expect("a pager")
    }

    pub(super) fn statistics(&self) -> Statistics {
        self.shared.statistics()
    }

    /// Checks what is read in each page but the one that was raced for.
    #[track_caller]
    pub(super) fn others_are(&self, expected: impl Fn(usize) -> Seen) {
        for page in (0..PAGES).filter(|page| *page != PAGE) {
            assert_eq!(read(self.at(page)), expected(page), "page {page}");
        }
    }
}

/// What one side does to a fault that the pager is about to answer.
pub(super) struct Act<T> {
    /// What the descriptor has to tell.
    pub(super) features: FeatureFlags,
    pub(super) act: fn(&Scene) -> T,
    /// What happens before the pager goes on. Readers that it starts are waited for.
    pub(super) meanwhile: fn(&Scene, Point) -> Vec<Reader>,
    pub(super) check: fn(&Scene, Outcome<T>),
}

/// How a race ended.
#[derive(Debug)]
pub(super) struct Outcome<T> {
    pub(super) point: Point,
    /// What the one saw whose fault it was about.
    pub(super) first: Seen,
    /// What another thread saw, which came before the pager went on: at `BeforeWake`, where it takes two.
    pub(super) second: Option<Seen>,
    /// What those threads saw that were started meanwhile.
    pub(super) meanwhile: Vec<Seen>,
    pub(super) acted: T,
}

impl<T> Outcome<T> {
    /// Whether the page was filled before the act could be heard of.
    pub(super) fn was_filled(&self) -> bool {
        matches!(self.point, Point::AfterFill | Point::BeforeWake)
    }

    /// Checks what the readers saw that came before the act: `loading` if the act came first. Else they were woken, and see
    /// the content or what the act has made of it, whichever is faster.
    #[track_caller]
    pub(super) fn readers_saw(&self, loading: Seen) {
        for seen in [Some(self.first), self.second].into_iter().flatten() {
            let fine = seen == loading || self.was_filled() && seen == content(PAGE);
            assert!(fine, "{seen:?} instead of {loading:?}");
        }
    }
}

/// What comes meanwhile: nothing.
pub(super) fn nobody(_: &Scene, _: Point) -> Vec<Reader> {
    Vec::new()
}

/// Waits until a thread is through, or so far that it waits for others.
pub(super) fn wait_for_progress<T>(thread: &JoinHandle<T>, id: libc::pid_t) {
    let mut asleep = 0;
    wait_until_mut(|| {
        asleep = if is_asleep(id) { asleep + 1 } else { 0 };
        thread.is_finished() || asleep > 10
    });
}

/// Whether a thread of this process sleeps, or has ended. Allocates nothing.
fn is_asleep(thread: libc::pid_t) -> bool {
    let mut text = [0; 512];
    proc::read(format_args!("/proc/self/task/{thread}/syscall"), &mut text)
        .is_none_or(|text| !text.starts_with("running"))
}

fn wait_until_mut(mut condition: impl FnMut() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

/// Starts a thread, and tells its id, too.
pub(super) fn start<T: Send + 'static>(
    act: impl FnOnce() -> T + Send + 'static,
) -> (JoinHandle<T>, libc::pid_t) {
    let id = Arc::new(AtomicI32::new(0));
    let told = Arc::clone(&id);
    let thread = thread::spawn(move || {
        told.store(thread_id(), Ordering::SeqCst);
        act()
    });
    wait_until(|| id.load(Ordering::SeqCst) != 0);
    (thread, id.load(Ordering::SeqCst))
}

impl<T: Debug + Send + 'static> Act<T> {
    /// Runs the race, in a process of its own.
    pub(super) fn race(&'static self, test: &'static str, flavour: Flavour, point: Point) {
        child::run_well(test, || {
            tell_signals();
            let Some(scene) = Scene::new(test, flavour, self.features) else { return };
            let (scene, addresses) = (Arc::new(scene), 0..usize::MAX);
            // In the end a thread must be woken only where a second fault joined the load.
            let load = (point == Point::BeforeWake).then(|| Stop::at(Point::BeforeFill, addresses.clone()));
            let stop = Stop::at(point, addresses);
            let first = Reader::of(scene.at(PAGE));
            let second = load.map(|load| {
                load.reached();
                let second = Reader::of(scene.at(PAGE));
                wait_until(|| scene.statistics().duplicates > 0);
                load.go();
                second
            });
            stop.reached();
            let acting = Arc::clone(&scene);
            let (actor, id) = start(move || (self.act)(&acting));
            wait_for_progress(&actor, id);
            let meanwhile = (self.meanwhile)(&scene, point);
            stop.go();
            let acted = actor.join().unwrap();
            let meanwhile = meanwhile.iter().map(Reader::wait).collect();
            let (first, second) = (first.wait(), second.map(|second| second.wait()));
            (self.check)(&scene, Outcome { point, first, second, meanwhile, acted });
        });
    }
}

/// A test of an act for each point, for each kind of memory.
macro_rules! races {
    ($name:ident: $act:ident; $($flavours:tt)*) => {
        mod $name {
            $crate::pager::races::harness::races! { @flavours $act; $($flavours)* }
        }
    };
    (@flavours $act:ident; $($kind:ident: $flavour:ident,)*) => {$(
        mod $kind {
            $crate::pager::races::harness::races! { @flavour $act; $flavour }
        }
    )*};
    (@flavour $act:ident; Async) => {
        $crate::pager::races::harness::races! {
            @points $act; Async;
            after_read: AfterRead,
            after_start: AfterStart,
            before_fill: BeforeFill,
            after_fill: AfterFill,
            before_wake: BeforeWake,
        }
    };
    (@flavour $act:ident; $flavour:ident) => {
        $crate::pager::races::harness::races! {
            @points $act; $flavour;
            after_read: AfterRead,
            before_fill: BeforeFill,
            after_fill: AfterFill,
            before_wake: BeforeWake,
        }
    };
    (@points $act:ident; $flavour:ident; $($name:ident: $point:ident,)*) => {
        $(#[test]
        fn $name() {
            $crate::support::require!();
            use crate::sync_point::Point;
            use crate::pager::races::harness::Flavour;
            super::super::$act.race($crate::support::test_name!(), Flavour::$flavour, Point::$point);
        })*
        // A point that is left out is an error here.
        #[allow(unreachable_patterns, reason = "`AfterStart` is a point of some kinds of memory alone")]
        const _: fn(Point) = |point| match point {
            $(Point::$point => {})*
            Point::AfterStart => {}
            Point::AfterKept | Point::BeforeClear => {}
            // No points of every fault: see `found` and `control`.
            Point::BeforeAdopt | Point::AfterAdd | Point::BeforeForeign | Point::BeforeLend | Point::BeforeMap | Point::Watch(_) | Point::Evict(_) => {}
        };
        use crate::sync_point::Point;
    };
}
pub(super) use races;
