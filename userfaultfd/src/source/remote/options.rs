//! How patient a source is, and how much it asks for at once.

use std::time::Duration;

/// How a remote object is read. The defaults are made for page faults, behind which a thread waits: a retry comes soon, and
/// a read gives up while the program can still react.
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
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of requests at a time, each on a connection and a thread of its own, which are made when they are needed:
    /// 32, at least 1. Other reads wait, those for faults before those ahead.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(1);
        self
    }

    /// How long one request may take, from its beginning to the last byte: 5 seconds.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// How long a read is tried, with all its requests, before it is an error: 10 seconds. The pager's own
    /// [retries](crate::pager::RetryPolicy) come after that.
    #[must_use]
    pub fn give_up_after(mut self, time: Duration) -> Self {
        self.give_up_after = time;
        self
    }

    /// How long the first retry waits: 10 milliseconds. Each further one waits twice as long, at most a second, and never
    /// less than the server says by `Retry-After`.
    #[must_use]
    pub fn retry_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay;
        self
    }

    /// Whether a read for a fault asks a second time when the answer takes longer than usual, and takes the answer that
    /// comes first: yes. It costs some percent of requests, and saves the slowest ones.
    #[must_use]
    pub fn hedge(mut self, hedge: bool) -> Self {
        self.hedge = hedge;
        self
    }

    /// Reads that wait for a connection become one request where no more than `gap` bytes are between them, 64 KiB, and
    /// the request has no more than `len` bytes, 1 MiB. A `len` of 0 merges none.
    #[must_use]
    pub fn merge(mut self, gap: u64, len: u64) -> Self {
        (self.merge_gap, self.merge_len) = (gap, len);
        self
    }
}

/// What a source has asked for so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemoteStatistics {
    /// Requests that were sent, of all kinds.
    pub requests: u64,
    /// Requests that came after one that failed.
    pub retries: u64,
    /// Second requests for what took longer than usual.
    pub hedges: u64,
    /// Reads that another's request brought along.
    pub merged: u64,
    /// Bytes that were asked for.
    pub bytes: u64,
}
