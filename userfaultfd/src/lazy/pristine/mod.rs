//! [`Pristine`]: memory that goes back to its image.
//!
//! The image lies in a sealed memfd, of which the memory is a private mapping. The kernel copies a page at its first write.
//! A reset reads what was written from the memfd again, into the copies that are there: that is cheaper than to drop a
//! copy and to have the kernel allocate and fill another one at the next write.
//!
//! A page that is written before each reset stays unprotected, so that writing it costs no fault ([`HotPages`]); it counts as
//! written then, and is read again whether it was or not.

mod builder;
mod hot;

use std::fmt;
use std::fs::File;
use std::ops::{ControlFlow, Deref, DerefMut, Range};
use std::os::fd::AsFd;

pub use self::builder::PristineBuilder;
use self::hot::HotPages;
use crate::dirty::DirtyTracker;
use crate::error::errno_of;
use crate::own_mapping::OwnMapping;
use crate::pagemap::{Categories, Pagemap, Region, Scan};
use crate::proc_maps::{Process, Source};
use crate::{Errno, Error, Result, page_size, sys};

/// Bytes of the shortest written range of which the pages are looked for that have no copy: a call, against the pages that
/// it may save.
const SCANNED_BYTES: usize = 64 << 10;

/// Memory of this process that [`reset`](Self::reset) brings back to an image: for sandboxes, fuzzers and WebAssembly.
///
/// It dereferences to `[u8]`, and holds the image at first. A reset costs what was written since the last one, not what
/// there is. Untouched pages share the image's memory, and take none of their own.
///
/// ```
/// use userfaultfd::Pristine;
///
/// let image = vec![7; 1 << 20];
/// let mut memory = Pristine::new(&image)?;
/// for run in 0..3 {
///     memory[run] = 1;
///     memory[500_000..600_000].fill(2);
///     memory.reset()?;
///     assert!(memory[..] == image);
/// }
/// # Ok::<(), userfaultfd::Error>(())
/// ```
///
/// # How it finds what was written
///
/// Since Linux 6.7 by asynchronous write protection, without a thread: [`ResetMethod::CopyBack`]. Where the kernel hasn't
/// got that, or a filter of system calls refuses it, a reset drops all pages that have changed:
/// [`ResetMethod::Drop`], which works on every kernel since 5.10. [`method`](Self::method) returns which of the two applies.
///
/// With `CopyBack`, a page that was written before two resets in a row stays writable without a fault, and is copied back at each
/// reset; every eighth reset finds out whether it is still written. A written page keeps its memory:
/// [`release`](Self::release) gives it back.
///
/// # Raw pointers
///
/// Code that has the memory by [`as_raw_slice`](Self::as_raw_slice), such as a sandbox's, may do this to its pages between
/// two resets:
///
/// | | the next reset |
/// | --- | --- |
/// | `MADV_DONTNEED` | the page holds the image already; it takes no memory |
/// | mprotect(2), also to `PROT_NONE` | makes it readable and writable again |
/// | mlock(2) | counts as a write |
/// | munmap(2), mremap(2) to elsewhere | is [`NotRestored`](Error::NotRestored), with the range |
/// | another mapping in the same place | likewise, or [`NotTracked`](Error::NotTracked); that mapping is left alone |
/// | guard pages (`MADV_GUARD_INSTALL`) | takes them away by [`ResetMethod::Drop`]. With [`ResetMethod::CopyBack`] that call itself doesn't return (Linux 6.18): it replaces the kernel's markers of protection, which come back, and retries |
///
/// After such an error the memory is partly restored. Drop it, and build another one: other mappings in its place stay.
///
/// No thread may write to the memory while `reset` runs: that write may stay, until the page is written again.
///
/// # Pinned memory
///
/// The kernel and devices write to [pinned pages](crate::dirty#pinned-memory) (`O_DIRECT`, registered buffers of io_uring)
/// without a fault, so that a reset doesn't see it. [`set_always_dirty`](Self::set_always_dirty) has it copy such ranges
/// back each time. Nothing may be in flight when `reset` runs.
///
/// # Forks
///
/// A forked child doesn't have the memory (`MADV_DONTFORK`): dereferencing it there panics, its methods fail with
/// [`OtherProcess`](Error::OtherProcess), and an access through a pointer from before the fork raises SIGSEGV. Dropping it
/// there closes the child's copies of its descriptors, and nothing else.
pub struct Pristine {
    /// Ends before the memory is unmapped. `None`: a reset drops all.
    tracker: Option<DirtyTracker>,
    hot: HotPages,
    memory: OwnMapping,
    image: File,
    /// The number of the image.
    inode: u64,
    len: usize,
}

