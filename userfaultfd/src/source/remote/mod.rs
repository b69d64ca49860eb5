//! Objects behind a network. All that isn't of one protocol is here once: the queue of reads, what is merged, retried
//! and asked twice, and when a read gives up ([`engine`]); how it is told ([`options`], [`error`]). A protocol is a
//! [`Fetch`](engine::Fetch).

mod engine;
mod error;
#[cfg(feature = "http")]
mod http;
#[cfg(feature = "object-store")]
mod object;
#[cfg(feature = "object-store")]
mod object_writer;
mod options;

pub use error::RemoteError;
#[cfg(feature = "http")]
pub use http::{HttpSource, HttpSourceBuilder};
#[cfg(feature = "object-store")]
pub use object::{ObjectSource, ObjectSourceBuilder};
#[cfg(feature = "object-store")]
pub use object_writer::ObjectWriter;
pub use options::{RemoteOptions, RemoteStatistics};

/// Locks past the panic of another thread: what is guarded here is whole at every moment.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
