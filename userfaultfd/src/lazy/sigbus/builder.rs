//! [`SigbusBuilder`].

#![expect(unsafe_code, reason = "the memory is made here")]

use std::fmt;
use std::sync::Arc;

use super::{Owned, SignalSafe};
use crate::FeatureFlags;
use crate::lazy::builder::{Mapped, Shape, open, shape_methods};
use crate::lazy::{LazyMemory, ServedBy};
use crate::pager::Result;

/// Builder for a [`LazyMemory`] that is filled in the thread that touches it: see [`LazyMemory::sigbus`].
///
/// ```
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::{BytesSource, FaultAround};
///
/// let source = BytesSource::new(vec![7; 1 << 20]);
/// let memory = LazyMemory::sigbus(source).offset(4096).len(100_000).fault_around(FaultAround::Page).build()?;
/// assert_eq!(memory[99_999], 7);
/// # Ok::<(), userfaultfd::pager::Error>(())
/// ```
#[must_use = "the memory is made by build"]
pub struct SigbusBuilder {
    shape: Shape,
    /// Where content of different kinds meets in the source.
    borders: Vec<u64>,
}

impl SigbusBuilder {
    pub(in crate::lazy) fn new(source: impl SignalSafe + 'static) -> Self {
        let borders = source.borders();
        Self { shape: Shape::new(source), borders }
    }

    shape_methods!();

    /// Maps the memory, and installs the handler unless it is.
    ///
    /// # Errors
    ///
    /// - [`NoLength`](crate::pager::Error::NoLength): a source without a length, and no [`len`](Self::len).
    /// - [`EmptyRegion`](crate::pager::Error::EmptyRegion): a length of 0.
    /// - [`BeyondSource`](crate::pager::Error::BeyondSource): the source has less.
    /// - [`PageSize`](crate::pager::Error::PageSize): there are no huge pages of this size.
    /// - [`NoHugePages`](crate::pager::Error::NoHugePages): too few huge pages are reserved.
    /// - [`Source`](crate::pager::Error::Source): the page with the end of the source, or with another
    ///   [border](SignalSafe::borders), couldn't be read.
    /// - [`Uffd`](crate::pager::Error::Uffd): no userfaultfd could be created; the error says what helps.
    /// - [`System`](crate::pager::Error::System): failed to map memory.
    pub fn build(self) -> Result<LazyMemory> {
        let Mapped { memory, region, len } = self.shape.map()?;
        let uffd = open(false, FeatureFlags::SIGBUS, FeatureFlags::empty())?;
        // SAFETY: as for `add_own`, of memory that is this function's. `new` takes nothing but sources that are
        // signal-safe, and these are the source's borders.
        let owned = unsafe { Owned::new(uffd, region, &self.borders) }?;
        memory.lock_on_fault()?;
        memory.hold();
        let region = Arc::clone(owned.lazy().region());
        Ok(LazyMemory { served: ServedBy::Sigbus(owned), memory, region, len, handles_kernel_faults: false })
    }
}

impl fmt::Debug for SigbusBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("SigbusBuilder");
        self.shape.debug(&mut f);
        f.finish_non_exhaustive()
    }
}
