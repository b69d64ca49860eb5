//! The state of a process's pages: written, present, swapped out, accessed (`PAGEMAP_SCAN`, Linux 6.7).
//!
//! A [`Pagemap`] belongs to one process. A [`Scan`] selects addresses and pages, and what to do with them; each call of
//! [`Scan::next_regions`] returns the next ones as [`Region`]s, until the whole range is scanned.
//!
//! Together with [`WP_ASYNC`](crate::FeatureFlags::WP_ASYNC) this is dirty tracking: the kernel notes writes itself, and
//! one scan reports the written pages and protects them again, without losing a write in between. For a ready tracker
//! see `DirtyTracker`.
//!
//! ```
//! use userfaultfd::pagemap::{Categories, Pagemap, Region, Scan};
//! use userfaultfd::{FeatureFlags, RegisterMode, Support, UffdBuilder};
//!
//! if !Support::probe()?.features().contains(FeatureFlags::WP_ASYNC) {
//!     return Ok(()); // before Linux 6.7
//! }
//! let page = userfaultfd::page_size();
//! let mut memory = memmap2::MmapMut::map_anon(16 * page)?;
//! let start = memory.as_mut_ptr().addr();
//! let uffd = UffdBuilder::new().require_features(FeatureFlags::WP_ASYNC).create()?;
//! uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), RegisterMode::WRITE_PROTECT)?;
//! uffd.write_protect(memory.as_mut_ptr().cast(), memory.len())?;
//!
//! memory[3 * page] = 1;
//! memory[4 * page] = 1;
//!
//! let pagemap = Pagemap::of_self()?;
//! let mut scan = Scan::new(start..start + memory.len());
//! scan.all_of(Categories::WRITTEN).write_protect(true);
//! let mut regions = [Region::default(); 8];
//! let written = scan.next_regions(&pagemap, &mut regions)?.expect("nothing was looked at before");
//! assert_eq!(written.len(), 1);
//! assert_eq!(written[0].range(), start + 3 * page..start + 5 * page);
//! assert!(scan.next_regions(&pagemap, &mut regions)?.is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Sources: [`PAGEMAP_SCAN(2const)`](https://man7.org/linux/man-pages/man2/PAGEMAP_SCAN.2const.html), the
//! kernel's `admin-guide/mm/pagemap`.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
#[cfg(any(feature = "tracking", feature = "snapshot"))]
use std::os::unix::fs::FileExt;

use crate::error::errno_of;
use crate::features::kernel_flags;
use crate::{Error, Pid, Result, sys};

kernel_flags! {
    /// The categories of a page. Unknown bits, from newer kernels, are kept.
    pub struct Categories {
        /// In a range that is registered for asynchronous write protection.
        #[doc(alias = "PAGE_IS_WPALLOWED")]
        WPALLOWED = sys::PAGE_IS_WPALLOWED, 6 . 7, "Asynchronous write protection is possible";
        /// In such a range pages that nothing has populated count as written, but for holes of hugetlb
        /// memory. Up to Linux 7.2 pages outside of such ranges are reported as written too, so combine it
        /// with `WPALLOWED` or scan only your own ranges.
        #[doc(alias = "PAGE_IS_WRITTEN")]
        WRITTEN = sys::PAGE_IS_WRITTEN, 6 . 7, "Written since it was write-protected";
        /// Shared memory is of a file here.
        #[doc(alias = "PAGE_IS_FILE")]
        FILE = sys::PAGE_IS_FILE, 6 . 7, "Of a file";
        ///
        #[doc(alias = "PAGE_IS_PRESENT")]
        PRESENT = sys::PAGE_IS_PRESENT, 6 . 7, "In memory";
        ///
        #[doc(alias = "PAGE_IS_SWAPPED")]
        SWAPPED = sys::PAGE_IS_SWAPPED, 6 . 7, "Swapped out";
        ///
        #[doc(alias = "PAGE_IS_PFNZERO")]
        PFNZERO = sys::PAGE_IS_PFNZERO, 6 . 7, "The shared zero page";
        ///
        #[doc(alias = "PAGE_IS_HUGE")]
        HUGE = sys::PAGE_IS_HUGE, 6 . 7, "Part of a huge page (transparent or hugetlb)";
        ///
        #[doc(alias = "PAGE_IS_SOFT_DIRTY")]
        SOFT_DIRTY = sys::PAGE_IS_SOFT_DIRTY, 6 . 7, "Soft-dirty: written since /proc/PID/clear_refs said so";
        ///
        #[doc(alias = "PAGE_IS_GUARD")]
        GUARD = sys::PAGE_IS_GUARD, 6 . 16, "A guard of MADV_GUARD_INSTALL";
        /// Only in ranges that are registered for read-write protection. Use it to find pages in use; pages
        /// that aren't reported need not be cold.
        #[doc(alias = "PAGE_IS_ACCESSED")]
        ACCESSED = sys::PAGE_IS_ACCESSED, 7 . 3, "Accessed since it was read-write-protected";
    }
    const _ = !0;
}

