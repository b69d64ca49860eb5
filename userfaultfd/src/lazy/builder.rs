//! What [`LazyMemory`] is made of, and [`LazyBuilder`].

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::{LazyMemory, ServedBy};
use crate::own_mapping::OwnMapping;
use crate::pager::evict::residence::Residence;
use crate::pager::evict::store::{BeforeWrite, StoreBacking};
use crate::pager::{
    self, Budget, Delivery, Error, FaultAround, PageSource, PageStore, Pager, PagerBuilder, Problem, Region,
    RetryPolicy, WriteBack,
};
use crate::{Errno, FeatureFlags, Uffd, UffdBuilder};

/// Which content lies where: what all memory has, whatever fills it.
pub(super) struct Shape {
    source: Arc<dyn PageSource>,
    pub(super) offset: u64,
    pub(super) len: Option<usize>,
    pub(super) page_size: usize,
    pub(super) around: FaultAround,
}

/// A mapping, the region that it becomes, and its length in bytes.
pub(super) struct Mapped {
    pub(super) memory: OwnMapping,
    pub(super) region: Region,
    pub(super) len: usize,
}

impl Shape {
    pub(super) fn new(source: impl PageSource + 'static) -> Self {
        Self {
            source: Arc::new(source),
            offset: 0,
            len: None,
            page_size: crate::page_size(),
            around: FaultAround::default(),
        }
    }

    /// Maps the memory.
    pub(super) fn map(self) -> pager::Result<Mapped> {
        let Self { source, offset, len, page_size, around } = self;
        let rest = source.len().map(|end| usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX));
        let len = len.or(rest).ok_or(Error::NoLength)?;
        if len == 0 {
            return Err(Error::EmptyRegion { address: 0 });
        }
        if let (true, Some(source_len)) = (rest.is_some_and(|rest| len > rest), source.len()) {
            return Err(Error::BeyondSource { address: 0, len, offset, source_len });
        }
        if !page_size.is_power_of_two() || page_size < crate::page_size() {
            return Err(Error::PageSize { address: 0, page_size });
        }
        let huge = (page_size != crate::page_size()).then(|| page_size.trailing_zeros() as u8);
        let whole = len.checked_next_multiple_of(page_size).filter(|len| isize::try_from(*len).is_ok());
        // What the kernel says of less.
        let whole = whole.ok_or(Errno::ENOMEM)?;
        let around = match around {
            // More than all of the memory is all of it.
            FaultAround::Block(block) => {
                FaultAround::Block(block.clamp(1, whole).next_multiple_of(page_size))
            }
            around => around,
        };
        let memory = OwnMapping::new(whole, huge).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) if huge.is_some() => Error::PageSize { address: 0, page_size },
            Some(libc::ENOMEM) if huge.is_some() => Error::NoHugePages { page_size, len: whole },
            _ => Error::System(error),
        })?;
        let region = Region::new(memory.as_ptr().expose_provenance(), whole, source)
            .offset(offset)
            .page_size(page_size)
            .fault_around(around);
        Ok(Mapped { memory, region, len })
    }

    pub(super) fn debug(&self, f: &mut fmt::DebugStruct<'_, '_>) {
        f.field("source_len", &self.source.len())
            .field("offset", &self.offset)
            .field("len", &self.len)
            .field("page_size", &self.page_size)
            .field("around", &self.around);
    }
}

/// The methods of builders about the [`Shape`].
macro_rules! shape_methods {
    () => {
        /// Sets the length in bytes. The default is the length of the source from the offset on.
        pub fn len(mut self, bytes: usize) -> Self {
            self.shape.len = Some(bytes);
            self
        }

        /// Sets the offset in the source, in bytes, at which the memory begins. The default is 0.
        pub fn offset(mut self, offset: u64) -> Self {
            self.shape.offset = offset;
            self
        }

        /// Sets the size of huge pages, in bytes: 2 MiB or 1 GiB on x86-64. They must be
        /// [reserved](https://docs.kernel.org/admin-guide/mm/hugetlbpage.html). A fault fills a whole huge page. By default
        /// the memory has pages of the system's size.
        pub fn huge_pages(mut self, bytes: usize) -> Self {
            self.shape.page_size = bytes;
            self
        }

        /// Sets how much is filled for one fault. The default is [`FaultAround::Adaptive`](crate::pager::FaultAround::Adaptive) with at most 2 MiB.
        pub fn fault_around(mut self, around: crate::pager::FaultAround) -> Self {
            self.shape.around = around;
            self
        }

        /// Fills, for one fault, the block of `bytes` bytes that has the faulting address: short for
        /// [`FaultAround::Block`](crate::pager::FaultAround::Block). The size is rounded up to whole pages.
        pub fn block(self, bytes: usize) -> Self {
            self.fault_around(crate::pager::FaultAround::Block(bytes))
        }
    };
}

pub(super) use shape_methods;

