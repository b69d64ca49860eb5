//! A store that fails, stalls and panics, and knows what is durable.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use userfaultfd::page_size;
use userfaultfd::pager::{PageData, PageSource, PageStore};

use crate::content::{Content, PANIC, WORD};
use crate::random::mix;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failures {
    None,
    Writes,
    Syncs,
}

/// A store in memory.
pub(super) struct Shelf {
    images: Mutex<Images>,
    pub(super) failures: Failures,
    /// Whether writes may come between flushes, too.
    on_flush: bool,
    /// Whether there is a flush now.
    pub(super) is_flushed: AtomicBool,
    /// Writes that came when there was none.
    pub(super) strays: AtomicUsize,
    /// Reads of pages whose last write has failed: memory alone has them.
    pub(super) unknown: AtomicUsize,
    seed: u64,
    calls: AtomicU64,
}

struct Images {
    /// What is read.
    now: Image,
    /// What a crash would leave.
    durable: Image,
}

#[derive(Clone)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    /// Of each page: whether its last write hasn't failed.
    pub(super) is_known: Vec<bool>,
}

impl Image {
    fn set_known(&mut self, bytes: &Range<usize>, is_known: bool) {
        self.is_known[bytes.start / page_size()..bytes.end.div_ceil(page_size())].fill(is_known);
    }
}

impl Shelf {
    pub(super) fn new(content: &Content, failures: Failures, on_flush: bool, seed: u64) -> Self {
        let mut bytes = vec![0; content.words.next_multiple_of(content.page) * WORD];
        content.fill(0, &mut bytes);
        bytes.truncate(content.words * WORD);
        let now = Image { bytes, is_known: vec![true; content.words.div_ceil(content.page)] };
        Self {
            images: Mutex::new(Images { durable: now.clone(), now }),
            failures,
            on_flush,
            is_flushed: AtomicBool::new(false),
            strays: AtomicUsize::new(0),
            unknown: AtomicUsize::new(0),
            seed,
            calls: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Images> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at what a crash would leave.
    pub(super) fn check(&self, check: impl FnOnce(&Image) -> Result<(), String>) -> Result<(), String> {
        check(&self.lock().durable)
    }

    fn luck(&self) -> u64 {
        mix(self.seed ^ self.calls.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes a while, seldom longer than a fault waits for a store.
    fn take_time(&self, luck: u64) {
        match luck >> 32 & 4095 {
            0 => thread::sleep(Duration::from_millis(1200)),
            1..20 => thread::sleep(Duration::from_millis(luck >> 44 & 7)),
            20..200 => thread::sleep(Duration::from_micros(luck >> 44 & 255)),
            _ => {}
        }
    }
}

impl PageSource for Shelf {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let luck = self.luck();
        if luck >> 32 & 4095 > 0 {
            self.take_time(luck);
        }
        let images = self.lock();
        let rest = &images.now.bytes[offset as usize..];
        let len = rest.len().min(page.len());
        let pages = offset as usize / page_size()..(offset as usize + len).div_ceil(page_size());
        if images.now.is_known[pages].contains(&false) {
            self.unknown.fetch_add(1, Ordering::Relaxed);
        }
        page[..len].copy_from_slice(&rest[..len]);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.lock().now.bytes.len() as u64)
    }
}

impl PageStore for Shelf {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.on_flush && !self.is_flushed.load(Ordering::SeqCst) {
            self.strays.fetch_add(1, Ordering::Relaxed);
        }
        let luck = self.luck();
        if self.failures == Failures::Writes {
            self.take_time(luck);
        }
        let range = offset as usize..offset as usize + bytes.len();
        if self.failures == Failures::Writes && luck % 8 == 0 {
            // Some of it is written, and some of it wrong.
            let mut images = self.lock();
            let Images { now, durable } = &mut *images;
            for (image, part) in [(now, bytes.len() / 2), (durable, bytes.len() / 3)] {
                image.bytes[range.start..range.start + part].fill(luck as u8);
                image.set_known(&range, false);
            }
            drop(images);
            if luck % 128 == 0 {
                std::panic::panic_any(PANIC);
            }
            return Err(io::ErrorKind::StorageFull.into());
        }
        let now = &mut self.lock().now;
        now.bytes[range.clone()].copy_from_slice(bytes);
        now.set_known(&range, true);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let luck = self.luck();
        if self.failures == Failures::Syncs && luck % 4 == 0 {
            return Err(io::ErrorKind::Other.into());
        }
        let images = &mut *self.lock();
        images.durable.clone_from(&images.now);
        Ok(())
    }
}