/// Adjacent pages that are equal in the categories that the scan reports.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Region(sys::page_region);

#[expect(unsafe_code, reason = "the layout is this type's")]
// SAFETY: it is transparent, and has nothing but numbers, of which any are valid.
unsafe impl sys::PageRegion for Region {}

impl Region {
    /// Returns the addresses, in bytes.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.0.start as usize..self.0.end as usize
    }

    /// Returns the categories of the pages, among those [reported](Scan::report).
    #[must_use]
    pub fn categories(&self) -> Categories {
        Categories::from_bits_retain(self.0.categories)
    }
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        (self.range(), self.categories()) == (other.range(), other.categories())
    }
}

impl Eq for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x} {}", self.0.start, self.0.end, self.categories())
    }
}

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the page map of the calling process.
    ///
    /// # Errors
    ///
    /// [`SystemError`](Error::SystemError) with `ENOENT` where `/proc` isn't mounted, `EMFILE`.
    pub fn of_self() -> Result<Self> {
        File::open("/proc/self/pagemap").map(Self).map_err(|error| Error::SystemError(errno_of(&error)))
    }

    /// Opens the page map of another process.
    ///
    /// # Errors
    ///
    /// [`NoAccess`](Error::NoAccess) with `ENOENT` if there is no such process, `EACCES` or `EPERM` if the caller may not read
    /// its memory by ptrace(2).
    pub fn of(pid: Pid) -> Result<Self> {
        let opened = File::open(format!("/proc/{pid}/pagemap"));
        opened.map(Self).map_err(|error| Error::NoAccess { process: pid, errno: errno_of(&error) })
    }

    /// Reads the words of some pages, beginning with the one at `start`, eight bytes each.
    #[cfg(any(feature = "tracking", feature = "snapshot"))]
    pub(crate) fn read_words(&self, start: usize, words: &mut [u8]) -> Result<()> {
        let at = start as u64 / sys::page_size() as u64 * 8;
        self.0.read_exact_at(words, at).map_err(|error| Error::SystemError(errno_of(&error)))
    }
}

impl From<OwnedFd> for Pagemap {
    /// Adopts an open `/proc/PID/pagemap`.
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A scan of a range: which pages to pick, what to report of them, and whether to protect them.
///
/// By default every page of every mapping in the range is picked, and no category is reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    range: Range<u64>,
    done: bool,
    flags: u64,
    inverted: Categories,
    all_of: Categories,
    any_of: Categories,
    report: Categories,
    max_pages: u64,
}

impl Scan {
    /// Returns a scan of a range of addresses. The start must be page-aligned; the end is rounded up to a page.
    #[must_use]
    pub fn new(range: Range<usize>) -> Self {
        Self {
            range: range.start as u64..range.end as u64,
            done: false,
            flags: 0,
            inverted: Categories::empty(),
            all_of: Categories::empty(),
            any_of: Categories::empty(),
            report: Categories::empty(),
            max_pages: 0,
        }
    }

    /// Picks only pages that have all of these categories, and reports these. Adds to earlier calls.
    pub fn all_of(&mut self, categories: Categories) -> &mut Self {
        self.all_of |= categories;
        self.report(categories)
    }

    /// Picks only pages that have at least one of these categories, and reports these. Adds to earlier calls.
    pub fn any_of(&mut self, categories: Categories) -> &mut Self {
        self.any_of |= categories;
        self.report(categories)
    }