/// Builder for a [`LazyMemory`] that is filled by a pager.
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::PageData;
///
/// let squares = |offset: u64, page: &mut [u8]| {
///     for (at, word) in page.chunks_exact_mut(8).enumerate() {
///         let index = offset / 8 + at as u64;
///         word.copy_from_slice(&(index * index).to_ne_bytes());
///     }
///     Ok(PageData::Data)
/// };
/// let memory = LazyMemory::builder(squares).len(1 << 30).threads(2).build()?;
/// let at = 8 * 12345;
/// assert_eq!(memory[at..at + 8], 152_399_025_u64.to_ne_bytes());
/// # Ok::<(), userfaultfd::pager::Error>(())
/// ```
#[must_use = "the memory is made by build"]
pub struct LazyBuilder {
    shape: Shape,
    pager: Option<Arc<Pager>>,
    own: PagerBuilder,
    kernel: Option<bool>,
    /// The features that a tracker's protection uses where the kernel has them.
    protection: FeatureFlags,
    budget: Option<Budget>,
    /// Where the spill file is made.
    spill: Option<PathBuf>,
    /// Where written pages go, if not to a spill file.
    store: Option<StoreOptions>,
    /// Whether pages are moved to the staging area, if the kernel can.
    moves: bool,
}

/// How written pages go back to the source.
pub(super) struct StoreOptions {
    pub(super) store: Arc<dyn PageStore>,
    pub(super) write_back: WriteBack,
    pub(super) before_write: Option<BeforeWrite>,
}

impl LazyBuilder {
    pub(super) fn new(source: impl PageSource + 'static) -> Self {
        Self {
            shape: Shape::new(source),
            pager: None,
            own: Pager::builder(),
            kernel: None,
            protection: FeatureFlags::WP_ASYNC | FeatureFlags::WP_UNPOPULATED,
            budget: None,
            spill: None,
            store: None,
            moves: true,
        }
    }

    shape_methods!();

    /// Sets up sequential access to a slow source, such as a network: reads up to `most` bytes ahead of one fault, 1 MiB at
    /// a time, with `threads` threads; with a budget, at most an eighth of it. See [`PagerBuilder::read_ahead_threads`].
    pub fn read_ahead(mut self, threads: usize, most: usize) -> Self {
        self.own = self.own.read_ahead_threads(threads);
        self.fault_around(FaultAround::Adaptive { most })
    }

