//! How patient a source is, and how much it asks for at once.

use std::time::Duration;

/// Options of a source that reads a remote object: timeouts, retries, number and size of requests. The defaults are made
/// for page faults, during which a thread waits: a retry comes soon, and a read fails while the program can still react.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteOptions {
    pub(super) connections: usize,
    pub(super) request_timeout: Duration,
    pub(super) give_up_after: Duration,
    pub(super) first_delay: Duration,
    pub(super) hedge: bool,
    pub(super) merge_gap: u64,
    pub(super) merge_len: u64,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            connections: 32,
            request_timeout: Duration::from_secs(5),
            give_up_after: Duration::from_secs(10),
            first_delay: Duration::from_millis(10),
            hedge: true,
            merge_gap: 64 << 10,
            merge_len: 1 << 20,
        }
    }
}

impl RemoteOptions {
    /// Returns the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the maximum number of requests at a time, each on a connection and a thread of its own, which are created when
    /// they are needed. The default is 32, the minimum 1. Further reads wait; those for faults go before those ahead.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(1);
        self
    }

    /// Sets how long one request may take, from its beginning to the last byte. The default is 5 seconds.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Sets how long a read may take with all its requests before it fails. The default is 10 seconds. The pager's own
    /// [retries](crate::pager::RetryPolicy) come after that.
    #[must_use]
    pub fn give_up_after(mut self, time: Duration) -> Self {
        self.give_up_after = time;
        self
    }

    /// Sets the delay before the first retry. The default is 10 milliseconds. The delay doubles before each further retry, up
    /// to a second, and is never less than the server demands by `Retry-After`.
    #[must_use]
    pub fn retry_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay;
        self
    }

    /// Sets whether a read for a fault sends a second request when the response takes longer than usual, and takes the
    /// response that comes first. The default is `true`: some percent more requests, without the slowest responses.
    #[must_use]
    pub fn hedge(mut self, hedge: bool) -> Self {
        self.hedge = hedge;
        self
    }

    /// Sets which reads that wait for a connection become one request: those with at most `gap` bytes between them, as long
    /// as the request has at most `len` bytes. The defaults are 64 KiB and 1 MiB. With a `len` of 0 none are merged.
    #[must_use]
    pub fn merge(mut self, gap: u64, len: u64) -> Self {
        (self.merge_gap, self.merge_len) = (gap, len);
        self
    }
}

/// Statistics of the requests of a remote source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemoteStatistics {
    /// Requests that were sent, of all kinds.
    pub requests: u64,
    /// Requests that came after one that failed.
    pub retries: u64,
    /// Second requests, sent because a response took longer than usual.
    pub hedges: u64,
    /// Reads that were part of another read's request.
    pub merged: u64,
    /// Bytes that were requested.
    pub bytes: u64,
}
