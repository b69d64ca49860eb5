//! Between the memory and the sink: a bounded number of bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar};

use crate::Errno;
use crate::lock_order::{LockGuard, RankedMutex, lock, rank};
use crate::snapshot::sink::Content;

/// What is delivered: where, and what.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) offset: u64,
    pub(crate) len: usize,
    pub(crate) payload: Payload,
}

#[derive(Debug)]
pub(crate) enum Payload {
    Data(Buffer),
    Zero,
    Gone,
}

/// A buffer, which goes back where it came from.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) bytes: Vec<u8>,
    size: Size,
}

/// Buffers for the walk, and small ones for a page that is about to be written, which don't wait for the walk's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Chunk,
    Page,
}

impl Item {
    pub(crate) fn content(&self) -> Content<'_> {
        match &self.payload {
            Payload::Data(buffer) => Content::Data(&buffer.bytes),
            Payload::Zero => Content::Zero(self.len as u64),
            Payload::Gone => Content::Gone(self.len as u64),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    free: [Vec<Buffer>; 2],
    /// Nothing will be added any more: all of it is there, or it is given up.
    end: Option<End>,
    /// Why it was given up, if that is an error of the kernel's.
    failure: Option<Errno>,
    /// How the sink ended.
    sink: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Complete,
    Aborted,
}

#[derive(Debug)]
pub(crate) struct Queue {
    state: RankedMutex<State, { rank::QUEUE }>,
    changed: Condvar,
    /// Wakes the thread that copies.
    wake: Arc<UnixStream>,
}

impl Queue {
    /// With a number of buffers, each of a number of bytes: of chunks, of pages.
    pub(crate) fn new(chunks: (usize, usize), pages: (usize, usize), wake: Arc<UnixStream>) -> Self {
        let buffers = |size, (count, len): (usize, usize)| {
            (0..count).map(|_| Buffer { bytes: Vec::with_capacity(len), size }).collect()
        };
        let free = [buffers(Size::Chunk, chunks), buffers(Size::Page, pages)];
        let state = RankedMutex::new(State { free, ..State::default() });
        Self { state, changed: Condvar::new(), wake }
    }

    fn lock(&self) -> LockGuard<'_, State> {
        lock(&self.state)
    }

    /// A free buffer, if there is one.
    pub(crate) fn buffer(&self, size: Size) -> Option<Buffer> {
        self.lock().free[size as usize].pop()
    }

    pub(crate) fn has_buffer(&self, size: Size) -> bool {
        !self.lock().free[size as usize].is_empty()
    }

    pub(crate) fn give_back(&self, buffer: Buffer) {
        self.lock().free[buffer.size as usize].push(buffer);
    }

    pub(crate) fn push(&self, item: Item) {
        self.lock().items.push_back(item);
        self.changed.notify_all();
    }

    /// Nothing more comes. What is complete can still be given up.
    pub(crate) fn end(&self, end: End) {
        let mut state = self.lock();
        if state.end != Some(End::Aborted) {
            state.end = Some(end);
        }
        drop(state);
        self.changed.notify_all();
        self.wake();
    }

    /// It is given up, for this error if there is one.
    pub(crate) fn fail(&self, errno: Option<Errno>) {
        if errno.is_some() {
            self.lock().failure = errno;
        }
        self.end(End::Aborted);
    }

    pub(crate) fn failure(&self) -> Option<Errno> {
        self.lock().failure
    }

    /// The next item, or how it ended. Waits.
    pub(crate) fn pop(&self) -> Result<Item, End> {
        let mut state = self.lock();
        loop {
            if state.end == Some(End::Aborted) {
                return Err(End::Aborted);
            }
            if let Some(item) = state.items.pop_front() {
                return Ok(item);
            }
            if let Some(end) = state.end {
                return Err(end);
            }
            state = state.wait(&self.changed);
        }
    }

    /// The sink is done with an item.
    pub(crate) fn done(&self, item: Item) {
        if let Payload::Data(buffer) = item.payload {
            self.give_back(buffer);
            self.wake();
        }
    }

    /// The sink has ended.
    pub(crate) fn sink_ended(&self, well: bool) {
        self.lock().sink = Some(well);
        self.wake();
    }

    pub(crate) fn sink(&self) -> Option<bool> {
        self.lock().sink
    }

    pub(crate) fn ended(&self) -> Option<End> {
        self.lock().end
    }

    pub(crate) fn wake(&self) {
        match (&*self.wake).write_all(&[0]) {
            Ok(()) => {}
            // Woken already; or there is nobody any more.
            Err(error) => debug_assert!(matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::BrokenPipe | io::ErrorKind::Interrupted
            )),
        }
    }
}
