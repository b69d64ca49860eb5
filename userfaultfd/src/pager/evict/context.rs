//! What eviction knows of the pager that serves a memory: not which threads it has, nor how pages are filled.

use std::sync::Arc;

use crate::pager::memory::table::Table;
use crate::pager::reports::Reports;
use crate::pager::{Problem, RetryPolicy};

/// The pager makes one for each memory that it attaches to a budget.
pub(crate) struct EvictContext {
    /// How writes to a store are retried.
    pub(crate) retry: RetryPolicy,
    pub(crate) reports: Arc<Reports>,
    /// Where descriptors of shared memory are looked up.
    pub(crate) table: Arc<Table>,
}

impl EvictContext {
    /// Has a problem reported.
    pub(super) fn report(&self, problem: Problem) {
        self.reports.post(problem);
    }
}
