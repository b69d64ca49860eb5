//! Mappings of every kind that a userfaultfd takes. Each test maps its own.

use std::ffi::c_void;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::{LazyLock, Mutex};

use userfaultfd::{Errno, FeatureFlags, RegisterMode};

use super::fault;
use super::hugetlb::{self, HugePages};
use super::mapping::memfd_of_bytes;
use super::proc;
use super::raw::check;

/// What a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// Shared anonymous memory.
    SharedAnonymous,
    /// A shared mapping of a memfd.
    Memfd,
    /// A private mapping of a memfd.
    PrivateMemfd,
    /// A shared mapping of hugetlb memory.
    Hugetlb,
    /// A private mapping of hugetlb memory.
    PrivateHugetlb,
}

impl Kind {
    pub(crate) const ALL: [Kind; 6] = [
        Kind::Anonymous,
        Kind::SharedAnonymous,
        Kind::Memfd,
        Kind::PrivateMemfd,
        Kind::Hugetlb,
        Kind::PrivateHugetlb,
    ];

    /// Those with pages of the base size.
    pub(crate) const SMALL: [Kind; 4] =
        [Kind::Anonymous, Kind::SharedAnonymous, Kind::Memfd, Kind::PrivateMemfd];

    /// Bytes of a page.
    pub(crate) fn page(self) -> usize {
        if self.is_hugetlb() { hugetlb::page() } else { super::page() }
    }

    pub(crate) fn is_hugetlb(self) -> bool {
        matches!(self, Kind::Hugetlb | Kind::PrivateHugetlb)
    }

    /// Whether its pages are kept in a page cache that others can map, too.
    pub(crate) fn is_shared(self) -> bool {
        !matches!(self, Kind::Anonymous | Kind::PrivateMemfd | Kind::PrivateHugetlb)
    }

    /// Whether it can ever be registered so; and the features that tell whether this kernel can.
    pub(crate) fn needs(self, modes: RegisterMode) -> Option<FeatureFlags> {
        if self == Kind::Anonymous && modes.contains(RegisterMode::MINOR) {
            return None;
        }
        let [missing, write_protect, minor] = self.features();
        let needs = [
            (RegisterMode::MISSING, missing),
            (RegisterMode::WRITE_PROTECT, write_protect),
            (RegisterMode::MINOR, minor),
            (RegisterMode::READ_WRITE_PROTECT, FeatureFlags::RWP),
        ];
        let needs = needs.into_iter().filter(|(mode, _)| modes.contains(*mode));
        Some(needs.fold(FeatureFlags::empty(), |all, (_, feature)| all | feature))
    }

    /// The feature that tells of missing faults on it, of write-protect faults, of minor faults.
    pub(crate) fn features(self) -> [FeatureFlags; 3] {
        match self {
            Kind::Anonymous => [
                FeatureFlags::empty(),
                FeatureFlags::PAGEFAULT_FLAG_WP,
                FeatureFlags::from_bits_retain(1 << 63),
            ],
            Kind::SharedAnonymous | Kind::Memfd | Kind::PrivateMemfd => {
                [FeatureFlags::MISSING_SHMEM, FeatureFlags::WP_HUGETLBFS_SHMEM, FeatureFlags::MINOR_SHMEM]
            }
            Kind::Hugetlb | Kind::PrivateHugetlb => [
                FeatureFlags::MISSING_HUGETLBFS,
                FeatureFlags::WP_HUGETLBFS_SHMEM,
                FeatureFlags::MINOR_HUGETLBFS,
            ],
        }
    }
}

/// Memory of every kind that can be registered so, of `pages` pages each, one after the other. Kinds that
/// this kernel lacks are skipped visibly.
pub(crate) fn each(test: &str, modes: RegisterMode, pages: usize) -> impl Iterator<Item = Memory> {
    each_of(test, &Kind::ALL, modes, pages)
}

/// [`each`] of some kinds.
pub(crate) fn each_of(
    test: &str,
    kinds: &[Kind],
    modes: RegisterMode,
    pages: usize,
) -> impl Iterator<Item = Memory> {
    kinds.iter().filter_map(move |kind| {
        let needs = kind.needs(modes)?;
        let part = format!("{test} ({kind:?}, {modes})");
        super::has_features(&part, needs).then(|| Memory::try_new(test, *kind, pages))?
    })
}

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// It is mapped.
    pub(crate) present: bool,
    /// It is protected by a userfaultfd. Told since Linux 5.13, for markers of pages that aren't there, too.
    pub(crate) protected: bool,
}

