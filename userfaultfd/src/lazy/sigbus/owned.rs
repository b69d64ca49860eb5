//! The owner of memory whose faults are answered in the thread that makes them.

#![expect(unsafe_code, reason = "memory that handlers find as long as this lives")]

use std::os::fd::AsFd;
use std::sync::Arc;

use super::memory::Lazy;
use super::{handler, table};
use crate::Uffd;
use crate::owner::{InheritedFd, Owner, abandon};
use crate::pager::{Region, Result};

/// Handlers find the memory until this is dropped.
#[derive(Debug)]
pub(crate) struct Owned {
    lazy: Arc<Lazy>,
    owner: Owner,
}

impl Owned {
    /// Registers a region of this process's memory, reads the pages that have one of `borders` inside, and has
    /// handlers find it.
    ///
    /// # Safety
    ///
    /// As [`Pager::add_own`](crate::pager::Pager::add_own). The source must be [`SignalSafe`](super::SignalSafe), with
    /// these borders.
    pub(crate) unsafe fn new(uffd: Uffd, region: Region, borders: &[u64]) -> Result<Self> {
        let owner = Owner::current()?;
        let lazy = Arc::new(Lazy::new(uffd, region, borders)?);
        handler::install()?;
        // SAFETY: the `Arc` keeps it where it is, and is given up by `drop` only after it was removed and nothing uses it.
        unsafe { table::add(Arc::as_ptr(&lazy), lazy.addresses()) }?;
        Ok(Self { lazy, owner })
    }

    pub(crate) fn lazy(&self) -> &Arc<Lazy> {
        &self.lazy
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.owner.is_current() {
            abandon(&self.lazy);
            // SAFETY: this is a fork's child, and the parent's memory is dropped no more in it. This has kept the
            // descriptor open.
            return unsafe { InheritedFd::new(self.lazy.uffd().as_fd()).close() };
        }
        self.lazy.end();
        table::remove(Arc::as_ptr(&self.lazy));
        self.lazy.wait_for_users();
    }
}
