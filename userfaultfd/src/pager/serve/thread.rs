//! Starting a thread of the pager's.

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
