//! Which chunks can be read in the mapping of an image, and how many mappings of the process that takes.

use std::sync::atomic::{AtomicIsize, Ordering};

use crate::proc_maps::max_mappings;

/// Where in the mappings of images, of this whole process, bytes that can be read border on bytes that can't. Each border is
/// one more mapping to the kernel.
static BORDERS: AtomicIsize = AtomicIsize::new(0);

/// The part of the mappings that a process may have which chunks may take.
const MAPPINGS_PART: usize = 4;

/// Mappings that a process may have, where the system doesn't say it: the kernel's default.
const USUAL_MAPPINGS: usize = 65530;

/// The number of borders up to which chunks are shown.
pub(super) fn max_borders() -> isize {
    (max_mappings().unwrap_or(USUAL_MAPPINGS) / MAPPINGS_PART) as isize
}

/// Counts some borders more, or fewer. `false`: they would be more than `most`, and aren't counted.
pub(super) fn take_borders(more: isize, most: isize) -> bool {
    let before = BORDERS.fetch_add(more, Ordering::Relaxed);
    let is_room = more <= 0 || before + more <= most;
    if !is_room {
        give_borders_back(more);
    }
    is_room
}

/// Undoes it.
pub(super) fn give_borders_back(more: isize) {
    BORDERS.fetch_sub(more, Ordering::Relaxed);
}

/// The chunks that can be read in the mapping of an image.
pub(super) struct Shown {
    chunks: Box<[bool]>,
    /// Those of [`BORDERS`] that are this image's.
    borders: isize,
}

impl Shown {
    pub(super) fn new(chunks: usize) -> Self {
        Self { chunks: vec![false; chunks].into(), borders: 0 }
    }

    pub(super) fn is(&self, chunk: usize) -> bool {
        self.chunks[chunk]
    }

    /// How many borders there are more with a chunk than without it. The ends of the mapping count as the rest.
    pub(super) fn change(&self, chunk: usize) -> isize {
        let is_shown =
            |chunk: Option<usize>| chunk.is_some_and(|chunk| self.chunks.get(chunk) == Some(&true));
        let neighbours = [chunk.checked_sub(1), chunk.checked_add(1)];
        2 - 2 * neighbours.into_iter().filter(|chunk| is_shown(*chunk)).count() as isize
    }

    /// Notes whether a chunk can be read, which makes a number of borders more.
    pub(super) fn set(&mut self, chunk: usize, is_shown: bool, more: isize) {
        self.chunks[chunk] = is_shown;
        self.borders += more;
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        give_borders_back(self.borders);
    }
}
