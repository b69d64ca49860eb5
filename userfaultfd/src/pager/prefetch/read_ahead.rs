//! Read-ahead: where a source is slow and access sequential, several threads read the next pages concurrently.

use std::sync::Arc;

use crate::pager::fill::ahead_queue::Ahead;
use crate::pager::fill::filler::PageFiller;
use crate::pager::fill::work::{Outcome, Work};
use crate::pager::memory::page_run::PageRun;
use crate::pager::serve::shared::Shared;

/// Reads ahead until the pager stops.
pub(crate) fn read(shared: &Shared, thread: usize) {
    let mut filler = PageFiller::new(thread);
    filler.place = Some(thread);
    while let Some(Ahead { descriptor, region, addresses }) = shared.fill.ahead.next() {
        shared.fill.activities.set_at_work(thread, true);
        let mut at = addresses.start;
        while at < addresses.end && !shared.is_stopping() {
            let run = {
                let serving = descriptor.lock_shard(thread);
                let Some(serving) = &*serving else { break };
                let Some(segment) = serving.layout.find(at) else { break };
                if !Arc::ptr_eq(&segment.region, &region) {
                    break;
                }
                let pages = segment.page_at(at)..segment.page_at(addresses.end.min(segment.end) - 1) + 1;
                let (run, next) = PageRun::claim(segment, pages, usize::MAX);
                at = segment.address_of(next).unwrap_or(segment.end);
                run
            };
            let Some(run) = run else { continue };
            match filler.resume(&shared.fill, &descriptor, Work::Load(run.early(), 0)) {
                Outcome::Settled => {}
                // A fault that needs the page reads it again.
                Outcome::Deferred(work, _) => filler.give_up(&descriptor, work),
                Outcome::TargetGone => shared.retire(&descriptor),
            }
        }
        shared.fill.activities.set_at_work(thread, false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use crate::pager::fill::ahead_queue::CHUNK_BYTES;
    use crate::pager::{Budget, PageData};
    use crate::support::proc::wait_until;
    use crate::{FeatureFlags, LazyMemory};

    /// Content by which each word is known.
    fn word(offset: u64) -> [u8; 8] {
        (offset ^ 0x5555).to_ne_bytes()
    }

    #[test]
    fn slow_source_is_read_by_several_threads_each_page_once() {
        crate::support::require!();
        const CHUNKS: usize = 24;
        static READING: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        static BYTES: AtomicUsize = AtomicUsize::new(0);
        let source = |offset: u64, buffer: &mut [u8]| {
            let now = READING.fetch_add(1, Ordering::SeqCst) + 1;
            MOST.fetch_max(now, Ordering::SeqCst);
            BYTES.fetch_add(buffer.len(), Ordering::SeqCst);
            // Slow, so that it is worth it; and until there are others, which there needn't be.
            let start = Instant::now();
            let enough = |time: Duration| {
                time > Duration::from_micros(400)
                    && (MOST.load(Ordering::SeqCst) >= 4 || time > Duration::from_millis(5))
            };
            while !enough(start.elapsed()) {
                std::thread::yield_now();
            }
            for (at, bytes) in buffer.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&word(offset + 8 * at as u64));
            }
            READING.fetch_sub(1, Ordering::SeqCst);
            Ok(PageData::Data)
        };
        let memory = LazyMemory::builder(source).len(CHUNKS * CHUNK_BYTES).read_ahead(4, 8 * CHUNK_BYTES);
        let memory = memory.build().unwrap();
        for at in (0..memory.len()).step_by(crate::page_size()) {
            assert_eq!(memory[at..at + 8], word(at as u64), "at {at:#x}");
        }
        assert!(MOST.load(Ordering::SeqCst) >= 4, "{MOST:?} at once");
        assert_eq!(BYTES.load(Ordering::SeqCst), memory.len(), "each page once");
        assert!(memory.statistics().faults() < 200, "{}", memory.statistics());
    }

    #[test]
    fn failed_read_ahead_is_retried_and_reported_once_needed() {
        crate::support::require!();
        const BAD: usize = 5 * CHUNK_BYTES;
        let source = |offset: u64, buffer: &mut [u8]| {
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(200) {}
            let range = offset as usize..offset as usize + buffer.len();
            // The bad page fails as long as it is read together with others.
            if range.contains(&BAD) && buffer.len() > crate::page_size() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            buffer.fill(7);
            Ok(PageData::Data)
        };
        let memory =
            LazyMemory::builder(source).len(8 * CHUNK_BYTES).read_ahead(3, 8 * CHUNK_BYTES).build().unwrap();
        assert!(memory.chunks(crate::page_size()).all(|page| page[0] == 7));
        let statistics = memory.statistics();
        assert_eq!(statistics.poisoned, 0, "{statistics}");
        assert!(statistics.source_errors > 0, "{statistics}");
    }

    /// With a budget one fault fills no more than 512 pages in one run, and has more read ahead.
    #[test]
    fn budget_has_more_read_ahead_than_one_run() {
        crate::support::require!(FeatureFlags::PAGEFAULT_FLAG_WP);
        let (page, slow) = (crate::page_size(), Duration::from_millis(1));
        let source = move |offset: u64, buffer: &mut [u8]| {
            let start = Instant::now();
            while start.elapsed() < slow {}
            buffer.fill((offset >> 20) as u8 | 1);
            Ok(PageData::Data)
        };
        let (budget, most) = (Budget::new(16 * 1024 * page), 1024 * page);
        let memory = LazyMemory::builder(source).len(4096 * page).read_ahead(2, most).budget(&budget);
        let memory = memory.build().unwrap();
        // Each fault comes where the last fill ended, and fills twice as much.
        for filled in (0..=10).map(|doublings| (1 << doublings) - 1) {
            assert_ne!(memory[filled * page], 0);
            wait_until(|| budget.resident() == (2 * filled + 1) * page);
        }
        assert_eq!(memory.statistics().faults(), 11);
    }
}