/// How memory is brought back to its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResetMethod {
    /// Written pages are found and copied from the image. Linux 6.7.
    CopyBack,
    /// All copies of pages are dropped, and the next access to each page maps the image's: `MADV_DONTNEED` of a private
    /// mapping. Locked memory is copied from the image as a whole instead.
    Drop,
}

/// What a [`reset`](Pristine::reset) did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResetReport {
    /// How it was done.
    pub method: ResetMethod,
    /// Number of pages that were copied from the image. With [`ResetMethod::Drop`] it is 0, or all pages of locked memory.
    pub copied_pages: usize,
    /// Number of these pages that were written before the last reset, too. Most of them stay writable without a fault.
    pub hot_pages: usize,
}

impl Pristine {
    /// Returns memory with the bytes of an image, which is copied once.
    ///
    /// # Errors
    ///
    /// As [`PristineBuilder::build`].
    pub fn new(image: &[u8]) -> Result<Self> {
        Self::builder(image).build()
    }

    /// Returns a builder. By default the memory is as long as the image.
    pub fn builder(image: &[u8]) -> PristineBuilder<'_> {
        PristineBuilder::new(image)
    }

    /// Returns how [`reset`](Self::reset) works here.
    #[must_use]
    pub fn method(&self) -> ResetMethod {
        if self.tracker.is_some() { ResetMethod::CopyBack } else { ResetMethod::Drop }
    }

    /// Returns a raw pointer to all bytes of the memory, for threads that write to different parts of it and for foreign
    /// code.
    ///
    /// Writing through it is sound while the memory lives, nothing borrows the bytes that are written, and no
    /// [`reset`](Self::reset) runs. A forked child must not use it.
    #[must_use]
    pub fn as_raw_slice(&self) -> *mut [u8] {
        std::ptr::slice_from_raw_parts_mut(self.memory.as_ptr(), self.len)
    }

    /// Brings all of the memory back to the image, and makes it readable and writable.
    ///
    /// # Errors
    ///
    /// After an error the memory is partly restored, and every page that isn't is restored by a later reset that succeeds.
    ///
    /// - [`NotRestored`](Error::NotRestored): a part was unmapped, moved, mapped anew, or can't be written.
    /// - [`NotTracked`](Error::NotTracked): likewise, and another tracker has what was mapped there.
    /// - [`OtherProcess`](Error::OtherProcess): this is a forked child.
    /// - [`SystemError`](Error::SystemError) with `ENOMEM`.
    pub fn reset(&mut self) -> Result<ResetReport> {
        self.check_owner()?;
        let all = self.range();
        // First: what else is mapped there must not be written, and not every look of the tracker would tell.
        if let Some(range) = self.foreign_part()? {
            return Err(not_restored(range, Errno::ENOENT));
        }
        let Some(tracker) = &mut self.tracker else { return self.drop_copies() };
        self.hot.begin();
        let (hot, memory, image) = (&mut self.hot, &self.memory, &self.image);
        let mut report = ResetReport { method: ResetMethod::CopyBack, copied_pages: 0, hot_pages: 0 };
        let mut scanner = None;
        let restored = tracker.restore(&all, |written, protect| {
            let part = |range: &Range<usize>| range.start - all.start..range.end - all.start;
            if written.len() < SCANNED_BYTES {
                report.copied_pages += copy_back(memory, image, part(&written))?;
            } else {
                let scanner = match &mut scanner {
                    Some(scanner) => scanner,
                    none => none.insert(CopyScanner::new()?),
                };
                scanner.each_copy(&written, |copy| {
                    report.copied_pages += copy_back(memory, image, part(copy))?;
                    Ok(())
                })?;
            }
            let Range { start, end } = part(&written);
            let mut cold = 0;
            hot.note(start / page_size()..end / page_size(), |pages| {
                cold += pages.len();
                protect.push(all.start + pages.start * page_size()..all.start + pages.end * page_size());
            });
            report.hot_pages += written.len() / page_size() - cold;
            Ok(())
        });
        match restored {
            Err(Error::NotTracked { .. }) => return Err(self.damage(Errno::ENOENT)),
            restored => restored?,
        }
        // Of pages that weren't written, too.
        make_writable(&self.memory, 0..all.len())?;
        Ok(report)
    }

    /// Resets the memory by [`ResetMethod::Drop`], whatever the [`method`](Self::method): pages that were written give
    /// back the memory that they take.
    ///
    /// # Errors
    ///
    /// As [`reset`](Self::reset).
    pub fn release(&mut self) -> Result<ResetReport> {
        self.check_owner()?;
        let report = self.drop_copies()?;
        self.hot.clear();
        if let Some(tracker) = &mut self.tracker {
            tracker.take().try_for_each(|written| written.map(drop))?;
        }
        Ok(report)
    }

    /// Has each [`reset`](Self::reset) copy a range back, whether or not a write was seen: for
    /// [pinned memory](crate::dirty#pinned-memory). The range is in bytes of the memory, whole pages. With `false` it is
    /// copied back once more, and then as any other.
    ///
    /// Pinned pages must be in no flight during a reset. With [`ResetMethod::Drop`], and after [`release`](Self::release), the
    /// kernel and devices go on writing to the pages that were dropped; pin the range again.
    ///
    /// # Errors
    ///
    /// As [`DirtyTracker::set_always_dirty`].
    pub fn set_always_dirty(&mut self, range: Range<usize>, always: bool) -> Result<()> {
        self.check_owner()?;
        let start = self.range().start;
        let place = |at: usize| start.saturating_add(at);
        match &mut self.tracker {
            Some(tracker) => tracker.set_always_dirty(place(range.start)..place(range.end), always),
            None => Ok(()),
        }
    }

    /// Whole pages.
    fn range(&self) -> Range<usize> {
        let start = self.memory.as_ptr().addr();
        start..start + self.memory.len()
    }

    fn check_owner(&self) -> Result<()> {
        if self.memory.is_here() { Ok(()) } else { Err(Error::OtherProcess) }
    }

    /// Drops the copies of all pages.
    #[expect(unsafe_code, reason = "changes what the memory holds")]
    fn drop_copies(&mut self) -> Result<ResetReport> {
        if let Some(range) = self.foreign_part()? {
            return Err(not_restored(range, Errno::ENOENT));
        }
        let mut report = ResetReport { method: ResetMethod::Drop, copied_pages: 0, hot_pages: 0 };
        let len = self.memory.len();
        // SAFETY: all of it is mapped to the image, as was just seen, and borrowed alone here. It keeps a valid content, since
        // any bytes are.
        match unsafe { sys::discard(self.memory.as_ptr(), len) } {
            // Locked memory.
            Err(Errno::EINVAL) => report.copied_pages = copy_back(&self.memory, &self.image, 0..len)?,
            dropped => dropped?,
        }
        sys::remove_guards(self.memory.as_ptr(), len)?;
        make_writable(&self.memory, 0..len)?;
        Ok(report)
    }

    /// The parts that are mapped to their place in the image, in bytes of the memory.
    fn own_parts(&self) -> Result<Vec<Range<usize>>> {
        let all = self.range();
        let mut own = Vec::new();
        let looked = Process::Own.each_mapping(Source::Maps, &all, |entry| {
            let place = entry.range.start.checked_sub(all.start);
            if entry.inode == self.inode && Some(entry.offset) == place {
                own.push(entry.range.start - all.start..entry.range.end.min(all.end) - all.start);
            }
            ControlFlow::Continue(())
        });
        looked.map_err(|error| Error::SystemError(errno_of(&error)))?;
        Ok(own)
    }

    /// The first part that isn't mapped to its place in the image.
    fn foreign_part(&self) -> Result<Option<Range<usize>>> {
        let all = self.range();
        let (mut next, mut foreign) = (all.start, None);
        let looked = Process::Own.each_mapping(Source::Maps, &all, |entry| {
            let place = entry.range.start.checked_sub(all.start);
            if entry.range.start > next {
                foreign = Some(next..entry.range.start.min(all.end));
            } else if entry.inode != self.inode || Some(entry.offset) != place {
                foreign = Some(next..entry.range.end.min(all.end));
            } else {
                next = entry.range.end;
                return ControlFlow::Continue(());
            }
            ControlFlow::Break(())
        });
        looked.map_err(|error| Error::SystemError(errno_of(&error)))?;
        Ok(foreign.or_else(|| (next < all.end).then_some(next..all.end)))
    }

    /// What has happened to the mapping.
    fn damage(&self, errno: Errno) -> Error {
        match self.foreign_part() {
            Ok(Some(range)) => not_restored(range, errno),
            // It is mapped, and not tracked: moved away and back.
            Ok(None) => not_restored(self.range(), errno),
            Err(error) => error,
        }
    }
}

