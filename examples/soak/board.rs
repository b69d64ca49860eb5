//! What every thread of every process is doing, in memory that all share: to find threads that hang.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use userfaultfd_examples::memfd;

macro_rules! acts {
    ($($name:ident: $what:literal,)*) => {
        /// What a thread does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Act { $($name,)* }

        impl Act {
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];

            pub(crate) fn what(self) -> &'static str {
                match self { $(Self::$name => $what,)* }
            }
        }
    };
}

acts! {
    Read: "pages read",
    KernelRead: "pages read by a system call",
    Write: "pages written",
    Remove: "ranges removed",
    Move: "ranges moved",
    MoveWhole: "ranges moved, and nothing left",
    Replace: "ranges mapped anew, and a region added",
    Fork: "forks",
    HandOver: "descriptors handed to another pager",
    Detach: "pagers detached",
    FinishRegion: "regions finished",
    Finish: "pagers finished",
    RemoveRegion: "regions removed",
    Drop: "pagers dropped",
    Renew: "memory set up",
    Check: "memory checked whole",
    Poisoned: "accesses to poisoned pages",
    Refused: "requests that this kernel refuses",
    Lazy: "LazyMemory",
    Limited: "memories of ten times their limit",
    Paged: "stores as memory of ten times its limit",
    Crowd: "crowds that waited for a source",
    Outage: "sources that were down for seconds",
    Remaps: "mappings that grew, shrank and moved",
    Signals: "faults under a hail of signals",
    ChildDrops: "children that dropped or left memory",
    Many: "hundreds of memories",
    Limits: "processes that reached a limit",
    Locked: "processes with all of their memory locked",
    Thousand: "processes with a thousand memories",
}

/// What one thread does.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Slot {
    /// Grows with each act. Odd while one is going on.
    sequence: AtomicUsize,
    act: AtomicUsize,
    /// Where: the arena, its page, and the address.
    arena: AtomicUsize,
    page: AtomicUsize,
    address: AtomicUsize,
    /// What the page was then.
    state: AtomicUsize,
    counts: [AtomicUsize; Act::ALL.len()],
}

/// A copy of what a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Doing {
    pub(crate) sequence: usize,
    pub(crate) act: Act,
    pub(crate) arena: usize,
    pub(crate) page: usize,
    pub(crate) address: usize,
    pub(crate) state: usize,
}

/// The page of a thread that is at none.
pub(crate) const NOWHERE: usize = usize::MAX;

impl Slot {
    /// An act begins.
    pub(crate) fn begin(&self, act: Act, arena: usize) {
        self.act.store(act as usize, Ordering::Relaxed);
        self.arena.store(arena, Ordering::Relaxed);
        self.page.store(NOWHERE, Ordering::Relaxed);
        self.address.store(0, Ordering::Relaxed);
        self.sequence.fetch_or(1, Ordering::Release);
    }

    /// It is at a page now. A thread that takes the page away sees that.
    pub(crate) fn at(&self, page: usize) {
        self.page.store(page, Ordering::SeqCst);
    }

    pub(crate) fn touches(&self, address: usize, state: u32) {
        self.address.store(address, Ordering::Relaxed);
        self.state.store(state as usize, Ordering::Relaxed);
    }

    /// It ends, and counts.
    pub(crate) fn end(&self, act: Act) {
        self.page.store(NOWHERE, Ordering::SeqCst);
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store((sequence | 1) + 1, Ordering::Release);
        self.count(act);
    }

    pub(crate) fn count(&self, act: Act) {
        self.counts[act as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Whether its thread is at a page of a range.
    pub(crate) fn is_at(&self, arena: usize, pages: &std::ops::Range<usize>) -> bool {
        pages.contains(&self.page.load(Ordering::SeqCst)) && self.arena.load(Ordering::SeqCst) == arena
    }

    /// What is going on, if something is.
    pub(crate) fn doing(&self) -> Option<Doing> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let act = Act::ALL[self.act.load(Ordering::Relaxed)];
        let [arena, page, address, state] =
            [&self.arena, &self.page, &self.address, &self.state].map(|cell| cell.load(Ordering::Relaxed));
        (sequence % 2 == 1).then_some(Doing { sequence, act, arena, page, address, state })
    }

    /// Nobody has it any more.
    pub(crate) fn leave(&self) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store((sequence | 1) + 1, Ordering::Release);
    }
}

/// The slots.
#[derive(Debug)]
pub(crate) struct Board {
    mapping: MmapRaw,
    slots: usize,
}

impl Board {
    /// A new one, and the file to map it by elsewhere.
    pub(crate) fn new(slots: usize) -> io::Result<(Self, File)> {
        let file = memfd(slots * size_of::<Slot>())?;
        Ok((Self::map(&file)?, file))
    }

    pub(crate) fn map(file: &File) -> io::Result<Self> {
        let mapping = MmapOptions::new().map_raw(file)?;
        Ok(Self { slots: mapping.len() / size_of::<Slot>(), mapping })
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        // SAFETY: the mapping has this length, aligned as pages are, shared, and there as long as `self`. Its atomics are
        // good whatever they hold, and nothing else leads to it.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast(), self.slots) }
    }

    /// How often each act was done.
    pub(crate) fn counts(&self) -> [usize; Act::ALL.len()] {
        std::array::from_fn(|act| {
            self.slots().iter().map(|slot| slot.counts[act].load(Ordering::Relaxed)).sum()
        })
    }
}