    /// Picks only pages that have none of these categories. Adds to earlier calls.
    pub fn none_of(&mut self, categories: Categories) -> &mut Self {
        self.all_of |= categories;
        self.inverted |= categories;
        self
    }

    /// Reports these categories of the picked pages. Adjacent pages with different reported categories are separate regions.
    /// Adds to earlier calls.
    pub fn report(&mut self, categories: Categories) -> &mut Self {
        self.report |= categories;
        self
    }

    /// Limits each call to `pages` picked pages; the next call goes on behind them. The default is 0: no limit.
    pub fn max_pages(&mut self, pages: usize) -> &mut Self {
        self.max_pages = pages as u64;
        self
    }

    /// Write-protects every page that is picked and was written, in the same step: no write falls between.
    ///
    /// Only where asynchronous write protection is on; elsewhere it does nothing, unless
    /// [`require_async`](Self::require_async). The default is `false`.
    ///
    /// Kernels before mid-2025 may lock up on hugetlb memory that isn't populated: there
    /// [`write_protect`](crate::Uffd::write_protect) the range first, which avoids it.
    #[doc(alias = "PM_SCAN_WP_MATCHING")]
    pub fn write_protect(&mut self, write_protect: bool) -> &mut Self {
        self.set(sys::PM_SCAN_WP_MATCHING, write_protect)
    }

    /// Fails with `EPERM` on memory that isn't registered for asynchronous write protection. The default is
    /// `false`.
    #[doc(alias = "PM_SCAN_CHECK_WPASYNC")]
    pub fn require_async(&mut self, require_async: bool) -> &mut Self {
        self.set(sys::PM_SCAN_CHECK_WPASYNC, require_async)
    }

    fn set(&mut self, flag: u64, on: bool) -> &mut Self {
        if on {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
        self
    }

    /// Returns the addresses that aren't scanned yet.
    #[must_use]
    pub fn remaining(&self) -> Range<usize> {
        self.range.start as usize..self.range.end as usize
    }

    /// Scans on, writes the next regions into `regions`, and returns those. An empty slice means that no page of the scanned
    /// part was picked; `None` that the whole range was scanned before.
    ///
    /// With no room in `regions` nothing is reported, but pages are [write-protected](Self::write_protect)
    /// all the same.
    ///
    /// Since Linux 6.7. What the kernel doesn't lock can change meanwhile.
    ///
    /// # Errors
    ///
    /// [`EmptyBuffer`](Error::EmptyBuffer): no room in `regions`, and nothing to protect either.
    /// [`SystemError`](Error::SystemError), with the scan left where it was, and
    ///
    /// - `EINVAL`: the start is unaligned; a category that this kernel doesn't know (`GUARD` before 6.16,
    ///   `ACCESSED` before 7.3).
    /// - `EFAULT`: the range ends before it starts, or lies beyond the address space.
    /// - `ENOTTY`: before 6.7, or the descriptor is something else.
    /// - `EPERM`: [`require_async`](Self::require_async) met other memory.
    /// - `ENOMEM`: no memory.
    /// - `ESRCH`: the process is gone. Some kernels, of 6.18 for one, find nothing then instead.
    #[doc(alias = "PAGEMAP_SCAN")]
    pub fn next_regions<'a>(
        &mut self,
        pagemap: &Pagemap,
        regions: &'a mut [Region],
    ) -> Result<Option<&'a [Region]>> {
        if self.done {
            return Ok(None);
        }
        if regions.is_empty() && self.flags & sys::PM_SCAN_WP_MATCHING == 0 {
            return Err(Error::EmptyBuffer);
        }
        let mut arg = sys::pm_scan_arg {
            size: size_of::<sys::pm_scan_arg>() as u64,
            flags: self.flags,
            start: self.range.start,
            end: self.range.end,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: self.max_pages,
            category_inverted: self.inverted.bits(),
            category_mask: self.all_of.bits(),
            category_anyof_mask: self.any_of.bits(),
            return_mask: self.report.bits(),
        };
        let filled = sys::pagemap_scan(pagemap.as_fd(), &mut arg, regions)?;
        // The kernel rounds the end up to a page, so it may have walked past ours.
        self.done = arg.walk_end >= self.range.end;
        self.range.start = arg.walk_end.min(self.range.end);
        Ok(Some(&regions[..filled]))
    }
}