fn not_restored(Range { start, end }: Range<usize>, errno: Errno) -> Error {
    Error::NotRestored { start, end, errno }
}

/// Copies a part back, in bytes of the memory, of which the caller has the memory borrowed alone, and knows that it is mapped there.
/// Returns the number of pages.
#[expect(unsafe_code, reason = "changes what the memory holds")]
fn copy_back(memory: &OwnMapping, image: &File, part: Range<usize>) -> Result<usize> {
    let to = memory.as_ptr().wrapping_add(part.start);
    // SAFETY: within the memory, of which nothing is borrowed, or addresses where nothing is.
    let read = || unsafe { sys::read_into(image.as_fd(), part.start, to, part.len()) };
    let copied = match read() {
        Err(Errno::EFAULT) => {
            make_writable(memory, part.clone())?;
            read()
        }
        copied => copied,
    };
    copied.map_err(|errno| not_restored(to.addr()..to.addr() + part.len(), errno))?;
    Ok(part.len() / page_size())
}

/// Makes a part writable that is mapped there, in bytes of the memory.
#[expect(unsafe_code, reason = "changes how memory can be accessed")]
fn make_writable(memory: &OwnMapping, part: Range<usize>) -> Result<()> {
    let start = memory.as_ptr().wrapping_add(part.start);
    // SAFETY: whole pages of the memory, which is this value's.
    let changed = unsafe { sys::make_writable(start, part.len()) };
    changed.map_err(|errno| not_restored(start.addr()..start.addr() + part.len(), errno))
}

