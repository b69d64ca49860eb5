//! Working through much memory a piece at a time: a writer waits for one piece at most.

use std::time::{Duration, Instant};

use super::layout::Part;

/// Bytes of a slice: at first, and at least.
const LEAST: usize = 8 << 20;

/// At most.
const MOST: usize = 1 << 30;

/// How long one is to take. The kernel takes some 80 ns for a page, small or huge.
const TIME: Duration = Duration::from_micros(150);

/// Slices, as large as takes the time that they are to take.
#[derive(Debug)]
pub(crate) struct Slices {
    bytes: usize,
}

impl Slices {
    pub(crate) fn new() -> Self {
        Self { bytes: LEAST }
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
        let bytes = if took < TIME { self.bytes * 2 } else { self.bytes / 2 };
        self.bytes = bytes.clamp(LEAST, MOST);
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
        assert_eq!(slices.cut(part(LEAST - 4096, 1 << 30)), part(LEAST - 4096, 4096));
        assert_eq!(slices.cut(part(LEAST, 1 << 30)), part(LEAST, LEAST));
        assert_eq!(slices.cut(part(LEAST, 8192)), part(LEAST, 8192));
        let huge = Part { address: 1 << 30, offset: 0, len: 4 << 30, page: 1 << 30 };
        assert_eq!(slices.cut(huge.clone()), Part { len: 1 << 30, ..huge });

        slices.learn(TIME / 2);
        assert_eq!(slices.cut(part(LEAST, 1 << 30)).len, LEAST);
        assert_eq!(slices.cut(part(2 * LEAST, 1 << 30)).len, 2 * LEAST);
        (0..20).for_each(|_| slices.learn(TIME / 2));
        assert_eq!(slices.cut(part(MOST, 4 << 30)).len, MOST);
        (0..20).for_each(|_| slices.learn(TIME));
        assert_eq!(slices.bytes, LEAST);
    }
}