/// Whether this kernel tells of protection in /proc/self/pagemap. If not, says so.
pub(crate) fn tells_protection(test: &str) -> bool {
    let protects = super::features().contains(FeatureFlags::PAGEFAULT_FLAG_WP);
    !protects || super::has(test, "protection in pagemap", kernel_tells_protection())
}

/// Whether the kernel reports in the page map what is protected (Linux 5.13), for tests that go on without.
pub(crate) fn kernel_tells_protection() -> bool {
    static TELLS: LazyLock<bool> = LazyLock::new(|| {
        let (uffd, memory) = (super::uffd(FeatureFlags::empty()), Memory::anonymous(1));
        fault::provoke(&uffd, &memory, RegisterMode::WRITE_PROTECT);
        memory.state(0).protected
    });
    *TELLS
}

/// A mapping, unmapped when dropped. Its pages are of [`Memory::page`] bytes.
pub(crate) struct Memory {
    kind: Kind,
    start: *mut u8,
    pages: usize,
    file: Option<OwnedFd>,
    /// Pages that are unmapped already: another thread may have mapped something there since.
    unmapped: Mutex<Vec<Range<usize>>>,
    /// Given back after the memory is unmapped.
    huge_pages: Option<HugePages>,
}

// SAFETY: a mapping belongs to the process; access to it is by raw pointers, whose users see to order.
unsafe impl Send for Memory {}

// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:p}+{:#x}", self.kind, self.start, self.len())
    }
}

impl Memory {
    /// Maps `pages` pages. `None`, visibly, where hugetlb pages can't be had.
    pub(crate) fn try_new(test: &str, kind: Kind, pages: usize) -> Option<Self> {
        if kind.is_hugetlb() {
            // A copy with a cold source takes a spare page for a moment, and an alias of private memory as
            // many again.
            let aliased = if kind.is_shared() { 0 } else { pages };
            let huge_pages = hugetlb::reserve(test, pages + aliased + 2)?;
            Some(Self::map(kind, pages, Some(huge_pages)))
        } else {
            Some(Self::map(kind, pages, None))
        }
    }

    /// Maps `pages` pages of a kind that can always be had.
    pub(crate) fn new(kind: Kind, pages: usize) -> Self {
        assert!(!kind.is_hugetlb(), "hugetlb memory may be missing: try_new");
        Self::map(kind, pages, None)
    }

    /// Maps `pages` pages of private anonymous memory.
    pub(crate) fn anonymous(pages: usize) -> Self {
        Self::new(Kind::Anonymous, pages)
    }

    /// Maps `pages` pages of hugetlb memory without a promise that the pool has them.
    pub(crate) fn unpromised_hugetlb(test: &str, pages: usize) -> Option<Self> {
        let huge_pages = hugetlb::reserve(test, pages + 2)?;
        Some(Self::map_with(Kind::Hugetlb, pages, libc::MAP_NORESERVE, Some(huge_pages)))
    }

    fn map(kind: Kind, pages: usize, huge_pages: Option<HugePages>) -> Self {
        Self::map_with(kind, pages, 0, huge_pages)
    }