/// Finds the pages of which the kernel has made a copy; all others show the image.
struct CopyScanner {
    pagemap: Pagemap,
    regions: Box<[Region]>,
}

impl CopyScanner {
    fn new() -> Result<Self> {
        Ok(Self { pagemap: Pagemap::of_self()?, regions: vec![Region::default(); 512].into() })
    }

    fn each_copy(
        &mut self,
        range: &Range<usize>,
        mut visit: impl FnMut(&Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut scan = Scan::new(range.clone());
        scan.any_of(Categories::PRESENT | Categories::SWAPPED).none_of(Categories::FILE);
        while let Some(regions) = scan.next_regions(&self.pagemap, &mut self.regions)? {
            regions.iter().try_for_each(|region| visit(&region.range()))?;
        }
        Ok(())
    }
}

impl Deref for Pristine {
    type Target = [u8];

    /// Returns the memory.
    ///
    /// # Panics
    ///
    /// In a forked child.
    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl DerefMut for Pristine {
    /// Returns the memory.
    ///
    /// # Panics
    ///
    /// In a forked child.
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[..self.len]
    }
}

impl Drop for Pristine {
    fn drop(&mut self) {
        // It registers nothing any more when the memory goes.
        self.tracker = None;
        // If it can't be seen what is the image's, all stays mapped.
        let own = if self.memory.is_here() { self.own_parts().unwrap_or_default() } else { Vec::new() };
        self.memory.unmap_parts(&own);
    }
}

impl fmt::Debug for Pristine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pristine")
            .field("len", &self.len)
            .field("method", &self.method())
            .finish_non_exhaustive()
    }
}
