//! The five operations that resolve a missing or minor fault, as one: what they have in common is tested in
//! one table.

use std::ffi::c_void;
use std::fmt;

use userfaultfd::{
    Errno, Error, FeatureFlags, IoctlFlags, MoveMode, RegisterMode, Result, Uffd, ZeropageMode,
};

use super::memory::{Kind, Memory};
use super::{has_features, page, uffd};

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Copy,
    Zeropage,
    Continue,
    Poison,
    Move,
}

impl Fill {
    pub(crate) const ALL: [Fill; 5] = [Fill::Copy, Fill::Zeropage, Fill::Continue, Fill::Poison, Fill::Move];

    /// Whether it resolves faults on memory of a kind.
    pub(crate) fn fits(self, kind: Kind) -> bool {
        match self {
            Fill::Copy | Fill::Poison => true,
            Fill::Zeropage => !kind.is_hugetlb(),
            Fill::Continue => kind != Kind::Anonymous,
            Fill::Move => kind == Kind::Anonymous,
        }
    }

    /// A kind that it fits.
    pub(crate) fn home(self) -> Kind {
        if self == Fill::Continue { Kind::Memfd } else { Kind::Anonymous }
    }

    /// The faults that it resolves.
    pub(crate) fn modes(self) -> RegisterMode {
        if self == Fill::Continue { RegisterMode::MINOR } else { RegisterMode::MISSING }
    }

    /// The features that tell whether this kernel has it.
    pub(crate) fn needs(self) -> FeatureFlags {
        match self {
            Fill::Poison => FeatureFlags::POISON,
            Fill::Move => FeatureFlags::MOVE,
            _ => FeatureFlags::empty(),
        }
    }

    /// What a page holds afterwards, in its first byte. Nobody reads a poisoned one.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Fill::Copy => 7,
            Fill::Continue => 8,
            Fill::Move => 9,
            Fill::Zeropage | Fill::Poison => 0,
        }
    }

    /// The error for stopping after `done` bytes, or what stands for it.
    fn stopped(self, done: usize, errno: Errno) -> Result<usize> {
        let stopped = |ioctl| Err(Error::Stopped { ioctl, done, errno });
        match self {
            Fill::Copy if errno == Errno::EAGAIN => Err(Error::PartiallyCopied(done)),
            Fill::Copy => Err(Error::CopyFailed(errno)),
            Fill::Zeropage => stopped(IoctlFlags::ZEROPAGE),
            Fill::Continue if done == 0 => Err(Error::SystemError(errno)),
            Fill::Continue => Ok(done),
            Fill::Poison => stopped(IoctlFlags::POISON),
            Fill::Move => stopped(IoctlFlags::MOVE),
        }
    }
}

/// An operation, a userfaultfd, memory that is registered with it, and what to fill it from.
pub(crate) struct Filler {
    pub(crate) fill: Fill,
    pub(crate) uffd: Uffd,
    pub(crate) memory: Memory,
    content: Vec<u8>,
    source: Memory,
}

impl fmt::Debug for Filler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on {:?}", self.fill, self.memory)
    }
}

impl Filler {
    /// For memory of a kind, registered for what the operation resolves. `None`, visibly, where this kernel
    /// lacks it.
    pub(crate) fn try_new(test: &str, fill: Fill, kind: Kind, pages: usize) -> Option<Self> {
        Self::try_with(test, fill, kind, pages, FeatureFlags::empty())
    }

    /// [`try_new`](Self::try_new), and with features of the userfaultfd.
    pub(crate) fn try_with(
        test: &str,
        fill: Fill,
        kind: Kind,
        pages: usize,
        features: FeatureFlags,
    ) -> Option<Self> {
        let part = format!("{test} ({fill:?}, {kind:?})");
        if !has_features(&part, kind.needs(fill.modes())? | fill.needs() | features) {
            return None;
        }
        let memory = Memory::try_new(test, kind, pages)?;
        let filler = Self::over(fill, uffd(features), memory);
        filler.uffd.register_with_mode(filler.memory.start(), filler.memory.len(), fill.modes()).unwrap();
        Some(filler)
    }