    /// Sets how faults reach the worker that resolves them. The default is [`Delivery::Adaptive`].
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.own = self.own.delivery(delivery);
        self
    }

    /// Sets the number of threads that read the source from the start. The default is 1. See [`PagerBuilder::threads`].
    pub fn threads(mut self, threads: usize) -> Self {
        self.own = self.own.threads(threads);
        self
    }

    /// Sets the most threads that read the source at the same time. See [`PagerBuilder::max_threads`].
    pub fn max_threads(mut self, threads: usize) -> Self {
        self.own = self.own.max_threads(threads);
        self
    }

    /// Sets how a failing source is retried. The default is [`RetryPolicy::default`].
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.own = self.own.retry(retry);
        self
    }

    /// Sets the function that is called when the source fails, or something else goes wrong: see
    /// [`PagerBuilder::on_problem`].
    pub fn on_problem(mut self, on_problem: impl Fn(&Problem) + Send + Sync + 'static) -> Self {
        self.own = self.own.on_problem(on_problem);
        self
    }

    /// Uses a shared pager instead of starting one. Its options apply: threads, delivery, retries and problems.
    pub fn pager(mut self, pager: &Arc<Pager>) -> Self {
        self.pager = Some(Arc::clone(pager));
        self
    }

    /// Limits how much of the memory is resident, together with all else that shares the budget: see [`Budget`].
    ///
    /// Pages that weren't written are dropped and read again from the source, which must have the same content then: a
    /// reference to the memory would show it change (see "What is `unsafe`" in the [crate docs](crate)).
    /// Pages that were written go to a [spill file](Self::spill).
    ///
    /// Such memory can't be [filled](LazyMemory::fill), [tracked](LazyMemory::tracker) or saved in a
    /// [snapshot](LazyMemory::snapshot); nor is there any of [huge pages](Self::huge_pages), or in a process that locks what
    /// it maps. Don't take pages from it by madvise(2), nor lock it; mlockall(2) may wait for ever.
    /// [Pin](LazyMemory::pin) what you give to system calls,
    /// since a page that was touched may have left again. [`read_at`](LazyMemory::read_at) and its like go part by part, so
    /// that an error may come after some of it.
    ///
    /// Linux 5.7. Since 6.8 pages are moved out, before that copied.
    pub fn budget(mut self, budget: &Budget) -> Self {
        self.budget = Some(budget.clone());
        self
    }

    /// Sets the directory of the spill file of memory with a [budget](Self::budget). The file has no name there, and takes
    /// as much disk as was written of the memory. The default is the [temporary directory](std::env::temp_dir): where that
    /// is a tmpfs, what is spilled stays in memory.
    pub fn spill(mut self, dir: impl Into<PathBuf>) -> Self {
        self.spill = Some(dir.into());
        self
    }

    /// Has written pages go to the source, which is a store, too.
    pub(super) fn store(mut self, store: StoreOptions) -> Self {
        self.store = Some(store);
        self
    }

    /// Has pages copied to the staging area, as before Linux 6.8.
    #[cfg(test)]
    pub(crate) fn copied_out(self) -> Self {
        Self { moves: false, ..self }
    }

    /// Sets whether the pager resolves faults from kernel mode: of system calls and KVM guests on missing pages.
    ///
    /// `true` needs the [right](crate#rights) for it, and fails without. With `false` such a system call fails with
    /// `EFAULT`. By default the builder tries `true`, and falls back to `false`.
    pub fn handle_kernel_faults(mut self, serve: bool) -> Self {
        self.kernel = Some(serve);
        self
    }

    /// As on a kernel that can't protect otherwise.
    #[cfg(all(test, feature = "tracking"))]
    pub(super) fn protection(mut self, protection: FeatureFlags) -> Self {
        self.protection = protection;
        self
    }

    /// Maps the memory.
    ///
    /// # Errors
    ///
    /// - [`NoLength`](pager::Error::NoLength): a source without a [length](PageSource::len), and no [`len`](Self::len).
    /// - [`EmptyRegion`](pager::Error::EmptyRegion): a length of 0.
    /// - [`BeyondSource`](pager::Error::BeyondSource): the memory is longer than the source from the offset on.
    /// - [`PageSize`](pager::Error::PageSize): the machine has no huge pages of this size.
    /// - [`NoHugePages`](pager::Error::NoHugePages): too few huge pages are reserved.
    /// - [`NotWithBudget`](pager::Error::NotWithBudget): huge pages, or a process that locks what it maps.
    /// - [`BudgetTooSmall`](pager::Error::BudgetTooSmall): the budget has fewer than 16 pages.
    /// - [`Spill`](pager::Error::Spill): the spill file couldn't be made.
    /// - [`Uffd`](pager::Error::Uffd): no userfaultfd could be created; the error says what helps. Or the kernel can't
    ///   protect pages, which a budget needs.
    /// - [`System`](pager::Error::System): failed to map memory or to create a thread.
    pub fn build(self) -> pager::Result<LazyMemory> {
        let Self { shape, pager, own, kernel, protection, budget, spill, store, moves } = self;
        let (page_size, offset, budget) = (shape.page_size, shape.offset, budget.as_ref());
        let Mapped { memory, mut region, len } = shape.map()?;
        let (mut required, mut requested) = (FeatureFlags::empty(), FeatureFlags::THREAD_ID);
        match budget {
            None => requested |= protection,
            // The first write to a page has to be a fault, which asynchronous protection has none of.
            Some(budget) => {
                let reason = match (page_size == crate::page_size(), memory.is_locked()) {
                    (false, _) => Some(("huge_pages", "the kernel moves no such pages")),
                    (true, true) => Some(("mlockall", "locked pages don't leave")),
                    (true, false) => None,
                };
                if let Some((option, reason)) = reason {
                    return Err(Error::NotWithBudget { option, reason });
                }
                required |= FeatureFlags::PAGEFAULT_FLAG_WP;
                let count = region.range().len() / page_size;
                let residence = match store {
                    None => {
                        let dir = spill.unwrap_or_else(std::env::temp_dir);
                        Residence::with_spill(budget, count, &dir, moves)?
                    }
                    Some(StoreOptions { store, write_back, before_write }) => {
                        if offset % page_size as u64 != 0 {
                            return Err(Error::UnalignedStore { offset, page_size });
                        }
                        let store = StoreBacking::new(store, (offset, len), write_back, before_write)?;
                        Residence::with_store(budget, count, store, moves)?
                    }
                };
                region = region.residence(Arc::new(residence));
            }
        }
        let (uffd, handles_kernel_faults) = match kernel {
            Some(kernel) => (open(kernel, required, requested)?, kernel),
            None => match open(true, required, requested) {
                Ok(uffd) => (uffd, true),
                Err(_) => (open(false, required, requested)?, false),
            },
        };
        let pager = match pager {
            Some(pager) => pager,
            None => Arc::new(own.build()?),
        };
        #[expect(unsafe_code, reason = "the memory is this function's")]
        // SAFETY: nobody has seen the memory yet, and bytes are good whatever they are. It is unmapped only after the
        // pager has let go of it, and poison is what the documentation says.
        let added = unsafe { pager.add_lazy(uffd, region) }.map_err(|refused| refused.error)?;
        let (descriptor, id) = (added.descriptor, added.regions[0]);
        let region = Arc::clone(pager.target(id)?.region());
        let served = ServedBy::Pager(Arc::clone(&pager), descriptor, id, Arc::clone(&region.lease));
        let lazy = LazyMemory { served, memory, region, len, handles_kernel_faults };
        pager.attach_budget(id)?;
        lazy.memory.lock_on_fault()?;
        lazy.memory.hold();
        Ok(lazy)
    }
}

/// A userfaultfd.
pub(super) fn open(kernel: bool, required: FeatureFlags, requested: FeatureFlags) -> crate::Result<Uffd> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(!kernel);
    builder.require_features(required).request_features(requested).create()
}

impl fmt::Debug for LazyBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("LazyBuilder");
        self.shape.debug(&mut f);
        f.field("kernel", &self.kernel).finish_non_exhaustive()
    }
}
