//! How a page gets in: a fault is claimed, its content loaded and installed, and what has to wait is retried.

pub(crate) mod ahead_queue;
pub(crate) mod buffers;
pub(crate) mod context;
pub(crate) mod fault;
pub(crate) mod filler;
pub(crate) mod growth;
pub(crate) mod install;
pub(crate) mod lease;
pub(crate) mod load;
pub(crate) mod retry;
pub(crate) mod work;
