//! [`SharedImage`]: content that is loaded once for all regions made of it.
//!
//! The content lies in a memfd. A table of the states of its pages decides which thread loads a page: the same table as that
//! of a region ([`Pages`]), with two differences. A page that a thread waits for has no fault to wake, so the loading thread
//! notifies a condition variable. And a page of zeros ends as poisoned there, which means that it
//! has no page in the file.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar};

use memmap2::{MmapOptions, MmapRaw};

use super::page_state::{Claim, Pages, Settlement};
use crate::lock_order::{RankedMutex, lock, rank};
use crate::owner::Owner;
use crate::source::{PageData, PageSource};
use crate::{Errno, page_size, sys};

/// Bytes that one read of the source brings at most.
const READ_BYTES: usize = 1 << 20;

/// The content of a source in memory that any number of regions share, of any number of processes: a page is loaded once, and
/// mapped in all others without a read.
///
/// It is a memfd with the length of the source, which is sealed: no other mapping can write to it, and it keeps its length. Each
/// process maps it privately, and so writes to copies of its own. (The kernel refuses to register a shared mapping of a sealed file.)
/// [`Region::image`](crate::pager::Region::image) makes a region of such a mapping, which a pager of **this** process serves. A
/// process gets the file by inheritance, over a socket, or by `/proc/PID/fd/N`.
///
/// ```
/// use memmap2::MmapOptions;
/// use userfaultfd::pager::{BytesSource, Pager, Region, SharedImage};
/// use userfaultfd::{FeatureFlags, UffdBuilder, page_size};
///
/// let len = 16 * page_size();
/// let image = SharedImage::new(BytesSource::new(vec![7; len]))?;
/// // Two guests; here both are mappings of this process.
/// let mut guests = [0, 1].map(|_| {
///     // SAFETY: the file can't be written, and keeps its length.
///     unsafe { MmapOptions::new().len(len).map_copy(image.file()) }.unwrap()
/// });
/// let mut builder = UffdBuilder::new();
/// let uffd = match builder.require_features(FeatureFlags::MINOR_SHMEM).create() {
///     Ok(uffd) => uffd,
///     Err(error) => return Ok(println!("{error}")), // no minor faults here
/// };
/// let regions = guests.each_ref().map(|guest| Region::image(guest.as_ptr().addr(), len, &image));
/// let pager = Pager::new()?;
/// // SAFETY: no references to the mappings exist until their pages are served.
/// unsafe { pager.add_own(uffd, regions) }?;
/// guests[0][0] = 1;
/// assert_eq!((guests[0][0], guests[1][0], guests[1][1]), (1, 7, 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What it saves
///
/// | memory of N guests that read the same M bytes | |
/// | --- | --- |
/// | a region with a source, filled by copies | N × M |
/// | a private mapping of an image's file by each, without this library | M, in the page cache |
/// | regions of a `SharedImage` | M |
///
/// What a guest writes is a copy of its own, in all three. Pages of zeros take no
/// memory where all that is filled for a fault is zeros.
/// Against a private mapping of a file this has the content come from any source (a network, a compressed image), and never reads
/// more from it than was asked for; where the raw image lies on the local disk, that mapping is simpler, and no slower.
///
/// # What it doesn't do
///
/// - Pages stay until the last handle and the last mapping of the image is gone: there is no limit.
/// - After `MADV_DONTNEED` a private mapping shows the image again, as that of a file does: not zeros, which a balloon needs.
/// - Huge pages. [`Region::minor`](crate::pager::Region::minor) has them, for one region, which may write to its file.
///
/// A failed load is an error for the region that asked, with that pager's retries; the next one tries anew. In the child of a fork
/// each load is an error: the threads that load are the parent's, and so is the table of what was loaded.
///
/// It is a [`PageSource`], too, for regions of other memory: that copies, and reads each page once all the same.
///
/// # Kernel
///
/// Linux 5.14 (`MINOR_SHMEM`) on x86-64, AArch64 and, later, LoongArch and RISC-V. Elsewhere adding a region is an error that
/// names what lacks.
pub struct SharedImage {
    /// The process whose threads load.
    owner: Owner,
    source: Arc<dyn PageSource>,
    source_len: u64,
    file: File,
    /// Made before the file was sealed, so that this alone can write to it.
    mapping: MmapRaw,
    pages: Pages,
    /// For threads that wait for others' loads.
    ended: Condvar,
    lock: RankedMutex<(), { rank::QUEUE }>,
}