    /// With memory that isn't registered.
    pub(crate) fn over(fill: Fill, uffd: Uffd, memory: Memory) -> Self {
        if fill == Fill::Continue && memory.kind() != Kind::Anonymous {
            let alias = memory.alias();
            (0..memory.pages()).for_each(|page| alias.write(page, fill.byte()));
        }
        let content = if fill == Fill::Copy { vec![fill.byte(); memory.len()] } else { Vec::new() };
        let source = Memory::anonymous(if fill == Fill::Move { memory.len() / page() } else { 1 });
        (0..source.pages()).for_each(|page| source.write(page, fill.byte()));
        Self { fill, uffd, memory, content, source }
    }

    /// The operation for `pages` pages of the memory.
    pub(crate) fn run(&self, first: usize, pages: usize, wake: bool) -> Result<usize> {
        self.run_at(self.memory.at(first), pages * self.memory.page(), wake)
    }

    /// The operation for any range.
    pub(crate) fn run_at(&self, start: *mut c_void, len: usize, wake: bool) -> Result<usize> {
        self.run_by(&self.uffd, start, len, wake)
    }

    /// The operation by another userfaultfd.
    pub(crate) fn run_by(&self, uffd: &Uffd, start: *mut c_void, len: usize, wake: bool) -> Result<usize> {
        match self.fill {
            // SAFETY: the content lives on, and the memory is accessed only by raw pointers.
            Fill::Copy => unsafe { uffd.copy(self.content.as_ptr().cast(), start, len, wake) },
            // SAFETY: the memory is accessed only by raw pointers.
            Fill::Zeropage => unsafe {
                let mode = if wake { ZeropageMode::empty() } else { ZeropageMode::DONT_WAKE };
                uffd.zeropage_with(start, len, mode)
            },
            Fill::Continue => uffd.r#continue(start, len, wake).map(|mapped| mapped as usize),
            // SAFETY: nobody accesses the memory afterwards but threads that expect SIGBUS.
            Fill::Poison => unsafe { uffd.poison(start, len, wake) },
            Fill::Move => {
                let mode = if wake { MoveMode::empty() } else { MoveMode::DONT_WAKE };
                let offset = start.addr().wrapping_sub(self.memory.start().addr()) / page() * page();
                let page = if offset < self.source.len() { offset / page() } else { 0 };
                // SAFETY: source and memory are accessed only by raw pointers.
                unsafe { uffd.move_pages(self.source.at(page), start, len, mode) }
            }
        }
    }

    /// Checks that the operation stopped as it should, and that the error answers every question so.
    #[track_caller]
    pub(crate) fn assert_stopped(&self, result: &Result<usize>, done_pages: usize, errno: Errno) {
        let done = done_pages * self.memory.page();
        let expected = self.fill.stopped(done, errno);
        assert_eq!(format!("{result:?}"), format!("{expected:?}"), "{self:?}");
        if let Err(error) = result {
            assert_eq!(error.errno(), Some(errno));
            assert_eq!(error.is_retryable(), errno == Errno::EAGAIN);
            let progress = if self.fill == Fill::Continue { None } else { Some(done) };
            assert_eq!(error.progress(), progress);
        }
    }
}

/// Every operation on memory of every kind that it fits, of `pages` pages each, one after the other.
pub(crate) fn each(test: &str, pages: usize) -> impl Iterator<Item = Filler> {
    let pairs = Fill::ALL.into_iter().flat_map(|fill| Kind::ALL.map(|kind| (fill, kind)));
    pairs
        .filter(|(fill, kind)| fill.fits(*kind))
        .filter_map(move |(fill, kind)| Filler::try_new(test, fill, kind, pages))
}
