//! What belongs where: every word of memory tells by its value which page it is of, and which thread put it there.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::pager::{BytesSource, FileSource, MappedFileSource, PageData, PageSource};
use userfaultfd_examples::memfd;

use crate::random::mix;

/// Memory is written and checked by words of 4 bytes, which are atomic everywhere.
pub(crate) const WORD: usize = size_of::<u32>();

/// What a source has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content {
    pub(crate) key: u64,
    /// The size of a page, in words.
    pub(crate) page: usize,
    /// How many words the source has. What lies beyond is zero.
    pub(crate) words: usize,
    /// Whether it has pages that can't be had.
    pub(crate) has_bad: bool,
}

impl Content {
    /// Whether all of a page is zero.
    pub(crate) fn is_zero(&self, page: usize) -> bool {
        mix(self.key ^ mix(page as u64)) % 16 == 0
    }

    /// Whether a page can never be had.
    pub(crate) fn is_bad(&self, page: usize) -> bool {
        self.has_bad && mix(self.key ^ mix(page as u64)) % 64 == 1
    }

    /// What the source has.
    pub(crate) fn loaded(&self, page: usize, word: usize) -> u32 {
        if self.is_zero(page) || page * self.page + word >= self.words {
            return 0;
        }
        self.value(page, word, 0)
    }

    /// What the writer of a generation of the page writes.
    pub(crate) fn written(&self, page: usize, word: usize, generation: u32) -> u32 {
        self.value(page, word, 1 + u64::from(generation))
    }

    fn value(&self, page: usize, word: usize, author: u64) -> u32 {
        let place = (page as u64) << 32 | word as u64;
        // 0 is what nobody has put there.
        mix(self.key ^ mix(place ^ author << 40)) as u32 | 1
    }

    /// Writes what the source has from a page on.
    pub(crate) fn fill(&self, first: usize, bytes: &mut [u8]) {
        for (page, bytes) in bytes.chunks_mut(self.page * WORD).enumerate() {
            for (word, bytes) in bytes.chunks_exact_mut(WORD).enumerate() {
                bytes.copy_from_slice(&self.loaded(first + page, word).to_ne_bytes());
            }
        }
    }

    /// A source of one of several kinds, with `pages` pages.
    pub(crate) fn source(&self, kind: usize, pages: usize) -> io::Result<Arc<dyn PageSource>> {
        if kind == 0 {
            return Ok(Arc::new(Flaky { content: *self, calls: AtomicU64::new(0), since: Instant::now() }));
        }
        let mut bytes = vec![0; pages * self.page * WORD];
        self.fill(0, &mut bytes);
        bytes.truncate(self.words * WORD);
        if kind == 1 {
            return Ok(Arc::new(BytesSource::new(bytes)));
        }
        let file = memfd(bytes.len())?;
        for (page, bytes) in bytes.chunks(self.page * WORD).enumerate() {
            // What is zero is a hole.
            if !self.is_zero(page) {
                file.write_all_at(bytes, (page * self.page * WORD) as u64)?;
            }
        }
        Ok(match kind {
            2 => Arc::new(FileSource::new(file)?),
            _ => Arc::new(MappedFileSource::new(file)?),
        })
    }
}

/// A source that stalls, fails and panics.
struct Flaky {
    content: Content,
    calls: AtomicU64,
    since: Instant,
}

impl Flaky {
    /// One source of eight answers nothing for seconds, soon after it was made.
    fn wait_until_up(&self) {
        let luck = mix(self.content.key ^ 0x5eed);
        let down = Duration::from_millis(luck >> 8 & 1023)..Duration::from_millis(2000 + (luck >> 20 & 2047));
        if luck % 8 == 0 && down.contains(&self.since.elapsed()) {
            thread::sleep(down.end.saturating_sub(self.since.elapsed()));
        }
    }
}

/// The panic of a source, which nobody needs to hear of.
pub(crate) const PANIC: &str = "a source panics, as it is meant to";

impl PageSource for Flaky {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let bytes = self.content.page * WORD;
        let first = (offset / bytes as u64) as usize;
        let pages = first..first + page.len() / bytes;
        if pages.clone().any(|page| self.content.is_bad(page)) {
            return Err(io::Error::other("a page that can't be had"));
        }
        self.wait_until_up();
        let luck = mix(self.content.key ^ mix(offset) ^ self.calls.fetch_add(1, Ordering::Relaxed));
        match luck % 4096 {
            0..4 => thread::sleep(Duration::from_millis(luck >> 12 & 127)),
            4..32 => thread::sleep(Duration::from_micros(luck >> 12 & 8191)),
            1000..2000 => thread::sleep(Duration::from_micros(luck >> 12 & 255)),
            32..100 => return Err(io::ErrorKind::TimedOut.into()),
            100..128 => return Err(io::ErrorKind::Interrupted.into()),
            128..140 => std::panic::panic_any(PANIC),
            _ => {}
        }
        if pages.clone().all(|page| self.content.is_zero(page)) {
            return Ok(PageData::Zero);
        }
        self.content.fill(first, page);
        Ok(PageData::Data)
    }
}

/// Counts how often each page was delivered.
pub(crate) struct Counted<S> {
    pub(crate) source: S,
    pub(crate) page_size: usize,
    pub(crate) delivered: Vec<AtomicU8>,
    /// Told of a page that was delivered twice.
    pub(crate) twice: fn(usize),
}

impl<S: PageSource> PageSource for Counted<S> {
    fn len(&self) -> Option<u64> {
        self.source.len()
    }

    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let fill = self.source.read(offset, page)?;
        let first = (offset / self.page_size as u64) as usize;
        for page in first..first + page.len() / self.page_size {
            if self.delivered[page].fetch_add(1, Ordering::Relaxed) > 0 {
                (self.twice)(page);
            }
        }
        Ok(fill)
    }
}