/// Pages that this thread loads. Dropped, others may.
struct Loading<'a> {
    image: &'a SharedImage,
    pages: Range<usize>,
}

impl Loading<'_> {
    fn end(mut self, settlement: Settlement) {
        self.settle(settlement);
    }

    fn settle(&mut self, settlement: Settlement) {
        let pages = std::mem::replace(&mut self.pages, 0..0);
        if pages.is_empty() {
            return;
        }
        for page in pages {
            // Threads that wait are notified whether they have joined this load or an earlier one.
            let _joined = self.image.pages.end(page, settlement);
        }
        // A thread that waits has looked with the lock held.
        drop(lock(&self.image.lock));
        self.image.ended.notify_all();
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.settle(Settlement::Released);
    }
}

/// What became of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ImageLoad {
    /// Whether all of it is zeros, which need not be in the file.
    pub(crate) is_zero: bool,
    /// How often the source was read.
    pub(crate) reads: u64,
}

impl SharedImage {
    /// Makes an image of all of a source. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](ErrorKind::InvalidInput): the source has no [length](PageSource::len), or is empty. Those of
    /// memfd_create(2), fcntl(2) (`F_SEAL_FUTURE_WRITE`: Linux 5.1) and mmap(2). `EPERM`, `ENOSYS`: a filter of system calls
    /// keeps this process from process_vm_writev(2) to itself.
    pub fn new(source: impl PageSource + 'static) -> io::Result<Arc<Self>> {
        let invalid = |text| io::Error::new(ErrorKind::InvalidInput, text);
        let source_len =
            source.len().ok_or_else(|| invalid("the source has no length, which a shared image needs"))?;
        let too_long = || invalid("an image that is longer than the address space");
        let len = usize::try_from(source_len).ok().and_then(|len| len.checked_next_multiple_of(page_size()));
        let len = len.filter(|len| isize::try_from(*len).is_ok()).ok_or_else(too_long)?;
        if len == 0 {
            return Err(invalid("an image of nothing"));
        }
        let file = File::from(sys::sealable_memfd(c"userfaultfd-image")?);
        file.set_len(len as u64)?;
        let mapping = MmapOptions::new().len(len).map_raw(&file)?;
        sys::write_mapping(&mapping, 0, &[])?;
        sys::seal_as_image(file.as_fd())?;
        let pages = Pages::new(len / page_size())?;
        let (owner, ended, lock) = (Owner::current()?, Condvar::new(), RankedMutex::new(()));
        Ok(Arc::new(Self { owner, source: Arc::new(source), source_len, file, mapping, pages, ended, lock }))
    }

    /// Returns the file to map, privately. It is sealed.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns how many bytes can be mapped: the length of the source, in whole pages.
    #[must_use]
    pub fn mapped_len(&self) -> usize {
        self.mapping.len()
    }

    /// Returns the bytes that were loaded: those that aren't zeros, and those of zeros.
    #[must_use]
    pub fn loaded(&self) -> (usize, usize) {
        let (data, zeros) = self.pages.present_and_poisoned();
        (data * page_size(), zeros * page_size())
    }

