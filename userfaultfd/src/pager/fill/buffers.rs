//! Buffers for content, mapped: nothing is taken from the allocator. And content that is put aside in one.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{MmapMut, MmapOptions};

/// Bytes of content that this process puts aside at most. What exceeds that is loaded again.
const MAX_ASIDE_BYTES: usize = 64 << 20;

/// Buffers that a thread keeps for content that will be put aside.
pub(crate) const MAX_SPARE_BUFFERS: usize = 8;

/// Bytes of content that are put aside now.
static PUT_ASIDE: AtomicUsize = AtomicUsize::new(0);

/// Content that is put aside. Any thread may go on with it.
#[derive(Debug)]
pub(crate) struct Aside(Option<MmapMut>);

impl Aside {
    /// `None` if too much is put aside. The buffer comes back then.
    pub(super) fn new(buffer: MmapMut) -> Result<Self, MmapMut> {
        let len = buffer.len();
        let fits = |aside: usize| aside.checked_add(len).filter(|aside| *aside <= MAX_ASIDE_BYTES.max(len));
        match PUT_ASIDE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Self(Some(buffer))),
            Err(_) => Err(buffer),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }

    pub(super) fn into_buffer(mut self) -> Option<MmapMut> {
        self.take()
    }

    fn take(&mut self) -> Option<MmapMut> {
        let buffer = self.0.take();
        PUT_ASIDE.fetch_sub(buffer.as_ref().map_or(0, |buffer| buffer.len()), Ordering::Relaxed);
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
