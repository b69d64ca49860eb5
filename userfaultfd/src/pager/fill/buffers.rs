//! Buffers for content, in mappings instead of the allocator, and content that is kept in one while its fill is deferred.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{Advice, MmapMut, MmapOptions};

use crate::Errno;
use crate::owner::PerProcess;

/// Bytes of content that this process keeps for deferred fills at most. Content beyond that is loaded again.
const MAX_ASIDE_BYTES: usize = 64 << 20;

/// Spare buffers that a thread keeps, for the content of later deferred fills.
pub(crate) const MAX_SPARE_BUFFERS: usize = 8;

/// Bytes of the huge pages of which long buffers are made. A disk is given one piece of a buffer for each page, and may take
/// few at a time: some virtual ones take one.
const HUGE_BYTES: usize = 2 << 20;

/// Bytes of the least buffer that is made of them: it is mapped twice as long at most.
const MIN_HUGE_BYTES: usize = HUGE_BYTES / 2;

/// Bytes of content that are kept now, counted in each process on its own.
static PUT_ASIDE: PerProcess<AtomicUsize> = PerProcess::new();

/// Makes the counter of this process. It allocates, so it must be called before faults come.
pub(crate) fn prepare() -> Result<(), Errno> {
    PUT_ASIDE.get().map(drop)
}

/// Bytes of content that this process keeps now.
#[cfg(test)]
pub(crate) fn put_aside() -> usize {
    PUT_ASIDE.made().map_or(0, |bytes| bytes.load(Ordering::Relaxed))
}

/// Content that is kept while its fill is deferred. Any thread may install it.
#[derive(Debug)]
pub(crate) struct Aside {
    buffer: Option<MmapMut>,
    counted: &'static AtomicUsize,
}

impl Aside {
    /// Keeps the content of a buffer. If too much is kept already, returns the buffer instead.
    pub(super) fn new(buffer: MmapMut) -> Result<Self, MmapMut> {
        let Some(counted) = PUT_ASIDE.made() else { return Err(buffer) };
        let len = buffer.len();
        let fits = |aside: usize| aside.checked_add(len).filter(|aside| *aside <= MAX_ASIDE_BYTES.max(len));
        match counted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Self { buffer: Some(buffer), counted }),
            Err(_) => Err(buffer),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }

    pub(super) fn into_buffer(mut self) -> Option<MmapMut> {
        self.take()
    }

    fn take(&mut self) -> Option<MmapMut> {
        let buffer = self.buffer.take();
        self.counted.fetch_sub(buffer.as_ref().map_or(0, |buffer| buffer.len()), Ordering::Relaxed);
        buffer
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.take();
    }
}

/// Maps a buffer of at least `len` bytes, without the allocator, which a forking thread may have locked.
pub(crate) fn ensure_capacity(buffer: &mut Option<MmapMut>, len: usize) -> io::Result<&mut MmapMut> {
    if buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
        *buffer = Some(MmapOptions::new().len(len).no_reserve_swap().map_anon()?);
    }
    buffer.as_mut().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Maps a buffer of at least `len` bytes that a disk may read or write by itself: a long one of huge pages, where the kernel
/// has some.
pub(crate) fn map_for_disk(len: usize) -> io::Result<MmapMut> {
    if len < MIN_HUGE_BYTES {
        return MmapOptions::new().len(len).no_reserve_swap().map_anon();
    }
    // Since Linux 6.7 the kernel aligns mappings of such lengths to their pages.
    let buffer = MmapOptions::new().len(len.next_multiple_of(HUGE_BYTES)).no_reserve_swap().map_anon()?;
    // Without them it does as well, and slower.
    let _advised = buffer.advise(Advice::HugePage);
    Ok(buffer)
}

/// As [`ensure_capacity`], of a buffer by [`map_for_disk`].
pub(crate) fn ensure_capacity_for_disk(buffer: &mut Option<MmapMut>, len: usize) -> io::Result<&mut MmapMut> {
    if buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
        *buffer = Some(map_for_disk(len)?);
    }
    buffer.as_mut().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::support::{child, require, test_name};

    /// Where the kernel has huge pages, a mapping that asks for them is known by a flag.
    #[test]
    fn long_buffer_for_a_disk_asks_for_huge_pages() {
        require!();
        let asks = |buffer: &MmapMut| {
            let (address, maps) = (buffer.as_ptr().addr(), fs::read_to_string("/proc/self/smaps").unwrap());
            // It may be one mapping with its neighbours.
            let has = |line: &&str| {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                let number = |text| usize::from_str_radix(text, 16).ok();
                let range = range.and_then(|(start, end)| Some(number(start)?..number(end)?));
                range.is_some_and(|range| range.contains(&address))
            };
            let mut mapping = maps.lines().skip_while(|line| !has(line));
            let flags = mapping.find(|line| line.starts_with("VmFlags:")).unwrap();
            flags.split_whitespace().any(|flag| flag == "hg")
        };
        let (long, short) =
            (map_for_disk(MIN_HUGE_BYTES).unwrap(), map_for_disk(MIN_HUGE_BYTES - 1).unwrap());
        assert_eq!((long.len(), short.len()), (HUGE_BYTES, MIN_HUGE_BYTES - 1));
        assert_eq!(asks(&long), fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap());
        let mut kept = Some(long);
        let address = kept.as_ref().unwrap().as_ptr();
        assert_eq!(
            ensure_capacity_for_disk(&mut kept, HUGE_BYTES).unwrap().as_ptr(),
            address,
            "it is long enough"
        );
        assert_eq!(ensure_capacity_for_disk(&mut kept, HUGE_BYTES + 1).unwrap().len(), 2 * HUGE_BYTES);
    }

    #[test]
    fn forked_child_counts_only_what_it_puts_aside_itself() {
        require!();
        child::run_well(test_name!(), || {
            let buffer = |len| MmapOptions::new().len(len).no_reserve_swap().map_anon().unwrap();
            prepare().unwrap();
            let all = Aside::new(buffer(MAX_ASIDE_BYTES)).unwrap();
            assert!(Aside::new(buffer(1)).is_err());
            let mut all = Some(all);
            child::fork(|| {
                prepare().unwrap();
                let own = Aside::new(buffer(MAX_ASIDE_BYTES - 1)).unwrap();
                // The parent's.
                drop(all.take());
                assert!(Aside::new(buffer(2)).is_err());
                let more = Aside::new(buffer(1)).unwrap();
                drop((own, more));
                assert_eq!(PUT_ASIDE.made().unwrap().load(Ordering::Relaxed), 0);
            })
            .succeed();
            drop(all);
            assert!(Aside::new(buffer(1)).is_ok());
        });
    }
}
