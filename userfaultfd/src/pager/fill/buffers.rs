//! Buffers for content, mapped: nothing is taken from the allocator. And content that is put aside in one.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{MmapMut, MmapOptions};

use crate::Errno;
use crate::owner::PerProcess;

/// Bytes of content that this process puts aside at most. What exceeds that is loaded again.
const MAX_ASIDE_BYTES: usize = 64 << 20;

/// Buffers that a thread keeps for content that will be put aside.
pub(crate) const MAX_SPARE_BUFFERS: usize = 8;

/// Bytes of content that are put aside now. None of it is a fork's child's.
static PUT_ASIDE: PerProcess<AtomicUsize> = PerProcess::new();

/// Has this process count what it puts aside. Allocates, so it comes before there are faults.
pub(crate) fn prepare() -> Result<(), Errno> {
    PUT_ASIDE.get().map(drop)
}

/// Content that is put aside. Any thread may go on with it.
#[derive(Debug)]
pub(crate) struct Aside {
    buffer: Option<MmapMut>,
    counted: &'static AtomicUsize,
}

impl Aside {
    /// The buffer comes back if too much is put aside.
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

/// A buffer of at least `len` bytes. It is mapped: nothing that a thread which forks has locked is needed.
pub(crate) fn ensure_capacity(buffer: &mut Option<MmapMut>, len: usize) -> io::Result<&mut MmapMut> {
    if buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
        *buffer = Some(MmapOptions::new().len(len).no_reserve_swap().map_anon()?);
    }
    buffer.as_mut().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::{child, require, test_name};

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
