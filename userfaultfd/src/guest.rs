//! Guest memory of the crate [`vm_memory`](https://docs.rs/vm-memory): served, tracked and saved as a whole, and its addresses
//! translated.
//!
//! A guest's memory has two kinds of addresses. [`GuestAddress`] is what the guest sees. [`ClientAddress`] is what the process
//! sees that has the memory mapped, and so what its userfaultfd reports: the word is that of vhost-user's post-copy, where the
//! backend is the client. They are types of their own, so that one can't stand for the other, and [`GuestLayout`] translates
//! both ways.
//!
//! ```
//! use userfaultfd::guest::{ClientAddress, GuestAddress, GuestLayout, GuestPart};
//!
//! // The table of a vhost-user backend: two parts of 1 MiB, with a hole for devices between them.
//! let layout = GuestLayout::new([
//!     GuestPart::new(GuestAddress(0), ClientAddress(0x7f00_0000_0000), 1 << 20),
//!     GuestPart::new(GuestAddress(0x1_0000_0000), ClientAddress(0x7e00_0000_0000), 1 << 20),
//! ])?;
//! assert_eq!(layout.to_guest(ClientAddress(0x7e00_0000_3000)), Some(GuestAddress(0x1_0000_3000)));
//! assert_eq!(layout.to_client(GuestAddress(0x3000)), Some(ClientAddress(0x7f00_0000_3000)));
//! assert_eq!(layout.to_client(GuestAddress(0x10_0000)), None);
//! # Ok::<(), userfaultfd::guest::LayoutError>(())
//! ```
//!
//! # Serving it
//!
//! [`Pager::add_guest_memory`] serves the memory of a monitor that is this process. Where the memory is another process's, as in
//! vhost-user post-copy, [`GuestLayout::regions`] makes the regions for [`Pager::add`].
//!
//! [`DirtyTracker::track_guest_memory`](crate::DirtyTracker::track_guest_memory),
//! [`AccessTracker::track_guest_memory`](crate::AccessTracker::track_guest_memory) and
//! [`snapshot::Options::guest_memory`](crate::snapshot::Options::guest_memory) take it, too; [`GuestLayout::guest_ranges`]
//! turns what a tracker reports into guest addresses.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

pub use vm_memory;
pub use vm_memory::GuestAddress;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::pager::{Added, Pager, Refused, Region};
use crate::proc_maps::Process;
use crate::source::{PageSource, read_through};
use crate::{Errno, FeatureFlags, Uffd};

/// An address in the process that has the guest's memory mapped: the one that made the userfaultfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientAddress(pub usize);

impl ClientAddress {
    /// Returns a range of plain addresses, such as a tracker's, as one of client addresses.
    #[must_use]
    pub fn range(addresses: Range<usize>) -> Range<Self> {
        Self(addresses.start)..Self(addresses.end)
    }
}

impl fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A part of a guest's memory that is contiguous in both kinds of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestPart {
    /// Where the guest sees its first byte.
    pub guest: GuestAddress,
    /// Where the client sees it.
    pub client: ClientAddress,
    /// The length in bytes.
    pub len: usize,
    /// The page size in bytes.
    pub page_size: usize,
    /// The offset of its first byte in the file that it is a mapping of, in bytes.
    pub file_offset: Option<u64>,
}

impl GuestPart {
    /// Returns a part of pages of the system's size that has no file.
    #[must_use]
    pub fn new(guest: GuestAddress, client: ClientAddress, len: usize) -> Self {
        Self { guest, client, len, page_size: crate::page_size(), file_offset: None }
    }

    /// Sets the page size, in bytes.
    #[must_use]
    pub fn page_size(mut self, bytes: usize) -> Self {
        self.page_size = bytes;
        self
    }

    /// Sets the offset in the file, in bytes.
    #[must_use]
    pub fn file_offset(mut self, offset: u64) -> Self {
        self.file_offset = Some(offset);
        self
    }

    /// The client's addresses.
    fn addresses(&self) -> Range<usize> {
        self.client.0..self.client.0 + self.len
    }
}

/// Where the content of a guest's memory lies in a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Placement {
    /// Where it lies in the file that the memory is a mapping of: the source is a copy of that file.
    FileOffset,
    /// At the guest's address: the source is an image of the guest's address space, with holes.
    GuestAddress,
    /// One part after the other, in the order of the guest's addresses: Firecracker's snapshots, for example.
    Consecutive,
}

