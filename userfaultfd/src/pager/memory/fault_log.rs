//! A log of the pages of a region that faulted, in order.

#![expect(unsafe_code, reason = "atomic numbers in a mapping")]

use std::io;
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// The pages that faulted, each once, in mappings that take memory only where an entry is. Noting is async-signal-safe.
#[derive(Debug)]
pub(crate) struct Log {
    /// Numbers of pages, plus 1.
    entries: MmapRaw,
    next: AtomicUsize,
    /// A bit for each page, set once it is noted.
    noted: MmapRaw,
    mode: AtomicU8,
}

/// Whether and how faults are noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    Off,
    /// Faults are noted, and fault-around stays as it is.
    On,
    /// Faults are noted without fault-around, so that each accessed page is noted.
    Exact,
    /// Faults will be noted once the former entries are cleared.
    Starting,
}

impl Log {
    /// Makes a log with room for all pages of a region.
    pub(crate) fn new(pages: usize) -> io::Result<Self> {
        let map = |len| MmapOptions::new().len(len).no_reserve_swap().map_anon().map(MmapRaw::from);
        let entries = map(pages.saturating_mul(size_of::<AtomicUsize>()))?;
        let noted = map(pages.div_ceil(8))?;
        Ok(Self { entries, next: AtomicUsize::new(0), noted, mode: AtomicU8::new(Mode::Off as u8) })
    }

    fn entries(&self) -> &[AtomicUsize] {
        let count = self.entries.len() / size_of::<AtomicUsize>();
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins with a page")]
        let entries = self.entries.as_ptr().cast::<AtomicUsize>();
        // SAFETY: `pages` numbers are mapped, aligned to a page, while `self` is borrowed. All access to them is by these
        // atomics, for which any bytes are valid.
        unsafe { slice::from_raw_parts(entries, count) }
    }

    fn bits(&self) -> &[AtomicU8] {
        // SAFETY: the bytes are mapped while `self` is borrowed. All access to them is by these atomics, for which any
        // byte is valid.
        unsafe { slice::from_raw_parts(self.noted.as_ptr().cast::<AtomicU8>(), self.noted.len()) }
    }

    /// Notes a page, if faults are noted and it isn't yet. Returns whether to fill nothing around it.
    pub(crate) fn note(&self, page: usize) -> bool {
        // Pairs with the store of `start`: a thread that sees noting on sees the entries cleared.
        let mode = self.mode.load(Ordering::Acquire);
        if (mode == Mode::On as u8 || mode == Mode::Exact as u8) && self.is_new(page) {
            if let Some(entry) = self.entries().get(self.next.fetch_add(1, Ordering::Relaxed)) {
                entry.store(page + 1, Ordering::Release);
            }
        }
        mode == Mode::Exact as u8
    }

    /// Sets the bit of a page. Returns whether it was clear.
    fn is_new(&self, page: usize) -> bool {
        let bit = 1 << (page % 8);
        self.bits().get(page / 8).is_some_and(|bits| {
            bits.load(Ordering::Relaxed) & bit == 0 && bits.fetch_or(bit, Ordering::Relaxed) & bit == 0
        })
    }

    /// Begins to note, with an empty log. Returns `false` while another recorder or replay uses the log.
    pub(crate) fn start(&self, mode: Mode) -> bool {
        let claimed = self.claim();
        if claimed {
            self.clear();
            self.mode.store(mode as u8, Ordering::Release);
        }
        claimed
    }

    /// Takes the log from [`Mode::Off`]. Faults are noted only once it is cleared, so that clearing removes no new note.
    fn claim(&self) -> bool {
        let (off, starting) = (Mode::Off as u8, Mode::Starting as u8);
        self.mode.compare_exchange(off, starting, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn clear(&self) {
        for entry in self.entries().iter().take(self.next.swap(0, Ordering::AcqRel)) {
            entry.store(0, Ordering::Relaxed);
        }
        // Writing zeros would take memory.
        for bits in self.bits().iter().filter(|bits| bits.load(Ordering::Relaxed) != 0) {
            bits.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn stop(&self) {
        self.mode.store(Mode::Off as u8, Ordering::Release);
    }

    /// The noted pages, each once.
    pub(crate) fn pages(&self) -> Vec<usize> {
        let noted = self.entries().iter().take(self.next.load(Ordering::Acquire));
        noted.filter_map(|entry| entry.load(Ordering::Acquire).checked_sub(1)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_notes_each_page_once_in_order_while_on() {
        crate::support::require!();
        let log = Log::new(10).unwrap();
        assert!(!log.note(9));
        assert!(log.start(Mode::Exact) && !log.start(Mode::On));
        assert!([3, 9, 3, 0].into_iter().all(|page| log.note(page)));
        log.stop();
        assert!(!log.note(5));
        assert_eq!(log.pages(), [3, 9, 0]);
        assert!(log.start(Mode::On));
        assert!(log.pages().is_empty() && !log.note(3));
        assert_eq!(log.pages(), [3]);
    }

    #[test]
    fn notes_are_taken_only_once_the_old_ones_are_cleared() {
        crate::support::require!();
        let log = Log::new(10).unwrap();
        assert!(log.start(Mode::Exact) && log.note(1));
        log.stop();
        assert!(log.claim() && !log.claim() && !log.start(Mode::On));
        // A fault noted now would be lost: the recorder would miss the page, and fill around it.
        assert!(!log.note(5));
        assert_eq!(log.pages(), [1]);
        log.clear();
        log.mode.store(Mode::Exact as u8, Ordering::Release);
        assert!(log.note(7));
        assert_eq!(log.pages(), [7]);
    }

    #[test]
    fn there_is_room_for_every_page_however_many_faults_it_has() {
        crate::support::require!();
        let log = Log::new(1000).unwrap();
        assert!(log.start(Mode::On));
        for round in 0..10 {
            (0..1000).for_each(|page| assert!(!log.note((page + round) % 1000)));
        }
        assert!(log.pages().into_iter().eq(0..1000));
    }
}
