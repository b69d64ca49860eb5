//! Starting a thread of the pager's, and waiting for its end.

use std::io;
use std::thread::{self, JoinHandle};

use crate::sys;

/// Starts a thread of the pager's, which takes no signal of the program's.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        sys::block_signals();
        run();
    })
}

/// Waits for a thread of the pager's, unless it is this one: a source, or a callback, may end what the thread belongs to.
/// Then it ends by itself.
pub(crate) fn join(thread: JoinHandle<()>) {
    if thread.thread().id() != thread::current().id() {
        // A panic has been reported.
        let _panicked = thread.join();
    }
}