/// Why parts are no layout of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A part has no bytes, or reaches beyond any address.
    #[error("the guest memory of {len:#x} bytes at {:#x} is empty, or ends beyond any address", .guest.0)]
    Length {
        /// Where the guest sees it.
        guest: GuestAddress,
        /// Its length in bytes.
        len: usize,
    },

    /// Two parts share addresses of the guest or of the client.
    #[error("the guest memory at {:#x} shares addresses with that at {:#x}", .guest.0, .other.0)]
    Overlap {
        /// Where the guest sees one of them.
        guest: GuestAddress,
        /// Where it sees the other one.
        other: GuestAddress,
    },

    /// A part isn't a mapping of a file, which [`Placement::FileOffset`] needs.
    #[error("the guest memory at {:#x} isn't a mapping of a file, so it has no place by file offset", .guest.0)]
    NoFile {
        /// Where the guest sees it.
        guest: GuestAddress,
    },

    /// The monitor doesn't say where the guest sees a region.
    #[error("the monitor doesn't say where the guest sees the region at {client}")]
    NoGuestAddress {
        /// Where the client sees it.
        client: ClientAddress,
    },

    /// `/proc/self/smaps` can't be read, which has the page sizes.
    #[error("the page size of guest memory can't be found out: {0}")]
    PageSize(Errno),
}

/// Where each part of a guest's memory is for the guest and for the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestLayout {
    /// By guest address.
    parts: Vec<GuestPart>,
    /// The places in `parts`, by client address.
    by_client: Vec<usize>,
}

impl GuestLayout {
    /// Returns a layout of parts.
    ///
    /// # Errors
    ///
    /// [`Length`](LayoutError::Length), [`Overlap`](LayoutError::Overlap).
    pub fn new(parts: impl IntoIterator<Item = GuestPart>) -> Result<Self, LayoutError> {
        let mut parts: Vec<GuestPart> = parts.into_iter().collect();
        for &GuestPart { guest, client, len, .. } in &parts {
            let fits = guest.0.checked_add(len as u64).is_some() && client.0.checked_add(len).is_some();
            if len == 0 || !fits {
                return Err(LayoutError::Length { guest, len });
            }
        }
        parts.sort_by_key(|part| part.guest);
        let mut by_client: Vec<usize> = (0..parts.len()).collect();
        by_client.sort_by_key(|&at| parts[at].client);
        let of_guest = parts.windows(2).find(|two| two[0].guest.0 + two[0].len as u64 > two[1].guest.0);
        let of_client = by_client.windows(2).map(|two| [&parts[two[0]], &parts[two[1]]]);
        let overlap = of_guest
            .map(|two| [&two[0], &two[1]])
            .or_else(|| of_client.into_iter().find(|[one, next]| one.addresses().end > next.client.0));
        match overlap {
            Some([one, other]) => Err(LayoutError::Overlap { guest: other.guest, other: one.guest }),
            None => Ok(Self { parts, by_client }),
        }
    }