    /// Has pages be loaded that no thread has loaded yet, and waits for those that another thread loads. `buffer` is room for
    /// reads: a page at least.
    pub(crate) fn load(&self, pages: Range<usize>, early: bool, buffer: &mut [u8]) -> io::Result<ImageLoad> {
        if !self.owner.is_current() {
            // What a thread of the parent loaded at the fork would be waited for without an end.
            return Err(io::Error::other("a shared image of the parent process"));
        }
        let most = (buffer.len().min(READ_BYTES) / page_size()).max(1);
        let (mut loaded, mut at) = (ImageLoad { is_zero: true, reads: 0 }, pages.start);
        while at < pages.end {
            match self.pages.claim(at) {
                Claim::Present => loaded.is_zero = false,
                Claim::Poisoned => {}
                Claim::Joined => {
                    self.wait(at);
                    continue;
                }
                Claim::Acquired { .. } => {
                    let mut loading = Loading { image: self, pages: at..at + 1 };
                    // Not claimed while it waits for others: each thread ends what it has first.
                    let found = self.load_claimed(&mut loading, pages.end, most, early, buffer)?;
                    at = loading.pages.end;
                    loaded.reads += u64::from(found != Found::KnownZeros);
                    loaded.is_zero &= found != Found::Data;
                    loading.end(if found == Found::Data {
                        Settlement::Present
                    } else {
                        Settlement::Poisoned
                    });
                    continue;
                }
            }
            at += 1;
        }
        Ok(loaded)
    }

    /// Loads a claimed page, and those that follow it up to an end, which it claims, too.
    fn load_claimed(
        &self,
        loading: &mut Loading<'_>,
        end: usize,
        most: usize,
        early: bool,
        buffer: &mut [u8],
    ) -> io::Result<Found> {
        let first = loading.pages.start;
        let offset = (first * page_size()) as u64;
        let zeros = usize::try_from(self.source.zeros(offset)).unwrap_or(usize::MAX) / page_size();
        let end = end.min(first.saturating_add(if zeros > 0 { zeros } else { most }));
        while loading.pages.end < end && self.pages.try_claim_untouched(loading.pages.end, false) {
            loading.pages.end += 1;
        }
        if zeros > 0 {
            return Ok(Found::KnownZeros);
        }
        let bytes = &mut buffer[..loading.pages.len() * page_size()];
        let found =
            if early { self.source.read_early(offset, bytes) } else { self.source.read(offset, bytes) };
        if found? == PageData::Zero {
            return Ok(Found::Zeros);
        }
        let inside = usize::try_from(self.source_len - offset).unwrap_or(usize::MAX);
        if let Some(behind) = bytes.get_mut(inside..) {
            behind.fill(0);
        }
        // EFAULT: there is no memory for a page.
        let written = sys::write_mapping(&self.mapping, first * page_size(), bytes);
        written.map_err(|errno| if errno == Errno::EFAULT { Errno::ENOMEM } else { errno })?;
        Ok(Found::Data)
    }

    /// Waits until no thread loads a page.
    fn wait(&self, page: usize) {
        drop(lock(&self.lock).wait_while(&self.ended, |()| self.pages.is_loading(page)));
    }

    /// Writes content that is there already, or zeros where zeros belong.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        sys::write_mapping(&self.mapping, offset as usize, bytes)
    }
}

/// What a source has for pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Data,
    Zeros,
    /// Zeros, without a read.
    KnownZeros,
}

impl PageSource for SharedImage {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let Some(rest) = (self.mapped_len() as u64).checked_sub(offset).filter(|rest| *rest > 0) else {
            return Ok(PageData::Zero);
        };
        let inside = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len()));
        let from = offset as usize;
        let pages = from / page_size()..(from + inside).div_ceil(page_size());
        // Mapped: the allocator's locks may be held by the thread that waits.
        let mut buffer = MmapOptions::new().len((pages.len() * page_size()).min(READ_BYTES)).map_anon()?;
        if self.load(pages, false, &mut buffer)?.is_zero {
            return Ok(PageData::Zero);
        }
        self.file.read_exact_at(&mut page[..inside], offset)?;
        page[inside..].fill(0);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.source_len)
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.source.zeros(offset)
    }
}

impl AsFd for SharedImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for SharedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedImage")
            .field("len", &self.source_len)
            .field("file", &self.file)
            .field("loaded", &self.loaded())
            .finish_non_exhaustive()
    }
}
