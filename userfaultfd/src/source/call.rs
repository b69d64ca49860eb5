//! Calling a source, which is code of the program and may panic.

use std::any::Any;
use std::io;
use std::panic::{self, AssertUnwindSafe};

/// Calls a source, and turns its panic into an error.
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    panic::catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|panic| Err(io::Error::other(format!("the source panicked: {}", message(&*panic)))))
}

/// The message of a panic.
pub(crate) fn message(panic: &(dyn Any + Send)) -> &str {
    let message = panic.downcast_ref::<&str>().copied();
    message.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("something")
}