    /// Returns the layout of memory that this process has mapped. Page sizes are read from `/proc/self/smaps`.
    ///
    /// # Errors
    ///
    /// [`PageSize`](LayoutError::PageSize); [`Overlap`](LayoutError::Overlap) where two regions are one mapping.
    pub fn of<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Result<Self, LayoutError> {
        let part = |region: &GuestRegionMmap<B>| {
            let client = ClientAddress(region.as_ptr().addr());
            let mut part = GuestPart::new(region.start_addr(), client, region.size());
            part.file_offset = region.file_offset().map(vm_memory::FileOffset::start);
            let mappings = Process::Own
                .mappings_with_pages(&part.addresses())
                .map_err(|error| LayoutError::PageSize(error.errno().unwrap_or(Errno::ENODATA)))?;
            let page = mappings.iter().map(|mapping| mapping.page).find(|page| *page > 0);
            Ok(part.page_size(page.unwrap_or(crate::page_size())))
        };
        Self::new(memory.iter().map(part).collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns the layout of memory that another process hands over, if its monitor says where the guest sees it.
    ///
    /// # Errors
    ///
    /// [`NoGuestAddress`](LayoutError::NoGuestAddress), and those of [`new`](Self::new).
    #[cfg(feature = "handoff")]
    pub fn of_regions<'a>(
        regions: impl IntoIterator<Item = &'a crate::handoff::MemoryRegion>,
    ) -> Result<Self, LayoutError> {
        let part = |region: &crate::handoff::MemoryRegion| {
            let client = ClientAddress(region.address);
            let guest = region.guest_address.ok_or(LayoutError::NoGuestAddress { client })?;
            let mut part =
                GuestPart::new(GuestAddress(guest), client, region.len).page_size(region.page_size);
            part.file_offset = region.file_offset;
            Ok(part)
        };
        Self::new(regions.into_iter().map(part).collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns the parts, ordered by guest address.
    #[must_use]
    pub fn parts(&self) -> &[GuestPart] {
        &self.parts
    }

    /// Returns where the guest sees what the client sees at an address: that of a fault, for example.
    #[must_use]
    pub fn to_guest(&self, address: ClientAddress) -> Option<GuestAddress> {
        let before = self.by_client.partition_point(|&at| self.parts[at].client <= address);
        let part = &self.parts[self.by_client[before.checked_sub(1)?]];
        let offset = address.0 - part.client.0;
        (offset < part.len).then(|| GuestAddress(part.guest.0 + offset as u64))
    }

    /// Returns where the client sees what the guest sees at an address.
    #[must_use]
    pub fn to_client(&self, address: GuestAddress) -> Option<ClientAddress> {
        let before = self.parts.partition_point(|part| part.guest <= address);
        let part = &self.parts[before.checked_sub(1)?];
        let offset = address.0 - part.guest.0;
        (offset < part.len as u64).then(|| ClientAddress(part.client.0 + offset as usize))
    }

    /// Returns the guest addresses of a range of the client's, in the order of the client's addresses. What isn't guest memory
    /// is left out.
    pub fn guest_ranges(&self, range: Range<ClientAddress>) -> impl Iterator<Item = Range<GuestAddress>> {
        self.by_client.iter().filter_map(move |&at| {
            let part = &self.parts[at];
            let addresses = part.addresses();
            let (start, end) = (addresses.start.max(range.start.0), addresses.end.min(range.end.0));
            let guest = |address: usize| GuestAddress(part.guest.0 + (address - addresses.start) as u64);
            (start < end).then(|| guest(start)..guest(end))
        })
    }

    /// Returns the client addresses of a range of the guest's, in the order of the guest's addresses. What isn't guest memory
    /// is left out.
    pub fn client_ranges(&self, range: Range<GuestAddress>) -> impl Iterator<Item = Range<ClientAddress>> {
        self.parts.iter().filter_map(move |part| {
            let first = part.guest.0;
            let (start, end) = (first.max(range.start.0), (first + part.len as u64).min(range.end.0));
            let client = |address: u64| ClientAddress(part.client.0 + (address - first) as usize);
            (start < end).then(|| client(start)..client(end))
        })
    }

    /// The offset of each part in a source.
    fn offsets(&self, placement: Placement) -> Result<Vec<u64>, LayoutError> {
        let mut before = 0;
        let mut offset = |part: &GuestPart| match placement {
            Placement::FileOffset => part.file_offset.ok_or(LayoutError::NoFile { guest: part.guest }),
            Placement::GuestAddress => Ok(part.guest.0),
            Placement::Consecutive => {
                let offset = before;
                before += part.len as u64;
                Ok(offset)
            }
        };
        self.parts.iter().map(&mut offset).collect()
    }

    /// Returns a region of a pager for each part, in the order of [`parts`](Self::parts): for memory of another process, with
    /// [`Pager::add`].
    ///
    /// # Errors
    ///
    /// [`NoFile`](LayoutError::NoFile).
    pub fn regions<S: PageSource + 'static>(
        &self,
        placement: Placement,
        source: S,
    ) -> Result<Vec<Region>, LayoutError> {
        let source = Arc::new(source);
        let region = |(part, offset): (&GuestPart, u64)| {
            let region = Region::new(part.client.0, part.len, Arc::clone(&source));
            region.offset(offset).page_size(part.page_size)
        };
        Ok(self.parts.iter().zip(self.offsets(placement)?).map(region).collect())
    }
}

/// A source that keeps the memory mapped that it is for.
struct Keeping<S, B> {
    source: S,
    _memory: GuestMemoryMmap<B>,
}

impl<S: PageSource, B: Send + Sync> PageSource for Keeping<S, B> {
    read_through!(self => self.source);
}

impl Pager {
    /// Serves guest memory of this process: the content of the whole of it is `source`, by `placement`.
    ///
    /// The regions are in the order of the guest's addresses. Where a region is a shared mapping of a file and the descriptor
    /// reports minor faults, its pages are put into the file, so that other processes with the same memory have them, too.
    ///
    /// It is safe, other than [`add_own`](Self::add_own): the crate `vm_memory` gives no reference to bytes of guest memory, only
    /// volatile and atomic accesses, since a guest changes it at any time. The pager keeps the memory mapped as long as it serves it.
    ///
    /// ```
    /// use userfaultfd::guest::Placement;
    /// use userfaultfd::guest::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use userfaultfd::pager::{PageData, Pager};
    /// use userfaultfd::{UffdBuilder, page_size};
    ///
    /// let len = 16 * page_size();
    /// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), len), (GuestAddress(1 << 32), len)])?;
    /// let uffd = UffdBuilder::new().close_on_exec(true).user_mode_only(true).create()?;
    /// let pager = Pager::new()?;
    /// // Any source; here each byte is the number of its MiB in the guest's address space.
    /// let source = |offset: u64, page: &mut [u8]| {
    ///     page.fill((offset >> 20) as u8);
    ///     Ok(PageData::Data)
    /// };
    /// pager.add_guest_memory(uffd, &memory, Placement::GuestAddress, source)?;
    /// assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 32))?, (1_u64 << 32 >> 20) as u8);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`add`](Self::add), but for [`OwnMemory`](crate::pager::Error::OwnMemory);
    /// [`GuestMemory`](crate::pager::Error::GuestMemory).
    pub fn add_guest_memory<B, S>(
        &self,
        uffd: Uffd,
        memory: &GuestMemoryMmap<B>,
        placement: Placement,
        source: S,
    ) -> Result<Added, Refused>
    where
        B: Bitmap + Send + Sync + 'static,
        S: PageSource + 'static,
    {
        let minor = uffd.features().intersects(FeatureFlags::MINOR_SHMEM | FeatureFlags::MINOR_HUGETLBFS);
        let regions = GuestLayout::of(memory).map_err(crate::pager::Error::GuestMemory).and_then(|layout| {
            let source = Keeping { source, _memory: memory.clone() };
            let regions = layout.regions(placement, source).map_err(crate::pager::Error::GuestMemory)?;
            // Both are ordered by guest address.
            regions
                .into_iter()
                .zip(memory.iter())
                .map(|(region, mapped)| of_file(region, mapped, minor))
                .collect()
        });
        let regions: Vec<Region> = match regions {
            Ok(regions) => regions,
            Err(error) => return Err(Refused { uffd, error }),
        };
        #[expect(unsafe_code, reason = "guest memory is accessed without references to its bytes")]
        // SAFETY: no reference to a byte of this memory exists: `vm_memory` gives out volatile slices and atomics, for which any
        // content is valid and any change allowed, and `GuestMemoryMmap` was made by it, or by a caller of an unsafe function that
        // promised the same. The source keeps the mappings, and so nothing else is mapped there, until the regions are gone.
        unsafe {
            self.add_own(uffd, regions)
        }
    }
}

/// Says whether the memory is a file's.
fn of_file<B: Bitmap>(
    region: Region,
    mapped: &GuestRegionMmap<B>,
    minor: bool,
) -> Result<Region, crate::pager::Error> {
    if mapped.flags() & libc::MAP_SHARED == 0 {
        return Ok(region);
    }
    match mapped.file_offset() {
        Some(file) if minor => {
            let (file, offset): (File, u64) = (file.file().try_clone()?, file.start());
            Ok(region.minor(file, offset))
        }
        _ => Ok(region.shared()),
    }
}

/// The addresses of memory in this process, ordered by guest address.
#[cfg(any(feature = "tracking", feature = "snapshot"))]
fn addresses<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> impl Iterator<Item = Range<usize>> {
    memory.iter().map(|region| {
        let start = region.as_ptr().addr();
        start..start + region.size()
    })
}

/// Tracks all of it, or nothing.
#[cfg(feature = "tracking")]
fn track_all<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    mut track: impl FnMut(Range<usize>, bool) -> crate::Result<()>,
) -> crate::Result<()> {
    let mut tracked = Vec::new();
    for range in addresses(memory) {
        if let Err(error) = track(range.clone(), true) {
            // What failed is what is reported.
            tracked.into_iter().for_each(|range| drop(track(range, false)));
            return Err(error);
        }
        tracked.push(range);
    }
    Ok(())
}

#[cfg(feature = "tracking")]
macro_rules! track_guest_memory {
    ($($tracker:ty),*) => {
        $(impl $tracker {
            /// Tracks the memory of a guest from now on: all of it, as [`track`](Self::track) does for a range.
            ///
            /// [`GuestLayout::guest_ranges`](crate::guest::GuestLayout::guest_ranges) says what the guest calls the ranges that
            /// are reported.
            ///
            /// # Errors
            ///
            /// Those of [`track`](Self::track); nothing of the memory is newly tracked then.
            pub fn track_guest_memory<B: Bitmap>(&mut self, memory: &GuestMemoryMmap<B>) -> crate::Result<()> {
                track_all(memory, |range, on| if on { self.track(range) } else { self.untrack(range) })
            }
        })*
    };
}

#[cfg(feature = "tracking")]
track_guest_memory!(crate::DirtyTracker, crate::AccessTracker);

#[cfg(feature = "snapshot")]
impl crate::snapshot::Options {
    /// Adds the memory of a guest, in the order of the guest's addresses, behind the ranges added before. Keep it
    /// mapped until the snapshot, or the series, is dropped.
    pub fn guest_memory<B: Bitmap>(self, memory: &GuestMemoryMmap<B>) -> Self {
        addresses(memory).fold(self, Self::range)
    }
}
