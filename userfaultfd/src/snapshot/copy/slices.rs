//! Working through much memory a piece at a time: a writer waits for one piece at most.

use std::time::{Duration, Instant};

use super::layout::Part;

/// Bytes of a slice: at first, and at least.
const MIN_SLICE_BYTES: usize = 8 << 20;

/// Bytes of a slice at most.
const MAX_SLICE_BYTES: usize = 1 << 30;

/// Time that protecting a slice should take. The kernel takes some 80 ns for a page, small or huge.
const SLICE_TIME: Duration = Duration::from_micros(150);

/// Slices, as large as their time allows.
#[derive(Debug)]
pub(crate) struct Slices {
    bytes: usize,
}

impl Slices {
    pub(crate) fn new() -> Self {
        Self { bytes: MIN_SLICE_BYTES }
    }

    /// The first slice of a part. Ends where an address is a multiple of the size of slices, and so no huge page is cut.
    pub(crate) fn cut(&self, part: Part) -> Part {
        let slice = self.bytes.max(part.page);
        let len = part.len.min(slice - part.address % slice);
        Part { len, ..part }
    }

    /// Does something with a slice, and learns how large slices may be.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        self.learn(started.elapsed());
        result
    }

    fn learn(&mut self, took: Duration) {
        let bytes = if took < SLICE_TIME { self.bytes * 2 } else { self.bytes / 2 };
        self.bytes = bytes.clamp(MIN_SLICE_BYTES, MAX_SLICE_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_grow_and_shrink_and_cut_no_page() {
        crate::support::require!();
        let mut slices = Slices::new();
        let part = |address, len| Part { address, offset: 3 << 12, len, page: 4096 };
        assert_eq!(slices.cut(part(MIN_SLICE_BYTES - 4096, 1 << 30)), part(MIN_SLICE_BYTES - 4096, 4096));
        assert_eq!(slices.cut(part(MIN_SLICE_BYTES, 1 << 30)), part(MIN_SLICE_BYTES, MIN_SLICE_BYTES));
        assert_eq!(slices.cut(part(MIN_SLICE_BYTES, 8192)), part(MIN_SLICE_BYTES, 8192));
        let huge = Part { address: 1 << 30, offset: 0, len: 4 << 30, page: 1 << 30 };
        assert_eq!(slices.cut(huge.clone()), Part { len: 1 << 30, ..huge });

        slices.learn(SLICE_TIME / 2);
        assert_eq!(slices.cut(part(MIN_SLICE_BYTES, 1 << 30)).len, MIN_SLICE_BYTES);
        assert_eq!(slices.cut(part(2 * MIN_SLICE_BYTES, 1 << 30)).len, 2 * MIN_SLICE_BYTES);
        (0..20).for_each(|_| slices.learn(SLICE_TIME / 2));
        assert_eq!(slices.cut(part(MAX_SLICE_BYTES, 4 << 30)).len, MAX_SLICE_BYTES);
        (0..20).for_each(|_| slices.learn(SLICE_TIME));
        assert_eq!(slices.bytes, MIN_SLICE_BYTES);
    }
}
