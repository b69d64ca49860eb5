//! Beginning a snapshot, and the thread of its sink.

use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::copy::bits::Bits;
use super::copy::queue::{End, Queue};
use super::copy::shared::{Begin, Counts, Shared};
use super::error::{Error, Result};
use super::handle::Snapshot;
use super::sink::{Geometry, Region, Sink};
use crate::page_size;

#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers {
    pub(super) chunks: (usize, usize),
    pub(super) pages: (usize, usize),
}

/// The thread that takes snapshots of some memory. Ends when it is dropped.
#[derive(Debug)]
pub(super) struct Maker {
    pub(super) shared: Arc<Shared>,
    pub(super) copier: Option<JoinHandle<()>>,
    pub(super) regions: Vec<Region>,
    pub(super) buffers: Buffers,
}

impl Maker {
    pub(super) fn begin<S: Sink + 'static>(&self, sink: S, changed: Bits) -> Result<Snapshot<S>> {
        self.begin_with(|completed| Ok((sink, completed > 0, changed)))
    }

    /// Begins a snapshot with what a function returns for the number of those that have been completed: the sink,
    /// whether it gets only what has changed, and what counts as changed.
    pub(super) fn begin_with<S: Sink + 'static>(
        &self,
        with: impl FnOnce(u64) -> Result<(S, bool, Bits)>,
    ) -> Result<Snapshot<S>> {
        if !self.shared.owner.is_current() {
            return Err(Error::Kernel(crate::Error::OtherProcess));
        }
        let completed = self.shared.claim().ok_or(Error::Running)?;
        let with = caught(|| with(completed)).and_then(|with| with);
        let (mut sink, incremental, changed) = with.inspect_err(|_| self.shared.release(false))?;
        let begun = self.begin_claimed(&mut sink, incremental, changed);
        let (queue, counts) = begun.inspect_err(|_| self.shared.release(false))?;
        let of_sink = Arc::clone(&queue);
        let spawned =
            thread::Builder::new().name("snapshot sink".into()).spawn(move || deliver(sink, &of_sink));
        match spawned {
            Ok(thread) => {
                let shared = Arc::clone(&self.shared);
                Ok(Snapshot { queue, counts, shared, sink: Some(thread), maker: None })
            }
            Err(error) => {
                queue.fail(None);
                queue.sink_ended(false);
                Err(Error::Thread(error))
            }
        }
    }

    /// The bits of the pages in a range, by their addresses when this was made. Each region has its own.
    pub(super) fn bits_in(&self, range: &Range<usize>) -> Result<Vec<Range<usize>>> {
        let (mut bits, mut offset, mut found) = (Vec::new(), 0, 0);
        for Region { addresses, page } in &self.regions {
            let (first, end) = (addresses.start as usize, addresses.end as usize);
            let (start, stop) = (first.max(range.start), end.min(range.end));
            if start < stop {
                let page = *page as usize;
                if let Some(address) = [start, stop].into_iter().find(|bound| bound % page != 0) {
                    return Err(crate::Error::InsidePage { address, page_size: page }.into());
                }
                bits.push((offset + start - first) / page_size()..(offset + stop - first) / page_size());
                found += stop - start;
            }
            offset += end - first;
        }
        if found == range.len() {
            Ok(bits)
        } else {
            Err(crate::Error::NeverTracked { start: range.start, end: range.end }.into())
        }
    }

    /// No page of all of them.
    pub(super) fn no_bits(&self) -> Bits {
        let bytes: u64 =
            self.regions.iter().map(|region| region.addresses.end - region.addresses.start).sum();
        Bits::new(bytes as usize / page_size(), false)
    }

    fn begin_claimed<S: Sink>(
        &self,
        sink: &mut S,
        incremental: bool,
        changed: Bits,
    ) -> Result<(Arc<Queue>, Arc<Counts>)> {
        let geometry = Geometry { regions: self.regions.clone(), incremental };
        self.shared.sink_begins(true);
        let begun = caught(|| sink.begin(&geometry));
        self.shared.sink_begins(false);
        begun?.map_err(Error::Sink)?;
        let queue = Arc::new(Queue::new(self.buffers.chunks, self.buffers.pages, self.shared.waker()));
        let counts = Arc::new(Counts::default());
        self.shared.begin(Begin { queue: Arc::clone(&queue), counts: Arc::clone(&counts), changed })?;
        Ok((queue, counts))
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        if !self.shared.owner.is_current() {
            std::mem::forget(self.copier.take());
            return self.shared.abandon();
        }
        self.shared.end();
        if let Some(thread) = self.copier.take() {
            // It doesn't panic; what it failed of is told by the snapshot.
            drop(thread.join());
        }
    }
}

/// Calls a sink, which may panic.
fn caught<T>(call: impl FnOnce() -> T) -> Result<T> {
    panic::catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        // So may what it panics with, when it is dropped, and what it panics with then.
        if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            std::mem::forget(payload);
        }
        Error::SinkPanicked
    })
}

/// Gives a sink what is delivered.
fn deliver<S: Sink>(mut sink: S, queue: &Queue) -> (S, Result<()>) {
    let deliver = || loop {
        match queue.pop() {
            Ok(item) => {
                sink.write(item.offset, item.content()).map_err(Error::Sink)?;
                queue.done(item);
            }
            Err(End::Complete) => return sink.finish().map_err(Error::Sink),
            Err(End::Aborted) => return Err(Error::Aborted),
        }
    };
    let result = caught(deliver).and_then(|result| result);
    if result.is_err() {
        queue.end(End::Aborted);
    }
    queue.sink_ended(result.is_ok());
    (sink, result)
}