    fn map_with(kind: Kind, pages: usize, flags: libc::c_int, huge_pages: Option<HugePages>) -> Self {
        let page = kind.page();
        let file = match kind {
            Kind::Anonymous | Kind::SharedAnonymous => None,
            Kind::Memfd | Kind::PrivateMemfd => Some(memfd_of_bytes(0, pages * page)),
            Kind::Hugetlb | Kind::PrivateHugetlb => Some(memfd_of_bytes(libc::MFD_HUGETLB, pages * page)),
        };
        let sharing = if kind.is_shared() { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let anonymous = if file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let start = map(pages * page, sharing | anonymous | flags, fd);
        // Transparent huge pages would fill neighbours.
        if !kind.is_hugetlb() {
            // SAFETY: the range was just mapped and is nobody else's.
            unsafe { libc::madvise(start.cast(), pages * page, libc::MADV_NOHUGEPAGE) };
        }
        Self { kind, start, pages, file, unmapped: Mutex::default(), huge_pages }
    }

    /// Maps the same pages once more, shared: what is written there is in the page cache. Not for private
    /// anonymous memory; for shared anonymous memory before it is registered.
    pub(crate) fn alias(&self) -> Memory {
        let file = self.file.as_ref().map(|file| file.try_clone().unwrap());
        let start = match &file {
            Some(file) => map(self.len(), libc::MAP_SHARED, file.as_raw_fd()),
            None => map_again(self.start, self.len()),
        };
        let kind = if self.kind.is_hugetlb() { Kind::Hugetlb } else { Kind::Memfd };
        Memory { kind, start, pages: self.pages, file, unmapped: Mutex::default(), huge_pages: None }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of a page: of a huge page on hugetlb memory.
    pub(crate) fn page(&self) -> usize {
        self.kind.page()
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn len(&self) -> usize {
        self.pages * self.page()
    }

    pub(crate) fn start(&self) -> *mut c_void {
        self.start.cast()
    }

    /// The address of page number `page`, which may be the one behind the last.
    pub(crate) fn at(&self, page: usize) -> *mut c_void {
        assert!(page <= self.pages);
        self.start.wrapping_add(page * self.page()).cast()
    }

    /// The addresses of some pages.
    pub(crate) fn range(&self, first: usize, pages: usize) -> Range<usize> {
        self.at(first).addr()..self.at(first + pages).addr()
    }

    /// The file behind the mapping.
    pub(crate) fn file(&self) -> &OwnedFd {
        self.file.as_ref().expect("memory of a file")
    }

    /// The huge pages of hugetlb memory.
    pub(crate) fn huge_pages(&self) -> &HugePages {
        self.huge_pages.as_ref().expect("hugetlb memory")
    }

    /// The content of a page.
    pub(crate) fn content(&self, page: usize) -> Vec<u8> {
        assert!(page < self.pages);
        let mut content = vec![0; self.page()];
        // SAFETY: source and destination are of a page's length, and the mapping is only accessed by raw
        // pointers.
        unsafe { ptr::copy_nonoverlapping(self.at(page).cast(), content.as_mut_ptr(), content.len()) };
        content
    }

    /// What /proc/self/pagemap says of a page, without an access to it.
    pub(crate) fn state(&self, page: usize) -> State {
        let mut entry = [0; 8];
        let at = self.at(page).addr() / super::page() * entry.len();
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, at as u64).unwrap();
        let entry = u64::from_ne_bytes(entry);
        State { present: entry >> 63 & 1 == 1, protected: entry >> 57 & 1 == 1 }
    }

    /// Reads the first byte of a page. Waits there if the page is missing and its faults are handled.
    pub(crate) fn read(&self, page: usize) -> u8 {
        assert!(page < self.pages);
        // SAFETY: inside the mapping, which lives as long as self and is only accessed by raw pointers.
        unsafe { self.at(page).cast::<u8>().read_volatile() }
    }

    /// Writes the first byte of a page. Waits there likewise.
    pub(crate) fn write(&self, page: usize, byte: u8) {
        assert!(page < self.pages);
        // SAFETY: as for read.
        unsafe { self.at(page).cast::<u8>().write_volatile(byte) }
    }

    /// Has the kernel read the first byte of a page: `EFAULT` where it can't, which would be a signal
    /// elsewhere.
    pub(crate) fn read_by_kernel(&self, page: usize) -> Result<u8, Errno> {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        // SAFETY: only the kernel reads from the address, and says so if it can't.
        check(unsafe { libc::write(writer.as_raw_fd(), self.at(page), 1) } as i64)?;
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        Ok(byte[0])
    }

    /// madvise(2) on some pages; tells the errno.
    pub(crate) fn advise(&self, first: usize, pages: usize, advice: libc::c_int) -> Result<(), i32> {
        // SAFETY: the range lies inside the mapping, whose content nobody borrows.
        let result = unsafe { libc::madvise(self.at(first), pages * self.page(), advice) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap()) }
    }

    /// Has the kernel write some pages to a swap device, where they are and nowhere else then.
    pub(crate) fn swap_out(&self, first: usize, pages: usize) {
        // It passes over pages that are in some processor's hands just now.
        proc::wait_until(|| {
            self.advise(first, pages, libc::MADV_PAGEOUT).unwrap();
            proc::swapped(self.range(first, self.pages - first)) >= pages * self.page()
        });
        assert!((first..first + pages).all(|page| !self.state(page).present), "{self:?}");
    }

    /// Unmaps some pages, which aren't to be accessed any more.
    pub(crate) fn unmap(&self, first: usize, pages: usize) {
        self.unmapped.lock().unwrap().push(first..first + pages);
        // SAFETY: the range lies inside the mapping, whose content nobody borrows.
        let result = unsafe { libc::munmap(self.at(first), pages * self.page()) };
        assert_eq!(result, 0);
    }

    /// Moves some pages over those of another mapping, by mremap(2) with `flags` in addition. They aren't to
    /// be accessed here any more, unless `flags` keeps them mapped.
    pub(crate) fn move_over(&self, first: usize, pages: usize, to: &Memory, flags: libc::c_int) {
        assert!(pages <= to.pages);
        self.try_move(first, pages, to.start(), flags).expect("mremap");
    }

    /// Moves some pages to an address, over what is mapped there, likewise.
    pub(crate) fn try_move(
        &self,
        first: usize,
        pages: usize,
        to: *mut c_void,
        flags: libc::c_int,
    ) -> std::io::Result<()> {
        let (len, stay) = (pages * self.page(), flags & libc::MREMAP_DONTUNMAP != 0);
        if !stay {
            self.unmapped.lock().unwrap().push(first..first + pages);
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | flags;
        // SAFETY: the pages are this mapping's, and so are those at the destination the caller's; nobody borrows them.
        let moved = unsafe { libc::mremap(self.at(first), len, len, flags, to) };
        if moved == to {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        if !stay {
            self.unmapped.lock().unwrap().pop();
        }
        Err(error)
    }

    /// Makes the mapping of `from` pages one of `to` pages in its place, by mremap(2). What is behind it must
    /// be unmapped.
    pub(crate) fn resize(&self, from: usize, to: usize) {
        let mut unmapped = self.unmapped.lock().unwrap();
        unmapped.retain(|range| range.start < from);
        unmapped.push(to..self.pages);
        // SAFETY: the range is a mapping whose content nobody borrows.
        let resized = unsafe { libc::mremap(self.start(), from * self.page(), to * self.page(), 0) };
        assert_eq!(resized, self.start(), "mremap: {}", std::io::Error::last_os_error());
    }

    /// mprotect(2) on some pages.
    pub(crate) fn protect(&self, first: usize, pages: usize, protection: libc::c_int) {
        // SAFETY: the range lies inside the mapping, whose content nobody borrows.
        let result = unsafe { libc::mprotect(self.at(first), pages * self.page(), protection) };
        assert_eq!(result, 0, "mprotect: {}", std::io::Error::last_os_error());
    }

    /// Makes the file as long as some pages. Those behind are gone wherever they are mapped.
    pub(crate) fn truncate(&self, pages: usize) {
        let len = pages * self.page();
        // SAFETY: touches no memory of the caller but what the file's mappings show.
        let result = unsafe { libc::ftruncate(self.file().as_raw_fd(), len as _) };
        assert_eq!(result, 0, "ftruncate: {}", std::io::Error::last_os_error());
    }

    /// Drops some pages from the file, wherever they are mapped.
    pub(crate) fn punch(&self, first: usize, pages: usize) {
        let (offset, len) = (first * self.page(), pages * self.page());
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: touches no memory of the caller but what the file's mappings show.
        let result = unsafe { libc::fallocate(self.file().as_raw_fd(), mode, offset as _, len as _) };
        assert_eq!(result, 0, "fallocate: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let unmapped = self.unmapped.get_mut().unwrap();
        for page in 0..self.pages {
            if !unmapped.iter().any(|range| range.contains(&page)) {
                let start = self.start.wrapping_add(page * self.kind.page());
                // SAFETY: the page is mapped, and self's own.
                unsafe { libc::munmap(start.cast(), self.kind.page()) };
            }
        }
    }
}

fn map(len: usize, flags: libc::c_int, fd: libc::c_int) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    assert_ne!(start, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    start.cast()
}

/// Maps the pages of a shared mapping a second time.
fn map_again(start: *mut u8, len: usize) -> *mut u8 {
    // SAFETY: an old length of 0 leaves the mapping alone and makes another at an address of the kernel's
    // choice.
    let again = unsafe { libc::mremap(start.cast(), 0, len, libc::MREMAP_MAYMOVE) };
    assert_ne!(again, libc::MAP_FAILED, "mremap: {}", std::io::Error::last_os_error());
    again.cast()
}
