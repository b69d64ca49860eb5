//! Poisoning: what becomes of pages whose content can't be had, and what memory's own file has instead.

#![expect(unsafe_code, reason = "poisoning memory that the owner of a region handed over")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::context::FillContext;
use super::filler::PageFiller;
use super::work::{FillContent, answer};
use crate::pager::memory::address_map::Segment;
use crate::pager::memory::descriptor::{Attachment, Descriptor, addr_to_ptr, wake};
use crate::pager::memory::page_run::{PageRun, is_in_source};
use crate::pager::memory::page_state::Settlement;
use crate::pager::memory::served::ServedRegion;
use crate::{ContinueMode, Errno};

impl PageFiller {
    /// Poisons pages at one address that are poisoned at another: in shared memory each mapping has its own poison. Returns
    /// the number of pages for which that failed, and may succeed soon.
    pub(crate) fn poison_here(&self, descriptor: &Descriptor, segment: &Segment) -> usize {
        let region = &segment.region;
        if !region.shared || region.pages.present_and_poisoned().1 == 0 {
            return 0;
        }
        let serving = descriptor.lock_shard(self.thread);
        let Some(serving) = &*serving else { return 0 };
        let is_left = |page: &usize| {
            let Some(address) = segment.address_of(*page) else { return false };
            let now = serving.layout.find(address);
            if !now.is_some_and(|now| Arc::ptr_eq(&now.region, region) && now.page_at(address) == *page) {
                return true;
            }
            let (_, errno, _) = poison(serving, region, address, region.page_size(), false);
            matches!(errno, Some(Errno::EAGAIN | Errno::ENOMEM))
        };
        segment.pages().filter(|page| region.pages.is_poisoned(*page)).filter(is_left).count()
    }

    /// Poisons pages that this thread has claimed and whose source faults on them: the thread would wait for itself.
    pub(crate) fn poison_own(&self, context: &FillContext, descriptor: &Descriptor, segment: &Segment) {
        let region = &segment.region;
        for page in segment.pages().filter(|page| is_in_source(region, *page)) {
            let serving = descriptor.lock_shard(self.thread);
            let Some(serving) = &*serving else { return };
            let Some(address) = segment.address_of(page).filter(|_| region.pages.is_loading(page)) else {
                continue;
            };
            let now = serving.layout.find(address);
            if now.is_some_and(|now| Arc::ptr_eq(&now.region, region) && now.page_at(address) == page) {
                let (done, _, end) = poison(serving, region, address, region.page_size(), false);
                if done > 0 {
                    context.counters(self.thread).poisoned.add(1);
                    let _joined = region.pages.end(page, end);
                    wake(&serving.uffd, address..address + done);
                }
            }
        }
    }

    /// Maps missing pages that are in the file of a private mapping, as an access would. Where the kernel can't poison,
    /// missing pages are copied at the end of service; into a private mapping the kernel copies without a look at the file,
    /// and the copy would hide the file's content. Into a shared mapping it doesn't.
    ///
    /// `memory` is `/proc/self/mem`, if the memory is this process's.
    pub(crate) fn map_from_file(
        &self,
        context: &FillContext,
        descriptor: &Descriptor,
        segment: &Segment,
        memory: Option<&File>,
    ) {
        let region = &segment.region;
        if region.shared || region.poison {
            return;
        }
        let missing = |page: &usize| region.pages.is_missing(*page) && !region.pages.is_removed(*page);
        for page in segment.pages().filter(missing) {
            let serving = descriptor.lock_shard(self.thread);
            let (Some(serving), Some(address)) = (&*serving, segment.address_of(page)) else { return };
            if !is_mapped_from_file(serving, region, address, memory) {
                continue;
            }
            // The page is no longer missing, unless another thread is about to notice, or it was moved or removed since.
            if region.pages.try_claim_untouched(page, false) {
                let mut run = PageRun::new(segment, page..page + 1, false);
                if run.is_there(serving) {
                    self.count(context, &run, &FillContent::Poison, 1, Settlement::Present);
                    run.skip(serving, Settlement::Present);
                } else {
                    run.give_up(Some(serving));
                }
            }
        }
    }
}

/// Poisons pages, and maps those that are in the memory's file, since another mapping or write(2) has written them. For a
/// minor region all are poisoned, but those that `may_be_there`: what its file holds of a page that was never loaded isn't
/// content.
///
/// Handles the first pages of one kind. Returns their bytes, the error on which it stopped, and their new state.
pub(crate) fn poison(
    serving: &Attachment,
    region: &ServedRegion,
    address: usize,
    len: usize,
    may_be_there: bool,
) -> (usize, Option<Errno>, Settlement) {
    let (uffd, dst) = (&serving.uffd, addr_to_ptr(address));
    let mut most = len;
    if region.cache.is_none() || may_be_there {
        let mut mode = ContinueMode::empty();
        mode.set(ContinueMode::WRITE_PROTECT, region.fills_protected());
        let mapped = uffd.continue_with(dst, len, mode).map(|mapped| mapped as usize);
        match answer(mapped, len) {
            (0, Some(Errno::EFAULT)) => most = region.page_size(),
            (0, Some(errno @ (Errno::EEXIST | Errno::EAGAIN | Errno::ENOMEM | Errno::ESRCH))) => {
                return (0, Some(errno), Settlement::Poisoned);
            }
            // Memory without a file, or a kernel that can't map from one.
            (0, Some(_)) => {}
            (mapped, errno) => return (mapped, errno, Settlement::Present),
        }
    }
    let poison = |len| {
        // SAFETY: the caller who added the region accepts that pages without content raise SIGBUS.
        answer(unsafe { uffd.poison(dst, len, true) }, len)
    };
    let (poisoned, errno) = match poison(most) {
        // A marker of protection may stop the poison. A thread that accesses the page meanwhile waits for this fill.
        (0, Some(Errno::EEXIST)) if region.fills_protected() => {
            let page = region.page_size();
            match uffd.remove_write_protection(dst, page, false) {
                Ok(()) => poison(page),
                Err(error) => (0, error.errno()),
            }
        }
        poisoned => poisoned,
    };
    (poisoned, errno, Settlement::Poisoned)
}

/// Maps a missing page if the memory's file has it. Returns whether it is mapped.
fn is_mapped_from_file(
    serving: &Attachment,
    region: &ServedRegion,
    address: usize,
    memory: Option<&File>,
) -> bool {
    let mut mode = ContinueMode::empty();
    mode.set(ContinueMode::WRITE_PROTECT, region.fills_protected());
    match serving
        .uffd
        .continue_with(addr_to_ptr(address), region.page_size(), mode)
        .map_err(|error| error.errno())
    {
        Ok(_) | Err(Some(Errno::EEXIST)) => true,
        // The file doesn't have the page.
        Err(Some(Errno::EFAULT)) => false,
        // A kernel without CONTINUE. This read doesn't wait for a userfaultfd: it maps the page like any other access, or
        // fails because the page is missing.
        Err(_) => memory.is_some_and(|memory| memory.read_at(&mut [0], address as u64).is_ok()),
    }
}
