//! Memory apart from the allocator's.
//!
//! A thread that forks holds the allocator's locks until its event is read. So a thread that keeps a worker from
//! reading it, by having a shard locked (see `descriptor`), neither allocates nor frees: what grows there lies in mappings
//! of its own, and what ends there is left to the control thread to free.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::Layout;
use std::ptr::NonNull;

use allocator_api2::alloc::{AllocError, Allocator};

use crate::{page_size, sys};

/// A vector with a mapping of its own.
pub(crate) type MappedVec<T> = allocator_api2::vec::Vec<T, Mapped>;

/// Gives out mappings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped;

/// A vector without a mapping.
pub(crate) const fn none<T>() -> MappedVec<T> {
    MappedVec::new_in(Mapped)
}

/// Returns an empty vector with a mapping; `None` if it can't be mapped.
pub(crate) fn try_with_room<T>(items: usize) -> Option<MappedVec<T>> {
    let mut empty = none();
    empty.try_reserve_exact(items).ok().map(|()| empty)
}

/// Makes room for one more item. Returns whether there is.
pub(crate) fn try_reserve<T>(vector: &mut MappedVec<T>) -> bool {
    vector.try_reserve(1).is_ok()
}

/// Makes room for `items` more items. Waits where there is no memory: what an event tells can't be left out.
pub(crate) fn reserve<T>(vector: &mut MappedVec<T>, items: usize) {
    while vector.try_reserve(items).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Returns a copy, with room for more items; `None` where there is no memory.
pub(crate) fn try_copy<T: Clone>(vector: &MappedVec<T>, more: usize) -> Option<MappedVec<T>> {
    let mut copy = try_with_room(vector.len() + more)?;
    copy.extend(vector.iter().cloned());
    Some(copy)
}

/// The length of a mapping.
fn mapped_len(layout: Layout) -> usize {
    layout.size().next_multiple_of(page_size())
}

// SAFETY: a mapping stays, and is nobody else's, until it is given back; all copies of `Mapped` are the same.
unsafe impl Allocator for Mapped {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 || layout.align() > page_size() {
            return Err(AllocError);
        }
        let len = mapped_len(layout);
        let start = sys::map(len).map_err(|_errno| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(start, len))
    }

    unsafe fn deallocate(&self, start: NonNull<u8>, layout: Layout) {
        // SAFETY: a mapping of `allocate` is given back once, and the size is one that fits it: not less than was asked
        // for, and not more than was had.
        unsafe { sys::unmap(start, mapped_len(layout)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::{child, maps, test_name};

    #[test]
    fn vectors_grow_shrink_and_give_everything_back() {
        crate::support::require!();
        // Alone, so that no other thread maps something where it was.
        child::run_well(test_name!(), || {
            let mut vector = try_with_room(10).unwrap();
            vector.extend(0..10_u64);
            for number in 10..100_000 {
                vector.push(number);
            }
            assert!(vector.iter().copied().eq(0..100_000));
            vector.truncate(700);
            vector.shrink_to_fit();
            let copy = try_copy(&vector, 3).unwrap();
            assert!(copy.capacity() >= 703 && copy.into_iter().eq(0..700));
            let start = vector.as_ptr().addr();
            assert!(maps::mapping_of(start).is_some());
            drop(vector);
            assert_eq!(maps::mapping_of(start), None);
        });
    }
}
