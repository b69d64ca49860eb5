//! Decompressed frames that are kept, and which thread decompresses one.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Decompressed frames of a limited number of bytes. What several threads need one decompresses, and the others wait.
pub(crate) struct Frames {
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In no order.
    entries: Vec<Entry>,
    /// Bytes of all that are there.
    bytes: usize,
    clock: u64,
}

struct Entry {
    frame: usize,
    /// `None`: a thread decompresses it.
    content: Option<Arc<Vec<u8>>>,
    used: u64,
}

/// A frame that this thread decompresses. Dropped, another thread may do it.
struct Loading<'a> {
    frames: &'a Frames,
    frame: usize,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut state = self.frames.lock();
        state.entries.retain(|entry| entry.frame != self.frame || entry.content.is_some());
        drop(state);
        self.frames.changed.notify_all();
    }
}

impl Frames {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a frame that is there, without a wait.
    pub(crate) fn find(&self, frame: usize) -> Option<Arc<Vec<u8>>> {
        self.lock().find(frame)?.content.clone()
    }

    /// Returns a frame, which `load` decompresses if it isn't there.
    pub(crate) fn get(
        &self,
        frame: usize,
        load: impl FnOnce() -> io::Result<Vec<u8>>,
    ) -> io::Result<Arc<Vec<u8>>> {
        let mut state = self.lock();
        while let Some(entry) = state.find(frame) {
            if let Some(content) = &entry.content {
                return Ok(Arc::clone(content));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.entries.push(Entry { frame, content: None, used: 0 });
        drop(state);
        let loading = Loading { frames: self, frame };
        let content = Arc::new(load()?);
        self.lock().put(frame, Arc::clone(&content), self.limit);
        drop(loading);
        Ok(content)
    }

    /// Keeps a frame that was loaded beside others, if it isn't there and no thread loads it.
    #[cfg(feature = "snapshot")]
    pub(crate) fn insert(&self, frame: usize, content: Arc<Vec<u8>>) {
        let mut state = self.lock();
        if state.find(frame).is_none() && content.len() <= self.limit {
            state.entries.push(Entry { frame, content: None, used: 0 });
            state.put(frame, content, self.limit);
        }
    }

    /// Bytes that are kept.
    #[cfg(all(test, feature = "zstd"))]
    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

impl State {
    fn find(&mut self, frame: usize) -> Option<&mut Entry> {
        self.clock += 1;
        let now = self.clock;
        let entry = self.entries.iter_mut().find(|entry| entry.frame == frame)?;
        entry.used = now;
        Some(entry)
    }

    /// Keeps a frame, and drops those whose last use is the longest ago. A frame that is longer than the limit is kept by
    /// nobody but its readers.
    fn put(&mut self, frame: usize, content: Arc<Vec<u8>>, limit: usize) {
        if content.len() > limit {
            return;
        }
        while self.bytes + content.len() > limit {
            let there = self.entries.iter().enumerate().filter(|(_, entry)| entry.content.is_some());
            let Some((oldest, _)) = there.min_by_key(|(_, entry)| entry.used) else { break };
            let dropped = self.entries.swap_remove(oldest).content;
            self.bytes -= dropped.map_or(0, |content| content.len());
        }
        self.bytes += content.len();
        if let Some(entry) = self.find(frame) {
            entry.content = Some(content);
        }
    }
}
