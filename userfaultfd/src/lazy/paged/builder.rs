//! Builder for a [`PagedMemory`].

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::PagedMemory;
use crate::lazy::builder::{LazyBuilder, StoreOptions};
use crate::pager::evict::writer::Writer;
use crate::pager::{
    self, Budget, Delivery, Error, FaultAround, PageStore, Pager, Problem, RetryPolicy, WriteBack,
};

/// Builder for a [`PagedMemory`].
///
/// ```
/// use userfaultfd::PagedMemory;
/// use userfaultfd::pager::{Budget, FileStore, WriteBack};
///
/// # let path = std::env::temp_dir().join(format!("paged-builder-{}", std::process::id()));
/// # std::fs::write(&path, vec![1; 1 << 20])?;
/// let store = FileStore::open(&path)?;
/// let memory = PagedMemory::builder(store)
///     .budget(&Budget::new(256 << 10))
///     .write_back(WriteBack::OnFlush)
///     .before_write(|bytes| Ok(println!("the log must be durable before {bytes:?} are written")))
///     .build();
/// # std::fs::remove_file(&path)?;
/// match memory {
///     Ok(memory) => println!("{} bytes", memory.len()),
///     Err(error) => println!("{error}"), // no write protection here
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[must_use = "the memory is made by build"]
pub struct PagedBuilder {
    lazy: LazyBuilder,
    store: StoreOptions,
    budget: Option<Budget>,
}

impl PagedBuilder {
    pub(super) fn new(store: impl PageStore + 'static) -> Self {
        let store: Arc<dyn PageStore> = Arc::new(store);
        let lazy = LazyBuilder::new(Arc::clone(&store));
        let store = StoreOptions { store, write_back: WriteBack::default(), before_write: None };
        Self { lazy, store, budget: None }
    }

    fn with(self, change: impl FnOnce(LazyBuilder) -> LazyBuilder) -> Self {
        Self { lazy: change(self.lazy), ..self }
    }

    /// Limits how much is resident, together with all else that shares the budget. By default the memory has a budget of
    /// its own, without a limit.
    pub fn budget(mut self, budget: &Budget) -> Self {
        self.budget = Some(budget.clone());
        self
    }

    /// Sets when written pages may reach the store. The default is [`WriteBack::Any`].
    pub fn write_back(mut self, write_back: WriteBack) -> Self {
        self.store.write_back = write_back;
        self
    }

    /// Sets a function that is called before each write to the store, with the bytes of the store that will be written:
    /// what they will become was in memory before the call. An error keeps them from being written, as one of the store.
    ///
    /// It runs on the thread that writes, and mustn't do what a [store](PageStore#what-a-store-must-not-do) mustn't.
    pub fn before_write(
        mut self,
        hook: impl Fn(Range<u64>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.store.before_write = Some(Box::new(hook));
        self
    }

    /// Sets the length in bytes. The default is the length of the store from the offset on.
    pub fn len(self, bytes: usize) -> Self {
        self.with(|lazy| lazy.len(bytes))
    }

    /// Sets the offset in the store, in bytes, at which the memory begins: a multiple of the page size. The default is 0.
    pub fn offset(self, offset: u64) -> Self {
        self.with(|lazy| lazy.offset(offset))
    }

    /// Sets how much is filled for one fault: see [`LazyBuilder::fault_around`].
    pub fn fault_around(self, around: FaultAround) -> Self {
        self.with(|lazy| lazy.fault_around(around))
    }

    /// Sets how faults reach the worker that resolves them: see [`LazyBuilder::delivery`].
    pub fn delivery(self, delivery: Delivery) -> Self {
        self.with(|lazy| lazy.delivery(delivery))
    }

    /// Sets the number of threads that read the store from the start: see [`LazyBuilder::threads`].
    pub fn threads(self, threads: usize) -> Self {
        self.with(|lazy| lazy.threads(threads))
    }

    /// Sets the most threads that read the store at the same time: see [`LazyBuilder::max_threads`].
    pub fn max_threads(self, threads: usize) -> Self {
        self.with(|lazy| lazy.max_threads(threads))
    }

    /// Sets how a failing store is retried, when it is read and when it is written.
    pub fn retry(self, retry: RetryPolicy) -> Self {
        self.with(|lazy| lazy.retry(retry))
    }

    /// Sets the function that is called when the store fails, or something else goes wrong: see
    /// [`LazyBuilder::on_problem`].
    pub fn on_problem(self, on_problem: impl Fn(&Problem) + Send + Sync + 'static) -> Self {
        self.with(|lazy| lazy.on_problem(on_problem))
    }

    /// Uses a shared pager instead of starting one: see [`LazyBuilder::pager`].
    pub fn pager(self, pager: &Arc<Pager>) -> Self {
        self.with(|lazy| lazy.pager(pager))
    }

    /// Sets whether the pager resolves faults from kernel mode: see [`LazyBuilder::handle_kernel_faults`].
    pub fn handle_kernel_faults(self, serve: bool) -> Self {
        self.with(|lazy| lazy.handle_kernel_faults(serve))
    }

    /// Has pages copied to the staging area, as before Linux 6.8.
    #[cfg(test)]
    pub(crate) fn copied_out(self) -> Self {
        self.with(LazyBuilder::copied_out)
    }

    /// Maps the memory.
    ///
    /// # Errors
    ///
    /// Those of [`LazyBuilder::build`] with a budget, and [`UnalignedStore`](Error::UnalignedStore): the offset is no
    /// multiple of the page size.
    pub fn build(self) -> pager::Result<PagedMemory> {
        let Self { lazy, store, budget } = self;
        let budget = budget.unwrap_or_else(|| Budget::new(usize::MAX));
        let memory = lazy.budget(&budget).store(store).build()?;
        let residence = memory.region.residence.as_ref().ok_or(Error::NotServed)?;
        let writer = Writer::start(residence)?;
        Ok(PagedMemory { writer, memory, is_closed: false })
    }
}

impl fmt::Debug for PagedBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedBuilder")
            .field("lazy", &self.lazy)
            .field("write_back", &self.store.write_back)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}
