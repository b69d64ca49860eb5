//! The thread that resolves faults in `Sync` mode.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::error::errno_of;
use crate::owner::{InheritedFd, abandon};
use crate::watch::Watch;
use crate::{Error, Event, EventBuffer, Result, page_size, sys};

/// Messages read by one call: a buffer of 2 KiB; more threads rarely wait at once.
const EVENTS_PER_READ: usize = 64;

/// The thread that resolves faults. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct FaultThread {
    /// The owner's end: a byte written to it makes the thread stop.
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    /// The thread's end, while it is open.
    stopped: Arc<InheritedFd>,
}

impl FaultThread {
    pub(crate) fn start(watch: &Arc<Watch>) -> Result<Self> {
        watch.uffd.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair().map_err(|error| system_error(&error))?;
        let watch = Arc::clone(watch);
        let number = Arc::new(InheritedFd::new(stopped.as_fd()));
        let of_thread = Arc::clone(&number);
        let serve = move || {
            if let Err(error) = serve(&watch, &stopped) {
                // No thread must wait for ever. Every later call reports that the tracker has failed.
                watch.fail(&error);
                for tracked in watch.ranges().iter() {
                    if let Err(error) = watch.untrack_at_work(&tracked.range) {
                        watch.fail(&error);
                    }
                }
            }
            of_thread.forget();
        };
        let thread = thread::Builder::new().name("userfaultfd".into()).spawn(serve);
        Ok(Self { stop, thread: Some(thread.map_err(|error| system_error(&error))?), stopped: number })
    }

    /// In a forked child, which doesn't have the thread: closes the descriptors that the thread shared.
    #[expect(unsafe_code, reason = "closes what the thread has a share of")]
    pub(crate) fn abandon(mut self, watch: &Arc<Watch>) {
        std::mem::forget(self.thread.take());
        abandon(watch);
        for fd in
            [&self.stopped, &InheritedFd::new(watch.uffd.as_fd()), &InheritedFd::new(watch.pagemap.as_fd())]
        {
            // SAFETY: this is a child, without the thread that owned its end, which forgets the number before it closes
            // it; and the tracker, which is being dropped here, kept the watch open, which is dropped no more.
            unsafe { fd.close() };
        }
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // If the write fails, the other end is closed: the thread has ended.
            let told = self.stop.write_all(&[0]);
            debug_assert!(told.is_ok() || thread.is_finished());
            // The thread doesn't panic.
            drop(thread.join());
        }
    }
}

fn system_error(error: &io::Error) -> Error {
    Error::SystemError(errno_of(error))
}

fn serve(watch: &Watch, stop: &UnixStream) -> Result<()> {
    let mut buffer = EventBuffer::new(EVENTS_PER_READ);
    let mut resolved = Vec::with_capacity(EVENTS_PER_READ);
    loop {
        let [_, stopped] = sys::wait_readable([watch.uffd.as_fd(), stop.as_fd()], -1)?;
        if stopped {
            return Ok(());
        }
        watch.uffd.read_batch(&mut buffer)?;
        resolved.clear();
        while let Some(event) = buffer.pop() {
            // Other events come where the descriptor was made with them; reading them is all they need.
            let Event::Pagefault { kind, rw, addr, .. } = event? else { continue };
            let page = addr.addr() / page_size();
            // The other waiters for this page were woken with it. Lifting the protection a second time might undo one
            // that was set since.
            if !resolved.contains(&page) {
                watch.resolve(kind, rw, addr)?;
                resolved.push(page);
            }
        }
    }
}
