//! What a snapshot is of, and how it is taken.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use super::copy::bits::Bits;
use super::copy::copier::Copier;
use super::copy::layout::{Layout, Part};
use super::copy::look::ChunkView;
use super::copy::shared::Shared;
use super::error::{Error, Result};
use super::handle::{Series, Snapshot};
use super::maker::{Buffers, Maker};
use super::sink::{Region, Sink};
use crate::holder::Holder;
use crate::proc_maps::Process;
use crate::watch::{Protection, Watch};
use crate::{FeatureFlags, Pid, Uffd, UffdBuilder, page_size};

/// Bytes that the walk saves at a time, unless a page is larger.
const CHUNK_BYTES: usize = 256 << 10;

/// How pages are treated that the program drops (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`) before they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Removal {
    /// They are saved first. The dropping thread, and every thread that writes to a page that is still protected, waits
    /// until the whole snapshot has been read. So does a thread that moves memory with mremap(2), and sometimes one that
    /// unmaps memory or maps over it: the kernel names the change only when it lets the thread go on. Right where dropped
    /// pages may have been in use when the snapshot began, such as memory that an allocator frees.
    #[default]
    Save,
    /// They are delivered as zeros, and no thread waits. For programs that no longer need a page once they have decided to
    /// drop it, such as the balloon of a virtual machine.
    Zero,
}

/// Options of a snapshot or a series: several ranges, another process, the size of buffers.
#[derive(Debug)]
#[must_use]
pub struct Options {
    ranges: Vec<Range<usize>>,
    buffer: usize,
    removal: Removal,
    user_mode_only: bool,
    descriptor: Option<Uffd>,
    process: Process,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ranges: Vec::new(),
            buffer: 16 << 20,
            removal: Removal::Save,
            user_mode_only: true,
            descriptor: None,
            process: Process::Own,
        }
    }
}

impl Options {
    /// Returns options without a range; [`range`](Self::range) adds one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a range of addresses, behind those added before. The bounds must be multiples of the page size, of the huge
    /// page size on hugetlb memory, and all of it must be mapped.
    pub fn range(mut self, range: Range<usize>) -> Self {
        self.ranges.push(range);
        self
    }

    /// Sets how many bytes may be buffered between memory and the sink. When the buffers are full, writers wait for the sink.
    /// The default is 16 MiB; less than some pages counts as some pages.
    pub fn buffer(mut self, bytes: usize) -> Self {
        self.buffer = bytes;
        self
    }

    /// Sets how pages that the program drops meanwhile are treated. The default is [`Removal::Save`].
    pub fn removal(mut self, removal: Removal) -> Self {
        self.removal = removal;
        self
    }

    /// Sets whether only writes from user mode are resolved, as [`UffdBuilder::user_mode_only`] does. The default is `true`,
    /// which needs no right; then **a system call that writes to a page that isn't saved yet, such as read(2), fails with
    /// `EFAULT`**. With `false`, which needs a [right](crate#rights), it waits like any write.
    pub fn user_mode_only(mut self, user_mode_only: bool) -> Self {
        self.user_mode_only = user_mode_only;
        self
    }

    /// Saves memory of another process, through a descriptor that was made in that process for this snapshot alone (it sent the
    /// descriptor, or [`UffdBuilder::create_in`] made it), with
    /// [`EVENT_REMOVE`](FeatureFlags::EVENT_REMOVE), [`EVENT_UNMAP`](FeatureFlags::EVENT_UNMAP) and
    /// [`EVENT_REMAP`](FeatureFlags::EVENT_REMAP), and where the kernel has it with
    /// [`WP_UNPOPULATED`](FeatureFlags::WP_UNPOPULATED). Needs the right to read that memory by ptrace(2).
    pub fn process(mut self, pid: Pid, uffd: Uffd) -> Self {
        self.process = Process::Other(pid);
        self.descriptor = Some(uffd);
        self
    }

