//! The growth of a region's mapping.
//!
//! When mremap(2) makes a mapping longer, the new part is registered, too, and no event reports it. What belongs there
//! is what the kernel itself would show: zeros, or the file's content. So the part is served as a hole of the region.
//!
//! Memory that a program registers to add it as a region later looks the same where it is of one mapping with a region
//! before it. If it was registered when that region was added, it counts as such memory, and its faults wait. Otherwise the
//! first fault makes it a part of the region before it for good: the memory can't be added any more, since pages that were
//! read as zeros must not change.

#![expect(unsafe_code, reason = "an operation that can't succeed")]

use std::ops::Range;

use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Attachment, Descriptor, addr_to_ptr};
use crate::{Errno, Uffd, sys};

/// Whether a range lies in one registered mapping. `None`: the kernel can't say at the moment.
pub(crate) fn is_one_mapping(uffd: &Uffd, range: Range<usize>) -> Option<bool> {
    let unreadable = sys::unreadable().ok()?;
    // COPY looks at the mapping before it reads its source.
    // SAFETY: nothing can be read there, so that nothing is copied.
    let answer = unsafe { uffd.copy(unreadable, addr_to_ptr(range.start), range.len(), false) };
    match answer.err().and_then(|error| error.errno()) {
        Some(Errno::EFAULT | Errno::EEXIST) => Some(true),
        Some(Errno::ENOENT | Errno::EINVAL) => Some(false),
        _ => None,
    }
}

/// Adds an address to a region whose mapping has grown to it. Returns whether one has.
pub(crate) fn adopt_growth(descriptor: &Descriptor, address: usize) -> bool {
    let mut adopted = false;
    descriptor.with_all_shards(&mut |serving| {
        let Some(serving) = serving else { return };
        adopted = !descriptor.is_registering() && adopt(serving, address);
    });
    adopted
}

/// Adds the growth of a region's mappings as holes, before the region is handed over: parts that were never accessed are
/// registered, too. The caller must hold all shards. Allocates nothing.
pub(crate) fn adopt_all(descriptor: &Descriptor, serving: &mut Attachment, region: u64) {
    if descriptor.is_registering() {
        return;
    }
    let mut last = 0;
    let next = |serving: &Attachment, last: usize| {
        let of_it = serving.layout.everything().filter(|part| part.region.id == region);
        of_it.map(|part| part.end).filter(|end| *end > last).min()
    };
    while let Some(end) = next(serving, last) {
        adopt(serving, end);
        last = end;
    }
}

/// Adds the whole growth of a region's mapping as a hole if it has an address. Returns whether it has. No region may be
/// about to be added: it would be taken for growth.
fn adopt(serving: &mut Attachment, address: usize) -> bool {
    // Another region, or a hole, may adjoin the region.
    if serving.layout.find(address).is_some() || serving.layout.find_hole(address).is_some() {
        return false;
    }
    let Some(before) = serving.layout.before(address).cloned() else { return false };
    let (page, end) = (before.region.page_size(), before.end);
    if before.region.followed == Some(end) {
        return false;
    }
    let fits = |pages: usize| {
        let len = pages.checked_mul(page).and_then(|len| end.checked_add(len));
        len.is_some_and(|to| is_one_mapping(&serving.uffd, end - page..to) == Some(true))
    };
    let mut pages = (address - end) / page + 1;
    if !fits(pages) {
        return false;
    }
    // To the end of the mapping, or to the next served segment.
    let most = (serving.layout.next_start(address) - end) / page;
    let mut step = pages;
    while step <= most - pages && fits(pages + step) {
        pages += step;
        step = step.saturating_mul(2);
    }
    while step > 1 {
        step /= 2;
        if step <= most - pages && fits(pages + step) {
            pages += step;
        }
    }
    let grown =
        Segment { start: end, end: end + pages * page, first: before.pages().end, region: before.region };
    serving.layout_mut().grow(grown)
}
