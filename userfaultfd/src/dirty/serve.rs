//! The thread that handles faults where they are delivered.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::watch::Watch;
use crate::error::errno_of;
use crate::{Error, Event, EventBuffer, Result, page_size, sys};

/// Messages that are read at a time.
const BATCH: usize = 64;

/// The thread, which ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    /// Something to read there tells the thread to stop.
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(watch: &Arc<Watch>) -> Result<Self> {
        watch.uffd.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair().map_err(|error| system_error(&error))?;
        let watch = Arc::clone(watch);
        let serve = move || {
            if let Err(error) = serve(&watch, &stopped) {
                // Nobody is to wait for ever. That nothing is noted any more is told by every answer.
                watch.fail(&error);
                for tracked in watch.ranges().iter() {
                    if let Err(error) = watch.untrack(&tracked.range) {
                        watch.fail(&error);
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("userfaultfd".into()).spawn(serve);
        Ok(Self { stop, thread: Some(thread.map_err(|error| system_error(&error))?) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // If that can't be written, the other end is closed: the thread has ended.
        let told = self.stop.write_all(&[0]);
        debug_assert!(told.is_ok() || self.thread.as_ref().is_some_and(JoinHandle::is_finished));
        if let Some(thread) = self.thread.take() {
            // It doesn't panic.
            drop(thread.join());
        }
    }
}

fn system_error(error: &io::Error) -> Error {
    Error::SystemError(errno_of(error))
}

fn serve(watch: &Watch, stop: &UnixStream) -> Result<()> {
    let mut buffer = EventBuffer::new(BATCH);
    let mut resolved = Vec::with_capacity(BATCH);
    loop {
        let [_, stopped] = sys::wait_readable([watch.uffd.as_fd(), stop.as_fd()], -1)?;
        if stopped {
            return Ok(());
        }
        watch.uffd.read_batch(&mut buffer)?;
        resolved.clear();
        while let Some(event) = buffer.pop() {
            // Other events are told where the descriptor was made to; reading them is what they need.
            let Event::Pagefault { kind, rw, addr, .. } = event? else { continue };
            let page = addr.addr() / page_size();
            // Who waits for the same page has been woken. Lifting its protection a second time might undo one that was
            // put there since.
            if !resolved.contains(&page) {
                watch.resolve(kind, rw, addr)?;
                resolved.push(page);
            }
        }
    }
}