    /// Begins one snapshot: see [`Snapshot::begin`].
    ///
    /// # Errors
    ///
    /// As [`Snapshot::begin`].
    pub fn begin<S: Sink + 'static>(self, sink: S) -> Result<Snapshot<S>> {
        let maker = self.maker(false)?;
        let mut snapshot = maker.begin(sink, Bits::default())?;
        snapshot.maker = Some(maker);
        Ok(snapshot)
    }

    /// Returns a series of snapshots of the same memory, each of which holds the changes since the one before.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::begin`], without those of the sink.
    pub fn series(self) -> Result<Series> {
        let maker = self.maker(true)?;
        let (always, revoked) = (maker.no_bits(), maker.no_bits());
        Ok(Series { maker, always, revoked, last: None })
    }

    fn maker(self, series: bool) -> Result<Maker> {
        let features = FeatureFlags::PAGEFAULT_FLAG_WP
            | FeatureFlags::EVENT_REMOVE
            | FeatureFlags::EVENT_UNMAP
            | FeatureFlags::EVENT_REMAP;
        let uffd = match self.descriptor {
            Some(uffd) => uffd,
            None => UffdBuilder::new()
                .close_on_exec(true)
                .user_mode_only(self.user_mode_only)
                .require_features(features)
                .request_features(FeatureFlags::WP_UNPOPULATED)
                .create()?,
        };
        uffd.set_nonblocking(true)?;
        let protects_empty = uffd.features().contains(FeatureFlags::WP_UNPOPULATED);
        let mut watch = Watch::new(uffd, self.process, Protection::Write, Holder::Snapshot)?;
        watch.protects_empty = protects_empty;
        // The thread that tries is the one that reads what must be read before another try.
        watch.tries = 1;
        let watch = Arc::new(watch);
        let mut parts = Vec::new();
        let mut regions = Vec::new();
        for range in &self.ranges {
            watch.register(range)?;
            for tracked in crate::watch::ranges::within(&watch.ranges(), range) {
                let offset = parts.last().map_or(0, |part: &Part| part.offset + part.len);
                let Range { start, end } = tracked.range;
                parts.push(Part { address: start, offset, len: end - start, page: tracked.page });
                let page = tracked.page as u64;
                regions.push(Region { addresses: start as u64..end as u64, page });
            }
        }
        let largest = parts.iter().map(|part| part.page).max().unwrap_or(page_size());
        let chunk = CHUNK_BYTES.max(largest);
        let buffers = Buffers {
            chunks: ((self.buffer / 4 * 3 / chunk).max(2), chunk),
            pages: ((self.buffer / 4 / largest).max(4), largest),
        };
        let shared = Arc::new(Shared::new().map_err(Error::Thread)?);
        let look = ChunkView::new()?;
        // Where the kernel doesn't tell what is protected, nothing shows whether it was this memory.
        let beside = match watch.process {
            Process::Own if look.can_tell() => {
                Some(UffdBuilder::new().close_on_exec(true).user_mode_only(self.user_mode_only).create()?)
            }
            _ => None,
        };
        let silent = silent(&watch, &parts, look.can_tell())?;
        let how = (self.removal, series, look);
        let copier = Copier::new(watch, beside, Arc::clone(&shared), Layout::new(parts), how, silent, chunk)
            .map_err(Error::Thread)?;
        let copier = thread::Builder::new()
            .name("snapshot".into())
            .spawn(move || copier.run())
            .map_err(Error::Thread)?;
        Ok(Maker { shared, copier: Some(copier), regions, buffers })
    }
}

/// The pages that may be dropped and seem protected all the same: all but private anonymous memory, or all where the
/// kernel doesn't show protection.
fn silent(watch: &Watch, parts: &[Part], can_tell: bool) -> Result<Bits> {
    let end = parts.iter().map(|part| part.offset + part.len).max().unwrap_or(0);
    let mut silent = Bits::new(end / page_size(), true);
    for part in parts.iter().filter(|_| can_tell) {
        for mapping in watch.process.mappings(&(part.address..part.address + part.len))? {
            if mapping.anonymous {
                let start = (part.offset + (mapping.range.start - part.address)) / page_size();
                silent.set(start..start + mapping.range.len() / page_size(), false);
            }
        }
    }
    Ok(silent)
}
