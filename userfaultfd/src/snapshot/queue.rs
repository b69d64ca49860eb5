//! Between the memory and the sink: a bounded number of bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::sink::Content;
use crate::Errno;

/// What is delivered: where, and what.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) payload: Payload,
}

#[derive(Debug)]
pub(super) enum Payload {
    Data(Buffer),
    Zero,
    Gone,
}

/// A buffer, which goes back where it came from.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) bytes: Vec<u8>,
    size: Size,
}

/// Buffers for the walk, and small ones for a page that is about to be written, which don't wait for the walk's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Chunk,
    Page,
}

impl Item {
    pub(super) fn content(&self) -> Content<'_> {
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
pub(super) enum End {
    Complete,
    Aborted,
}

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Wakes the thread that copies.
    wake: Arc<UnixStream>,
}

impl Queue {
    /// With so many buffers of so many bytes: of chunks, of pages.
    pub(super) fn new(chunks: (usize, usize), pages: (usize, usize), wake: Arc<UnixStream>) -> Self {
        let buffers = |size, (count, len): (usize, usize)| {
            (0..count).map(|_| Buffer { bytes: Vec::with_capacity(len), size }).collect()
        };
        let free = [buffers(Size::Chunk, chunks), buffers(Size::Page, pages)];
        let state = Mutex::new(State { free, ..State::default() });
        Self { state, changed: Condvar::new(), wake }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A free buffer, if there is one.
    pub(super) fn buffer(&self, size: Size) -> Option<Buffer> {
        self.lock().free[size as usize].pop()
    }

    pub(super) fn has_buffer(&self, size: Size) -> bool {
        !self.lock().free[size as usize].is_empty()
    }

    pub(super) fn give_back(&self, buffer: Buffer) {
        self.lock().free[buffer.size as usize].push(buffer);
    }

    pub(super) fn push(&self, item: Item) {
        self.lock().items.push_back(item);
        self.changed.notify_all();
    }

    /// Nothing more comes. What is complete can still be given up.
    pub(super) fn end(&self, end: End) {
        let mut state = self.lock();
        if state.end != Some(End::Aborted) {
            state.end = Some(end);
        }
        drop(state);
        self.changed.notify_all();
        self.wake();
    }

    /// It is given up, for this error if there is one.
    pub(super) fn fail(&self, errno: Option<Errno>) {
        if errno.is_some() {
            self.lock().failure = errno;
        }
        self.end(End::Aborted);
    }

    pub(super) fn failure(&self) -> Option<Errno> {
        self.lock().failure
    }

    /// The next item, or how it ended. Waits.
    pub(super) fn pop(&self) -> Result<Item, End> {
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
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The sink is done with an item.
    pub(super) fn done(&self, item: Item) {
        if let Payload::Data(buffer) = item.payload {
            self.give_back(buffer);
            self.wake();
        }
    }

    /// The sink has ended.
    pub(super) fn sink_ended(&self, well: bool) {
        self.lock().sink = Some(well);
        self.wake();
    }

    pub(super) fn sink(&self) -> Option<bool> {
        self.lock().sink
    }

    pub(super) fn ended(&self) -> Option<End> {
        self.lock().end
    }

    pub(super) fn wake(&self) {
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
